//! What an operator and a host can do to the cache of a store: deletions that fail, full disks, volumes that have failed,
//! caches of another time.
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

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};

use disk::Queue;
use oracle::{Value, stamp};
use stratablk_layers::cache::CacheOptions;
use stratablk_layers::catalog::CatalogState;
use stratablk_layers::catalog::memory::{MemoryCatalog, MemoryDisk};
use stratablk_layers::file::Media;
use stratablk_layers::file::sim::{Fault, FaultEffect, FaultPoint, SimMedia};
use stratablk_layers::store::{Store, StoreOptions, VolumeSource};
use stratablk_layers::units::{SECTOR_BYTES, Sector, SectorRange, StoreId};
use stratablk_layers::volume::Operation;
use tempfile::TempDir;

/// A simulated store with its medium and its catalog's.
fn simulated(frames: u64) -> (Store, SimMedia, MemoryDisk) {
    let media = SimMedia::new(1);
    let disk = MemoryDisk::new(CatalogState::empty(StoreId(uuid::Uuid::from_u128(5))));
    let store = reopen(&media, &disk, frames);
    (store, media, disk)
}

/// A store on these media.
fn reopen(media: &SimMedia, disk: &MemoryDisk, frames: u64) -> Store {
    let files: Arc<dyn Media> = Arc::new(media.clone());
    let catalog = MemoryCatalog::open(disk).unwrap();
    let cache = CacheOptions {
        bytes: frames * 4096,
        ..CacheOptions::default()
    };
    let options = StoreOptions {
        cache,
        ..StoreOptions::default()
    };
    Store::simulated(files, Box::new(catalog), options).unwrap()
}

/// A queue of a volume.
fn queue(store: &Store, name: &str) -> Queue {
    Queue::new(store.open_volume(name).unwrap().context(false).unwrap())
}

/// Stamps of write `id` for a run of sectors.
fn stamps(start: u64, count: u64, id: u64) -> Vec<u8> {
    (start..start + count)
        .flat_map(|sector| stamp(7, sector, id))
        .collect()
}

/// Writes the stamp of write `id` to a run of sectors.
fn write(queue: &mut Queue, start: u64, count: u64, id: u64) {
    let bytes = stamps(start, count, id);
    queue.run(Operation::Write(Sector(start)), bytes).0.unwrap();
}

#[test]
fn a_volume_that_could_not_be_deleted_has_all_that_was_written_to_it() {
    let (store, media, disk) = simulated(64);
    store
        .create_volume("v", &VolumeSource::Size(16 * SECTOR_BYTES))
        .unwrap();
    let mut v = queue(&store, "v");
    write(&mut v, 0, 16, 1);
    v.run(Operation::Flush, Vec::new()).0.unwrap();
    write(&mut v, 0, 8, 2);
    drop(v);
    disk.fail_next_commit();
    store.delete_volume("v").unwrap_err();
    let mut v = queue(&store, "v");
    assert_eq!(v.read_all(7, 16).unwrap()[0], Value::Stamp(2));
    write(&mut v, 0, 8, 3);
    v.run(Operation::Flush, Vec::new()).0.unwrap();
    let after = reopen(&media.crash_image(1), &disk.crash_image(), 64);
    let values = queue(&after, "v").read_all(7, 16).unwrap();
    assert_eq!(values[..8], [Value::Stamp(3); 8], "flushed");
}

#[test]
fn a_discard_on_a_full_disk_does_not_fail_the_volume_for_good() {
    let (store, media, _) = simulated(64);
    store
        .create_volume("v", &VolumeSource::Size(64 * SECTOR_BYTES))
        .unwrap();
    let mut v = queue(&store, "v");
    write(&mut v, 0, 64, 1);
    v.run(Operation::Flush, Vec::new()).0.unwrap();
    media.inject(Fault {
        point: FaultPoint::Write,
        name: Some("map".into()),
        after: 0,
        times: 1,
        effect: FaultEffect::NoSpace,
    });
    let range = SectorRange {
        start: Sector(0),
        count: 64,
    };
    v.run(Operation::Discard(range), Vec::new()).0.unwrap_err();
    assert_eq!(store.volume_info("v").unwrap().failure, None);
    write(&mut v, 0, 8, 2);
}

#[test]
fn a_volume_that_has_failed_takes_no_frames_from_others() {
    let (store, media, _) = simulated(16);
    for name in ["bad", "good"] {
        store
            .create_volume(name, &VolumeSource::Size(256 * SECTOR_BYTES))
            .unwrap();
    }
    let (mut bad, mut good) = (queue(&store, "bad"), queue(&store, "good"));
    for cluster in 0..8 {
        write(&mut bad, cluster * 8, 8, 1);
    }
    media.inject(Fault {
        point: FaultPoint::SyncData,
        name: Some("data".into()),
        after: 0,
        times: 1,
        effect: FaultEffect::Error,
    });
    bad.run(Operation::Flush, Vec::new()).0.unwrap_err();
    let bytes = stamps(0, 8, 2);
    let help = || store.write_back_step(64);
    good.run_helped(Operation::Write(Sector(0)), bytes, &help)
        .0
        .unwrap();
}

/// Writes over sectors that are in a clean frame, and past the cache: as many frames are dirty as may be, and the host had no
/// space for them. The daemon is killed at each step of that. Returns what the next daemon reads with the cache and what the
/// one after it reads without.
fn killed_while_writing_past_the_cache() -> Vec<(Value, Value)> {
    let options = StoreOptions {
        cache: CacheOptions {
            bytes: 16 * 4096,
            dirty_bytes: Some(2 * 4096),
            ..CacheOptions::default()
        },
        ..StoreOptions::default()
    };
    let media = SimMedia::new(1);
    let disk = MemoryDisk::new(CatalogState::empty(StoreId(uuid::Uuid::from_u128(5))));
    let catalog = Box::new(MemoryCatalog::open(&disk).unwrap());
    let files: Arc<dyn Media> = Arc::new(media.clone());
    let store = Arc::new(Store::simulated(files, catalog, options.clone()).unwrap());
    store
        .create_volume("v", &VolumeSource::Size(256 * SECTOR_BYTES))
        .unwrap();
    let mut v = queue(&store, "v");
    write(&mut v, 0, 8, 1);
    v.run(Operation::Flush, Vec::new()).0.unwrap();
    for cluster in 4..6 {
        write(&mut v, cluster * 8, 8, 1);
    }
    media.inject(Fault {
        point: FaultPoint::Write,
        name: Some("data".into()),
        after: 0,
        times: 1,
        effect: FaultEffect::NoSpace,
    });
    let (watched, found) = (Arc::downgrade(&store), Arc::new(Mutex::new(Vec::new())));
    let seen = Arc::clone(&found);
    media.set_observer(Box::new(move |media, point| {
        let Some(store) = watched.upgrade() else {
            return;
        };
        let (media, disk) = (media.kill_image(point.number), disk.crash_image());
        let arena = store.cache_arena().copy().unwrap();
        let files: Arc<dyn Media> = Arc::new(media.clone());
        let catalog = Box::new(MemoryCatalog::open(&disk).unwrap());
        let next = Store::simulated_after_kill(files, catalog, options.clone(), arena).unwrap();
        let first = queue(&next, "v").read_all(7, 8).unwrap();
        drop(next);
        let then = reopen(&media.kill_image(point.number), &disk.crash_image(), 16);
        let second = queue(&then, "v").read_all(7, 8).unwrap();
        seen.lock().unwrap().push((first[0], second[0]));
    }));
    let bytes = stamps(0, 8, 2);
    let help = || store.write_back_step(64);
    v.run_helped(Operation::Write(Sector(0)), bytes, &help)
        .0
        .unwrap();
    media.clear_observer();
    assert_eq!(v.read_all(7, 8).unwrap()[0], Value::Stamp(2));
    std::mem::take(&mut *found.lock().unwrap())
}

#[test]
fn what_is_read_after_a_kill_does_not_change_by_itself() {
    let found = killed_while_writing_past_the_cache();
    assert!(found.contains(&(Value::Stamp(1), Value::Stamp(1))));
    assert!(found.contains(&(Value::Stamp(2), Value::Stamp(2))));
    assert!(found.iter().all(|(first, then)| first == then), "{found:?}");
}

#[test]
#[cfg(feature = "canary")]
fn canary_a_clean_frame_of_a_file_that_was_being_written_is_noticed() {
    use stratablk_layers::canary::{Canary, set};
    set(Some(Canary::TrustPast));
    let old = (Value::Stamp(1), Value::Stamp(2));
    assert!(killed_while_writing_past_the_cache().contains(&old));
}

/// A store on real files in a directory, with its cache in another one in there.
fn on_files(dir: &Path, cache: &str) -> Store {
    let cache = CacheOptions {
        bytes: 1 << 20,
        place: Some(dir.join(cache)),
        ..CacheOptions::default()
    };
    let options = StoreOptions {
        cache,
        ..StoreOptions::default()
    };
    Store::open(&dir.join("store"), options).unwrap()
}

/// A directory with two in it, `a` and `b`, that a cache may be in.
fn with_two_caches() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a", "b"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    dir
}

/// A new volume `v` whose first 8 sectors are written, and in the cache only.
fn written(store: &Store) -> Queue {
    store
        .create_volume("v", &VolumeSource::Size(1 << 20))
        .unwrap();
    let mut v = queue(store, "v");
    write(&mut v, 0, 8, 1);
    v
}

#[test]
fn a_cache_of_before_another_one_was_used_brings_nothing_old_back() {
    let dir = with_two_caches();
    let open = |cache: &str| on_files(dir.path(), cache);
    let store = open("a");
    let v = written(&store);
    // What a kill at this instant would leave.
    let arena = store.cache_arena().path().unwrap().to_owned();
    let left = dir.path().join("left");
    fs::copy(&arena, &left).unwrap();
    drop(v);
    store.finish().unwrap();
    drop(store);
    fs::rename(&left, &arena).unwrap();
    // The operator tries another directory, and comes back.
    let store = open("b");
    let mut v = queue(&store, "v");
    write(&mut v, 0, 8, 2);
    v.run(Operation::Flush, Vec::new()).0.unwrap();
    drop(v);
    store.finish().unwrap();
    drop(store);
    let store = open("a");
    let values = queue(&store, "v").read_all(7, 8).unwrap();
    assert_eq!(values, [Value::Stamp(2); 8], "flushed");
    // Thrown away is nothing that nobody has looked at.
    let aside = arena.with_extension("stale");
    assert!(aside.exists());
    let told = aside.display().to_string();
    let notes = store.notes();
    assert!(notes.iter().any(|note| note.contains(&told)), "{notes:?}");
}

#[test]
fn a_cache_is_found_however_its_directory_is_written() {
    let dir = with_two_caches();
    let open = |cache: &str| on_files(dir.path(), cache);
    let store = open("a");
    let v = written(&store);
    // Written and not flushed: the next one finds it in the cache only, as after a kill.
    drop(v);
    drop(store);
    let store = open("b/../a");
    let values = queue(&store, "v").read_all(7, 8).unwrap();
    assert_eq!(values, [Value::Stamp(1); 8]);
}
