//! Every call to the host fails once: a fixed life of a volume (writes, flushes, write-back, discards, snapshots, a merge, a
//! restore, a clone, another size, a checkpoint) is gone through again and again, and each time another one of the calls
//! that it makes fails, as each kind of failure. After that nothing is promised that is not there, somebody was told, the other
//! volume has nothing to do with it, and all of it goes on.
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

use std::collections::BTreeMap;
use std::sync::Arc;

use disk::Queue;
use oracle::{Value, stamp};
use stratablk_layers::Error;
use stratablk_layers::cache::CacheOptions;
use stratablk_layers::cache::arena::Arena;
use stratablk_layers::catalog::CatalogState;
use stratablk_layers::catalog::memory::{CommitPoint, MemoryCatalog, MemoryDisk};
use stratablk_layers::file::Media;
use stratablk_layers::file::sim::{Fault, FaultEffect, FaultPoint, SimMedia, Survival};
use stratablk_layers::lifecycle::{DeleteOptions, ResizeOptions, RestoreOptions};
use stratablk_layers::store::{Selection, Store, StoreOptions, VolumeSource};
use stratablk_layers::units::{SECTOR_BYTES, Sector, SectorRange, StoreId};
use stratablk_layers::volume::{Operation, RequestError};

/// Sectors of each disk, until `v` gets larger.
const SECTORS: u64 = 192;
/// What it has then.
const GROWN: u64 = 256;

/// What fails.
#[derive(Clone, Copy, Debug)]
enum What {
    /// A call to the host.
    Call(FaultPoint, FaultEffect),
    /// A commit of the catalog.
    Commit,
}

/// All there is.
fn whats() -> Vec<What> {
    let mut all = vec![What::Commit];
    for point in [
        FaultPoint::Read,
        FaultPoint::Write,
        FaultPoint::Punch,
        FaultPoint::SyncData,
        FaultPoint::SyncDir,
        FaultPoint::Create,
        FaultPoint::Rename,
        FaultPoint::Open,
        FaultPoint::SetLen,
        FaultPoint::Remove,
    ] {
        // A write that fails for want of space has written a part: a short write.
        all.push(What::Call(point, FaultEffect::Error));
        if point != FaultPoint::Read {
            all.push(What::Call(point, FaultEffect::NoSpace));
        }
        if point == FaultPoint::SyncData {
            all.push(What::Call(point, FaultEffect::LostPages));
        }
    }
    all
}

/// What a sector may hold.
type Sets = Vec<Vec<Value>>;

/// What `v` may hold, by what its guest and its operator were told.
#[derive(Clone)]
struct Model {
    /// Now.
    live: Sets,
    /// After power loss.
    kept: Sets,
    /// In snapshots that were acknowledged.
    snapshots: BTreeMap<String, Sets>,
}

/// Whether each value is one of those.
fn within(found: &[Value], sets: &Sets) -> Result<(), String> {
    if found.len() != sets.len() {
        return Err(format!("{} sectors, not {}", found.len(), sets.len()));
    }
    for (sector, (value, set)) in found.iter().zip(sets).enumerate() {
        if !set.contains(value) {
            return Err(format!("sector {sector}: {value:?} is not in {set:?}"));
        }
    }
    Ok(())
}

impl Model {
    /// A write of these sectors ended so.
    fn wrote(&mut self, start: u64, count: u64, value: Value, ok: bool) {
        for sector in start as usize..(start + count) as usize {
            if ok {
                self.live[sector].clear();
            }
            self.live[sector].push(value);
            self.kept[sector].push(value);
        }
    }
}

/// The store with the volumes `v` and `w`.
struct Life {
    /// Of the cache.
    frames: u64,
    store: Store,
    media: SimMedia,
    catalog: MemoryDisk,
    model: Model,
    /// What went wrong, as it was told: to whom, and what.
    told: Vec<String>,
}

fn open(
    frames: u64,
    media: &SimMedia,
    catalog: &MemoryDisk,
    arena: Option<Arena>,
) -> Result<Store, Error> {
    let files: Arc<dyn Media> = Arc::new(media.clone());
    let rows = Box::new(MemoryCatalog::open(catalog)?);
    let options = StoreOptions {
        cache: CacheOptions {
            bytes: frames * 4096,
            ..CacheOptions::default()
        },
        ..StoreOptions::default()
    };
    match arena {
        None => Store::simulated(files, rows, options),
        Some(arena) => Store::simulated_after_kill(files, rows, options, arena),
    }
}

fn run(
    store: &Store,
    name: &str,
    operation: Operation,
    bytes: Vec<u8>,
) -> Result<(Result<(), RequestError>, Vec<u8>), Error> {
    let context = store.open_volume(name)?.context(false)?;
    let help = || store.write_back_step(16);
    Ok(Queue::new(context).run_helped(operation, bytes, &help))
}

fn read(store: &Store, name: &str) -> Result<Vec<Value>, String> {
    let sectors = store.volume_info(name).unwrap().size_bytes / SECTOR_BYTES;
    let context = store.open_volume(name).and_then(|v| v.context(false));
    let mut queue = Queue::new(context.map_err(|error| error.to_string())?);
    queue.read_all(7, sectors)
}

impl Life {
    fn new(frames: u64) -> Self {
        let media = SimMedia::new(1);
        let catalog = MemoryDisk::new(CatalogState::empty(StoreId(uuid::Uuid::from_u128(5))));
        let store = open(frames, &media, &catalog, None).unwrap();
        for name in ["v", "w"] {
            let size = VolumeSource::Size(SECTORS * SECTOR_BYTES);
            store.create_volume(name, &size).unwrap();
        }
        let empty = vec![vec![Value::Zero]; SECTORS as usize];
        let mut life = Self {
            frames,
            store,
            media,
            catalog,
            model: Model {
                live: empty.clone(),
                kept: empty,
                snapshots: BTreeMap::new(),
            },
            told: Vec::new(),
        };
        life.write(0, 100, 1);
        life.flush();
        life.assert_other();
        life
    }

    /// Notes an error that somebody was told.
    fn tell<T>(&mut self, whom: &str, result: Result<T, impl ToString>) -> Option<T> {
        result
            .map_err(|error| self.told.push(format!("{whom}: {}", error.to_string())))
            .ok()
    }

    /// Carries out a request of the guest.
    fn request(&mut self, operation: Operation, bytes: Vec<u8>) -> Option<Vec<u8>> {
        let done = run(&self.store, "v", operation, bytes);
        let (end, bytes) = self.tell("operator", done)?;
        let end = end.map_err(|error| format!("{operation:?}: {error:?}"));
        self.tell("guest", end).map(|()| bytes)
    }

    fn write(&mut self, start: u64, count: u64, id: u64) {
        let bytes = (start..start + count)
            .flat_map(|sector| stamp(7, sector, id))
            .collect();
        let ok = self.request(Operation::Write(Sector(start)), bytes);
        self.model
            .wrote(start, count, Value::Stamp(id), ok.is_some());
    }

    fn discard(&mut self, start: u64, count: u64) {
        let range = SectorRange::new(Sector(start), count).unwrap();
        let ok = self.request(Operation::Discard(range), Vec::new());
        self.model.wrote(start, count, Value::Zero, ok.is_some());
    }

    fn flush(&mut self) {
        if self.request(Operation::Flush, Vec::new()).is_some() {
            self.model.kept = self.model.live.clone();
        }
    }

    fn read(&mut self) {
        let bytes = vec![0xa5; SECTORS as usize * SECTOR_BYTES as usize];
        if let Some(bytes) = self.request(Operation::Read(Sector(0)), bytes) {
            let sectors = (0..).zip(bytes.chunks(SECTOR_BYTES as usize));
            let found: Vec<Value> = sectors
                .map(|(sector, bytes)| oracle::unstamp(7, sector, bytes).unwrap())
                .collect();
            // Where the host has lost pages of a volume that failed, reads may find what was there before them.
            let failed = self.store.volume_info("v").unwrap().failure.is_some();
            let lived = self.model.live[..SECTORS as usize].to_vec();
            assert!(failed || within(&found, &lived) == Ok(()));
        }
    }

    fn snapshot(&mut self, name: &str) {
        let taken = self
            .store
            .snapshot(name, &Selection::Volumes(vec!["v".into()]));
        if self.tell("operator", taken).is_some() {
            self.model.kept = self.model.live.clone();
            let content = self.model.live.clone();
            self.model.snapshots.insert(name.into(), content);
        }
    }

    fn delete_snapshot(&mut self, name: &str) {
        let deleted = self
            .store
            .delete_snapshot("v", name, DeleteOptions::default());
        if self.tell("operator", deleted).is_some() {
            self.model.snapshots.remove(name);
        }
        self.work();
    }

    /// Carries out the jobs.
    fn work(&mut self) {
        for _ in 0..1000 {
            if !self.store.job_step() {
                break;
            }
        }
        for job in self.store.jobs() {
            if let Some(error) = job.error {
                self.told.push(format!("job {}: {error}", job.id.0));
            }
        }
    }

    fn restore(&mut self, name: &str) {
        let restored = self.store.restore("v", name, &RestoreOptions::default());
        if self.tell("operator", restored).is_some() {
            let content = self.model.snapshots[name].clone();
            (self.model.live, self.model.kept) = (content.clone(), content);
        }
    }

    fn grow(&mut self) {
        let grown = self
            .store
            .resize("v", GROWN * SECTOR_BYTES, ResizeOptions::default());
        if self.tell("operator", grown).is_some() {
            for sets in [&mut self.model.live, &mut self.model.kept] {
                sets.resize(GROWN as usize, vec![Value::Zero]);
            }
        }
    }

    /// The life.
    fn live(&mut self) {
        self.write(90, 30, 2);
        self.flush();
        self.write(0, 64, 3);
        self.store.write_back_step(1000);
        self.read();
        self.flush();
        self.snapshot("s1");
        self.write(40, 40, 4);
        self.discard(48, 16);
        self.flush();
        self.snapshot("s2");
        self.write(10, 5, 5);
        self.flush();
        self.delete_snapshot("s1");
        self.write(100, 50, 6);
        if self.model.snapshots.contains_key("s2") {
            self.restore("s2");
        }
        self.write(3, 3, 7);
        self.flush();
        self.grow();
        self.discard(0, 8);
        let checkpoint = self.store.checkpoint_volume("v");
        self.tell("operator", checkpoint);
        let clone = VolumeSource::Volume("v".into());
        let cloned = self.store.create_volume("c", &clone);
        if self.tell("operator", cloned).is_some() {
            let deleted = self.store.delete_volume("c");
            self.tell("operator", deleted);
        }
        if self.model.snapshots.contains_key("s2") {
            self.delete_snapshot("s2");
        }
        self.work();
        self.write(60, 9, 8);
        self.read();
        self.flush();
    }

    /// The other volume is as it was, takes writes, and flushes.
    fn assert_other(&self) {
        let info = self.store.volume_info("w").unwrap();
        assert_eq!((info.failure, info.no_space), (None, false));
        let bytes = (0..SECTORS).flat_map(|at| stamp(7, at, 9)).collect();
        let wrote = run(&self.store, "w", Operation::Write(Sector(0)), bytes).unwrap();
        wrote.0.unwrap();
        let flushed = run(&self.store, "w", Operation::Flush, Vec::new()).unwrap();
        flushed.0.unwrap();
        let all = vec![Value::Stamp(9); SECTORS as usize];
        assert_eq!(read(&self.store, "w"), Ok(all));
    }

    /// What a start finds that must be one of these.
    fn assert_found(&self, store: &Store, sets: &Sets, when: &str) {
        let found = read(store, "v").unwrap_or_else(|error| panic!("{when}: {error}"));
        within(&found, sets).unwrap_or_else(|error| panic!("{when}: {error}"));
        for (name, content) in &self.model.snapshots {
            let source = VolumeSource::Snapshot {
                volume: "v".into(),
                snapshot: name.clone(),
            };
            let clone = format!("look-{name}");
            store
                .create_volume(&clone, &source)
                .unwrap_or_else(|error| panic!("{when}, {name}: {error}"));
            within(&read(store, &clone).unwrap(), content)
                .unwrap_or_else(|error| panic!("{when}, {name}: {error}"));
        }
    }

    /// All that must hold after a failure, which is over.
    fn judge(mut self, silent: bool) {
        let failure = self.store.volume_info("v").unwrap().failure;
        let mut told = std::mem::take(&mut self.told);
        told.extend(failure.iter().map(|cause| format!("failed: {cause}")));
        told.extend(
            self.store
                .notes()
                .into_iter()
                .map(|note| format!("log: {note}")),
        );
        assert!(silent || !told.is_empty(), "nobody was told");
        self.assert_other();

        // Power goes; the daemon is killed.
        let cut = self.media.crash_image_with(Survival::Nothing);
        let cut = open(self.frames, &cut, &self.catalog.crash_image(), None).unwrap();
        self.assert_found(&cut, &self.model.kept, "after a power cut");
        let arena = self.store.cache_arena().copy().unwrap();
        let killed = self.media.kill_image(3);
        let killed = open(
            self.frames,
            &killed,
            &self.catalog.crash_image(),
            Some(arena),
        )
        .unwrap();
        self.assert_found(&killed, &self.model.live, "after a kill");
        let after = killed.volume_info("v").unwrap().failure;
        assert_eq!(after.is_some(), failure.is_some(), "{after:?}");

        // The host is well again. What has failed stays so, until it is recovered.
        let again = run(&self.store, "v", Operation::Flush, Vec::new())
            .unwrap()
            .0;
        assert_eq!(again.is_err(), failure.is_some(), "{again:?}");
        if failure.is_some() {
            self.store.recover_volume("v").unwrap();
        }
        let found = read(&self.store, "v").unwrap();
        within(&found, &self.model.live).unwrap();
        // Jobs go on where they stopped, and nobody sees anything of that.
        for job in self.store.jobs() {
            if job.error.is_some() {
                self.store.resume_job(job.id).unwrap();
            }
        }
        self.work();
        assert_eq!(read(&self.store, "v").unwrap(), found, "after the jobs");
        self.model.live = found.into_iter().map(|value| vec![value]).collect();
        self.write(0, 20, 10);
        self.flush();
        self.snapshot("after");
        assert_eq!(self.told, Vec::<String>::new());
        let cut = self.media.crash_image_with(Survival::Nothing);
        let cut = open(self.frames, &cut, &self.catalog.crash_image(), None).unwrap();
        self.assert_found(&cut, &self.model.live, "after a power cut, at the end");
    }
}

/// One life, in which call number `number` of a kind fails. Returns with what it had to do, or `None` if there were fewer.
fn one(frames: u64, what: What, number: u64) -> Option<String> {
    let mut life = Life::new(frames);
    let name = match what {
        What::Call(point, effect) => {
            life.media.inject(Fault {
                point,
                name: None,
                after: number,
                times: 1,
                effect,
            });
            life.live();
            life.media.clear_faults();
            life.media.last_fault()?
        }
        What::Commit => {
            let (disk, mut left) = (life.catalog.clone(), number);
            let hit = Arc::new(std::sync::atomic::AtomicBool::new(false));
            let seen = Arc::clone(&hit);
            life.catalog.set_observer(move |point| {
                if point == CommitPoint::Before && !seen.load(std::sync::atomic::Ordering::Relaxed)
                {
                    if left == 0 {
                        seen.store(true, std::sync::atomic::Ordering::Relaxed);
                        disk.fail_next_commit();
                    } else {
                        left -= 1;
                    }
                }
            });
            life.live();
            life.catalog.set_observer(|_| {});
            hit.load(std::sync::atomic::Ordering::Relaxed)
                .then(|| "catalog".to_owned())?
        }
    };
    let layer = name.len() == 36;
    let name = if layer { "LAYER".to_owned() } else { name };
    // Leftovers that stay for the next try, or the next start, need nobody; nor does a read that is tried again in smaller
    // pieces, by who takes checksums; nor do checksums that are taken anew, since the old ones cannot be read.
    let silent = match what {
        What::Call(FaultPoint::Remove, _) => true,
        What::Call(FaultPoint::Read, _) => name == "data" || name == "sums",
        _ => false,
    };
    life.judge(silent);
    Some(name)
}

#[test]
fn every_call_fails_once_with_a_small_cache() {
    // Less than the disk, so that reads go to files and writes wait for frames.
    every_call_fails_once(16);
}

#[test]
fn every_call_fails_once_with_a_large_cache() {
    every_call_fails_once(512);
}

fn every_call_fails_once(frames: u64) {
    // Unharmed, nobody is told of anything.
    let mut life = Life::new(frames);
    life.live();
    assert_eq!(life.told, Vec::<String>::new());
    life.judge(true);

    let (mut failures, mut bad) = (0, Vec::new());
    for what in whats() {
        let mut sites: BTreeMap<String, u64> = BTreeMap::new();
        for number in 0.. {
            let run = std::panic::AssertUnwindSafe(|| one(frames, what, number));
            match std::panic::catch_unwind(run) {
                Ok(None) => break,
                Ok(Some(name)) => *sites.entry(name).or_default() += 1,
                Err(panic) => {
                    let text = panic
                        .downcast_ref::<String>()
                        .cloned()
                        .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
                    bad.push(format!(
                        "{what:?}, number {number}: {}",
                        text.unwrap_or_default()
                    ));
                }
            }
            assert!(number < 2000, "{what:?} has no end");
            failures += 1;
        }
        println!("{what:?}: {sites:?}");
    }
    println!("{failures} failures");
    assert!(
        bad.is_empty(),
        "{} of {failures}:\n{}",
        bad.len(),
        bad.join("\n")
    );
    assert!(failures > 300, "{failures}");
}
