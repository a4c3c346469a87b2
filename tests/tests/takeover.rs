//! A new process goes on where the daemon is that runs, and guests notice no more than a pause.
//!
//! `STRATABLK_TAKEOVERS` says how often (20 for each kind of load), `STRATABLK_TAKEOVER_SEED` repeats a run, as far as the
//! instants allow.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use stratablk_tests::daemon::Daemon;
use stratablk_tests::kill::client::{Client, Mix};
use stratablk_tests::kill::home::Cache;
use stratablk_tests::kill::rig::{Rig, VOLUME};
use stratablk_tests::load::random::Random;
use stratablk_tests::wait::{event, readable};

/// Sectors of the disk: 8 MiB.
const SECTORS: usize = 16 * 1024;
/// The longest load between two takeovers.
const LOAD_MAX_MS: u64 = 200;

/// A number from the environment.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

/// Lets this much time pass.
fn pass(time: Duration) {
    use std::os::fd::AsFd;
    readable([event().as_fd()], time);
}

/// Ends a load, whatever becomes of the test meanwhile.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What the daemon says that its guests have waited, in milliseconds.
fn waited_ms(log: &str) -> u64 {
    let line = log.lines().find(|line| line.contains("guests waited"));
    let line = line.unwrap_or_else(|| panic!("no word of a takeover in {log}"));
    let words: Vec<&str> = line.split_whitespace().collect();
    let at = words
        .iter()
        .position(|word| *word == "waited")
        .expect("it is there");
    words[at + 1].parse().expect("a number")
}

/// Lets another daemon take over.
fn take_over(rig: &Rig, daemon: Daemon) -> (Daemon, u64) {
    let next = rig.succeed();
    assert!(
        next.await_ready(),
        "new: {}\nold: {}",
        next.log(),
        daemon.log()
    );
    let (status, log) = daemon.ended();
    assert!(status.success(), "{status}: {log}");
    let waited = waited_ms(&next.log());
    (next, waited)
}

/// What a run measured.
#[derive(Debug)]
struct Measured {
    /// How long guests waited by what the daemons say, in milliseconds.
    waits_ms: Vec<u64>,
    /// The longest time in which the guest got nothing back.
    longest_pause: Duration,
}

/// Takeovers under a load of two queues that is checked all the time. The session goes on through all of them.
fn takeovers_under_load(seed: u64, tracked: bool, cache: Cache) -> Measured {
    let seed = number("STRATABLK_TAKEOVER_SEED").unwrap_or(seed);
    let mut client = Client::new(seed, SECTORS, Mix::Everything).tracked(tracked);
    let rig = Rig::new(&client.oracle, false, cache);
    let mut daemon = rig.launch();
    assert!(daemon.await_ready(), "{}", daemon.log());
    let mut link = client.connect(&rig.socket()).expect("a session");
    let stop = AtomicBool::new(false);
    let mut random = Random::new(seed);
    let mut waits_ms = Vec::new();
    let mut snapshots = Vec::new();
    daemon = thread::scope(|scope| {
        let (client, link, stop) = (&mut client, &mut link, &stop);
        let guest = scope.spawn(move || client.load(link, stop));
        let end = Stop(stop);
        for round in 0..number("STRATABLK_TAKEOVERS").unwrap_or(20) {
            pass(Duration::from_millis(random.below(LOAD_MAX_MS)));
            if round % 5 == 2 {
                let name = format!("s{round}");
                daemon
                    .line(&format!("snapshot create {name} {VOLUME}"))
                    .ok();
                snapshots.push(name);
            }
            let (next, waited) = take_over(&rig, daemon);
            daemon = next;
            waits_ms.push(waited);
        }
        pass(Duration::from_millis(100));
        drop(end);
        let ended = guest.join().expect("the guest");
        ended.unwrap_or_else(|fault| panic!("{fault}\n{}", daemon.log()));
        daemon
    });
    let never = AtomicBool::new(false);
    let session = (
        client.settle(&mut link, &never),
        client.verify(&mut link, &never),
    );
    assert!(matches!(session, (Ok(true), Ok(true))), "{session:?}");
    client.leave(link);
    let listed = daemon.line(&format!("snapshot list {VOLUME}")).ok();
    assert!(
        snapshots.iter().all(|name| listed.contains(name)),
        "{listed}"
    );
    let (status, _, log) = daemon.stop();
    assert!(status.success(), "{log}");
    rig.check().expect("a sound store");
    assert!(client.counts.completed > 10_000, "{:?}", client.counts);
    Measured {
        waits_ms,
        longest_pause: client.counts.longest_pause,
    }
}

#[test]
fn a_guest_goes_on_through_many_takeovers() {
    for (seed, tracked, cache) in [
        (9_001, false, Cache::LARGE),
        (9_002, true, Cache::LARGE),
        (9_003, false, Cache::SMALL),
    ] {
        let measured = takeovers_under_load(seed, tracked, cache);
        println!("tracked: {tracked}, {cache:?}: {measured:?}");
    }
}
