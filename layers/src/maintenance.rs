//! What the data plane tells the control plane: lines for the log, volumes that have failed, journals that want a checkpoint.
//!
//! Never on the path of a request that goes well. The lists are bounded; what does not fit is counted.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Lines kept until somebody asks for them.
const NOTES_MAX: usize = 1000;

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

    /// Waits for volumes that want a checkpoint, or that have failed; returns the former, `None` once closed.
    pub fn wait(&self) -> Option<Vec<String>> {
        let mut pending = self.lock();
        loop {
            if pending.closed {
                return None;
            }
            let failed = std::mem::take(&mut pending.failed);
            if failed || !pending.checkpoints.is_empty() {
                return Some(
                    std::mem::take(&mut pending.checkpoints)
                        .into_iter()
                        .collect(),
                );
            }
            pending = self
                .more
                .wait(pending)
                .unwrap_or_else(PoisonError::into_inner);
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
