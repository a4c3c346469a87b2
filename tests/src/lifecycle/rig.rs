//! A store with two attached volumes, one of them over a base full of stamped data, and the daemon that serves it.

use std::ops::Deref;
use std::path::PathBuf;

use crate::daemon::Daemon;
use crate::kill::home::{Cache, Home};
use crate::kill::oracle::{Oracle, SECTOR_BYTES, Value};
use crate::kill::rig::QUEUES;
use crate::load::driver::{Driver, Options};

/// Names of the volumes that guests use.
pub const VOLUMES: [&str; 2] = ["based", "empty"];
/// Bytes of a read of what nobody uses.
const SCAN_BYTES: usize = 64 << 10;

/// All that outlives a daemon.
#[derive(Debug)]
pub struct Rig(Home);

impl Deref for Rig {
    type Target = Home;

    fn deref(&self) -> &Home {
        &self.0
    }
}

impl Rig {
    /// Makes a base that holds what the oracle says, a store with a volume over it, and an empty volume of the same size.
    /// `in_memory`: on tmpfs.
    ///
    /// # Panics
    /// The host or the daemon refuses.
    pub fn new(base: &Oracle, in_memory: bool, cache: Cache) -> Self {
        let rig = Self(Home::new("life", in_memory, cache));
        rig.image("base.img", base);
        let [based, empty] = VOLUMES;
        let bytes = base.len() * SECTOR_BYTES;
        let image = rig.path("base.img");
        rig.set_up(&[
            format!("volume create {based} --base {}", image.display()),
            format!("volume create {empty} --size {bytes}"),
            rig.attach(based, QUEUES),
            rig.attach(empty, QUEUES),
        ]);
        rig
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
}
