//! Requests that find the host without space wait, and go on when there is room: nothing is lost, nothing is latched, and who
//! has to see their end does.
#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests: small numbers, and a panic is the verdict"
)]
#![expect(
    dead_code,
    reason = "shares the guest and the oracle of the crash tests"
)]

#[path = "crash/disk.rs"]
mod disk;
#[path = "crash/oracle.rs"]
mod oracle;

use std::sync::Arc;

use disk::Queue;
use oracle::{Value, stamp};
use stratablk_layers::cache::{CacheOptions, OnFull};
use stratablk_layers::catalog::CatalogState;
use stratablk_layers::catalog::memory::{MemoryCatalog, MemoryDisk};
use stratablk_layers::file::Media;
use stratablk_layers::file::sim::{Fault, FaultEffect, FaultPoint, SimMedia};
use stratablk_layers::store::{Store, StoreOptions, VolumeSource};
use stratablk_layers::units::{SECTOR_BYTES, Sector, SectorRange, StoreId};
use stratablk_layers::volume::{Durability, Operation, RequestError};

/// Sectors of each disk.
const SECTORS: u64 = 512;
/// How often a request that must wait is looked at.
const LOOKS: usize = 20;

/// A store with the volumes `v` and `w`.
struct Sim {
    store: Store,
    media: SimMedia,
    catalog: MemoryDisk,
}

impl Sim {
    fn new(frames: u64, on_full: OnFull) -> Self {
        let media = SimMedia::new(1);
        let catalog = MemoryDisk::new(CatalogState::empty(StoreId(uuid::Uuid::from_u128(5))));
        let store = open(&media, &catalog, frames, on_full);
        for name in ["v", "w"] {
            let size = VolumeSource::Size(SECTORS * SECTOR_BYTES);
            store.create_volume(name, &size).unwrap();
        }
        Self {
            store,
            media,
            catalog,
        }
    }

    fn queue(&self, name: &str) -> Queue {
        Queue::new(
            self.store
                .open_volume(name)
                .unwrap()
                .context(false)
                .unwrap(),
        )
    }

    /// Lets writes to files of this name find no space, until `room`.
    fn fill(&self, name: &str) {
        self.media.inject(Fault {
            point: FaultPoint::Write,
            name: Some(name.into()),
            after: 0,
            times: u64::MAX,
            effect: FaultEffect::NoSpace,
        });
    }

    fn room(&self) {
        self.media.clear_faults();
    }

    fn waits(&self, name: &str) -> bool {
        let info = self.store.volume_info(name).unwrap();
        assert_eq!(info.failure, None);
        info.no_space
    }

    /// What a power cut would leave of `v`.
    fn after_cut(&self) -> Vec<Value> {
        let media = self.media.crash_image(1);
        let store = open(&media, &self.catalog.crash_image(), 64, OnFull::Hold);
        let context = store.open_volume("v").unwrap().context(false).unwrap();
        Queue::new(context).read_all(7, SECTORS).unwrap()
    }
}

fn open(media: &SimMedia, catalog: &MemoryDisk, frames: u64, on_full: OnFull) -> Store {
    let files: Arc<dyn Media> = Arc::new(media.clone());
    let catalog = MemoryCatalog::open(catalog).unwrap();
    let cache = CacheOptions {
        bytes: frames * 4096,
        on_full,
        ..CacheOptions::default()
    };
    let options = StoreOptions {
        cache,
        ..StoreOptions::default()
    };
    Store::simulated(files, Box::new(catalog), options).unwrap()
}

fn stamps(start: u64, count: u64, id: u64) -> Vec<u8> {
    (start..start + count)
        .flat_map(|sector| stamp(7, sector, id))
        .collect()
}

fn submit(queue: &mut Queue, operation: Operation, memory: Vec<u8>, token: u64) {
    queue.context().begin_batch();
    queue.submit(operation, Durability::AfterFlush, memory, &[], token);
    queue.context().kick();
}

fn write(queue: &mut Queue, start: u64, count: u64, id: u64) {
    let bytes = stamps(start, count, id);
    queue.run(Operation::Write(Sector(start)), bytes).0.unwrap();
}

/// The requests that end while the store is written back, with their results.
fn ended(sim: &Sim, queue: &mut Queue) -> Vec<(u64, Result<(), RequestError>)> {
    let mut all = Vec::new();
    for _ in 0..LOOKS {
        all.extend(queue.poll().into_iter().map(|(token, end, _)| (token, end)));
        sim.store.write_back_step(64);
    }
    all
}

#[test]
fn a_flush_waits_for_space_and_covers_all_that_it_should() {
    // No room for data; none for the journal.
    for full in ["data", "map"] {
        let sim = Sim::new(64, OnFull::Hold);
        let (mut v, mut w) = (sim.queue("v"), sim.queue("w"));
        write(&mut v, 0, 64, 2);
        sim.fill(full);
        submit(&mut v, Operation::Flush, Vec::new(), 1);
        submit(&mut v, Operation::Flush, Vec::new(), 2);
        assert_eq!(ended(&sim, &mut v), [], "{full}");
        assert!(sim.waits("v"), "{full}");
        assert!(!sim.waits("w"), "{full}");
        // The guest goes on, and so does another.
        assert_eq!(v.read_all(7, 64).unwrap(), [Value::Stamp(2); 64]);
        write(&mut v, 64, 8, 3);
        w.run(Operation::Flush, Vec::new()).0.unwrap();
        assert_eq!(sim.after_cut()[..64], [Value::Zero; 64], "not claimed");
        sim.room();
        let mut done = ended(&sim, &mut v);
        done.sort_by_key(|(token, _)| *token);
        assert_eq!(done, [(1, Ok(())), (2, Ok(()))], "{full}");
        assert!(!sim.waits("v"), "{full}");
        assert_eq!(sim.after_cut()[..64], [Value::Stamp(2); 64], "{full}");
        let notes = sim.store.notes();
        for words in ["no space left", "room again"] {
            let lines = notes.iter().filter(|line| line.contains(words)).count();
            assert_eq!(lines, 1, "{words}: {notes:?}");
        }
    }
}

#[test]
fn zeroes_wait_for_space_and_keep_no_snapshot_waiting() {
    let sim = Sim::new(64, OnFull::Hold);
    let mut v = sim.queue("v");
    write(&mut v, 0, 64, 2);
    v.run(Operation::Flush, Vec::new()).0.unwrap();
    sim.fill("map");
    let range = SectorRange {
        start: Sector(0),
        count: 32,
    };
    submit(&mut v, Operation::Discard(range), Vec::new(), 1);
    assert_eq!(ended(&sim, &mut v), []);
    assert_eq!(v.read_all(7, 64).unwrap(), [Value::Stamp(2); 64], "not yet");
    sim.room();
    assert_eq!(ended(&sim, &mut v), [(1, Ok(()))]);
    v.run(Operation::Flush, Vec::new()).0.unwrap();
    let found = sim.after_cut();
    assert_eq!(found[..32], [Value::Zero; 32]);
    assert_eq!(found[32..64], [Value::Stamp(2); 32]);
}

#[test]
fn a_write_beyond_the_dirty_bound_waits_for_space() {
    for full in ["data", "map"] {
        let sim = Sim::new(16, OnFull::Hold);
        let mut v = sim.queue("v");
        sim.fill(full);
        let mut over = 0;
        while over < 40 {
            submit(
                &mut v,
                Operation::Write(Sector(over * 8)),
                stamps(over * 8, 8, over + 2),
                over,
            );
            over += 1;
        }
        let early = ended(&sim, &mut v);
        assert!(early.len() < 40, "all found room");
        assert!(early.iter().all(|(_, result)| result.is_ok()), "{early:?}");
        assert!(sim.waits("v"), "{full}");
        sim.room();
        let late = ended(&sim, &mut v);
        assert_eq!(early.len() + late.len(), 40, "{full}");
        assert!(late.iter().all(|(_, result)| result.is_ok()), "{late:?}");
        v.run(Operation::Flush, Vec::new()).0.unwrap();
        let found = sim.after_cut();
        for cluster in 0..40 {
            assert_eq!(found[cluster as usize * 8], Value::Stamp(cluster + 2));
        }
    }
}

#[test]
fn who_must_see_their_end_sees_it_and_nothing_is_lost() {
    let sim = Sim::new(16, OnFull::Hold);
    let mut v = sim.queue("v");
    sim.fill("data");
    for cluster in 0..24 {
        let start = cluster * 8;
        let bytes = stamps(start, 8, cluster + 2);
        submit(&mut v, Operation::Write(Sector(start)), bytes, cluster);
    }
    submit(&mut v, Operation::Flush, Vec::new(), 100);
    submit(&mut v, Operation::Flush, Vec::new(), 200);
    let written = ended(&sim, &mut v);
    // One flush stays, as of a ring that goes on.
    let mut refused = Vec::new();
    for _ in 0..LOOKS {
        // A flush may just be under way, and waits again afterwards.
        v.context().end_held(&|token| token != 200);
        refused.extend(ended(&sim, &mut v));
    }
    assert_eq!(written.len() + refused.len(), 25);
    assert!(refused.contains(&(100, Err(RequestError::NoSpace))));
    let all_refused = refused
        .iter()
        .all(|(_, end)| *end == Err(RequestError::NoSpace));
    assert!(all_refused, "{refused:?}");
    sim.room();
    assert_eq!(ended(&sim, &mut v), [(200, Ok(()))]);
    let found = sim.after_cut();
    for (cluster, _) in written {
        assert_eq!(found[cluster as usize * 8], Value::Stamp(cluster + 2));
    }
}

#[test]
fn a_context_with_held_requests_ends() {
    let sim = Sim::new(64, OnFull::Hold);
    let (mut v, mut other) = (sim.queue("v"), sim.queue("v"));
    write(&mut v, 0, 8, 2);
    sim.fill("data");
    submit(&mut v, Operation::Flush, Vec::new(), 1);
    submit(&mut other, Operation::Flush, Vec::new(), 1);
    assert_eq!(ended(&sim, &mut v), []);
    assert_eq!(ended(&sim, &mut other), []);
    drop(v);
    sim.room();
    assert_eq!(ended(&sim, &mut other), [(1, Ok(()))]);
}

#[test]
fn where_it_is_to_be_reported_it_is() {
    let sim = Sim::new(16, OnFull::Report);
    let mut v = sim.queue("v");
    write(&mut v, 0, 8, 2);
    sim.fill("data");
    submit(&mut v, Operation::Flush, Vec::new(), 100);
    assert_eq!(ended(&sim, &mut v), [(100, Err(RequestError::NoSpace))]);
    for cluster in 0..40 {
        let start = cluster * 8;
        let bytes = stamps(start, 8, 3);
        submit(&mut v, Operation::Write(Sector(start)), bytes, cluster);
    }
    let done = ended(&sim, &mut v);
    assert_eq!(done.len(), 40, "nobody waits");
    assert!(done.contains(&(39, Err(RequestError::NoSpace))), "{done:?}");
    assert!(sim.waits("v"));
    sim.room();
    v.run(Operation::Flush, Vec::new()).0.unwrap();
    assert!(!sim.waits("v"));
    let found = sim.after_cut();
    for (cluster, end) in done {
        let expected = Value::Stamp(3);
        assert!(end.is_err() || found[cluster as usize * 8] == expected);
    }
}
