//! Whose rings run: of all front-ends of a disk, at most one has some.
//!
//! Several may be connected at once: in a live migration on one host, the machine that is left and the one that takes over
//! are. They may negotiate as they like; the disk is opened for one of them at a time. The one that comes waits a while for
//! the other to stop, as a migration that hands over has it stop first, and is refused then.
//!
//! Here is also known when the machine has left: when no session is there any more in which rings ran.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What the sessions of an attachment share.
#[derive(Debug)]
pub struct Turns {
    /// Who has the turn, and who had it.
    state: Mutex<State>,
    /// Notified when the turn is given back, or none is given any more.
    changed: Condvar,
    /// How long a session waits for another's rings to stop.
    patience: Duration,
}

/// Who has the turn, and who had it.
#[derive(Debug, Default)]
struct State {
    /// Whether a session has it.
    taken: bool,
    /// Sessions in which rings ran, and which have not ended.
    begun: usize,
    /// The last of these ended while another session had the turn in whose rings none had run yet.
    owed: bool,
    /// Whether the attachment is being stopped.
    stopped: bool,
}

impl Turns {
    /// Nobody has the turn. A session waits so long for it.
    pub fn new(patience: Duration) -> Self {
        Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            patience,
        }
    }

    /// Locks the state. Each change of it is a single step, so it is whole even if a thread panicked with the lock.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the turn; waits for another session to give it back, but not for long. Returns whether it could be had.
    ///
    /// `fresh`: a machine starts with it. Then the one before has ended, as a rule, and it is waited for until its end is over
    /// and done with; if it is there all the same the new one starts beside it.
    #[must_use]
    pub fn take(&self, fresh: bool) -> bool {
        let waiting =
            |state: &mut State| !state.stopped && (state.taken || fresh && state.begun > 0);
        let waited = self
            .changed
            .wait_timeout_while(self.state(), self.patience, waiting);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if state.taken || state.stopped {
            return false;
        }
        state.taken = true;
        true
    }

    /// The session that has the turn has begun: its first ring runs.
    pub fn begin(&self) {
        let mut state = self.state();
        state.begun += 1;
        state.owed = false;
    }

    /// Gives the turn back. `machine_left` is called if the machine has left meanwhile.
    pub fn give_back(&self, machine_left: impl FnOnce()) {
        let mut state = self.state();
        if std::mem::take(&mut state.owed) {
            machine_left();
        }
        state.taken = false;
        drop(state);
        self.changed.notify_all();
    }

    /// A session in which rings ran has ended. `machine_left` is called if it was the last one; nobody has the turn meanwhile.
    pub fn end(&self, machine_left: impl FnOnce()) {
        let mut state = self.state();
        state.begun = state.begun.saturating_sub(1);
        if state.begun > 0 {
            return;
        }
        if state.taken {
            state.owed = true;
        } else {
            machine_left();
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Nobody gets the turn any more, nor waits for it.
    pub fn stop(&self) {
        self.state().stopped = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn one_at_a_time_and_a_wait_has_an_end() {
        let turns = Turns::new(Duration::from_millis(10));
        assert!(turns.take(false));
        assert!(!turns.take(false), "taken, and nobody gives it back");
        turns.give_back(|| {});
        assert!(turns.take(false));
        let turns = Turns::new(Duration::from_secs(3600));
        assert!(turns.take(false));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| turns.take(false));
            turns.give_back(|| {});
            assert!(waits.join().is_ok_and(|had| had));
            let waits = scope.spawn(|| turns.take(false));
            turns.stop();
            assert!(waits.join().is_ok_and(|had| !had));
        });
    }

    #[test]
    fn a_machine_that_starts_waits_for_the_end_of_the_one_before() {
        let turns = Turns::new(Duration::from_secs(3600));
        let left = std::sync::atomic::AtomicBool::new(false);
        assert!(turns.take(true));
        turns.begin();
        turns.give_back(|| {});
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| {
                let had = turns.take(true);
                had && left.load(std::sync::atomic::Ordering::SeqCst)
            });
            turns.end(|| left.store(true, std::sync::atomic::Ordering::SeqCst));
            assert!(waits.join().is_ok_and(|after| after));
        });
        // One that does not end is not waited for long.
        let turns = Turns::new(Duration::from_millis(10));
        assert!(turns.take(true));
        turns.begin();
        turns.give_back(|| {});
        assert!(turns.take(true));
    }

    #[test]
    fn a_machine_has_left_when_the_last_session_that_began_has() {
        let turns = Turns::new(Duration::ZERO);
        let left = Cell::new(0);
        let leaves = || left.set(left.get() + 1);
        let begin = || {
            assert!(turns.take(false));
            turns.begin();
        };
        begin();
        turns.give_back(leaves);
        begin();
        turns.end(leaves);
        turns.give_back(leaves);
        assert_eq!(left.get(), 0, "the machine has moved");
        turns.end(leaves);
        assert_eq!(left.get(), 1);
        // It leaves while another one that is about to start gets nothing to run on.
        begin();
        turns.give_back(leaves);
        assert!(turns.take(false));
        turns.end(leaves);
        assert_eq!(left.get(), 1);
        turns.give_back(leaves);
        assert_eq!(left.get(), 2);
    }
}
