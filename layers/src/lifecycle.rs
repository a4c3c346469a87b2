//! What the commands on the tree of layers take and give back: restore, delete, clone, merge, resize, compare.

use std::time::Duration;

use crate::catalog::{JobId, JobKind, Way};
use crate::store::{SnapshotInfo, VolumeInfo};
use crate::units::{LayerId, SectorRange};

/// How to restore.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RestoreOptions {
    /// What was written since is kept as a snapshot of this name, on each of the volumes.
    pub keep: Option<String>,
    /// Only the volume that was named, although the snapshot was taken of a group.
    pub only: bool,
}

/// What a restore did.
#[derive(Clone, Debug)]
pub struct RestoreReport {
    /// The volumes that were restored: all of the snapshot's group, or one.
    pub volumes: Vec<String>,
    /// What was written since, where it was kept.
    pub kept: Vec<SnapshotInfo>,
    /// The time from the command to the reply.
    pub elapsed: Duration,
}

/// What a recovery of a volume that had failed did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecoverReport {
    /// Why it had failed.
    pub cause: String,
    /// Bytes that were written again.
    pub written_bytes: u64,
    /// Bytes that the host cannot read: the guest gets errors for them until it writes there.
    pub unreadable_bytes: u64,
    /// Where these are; not more than a thousand of them.
    pub unreadable: Vec<SectorRange>,
}

/// How to delete a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeleteOptions {
    /// Copy its data into each of several children, so that nothing of it stays.
    pub push_down: bool,
    /// Move its data into the user's base below it, which is written.
    pub into_base: bool,
    /// The way the data has to go; `None`: the cheaper one.
    pub way: Option<Way>,
    /// At most so many bytes a second, also for a job that is made later, when the layers are no longer at work; but not for
    /// one that is made after the store was closed.
    pub rate: Option<u64>,
}

/// What it would cost to move data one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WayCost {
    /// The way.
    pub way: Way,
    /// Bytes to be copied.
    pub bytes: u64,
    /// Bytes of space needed on top, at most, at any time.
    pub space: u64,
    /// How long it takes, as far as can be told from earlier jobs; a guess.
    pub estimate: Duration,
    /// Whether it is the one that would be taken.
    pub chosen: bool,
}

/// What becomes of a layer whose name goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Nothing needs it: its files are removed at once, which frees so many bytes.
    Removed {
        /// Bytes that are freed.
        frees: u64,
    },
    /// It stays without a name until one child is left.
    Kept {
        /// How many layers lie directly over it.
        children: usize,
    },
    /// Another snapshot or volume names it as well, or a job of another kind needs it.
    Named,
    /// It is joined with its only child, or copied into its children.
    Joined {
        /// The child, or the first of them.
        child: LayerId,
        /// The ways there are.
        ways: Vec<WayCost>,
    },
}

/// What deleting a snapshot does, or would do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeleteReport {
    /// The snapshot.
    pub volume: String,
    /// Its name.
    pub snapshot: String,
    /// Its layer.
    pub layer: LayerId,
    /// What becomes of that.
    pub fate: Fate,
    /// The jobs that were begun; none in a dry run.
    pub jobs: Vec<JobId>,
}

/// Where a job has got to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Waits for its turn.
    Queued,
    /// At work.
    Running,
    /// Waits for a `resume`.
    Paused,
    /// Has ended well.
    Done,
    /// Was cancelled.
    Cancelled,
    /// Has failed; a `resume` tries again.
    Failed,
}

/// What there is to say about a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobInfo {
    /// Its name.
    pub id: JobId,
    /// What it is for.
    pub kind: JobKind,
    /// What people know it by: "web@before-upgrade", or a volume's name.
    pub subject: String,
    /// Which way the data goes.
    pub way: Way,
    /// Where it has got to.
    pub phase: Phase,
    /// Why it failed.
    pub error: Option<String>,
    /// Bytes copied since it began, or since the daemon started.
    pub bytes_done: u64,
    /// Bytes to be copied in all, as far as is known.
    pub bytes_total: u64,
    /// Bytes a second, lately.
    pub speed: u64,
    /// At most so many bytes a second.
    pub rate: Option<u64>,
    /// When it was created: nanoseconds since 1970.
    pub created_ns: u64,
    /// When it ended: nanoseconds since 1970.
    pub ended_ns: Option<u64>,
    /// What a scrub has found so far; `None` of other jobs.
    pub scrub: Option<ScrubReport>,
}

/// What a scrub has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubReport {
    /// Layers to be looked at in all.
    pub layers_total: u64,
    /// Layers that were looked at to their end.
    pub layers: u64,
    /// Bytes of data that were read.
    pub bytes: u64,
    /// Layers that had no checksums, or none that could be used: they have now, and are held against them the next time.
    pub taken: u64,
    /// Clusters that were damaged and were mended from the cache.
    pub mended: u64,
    /// Bytes that are damaged.
    pub bad_bytes: u64,
    /// Where these are.
    pub bad: Vec<BadLayer>,
    /// Layers whose checksums were damaged, in part or whole.
    pub damaged_sums: Vec<LayerId>,
    /// Layers that could not be looked at, and why: the first of them.
    pub left_out: Vec<(LayerId, String)>,
    /// How many these are.
    pub left_out_total: u64,
    /// Whether the host's page cache could not be gone past for some of the data.
    pub through_page_cache: bool,
}

impl ScrubReport {
    /// What is not well, in words.
    pub fn failure(&self) -> Option<String> {
        let mut parts = Vec::new();
        if self.bad_bytes > 0 {
            let layers = self.bad.len();
            parts.push(format!(
                "{} bytes of {layers} layers are damaged",
                self.bad_bytes
            ));
        }
        if !self.damaged_sums.is_empty() {
            let layers = self.damaged_sums.len();
            parts.push(format!("the checksums of {layers} layers were damaged"));
        }
        if self.left_out_total > 0 {
            let layers = self.left_out_total;
            parts.push(format!("{layers} layers could not be looked at"));
        }
        (!parts.is_empty()).then(|| parts.join("; "))
    }
}

/// A layer with damaged data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadLayer {
    /// The layer.
    pub layer: LayerId,
    /// The volumes over it, and its snapshots as "volume@snapshot".
    pub volumes: Vec<String>,
    /// Bytes that are damaged.
    pub bytes: u64,
    /// Where these are: the first runs of them.
    pub ranges: Vec<SectorRange>,
}

/// How to change the size of a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResizeOptions {
    /// Allow a smaller size.
    pub shrink: bool,
    /// Allow it even if written sectors are cut off.
    pub force: bool,
}

/// What a multiattach volume gave out.
#[derive(Clone, Debug)]
pub struct Given {
    /// The volume that was made for the attachment.
    pub volume: VolumeInfo,
    /// Whether it is new.
    pub new: bool,
}

/// The content of a disk at one time: a volume as it is now, or one of its snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Point {
    /// The volume.
    pub volume: String,
    /// The snapshot; `None`: what was flushed up to now.
    pub snapshot: Option<String>,
}

/// A run of sectors that may differ between two points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiffRange {
    /// The sectors.
    pub range: SectorRange,
    /// Whether they are zeroes, or not allocated, at the second point.
    pub zero: bool,
}

/// What a volume takes on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// The volume.
    pub volume: String,
    /// Bytes of layers that deleting the volume with its snapshots would free.
    pub exclusive: u64,
    /// Bytes of layers that others need as well. A base is among them.
    pub shared: u64,
    /// Bytes of the user's base, which is never part of the store.
    pub base: u64,
}
