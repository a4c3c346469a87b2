//! A store in a simulation, what a user can see of it, and what is found of it after crashes at every step of a command.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};

use stratablk_layers::Error;
use stratablk_layers::cache::CacheOptions;
use stratablk_layers::cache::arena::Arena;
use stratablk_layers::catalog::memory::{CommitPoint, MemoryCatalog, MemoryDisk};
use stratablk_layers::catalog::{CatalogState, JobKind, JobRow, LayerState, VolumeKind};
use stratablk_layers::check::{CheckOptions, Severity, check_against};
use stratablk_layers::file::Media;
use stratablk_layers::file::sim::{SimMedia, Survival};
use stratablk_layers::mapfile::{LAYERS_DIR, MapFile, layer_dir};
use stratablk_layers::store::{Selection, Store, StoreOptions, VolumeSource};
use stratablk_layers::units::{LayerId, SECTOR_BYTES, Sector, StoreId};
use stratablk_layers::volume::Operation;

use crate::disk::Queue;
use crate::oracle::{Value, stamp};

/// Sectors of every disk, but for those of other sizes.
pub const SECTORS: u64 = 64;
/// Goes into the stamps of all disks, since clones share them.
const NUMBER: u64 = 7;

/// A store and its media.
pub struct World {
    /// The files.
    pub media: SimMedia,
    /// The catalog's medium.
    pub catalog: MemoryDisk,
    /// The store.
    store: Option<Arc<Store>>,
}

/// What a user sees of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenVolume {
    /// Its type.
    pub kind: VolumeKind,
    /// Whether the next start of a machine resets it.
    pub armed: bool,
    /// Whose attachment it is.
    pub attached_from: Option<String>,
    /// Whether a job makes it independent of an image.
    pub imported: bool,
    /// What it reads.
    pub values: Vec<Value>,
}

/// What a user sees of a store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// The volumes.
    pub volumes: BTreeMap<String, SeenVolume>,
    /// What the snapshots read.
    pub snapshots: BTreeMap<(String, String), Vec<Value>>,
}

/// A store's options, with a small cache.
fn options() -> StoreOptions {
    StoreOptions {
        cache: CacheOptions {
            bytes: 16 * 16 * 4096,
            ..CacheOptions::default()
        },
        ..StoreOptions::default()
    }
}

impl World {
    /// An empty store, and a raw image `/base.raw` of stamps 1.
    pub fn new() -> Self {
        let media = SimMedia::new(1);
        let base: Vec<u8> = (0..SECTORS)
            .flat_map(|sector| stamp(NUMBER, sector, 1))
            .collect();
        media.install(Path::new("/base.raw"), &base).unwrap();
        let id = StoreId(uuid::Uuid::from_u64_pair(1, 1));
        let catalog = MemoryDisk::new(CatalogState::empty(id));
        Self::open(media, catalog, None).unwrap()
    }

    /// The store on these media.
    fn open(media: SimMedia, catalog: MemoryDisk, arena: Option<Arena>) -> Result<Self, Error> {
        let files: Arc<dyn Media> = Arc::new(media.clone());
        let rows = Box::new(MemoryCatalog::open(&catalog)?);
        let store = match arena {
            None => Store::simulated(files, rows, options())?,
            Some(arena) => Store::simulated_after_kill(files, rows, options(), arena)?,
        };
        Ok(Self {
            media,
            catalog,
            store: Some(Arc::new(store)),
        })
    }

    /// The store.
    pub fn store(&self) -> &Arc<Store> {
        self.store.as_ref().unwrap()
    }

    /// Ends the daemon in order and starts it again.
    pub fn reopen(&mut self) {
        self.store().flush_all().unwrap();
        self.restart();
    }

    /// Starts the daemon again, after whatever end.
    pub fn restart(&mut self) {
        self.store = None;
        *self = Self::open(self.media.clone(), self.catalog.clone(), None).unwrap();
    }

    /// An empty volume.
    pub fn create(&self, name: &str) {
        let size = VolumeSource::Size(SECTORS * SECTOR_BYTES);
        self.store().create_volume(name, &size).unwrap();
    }

    /// A clone of a snapshot.
    pub fn clone_of(&self, name: &str, volume: &str, snapshot: &str) {
        let source = VolumeSource::Snapshot {
            volume: volume.into(),
            snapshot: snapshot.into(),
        };
        self.store().create_volume(name, &source).unwrap();
    }

    /// A queue of a volume: a machine that uses it.
    pub fn queue(&self, volume: &str) -> Queue {
        let volume = self.store().open_volume(volume).unwrap();
        Queue::new(volume.context(false).unwrap())
    }

    /// Writes the stamp of write `id` to a run of sectors.
    pub fn write(&self, volume: &str, start: u64, count: u64, id: u64) {
        let bytes = (start..start + count)
            .flat_map(|sector| stamp(NUMBER, sector, id))
            .collect();
        let mut queue = self.queue(volume);
        queue.run(Operation::Write(Sector(start)), bytes).0.unwrap();
    }

    /// What a volume reads.
    pub fn values(&self, volume: &str) -> Vec<Value> {
        let sectors = self.store().volume_info(volume).unwrap().size_bytes / SECTOR_BYTES;
        self.queue(volume).read_all(NUMBER, sectors).unwrap()
    }

    /// Takes a snapshot of some volumes.
    pub fn snapshot(&self, name: &str, volumes: &[&str]) {
        let names = volumes.iter().map(|name| (*name).to_owned()).collect();
        let selection = Selection::Volumes(names);
        self.store().snapshot(name, &selection).unwrap();
    }

    /// The layer of a snapshot.
    pub fn layer_of(&self, volume: &str, snapshot: &str) -> LayerId {
        let state = self.catalog.state();
        state.snapshot(volume, snapshot).unwrap().layer
    }

    /// The jobs in the catalog, oldest first.
    pub fn jobs(&self) -> Vec<JobRow> {
        self.catalog.state().jobs.values().cloned().collect()
    }

    /// Takes so many steps of jobs, or fewer if there are no more.
    pub fn work(&self, steps: usize) {
        for _ in 0..steps {
            if !self.store().job_step() {
                break;
            }
        }
    }

    /// Carries out all jobs.
    #[track_caller]
    pub fn work_all(&self) {
        self.work(10_000);
        assert_eq!(self.jobs(), [], "{:?}", self.store().notes());
    }

    /// All that a user sees. Snapshots are read through clones in a copy.
    pub fn seen(&self) -> Seen {
        let mut seen = Seen::default();
        let state = self.catalog.state();
        for row in state.volumes.values() {
            let volume = SeenVolume {
                kind: row.kind,
                armed: row.armed,
                attached_from: row.attached_from.clone(),
                imported: (state.jobs.values())
                    .any(|job| job.kind == JobKind::Import && job.target == row.active),
                values: self.values(&row.name),
            };
            seen.volumes.insert(row.name.clone(), volume);
        }
        if state.snapshots.is_empty() {
            return seen;
        }
        let media = self.media.crash_image_with(Survival::Everything);
        let copy = Self::open(media, self.catalog.crash_image(), None).unwrap();
        for (number, row) in state.snapshots.iter().enumerate() {
            let name = format!("look-{number}");
            copy.clone_of(&name, &row.volume, &row.name);
            let values = copy.values(&name);
            let key = (row.volume.clone(), row.name.clone());
            seen.snapshots.insert(key, values);
        }
        seen
    }

    /// What is in the store's directory and should not be, or the other way round; and what the check finds.
    pub fn misplaced(&self) -> Vec<String> {
        let state = self.catalog.state();
        let known: BTreeSet<String> = state.layers.keys().map(ToString::to_string).collect();
        let there: BTreeSet<String> = self
            .media
            .list(Path::new(LAYERS_DIR))
            .unwrap()
            .into_iter()
            .collect();
        let mut misplaced: Vec<String> = known
            .symmetric_difference(&there)
            .map(|layer| format!("{layer}, in the catalog: {}", known.contains(layer)))
            .collect();
        for row in state.layers.values() {
            let data = if row.base.is_some() { 0 } else { 1 };
            let mut names = self.media.list(&layer_dir(row.id)).unwrap();
            if row.state == LayerState::Sealed {
                // Taken when there is time.
                names.retain(|name| name != "sums");
            }
            if names.len() != data + 1 {
                misplaced.push(format!("{} has {names:?}", row.id));
            }
        }
        let media: Arc<dyn Media> = Arc::new(self.media.clone());
        // A catalog that is made anew believes the names in maps.
        let name_in = |layer| MapFile::read_header(&media, layer).unwrap().volume;
        for row in state.volumes.values() {
            let name = name_in(row.active);
            if name != row.name {
                misplaced.push(format!("the map of {} says {name}", row.name));
            }
        }
        for row in &state.snapshots {
            let name = name_in(row.layer);
            if !state.volumes.contains_key(&name) {
                misplaced.push(format!(
                    "the map of {}@{} says {name}",
                    row.volume, row.name
                ));
            }
        }
        misplaced.extend(state.doomed.iter().map(|id| format!("{id} is doomed")));
        let report = check_against(&state, &media, CheckOptions::default()).unwrap();
        // A file longer than its disk is what an interrupted change of size leaves; nobody reads its end.
        let findings = report
            .findings
            .into_iter()
            .filter(|finding| !finding.what.contains("has room for"));
        misplaced.extend(
            findings
                .filter(|finding| finding.severity > Severity::Note)
                .map(|finding| finding.what),
        );
        misplaced
    }

    /// Nothing is in the store's directory that should not be.
    #[track_caller]
    pub fn assert_tidy(&self) {
        assert_eq!(self.misplaced(), Vec::<String>::new());
    }
}

/// What a crash leaves.
struct Image {
    /// At which point of which run.
    when: String,
    /// The files.
    media: SimMedia,
    /// The catalog.
    catalog: MemoryDisk,
    /// The arena, of a killed daemon.
    arena: Option<Arena>,
}

/// Takes images of every crash point while `run` runs. `powers`: of power cuts as well, and not only of kills.
fn images(
    media: &SimMedia,
    catalog: &MemoryDisk,
    store: Option<&Arc<Store>>,
    powers: bool,
    run: impl FnOnce(),
) -> Vec<Image> {
    let taken: Arc<Mutex<Vec<Image>>> = Arc::default();
    let into = Arc::clone(&taken);
    let (durable, alive) = (catalog.clone(), store.map(Arc::downgrade));
    media.set_observer(Box::new(move |media, point| {
        let when = format!("point {} ({:?} {})", point.number, point.event, point.path);
        let mut taken = into.lock().unwrap();
        let mut add = |media, arena, how: String| {
            taken.push(Image {
                when: format!("{when}, {how}"),
                media,
                catalog: durable.crash_image(),
                arena,
            });
        };
        let cuts = [
            Survival::Nothing,
            Survival::Everything,
            Survival::Seeded(point.number),
        ];
        for survival in cuts.into_iter().filter(|_| powers) {
            let image = media.crash_image_with(survival);
            add(image, None, format!("power cut, {survival:?}"));
        }
        if let Some(store) = alive.as_ref().and_then(std::sync::Weak::upgrade) {
            let arena = store.cache_arena().copy().unwrap();
            add(media.kill_image(point.number), Some(arena), "killed".into());
        }
    }));
    let marker = media.clone();
    catalog.set_observer(move |point| {
        marker.mark(match point {
            CommitPoint::Before => "before a commit",
            CommitPoint::After => "after a commit",
        });
    });
    run();
    media.mark("the end");
    media.clear_observer();
    catalog.set_observer(|_| {});
    std::mem::take(&mut *taken.lock().unwrap())
}

/// Crashes at every step of a command, and at every step of some of the recoveries: what is found is what was there before
/// or what is there after it, and no file too many or too few.
#[track_caller]
pub fn crash_everywhere(
    what: &str,
    setup: impl Fn(&World),
    command: impl Fn(&Store),
) -> (Seen, Seen) {
    let mut result = (Seen::default(), Seen::default());
    // Once with everything in the files, and once with what was written last in the cache only.
    for flushed in [true, false] {
        let world = World::new();
        setup(&world);
        if flushed {
            world.store().flush_all().unwrap();
        }
        let before = world.seen();
        let store = Arc::clone(world.store());
        let found = images(
            &world.media,
            &world.catalog,
            Some(world.store()),
            flushed,
            || command(&store),
        );
        drop(store);
        let after = world.seen();
        world.assert_tidy();
        assert_ne!(before, after, "{what}: the command does something");
        let (mut examined, mut second) = (0, 0);
        let last = format!("{:?}", "the end");
        for (number, image) in found.into_iter().enumerate() {
            let promised = image.when.contains(&last);
            let (media, catalog) = (image.media.clone(), image.catalog.crash_image());
            let when = format!("{what}, flushed: {flushed}, {}", image.when);
            if number % 5 == 0 && image.arena.is_none() {
                // The recovery is interrupted as well.
                let (again, rows) = (media.crash_image_with(Survival::Everything), catalog);
                let inner = images(&again, &rows, None, true, || {
                    World::open(again.clone(), rows.clone(), None).unwrap();
                });
                for image in inner {
                    let when = format!("{when}, then {}", image.when);
                    examine(image, &when, &before, &after, promised);
                    second += 1;
                }
            }
            examine(image, &when, &before, &after, promised);
            examined += 1;
        }
        println!("{what}: {examined} images, {second} of second crashes");
        assert!(examined > 2, "{what}: {examined} images are not every step");
        result = (before, after);
    }
    result
}

/// Opens an image and looks.
#[track_caller]
fn examine(image: Image, when: &str, before: &Seen, after: &Seen, promised: bool) {
    let world = World::open(image.media, image.catalog, image.arena)
        .unwrap_or_else(|error| panic!("{when}: the store does not open: {error}"));
    let seen = world.seen();
    assert!(
        seen == *after || (seen == *before && !promised),
        "{when}: neither old nor new:\n{seen:#?}\n{before:#?}\n{after:#?}"
    );
    let tidy = || {
        let misplaced = world.misplaced();
        let notes = world.store().notes();
        assert!(misplaced.is_empty(), "{when}: {misplaced:?}, {notes:?}");
    };
    tidy();
    if !world.jobs().is_empty() {
        world.work_all();
        let mut seen = seen;
        for volume in seen.volumes.values_mut() {
            volume.imported = false;
        }
        assert_eq!(world.seen(), seen, "{when}, at the end of all jobs");
        tidy();
    }
}
