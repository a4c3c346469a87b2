//! A store found after a crash: opened as the daemon would, read whole, held against the oracle; and used again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use stratablk_layers::cache::CacheOptions;
use stratablk_layers::cache::arena::Arena;
use stratablk_layers::catalog::memory::{MemoryCatalog, MemoryDisk};
use stratablk_layers::file::Media;
use stratablk_layers::file::sim::{Random, SimMedia, Survival};
use stratablk_layers::store::{Store, StoreOptions, VolumeSource};
use stratablk_layers::units::{Sector, SectorRange};
use stratablk_layers::volume::{Operation, QueueContext, RequestError};

use crate::disk::Queue;
use crate::oracle::{Disk, Promise, Value, stamp};
use crate::workload::trace;

/// What a crash leaves behind.
pub struct Found {
    /// The files.
    pub media: SimMedia,
    /// The catalog.
    pub catalog: MemoryDisk,
    /// The cache's arena, if it is still there.
    pub arena: Option<Arena>,
    /// How the next daemon is set up.
    pub options: StoreOptions,
    /// What must be there.
    pub promise: Promise,
}

/// The disks that a store must hold.
type Disks = BTreeMap<String, Disk>;

/// What came of an examination.
#[derive(Default)]
pub struct Verdict {
    /// What is wrong.
    pub problems: Vec<String>,
    /// Images that were looked at: the one given, and those made of it.
    pub images: u64,
}

impl Verdict {
    /// Adds another one's findings.
    fn add(&mut self, other: Self, when: &str) {
        self.images += other.images;
        let problems = other.problems.into_iter();
        self.problems
            .extend(problems.map(|problem| format!("{when}: {problem}")));
    }
}

/// A store's options with a cache of so many sets.
pub fn small_cache(sets: u64, dirty_frames: Option<u64>) -> StoreOptions {
    StoreOptions {
        cache: CacheOptions {
            bytes: sets * 16 * 4096,
            dirty_bytes: dirty_frames.map(|frames| frames * 4096),
            ..CacheOptions::default()
        },
        ..StoreOptions::default()
    }
}

/// Looks at what was found, and now and then at what comes of it if it crashes again.
pub fn examine(found: Found, disks: &Disks, seed: u64) -> Verdict {
    let mut random = Random::new(seed);
    let mut verdict = Verdict::default();
    let watched = found.arena.is_some() && random.chance(8);
    let more = random.below(16);
    if let Err(problem) = (|| {
        let (media, catalog, options) = (
            found.media.clone(),
            found.catalog.clone(),
            found.options.clone(),
        );
        let store = if watched {
            open_watched(found, disks, random.number(), &mut verdict)?
        } else {
            open(found, disks, &mut random, &mut verdict)?
        };
        let store = &*store.0;
        if verdict.problems.is_empty() && more < 4 {
            let rest = Rest {
                media,
                catalog,
                options,
            };
            live_again(&rest, store, disks, more < 2, &mut random, &mut verdict)?;
        }
        Ok(())
    })() {
        verdict.problems.push(problem);
    }
    verdict
}

/// Looks at what was found, and no further.
fn glance(found: Found, disks: &Disks, seed: u64) -> Verdict {
    let mut verdict = Verdict::default();
    if let Err(problem) = open(found, disks, &mut Random::new(seed), &mut verdict) {
        verdict.problems.push(problem);
    }
    verdict
}

/// A store that was opened and looked at.
struct Opened(Arc<Store>);

/// Opens a store and holds its disks and snapshots against the oracle.
fn open(
    found: Found,
    disks: &Disks,
    random: &mut Random,
    verdict: &mut Verdict,
) -> Result<Opened, String> {
    let problem = |error| format!("the store does not open: {error}");
    let catalog = Box::new(MemoryCatalog::open(&found.catalog).map_err(problem)?);
    let files: Arc<dyn Media> = Arc::new(found.media);
    let store = match found.arena {
        None => Store::simulated(files, catalog, found.options).map_err(problem)?,
        Some(arena) => {
            Store::simulated_after_kill(files, catalog, found.options, arena).map_err(problem)?
        }
    };
    let store = Arc::new(store);
    check(&store, disks, found.promise, random, verdict)?;
    Ok(Opened(store))
}

/// As `open`, with crashes while the arena is taken over.
fn open_watched(
    found: Found,
    disks: &Disks,
    seed: u64,
    verdict: &mut Verdict,
) -> Result<Opened, String> {
    let problem = |error| format!("the store does not open: {error}");
    let arena = found.arena.ok_or("there is no arena to take over")?;
    let catalog = Box::new(MemoryCatalog::open(&found.catalog).map_err(problem)?);
    let files: Arc<dyn Media> = Arc::new(found.media.clone());
    let options = found.options.clone();
    let store = Arc::new(Store::simulated_found(files, catalog, options, arena));
    let (watched, disks_then) = (Arc::downgrade(&store), disks.clone());
    let (catalog, options, promise) = (found.catalog, found.options, found.promise);
    let inner = Arc::new(Mutex::new(Verdict::default()));
    let seen = Arc::clone(&inner);
    let mut random = Random::new(seed);
    found.media.set_observer(Box::new(move |media, point| {
        let Some(store) = watched.upgrade().filter(|_| random.chance(128)) else {
            return;
        };
        let seed = random.number();
        let killed = random.chance(128);
        let again = Found {
            media: if killed {
                media.kill_image(seed)
            } else {
                media.crash_image(seed)
            },
            catalog: catalog.crash_image(),
            arena: killed.then(|| store.cache_arena().copy().unwrap()),
            options: options.clone(),
            promise: if killed { promise } else { Promise::Flushed },
        };
        let when = format!(
            "taking over, point {} ({:?} {}), killed: {killed}",
            point.number, point.event, point.path
        );
        let verdict = glance(again, &disks_then, seed);
        seen.lock().unwrap().add(verdict, &when);
    }));
    let taken = store.take_over().map_err(problem);
    found.media.clear_observer();
    taken?;
    verdict.add(std::mem::take(&mut *inner.lock().unwrap()), "again");
    check(&store, disks, promise, &mut Random::new(seed), verdict)?;
    Ok(Opened(store))
}

/// Holds the disks and snapshots of a store against the oracle.
fn check(
    store: &Store,
    disks: &Disks,
    promise: Promise,
    random: &mut Random,
    verdict: &mut Verdict,
) -> Result<(), String> {
    verdict.images += 1;
    for (name, disk) in disks {
        let found = read(store, name, disk, random)?;
        verdict.problems.extend(disk.check(&found, promise));
    }
    check_snapshots(store, disks, promise, random, &mut verdict.problems)
}

/// A queue of a volume.
fn context(store: &Store, name: &str) -> Result<QueueContext, String> {
    let volume = store
        .open_volume(name)
        .map_err(|error| format!("{name} does not open: {error}"))?;
    volume.context(false).map_err(|error| error.to_string())
}

/// Reads a volume whole, in pieces of some size.
fn read(store: &Store, name: &str, disk: &Disk, random: &mut Random) -> Result<Vec<Value>, String> {
    let piece = match random.below(3) {
        0 => 1 + random.below(100),
        _ => disk.sectors(),
    };
    let mut queue = Queue::new(context(store, name)?);
    queue.read_in_pieces(disk.number, disk.sectors(), piece)
}

/// P3: acknowledged snapshots are there, others whole (on all disks of their group) or not at all.
fn check_snapshots(
    store: &Store,
    disks: &Disks,
    promise: Promise,
    random: &mut Random,
    problems: &mut Vec<String>,
) -> Result<(), String> {
    let there = store.snapshots(None).map_err(|error| error.to_string())?;
    let mut groups: BTreeMap<u64, Vec<(String, bool)>> = BTreeMap::new();
    for (name, disk) in disks {
        for (snapshot, expected) in &disk.snapshots {
            let found = there
                .iter()
                .any(|info| &info.volume == name && &info.name == snapshot);
            groups
                .entry(expected.group)
                .or_default()
                .push((format!("{name}@{snapshot}"), found));
            if !found {
                if expected.acknowledged {
                    problems.push(format!(
                        "snapshot {name}@{snapshot} was acknowledged and is gone"
                    ));
                }
                continue;
            }
            let clone = format!("look-{name}-{snapshot}");
            let source = VolumeSource::Snapshot {
                volume: name.clone(),
                snapshot: snapshot.clone(),
            };
            store
                .create_volume(&clone, &source)
                .map_err(|error| format!("no clone of {name}@{snapshot}: {error}"))?;
            let values = read(store, &clone, disk, random)?;
            problems.extend(disk.check_snapshot(snapshot, &values, promise));
        }
    }
    for members in groups.values() {
        if members.iter().any(|(_, found)| *found) && !members.iter().all(|(_, found)| *found) {
            problems.push(format!("a group snapshot is there in part: {members:?}"));
        }
    }
    Ok(())
}

/// What is left of a crash while a store is open on it.
struct Rest {
    /// The files.
    media: SimMedia,
    /// The catalog.
    catalog: MemoryDisk,
    /// How the next daemon is set up.
    options: StoreOptions,
}

/// Recovers a volume that had failed; it must not have forgotten that.
fn was_failed(store: &Store, name: &str) -> Result<bool, String> {
    let info = store.volume_info(name).map_err(|error| error.to_string())?;
    if info.failure.is_none() {
        return Ok(false);
    }
    let (flushed, _) = Queue::new(context(store, name)?).run(Operation::Flush, Vec::new());
    if flushed != Err(RequestError::Failed) {
        return Err(format!("a flush of {name}, which has failed: {flushed:?}"));
    }
    store
        .recover_volume(name)
        .map_err(|error| format!("{name} cannot be recovered: {error}"))?;
    Ok(true)
}

/// Uses a recovered store, ends it by a power cut after a flush or by a kill, and looks again. What was found once and then
/// flushed must be there after the cut, whoever wrote it; and all of it after the kill.
fn live_again(
    rest: &Rest,
    store: &Store,
    disks: &Disks,
    kill: bool,
    random: &mut Random,
    verdict: &mut Verdict,
) -> Result<(), String> {
    let mut next: Disks = BTreeMap::new();
    let mut queues = Vec::new();
    for (name, disk) in disks {
        let found = read(store, name, disk, random)?;
        if was_failed(store, name)? && read(store, name, disk, random)? != found {
            return Err(format!("{name} reads differently after its recovery"));
        }
        next.insert(name.clone(), Disk::new(disk.number, found));
        queues.push((name.clone(), Queue::new(context(store, name)?)));
    }
    let help = || store.write_back_step(3);
    let mut id = 1 << 40;
    for (name, queue) in &mut queues {
        let disk = next.get_mut(name).ok_or("a disk without a name")?;
        for _ in 0..random.below(3) {
            for _ in 0..1 + random.below(4) {
                id += 1;
                change(queue, disk, id, random, &help)?;
            }
            flush(queue, disk, &help)?;
        }
        if !kill {
            flush(queue, disk, &help)?;
        }
        for _ in 0..random.below(4) {
            id += 1;
            change(queue, disk, id, random, &help)?;
        }
    }
    let seed = random.number();
    let again = if kill {
        Found {
            media: rest.media.kill_image(seed),
            catalog: rest.catalog.crash_image(),
            arena: Some(
                store
                    .cache_arena()
                    .copy()
                    .map_err(|error| error.to_string())?,
            ),
            options: rest.options.clone(),
            promise: Promise::Acknowledged,
        }
    } else {
        let survival = if random.chance(128) {
            Survival::Nothing
        } else {
            Survival::Seeded(seed)
        };
        Found {
            media: rest.media.crash_image_with(survival),
            catalog: rest.catalog.crash_image(),
            arena: None,
            options: rest.options.clone(),
            promise: Promise::Flushed,
        }
    };
    let when = if kill {
        "after life went on and a kill"
    } else {
        "after life went on and a cut"
    };
    verdict.add(glance(again, &next, seed), when);
    Ok(())
}

/// Writes or zeroes some sectors.
fn change(
    queue: &mut Queue,
    disk: &mut Disk,
    id: u64,
    random: &mut Random,
    help: &dyn Fn(),
) -> Result<(), String> {
    let start = random.below(disk.sectors());
    let count = 1 + random.below((disk.sectors() - start).min(12));
    let sectors = start..start + count;
    let range = SectorRange {
        start: Sector(start),
        count,
    };
    let number = disk.number;
    let (operation, value, memory) = match random.below(4) {
        0 => (Operation::Discard(range), Value::Zero, Vec::new()),
        1 => (
            Operation::WriteZeroes {
                range,
                unmap: false,
            },
            Value::Zero,
            Vec::new(),
        ),
        _ => {
            let bytes = sectors.clone().flat_map(|sector| stamp(number, sector, id));
            (
                Operation::Write(range.start),
                Value::Stamp(id),
                bytes.collect(),
            )
        }
    };
    let issued = disk.issue(sectors.clone().map(|sector| (sector, value)));
    let (result, _) = queue.run_helped(operation, memory, help);
    trace(|| format!("  then {operation:?}, stamp {id}: {result:?}"));
    disk.end(issued, sectors, result.is_ok(), false);
    result.map_err(|error| format!("{operation:?} failed after recovery: {error:?}"))
}

/// Flushes.
fn flush(queue: &mut Queue, disk: &mut Disk, help: &dyn Fn()) -> Result<(), String> {
    let marks = disk.marks();
    let (result, _) = queue.run_helped(Operation::Flush, Vec::new(), help);
    result.map_err(|error| format!("a flush failed after recovery: {error:?}"))?;
    trace(|| format!("  then a flush of disk {}", disk.number));
    disk.flushed(&marks);
    Ok(())
}
