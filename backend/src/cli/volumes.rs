//! Commands on volumes.

use std::path::Path;

use hyper::Method;
use serde_json::json;

use super::args::{SourceArgs, VolumeCommand, WaitArgs};
use super::client::{Client, encoded};
use super::size::NewSize;
use super::{Done, Failure, absolute, filtered, jobs, output, progress, read, size, volume_target};
use crate::control::timestamp::Timestamp;
use crate::control::types::{
    AttachmentRequest, Detached, ErrorKind, Import, ImportRequest, Job, JobOptions, PointRef,
    Recovered, UsageList, Volume, VolumeChange, VolumeList, VolumeRequest, VolumeType,
};

/// Carries out a command on volumes.
pub(super) fn run(client: &Client, command: VolumeCommand, json: bool) -> Result<Done, Failure> {
    match command {
        VolumeCommand::Create { name, source, kind } => create(client, name, source, kind),
        VolumeCommand::List => {
            let json = client.call(Method::GET, "/v1/volumes", None)?;
            let text = output::volumes(&read::<VolumeList>(&json)?);
            Ok(Done::new(json, text))
        }
        VolumeCommand::Show { name } => {
            let json = client.call(Method::GET, &volume_target(&name), None)?;
            let text = output::volume(&read(&json)?, Timestamp::now());
            Ok(Done::new(json, text))
        }
        VolumeCommand::Set { name, kind } => {
            let change = VolumeChange {
                kind: Some(kind),
                ..VolumeChange::default()
            };
            let json = client.call(Method::PATCH, &volume_target(&name), Some(&json!(change)))?;
            Ok(Done::new(json, format!("volume {name} is {kind} now\n")))
        }
        VolumeCommand::Resize {
            name,
            size,
            shrink,
            force,
        } => resize(client, &name, size, (shrink, force)),
        VolumeCommand::Flatten { name, wait } => {
            let options = JobOptions {
                rate_bytes_per_s: wait.rate_bytes_per_s(),
            };
            let target = volume_target(&name) + "/flatten";
            let json_begun = client.call(Method::POST, &target, Some(&json!(options)))?;
            let job: Job = read(&json_begun)?;
            if !wait.wait {
                return Ok(Done::new(json_begun, jobs::begun(&[job])));
            }
            let ended = progress::wait(client, vec![job], json)?;
            let text = ended.iter().map(jobs::ended_line).collect();
            Ok(Done::new(json!(ended.first()), text))
        }
        VolumeCommand::Recover { name } => {
            let target = volume_target(&name) + "/recover";
            let json = client.call(Method::POST, &target, None)?;
            let text = recovered(&read(&json)?);
            Ok(Done::new(json, text))
        }
        VolumeCommand::Delete { name } => {
            let json = client.call(Method::DELETE, &volume_target(&name), None)?;
            Ok(Done::new(json, format!("volume {name} deleted\n")))
        }
        VolumeCommand::Attach {
            name,
            socket,
            queues,
            read_only,
            made,
        } => {
            let request = AttachmentRequest {
                socket: absolute("--socket", &socket)?,
                queues,
                read_only,
                made,
            };
            attach(client, &name, &request)
        }
        VolumeCommand::Detach { name, keep_as } => detach(client, &name, keep_as.as_deref()),
    }
}

/// Creates a volume.
pub(super) fn create(
    client: &Client,
    name: String,
    source: SourceArgs,
    kind: VolumeType,
) -> Result<Done, Failure> {
    let base = source
        .base
        .as_deref()
        .map(|path| absolute("--base", path))
        .transpose()?;
    let from = source.from.as_ref().map(PointRef::to_string);
    let request = VolumeRequest {
        name,
        kind,
        size_bytes: source.size,
        base,
        from: source.from,
    };
    let json = client.call(Method::POST, "/v1/volumes", Some(&json!(request)))?;
    let volume: Volume = read(&json)?;
    let over = match (&request.base, from) {
        (Some(base), _) => format!(" over {base}, which must not change from now on"),
        (None, Some(from)) => format!(" from {from}"),
        (None, None) => String::new(),
    };
    let what = match kind {
        VolumeType::Normal => "volume".to_owned(),
        kind => format!("{kind} volume"),
    };
    let size = size::show(volume.size_bytes);
    let text = format!("{what} {} of {size} created{over}\n", volume.name);
    Ok(Done::new(json, text))
}

/// Imports an image.
pub(super) fn import(
    client: &Client,
    image: &Path,
    name: String,
    wait: WaitArgs,
    json: bool,
) -> Result<Done, Failure> {
    let request = ImportRequest {
        name,
        image: absolute("FILE", image)?,
        rate_bytes_per_s: wait.rate_bytes_per_s(),
    };
    let begun = client.call(Method::POST, "/v1/imports", Some(&json!(request)))?;
    let mut import: Import = read(&begun)?;
    let size = size::show(import.volume.size_bytes);
    let mut text = format!(
        "volume {} of {size} created, and can be used; {} must stay as it is until the job has ended\n",
        request.name, request.image
    );
    if !wait.wait {
        text.push_str(&jobs::begun(&[import.job]));
        return Ok(Done::new(begun, text));
    }
    if let Some(ended) = progress::wait(client, vec![import.job.clone()], json)?.pop() {
        text = format!(
            "volume {} of {size} imported\n{}",
            request.name,
            jobs::ended_line(&ended)
        );
        import.job = ended;
    }
    Ok(Done::new(json!(import), text))
}

/// What a recovery did, and what is left to be done.
fn recovered(report: &Recovered) -> String {
    let mut text = format!(
        "volume {} takes writes again; {} were written once more\nit had failed: {}\n",
        report.volume,
        size::show(report.written_bytes),
        report.cause
    );
    if report.unreadable_bytes > 0 {
        let bytes = size::show(report.unreadable_bytes);
        text += &format!(
            "{bytes} cannot be read, and the guest gets errors there until it writes to them:\n"
        );
        for range in &report.unreadable {
            text += &format!("  {} bytes at byte {}\n", range.bytes, range.offset);
        }
    }
    text +=
        "what the host had lost by then is lost: look at the disk as after a power cut (fsck)\n";
    text
}

/// Changes the size of a volume.
fn resize(
    client: &Client,
    name: &str,
    size: NewSize,
    (shrink, force): (bool, bool),
) -> Result<Done, Failure> {
    let target = volume_target(name);
    let bytes = match size {
        NewSize::Exactly(bytes) => bytes,
        NewSize::More(more) => {
            let now: Volume = read(&client.call(Method::GET, &target, None)?)?;
            now.size_bytes.checked_add(more).ok_or_else(|| {
                Failure::of(ErrorKind::Invalid, "SIZE: more than 64 bits can count")
            })?
        }
    };
    let change = VolumeChange {
        size_bytes: Some(bytes),
        shrink,
        force,
        ..VolumeChange::default()
    };
    let json = client.call(Method::PATCH, &target, Some(&json!(change)))?;
    let volume: Volume = read(&json)?;
    let size = size::show(volume.size_bytes);
    let text = format!(
        "volume {name} has {size} now ({} bytes)\n",
        volume.size_bytes
    );
    Ok(Done::new(json, text))
}

/// Serves a volume.
fn attach(client: &Client, name: &str, request: &AttachmentRequest) -> Result<Done, Failure> {
    let target = volume_target(name) + "/attachment";
    let json = client.call(Method::PUT, &target, Some(&json!(request)))?;
    let volume: Volume = read(&json)?;
    let socket = volume.attachment.map(|a| a.socket).unwrap_or_default();
    let made = match volume.attached_from.filter(|_| volume.name != name) {
        Some(from) => format!(", made for this attachment of {from},"),
        None => String::new(),
    };
    let text = format!("volume {}{made} is served on {socket}\n", volume.name);
    Ok(Done::new(json, text))
}

/// Stops serving a volume.
fn detach(client: &Client, name: &str, keep_as: Option<&str>) -> Result<Done, Failure> {
    let mut target = volume_target(name) + "/attachment";
    if let Some(keep_as) = keep_as {
        target.push_str(&format!("?keep_as={}", encoded(keep_as)));
    }
    let json = client.call(Method::DELETE, &target, None)?;
    let detached: Detached = read(&json)?;
    let text = match detached.volume {
        None => format!("volume {name} detached and thrown away\n"),
        Some(volume) if volume.name != name => {
            format!("volume {name} detached, and kept as {}\n", volume.name)
        }
        Some(_) => format!("volume {name} detached\n"),
    };
    Ok(Done::new(json, text))
}

/// Tells what volumes take on the host.
pub(super) fn usage(client: &Client, volumes: Vec<String>) -> Result<Done, Failure> {
    let mut list = UsageList {
        volumes: Vec::new(),
    };
    if volumes.is_empty() {
        list = read(&client.call(Method::GET, "/v1/usage", None)?)?;
    }
    for name in volumes {
        let target = filtered("/v1/usage", Some(&name));
        let one: UsageList = read(&client.call(Method::GET, &target, None)?)?;
        list.volumes.extend(one.volumes);
    }
    Ok(Done::new(json!(list), output::usage(&list)))
}
