//! Attaching volumes to front-ends, now and after every restart.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use stratablk_layers as layers;
use stratablk_layers::catalog::VolumeKind;

use stratablk_layers::store;

use crate::provider::StoredDisk;

use super::super::attachments::{Source, Terms};
use super::super::convert::path_text;
use super::super::error::{ApiError, Result};
use super::super::socket::PATH_BYTES_MAX;
use super::super::types::{
    AttachmentRequest, AttachmentState, DetachQuery, Detached, QUEUES_MAX, Volume,
};
use super::{Commands, absolute, check_reach};
use crate::confine::reach::Want;

impl Commands {
    /// Serves a volume on a socket, now and after every restart. Asking again for what is there already does nothing.
    /// Of a multiattach volume a volume of its own is made for the attachment, served, and returned.
    ///
    /// # Errors
    /// `Invalid`, `NotFound`; `Busy` if the volume or the socket is in use; `BaseChanged`, `Corrupt`, `Io`.
    pub fn attach(&self, name: &str, request: AttachmentRequest) -> Result<Volume> {
        let wanted = store::Attachment {
            socket: socket_path(request.socket)?,
            queues: queues(request.queues)?,
            read_only: request.read_only,
        };
        let info = self.store.volume_info(name)?;
        if info.kind == VolumeKind::Multiattach {
            return self.attach_another(name, request.made.as_deref(), wanted);
        }
        if request.made.is_some() {
            let what = format!(
                "only an attachment of a multiattach volume gets one; {name:?} is another type"
            );
            return Err(ApiError::invalid("as", what));
        }
        self.attach_as(info, wanted)
    }

    /// Serves a volume that was made for this attachment of a multiattach volume, or makes one.
    fn attach_another(
        &self,
        name: &str,
        made: Option<&str>,
        wanted: store::Attachment,
    ) -> Result<Volume> {
        let known = self.store.volumes().into_iter().find(|info| {
            info.attached_from.as_deref() == Some(name)
                && info.attachment.as_ref() == Some(&wanted)
                && made.is_none_or(|made| info.name == made)
        });
        if let Some(info) = known {
            return self.attach_as(info, wanted);
        }
        let given = (self.store.give_attachment(name, made)).map_err(|error| match error {
            layers::Error::Exists { .. } => ApiError::from(error).of("as"),
            error => ApiError::from(error).renamed("name", "as"),
        })?;
        let made = given.volume.name.clone();
        let served = self.attach_as(given.volume, wanted);
        if served.is_err()
            && given.new
            && let Err(error) = self.store.take_attachment(&made, None)
        {
            tracing::error!(volume = %made, "stays, although it could not be attached: {error}");
        }
        served
    }

    /// Serves a volume on a socket, now and after every restart.
    fn attach_as(&self, info: store::VolumeInfo, wanted: store::Attachment) -> Result<Volume> {
        let name = info.name.clone();
        let served = self.attachments.view(&name).filter(|view| {
            matches!(
                view.state,
                AttachmentState::Listening | AttachmentState::Connected
            )
        });
        if served.is_some() && info.attachment.as_ref() == Some(&wanted) {
            return Ok(self.view(info));
        }
        // The socket first: if it cannot be had, nothing was promised yet.
        let source = Source::Path(wanted.socket.clone());
        let (queues, read_only) = (wanted.queues, wanted.read_only);
        self.start(&name, source, queues, read_only, || {
            Ok(self.store.set_attachment(&name, Some(wanted))?)
        })?;
        self.volume(&name)
    }

    /// Serves a volume without remembering it: how one-disk mode and restarts attach.
    ///
    /// # Errors
    /// `NotFound`; `Busy` if the volume or the socket is in use; `BaseChanged`, `Corrupt`, `Io`.
    pub fn serve(&self, name: &str, source: Source, queues: u16, read_only: bool) -> Result<()> {
        self.start(name, source, queues, read_only, || Ok(()))
    }

    /// Serves a volume that can be opened.
    fn start(
        &self,
        name: &str,
        source: Source,
        queues: u16,
        read_only: bool,
        commit: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let opened = self.store.open_volume(name);
        // Also when it failed: what recovery found says why.
        self.log_notes();
        // Only to see that it can be: who serves it opens it again for as long as rings run.
        drop(opened?);
        let disk = Arc::new(StoredDisk::new(
            Arc::clone(&self.store),
            name,
            Arc::clone(&self.opener),
        )?);
        self.attachments
            .start(disk, source, queues, read_only, commit)?;
        tracing::info!(volume = %name, queues, read_only, "attached");
        Ok(())
    }

    /// Stops serving a volume, now and for good. One that was made for an attachment of a multiattach volume goes with it,
    /// unless it is kept.
    ///
    /// # Errors
    /// `NotFound` if there is no such volume or it is not attached; `Invalid`, `Exists` for a name to keep it as; `Io`.
    pub fn detach(&self, name: &str, query: DetachQuery) -> Result<Detached> {
        let info = self.store.volume_info(name)?;
        let keep_as = query.keep_as.as_deref();
        self.check_detach(&info, keep_as)?;
        let made = info.attached_from.is_some();
        // Forgotten last, since that also flushes and closes the volume, which its guest must have left by then.
        self.attachments.stop(name, || {
            match self.store.set_attachment(name, None) {
                // Forgotten all the same; the volume shows its failure.
                Err(layers::Error::Failed { volume, cause }) => {
                    tracing::error!(%volume, "detached after a failure: {cause}");
                }
                done => done?,
            }
            if made {
                self.store.take_attachment(name, keep_as)?;
            }
            Ok(())
        })?;
        tracing::info!(volume = %name, "detached");
        let left = match (made, keep_as) {
            (true, None) => None,
            (true, Some(kept)) => Some(self.volume(kept)?),
            (false, _) => Some(self.volume(name)?),
        };
        Ok(Detached {
            detached: name.to_owned(),
            volume: left,
        })
    }

    /// Checks what can be checked before a volume is detached, so that a refusal changes nothing.
    fn check_detach(&self, info: &store::VolumeInfo, keep_as: Option<&str>) -> Result<()> {
        let name = &info.name;
        if info.kind == VolumeKind::Multiattach && self.attachments.view(name).is_none() {
            let volumes = self.store.volumes().into_iter();
            let made: Vec<String> = volumes
                .filter(|other| other.attached_from.as_ref() == Some(name))
                .map(|other| other.name)
                .collect();
            if !made.is_empty() {
                return Err(ApiError::busy(format!(
                    "volume {name:?} is multiattach and not attached itself; detach one of the volumes that were made for \
                     its attachments: {}",
                    made.join(", ")
                )));
            }
        }
        let Some(keep_as) = keep_as else {
            if info.attached_from.is_some() {
                self.store.check_no_snapshots(name)?;
            }
            return Ok(());
        };
        if info.attached_from.is_none() {
            let what = format!(
                "{name:?} was not made for an attachment of a multiattach volume; it stays anyway"
            );
            return Err(ApiError::invalid("keep_as", what));
        }
        layers::check_name("keep_as", keep_as)?;
        if keep_as != name && self.store.volume_info(keep_as).is_ok() {
            let taken = layers::Error::Exists {
                kind: "volume",
                name: keep_as.to_owned(),
            };
            return Err(ApiError::from(taken).of("keep_as"));
        }
        Ok(())
    }

    /// Serves every volume that is remembered as attached, except `but`. One that cannot be served is reported and
    /// shown as failed; the others go on.
    pub fn attach_remembered(&self, but: &[&str]) {
        for info in self.store.volumes() {
            let Some(remembered) = info.attachment.filter(|_| !but.contains(&&*info.name)) else {
                continue;
            };
            let (queues, read_only) = (remembered.queues, remembered.read_only);
            let terms = Terms {
                socket: path_text(&remembered.socket),
                queues,
                read_only,
            };
            let source = Source::Path(remembered.socket);
            if let Err(error) = self.serve(&info.name, source, queues, read_only) {
                tracing::error!(volume = %info.name, socket = %terms.socket, "not attached: {error}");
                self.attachments
                    .note_failure(&info.name, terms, error.to_string());
            }
        }
    }
}

/// The path of a new vhost-user socket.
fn socket_path(text: String) -> Result<PathBuf> {
    let path = absolute("socket", text)?;
    check_socket_path(&path)?;
    check_reach("socket", &path, Want::Socket)?;
    Ok(path)
}

/// Checks that front-ends can connect to a socket at this path.
///
/// # Errors
/// `Invalid`.
pub fn check_socket_path(path: &Path) -> Result<()> {
    use std::os::unix::ffi::OsStrExt;

    let bytes = path.as_os_str().as_bytes();
    if bytes.contains(&0) {
        return Err(ApiError::invalid("socket", "a path cannot hold a NUL byte"));
    }
    if bytes.len() > PATH_BYTES_MAX {
        return Err(ApiError::invalid(
            "socket",
            format!(
                "the path has {} bytes, a Unix socket allows {PATH_BYTES_MAX}; choose a shorter one",
                bytes.len()
            ),
        ));
    }
    Ok(())
}

/// How many virtqueues an attachment offers.
fn queues(wanted: u16) -> Result<u16> {
    if wanted == 0 || wanted > QUEUES_MAX {
        return Err(ApiError::invalid(
            "queues",
            format!("{wanted} is not between 1 and {QUEUES_MAX}"),
        ));
    }
    Ok(wanted)
}
