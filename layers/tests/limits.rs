//! Trees far larger than most: a chain of 10,000 layers, and 10,000 clones of one snapshot. What is asked for is that every
//! command stays as quick as on a small tree, that opening stays within seconds, and memory within what the design says.
//!
//! `STRATABLK_LIMIT_LAYERS` chooses another number of layers. Times are compared within the run, and bounds are generous:
//! they tell a command that looks at everything from one that does not.

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

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use disk::Queue;
use oracle::{Value, stamp};
use rustix::process::{Resource, getrlimit, setrlimit};
use stratablk_layers::lifecycle::DeleteOptions;
use stratablk_layers::store::{Selection, Store, StoreOptions, VolumeSource};
use stratablk_layers::units::{CLUSTER_BYTES, CLUSTER_SECTORS, SECTOR_BYTES, Sector};
use stratablk_layers::volume::Operation;

/// Clusters of the disks.
const CLUSTERS: u64 = 4096;
/// Opening a store with a volume of 10,000 layers takes no longer than this, also in a debug build on a busy machine.
const OPEN_SECONDS: u64 = 20;
/// Memory that a layer of an open chain may take, beside the resolve table: its object, its map, its places in the chain.
const LAYER_BYTES: u64 = 16 << 10;

/// How many layers.
fn layers() -> u64 {
    let text = std::env::var("STRATABLK_LIMIT_LAYERS").ok();
    text.map_or(10_000, |text| text.parse().unwrap())
}

/// A folder in memory where there is one: what is tested is the number of layers, not the disk.
fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let place = if memory.is_dir() {
        memory.to_owned()
    } else {
        std::env::temp_dir()
    };
    tempfile::Builder::new()
        .prefix("stratablk-limits.")
        .tempdir_in(place)
        .unwrap()
}

/// One descriptor a layer in use, as the daemon sees to when it starts.
fn raise_limit_of_files() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
}

fn open(dir: &Path) -> Store {
    Store::open(&dir.join("store"), StoreOptions::default()).unwrap()
}

fn queue(store: &Store, name: &str) -> Queue {
    Queue::new(store.open_volume(name).unwrap().context(false).unwrap())
}

/// Writes a cluster with the stamp of write `id`.
fn write(queue: &mut Queue, cluster: u64, id: u64) {
    let start = cluster * CLUSTER_SECTORS;
    let bytes = (start..start + CLUSTER_SECTORS).flat_map(|sector| stamp(7, sector, id));
    let written = queue.run(Operation::Write(Sector(start)), bytes.collect());
    written.0.unwrap();
}

fn snapshot(store: &Store, name: &str) {
    let volumes = Selection::Volumes(vec!["deep".into()]);
    store.snapshot(name, &volumes).unwrap();
}

/// Resident memory of this process.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = text.split_whitespace().nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// Runs all jobs to their end.
fn finish_jobs(store: &Store) {
    let began = Instant::now();
    while store.job_step() {
        assert!(
            began.elapsed() < Duration::from_secs(120),
            "{:?}",
            store.jobs()
        );
    }
}

/// The middle one of some times.
fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// What a command takes, a few times over.
fn times(count: u64, mut act: impl FnMut(u64)) -> Duration {
    let time = |number| {
        let began = Instant::now();
        act(number);
        began.elapsed()
    };
    median((0..count).map(time).collect())
}

/// What commands took at the start and at the end of so many: it must not grow with what there is.
struct Steady {
    count: u64,
    early: Vec<Duration>,
    late: Vec<Duration>,
}

impl Steady {
    fn new(count: u64) -> Self {
        Self {
            count,
            early: Vec::new(),
            late: Vec::new(),
        }
    }

    /// Carries out one of them.
    fn time(&mut self, number: u64, act: impl FnOnce()) {
        let began = Instant::now();
        act();
        match number {
            50..100 => self.early.push(began.elapsed()),
            _ if number + 50 >= self.count => self.late.push(began.elapsed()),
            _ => {}
        }
    }

    fn judge(self, what: &str) {
        let count = self.count;
        let (early, late) = (median(self.early), median(self.late));
        println!("{what}: {early:?} at the start of {count}, {late:?} at the end");
        assert!(
            late < early * 4 + Duration::from_millis(10),
            "{what} takes too long: {late:?}, at the start {early:?}"
        );
    }
}

#[test]
fn a_chain_of_ten_thousand_layers_works() {
    raise_limit_of_files();
    let dir = folder();
    let store = open(dir.path());
    let bytes = CLUSTERS * CLUSTER_BYTES;
    store
        .create_volume("deep", &VolumeSource::Size(bytes))
        .unwrap();
    let mut expected = vec![Value::Zero; (bytes / SECTOR_BYTES) as usize];
    let mut guest = queue(&store, "deep");
    let set = |guest: &mut Queue, expected: &mut Vec<Value>, id: u64| {
        let cluster = id * 7 % CLUSTERS;
        write(guest, cluster, id);
        let first = (cluster * CLUSTER_SECTORS) as usize;
        expected[first..first + CLUSTER_SECTORS as usize].fill(Value::Stamp(id));
    };
    let count = layers();
    let mut steady = Steady::new(count);
    for id in 1..count {
        set(&mut guest, &mut expected, id);
        steady.time(id, || snapshot(&store, &format!("s{id}")));
    }
    steady.judge("a snapshot of a deep chain");
    let sectors = bytes / SECTOR_BYTES;
    assert_eq!(guest.read_all(7, sectors).unwrap(), expected);
    drop(guest);
    store.finish().unwrap();
    drop(store);

    let before = resident();
    let began = Instant::now();
    let store = open(dir.path());
    let mut guest = queue(&store, "deep");
    let opened = began.elapsed();
    let grown = resident().saturating_sub(before);
    let table = store.open_volume("deep").unwrap().table_bytes();
    println!(
        "opened in {opened:?}, {} KiB of memory, {table} bytes of table",
        grown >> 10
    );
    assert!(opened < Duration::from_secs(OPEN_SECONDS), "{opened:?}");
    assert!(grown < count * LAYER_BYTES + (64 << 20), "{grown} bytes");
    // 4 bytes a cluster, and the nodes above.
    assert!(table < CLUSTERS * 4 + (1 << 20), "{table} bytes of table");
    assert_eq!(store.volume_info("deep").unwrap().depth as u64, count);
    assert_eq!(guest.read_all(7, sectors).unwrap(), expected);

    // Some go from the middle, while the guest writes on.
    let delete = times(20, |number| {
        let name = format!("s{}", count / 2 + number);
        set(&mut guest, &mut expected, count + number);
        store
            .delete_snapshot("deep", &name, DeleteOptions::default())
            .unwrap();
    });
    println!("deleting one in the middle took {delete:?}");
    assert!(delete < Duration::from_secs(1), "{delete:?}");
    let began = Instant::now();
    finish_jobs(&store);
    println!("the merges took {:?}", began.elapsed());
    assert_eq!(store.volume_info("deep").unwrap().depth as u64, count - 20);
    assert_eq!(guest.read_all(7, sectors).unwrap(), expected);
    let tree = times(3, |_| {
        assert!(store.tree(Some("deep")).unwrap().len() as u64 >= count - 20)
    });
    println!("the tree took {tree:?}");
    assert!(tree < Duration::from_secs(2), "{tree:?}");
    drop(guest);
    let began = Instant::now();
    store.delete_volume("deep").unwrap();
    println!("deleting all of it took {:?}", began.elapsed());
    assert_eq!(
        std::fs::read_dir(layers_dir(dir.path())).unwrap().count(),
        0
    );
}

/// Where the layers of a store are.
fn layers_dir(dir: &Path) -> PathBuf {
    dir.join("store/layers")
}

#[test]
fn ten_thousand_clones_of_one_snapshot_work() {
    raise_limit_of_files();
    let dir = folder();
    let store = open(dir.path());
    let bytes = CLUSTERS * CLUSTER_BYTES;
    store
        .create_volume("deep", &VolumeSource::Size(bytes))
        .unwrap();
    let mut guest = queue(&store, "deep");
    for cluster in 0..64 {
        write(&mut guest, cluster, 1);
    }
    snapshot(&store, "golden");
    let golden = VolumeSource::Snapshot {
        volume: "deep".into(),
        snapshot: "golden".into(),
    };
    let count = layers();
    let mut steady = Steady::new(count);
    for number in 0..count {
        steady.time(number, || {
            store.create_volume(&format!("c{number}"), &golden).unwrap();
        });
    }
    steady.judge("a clone beside many");
    for number in [0, count / 2, count - 1] {
        let mut clone = queue(&store, &format!("c{number}"));
        write(&mut clone, 3, 2 + number);
        let found = clone.read_all(7, 64 * CLUSTER_SECTORS).unwrap();
        for (at, value) in (0..).zip(found) {
            let own = at / CLUSTER_SECTORS == 3;
            assert_eq!(value, Value::Stamp(if own { 2 + number } else { 1 }));
        }
    }
    let tree = times(3, |_| {
        assert!(store.tree(None).unwrap().len() as u64 > count)
    });
    println!("the tree took {tree:?}");
    assert!(tree < Duration::from_secs(2), "{tree:?}");
    // The name of what all of them need goes; it stays.
    store
        .delete_snapshot("deep", "golden", DeleteOptions::default())
        .unwrap();
    let delete = times(50, |number| {
        store.delete_volume(&format!("c{}", 1 + number)).unwrap();
    });
    println!("deleting one took {delete:?}");
    assert!(delete < Duration::from_secs(1), "{delete:?}");
    finish_jobs(&store);
    drop(guest);
    store.finish().unwrap();
    drop(store);
    let began = Instant::now();
    let store = open(dir.path());
    println!("the store was opened in {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(OPEN_SECONDS));
    let found = queue(&store, &format!("c{}", count - 1)).read_all(7, 64 * CLUSTER_SECTORS);
    assert_eq!(found.unwrap()[0], Value::Stamp(1));
}
