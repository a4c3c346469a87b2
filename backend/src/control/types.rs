//! The types of the control API, as they travel over the socket: shared by the server and the command line.
//!
//! Requests refuse fields they do not know, so that a misspelt option never passes silently. Replies always carry all
//! their fields (`null` where there is nothing to say), and clients must accept fields they do not know.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::timestamp::Timestamp;

/// How many virtqueues an attachment offers unless told otherwise. A front-end may use fewer but never more, and QEMU
/// asks for one queue a virtual CPU by default, so this is generous: a queue that is not used costs nothing.
pub const QUEUES_DEFAULT: u16 = 8;
/// The most virtqueues that an attachment offers.
pub const QUEUES_MAX: u16 = 64;

/// The default of [`AttachmentRequest::queues`], for serde.
const fn queues_default() -> u16 {
    QUEUES_DEFAULT
}

/// A snapshot of a volume, written `VOLUME@SNAPSHOT` on the command line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRef {
    /// The volume that the snapshot was taken of.
    pub volume: String,
    /// The snapshot's name.
    pub snapshot: String,
}

impl fmt::Display for SnapshotRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.volume, self.snapshot)
    }
}

impl FromStr for SnapshotRef {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('@') {
            Some((volume, snapshot)) if !volume.is_empty() && !snapshot.is_empty() => Ok(Self {
                volume: volume.to_owned(),
                snapshot: snapshot.to_owned(),
            }),
            _ => Err("write VOLUME@SNAPSHOT, for example web@before-upgrade"),
        }
    }
}

/// A request for a new volume: a name and exactly one of the three sources.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeRequest {
    /// The new volume's name: letters, digits, `.`, `_` and `-`, 1 to 64 bytes, not starting with `.` or `-`.
    pub name: String,
    /// An empty disk of this size in bytes, a multiple of 512.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// The absolute path of a raw image, used in place and never written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// A snapshot to start from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<SnapshotRef>,
}

/// A request to serve a volume to a front-end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachmentRequest {
    /// The absolute path of the vhost-user socket to listen on.
    pub socket: String,
    /// How many virtqueues to offer.
    #[serde(default = "queues_default")]
    #[schema(default = 8, minimum = 1, maximum = 64)]
    pub queues: u16,
    /// Whether the guest may only read.
    #[serde(default)]
    pub read_only: bool,
}

/// A request for a snapshot: a name, and either a list of volumes or all of them. All are cut at one instant.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// The new snapshot's name, by the rules of volume names.
    pub name: String,
    /// The volumes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<String>,
    /// All volumes of the store.
    #[serde(default)]
    pub all: bool,
}

/// Restricts a list to one volume.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct VolumeFilter {
    /// Only what belongs to this volume.
    pub volume: Option<String>,
}

/// Where an attachment stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AttachmentState {
    /// Listening; no front-end is connected.
    Listening,
    /// A front-end is connected.
    Connected,
    /// Being set up or taken down by another command.
    Changing,
    /// Could not be set up; see `error`.
    Failed,
}

/// What a volume's guest has asked for since it was attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RequestCounts {
    /// Read requests.
    pub reads: u64,
    /// Write requests.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Discards and writes of zeroes.
    pub discards: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Requests that ended with an error.
    pub errors: u64,
}

/// How a volume is attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Attachment {
    /// The path of the vhost-user socket, or `fd N` for one that the daemon was started with.
    pub socket: String,
    /// How many virtqueues are offered.
    pub queues: u16,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// Where it stands.
    pub state: AttachmentState,
    /// Virtqueues that the guest has started.
    pub rings_running: u64,
    /// Why it failed.
    pub error: Option<String>,
    /// What the guest has asked for.
    pub requests: RequestCounts,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// The size of the disk in bytes.
    pub size_bytes: u64,
    /// Layers from the base to the active one, both counted.
    pub depth: u64,
    /// The path of the raw image at the bottom, if there is one.
    pub base: Option<String>,
    /// The layer that takes all writes.
    pub active_layer: String,
    /// Bytes that the active layer takes on the host.
    pub allocated_bytes: u64,
    /// How many snapshots it has.
    pub snapshots: u64,
    /// When it was created.
    #[schema(value_type = String, format = DateTime)]
    pub created: Timestamp,
    /// Why it takes no more writes; `null` while all is well.
    pub failure: Option<String>,
    /// How it is attached; `null` if it is not.
    pub attachment: Option<Attachment>,
}

/// All volumes of the store, by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeList {
    /// The volumes.
    pub volumes: Vec<Volume>,
}

/// What a deletion removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Deleted {
    /// The name that is free again.
    pub deleted: String,
}

/// A snapshot of one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    /// Its name.
    pub name: String,
    /// The volume it was taken of.
    pub volume: String,
    /// The instant.
    #[schema(value_type = String, format = DateTime)]
    pub created: Timestamp,
    /// Equal for all snapshots of one instant.
    pub group: String,
    /// The sealed layer it stands for.
    pub layer: String,
    /// The size of the disk in bytes.
    pub size_bytes: u64,
    /// Bytes that the layer takes on the host.
    pub allocated_bytes: u64,
}

/// Snapshots, oldest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotList {
    /// The snapshots.
    pub snapshots: Vec<Snapshot>,
}

/// What taking a snapshot did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotReport {
    /// The new snapshots, one a volume, all of one instant.
    pub snapshots: Vec<Snapshot>,
    /// The time from the command to the reply, in nanoseconds.
    pub elapsed_ns: u64,
    /// The longest that any guest request was kept waiting by it, in nanoseconds.
    pub stall_max_ns: u64,
    /// Bytes of maps written.
    pub bytes_written: u64,
}

/// A layer in the tree of a store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TreeNode {
    /// The layer.
    pub layer: String,
    /// The layer below it; `null` for a root.
    pub parent: Option<String>,
    /// The path of the raw image that it stands for, if it is one.
    pub base: Option<String>,
    /// The snapshots that name it.
    pub snapshots: Vec<SnapshotRef>,
    /// The volume whose active layer it is.
    pub active_of: Option<String>,
    /// The size of the disk in bytes.
    pub size_bytes: u64,
    /// Bytes that it takes on the host.
    pub allocated_bytes: u64,
    /// When it was created.
    #[schema(value_type = String, format = DateTime)]
    pub created: Timestamp,
}

/// The layers of a store, parents before children.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Tree {
    /// The layers.
    pub layers: Vec<TreeNode>,
}

/// The daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// The store's name.
    pub store_id: String,
    /// The store's directory.
    pub store: String,
    /// Seconds since the daemon started.
    pub uptime_s: u64,
    /// How many volumes the store has.
    pub volumes: u64,
    /// How many of them have a front-end.
    pub connected: u64,
}

/// What the sector cache has and has done since the daemon started. Clusters are of 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CacheFigures {
    /// Bytes that it can hold.
    pub size_bytes: u64,
    /// Bytes of clusters that it holds.
    pub used_bytes: u64,
    /// Bytes of clusters that were written and are not safely in the files yet.
    pub dirty_bytes: u64,
    /// Clusters read from it.
    pub hits: u64,
    /// Clusters that had to be read from files.
    pub misses: u64,
    /// Clusters kept in it after that.
    pub fills: u64,
    /// Clusters read from files and not kept.
    pub bypasses: u64,
    /// Clusters written to it.
    pub writes: u64,
    /// Clusters written from it to the files.
    pub write_backs: u64,
    /// Clusters that had to make room for others.
    pub evictions: u64,
    /// Copies made again because somebody wrote to the cluster meanwhile.
    pub retries: u64,
    /// Requests put aside until there was room or the cluster was free.
    pub parks: u64,
}

/// What the guest of a volume has asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeFigures {
    /// The volume.
    pub name: String,
    /// Where its attachment stands; `null` if it has none.
    pub state: Option<AttachmentState>,
    /// The requests since it was attached; `null` if it is not.
    pub requests: Option<RequestCounts>,
}

/// What the daemon has done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Stats {
    /// The cache that all volumes share.
    pub cache: CacheFigures,
    /// The volumes, by name.
    pub volumes: Vec<VolumeFigures>,
}

/// What kind of thing went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// A field of the request cannot be as it is.
    Invalid,
    /// No such volume, snapshot, attachment or route.
    NotFound,
    /// The name is taken.
    Exists,
    /// Something else is in the way; the message says what to do.
    Busy,
    /// The daemon is overloaded or about to exit.
    Unavailable,
    /// The raw image under a volume is not the one it was created from.
    BaseChanged,
    /// The volume takes no more writes since an earlier failure.
    Failed,
    /// The host has no space left.
    NoSpace,
    /// The host refused to read or write.
    Io,
    /// A file of the store is damaged.
    Corrupt,
    /// A file of the store was written by a newer version.
    Unsupported,
    /// A fault of the daemon itself.
    Internal,
}

/// Why a request was refused or failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    /// What kind of thing went wrong.
    pub kind: ErrorKind,
    /// The field of the request that it is about, where there is one.
    pub field: Option<String>,
    /// What is wrong and what to do, in a sentence.
    pub message: String,
}

/// The body of every reply that is not a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorDetail,
}
