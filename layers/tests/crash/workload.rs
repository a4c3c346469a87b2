//! A random workload on a simulated store, with crash images examined at every crash point.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, Weak};

use stratablk_layers::PendingSnapshot;
use stratablk_layers::cache::CacheStats;
use stratablk_layers::canary::Canary;
use stratablk_layers::catalog::CatalogState;
use stratablk_layers::catalog::memory::{CommitPoint, MemoryCatalog, MemoryDisk};
use stratablk_layers::file::Media;
use stratablk_layers::file::sim::{Fault, FaultEffect, Random, SimMedia};
use stratablk_layers::store::{Selection, Store, StoreOptions, VolumeSource};
use stratablk_layers::units::{SECTOR_BYTES, StoreId};

use crate::disk::Queue;
use crate::guests::Guests;
use crate::oracle::{Disk, Promise, Value, stamp};
use crate::recovered::small_cache;
use crate::watch::{Crashes, Images, Shared, Watch};

/// Sectors of the disk over a base: not whole clusters, on purpose, and enough for a read past the cache.
const BASED_SECTORS: u64 = 299;
/// Sectors of the empty disk.
const EMPTY_SECTORS: u64 = 128;
/// Steps after which a run that does not end is one that hangs.
const HANGS: u64 = 5000;

/// How a run goes.
#[derive(Default)]
pub struct Plan {
    /// Failures of the disk.
    pub faults: Vec<Fault>,
    /// What is broken on purpose.
    pub canary: Option<Canary>,
    /// Which crashes it is looked at for.
    pub crashes: Crashes,
    /// How the store is set up.
    pub options: StoreOptions,
    /// Whether requests overlap.
    pub overlap: bool,
}

impl Plan {
    /// With a cache that fits nothing, or little, or all, by the seed.
    pub fn tight(seed: u64, crashes: Crashes) -> Self {
        let options = match seed % 6 {
            0 => small_cache(1, None),
            1 => small_cache(2, None),
            2 => small_cache(1, Some(2)),
            3 => small_cache(2, Some(5)),
            4 => small_cache(1, Some(16)),
            _ => small_cache(24, None),
        };
        Self {
            crashes,
            options,
            overlap: (seed / 6).is_multiple_of(2),
            ..Self::default()
        }
    }
}

/// What a run found.
pub struct Outcome {
    /// Images examined.
    pub images: Images,
    /// Instants at which images could be taken.
    pub crash_points: u64,
    /// What was wrong with them.
    pub violations: Vec<String>,
    /// What the cache did.
    pub cache: CacheStats,
}

/// A run.
pub struct Workload {
    seed: u64,
    random: Random,
    media: SimMedia,
    store: Option<Arc<Store>>,
    shared: Shared,
    guests: Arc<Mutex<Guests>>,
    pending: Option<(PendingSnapshot, String, Vec<String>)>,
    next_group: u64,
    faulty: bool,
}

impl Workload {
    /// A run from a seed.
    pub fn new(seed: u64, plan: Plan) -> Self {
        #[cfg(feature = "canary")]
        stratablk_layers::canary::set(plan.canary);
        let _ = plan.canary;
        let media = SimMedia::new(seed);
        let base: Vec<u8> = (0..BASED_SECTORS)
            .flat_map(|sector| stamp(0, sector, 1))
            .collect();
        media.install(Path::new("/images/base.raw"), &base).unwrap();
        let durable = MemoryDisk::new(CatalogState::empty(StoreId(uuid::Uuid::from_u64_pair(
            1, seed,
        ))));
        let catalog = MemoryCatalog::open(&durable).unwrap();
        let files: Arc<dyn Media> = Arc::new(media.clone());
        let options = plan.options;
        let store = Store::simulated(files, Box::new(catalog), options.clone()).unwrap();
        let store = Arc::new(store);
        store
            .create_volume("based", &VolumeSource::Base("/images/base.raw".into()))
            .unwrap();
        store
            .create_volume("empty", &VolumeSource::Size(EMPTY_SECTORS * SECTOR_BYTES))
            .unwrap();
        let disks = BTreeMap::from([
            (
                "based".to_owned(),
                Disk::new(0, vec![Value::Stamp(1); BASED_SECTORS as usize]),
            ),
            (
                "empty".to_owned(),
                Disk::new(1, vec![Value::Zero; EMPTY_SECTORS as usize]),
            ),
        ]);
        let lossy = plan.faults.iter().any(|fault| {
            matches!(
                fault.effect,
                FaultEffect::LostPages | FaultEffect::ClaimSuccess
            )
        });
        let shared = Arc::new(Mutex::new(Watch {
            disks,
            violations: Vec::new(),
            images: Images::default(),
            random: Random::new(seed ^ 0x1ace),
            crashes: plan.crashes,
            lossy,
            options,
            durable: durable.clone(),
            store: Arc::downgrade(&store),
        }));
        let faulty = !plan.faults.is_empty();
        let guests = Guests::new(seed, Arc::clone(&shared), plan.overlap, faulty, lossy);
        let guests = Arc::new(Mutex::new(guests));
        observe(&media, seed, &shared, Arc::downgrade(&guests));
        let marker = media.clone();
        durable.set_observer(move |point| match point {
            CommitPoint::Before => marker.mark("before a commit of the catalog"),
            CommitPoint::After => marker.mark("after a commit of the catalog"),
        });
        let workload = Self {
            seed,
            random: Random::new(seed ^ 0x5eed),
            media,
            store: Some(store),
            shared,
            guests,
            pending: None,
            next_group: 1,
            faulty,
        };
        for name in ["based", "based", "empty"] {
            workload.add_queue(name);
        }
        for fault in plan.faults {
            workload.media.inject(fault);
        }
        workload
    }

    /// The store.
    fn store(&self) -> &Arc<Store> {
        self.store.as_ref().unwrap()
    }

    /// Lets one more queue of a disk work.
    fn add_queue(&self, name: &str) {
        let volume = self.store().open_volume(name).unwrap();
        let queue = Queue::new(volume.context(false).unwrap());
        self.guests.lock().unwrap().add(name, queue);
    }

    /// Runs it to its end.
    pub fn run(mut self) -> Outcome {
        let steps = 60 + self.random.below(60);
        for _ in 0..steps {
            self.step();
            self.media.mark("a step");
            if !self.shared.lock().unwrap().violations.is_empty() {
                break;
            }
        }
        let mut turns = 0;
        while self.guests.lock().unwrap().under_way() > 0 || self.pending.is_some() {
            self.guests.lock().unwrap().poll_all();
            self.finish_snapshot();
            self.store().write_back_step(8);
            turns += 1;
            if turns == HANGS {
                let left = self.guests.lock().unwrap().under_way();
                let mut watch = self.shared.lock().unwrap();
                watch.violation(format!("seed {}: {left} requests hang", self.seed));
                break;
            }
        }
        self.media.clear_observer();
        let cache = self.store().cache_stats();
        if turns < HANGS {
            self.guests.lock().unwrap().close();
        }
        self.store = None;
        let mut watch = self.shared.lock().unwrap();
        Outcome {
            images: watch.images,
            crash_points: self.media.crash_points(),
            violations: std::mem::take(&mut watch.violations),
            cache,
        }
    }

    /// One step: a batch of requests, a look at what has ended, or a command.
    fn step(&mut self) {
        match self.random.below(100) {
            0..52 => self.guests.lock().unwrap().batch(4),
            52..76 => self.guests.lock().unwrap().poll_all(),
            76..87 => {
                const CLUSTERS: [usize; 5] = [1, 2, 3, 7, 64];
                let clusters = CLUSTERS[self.random.index(CLUSTERS.len())];
                trace(|| format!("write back {clusters} clusters"));
                self.store().write_back_step(clusters);
            }
            87..91 => self.begin_snapshot(),
            91..95 => self.finish_snapshot(),
            95..99 => self.checkpoint(),
            _ => self.clone_one(),
        }
    }

    fn begin_snapshot(&mut self) {
        if self.pending.is_some() {
            return;
        }
        let all: Vec<String> = self.shared.lock().unwrap().disks.keys().cloned().collect();
        let mut members: Vec<String> = all
            .iter()
            .filter(|_| self.random.chance(128))
            .cloned()
            .collect();
        if members.is_empty() {
            members = all;
        }
        let group = self.next_group;
        self.next_group += 1;
        let name = format!("s{group}");
        for member in &members {
            let mut watch = self.shared.lock().unwrap();
            let disk = watch.disks.get_mut(member).unwrap();
            disk.begin_snapshot(&name, group);
        }
        let begun = self
            .store()
            .begin_snapshot(&name, &Selection::Volumes(members.clone()));
        trace(|| format!("snapshot {name} of {members:?}: {:?}", begun.as_ref().err()));
        for member in &members {
            let mut watch = self.shared.lock().unwrap();
            watch.disks.get_mut(member).unwrap().instant_passed(&name);
        }
        match begun {
            Ok(pending) => self.pending = Some((pending, name, members)),
            Err(error) => assert!(self.faulty, "seed {}: {error}", self.seed),
        }
    }

    fn finish_snapshot(&mut self) {
        let Some((mut pending, name, members)) = self.pending.take() else {
            return;
        };
        let store = Arc::clone(self.store());
        // Between the sync and the end of the command there may be flushes, and crashes.
        let synced = store.snapshot_drained(&pending) && store.sync_snapshot(&mut pending);
        if !synced || self.random.chance(64) {
            self.pending = Some((pending, name, members));
            self.guests.lock().unwrap().poll_all();
            return;
        }
        let finished = store.finish_snapshot(pending);
        trace(|| format!("snapshot {name} finished: {:?}", finished.as_ref().err()));
        match finished {
            Ok(_) => {
                let mut watch = self.shared.lock().unwrap();
                for member in members {
                    let disk = watch.disks.get_mut(&member).unwrap();
                    disk.snapshots.get_mut(&name).unwrap().acknowledged = true;
                }
            }
            Err(error) => assert!(self.faulty, "seed {}: {error}", self.seed),
        }
    }

    /// A checkpoint between two flushes; with one under way on this thread it would wait for itself.
    fn checkpoint(&mut self) {
        let disk = if self.random.chance(128) {
            "based"
        } else {
            "empty"
        };
        if self.guests.lock().unwrap().may_flush(disk) || self.pending.is_some() {
            return;
        }
        let done = self.store().checkpoint_volume(disk);
        trace(|| format!("checkpoint of {disk}: {done:?}"));
        assert!(done.is_ok() || self.faulty, "seed {}: {done:?}", self.seed);
    }

    /// One more disk, which starts as an acknowledged snapshot of another.
    fn clone_one(&mut self) {
        let source = {
            let watch = self.shared.lock().unwrap();
            if watch.disks.contains_key("clone") || self.pending.is_some() {
                return;
            }
            let found = watch.disks.iter().find_map(|(name, disk)| {
                let mut snapshots = disk.snapshots.iter();
                let snapshot = snapshots.find(|(_, snapshot)| snapshot.acknowledged)?;
                Some((
                    name.clone(),
                    snapshot.0.clone(),
                    disk.number,
                    disk.sectors(),
                ))
            });
            let Some(found) = found else {
                return;
            };
            found
        };
        let (volume, snapshot, number, sectors) = source;
        let source = VolumeSource::Snapshot {
            volume: volume.clone(),
            snapshot: snapshot.clone(),
        };
        let made = self.store().create_volume("clone", &source);
        trace(|| format!("clone of {volume}@{snapshot}: {:?}", made.as_ref().err()));
        if let Err(error) = made {
            assert!(self.faulty, "seed {}: {error}", self.seed);
            return;
        }
        let opened = self.store().open_volume("clone").unwrap();
        let mut queue = Queue::new(opened.context(false).unwrap());
        let found = queue.read_all(number, sectors);
        if found.is_err() && self.faulty {
            // The planned failure of a read; this disk stays unknown.
            return;
        }
        let mut watch = self.shared.lock().unwrap();
        let problem = match &found {
            Ok(found) => {
                watch.disks[&volume].check_snapshot(&snapshot, found, Promise::Acknowledged)
            }
            Err(problem) => Some(problem.clone()),
        };
        let lossy = watch.lossy;
        match (found, problem) {
            (Ok(found), None) => {
                watch.disks.insert("clone".into(), Disk::new(number, found));
            }
            (_, Some(problem)) if !lossy => {
                watch.violation(format!("seed {}: clone: {problem}", self.seed));
                return;
            }
            _ => return,
        }
        drop(watch);
        self.guests.lock().unwrap().add("clone", queue);
    }
}

/// Tells what happens, if `STRATABLK_CRASH_TRACE` is set.
pub fn trace(what: impl FnOnce() -> String) {
    if std::env::var_os("STRATABLK_CRASH_TRACE").is_some() {
        eprintln!("  {}", what());
    }
}

/// Examines images at every crash point from now on, and lets guests go on there if it lies in a command: as threads do.
fn observe(media: &SimMedia, seed: u64, shared: &Shared, guests: Weak<Mutex<Guests>>) {
    let shared = Arc::clone(shared);
    let mut random = Random::new(seed ^ 0x1d1e);
    media.set_observer(Box::new(move |media, point| {
        shared.lock().unwrap().look(seed, media, point);
        if random.chance(112)
            && let Some(guests) = guests.upgrade()
            && let Ok(mut guests) = guests.try_lock()
        {
            trace(|| "meanwhile".into());
            guests.interrupt();
        }
    }));
}
