//! A store found after a crash: opened as the daemon would, read, held against the oracle; then its jobs are carried out to
//! their end, and it must read the same. Some of it is crashed again on the way.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use stratablk_layers::cache::CacheOptions;
use stratablk_layers::cache::arena::Arena;
use stratablk_layers::catalog::CatalogState;
use stratablk_layers::catalog::memory::{MemoryCatalog, MemoryDisk};
use stratablk_layers::check::{CheckOptions, Severity, check_against};
use stratablk_layers::file::Media;
use stratablk_layers::file::sim::{Event, Random, SimMedia};
use stratablk_layers::lifecycle::Phase;
use stratablk_layers::store::{Store, StoreOptions, VolumeSource};
use stratablk_layers::units::SECTOR_BYTES;

use crate::disk::Queue;
use crate::oracle::{Promise, Value};
use crate::tidy;
use crate::trace;
use crate::tree::{Name, Oracle, World};

/// The most volumes and snapshots that are read of one image, beside those that a command is about.
const READ_MAX: usize = 8;
/// Steps after which jobs that do not end hang.
const HANGS: u64 = 50_000;
/// The first part of the names of clones that are made to read snapshots.
const LOOK: &str = "look-";

/// What a crash leaves behind.
pub struct Image {
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

/// What came of an examination.
#[derive(Default)]
pub struct Verdict {
    /// What is wrong.
    pub problems: Vec<String>,
    /// Images made of this one by a second crash.
    pub second: u64,
    /// Steps of jobs that were taken.
    pub job_steps: u64,
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

/// What was seen of a store.
pub struct Seen {
    /// What each name holds, of those that were read.
    pub values: BTreeMap<Name, Vec<Value>>,
    /// Whether it is the world of after the command under way.
    pub is_next: bool,
}

/// Looks at what was found; `further`: carries out its jobs as well, and looks at what a second crash leaves.
pub fn examine(image: Image, oracle: &Oracle, seed: u64, further: bool) -> Verdict {
    let mut verdict = Verdict::default();
    let second = Arc::new(Mutex::new(Verdict::default()));
    let result = look_further(image, oracle, seed, further, &second, &mut verdict);
    verdict.problems.extend(result.err());
    let mut second = second.lock().unwrap();
    verdict.second += second.second;
    verdict.problems.append(&mut second.problems);
    verdict
}

/// As `examine`.
fn look_further(
    image: Image,
    oracle: &Oracle,
    seed: u64,
    further: bool,
    second: &Arc<Mutex<Verdict>>,
    verdict: &mut Verdict,
) -> Result<(), String> {
    let mut random = Random::new(seed);
    let (media, catalog, promise) = (image.media.clone(), image.catalog.clone(), image.promise);
    let again = further && random.chance(64);
    let store = open(image, |store, options| {
        if again {
            watch(
                store, &media, &catalog, oracle, &options, promise, seed, second,
            );
        }
    })?;
    let store = &*store;
    tidy::after_start(&media, &catalog.state())?;
    let mut looks = Looks::default();
    // A first crash may have left some.
    for info in store.volumes() {
        if info.name.starts_with(LOOK) {
            store
                .delete_volume(&info.name)
                .map_err(|error| format!("{} cannot be deleted: {error}", info.name))?;
        }
    }
    let seen = look(store, oracle, promise, READ_MAX, &mut random, &mut looks)?;
    check_files(&media, &catalog.state())?;
    if further {
        let world = match &oracle.next {
            Some(next) if seen.is_next => next,
            _ => &oracle.world,
        };
        if random.chance(128) {
            looks.remove(store)?;
        }
        verdict.job_steps += finish_jobs(store, world, &seen.values, &mut random)?;
        media.clear_observer();
        for (name, values) in &seen.values {
            read_same(store, world, name, values, "after its jobs", &mut looks)?;
        }
        looks.remove(store)?;
        // Removing what was looked through may have left something to join.
        finish_jobs(store, world, &BTreeMap::new(), &mut random)?;
        tidy::after_jobs(&media, &catalog.state())?;
        check_files(&media, &catalog.state())?;
    }
    media.clear_observer();
    Ok(())
}

/// Opens a store; `watch` is told of it before anything is done, if there is an arena to be taken over.
pub fn open(
    image: Image,
    watch: impl FnOnce(&Arc<Store>, StoreOptions),
) -> Result<Arc<Store>, String> {
    let problem = |error| format!("the store does not open: {error}");
    let catalog = Box::new(MemoryCatalog::open(&image.catalog).map_err(problem)?);
    let files: Arc<dyn Media> = Arc::new(image.media);
    let options = image.options;
    match image.arena {
        None => {
            let store = Store::simulated(files, catalog, options.clone()).map_err(problem)?;
            let store = Arc::new(store);
            watch(&store, options);
            Ok(store)
        }
        Some(arena) => {
            let store = Store::simulated_found(files, catalog, options.clone(), arena);
            let store = Arc::new(store);
            watch(&store, options);
            store.take_over().map_err(problem)?;
            Ok(store)
        }
    }
}

/// From now on some instants are looked at as if there were a crash.
#[expect(clippy::too_many_arguments, reason = "all that a crash is made of")]
fn watch(
    store: &Arc<Store>,
    media: &SimMedia,
    catalog: &MemoryDisk,
    oracle: &Oracle,
    options: &StoreOptions,
    promise: Promise,
    seed: u64,
    second: &Arc<Mutex<Verdict>>,
) {
    let (store, second) = (Arc::downgrade(store), Arc::clone(second));
    let (catalog, oracle, options) = (catalog.clone(), oracle.clone(), options.clone());
    let mut random = Random::new(seed ^ 0x2ec0);
    media.set_observer(Box::new(move |media, point| {
        let wanted = if matches!(point.event, Event::Written) {
            4
        } else {
            12
        };
        let Some(store) = store.upgrade().filter(|_| random.chance(wanted)) else {
            return;
        };
        let choice = random.number();
        let killed = random.chance(128);
        let image = Image {
            media: if killed {
                media.kill_image(choice)
            } else {
                media.crash_image(choice)
            },
            catalog: catalog.crash_image(),
            arena: killed.then(|| store.cache_arena().copy().unwrap()),
            options: options.clone(),
            promise: if killed { promise } else { Promise::Flushed },
        };
        let verdict = examine(image, &oracle, choice, false);
        let mut second = second.lock().unwrap();
        second.second += 1;
        let told = verdict.problems.into_iter().map(|problem| {
            format!(
                "again, point {} ({:?} {}), killed: {killed}: {problem}",
                point.number, point.event, point.path
            )
        });
        second.problems.extend(told);
    }));
}

/// Clones that were made to read snapshots.
#[derive(Default)]
pub struct Looks {
    /// By name of what was read.
    clones: BTreeMap<Name, String>,
}

impl Looks {
    /// The volume to read for a name: itself, or a clone.
    fn volume(&mut self, store: &Store, name: &Name) -> Result<String, String> {
        let Some(snapshot) = &name.1 else {
            return Ok(name.0.clone());
        };
        if let Some(clone) = self.clones.get(name) {
            return Ok(clone.clone());
        }
        let clone = format!("{LOOK}{}", self.clones.len());
        let source = VolumeSource::Snapshot {
            volume: name.0.clone(),
            snapshot: snapshot.clone(),
        };
        store
            .create_volume(&clone, &source)
            .map_err(|error| format!("no clone of {}@{snapshot}: {error}", name.0))?;
        self.clones.insert(name.clone(), clone.clone());
        Ok(clone)
    }

    /// Removes them.
    pub fn remove(&mut self, store: &Store) -> Result<(), String> {
        for clone in std::mem::take(&mut self.clones).into_values() {
            store
                .delete_volume(&clone)
                .map_err(|error| format!("{clone} cannot be deleted: {error}"))?;
        }
        Ok(())
    }
}

/// Reads what a name holds.
pub fn read(
    store: &Store,
    name: &Name,
    family: u64,
    piece: Option<u64>,
    looks: &mut Looks,
) -> Result<Vec<Value>, String> {
    let volume = looks.volume(store, name)?;
    let told = |what: String| format!("{name:?}: {what}");
    let info = store
        .volume_info(&volume)
        .map_err(|error| told(error.to_string()))?;
    let sectors = info.size_bytes / SECTOR_BYTES;
    let opened = store
        .open_volume(&volume)
        .map_err(|error| told(format!("it does not open: {error}")))?;
    let context = opened
        .context(false)
        .map_err(|error| told(error.to_string()))?;
    let mut queue = Queue::new(context);
    queue
        .read_in_pieces(family, sectors, piece.unwrap_or(sectors))
        .map_err(told)
}

/// What holds data in a store.
fn names_of(store: &Store) -> Result<BTreeSet<Name>, String> {
    let volumes = store.volumes().into_iter();
    let snapshots = store.snapshots(None).map_err(|error| error.to_string())?;
    let volumes = volumes.map(|info| (info.name, None));
    let snapshots = snapshots
        .into_iter()
        .map(|info| (info.volume, Some(info.name)));
    let names = volumes.chain(snapshots);
    Ok(names.filter(|name| !name.0.starts_with(LOOK)).collect())
}

/// Holds a store against the oracle.
pub fn look(
    store: &Store,
    oracle: &Oracle,
    promise: Promise,
    most: usize,
    random: &mut Random,
    looks: &mut Looks,
) -> Result<Seen, String> {
    let there = names_of(store)?;
    let worlds: Vec<(bool, &World)> = [(false, Some(&oracle.world)), (true, oracle.next.as_ref())]
        .into_iter()
        .filter_map(|(is_next, world)| Some((is_next, world?)))
        .collect();
    let names = |world: &World| world.names().into_iter().collect::<BTreeSet<_>>();
    let possible: Vec<_> = worlds
        .iter()
        .filter(|(_, world)| names(world) == there)
        .collect();
    let Some((_, some)) = possible.first() else {
        let differ = worlds.iter().map(|(is_next, world)| {
            let names = names(world);
            let missing: Vec<_> = names.difference(&there).collect();
            let foreign: Vec<_> = there.difference(&names).collect();
            format!("after the command: {is_next}, missing: {missing:?}, too many: {foreign:?}")
        });
        let differ: Vec<String> = differ.collect();
        return Err(format!("names: {}", differ.join("; or ")));
    };
    let mut values = BTreeMap::new();
    for name in chosen(&there, oracle, most, random) {
        let family = some.family(&name).ok_or("a name without a family")?;
        let piece = random.chance(64).then(|| 1 + random.below(100));
        values.insert(name.clone(), read(store, &name, family, piece, looks)?);
    }
    let mut problems = Vec::new();
    for (is_next, world) in possible {
        let wrong = values
            .iter()
            .filter_map(|(name, found)| world.wrong(&oracle.world, name, found, promise));
        let wrong: Vec<String> = wrong.chain(misdescribed(store, world)).collect();
        if wrong.is_empty() {
            return Ok(Seen {
                values,
                is_next: *is_next,
            });
        }
        let when = if *is_next { "after" } else { "before" };
        let more = wrong.len() - 1;
        problems.push(format!(
            "as {when} the command: {} (and {more} more)",
            wrong[0]
        ));
    }
    Err(problems.join("; "))
}

/// What to read: all, or some with what the command under way is about among it.
fn chosen(there: &BTreeSet<Name>, oracle: &Oracle, most: usize, random: &mut Random) -> Vec<Name> {
    let mut names: Vec<Name> = there.iter().cloned().collect();
    for last in (1..names.len()).rev() {
        names.swap(last, random.index(last + 1));
    }
    let concerned = |name: &Name| {
        oracle.next.as_ref().is_some_and(|next| {
            let (old, new) = (oracle.world.disks.get(&name.0), next.disks.get(&name.0));
            match (old, new) {
                (Some(old), Some(new)) => !Arc::ptr_eq(old, new) && name.1.is_none(),
                _ => true,
            }
        }) || oracle.next.as_ref().is_some_and(|next| next.is_open(name))
    };
    names.sort_by_key(|name| !concerned(name));
    names.truncate(most);
    names
}

/// What is said of volumes against what it should be.
fn misdescribed(store: &Store, world: &World) -> Option<String> {
    for info in store.volumes() {
        let Some(disk) = world.disks.get(&info.name) else {
            continue;
        };
        let said = (
            info.size_bytes / SECTOR_BYTES,
            info.kind,
            info.attached_from.as_ref(),
        );
        let is = (disk.sectors, disk.kind, disk.attached_from.as_ref());
        if said != is {
            return Some(format!("{} is {said:?} instead of {is:?}", info.name));
        }
    }
    None
}

/// Carries out all jobs, and reads some of it again on the way.
pub fn finish_jobs(
    store: &Store,
    world: &World,
    values: &BTreeMap<Name, Vec<Value>>,
    random: &mut Random,
) -> Result<u64, String> {
    for job in store.jobs() {
        match job.phase {
            Phase::Queued | Phase::Running | Phase::Done => {}
            Phase::Failed => return Err(format!("a job failed on a good disk: {job:?}")),
            Phase::Paused | Phase::Cancelled => {
                // One that was cancelled before its end has nothing left to resume.
                let resumed = store.resume_job(job.id);
                trace(|| format!("  resumed {:?}: {:?}", job.id, resumed.map(|job| job.phase)));
            }
        }
    }
    store.set_job_step_bytes(4096 << random.below(6));
    let volumes: Vec<&Name> = values.keys().filter(|name| name.1.is_none()).collect();
    let mut steps = 0;
    while store.job_step() {
        steps += 1;
        if steps == HANGS {
            return Err(format!("jobs do not end: {:?}", store.jobs()));
        }
        if random.chance(32) {
            store.write_back_step(4);
        }
        if !volumes.is_empty() && random.chance(32) {
            let name = volumes[random.index(volumes.len())];
            let mut none = Looks::default();
            read_same(store, world, name, &values[name], "during a job", &mut none)?;
        }
    }
    for job in store.jobs() {
        if !matches!(job.phase, Phase::Done | Phase::Cancelled) {
            return Err(format!("a job did not end: {job:?}"));
        }
    }
    Ok(steps)
}

/// Reads a name again.
fn read_same(
    store: &Store,
    world: &World,
    name: &Name,
    values: &[Value],
    when: &str,
    looks: &mut Looks,
) -> Result<(), String> {
    let family = world.family(name).ok_or("a name without a family")?;
    let found = read(store, name, family, None, looks)?;
    if found.len() != values.len() {
        return Err(format!("{name:?} has another size {when}"));
    }
    let mut pairs = (0..).zip(values.iter().zip(&found));
    match pairs.find(|(_, (was, is))| was != is) {
        None => Ok(()),
        Some((sector, (was, is))) => Err(format!(
            "{name:?} reads differently {when}: sector {sector} holds {is:?}, and held {was:?}"
        )),
    }
}

/// The offline check finds nothing that is lost.
fn check_files(media: &SimMedia, state: &CatalogState) -> Result<(), String> {
    let files: Arc<dyn Media> = Arc::new(media.clone());
    let report = check_against(state, &files, CheckOptions::default())
        .map_err(|error| format!("the check fails: {error}"))?;
    let mut findings = report.findings.iter();
    match findings.find(|finding| finding.severity == Severity::Error) {
        Some(finding) => Err(format!("the check finds: {finding:?}")),
        None => Ok(()),
    }
}
