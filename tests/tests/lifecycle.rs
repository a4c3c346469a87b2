//! Trees of real disks live on while their daemon is killed in the midst of commands and jobs, and no command makes a guest's
//! request wait. See `stratablk_tests::lifecycle`.
//!
//! `STRATABLK_LIFECYCLE_KILLS` says how often to kill (16), `STRATABLK_LIFECYCLE_SEED` repeats a run, as far as the instants of
//! the kills allow.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use stratablk_tests::daemon::Daemon;
use stratablk_tests::kill::oracle::Oracle;
use stratablk_tests::kill::rig::Cache;
use stratablk_tests::lifecycle::gaps::Load;
use stratablk_tests::lifecycle::rig::{Rig, VOLUMES};
use stratablk_tests::lifecycle::run::{Plan, run};

/// Kills of one store, after which the next one gets another seed and cache.
const KILLS_A_STORE: u64 = 8;
/// What a command may add to the longest wait of a request.
const ALLOWED: Duration = Duration::from_millis(2);
/// Pairs of a time with commands and one without, before a difference is believed.
const PAIRS_MAX: usize = 40;
/// Pairs before the first look.
const PAIRS_MIN: usize = 7;

/// A number from the environment.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

#[test]
fn trees_survive_the_death_of_their_daemon() {
    let seed = number("STRATABLK_LIFECYCLE_SEED");
    let mut left = number("STRATABLK_LIFECYCLE_KILLS").unwrap_or(16);
    let mut stores = 0;
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
        let done = summary.commands.values().map(|(done, _)| done);
        assert!(done.sum::<u64>() > 2 * kills, "{summary:?}");
        let requests = summary.counts.iter().map(|counts| counts.completed);
        assert!(requests.sum::<u64>() > 100 * kills, "{summary:?}");
        left -= kills;
        stores += 1;
    }
}

/// One pass through the commands on the tree, of a volume that a guest uses.
fn commands(daemon: &Daemon, volume: &str, pass: usize) {
    let (first, second) = (format!("a{pass}"), format!("b{pass}"));
    for line in [
        format!("snapshot create {first} {volume}"),
        format!("clone {volume}@{first} c{pass}"),
        format!("snapshot create {second} {volume}"),
        format!("snapshot delete {volume} {first} --push-down"),
        format!("volume delete c{pass}"),
        format!("snapshot create d{pass} {volume}"),
        format!("snapshot delete {volume} {second}"),
        format!("snapshot delete {volume} d{pass}"),
        format!("volume resize {volume} +4K"),
    ] {
        daemon.line(&line).ok();
    }
}

/// As many commands that change nothing, so that what the host needs for them is the same.
fn looks(daemon: &Daemon) {
    for _ in 0..9 {
        daemon.line("volume list").ok();
    }
}

/// The middle one.
fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

#[test]
fn no_command_makes_a_request_wait() {
    let rig = Rig::new(&Oracle::new(1, 64 * 1024), true, Cache::LARGE);
    let daemon = rig.launch();
    assert!(daemon.await_ready(), "{}", daemon.log());
    let volume = VOLUMES[0];
    let mut load = Load::new(&rig.socket(volume), 7).expect("a session");
    let (mut quiet, mut busy) = (Vec::new(), Vec::new());
    let mut requests = 0;
    for pass in 0..PAIRS_MAX {
        for with_commands in [false, true] {
            let stop = AtomicBool::new(false);
            let began = Instant::now();
            let result = thread::scope(|scope| {
                let load = &mut load;
                let guest = scope.spawn(|| load.run(&stop));
                if with_commands {
                    commands(&daemon, volume, pass);
                } else {
                    looks(&daemon);
                }
                stop.store(true, Ordering::Relaxed);
                guest.join().expect("the guest")
            });
            let (longest, count) = result.expect("a back-end that serves");
            requests += count;
            let times = if with_commands { &mut busy } else { &mut quiet };
            times.push(longest);
            println!(
                "{}: longest {longest:?} of {count} requests in {:?}",
                if with_commands {
                    "commands"
                } else {
                    "quiet   "
                },
                began.elapsed()
            );
        }
        let (without, with) = (median(&quiet), median(&busy));
        if quiet.len() >= PAIRS_MIN && with <= without + ALLOWED {
            println!(
                "the longest wait of a request, median of {} times: {without:?} without commands, {with:?} with them; \
                 {requests} requests",
                quiet.len()
            );
            return;
        }
    }
    panic!(
        "commands make requests wait: {:?} with them, {:?} without (medians of the longest of {PAIRS_MAX} times each)",
        median(&busy),
        median(&quiet)
    );
}
