//! A lock that is handed over in the order in which it was asked for: commands of people wait for one step of a job, and
//! not for as many as the job's thread gets in before the waiting thread has woken up.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// The lock.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    /// Who is next.
    tickets: Mutex<Tickets>,
    /// Told when the turn passes on.
    passed: Condvar,
}

/// Numbers as at a counter.
#[derive(Debug, Default)]
struct Tickets {
    /// The next one to be drawn.
    next: u64,
    /// The one whose turn it is.
    serving: u64,
}

/// The lock, held. Dropping it passes the turn on.
#[derive(Debug)]
#[must_use = "the lock is held as long as this lives"]
pub(crate) struct Turn<'a>(&'a Turns);

impl Turns {
    /// Waits for its turn.
    pub(crate) fn take(&self) -> Turn<'_> {
        let mut tickets = self.lock();
        let mine = tickets.next;
        tickets.next += 1;
        while tickets.serving != mine {
            tickets = self
                .passed
                .wait(tickets)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Turn(self)
    }

    /// How many turns were asked for so far.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn drawn(&self) -> u64 {
        self.lock().next
    }

    /// The numbers, whatever happened to an earlier holder: they are whole between any two steps.
    fn lock(&self) -> MutexGuard<'_, Tickets> {
        self.tickets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.lock().serving += 1;
        self.0.passed.notify_all();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn turns_go_in_the_order_of_asking() {
        let turns = Turns::default();
        let order = Mutex::new(Vec::new());
        let first = turns.take();
        std::thread::scope(|scope| {
            for number in 0..4 {
                let before = turns.lock().next;
                let (turns, order) = (&turns, &order);
                scope.spawn(move || {
                    let _turn = turns.take();
                    order
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(number);
                });
                // The next one asks only when this one has.
                while turns.lock().next == before {
                    std::thread::yield_now();
                }
            }
            drop(first);
        });
        assert_eq!(
            *order.lock().unwrap_or_else(PoisonError::into_inner),
            [0, 1, 2, 3]
        );
    }

    #[test]
    fn a_panic_passes_the_turn_on() {
        let turns = Turns::default();
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _turn = turns.take();
            panic!("a command failed badly");
        }));
        assert!(panicked.is_err());
        let _turn = turns.take();
    }
}
