//! Jobs: what is done in the background.

use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use super::super::timestamp::Timestamp;
use super::volumes::ByteRange;

/// What a job is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum JobKind {
    /// Joins a layer that has no name any more with its only child.
    Merge,
    /// Copies a layer that has no name any more into one of its children.
    PushDown,
    /// Makes a volume independent of the layers below its active one.
    Flatten,
    /// Makes a volume independent of the image that it was imported from.
    Import,
    /// Moves the data of a layer into the raw image below it.
    IntoBase,
    /// Holds the data of sealed layers against their checksums.
    Scrub,
}

/// Which way the data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// From the lower layer into the upper one.
    Up,
    /// From the upper layer into the file of the lower one.
    Down,
    /// The upper layer goes on in the file of the lower one; only what lies between is copied.
    InPlace,
    /// Copied upwards; the lower layers stay as they are.
    Copy,
}

impl Direction {
    /// Its name, as in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
            Self::InPlace => "in-place",
            Self::Copy => "copy",
        }
    }
}

/// Where a job has got to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// Waits for its turn.
    Queued,
    /// At work.
    Running,
    /// Rests until it is resumed.
    Paused,
    /// Has ended well.
    Done,
    /// Was cancelled.
    Cancelled,
    /// Has failed; resuming it tries again.
    Failed,
}

impl JobState {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Queued,
        Self::Running,
        Self::Paused,
        Self::Done,
        Self::Cancelled,
        Self::Failed,
    ];

    /// Its name, as in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Done => "done",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }

    /// Whether nothing more happens unless somebody resumes it.
    pub const fn has_ended(self) -> bool {
        matches!(self, Self::Done | Self::Cancelled | Self::Failed)
    }
}

/// A job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Job {
    /// Its number; never used twice in a store.
    pub id: u64,
    /// What it is for.
    pub kind: JobKind,
    /// What it works on: `VOLUME@SNAPSHOT`, or a volume.
    pub subject: String,
    /// Which way the data goes.
    pub way: Direction,
    /// Where it has got to.
    pub state: JobState,
    /// Why it failed.
    pub error: Option<String>,
    /// Bytes that it has copied since it began, or since the daemon started.
    pub bytes_done: u64,
    /// Bytes to be copied in all, as far as is known.
    pub bytes_total: u64,
    /// Bytes a second, lately.
    pub bytes_per_s: u64,
    /// At most so many bytes a second; `null`: no limit.
    pub rate_bytes_per_s: Option<u64>,
    /// Seconds until it ends, as far as can be told.
    pub remaining_s: Option<u64>,
    /// When it was created.
    #[schema(value_type = String, format = DateTime)]
    pub created: Timestamp,
    /// When it ended.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub ended: Option<Timestamp>,
    /// What a scrub has found so far; `null` for other jobs.
    #[serde(default)]
    pub scrub: Option<ScrubReport>,
}

/// What a scrub has found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ScrubReport {
    /// Layers to be looked at in all.
    pub layers_total: u64,
    /// Layers that were looked at to their end.
    pub layers: u64,
    /// Bytes of data that were read.
    pub bytes: u64,
    /// Layers that had no checksums that could be used: these were taken now, so nothing is known of their data.
    pub taken: u64,
    /// Clusters of 4 KiB that were damaged and were mended from the cache.
    pub mended: u64,
    /// Bytes that are damaged; reads of them fail.
    pub bad_bytes: u64,
    /// Where these are.
    pub bad: Vec<BadLayer>,
    /// Layers whose checksums were damaged, in part or whole.
    pub damaged_checksums: Vec<String>,
    /// Layers that could not be looked at.
    pub left_out: Vec<LeftOut>,
    /// Whether some of the data came through the host's page cache, since the file system cannot do without.
    pub through_page_cache: bool,
}

/// A layer with damaged data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BadLayer {
    /// The layer.
    pub layer: String,
    /// The volumes over it, and snapshots as `VOLUME@SNAPSHOT`.
    pub volumes: Vec<String>,
    /// Bytes that are damaged.
    pub bytes: u64,
    /// Where these are: at most 1,000 runs.
    pub ranges: Vec<ByteRange>,
}

/// A layer that could not be looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LeftOut {
    /// The layer.
    pub layer: String,
    /// Why.
    pub why: String,
}

/// Which layers to hold against their checksums.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ScrubRequest {
    /// Those of this volume and its snapshots; without it those of all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<String>,
    /// The job's limit in bytes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_bytes_per_s: Option<u64>,
}

#[cfg(test)]
impl Job {
    /// A job that has copied a part, for tests.
    pub fn sample() -> Self {
        Self {
            id: 7,
            kind: JobKind::Merge,
            subject: "web@s1".into(),
            way: Direction::Up,
            state: JobState::Running,
            error: None,
            bytes_done: 43,
            bytes_total: 100,
            bytes_per_s: 0,
            rate_bytes_per_s: None,
            remaining_s: None,
            created: Timestamp(0),
            ended: None,
            scrub: None,
        }
    }
}

impl Job {
    /// How far it is, in percent: 100 only when it is done.
    pub fn percent(&self) -> u64 {
        if self.state == JobState::Done {
            return 100;
        }
        let done = u128::from(self.bytes_done) * 100;
        let percent = done.checked_div(u128::from(self.bytes_total)).unwrap_or(0);
        u64::try_from(percent).unwrap_or(99).min(99)
    }
}

/// The jobs that have not ended, and those that ended lately, by number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JobList {
    /// The jobs.
    pub jobs: Vec<Job>,
}

/// A change of a job.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JobChange {
    /// At most so many bytes a second; `null`: no limit.
    #[serde(deserialize_with = "given")]
    #[schema(required = true)]
    pub rate_bytes_per_s: Option<u64>,
}

/// A value that may be `null` but must be there.
fn given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    Option::deserialize(deserializer)
}

/// The options of a command that begins a job.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JobOptions {
    /// The job's limit in bytes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_bytes_per_s: Option<u64>,
}
