//! Trees of real disks live on while their daemon is killed in the midst of commands and jobs, and no command makes a guest's
//! request wait. See `stratablk_tests::lifecycle`.
//!
//! `STRATABLK_LIFECYCLE_KILLS` says how often to kill (16), `STRATABLK_LIFECYCLE_SEED` repeats a run, as far as the instants of
//! the kills allow.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use stratablk_tests::daemon::Daemon;
use stratablk_tests::kill::home::Cache;
use stratablk_tests::kill::oracle::Oracle;
use stratablk_tests::lifecycle::control::{Command, jobs_left, pass};
use stratablk_tests::lifecycle::gaps::{self, Ended, Load};
use stratablk_tests::lifecycle::judge::{ALLOWED, Verdict, Waits};
use stratablk_tests::lifecycle::rig::{Rig, VOLUMES};
use stratablk_tests::lifecycle::run::{Plan, run};
use stratablk_tests::wait::{event, readable, until};

/// Kills of one store, after which the next one gets another seed and cache.
const KILLS_A_STORE: u64 = 8;
/// Passes through all commands, before the first judgement.
const PASSES_MIN: u64 = 16;
/// How long it may take until it can be told whether commands make requests wait.
const TIME_MAX: Duration = Duration::from_secs(60);
/// How long requests are watched after a command.
const TAIL: Duration = Duration::from_millis(5);
/// How long the daemon is stopped, to see whether that is noticed.
const PLANTED: Duration = Duration::from_millis(5);
/// Bytes of the disk in use.
const DISK_BYTES: u64 = 2 << 30;
/// Clusters of it, each by itself, that its map speaks of.
const CLUSTERS: u64 = 1 << 17;
/// By how many bytes a disk grows each time.
const GROWTH: u64 = 1 << 20;

/// What was done in a time.
#[derive(Clone, Copy, Debug)]
enum What {
    /// Nothing.
    Nothing,
    /// A command, with its jobs.
    Command(&'static str),
    /// The daemon was stopped for a moment.
    Stopped,
}

/// A number from the environment.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

#[test]
fn trees_survive_the_death_of_their_daemon() {
    let seed = number("STRATABLK_LIFECYCLE_SEED");
    let mut left = number("STRATABLK_LIFECYCLE_KILLS").unwrap_or(16);
    let (mut stores, mut done, mut asked) = (0, 0, 0);
    let all = left;
    while left > 0 {
        let kills = left.min(KILLS_A_STORE);
        let plan = Plan {
            seed: seed.unwrap_or(5000) + stores,
            kills,
            in_memory: stores % 2 == 1,
            cache: [Cache::LARGE, Cache::SMALL][usize::from(stores % 4 >= 2)],
        };
        let summary = run(plan).unwrap_or_else(|failure| panic!("{failure}"));
        println!("{summary:#?}");
        let commands = summary.commands.values().map(|(done, _)| done);
        done += commands.sum::<u64>();
        let requests = summary.counts.iter().map(|counts| counts.completed);
        asked += requests.sum::<u64>();
        left -= kills;
        stores += 1;
    }
    assert!(done > 2 * all, "{done} commands in {all} kills");
    assert!(asked > 100 * all, "{asked} requests in {all} kills");
}

/// Ends a load, whatever becomes of the commands meanwhile.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Lets this much time pass.
fn pass_time(time: Duration) {
    readable([event().as_fd()], time);
}

/// Runs commands, with a time of the same length without any before each, and stops the daemon for a moment now and then.
/// Returns what it was, from when and until when.
fn rounds(
    daemon: &Daemon,
    commands: &[Command],
    lengths: &mut BTreeMap<&'static str, Duration>,
) -> Vec<(What, Instant, Instant)> {
    let mut log = Vec::new();
    for (number, command) in commands.iter().enumerate() {
        let length = lengths.get(command.name).copied().unwrap_or(TAIL);
        let began = Instant::now();
        pass_time(length);
        log.push((What::Nothing, began, Instant::now()));

        let began = Instant::now();
        let done = command.run(daemon.control());
        assert!(done.is_ok(), "{done:?}");
        // What it leaves to the background belongs to it.
        assert!(until(|| jobs_left(daemon.control()) == Ok(0)));
        pass_time(TAIL);
        log.push((What::Command(command.name), began, Instant::now()));
        lengths.insert(command.name, began.elapsed());

        if number % (commands.len() / 2) == 0 {
            // What is under way ends first, and is not taken for what the command did.
            pass_time(TAIL);
            let began = Instant::now();
            daemon.signal(Signal::STOP);
            pass_time(PLANTED);
            daemon.signal(Signal::CONT);
            pass_time(TAIL);
            log.push((What::Stopped, began, Instant::now()));
        }
    }
    log
}

/// The longest wait of each of these times.
fn sort(log: &[(What, Instant, Instant)], requests: &[Ended], waits: &mut Waits) {
    for (what, began, ended) in log {
        let of_it = requests.iter().filter(|request| match what {
            // One that was caught by the command that came next belongs to that.
            What::Nothing => request.since >= *began && request.until <= *ended,
            What::Command(_) | What::Stopped => request.until >= *began && request.since <= *ended,
        });
        let Some(longest) = of_it.max_by_key(|request| request.took) else {
            continue;
        };
        match what {
            What::Nothing => waits.quiet.push(longest.took),
            What::Stopped => waits.planted.push(longest.took),
            What::Command(name) => {
                waits.busy.entry(name).or_default().push(longest.took);
                if longest.took > ALLOWED {
                    println!(
                        "{name}: a {} waited for {:?} ({:?})",
                        longest.kind,
                        longest.took,
                        longest.until - longest.since
                    );
                }
            }
        }
    }
}

#[test]
fn no_command_makes_a_request_wait() {
    let rig = Rig::new(&Oracle::new(1, 64 * 1024), true, Cache::LARGE);
    let daemon = rig.launch();
    assert!(daemon.await_ready(), "{}", daemon.log());
    let (socket, pid) = (rig.socket(VOLUMES[0]), daemon.pid());
    let mut waits = Waits::default();
    let mut lengths = BTreeMap::new();
    let mut bytes = DISK_BYTES;
    daemon
        .line(&format!("volume resize {} {bytes}", VOLUMES[0]))
        .ok();
    gaps::scatter(&socket, CLUSTERS).expect("a back-end that serves");
    let began = Instant::now();
    let mut passes = 0;
    loop {
        bytes += GROWTH;
        let commands = pass(VOLUMES, passes, bytes);
        let stop = AtomicBool::new(false);
        let (log, requests) = thread::scope(|scope| {
            let guest = scope.spawn(|| Load::new(&socket, pid, passes)?.run(&stop));
            let log = {
                let _stop = Stop(&stop);
                rounds(&daemon, &commands, &mut lengths)
            };
            (log, guest.join().expect("the guest"))
        });
        let requests = requests.expect("a back-end that serves");
        passes += 1;
        if passes == 1 {
            // Pages that were never touched, and lengths that were not known.
            continue;
        }
        sort(&log, &requests, &mut waits);
        if passes < PASSES_MIN {
            continue;
        }
        let verdict = waits.verdict();
        if verdict == Verdict::Fine {
            println!("{waits}");
            return;
        }
        assert!(
            began.elapsed() < TIME_MAX,
            "{verdict:?} after {passes} passes\n{waits}\n{}",
            daemon.log()
        );
    }
}
