//! Two neighbouring sealed layers are merged, upwards or downwards, below a layer that takes writes, while guests read and
//! write.
//!
//! Table, sets, clock and the map on top are the real ones, files are one atomic a sector. The steps are those of a merge:
//!
//! 1. the data is copied into the file of the layer that gains it;
//! 2. its set says so, then the table's words follow; downwards, the upper layer's set loses it;
//! 3. the clock is advanced and no request of before is under way any more;
//! 4. upwards, the lower layer's set loses it; its place is given back.

use std::sync::{Arc, Mutex};

use crate::generation::{Announcement, Clock, Oldest};
use crate::map::active::ActiveMap;
use crate::map::fault::{Fault, planted};
#[cfg(not(loom))]
use crate::map::radix::REGION_CLUSTERS;
use crate::map::record::{MapRecord, RecordKind};
use crate::map::set::SectorSet;
use crate::map::table::Table;
use crate::sync::{AtomicU64, Ordering, thread};
use crate::units::{CLUSTER_SECTORS, Cluster, LayerSlot, Sector, SectorMask, SectorRange};

#[cfg(loom)]
use super::explore_broken;
use super::{HERE, Pace, explore};

/// The lower one of the two.
const LOWER: LayerSlot = LayerSlot(1);
/// The upper one.
const UPPER: LayerSlot = LayerSlot(2);
/// The layer that takes writes.
const TOP: LayerSlot = LayerSlot(3);
/// Sectors of a cluster that the scenarios use.
const SECTORS: u64 = 2;
/// What a sector holds that was given back.
const PUNCHED: u64 = 0;
/// What a sector of the lower layer holds that the upper one hides.
const HIDDEN: u64 = u64::MAX;
/// Sets that are kept for who has just looked which one it is.
const KEPT: usize = 1 << 12;
/// What is read where no layer says anything.
const NOTHING: u64 = u64::MAX - 1;

/// The way the data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Into the upper layer.
    Up,
    /// Into the lower layer.
    Down,
}

/// Three layers of one disk.
struct Disk {
    /// The generations.
    clock: Clock,
    /// Which layer answers for which cluster.
    table: Table,
    /// What the sealed layers hold, the lower one's first.
    sets: [Published; 2],
    /// What the top layer holds.
    map: ActiveMap,
    /// What the files hold, by slot, cluster and sector.
    files: Vec<AtomicU64>,
    /// How many clusters there are.
    clusters: u64,
    /// Where threads take turns.
    pace: Pace,
}

/// A set that is replaced by pointer, as `ArcSwap` does it: here the number of one of those that there were.
struct Published {
    /// All of them.
    sets: Mutex<Vec<SectorSet>>,
    /// Which one it is.
    current: AtomicU64,
}

impl Published {
    /// A set to begin with.
    fn new() -> Self {
        Self {
            sets: Mutex::new(vec![SectorSet::empty()]),
            current: AtomicU64::new(0),
        }
    }

    /// The set now.
    fn load(&self) -> SectorSet {
        let current = usize::try_from(self.current.load(Ordering::Acquire)).unwrap();
        self.sets.lock().unwrap()[current % KEPT].clone()
    }

    /// Another one from now on; by one thread.
    fn store(&self, set: SectorSet) {
        let next = usize::try_from(self.current.load(Ordering::Relaxed)).unwrap() + 1;
        {
            let mut sets = self.sets.lock().unwrap();
            if sets.len() < KEPT {
                sets.push(set);
            } else {
                sets[next % KEPT] = set;
            }
        }
        self.current.store(next as u64, Ordering::Release);
    }
}

/// A sector of a cluster.
fn sector(cluster: Cluster, index: u64) -> Sector {
    Sector(cluster.first_sector().0 + index)
}

/// What a sector that only the sealed layers hold reads as.
fn content(cluster: Cluster, index: u64) -> u64 {
    1 + cluster.0 * SECTORS + index
}

impl Disk {
    /// A disk whose lower layer holds everything, and whose upper one holds the sectors of `upper` in every cluster.
    fn new(clusters: u64, upper: SectorMask) -> Arc<Self> {
        let disk = Self {
            clock: Clock::new(),
            table: Table::new(clusters),
            sets: [Published::new(), Published::new()],
            map: ActiveMap::new(clusters),
            files: (0..3 * clusters * SECTORS)
                .map(|_| AtomicU64::new(PUNCHED))
                .collect(),
            clusters,
            pace: Pace::new(),
        };
        let (mut low, mut high) = (SectorSet::empty(), SectorSet::empty());
        for cluster in (0..clusters).map(Cluster) {
            for index in 0..SECTORS {
                let what = content(cluster, index);
                if upper.0 >> index & 1 != 0 {
                    disk.gain(&mut high, (UPPER, cluster, index), what);
                    disk.gain(&mut low, (LOWER, cluster, index), HIDDEN);
                } else {
                    disk.gain(&mut low, (LOWER, cluster, index), what);
                }
            }
        }
        for (slot, set) in [(LOWER, low), (UPPER, high)] {
            disk.table.load_layer(slot, &set);
            disk.replace_set(slot, set);
        }
        Arc::new(disk)
    }

    /// A sealed layer holds one more sector.
    fn gain(&self, set: &mut SectorSet, place: (LayerSlot, Cluster, u64), what: u64) {
        let (slot, cluster, index) = place;
        self.file(slot, cluster, index)
            .store(what, Ordering::Relaxed);
        set.apply(&MapRecord {
            kind: RecordKind::Data,
            range: SectorRange::new(sector(cluster, index), 1).unwrap(),
        });
    }

    /// What a sealed layer holds now.
    fn set(&self, slot: LayerSlot) -> SectorSet {
        self.pace.step();
        self.sets[usize::try_from(slot.0).unwrap() - 1].load()
    }

    /// What a sealed layer holds from now on.
    fn replace_set(&self, slot: LayerSlot, set: SectorSet) {
        self.pace.step();
        self.sets[usize::try_from(slot.0).unwrap() - 1].store(set);
    }

    /// A sector of a file.
    fn file(&self, slot: LayerSlot, cluster: Cluster, index: u64) -> &AtomicU64 {
        let at = (u64::from(slot.0 - 1) * self.clusters + cluster.0) * SECTORS + index;
        &self.files[usize::try_from(at).unwrap()]
    }

    /// Reads a sector as a worker does it: what is looked at in the tables, and then in the file.
    fn read(&self, worker: &Announcement, cluster: Cluster, index: u64) -> u64 {
        worker.enter(&self.clock, Oldest::default());
        let place = self.resolve(cluster, index);
        self.pace.step();
        let found = place.map_or(NOTHING, |slot| {
            self.file(slot, cluster, index).load(Ordering::Acquire)
        });
        worker.leave(Oldest::default());
        found
    }

    /// Which layer holds a sector.
    fn resolve(&self, cluster: Cluster, index: u64) -> Option<LayerSlot> {
        let bit = SectorMask(1 << index);
        let word = self.table.get(cluster);
        if word.slot == TOP {
            if self.map.get(cluster).data.contains(bit) {
                return Some(TOP);
            }
        } else if word.mask.contains(bit) {
            return Some(word.slot);
        }
        // The masks of sealed layers are exact, or were before a step of the merge: then the sets have the rest.
        let below = [UPPER, LOWER].into_iter().filter(|slot| *slot <= word.slot);
        let holds = |slot: &LayerSlot| self.set(*slot).cluster(cluster).0.contains(bit);
        below.into_iter().find(holds)
    }

    /// A write to the top layer; acknowledged on return.
    fn write(&self, worker: &Announcement, cluster: Cluster, index: u64, what: u64) {
        worker.enter(&self.clock, Oldest::default());
        self.file(TOP, cluster, index)
            .store(what, Ordering::Release);
        let change = self
            .map
            .write(SectorRange::new(sector(cluster, index), 1).unwrap());
        self.pace.step();
        self.table.refresh(TOP, &self.map, cluster, 1, change);
        worker.leave(Oldest::default());
    }

    /// One step of a merge. `wait` answers whether no request of before the generation is under way any more.
    fn merge(
        &self,
        way: Way,
        first: Cluster,
        count: u64,
        wait: impl Fn(&Clock, crate::units::Generation) -> bool,
    ) {
        let (from, to) = match way {
            Way::Up => (LOWER, UPPER),
            Way::Down => (UPPER, LOWER),
        };
        let (lower, upper) = (self.set(LOWER), self.set(UPPER));
        let both = upper.within(first, count).over(&lower.within(first, count));
        let moved: Vec<_> = match way {
            Way::Up => lower.under(&upper).data_runs(first, count).collect(),
            Way::Down => upper.data_runs_in(first, count).collect(),
        };
        let copy = || {
            for at in moved.iter().flat_map(|run| run.start.0..run.end().0) {
                let (cluster, index) = (Sector(at).cluster(), at % CLUSTER_SECTORS);
                let what = self.file(from, cluster, index).load(Ordering::Relaxed);
                self.file(to, cluster, index).store(what, Ordering::Relaxed);
            }
        };
        if !planted(Fault::TableBeforeData) {
            copy();
        }
        let gained = self.set(to).with(first, count, &both);
        self.replace_set(to, gained.clone());
        self.table.replace(first, count, from, to, &gained);
        if planted(Fault::TableBeforeData) {
            copy();
        }
        let lost = self.set(from).without(first, count);
        let late = way == Way::Up || planted(Fault::LoseTooLate);
        if !late || planted(Fault::LoseTooEarly) {
            self.replace_set(from, lost.clone());
        }
        let generation = self.clock.advance();
        if !wait(&self.clock, generation) && !planted(Fault::PunchBeforeQuiescent) {
            return;
        }
        if late {
            self.replace_set(from, lost);
        }
        for cluster in (first.0..first.0 + count).map(Cluster) {
            for index in 0..SECTORS {
                self.file(from, cluster, index)
                    .store(PUNCHED, Ordering::Relaxed);
            }
        }
    }
}

/// A merge of the one cluster there is; what it cannot give back now it leaves.
fn merge_here(disk: &Disk, way: Way) {
    disk.merge(way, HERE, 1, Clock::quiescent_for_reads);
}

/// A reader that is somewhere in between while two layers are merged finds what the disk holds.
fn reader(way: Way, upper: SectorMask, index: u64) {
    let disk = Disk::new(1, upper);
    let worker = disk.clock.register();
    let other = Arc::clone(&disk);
    let thread = thread::spawn(move || {
        let found = other.read(&worker, HERE, index);
        assert_eq!(found, content(HERE, index), "the disk holds what it held");
    });
    merge_here(&disk, way);
    thread.join().unwrap();
    let worker = disk.clock.register();
    for index in 0..SECTORS {
        assert_eq!(disk.read(&worker, HERE, index), content(HERE, index));
    }
}

/// A write on top meets a merge: whoever comes last in the table, the top layer has the cluster, and nothing else of it has
/// changed.
fn writer(way: Way, upper: SectorMask) {
    let disk = Disk::new(1, upper);
    let worker = disk.clock.register();
    let other = Arc::clone(&disk);
    let thread = thread::spawn(move || {
        other.write(&worker, HERE, 1, 77);
        assert_eq!(
            other.read(&worker, HERE, 1),
            77,
            "what was acknowledged is read"
        );
    });
    merge_here(&disk, way);
    thread.join().unwrap();
    assert_eq!(
        disk.table.get(HERE).slot,
        TOP,
        "what was acknowledged is read"
    );
    let worker = disk.clock.register();
    assert_eq!(disk.read(&worker, HERE, 1), 77);
    assert_eq!(disk.read(&worker, HERE, 0), content(HERE, 0));
}

/// All three at once, and so a reader that goes through the top layer to the sets of the others: it finds the old content of
/// what is being written or the new one, and of its neighbour the only one there is.
fn reader_and_writer(way: Way, upper: SectorMask, index: u64) {
    let disk = Disk::new(1, upper);
    let (reading, writing) = (disk.clock.register(), disk.clock.register());
    let other = Arc::clone(&disk);
    let writer = thread::spawn(move || other.write(&writing, HERE, 1, 77));
    let other = Arc::clone(&disk);
    let reader = thread::spawn(move || {
        let found = other.read(&reading, HERE, index);
        assert!(
            found == content(HERE, index) || (index == 1 && found == 77),
            "the disk holds what it held"
        );
    });
    merge_here(&disk, way);
    reader.join().unwrap();
    writer.join().unwrap();
}

/// The first sector.
const ONE: SectorMask = SectorMask(1);

#[test]
fn loom_merge_up_against_reader_of_what_moves() {
    explore(Some(4), || reader(Way::Up, ONE, 1));
}

#[test]
fn loom_merge_up_against_reader_of_what_stays() {
    explore(Some(4), || reader(Way::Up, ONE, 0));
}

#[test]
fn loom_merge_up_of_a_whole_cluster_against_reader() {
    explore(Some(4), || reader(Way::Up, SectorMask::NONE, 0));
}

#[test]
fn loom_merge_down_against_reader_of_what_moves() {
    explore(Some(4), || reader(Way::Down, ONE, 0));
}

#[test]
fn loom_merge_down_against_reader_of_what_stays() {
    explore(Some(4), || reader(Way::Down, ONE, 1));
}

#[test]
fn loom_merge_up_against_writer() {
    explore(Some(3), || writer(Way::Up, ONE));
}

#[test]
fn loom_merge_down_against_writer() {
    explore(Some(3), || writer(Way::Down, ONE));
}

#[test]
fn loom_merge_up_against_reader_and_writer() {
    explore(Some(2), || reader_and_writer(Way::Up, ONE, 1));
}

#[test]
fn loom_merge_down_against_reader_and_writer() {
    explore(Some(2), || reader_and_writer(Way::Down, ONE, 0));
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "the disk holds what it held")]
fn loom_caught_punch_before_quiescent() {
    explore_broken(Fault::PunchBeforeQuiescent, Some(3), || {
        reader(Way::Up, ONE, 1)
    });
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "the disk holds what it held")]
fn loom_caught_lose_too_early() {
    explore_broken(Fault::LoseTooEarly, Some(3), || reader(Way::Up, ONE, 1));
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "the disk holds what it held")]
fn loom_caught_lose_too_late() {
    explore_broken(Fault::LoseTooLate, Some(2), || {
        reader_and_writer(Way::Down, ONE, 0)
    });
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "the disk holds what it held")]
fn loom_caught_table_before_data_upwards() {
    explore_broken(Fault::TableBeforeData, Some(3), || reader(Way::Up, ONE, 1));
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "the disk holds what it held")]
fn loom_caught_table_before_data_downwards() {
    explore_broken(Fault::TableBeforeData, Some(3), || {
        reader(Way::Down, ONE, 0)
    });
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "the disk holds what it held")]
fn loom_caught_read_unannounced_by_a_merge() {
    explore_broken(Fault::ReadUnannounced, Some(3), || reader(Way::Up, ONE, 1));
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "what was acknowledged is read")]
fn loom_caught_replace_beats_newer() {
    explore_broken(Fault::ReplaceBeatsNewer, Some(3), || writer(Way::Up, ONE));
}

/// Real threads read and write all over a disk while its layers are merged up and down again; with a fault in the merge.
/// Returns whether everybody read what the disk holds.
#[cfg(not(loom))]
fn stress(rounds: u64, fault: Option<Fault>) -> bool {
    /// Some regions, not whole.
    const CLUSTERS: u64 = 2 * REGION_CLUSTERS + 100;
    let disk = Disk::new(CLUSTERS, ONE);
    let (over, broken) = (AtomicU64::new(0), AtomicU64::new(0));
    let run = |number: u64| {
        let worker = disk.clock.register();
        let mut random = 0x9e37_79b9_7f4a_7c15u64 ^ number;
        let mut version = 1 << 40;
        while over.load(Ordering::Relaxed) == 0 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let cluster = Cluster(random % CLUSTERS);
            let index = random >> 33 & 1;
            // The writer has every fourth cluster for itself, and reads there what it wrote last.
            if number == 0 && cluster.0.is_multiple_of(4) && random >> 61 == 0 {
                version += 1;
                disk.write(&worker, cluster, index, version);
                if disk.read(&worker, cluster, index) != version {
                    broken.store(1, Ordering::Relaxed);
                }
                continue;
            }
            let found = disk.read(&worker, cluster, index);
            let written = cluster.0.is_multiple_of(4) && found > 1 << 40 && found < NOTHING;
            if found != content(cluster, index) && !written {
                broken.store(1, Ordering::Relaxed);
            }
        }
        disk.clock.unregister(&worker);
    };
    std::thread::scope(|scope| {
        let run = &run;
        for number in 0..3 {
            scope.spawn(move || run(number));
        }
        let _planted = fault.map(crate::map::fault::plant_here);
        let mut random = 88_172_645_463_325_252u64;
        for round in 0..rounds {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let first = random % CLUSTERS;
            let count = (1 + (random >> 32) % 600).min(CLUSTERS - first);
            let way = if round % 2 == 0 { Way::Up } else { Way::Down };
            disk.merge(way, Cluster(first), count, |clock, generation| {
                while fault.is_none() && !clock.quiescent_for_reads(generation) {
                    std::thread::yield_now();
                }
                true
            });
            if broken.load(Ordering::Relaxed) != 0 {
                break;
            }
        }
        over.store(1, Ordering::Relaxed);
    });
    let worker = disk.clock.register();
    let whole = (0..CLUSTERS).map(Cluster).all(|cluster| {
        (0..SECTORS).all(|index| {
            let found = disk.read(&worker, cluster, index);
            found == content(cluster, index) || cluster.0.is_multiple_of(4)
        })
    });
    broken.load(Ordering::Relaxed) == 0 && whole
}

#[cfg(not(loom))]
#[test]
fn real_guests_do_not_notice_merges() {
    assert!(stress(200, None));
}

#[cfg(not(loom))]
#[test]
fn real_guests_notice_a_merge_that_does_not_wait_for_them() {
    assert!(!stress(u64::MAX, Some(Fault::PunchBeforeQuiescent)));
}

#[cfg(not(loom))]
#[test]
fn real_guests_notice_a_merge_that_overwrites_newer_layers() {
    assert!(!stress(u64::MAX, Some(Fault::ReplaceBeatsNewer)));
}
