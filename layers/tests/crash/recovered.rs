//! A store found after a crash: opened as the daemon would, read whole, held against the oracle; and used again.

use std::collections::BTreeMap;
use std::sync::Arc;

use stratablk_layers::catalog::memory::{MemoryCatalog, MemoryDisk};
use stratablk_layers::file::Media;
use stratablk_layers::file::sim::{Random, SimMedia, Survival};
use stratablk_layers::store::{Store, StoreOptions, VolumeSource};
use stratablk_layers::units::Sector;
use stratablk_layers::volume::Operation;

use crate::disk::Queue;
use crate::oracle::{Disk, Value, stamp};

/// What is wrong with the store found on `media` with this catalog; empty if all is well.
pub fn examine(
    media: SimMedia,
    catalog: MemoryDisk,
    disks: &BTreeMap<String, Disk>,
    seed: u64,
) -> Vec<String> {
    let mut problems = Vec::new();
    if let Err(problem) = examine_once(&media, &catalog, disks, seed, &mut problems) {
        problems.push(problem);
    }
    problems
}

fn examine_once(
    media: &SimMedia,
    catalog: &MemoryDisk,
    disks: &BTreeMap<String, Disk>,
    seed: u64,
    problems: &mut Vec<String>,
) -> Result<(), String> {
    let store = open(media, catalog)?;
    for (name, disk) in disks {
        let found = read(&store, name, disk)?;
        problems.extend(disk.check(&found));
    }
    check_snapshots(&store, disks, problems)?;
    let mut random = Random::new(seed);
    if problems.is_empty() {
        match random.below(8) {
            0 | 1 => live_again(media, store, catalog, disks, &mut random, problems)?,
            2 => killed(media, store, catalog, disks, &mut random, problems)?,
            _ => {}
        }
    }
    Ok(())
}

/// A daemon that is killed while its host goes on, started again, asked for a flush, and then the power is cut: what was seen
/// and flushed after the start must be there, whoever wrote it.
fn killed(
    media: &SimMedia,
    store: Store,
    catalog: &MemoryDisk,
    disks: &BTreeMap<String, Disk>,
    random: &mut Random,
    problems: &mut Vec<String>,
) -> Result<(), String> {
    for (name, disk) in disks {
        let volume = store.open_volume(name).map_err(|error| error.to_string())?;
        let mut queue = Queue::new(volume.context(false).map_err(|error| error.to_string())?);
        for write in 0..4 {
            // Overwrites and first writes, never flushed by this daemon.
            let sector = random.below(disk.sectors());
            let bytes = stamp(disk.number, sector, (1 << 41) + write).to_vec();
            let (result, _) = queue.run(Operation::Write(Sector(sector)), bytes);
            result.map_err(|error| format!("{name} takes no writes: {error:?}"))?;
        }
    }
    drop(store);
    let store = open(media, catalog)?;
    let mut seen = BTreeMap::new();
    for (name, disk) in disks {
        let volume = store.open_volume(name).map_err(|error| error.to_string())?;
        let mut queue = Queue::new(volume.context(false).map_err(|error| error.to_string())?);
        seen.insert(name, queue.read_all(disk.number, disk.sectors())?);
        let (result, _) = queue.run(Operation::Flush, Vec::new());
        result.map_err(|error| format!("{name} does not flush: {error:?}"))?;
    }
    drop(store);
    let again = media.crash_image_with(Survival::Nothing);
    let store = open(&again, &catalog.crash_image())?;
    for (name, disk) in disks {
        let found = read(&store, name, disk)?;
        let seen = seen.get(name).into_iter().flatten();
        if let Some(sector) = seen.zip(&found).position(|(seen, found)| seen != found) {
            problems.push(format!(
                "after a kill and a flush a power cut changed {name} sector {sector}"
            ));
        }
    }
    Ok(())
}

/// Opens a store.
fn open(media: &SimMedia, catalog: &MemoryDisk) -> Result<Store, String> {
    let problem = |error| format!("the store does not open: {error}");
    let catalog = MemoryCatalog::open(catalog).map_err(problem)?;
    let files: Arc<dyn Media> = Arc::new(media.clone());
    Store::simulated(files, Box::new(catalog), StoreOptions::default()).map_err(problem)
}

/// Reads a volume whole.
fn read(store: &Store, name: &str, disk: &Disk) -> Result<Vec<Value>, String> {
    let volume = store
        .open_volume(name)
        .map_err(|error| format!("{name} does not open: {error}"))?;
    let context = volume.context(false).map_err(|error| error.to_string())?;
    Queue::new(context).read_all(disk.number, disk.sectors())
}

/// P3: acknowledged snapshots are there, others whole (on all disks of their group) or not at all.
fn check_snapshots(
    store: &Store,
    disks: &BTreeMap<String, Disk>,
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
            let clone = format!("clone-{name}-{snapshot}");
            let source = VolumeSource::Snapshot {
                volume: name.clone(),
                snapshot: snapshot.clone(),
            };
            store
                .create_volume(&clone, &source)
                .map_err(|error| format!("no clone of {name}@{snapshot}: {error}"))?;
            let values = read(store, &clone, disk)?;
            problems.extend(disk.check_snapshot(snapshot, &values));
        }
    }
    for members in groups.values() {
        if members.iter().any(|(_, found)| *found) && !members.iter().all(|(_, found)| *found) {
            problems.push(format!("a group snapshot is there in part: {members:?}"));
        }
    }
    Ok(())
}

/// Uses a recovered store: writes, flushes, cuts the power so that nothing unsynced survives, and reads again.
fn live_again(
    media: &SimMedia,
    store: Store,
    catalog: &MemoryDisk,
    disks: &BTreeMap<String, Disk>,
    random: &mut Random,
    problems: &mut Vec<String>,
) -> Result<(), String> {
    let mut expected = BTreeMap::new();
    for (name, disk) in disks {
        let volume = store.open_volume(name).map_err(|error| error.to_string())?;
        let mut queue = Queue::new(volume.context(false).map_err(|error| error.to_string())?);
        let mut values = queue.read_all(disk.number, disk.sectors())?;
        for round in 0..random.below(3) {
            for write in 0..1 + random.below(4) {
                let sector = random.below(disk.sectors());
                let id = (1 << 40) + round * 100 + write;
                let bytes = stamp(disk.number, sector, id).to_vec();
                let (result, _) = queue.run(Operation::Write(Sector(sector)), bytes);
                result
                    .map_err(|error| format!("{name} takes no writes after recovery: {error:?}"))?;
                values[sector as usize] = Value::Stamp(id);
            }
            let (result, _) = queue.run(Operation::Flush, Vec::new());
            result.map_err(|error| format!("{name} does not flush after recovery: {error:?}"))?;
        }
        expected.insert(name.clone(), values);
    }
    drop(store);
    let again = media.crash_image_with(Survival::Nothing);
    let store = open(&again, &catalog.crash_image())?;
    for (name, disk) in disks {
        let found = read(&store, name, disk)?;
        let durable = expected.get(name);
        // What was found once, unflushed, may be gone at the second cut; what was written and flushed since may not.
        for (sector, value) in found.iter().enumerate() {
            let wanted = durable.and_then(|values| values.get(sector)).copied();
            let rewritten = matches!(wanted, Some(Value::Stamp(id)) if id >= 1 << 40);
            if rewritten && wanted != Some(*value) {
                problems.push(format!(
                    "after a second cut {name} sector {sector} holds {value:?} instead of {wanted:?}"
                ));
            }
        }
        if problems.is_empty() {
            let old: Vec<Value> = found
                .iter()
                .zip(durable.into_iter().flatten())
                .enumerate()
                .map(|(sector, (value, wanted))| match wanted {
                    Value::Stamp(id) if *id >= 1 << 40 => disk.current(sector as u64),
                    _ => *value,
                })
                .collect();
            problems.extend(
                disk.check(&old)
                    .map(|what| format!("after a second cut: {what}")),
            );
        }
    }
    Ok(())
}
