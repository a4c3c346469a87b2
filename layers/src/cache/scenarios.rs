//! The races of frames, each as a small scenario with two runners: under loom every interleaving and every value that the
//! memory model allows, with two ways a set and one word a sector; else many rounds on real threads, with whole frames.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p stratablk-layers --release --lib loom_cache --target-dir target/loom
//! STRATABLK_STRESS_SECONDS=60 cargo test -p stratablk-layers --release --lib cache::scenarios
//! ```
//!
//! This file has frames and files alone, `layered` what they have to do with maps, flushes and snapshots, `merged`
//! with merges. `crash` ends a
//! process before each of its stores, and `stress` lets real threads loose on a real arena.
//!
//! The tests named `caught` plant a fault (see `map::fault`) and must fail. `CONCURRENCY.md` says what loom does not see.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[cfg(not(loom))]
mod crash;
mod layered;
mod merged;
#[cfg(not(loom))]
mod stress;

use std::sync::Arc;

use crate::map::fault::Fault;
use crate::sync::{AtomicU64, Ordering, thread};
use crate::units::{Cluster, LayerNumber, SectorMask};

use super::access::{Claim, Clean, FrameIndex, Read, Sets, Tally, Ticket, Write};
use super::set::{FrameKey, Set, State, WAYS};

/// Sectors of a frame.
const SECTORS: usize = if cfg!(loom) { 2 } else { 8 };
/// Words of a sector.
const WORDS: usize = if cfg!(loom) { 1 } else { 64 };
/// Clusters of each layer's file.
const CLUSTERS: usize = if cfg!(loom) { 3 } else { 5 };
/// Layers that have files.
const LAYERS: usize = 2;
/// What the files hold at first.
const FIRST: u32 = 1;

/// The cluster that everybody fights over.
const HERE: FrameKey = key(1, 0);
/// The first sector of it.
const ONE: SectorMask = SectorMask::span(0, 1);
/// The second one.
const OTHER: SectorMask = SectorMask::span(1, 1);
/// Both.
const BOTH: SectorMask = SectorMask::span(0, 2);

/// The key of a cluster of a layer.
const fn key(layer: u32, cluster: u64) -> FrameKey {
    FrameKey::new(LayerNumber(layer), Cluster(cluster))
}

/// The word of a version of a sector. All words of the sector are the same.
fn stamp(key: FrameKey, sector: usize, version: u32) -> u64 {
    let place = u64::from(key.layer().0) << 16 | key.cluster().0 << 8 | sector as u64;
    place << 32 | u64::from(version)
}

/// Which version of a sector these words are; fails if they are another sector's or not of one version.
fn version(key: FrameKey, sector: usize, words: &[u64]) -> u32 {
    let word = words[0];
    assert!(
        words.iter().all(|other| *other == word),
        "a mix of two versions in a sector"
    );
    let version = u32::try_from(word & u64::from(u32::MAX)).unwrap();
    assert_eq!(
        word,
        stamp(key, sector, version),
        "the bytes of another key or sector"
    );
    version
}

/// The sectors of a mask.
fn sectors(mask: SectorMask) -> impl Iterator<Item = usize> {
    (0..SECTORS).filter(move |sector| mask.0 >> sector & 1 != 0)
}

/// The words of one frame, private.
type Page = [u64; SECTORS * WORDS];
/// The versions of the sectors of a frame that were asked for.
type Versions = [Option<u32>; SECTORS];

/// The versions in a page.
fn versions(key: FrameKey, mask: SectorMask, page: &Page) -> Versions {
    let mut versions = [None; SECTORS];
    for sector in sectors(mask) {
        let words = &page[sector * WORDS..(sector + 1) * WORDS];
        versions[sector] = Some(version(key, sector, words));
    }
    versions
}

/// One set, its frames, and the files of two layers.
struct World {
    /// One set.
    sets: [Set; 1],
    /// The words of the frames, as others may see them change.
    frames: Vec<AtomicU64>,
    /// For each sector of the files which version it is: a host writes sectors whole.
    files: Vec<AtomicU64>,
    /// Makes loom try every order of the threads that come here: see `map::scenarios`. It orders nothing.
    pace: AtomicU64,
}

impl World {
    /// A world in whose set this many ways are free and the others dirty for ever.
    fn new(ways: usize) -> Arc<Self> {
        let words = |count| (0..count).map(|_| AtomicU64::new(0)).collect();
        let world = Self {
            sets: [Set::default()],
            frames: words(WAYS * SECTORS * WORDS),
            files: (0..LAYERS * CLUSTERS * SECTORS)
                .map(|_| AtomicU64::new(u64::from(FIRST)))
                .collect(),
            pace: AtomicU64::new(0),
        };
        for way in ways..WAYS {
            assert!(world.write(key(9, way as u64), ONE, FIRST));
        }
        Arc::new(world)
    }

    /// The protocol, at the beginning of a step.
    fn sets(&self) -> Sets<'_> {
        if cfg!(loom) {
            self.pace.fetch_or(0, Ordering::Relaxed);
        }
        Sets::new(&self.sets, 0)
    }

    /// A word of a frame.
    fn word(&self, index: FrameIndex, word: usize) -> &AtomicU64 {
        &self.frames[index.way * SECTORS * WORDS + word]
    }

    /// Takes sectors out of a frame, as racy as a copy is.
    fn load(&self, index: FrameIndex, mask: SectorMask, page: &mut Page) {
        for word in sectors(mask).flat_map(|sector| sector * WORDS..(sector + 1) * WORDS) {
            page[word] = self.word(index, word).load(Ordering::Relaxed);
        }
    }

    /// Puts sectors into a frame.
    fn store(&self, index: FrameIndex, mask: SectorMask, page: &Page) {
        for word in sectors(mask).flat_map(|sector| sector * WORDS..(sector + 1) * WORDS) {
            self.word(index, word).store(page[word], Ordering::Relaxed);
        }
    }

    /// Which version of a sector the file has.
    fn file(&self, key: FrameKey, sector: usize) -> &AtomicU64 {
        let layer = usize::try_from(key.layer().0).unwrap() - 1;
        let cluster = usize::try_from(key.cluster().0).unwrap();
        &self.files[(layer * CLUSTERS + cluster) * SECTORS + sector]
    }

    /// Reads the file.
    fn read_file(&self, key: FrameKey, mask: SectorMask) -> Page {
        let mut page = [0; SECTORS * WORDS];
        for sector in sectors(mask) {
            let version = u32::try_from(self.file(key, sector).load(Ordering::Acquire)).unwrap();
            page[sector * WORDS..(sector + 1) * WORDS].fill(stamp(key, sector, version));
        }
        page
    }

    /// Reads frames only.
    fn read(&self, key: FrameKey, mask: SectorMask) -> Result<Versions, Read> {
        let mut page = [0; SECTORS * WORDS];
        let copy = |index| self.load(index, mask, &mut page);
        match self.sets().read(key, mask, &mut Tally::default(), copy) {
            Read::Hit => Ok(versions(key, mask, &page)),
            other => Err(other),
        }
    }

    /// Writes sectors, waiting for whoever is in the way. Returns whether there was a way.
    fn write(&self, key: FrameKey, mask: SectorMask, version: u32) -> bool {
        self.write_and(key, mask, version, |_| {})
    }

    /// The same, with what is published under the lock.
    fn write_and(
        &self,
        key: FrameKey,
        mask: SectorMask,
        version: u32,
        mut publish: impl FnMut(bool),
    ) -> bool {
        let mut page = [0; SECTORS * WORDS];
        for sector in sectors(mask) {
            page[sector * WORDS..(sector + 1) * WORDS].fill(stamp(key, sector, version));
        }
        loop {
            let copy = |index| self.store(index, mask, &page);
            let mut tally = Tally::default();
            match self
                .sets()
                .write(key, mask, true, &mut tally, copy, &mut publish)
            {
                Write::Done { .. } => return true,
                Write::Full => return false,
                Write::Busy => thread::yield_now(),
            }
        }
    }

    /// Claims a frame.
    fn claim(&self, key: FrameKey, mask: SectorMask) -> Option<Ticket> {
        match self.sets().claim(key, mask, &mut Tally::default()) {
            Claim::Claimed(ticket) => Some(ticket),
            Claim::Resident | Claim::Refused => None,
        }
    }

    /// Ends a fill. What the page is then, unless it is out of date.
    fn insert(&self, ticket: Ticket, mask: SectorMask, mut page: Page) -> Option<Versions> {
        let key = ticket.key();
        let kept = self.sets().insert(ticket, mask, |index, missing| {
            self.store(index, missing, &page);
            self.load(index, SectorMask(mask.0 & !missing.0), &mut page);
        });
        kept.then(|| versions(key, mask, &page))
    }

    /// Reads sectors from the file into a frame, if nobody else does. What the reader gets.
    fn fill(&self, key: FrameKey, mask: SectorMask) -> Option<Versions> {
        let ticket = self.claim(key, mask)?;
        let page = self.read_file(key, mask);
        self.insert(ticket, mask, page)
    }

    /// Writes a frame back. Returns whether it is clean then.
    fn write_back(&self, key: FrameKey) -> bool {
        let mut page = [0; SECTORS * WORDS];
        let copy = |index, dirty| self.load(index, dirty, &mut page);
        let Some(copied) = self.sets().copy_dirty(key, copy) else {
            return true;
        };
        self.write_file(key, copied.dirty, &page);
        self.sets().clean(&copied) == Clean::Cleaned
    }

    /// Writes sectors to the file.
    fn write_file(&self, key: FrameKey, mask: SectorMask, page: &Page) {
        for sector in sectors(mask) {
            let version = version(key, sector, &page[sector * WORDS..(sector + 1) * WORDS]);
            self.file(key, sector)
                .store(u64::from(version), Ordering::Release);
        }
    }

    /// The states of all ways that have a key.
    fn states(&self, key: FrameKey) -> Vec<State> {
        let set = &self.sets[0];
        let of_key = (0..WAYS).filter(|way| set.keys[*way].load(Ordering::Acquire) == key.word());
        of_key
            .map(|way| State(set.states[way].load(Ordering::Acquire)))
            .collect()
    }

    /// Once all is quiet: the state of the one frame of a key. `None`: it has none.
    fn state(&self, key: FrameKey) -> Option<State> {
        let states = self.states(key);
        assert!(states.len() <= 1, "two frames of one key");
        states.first().copied()
    }

    /// Once all is quiet: which version of a sector a reader gets, wherever it lies. `lost` says what it must not be less than.
    fn latest(&self, key: FrameKey, sector: usize) -> u32 {
        let mask = SectorMask(1 << sector);
        let in_frame = self
            .state(key)
            .is_some_and(|state| state.valid().contains(mask));
        let found = if in_frame {
            self.read(key, mask).expect("nobody changes it")[sector]
        } else {
            versions(key, mask, &self.read_file(key, mask))[sector]
        };
        found.unwrap()
    }
}

/// How often a scenario runs on real threads.
#[cfg(not(loom))]
const RUNS: u32 = 2_000;
/// How often a thread does what it does in a scenario: once in a model.
const ROUNDS: u32 = if cfg!(loom) { 1 } else { 20 };

/// Runs a scenario in every way there is with at most so many preemptions (without limit if `None`), or with fewer if
/// `LOOM_MAX_PREEMPTIONS` says so. One more in long runs.
#[cfg(loom)]
fn explore(preemptions: Option<usize>, scenario: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = if std::env::var_os("STRATABLK_LONG").is_some() {
        preemptions.map(|bound| bound + 1)
    } else {
        [preemptions, builder.preemption_bound]
            .into_iter()
            .flatten()
            .min()
    };
    builder.max_branches = 10_000;
    builder.check(scenario);
}

/// Runs a scenario often.
#[cfg(not(loom))]
fn explore(_preemptions: Option<usize>, scenario: impl Fn() + Send + Sync + 'static) {
    for _ in 0..RUNS {
        scenario();
    }
}

/// Plants a fault and runs a scenario that must see it.
#[cfg(loom)]
fn explore_broken(
    fault: Fault,
    preemptions: Option<usize>,
    scenario: impl Fn() + Send + Sync + 'static,
) {
    crate::map::fault::plant(fault);
    explore(preemptions, scenario);
}

/// A reader meets writers of the same sectors: it gets all of one version, and never an older one than before.
fn read_against_write() {
    let world = World::new(2);
    world.write(HERE, BOTH, FIRST);
    let other = Arc::clone(&world);
    let writer = thread::spawn(move || {
        for round in 1..=ROUNDS {
            other.write(HERE, BOTH, FIRST + round);
        }
    });
    let mut last = FIRST;
    for _ in 0..ROUNDS {
        match world.read(HERE, BOTH) {
            Ok(found) => {
                assert_eq!(found[0], found[1], "a mix of two versions in a read");
                assert!(found[0] >= Some(last), "older than what was read before");
                last = found[0].unwrap();
            }
            Err(read) => assert_eq!(
                read,
                Read::Busy,
                "a sector that was written is in its frame"
            ),
        }
    }
    writer.join().unwrap();
    assert_eq!(world.latest(HERE, 0), FIRST + ROUNDS);
}

/// A reader meets those who take its frame for other keys.
fn read_against_eviction() {
    let world = World::new(1);
    world.fill(HERE, BOTH);
    let other = Arc::clone(&world);
    let thread = thread::spawn(move || {
        for round in 0..ROUNDS {
            other.fill(key(1, 1 + u64::from(round % 2)), BOTH);
            if !cfg!(loom) {
                other.fill(HERE, BOTH);
            }
        }
    });
    for _ in 0..ROUNDS {
        // The stamps say whose bytes they are.
        if let Ok(found) = world.read(HERE, BOTH) {
            assert_eq!(found[..2], [Some(FIRST); 2]);
        }
    }
    thread.join().unwrap();
}

/// Sectors are written while they are read from the file for the same frame. The writer writes back and tries to have the frame
/// evicted and claimed anew: the fill is of that very frame or of none.
fn fill_against_write(written_back: bool) {
    let world = World::new(1);
    let other = Arc::clone(&world);
    let filler = thread::spawn(move || {
        if let Some(found) = other.fill(HERE, BOTH) {
            assert_eq!(found[1], Some(FIRST));
        }
    });
    if world.write(HERE, ONE, 2) && written_back {
        world.write_back(HERE);
        let others = world.claim(key(1, 1), BOTH);
        let again = match others {
            Some(ticket) => {
                world.sets().abandon(ticket);
                world.claim(HERE, BOTH)
            }
            None => None,
        };
        filler.join().unwrap();
        again
            .into_iter()
            .for_each(|ticket| world.sets().abandon(ticket));
    } else {
        filler.join().unwrap();
    }
    let left = world.state(HERE);
    assert!(left.is_none_or(|state| !state.is_filling() && !state.is_locked()));
    assert_eq!(world.latest(HERE, 0), 2, "the fill overwrote the write");
    assert_eq!(world.latest(HERE, 1), FIRST);
}

/// Two threads want a frame for one key that has none, each in its way: there is one frame, with what both of them did.
fn two_of_one_key(fills: [bool; 2]) {
    let world = World::new(2);
    let enter = move |world: &World, which: usize| {
        let mask = [ONE, OTHER][which];
        if fills[which] {
            world.claim(HERE, mask).map(|ticket| (ticket, mask))
        } else {
            assert!(world.write(HERE, mask, 2), "there is room");
            None
        }
    };
    let other = Arc::clone(&world);
    let thread = thread::spawn(move || enter(&other, 1));
    let mine = enter(&world, 0);
    let theirs = thread.join().unwrap();
    assert!(
        mine.is_none() || theirs.is_none(),
        "two fills of one key at once"
    );
    for (ticket, mask) in mine.into_iter().chain(theirs) {
        let page = world.read_file(HERE, mask);
        world.insert(ticket, mask, page).unwrap();
    }
    for (sector, fill) in fills.into_iter().enumerate() {
        let expected = if fill { FIRST } else { 2 };
        assert_eq!(world.latest(HERE, sector), expected, "one of them was lost");
    }
}

/// Fills and writes of three keys fight for two ways: what is found is the right key's, and nothing written is lost.
fn fill_against_eviction() {
    let world = World::new(2);
    let other = Arc::clone(&world);
    let thread = thread::spawn(move || {
        for round in 1..=ROUNDS {
            if other.write(key(1, 2), ONE, FIRST + round) {
                other.write_back(key(1, 2));
            }
            other.fill(key(1, 1), ONE);
        }
    });
    for _ in 0..ROUNDS {
        if let Some(found) = world.fill(HERE, ONE) {
            assert_eq!(found[0], Some(FIRST));
        }
        let _ = world.read(key(1, 1), ONE);
    }
    thread.join().unwrap();
    assert_eq!(world.latest(HERE, 0), FIRST);
    assert_eq!(world.latest(key(1, 1), 0), FIRST);
    let last = world.latest(key(1, 2), 0);
    assert!(last == FIRST + ROUNDS || !cfg!(loom), "the write was lost");
}

/// A layer is dropped while the ways of its frames are wanted for others: nothing of it is left, and nothing else is gone.
fn drop_against_fill() {
    let world = World::new(2);
    world.fill(HERE, BOTH);
    world.write(key(1, 1), ONE, 2);
    let other = Arc::clone(&world);
    let thread = thread::spawn(move || other.fill(key(2, 0), BOTH).is_some());
    assert_eq!(world.sets().drop_layer(HERE.layer()), 1);
    let filled = thread.join().unwrap();
    assert!(world.state(HERE).is_none() && world.state(key(1, 1)).is_none());
    let state = world.state(key(2, 0));
    let held = state.is_some_and(|state| state.valid() == BOTH && !state.is_filling());
    assert_eq!(held, filled, "the frame of another layer was dropped");
    for cluster in 0..2 {
        assert!(world.write(key(2, cluster), ONE, 2), "a way is lost");
    }
}

#[test]
fn loom_cache_drop_against_fill() {
    explore(None, drop_against_fill);
}

#[test]
fn loom_cache_read_against_write() {
    explore(None, read_against_write);
}

#[test]
fn loom_cache_read_against_eviction() {
    explore(None, read_against_eviction);
}

#[test]
fn loom_cache_fill_against_write() {
    explore(None, || fill_against_write(false));
}

#[test]
fn loom_cache_fill_against_write_that_is_written_back() {
    explore(Some(3), || fill_against_write(true));
}

#[test]
fn loom_cache_two_writes_of_a_new_key() {
    explore(None, || two_of_one_key([false, false]));
}

#[test]
fn loom_cache_write_and_fill_of_a_new_key() {
    explore(None, || two_of_one_key([false, true]));
}

#[test]
fn loom_cache_two_fills_of_a_new_key() {
    explore(None, || two_of_one_key([true, true]));
}

#[test]
fn loom_cache_fill_against_eviction() {
    explore(Some(2), fill_against_eviction);
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "a mix of two versions in a read")]
fn loom_cache_caught_read_once() {
    explore_broken(Fault::ReadOnce, None, read_against_write);
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "a mix of two versions in a read")]
fn loom_cache_caught_read_without_fence() {
    explore_broken(Fault::ReadWithoutFence, None, read_against_write);
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "a mix of two versions in a read")]
fn loom_cache_caught_lock_without_fence() {
    explore_broken(Fault::LockWithoutFence, None, read_against_write);
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "the bytes of another key or sector")]
fn loom_cache_caught_key_before_state() {
    explore_broken(Fault::KeyBeforeState, Some(3), read_against_eviction);
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "the fill overwrote the write")]
fn loom_cache_caught_fill_overwrites() {
    explore_broken(Fault::FillOverWrites, Some(3), || fill_against_write(false));
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "the fill overwrote the write")]
fn loom_cache_caught_evict_filling() {
    explore_broken(Fault::EvictFilling, Some(3), || fill_against_write(true));
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "two frames of one key")]
fn loom_cache_caught_no_set_lock() {
    explore_broken(Fault::NoSetLock, Some(3), || two_of_one_key([false, false]));
}
