//! A new process goes on where the daemon is that runs, and guests notice no more than a pause.
//!
//! `STRATABLK_TAKEOVERS` says how often (20 for each kind of load), `STRATABLK_TAKEOVER_SEED` repeats a run, as far as the
//! instants allow. `STRATABLK_TAKEOVER_KILLS` says how often to kill one of the two in the midst of it (50).

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use stratablk_tests::daemon::Daemon;
use stratablk_tests::kill::client::{Client, Life, Link, Mix};
use stratablk_tests::kill::home::Cache;
use stratablk_tests::kill::rig::{Killer, Rig, VOLUME};
use stratablk_tests::lifecycle::gaps::Load;
use stratablk_tests::load::random::Random;
use stratablk_tests::wait::{event, readable, until};

/// Sectors of the disk: 8 MiB.
const SECTORS: usize = 16 * 1024;
/// More than a guest may notice, on however slow a host: it would say that its disk hangs.
const PAUSE_MAX: Duration = Duration::from_secs(3);
/// The longest load between two takeovers.
const LOAD_MAX_MS: u64 = 200;

/// A number from the environment.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

/// With an inflight buffer or without.
fn life(tracked: bool) -> Life {
    match tracked {
        true => Life::Lasting,
        false => Life::Anew,
    }
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
    let next_log = next.log();
    let waited = waited_ms(&next_log);
    if number("STRATABLK_TAKEOVER_PARTS").is_some() {
        let parts = log.lines().chain(next_log.lines());
        let parts = parts.filter(|line| line.contains("the parts of that"));
        parts.for_each(|line| println!("{line}; {waited} ms"));
    }
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
    let mut client = Client::new(seed, SECTORS, Mix::Everything).living(life(tracked));
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
    assert!(client.counts.completed > 2_000, "{:?}", client.counts);
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
        let longest_pause = measured.longest_pause;
        println!(
            "tracked: {tracked}, {cache:?}: guests waited {:?} ms by what daemons say; nothing came back for {longest_pause:?} \
             at most",
            measured.waits_ms
        );
        assert!(longest_pause < PAUSE_MAX, "{longest_pause:?}");
    }
}

/// Requests one by one in time, and how long each of them took.
#[test]
fn a_paced_guest_waits_no_longer_than_that() {
    let client = Client::new(9_010, SECTORS, Mix::Everything);
    let rig = Rig::new(&client.oracle, false, Cache::LARGE);
    let mut daemon = rig.launch();
    assert!(daemon.await_ready(), "{}", daemon.log());
    let stop = AtomicBool::new(false);
    let socket = rig.socket();
    let (waits_ms, requests) = thread::scope(|scope| {
        let guest = scope.spawn(|| Load::new(&socket, std::process::id(), 1)?.run(&stop));
        let _stop = Stop(&stop);
        let mut waits_ms = Vec::new();
        for _ in 0..5 {
            pass(Duration::from_millis(200));
            let (next, waited) = take_over(&rig, daemon);
            daemon = next;
            waits_ms.push(waited);
        }
        pass(Duration::from_millis(200));
        drop(_stop);
        (waits_ms, guest.join().expect("the guest"))
    });
    let requests = requests.expect("a back-end that serves");
    let mut took: Vec<Duration> = requests.iter().map(|one| one.until - one.since).collect();
    took.sort_unstable();
    let longest: Vec<_> = took.iter().rev().take(5).collect();
    println!(
        "{} requests, the longest {longest:?}; guests waited {waits_ms:?} ms",
        took.len()
    );
    assert!(took.len() > 1000, "{}", took.len());
    assert!(*longest[0] < PAUSE_MAX, "{longest:?}");
}

/// Which of the two is killed.
#[derive(Clone, Copy, Debug)]
enum Victim {
    /// The one that is to go on.
    New,
    /// The one that has served.
    Old,
}

/// What has become of a takeover in the midst of which one of the two was killed.
enum Outcome {
    /// One of the two serves, and the front-end is connected still.
    GoesOn(Daemon),
    /// Neither of the two serves: the one that did was killed.
    Crashed,
}

/// Kills one of the two after that time, and waits until it is clear what becomes of it.
fn kill_amid(rig: &Rig, daemon: Daemon, victim: Victim, delay: Duration) -> Outcome {
    let next = rig.succeed();
    match victim {
        Victim::New => {
            Killer::start(&next, delay).finish();
            let (_, log) = next.ended();
            let clear = until(|| daemon.has_ended() || daemon.line("volume list").code == Some(0));
            assert!(clear, "old: {}\nnew: {log}", daemon.log());
            if !daemon.has_ended() {
                return Outcome::GoesOn(daemon);
            }
            let (status, old) = daemon.ended();
            assert!(status.success(), "{status}: {old}\nnew: {log}");
            Outcome::Crashed
        }
        Victim::Old => {
            Killer::start(&daemon, delay).finish();
            daemon.ended();
            if next.await_ready() {
                return Outcome::GoesOn(next);
            }
            let (status, log) = next.ended();
            assert_eq!(status.code(), Some(1), "{log}");
            Outcome::Crashed
        }
    }
}

/// A guest that goes on, whatever becomes of its daemon.
struct Survivor {
    /// The guest.
    client: Client,
    /// Its session, while there is one.
    link: Option<Link>,
}

impl Survivor {
    /// Has the guest work, in its session or a new one, while `meanwhile` goes on, and ends the session if that says so.
    fn work<T>(&mut self, rig: &Rig, meanwhile: impl FnOnce() -> (T, bool)) -> T {
        let mut link = match self.link.take() {
            Some(link) => link,
            None => {
                let mut link = self.client.connect(&rig.socket()).expect("a session");
                let never = AtomicBool::new(false);
                let verified = self.client.verify(&mut link, &never);
                verified.unwrap_or_else(|fault| panic!("{fault}"));
                link
            }
        };
        let stop = AtomicBool::new(false);
        let (done, goes_on) = thread::scope(|scope| {
            let (client, stop, link) = (&mut self.client, &stop, &mut link);
            let guest = scope.spawn(move || client.load(link, stop));
            let end = Stop(stop);
            let done = meanwhile();
            drop(end);
            let ended = guest.join().expect("the guest");
            ended.unwrap_or_else(|fault| panic!("{fault}"));
            done
        });
        if goes_on {
            self.link = Some(link);
        } else {
            let buried = self.client.bury(link);
            buried.unwrap_or_else(|fault| panic!("{fault}"));
        }
        done
    }

    /// Checks everything that it knows of.
    fn verify(mut self, rig: &Rig, daemon: Daemon) {
        let never = AtomicBool::new(false);
        let mut link = match self.link.take() {
            Some(link) => link,
            None => self.client.connect(&rig.socket()).expect("a session"),
        };
        for done in [
            self.client.settle(&mut link, &never),
            self.client.verify(&mut link, &never),
        ] {
            assert!(done.unwrap_or_else(|fault| panic!("{fault}")));
        }
        self.client.leave(link);
        let (status, _, log) = daemon.stop();
        assert!(status.success(), "{log}");
        rig.check().expect("a sound store");
    }
}

#[test]
fn a_kill_in_the_midst_loses_nothing() {
    let seed = number("STRATABLK_TAKEOVER_SEED").unwrap_or(9_020);
    let kills = number("STRATABLK_TAKEOVER_KILLS").unwrap_or(50);
    for tracked in [false, true] {
        let client = Client::new(seed, SECTORS, Mix::Everything).living(life(tracked));
        let rig = Rig::new(&client.oracle, false, Cache::LARGE);
        let mut daemon = rig.launch();
        assert!(daemon.await_ready(), "{}", daemon.log());
        let mut guest = Survivor { client, link: None };
        let mut random = Random::new(seed);
        let mut counts = [[0; 2]; 2];
        let mut time = Duration::ZERO;
        for round in 0..kills.div_ceil(2) {
            if round % 10 == 0 {
                let (next, took) = guest.work(&rig, || {
                    let began = Instant::now();
                    let (next, _) = take_over(&rig, daemon);
                    ((next, began.elapsed()), true)
                });
                (daemon, time) = (next, took);
            }
            let victim = [Victim::New, Victim::Old][usize::from(random.below(2) == 1)];
            let nanos = u64::try_from(time.as_nanos()).expect("short");
            let delay = Duration::from_nanos(random.below(nanos));
            let outcome = guest.work(&rig, || {
                let outcome = kill_amid(&rig, daemon, victim, delay);
                let goes_on = matches!(outcome, Outcome::GoesOn(_));
                (outcome, goes_on)
            });
            let went_on = matches!(outcome, Outcome::GoesOn(_));
            counts[victim as usize][usize::from(went_on)] += 1;
            daemon = match outcome {
                Outcome::GoesOn(daemon) => daemon,
                Outcome::Crashed => {
                    let daemon = rig.launch();
                    assert!(daemon.await_ready(), "{}", daemon.log());
                    daemon
                }
            };
        }
        println!("tracked: {tracked}; [new, old] killed: [crashed, went on] {counts:?}");
        // Both ways were gone, or the kills came at the wrong times.
        let [[_, back], [crashed, _]] = counts;
        assert!(back > 0 && crashed > 0, "{counts:?}");
        guest.verify(&rig, daemon);
    }
}

#[test]
fn one_that_fails_leaves_the_guest_where_it_was() {
    let client = Client::new(9_030, SECTORS, Mix::Everything);
    let rig = Rig::new(&client.oracle, false, Cache::LARGE);
    let daemon = rig.launch();
    assert!(daemon.await_ready(), "{}", daemon.log());
    let mut guest = Survivor { client, link: None };
    let missing = rig.path("missing");
    let missing = missing.to_str().expect("a path of ours");
    let failing = [
        (["--control", missing], "give the same with --control"),
        (["--cache-dir", missing], "missing"),
        (["--cache-size", "8T"], "cache"),
    ];
    for round in 0..6 {
        let (arguments, why) = &failing[round % failing.len()];
        guest.work(&rig, || {
            pass(Duration::from_millis(50));
            let next = rig.succeed_with(arguments);
            let (status, log) = next.ended();
            assert_eq!(status.code(), Some(1), "{log}");
            assert!(log.contains(why), "{log}");
            let back = until(|| daemon.line("volume list").code == Some(0));
            assert!(back, "{}", daemon.log());
            ((), true)
        });
    }
    assert!(guest.link.is_some(), "it is the same session");
    assert!(daemon.has_logged("this one goes on"), "{}", daemon.log());
    println!("{}", daemon.log());
    guest.verify(&rig, daemon);
}

#[test]
fn nobody_takes_over_what_is_not_there() {
    let client = Client::new(9_040, SECTORS, Mix::Everything);
    let rig = Rig::new(&client.oracle, false, Cache::LARGE);
    let (status, log) = rig.succeed().ended();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("start without --takeover"), "{log}");
}
