//! A real daemon on a file system that is full: requests of guests wait, others go on, a delete makes room, and nothing is
//! lost. On a tmpfs in a mount namespace of the daemon's own.
#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use stratablk_tests::daemon::{Daemon, binary, temp_dir};
use stratablk_tests::disk::Disk;
use stratablk_tests::request::{S_IOERR, S_OK};
use tempfile::TempDir;

/// How long anything may take.
const DEADLINE: Duration = Duration::from_secs(60);
/// Bytes of a write.
const PIECE: usize = 256 << 10;
/// Sectors of it.
const PIECE_SECTORS: u64 = (PIECE / 512) as u64;

/// A daemon with three volumes, one of which is there to be deleted.
struct Rig {
    dir: TempDir,
    daemon: Daemon,
    /// The store, as seen from here.
    inside: PathBuf,
}

impl Rig {
    /// `None`, with a word on stderr, where the host lets nobody mount.
    fn new(policy: &str) -> Option<Self> {
        let dir = temp_dir();
        let (store, control) = (dir.path().join("store"), dir.path().join("control.sock"));
        fs::create_dir(&store).unwrap();
        let mount = "mount -t tmpfs -o size=8m,mode=700 tmpfs \"$1\"";
        let way = [&["--mount"][..], &["--user", "--map-root-user", "--mount"]]
            .into_iter()
            .find(|way| {
                let script = [*way, &["sh", "-c", mount, "sh"]].concat();
                let tried = Command::new("unshare").args(script).arg(&store).output();
                tried.is_ok_and(|tried| tried.status.success())
            });
        let Some(way) = way else {
            eprintln!("SKIPPED: no file system may be mounted here");
            return None;
        };
        let mut command = Command::new("unshare");
        command.args(way).args(["sh", "-c"]).arg(format!(
            "{mount} && exec \"$0\" serve --store \"$1\" --control \"$2\" --on-enospc {policy}"
        ));
        command.arg(binary()).args([&store, &control]);
        let daemon = Daemon::spawn(&mut command, &control).unwrap();
        let inside = PathBuf::from(format!("/proc/{}/root{}", daemon.pid(), store.display()));
        let rig = Self {
            dir,
            daemon,
            inside,
        };
        for name in ["web", "db", "scrap"] {
            rig.line(&format!("volume create {name} --size 16M"));
            let socket = rig.socket(name);
            rig.line(&format!(
                "volume attach {name} --socket {}",
                socket.display()
            ));
        }
        let mut scrap = rig.disk("scrap");
        for piece in 0..8 {
            scrap.write(piece * PIECE_SECTORS, &vec![9; PIECE]);
        }
        scrap.flush();
        drop(scrap);
        rig.line("volume detach scrap");
        Some(rig)
    }

    fn line(&self, line: &str) -> String {
        self.daemon.line(line).ok()
    }

    fn socket(&self, volume: &str) -> PathBuf {
        self.dir.path().join(format!("{volume}.sock"))
    }

    fn disk(&self, volume: &str) -> Disk {
        Disk::connect(&self.socket(volume))
    }

    /// Waits until the volume says that it waits for space, or that it does not.
    fn await_no_space(&self, volume: &str, expected: bool) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let shown = self.daemon.line(&format!("volume show {volume} --json"));
            let shown = shown.json();
            assert!(shown["failure"].is_null(), "{shown}");
            if shown["no_space"] == expected {
                return;
            }
            assert!(Instant::now() < deadline, "{shown}");
            thread::yield_now();
        }
    }
}

/// Writes a file until the file system is full.
fn fill(path: &Path) {
    let mut file = File::create(path).unwrap();
    for length in [4096, 1] {
        while file.write_all(&vec![1; length]).is_ok() {}
    }
}

/// What piece number `piece` holds.
fn content(piece: u64) -> Vec<u8> {
    vec![u8::try_from(piece + 1).unwrap(); PIECE]
}

#[test]
fn guests_wait_for_space_and_a_delete_makes_it() {
    let Some(rig) = Rig::new("hold") else {
        return;
    };
    let (mut web, mut db) = (rig.disk("web"), rig.disk("db"));
    db.write(0, &content(0));
    db.flush();
    fill(&rig.inside.join("fill"));
    let (sender, flushed) = mpsc::channel();
    let guest = thread::spawn(move || {
        for piece in 0..6 {
            web.write(piece * PIECE_SECTORS, &content(piece));
        }
        web.flush();
        sender.send(()).unwrap();
        for piece in 0..6 {
            let found = web.read(piece * PIECE_SECTORS, PIECE_SECTORS);
            assert!(found == content(piece), "piece {piece}");
        }
    });
    rig.await_no_space("web", true);
    assert!(rig.line("volume list").contains("no-space"));
    // Overwrites need no room.
    db.write(0, &content(3));
    db.flush();
    rig.await_no_space("db", false);
    let refused = rig.daemon.line("snapshot create s web").refused();
    assert!(refused.contains("No space left"), "{refused}");
    assert!(flushed.try_recv().is_err(), "it claims what cannot be");
    rig.line("volume delete scrap");
    flushed
        .recv_timeout(DEADLINE)
        .expect("it goes on by itself");
    guest.join().unwrap();
    rig.await_no_space("web", false);
    let told = [
        "volume web: no space left",
        "volume web: there is room again",
    ];
    for words in told {
        assert!(rig.daemon.wait_for(words), "{words}");
    }
    let log = rig.daemon.log();
    for words in told {
        assert_eq!(log.matches(words).count(), 1, "{words}: {log}");
    }
}

#[test]
fn where_it_is_to_be_reported_a_flush_fails_and_a_later_one_does_not() {
    let Some(rig) = Rig::new("report") else {
        return;
    };
    let mut web = rig.disk("web");
    fill(&rig.inside.join("fill"));
    web.write(0, &content(0));
    assert_eq!(web.try_flush(), S_IOERR);
    rig.await_no_space("web", true);
    fs::remove_file(rig.inside.join("fill")).unwrap();
    assert_eq!(web.try_flush(), S_OK);
    rig.await_no_space("web", false);
    assert!(web.read(0, PIECE_SECTORS) == content(0));
}

#[test]
fn a_daemon_that_must_end_ends_what_waits() {
    let Some(rig) = Rig::new("hold") else {
        return;
    };
    let mut web = rig.disk("web");
    fill(&rig.inside.join("fill"));
    web.write(0, &content(0));
    let guest = thread::spawn(move || web.try_flush());
    rig.await_no_space("web", true);
    // Ends the session, and so the rings.
    let began = Instant::now();
    let detached = rig.daemon.line("volume detach web --force");
    assert!(began.elapsed() < DEADLINE, "{detached:?}");
    drop(rig.daemon.stop());
    assert!(began.elapsed() < DEADLINE);
    drop(guest);
}
