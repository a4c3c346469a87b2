//! The directories of a store and of its daemon's cache, and the daemon that serves it: all that outlives a daemon.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::oracle::{Oracle, SECTOR_BYTES, Value};
use crate::daemon::{Daemon, run, stratablk};

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
pub struct Home {
    /// Store, images and sockets.
    dir: TempDir,
    /// The daemon's cache, in shared memory.
    cache_dir: TempDir,
    /// Arguments of `serve`.
    arguments: Vec<OsString>,
}

impl Home {
    /// Makes the directories, with this word in their names, for a store that the first daemon makes. `in_memory`: on tmpfs.
    ///
    /// # Panics
    /// The host refuses.
    pub fn new(word: &str, in_memory: bool, cache: Cache) -> Self {
        let prefix = format!("stratablk-{word}-");
        let temp = |place: &Path| {
            let mut builder = tempfile::Builder::new();
            builder.prefix(&prefix);
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
        Self {
            dir,
            cache_dir,
            arguments,
        }
    }

    /// A path beside the store.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The store.
    fn store(&self) -> PathBuf {
        self.path("store")
    }

    /// Writes a raw image full of the oracle's base.
    ///
    /// # Panics
    /// The host refuses.
    pub fn image(&self, name: &str, base: &Oracle) {
        let mut bytes = vec![0; base.len() * SECTOR_BYTES];
        base.fill(0, Value::Base, &mut bytes);
        fs::write(self.path(name), bytes).expect("an image");
    }

    /// Starts a daemon and waits for nothing.
    pub fn launch(&self) -> Daemon {
        let mut command = stratablk(["serve"]);
        command.args(&self.arguments).args(["--log", "info"]);
        Daemon::launch(&mut command, &self.store().join("control.sock"))
    }

    /// Starts a daemon that takes over from the one that runs, and waits for nothing.
    pub fn succeed(&self) -> Daemon {
        self.succeed_with(&[])
    }

    /// The same with more arguments, which replace those of the same name.
    pub fn succeed_with(&self, more: &[&str]) -> Daemon {
        let mut command = stratablk(["serve", "--takeover", "--log", "stratablk=debug"]);
        let pairs = self.arguments.chunks(2);
        let replaced = |pair: &&[OsString]| !more.iter().any(|word| pair[0] == *word);
        command.args(pairs.filter(replaced).flatten()).args(more);
        Daemon::launch(&mut command, &self.store().join("control.sock"))
    }

    /// Gives commands to a daemon that is started for them, and stopped in order.
    ///
    /// # Panics
    /// It refuses one.
    pub fn set_up(&self, lines: &[String]) {
        let daemon = self.launch();
        assert!(daemon.await_ready(), "{}", daemon.log());
        for line in lines {
            daemon.line(line).ok();
        }
        let (status, _, log) = daemon.stop();
        assert!(status.success(), "{log}");
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
