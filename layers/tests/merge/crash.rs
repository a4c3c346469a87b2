//! The power is cut, or the daemon killed, at every step of a job: what is found reads right, and the job ends afterwards.

use std::path::Path;
use std::sync::{Arc, Mutex};

use stratablk_layers::cache::arena::Arena;
use stratablk_layers::catalog::memory::{CommitPoint, MemoryCatalog, MemoryDisk};
use stratablk_layers::file::Media;
use stratablk_layers::file::sim::{Random, SimMedia};
use stratablk_layers::lifecycle::Phase;
use stratablk_layers::store::{Store, StoreOptions, VolumeSource};

use crate::disk::Queue;
use crate::oracle::{Promise, Value};
use crate::world::{Known, NUMBER, World};

/// What a crash leaves.
struct Found {
    /// The files.
    media: SimMedia,
    /// The catalog.
    catalog: MemoryDisk,
    /// The cache's arena.
    arena: Option<Arena>,
    /// How the store is opened.
    options: StoreOptions,
    /// What must be there.
    promise: Promise,
}

/// What was seen.
#[derive(Default)]
pub struct Seen {
    /// Images that were looked at.
    pub images: u64,
    /// What was wrong.
    pub violations: Vec<String>,
}

/// Looks at every crash point of the world from now on, at one image of so many in 256.
pub fn watch(world: &World, seed: u64, share: u64) -> Arc<Mutex<Seen>> {
    let seen = Arc::new(Mutex::new(Seen::default()));
    let marker = world.media.clone();
    world.durable.set_observer(move |point| match point {
        CommitPoint::Before => marker.mark("before a commit of the catalog"),
        CommitPoint::After => marker.mark("after a commit of the catalog"),
    });
    let (known, store) = (Arc::clone(&world.known), Arc::downgrade(world.store()));
    let (catalog, options) = (world.durable.clone(), world.options.clone());
    let mut random = Random::new(seed ^ 0xcafe);
    let results = Arc::clone(&seen);
    world.media.set_observer(Box::new(move |media, point| {
        if !random.chance(share) || !results.lock().unwrap().violations.is_empty() {
            return;
        }
        let choice = random.number();
        let arena = (choice & 1 == 0)
            .then(|| store.upgrade())
            .flatten()
            .map(|store| store.cache_arena().copy().unwrap());
        let (media, promise) = if arena.is_some() {
            (media.kill_image(choice), Promise::Acknowledged)
        } else {
            (media.crash_image(choice), Promise::Flushed)
        };
        let found = Found {
            media,
            catalog: catalog.crash_image(),
            arena,
            options: options.clone(),
            promise,
        };
        let looked = look(found, &known.lock().unwrap());
        let mut seen = results.lock().unwrap();
        seen.images += 1;
        if let Err(what) = looked {
            seen.violations.push(format!(
                "seed {seed}, point {} ({:?} {}), {promise:?}: {what}",
                point.number, point.event, point.path
            ));
        }
    }));
    seen
}

/// Opens what was found, reads it, carries out its jobs and reads it again.
fn look(found: Found, known: &Known) -> Result<(), String> {
    let text = |error: stratablk_layers::Error| error.to_string();
    let raw: Arc<dyn Media> = Arc::new(found.media.clone());
    // Whatever checksums there are, they are those of the data.
    if let Some(what) = crate::scrub::look_at_sums(&found.catalog.state(), &raw, false) {
        return Err(what);
    }
    let catalog = Box::new(MemoryCatalog::open(&found.catalog).map_err(text)?);
    let files: Arc<dyn Media> = Arc::new(found.media.clone());
    let store = match found.arena {
        None => Store::simulated(files, catalog, found.options),
        Some(arena) => Store::simulated_after_kill(files, catalog, found.options, arena),
    };
    let store = store.map_err(text)?;
    store.set_job_step_bytes(4096);
    let mut first = Vec::new();
    for (name, disk) in &known.disks {
        let values = read(&store, name, disk.sectors())?;
        if let Some(problem) = disk.check(&values, found.promise) {
            return Err(problem);
        }
        first.push((name, values));
    }
    check_snapshots(&store, known)?;
    let mut turns = 0;
    while store.job_step() {
        turns += 1;
        if turns > 20_000 {
            return Err(format!("jobs hang: {:?}", store.jobs()));
        }
    }
    for job in store.jobs() {
        if !matches!(job.phase, Phase::Done | Phase::Cancelled) {
            return Err(format!("{job:?}"));
        }
    }
    for (name, before) in first {
        let values = read(&store, name, before.len() as u64)?;
        if let Some(sector) = values
            .iter()
            .zip(&before)
            .position(|(now, then)| now != then)
        {
            return Err(format!(
                "{name}: sector {sector} was {:?} and is {:?} after the job",
                before[sector], values[sector]
            ));
        }
    }
    check_snapshots(&store, known)?;
    if let Some(what) = crate::scrub::look_at_sums(&found.catalog.state(), &raw, true) {
        return Err(format!("after the jobs: {what}"));
    }
    let rows = found.catalog.state();
    let there = found
        .media
        .list(Path::new("layers"))
        .map_err(|error| error.to_string())?;
    if there.len() != rows.layers.len() || !rows.doomed.is_empty() {
        return Err(format!(
            "{} directories, {} layers",
            there.len(),
            rows.layers.len()
        ));
    }
    Ok(())
}

/// Reads a volume.
fn read(store: &Store, name: &str, sectors: u64) -> Result<Vec<Value>, String> {
    let volume = store.open_volume(name);
    let volume = volume.map_err(|error| format!("{name} does not open: {error}"))?;
    let mut queue = Queue::new(volume.context(true).map_err(|error| error.to_string())?);
    queue.read_all(NUMBER, sectors)
}

/// Holds the snapshots against what they must be.
fn check_snapshots(store: &Store, known: &Known) -> Result<(), String> {
    for ((volume, snapshot), expected) in &known.snapshots {
        let source = VolumeSource::Snapshot {
            volume: volume.clone(),
            snapshot: snapshot.clone(),
        };
        let created = store.create_volume("look", &source);
        created.map_err(|error| format!("{volume}@{snapshot}: {error}"))?;
        let values = read(store, "look", expected.len() as u64)?;
        store
            .delete_volume("look")
            .map_err(|error| error.to_string())?;
        if let Some(sector) = values.iter().zip(expected).position(|(is, was)| is != was) {
            return Err(format!(
                "{volume}@{snapshot}: sector {sector} is {:?}, was {:?}",
                values[sector], expected[sector]
            ));
        }
    }
    Ok(())
}
