//! Snapshots: taking, listing, restoring, deleting, comparing.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::super::timestamp::Timestamp;
use super::jobs::{Direction, Job};

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

/// A request to make a volume hold what a snapshot of it holds.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreRequest {
    /// The snapshot. If it was taken of several volumes, all of them are restored.
    pub snapshot: String,
    /// Keep what was written since as a snapshot of this name; otherwise it is thrown away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<String>,
    /// Only the volume that is named, although the snapshot was taken of several.
    #[serde(default)]
    pub only: bool,
}

/// What a restore did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RestoreReport {
    /// The volumes that were restored.
    pub volumes: Vec<String>,
    /// The snapshot.
    pub snapshot: String,
    /// What was written since, where it was kept.
    pub kept: Vec<Snapshot>,
    /// The time from the command to the reply, in nanoseconds.
    pub elapsed_ns: u64,
}

/// How to delete a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct DeleteQuery {
    /// Only say what would happen and what it would cost.
    #[serde(default)]
    pub dry_run: bool,
    /// Copy its data into each of several children, so that nothing of it stays.
    #[serde(default)]
    pub push_down: bool,
    /// Move its data into the raw image below it, which is written then.
    #[serde(default)]
    pub into_base: bool,
    /// The way its data has to go; the cheaper one if not given.
    pub way: Option<MergeWay>,
    /// The limit of the jobs that begin, in bytes a second.
    pub rate_bytes_per_s: Option<u64>,
}

/// The way that a client can choose for the data of a snapshot that is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum MergeWay {
    /// Its data goes into its child.
    Up,
    /// The data of its child goes into it, and it becomes the child.
    Down,
}

/// What it costs to move data one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WayCost {
    /// The way.
    pub way: Direction,
    /// Bytes to be copied.
    pub bytes: u64,
    /// Bytes of space that are needed on top, at most, at any time.
    pub space_bytes: u64,
    /// How long it takes, as far as can be told from earlier jobs, in milliseconds.
    pub estimate_ms: u64,
    /// Whether it is the one that is taken.
    pub chosen: bool,
}

/// What becomes of the data of a snapshot whose name goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Fate {
    /// Nothing needs it: it is removed at once.
    Removed {
        /// Bytes that are freed.
        frees_bytes: u64,
    },
    /// It stays without a name until one child is left.
    Kept {
        /// How many layers lie directly over it.
        children: u64,
    },
    /// Another snapshot or volume needs it as it is.
    Named,
    /// It is joined with its only child, or copied into its children.
    Joined {
        /// The child, or the first of them: a layer.
        child: String,
        /// What people know the child by.
        child_name: String,
        /// The ways there are.
        ways: Vec<WayCost>,
    },
}

/// What deleting a snapshot did, or would do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DeleteReport {
    /// The volume.
    pub volume: String,
    /// The snapshot.
    pub snapshot: String,
    /// Its layer.
    pub layer: String,
    /// Whether nothing was done.
    pub dry_run: bool,
    /// What becomes of its data.
    pub fate: Fate,
    /// The jobs that were begun; none in a dry run.
    pub jobs: Vec<Job>,
}

/// What to compare.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct DiffQuery {
    /// `VOLUME@SNAPSHOT`, or `VOLUME` for what it holds now.
    pub from: String,
    /// The same; the volume of `from` as it is now if not given.
    pub to: Option<String>,
}

/// A line of a comparison: a range that may differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiffLine {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// How long it is, in bytes.
    pub length: u64,
    /// Whether it reads as zeroes at the second point.
    pub zero: bool,
}
