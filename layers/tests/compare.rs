//! What is told of disks and their layers without reading them: which sectors differ between two points, what volumes take,
//! and the lists of a large store.

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

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use disk::Queue;
use oracle::{Value, stamp};
use stratablk_layers::Error;
use stratablk_layers::catalog::memory::{MemoryCatalog, MemoryDisk};
use stratablk_layers::catalog::{
    CatalogState, LayerRow, LayerState, Rows, SnapshotRow, VolumeKind, VolumeRow,
};
use stratablk_layers::file::sim::{Random, SimMedia};
use stratablk_layers::lifecycle::{DiffRange, Point, ResizeOptions};
use stratablk_layers::store::{Selection, Store, StoreOptions, VolumeSource};
use stratablk_layers::units::{LayerId, SECTOR_BYTES, Sector, SectorRange, StoreId};
use stratablk_layers::volume::Operation;
use uuid::Uuid;

/// Sectors of the disks here; the last cluster is cut short.
const SECTORS: u64 = 203;

/// A store in a folder.
fn open(dir: &Path) -> Store {
    Store::open(&dir.join("store"), StoreOptions::default()).unwrap()
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

fn run(start: u64, count: u64) -> SectorRange {
    SectorRange::new(Sector(start), count).unwrap()
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

/// "web" or "web@first".
fn point(text: &str) -> Point {
    let (volume, snapshot) = match text.split_once('@') {
        Some((volume, snapshot)) => (volume, Some(snapshot.to_owned())),
        None => (text, None),
    };
    Point {
        volume: volume.into(),
        snapshot,
    }
}

fn diff(store: &Store, from: &str, to: &str) -> Vec<DiffRange> {
    store.diff(&point(from), &point(to)).unwrap()
}

/// Whether each sector differs, and if so whether it is told to be zeroes.
fn flat(ranges: &[DiffRange], sectors: usize) -> Vec<Option<bool>> {
    let mut flat = vec![None; sectors];
    let mut end = None;
    for it in ranges {
        assert!(it.range.count > 0);
        let touches = end.is_some_and(|(end, zero)| end == it.range.start && zero == it.zero);
        assert!(!touches, "two ranges that could be one: {ranges:?}");
        let place = it.range.start.0 as usize..it.range.end().0 as usize;
        assert!(
            flat[place.clone()].iter().all(Option::is_none),
            "out of order"
        );
        flat[place].fill(Some(it.zero));
        end = Some((it.range.end(), it.zero));
    }
    flat
}

/// What is told must be true of these contents.
fn judge(ranges: &[DiffRange], from: &[Value], to: &[Value]) {
    let told = flat(ranges, from.len().max(to.len()));
    for (at, told) in told.into_iter().enumerate() {
        match told {
            None => assert_eq!(from[at], to[at], "sector {at} differs and is not told"),
            Some(true) => assert!(
                to.get(at).is_none_or(|value| *value == Value::Zero),
                "sector {at} is not zeroes"
            ),
            Some(false) => assert!(at < to.len(), "sector {at} is beyond the end"),
        }
    }
}

#[test]
fn what_differs_is_told_whatever_the_history() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("base.raw");
    let bytes: Vec<u8> = (0..SECTORS)
        .flat_map(|sector| stamp(7, sector, 1))
        .collect();
    fs::write(&image, bytes).unwrap();
    let store = open(dir.path());
    let base = VolumeSource::Base(image);
    store.create_volume("v0", &base).unwrap();
    store
        .create_volume("v1", &VolumeSource::Size(SECTORS * SECTOR_BYTES))
        .unwrap();
    let mut contents: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    contents.insert("v0".into(), vec![Value::Stamp(1); SECTORS as usize]);
    contents.insert("v1".into(), vec![Value::Zero; SECTORS as usize]);
    let mut queues: HashMap<String, Queue> = HashMap::new();
    let mut random = Random::new(4);
    for id in 2..400 {
        let live: Vec<String> = contents
            .keys()
            .filter(|it| !it.contains('@'))
            .cloned()
            .collect();
        let name = live[random.below(live.len() as u64) as usize].clone();
        let start = random.below(SECTORS);
        let count = 1 + random.below(30.min(SECTORS - start));
        let place = start as usize..(start + count) as usize;
        match random.below(20) {
            0..=11 => {
                let queue = queues
                    .entry(name.clone())
                    .or_insert_with(|| queue(&store, &name));
                let value = if random.below(3) == 0 {
                    let zeroes = Operation::WriteZeroes {
                        range: run(start, count),
                        unmap: true,
                    };
                    queue.run(zeroes, Vec::new()).0.unwrap();
                    Value::Zero
                } else {
                    write(queue, start, count, id);
                    Value::Stamp(id)
                };
                contents.get_mut(&name).unwrap()[place].fill(value);
            }
            12..=14 => {
                let full = format!("{name}@s{id}");
                snapshot(&store, &name, &format!("s{id}"));
                contents.insert(full.clone(), contents[&name].clone());
                assert_eq!(diff(&store, &full, &name), []);
            }
            15 if live.len() < 6 => {
                let taken: Vec<_> = contents
                    .keys()
                    .filter(|it| it.contains('@'))
                    .cloned()
                    .collect();
                if taken.is_empty() {
                    continue;
                }
                let source = &taken[random.below(taken.len() as u64) as usize];
                let (volume, name) = source.split_once('@').unwrap();
                let clone = format!("v{}", live.len());
                store.create_volume(&clone, &from(volume, name)).unwrap();
                contents.insert(clone, contents[source].clone());
            }
            // Closed, so that its maps are read from files.
            16 => drop(queues.remove(&name)),
            _ => {
                let points: Vec<&String> = contents.keys().collect();
                let mut any = || points[random.below(points.len() as u64) as usize];
                let (one, other) = (any(), any());
                judge(&diff(&store, one, other), &contents[one], &contents[other]);
            }
        }
    }
    drop(queues);
    store.finish().unwrap();
    drop(store);
    // The same from the files of another run, whose data nobody looks at.
    let layers = dir.path().join("store/layers");
    for layer in fs::read_dir(&layers).unwrap() {
        let data = layer.unwrap().path().join("data");
        if data.exists() {
            fs::remove_file(data).unwrap();
        }
    }
    let store = open(dir.path());
    for (one, from) in &contents {
        for (other, to) in &contents {
            judge(&diff(&store, one, other), from, to);
        }
    }
}

#[test]
fn a_diff_is_exact() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let source = VolumeSource::Size(SECTORS * SECTOR_BYTES);
    store.create_volume("web", &source).unwrap();
    store.create_volume("other", &source).unwrap();
    let mut web = queue(&store, "web");
    write(&mut web, 3, 2, 1);
    write(&mut web, 100, 50, 1);
    snapshot(&store, "web", "a");
    write(&mut web, 4, 1, 2);
    write(&mut web, 5, 4, 2);
    web.run(Operation::Discard(run(104, 16)), Vec::new())
        .0
        .unwrap();
    let range = |start, count, zero| DiffRange {
        range: run(start, count),
        zero,
    };
    let changed = [range(4, 5, false), range(104, 16, true)];
    assert_eq!(diff(&store, "web@a", "web"), changed);
    // The other way the same, but for what is zeroes there.
    let back = [range(4, 1, false), range(5, 4, true), range(104, 16, false)];
    assert_eq!(diff(&store, "web", "web@a"), back);
    // Nothing in common: all that either has. The first holds zeroes only where it was discarded.
    let all = [
        range(3, 6, false),
        range(100, 4, false),
        range(104, 16, true),
        range(120, 30, false),
    ];
    assert_eq!(diff(&store, "other", "web"), all);
    assert_eq!(diff(&store, "other", "other"), []);
    // The rest of a larger disk.
    drop(web);
    store
        .resize("web", 300 * SECTOR_BYTES, ResizeOptions::default())
        .unwrap();
    let mut web = queue(&store, "web");
    write(&mut web, 250, 1, 3);
    let longer = diff(&store, "web@a", "web");
    let told = flat(&longer, 300);
    assert!(told[203..300].iter().all(Option::is_some), "{longer:?}");
    assert_eq!(
        (told[250], told[251], told[202]),
        (Some(false), Some(true), None)
    );
    let told = flat(&diff(&store, "web", "web@a"), 300);
    assert!(told[203..300].iter().all(|it| *it == Some(true)));
    for (from, to) in [("web@b", "web"), ("web", "none"), ("none@a", "web")] {
        let error = store.diff(&point(from), &point(to)).unwrap_err();
        assert!(matches!(error, Error::NotFound { .. }), "{error}");
    }
}

#[test]
fn what_was_acknowledged_before_is_in_a_diff_under_load() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let sectors = 1 << 16;
    let source = VolumeSource::Size(sectors * SECTOR_BYTES);
    store.create_volume("web", &source).unwrap();
    snapshot(&store, "web", "a");
    let stop = AtomicBool::new(false);
    let written = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut web = queue(&store, "web");
            let mut at = 0;
            while !stop.load(Ordering::Relaxed) && at + 5 <= sectors {
                write(&mut web, at, 3, 1);
                at += 5;
                written.store(at, Ordering::Release);
            }
        });
        for round in 0..40 {
            while written.load(Ordering::Acquire) < round * 25 {
                std::thread::yield_now();
            }
            let before = written.load(Ordering::Acquire);
            let told = flat(&diff(&store, "web@a", "web"), sectors as usize);
            let after = written.load(Ordering::Acquire) + 5;
            for at in 0..sectors {
                let was_written = at % 5 < 3;
                let found = told[at as usize];
                if at < before {
                    assert_eq!(found, was_written.then_some(false), "sector {at}");
                }
                assert!(found.is_none() || at < after && was_written, "sector {at}");
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// Bytes that the data of each layer takes.
fn allocated(dir: &Path) -> HashMap<String, u64> {
    let layers = fs::read_dir(dir.join("store/layers")).unwrap();
    layers
        .map(|layer| layer.unwrap())
        .map(|layer| {
            let data = fs::metadata(layer.path().join("data"));
            let bytes = data.map_or(0, |data| data.blocks() * 512);
            (layer.file_name().into_string().unwrap(), bytes)
        })
        .collect()
}

#[test]
fn what_is_exclusive_is_what_deleting_frees() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("base.raw");
    fs::write(&image, vec![1; 1 << 20]).unwrap();
    let store = open(dir.path());
    store
        .create_volume("a", &VolumeSource::Base(image.clone()))
        .unwrap();
    let grow = |name: &str, clusters: u64| {
        write(&mut queue(&store, name), 0, clusters * 8, 1);
    };
    grow("a", 3);
    snapshot(&store, "a", "one");
    grow("a", 20);
    snapshot(&store, "a", "two");
    grow("a", 50);
    store.create_volume("b", &from("a", "one")).unwrap();
    store.create_volume("c", &from("a", "one")).unwrap();
    grow("b", 100);
    snapshot(&store, "b", "three");
    store.create_volume("d", &from("b", "three")).unwrap();
    grow("b", 7);
    grow("d", 9);
    store
        .create_volume("alone", &VolumeSource::Size(1 << 20))
        .unwrap();
    grow("alone", 11);
    store.flush_all().unwrap();
    let of = |bytes: &HashMap<String, u64>, layer: LayerId| bytes[&layer.to_string()];
    for (name, clusters) in [("a", 70), ("b", 7), ("c", 0), ("d", 109), ("alone", 11)] {
        let all = store.usage(None).unwrap();
        let usage = store.usage(Some(name)).unwrap().remove(0);
        assert!(all.contains(&usage), "{name}: {all:?}");
        let before = allocated(dir.path());
        let tree = store.tree(Some(name)).unwrap();
        // What is below its active layer and its snapshots, but for the base.
        let parents: HashMap<_, _> = tree.iter().map(|it| (it.layer, it.parent)).collect();
        let tops = tree.iter().filter(|it| {
            it.active_of.as_deref() == Some(name)
                || it.snapshots.iter().any(|(volume, _)| volume == name)
        });
        let mut below = std::collections::HashSet::new();
        for top in tops {
            let mut next = Some(top.layer);
            while let Some(layer) = next {
                below.insert(layer);
                next = parents[&layer];
            }
        }
        let total: u64 = below.iter().map(|layer| of(&before, *layer)).sum();
        assert_eq!(usage.exclusive + usage.shared, total, "{name}: {usage:?}");
        let has_base = name != "alone";
        assert_eq!(usage.base > 0, has_base, "{name}: {usage:?}");
        store.delete_volume(name).unwrap();
        let after = allocated(dir.path());
        let freed: u64 = before
            .iter()
            .filter(|(layer, _)| !after.contains_key(*layer))
            .map(|(_, bytes)| bytes)
            .sum();
        assert_eq!(usage.exclusive, freed, "{name}: {usage:?}");
        assert!(usage.exclusive >= clusters * 4096, "{name}: {usage:?}");
    }
    let error = store.usage(Some("a")).unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
    assert!(store.usage(None).unwrap().is_empty());
}

/// A store whose catalog has a chain of so many layers, each a snapshot of "vm", and as many volumes over one of them. There
/// are no files.
fn large(count: u128) -> Store {
    let id = |n: u128| LayerId(Uuid::from_u128(n));
    let mut rows = Rows::empty(StoreId(Uuid::from_u128(5)));
    let mut layer = |n, parent: Option<u128>, state| {
        let row = LayerRow {
            id: id(n),
            parent: parent.map(id),
            size: Sector(SECTORS),
            state,
            base: None,
            created_ns: n as u64,
        };
        rows.layers.insert(row.id, row);
    };
    let clone = |n| 1_000_000 + n;
    for n in 1..=count {
        layer(n, (n > 1).then(|| n - 1), LayerState::Sealed);
        layer(clone(n), Some(count), LayerState::Active);
    }
    layer(clone(0), Some(count), LayerState::Active);
    for n in 0..=count {
        let row = VolumeRow {
            name: if n == 0 { "vm".into() } else { format!("c{n}") },
            active: id(clone(n)),
            size: Sector(SECTORS),
            created_ns: 1,
            attachment: None,
            kind: VolumeKind::Normal,
            armed: false,
            attached_from: None,
            failed: None,
        };
        rows.volumes.insert(row.name.clone(), row);
    }
    rows.snapshots = (1..=count)
        .map(|n| SnapshotRow {
            volume: "vm".into(),
            name: format!("s{n}"),
            layer: id(n),
            group: Uuid::from_u128(n),
            created_ns: n as u64,
            size: Sector(SECTORS),
        })
        .collect();
    let disk = MemoryDisk::new(CatalogState::new(rows).unwrap());
    let catalog = Box::new(MemoryCatalog::open(&disk).unwrap());
    Store::simulated(Arc::new(SimMedia::new(1)), catalog, StoreOptions::default()).unwrap()
}

#[test]
fn lists_of_a_large_store_cost_by_what_is_in_them() {
    let count = 10_000;
    let store = large(count as u128);
    let timed = |what: &str, act: &dyn Fn() -> usize| {
        let began = Instant::now();
        let found = act();
        let took = began.elapsed();
        println!("{what}: {took:?}");
        // What looks at all for each takes minutes.
        assert!(took < Duration::from_secs(8), "{what} took {took:?}");
        found
    };
    let volumes = timed("volumes", &|| store.volumes().len());
    assert_eq!(volumes, count + 1);
    assert_eq!(
        timed("snapshots", &|| store.snapshots(None).unwrap().len()),
        count
    );
    let tree = timed("tree", &|| store.tree(None).unwrap().len());
    assert_eq!(tree, 2 * count + 1);
    assert_eq!(
        timed("tree of one", &|| store.tree(Some("c7")).unwrap().len()),
        tree
    );
    assert_eq!(
        timed("usage", &|| store.usage(None).unwrap().len()),
        volumes
    );
    assert_eq!(store.volume_info("c9").unwrap().depth, count + 1);
    let snapshots = timed("a hundred volumes, one by one", &|| {
        (1..=100)
            .map(|n| store.volume_info(&format!("c{n}")).unwrap().snapshots)
            .sum()
    });
    assert_eq!(snapshots, 0);
}
