//! From the types of the layers to those of the control API, field by field, so that neither binds the other.

use std::path::Path;
use std::time::Duration;

use stratablk_layers::cache::{CacheStats, FRAME_BYTES};
use stratablk_layers::store;

use super::timestamp::Timestamp;
use super::types::{
    Attachment, CacheFigures, Snapshot, SnapshotRef, SnapshotReport, TreeNode, Volume,
    VolumeFigures,
};

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

/// The figures of the cache.
pub const fn cache(stats: &CacheStats) -> CacheFigures {
    let tally = &stats.tally;
    CacheFigures {
        size_bytes: stats.bytes,
        used_bytes: stats.frames_used.saturating_mul(FRAME_BYTES),
        dirty_bytes: stats.frames_dirty.saturating_mul(FRAME_BYTES),
        hits: tally.hits,
        misses: tally.misses,
        fills: tally.fills,
        bypasses: tally.bypasses,
        writes: tally.writes,
        write_backs: stats.write_backs,
        evictions: tally.evictions,
        retries: tally.retries,
        parks: tally.parks,
    }
}

/// The figures of a volume.
pub fn figures(volume: Volume) -> VolumeFigures {
    let attachment = volume.attachment.as_ref();
    VolumeFigures {
        state: attachment.map(|attachment| attachment.state),
        requests: attachment.map(|attachment| attachment.requests),
        name: volume.name,
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

#[cfg(test)]
mod tests {
    use stratablk_layers::cache::access::Tally;

    use super::*;

    #[test]
    fn each_figure_of_the_cache_arrives_in_its_place() {
        let stats = CacheStats {
            bytes: 1 << 20,
            frames_used: 3,
            frames_dirty: 2,
            tally: Tally {
                hits: 11,
                misses: 12,
                fills: 13,
                bypasses: 14,
                evictions: 15,
                retries: 16,
                parks: 17,
                writes: 18,
            },
            write_backs: 19,
        };
        let expected = CacheFigures {
            size_bytes: 1 << 20,
            used_bytes: 12288,
            dirty_bytes: 8192,
            hits: 11,
            misses: 12,
            fills: 13,
            bypasses: 14,
            evictions: 15,
            retries: 16,
            parks: 17,
            writes: 18,
            write_backs: 19,
        };
        assert_eq!(cache(&stats), expected);
    }
}
