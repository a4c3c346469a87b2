//! The daemon, and what it has done.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::volumes::{AttachmentState, RequestCounts};

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
    /// Bytes of all layers' data that scrubs found damaged; reads of them fail.
    #[serde(default)]
    pub bad_bytes: u64,
    /// Sealed layers whose checksums are to be taken still.
    #[serde(default)]
    pub layers_without_checksums: u64,
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
