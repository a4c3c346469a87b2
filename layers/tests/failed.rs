//! A volume that has failed stays so whatever becomes of the daemon, no flush of it succeeds, and the others go on; a recovery
//! saves what can be saved, says what cannot be read, and only then the volume takes writes again.
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
use stratablk_layers::Error;
use stratablk_layers::cache::CacheOptions;
use stratablk_layers::cache::arena::Arena;
use stratablk_layers::catalog::CatalogState;
use stratablk_layers::catalog::memory::{MemoryCatalog, MemoryDisk};
use stratablk_layers::file::Media;
use stratablk_layers::file::sim::{Fault, FaultEffect, FaultPoint, SimMedia, Survival};
use stratablk_layers::lifecycle::RestoreOptions;
use stratablk_layers::store::{Selection, Store, StoreOptions, VolumeSource};
use stratablk_layers::units::{SECTOR_BYTES, Sector, SectorRange, StoreId};
use stratablk_layers::volume::{Operation, RequestError};

/// Sectors of each disk.
const SECTORS: u64 = 256;

/// A store with the volumes `v` and `w`, both with write 1 in all sectors, flushed.
struct Sim {
    store: Option<Store>,
    media: SimMedia,
    catalog: MemoryDisk,
}

impl Sim {
    fn new() -> Self {
        let media = SimMedia::new(1);
        let catalog = MemoryDisk::new(CatalogState::empty(StoreId(uuid::Uuid::from_u128(5))));
        let sim = Self::open(media, catalog, None);
        for name in ["v", "w"] {
            let size = VolumeSource::Size(SECTORS * SECTOR_BYTES);
            sim.store().create_volume(name, &size).unwrap();
            sim.write(name, 0, SECTORS, 1).unwrap();
            sim.flush(name).unwrap();
        }
        sim
    }

    fn open(media: SimMedia, catalog: MemoryDisk, arena: Option<Arena>) -> Self {
        let files: Arc<dyn Media> = Arc::new(media.clone());
        let rows = Box::new(MemoryCatalog::open(&catalog).unwrap());
        let options = StoreOptions {
            cache: CacheOptions {
                bytes: 128 * 4096,
                ..CacheOptions::default()
            },
            ..StoreOptions::default()
        };
        let store = match arena {
            None => Store::simulated(files, rows, options),
            Some(arena) => Store::simulated_after_kill(files, rows, options, arena),
        };
        Self {
            store: Some(store.unwrap()),
            media,
            catalog,
        }
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    /// The next daemon, after this one was killed.
    fn killed(&self) -> Self {
        let arena = self.store().cache_arena().copy().unwrap();
        let media = self.media.kill_image(3);
        Self::open(media, self.catalog.crash_image(), Some(arena))
    }

    /// The next daemon, after an end of this one that left nothing in memory, and no power cut.
    fn restarted(mut self) -> Self {
        self.store = None;
        Self::open(self.media, self.catalog, None)
    }

    /// What a power cut leaves, of a disk that has kept only what it had to.
    fn cut(&self) -> Self {
        let media = self.media.crash_image_with(Survival::Nothing);
        Self::open(media, self.catalog.crash_image(), None)
    }

    fn queue(&self, name: &str) -> Queue {
        let volume = self.store().open_volume(name).unwrap();
        Queue::new(volume.context(false).unwrap())
    }

    fn write(&self, name: &str, start: u64, count: u64, id: u64) -> Result<(), RequestError> {
        let bytes = (start..start + count)
            .flat_map(|sector| stamp(7, sector, id))
            .collect();
        let write = Operation::Write(Sector(start));
        self.queue(name).run(write, bytes).0
    }

    fn flush(&self, name: &str) -> Result<(), RequestError> {
        self.queue(name).run(Operation::Flush, Vec::new()).0
    }

    fn read(&self, name: &str) -> Vec<Value> {
        self.queue(name).read_all(7, SECTORS).unwrap()
    }

    fn fault(&self, point: FaultPoint, name: &str, times: u64, effect: FaultEffect) {
        self.media.inject(Fault {
            point,
            name: Some(name.into()),
            after: 0,
            times,
            effect,
        });
    }

    fn failure(&self) -> Option<String> {
        let of = |name| self.store().volume_info(name).unwrap().failure;
        assert_eq!(of("w"), None, "the other volume has nothing to do with it");
        let facts = self.store().volume_facts("v").unwrap().failure;
        let info = of("v");
        assert_eq!(facts, info);
        info
    }

    /// Writes 2 to the first half of `v`, writes it back without a sync, and lets the sync fail with the pages lost.
    fn fail(&self) {
        self.write("v", 0, SECTORS / 2, 2).unwrap();
        self.store().write_back_step(1000);
        self.fault(FaultPoint::SyncData, "data", 1, FaultEffect::LostPages);
        assert_eq!(self.flush("v"), Err(RequestError::Failed));
        self.media.clear_faults();
        assert!(self.failure().is_some());
    }

    /// Nothing that was written to `v` is claimed to be safe; `w` goes on.
    #[track_caller]
    fn assert_failed(&self, when: &str) {
        assert!(self.failure().is_some(), "{when}: forgotten");
        assert_eq!(self.flush("v"), Err(RequestError::Failed), "{when}");
        assert_eq!(
            self.write("v", 9, 1, 9),
            Err(RequestError::Failed),
            "{when}"
        );
        assert_eq!(self.read("v").len(), SECTORS as usize, "{when}");
        let snapshot = self
            .store()
            .snapshot("s", &Selection::Volumes(vec!["v".into()]));
        assert!(
            matches!(snapshot, Err(Error::Failed { .. })),
            "{when}: {snapshot:?}"
        );
        let clone = VolumeSource::Volume("v".into());
        assert!(self.store().create_volume("c", &clone).is_err(), "{when}");
        self.write("w", 0, 8, 5).unwrap();
        self.flush("w").unwrap();
    }
}

/// Write 2 in the first half, and write 1 in the second.
fn halves() -> Vec<Value> {
    let half = SECTORS as usize / 2;
    [vec![Value::Stamp(2); half], vec![Value::Stamp(1); half]].concat()
}

#[test]
fn a_failure_outlives_the_daemon_however_that_ends() {
    let sim = Sim::new();
    sim.fail();
    sim.assert_failed("at once");
    // Nobody had the time to write it down.
    let killed = sim.killed();
    assert!(killed.failure().is_some(), "before anybody opens it");
    killed.assert_failed("killed");
    killed.killed().assert_failed("killed twice");
    killed.cut().assert_failed("killed, and then a power cut");
    killed.restarted().assert_failed("killed and started twice");
    // The catalog cannot be written: the arena still knows.
    sim.catalog.fail_next_commit();
    sim.store().record_failures();
    sim.killed().assert_failed("killed, no commit");
    sim.store().record_failures();
    sim.cut().assert_failed("written down, a power cut");
    sim.restarted().assert_failed("written down, a restart");
}

#[test]
fn a_failure_that_could_not_be_written_down_is_tried_again_by_upkeep() {
    let sim = Sim::new();
    sim.fail();
    let written = || sim.catalog.state().volumes["v"].failed.is_some();
    for tries in 1..=2 {
        sim.catalog.fail_next_commit();
        assert!(maintain(&sim), "try {tries}");
        assert!(!written(), "that commit failed");
    }
    assert!(maintain(&sim), "it was not tried again");
    assert!(written());
    let notes = sim.store().notes();
    let told = notes.iter().filter(|note| note.contains("tried again"));
    assert_eq!(told.count(), 1, "{notes:?}");
    sim.cut().assert_failed("written down, a power cut");
}

/// A turn of upkeep. Returns whether it came.
fn maintain(sim: &Sim) -> bool {
    std::thread::scope(|scope| {
        let (done, came) = std::sync::mpsc::channel();
        scope.spawn(move || done.send(sim.store().maintain()).unwrap());
        let came = came.recv_timeout(std::time::Duration::from_secs(20));
        if came.is_err() {
            // Lets the thread end.
            sim.store().close();
        }
        came == Ok(true)
    })
}

#[test]
fn a_recovery_writes_again_what_the_cache_and_the_host_have() {
    let sim = Sim::new();
    sim.fail();
    let in_use = sim.queue("v");
    let busy = sim.store().recover_volume("v");
    assert!(matches!(busy, Err(Error::Busy { .. })), "{busy:?}");
    drop(in_use);
    let sound = sim.store().recover_volume("w");
    assert!(matches!(sound, Err(Error::Invalid { .. })), "{sound:?}");

    let killed = sim.killed();
    for (sim, when) in [(sim, "the same daemon"), (killed, "the next daemon")] {
        // Not while the host fails: and it can be tried again.
        for (point, name) in [
            (FaultPoint::Write, "data"),
            (FaultPoint::SyncData, "data"),
            (FaultPoint::Write, "map.new"),
            (FaultPoint::SyncData, "map.new"),
            (FaultPoint::Rename, "map"),
            (FaultPoint::SyncDir, ""),
        ] {
            let name = if name.is_empty() {
                None
            } else {
                Some(name.into())
            };
            sim.media.inject(Fault {
                point,
                name,
                after: 0,
                times: 1,
                effect: FaultEffect::Error,
            });
            let hits = sim.media.faults_hit();
            let failed = sim.store().recover_volume("v");
            assert!(failed.is_err(), "{when}, {point:?}: {failed:?}");
            assert_eq!(sim.media.faults_hit(), hits + 1, "{when}, {point:?}");
            sim.media.clear_faults();
            sim.assert_failed(when);
        }
        sim.catalog.fail_next_commit();
        sim.store().recover_volume("v").unwrap_err();
        sim.assert_failed(when);

        let report = sim.store().recover_volume("v").unwrap();
        assert_eq!(report.written_bytes, SECTORS * SECTOR_BYTES, "{when}");
        assert_eq!(report.unreadable_bytes, 0, "{when}");
        assert_eq!(sim.failure(), None, "{when}");
        assert_eq!(sim.read("v"), halves(), "{when}");
        // On the medium, all of it: the cache had what the host had lost.
        let cut = sim.cut();
        assert_eq!((cut.failure(), cut.read("v")), (None, halves()), "{when}");
        assert_eq!(sim.killed().failure(), None, "{when}: no mark is left");
        sim.write("v", 0, 1, 3).unwrap();
        sim.flush("v").unwrap();
        assert_eq!(sim.cut().read("v")[0], Value::Stamp(3), "{when}");
    }
}

#[test]
fn what_was_never_in_the_map_is_saved_too() {
    let sim = Sim::new();
    let size = VolumeSource::Size(SECTORS * SECTOR_BYTES);
    sim.store().delete_volume("v").unwrap();
    sim.store().create_volume("v", &size).unwrap();
    sim.write("v", 3, 7, 4).unwrap();
    // The record that says so fails: what follows it would be damage.
    sim.fault(FaultPoint::Write, "map", 1, FaultEffect::Error);
    assert_eq!(sim.flush("v"), Err(RequestError::Failed));
    sim.media.clear_faults();
    let mut expected = vec![Value::Zero; SECTORS as usize];
    expected[3..10].fill(Value::Stamp(4));
    assert_eq!(sim.read("v"), expected);
    for sim in [sim.killed(), sim] {
        sim.store().recover_volume("v").unwrap();
        assert_eq!(sim.cut().read("v"), expected);
        assert_eq!(sim.read("v"), expected);
    }
}

#[test]
fn what_cannot_be_read_is_told_and_stays_an_error() {
    let sim = Sim::new();
    sim.fail();
    sim.store().record_failures();
    let sim = sim.restarted();
    // A chunk at once, and then its sectors 0 to 4 one by one.
    sim.fault(FaultPoint::Read, "data", 6, FaultEffect::Error);
    let report = sim.store().recover_volume("v").unwrap();
    sim.media.clear_faults();
    let range = SectorRange::new(Sector(0), 5).unwrap();
    assert_eq!(report.unreadable, [range]);
    assert_eq!(report.unreadable_bytes, 5 * SECTOR_BYTES);
    assert_eq!(report.written_bytes, (SECTORS - 5) * SECTOR_BYTES);
    assert_eq!(sim.failure(), None);
    sim.write("v", 0, 8, 3).unwrap();
    sim.flush("v").unwrap();
}

#[test]
fn a_restore_throws_the_failure_away_with_what_failed() {
    for restart in [false, true] {
        let mut sim = Sim::new();
        let all = Selection::Volumes(vec!["v".into()]);
        sim.store().snapshot("good", &all).unwrap();
        sim.write("v", 0, SECTORS, 6).unwrap();
        sim.flush("v").unwrap();
        sim.fail();
        if restart {
            sim.store().record_failures();
            sim = sim.restarted();
        }
        let keep = RestoreOptions {
            keep: Some("kept".into()),
            only: false,
        };
        let kept = sim.store().restore("v", "good", &keep);
        assert!(matches!(kept, Err(Error::Failed { .. })), "{kept:?}");
        let plain = RestoreOptions::default();
        sim.store().restore("v", "good", &plain).unwrap();
        assert_eq!(sim.failure(), None);
        assert_eq!(sim.read("v"), vec![Value::Stamp(1); SECTORS as usize]);
        sim.write("v", 0, 8, 3).unwrap();
        sim.flush("v").unwrap();
        assert_eq!(sim.killed().failure(), None);
        assert_eq!(sim.cut().failure(), None);
    }
}

#[test]
fn a_snapshot_whose_writing_failed_is_not_completed_by_a_restart() {
    let sim = Sim::new();
    sim.write("v", 0, SECTORS / 2, 2).unwrap();
    sim.store().write_back_step(1000);
    sim.media.inject(Fault {
        point: FaultPoint::SyncData,
        name: Some("data".into()),
        // The new layer's.
        after: 1,
        times: 1,
        effect: FaultEffect::LostPages,
    });
    let all = Selection::Volumes(vec!["v".into()]);
    sim.store().snapshot("s", &all).unwrap_err();
    sim.media.clear_faults();
    let sim = sim.killed();
    assert!(sim.failure().is_some());
    let found = sim.store().snapshots(Some("v")).unwrap();
    assert!(found.is_empty(), "{found:?}");
    sim.assert_failed("after the snapshot");
    sim.store().recover_volume("v").unwrap();
    assert_eq!(sim.cut().read("v"), halves());
    sim.store().snapshot("s", &all).unwrap();
    assert_eq!(sim.cut().read("v"), halves());
}
