//! What the data plane tells the control plane: lines for the log, volumes that have failed, journals that want a checkpoint.
//!
//! Never on the path of a request that goes well. The lists are bounded; what does not fit is counted.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Lines kept until somebody asks for them.
const NOTES_MAX: usize = 1000;
/// When that is tried again which failed.
const AGAIN: Duration = Duration::from_secs(1);

/// What waits for the control plane.
#[derive(Debug, Default)]
pub struct Maintenance {
    /// What waits.
    pending: Mutex<Pending>,
    /// Wakes the thread that sees to it.
    more: Condvar,
}

/// What waits for the control plane.
#[derive(Debug, Default)]
struct Pending {
    /// Lines for the log.
    notes: Vec<String>,
    /// Lines that did not fit.
    notes_dropped: u64,
    /// Volumes whose journal has grown long.
    checkpoints: BTreeSet<String>,
    /// Whether a volume has failed since the last look.
    failed: bool,
    /// When failures are to be looked at again that could not be recorded.
    again: Option<Instant>,
    /// Nobody will ask any more.
    closed: bool,
}

impl Maintenance {
    /// Adds a line for the log.
    pub fn note(&self, line: String) {
        let mut pending = self.lock();
        if pending.notes.len() < NOTES_MAX {
            pending.notes.push(line);
        } else {
            pending.notes_dropped += 1;
        }
    }

    /// A volume takes no more writes.
    pub fn failed(&self, volume: &str, cause: &str) {
        self.note(format!("volume {volume} takes no more writes: {cause}"));
        self.lock().failed = true;
        self.more.notify_all();
    }

    /// Failures could not be recorded, which is to be tried again, or they were. Returns whether that is news.
    pub fn recorded(&self, recorded: bool) -> bool {
        let again = (!recorded).then(|| Instant::now() + AGAIN);
        let before = std::mem::replace(&mut self.lock().again, again);
        before.is_none() != recorded
    }

    /// A volume's journal has grown long.
    pub fn want_checkpoint(&self, volume: &str) {
        self.lock().checkpoints.insert(volume.to_owned());
        self.more.notify_all();
    }

    /// Takes the lines.
    pub fn take_notes(&self) -> Vec<String> {
        let mut pending = self.lock();
        let mut notes = std::mem::take(&mut pending.notes);
        let dropped = std::mem::take(&mut pending.notes_dropped);
        if dropped > 0 {
            notes.push(format!("{dropped} more lines were dropped"));
        }
        notes
    }

    /// Waits for volumes that want a checkpoint, or that have failed, also those of which that could not be recorded before;
    /// returns the former, `None` once closed.
    pub fn wait(&self) -> Option<Vec<String>> {
        let mut pending = self.lock();
        loop {
            if pending.closed {
                return None;
            }
            let left = (pending.again).map(|at| at.saturating_duration_since(Instant::now()));
            let failed = std::mem::take(&mut pending.failed) || left == Some(Duration::ZERO);
            if failed || !pending.checkpoints.is_empty() {
                return Some(
                    std::mem::take(&mut pending.checkpoints)
                        .into_iter()
                        .collect(),
                );
            }
            pending = match left {
                None => {
                    let waited = self.more.wait(pending);
                    waited.unwrap_or_else(PoisonError::into_inner)
                }
                Some(left) => {
                    let waited = self.more.wait_timeout(pending, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Ends every wait.
    pub fn close(&self) {
        self.lock().closed = true;
        self.more.notify_all();
    }

    /// What waits, whatever happened to an earlier holder of the lock.
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
