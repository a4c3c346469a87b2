//! From the types of the layers to those of the control API, field by field, so that neither binds the other.

use std::path::Path;
use std::time::Duration;

use stratablk_layers::store;

use super::timestamp::Timestamp;
use super::types::{Attachment, Snapshot, SnapshotRef, SnapshotReport, TreeNode, Volume};

/// A path as text; a path that is not UTF-8 is shown with replacement characters.
pub fn path_text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// A count as it travels.
fn count(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

/// A duration as it travels.
fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A volume, with the attachment as the daemon knows it (which says more than the store remembers).
pub fn volume(info: store::VolumeInfo, attachment: Option<Attachment>) -> Volume {
    Volume {
        name: info.name,
        size_bytes: info.size_bytes,
        depth: count(info.depth),
        base: info.base.as_deref().map(path_text),
        active_layer: info.active.to_string(),
        allocated_bytes: info.active_allocated_bytes,
        snapshots: count(info.snapshots),
        created: Timestamp(info.created_ns),
        failure: info.failure,
        attachment,
    }
}

/// A snapshot.
pub fn snapshot(info: store::SnapshotInfo) -> Snapshot {
    Snapshot {
        name: info.name,
        volume: info.volume,
        created: Timestamp(info.created_ns),
        group: info.group.to_string(),
        layer: info.layer.to_string(),
        size_bytes: info.size_bytes,
        allocated_bytes: info.allocated_bytes,
    }
}

/// What taking a snapshot did.
pub fn report(report: store::SnapshotReport) -> SnapshotReport {
    SnapshotReport {
        snapshots: report.snapshots.into_iter().map(snapshot).collect(),
        elapsed_ns: nanoseconds(report.elapsed),
        stall_max_ns: nanoseconds(report.stall_max),
        bytes_written: report.bytes_written,
    }
}

/// A layer of the tree.
pub fn tree_node(node: store::TreeNode) -> TreeNode {
    let snapshots = node.snapshots.into_iter();
    TreeNode {
        layer: node.layer.to_string(),
        parent: node.parent.map(|parent| parent.to_string()),
        base: node.base.as_deref().map(path_text),
        snapshots: snapshots
            .map(|(volume, snapshot)| SnapshotRef { volume, snapshot })
            .collect(),
        active_of: node.active_of,
        size_bytes: node.size_bytes,
        allocated_bytes: node.allocated_bytes,
        created: Timestamp(node.created_ns),
    }
}
