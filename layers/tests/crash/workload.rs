//! A random workload on a simulated store, with a crash image examined at every crash point.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex};

use stratablk_layers::PendingSnapshot;
use stratablk_layers::catalog::CatalogState;
use stratablk_layers::catalog::memory::{CommitPoint, MemoryCatalog, MemoryDisk};
use stratablk_layers::file::Media;
use stratablk_layers::file::sim::{Fault, Random, SimMedia, Survival};
use stratablk_layers::store::{Selection, Store, StoreOptions, VolumeSource};
use stratablk_layers::units::{SECTOR_BYTES, Sector, SectorRange, StoreId};
use stratablk_layers::volume::{Durability, Operation};

use crate::disk::Queue;
use crate::oracle::{Disk, FlushMark, Value, stamp, unstamp};
use crate::recovered::examine;

/// Sectors of the disk over a base: not whole clusters, on purpose.
const BASED_SECTORS: u64 = 203;
/// Sectors of the empty disk.
const EMPTY_SECTORS: u64 = 128;

/// What goes wrong in a run, beside the power.
#[derive(Default)]
pub struct Plan {
    /// Failures of the disk.
    pub faults: Vec<Fault>,
    /// The canary that turns the order of a flush around.
    pub map_before_data: bool,
}

/// What a run found.
pub struct Outcome {
    /// Images examined.
    pub images: u64,
    /// Instants at which images could be taken.
    pub crash_points: u64,
    /// What was wrong with them.
    pub violations: Vec<String>,
}

/// What the observer needs at a crash point.
struct Watch {
    /// What may be found.
    disks: BTreeMap<String, Disk>,
    /// What was found.
    violations: Vec<String>,
    /// Images examined.
    images: u64,
    /// Chooses images.
    random: Random,
}

/// What a request under way is.
enum Kind {
    /// A change of these sectors.
    Change { range: SectorRange, stable: bool },
    /// A read of these sectors.
    Read { range: SectorRange },
    /// A flush that covers this.
    Flush(FlushMark),
}

/// A request under way.
struct Request {
    /// Its disk.
    disk: &'static str,
    /// What it is.
    kind: Kind,
}

/// A run.
pub struct Workload {
    seed: u64,
    random: Random,
    media: SimMedia,
    store: Option<Store>,
    watch: Arc<Mutex<Watch>>,
    queues: Vec<(&'static str, Queue)>,
    requests: HashMap<u64, Request>,
    /// Sectors with a request under way: no two requests overlap, so that the order of their values is known.
    busy: BTreeSet<(&'static str, u64)>,
    pending: Option<(PendingSnapshot, String, Vec<&'static str>)>,
    next_id: u64,
    next_group: u64,
    faulty: bool,
}

impl Workload {
    /// A run from a seed.
    pub fn new(seed: u64, plan: Plan) -> Self {
        #[cfg(feature = "canary")]
        stratablk_layers::canary::set_map_before_data(plan.map_before_data);
        let _ = plan.map_before_data;
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
        let store = Store::simulated(files, Box::new(catalog), StoreOptions::default()).unwrap();
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
        let random = Random::new(seed ^ 0x5eed);
        let watch = Watch {
            disks,
            violations: Vec::new(),
            images: 0,
            random: Random::new(seed ^ 0x1ace),
        };
        let watch = Arc::new(Mutex::new(watch));
        observe(&media, seed, &watch, durable.clone());
        let marker = media.clone();
        durable.set_observer(move |point| match point {
            CommitPoint::Before => marker.mark("before a commit of the catalog"),
            CommitPoint::After => marker.mark("after a commit of the catalog"),
        });
        let queues = ["based", "based", "empty"].map(|name| {
            (
                name,
                Queue::new(store.open_volume(name).unwrap().context(false).unwrap()),
            )
        });
        let faulty = !plan.faults.is_empty();
        for fault in plan.faults {
            media.inject(fault);
        }
        Self {
            seed,
            random,
            media,
            store: Some(store),
            watch,
            queues: queues.into(),
            requests: HashMap::new(),
            busy: BTreeSet::new(),
            pending: None,
            next_id: 2,
            next_group: 1,
            faulty,
        }
    }

    /// Runs it to its end.
    pub fn run(mut self) -> Outcome {
        let steps = 60 + self.random.below(60);
        for _ in 0..steps {
            self.step();
            if !self.watch.lock().unwrap().violations.is_empty() {
                break;
            }
        }
        while !self.requests.is_empty() || self.pending.is_some() {
            self.poll_all();
            self.finish_snapshot();
        }
        self.media.clear_observer();
        self.queues.clear();
        self.store = None;
        let mut watch = self.watch.lock().unwrap();
        Outcome {
            images: watch.images,
            crash_points: self.media.crash_points(),
            violations: std::mem::take(&mut watch.violations),
        }
    }

    /// One step: a batch of requests, a look at what has ended, or a command.
    fn step(&mut self) {
        match self.random.below(100) {
            0..60 => self.batch(),
            60..88 => self.poll_all(),
            88..93 => self.begin_snapshot(),
            93..97 => self.finish_snapshot(),
            _ => self.checkpoint(),
        }
    }

    /// Some requests on one queue.
    fn batch(&mut self) {
        let index = self.random.index(self.queues.len());
        self.queues[index].1.context().begin_batch();
        for _ in 0..1 + self.random.below(4) {
            match self.random.below(100) {
                0..52 => self.write(index),
                52..62 => self.zero(index, false),
                62..72 => self.zero(index, true),
                72..84 => self.read(index),
                _ => self.flush(index),
            }
        }
        self.queues[index].1.context().kick();
    }

    /// A run of sectors of a disk without a request under way.
    fn free_range(&mut self, disk: &'static str, longest: u64) -> Option<SectorRange> {
        let sectors = if disk == "based" {
            BASED_SECTORS
        } else {
            EMPTY_SECTORS
        };
        let start = self.random.below(sectors);
        let mut count = 1 + self.random.below(longest.min(sectors - start));
        if self.random.chance(64) {
            count = sectors - start;
        }
        let free = (start..start + count).all(|sector| !self.busy.contains(&(disk, sector)));
        free.then_some(SectorRange {
            start: Sector(start),
            count,
        })
    }

    /// Notes a request and its sectors.
    fn note(&mut self, disk: &'static str, kind: Kind) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        if let Kind::Change { range, .. } | Kind::Read { range } = &kind {
            self.busy
                .extend((range.start.0..range.end().0).map(|sector| (disk, sector)));
        }
        self.requests.insert(id, Request { disk, kind });
        id
    }

    /// Tells the oracle that these sectors are about to change.
    fn issue(&self, disk: &str, range: SectorRange, value: Value) {
        let mut watch = self.watch.lock().unwrap();
        let disk = watch.disks.get_mut(disk).unwrap();
        for sector in range.start.0..range.end().0 {
            disk.issue(sector, value);
        }
    }

    fn write(&mut self, index: usize) {
        let disk = self.queues[index].0;
        let Some(range) = self.free_range(disk, 20) else {
            return;
        };
        let stable = self.random.chance(25);
        let id = self.note(disk, Kind::Change { range, stable });
        trace(|| format!("request {id}: write {disk} {range:?}, stable: {stable}"));
        self.issue(disk, range, Value::Stamp(id));
        let number = u64::from(disk == "empty");
        let memory: Vec<u8> = (range.start.0..range.end().0)
            .flat_map(|sector| stamp(number, sector, id))
            .collect();
        let cuts: Vec<usize> = (0..self.random.below(3))
            .map(|_| self.random.index(memory.len()))
            .collect();
        let cuts: Vec<usize> = cuts
            .into_iter()
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();
        let durability = if stable {
            Durability::OnCompletion
        } else {
            Durability::AfterFlush
        };
        self.queues[index]
            .1
            .submit(Operation::Write(range.start), durability, memory, &cuts, id);
    }

    fn zero(&mut self, index: usize, discard: bool) {
        let disk = self.queues[index].0;
        let Some(range) = self.free_range(disk, 40) else {
            return;
        };
        let id = self.note(
            disk,
            Kind::Change {
                range,
                stable: false,
            },
        );
        trace(|| format!("request {id}: zero {disk} {range:?}, discard: {discard}"));
        self.issue(disk, range, Value::Zero);
        let unmap = self.random.chance(128);
        let operation = if discard {
            Operation::Discard(range)
        } else {
            Operation::WriteZeroes { range, unmap }
        };
        self.queues[index]
            .1
            .submit(operation, Durability::AfterFlush, Vec::new(), &[], id);
    }

    fn read(&mut self, index: usize) {
        let disk = self.queues[index].0;
        let Some(range) = self.free_range(disk, 40) else {
            return;
        };
        let id = self.note(disk, Kind::Read { range });
        let memory = vec![0x5a; (range.count * SECTOR_BYTES) as usize];
        self.queues[index].1.submit(
            Operation::Read(range.start),
            Durability::AfterFlush,
            memory,
            &[],
            id,
        );
    }

    fn flush(&mut self, index: usize) {
        let disk = self.queues[index].0;
        let mark = self.watch.lock().unwrap().disks[disk].flush_mark();
        let id = self.note(disk, Kind::Flush(mark));
        trace(|| format!("request {id}: flush {disk}"));
        self.queues[index].1.submit(
            Operation::Flush,
            Durability::AfterFlush,
            Vec::new(),
            &[],
            id,
        );
    }

    /// Looks at what has ended, on all queues.
    fn poll_all(&mut self) {
        for index in 0..self.queues.len() {
            for (id, result, memory) in self.queues[index].1.poll() {
                self.ended(id, result.is_ok(), &memory);
            }
        }
    }

    /// A request has ended: tells the oracle.
    fn ended(&mut self, id: u64, ok: bool, memory: &[u8]) {
        trace(|| format!("request {id} ended, ok: {ok}"));
        let request = self.requests.remove(&id).unwrap();
        let mut watch = self.watch.lock().unwrap();
        let watch = &mut *watch;
        let disk = watch.disks.get_mut(request.disk).unwrap();
        if !ok && !self.faulty {
            watch.violations.push(format!(
                "seed {}: request {id} failed on a good disk",
                self.seed
            ));
        }
        match request.kind {
            Kind::Change { range, stable } => {
                for sector in range.start.0..range.end().0 {
                    self.busy.remove(&(request.disk, sector));
                    if ok {
                        disk.complete(sector, stable);
                    }
                }
            }
            Kind::Flush(mark) => {
                if ok {
                    disk.flushed(&mark);
                }
            }
            Kind::Read { range } => {
                for sector in range.start.0..range.end().0 {
                    self.busy.remove(&(request.disk, sector));
                }
                // After a fault the disk may have lost pages under our hands; the guest was told of the failure.
                if ok && !self.faulty {
                    let chunks = memory.chunks_exact(SECTOR_BYTES as usize);
                    for (sector, bytes) in (range.start.0..).zip(chunks) {
                        let found = unstamp(disk.number, sector, bytes);
                        if found != Ok(disk.current(sector)) {
                            watch.violations.push(format!(
                                "seed {}: disk {} sector {sector}: read {found:?}, expected {:?}",
                                self.seed,
                                request.disk,
                                disk.current(sector)
                            ));
                        }
                    }
                }
            }
        }
    }

    fn begin_snapshot(&mut self) {
        if self.pending.is_some() {
            return;
        }
        let members: Vec<&'static str> = match self.random.below(3) {
            0 => vec!["based"],
            1 => vec!["empty"],
            _ => vec!["based", "empty"],
        };
        let group = self.next_group;
        self.next_group += 1;
        let name = format!("s{group}");
        for member in &members {
            let mut watch = self.watch.lock().unwrap();
            watch
                .disks
                .get_mut(*member)
                .unwrap()
                .begin_snapshot(&name, group);
        }
        let names = members.iter().map(|member| (*member).to_owned()).collect();
        let begun = self
            .store
            .as_ref()
            .unwrap()
            .begin_snapshot(&name, &Selection::Volumes(names));
        trace(|| format!("snapshot {name} of {members:?}: {:?}", begun.as_ref().err()));
        match begun {
            Ok(pending) => self.pending = Some((pending, name, members)),
            Err(error) => assert!(self.faulty, "seed {}: {error}", self.seed),
        }
    }

    fn finish_snapshot(&mut self) {
        let Some((mut pending, name, members)) = self.pending.take() else {
            return;
        };
        let store = self.store.as_ref().unwrap();
        // Between the sync and the end of the command there may be flushes, and power cuts.
        let synced = store.snapshot_drained(&pending) && store.sync_snapshot(&mut pending);
        if !synced || self.random.chance(64) {
            self.pending = Some((pending, name, members));
            self.poll_all();
            return;
        }
        let finished = store.finish_snapshot(pending);
        trace(|| format!("snapshot {name} finished: {:?}", finished.as_ref().err()));
        match finished {
            Ok(_) => {
                let mut watch = self.watch.lock().unwrap();
                for member in members {
                    let disk = watch.disks.get_mut(member).unwrap();
                    disk.snapshots.get_mut(&name).unwrap().acknowledged = true;
                }
            }
            Err(error) => assert!(self.faulty, "seed {}: {error}", self.seed),
        }
    }

    /// A checkpoint between two flushes; with one under way on this thread it would wait for itself.
    fn checkpoint(&mut self) {
        let flushing = self.requests.values().any(|request| {
            matches!(
                request.kind,
                Kind::Flush(_) | Kind::Change { stable: true, .. }
            )
        });
        if flushing || self.pending.is_some() {
            return;
        }
        let disk = if self.random.chance(128) {
            "based"
        } else {
            "empty"
        };
        let done = self.store.as_ref().unwrap().checkpoint_volume(disk);
        trace(|| format!("checkpoint of {disk}: {done:?}"));
        assert!(done.is_ok() || self.faulty, "seed {}: {done:?}", self.seed);
    }
}

/// Tells what happens, if `STRATABLK_CRASH_TRACE` is set.
fn trace(what: impl FnOnce() -> String) {
    if std::env::var_os("STRATABLK_CRASH_TRACE").is_some() {
        eprintln!("  {}", what());
    }
}

/// Examines images at every crash point from now on.
fn observe(media: &SimMedia, seed: u64, watch: &Arc<Mutex<Watch>>, durable: MemoryDisk) {
    let watch = Arc::clone(watch);
    media.set_observer(Box::new(move |media, point| {
        let mut watch = watch.lock().unwrap();
        if !watch.violations.is_empty() {
            return;
        }
        trace(|| format!("point {}: {:?} {}", point.number, point.event, point.path));
        for _ in 0..2 {
            let choice = watch.random.number();
            let survival = match choice % 10 {
                0 => Survival::Nothing,
                1 => Survival::Everything,
                _ => Survival::Seeded(choice),
            };
            watch.images += 1;
            let image = media.crash_image_with(survival);
            let problems = examine(image, durable.crash_image(), &watch.disks, choice);
            watch.violations.extend(problems.into_iter().map(|problem| {
                format!(
                    "seed {seed}, crash point {} ({:?} {}), {survival:?}: {problem}",
                    point.number, point.event, point.path
                )
            }));
        }
    }));
}
