//! Frames of layers that are merged: a layer that takes writes takes over what the one below it holds, and a sealed layer what
//! the one above it holds. The steps are those of `ops::merge`, with real frames, maps, marks and tables.

use super::layered::{CLUSTER, Journal, Layered, range};
use super::*;

use std::sync::Mutex;

use crate::map::fault::planted;
use crate::map::{ActiveMap, ClusterState, MapRecord, RecordKind, SectorSet, Table};
use crate::units::LayerSlot;

/// The other layer: below the one of `HERE` where that takes writes, above it where both are sealed.
const OTHER_LAYER: FrameKey = key(2, 0);
/// The slot of the layer below.
const BELOW: LayerSlot = LayerSlot(1);
/// The slot of the layer that takes writes.
const TOP: LayerSlot = LayerSlot(2);
/// The version that the layer below holds.
const OLD: u32 = 5;
/// The version that a guest writes.
const NEW: u32 = 7;

/// A layer that takes writes, over one that is sealed and holds both sectors.
struct Stack {
    /// The layer that takes writes.
    top: Arc<Layered>,
    /// Which of them answers.
    table: Table,
    /// Whether somebody leads the flushes.
    lead: AtomicU64,
    /// Of who leads.
    journal: Mutex<Journal>,
}

impl Stack {
    /// Nothing is written to the upper layer, whose file holds the first version everywhere.
    fn new(ways: usize) -> Arc<Self> {
        let (top, journal) = Layered::new(ways);
        for at in 0..SECTORS {
            let file = top.world.file(OTHER_LAYER, at);
            file.store(OLD.into(), Ordering::Relaxed);
        }
        let table = Table::new(1);
        let mut below = SectorSet::empty();
        below.apply(&MapRecord {
            kind: RecordKind::Data,
            range: range(2),
        });
        table.load_layer(BELOW, &below);
        Arc::new(Self {
            top,
            table,
            lead: AtomicU64::new(0),
            journal: Mutex::new(journal),
        })
    }

    /// The map of the layer that takes writes.
    fn map(&self) -> &ActiveMap {
        &self.top.map
    }

    /// Takes the lead of the flushes if nobody has it.
    fn try_lead(&self) -> bool {
        self.lead
            .compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
    }

    /// Gives it back.
    fn give_lead_back(&self) {
        self.lead.store(0, Ordering::Release);
    }

    /// A guest's write; acknowledged on return.
    fn write(&self, mask: SectorMask, version: u32) {
        let publish = |dirtied| {
            let change = self.map().write_cluster(CLUSTER, mask, dirtied);
            self.table.refresh(TOP, self.map(), CLUSTER, 1, change);
        };
        while !self.top.world.write_and(HERE, mask, version, publish) {
            thread::yield_now();
        }
    }

    /// A flush, by who leads. Puts the frame away afterwards, if it is clean.
    fn flush_and_evict(&self) {
        self.top.flush(&mut self.journal.lock().unwrap());
        let dirty = |state: State| state.dirty() != SectorMask::NONE;
        if !self.top.world.states(HERE).into_iter().any(dirty) {
            self.top.world.sets().trim(HERE, || SectorMask::NONE);
        }
    }

    /// The layer takes over what the one below it holds. By who leads, from the look at the map to the mark.
    fn hand_over(&self) {
        let held = self.map().get(CLUSTER).data;
        let copy = || {
            for at in sectors(SectorMask(BOTH.0 & !held.0)) {
                let (from, to) = (
                    self.top.world.file(OTHER_LAYER, at),
                    self.top.world.file(HERE, at),
                );
                to.store(from.load(Ordering::Acquire), Ordering::Release);
            }
        };
        if !planted(Fault::TableBeforeData) {
            copy();
        }
        let below = ClusterState {
            data: BOTH,
            rest_zero: false,
        };
        let change = self.map().merge_below(CLUSTER, 1, below);
        self.table.refresh(TOP, self.map(), CLUSTER, 1, change);
        if planted(Fault::TableBeforeData) {
            copy();
        }
    }

    /// A job's piece, if it gets the lead. Returns whether it was done.
    fn job(&self) -> bool {
        let leads = self.try_lead();
        if leads || planted(Fault::HandOverWithoutLead) {
            self.hand_over();
        }
        if leads {
            self.give_lead_back();
        }
        leads
    }

    /// A read of a sector as a worker does it. `None`: it would look again.
    fn read(&self, mask: SectorMask) -> Option<u32> {
        let at = sectors(mask).next().unwrap();
        let holds = || self.map().get(CLUSTER).data.contains(mask);
        if self.table.get(CLUSTER).slot == TOP && holds() {
            return self.top.read(mask).and_then(|found| found[at]);
        }
        versions(
            OTHER_LAYER,
            mask,
            &self.top.world.read_file(OTHER_LAYER, mask),
        )[at]
    }

    /// Once all is quiet: the job flushes before it gives anything back. Then the upper layer alone has all there is.
    fn assert_handed_over(&self, expected: [u32; 2]) {
        assert!(self.try_lead());
        self.top.flush(&mut self.journal.lock().unwrap());
        assert!(
            self.journal.lock().unwrap().has(BOTH),
            "the journal has what was handed over"
        );
        for (at, expected) in expected.into_iter().enumerate() {
            self.top
                .world
                .file(OTHER_LAYER, at)
                .store(FIRST.into(), Ordering::Relaxed);
            assert_eq!(
                self.top.world.latest(HERE, at),
                expected,
                "older than what was acknowledged"
            );
        }
        self.top.assert_durable(&mut self.journal.lock().unwrap());
    }
}

/// A guest writes a sector, and perhaps flushes it, while its cluster is handed over: the write wins, and the other sector is
/// what it was.
fn hand_over_against_write(before: Option<SectorMask>) {
    let stack = Stack::new(2);
    if let Some(mask) = before {
        stack.write(mask, NEW - 1);
    }
    let other = Arc::clone(&stack);
    let guest = thread::spawn(move || {
        other.write(ONE, NEW);
        if other.try_lead() {
            other.flush_and_evict();
            other.give_lead_back();
        }
    });
    let done = stack.job();
    guest.join().unwrap();
    if !done {
        assert!(stack.job());
    }
    let second = if before == Some(OTHER) { NEW - 1 } else { OLD };
    stack.assert_handed_over([NEW, second]);
}

/// A reader of a sector that is handed over finds it in either place.
fn hand_over_against_reader(write: bool) {
    let stack = Stack::new(2);
    let other = Arc::clone(&stack);
    let reader = thread::spawn(move || {
        let found = other.read(ONE);
        assert!(
            found.is_none_or(|found| found == OLD),
            "the disk holds what it held"
        );
    });
    if write {
        stack.write(OTHER, NEW);
    }
    assert!(stack.job());
    reader.join().unwrap();
    stack.assert_handed_over([OLD, if write { NEW } else { OLD }]);
}

/// The upper one of two sealed layers holds the first sector, the lower one both. Its frame of the cluster is being filled, for
/// the sake of the second sector, while the first one is moved down: what was read before must not stay.
fn fill_against_merge_down(cached: bool) {
    let world = World::new(2);
    for (at, version) in [(0, FIRST), (1, OLD)] {
        world
            .file(HERE, at)
            .store(version.into(), Ordering::Relaxed);
    }
    world
        .file(OTHER_LAYER, 0)
        .store(NEW.into(), Ordering::Relaxed);
    if cached {
        world.fill(HERE, BOTH);
    }
    // Whether the table leads to the lower layer.
    let word = Arc::new(AtomicU64::new(0));
    let (other, words) = (Arc::clone(&world), Arc::clone(&word));
    let reader = thread::spawn(move || {
        if let Some(found) = other.fill(HERE, BOTH) {
            assert_eq!(found[1], Some(OLD));
        }
        if words.load(Ordering::Acquire) == 1 {
            let found = match other.read(HERE, ONE) {
                Ok(found) => found[0],
                Err(Read::Miss) => versions(HERE, ONE, &other.read_file(HERE, ONE))[0],
                Err(_) => None,
            };
            assert!(
                found.is_none_or(|found| found == NEW),
                "the disk holds what it held"
            );
        }
    });
    let data = world.file(OTHER_LAYER, 0).load(Ordering::Relaxed);
    world.file(HERE, 0).store(data, Ordering::Release);
    if !planted(Fault::MergeWithoutTrim) {
        world.sets().trim(HERE, || SectorMask::NONE);
    }
    word.store(1, Ordering::Release);
    reader.join().unwrap();
    assert_eq!(world.latest(HERE, 0), NEW, "the disk holds what it held");
    assert_eq!(world.latest(HERE, 1), OLD, "the disk holds what it held");
}

#[test]
fn loom_cache_hand_over_against_first_write() {
    explore(Some(3), || hand_over_against_write(None));
}

#[test]
fn loom_cache_hand_over_against_write_of_same_sector() {
    explore(Some(2), || hand_over_against_write(Some(ONE)));
}

#[test]
fn loom_cache_hand_over_against_write_of_other_sector() {
    explore(Some(2), || hand_over_against_write(Some(OTHER)));
}

#[test]
fn loom_cache_hand_over_against_reader() {
    explore(Some(3), || hand_over_against_reader(false));
}

#[test]
fn loom_cache_hand_over_and_write_against_reader() {
    explore(Some(2), || hand_over_against_reader(true));
}

#[test]
fn loom_cache_fill_against_merge_down() {
    explore(Some(4), || fill_against_merge_down(false));
}

#[test]
fn loom_cache_frame_against_merge_down() {
    explore(Some(4), || fill_against_merge_down(true));
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "the journal has what was handed over")]
fn loom_cache_caught_hand_over_without_mark() {
    explore_broken(Fault::HandOverWithoutMark, Some(2), || {
        hand_over_against_write(None)
    });
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "older than what was acknowledged")]
fn loom_cache_caught_hand_over_without_lead() {
    explore_broken(Fault::HandOverWithoutLead, Some(3), || {
        hand_over_against_write(None)
    });
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "the disk holds what it held")]
fn loom_cache_caught_hand_over_before_data() {
    explore_broken(Fault::TableBeforeData, Some(3), || {
        hand_over_against_reader(false)
    });
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "the disk holds what it held")]
fn loom_cache_caught_merge_without_trim() {
    explore_broken(Fault::MergeWithoutTrim, Some(3), || {
        fill_against_merge_down(false)
    });
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "the disk holds what it held")]
fn loom_cache_caught_keep_spoiled_by_a_merge() {
    explore_broken(Fault::KeepSpoiled, Some(3), || {
        fill_against_merge_down(false)
    });
}
