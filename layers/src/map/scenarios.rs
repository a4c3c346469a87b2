//! The races of this module, each as a small scenario with two runners: under loom every interleaving and every value
//! that the memory model allows, else many rounds on real threads with tables of real size.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p stratablk-layers --release --lib loom_ --target-dir target/loom
//! ```
//!
//! Loom 0.7 has a blind spot: of the accesses to an atomic it remembers only the last one, so that it does not try a
//! thread's "load, then compare-and-swap" before another thread's earlier load. The scenarios whose point is such an
//! order say so with a [`Pace`], a read-modify-write that orders nothing but makes loom try both.
//! Scenarios that are too large for every interleaving have a bound of preemptions (`LOOM_MAX_PREEMPTIONS` overrides it).
//!
//! The tests named `caught` plant a fault (see `fault.rs`) and must fail; only a model is sure to find them.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod cached;
mod merged;

use std::sync::Arc;

use crate::map::active::ActiveMap;
use crate::map::fault::{Fault, planted};
use crate::map::radix::{REGION_CLUSTERS, Radix, SPAN_CLUSTERS};
use crate::map::record::MapRecord;
use crate::map::set::SectorSet;
use crate::map::table::{Resolve, Table};
use crate::sync::{AtomicU64, Ordering, thread};
use crate::units::{CLUSTER_SECTORS, Cluster, LayerSlot, Sector, SectorMask, SectorRange};

/// The slot of the layer that takes writes.
const ACTIVE: LayerSlot = LayerSlot(2);
/// The slot of the layer below it.
const OLDER: LayerSlot = LayerSlot(1);
/// The cluster that everybody fights over.
const HERE: Cluster = Cluster(0);

/// Runs a scenario in every way there is with at most so many preemptions; without limit if `None`.
#[cfg(loom)]
fn explore(preemptions: Option<usize>, scenario: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(preemptions);
    builder.check(scenario);
}

/// Runs a scenario often.
#[cfg(not(loom))]
fn explore(_preemptions: Option<usize>, scenario: impl Fn() + Send + Sync + 'static) {
    for _ in 0..2_000 {
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

/// Makes loom try every order of the threads that come here. Relaxed and always the same value, so that nothing is
/// ordered by it that is not ordered without.
struct Pace(AtomicU64);

impl Pace {
    /// A place to meet.
    fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Before or after the others.
    fn step(&self) {
        self.0.fetch_or(0, Ordering::Relaxed);
    }
}

/// A contested thing and the pace of those who fight over it.
type Contested<T> = Arc<(T, Pace)>;

/// Such a thing for two threads.
fn contested<T>(thing: T) -> (Contested<T>, Contested<T>) {
    let mine = Arc::new((thing, Pace::new()));
    (Arc::clone(&mine), mine)
}

/// Sectors `index .. index + count` of the contested cluster.
fn sectors(index: u64, count: u64) -> SectorRange {
    SectorRange {
        start: Sector(HERE.first_sector().0 + index),
        count,
    }
}

/// Two threads change neighbours in a uniform region, so that both want to put a leaf (and a node) there.
fn leaf_race() {
    let radix = Arc::new(Radix::<u32>::new(SPAN_CLUSTERS, 7));
    let other = Arc::clone(&radix);
    let thread = thread::spawn(move || other.update(0, 1, |_| Some(1), |_| {}));
    radix.update(1, 1, |_| Some(2), |_| {});
    thread.join().unwrap();
    assert_eq!(
        (radix.get(0), radix.get(1)),
        (1, 2),
        "both changes are there"
    );
    assert_eq!(
        radix.get(SPAN_CLUSTERS - 1),
        7,
        "the others have the word of the entry"
    );
}

/// One thread changes `count` clusters as a whole, the other one of them: neither change may be lost, in whatever level
/// each of them lands.
fn coarse_against_fine(count: u64) {
    let radix = Arc::new(Radix::<u16>::new(SPAN_CLUSTERS, 0));
    let other = Arc::clone(&radix);
    let thread = thread::spawn(move || {
        let mut seen = 0;
        other.update(0, count, |old| Some(old | 1), |run| seen += run.count);
        assert_eq!(seen, count, "each cluster is reported once");
    });
    radix.update(0, 1, |old| Some(old | 2), |_| {});
    thread.join().unwrap();
    assert_eq!(radix.get(0), 3, "both changes are in the word");
    assert_eq!(radix.get(count - 1), 1);
}

/// A reader meets a writer that puts new levels in: it sees the old word or the new one, and never the old one again.
fn old_or_new() {
    let (mine, other) = contested(Radix::<u32>::new(SPAN_CLUSTERS, 7));
    let thread = thread::spawn(move || {
        let (radix, pace) = &*other;
        pace.step();
        radix.update(0, 1, |_| Some(1), |_| {});
    });
    let (radix, pace) = &*mine;
    let mut last = 7;
    for _ in 0..2 {
        pace.step();
        let found = radix.get(0);
        assert!(found == 1 || found == last, "the new word does not go away");
        assert_eq!(radix.get(1), 7, "nothing happens to the neighbour");
        last = found;
    }
    thread.join().unwrap();
    assert_eq!(radix.get(0), 1);
}

/// Applies what was collected, and says whether the sectors of `mask` of the contested cluster are data by then.
fn journal(set: &mut SectorSet, records: &[MapRecord], mask: SectorMask) -> bool {
    records.iter().for_each(|record| set.apply(record));
    set.cluster(HERE).0.contains(mask)
}

/// Two writers overlap. One is acknowledged, then a flush begins: it must have this one's sectors, though the other one
/// may have changed the word and not yet marked the region.
fn flush_after_acknowledgement(mine: SectorRange) {
    let map = Arc::new(ActiveMap::new(REGION_CLUSTERS));
    let other = Arc::clone(&map);
    let thread = thread::spawn(move || {
        let _ = other.write(sectors(0, 1));
    });
    let _ = map.write(mine);
    let mut set = SectorSet::empty();
    let written = SectorMask::span(
        mine.start.index_in_cluster(),
        u32::try_from(mine.count).unwrap(),
    );
    assert!(
        journal(&mut set, &map.collect(usize::MAX).records, written),
        "the flush has what was acknowledged before it"
    );
    thread.join().unwrap();
    assert!(
        journal(
            &mut set,
            &map.collect(usize::MAX).records,
            SectorMask::span(0, 1)
        ),
        "the next one has the rest"
    );
    assert_eq!(set, map.to_set(), "and nothing else");
}

/// An earlier flush collects the region while a write changes another word of it. The next flush must have the write,
/// though its region's bit was set when it looked.
fn flush_against_flush() {
    let (mine, other) = contested(ActiveMap::new(REGION_CLUSTERS));
    let (map, pace) = &*mine;
    let _ = map.write(SectorRange {
        start: Sector(CLUSTER_SECTORS),
        count: 1,
    });
    let earlier = thread::spawn(move || {
        let (map, pace) = &*other;
        pace.step();
        map.collect(usize::MAX).records
    });
    pace.step();
    let _ = map.write(sectors(0, 1));
    pace.step();
    let mut set = SectorSet::empty();
    journal(&mut set, &earlier.join().unwrap(), SectorMask::NONE);
    assert!(
        journal(
            &mut set,
            &map.collect(usize::MAX).records,
            SectorMask::span(0, 1)
        ),
        "one of them has the write"
    );
    assert_eq!(set, map.to_set());
}

/// One thread zeroes `count` clusters, the other writes into one of them and flushes: applied in order, the two
/// collections give the map.
fn flush_against_zero(count: u64) {
    let (mine, other) = contested(ActiveMap::new(REGION_CLUSTERS));
    let thread = thread::spawn(move || {
        let (map, pace) = &*other;
        pace.step();
        let _ = map.zero(HERE, count);
    });
    let (map, pace) = &*mine;
    let _ = map.write(sectors(3, 1));
    pace.step();
    let mut set = SectorSet::empty();
    journal(&mut set, &map.collect(usize::MAX).records, SectorMask::NONE);
    thread.join().unwrap();
    journal(&mut set, &map.collect(usize::MAX).records, SectorMask::NONE);
    assert_eq!(set, map.to_set());
}

/// A map and its table, as one volume has them.
struct Volume {
    /// The active layer's map.
    map: ActiveMap,
    /// The table.
    table: Table,
    /// Where threads take turns.
    pace: Pace,
}

impl Volume {
    /// An empty layer over nothing.
    fn new(clusters: u64) -> Arc<Self> {
        Arc::new(Self {
            map: ActiveMap::new(clusters),
            table: Table::new(clusters),
            pace: Pace::new(),
        })
    }

    /// A write as a worker does it; acknowledged on return.
    fn write(&self, range: SectorRange) {
        let change = self.map.write(range);
        self.pace.step();
        self.table
            .refresh(ACTIVE, &self.map, range.start.cluster(), 1, change);
    }

    /// Zeroing as a worker does it; acknowledged on return.
    fn zero(&self, count: u64) {
        self.pace.step();
        let change = self.map.zero(HERE, count);
        self.table.refresh(ACTIVE, &self.map, HERE, count, change);
    }

    /// Whether a reader finds the sector in the active layer's file.
    fn reads_data(&self, index: u32) -> bool {
        let found = self.table.get(HERE);
        let mask = if planted(Fault::TrustTheMask) {
            found.mask
        } else {
            self.map.get(HERE).data
        };
        found.slot == ACTIVE && mask.contains(SectorMask::span(index, 1))
    }

    /// Fails unless the table says what the map says.
    fn assert_equal(&self, cluster: Cluster) {
        let state = self.map.get(cluster);
        let expected = if state.is_absent() {
            Resolve::default()
        } else {
            Resolve {
                slot: ACTIVE,
                mask: state.data,
            }
        };
        assert_eq!(
            self.table.get(cluster),
            expected,
            "the table follows the map"
        );
    }
}

/// A write and a zero meet in one cluster: whoever comes last in the map, the table says the same in the end.
fn write_against_zero(zeroed: u64) {
    let volume = Volume::new(REGION_CLUSTERS);
    if zeroed == 1 {
        // The races of new leaves have scenarios of their own.
        volume.write(sectors(0, 1));
    }
    let other = Arc::clone(&volume);
    let thread = thread::spawn(move || other.zero(zeroed));
    volume.write(sectors(0, CLUSTER_SECTORS));
    thread.join().unwrap();
    volume.assert_equal(HERE);
    volume.assert_equal(Cluster(REGION_CLUSTERS - 1));
}

/// As above, but the cluster is zero before: who zeroes it again finds the table right already.
fn zero_again_against_write() {
    let volume = Volume::new(REGION_CLUSTERS);
    volume.zero(1);
    let other = Arc::clone(&volume);
    let thread = thread::spawn(move || other.write(sectors(0, CLUSTER_SECTORS)));
    volume.zero(1);
    thread.join().unwrap();
    volume.assert_equal(HERE);
}

/// Two writers of different sectors.
fn writers_of_one_cluster() {
    let volume = Volume::new(REGION_CLUSTERS);
    let other = Arc::clone(&volume);
    let thread = thread::spawn(move || other.write(sectors(0, 1)));
    volume.write(sectors(1, 1));
    assert!(volume.reads_data(1), "what was acknowledged is read");
    thread.join().unwrap();
    assert!(volume.reads_data(0) && volume.reads_data(1));
    volume.assert_equal(HERE);
}

/// A write of the old generation completes late, after one of the new generation or in its midst: the newer slot stays.
fn late_write_of_older_generation() {
    let (mine, other) = contested(Table::new(REGION_CLUSTERS));
    let thread = thread::spawn(move || {
        let (table, pace) = &*other;
        let map = ActiveMap::new(REGION_CLUSTERS);
        let change = map.write(sectors(0, CLUSTER_SECTORS));
        pace.step();
        table.refresh(OLDER, &map, HERE, 1, change);
    });
    let (table, pace) = &*mine;
    let map = ActiveMap::new(REGION_CLUSTERS);
    let change = map.write(sectors(0, 1));
    pace.step();
    table.refresh(ACTIVE, &map, HERE, 1, change);
    let expected = Resolve {
        slot: ACTIVE,
        mask: SectorMask::span(0, 1),
    };
    assert_eq!(table.get(HERE), expected, "acknowledged, so it is there");
    thread.join().unwrap();
    assert_eq!(table.get(HERE), expected, "and it stays");
}

/// A reader meets the first write to a cluster of an older layer: it finds either layer, never the older one again, and
/// in the newer one's map what the write wrote.
fn reader_of_first_write() {
    let volume = Volume::new(REGION_CLUSTERS);
    let base = SectorSet::everything(Sector(REGION_CLUSTERS * CLUSTER_SECTORS));
    volume.table.load_layer(OLDER, &base);
    let other = Arc::clone(&volume);
    let thread = thread::spawn(move || other.write(sectors(2, 1)));
    let mut last = LayerSlot::NONE;
    for _ in 0..2 {
        volume.pace.step();
        let found = volume.table.get(HERE).slot;
        assert!(found >= last && found >= OLDER, "slots never fall");
        if found == ACTIVE {
            assert_eq!(
                volume.map.get(HERE).data,
                SectorMask::span(2, 1),
                "the map came first"
            );
        }
        last = found;
    }
    assert_eq!(volume.table.get(Cluster(1)).slot, OLDER);
    thread.join().unwrap();
    volume.assert_equal(HERE);
}

/// A slow write of sector 3 holds what the map said for a moment in between, while sector 5 is zeroed and written anew:
/// who then reads sector 5 finds its data, whatever the slow one does to the table.
fn acknowledged_stays() {
    let volume = Volume::new(REGION_CLUSTERS);
    volume.write(sectors(5, 1));
    let other = Arc::clone(&volume);
    let slow = thread::spawn(move || other.write(sectors(3, 1)));
    volume.zero(1);
    volume.write(sectors(5, 1));
    assert!(volume.reads_data(5), "what was acknowledged is read");
    slow.join().unwrap();
    volume.assert_equal(HERE);
}

#[test]
fn loom_leaf_race() {
    explore(None, leaf_race);
}

#[test]
fn loom_region_against_leaf() {
    explore(None, || coarse_against_fine(REGION_CLUSTERS));
}

#[test]
fn loom_span_against_node() {
    explore(None, || coarse_against_fine(SPAN_CLUSTERS));
}

#[test]
fn loom_old_or_new() {
    explore(None, old_or_new);
}

#[test]
fn loom_flush_after_acknowledgement_of_same_sector() {
    explore(Some(6), || flush_after_acknowledgement(sectors(0, 1)));
}

#[test]
fn loom_flush_after_acknowledgement_of_other_sector() {
    explore(Some(6), || flush_after_acknowledgement(sectors(1, 1)));
}

#[test]
fn loom_flush_against_flush() {
    explore(None, flush_against_flush);
}

#[test]
fn loom_flush_against_zero_of_cluster() {
    explore(Some(6), || flush_against_zero(1));
}

#[test]
fn loom_flush_against_zero_of_region() {
    explore(Some(4), || flush_against_zero(REGION_CLUSTERS));
}

#[test]
fn loom_write_against_zero_of_cluster() {
    explore(None, || write_against_zero(1));
}

#[test]
fn loom_write_against_zero_of_region() {
    explore(Some(4), || write_against_zero(REGION_CLUSTERS));
}

#[test]
fn loom_zero_again_against_write() {
    explore(None, zero_again_against_write);
}

#[test]
fn loom_writers_of_one_cluster() {
    explore(Some(3), writers_of_one_cluster);
}

#[test]
fn loom_late_write_of_older_generation() {
    explore(None, late_write_of_older_generation);
}

#[test]
fn loom_reader_of_first_write() {
    explore(None, reader_of_first_write);
}

#[test]
fn loom_acknowledged_stays() {
    explore(Some(4), acknowledged_stays);
}

/// Real threads write, zero and flush all over a disk; in the end journal, map and table agree.
#[cfg(not(loom))]
#[test]
fn many_threads_agree_in_the_end() {
    stress(true);
}

/// Real threads write, each its own sector of every cluster, and read back what they wrote; nobody zeroes.
#[cfg(not(loom))]
#[test]
fn many_threads_read_what_they_wrote() {
    stress(false);
}

/// Four writers and a collector. Each writer reads back its own sector after every write, unless others may zero it.
#[cfg(not(loom))]
fn stress(zeroes: bool) {
    /// A span and a bit, so that all levels are there.
    const CLUSTERS: u64 = SPAN_CLUSTERS + 3 * REGION_CLUSTERS;
    let map = ActiveMap::new(CLUSTERS);
    let table = Table::new(CLUSTERS);
    let writers_left = AtomicU64::new(4);
    let mut journal = SectorSet::empty();
    std::thread::scope(|scope| {
        for writer in 0..4u32 {
            let (map, table, writers_left) = (&map, &table, &writers_left);
            scope.spawn(move || {
                let mut random = 0x9e37_79b9_7f4a_7c15u64 ^ u64::from(writer);
                for round in 0..100_000u32 {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    // Mostly a few clusters in a few regions, at times anywhere.
                    let at = if round % 16 == 0 {
                        random % CLUSTERS
                    } else {
                        random % 4 * REGION_CLUSTERS + random / 4 % 4
                    };
                    let cluster = Cluster(at);
                    if zeroes && random >> 60 == 0 {
                        let count = if random >> 56 == 0 {
                            REGION_CLUSTERS
                        } else {
                            1 + random % 3
                        };
                        let change = map.zero(cluster, count);
                        table.refresh(ACTIVE, map, cluster, count, change);
                        continue;
                    }
                    let start = Sector(cluster.first_sector().0 + u64::from(writer));
                    let change = map.write(SectorRange { start, count: 1 });
                    table.refresh(ACTIVE, map, cluster, 1, change);
                    assert_eq!(table.get(cluster).slot, ACTIVE);
                    let data = map.get(cluster).data;
                    assert!(zeroes || data.contains(SectorMask::span(writer, 1)));
                }
                writers_left.fetch_sub(1, Ordering::Release);
            });
        }
        while writers_left.load(Ordering::Acquire) != 0 {
            map.collect(usize::MAX)
                .records
                .iter()
                .for_each(|record| journal.apply(record));
        }
    });
    map.collect(usize::MAX)
        .records
        .iter()
        .for_each(|record| journal.apply(record));
    assert_eq!(journal, map.to_set(), "the journal has everything");
    for cluster in (0..CLUSTERS).map(Cluster) {
        let state = map.get(cluster);
        let slot = if state.is_absent() {
            LayerSlot::NONE
        } else {
            ACTIVE
        };
        assert_eq!(
            table.get(cluster),
            Resolve {
                slot,
                mask: state.data
            },
            "the table follows the map"
        );
    }
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "the others have the word of the entry")]
fn loom_caught_empty_leaf() {
    explore_broken(Fault::EmptyLeaf, None, leaf_race);
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "the flush has what was acknowledged before it")]
fn loom_caught_mark_only_own_changes() {
    explore_broken(Fault::MarkOnlyOwnChanges, None, || {
        flush_after_acknowledgement(sectors(0, 1))
    });
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "one of them has the write")]
fn loom_caught_look_before_marking() {
    explore_broken(Fault::LookBeforeMarking, None, flush_against_flush);
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "the table follows the map")]
fn loom_caught_refresh_once() {
    explore_broken(Fault::RefreshOnce, None, || write_against_zero(1));
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "the table follows the map")]
fn loom_caught_refresh_without_touch() {
    explore_broken(Fault::RefreshWithoutTouch, None, zero_again_against_write);
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "and it stays")]
fn loom_caught_older_slot_wins() {
    explore_broken(Fault::OlderSlotWins, None, late_write_of_older_generation);
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "what was acknowledged is read")]
fn loom_caught_trust_the_mask() {
    explore_broken(Fault::TrustTheMask, None, acknowledged_stays);
}
