//! A store with one attached volume over a base full of stamped data, and the daemon that serves it.

use std::ffi::OsString;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tempfile::TempDir;

use super::oracle::{Oracle, SECTOR_BYTES, Value};
use crate::daemon::{Daemon, run, stratablk};

/// The volume.
pub const VOLUME: &str = "disk";
/// Its queues.
pub const QUEUES: usize = 2;

/// How the daemon caches, if it does.
#[derive(Clone, Copy, Debug)]
pub struct Cache {
    /// `--cache-size`.
    pub size: &'static str,
    /// `--dirty-limit`.
    pub dirty_limit: &'static str,
    /// `--dirty-age`, in seconds.
    pub dirty_age: &'static str,
}

impl Cache {
    /// Holds everything for long.
    pub const LARGE: Self = Self {
        size: "64M",
        dirty_limit: "32M",
        dirty_age: "60",
    };
    /// Is written back and replaced all the time.
    pub const SMALL: Self = Self {
        size: "2M",
        dirty_limit: "256K",
        dirty_age: "1",
    };

    /// Whether this daemon has a cache that outlives it.
    pub fn is_there() -> bool {
        run(["serve", "--help"]).ok().contains("--cache-dir")
    }
}

/// All that outlives a daemon.
#[derive(Debug)]
pub struct Rig {
    /// Store, base and sockets.
    dir: TempDir,
    /// The daemon's cache, in shared memory.
    cache_dir: TempDir,
    /// Arguments of `serve`.
    arguments: Vec<OsString>,
}

impl Rig {
    /// Makes a base that holds what the oracle says, and a store with a volume over it. `in_memory`: on tmpfs.
    ///
    /// # Panics
    /// The host or the daemon refuses.
    pub fn new(oracle: &Oracle, in_memory: bool, cache: Cache) -> Self {
        let temp = |place: &Path| {
            let mut builder = tempfile::Builder::new();
            builder.prefix("stratablk-kill-");
            builder.tempdir_in(place).expect("room for a directory")
        };
        let shm = Path::new("/dev/shm");
        let dir = if in_memory {
            temp(shm)
        } else {
            temp(&std::env::temp_dir())
        };
        let cache_dir = temp(shm);
        let mut arguments = vec![OsString::from("--store"), dir.path().join("store").into()];
        if Cache::is_there() {
            arguments.extend(["--cache-dir".into(), cache_dir.path().into()]);
            arguments.extend(["--cache-size", cache.size].map(OsString::from));
            arguments.extend(["--dirty-limit", cache.dirty_limit].map(OsString::from));
            arguments.extend(["--dirty-age", cache.dirty_age].map(OsString::from));
        }
        let rig = Self {
            dir,
            cache_dir,
            arguments,
        };
        let mut base = vec![0; oracle.len() * SECTOR_BYTES];
        oracle.fill(0, Value::Base, &mut base);
        let image = rig.dir.path().join("base.img");
        fs::write(&image, base).expect("a base");
        let daemon = rig.launch();
        assert!(daemon.await_ready(), "{}", daemon.log());
        let (image, socket) = (image.display(), rig.socket());
        daemon
            .line(&format!("volume create {VOLUME} --base {image}"))
            .ok();
        daemon
            .line(&format!(
                "volume attach {VOLUME} --queues {QUEUES} --socket {}",
                socket.display()
            ))
            .ok();
        let (status, _, log) = daemon.stop();
        assert!(status.success(), "{log}");
        rig
    }

    /// The volume's socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("disk.sock")
    }

    /// The store.
    pub fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    /// The control socket.
    pub fn control(&self) -> PathBuf {
        self.store().join("control.sock")
    }

    /// Starts a daemon and waits for nothing.
    pub fn launch(&self) -> Daemon {
        let mut command = stratablk(["serve"]);
        command.args(&self.arguments).args(["--log", "warn"]);
        Daemon::launch(&mut command, &self.control())
    }

    /// Loses what a host loses that loses power. Returns how many files that were.
    ///
    /// # Panics
    /// The host refuses.
    pub fn lose_cache(&self) -> usize {
        let files = fs::read_dir(self.cache_dir.path()).expect("a directory of ours");
        files
            .map(|file| fs::remove_file(file.expect("an entry").path()).expect("a file of ours"))
            .count()
    }

    /// What `stratablk check` says of the store, which nobody serves.
    ///
    /// # Errors
    /// Its output, if the store is not sound.
    pub fn check(&self) -> Result<(), String> {
        let store = self.store();
        let ran = run([
            OsString::from("check"),
            OsString::from("--store"),
            store.into_os_string(),
        ]);
        if ran.code == Some(0) {
            Ok(())
        } else {
            Err(format!("{}{}", ran.stdout, ran.stderr))
        }
    }
}

/// Kills a daemon at some instant, from a thread of its own.
#[derive(Debug)]
pub struct Killer {
    /// Set just before the kill.
    killed: Arc<AtomicBool>,
    /// Ends with the kill.
    thread: JoinHandle<()>,
}

impl Killer {
    /// Kills `daemon` after that time, unless it ends before.
    ///
    /// # Panics
    /// The host refuses.
    pub fn start(daemon: &Daemon, delay: Duration) -> Self {
        let pid = rustix::process::Pid::from_raw(i32::try_from(daemon.pid()).expect("a pid"));
        let pidfd = pidfd_open(pid.expect("not 0"), PidfdFlags::empty());
        let pidfd: OwnedFd = pidfd.expect("the daemon was not waited for");
        let killed = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&killed);
        let thread = thread::spawn(move || {
            let timeout = Timespec::try_from(delay).expect("a short time");
            let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
            // However it ends: an early end of the daemon shows when it is waited for.
            let _ = poll(&mut fds, Some(&timeout));
            flag.store(true, Ordering::Relaxed);
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        });
        Self { killed, thread }
    }

    /// Readable by whoever drives the load: time to look at what became of the daemon.
    pub fn flag(&self) -> &AtomicBool {
        &self.killed
    }

    /// Waits for the kill.
    ///
    /// # Panics
    /// The thread did.
    pub fn finish(self) {
        self.thread.join().expect("the killer");
    }
}
