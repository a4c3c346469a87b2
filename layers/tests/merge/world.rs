//! A simulated store with guests whose disks are known sector by sector.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use stratablk_layers::catalog::memory::{MemoryCatalog, MemoryDisk};
use stratablk_layers::catalog::{CatalogState, JobId, Way};
use stratablk_layers::file::Media;
use stratablk_layers::file::sim::{Random, SimMedia};
use stratablk_layers::lifecycle::{DeleteOptions, Phase};
use stratablk_layers::store::{Selection, Store, StoreOptions, VolumeSource};
use stratablk_layers::units::{SECTOR_BYTES, Sector, SectorRange, StoreId};
use stratablk_layers::volume::{Durability, Operation};

use crate::disk::Queue;
use crate::oracle::{Disk, Marks, Value, stamp};

/// Sectors of a disk: not whole clusters, on purpose.
pub const SECTORS: u64 = 331;
/// The number in all stamps.
pub const NUMBER: u64 = 3;
/// A job that takes more turns than this hangs.
const TURNS_MAX: usize = 20_000;

/// What a request under way does.
#[derive(Clone, Copy)]
struct Doing {
    /// Which sectors.
    range: SectorRange,
    /// What it leaves there; `None` for a read.
    value: Option<Value>,
    /// When it was issued.
    issued: u64,
}

/// A guest: one queue of a volume.
pub struct Guest {
    /// The volume.
    pub name: String,
    /// Its queue.
    queue: Queue,
    /// Requests under way.
    under_way: HashMap<u64, Doing>,
    /// Flushes under way, with what they cover.
    flushes: HashMap<u64, Marks>,
    /// The next request.
    next: u64,
}

/// What may be found after a crash.
#[derive(Default)]
pub struct Known {
    /// Every volume.
    pub disks: BTreeMap<String, Disk>,
    /// Every snapshot.
    pub snapshots: BTreeMap<(String, String), Vec<Value>>,
}

/// A store, its guests, and what must be read.
pub struct World {
    /// The files.
    pub media: SimMedia,
    /// The catalog.
    pub durable: MemoryDisk,
    /// How the store is opened.
    pub options: StoreOptions,
    /// The store.
    store: Option<Arc<Store>>,
    /// What every volume holds.
    pub volumes: BTreeMap<String, Vec<Value>>,
    /// What every snapshot holds, by volume and name.
    pub snapshots: BTreeMap<(String, String), Vec<Value>>,
    /// What may be found of them after a crash, for who watches.
    pub known: Arc<Mutex<Known>>,
    /// Guests at work.
    guests: Vec<Guest>,
    /// Chance.
    pub random: Random,
    /// The next stamp.
    stamp: u64,
    /// Bytes of a step.
    step_bytes: u64,
}

impl World {
    /// An empty store. The cache fits little, or much, by the seed.
    pub fn new(seed: u64) -> Self {
        let media = SimMedia::new(seed);
        let id = StoreId(uuid::Uuid::from_u64_pair(7, seed));
        let durable = MemoryDisk::new(CatalogState::empty(id));
        let mut options = StoreOptions::default();
        options.cache.bytes = [1, 2, 24, 200][(seed % 4) as usize] * 16 * 4096;
        let mut random = Random::new(seed ^ 0xabc);
        let step_bytes = [512, 4096, 20 << 10, 1 << 20][random.index(4)];
        let mut world = Self {
            media,
            durable,
            options,
            store: None,
            volumes: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            known: Arc::default(),
            guests: Vec::new(),
            random,
            stamp: 10,
            step_bytes,
        };
        world.open();
        world
    }

    /// Opens the store.
    pub fn open(&mut self) {
        let catalog = Box::new(MemoryCatalog::open(&self.durable).unwrap());
        let files: Arc<dyn Media> = Arc::new(self.media.clone());
        let store = Store::simulated(files, catalog, self.options.clone()).unwrap();
        store.set_job_step_bytes(self.step_bytes);
        self.store = Some(Arc::new(store));
    }

    /// Has jobs commit after so many bytes.
    pub fn set_step(&mut self, bytes: u64) {
        self.step_bytes = bytes;
        self.store().set_job_step_bytes(bytes);
    }

    /// Ends the store in order, and opens it again.
    pub fn restart(&mut self) {
        self.settle_guests();
        self.guests.clear();
        let store = self.store.take().unwrap();
        store.finish().unwrap();
        drop(store);
        self.open();
    }

    /// The store.
    pub fn store(&self) -> &Arc<Store> {
        self.store.as_ref().unwrap()
    }

    /// A new volume.
    pub fn create(&mut self, name: &str, source: &VolumeSource) {
        self.store().create_volume(name, source).unwrap();
        let values = match source {
            VolumeSource::Size(bytes) => vec![Value::Zero; (bytes / SECTOR_BYTES) as usize],
            VolumeSource::Base(_) => vec![Value::Stamp(1); SECTORS as usize],
            VolumeSource::Snapshot { volume, snapshot } => {
                self.snapshots[&(volume.clone(), snapshot.clone())].clone()
            }
            VolumeSource::Volume(volume) => self.volumes[volume].clone(),
        };
        self.know(name, values);
    }

    /// A volume that is there holds this.
    pub fn know(&mut self, name: &str, values: Vec<Value>) {
        let disk = Disk::new(NUMBER, values.clone());
        self.known().disks.insert(name.to_owned(), disk);
        self.volumes.insert(name.to_owned(), values);
    }

    /// What may be found after a crash.
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap()
    }

    /// Puts a raw image.
    pub fn install_base(&self) -> VolumeSource {
        let path = Path::new("/images/base.raw");
        let bytes: Vec<u8> = (0..SECTORS)
            .flat_map(|sector| stamp(NUMBER, sector, 1))
            .collect();
        self.media.install(path, &bytes).unwrap();
        VolumeSource::Base(path.into())
    }

    /// Lets a guest work on a volume.
    pub fn attach(&mut self, name: &str) {
        let volume = self.store().open_volume(name).unwrap();
        self.guests.push(Guest {
            name: name.to_owned(),
            queue: Queue::new(volume.context(false).unwrap()),
            under_way: HashMap::new(),
            flushes: HashMap::new(),
            next: 1,
        });
    }

    /// Ends all guests of a volume.
    pub fn detach(&mut self, name: &str) {
        self.settle_guests();
        self.guests.retain(|guest| guest.name != name);
    }

    /// Takes a snapshot of one volume, while requests are under way.
    pub fn snapshot(&mut self, volume: &str, name: &str) {
        self.settle_guests();
        let selection = Selection::Volumes(vec![volume.to_owned()]);
        self.store().snapshot(name, &selection).unwrap();
        let values = self.volumes[volume].clone();
        let key = (volume.to_owned(), name.to_owned());
        self.known().snapshots.insert(key.clone(), values.clone());
        self.snapshots.insert(key, values);
    }

    /// Takes a snapshot's name away; its data goes this way.
    pub fn delete(&mut self, volume: &str, name: &str, way: Option<Way>) -> Vec<JobId> {
        let options = DeleteOptions {
            way,
            ..DeleteOptions::default()
        };
        self.delete_with(volume, name, options)
    }

    /// The same, in any way.
    pub fn delete_with(&mut self, volume: &str, name: &str, options: DeleteOptions) -> Vec<JobId> {
        let key = (volume.to_owned(), name.to_owned());
        self.known().snapshots.remove(&key);
        let report = self.store().delete_snapshot(volume, name, options).unwrap();
        self.snapshots.remove(&key);
        report.jobs
    }

    /// Random writes and zeroes of one volume, one after the other.
    pub fn scribble(&mut self, name: &str, count: usize) {
        self.attach(name);
        for _ in 0..count {
            let at = self.guests.len() - 1;
            self.issue(at, true);
            self.settle_guests();
        }
        self.guests.pop();
    }

    /// Submits a random request of a guest that meets no other one's sectors.
    fn issue(&mut self, at: usize, only_changes: bool) {
        let Some(guest) = self.guests.get(at) else {
            return;
        };
        let name = guest.name.clone();
        let sectors = self.volumes[&name].len() as u64;
        let start = self.random.below(sectors);
        let longest = [3, 8, 40, 150][self.random.index(4)];
        let count = 1 + self.random.below((sectors - start).min(longest));
        let range = SectorRange {
            start: Sector(start),
            count,
        };
        let kind = self.random.below(if only_changes { 7 } else { 12 });
        let changes = kind < 7;
        let meets = |doing: &Doing| {
            doing.range.start < range.end()
                && range.start < doing.range.end()
                && (changes || doing.value.is_some())
        };
        let of_volume = self.guests.iter().filter(|guest| guest.name == name);
        let mut all = of_volume.flat_map(|guest| guest.under_way.values());
        if all.any(meets) {
            return;
        }
        let (operation, value, memory) = match kind {
            0 => (Operation::Discard(range), Some(Value::Zero), Vec::new()),
            1 => {
                let unmap = self.random.chance(128);
                let operation = Operation::WriteZeroes { range, unmap };
                (operation, Some(Value::Zero), Vec::new())
            }
            2..7 => {
                self.stamp += 1;
                let id = self.stamp;
                let bytes = (start..start + count).flat_map(|sector| stamp(NUMBER, sector, id));
                let memory = bytes.collect();
                (
                    Operation::Write(range.start),
                    Some(Value::Stamp(id)),
                    memory,
                )
            }
            7 => (Operation::Flush, None, Vec::new()),
            _ => {
                let memory = vec![0xa5; (count * SECTOR_BYTES) as usize];
                (Operation::Read(range.start), None, memory)
            }
        };
        let range = if kind == 7 {
            SectorRange {
                start: Sector(0),
                count: 0,
            }
        } else {
            range
        };
        let mut issued = 0;
        let mut covers = None;
        {
            let mut known = self.known.lock().unwrap();
            let disk = known.disks.get_mut(&name).unwrap();
            if let Some(value) = value {
                let sectors = start..start + count;
                issued = disk.issue(sectors.map(|sector| (sector, value)));
            } else if kind == 7 {
                covers = Some(disk.marks());
            }
        }
        let guest = &mut self.guests[at];
        let token = guest.next;
        guest.next += 1;
        let doing = Doing {
            range,
            value,
            issued,
        };
        guest.under_way.insert(token, doing);
        guest.flushes.extend(covers.map(|marks| (token, marks)));
        guest.queue.context().begin_batch();
        guest
            .queue
            .submit(operation, Durability::AfterFlush, memory, &[], token);
        guest.queue.context().kick();
    }

    /// Takes what has ended, and holds it against what must be.
    pub fn poll(&mut self) {
        for guest in &mut self.guests {
            let values = self.volumes.get_mut(&guest.name).unwrap();
            for (token, result, memory) in guest.queue.poll() {
                let doing = guest.under_way.remove(&token).unwrap();
                result.unwrap();
                let mut known = self.known.lock().unwrap();
                let disk = known.disks.get_mut(&guest.name).unwrap();
                if doing.value.is_some() {
                    let sectors = doing.range.start.0..doing.range.end().0;
                    disk.end(doing.issued, sectors, true, false);
                }
                if let Some(marks) = guest.flushes.remove(&token) {
                    disk.flushed(&marks);
                }
                drop(known);
                let first = doing.range.start.0;
                let range = first as usize..doing.range.end().0 as usize;
                match doing.value {
                    Some(value) => values[range].fill(value),
                    None => {
                        let read = memory.chunks_exact(SECTOR_BYTES as usize);
                        for ((sector, bytes), expected) in (first..).zip(read).zip(&values[range]) {
                            let found = crate::oracle::unstamp(NUMBER, sector, bytes);
                            assert_eq!(
                                found.as_ref(),
                                Ok(expected),
                                "{}: sector {sector} was read",
                                guest.name
                            );
                        }
                    }
                }
            }
        }
    }

    /// Lets all requests end.
    pub fn settle_guests(&mut self) {
        for _ in 0..TURNS_MAX {
            self.poll();
            if self.guests.iter().all(|guest| guest.under_way.is_empty()) {
                return;
            }
            self.store().write_back_step(4);
        }
        panic!("requests hang");
    }

    /// A step of a job, among requests. Returns whether there was one.
    pub fn step(&mut self) -> bool {
        for at in 0..self.guests.len() {
            if self.random.chance(150) {
                self.issue(at, false);
            }
        }
        let more = self.store().job_step();
        if self.random.chance(40) {
            self.store().write_back_step(2);
        }
        if self.random.chance(128) {
            self.poll();
        }
        more
    }

    /// Carries out all jobs, among requests.
    pub fn run_jobs(&mut self) {
        for _ in 0..TURNS_MAX {
            if !self.step() {
                return self.check_no_jobs();
            }
        }
        panic!("jobs hang: {:?}", self.store().jobs());
    }

    /// Carries out all jobs, and asserts that none has failed.
    pub fn run_jobs_alone(&self) {
        for _ in 0..TURNS_MAX {
            if !self.store().job_step() {
                return self.check_no_jobs();
            }
        }
        panic!("jobs hang: {:?}", self.store().jobs());
    }

    /// No job is left.
    fn check_no_jobs(&self) {
        for job in self.store().jobs() {
            assert!(
                matches!(job.phase, Phase::Done | Phase::Cancelled),
                "{job:?}; notes: {:?}",
                self.store().notes()
            );
        }
        assert!(self.durable.state().jobs.is_empty());
    }

    /// Reads everything that there is and compares.
    pub fn check(&mut self) {
        self.settle_guests();
        let store = Arc::clone(self.store());
        for (name, values) in &self.volumes {
            let volume = store.open_volume(name).unwrap();
            assert_eq!(volume.failure(), None);
            let mut queue = Queue::new(volume.context(true).unwrap());
            let found = queue.read_all(NUMBER, values.len() as u64).unwrap();
            same(name, &found, values);
        }
        for ((volume, snapshot), values) in &self.snapshots {
            let source = VolumeSource::Snapshot {
                volume: volume.clone(),
                snapshot: snapshot.clone(),
            };
            store.create_volume("look", &source).unwrap();
            {
                let look = store.open_volume("look").unwrap();
                let mut queue = Queue::new(look.context(true).unwrap());
                let found = queue
                    .read_in_pieces(NUMBER, values.len() as u64, 64)
                    .unwrap();
                same(&format!("{volume}@{snapshot}"), &found, values);
            }
            store.delete_volume("look").unwrap();
        }
    }

    /// How many layers there are, which must be as many as there are directories.
    pub fn layers(&self) -> usize {
        let layers = self.durable.state().layers.len();
        assert_eq!(self.media.list(Path::new("layers")).unwrap().len(), layers);
        assert!(self.durable.state().doomed.is_empty());
        layers
    }

    /// Bytes that the data files of all layers take; those that are going are another's by then, or empty.
    pub fn allocated(&self) -> u64 {
        let layers = self.durable.state().layers.clone();
        let data = layers.keys().map(|layer| format!("layers/{layer}/data"));
        data.map(|path| {
            self.media
                .stat(Path::new(&path))
                .map_or(0, |stat| stat.allocated)
        })
        .sum()
    }
}

/// Compares disks.
#[track_caller]
pub fn same(what: &str, found: &[Value], expected: &[Value]) {
    assert_eq!(found.len(), expected.len());
    for (sector, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found, expected, "{what}: sector {sector}");
    }
}
