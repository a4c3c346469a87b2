//! The control plane's facade: a directory of layers with its catalog, and what can be done to it.
//!
//! Every method may block (files, database) and may be called from any thread; commands are serialised inside.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::units::{LayerId, StoreId};
use crate::volume::Volume;

/// How to open a store.
#[derive(Clone, Debug, Default)]
pub struct StoreOptions {
    /// Open data files with O_DIRECT where the file system can.
    pub direct_io: bool,
    /// Use the pread/pwrite engine even where io_uring works.
    pub no_io_uring: bool,
}

/// What a new volume starts from.
#[derive(Clone, Debug)]
pub enum VolumeSource {
    /// An empty disk of this size in bytes (a multiple of 512).
    Size(u64),
    /// A raw image, used in place, never written.
    Base(PathBuf),
    /// A snapshot of a volume.
    Snapshot {
        /// The volume that the snapshot was taken of.
        volume: String,
        /// The snapshot's name.
        snapshot: String,
    },
}

/// How a volume is attached to a front-end, remembered over restarts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// The absolute path of the vhost-user socket.
    pub socket: PathBuf,
    /// How many virtqueues are offered.
    pub queues: u16,
    /// Whether the guest may only read.
    pub read_only: bool,
}

/// What there is to say about a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Layers from the base to the active one, both counted.
    pub depth: usize,
    /// The active layer.
    pub active: LayerId,
    /// Bytes that the active layer takes on the host.
    pub active_allocated_bytes: u64,
    /// The raw base at the bottom, if there is one.
    pub base: Option<PathBuf>,
    /// Its attachment, if it has one.
    pub attachment: Option<Attachment>,
    /// Why it takes no more writes.
    pub failure: Option<String>,
    /// When it was created: nanoseconds since 1970.
    pub created_ns: u64,
    /// How many snapshots it has.
    pub snapshots: usize,
}

/// What there is to say about a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// The volume it was taken of.
    pub volume: String,
    /// Its name.
    pub name: String,
    /// The sealed layer it stands for.
    pub layer: LayerId,
    /// Equal for all snapshots of one instant.
    pub group: uuid::Uuid,
    /// The instant: nanoseconds since 1970.
    pub created_ns: u64,
    /// The size of the disk in bytes.
    pub size_bytes: u64,
    /// Bytes that the layer takes on the host.
    pub allocated_bytes: u64,
}

/// Which volumes a snapshot is taken of.
#[derive(Clone, Debug)]
pub enum Selection {
    /// These, at one instant.
    Volumes(Vec<String>),
    /// All of the store, at one instant.
    All,
}

/// What a snapshot did.
#[derive(Clone, Debug)]
pub struct SnapshotReport {
    /// The new snapshots, one a volume, all of one instant.
    pub snapshots: Vec<SnapshotInfo>,
    /// The longest that any worker was kept from guest requests by it.
    pub stall_max: Duration,
    /// The time from the command to the reply.
    pub elapsed: Duration,
    /// Bytes of maps written while sealing.
    pub bytes_written: u64,
}

/// A layer in the tree of a store.
#[derive(Clone, Debug)]
pub struct TreeNode {
    /// The layer.
    pub layer: LayerId,
    /// Its parent; `None` for a root.
    pub parent: Option<LayerId>,
    /// The raw image it stands for, if it is one.
    pub base: Option<PathBuf>,
    /// Snapshots that name it: (volume, snapshot).
    pub snapshots: Vec<(String, String)>,
    /// The volume whose active layer it is.
    pub active_of: Option<String>,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Bytes it takes on the host.
    pub allocated_bytes: u64,
    /// When it was created: nanoseconds since 1970.
    pub created_ns: u64,
}

/// A store, open and locked. Dropping it writes nothing: what was flushed is safe already.
#[derive(Debug)]
pub struct Store {}

fn unfinished() -> Error {
    Error::Busy {
        what: "unfinished".into(),
    }
}

impl Store {
    /// Opens the store in `dir`, creating an empty one if there is none, and takes its lock.
    ///
    /// # Errors
    /// `Busy` with the holder's pid if another daemon has it; `Unsupported` for a newer format; `Corrupt`; `Io`.
    pub fn open(dir: &Path, options: StoreOptions) -> Result<Self> {
        let _ = (dir, options);
        Err(unfinished())
    }

    /// The store's name.
    pub fn id(&self) -> StoreId {
        StoreId(uuid::Uuid::nil())
    }

    /// Lines worth a log entry since the last call: what recovery dropped, which fall-backs were taken.
    pub fn notes(&self) -> Vec<String> {
        Vec::new()
    }

    /// Creates a volume. Durable on return.
    ///
    /// # Errors
    /// `Invalid`, `Exists`, `NotFound`, `Io` (a full disk): nothing is left behind.
    pub fn create_volume(&self, name: &str, source: &VolumeSource) -> Result<VolumeInfo> {
        let _ = (name, source);
        Err(unfinished())
    }

    /// All volumes, by name.
    pub fn volumes(&self) -> Vec<VolumeInfo> {
        Vec::new()
    }

    /// One volume.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn volume_info(&self, name: &str) -> Result<VolumeInfo> {
        let _ = name;
        Err(unfinished())
    }

    /// Deletes a volume with its snapshots. Layers that clones need stay, unnamed.
    ///
    /// # Errors
    /// `NotFound`; `Busy` while it is attached or open.
    pub fn delete_volume(&self, name: &str) -> Result<()> {
        let _ = name;
        Err(unfinished())
    }

    /// Remembers how a volume is attached (`None`: not at all). Durable on return. Does not touch any socket.
    ///
    /// # Errors
    /// `NotFound`; `Busy` if the socket path belongs to another volume.
    pub fn set_attachment(&self, name: &str, attachment: Option<Attachment>) -> Result<()> {
        let _ = (name, attachment);
        Err(unfinished())
    }

    /// Opens a volume for requests: builds its resolve table. All openers share one.
    ///
    /// # Errors
    /// `NotFound`, `BaseChanged`, `Corrupt`, `Io`.
    pub fn open_volume(&self, name: &str) -> Result<Arc<Volume>> {
        let _ = name;
        Err(unfinished())
    }

    /// Takes a snapshot of one or more volumes at one instant, while guests run. Whole and durable on return.
    ///
    /// # Errors
    /// `Invalid`, `NotFound`, `Exists`, `Failed`, `Io`.
    pub fn snapshot(&self, name: &str, selection: &Selection) -> Result<SnapshotReport> {
        let _ = (name, selection);
        Err(unfinished())
    }

    /// The snapshots of one volume, or all, oldest first.
    ///
    /// # Errors
    /// `NotFound` for an unknown volume.
    pub fn snapshots(&self, volume: Option<&str>) -> Result<Vec<SnapshotInfo>> {
        let _ = volume;
        Err(unfinished())
    }

    /// The tree of layers, parents before children; of one volume (its chain, and what branches off it) or all.
    ///
    /// # Errors
    /// `NotFound` for an unknown volume.
    pub fn tree(&self, volume: Option<&str>) -> Result<Vec<TreeNode>> {
        let _ = volume;
        Err(unfinished())
    }

    /// Makes everything written to all open volumes durable: the last act before an orderly exit.
    ///
    /// # Errors
    /// The first failure, after all volumes were tried.
    pub fn flush_all(&self) -> Result<()> {
        Err(unfinished())
    }
}
