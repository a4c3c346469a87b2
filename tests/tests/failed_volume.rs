//! A real daemon whose host fails to write: the volume takes no more writes, says so, and still does after a kill and after a
//! restart; the others go on; and a recovery lets it go on with what it held.
#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::{Pid, Resource, Rlimit, prlimit};
use stratablk_tests::daemon::{Daemon, binary, temp_dir};
use stratablk_tests::disk::Disk;
use stratablk_tests::request::S_IOERR;
use tempfile::TempDir;

/// Bytes beyond which the host lets no file of the daemon grow while it fails.
const FILE_MAX: u64 = 1 << 20;
/// Sectors of a write.
const PIECE_SECTORS: u64 = 64;

/// A daemon with two volumes.
struct Rig {
    dir: TempDir,
    daemon: Daemon,
}

impl Rig {
    fn new() -> Self {
        let dir = temp_dir();
        let daemon = start(dir.path());
        let rig = Self { dir, daemon };
        for name in ["web", "db"] {
            rig.line(&format!("volume create {name} --size 16M"));
            let socket = rig.socket(name);
            rig.line(&format!(
                "volume attach {name} --socket {}",
                socket.display()
            ));
        }
        rig
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

    /// Lets the host refuse to make files longer than this, or not any more.
    fn limit_files(&self, bytes: Option<u64>) {
        let pid = i32::try_from(self.daemon.pid())
            .ok()
            .and_then(Pid::from_raw);
        let limit = Rlimit {
            current: bytes,
            maximum: None,
        };
        prlimit(pid, Resource::Fsize, limit).unwrap();
    }

    /// Why the volume takes no more writes.
    fn failure(&self, volume: &str) -> Option<String> {
        let shown = self.daemon.line(&format!("volume show {volume} --json"));
        shown.json()["failure"].as_str().map(ToOwned::to_owned)
    }
}

fn start(dir: &Path) -> Daemon {
    serve(dir, &[])
}

/// One that takes over from the one that runs.
fn succeed(dir: &Path) -> Daemon {
    serve(dir, &["--takeover"])
}

fn serve(dir: &Path, more: &[&str]) -> Daemon {
    let (store, control) = (dir.join("store"), dir.join("control.sock"));
    let mut command = Command::new(binary());
    command.arg("serve").arg("--store").arg(store);
    command.arg("--control").arg(&control).args(more);
    Daemon::spawn(&mut command, &control).unwrap()
}

/// What piece number `piece` holds.
fn content(piece: u64) -> Vec<u8> {
    vec![u8::try_from(piece + 1).unwrap(); usize::try_from(PIECE_SECTORS).unwrap() * 512]
}

/// A sector that lies behind the end that files may have.
const BEHIND: u64 = 2 * FILE_MAX / 512;

#[test]
fn a_failure_outlives_the_daemon_and_a_recovery_ends_it() {
    let mut rig = Rig::new();
    let mut web = rig.disk("web");
    web.write(0, &content(0));
    web.flush();
    rig.limit_files(Some(FILE_MAX));
    web.write(BEHIND, &content(1));
    assert_eq!(web.try_flush(), S_IOERR);
    rig.limit_files(None);
    // The host is well again: that is no reason to claim anything.
    assert_eq!(web.try_flush(), S_IOERR);
    assert_eq!(web.try_write(8, &content(2)), S_IOERR);
    let cause = rig.failure("web").expect("it has failed");
    assert!(cause.contains("File too large"), "{cause}");
    assert!(rig.line("volume list").contains("failed"));
    assert!(rig.daemon.wait_for("volume web takes no more writes"));
    assert_eq!(rig.failure("db"), None);
    let mut db = rig.disk("db");
    db.write(0, &content(3));
    db.flush();
    let busy = rig.daemon.line("volume recover web").refused();
    assert!(busy.contains("running guest"), "{busy}");
    let refused = rig.daemon.line("snapshot create s web").refused();
    assert!(refused.contains("takes no more writes"), "{refused}");
    drop((web, db));

    // Killed, and stopped in order.
    for end in ["kill", "stop", "kill"] {
        match end {
            "kill" => rig.daemon.kill(),
            _ => drop(rig.daemon.stop()),
        }
        rig.daemon = start(rig.dir.path());
        assert_eq!(rig.failure("web").as_deref(), Some(&*cause), "{end}");
        let mut web = rig.disk("web");
        assert_eq!(web.try_flush(), S_IOERR, "{end}");
        assert_eq!(web.try_write(8, &content(2)), S_IOERR, "{end}");
        assert!(web.read(0, PIECE_SECTORS) == content(0), "{end}");
        assert!(web.read(BEHIND, PIECE_SECTORS) == content(1), "{end}");
        assert_eq!(rig.failure("db"), None, "{end}");
    }
    // Taken over: what can still be read goes on to be read, over the same connection.
    let mut web = rig.disk("web");
    assert!(web.read(0, PIECE_SECTORS) == content(0));
    let old = std::mem::replace(&mut rig.daemon, succeed(rig.dir.path()));
    let (status, log) = old.ended();
    assert!(status.success(), "{log}");
    assert_eq!(rig.failure("web").as_deref(), Some(&*cause));
    assert_eq!(web.try_flush(), S_IOERR);
    assert!(web.read(BEHIND, PIECE_SECTORS) == content(1));
    drop(web);
    rig.line("volume detach web");
    let sound = rig.daemon.line("volume recover db").refused();
    assert!(sound.contains("has not failed"), "{sound}");
    let told = rig.line("volume recover web");
    for words in ["takes writes again", "64 KiB", &cause, "fsck"] {
        assert!(told.contains(words), "{words}: {told}");
    }
    assert_eq!(rig.failure("web"), None);
    let socket = rig.socket("web");
    rig.line(&format!("volume attach web --socket {}", socket.display()));
    let mut web = rig.disk("web");
    web.write(8, &content(2));
    web.flush();
    assert!(web.read(BEHIND, PIECE_SECTORS) == content(1));
    drop(web);
    let (status, _, log) = rig.daemon.stop();
    assert!(status.success(), "{log}");
}
