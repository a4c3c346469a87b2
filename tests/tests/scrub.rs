//! Bits that rot on the medium below a running daemon: a scrub finds them, guests never get them, other disks go on, and what
//! is good in the cache mends the medium.
#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use stratablk_tests::daemon::{Daemon, Ran, run, temp_dir};
use stratablk_tests::disk::Disk;
use stratablk_tests::request::S_IOERR;
use stratablk_tests::wait::until;
use tempfile::TempDir;

/// Bytes of a disk.
const DISK_BYTES: usize = 4 << 20;
/// Sectors that are written: a MiB.
const SECTORS: usize = 2048;
/// The byte of the disk whose bit rots.
const ROTTEN: u64 = 100 * 4096 + 17;
/// The first sector of its cluster.
const ROTTEN_SECTOR: u64 = 800;
/// The exit code of a scrub that was waited for and found damage.
const DAMAGED: i32 = 3;

/// A store with its daemon, and two volumes: `web` with a snapshot that holds ones, and `db`.
struct Rig {
    /// The daemon; `None` while it is stopped.
    daemon: Option<Daemon>,
    /// Everything lies in here.
    dir: TempDir,
}

impl Rig {
    fn new() -> Self {
        let dir = temp_dir();
        let daemon = Some(Daemon::on_store(&dir.path().join("store")));
        let rig = Self { daemon, dir };
        for name in ["web", "db"] {
            rig.line(&format!("volume create {name} --size {DISK_BYTES}"))
                .ok();
            let socket = rig.socket(name);
            rig.line(&format!(
                "volume attach {name} --socket {}",
                socket.display()
            ))
            .ok();
            let mut disk = rig.disk(name);
            disk.write(0, &vec![1; SECTORS * 512]);
            disk.flush();
        }
        rig.line("snapshot create s1 web").ok();
        let mut disk = rig.disk("web");
        disk.write(0, &[2; 4096]);
        disk.flush();
        drop(disk);
        let sums = rig.layer().join("sums");
        assert!(until(|| sums.exists()), "{}", rig.log());
        rig
    }

    fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn socket(&self, volume: &str) -> PathBuf {
        self.dir.path().join(format!("{volume}.sock"))
    }

    fn disk(&self, volume: &str) -> Disk {
        Disk::connect(&self.socket(volume))
    }

    fn line(&self, line: &str) -> Ran {
        self.daemon.as_ref().unwrap().line(line)
    }

    fn log(&self) -> String {
        self.daemon.as_ref().unwrap().log()
    }

    /// A command that goes well, as JSON.
    #[track_caller]
    fn json(&self, line: &str) -> Value {
        self.line(&format!("{line} --json")).json()
    }

    /// The directory of the sealed layer of `web`.
    fn layer(&self) -> PathBuf {
        let snapshots = self.json("snapshot list web");
        let layer = snapshots["snapshots"][0]["layer"].as_str().unwrap();
        self.store().join("layers").join(layer)
    }

    /// Ends the daemon in order, and starts another one, with an empty cache.
    fn restart(&mut self) {
        self.daemon.take().unwrap().stop();
        self.daemon = Some(Daemon::on_store(&self.store()));
    }

    /// Scrubs and waits: the exit code, and what was found.
    fn scrub(&self, what: &str) -> (Option<i32>, Value) {
        let ran = self.line(&format!("scrub {what} --wait --json"));
        let job: Value = serde_json::from_str(&ran.stdout)
            .unwrap_or_else(|error| panic!("{error}: {ran:?}; {}", self.log()));
        (ran.code, job)
    }
}

/// Flips a bit of a file.
fn flip(path: &Path, offset: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 8], offset).unwrap();
}

/// The byte of a file.
fn byte(path: &Path, offset: u64) -> u8 {
    let mut byte = [0];
    let file = File::open(path).unwrap();
    file.read_exact_at(&mut byte, offset).unwrap();
    byte[0]
}

#[test]
fn a_rotten_bit_is_found_and_never_served() {
    let mut rig = Rig::new();
    rig.restart();
    let data = rig.layer().join("data");
    let (code, job) = rig.scrub("--all");
    assert_eq!(code, Some(0), "{job}");
    assert_eq!(job["kind"], "scrub");
    assert_eq!(job["scrub"]["layers"], 1);
    assert_eq!(job["scrub"]["bytes"], SECTORS * 512);
    assert_eq!(job["scrub"]["taken"], 0);

    let (mut web, mut db) = (rig.disk("web"), rig.disk("db"));
    flip(&data, ROTTEN);
    let (code, job) = rig.scrub("web");
    assert_eq!(code, Some(DAMAGED), "{job}");
    let bad = &job["scrub"]["bad"][0];
    assert_eq!(bad["bytes"], 4096, "{job}");
    assert_eq!(bad["ranges"][0]["offset"], ROTTEN_SECTOR * 512);
    assert_eq!(bad["ranges"][0]["bytes"], 4096);
    assert_eq!(bad["volumes"], serde_json::json!(["web", "web@s1"]));

    // The guest gets an error for what is rotten, and everything else.
    assert_eq!(web.try_read(ROTTEN_SECTOR, 1).unwrap_err(), S_IOERR);
    assert_eq!(
        web.try_read(0, u64::try_from(SECTORS).unwrap())
            .unwrap_err(),
        S_IOERR
    );
    assert_eq!(web.read(0, 8), [2; 4096]);
    assert_eq!(web.read(ROTTEN_SECTOR - 8, 8), [1; 4096]);
    assert_eq!(web.read(ROTTEN_SECTOR + 8, 8), [1; 4096]);
    assert_eq!(db.read(ROTTEN_SECTOR, 8), [1; 4096]);
    db.write(0, &[3; 512]);
    db.flush();
    // It may write there, and reads what it wrote.
    web.write(ROTTEN_SECTOR, &[4; 512]);
    web.flush();
    assert_eq!(web.read(ROTTEN_SECTOR, 1), [4; 512]);
    assert_eq!(web.try_read(ROTTEN_SECTOR + 1, 1).unwrap_err(), S_IOERR);

    // Everybody is told.
    let shown = rig.line("volume list").ok();
    assert!(shown.contains("damaged"), "{shown}");
    let shown = rig.line("tree").ok();
    assert!(shown.contains("4 KiB damaged"), "{shown}");
    let id = &job["id"];
    let shown = rig.line(&format!("job show {id}")).ok();
    assert!(shown.contains("damaged: layer"), "{shown}");
    assert!(
        rig.daemon
            .as_ref()
            .unwrap()
            .wait_for("damaged on the medium")
    );
    let failed = rig.line(&format!("job wait {id}")).refused();
    assert!(
        failed.contains("4096 bytes of 1 layers are damaged"),
        "{failed}"
    );

    // A daemon that comes later knows it too.
    drop((web, db));
    drop(rig.daemon.take());
    rig.daemon = Some(Daemon::on_store(&rig.store()));
    let mut web = rig.disk("web");
    assert_eq!(web.try_read(ROTTEN_SECTOR + 1, 1).unwrap_err(), S_IOERR);
    assert_eq!(web.read(ROTTEN_SECTOR, 1), [4; 512]);

    // The file is put right: a scrub says so, and it is served.
    flip(&data, ROTTEN);
    let (code, job) = rig.scrub("--all");
    assert_eq!(code, Some(0), "{job}");
    assert_eq!(web.read(ROTTEN_SECTOR + 1, 7), [1; 7 * 512]);
    let shown = rig.line("volume list").ok();
    assert!(!shown.contains("damaged"), "{shown}");
}

#[test]
fn what_is_good_in_the_cache_mends_the_medium() {
    let mut rig = Rig::new();
    rig.restart();
    let data = rig.layer().join("data");
    let mut web = rig.disk("web");
    assert_eq!(web.read(ROTTEN_SECTOR, 8), [1; 4096]);
    flip(&data, ROTTEN);
    let (code, job) = rig.scrub("web");
    assert_eq!(
        (code, &job["scrub"]["mended"]),
        (Some(0), &Value::from(1)),
        "{job}"
    );
    assert_eq!(byte(&data, ROTTEN), 1);
    assert_eq!(web.read(ROTTEN_SECTOR, 8), [1; 4096]);
}

#[test]
fn a_store_at_rest_is_scrubbed_by_the_check() {
    let mut rig = Rig::new();
    let layer = rig.layer();
    rig.daemon.take().unwrap().stop();
    let check = || {
        let store = rig.store();
        run(["check", "--scrub", "--store", store.to_str().unwrap()])
    };
    let text = check().ok();
    assert!(text.contains("1 MiB of data of 1 layers"), "{text}");
    flip(&layer.join("data"), ROTTEN);
    let before = fs::read_dir(&layer).unwrap().count();
    let ran = check();
    assert_eq!(ran.code, Some(1));
    assert!(ran.stdout.contains("bytes 409600 to 413696"), "{ran:?}");
    assert_eq!(
        fs::read_dir(&layer).unwrap().count(),
        before,
        "it changes nothing"
    );
    flip(&layer.join("data"), ROTTEN);
    check().ok();
    flip(&layer.join("sums"), 5000);
    let text = check().ok();
    assert!(text.contains("checksums are damaged"), "{text}");
}
