//! The control plane's facade: a directory of layers with its catalog, and what can be done to it.
//!
//! Every method may block (files, database) and may be called from any thread; commands are serialised inside. The commands
//! themselves are in `ops`, one a file.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crate::cache::access::Sets;
use crate::cache::arena::{Arena, Place, last};
use crate::cache::writeback::WriteBack;
use crate::cache::{Cache, CacheOptions, CacheStats};
use crate::catalog::sqlite::SqliteCatalog;
use crate::catalog::{
    Catalog, CatalogState, Change, Depths, JobId, SnapshotRow, VolumeKind, VolumeRow,
};
use crate::error::{Error, Result};
use crate::file::Media;
use crate::file::host::{HostMedia, HostOptions};
use crate::generation::Clock;
use crate::layer::Layer;
use crate::lock::StoreLock;
use crate::maintenance::Maintenance;
use crate::mapfile::{data_path, remove_file};
use crate::ops::boot::last_boot;
use crate::ops::idle::Command;
use crate::ops::jobs::Jobs;
use crate::ops::scrub::Damage;
use crate::turns::Turns;
use crate::units::{Cluster, LayerId, SECTOR_BYTES, SectorMask, StoreId};
use crate::volume::Volume;

mod threads;

use threads::CacheThreads;

/// How to open a store.
#[derive(Clone, Debug, Default)]
pub struct StoreOptions {
    /// Open data files with O_DIRECT where the file system can.
    pub direct_io: bool,
    /// Use the pread/pwrite engine even where io_uring works.
    pub no_io_uring: bool,
    /// The sector cache.
    pub cache: CacheOptions,
    /// At most so many bytes a second are read to take checksums of layers that were sealed; `None`: as fast as it goes.
    pub sums_rate: Option<u64>,
    /// Called first by each thread that the store starts. Such a thread opens no files: it works on memory and open files.
    pub on_thread: Option<fn()>,
}

/// What a new volume starts from.
#[derive(Clone, Debug)]
pub enum VolumeSource {
    /// An empty disk of this size in bytes (a multiple of 512).
    Size(u64),
    /// A raw image, used in place, never written.
    Base(PathBuf),
    /// A snapshot of a volume.
    Snapshot {
        /// The volume that the snapshot was taken of.
        volume: String,
        /// The snapshot's name.
        snapshot: String,
    },
    /// What a volume holds now: it is sealed for that, without a name.
    Volume(String),
}

/// How a volume is attached to a front-end, remembered over restarts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// The absolute path of the vhost-user socket.
    pub socket: PathBuf,
    /// How many virtqueues are offered.
    pub queues: u16,
    /// Whether the guest may only read.
    pub read_only: bool,
}

/// What there is to say about a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Layers from the base to the active one, both counted.
    pub depth: usize,
    /// The active layer.
    pub active: LayerId,
    /// Bytes that the active layer takes on the host.
    pub active_allocated_bytes: u64,
    /// The raw base at the bottom, if there is one.
    pub base: Option<PathBuf>,
    /// Its attachment, if it has one.
    pub attachment: Option<Attachment>,
    /// Why it takes no more writes.
    pub failure: Option<String>,
    /// Whether what it has to write waits for space on the host.
    pub no_space: bool,
    /// When it was created: nanoseconds since 1970.
    pub created_ns: u64,
    /// How many snapshots it has.
    pub snapshots: usize,
    /// What happens to its writes.
    pub kind: VolumeKind,
    /// The multiattach volume whose attachment it is.
    pub attached_from: Option<String>,
    /// Bytes of the data of its layers that are known to be damaged, hidden ones among them.
    pub bad_bytes: u64,
}

/// What keeps an open volume from being written to.
#[derive(Debug, Default)]
struct Trouble {
    /// Why it takes no more writes.
    failure: Option<String>,
    /// Whether what it has to write waits for space on the host.
    no_space: bool,
}

impl Trouble {
    /// What there is of it.
    fn of(volume: &Volume) -> Self {
        Self {
            failure: volume.failure(),
            no_space: volume.waits_for_space(),
        }
    }
}

/// What there is to say about a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// The volume it was taken of.
    pub volume: String,
    /// Its name.
    pub name: String,
    /// The sealed layer it stands for.
    pub layer: LayerId,
    /// Equal for all snapshots of one instant.
    pub group: uuid::Uuid,
    /// The instant: nanoseconds since 1970.
    pub created_ns: u64,
    /// The size of the disk in bytes.
    pub size_bytes: u64,
    /// Bytes that the layer takes on the host.
    pub allocated_bytes: u64,
}

/// Which volumes a snapshot is taken of.
#[derive(Clone, Debug)]
pub enum Selection {
    /// These, at one instant.
    Volumes(Vec<String>),
    /// All of the store, at one instant.
    All,
}

/// What a snapshot did.
#[derive(Clone, Debug)]
pub struct SnapshotReport {
    /// The new snapshots, one a volume, all of one instant.
    pub snapshots: Vec<SnapshotInfo>,
    /// The longest that any worker was kept from guest requests by it.
    pub stall_max: Duration,
    /// The time from the command to the reply.
    pub elapsed: Duration,
    /// Bytes of maps written while sealing.
    pub bytes_written: u64,
}

/// A layer in the tree of a store.
#[derive(Clone, Debug)]
pub struct TreeNode {
    /// The layer.
    pub layer: LayerId,
    /// Its parent; `None` for a root.
    pub parent: Option<LayerId>,
    /// The raw image it stands for, if it is one.
    pub base: Option<PathBuf>,
    /// Snapshots that name it: (volume, snapshot).
    pub snapshots: Vec<(String, String)>,
    /// The volume whose active layer it is.
    pub active_of: Option<String>,
    /// The job that takes from it or gives to it.
    pub job: Option<JobId>,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Bytes it takes on the host.
    pub allocated_bytes: u64,
    /// When it was created: nanoseconds since 1970.
    pub created_ns: u64,
    /// Bytes of its data that are known to be damaged.
    pub bad_bytes: u64,
}

/// A store, open and locked. Dropping it writes nothing: what was flushed is safe already.
#[derive(Debug)]
pub struct Store {
    /// Where the files are.
    pub(crate) media: Arc<dyn Media>,
    /// How it was opened.
    pub(crate) options: StoreOptions,
    /// The store's name.
    id: StoreId,
    /// The generations of all its volumes.
    pub(crate) clock: Arc<Clock>,
    /// What waits for the control plane.
    pub(crate) maintenance: Arc<Maintenance>,
    /// The data that was used last, of all volumes.
    pub(crate) cache: Arc<Cache>,
    /// What is written back in time.
    pub(crate) write_back: Arc<WriteBack>,
    /// What takes long and is done step by step.
    pub(crate) jobs: Jobs,
    /// What is known to be damaged.
    pub(crate) damage: Damage,
    /// The threads that go with the cache; none in a simulation.
    threads: Option<CacheThreads>,
    /// Held by every command that changes something, from its first check to its end.
    pub(crate) commands: Turns,
    /// Held for moments only.
    inner: Mutex<Inner>,
    /// One daemon a store; none in a simulation.
    pub(crate) lock: Option<StoreLock>,
}

/// What the commands change.
#[derive(Debug)]
pub(crate) struct Inner {
    /// What is durable.
    pub catalog: Box<dyn Catalog>,
    /// Layers in use by open volumes.
    pub layers: HashMap<LayerId, Weak<Layer>>,
    /// Volumes that are open.
    pub open: BTreeMap<String, Arc<Volume>>,
    /// Volumes that the command under way has found unused and relies on to stay so: nobody is given them before its end.
    pub reserved: BTreeSet<String>,
    /// What an earlier process left dirty of layers that could not be written yet.
    pub unsettled: BTreeMap<LayerId, Vec<(Cluster, SectorMask)>>,
}

impl Store {
    /// Opens the store in `dir`, creating an empty one if there is none, and takes its lock. Finishes what a crash
    /// interrupted.
    ///
    /// # Errors
    /// `Busy` with the holder's pid if another daemon has it; `Unsupported` for a newer format; `Corrupt`; `Io`.
    pub fn open(dir: &Path, options: StoreOptions) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(|source| Error::Io {
            op: "create",
            path: dir.to_owned(),
            source,
        })?;
        let lock = StoreLock::acquire(dir)?;
        let catalog = SqliteCatalog::open_or_create(dir)?;
        Self::open_locked(dir, options, lock, catalog)
    }

    /// Opens the store in `dir`, which is locked, and has that catalog.
    pub(crate) fn open_locked(
        dir: &Path,
        options: StoreOptions,
        lock: StoreLock,
        catalog: SqliteCatalog,
    ) -> Result<Self> {
        let host = HostOptions {
            io_uring: !options.no_io_uring,
        };
        let media = HostMedia::new(dir.to_owned(), host).map_err(|source| Error::Io {
            op: "open",
            path: dir.to_owned(),
            source,
        })?;
        let id = catalog.state().store;
        let wanted = options.cache.sets();
        let place = match &options.cache.place {
            Some(shared) => Some(Place::new(dir, id, Some(shared.clone()))?),
            None => None,
        };
        let (arena, adopted, notes) = match &place {
            None => (private_arena(wanted)?, false, Vec::new()),
            Some(place) => {
                let recorded = last::read(dir)?;
                // Before a new one takes its name.
                let loss = last::loss(recorded.as_deref(), last_boot(dir)?, place);
                let (arena, adopted, aside) = find_arena(recorded.as_deref(), place, wanted)?;
                let loss = loss.filter(|_| !adopted);
                (arena, adopted, loss.into_iter().chain(aside).collect())
            }
        };
        let mut store = Self::with_parts(
            Arc::new(media),
            Box::new(catalog),
            options,
            Some(lock),
            arena,
            adopted,
        )?;
        for note in notes {
            store.maintenance.note(note);
        }
        store.arm_after_boot(dir)?;
        if let Some(place) = &place {
            let as_wanted = store.cache.arena().path() == Some(&*place.path());
            if !as_wanted || store.cache.arena().sets() != wanted {
                store.replace_cache(place, wanted)?;
            }
            if let Some(path) = store.cache.arena().path() {
                last::write(dir, path)?;
            }
        }
        store.threads = Some(CacheThreads::start(
            &store.cache,
            &store.write_back,
            store.options.on_thread,
        )?);
        Ok(store)
    }

    /// Replaces an arena that was taken over by one of the size and in the place that are wanted now.
    fn replace_cache(&mut self, place: &Place, sets: usize) -> Result<()> {
        if !self.may_lose_cache() {
            self.maintenance.note(
                "the cache keeps its size and place, since it holds writes that could not be written yet, or what says \
                 that a volume has failed"
                    .into(),
            );
            return Ok(());
        }
        self.remove_cache()?;
        let options = self.options.cache.clone();
        let cache = Cache::new(Arena::create(place, sets)?, self.id, options);
        self.cache = Arc::new(cache);
        self.write_back = Arc::new(WriteBack::new(Arc::clone(&self.cache)));
        Ok(())
    }

    /// Opens a store over any media and catalog: for simulations.
    ///
    /// # Errors
    /// As `open`.
    pub fn simulated(
        media: Arc<dyn Media>,
        catalog: Box<dyn Catalog>,
        options: StoreOptions,
    ) -> Result<Self> {
        let arena = private_arena(options.cache.sets())?;
        Self::with_parts(media, catalog, options, None, arena, false)
    }

    /// As `simulated`, in the place of a process that was killed: with the arena that it left behind.
    ///
    /// # Errors
    /// As `open`.
    pub fn simulated_after_kill(
        media: Arc<dyn Media>,
        catalog: Box<dyn Catalog>,
        options: StoreOptions,
        arena: Arena,
    ) -> Result<Self> {
        Self::with_parts(media, catalog, options, None, arena, true)
    }

    /// The first half of `simulated_after_kill`, for who wants to look at the arena during the other half: nothing is done
    /// yet, and nothing may be done with the store before `take_over`.
    pub fn simulated_found(
        media: Arc<dyn Media>,
        catalog: Box<dyn Catalog>,
        options: StoreOptions,
        arena: Arena,
    ) -> Self {
        Self::assemble(media, catalog, options, None, arena)
    }

    /// The second half of `simulated_after_kill`.
    ///
    /// # Errors
    /// As `open`.
    pub fn take_over(&self) -> Result<()> {
        self.adopt_frames();
        self.record_marked();
        self.recover()
    }

    /// Puts a store together and finishes what a crash interrupted.
    fn with_parts(
        media: Arc<dyn Media>,
        catalog: Box<dyn Catalog>,
        options: StoreOptions,
        lock: Option<StoreLock>,
        arena: Arena,
        adopted: bool,
    ) -> Result<Self> {
        let store = Self::assemble(media, catalog, options, lock, arena);
        if adopted {
            store.adopt_frames();
            store.record_marked();
        }
        store.recover()?;
        Ok(store)
    }

    /// Puts a store together.
    fn assemble(
        media: Arc<dyn Media>,
        catalog: Box<dyn Catalog>,
        options: StoreOptions,
        lock: Option<StoreLock>,
        arena: Arena,
    ) -> Self {
        let id = catalog.state().store;
        let cache = Arc::new(Cache::new(arena, id, options.cache.clone()));
        Self {
            media,
            options,
            id,
            write_back: Arc::new(WriteBack::new(Arc::clone(&cache))),
            cache,
            jobs: Jobs::default(),
            damage: Damage::default(),
            threads: None,
            clock: Arc::new(Clock::new()),
            maintenance: Arc::new(Maintenance::default()),
            commands: Turns::default(),
            inner: Mutex::new(Inner {
                catalog,
                layers: HashMap::new(),
                open: BTreeMap::new(),
                reserved: BTreeSet::new(),
                unsettled: BTreeMap::new(),
            }),
            lock,
        }
    }

    /// The store's name.
    pub fn id(&self) -> StoreId {
        self.id
    }

    /// Lines worth a log entry since the last call: what recovery dropped, which fall-backs were taken, which volumes have
    /// failed.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = self.media.notes();
        notes.extend(self.maintenance.take_notes());
        notes
    }

    /// Ends the wait of `maintain` and of `run_jobs`.
    pub fn close(&self) {
        self.maintenance.close();
        self.jobs.close();
    }

    /// All volumes, by name.
    pub fn volumes(&self) -> Vec<VolumeInfo> {
        let (state, mut troubles) = {
            let inner = self.inner();
            let open = inner.open.iter();
            let troubles: HashMap<String, Trouble> = open
                .map(|(name, volume)| (name.clone(), Trouble::of(volume)))
                .collect();
            (inner.catalog.share(), troubles)
        };
        let mut depths = Depths::default();
        state
            .volumes
            .values()
            .map(|row| {
                let below = depths.of(&state, row.active);
                let trouble = troubles.remove(&row.name).unwrap_or_default();
                self.describe(&state, row, below, trouble)
            })
            .collect()
    }

    /// One volume.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn volume_info(&self, name: &str) -> Result<VolumeInfo> {
        let (state, trouble) = {
            let inner = self.inner();
            let open = inner.open.get(name);
            let trouble = open.map(|volume| Trouble::of(volume)).unwrap_or_default();
            (inner.catalog.share(), trouble)
        };
        let row = state.volume(name)?;
        let below = state.depth(row.active);
        Ok(self.describe(&state, row, below, trouble))
    }

    /// Remembers how a volume is attached (`None`: not at all; the volume is then flushed and closed if nobody else uses
    /// it). Either arms an immutable volume: what is served next is the start of a machine. Durable on return. Does not touch
    /// any socket.
    ///
    /// # Errors
    /// `NotFound`; `Busy` if the socket path belongs to another volume; `Failed` if what was written could not be flushed
    /// (the attachment is forgotten all the same).
    pub fn set_attachment(&self, name: &str, attachment: Option<Attachment>) -> Result<()> {
        let _command = self.command();
        {
            let mut inner = self.inner();
            let state = inner.catalog.state();
            let row = state.volume(name)?;
            // Whoever attaches or detaches a volume says that no machine goes on with it.
            let arm = row.kind == VolumeKind::Immutable && !row.armed;
            if let Some(wanted) = &attachment
                && let Some(other) = state.volumes.values().find(|row| {
                    row.name != name
                        && row
                            .attachment
                            .as_ref()
                            .is_some_and(|has| has.socket == wanted.socket)
                })
            {
                return Err(Error::Busy {
                    what: format!(
                        "socket: {} belongs to volume {:?}; choose another path or detach that volume",
                        wanted.socket.display(),
                        other.name
                    ),
                });
            }
            let detach = attachment.is_none();
            let volume = name.to_owned();
            let mut changes = vec![Change::SetAttachment { volume, attachment }];
            if arm {
                let volume = name.to_owned();
                changes.push(Change::SetArmed {
                    volume,
                    armed: true,
                });
            }
            inner.catalog.commit(&changes)?;
            if !detach {
                return Ok(());
            }
        }
        self.close_volume(name)
    }

    /// The snapshots of one volume, or all, oldest first.
    ///
    /// # Errors
    /// `NotFound` for an unknown volume.
    pub fn snapshots(&self, volume: Option<&str>) -> Result<Vec<SnapshotInfo>> {
        // The host is asked about their files with nobody waiting.
        let state = self.inner().catalog.share();
        let rows: Vec<&SnapshotRow> = match volume {
            Some(name) => {
                state.volume(name)?;
                state.snapshots_of(name)
            }
            None => state.snapshots.iter().collect(),
        };
        let described = rows.into_iter().map(|row| self.describe_snapshot(row));
        Ok(described.collect())
    }

    /// Makes everything written to all open volumes durable: the last act before an orderly exit.
    ///
    /// # Errors
    /// The first failure, after all volumes were tried.
    pub fn flush_all(&self) -> Result<()> {
        let open: Vec<Arc<Volume>> = self.inner().open.values().cloned().collect();
        let mut result = Ok(());
        for volume in open {
            let flushed = volume.flush_blocking();
            if result.is_ok() {
                result = flushed;
            }
        }
        result
    }

    /// Ends the use of the store in order: makes everything durable, and then removes the cache's arena, unless it is to be
    /// kept for a warm start. After an error the arena stays for the next process to take over.
    ///
    /// # Errors
    /// As `flush_all`.
    pub fn finish(&self) -> Result<()> {
        let flushed = self.flush_all();
        self.record_failures();
        flushed?;
        // A net: what is dirty in spite of that is for the next process to take over.
        let (_, dirty) = self.cache.sets().count();
        if !self.options.cache.keep && self.may_lose_cache() && dirty == 0 {
            self.remove_cache()?;
        }
        Ok(())
    }

    /// Removes the cache's memory file, which holds nothing that is not in the files. It is forgotten first, so that nobody
    /// looks for it in vain.
    fn remove_cache(&self) -> Result<()> {
        if self.cache.arena().path().is_some() {
            remove_file(&self.media, Path::new(last::NAME))?;
        }
        self.cache.arena().remove()
    }

    /// Figures of the sector cache.
    pub fn cache_stats(&self) -> CacheStats {
        self.cache.stats()
    }

    /// The cache's arena, for simulations of a process that is killed.
    pub fn cache_arena(&self) -> &Arena {
        self.cache.arena()
    }

    /// Writes back about so many clusters of every dirty volume: what the write-back thread does, for simulations.
    pub fn write_back_step(&self, clusters: usize) {
        self.write_back.step(clusters);
    }

    /// Serialises the commands that change something, in the order in which they come.
    pub(crate) fn command(&self) -> Command<'_> {
        Command::new(self, self.commands.take())
    }

    /// What the commands change; to be held for moments only.
    pub(crate) fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An error of the host about a file of the store.
    pub(crate) fn io(&self, op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = self.media.display_path(path);
        move |source| Error::Io { op, path, source }
    }

    /// What there is to say about a volume with so many layers down to this one. Asks the host about its file, so that nobody
    /// should be waiting.
    fn describe(
        &self,
        state: &CatalogState,
        row: &VolumeRow,
        (depth, lowest): (usize, LayerId),
        trouble: Trouble,
    ) -> VolumeInfo {
        VolumeInfo {
            name: row.name.clone(),
            size_bytes: row.size.0 * SECTOR_BYTES,
            depth,
            active: row.active,
            active_allocated_bytes: self.allocated(row.active),
            base: state
                .layers
                .get(&lowest)
                .and_then(|layer| layer.base.as_ref())
                .map(|base| base.path.clone()),
            attachment: row.attachment.clone(),
            failure: trouble.failure.or_else(|| row.failed.clone()),
            no_space: trouble.no_space,
            created_ns: row.created_ns,
            snapshots: state.snapshot_count(&row.name),
            kind: row.kind,
            attached_from: row.attached_from.clone(),
            bad_bytes: self.bad_bytes_below(state, row.active),
        }
    }

    /// What there is to say about a snapshot.
    pub(crate) fn describe_snapshot(&self, row: &SnapshotRow) -> SnapshotInfo {
        SnapshotInfo {
            volume: row.volume.clone(),
            name: row.name.clone(),
            layer: row.layer,
            group: row.group,
            created_ns: row.created_ns,
            size_bytes: row.size.0 * SECTOR_BYTES,
            allocated_bytes: self.allocated(row.layer),
        }
    }

    /// Bytes that a layer's data takes on the host; 0 where that cannot be told.
    pub(crate) fn allocated(&self, layer: LayerId) -> u64 {
        self.media
            .stat(&data_path(layer))
            .map_or(0, |stat| stat.allocated)
    }
}

/// The arena of a store, and whether it was taken over: the one that the store used last, wherever it is, or a new one. What
/// lies in the wanted place and was not used last is never taken over, since its writes are older than the files; where it has
/// some it is put aside, and the third of what is returned tells of it.
fn find_arena(
    recorded: Option<&Path>,
    place: &Place,
    sets: usize,
) -> Result<(Arena, bool, Option<String>)> {
    let last = match last::elsewhere(recorded, place) {
        Some(elsewhere) => Arena::adopt(&elsewhere)?,
        None => None,
    };
    if let Some(arena) = last {
        return Ok((arena, true, None));
    }
    let aside = match Arena::adopt(place)? {
        Some(arena) if recorded == Some(&place.path()) => return Ok((arena, true, None)),
        Some(stale) => put_aside(&stale, &place.path())?,
        None => None,
    };
    Ok((Arena::create(place, sets)?, false, aside))
}

/// Removes an arena that was not used last, or renames it if it has writes: they are older than what the files have, unless
/// somebody has changed the store's files by hand.
fn put_aside(stale: &Arena, path: &Path) -> Result<Option<String>> {
    let (_, dirty) = Sets::new(stale.all(), 0).count();
    if dirty == 0 {
        stale.remove()?;
        return Ok(None);
    }
    let aside = path.with_extension("stale");
    std::fs::rename(path, &aside).map_err(|source| Error::Io {
        op: "rename",
        path: path.to_owned(),
        source,
    })?;
    Ok(Some(format!(
        "a cache with {dirty} clusters that are in no file was not the one that this store used last; it is {} now, and is not \
         used: remove it",
        aside.display()
    )))
}

/// Memory for a cache that dies with the process.
fn private_arena(sets: usize) -> Result<Arena> {
    Arena::private(sets).map_err(|source| Error::Io {
        op: "take memory for",
        path: "the cache".into(),
        source,
    })
}

/// Nanoseconds since 1970.
pub(crate) fn now_ns() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    })
}
