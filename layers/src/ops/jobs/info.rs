//! What is known of jobs while the store is open: how far they are, and how those ended that are in the catalog no more.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::catalog::{JobId, JobKind, JobRow, JobState};
use crate::lifecycle::{JobInfo, Phase};
use crate::store::now_ns;
use crate::units::LayerId;

use super::rate::Bucket;
use crate::ops::merge::Runner;
use crate::ops::scrub::Scrubs;

/// Jobs that have ended and are remembered.
const ENDED_MAX: usize = 100;
/// Bytes a second that a copy is taken for until one was timed.
const SPEED_GUESS: u64 = 200_000_000;
/// How long speeds are measured before they are told.
const SPEED_WINDOW: Duration = Duration::from_millis(500);
/// Bytes that are moved before they are committed: the bound of the space that a job needs on top.
pub(crate) const STEP_BYTES: u64 = 64 << 20;

/// The jobs of a store, as far as they are not in its catalog.
#[derive(Debug, Default)]
pub(crate) struct Jobs {
    /// Held for moments only.
    board: Mutex<Board>,
    /// Wakes who carries out jobs.
    changed: Condvar,
    /// Who carries out jobs: one at a time, for a step. Taken before the command lock.
    pub runner: Mutex<Runner>,
}

/// What is to be told of jobs.
#[derive(Debug)]
pub(crate) struct Board {
    /// Of jobs that were worked at since the store was opened.
    progress: HashMap<JobId, Progress>,
    /// Jobs that have ended, oldest first.
    ended: VecDeque<JobInfo>,
    /// The job at work.
    pub running: Option<JobId>,
    /// Bytes a second of the last copies.
    speed: u64,
    /// Whether the store is closed.
    pub closed: bool,
    /// Counts what happened to jobs, so that nobody sleeps over it.
    pub changes: u64,
    /// Bytes that are moved before they are committed.
    pub step_bytes: u64,
    /// Keeps the job at work to its rate.
    pub bucket: Bucket,
    /// Layers that are in no chain any more and that requests under way may still read.
    pub retiring: BTreeSet<LayerId>,
    /// The last wait for requests under way.
    pub pause: Duration,
    /// How many hold new jobs back.
    pub holders: usize,
    /// The rates to which layers are to be joined that no job joins yet.
    pub rates: HashMap<LayerId, u64>,
    /// While somebody does: jobs from this one on do not begin.
    pub held_from: Option<JobId>,
    /// Scrubs, which are in no catalog.
    pub scrubs: Scrubs,
}

impl Default for Board {
    fn default() -> Self {
        Self {
            progress: HashMap::new(),
            ended: VecDeque::new(),
            running: None,
            speed: SPEED_GUESS,
            closed: false,
            changes: 0,
            step_bytes: STEP_BYTES,
            bucket: Bucket::default(),
            retiring: BTreeSet::new(),
            pause: Duration::ZERO,
            holders: 0,
            rates: HashMap::new(),
            held_from: None,
            scrubs: Scrubs::default(),
        }
    }
}

/// How far a job is.
#[derive(Clone, Debug)]
struct Progress {
    /// What the catalog said of it last.
    row: JobRow,
    /// Bytes copied.
    done: u64,
    /// Bytes to be copied in all.
    total: u64,
    /// Bytes a second, lately.
    speed: u64,
    /// When the measurement began that is under way.
    since: Instant,
    /// Bytes copied since then.
    bytes: u64,
}

impl Jobs {
    /// What is to be told, whatever happened to an earlier holder of the lock.
    pub(crate) fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something has happened to jobs: who sleeps until then looks again.
    pub(crate) fn wake(&self) {
        self.board().changes += 1;
        self.changed.notify_all();
    }

    /// The store is closed.
    pub(crate) fn close(&self) {
        self.board().closed = true;
        self.changed.notify_all();
    }

    /// Sleeps until something has happened to jobs since `seen` was counted, at most so long.
    pub(crate) fn sleep(&self, seen: u64, at_most: Option<Duration>) {
        let mut board = self.board();
        let until = at_most.map(|time| Instant::now() + time);
        while !board.closed && board.changes == seen {
            board = match until {
                None => {
                    let waited = self.changed.wait(board);
                    waited.unwrap_or_else(PoisonError::into_inner)
                }
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return;
                    }
                    let waited = self.changed.wait_timeout(board, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

impl Board {
    /// A job is at work, with so much before it.
    pub(crate) fn began(&mut self, row: &JobRow, left: u64) {
        let progress = self.progress.entry(row.id).or_insert_with(|| Progress {
            row: row.clone(),
            done: 0,
            total: left,
            speed: 0,
            since: Instant::now(),
            bytes: 0,
        });
        progress.row = row.clone();
        progress.total = progress.done.saturating_add(left);
        progress.since = Instant::now();
        progress.bytes = 0;
        self.running = Some(row.id);
    }

    /// The job at work has copied so much.
    pub(crate) fn moved(&mut self, bytes: u64) {
        let Some(progress) = self.running.and_then(|id| self.progress.get_mut(&id)) else {
            return;
        };
        progress.done = progress.done.saturating_add(bytes);
        progress.total = progress.total.max(progress.done);
        progress.bytes = progress.bytes.saturating_add(bytes);
        let took = progress.since.elapsed();
        if took >= SPEED_WINDOW {
            let milliseconds = u64::try_from(took.as_millis()).unwrap_or(u64::MAX).max(1);
            progress.speed = progress.bytes.saturating_mul(1000) / milliseconds;
            progress.since = Instant::now();
            progress.bytes = 0;
            // What is limited says nothing of what is possible.
            if progress.row.rate.is_none() {
                self.speed = progress.speed.max(1);
            }
        }
    }

    /// A job is no longer in the catalog.
    pub(crate) fn ended(&mut self, id: JobId, phase: Phase) {
        if self.running == Some(id) {
            self.running = None;
        }
        let Some(progress) = self.progress.remove(&id) else {
            return;
        };
        self.remember(&progress.row.clone(), Some(progress), phase);
    }

    /// The same for a job that perhaps was never at work.
    pub(crate) fn ended_row(&mut self, row: &JobRow, phase: Phase) {
        if self.running == Some(row.id) {
            self.running = None;
        }
        let progress = self.progress.remove(&row.id);
        self.remember(row, progress, phase);
    }

    /// Keeps a job that has ended, and forgets the oldest one.
    fn remember(&mut self, row: &JobRow, progress: Option<Progress>, phase: Phase) {
        // However it ended: what it has changed, or was to change, may need checksums, and so may what it kept from them.
        if row.kind != JobKind::Scrub {
            self.scrubs.sealed.extend([row.source, row.target]);
        }
        let mut info = describe(row, progress.as_ref(), None);
        info.phase = phase;
        info.ended_ns = Some(now_ns());
        if phase == Phase::Done {
            info.bytes_total = info.bytes_done;
        }
        self.ended.push_back(info);
        while self.ended.len() > ENDED_MAX {
            self.ended.pop_front();
        }
    }

    /// The job that ended last.
    pub(crate) fn last_ended(&mut self) -> Option<&mut JobInfo> {
        self.ended.back_mut()
    }

    /// What there is to say about a job of the catalog.
    pub(crate) fn describe(&self, row: &JobRow) -> JobInfo {
        describe(row, self.progress.get(&row.id), self.running)
    }

    /// Jobs that have ended, oldest first.
    pub(crate) fn all_ended(&self) -> impl Iterator<Item = &JobInfo> {
        self.ended.iter()
    }

    /// How long a copy takes, as far as can be told.
    pub(crate) fn estimate(&self, bytes: u64) -> Duration {
        let milliseconds = u128::from(bytes) * 1000 / u128::from(self.speed.max(1));
        Duration::from_millis(u64::try_from(milliseconds).unwrap_or(u64::MAX))
    }

    /// Jobs that are at their end: the catalog does not know them any more, and nobody has said how they ended.
    pub(crate) fn ending(&self, known: impl Fn(JobId) -> bool) -> impl Iterator<Item = JobInfo> {
        let progress = self.progress.iter().filter(move |(id, _)| !known(**id));
        progress.map(|(id, progress)| describe(&progress.row, Some(progress), Some(*id)))
    }

    /// Jobs that are told of and that the catalog does not know: somebody has ended them.
    pub(crate) fn lost(&self, known: impl Fn(JobId) -> bool) -> Vec<JobId> {
        let mut lost: Vec<JobId> = self
            .progress
            .keys()
            .copied()
            .filter(|id| !known(*id))
            .collect();
        lost.sort_unstable();
        lost
    }
}

/// What there is to say about a job.
fn describe(row: &JobRow, progress: Option<&Progress>, running: Option<JobId>) -> JobInfo {
    let phase = match (row.state, &row.error) {
        (JobState::Queued, _) if running == Some(row.id) => Phase::Running,
        (JobState::Queued, _) => Phase::Queued,
        (JobState::Paused, _) => Phase::Paused,
        (JobState::Stopped, None) => Phase::Cancelled,
        (JobState::Stopped, Some(_)) => Phase::Failed,
    };
    JobInfo {
        id: row.id,
        kind: row.kind,
        subject: row.subject.clone(),
        way: row.way,
        phase,
        error: row.error.clone(),
        bytes_done: progress.map_or(0, |progress| progress.done),
        bytes_total: progress.map_or(0, |progress| progress.total),
        speed: progress.map_or(0, |progress| progress.speed),
        rate: row.rate,
        created_ns: row.created_ns,
        ended_ns: None,
        scrub: None,
    }
}
