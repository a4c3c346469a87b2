//! The sector cache as its users see it: what is shared, what happens when frames run out, and what a failing disk does to
//! data that is in frames only. On a simulated disk where failures are planned, on real files where threads matter.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests: small numbers, and a panic is the verdict"
)]
#![expect(
    dead_code,
    reason = "shares the guest and the oracle of the crash tests and uses a part of them"
)]

#[path = "crash/disk.rs"]
mod disk;
#[path = "crash/oracle.rs"]
mod oracle;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use disk::Queue;
use oracle::{Value, stamp};
use stratablk_layers::cache::{CacheOptions, OnFull};
use stratablk_layers::catalog::CatalogState;
use stratablk_layers::catalog::memory::{MemoryCatalog, MemoryDisk};
use stratablk_layers::file::Media;
use stratablk_layers::file::sim::{Fault, FaultEffect, FaultPoint, Random, SimMedia, Survival};
use stratablk_layers::store::{Selection, Store, StoreOptions, VolumeSource};
use stratablk_layers::units::{SECTOR_BYTES, Sector, SectorRange, StoreId};
use stratablk_layers::volume::{Durability, Operation, RequestError};

/// Sectors of the disks.
const SECTORS: u64 = 512;
/// Clusters of the disks.
const CLUSTERS: u64 = SECTORS / 8;

/// A simulated store.
struct Sim {
    media: SimMedia,
    catalog: MemoryDisk,
    options: StoreOptions,
    store: Store,
}

impl Sim {
    /// A store with a cache of so many sets and so many frames that may be dirty, and two empty disks. Requests wait for space.
    fn new(sets: u64, dirty: u64) -> Self {
        Self::with(sets, dirty, OnFull::Hold)
    }

    /// The same, where this becomes of requests that need space while there is none.
    fn with(sets: u64, dirty: u64, on_full: OnFull) -> Self {
        let media = SimMedia::new(7);
        let state = CatalogState::empty(StoreId(uuid::Uuid::from_u64_pair(3, 4)));
        let catalog = MemoryDisk::new(state);
        let options = StoreOptions {
            cache: CacheOptions {
                bytes: sets * 16 * 4096,
                dirty_bytes: Some(dirty * 4096),
                on_full,
                ..CacheOptions::default()
            },
            ..StoreOptions::default()
        };
        let store = open(&media, &catalog, &options);
        for name in ["v", "w"] {
            let size = VolumeSource::Size(SECTORS * SECTOR_BYTES);
            store.create_volume(name, &size).unwrap();
        }
        Self {
            media,
            catalog,
            options,
            store,
        }
    }

    /// A queue of a disk.
    fn queue(&self, name: &str) -> Queue {
        queue(&self.store, name)
    }

    /// The store as it is found after a power cut that spares nothing.
    fn after_cut(&self) -> Store {
        let media = self.media.crash_image_with(Survival::Nothing);
        open(&media, &self.catalog.crash_image(), &self.options)
    }

    /// The store as it is found after the daemon was killed.
    fn after_kill(&self) -> Store {
        let catalog = MemoryCatalog::open(&self.catalog.crash_image()).unwrap();
        let files: Arc<dyn Media> = Arc::new(self.media.kill_image(5));
        let arena = self.store.cache_arena().copy().unwrap();
        let options = self.options.clone();
        Store::simulated_after_kill(files, Box::new(catalog), options, arena).unwrap()
    }

    /// Why a disk takes no more writes.
    fn failure(&self, name: &str) -> Option<String> {
        self.store.volume_info(name).unwrap().failure
    }

    /// Lets operations on files of this name fail, `times` of them after `after`.
    fn fail(&self, point: FaultPoint, name: &str, after: u64, times: u64, effect: FaultEffect) {
        self.media.inject(Fault {
            point,
            name: Some(name.to_owned()),
            after,
            times,
            effect,
        });
    }
}

/// Opens a simulated store.
fn open(media: &SimMedia, catalog: &MemoryDisk, options: &StoreOptions) -> Store {
    let catalog = MemoryCatalog::open(catalog).unwrap();
    let files: Arc<dyn Media> = Arc::new(media.clone());
    Store::simulated(files, Box::new(catalog), options.clone()).unwrap()
}

/// A queue of a volume.
fn queue(store: &Store, name: &str) -> Queue {
    Queue::new(store.open_volume(name).unwrap().context(false).unwrap())
}

/// The bytes that write `id` puts into a run of sectors.
fn bytes(start: u64, count: u64, id: u64) -> Vec<u8> {
    (start..start + count)
        .flat_map(|sector| stamp(7, sector, id))
        .collect()
}

/// Writes the stamp of `id` to a run of sectors; it needs no write-back.
fn write(queue: &mut Queue, start: u64, count: u64, id: u64) -> Result<(), RequestError> {
    let operation = Operation::Write(Sector(start));
    queue.run(operation, bytes(start, count, id)).0
}

/// The same, with a write-back whenever it waits.
fn write_helped(store: &Store, queue: &mut Queue, start: u64, id: u64) -> Result<(), RequestError> {
    let operation = Operation::Write(Sector(start));
    let help = || store.write_back_step(4);
    queue.run_helped(operation, bytes(start, 8, id), &help).0
}

/// Flushes.
fn flush(queue: &mut Queue) -> Result<(), RequestError> {
    queue.run(Operation::Flush, Vec::new()).0
}

/// Reads a run of sectors.
fn read(queue: &mut Queue, start: u64, count: u64) -> Vec<Value> {
    let memory = vec![0xa5; (count * SECTOR_BYTES) as usize];
    let (result, memory) = queue.run(Operation::Read(Sector(start)), memory);
    result.unwrap();
    (start..)
        .zip(memory.chunks_exact(512))
        .map(|(sector, bytes)| oracle::unstamp(7, sector, bytes).unwrap())
        .collect()
}

/// Submits a write that may not end.
fn submit_write(queue: &mut Queue, start: u64, count: u64, id: u64) {
    queue.context().begin_batch();
    queue.submit(
        Operation::Write(Sector(start)),
        Durability::AfterFlush,
        bytes(start, count, id),
        &[],
        id,
    );
    queue.context().kick();
}

#[test]
fn a_dirty_part_of_a_cluster_and_a_rest_in_the_file_are_read_together() {
    // Of all lengths: small reads fill frames, long ones leave the cache alone.
    for count in [8, 16, 80, 300, SECTORS] {
        let sim = Sim::new(1, 16);
        let mut v = sim.queue("v");
        for cluster in 0..CLUSTERS {
            write_helped(&sim.store, &mut v, cluster * 8, 2).unwrap();
        }
        flush(&mut v).unwrap();
        // Others take all frames.
        for cluster in 0..CLUSTERS {
            write_helped(&sim.store, &mut sim.queue("w"), cluster * 8, 3).unwrap();
        }
        flush(&mut sim.queue("w")).unwrap();
        let mut expected = vec![Value::Stamp(2); SECTORS as usize];
        for (sector, id) in [(3, 10), (4, 11), (0, 12), (15, 13), (77, 14)] {
            write(&mut v, sector, 1, id).unwrap();
            expected[sector as usize] = Value::Stamp(id);
        }
        assert_eq!(read(&mut v, 0, count), expected[..count as usize]);
        assert_eq!(v.read_all(7, SECTORS).unwrap(), expected);
        assert_eq!(v.read_in_pieces(7, SECTORS, 7).unwrap(), expected);
    }
}

#[test]
fn the_second_of_eight_clones_reads_nothing_from_files() {
    let sim = Sim::new(64, 512);
    let mut v = sim.queue("v");
    for cluster in 0..CLUSTERS {
        write(&mut v, cluster * 8, 8, 2).unwrap();
    }
    let all = Selection::Volumes(vec!["v".into()]);
    sim.store.snapshot("s", &all).unwrap();
    // A new daemon: nothing is in memory.
    let store = sim.after_cut();
    let source = VolumeSource::Snapshot {
        volume: "v".into(),
        snapshot: "s".into(),
    };
    let expected = vec![Value::Stamp(2); SECTORS as usize];
    let names: Vec<String> = (0..8).map(|clone| format!("clone{clone}")).collect();
    for name in &names {
        store.create_volume(name, &source).unwrap();
    }
    let found = queue(&store, &names[0]).read_in_pieces(7, SECTORS, 40);
    assert_eq!(found.unwrap(), expected);
    let after_first = store.cache_stats();
    assert_eq!(after_first.tally.misses, CLUSTERS);
    for name in &names[1..] {
        let found = queue(&store, name).read_in_pieces(7, SECTORS, 40);
        assert_eq!(found.unwrap(), expected);
    }
    let stats = store.cache_stats();
    assert_eq!(stats.tally.misses, CLUSTERS, "the others found all of it");
    assert_eq!(stats.tally.bypasses, after_first.tally.bypasses);
    assert_eq!(stats.tally.hits, after_first.tally.hits + 7 * CLUSTERS);
}

#[test]
fn a_full_disk_loses_nothing_and_is_forgotten_once_there_is_space() {
    let sim = Sim::with(2, 16, OnFull::Report);
    let mut v = sim.queue("v");
    sim.fail(FaultPoint::Write, "data", 0, u64::MAX, FaultEffect::NoSpace);
    write(&mut v, 5, 30, 2).unwrap();
    for _ in 0..3 {
        assert_eq!(flush(&mut v), Err(RequestError::NoSpace));
        sim.store.write_back_step(2);
    }
    assert_eq!(sim.failure("v"), None, "it is not for ever");
    assert_eq!(read(&mut v, 5, 30), [Value::Stamp(2); 30]);
    write(&mut v, 8, 4, 3).unwrap();
    let mut expected = vec![Value::Stamp(2); 30];
    expected[3..7].fill(Value::Stamp(3));
    let found = read(&mut queue(&sim.after_kill(), "v"), 5, 30);
    assert_eq!(found, expected, "a new daemon finds space and writes it");
    sim.media.clear_faults();
    flush(&mut v).unwrap();
    assert_eq!(read(&mut queue(&sim.after_cut(), "v"), 5, 30), expected);
}

#[test]
fn writes_wait_for_space_and_go_on_when_there_is_some() {
    let sim = Sim::new(1, 4);
    let mut v = sim.queue("v");
    sim.fail(FaultPoint::Write, "data", 0, u64::MAX, FaultEffect::NoSpace);
    // Twice as much as may be dirty.
    for cluster in 0..8 {
        submit_write(&mut v, cluster * 8, 8, 2 + cluster);
    }
    let mut ended = 0;
    for _ in 0..20 {
        ended += v.poll().len();
        sim.store.write_back_step(4);
    }
    assert!(ended < 8, "all were taken, with nowhere to go");
    sim.media.clear_faults();
    for _ in 0..20 {
        for (id, result, _) in v.poll() {
            assert_eq!(result, Ok(()), "request {id}");
            ended += 1;
        }
        sim.store.write_back_step(4);
    }
    assert_eq!(ended, 8);
    flush(&mut v).unwrap();
    let found = queue(&sim.after_cut(), "v").read_all(7, SECTORS).unwrap();
    for cluster in 0..8 {
        assert_eq!(found[cluster * 8], Value::Stamp(2 + cluster as u64));
    }
}

#[test]
fn a_failed_write_back_is_sticky_and_what_is_in_frames_stays_readable() {
    let cases = [
        (FaultPoint::Write, "data"),
        (FaultPoint::SyncData, "data"),
        (FaultPoint::Write, "map"),
        (FaultPoint::SyncData, "map"),
    ];
    for by_step in [false, true] {
        for (point, name) in cases {
            let sim = Sim::new(1, 16);
            let mut v = sim.queue("v");
            write(&mut v, 0, 40, 2).unwrap();
            sim.fail(point, name, 0, 1, FaultEffect::Error);
            if by_step {
                sim.store.write_back_step(100);
            } else {
                assert_eq!(flush(&mut v), Err(RequestError::Failed), "{point:?} {name}");
            }
            assert!(sim.failure("v").is_some(), "{point:?} {name}");
            assert_eq!(flush(&mut v), Err(RequestError::Failed));
            assert_eq!(write(&mut v, 0, 8, 3), Err(RequestError::Failed));
            sim.store.write_back_step(100);
            assert_eq!(read(&mut v, 0, 40), [Value::Stamp(2); 40]);
            // And nothing is lost for a daemon that finds the disk repaired.
            let found = read(&mut queue(&sim.after_kill(), "v"), 0, 40);
            assert_eq!(found, [Value::Stamp(2); 40], "{point:?} {name}");
        }
    }
}

#[test]
fn a_failed_volume_that_fills_the_cache_stops_no_other() {
    // All frames dirty; as many as may be, but not all.
    for dirty in [16, 6] {
        let sim = Sim::new(1, dirty);
        let mut v = sim.queue("v");
        for cluster in 0..dirty {
            write(&mut v, cluster * 8, 8, 2).unwrap();
        }
        sim.fail(FaultPoint::Write, "data", 0, 1, FaultEffect::Error);
        assert_eq!(flush(&mut v), Err(RequestError::Failed));
        let mut w = sim.queue("w");
        let mut expected = vec![Value::Zero; SECTORS as usize];
        let mut random = Random::new(9);
        for id in 2..200 {
            let start = random.below(SECTORS - 20);
            let count = 1 + random.below(20);
            let operation = Operation::Write(Sector(start));
            let help = || sim.store.write_back_step(3);
            let (result, _) = w.run_helped(operation, bytes(start, count, id), &help);
            result.unwrap();
            expected[start as usize..(start + count) as usize].fill(Value::Stamp(id));
            if random.chance(60) {
                let range = SectorRange {
                    start: Sector(start),
                    count,
                };
                let (result, _) = w.run_helped(Operation::Discard(range), Vec::new(), &help);
                result.unwrap();
                expected[start as usize..(start + count) as usize].fill(Value::Zero);
            }
            if random.chance(30) {
                assert_eq!(w.read_all(7, SECTORS).unwrap(), expected);
                let killed = sim.after_kill();
                let found = queue(&killed, "w").read_all(7, SECTORS).unwrap();
                assert_eq!(found, expected, "after a kill");
                let found = read(&mut queue(&killed, "v"), 0, dirty * 8);
                assert!(found.iter().all(|value| *value == Value::Stamp(2)));
            }
            if random.chance(20) {
                flush(&mut w).unwrap();
                let found = queue(&sim.after_cut(), "w").read_all(7, SECTORS).unwrap();
                assert_eq!(found, expected, "after a power cut");
            }
        }
        let found = read(&mut v, 0, dirty * 8);
        assert!(found.iter().all(|value| *value == Value::Stamp(2)));
        assert!(sim.failure("w").is_none());
    }
}

#[test]
fn what_cannot_be_taken_over_now_stops_its_own_volume_only_and_only_for_now() {
    for dirty in [16, 6] {
        let sim = Sim::new(1, dirty);
        let mut v = sim.queue("v");
        for cluster in 0..dirty {
            write(&mut v, cluster * 8, 8, 2).unwrap();
        }
        let media = sim.media.kill_image(1);
        let fault = |point, effect| Fault {
            point,
            name: Some("data".into()),
            after: 0,
            times: u64::MAX,
            effect,
        };
        media.inject(fault(FaultPoint::Write, FaultEffect::NoSpace));
        let catalog = Box::new(MemoryCatalog::open(&sim.catalog.crash_image()).unwrap());
        let files: Arc<dyn Media> = Arc::new(media.clone());
        let arena = sim.store.cache_arena().copy().unwrap();
        let options = sim.options.clone();
        let store = Store::simulated_after_kill(files, catalog, options, arena).unwrap();
        store.open_volume("v").unwrap_err();
        let mut w = queue(&store, "w");
        media.clear_faults();
        for cluster in 0..CLUSTERS {
            write_helped(&store, &mut w, cluster * 8, 3).unwrap();
        }
        assert_eq!(
            w.read_all(7, SECTORS).unwrap(),
            [Value::Stamp(3); SECTORS as usize]
        );
        flush(&mut w).unwrap();
        let found = read(&mut queue(&store, "v"), 0, dirty * 8);
        assert!(found.iter().all(|value| *value == Value::Stamp(2)));
        let help = || store.write_back_step(3);
        let mut v = queue(&store, "v");
        v.run_helped(Operation::Flush, Vec::new(), &help).0.unwrap();
        for cluster in 0..CLUSTERS {
            write_helped(&store, &mut v, cluster * 8, 4).unwrap();
        }
    }
}

#[test]
fn a_write_past_the_cache_that_fails_is_latched_and_one_that_finds_no_space_waits() {
    for effect in [FaultEffect::Error, FaultEffect::NoSpace] {
        let sim = Sim::new(1, 16);
        let mut v = sim.queue("v");
        for cluster in 0..16 {
            write(&mut v, cluster * 8, 8, 2).unwrap();
        }
        sim.fail(FaultPoint::Write, "data", 0, 1, FaultEffect::Error);
        assert_eq!(flush(&mut v), Err(RequestError::Failed));
        let mut w = sim.queue("w");
        sim.fail(FaultPoint::Write, "data", 0, 5, effect);
        let result = write_helped(&sim.store, &mut w, 8, 3);
        let expected = if effect == FaultEffect::Error {
            Err(RequestError::Failed)
        } else {
            Ok(())
        };
        assert_eq!(result, expected);
        assert_eq!(sim.failure("w").is_some(), expected.is_err());
        if expected.is_ok() {
            assert_eq!(read(&mut w, 8, 8), [Value::Stamp(3); 8]);
        }
    }
}

#[test]
fn a_queue_with_writes_that_wait_for_frames_can_be_dropped() {
    let sim = Sim::new(1, 2);
    let mut v = sim.queue("v");
    for cluster in 0..8 {
        submit_write(&mut v, cluster * 8, 8, 2 + cluster);
    }
    v.poll();
    drop(v);
    // Nobody waits for it any more, and nothing is broken.
    sim.store
        .snapshot("s", &Selection::Volumes(vec!["v".into()]))
        .unwrap();
    let mut v = sim.queue("v");
    write_helped(&sim.store, &mut v, 80, 99).unwrap();
    flush(&mut v).unwrap();
}

#[test]
fn a_snapshot_does_not_wait_for_writes_that_wait_for_frames() {
    let sim = Sim::new(1, 4);
    let mut v = sim.queue("v");
    sim.fail(FaultPoint::Write, "data", 0, u64::MAX, FaultEffect::NoSpace);
    write(&mut v, 0, 8, 2).unwrap();
    // A part of it finds frames.
    submit_write(&mut v, 4, 400, 3);
    let selection = Selection::Volumes(vec!["v".into()]);
    let mut pending = sim.store.begin_snapshot("s", &selection).unwrap();
    for _ in 0..3 {
        sim.store.write_back_step(4);
        assert!(v.poll().is_empty());
    }
    assert!(sim.store.snapshot_drained(&pending), "it waits for space");
    sim.media.clear_faults();
    assert!(sim.store.sync_snapshot(&mut pending));
    sim.store.finish_snapshot(pending).unwrap();
    let mut ended = Vec::new();
    while ended.is_empty() {
        ended = v.poll();
        sim.store.write_back_step(4);
    }
    assert_eq!(ended[0].1, Ok(()));
    let mut expected = vec![Value::Zero; SECTORS as usize];
    expected[..4].fill(Value::Stamp(2));
    expected[4..404].fill(Value::Stamp(3));
    assert_eq!(v.read_all(7, SECTORS).unwrap(), expected);
    flush(&mut v).unwrap();
    let found = queue(&sim.after_cut(), "v").read_all(7, SECTORS).unwrap();
    assert_eq!(found, expected);
}

#[test]
fn many_queues_and_snapshots_share_a_cache_of_one_set() {
    for no_io_uring in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let options = StoreOptions {
            no_io_uring,
            cache: CacheOptions {
                bytes: 16 * 4096,
                ..CacheOptions::default()
            },
            ..StoreOptions::default()
        };
        let store = Store::open(&dir.path().join("store"), options).unwrap();
        for name in ["v", "w"] {
            let size = VolumeSource::Size(SECTORS * SECTOR_BYTES);
            store.create_volume(name, &size).unwrap();
        }
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let workers: Vec<_> = [("v", 0), ("v", 1), ("w", 0), ("w", 1)]
                .map(|(name, worker)| {
                    let (queue, stop) = (queue(&store, name), &stop);
                    scope.spawn(move || hammer(queue, worker, stop))
                })
                .into();
            for number in 0..25 {
                let name = format!("s{number}");
                store.snapshot(&name, &Selection::All).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
            for worker in workers {
                assert!(worker.join().unwrap() > 0);
            }
        });
        assert!(
            store
                .volumes()
                .iter()
                .all(|volume| volume.failure.is_none())
        );
    }
}

/// Writes, zeroes and reads every other piece of a disk until told to stop; returns how many rounds it made.
fn hammer(mut queue: Queue, worker: u64, stop: &AtomicBool) -> u64 {
    /// Sectors of a piece: neither whole clusters nor within one.
    const PIECE: u64 = 11;
    let mut random = Random::new(worker);
    let pieces = SECTORS / PIECE / 2;
    let mut expected = vec![Value::Zero; pieces as usize];
    let mut rounds = 0;
    while !stop.load(Ordering::Relaxed) {
        rounds += 1;
        let piece = random.below(pieces);
        let start = (piece * 2 + worker) * PIECE;
        let id = 2 + rounds * 2 + worker;
        let range = SectorRange {
            start: Sector(start),
            count: PIECE,
        };
        if random.chance(200) {
            write(&mut queue, start, PIECE, id).unwrap();
            expected[piece as usize] = Value::Stamp(id);
        } else {
            let unmap = random.chance(128);
            let operation = Operation::WriteZeroes { range, unmap };
            queue.run(operation, Vec::new()).0.unwrap();
            expected[piece as usize] = Value::Zero;
        }
        if random.chance(20) {
            flush(&mut queue).unwrap();
        }
        let piece = random.below(pieces);
        let found = read(&mut queue, (piece * 2 + worker) * PIECE, PIECE);
        assert_eq!(found, [expected[piece as usize]; PIECE as usize]);
    }
    rounds
}

#[test]
fn a_checkpoint_says_nothing_of_what_is_in_frames_only() {
    let sim = Sim::new(4, 64);
    let mut v = sim.queue("v");
    write(&mut v, 0, 8, 2).unwrap();
    // While the checkpoint is made, as if on another thread.
    let mut late = sim.queue("v");
    let mut id = 10;
    sim.media.set_observer(Box::new(move |_, _| {
        id += 1;
        write(&mut late, id * 8, 8, id).unwrap();
    }));
    sim.store.checkpoint_volume("v").unwrap();
    sim.media.clear_observer();
    let found = queue(&sim.after_cut(), "v").read_all(7, SECTORS).unwrap();
    assert_eq!(found[..8], [Value::Stamp(2); 8]);
    assert!(v.read_all(7, SECTORS).unwrap()[88] == Value::Stamp(11));
    // Not zeroes that nobody wrote in place of a parent's data: what the map does not say is not looked for in the file.
    let map = sim.media.crash_image_with(Survival::Nothing);
    let active = sim.store.volume_info("v").unwrap().active;
    let files: Arc<dyn Media> = Arc::new(map);
    let contents = stratablk_layers::mapfile::MapFile::read(&files, active).unwrap();
    for run in contents.set.data_runs() {
        let said = found
            .iter()
            .skip(run.start.0 as usize)
            .take(run.count as usize);
        for value in said {
            assert!(matches!(value, Value::Stamp(_)), "{run:?} is {value:?}");
        }
    }
    let written = v.read_all(7, SECTORS).unwrap();
    let written = written
        .iter()
        .filter(|value| **value != Value::Zero)
        .count();
    assert!(
        contents.set.data_sectors() < written as u64,
        "{written} sectors, and all are in files"
    );
}

/// A checkpoint, in the middle of which another guest flushes what it wrote. Returns what is there after a power cut.
fn flushed_meanwhile() -> Vec<Value> {
    let sim = Sim::new(4, 64);
    let mut v = sim.queue("v");
    write(&mut v, 0, 8, 2).unwrap();
    let mut late = Some(sim.queue("v"));
    sim.media.set_observer(Box::new(move |_, point| {
        if point.path.ends_with("map.new")
            && let Some(mut late) = late.take()
        {
            write(&mut late, 8, 8, 3).unwrap();
            flush(&mut late).unwrap();
        }
    }));
    sim.store.checkpoint_volume("v").unwrap();
    sim.media.clear_observer();
    queue(&sim.after_cut(), "v").read_all(7, 16).unwrap()
}

#[test]
fn a_checkpoint_says_what_was_flushed_while_it_was_written() {
    let found = flushed_meanwhile();
    assert_eq!(found[..8], [Value::Stamp(2); 8]);
    assert_eq!(found[8..], [Value::Stamp(3); 8]);
}

#[cfg(feature = "canary")]
#[test]
fn canary_a_checkpoint_that_forgets_what_was_flushed_meanwhile_is_noticed() {
    use stratablk_layers::canary::{Canary, set};

    set(Some(Canary::ForgetSince));
    let found = flushed_meanwhile();
    set(None);
    assert_ne!(found[8..], [Value::Stamp(3); 8]);
}
