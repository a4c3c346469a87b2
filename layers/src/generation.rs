//! The clock of a store: one generation for all its volumes, and the proof that an old one is over.
//!
//! A snapshot publishes the new chains first and then advances the clock by *one* atomic store: that store is the instant
//! of the snapshot, for every disk of the group. Workers look at the clock once a batch, after they have read the
//! available index that announced the requests of the batch. So if a guest issues a write after it saw another write
//! complete, the second one runs in the same or a later generation: the set of writes in a snapshot is closed
//! under causality.
//!
//! A worker announces the oldest generation in which it may still change layers before it works in it. Whoever advanced
//! the clock waits until no announcement is older than the new generation; from then on the old active layers
//! never change again.
//!
//! INVARIANT: a worker only changes layers of a generation `g` while its announcement is `<= g`.

use std::sync::{Arc, Mutex, PoisonError};

use crate::sync::{AtomicU64, Ordering, fence};
use crate::units::Generation;

/// The announcement of a worker that changes nothing.
const IDLE: u64 = u64::MAX;

/// The generation counter of one store and the workers that follow it.
#[derive(Debug)]
pub struct Clock {
    /// The current generation.
    now: AtomicU64,
    /// Everybody who ever may change a layer. Control plane only.
    workers: Mutex<Vec<Arc<Announcement>>>,
}

/// What one worker says about itself. Alone on its cache line, since its worker stores to it once a batch.
#[derive(Debug)]
#[repr(align(64))]
pub struct Announcement {
    /// The oldest generation that the worker may still change layers of, or `IDLE`.
    oldest: AtomicU64,
}

impl Clock {
    /// A clock at generation 1.
    pub fn new() -> Self {
        Self {
            now: AtomicU64::new(1),
            workers: Mutex::new(Vec::new()),
        }
    }

    /// Adds a worker, which starts out idle.
    pub fn register(&self) -> Arc<Announcement> {
        let announcement = Arc::new(Announcement {
            oldest: AtomicU64::new(IDLE),
        });
        self.workers().push(Arc::clone(&announcement));
        announcement
    }

    /// Forgets a worker. It must be idle for good.
    pub fn unregister(&self, announcement: &Arc<Announcement>) {
        self.workers()
            .retain(|known| !Arc::ptr_eq(known, announcement));
    }

    /// The current generation. What was published before the clock advanced to it is visible to the caller.
    pub fn now(&self) -> Generation {
        // ORDERING: Acquire; pairs with the store in `advance`, so that who sees a generation sees its chains.
        Generation(self.now.load(Ordering::Acquire))
    }

    /// Advances the clock: the instant. The chains of the new generation must have been published before.
    /// One caller at a time (the command lock of the store).
    pub fn advance(&self) -> Generation {
        let next = self.now.load(Ordering::Relaxed).wrapping_add(1);
        // ORDERING: Release publishes the new chains with the generation; pairs with `now`.
        self.now.store(next, Ordering::Release);
        // ORDERING: SeqCst fence between this store and the loads in `quiescent`; pairs with the fence in `enter`. It
        // forbids that a worker misses the new generation while the waiter misses the worker's announcement.
        fence(Ordering::SeqCst);
        Generation(next)
    }

    /// Whether no worker can change layers of a generation before `generation` any more.
    pub fn quiescent(&self, generation: Generation) -> bool {
        // ORDERING: Acquire pairs with the Release in `Announcement::leave`: whoever sees a worker gone sees all its changes.
        self.workers()
            .iter()
            .all(|worker| worker.oldest.load(Ordering::Acquire) >= generation.0)
    }

    /// The list of workers, whatever happened to an earlier holder of the lock: it is a plain list.
    fn workers(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Announcement>>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

impl Announcement {
    /// Announces that the worker goes on to change layers, and returns the generation in which it must do so. `oldest` is
    /// the oldest generation in which it still has changes under way, if any.
    pub fn enter(&self, clock: &Clock, oldest: Option<Generation>) -> Generation {
        let mut now = clock.now();
        loop {
            let announced = oldest.unwrap_or(now).min(now);
            // ORDERING: Release, since an announcement that moves forward says that older changes are done.
            self.oldest.store(announced.0, Ordering::Release);
            // ORDERING: pairs with the fence in `advance`: either this worker sees the new generation below, or the
            // waiter sees this announcement.
            fence(Ordering::SeqCst);
            let again = clock.now();
            if again == now {
                return now;
            }
            now = again;
        }
    }

    /// Announces what is still under way: changes of this generation and newer ones, or nothing.
    pub fn leave(&self, oldest: Option<Generation>) {
        // ORDERING: Release; pairs with `quiescent`. The changes made so far are visible to whoever sees this.
        self.oldest.store(
            oldest.map_or(IDLE, |generation| generation.0),
            Ordering::Release,
        );
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_worker_holds_up_the_end_of_its_generation() {
        let clock = Clock::new();
        let worker = clock.register();
        let old = worker.enter(&clock, None);
        let new = clock.advance();
        assert!(!clock.quiescent(new));
        assert_eq!(worker.enter(&clock, Some(old)), new);
        assert!(
            !clock.quiescent(new),
            "a change of the old generation is still under way"
        );
        worker.leave(Some(new));
        assert!(clock.quiescent(new));
        worker.leave(None);
        assert!(clock.quiescent(Generation(new.0 + 1)));
    }

    #[test]
    fn an_unregistered_worker_holds_up_nobody() {
        let clock = Clock::new();
        let worker = clock.register();
        worker.enter(&clock, None);
        let new = clock.advance();
        clock.unregister(&worker);
        assert!(clock.quiescent(new));
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use crate::sync::AtomicBool;

    /// After the clock advanced and was quiescent, no write may reach the old layer.
    #[test]
    fn loom_generation_change_against_a_writer() {
        loom::model(|| {
            let clock = loom::sync::Arc::new(Clock::new());
            let worker = clock.register();
            let sealed = loom::sync::Arc::new(AtomicBool::new(false));
            let writer = {
                let clock = loom::sync::Arc::clone(&clock);
                let sealed = loom::sync::Arc::clone(&sealed);
                loom::thread::spawn(move || {
                    let generation = worker.enter(&clock, None);
                    if generation.0 == 1 {
                        assert!(
                            !sealed.load(Ordering::Relaxed),
                            "a write reached a sealed layer"
                        );
                    }
                    worker.leave(None);
                })
            };
            let new = clock.advance();
            if clock.quiescent(new) {
                sealed.store(true, Ordering::Relaxed);
            }
            writer.join().ok();
        });
    }
}
