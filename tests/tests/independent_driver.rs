//! An independent driver writes stamped blocks at full depth while snapshots are taken; a clone of each snapshot must
//! show a consistent cut of what was written. See `stratablk_tests::load::cut` for what that means.

#![expect(clippy::unwrap_used, reason = "a failure here is the test's failure")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use stratablk_tests::daemon::{Daemon, temp_dir};
use stratablk_tests::load::cut::{self, Cut, History};
use stratablk_tests::load::driver::{Done, Driver, Options, Request, Wait};
use stratablk_tests::load::random::Random;
use stratablk_tests::load::stamp::{Content, STAMP_BYTES, Stamp, read_block};
use tempfile::TempDir;

/// Bytes of a test disk.
const DISK: &str = "64M";
/// Blocks of a disk that are written, few enough to be rewritten often between two snapshots.
const BLOCKS: usize = 4096;
/// Writes under way on each queue.
const DEPTH: usize = 32;
/// Queues of each disk.
const QUEUES: usize = 2;
/// Snapshots taken of a run.
const SNAPSHOTS: usize = 6;
/// Writes between two snapshots, at least.
const WRITES_BETWEEN: usize = 2000;
/// Whatever takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running daemon on a store of its own.
struct Served {
    /// The process; gone before its directory.
    daemon: Daemon,
    /// Holds the store and the sockets; vanishes with the test.
    directory: TempDir,
}

impl Served {
    /// Starts a daemon on an empty store.
    fn start() -> Self {
        let directory = temp_dir();
        Self {
            daemon: Daemon::on_store(&directory.path().join("store")),
            directory,
        }
    }

    /// Runs a command of the CLI, which must succeed.
    fn run(&self, arguments: &[&str]) {
        self.daemon.cli(arguments).ok();
    }

    /// Attaches a volume and connects to it.
    fn connect(&self, volume: &str, wait: Wait) -> Driver {
        let socket = self.directory.path().join(format!("{volume}.sock"));
        let queues = QUEUES.to_string();
        self.run(&[
            "volume",
            "attach",
            volume,
            "--socket",
            socket.to_str().unwrap(),
            "--queues",
            &queues,
        ]);
        Driver::connect(Options {
            queues: QUEUES,
            depth: DEPTH,
            buffer_bytes: STAMP_BYTES,
            wait,
            patience: PATIENCE,
            ..Options::new(&socket)
        })
        .unwrap()
    }
}

/// The writer of a run: stamped blocks to random places of all disks, a window of `QUEUES * DEPTH` under way on each.
struct Writer<'a> {
    /// A session with each disk.
    disks: &'a mut [Driver],
    /// Every write, its issue and its completion.
    history: &'a mut History,
    /// In every stamp; the places follow from it.
    seed: u64,
    /// Told each time another `WRITES_BETWEEN` were issued.
    progress: SyncSender<()>,
}

/// A slot: disk, queue, and its number there.
type Slot = (usize, usize, usize);

impl Writer<'_> {
    /// Writes until `stop`, then waits for what is under way.
    fn write(&mut self, stop: &AtomicBool) {
        let mut random = Random::new(self.seed);
        let mut busy = vec![vec![false; BLOCKS]; self.disks.len()];
        let mut under_way = vec![vec![[0; DEPTH]; QUEUES]; self.disks.len()];
        let mut idle: Vec<Slot> = Vec::new();
        for slot in 0..DEPTH {
            for queue in 0..QUEUES {
                // Neighbours in the list lie on different disks, so that the writer alternates between them.
                idle.extend((0..self.disks.len()).map(|disk| (disk, queue, slot)));
            }
        }
        let mut progress = Instant::now();
        loop {
            let stopping = stop.load(Ordering::Relaxed);
            if !stopping {
                for slot in idle.drain(..) {
                    let (disk, queue, index) = slot;
                    let block = loop {
                        let block = usize::try_from(random.below(BLOCKS as u64)).unwrap();
                        if !std::mem::replace(&mut busy[disk][block], true) {
                            break block;
                        }
                    };
                    under_way[disk][queue][index] = self.issue(slot, block as u64);
                }
                for disk in self.disks.iter_mut() {
                    for queue in 0..QUEUES {
                        disk.kick(queue).unwrap();
                    }
                }
            }
            let ended = self.poll();
            if !ended.is_empty() {
                progress = Instant::now();
            }
            assert!(
                progress.elapsed() < PATIENCE,
                "no write completed for {PATIENCE:?}"
            );
            for (number, queue, done) in ended {
                let sequence = under_way[number][queue][done.slot];
                self.history.complete(sequence);
                let block = self.history.write(sequence).unwrap().block;
                busy[number][usize::try_from(block).unwrap()] = false;
                idle.push((number, queue, done.slot));
            }
            if stopping && self.disks.iter().all(|disk| disk.under_way() == 0) {
                return;
            }
            if idle.is_empty() {
                thread::yield_now();
            }
        }
    }

    /// Issues a write of `block` in an idle slot; returns its number.
    fn issue(&mut self, (disk, queue, slot): Slot, block: u64) -> u64 {
        let sequence = self.history.issue(disk_number(disk), block);
        let stamp = Stamp {
            disk: disk_number(disk),
            queue: u16::try_from(queue).unwrap(),
            block,
            sequence,
            seed: self.seed,
        };
        stamp.write_to(self.disks[disk].buffer_mut(queue, slot));
        let request = Request::Write {
            offset: block * STAMP_BYTES as u64,
            len: STAMP_BYTES,
        };
        self.disks[disk].submit(queue, slot, request).unwrap();
        if self.history.len().is_multiple_of(WRITES_BETWEEN) {
            // A full channel has told the reader already.
            let _told = self.progress.try_send(());
        }
        sequence
    }

    /// The writes that have ended: disk, queue, slot.
    fn poll(&mut self) -> Vec<(usize, usize, Done)> {
        let mut ended = Vec::new();
        let mut done = Vec::new();
        for (number, disk) in self.disks.iter_mut().enumerate() {
            for queue in 0..QUEUES {
                disk.poll(queue, &mut done).unwrap();
                ended.extend(done.drain(..).map(|done| (number, queue, done)));
            }
        }
        ended
    }
}

/// Waits until `WRITES_BETWEEN` more writes were issued, from now on.
fn await_progress(progress: &Receiver<()>) {
    // The first may have lain in the channel, the second may have come after a single write more.
    for _ in 0..3 {
        progress.recv_timeout(PATIENCE).unwrap();
    }
}

/// The number of a disk in stamps.
fn disk_number(disk: usize) -> u32 {
    u32::try_from(disk).unwrap()
}

/// Reads what a disk holds into a cut.
fn read(driver: &mut Driver, disk: u32, seed: u64, cut: &mut Cut) {
    let mut stamps = 0;
    driver
        .scan(0, (BLOCKS * STAMP_BYTES) as u64, |offset, bytes| {
            let block = offset / STAMP_BYTES as u64;
            match read_block(bytes, disk, block) {
                Ok(Content::Zeroes) => {}
                Ok(Content::Stamped(stamp)) => {
                    assert_eq!(stamp.seed, seed, "block {block} holds data of another run");
                    cut.set(disk, block, stamp.sequence);
                    stamps += 1;
                }
                Err(damage) => panic!("block {block} of disk {disk}: {damage}"),
            }
        })
        .unwrap();
    assert!(stamps > 0, "disk {disk} holds nothing");
}

/// A run that is over: disks that were written to, and the snapshots taken meanwhile.
struct Run {
    /// Sessions with the disks; gone before the daemon.
    disks: Vec<Driver>,
    /// Holds the disks and their snapshots.
    served: Served,
    /// The volumes, by the number of the disk.
    names: Vec<String>,
    /// Every write.
    history: History,
    /// When each snapshot was taken.
    commands: Vec<cut::Command>,
    /// In every stamp.
    seed: u64,
}

impl Run {
    /// Writes to `volumes` disks and meanwhile lets `take` take snapshots, given their names and those of the volumes.
    fn with_snapshots(volumes: usize, seed: u64, take: impl Fn(&Served, &str, &[String])) -> Self {
        let served = Served::start();
        let names: Vec<String> = (0..volumes).map(|disk| format!("disk{disk}")).collect();
        for name in &names {
            served.run(&["volume", "create", name, "--size", DISK]);
        }
        let mut disks: Vec<Driver> = names
            .iter()
            .map(|name| served.connect(name, Wait::Spin))
            .collect();
        let mut history = History::default();
        let clock = history.clock();
        let stop = AtomicBool::new(false);
        let (tell, progress) = sync_channel(1);
        let commands = thread::scope(|scope| {
            let mut writer = Writer {
                disks: &mut disks,
                history: &mut history,
                seed,
                progress: tell,
            };
            let stop_at_end = StopAtEnd(&stop);
            let writer = scope.spawn({
                let stop = &stop;
                move || writer.write(stop)
            });
            let mut commands = Vec::new();
            for snapshot in 0..SNAPSHOTS {
                await_progress(&progress);
                let given = clock.now();
                take(&served, &snapshot_name(snapshot), &names);
                commands.push(cut::Command {
                    given,
                    returned: clock.now(),
                });
            }
            await_progress(&progress);
            drop(stop_at_end);
            writer.join().unwrap();
            commands
        });
        Self {
            disks,
            served,
            names,
            history,
            commands,
            seed,
        }
    }

    /// What clones of one snapshot hold.
    fn cut(&self, snapshot: usize) -> Cut {
        let mut cut = Cut::new(self.names.len(), BLOCKS);
        for (disk, name) in self.names.iter().enumerate() {
            let clone = format!("clone{snapshot}-{name}");
            let source = format!("{name}@{}", snapshot_name(snapshot));
            self.served
                .run(&["volume", "create", &clone, "--from", &source]);
            let mut driver = self.served.connect(&clone, Wait::Sleep);
            read(&mut driver, disk_number(disk), self.seed, &mut cut);
        }
        cut
    }

    /// Checks all snapshots, and that there was enough load around each for that to mean something.
    fn check_snapshots(&self) {
        for (snapshot, command) in self.commands.iter().enumerate() {
            let summary =
                cut::check(&self.history, *command, &self.cut(snapshot)).unwrap_or_else(|wrong| {
                    panic!(
                        "seed {}, snapshot {snapshot}, {command:?}: {wrong}",
                        self.seed
                    )
                });
            println!(
                "snapshot {snapshot}: {summary:?} of {} writes, {command:?}",
                self.history.len()
            );
            assert!(
                summary.required >= WRITES_BETWEEN * (snapshot + 1),
                "the load was too weak: {summary:?}"
            );
            let after = self.history.len() - usize::try_from(summary.newest).unwrap();
            assert!(
                after >= WRITES_BETWEEN,
                "no load after snapshot {snapshot}: {summary:?}"
            );
        }
    }

    /// Checks that the disks themselves hold every last write.
    fn check_disks(&mut self) {
        let now = self.history.clock().now();
        let mut live = Cut::new(self.names.len(), BLOCKS);
        for (disk, driver) in self.disks.iter_mut().enumerate() {
            read(driver, disk_number(disk), self.seed, &mut live);
        }
        let summary = cut::check(
            &self.history,
            cut::Command {
                given: now,
                returned: now,
            },
            &live,
        )
        .unwrap_or_else(|wrong| panic!("seed {}, the disks at the end: {wrong}", self.seed));
        assert_eq!(summary.required, self.history.len());
    }
}

/// The name of a snapshot.
fn snapshot_name(snapshot: usize) -> String {
    format!("snapshot{snapshot}")
}

/// One snapshot of all volumes at one instant.
fn take_group(served: &Served, snapshot: &str, volumes: &[String]) {
    let mut arguments = vec!["snapshot", "create", snapshot];
    arguments.extend(volumes.iter().map(String::as_str));
    served.run(&arguments);
}

/// Ends the writer even if the test fails, so that the failure is shown instead of a hang.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn snapshots_of_a_busy_disk_are_consistent_cuts() {
    let mut run = Run::with_snapshots(1, 11, take_group);
    run.check_snapshots();
    run.check_disks();
}

#[test]
fn a_snapshot_of_two_busy_disks_is_one_consistent_cut() {
    let mut run = Run::with_snapshots(2, 12, take_group);
    run.check_snapshots();
    run.check_disks();
}

#[test]
fn canary_snapshots_of_two_disks_one_after_the_other_are_no_cut() {
    let run = Run::with_snapshots(2, 13, |served, snapshot, volumes| {
        for volume in volumes {
            served.run(&["snapshot", "create", snapshot, volume]);
        }
    });
    let caught = (0..SNAPSHOTS)
        .filter(|snapshot| {
            cut::check(&run.history, run.commands[*snapshot], &run.cut(*snapshot)).is_err()
        })
        .count();
    assert!(
        caught > 0,
        "the check accepts snapshots that are not of one instant"
    );
}
