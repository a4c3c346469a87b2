//! The clock of a store: one generation for all its volumes, and the proof that an old one is over.
//!
//! A snapshot publishes the new chains first and then advances the clock by *one* atomic store: that store is the instant
//! of the snapshot, for every disk of the group. Workers look at the clock once a batch, after they have read the
//! available index that announced the requests of the batch. So if a guest issues a write after it saw another write
//! complete, the second one runs in the same or a later generation: the set of writes in a snapshot is closed
//! under causality.
//!
//! A worker announces two things before it works in a generation: the oldest one in which it may still *change* layers, and
//! the oldest one in which it may still have a *request* of any kind, reads among them. Whoever advanced the clock waits until
//! no announcement is older than the new generation:
//!
//! - of changes (`quiescent`): from then on the old active layers never change again, and a snapshot goes on. A read that
//!   hangs on a slow device does not hold it up;
//! - of requests (`quiescent_for_reads`): from then on nobody uses what was in the resolve tables, maps and chains before the
//!   clock was advanced, and a merge gives back the places that they led to.
//!
//! What is put aside and may wait for long must not hold up the second for ever: see `context::era`.
//!
//! INVARIANT: a worker only changes layers of a generation `g` while its announcement of changes is `<= g`.
//! INVARIANT: a worker looks at tables, and uses what it found there, only while it announces requests; the announcement is not
//! newer than the generation in which the oldest of them looked.

use std::sync::{Arc, Mutex, PoisonError};

use crate::map::fault::{Fault, planted};
use crate::sync::{AtomicU64, Ordering, fence};
use crate::units::Generation;

/// The announcement of a worker that does nothing.
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
    changes: AtomicU64,
    /// The oldest generation in which the worker may still have a request, or `IDLE`.
    requests: AtomicU64,
}

/// What a worker has under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Oldest {
    /// The oldest generation with changes.
    pub changes: Option<Generation>,
    /// The oldest generation with requests of any kind: not newer than that of changes.
    pub requests: Option<Generation>,
}

impl Oldest {
    /// Both of them, where what begins now belongs to `now`.
    pub fn or(self, now: Generation) -> Self {
        Self {
            changes: Some(self.changes.unwrap_or(now).min(now)),
            requests: Some(self.requests.unwrap_or(now).min(now)),
        }
    }
}

/// A generation as it is announced.
fn announced(generation: Option<Generation>) -> u64 {
    generation.map_or(IDLE, |generation| generation.0)
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
            changes: AtomicU64::new(IDLE),
            requests: AtomicU64::new(IDLE),
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
            .all(|worker| worker.changes.load(Ordering::Acquire) >= generation.0)
    }

    /// Whether no worker can be in a request of a generation before `generation` any more: nobody uses what tables and chains
    /// said before the clock was advanced to it.
    ///
    /// A request that waits for the lead of its volume's flushes is under way: who waits for this must not hold one.
    pub fn quiescent_for_reads(&self, generation: Generation) -> bool {
        // ORDERING: Acquire; as in `quiescent`. What the caller does to a place comes after the last read of it.
        self.workers()
            .iter()
            .all(|worker| worker.requests.load(Ordering::Acquire) >= generation.0)
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
    /// Announces that the worker goes on with requests, and returns the generation to which they belong. `oldest` is what it
    /// has under way already.
    pub fn enter(&self, clock: &Clock, oldest: Oldest) -> Generation {
        let mut now = clock.now();
        loop {
            self.say(oldest.or(now));
            // ORDERING: pairs with the fence in `advance`: either this worker sees the new generation below, or the
            // waiter sees these announcements.
            fence(Ordering::SeqCst);
            let again = clock.now();
            if again == now {
                return now;
            }
            now = again;
        }
    }

    /// Announces what is still under way: these generations and newer ones, or nothing.
    pub fn leave(&self, oldest: Oldest) {
        self.say(oldest);
    }

    /// Stores both announcements.
    fn say(&self, oldest: Oldest) {
        // ORDERING: Release, since an announcement that moves forward says that older changes and reads are done; pairs with
        // `quiescent` and `quiescent_for_reads`.
        self.changes
            .store(announced(oldest.changes), Ordering::Release);
        if !planted(Fault::ReadUnannounced) {
            self.requests
                .store(announced(oldest.requests), Ordering::Release);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// Changes of a generation, which are requests as well.
    fn changes(generation: Generation) -> Oldest {
        Oldest {
            changes: Some(generation),
            requests: Some(generation),
        }
    }

    #[test]
    fn a_worker_holds_up_the_end_of_its_generation() {
        let clock = Clock::new();
        let worker = clock.register();
        let old = worker.enter(&clock, Oldest::default());
        let new = clock.advance();
        assert!(!clock.quiescent(new));
        assert!(!clock.quiescent_for_reads(new));
        assert_eq!(worker.enter(&clock, changes(old)), new);
        assert!(
            !clock.quiescent(new),
            "a change of the old generation is still under way"
        );
        worker.leave(changes(new));
        assert!(clock.quiescent(new) && clock.quiescent_for_reads(new));
        worker.leave(Oldest::default());
        assert!(clock.quiescent(Generation(new.0 + 1)));
    }

    #[test]
    fn a_read_holds_up_merges_and_no_snapshot() {
        let clock = Clock::new();
        let worker = clock.register();
        let old = worker.enter(&clock, Oldest::default());
        let read = Oldest {
            changes: None,
            requests: Some(old),
        };
        worker.leave(read);
        let new = clock.advance();
        assert!(clock.quiescent(new) && !clock.quiescent_for_reads(new));
        assert_eq!(worker.enter(&clock, read), new);
        worker.leave(read);
        assert!(clock.quiescent(new) && !clock.quiescent_for_reads(new));
        worker.leave(Oldest::default());
        assert!(clock.quiescent_for_reads(new));
    }

    #[test]
    fn an_unregistered_worker_holds_up_nobody() {
        let clock = Clock::new();
        let worker = clock.register();
        worker.enter(&clock, Oldest::default());
        let new = clock.advance();
        clock.unregister(&worker);
        assert!(clock.quiescent(new) && clock.quiescent_for_reads(new));
    }
}

#[cfg(test)]
mod scenarios {
    //! The two proofs, as models and on real threads.

    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::sync::thread;

    /// Runs a scenario in every interleaving.
    #[cfg(loom)]
    fn explore(scenario: impl Fn() + Send + Sync + 'static) {
        loom::model(scenario);
    }

    /// Runs a scenario often.
    #[cfg(not(loom))]
    fn explore(scenario: impl Fn() + Send + Sync + 'static) {
        for _ in 0..2_000 {
            scenario();
        }
    }

    /// After the clock advanced and was quiescent, no write may reach the old layer.
    fn change_against_a_writer() {
        let clock = Arc::new(Clock::new());
        let worker = clock.register();
        let sealed = Arc::new(AtomicU64::new(0));
        let writer = {
            let clock = Arc::clone(&clock);
            let sealed = Arc::clone(&sealed);
            thread::spawn(move || {
                let generation = worker.enter(&clock, Oldest::default());
                if generation.0 == 1 {
                    assert_eq!(
                        sealed.load(Ordering::Relaxed),
                        0,
                        "a write reached a sealed layer"
                    );
                }
                worker.leave(Oldest::default());
            })
        };
        let new = clock.advance();
        if clock.quiescent(new) {
            sealed.store(1, Ordering::Relaxed);
        }
        writer.join().unwrap();
    }

    /// After a word was changed, the clock advanced and was quiescent, nobody reads the old place, which is punched: not by a
    /// batch that begins meanwhile, and not by a read that it leaves under way.
    fn read_of_an_old_place(under_way: bool) {
        /// What the old place holds until it is punched.
        const DATA: u64 = 7;
        let clock = Arc::new(Clock::new());
        let worker = clock.register();
        let word = Arc::new(AtomicU64::new(0));
        let files: Arc<[AtomicU64; 2]> = Arc::new([AtomicU64::new(DATA), AtomicU64::new(DATA)]);
        let reader = {
            let (clock, word, files) = (Arc::clone(&clock), Arc::clone(&word), Arc::clone(&files));
            thread::spawn(move || {
                let generation = worker.enter(&clock, Oldest::default());
                let place = usize::try_from(word.load(Ordering::Relaxed)).unwrap();
                if under_way {
                    worker.leave(Oldest {
                        changes: None,
                        requests: Some(generation),
                    });
                }
                let found = files[place].load(Ordering::Relaxed);
                assert_eq!(found, DATA, "a read of a place that was given back");
                worker.leave(Oldest::default());
            })
        };
        word.store(1, Ordering::Relaxed);
        let new = clock.advance();
        if clock.quiescent_for_reads(new) {
            files[0].store(0, Ordering::Relaxed);
        }
        reader.join().unwrap();
    }

    #[test]
    fn loom_generation_change_against_a_writer() {
        explore(change_against_a_writer);
    }

    #[test]
    fn loom_generation_read_of_an_old_place() {
        explore(|| read_of_an_old_place(false));
    }

    #[test]
    fn loom_generation_read_under_way_of_an_old_place() {
        explore(|| read_of_an_old_place(true));
    }

    #[cfg(loom)]
    #[test]
    #[should_panic(expected = "a read of a place that was given back")]
    fn loom_generation_caught_read_unannounced() {
        crate::map::fault::plant(Fault::ReadUnannounced);
        explore(|| read_of_an_old_place(false));
    }

    /// Readers follow a word that a merger moves from place to place, giving back the one before each time it may. Returns
    /// whether nobody has read a place that was given back.
    #[cfg(not(loom))]
    fn merge_among_readers(rounds: u64, fault: Option<Fault>) -> bool {
        /// What a place holds until it is given back.
        const DATA: u64 = 7;
        let clock = Clock::new();
        let word = AtomicU64::new(0);
        let files = [AtomicU64::new(DATA), AtomicU64::new(DATA)];
        let (over, broken) = (AtomicU64::new(0), AtomicU64::new(0));
        let file = |number: u64| &files[usize::try_from(number % 2).unwrap()];
        let read = |first: u64| {
            let _planted = fault.map(crate::map::fault::plant_here);
            let worker = clock.register();
            let mut round = first;
            while over.load(Ordering::Relaxed) == 0 {
                round += 1;
                let generation = worker.enter(&clock, Oldest::default());
                // ORDERING: Acquire, with the merger's Release: what the word leads to is there.
                let place = word.load(Ordering::Acquire);
                if round.is_multiple_of(3) {
                    worker.leave(Oldest {
                        changes: None,
                        requests: Some(generation),
                    });
                    std::thread::yield_now();
                }
                if file(place).load(Ordering::Relaxed) != DATA {
                    broken.store(1, Ordering::Relaxed);
                }
                worker.leave(Oldest::default());
            }
            clock.unregister(&worker);
        };
        std::thread::scope(|scope| {
            let readers = (0..3).map(|reader| {
                scope.spawn({
                    let read = &read;
                    move || read(reader)
                })
            });
            let readers: Vec<_> = readers.collect();
            for round in 1..=rounds {
                file(round).store(DATA, Ordering::Relaxed);
                word.store(round, Ordering::Release);
                let generation = clock.advance();
                while !clock.quiescent_for_reads(generation) {
                    std::thread::yield_now();
                }
                file(round - 1).store(0, Ordering::Relaxed);
                if broken.load(Ordering::Relaxed) != 0 {
                    break;
                }
            }
            over.store(1, Ordering::Relaxed);
            for reader in readers {
                reader.join().unwrap();
            }
        });
        broken.load(Ordering::Relaxed) == 0
    }

    #[cfg(not(loom))]
    #[test]
    fn real_readers_never_read_a_place_that_was_given_back() {
        assert!(merge_among_readers(20_000, None));
    }

    #[cfg(not(loom))]
    #[test]
    fn real_readers_without_announcement_are_caught() {
        assert!(!merge_among_readers(u64::MAX, Some(Fault::ReadUnannounced)));
    }
}
