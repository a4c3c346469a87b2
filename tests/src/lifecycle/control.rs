//! Commands over the control socket without a process for each: on a machine with two CPUs, starting one would be a good part
//! of what is measured.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value as Json, json};

use crate::daemon::DEADLINE;

/// A command.
#[derive(Clone, Debug)]
pub struct Command {
    /// What it is called where figures are printed.
    pub name: &'static str,
    /// The method.
    method: &'static str,
    /// Path and query.
    target: String,
    /// Its arguments.
    body: Json,
}

impl Command {
    /// A command.
    pub fn new(name: &'static str, method: &'static str, target: String, body: Json) -> Self {
        Self {
            name,
            method,
            target,
            body,
        }
    }

    /// Has it carried out.
    ///
    /// # Errors
    /// The reply, if it is not that all went well.
    pub fn run(&self, control: &Path) -> Result<String, String> {
        exchange(control, self.method, &self.target, &self.body)
    }
}

/// How many jobs there are that have not ended.
///
/// # Errors
/// The daemon does not say.
pub fn jobs_left(control: &Path) -> Result<usize, String> {
    let listed = exchange(control, "GET", "/v1/jobs", &Json::Null)?;
    let listed: Json = serde_json::from_str(&listed).map_err(|error| error.to_string())?;
    let jobs = listed["jobs"].as_array().ok_or("no list of jobs")?;
    let left = |job: &&Json| matches!(job["state"].as_str(), Some("queued" | "running"));
    Ok(jobs.iter().filter(left).count())
}

/// One request and its reply.
fn exchange(control: &Path, method: &str, target: &str, body: &Json) -> Result<String, String> {
    let failed = |error: std::io::Error| format!("{method} {target}: {error}");
    let mut stream = UnixStream::connect(control).map_err(failed)?;
    stream.set_read_timeout(Some(DEADLINE)).map_err(failed)?;
    let body = if body.is_null() {
        String::new()
    } else {
        body.to_string()
    };
    let request = format!(
        "{method} {target} HTTP/1.1\r\nhost: stratablk\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).map_err(failed)?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply).map_err(failed)?;
    let (head, body) = reply.split_once("\r\n\r\n").unwrap_or((&reply, ""));
    if head.starts_with("HTTP/1.1 2") {
        Ok(body.to_owned())
    } else {
        Err(format!("{method} {target}: {reply}"))
    }
}

/// One pass through the commands on a tree, after which it is as before, but for a disk that is larger and a number that
/// was used: of a volume that a guest uses, and of one that nobody uses.
pub fn pass([volume, unused]: [&str; 2], pass: u64, bytes: u64) -> Vec<Command> {
    let [first, second, third, both] = ["a", "b", "d", "e"].map(|name| format!("{name}{pass}"));
    let [clone, running] = ["c", "f"].map(|name| format!("{name}{pass}"));
    let snapshot = |name, volumes: &[&str], snapshot: &str| {
        let body = json!({ "name": snapshot, "volumes": volumes });
        Command::new(name, "POST", "/v1/snapshots".into(), body)
    };
    let delete = |name, volume: &str, snapshot: &str, how: &str| {
        let target = format!("/v1/snapshots/{volume}/{snapshot}{how}");
        Command::new(name, "DELETE", target, Json::Null)
    };
    let gone = |name, volume: &str| {
        let target = format!("/v1/volumes/{volume}");
        Command::new(name, "DELETE", target, Json::Null)
    };
    let change = |name, volume: &str, body| {
        Command::new(name, "PATCH", format!("/v1/volumes/{volume}"), body)
    };
    let create = |name, body| Command::new(name, "POST", "/v1/volumes".into(), body);
    let look = |name, target: String| Command::new(name, "GET", target, Json::Null);
    vec![
        snapshot("snapshot create", &[volume], &first),
        create(
            "clone of a snapshot",
            json!({ "name": clone, "from": { "volume": volume, "snapshot": first } }),
        ),
        snapshot("snapshot create", &[volume], &second),
        delete(
            "snapshot delete --push-down",
            volume,
            &first,
            "?push_down=true",
        ),
        gone("volume delete", &clone),
        snapshot("snapshot create", &[volume], &third),
        delete("snapshot delete", volume, &second, ""),
        delete("snapshot delete, in place", volume, &third, "?way=down"),
        snapshot("snapshot create, of a group", &[volume, unused], &both),
        look("diff", format!("/v1/diff?from={volume}@{both}")),
        Command::new(
            "snapshot restore",
            "POST",
            format!("/v1/volumes/{unused}/restore"),
            json!({ "snapshot": both, "only": true }),
        ),
        delete("snapshot delete", volume, &both, ""),
        delete("snapshot delete", unused, &both, ""),
        change("volume resize", volume, json!({ "size_bytes": bytes })),
        create(
            "clone of a running volume",
            json!({ "name": running, "from": { "volume": volume } }),
        ),
        Command::new(
            "flatten",
            "POST",
            format!("/v1/volumes/{running}/flatten"),
            json!({}),
        ),
        gone("volume delete, flattened", &running),
        change("volume set --type", unused, json!({ "type": "immutable" })),
        change("volume set --type", unused, json!({ "type": "normal" })),
        look("tree", "/v1/tree".into()),
        look("du", "/v1/usage".into()),
    ]
}
