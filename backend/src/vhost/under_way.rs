//! Whether what front-ends have asked for comes to an end, found out while they are served.
//!
//! Who stops all rings at once has to know that first: a request that waits for a host that does not answer ends when that
//! host likes, and then all who have stopped would wait for it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::state::SessionState;
use crate::worker::command::{Line, WorkerHandle};

/// How often to look whether a message has been handled. Nothing tells.
const LOOK_PERIOD: Duration = Duration::from_millis(1);

/// What a session does now.
#[derive(Debug, Default)]
pub struct Activity {
    /// Messages that were begun, and those that were ended: odd in the midst of one.
    messages: AtomicU64,
    /// The ways to its workers.
    workers: Mutex<Vec<Weak<Line>>>,
}

/// A message that is being handled, until this is dropped.
#[derive(Debug)]
pub struct InMessage(Arc<SessionState>);

impl InMessage {
    /// A session begins with a message; it does so with one at a time.
    pub fn begin(state: &Arc<SessionState>) -> Self {
        // ORDERING: Relaxed; whoever looks wants to know only whether it is the same for seconds.
        state.activity.messages.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(state))
    }
}

impl Drop for InMessage {
    fn drop(&mut self) {
        // ORDERING: Relaxed; see `begin`.
        self.0.activity.messages.fetch_add(1, Ordering::Relaxed);
    }
}

impl Activity {
    /// A worker serves the session from now on.
    pub fn add_worker(&self, worker: &WorkerHandle) {
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        workers.retain(|line| line.strong_count() > 0);
        workers.push(worker.line());
    }

    /// Has `done` dropped when its workers have completed what they have under way now.
    fn ask(&self, done: &mpsc::Sender<()>) {
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        for line in workers.iter().filter_map(Weak::upgrade) {
            // One that is gone has nothing under way.
            let _ = line.await_all(done.clone());
        }
    }
}

/// What sessions had under way at some time.
#[derive(Debug)]
pub struct UnderWay {
    /// The sessions, and how many messages they had begun or ended by then.
    sessions: Vec<(Arc<SessionState>, u64)>,
    /// Disconnected when their workers have completed all of it.
    completed: mpsc::Receiver<()>,
}

impl UnderWay {
    /// What these sessions have under way now. Does not wait.
    pub fn of<'a>(sessions: impl Iterator<Item = &'a Arc<SessionState>>) -> Self {
        let (done, completed) = mpsc::channel();
        let ask = |state: &Arc<SessionState>| {
            state.activity.ask(&done);
            // ORDERING: Relaxed; see `InMessage::begin`.
            let messages = state.activity.messages.load(Ordering::Relaxed);
            (Arc::clone(state), messages)
        };
        Self {
            sessions: sessions.map(ask).collect(),
            completed,
        }
    }

    /// Waits until all of it has ended. Returns whether it has by the deadline.
    pub fn has_ended_by(&self, deadline: Instant) -> bool {
        let left = || deadline.saturating_duration_since(Instant::now());
        if self.completed.recv_timeout(left()) == Err(RecvTimeoutError::Timeout) {
            return false;
        }
        self.sessions.iter().all(|(state, then)| {
            // ORDERING: Relaxed; see `InMessage::begin`.
            let in_it =
                || then % 2 == 1 && state.activity.messages.load(Ordering::Relaxed) == *then;
            while in_it() && !left().is_zero() {
                thread::park_timeout(LOOK_PERIOD);
            }
            !in_it()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_that_does_not_end_is_noticed_and_later_ones_are_not_waited_for() {
        let state = Arc::new(SessionState::default());
        let under_way = || UnderWay::of([&state].into_iter());
        assert!(under_way().has_ended_by(Instant::now()));
        let message = InMessage::begin(&state);
        let before = under_way();
        assert!(!before.has_ended_by(Instant::now()));
        drop(message);
        let _next = InMessage::begin(&state);
        assert!(before.has_ended_by(Instant::now()));
        assert!(!under_way().has_ended_by(Instant::now() + LOOK_PERIOD));
    }
}
