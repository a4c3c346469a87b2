//! From the types of the layers to those of the control API, field by field, so that neither binds the other.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use stratablk_layers::cache::{CacheStats, FRAME_BYTES};
use stratablk_layers::catalog::{self, VolumeKind, Way};
use stratablk_layers::lifecycle::{self, JobInfo, Phase};
use stratablk_layers::store;
use stratablk_layers::units::{LayerId, SECTOR_BYTES};

use super::timestamp::Timestamp;
use super::types::{
    Attachment, BadLayer, ByteRange, CacheFigures, DeleteReport, DiffLine, Direction, Fate, Job,
    JobKind, JobState, LeftOut, NodeKind, RestoreReport, ScrubReport, Snapshot, SnapshotRef,
    SnapshotReport, Tree, TreeNode, Usage, Volume, VolumeFigures, VolumeType, WayCost,
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
        kind: volume_type(info.kind),
        attached_from: info.attached_from,
        size_bytes: info.size_bytes,
        depth: count(info.depth),
        base: info.base.as_deref().map(path_text),
        active_layer: info.active.to_string(),
        allocated_bytes: info.active_allocated_bytes,
        snapshots: count(info.snapshots),
        created: Timestamp(info.created_ns),
        failure: info.failure,
        no_space: info.no_space,
        bad_bytes: info.bad_bytes,
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

/// The type of a volume.
pub const fn volume_type(kind: VolumeKind) -> VolumeType {
    match kind {
        VolumeKind::Normal => VolumeType::Normal,
        VolumeKind::Immutable => VolumeType::Immutable,
        VolumeKind::Writethrough => VolumeType::Writethrough,
        VolumeKind::Multiattach => VolumeType::Multiattach,
        VolumeKind::Readonly => VolumeType::Readonly,
    }
}

/// The type of a volume, the other way.
pub const fn kind(kind: VolumeType) -> VolumeKind {
    match kind {
        VolumeType::Normal => VolumeKind::Normal,
        VolumeType::Immutable => VolumeKind::Immutable,
        VolumeType::Writethrough => VolumeKind::Writethrough,
        VolumeType::Multiattach => VolumeKind::Multiattach,
        VolumeType::Readonly => VolumeKind::Readonly,
    }
}

/// What a volume takes.
pub fn usage(usage: lifecycle::Usage) -> Usage {
    Usage {
        volume: usage.volume,
        exclusive_bytes: usage.exclusive,
        shared_bytes: usage.shared,
        base_bytes: usage.base,
    }
}

/// What a restore did.
pub fn restored(report: lifecycle::RestoreReport, snapshot_name: String) -> RestoreReport {
    RestoreReport {
        volumes: report.volumes,
        snapshot: snapshot_name,
        kept: report.kept.into_iter().map(snapshot).collect(),
        elapsed_ns: nanoseconds(report.elapsed),
    }
}

/// Which way data goes.
const fn direction(way: Way) -> Direction {
    match way {
        Way::Up => Direction::Up,
        Way::Down => Direction::Down,
        Way::InPlace => Direction::InPlace,
        Way::Copy => Direction::Copy,
    }
}

/// What a way costs.
fn way_cost(cost: &lifecycle::WayCost) -> WayCost {
    WayCost {
        way: direction(cost.way),
        bytes: cost.bytes,
        space_bytes: cost.space,
        estimate_ms: u64::try_from(cost.estimate.as_millis()).unwrap_or(u64::MAX),
        chosen: cost.chosen,
    }
}

/// What deleting a snapshot did, or would do.
pub fn deleted(
    report: lifecycle::DeleteReport,
    child_name: String,
    jobs: Vec<Job>,
    dry_run: bool,
) -> DeleteReport {
    let fate = match report.fate {
        lifecycle::Fate::Removed { frees } => Fate::Removed { frees_bytes: frees },
        lifecycle::Fate::Kept { children } => Fate::Kept {
            children: count(children),
        },
        lifecycle::Fate::Named => Fate::Named,
        lifecycle::Fate::Joined { child, ways } => Fate::Joined {
            child: child.to_string(),
            child_name,
            ways: ways.iter().map(way_cost).collect(),
        },
    };
    DeleteReport {
        volume: report.volume,
        snapshot: report.snapshot,
        layer: report.layer.to_string(),
        dry_run,
        fate,
        jobs,
    }
}

/// A range that may differ.
pub const fn diff_line(range: lifecycle::DiffRange) -> DiffLine {
    DiffLine {
        offset: range.range.start.0.saturating_mul(SECTOR_BYTES),
        length: range.range.count.saturating_mul(SECTOR_BYTES),
        zero: range.zero,
    }
}

/// A job.
pub fn job(info: JobInfo) -> Job {
    let left = info.bytes_total.saturating_sub(info.bytes_done);
    let remaining_s = (info.phase == Phase::Running)
        .then(|| left.checked_div(info.speed))
        .flatten();
    Job {
        id: info.id.0,
        kind: match info.kind {
            catalog::JobKind::Merge => JobKind::Merge,
            catalog::JobKind::PushDown => JobKind::PushDown,
            catalog::JobKind::Flatten => JobKind::Flatten,
            catalog::JobKind::Import => JobKind::Import,
            catalog::JobKind::IntoBase => JobKind::IntoBase,
            catalog::JobKind::Scrub => JobKind::Scrub,
        },
        subject: info.subject,
        way: direction(info.way),
        state: match info.phase {
            Phase::Queued => JobState::Queued,
            Phase::Running => JobState::Running,
            Phase::Paused => JobState::Paused,
            Phase::Done => JobState::Done,
            Phase::Cancelled => JobState::Cancelled,
            Phase::Failed => JobState::Failed,
        },
        error: info.error,
        bytes_done: info.bytes_done,
        bytes_total: info.bytes_total,
        bytes_per_s: info.speed,
        rate_bytes_per_s: info.rate,
        remaining_s,
        created: Timestamp(info.created_ns),
        ended: info.ended_ns.map(Timestamp),
        scrub: info.scrub.map(scrub),
    }
}

/// What a scrub has found.
fn scrub(report: lifecycle::ScrubReport) -> ScrubReport {
    let bad = report.bad.into_iter().map(|bad| BadLayer {
        layer: bad.layer.to_string(),
        volumes: bad.volumes,
        bytes: bad.bytes,
        ranges: (bad.ranges.iter())
            .map(|range| ByteRange {
                offset: range.start.0.saturating_mul(SECTOR_BYTES),
                bytes: range.count.saturating_mul(SECTOR_BYTES),
            })
            .collect(),
    });
    let left_out = report.left_out.into_iter().map(|(layer, why)| LeftOut {
        layer: layer.to_string(),
        why,
    });
    ScrubReport {
        layers_total: report.layers_total,
        layers: report.layers,
        bytes: report.bytes,
        taken: report.taken,
        mended: report.mended,
        bad_bytes: report.bad_bytes,
        bad: bad.collect(),
        damaged_checksums: (report.damaged_sums.iter())
            .map(ToString::to_string)
            .collect(),
        left_out: left_out.collect(),
        through_page_cache: report.through_page_cache,
    }
}

/// The first digits of a layer's name, enough for people.
pub fn short(layer: LayerId) -> String {
    layer.to_string().chars().take(8).collect()
}

/// The tree of layers, with what volumes and jobs have to do with them.
pub fn tree(
    nodes: Vec<store::TreeNode>,
    volumes: Vec<store::VolumeInfo>,
    jobs: Vec<JobInfo>,
) -> Tree {
    let types: BTreeMap<String, VolumeType> = volumes
        .iter()
        .map(|info| (info.name.clone(), volume_type(info.kind)))
        .collect();
    // What volumes of these types start from lies under their active layer.
    let mut content: BTreeMap<LayerId, Vec<String>> = BTreeMap::new();
    for node in &nodes {
        let starts_anew = |volume: &&String| {
            matches!(
                types.get(*volume),
                Some(VolumeType::Immutable | VolumeType::Multiattach)
            )
        };
        if let Some(volume) = node.active_of.as_ref().filter(starts_anew)
            && let Some(parent) = node.parent
        {
            content.entry(parent).or_default().push(volume.clone());
        }
    }
    let named: BTreeSet<u64> = nodes.iter().filter_map(|node| Some(node.job?.0)).collect();
    let layers = nodes.into_iter().map(|node| {
        let content_of = content.remove(&node.layer).unwrap_or_default();
        let active_type = node.active_of.as_ref().and_then(|name| types.get(name));
        TreeNode {
            active_type: active_type.copied(),
            ..tree_node(node, content_of)
        }
    });
    Tree {
        layers: layers.collect(),
        jobs: jobs
            .into_iter()
            .filter(|job| named.contains(&job.id.0))
            .map(job)
            .collect(),
    }
}

/// A layer of the tree.
fn tree_node(node: store::TreeNode, content_of: Vec<String>) -> TreeNode {
    let kind = if node.base.is_some() {
        NodeKind::Base
    } else if node.active_of.is_some() {
        NodeKind::Active
    } else if !node.snapshots.is_empty() {
        NodeKind::Snapshot
    } else if !content_of.is_empty() {
        NodeKind::Content
    } else {
        NodeKind::Unnamed
    };
    let snapshots = node.snapshots.into_iter();
    TreeNode {
        layer: node.layer.to_string(),
        parent: node.parent.map(|parent| parent.to_string()),
        kind,
        base: node.base.as_deref().map(path_text),
        snapshots: snapshots
            .map(|(volume, snapshot)| SnapshotRef { volume, snapshot })
            .collect(),
        active_of: node.active_of,
        active_type: None,
        content_of,
        job: node.job.map(|id| id.0),
        size_bytes: node.size_bytes,
        allocated_bytes: node.allocated_bytes,
        bad_bytes: node.bad_bytes,
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
