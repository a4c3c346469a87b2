//! A store with two attached volumes, one of them over a base full of stamped data, and the daemon that serves it.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::daemon::{Daemon, run, stratablk};
use crate::kill::oracle::{Oracle, SECTOR_BYTES, Value};
use crate::kill::rig::{Cache, QUEUES};
use crate::load::driver::{Driver, Options};

/// Names of the volumes that guests use.
pub const VOLUMES: [&str; 2] = ["based", "empty"];
/// Bytes of a read of what nobody uses.
const SCAN_BYTES: usize = 64 << 10;

/// All that outlives a daemon.
#[derive(Debug)]
pub struct Rig {
    /// Store, images and sockets.
    dir: TempDir,
    /// The daemon's cache, in shared memory.
    _cache_dir: TempDir,
    /// Arguments of `serve`.
    arguments: Vec<OsString>,
}

impl Rig {
    /// Makes a base that holds what the oracle says, a store with a volume over it, and an empty volume of the same size.
    /// `in_memory`: on tmpfs.
    ///
    /// # Panics
    /// The host or the daemon refuses.
    pub fn new(base: &Oracle, in_memory: bool, cache: Cache) -> Self {
        let temp = |place: &Path| {
            let mut builder = tempfile::Builder::new();
            builder.prefix("stratablk-life-");
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
        arguments.extend(["--cache-dir".into(), cache_dir.path().into()]);
        arguments.extend(["--cache-size", cache.size].map(OsString::from));
        arguments.extend(["--dirty-limit", cache.dirty_limit].map(OsString::from));
        arguments.extend(["--dirty-age", cache.dirty_age].map(OsString::from));
        let rig = Self {
            dir,
            _cache_dir: cache_dir,
            arguments,
        };
        rig.image("base.img", base);
        let daemon = rig.launch();
        assert!(daemon.await_ready(), "{}", daemon.log());
        let [based, empty] = VOLUMES;
        let bytes = base.len() * SECTOR_BYTES;
        let image = rig.path("base.img");
        daemon
            .line(&format!("volume create {based} --base {}", image.display()))
            .ok();
        daemon
            .line(&format!("volume create {empty} --size {bytes}"))
            .ok();
        for volume in VOLUMES {
            daemon.line(&rig.attach(volume, QUEUES)).ok();
        }
        let (status, _, log) = daemon.stop();
        assert!(status.success(), "{log}");
        rig
    }

    /// Writes a raw image full of the oracle's base.
    fn image(&self, name: &str, base: &Oracle) {
        let mut bytes = vec![0; base.len() * SECTOR_BYTES];
        base.fill(0, Value::Base, &mut bytes);
        fs::write(self.path(name), bytes).expect("an image");
    }

    /// A path beside the store.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The command that attaches a volume.
    pub fn attach(&self, volume: &str, queues: usize) -> String {
        let socket = self.socket(volume);
        format!(
            "volume attach {volume} --queues {queues} --socket {}",
            socket.display()
        )
    }

    /// A volume's socket.
    pub fn socket(&self, volume: &str) -> PathBuf {
        self.path(&format!("{volume}.sock"))
    }

    /// The store.
    fn store(&self) -> PathBuf {
        self.path("store")
    }

    /// Starts a daemon and waits for nothing.
    pub fn launch(&self) -> Daemon {
        let mut command = stratablk(["serve"]);
        command.args(&self.arguments).args(["--log", "warn"]);
        Daemon::launch(&mut command, &self.store().join("control.sock"))
    }

    /// Reads a volume that nobody uses, whole, by the stamps of this oracle.
    ///
    /// # Errors
    /// Sectors that hold nothing that was ever written there; or a daemon that fails.
    pub fn read(
        &self,
        daemon: &Daemon,
        volume: &str,
        oracle: &Oracle,
    ) -> Result<Vec<Value>, String> {
        let done = |line: &str| {
            let ran = daemon.line(line);
            match ran.code {
                Some(0) => Ok(()),
                _ => Err(format!("{line}: {}", ran.stderr)),
            }
        };
        done(&self.attach(volume, 1))?;
        let read = self.scan(volume, oracle);
        done(&format!("volume detach {volume}"))?;
        read.map_err(|what| format!("{volume}: {what}"))
    }

    /// The same of a volume that is attached.
    fn scan(&self, volume: &str, oracle: &Oracle) -> Result<Vec<Value>, String> {
        let mut driver = Driver::connect(Options {
            buffer_bytes: SCAN_BYTES,
            depth: 8,
            ..Options::new(&self.socket(volume))
        })
        .map_err(|error| error.to_string())?;
        let bytes = driver.capacity_bytes();
        let sectors = usize::try_from(bytes).expect("64-bit host") / SECTOR_BYTES;
        let mut values = vec![None; sectors];
        driver
            .scan(0, bytes, |offset, bytes| {
                let first = offset / SECTOR_BYTES as u64;
                for (sector, bytes) in (first..).zip(bytes.chunks_exact(SECTOR_BYTES)) {
                    let at = usize::try_from(sector).expect("64-bit host");
                    values[at] = oracle.decode(sector, bytes);
                }
            })
            .map_err(|error| error.to_string())?;
        let known = values.iter().position(Option::is_none);
        match known {
            None => Ok(values.into_iter().flatten().collect()),
            Some(sector) => Err(format!(
                "sector {sector} holds what was never written there"
            )),
        }
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
