//! Frames with the map of their layer: writing back, zeroing, and snapshots.
//!
//! The steps are those of `flush` and the files below it, `context::write` and `context::read`, with the real map, the real
//! marks and the real clock.

use super::*;

use crate::generation::{Clock, Oldest};
#[cfg(loom)]
use crate::map::fault::Fault;
use crate::map::fault::planted;
use crate::map::{ActiveMap, MapRecord, RecordKind, SectorSet};
use crate::units::{CLUSTER_SECTORS, SectorRange};

/// The cluster of `HERE`.
pub(super) const CLUSTER: Cluster = Cluster(0);

/// The first sectors of it.
pub(super) fn range(count: u64) -> SectorRange {
    let start = CLUSTER.first_sector();
    SectorRange { start, count }
}

/// A layer: its map and its frames.
pub(super) struct Layered {
    /// Frames and file.
    pub(super) world: Arc<World>,
    /// What the layer holds.
    pub(super) map: ActiveMap,
}

/// The layer's journal; who has it leads the flushes.
pub(super) struct Journal(SectorSet);

impl Layered {
    /// A layer that holds nothing.
    pub(super) fn new(ways: usize) -> (Arc<Self>, Journal) {
        let layered = Self {
            world: World::new(ways),
            map: ActiveMap::new(CLUSTER_SECTORS),
        };
        (Arc::new(layered), Journal(SectorSet::empty()))
    }

    /// A write; acknowledged on return.
    fn write(&self, mask: SectorMask, version: u32) {
        let publish = |dirtied| {
            let _ = self.map.write_cluster(CLUSTER, mask, dirtied);
        };
        // A trim that has the only way says that there is none.
        while !self.world.write_and(HERE, mask, version, publish) {
            thread::yield_now();
        }
    }

    /// A flush, or a part of one.
    pub(super) fn flush(&self, journal: &mut Journal) {
        let collected = self.map.collect(usize::MAX);
        let mut copies = Vec::new();
        for (first, count) in &collected.dirty {
            for cluster in (first.0..first.0 + count).map(Cluster) {
                let key = FrameKey::new(HERE.layer(), cluster);
                let mut page = [0; SECTORS * WORDS];
                let copy = |index, dirty| self.world.load(index, dirty, &mut page);
                if let Some(copied) = self.world.sets().copy_dirty(key, copy) {
                    self.world.write_file(key, copied.dirty, &page);
                    copies.push(copied);
                }
            }
        }
        journal.commit(&collected.records);
        for copied in copies {
            let cluster = copied.key.cluster();
            if !self.map.is_journaled(cluster) || self.world.sets().clean(&copied) == Clean::Changed
            {
                self.map.mark_dirty(cluster);
            }
        }
    }

    /// Zeroes the cluster, by who leads; acknowledged on return.
    fn zero(&self, journal: &mut Journal) {
        journal.commit(&[MapRecord {
            kind: RecordKind::Zero,
            range: range(CLUSTER_SECTORS),
        }]);
        let _ = self.map.zero(CLUSTER, 1);
        self.trim();
    }

    /// Writes the first sector past the cache, by who leads; acknowledged on return.
    fn write_past(&self, journal: &mut Journal, version: u32) {
        self.world
            .file(HERE, 0)
            .store(u64::from(version), Ordering::Release);
        journal.commit(&[MapRecord {
            kind: RecordKind::Data,
            range: range(1),
        }]);
        let _ = self.map.write(range(1));
        let keep = || SectorMask(self.map.get(CLUSTER).data.0 & !ONE.0);
        self.world.sets().trim(HERE, keep);
    }

    /// Takes out of the frame what the map no longer says.
    fn trim(&self) {
        self.world.sets().trim(HERE, || self.map.get(CLUSTER).data);
    }

    /// Puts the frame away, once it is clean.
    fn evict(&self) {
        assert_eq!(self.dirty(), SectorMask::NONE);
        self.world.sets().trim(HERE, || SectorMask::NONE);
    }

    /// A read as a worker does it: from the frame, by a fill, or past the cache. `None`: the map has changed, it would look
    /// again.
    pub(super) fn read(&self, mask: SectorMask) -> Option<Versions> {
        let says = || self.map.get(CLUSTER).data.contains(mask);
        match self.world.read(HERE, mask) {
            Ok(found) => return Some(found),
            Err(Read::Miss) => {}
            Err(_) => return None,
        }
        if let Some(ticket) = self.world.claim(HERE, mask) {
            if !says() {
                self.world.sets().abandon(ticket);
                return None;
            }
            let page = self.world.read_file(HERE, mask);
            return self.world.insert(ticket, mask, page);
        }
        self.past(mask)
    }

    /// A read past the cache of what was in no frame.
    fn past(&self, mask: SectorMask) -> Option<Versions> {
        let says = self.map.get(CLUSTER).data.contains(mask);
        (says && self.world.sets().lacks(HERE, mask))
            .then(|| versions(HERE, mask, &self.world.read_file(HERE, mask)))
    }

    /// Which sectors of the frame are dirty, once all is quiet.
    fn dirty(&self) -> SectorMask {
        self.world
            .state(HERE)
            .map_or(SectorMask::NONE, State::dirty)
    }

    /// Which version of a sector the file has.
    fn in_file(&self, sector: usize) -> u32 {
        u32::try_from(self.world.file(HERE, sector).load(Ordering::Acquire)).unwrap()
    }

    /// Once all is quiet: a flush makes everything durable, and frame, file, map and journal agree.
    pub(super) fn assert_durable(&self, journal: &mut Journal) {
        let said = self.map.get(CLUSTER).data;
        let dirty = self.dirty();
        assert!(said.contains(dirty), "a zeroed sector is left dirty");
        let before: Vec<_> = sectors(said)
            .map(|at| self.world.latest(HERE, at))
            .collect();
        self.flush(journal);
        assert_eq!(self.dirty(), SectorMask::NONE, "no frame stays dirty");
        assert_eq!(journal.0, self.map.to_set(), "the journal has everything");
        let after: Vec<_> = sectors(said).map(|at| self.in_file(at)).collect();
        assert_eq!(before, after, "the file has what was read");
    }
}

impl Journal {
    /// Writes records and their commit record.
    fn commit(&mut self, records: &[MapRecord]) {
        records.iter().for_each(|record| self.0.apply(record));
    }

    /// Whether it says that a sector is data.
    pub(super) fn has(&self, mask: SectorMask) -> bool {
        self.0.cluster(CLUSTER).0.contains(mask)
    }
}

/// A write meets a flush: the flush has it, or leaves it to the next one; what is clean is in the file and in the journal.
fn write_back_against_write(mask: SectorMask) {
    let (layer, mut journal) = Layered::new(1);
    layer.write(ONE, 2);
    let other = Arc::clone(&layer);
    let flush = thread::spawn(move || {
        for _ in 0..ROUNDS {
            other.flush(&mut journal);
        }
        journal
    });
    for round in 0..ROUNDS {
        layer.write(mask, 3 + round);
    }
    let mut journal = flush.join().unwrap();
    if !layer.dirty().contains(mask) {
        let sector = sectors(mask).next().unwrap();
        assert!(
            layer.in_file(sector) == 2 + ROUNDS && journal.has(mask),
            "what is clean is durable"
        );
    }
    layer.assert_durable(&mut journal);
}

/// Two writes of one sector, and a flush that begins after one of them was acknowledged.
fn flush_after_acknowledgement() {
    let (layer, mut journal) = Layered::new(1);
    let other = Arc::clone(&layer);
    let thread = thread::spawn(move || other.write(ONE, 2));
    layer.write(ONE, 3);
    layer.flush(&mut journal);
    assert!(
        layer.in_file(0) > FIRST && journal.has(ONE),
        "the flush has what was acknowledged before it"
    );
    thread.join().unwrap();
    layer.assert_durable(&mut journal);
}

/// A dirty cluster is zeroed while a sector of it is written: map and frame agree in the end, whoever came last.
fn trim_against_write(ways: usize) {
    let (layer, mut journal) = Layered::new(ways);
    layer.write(BOTH, 2);
    let other = Arc::clone(&layer);
    let writer = thread::spawn(move || {
        for round in 0..ROUNDS {
            other.write(ONE, 3 + round);
        }
    });
    for _ in 0..ROUNDS {
        layer.zero(&mut journal);
    }
    writer.join().unwrap();
    let state = layer.map.get(CLUSTER);
    assert!(state.data == ONE || state.data == SectorMask::NONE);
    if state.data == ONE {
        assert_eq!(
            layer.world.latest(HERE, 0),
            2 + ROUNDS,
            "what the map says is in the frame or the file"
        );
    }
    layer.assert_durable(&mut journal);
}

/// A layer whose file has the first version of both sectors, and the frame (a dirty one) the second of one of them.
fn old_in_file() -> (Arc<Layered>, Journal) {
    let (layer, mut journal) = Layered::new(2);
    layer.write(BOTH, FIRST);
    layer.flush(&mut journal);
    layer.evict();
    layer.write(ONE, 2);
    (layer, journal)
}

/// A cluster is zeroed (and written) while a reader that has seen its data in the map reads it, by whatever way. It gets
/// nothing older
/// than what was acknowledged before.
fn trim_against_reader(mask: SectorMask, rewrite: bool) {
    let (layer, mut journal) = old_in_file();
    let other = Arc::clone(&layer);
    let reader = thread::spawn(move || {
        for _ in 0..ROUNDS {
            if !other.map.get(CLUSTER).data.contains(mask) {
                continue;
            }
            let found = other.read(mask);
            assert!(
                found.is_none_or(|found| found[0] >= Some(2)),
                "older than what was acknowledged"
            );
            if let Ok(found) = other.world.read(HERE, ONE) {
                assert!(found[0] >= Some(2), "older than what was acknowledged");
            }
        }
    });
    layer.zero(&mut journal);
    if rewrite {
        layer.write(ONE, 3);
    }
    reader.join().unwrap();
    layer.assert_durable(&mut journal);
}

/// The same with a reader that goes past the cache.
fn trim_against_read_past(rewrite: bool) {
    let (layer, mut journal) = old_in_file();
    let other = Arc::clone(&layer);
    let reader = thread::spawn(move || {
        if other.map.get(CLUSTER).data.contains(ONE)
            && other.world.read(HERE, ONE) == Err(Read::Miss)
        {
            let found = other.past(ONE);
            assert!(
                found.is_none_or(|found| found[0] >= Some(2)),
                "older than what was acknowledged"
            );
        }
    });
    layer.zero(&mut journal);
    if rewrite {
        layer.write(ONE, 3);
    }
    reader.join().unwrap();
    layer.assert_durable(&mut journal);
}

/// The key's last frame goes by a trim; a reader that fills another way must know the map that led to it.
fn fill_of_another_way_against_trim() {
    let (layer, mut journal) = Layered::new(2);
    layer.write(BOTH, FIRST);
    layer.flush(&mut journal);
    layer.evict();
    // So that the first way is free again and the cluster's frame the second one.
    layer.world.fill(key(1, 1), ONE);
    layer.write(ONE, 2);
    layer.world.sets().trim(key(1, 1), || SectorMask::NONE);
    let other = Arc::clone(&layer);
    let reader = thread::spawn(move || {
        let Some(ticket) = other.world.claim(HERE, ONE) else {
            return;
        };
        let says = other.map.get(CLUSTER).data.contains(ONE);
        let page = other.world.read_file(HERE, ONE);
        if says {
            let found = other.world.insert(ticket, ONE, page);
            assert!(
                found.is_none_or(|found| found[0] >= Some(2)),
                "older than what was acknowledged"
            );
        } else {
            other.world.sets().abandon(ticket);
        }
    });
    layer.zero(&mut journal);
    reader.join().unwrap();
}

/// A sector is written past the cache while it is read: what was read before is not kept.
fn write_past_against_fill() {
    let (layer, mut journal) = Layered::new(1);
    layer.write(ONE, FIRST);
    layer.flush(&mut journal);
    layer.evict();
    let other = Arc::clone(&layer);
    let reader = thread::spawn(move || {
        other.read(ONE);
    });
    layer.write_past(&mut journal, 2);
    if let Some(found) = layer.read(ONE) {
        assert_eq!(found[0], Some(2), "older than what was acknowledged");
    }
    reader.join().unwrap();
    assert_eq!(
        layer.world.latest(HERE, 0),
        2,
        "a frame of old data is kept"
    );
    layer.assert_durable(&mut journal);
}

/// A snapshot is taken while a worker writes: once its generation is over, the old layer's frames never change again, and a
/// write is in the layer of the generation in which it was announced.
fn snapshot_against_write() {
    /// The same cluster in the new layer.
    const NEW: FrameKey = key(2, 0);
    let world = World::new(2);
    world.write(HERE, ONE, 2);
    let clock = Arc::new(Clock::new());
    let worker = clock.register();
    let (other, clocks) = (Arc::clone(&world), Arc::clone(&clock));
    let writer = thread::spawn(move || {
        let generation = if planted(crate::map::fault::Fault::WriteUnannounced) {
            clocks.now()
        } else {
            worker.enter(&clocks, Oldest::default())
        };
        let layer = if generation.0 == 1 { HERE } else { NEW };
        assert!(other.write(layer, ONE, 3));
        worker.leave(Oldest::default());
        layer
    });
    let new = clock.advance();
    let sealed = clock.quiescent(new).then(|| {
        let clean = world.write_back(HERE);
        (clean, world.latest(HERE, 0))
    });
    let written = writer.join().unwrap();
    if let Some((clean, version)) = sealed {
        assert!(
            clean && world.latest(HERE, 0) == version,
            "a sealed layer has changed"
        );
        assert_eq!(
            world.state(HERE).map_or(SectorMask::NONE, State::dirty),
            SectorMask::NONE,
            "a sealed layer has changed"
        );
    }
    assert_eq!(world.latest(written, 0), 3, "the write is in its layer");
}

#[test]
fn loom_cache_write_back_against_write_of_same_sector() {
    explore(None, || write_back_against_write(ONE));
}

#[test]
fn loom_cache_write_back_against_write_of_other_sector() {
    explore(Some(5), || write_back_against_write(OTHER));
}

#[test]
fn loom_cache_flush_after_acknowledgement() {
    explore(Some(4), flush_after_acknowledgement);
}

#[test]
fn loom_cache_trim_against_write_of_the_only_way() {
    explore(None, || trim_against_write(1));
}

#[test]
fn loom_cache_trim_against_write_of_another_way() {
    explore(Some(4), || trim_against_write(2));
}

#[test]
fn loom_cache_trim_against_reader_of_dirty_sector() {
    explore(Some(2), || trim_against_reader(ONE, true));
}

#[test]
fn loom_cache_trim_against_fill() {
    explore(Some(4), || trim_against_reader(BOTH, false));
}

#[test]
fn loom_cache_trim_against_read_past() {
    explore(None, || trim_against_read_past(false));
}

#[test]
fn loom_cache_trim_and_write_against_read_past() {
    explore(Some(3), || trim_against_read_past(true));
}

#[test]
fn loom_cache_fill_of_another_way_against_trim() {
    explore(None, fill_of_another_way_against_trim);
}

#[test]
fn loom_cache_write_past_against_fill() {
    explore(Some(4), write_past_against_fill);
}

#[test]
fn loom_cache_snapshot_against_write() {
    explore(None, snapshot_against_write);
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "what is clean is durable")]
fn loom_cache_caught_clean_without_version() {
    explore_broken(Fault::CleanWithoutVersion, Some(3), || {
        write_back_against_write(ONE)
    });
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "what is clean is durable")]
fn loom_cache_caught_publish_after_unlock_by_write_back() {
    explore_broken(Fault::PublishAfterUnlock, Some(3), || {
        write_back_against_write(OTHER)
    });
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "the flush has what was acknowledged before it")]
fn loom_cache_caught_publish_after_unlock_by_flush() {
    explore_broken(
        Fault::PublishAfterUnlock,
        Some(1),
        flush_after_acknowledgement,
    );
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "what the map says is in the frame or the file")]
fn loom_cache_caught_publish_after_unlock_by_trim() {
    explore_broken(Fault::PublishAfterUnlock, Some(3), || trim_against_write(1));
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "what the map says is in the frame or the file")]
fn loom_cache_caught_keep_before_lock() {
    explore_broken(Fault::KeepBeforeLock, Some(3), || trim_against_write(1));
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "older than what was acknowledged")]
fn loom_cache_caught_keep_spoiled() {
    explore_broken(Fault::KeepSpoiled, Some(3), || {
        trim_against_reader(BOTH, false)
    });
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "older than what was acknowledged")]
fn loom_cache_caught_trim_without_spoiling() {
    explore_broken(Fault::TrimWithoutSpoiling, Some(3), || {
        trim_against_reader(BOTH, false)
    });
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "older than what was acknowledged")]
fn loom_cache_caught_miss_without_fence() {
    explore_broken(Fault::MissWithoutFence, Some(3), || {
        trim_against_read_past(false)
    });
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "older than what was acknowledged")]
fn loom_cache_caught_locked_is_lacking() {
    explore_broken(Fault::LockedIsLacking, Some(3), || {
        trim_against_read_past(true)
    });
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "older than what was acknowledged")]
fn loom_cache_caught_claim_without_fence_by_trim() {
    explore_broken(
        Fault::ClaimWithoutFence,
        Some(3),
        fill_of_another_way_against_trim,
    );
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "a frame of old data is kept")]
fn loom_cache_caught_claim_without_fence() {
    explore_broken(Fault::ClaimWithoutFence, Some(3), write_past_against_fill);
}

#[cfg(loom)]
#[test]
#[should_panic(expected = "a sealed layer has changed")]
fn loom_cache_caught_write_unannounced() {
    explore_broken(Fault::WriteUnannounced, Some(3), snapshot_against_write);
}
