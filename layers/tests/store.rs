//! The store on real files: what a user of the library does with it, and what must be refused.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests: small numbers, and a panic is the verdict"
)]
#![expect(
    dead_code,
    reason = "shares the guest and the oracle of the crash tests and uses a part of them"
)]

#[path = "crash/disk.rs"]
mod disk;
#[path = "crash/oracle.rs"]
mod oracle;

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use disk::Queue;
use oracle::{Value, stamp};
use stratablk_layers::Error;
use stratablk_layers::file::sim::Random;
use stratablk_layers::store::{Selection, Store, StoreOptions, VolumeSource};
use stratablk_layers::units::{SECTOR_BYTES, Sector, SectorRange};
use stratablk_layers::volume::{Durability, Operation, RequestError};

/// A store in a folder, with these options.
fn open(dir: &Path, options: &StoreOptions) -> Store {
    Store::open(&dir.join("store"), options.clone()).unwrap()
}

/// Every engine that the host can offer.
fn engines() -> [StoreOptions; 3] {
    [
        StoreOptions::default(),
        StoreOptions {
            no_io_uring: true,
            ..StoreOptions::default()
        },
        StoreOptions {
            direct_io: true,
            ..StoreOptions::default()
        },
    ]
}

/// A raw image of stamped sectors.
fn base(dir: &Path, sectors: u64) -> std::path::PathBuf {
    let path = dir.join("base.raw");
    let bytes: Vec<u8> = (0..sectors)
        .flat_map(|sector| stamp(7, sector, 1))
        .collect();
    fs::write(&path, bytes).unwrap();
    path
}

/// A queue of a volume.
fn queue(store: &Store, name: &str) -> Queue {
    Queue::new(store.open_volume(name).unwrap().context(false).unwrap())
}

/// Writes the stamp of write `id` to a run of sectors.
fn write(queue: &mut Queue, start: u64, count: u64, id: u64) {
    let bytes = (start..start + count)
        .flat_map(|sector| stamp(7, sector, id))
        .collect();
    queue.run(Operation::Write(Sector(start)), bytes).0.unwrap();
}

/// Takes a snapshot of one volume.
fn snapshot(store: &Store, volume: &str, name: &str) {
    store
        .snapshot(name, &Selection::Volumes(vec![volume.to_owned()]))
        .unwrap();
}

/// The source of a clone.
fn from(volume: &str, snapshot: &str) -> VolumeSource {
    VolumeSource::Snapshot {
        volume: volume.into(),
        snapshot: snapshot.into(),
    }
}

#[test]
fn snapshots_and_clones_hold_what_was_there_and_the_base_never_changes() {
    for options in engines() {
        let dir = tempfile::tempdir().unwrap();
        let image = base(dir.path(), 100);
        let before = fs::read(&image).unwrap();
        let mut expected = vec![Value::Stamp(1); 100];
        {
            let store = open(dir.path(), &options);
            store
                .create_volume("web", &VolumeSource::Base(image.clone()))
                .unwrap();
            let mut web = queue(&store, "web");
            write(&mut web, 3, 10, 2);
            expected[3..13].fill(Value::Stamp(2));
            snapshot(&store, "web", "first");
            let at_first = expected.clone();
            write(&mut web, 8, 1, 3);
            expected[8] = Value::Stamp(3);
            let range = SectorRange {
                start: Sector(15),
                count: 20,
            };
            web.run(Operation::Discard(range), Vec::new()).0.unwrap();
            expected[15..35].fill(Value::Zero);
            write(&mut web, 17, 2, 4);
            expected[17..19].fill(Value::Stamp(4));
            snapshot(&store, "web", "second");
            write(&mut web, 20, 1, 5);
            expected[20] = Value::Stamp(5);
            assert_eq!(web.read_all(7, 100).unwrap(), expected);
            store.create_volume("old", &from("web", "first")).unwrap();
            assert_eq!(queue(&store, "old").read_all(7, 100).unwrap(), at_first);
            web.run(Operation::Flush, Vec::new()).0.unwrap();
        }
        let store = open(dir.path(), &options);
        assert_eq!(
            queue(&store, "web").read_all(7, 100).unwrap(),
            expected,
            "after a restart"
        );
        assert_eq!(store.volume_info("web").unwrap().depth, 4);
        assert_eq!(store.volume_info("web").unwrap().snapshots, 2);
        assert_eq!(store.tree(None).unwrap().len(), 5);
        assert_eq!(fs::read(&image).unwrap(), before);
    }
}

#[test]
fn random_requests_on_a_deep_chain_agree_with_a_flat_copy() {
    for (seed, options) in (1..).zip(engines()) {
        let dir = tempfile::tempdir().unwrap();
        let mut random = Random::new(seed);
        let sectors = 1000;
        let image = base(dir.path(), sectors);
        let mut store = open(dir.path(), &options);
        store
            .create_volume("v", &VolumeSource::Base(image))
            .unwrap();
        let mut expected = vec![Value::Stamp(1); sectors as usize];
        let mut copies: HashMap<String, Vec<Value>> = HashMap::new();
        for round in 0..40 {
            let mut v = queue(&store, "v");
            for step in 0..25 {
                let start = random.below(sectors);
                let count = 1 + random.below((sectors - start).min(64));
                let (from, to) = (start as usize, (start + count) as usize);
                let range = SectorRange {
                    start: Sector(start),
                    count,
                };
                if random.chance(180) {
                    let id = 2 + round * 100 + step;
                    write(&mut v, start, count, id);
                    expected[from..to].fill(Value::Stamp(id));
                } else {
                    let unmap = random.chance(128);
                    v.run(Operation::WriteZeroes { range, unmap }, Vec::new())
                        .0
                        .unwrap();
                    expected[from..to].fill(Value::Zero);
                }
            }
            assert_eq!(v.read_all(7, sectors).unwrap(), expected);
            let name = format!("s{round}");
            snapshot(&store, "v", &name);
            copies.insert(name, expected.clone());
            if random.chance(60) {
                drop(v);
                drop(store);
                store = open(dir.path(), &options);
            }
        }
        for (name, copy) in copies {
            store.create_volume("c", &from("v", &name)).unwrap();
            assert_eq!(
                queue(&store, "c").read_all(7, sectors).unwrap(),
                copy,
                "{name}"
            );
            store.delete_volume("c").unwrap();
        }
    }
}

#[test]
fn flushes_of_many_queues_all_end_and_snapshots_stop_none_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), &StoreOptions::default());
    store
        .create_volume("v", &VolumeSource::Size(1 << 20))
        .unwrap();
    let volume = store.open_volume("v").unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..3u64)
            .map(|worker| {
                let mut queue = Queue::new(volume.context(false).unwrap());
                let stop = &stop;
                scope.spawn(move || {
                    let mut id = 2;
                    while !stop.load(Ordering::Relaxed) {
                        // Sectors of its own, but clusters shared with the other workers.
                        let sector = (id % 200) * 3 + worker;
                        write(&mut queue, sector, 1, id);
                        queue.run(Operation::Flush, Vec::new()).0.unwrap();
                        let (result, bytes) = queue.run(
                            Operation::Read(Sector(sector)),
                            vec![0; SECTOR_BYTES as usize],
                        );
                        result.unwrap();
                        assert_eq!(bytes, stamp(7, sector, id));
                        id += 1;
                    }
                    id - 2
                })
            })
            .collect();
        for number in 0..50 {
            snapshot(&store, "v", &format!("s{number}"));
        }
        stop.store(true, Ordering::Relaxed);
        let rounds: Vec<u64> = workers
            .into_iter()
            .map(|worker| worker.join().unwrap())
            .collect();
        assert!(rounds.iter().all(|rounds| *rounds > 0), "{rounds:?}");
    });
    assert_eq!(store.volume_info("v").unwrap().depth, 51);
}

#[test]
fn a_write_of_many_segments_and_a_read_of_many_layers_work() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), &StoreOptions::default());
    store
        .create_volume("v", &VolumeSource::Size(4 << 20))
        .unwrap();
    let mut v = queue(&store, "v");
    let memory: Vec<u8> = (0..8192).flat_map(|sector| stamp(7, sector, 9)).collect();
    let cuts: Vec<usize> = (1..2000).map(|cut| cut * 2000 + 3).collect();
    v.context().begin_batch();
    v.submit(
        Operation::Write(Sector(0)),
        Durability::OnCompletion,
        memory,
        &cuts,
        1,
    );
    v.context().kick();
    let ended = loop {
        if let Some(ended) = v.poll().pop() {
            break ended;
        }
        v.context().wait(-1).unwrap();
    };
    ended.1.unwrap();
    for layer in 0..20 {
        snapshot(&store, "v", &format!("s{layer}"));
        for piece in 0..100 {
            write(&mut v, (piece * 83 + layer * 7) % 8192, 1, 10 + layer);
        }
    }
    let values = v.read_all(7, 8192).unwrap();
    assert!(
        values
            .iter()
            .all(|value| matches!(value, Value::Stamp(9..30)))
    );
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), &StoreOptions::default());
    let files = |path: &Path| fs::read_dir(path).unwrap().count();
    let layers = dir.path().join("store/layers");
    store
        .create_volume("v", &VolumeSource::Size(1 << 20))
        .unwrap();
    let known = files(&layers);
    let odd = dir.path().join("odd.raw");
    fs::write(&odd, vec![1; 1000]).unwrap();
    let cases: [(&str, VolumeSource, &str); 8] = [
        ("v", VolumeSource::Size(512), "exists already"),
        ("a/b", VolumeSource::Size(512), "name"),
        ("w", VolumeSource::Size(1000), "multiple of 512"),
        ("w", VolumeSource::Size(0), "multiple of 512"),
        ("w", VolumeSource::Size(1 << 60), "largest disk"),
        (
            "w",
            VolumeSource::Base(dir.path().join("missing.raw")),
            "missing.raw",
        ),
        ("w", VolumeSource::Base(odd), "multiple of 512"),
        ("w", from("v", "nothing"), "v@nothing"),
    ];
    for (name, source, expected) in cases {
        let error = store.create_volume(name, &source).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(files(&layers), known, "{error}");
        assert_eq!(store.volumes().len(), 1, "{error}");
    }
    snapshot(&store, "v", "s");
    let again = store.snapshot("s", &Selection::All).unwrap_err();
    assert!(matches!(again, Error::Exists { .. }), "{again}");
    let nobody = store
        .snapshot("t", &Selection::Volumes(vec!["x".into()]))
        .unwrap_err();
    assert!(matches!(nobody, Error::NotFound { .. }), "{nobody}");
    assert_eq!(store.volume_info("v").unwrap().depth, 2);
    let second = Store::open(&dir.path().join("store"), StoreOptions::default()).unwrap_err();
    assert!(
        second.to_string().contains(&std::process::id().to_string()),
        "{second}"
    );
}

#[test]
fn requests_outside_the_disk_or_against_its_mode_fail_and_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), &StoreOptions::default());
    store
        .create_volume("v", &VolumeSource::Base(base(dir.path(), 16)))
        .unwrap();
    let mut v = queue(&store, "v");
    let sector = || vec![0; SECTOR_BYTES as usize];
    let outside = RequestError::OutOfRange;
    assert_eq!(
        v.run(Operation::Write(Sector(16)), sector()).0,
        Err(outside)
    );
    assert_eq!(
        v.run(Operation::Read(Sector(u64::MAX)), sector()).0,
        Err(outside)
    );
    assert_eq!(
        v.run(Operation::Read(Sector(0)), vec![0; 513]).0,
        Err(outside)
    );
    let range = SectorRange {
        start: Sector(15),
        count: 2,
    };
    assert_eq!(v.run(Operation::Discard(range), Vec::new()).0, Err(outside));
    let overflow = SectorRange {
        start: Sector(u64::MAX),
        count: 2,
    };
    assert_eq!(
        v.run(Operation::Discard(overflow), Vec::new()).0,
        Err(outside)
    );
    let mut reader = Queue::new(store.open_volume("v").unwrap().context(true).unwrap());
    let refused = Err(RequestError::ReadOnly);
    assert_eq!(reader.run(Operation::Write(Sector(0)), sector()).0, refused);
    let range = SectorRange {
        start: Sector(0),
        count: 8,
    };
    assert_eq!(
        reader
            .run(Operation::WriteZeroes { range, unmap: true }, Vec::new())
            .0,
        refused
    );
    assert_eq!(v.read_all(7, 16).unwrap(), vec![Value::Stamp(1); 16]);
}

#[test]
fn deleting_a_volume_frees_what_no_clone_needs() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), &StoreOptions::default());
    let layers = || {
        fs::read_dir(dir.path().join("store/layers"))
            .unwrap()
            .count()
    };
    store
        .create_volume("v", &VolumeSource::Base(base(dir.path(), 64)))
        .unwrap();
    snapshot(&store, "v", "a");
    snapshot(&store, "v", "b");
    store.create_volume("c", &from("v", "a")).unwrap();
    assert_eq!(layers(), 5, "base, a, b, active, clone");
    store.delete_volume("v").unwrap();
    assert_eq!(layers(), 3, "base, a, clone");
    assert_eq!(
        queue(&store, "c").read_all(7, 64).unwrap(),
        vec![Value::Stamp(1); 64]
    );
    store.delete_volume("c").unwrap();
    assert_eq!(layers(), 0);
}

#[test]
fn a_changed_base_is_refused_and_other_volumes_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let image = base(dir.path(), 64);
    {
        let store = open(dir.path(), &StoreOptions::default());
        store
            .create_volume("v", &VolumeSource::Base(image.clone()))
            .unwrap();
        store.create_volume("w", &VolumeSource::Size(4096)).unwrap();
    }
    fs::write(&image, vec![0; 64 * 512]).unwrap();
    let store = open(dir.path(), &StoreOptions::default());
    let error = store.open_volume("v").unwrap_err();
    assert!(matches!(error, Error::BaseChanged { .. }), "{error}");
    store.open_volume("w").unwrap();
}

#[test]
fn discarded_space_goes_back_to_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), &StoreOptions::default());
    store
        .create_volume("v", &VolumeSource::Size(16 << 20))
        .unwrap();
    let mut v = queue(&store, "v");
    write(&mut v, 0, 8 << 11, 3);
    v.run(Operation::Flush, Vec::new()).0.unwrap();
    let full = store.volume_info("v").unwrap().active_allocated_bytes;
    assert!(full >= 8 << 20, "{full}");
    let range = SectorRange {
        start: Sector(0),
        count: 7 << 11,
    };
    v.run(Operation::Discard(range), Vec::new()).0.unwrap();
    let left = store.volume_info("v").unwrap().active_allocated_bytes;
    assert!(left <= 2 << 20, "{left} of {full} bytes left");
}

#[test]
fn a_long_journal_gets_a_checkpoint_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(open(dir.path(), &StoreOptions::default()));
    store
        .create_volume("v", &VolumeSource::Size(1 << 20))
        .unwrap();
    let mut v = queue(&store, "v");
    write(&mut v, 1, 3, 5);
    v.run(Operation::Flush, Vec::new()).0.unwrap();
    let active = store.volume_info("v").unwrap().active;
    let map = dir.path().join(format!("store/layers/{active}/map"));
    let journal = fs::metadata(&map).unwrap().len();
    store.checkpoint_volume("v").unwrap();
    write(&mut v, 9, 3, 6);
    v.run(Operation::Flush, Vec::new()).0.unwrap();
    assert!(journal > 0 && fs::metadata(&map).unwrap().len() > 0);
    drop(v);
    drop(store);
    let store = open(dir.path(), &StoreOptions::default());
    let values = queue(&store, "v").read_all(7, 16).unwrap();
    assert_eq!(values[1..4], [Value::Stamp(5); 3]);
    assert_eq!(values[9..12], [Value::Stamp(6); 3]);
}
