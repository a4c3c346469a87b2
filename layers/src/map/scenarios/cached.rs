//! The races of a layer whose data wait in frames of a write-back cache: writers, discards, and who writes back.
//!
//! The cache is a model of it, one word a frame, locked by a compare-and-swap: what `ActiveMap` may rely on and no more. Who
//! collects has the [`Disk`], so that there is one at a time.

use std::sync::Arc;
#[cfg(not(loom))]
use std::sync::Mutex;

use crate::map::active::{ActiveMap, Collected};
use crate::map::fault::{Fault, planted};
use crate::map::radix::REGION_CLUSTERS;
use crate::map::set::SectorSet;
use crate::sync::{AtomicU64, Ordering, thread};
use crate::units::{Cluster, SectorMask};

#[cfg(loom)]
use super::explore_broken;
use super::{HERE, Pace, explore};

/// Bit of a frame's word: somebody has it for himself.
const LOCKED: u64 = 1;
/// Bit of a frame's word: it holds data that the file lacks.
const DIRTY: u64 = 2;
/// The rest of a frame's word counts its changes.
const VERSION: u64 = 4;

/// A layer's map and the frames of its clusters.
struct Cached {
    /// The map.
    map: ActiveMap,
    /// One word a cluster.
    frames: Vec<AtomicU64>,
    /// Where threads take turns.
    pace: Pace,
}

/// What survives: only who collects has it.
struct Disk {
    /// For each cluster the word of the frame when it was last written back.
    file: Vec<u64>,
    /// What the journal says.
    journal: SectorSet,
}

/// One sector of a cluster.
fn sector(index: u32) -> SectorMask {
    SectorMask::span(index, 1)
}

impl Cached {
    /// An empty layer and its files.
    fn new(clusters: u64) -> (Arc<Self>, Disk) {
        let cached = Self {
            map: ActiveMap::new(clusters),
            frames: (0..clusters).map(|_| AtomicU64::new(0)).collect(),
            pace: Pace::new(),
        };
        let disk = Disk {
            file: cached.frames.iter().map(|_| 0).collect(),
            journal: SectorSet::empty(),
        };
        (Arc::new(cached), disk)
    }

    /// The frame of a cluster.
    fn frame(&self, cluster: Cluster) -> &AtomicU64 {
        self.frames
            .get(usize::try_from(cluster.0).unwrap())
            .unwrap()
    }

    /// The word of a frame that is not locked.
    fn unlocked(&self, cluster: Cluster) -> u64 {
        loop {
            let found = self.frame(cluster).load(Ordering::Acquire);
            if found & LOCKED == 0 {
                return found;
            }
            thread::yield_now();
        }
    }

    /// Locks a frame and says what it was.
    fn lock(&self, cluster: Cluster) -> u64 {
        loop {
            let found = self.unlocked(cluster);
            let locked = self.frame(cluster).compare_exchange(
                found,
                found | LOCKED,
                Ordering::Acquire,
                Ordering::Relaxed,
            );
            if locked.is_ok() {
                return found;
            }
        }
    }

    /// Lets go of a frame.
    fn unlock(&self, cluster: Cluster, word: u64) {
        self.frame(cluster).store(word, Ordering::Release);
    }

    /// A write as a worker does it; acknowledged on return. Returns the frame's word, to compare with the file's.
    fn write(&self, cluster: Cluster, index: u32) -> u64 {
        self.pace.step();
        let found = self.lock(cluster);
        let dirtied = found & DIRTY == 0;
        let _ = self.map.write_cluster(cluster, sector(index), dirtied);
        let written = (found + VERSION) | DIRTY;
        self.unlock(cluster, written);
        self.pace.step();
        if dirtied && planted(Fault::MarkAfterUnlock) {
            self.map.mark_dirty(cluster);
        }
        written
    }

    /// Zeroes a cluster as a worker does it, short of the acknowledgement.
    fn zero(&self, cluster: Cluster) {
        self.pace.step();
        let _ = self.map.zero(cluster, 1);
        self.pace.step();
        let found = self.lock(cluster);
        let stays = self.map.get(cluster).data != SectorMask::NONE;
        let dirty = if stays { DIRTY } else { 0 };
        self.unlock(cluster, ((found & !DIRTY) + VERSION) | (found & dirty));
    }

    /// A flush or a part of one: collects, writes back, commits, and makes clean or marks again.
    fn flush(&self, limit: usize, disk: &mut Disk) -> bool {
        self.pace.step();
        let collected = self.map.collect(limit);
        self.pace.step();
        let mut copies = Vec::new();
        for (first, count) in &collected.dirty {
            for cluster in (first.0..first.0 + count).map(Cluster) {
                let copy = self.unlocked(cluster);
                if copy & DIRTY != 0 {
                    *disk
                        .file
                        .get_mut(usize::try_from(cluster.0).unwrap())
                        .unwrap() = copy;
                    copies.push((cluster, copy));
                }
            }
        }
        disk.commit(&collected);
        for (cluster, copy) in copies {
            let journaled = self.map.is_journaled(cluster) || planted(Fault::CleanUnjournaled);
            let frame = self.frame(cluster);
            let clean = (copy & !DIRTY) + VERSION;
            if planted(Fault::CleanWhatChanged) {
                frame.fetch_and(!DIRTY, Ordering::AcqRel);
            } else if !journaled
                || frame
                    .compare_exchange(copy, clean, Ordering::AcqRel, Ordering::Relaxed)
                    .is_err()
            {
                self.map.mark_dirty(cluster);
            }
        }
        collected.more
    }

    /// Fails unless all that is clean is durable, and the journal says what the map says, once all is flushed.
    fn assert_durable(&self, disk: &mut Disk) {
        while self.flush(usize::MAX, disk) {}
        assert!(
            self.frames
                .iter()
                .all(|frame| frame.load(Ordering::Relaxed) & (LOCKED | DIRTY) == 0),
            "no frame stays dirty"
        );
        assert_eq!(
            disk.journal,
            self.map.to_set(),
            "the journal has everything"
        );
        assert!(!self.map.has_marks(), "nothing is left to collect");
    }
}

impl Disk {
    /// Writes the records to the journal.
    fn commit(&mut self, collected: &Collected) {
        let records = collected.records.iter();
        records.for_each(|record| self.journal.apply(record));
    }

    /// Whether this write, or a later one of the cluster, is in the file, and the sector in the journal.
    fn has(&self, cluster: Cluster, written: u64, index: u32) -> bool {
        self.file[usize::try_from(cluster.0).unwrap()] >= written
            && self.journal.cluster(cluster).0.contains(sector(index))
    }
}

/// One thread makes a frame dirty, another finds it dirty, is acknowledged without a mark of its own, and flushes.
fn dirty_frame_is_found() {
    let (cached, mut disk) = Cached::new(REGION_CLUSTERS);
    let other = Arc::clone(&cached);
    let thread = thread::spawn(move || {
        other.write(HERE, 0);
    });
    let written = cached.write(HERE, 0);
    cached.flush(usize::MAX, &mut disk);
    assert!(
        disk.has(HERE, written, 0),
        "the flush has what was acknowledged before it"
    );
    thread.join().unwrap();
    cached.assert_durable(&mut disk);
}

/// A write meets a flush that has collected the cluster: the flush has the write, or leaves it to the next one. A frame is
/// never clean before the journal has its sectors.
fn clean_or_marked_again(index: u32) {
    let (cached, mut disk) = Cached::new(REGION_CLUSTERS);
    cached.write(HERE, 0);
    let other = Arc::clone(&cached);
    let earlier = thread::spawn(move || {
        other.flush(usize::MAX, &mut disk);
        disk
    });
    let written = cached.write(HERE, index);
    let mut disk = earlier.join().unwrap();
    let clean = cached.unlocked(HERE) & DIRTY == 0;
    assert!(
        !clean || disk.has(HERE, written, index),
        "what is clean is durable"
    );
    cached.flush(usize::MAX, &mut disk);
    assert!(disk.has(HERE, written, index), "one of them has the write");
    cached.assert_durable(&mut disk);
}

/// The flag of a clean frame was left behind. A write makes the frame dirty while a flush takes that flag: one of the two
/// must see the other.
fn clean_frame_with_a_flag() {
    let (cached, mut disk) = Cached::new(REGION_CLUSTERS);
    cached.write(HERE, 0);
    cached.assert_durable(&mut disk);
    cached.map.mark_dirty(HERE);
    let other = Arc::clone(&cached);
    let earlier = thread::spawn(move || {
        other.flush(usize::MAX, &mut disk);
        disk
    });
    let written = cached.write(HERE, 0);
    let mut disk = earlier.join().unwrap();
    cached.flush(usize::MAX, &mut disk);
    assert!(disk.has(HERE, written, 0), "one of them has the write");
    cached.assert_durable(&mut disk);
}

/// A dirty cluster is zeroed. Before its frame is trimmed a write finds it dirty.
fn zero_of_dirty_cluster() {
    let (cached, mut disk) = Cached::new(REGION_CLUSTERS);
    cached.write(HERE, 0);
    let other = Arc::clone(&cached);
    let thread = thread::spawn(move || other.zero(HERE));
    let written = cached.write(HERE, 0);
    thread.join().unwrap();
    cached.flush(usize::MAX, &mut disk);
    let lost = cached.map.get(HERE).data == SectorMask::NONE;
    assert!(
        lost || disk.has(HERE, written, 0),
        "the file has what the map says"
    );
    cached.assert_durable(&mut disk);
}

/// A cluster is zeroed and its record written, so that it may be acknowledged, while another sector of it is written.
fn zero_records_against_write() {
    let (cached, mut disk) = Cached::new(REGION_CLUSTERS);
    let other = Arc::clone(&cached);
    let thread = thread::spawn(move || {
        other.write(HERE, 3);
    });
    cached.zero(HERE);
    acknowledge_zero(&cached, HERE, &mut disk);
    let zero = disk.journal.cluster(HERE).1;
    assert!(
        zero.contains(SectorMask(!sector(3).0)),
        "the journal has the zeroes"
    );
    thread.join().unwrap();
    cached.assert_durable(&mut disk);
}

/// Makes the zeroes of a cluster durable.
fn acknowledge_zero(cached: &Cached, cluster: Cluster, disk: &mut Disk) {
    cached.pace.step();
    match cached.map.zero_records(cluster, 1) {
        Some(records) => disk.commit(&Collected {
            records,
            ..Collected::default()
        }),
        None => {
            cached.flush(usize::MAX, disk);
        }
    }
}

/// Collections of little stop before they have everything, while clusters of other regions are written.
fn limited_collections() {
    let (cached, mut disk) = Cached::new(3 * REGION_CLUSTERS);
    let region = |region: u64| Cluster(region * REGION_CLUSTERS);
    let first = cached.write(region(0), 0);
    let second = cached.write(region(1), 1);
    let other = Arc::clone(&cached);
    let thread = thread::spawn(move || other.write(region(2), 2));
    cached.flush(1, &mut disk);
    cached.flush(1, &mut disk);
    let last = thread.join().unwrap();
    while cached.flush(1, &mut disk) {}
    let found = |at: u32, written| disk.has(region(u64::from(at)), written, at);
    assert!(
        found(0, first) && found(1, second) && found(2, last),
        "what one collection leaves another finds"
    );
    cached.assert_durable(&mut disk);
}

/// A flush that fails puts back what it took, while the cluster is written or zeroed.
fn put_back_against(change: impl Fn(&Cached) + Send + 'static) {
    let (cached, mut disk) = Cached::new(REGION_CLUSTERS);
    cached.write(HERE, 0);
    let other = Arc::clone(&cached);
    let thread = thread::spawn(move || change(&other));
    cached.pace.step();
    let collected = cached.map.collect(usize::MAX);
    cached.pace.step();
    cached.map.put_back(&collected);
    assert!(cached.map.has_marks());
    thread.join().unwrap();
    cached.assert_durable(&mut disk);
}

#[test]
fn loom_dirty_frame_is_found() {
    explore(None, dirty_frame_is_found);
}

#[test]
fn loom_clean_or_marked_again_after_same_sector() {
    explore(None, || clean_or_marked_again(0));
}

#[test]
fn loom_clean_or_marked_again_after_other_sector() {
    explore(None, || clean_or_marked_again(1));
}

#[test]
fn loom_clean_frame_with_a_flag() {
    explore(None, clean_frame_with_a_flag);
}

#[test]
fn loom_zero_of_dirty_cluster() {
    explore(None, zero_of_dirty_cluster);
}

#[test]
fn loom_zero_records_against_write() {
    explore(Some(4), zero_records_against_write);
}

#[test]
fn loom_limited_collections() {
    explore(None, limited_collections);
}

#[test]
fn loom_put_back_against_write() {
    explore(Some(4), || {
        put_back_against(|cached| {
            cached.write(HERE, 1);
        });
    });
}

#[test]
fn loom_put_back_against_zero() {
    explore(Some(4), || put_back_against(|cached| cached.zero(HERE)));
}

/// Real threads write and zero all over a disk and flush at times, one of them little by little: whoever has flushed finds
/// his writes durable, and in the end everything is.
#[cfg(not(loom))]
#[test]
fn many_threads_find_their_writes_durable() {
    /// Some regions.
    const CLUSTERS: u64 = 5 * REGION_CLUSTERS;
    let (cached, disk) = Cached::new(CLUSTERS);
    let disk = Mutex::new(disk);
    let writers_left = AtomicU64::new(4);
    std::thread::scope(|scope| {
        for writer in 0..4u32 {
            let (cached, disk, writers_left) = (&cached, &disk, &writers_left);
            scope.spawn(move || {
                let mut random = 0x9e37_79b9_7f4a_7c15u64 ^ u64::from(writer);
                for _ in 0..30_000u32 {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    // The last writer has clusters of its own, in which nobody zeroes.
                    let own = writer == 3;
                    let at = random % 5 * REGION_CLUSTERS + random / 5 % 4 + 4 * u64::from(own);
                    let cluster = Cluster(at);
                    if !own && random >> 61 == 0 {
                        cached.zero(cluster);
                        acknowledge_zero(cached, cluster, &mut disk.lock().unwrap());
                        continue;
                    }
                    let written = cached.write(cluster, writer);
                    if own && random >> 60 == 0 {
                        let mut disk = disk.lock().unwrap();
                        cached.flush(usize::MAX, &mut disk);
                        assert!(disk.has(cluster, written, writer));
                    }
                }
                writers_left.fetch_sub(1, Ordering::Release);
            });
        }
        while writers_left.load(Ordering::Acquire) != 0 {
            let mut disk = disk.lock().unwrap();
            if writers_left.load(Ordering::Relaxed) & 1 == 0 {
                cached.flush(3, &mut disk);
            } else {
                let collected = cached.map.collect(5);
                cached.map.put_back(&collected);
            }
        }
    });
    cached.assert_durable(&mut disk.into_inner().unwrap());
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "the flush has what was acknowledged before it")]
fn loom_caught_mark_after_unlock() {
    explore_broken(Fault::MarkAfterUnlock, None, dirty_frame_is_found);
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "what is clean is durable")]
fn loom_caught_clean_what_changed() {
    explore_broken(Fault::CleanWhatChanged, None, || clean_or_marked_again(0));
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "what is clean is durable")]
fn loom_caught_clean_unjournaled() {
    explore_broken(Fault::CleanUnjournaled, None, || clean_or_marked_again(1));
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "one of them has the write")]
fn loom_caught_look_before_dirtying() {
    explore_broken(Fault::LookBeforeDirtying, None, clean_frame_with_a_flag);
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "the file has what the map says")]
fn loom_caught_zero_forgets_dirty() {
    explore_broken(Fault::ZeroForgetsDirty, None, zero_of_dirty_cluster);
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "the journal has the zeroes")]
fn loom_caught_zero_without_record() {
    explore_broken(
        Fault::ZeroWithoutRecord,
        Some(3),
        zero_records_against_write,
    );
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "what one collection leaves another finds")]
fn loom_caught_forget_the_rest() {
    explore_broken(Fault::ForgetTheRest, None, limited_collections);
}
