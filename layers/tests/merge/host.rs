//! Jobs on real files: a guest writes and reads without a pause while layers below it are joined, on a thread of their own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use stratablk_layers::catalog::Way;
use stratablk_layers::check::rebuild_catalog;
use stratablk_layers::file::Media;
use stratablk_layers::file::host::{HostMedia, HostOptions};
use stratablk_layers::file::sim::Random;
use stratablk_layers::lifecycle::{DeleteOptions, Phase};
use stratablk_layers::store::{Selection, Store, StoreOptions, VolumeSource};
use stratablk_layers::units::{SECTOR_BYTES, Sector};
use stratablk_layers::volume::Operation;

use crate::disk::Queue;
use crate::oracle::{Value, stamp};
use crate::world::{NUMBER, same};

/// Sectors of the disk: 12 MiB.
const SECTORS: u64 = 24_576;
/// Nothing takes longer than this.
const LONG: Duration = Duration::from_secs(120);

/// A guest on a thread: writes and reads until it is told to stop. Returns what the disk holds.
fn guest(store: &Store, mut values: Vec<Value>, stop: &AtomicBool, done: &AtomicU64) -> Vec<Value> {
    let volume = store.open_volume("v").unwrap();
    let mut queue = Queue::new(volume.context(false).unwrap());
    let mut random = Random::new(99);
    let mut id = 1 << 20;
    while !stop.load(Ordering::Relaxed) {
        let start = random.below(SECTORS);
        let count = 1 + random.below((SECTORS - start).min(64));
        let range = start as usize..(start + count) as usize;
        if random.chance(100) {
            id += 1;
            let bytes = (start..start + count).flat_map(|sector| stamp(NUMBER, sector, id));
            let (result, _) = queue.run(Operation::Write(Sector(start)), bytes.collect());
            result.unwrap();
            values[range].fill(Value::Stamp(id));
        } else {
            let memory = vec![0; (count * SECTOR_BYTES) as usize];
            let (result, memory) = queue.run(Operation::Read(Sector(start)), memory);
            result.unwrap();
            let read = memory.chunks_exact(SECTOR_BYTES as usize);
            for ((sector, bytes), expected) in (start..).zip(read).zip(&values[range]) {
                let found = crate::oracle::unstamp(NUMBER, sector, bytes);
                assert_eq!(found.as_ref(), Ok(expected), "sector {sector}");
            }
        }
        done.fetch_add(1, Ordering::Relaxed);
    }
    values
}

/// Fills some runs of the disk.
fn fill(store: &Store, values: &mut [Value], id: u64, every: u64) {
    let volume = store.open_volume("v").unwrap();
    let mut queue = Queue::new(volume.context(false).unwrap());
    for start in (0..SECTORS).step_by(every as usize) {
        let count = (SECTORS - start).min(64);
        let bytes = (start..start + count).flat_map(|sector| stamp(NUMBER, sector, id));
        let (result, _) = queue.run(Operation::Write(Sector(start)), bytes.collect());
        result.unwrap();
        values[start as usize..(start + count) as usize].fill(Value::Stamp(id));
    }
    queue.run(Operation::Flush, Vec::new()).0.unwrap();
}

#[test]
fn a_guest_goes_on_while_layers_are_joined_below_it() {
    for direct_io in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let mut options = StoreOptions {
            direct_io,
            ..StoreOptions::default()
        };
        options.cache.bytes = 2 << 20;
        let store = Arc::new(Store::open(&dir.path().join("store"), options).unwrap());
        store.set_job_step_bytes(1 << 20);
        let size = SECTORS * SECTOR_BYTES;
        store.create_volume("v", &VolumeSource::Size(size)).unwrap();
        let mut values = vec![Value::Zero; SECTORS as usize];
        for (snapshot, every) in [("a", 80), ("b", 600), ("c", 100), ("d", 1000)] {
            fill(&store, &mut values, every, every);
            let selection = Selection::Volumes(vec!["v".into()]);
            store.snapshot(snapshot, &selection).unwrap();
        }
        let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
        let values = std::thread::scope(|scope| {
            let runner = scope.spawn(|| while store.run_jobs() {});
            let at_work = scope.spawn(|| guest(&store, values, &stop, &done));
            let deletions = [
                ("b", Some(Way::Down)),
                ("a", Some(Way::Up)),
                ("d", Some(Way::InPlace)),
                ("c", None),
            ];
            for (snapshot, way) in deletions {
                let before = done.load(Ordering::Relaxed);
                let options = DeleteOptions {
                    way,
                    ..DeleteOptions::default()
                };
                store.delete_snapshot("v", snapshot, options).unwrap();
                wait(|| {
                    let jobs = store.jobs();
                    assert!(
                        jobs.iter().all(|job| job.phase != Phase::Failed),
                        "{jobs:?}"
                    );
                    jobs.iter().all(|job| job.phase == Phase::Done)
                        && done.load(Ordering::Relaxed) > before + 10
                });
            }
            stop.store(true, Ordering::Relaxed);
            let values = at_work.join().unwrap();
            store.close();
            runner.join().unwrap();
            values
        });
        assert_eq!(store.volume_info("v").unwrap().depth, 1);
        store.finish().unwrap();
        drop(store);
        let store = Store::open(&dir.path().join("store"), StoreOptions::default()).unwrap();
        let volume = store.open_volume("v").unwrap();
        let mut queue = Queue::new(volume.context(true).unwrap());
        let found = queue.read_in_pieces(NUMBER, SECTORS, 2048).unwrap();
        same("v", &found, &values);
    }
}

#[test]
fn a_rate_is_kept_and_lifted() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store"), StoreOptions::default()).unwrap();
    let size = SECTORS * SECTOR_BYTES;
    store.create_volume("v", &VolumeSource::Size(size)).unwrap();
    let mut values = vec![Value::Zero; SECTORS as usize];
    fill(&store, &mut values, 7, 64);
    let selection = Selection::Volumes(vec!["v".into()]);
    store.snapshot("a", &selection).unwrap();
    let options = DeleteOptions {
        way: Some(Way::Up),
        ..DeleteOptions::default()
    };
    store.delete_snapshot("v", "a", options).unwrap();
    let job = store.jobs().last().unwrap().id;
    // A byte a second: nothing happens within the time of this test, but for the first pieces.
    store.limit_job(job, Some(1)).unwrap();
    std::thread::scope(|scope| {
        let runner = scope.spawn(|| while store.run_jobs() {});
        wait(|| store.job(job).unwrap().bytes_done > 0);
        assert_ne!(store.job(job).unwrap().phase, Phase::Done);
        store.limit_job(job, None).unwrap();
        wait(|| store.job(job).unwrap().phase == Phase::Done);
        store.close();
        runner.join().unwrap();
    });
    let volume = store.open_volume("v").unwrap();
    let mut queue = Queue::new(volume.context(true).unwrap());
    let found = queue.read_in_pieces(NUMBER, SECTORS, 2048).unwrap();
    same("v", &found, &values);
}

#[test]
fn a_deleted_name_does_not_come_back_while_its_layer_is_taken_apart() {
    for (way, restarted) in [
        (Way::Up, false),
        (Way::Down, false),
        (Way::InPlace, false),
        (Way::Down, true),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let open = || {
            let store = Store::open(&path, StoreOptions::default()).unwrap();
            store.set_job_step_bytes(1 << 16);
            store
        };
        let mut store = open();
        let size = SECTORS * SECTOR_BYTES;
        store.create_volume("v", &VolumeSource::Size(size)).unwrap();
        let mut values = vec![Value::Zero; SECTORS as usize];
        let selection = Selection::Volumes(vec!["v".into()]);
        fill(&store, &mut values, 5, 640);
        store.snapshot("first", &selection).unwrap();
        let first = values.clone();
        fill(&store, &mut values, 6, 256);
        store.snapshot("gone", &selection).unwrap();
        fill(&store, &mut values, 7, 512);
        if way != Way::InPlace {
            store.snapshot("last", &selection).unwrap();
        }
        let options = DeleteOptions {
            way: Some(way),
            ..DeleteOptions::default()
        };
        store.delete_snapshot("v", "gone", options).unwrap();
        let job = store.jobs().last().unwrap().id;
        while store.job(job).unwrap().bytes_done == 0 {
            assert!(store.job_step());
        }
        if restarted {
            store.finish().unwrap();
            drop(store);
            store = open();
            assert!(store.job_step());
        }
        assert_ne!(store.job(job).unwrap().phase, Phase::Done);
        store.finish().unwrap();
        drop(store);
        let media: Arc<dyn Media> =
            Arc::new(HostMedia::new(path.clone(), HostOptions { io_uring: false }).unwrap());
        rebuild_catalog(&path, &media).unwrap();
        let store = open();
        let names: Vec<_> = store.snapshots(None).unwrap();
        let names: Vec<_> = names.iter().map(|row| row.name.as_str()).collect();
        let expected: &[&str] = match way {
            Way::InPlace => &["first"],
            _ => &["first", "last"],
        };
        assert_eq!(names, expected, "{way:?}");
        store
            .create_volume(
                "then",
                &VolumeSource::Snapshot {
                    volume: "v".into(),
                    snapshot: "first".into(),
                },
            )
            .unwrap();
        for (name, values) in [("v", &values), ("then", &first)] {
            let volume = store.open_volume(name).unwrap();
            let mut queue = Queue::new(volume.context(true).unwrap());
            let found = queue.read_in_pieces(NUMBER, SECTORS, 2048).unwrap();
            same(name, &found, values);
        }
        while store.job_step() {}
        let volume = store.open_volume("v").unwrap();
        let mut queue = Queue::new(volume.context(true).unwrap());
        let found = queue.read_in_pieces(NUMBER, SECTORS, 2048).unwrap();
        same("v", &found, &values);
    }
}

/// Waits until something is so.
fn wait(mut so: impl FnMut() -> bool) {
    let until = Instant::now() + LONG;
    while !so() {
        assert!(Instant::now() < until, "it takes too long");
        std::thread::yield_now();
    }
}

#[test]
fn a_sparse_image_stays_sparse() {
    use std::os::unix::fs::{FileExt, MetadataExt};

    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.raw");
    let file = std::fs::File::create(&image).unwrap();
    file.set_len(64 << 20).unwrap();
    let bytes: Vec<u8> = (2048..2048 + 512)
        .flat_map(|sector| stamp(NUMBER, sector, 1))
        .collect();
    file.write_all_at(&bytes, 2048 * SECTOR_BYTES).unwrap();
    // Written, and zero.
    file.write_all_at(&vec![0; 1 << 20], 32 << 20).unwrap();
    file.sync_all().unwrap();
    let store = Store::open(&dir.path().join("store"), StoreOptions::default()).unwrap();
    let job = store.import("v", &image).unwrap().id;
    while store.job_step() {}
    let job = store.job(job).unwrap();
    assert_eq!(job.phase, Phase::Done, "{job:?}");
    let layers = std::fs::read_dir(dir.path().join("store/layers")).unwrap();
    let data = layers.map(|layer| layer.unwrap().path().join("data"));
    let allocated: u64 = data
        .map(|data| data.metadata().unwrap().blocks() * 512)
        .sum();
    assert!(allocated < 1 << 20, "{allocated} bytes");
    let volume = store.open_volume("v").unwrap();
    let mut queue = Queue::new(volume.context(true).unwrap());
    let found = queue
        .read_in_pieces(NUMBER, (64 << 20) / SECTOR_BYTES, 2048)
        .unwrap();
    let mut values = vec![Value::Zero; found.len()];
    values[2048..2048 + 512].fill(Value::Stamp(1));
    same("v", &found, &values);
}

#[test]
fn an_image_that_another_daemon_uses_is_not_written_to() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.raw");
    let bytes = usize::try_from(SECTORS * SECTOR_BYTES).unwrap();
    std::fs::write(&image, vec![1; bytes]).unwrap();
    let open = |name: &str| Store::open(&dir.path().join(name), StoreOptions::default()).unwrap();
    let (one, mut two) = (open("one"), open("two"));
    for store in [&one, &two] {
        let base = VolumeSource::Base(image.clone());
        store.create_volume("v", &base).unwrap();
    }
    let mut values = vec![Value::Zero; SECTORS as usize];
    fill(&one, &mut values, 7, 64);
    let selection = Selection::Volumes(vec!["v".into()]);
    one.snapshot("s", &selection).unwrap();
    one.set_job_step_bytes(1 << 20);
    let options = DeleteOptions {
        into_base: true,
        ..DeleteOptions::default()
    };
    let busy = |result: Result<(), stratablk_layers::Error>| {
        let error = result.unwrap_err();
        assert!(
            matches!(error, stratablk_layers::Error::Busy { .. }),
            "{error}"
        );
        assert!(error.to_string().contains("image.raw"), "{error}");
    };
    let delete = || one.delete_snapshot("v", "s", options);
    // Whether the one that would write has it open itself or not.
    let used = two.open_volume("v").unwrap();
    busy(delete().map(drop));
    let own = one.open_volume("v").unwrap();
    busy(delete().map(drop));
    // Several may read it.
    assert!(
        open("three")
            .create_volume("v", &VolumeSource::Base(image.clone()))
            .is_ok()
    );
    drop(used);
    drop(two);
    two = open("two");
    let job = delete().unwrap().jobs[0];
    // One that comes before the job has begun stops it.
    let used = two.open_volume("v").unwrap();
    while one.job_step() {}
    let failed = one.job(job).unwrap();
    assert_eq!(failed.phase, Phase::Failed);
    assert!(failed.error.unwrap().contains("image.raw"));
    drop(used);
    drop(two);
    two = open("two");
    one.resume_job(job).unwrap();
    while one.job(job).unwrap().bytes_done == 0 {
        assert!(one.job_step());
    }
    // Under way: nobody else begins to use it.
    busy(two.open_volume("v").map(drop));
    let base = VolumeSource::Base(image.clone());
    busy(two.create_volume("late", &base).map(drop));
    while one.job_step() {}
    assert_eq!(one.job(job).unwrap().phase, Phase::Done);
    // Others may read what it is now, while the one that wrote it does.
    two.create_volume("late", &base).unwrap();
    two.open_volume("late").unwrap();
    assert!(two.open_volume("v").is_err());
    drop(own);
}
