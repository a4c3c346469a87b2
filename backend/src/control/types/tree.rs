//! The tree of layers.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::super::timestamp::Timestamp;
use super::jobs::Job;
use super::snapshots::SnapshotRef;
use super::volumes::VolumeType;

/// What a layer is to people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum NodeKind {
    /// A raw image.
    Base,
    /// The current state of a volume: takes its writes.
    Active,
    /// Named by snapshots.
    Snapshot,
    /// What immutable or multiattach volumes start from.
    Content,
    /// Without a name; needed by what lies over it, or about to be joined with it.
    Unnamed,
}

/// A layer in the tree of a store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TreeNode {
    /// The layer.
    pub layer: String,
    /// The layer below it; `null` for a root.
    pub parent: Option<String>,
    /// What it is.
    pub kind: NodeKind,
    /// The path of the raw image that it stands for, if it is one.
    pub base: Option<String>,
    /// The snapshots that name it.
    pub snapshots: Vec<SnapshotRef>,
    /// The volume whose active layer it is.
    pub active_of: Option<String>,
    /// The type of that volume.
    pub active_type: Option<VolumeType>,
    /// Immutable and multiattach volumes that start from it.
    pub content_of: Vec<String>,
    /// The job that takes from it or gives to it; see `jobs`.
    pub job: Option<u64>,
    /// The size of the disk in bytes.
    pub size_bytes: u64,
    /// Bytes that it takes on the host.
    pub allocated_bytes: u64,
    /// Bytes of its data that a scrub found damaged; reads of them fail.
    #[serde(default)]
    pub bad_bytes: u64,
    /// When it was created.
    #[schema(value_type = String, format = DateTime)]
    pub created: Timestamp,
}

/// The layers of a store, parents before children.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Tree {
    /// The layers.
    pub layers: Vec<TreeNode>,
    /// The jobs that layers name.
    pub jobs: Vec<Job>,
}
