//! What the control plane can be asked to do, free of HTTP: each command checks its request, changes the store or the
//! attachments, and tells the listeners.
//!
//! Every method may block (files, database, a front-end that drains) and runs on a thread for that. A command that fails
//! leaves everything as it was. Once begun it runs to its end, whether or not its client is still there.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use stratablk_layers as layers;
use stratablk_layers::store::{self, Selection, Store, VolumeSource};

use crate::provider::StoredDisk;

use super::attachments::{Attachments, Source, Terms};
use super::convert::{self, path_text};
use super::error::{ApiError, Result};
use super::events::{Events, Happening};
use super::socket::PATH_BYTES_MAX;
use super::types::{
    AttachmentRequest, AttachmentState, CacheFigures, Deleted, QUEUES_MAX, SnapshotList,
    SnapshotReport, SnapshotRequest, Stats, Status, Tree, Volume, VolumeList, VolumeRequest,
};

/// The daemon as its commands see it.
#[derive(Debug)]
pub struct Commands {
    /// The store.
    store: Arc<Store>,
    /// Its directory, absolute.
    dir: PathBuf,
    /// What is served now.
    attachments: Attachments,
    /// Where changes are told.
    events: Arc<Events>,
    /// When the daemon started.
    started: Instant,
}

impl Commands {
    /// The commands on an open store. `workers_max` bounds the worker threads of each attachment.
    pub fn new(store: Store, dir: PathBuf, workers_max: usize) -> Self {
        let events = Arc::new(Events::default());
        let attachments = Attachments::new(workers_max, Arc::clone(&events));
        Self {
            store: Arc::new(store),
            dir,
            attachments,
            events,
            started: Instant::now(),
        }
    }

    /// Where changes are told.
    pub const fn events(&self) -> &Arc<Events> {
        &self.events
    }

    /// What is served now.
    pub const fn attachments(&self) -> &Attachments {
        &self.attachments
    }

    /// The daemon itself.
    pub fn status(&self) -> Status {
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            store_id: self.store.id().to_string(),
            store: path_text(&self.dir),
            uptime_s: self.started.elapsed().as_secs(),
            volumes: u64::try_from(self.store.volumes().len()).unwrap_or(u64::MAX),
            connected: u64::try_from(self.attachments.connected()).unwrap_or(u64::MAX),
        }
    }

    /// What the cache and the volumes have done.
    pub fn stats(&self) -> Stats {
        let volumes = self.volumes().volumes.into_iter();
        Stats {
            cache: self.cache(),
            volumes: volumes.map(convert::figures).collect(),
        }
    }

    /// What the cache has done.
    pub fn cache(&self) -> CacheFigures {
        convert::cache(&self.store.cache_stats())
    }

    /// All volumes, by name.
    pub fn volumes(&self) -> VolumeList {
        let volumes = self.store.volumes().into_iter();
        VolumeList {
            volumes: volumes.map(|info| self.view(info)).collect(),
        }
    }

    /// One volume.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn volume(&self, name: &str) -> Result<Volume> {
        Ok(self.view(self.store.volume_info(name)?))
    }

    /// A volume with its attachment. Every remembered attachment is in the table as well, served or failed.
    fn view(&self, info: store::VolumeInfo) -> Volume {
        let attachment = self.attachments.view(&info.name);
        convert::volume(info, attachment)
    }

    /// Creates a volume.
    ///
    /// # Errors
    /// `Invalid`, `Exists`, `NotFound`, `NoSpace`, `Io`.
    pub fn create_volume(&self, request: VolumeRequest) -> Result<Volume> {
        let source = match (request.size_bytes, request.base, request.from) {
            (Some(bytes), None, None) => VolumeSource::Size(bytes),
            (None, Some(path), None) => VolumeSource::Base(absolute("base", path)?),
            (None, None, Some(from)) => VolumeSource::Snapshot {
                volume: from.volume,
                snapshot: from.snapshot,
            },
            _ => {
                return Err(ApiError::invalid(
                    "size_bytes",
                    "give exactly one of size_bytes, base and from",
                ));
            }
        };
        self.create(&request.name, &source)
    }

    /// Creates a volume from a source that is known to be whole.
    ///
    /// # Errors
    /// `Invalid`, `Exists`, `NotFound`, `NoSpace`, `Io`.
    pub fn create(&self, name: &str, source: &VolumeSource) -> Result<Volume> {
        let info = self
            .store
            .create_volume(name, source)
            .map_err(|error| match error {
                // The layers say "size" as the command line does; the field of the request tells its unit.
                layers::Error::Invalid { field: "size", .. } => {
                    ApiError::from(error).of("size_bytes")
                }
                error => error.into(),
            })?;
        tracing::info!(volume = %info.name, bytes = info.size_bytes, "created");
        self.events.tell(Happening::VolumeCreated {
            volume: info.name.clone(),
        });
        Ok(self.view(info))
    }

    /// Deletes a volume with its snapshots.
    ///
    /// # Errors
    /// `NotFound`; `Busy` while it is attached.
    pub fn delete_volume(&self, name: &str) -> Result<Deleted> {
        if let Some(attachment) = self.attachments.view(name) {
            return Err(ApiError::busy(format!(
                "volume {name:?} is attached to {}; detach it first",
                attachment.socket
            )));
        }
        self.store.delete_volume(name)?;
        tracing::info!(volume = %name, "deleted");
        self.events.tell(Happening::VolumeDeleted {
            volume: name.to_owned(),
        });
        Ok(Deleted {
            deleted: name.to_owned(),
        })
    }

    /// Serves a volume on a socket, now and after every restart. Asking again for what is there already does nothing.
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
        let served = self.attachments.view(name).filter(|view| {
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
        self.start(name, source, queues, read_only, || {
            Ok(self.store.set_attachment(name, Some(wanted))?)
        })?;
        self.volume(name)
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
        let disk = Arc::new(StoredDisk::new(Arc::clone(&self.store), name)?);
        self.attachments
            .start(disk, source, queues, read_only, commit)?;
        tracing::info!(volume = %name, queues, read_only, "attached");
        Ok(())
    }

    /// Stops serving a volume, now and for good.
    ///
    /// # Errors
    /// `NotFound` if there is no such volume or it is not attached; `Io`.
    pub fn detach(&self, name: &str) -> Result<Volume> {
        self.store.volume_info(name)?;
        // Forgotten last, since that also flushes and closes the volume, which its guest must have left by then.
        self.attachments
            .stop(name, || match self.store.set_attachment(name, None) {
                // Forgotten all the same; the volume shows its failure.
                Err(layers::Error::Failed { volume, cause }) => {
                    tracing::error!(%volume, "detached after a failure: {cause}");
                    Ok(())
                }
                done => Ok(done?),
            })?;
        tracing::info!(volume = %name, "detached");
        self.volume(name)
    }

    /// Serves every volume that is remembered as attached, except `but`. One that cannot be served is reported and
    /// shown as failed; the others go on.
    pub fn attach_remembered(&self, but: Option<&str>) {
        for info in self.store.volumes() {
            let Some(remembered) = info.attachment.filter(|_| Some(info.name.as_str()) != but)
            else {
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

    /// Takes a snapshot.
    ///
    /// # Errors
    /// `Invalid`, `NotFound`, `Exists`, `Failed`, `NoSpace`, `Io`.
    pub fn snapshot(&self, request: SnapshotRequest) -> Result<SnapshotReport> {
        let selection = match (request.all, request.volumes.is_empty()) {
            (true, true) => Selection::All,
            (false, false) => Selection::Volumes(request.volumes),
            (true, false) => {
                return Err(ApiError::invalid(
                    "all",
                    "give either volumes or all, not both",
                ));
            }
            (false, true) => {
                return Err(ApiError::invalid(
                    "volumes",
                    "name at least one volume, or set all",
                ));
            }
        };
        let report =
            self.store
                .snapshot(&request.name, &selection)
                .map_err(|error| match error {
                    // The layers say "snapshot" as the command line does.
                    layers::Error::Invalid {
                        field: "snapshot", ..
                    } => ApiError::from(error).of("name"),
                    error => error.into(),
                })?;
        let report = convert::report(report);
        let volumes: Vec<_> = report.snapshots.iter().map(|s| s.volume.clone()).collect();
        tracing::info!(
            snapshot = %request.name, volumes = %volumes.join(","),
            elapsed_ns = report.elapsed_ns, stall_max_ns = report.stall_max_ns, "taken"
        );
        self.events.tell(Happening::SnapshotCreated {
            snapshot: request.name,
            volumes,
        });
        Ok(report)
    }

    /// The snapshots of one volume, or all, oldest first.
    ///
    /// # Errors
    /// `NotFound` for an unknown volume.
    pub fn snapshots(&self, volume: Option<&str>) -> Result<SnapshotList> {
        let snapshots = self.store.snapshots(volume)?.into_iter();
        Ok(SnapshotList {
            snapshots: snapshots.map(convert::snapshot).collect(),
        })
    }

    /// The tree of layers of one volume, or all.
    ///
    /// # Errors
    /// `NotFound` for an unknown volume.
    pub fn tree(&self, volume: Option<&str>) -> Result<Tree> {
        let layers = self.store.tree(volume)?.into_iter();
        Ok(Tree {
            layers: layers.map(convert::tree_node).collect(),
        })
    }

    /// Writes what the store has to say into the log: what recovery dropped, which fall-backs were taken.
    pub fn log_notes(&self) {
        for note in self.store.notes() {
            tracing::warn!("{note}");
        }
    }

    /// Does the store's upkeep (checkpoints of long journals) until `close`; for a thread of its own.
    pub fn maintain(&self) {
        while self.store.maintain() {
            self.log_notes();
        }
    }

    /// The last act: stops serving, then makes everything durable.
    ///
    /// # Errors
    /// The first failure, after everything was tried.
    pub fn close(&self) -> Result<()> {
        self.attachments.stop_all();
        let flushed = self.store.finish();
        self.store.close();
        self.log_notes();
        Ok(flushed?)
    }
}

/// A path of a request, which must be absolute: the daemon's working directory is not its client's.
fn absolute(field: &str, path: String) -> Result<PathBuf> {
    let path = PathBuf::from(path);
    if !path.is_absolute() {
        return Err(ApiError::invalid(
            field,
            format!("{path:?} must be an absolute path"),
        ));
    }
    Ok(path)
}

/// The path of a new vhost-user socket.
fn socket_path(text: String) -> Result<PathBuf> {
    let path = absolute("socket", text)?;
    check_socket_path(&path)?;
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
