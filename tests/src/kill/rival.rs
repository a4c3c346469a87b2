//! The same guest, the same oracle, the same kills, and several back-ends: counts what each of them loses. A control group: it
//! shows that the oracle sees losses where there are some, and what is to be expected of a back-end.
//!
//! Each kill is of a fresh disk over a base, since what was written for the first time is what is lost most easily. The load is
//! of reads, writes and flushes: what a discarded sector holds is a promise of ours only.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use super::client::{Client, Fault, Link, Mix};
use super::home::Cache;
use super::oracle::{Fate, Oracle, SECTOR_BYTES, Value};
use super::rig::{Killer, QUEUES, Rig};
use crate::daemon::Daemon;
use crate::load::driver::{Driver, Options};
use crate::load::random::Random;
use crate::process::Process;
use crate::wait::until;

/// Sectors of a disk: 4 MiB.
const SECTORS: usize = 8 * 1024;
/// The shortest and the longest load before a kill, in microseconds.
const LOAD_MICROS: [u64; 2] = [10_000, 150_000];
/// Bytes of a read of what is left.
const SCAN_BYTES: usize = 64 << 10;

/// A back-end with a disk of its own kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackEnd {
    /// A volume over the base.
    Stratablk,
    /// `qemu-storage-daemon` with a qcow2 image over the base, writes cached by the host (`cache.direct=off`).
    Qcow2,
    /// `qemu-storage-daemon` with a raw copy of the base: all it has is the host's page cache, which survives it.
    Raw,
}

impl fmt::Display for BackEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Stratablk => "stratablk",
            Self::Qcow2 => "qemu-storage-daemon, qcow2",
            Self::Raw => "qemu-storage-daemon, raw",
        })
    }
}

/// What was lost in all.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Kills under load.
    pub kills: u64,
    /// Requests that completed before.
    pub completed: u64,
    /// Flushes among them.
    pub flushes: u64,
    /// Requests that were cut off.
    pub cut_off: u64,
    /// Kills by which something was lost.
    pub losses: u64,
    /// Sectors without a write that was acknowledged, but not flushed.
    pub unflushed: u64,
    /// Sectors without a write that was flushed.
    pub flushed: u64,
    /// Sectors that hold no value whole.
    pub torn: u64,
}

impl Tally {
    /// The head of a table of tallies.
    pub fn head() -> String {
        format!(
            "{:<28}{:>7}{:>11}{:>9}{:>9}{:>12}{:>20}{:>18}{:>8}",
            "back-end",
            "kills",
            "completed",
            "flushes",
            "cut off",
            "kills that",
            "sectors lost",
            "sectors lost",
            "sectors"
        ) + &format!(
            "\n{:<28}{:>7}{:>11}{:>9}{:>9}{:>12}{:>20}{:>18}{:>8}",
            "",
            "",
            "requests",
            "",
            "",
            "lose data",
            "(not flushed: P5)",
            "(flushed: P1,P2)",
            "torn"
        )
    }

    /// Its line of the table.
    pub fn line(&self, of: BackEnd) -> String {
        let Self {
            kills,
            completed,
            flushes,
            cut_off,
            losses,
            unflushed,
            flushed,
            torn,
        } = self;
        format!(
            "{of:<28}{kills:>7}{completed:>11}{flushes:>9}{cut_off:>9}{losses:>12}{unflushed:>20}{flushed:>18}{torn:>8}"
        )
    }
}

/// A disk that outlives its back-end.
enum Disk {
    /// A store.
    Stratablk(Rig),
    /// Files in a directory.
    Qemu(TempDir, BackEnd),
}

/// A back-end that runs. Killed when dropped, and its cache removed.
enum Server {
    /// Ours.
    Stratablk(Daemon),
    /// The other one.
    Qemu(Process),
}

impl Server {
    /// Its process.
    fn pid(&self) -> u32 {
        match self {
            Self::Stratablk(daemon) => daemon.pid(),
            Self::Qemu(process) => process.child.id(),
        }
    }

    /// Waits for the end of one that was killed. Only then has it completed all that it ever will, and what it leaves stays.
    fn await_end(self) {
        match self {
            Self::Stratablk(daemon) => drop(daemon.ended()),
            Self::Qemu(mut process) => drop(process.child.wait()),
        }
    }
}

impl Disk {
    /// A disk that holds what the oracle says.
    fn new(of: BackEnd, oracle: &Oracle) -> Self {
        if of == BackEnd::Stratablk {
            return Self::Stratablk(Rig::new(oracle, true, Cache::LARGE));
        }
        let mut builder = tempfile::Builder::new();
        builder.prefix("stratablk-rival-");
        // Where the store of ours is as well.
        let dir = builder
            .tempdir_in("/dev/shm")
            .expect("room for a directory");
        let mut bytes = vec![0; oracle.len() * SECTOR_BYTES];
        oracle.fill(0, Value::Base, &mut bytes);
        let base = dir.path().join("base.img");
        std::fs::write(&base, bytes).expect("an image");
        if of == BackEnd::Qcow2 {
            let made = Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
                .args([&base, &dir.path().join("disk.qcow2")])
                .status();
            assert!(made.expect("qemu-img; see scripts/setup --guest").success());
        }
        Self::Qemu(dir, of)
    }

    /// Where it is served.
    fn socket(&self) -> PathBuf {
        match self {
            Self::Stratablk(rig) => rig.socket(),
            Self::Qemu(dir, _) => dir.path().join("disk.sock"),
        }
    }

    /// Starts its back-end.
    fn serve(&self) -> Server {
        let (dir, of) = match self {
            Self::Stratablk(rig) => {
                let daemon = rig.launch();
                assert!(daemon.await_ready(), "{}", daemon.log());
                return Server::Stratablk(daemon);
            }
            Self::Qemu(dir, of) => (dir.path(), *of),
        };
        let node = |name: &str| {
            format!(
                "file.driver=file,file.filename={}",
                dir.join(name).display()
            )
        };
        let node = match of {
            BackEnd::Qcow2 => format!("driver=qcow2,{}", node("disk.qcow2")),
            _ => format!("driver=raw,{}", node("base.img")),
        };
        let socket = self.socket();
        // The one of a back-end that was killed stays.
        drop(std::fs::remove_file(&socket));
        let export = format!(
            "type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={},writable=on,writethrough=off,\
             num-queues={QUEUES}",
            socket.display()
        );
        let child = Command::new("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!(
                "{node},node-name=disk,discard=unmap,cache.direct=off,cache.no-flush=off"
            ))
            .arg("--export")
            .arg(export)
            .stdin(Stdio::null())
            .spawn();
        let child = child.expect("qemu-storage-daemon; see scripts/setup --guest");
        Server::Qemu(Process { child })
    }
}

/// Tries until the back-end has made its socket.
fn retry<T, E: fmt::Display>(mut connect: impl FnMut() -> Result<T, E>) -> T {
    let mut last = None;
    let connected = until(|| {
        last = Some(connect());
        matches!(last, Some(Ok(_)))
    });
    match last {
        Some(Ok(it)) if connected => it,
        Some(Err(error)) => panic!("no session: {error}"),
        _ => panic!("no session"),
    }
}

/// Kills a back-end so often, and counts.
///
/// # Errors
/// The back-end fails a request, or a read returns what it must not, before any kill.
///
/// # Panics
/// The host refuses what a test needs.
pub fn count(of: BackEnd, seed: u64, kills: u64) -> Result<Tally, Fault> {
    let mut tally = Tally::default();
    let mut random = Random::new(seed ^ 0x7269_7661);
    for round in 0..kills {
        let mut client = Client::new(seed + round, SECTORS, Mix::Transfers);
        let disk = Disk::new(of, &client.oracle);
        let [least, most] = LOAD_MICROS;
        let delay = Duration::from_micros(least + random.below(most - least));
        tally.cut_off += load_and_kill(&disk, &mut client, delay)?;
        tally.kills += 1;
        tally.completed += client.counts.completed;
        tally.flushes += client.counts.flushes;
        let lost = judge(&disk, &mut client.oracle);
        let [unflushed, flushed, torn] = lost;
        tally.unflushed += unflushed;
        tally.flushed += flushed;
        tally.torn += torn;
        tally.losses += u64::from(lost != [0; 3]);
    }
    Ok(tally)
}

/// Has a back-end killed in the midst of work. Returns how many requests were cut off.
fn load_and_kill(disk: &Disk, client: &mut Client, delay: Duration) -> Result<u64, Fault> {
    let server = disk.serve();
    let socket = disk.socket();
    let mut link: Link = retry(|| client.connect(&socket));
    let killer = Killer::of_process(server.pid(), delay);
    let result = client.load(&mut link, killer.flag());
    killer.finish();
    server.await_end();
    result?;
    client.bury_for_good(link)
}

/// Reads what a killed back-end has left, with the next one. Returns how many sectors lost something that was not flushed,
/// lost something that was flushed, and are torn.
fn judge(disk: &Disk, oracle: &mut Oracle) -> [u64; 3] {
    let _server = disk.serve();
    let socket = disk.socket();
    let mut driver = retry(|| scanner(&socket));
    let mut lost = [0; 3];
    let bytes = driver.capacity_bytes();
    assert_eq!(bytes, (SECTORS * SECTOR_BYTES) as u64);
    let scanned = driver.scan(0, bytes, |offset, bytes| {
        let first = offset / SECTOR_BYTES as u64;
        for (sector, bytes) in (first..).zip(bytes.chunks_exact(SECTOR_BYTES)) {
            match oracle.fate(sector, bytes) {
                Fate::Kept => {}
                Fate::LostUnflushed => lost[0] += 1,
                Fate::LostFlushed => lost[1] += 1,
                Fate::Torn => lost[2] += 1,
            }
        }
    });
    scanned.unwrap_or_else(|error| panic!("{error}"));
    lost
}

/// A driver that reads.
fn scanner(socket: &Path) -> Result<Driver, crate::load::driver::DriverError> {
    Driver::connect(Options {
        buffer_bytes: SCAN_BYTES,
        depth: 8,
        ..Options::new(socket)
    })
}
