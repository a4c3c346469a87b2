//! Trees of real disks live on while their daemon is killed in the midst of commands and jobs, and no command makes a guest's
//! request wait. See `stratablk_tests::lifecycle`.
//!
//! `STRATABLK_LIFECYCLE_KILLS` says how often to kill (16), `STRATABLK_LIFECYCLE_SEED` repeats a run, as far as the instants of
//! the kills allow.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use stratablk_tests::daemon::Daemon;
use stratablk_tests::kill::home::Cache;
use stratablk_tests::kill::oracle::Oracle;
use stratablk_tests::lifecycle::gaps::Load;
use stratablk_tests::lifecycle::rig::{Rig, VOLUMES};
use stratablk_tests::lifecycle::run::{Plan, run};
use stratablk_tests::wait::until;

/// Kills of one store, after which the next one gets another seed and cache.
const KILLS_A_STORE: u64 = 8;
/// What a command may add to the longest wait of a request.
const ALLOWED: Duration = Duration::from_millis(2);
/// How long requests are watched at a time: a pass through all commands, and more.
const TIME: Duration = Duration::from_millis(300);
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

/// One pass through the commands on the tree: of a volume that a guest uses, and of one that nobody uses.
fn commands(
    daemon: &Daemon,
    [volume, unused]: [&str; 2],
    pass: usize,
    log: &mut Vec<(Instant, String)>,
) {
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
        format!("snapshot create e{pass} {unused}"),
        format!("snapshot restore {unused} e{pass}"),
        format!("snapshot delete {unused} e{pass}"),
        format!("volume resize {volume} +4K"),
    ] {
        log.push((Instant::now(), line.clone()));
        // Some are refused as long as a job is at the same layers.
        let mut last = None;
        let done = until(|| {
            let ran = daemon.line(&line);
            let done = ran.code == Some(0);
            last = Some(ran);
            done
        });
        assert!(done, "{line}: {last:?}");
    }
}

/// Ends a load, whatever becomes of the commands meanwhile.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The time that a quarter of these do not exceed. In each time with commands there are all of them, so what one of them
/// costs is in this as well; what the host does now and then is not.
fn quarter(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort_unstable();
    times.get(times.len() / 4).copied().unwrap_or_default()
}

#[test]
fn no_command_makes_a_request_wait() {
    let rig = Rig::new(&Oracle::new(1, 64 * 1024), true, Cache::LARGE);
    let daemon = rig.launch();
    assert!(daemon.await_ready(), "{}", daemon.log());
    let mut load = Load::new(&rig.socket(VOLUMES[0]), 7).expect("a session");
    let (mut quiet, mut busy) = (Vec::new(), Vec::new());
    let mut requests = 0;
    let mut passes = 0..;
    for _ in 0..PAIRS_MAX {
        for with_commands in [false, true] {
            let stop = AtomicBool::new(false);
            let began = Instant::now();
            let mut log = Vec::new();
            let result = thread::scope(|scope| {
                let load = &mut load;
                let guest = scope.spawn(|| load.run(&stop));
                let stop = Stop(&stop);
                while began.elapsed() < TIME {
                    if with_commands {
                        let pass = passes.next().expect("numbers");
                        commands(&daemon, VOLUMES, pass, &mut log);
                    } else {
                        // As many processes, which take time from the others on their own.
                        daemon.line("volume list").ok();
                    }
                }
                drop(stop);
                guest.join().expect("the guest")
            });
            let gaps = result.expect("a back-end that serves");
            let (longest, count) = (gaps.longest, gaps.count);
            requests += count;
            let over = gaps.since + longest;
            let meanwhile = log.iter().rev().find(|(at, _)| *at < over);
            let meanwhile = meanwhile.map_or("", |(_, line)| line.as_str());
            let times = if with_commands { &mut busy } else { &mut quiet };
            times.push(longest);
            println!(
                "{}: longest {longest:?} of {count} requests in {:?} {meanwhile}",
                if with_commands {
                    "commands"
                } else {
                    "quiet   "
                },
                began.elapsed()
            );
        }
        let (without, with) = (quarter(&quiet), quarter(&busy));
        if quiet.len() >= PAIRS_MIN && with <= without + ALLOWED {
            println!(
                "the longest wait of a request, lower quartile of {} times: {without:?} without commands, {with:?} with \
                 them; {requests} requests",
                quiet.len()
            );
            return;
        }
    }
    panic!(
        "commands make requests wait: {:?} with them, {:?} without (lower quartiles of the longest of {PAIRS_MAX} times each)",
        quarter(&busy),
        quarter(&quiet)
    );
}
