//! Rounds of start, load and kill.

use std::fmt;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use std::os::unix::process::ExitStatusExt;
use std::sync::atomic::AtomicBool;

use rustix::process::Signal;

use super::client::{Client, Counts, Fault, Life, Link, Mix};
use super::home::Cache;
use super::rig::{Killer, Rig, VOLUME};
use crate::daemon::{Daemon, run as command};
use crate::load::random::Random;

/// Sectors of the disk: 8 MiB, few enough to be rewritten often and read as a whole after every kill.
const SECTORS: usize = 16 * 1024;
/// The longest load between two kills.
const LOAD_MAX: Duration = Duration::from_millis(200);
/// Snapshots taken of one store, at most: each adds a layer to open.
const SNAPSHOTS_MAX: usize = 40;

/// What is lost with the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// Nothing else: the guest goes on, and nothing that was acknowledged may be lost.
    Kill,
    /// The host's memory and the guest: what was flushed must be there.
    Reboot,
    /// The cache, but the guest goes on as if it had not. Something is lost by that, which shows that it would be noticed.
    LostCache,
}

/// What to do.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Everything random follows from it, but the instants of the kills.
    pub seed: u64,
    /// How often to kill.
    pub kills: u64,
    /// What is lost each time.
    pub after: After,
    /// Whether the store lies in memory.
    pub in_memory: bool,
    /// How the daemon caches.
    pub cache: Cache,
    /// What the load consists of.
    pub mix: Mix,
    /// Whether all of the disk is written and flushed at first, and no snapshot is taken: then every write finds its sectors in
    /// the map, and needs no cache to survive.
    pub overwrites_only: bool,
    /// How the guest lives through the kills.
    pub life: Life,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Summary {
    /// Kills of a daemon that lived.
    pub kills: u64,
    /// Kills before it was ready.
    pub while_starting: u64,
    /// Kills while a snapshot was being taken.
    pub while_snapshotting: u64,
    /// Snapshots that were acknowledged.
    pub snapshots: usize,
    /// What the guest did.
    pub counts: Counts,
    /// Sectors found half old and half new, beside a write of them or after one was cut off.
    pub mixed: u64,
    /// Whole reads of the disk.
    pub verified: u64,
}

/// A run that failed, with all that is needed to look into it.
#[derive(Debug)]
pub struct Failure {
    /// As asked for.
    pub plan: Plan,
    /// How far it came.
    pub summary: Summary,
    /// What went wrong.
    pub fault: Fault,
    /// The end of the last daemon's log.
    pub log: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            plan,
            summary,
            fault,
            log,
        } = self;
        let seed = plan.seed;
        write!(
            f,
            "{fault}\nagain with STRATABLK_KILL_SEED={seed}\n{plan:?}\n{summary:?}\nlog:\n{log}"
        )
    }
}

/// A run under way.
struct Rounds {
    /// As asked for.
    plan: Plan,
    /// What outlives the daemons.
    rig: Rig,
    /// The guest.
    client: Client,
    /// Picks the instants.
    random: Random,
    /// What was done.
    summary: Summary,
    /// Names of snapshots that must be there.
    snapshots: Vec<String>,
    /// How many were asked for.
    snapshots_asked: usize,
    /// How long the last start took.
    start_time: Duration,
    /// The last log.
    log: String,
}

/// A snapshot being taken by the command line.
type Snapshot = JoinHandle<Option<String>>;

/// Carries out a plan.
///
/// # Errors
/// The first thing that is wrong.
///
/// # Panics
/// The host refuses what a test needs.
pub fn run(plan: Plan) -> Result<Summary, Box<Failure>> {
    let client = Client::new(plan.seed, SECTORS, plan.mix).living(plan.life);
    let rig = Rig::new(&client.oracle, plan.in_memory, plan.cache);
    let mut rounds = Rounds {
        plan,
        rig,
        client,
        random: Random::new(plan.seed ^ 0x6b69_6c6c),
        summary: Summary::default(),
        snapshots: Vec::new(),
        snapshots_asked: 0,
        start_time: Duration::from_millis(50),
        log: String::new(),
    };
    let result = rounds.go();
    rounds.summary.counts = rounds.client.counts;
    rounds.summary.mixed = rounds.client.oracle.mixed;
    rounds.summary.snapshots = rounds.snapshots.len();
    match result {
        Ok(()) => Ok(rounds.summary),
        Err(fault) => Err(Box::new(Failure {
            plan,
            summary: rounds.summary,
            fault,
            log: rounds.log,
        })),
    }
}

impl Rounds {
    /// All rounds, and the end.
    fn go(&mut self) -> Result<(), Fault> {
        if self.plan.overwrites_only {
            let daemon = self.start()?;
            let mut link = self.client.connect(&self.rig.socket())?;
            self.client.overwrite_all(&mut link)?;
            self.client.leave(link);
            self.stop(daemon)?;
        }
        while self.summary.kills < self.plan.kills {
            let starting = self.random.below(6) == 0;
            if starting {
                self.kill_while_starting()?;
            } else {
                self.kill_while_serving()?;
            }
            if self.plan.after != After::Kill {
                let lost = self.rig.lose_cache();
                // One that was killed while it started may not have had a cache yet.
                if Cache::is_there() && lost == 0 && !starting {
                    return Err(Fault::Daemon("there is no cache to lose".into()));
                }
            }
        }
        self.end()
    }

    /// Starts a daemon and waits until it is ready.
    fn start(&mut self) -> Result<Daemon, Fault> {
        let began = Instant::now();
        let daemon = self.rig.launch();
        if !daemon.await_ready() {
            let (status, log) = daemon.ended();
            self.log = log;
            return Err(Fault::Daemon(format!("it does not start: {status}")));
        }
        self.start_time = began.elapsed();
        Ok(daemon)
    }

    /// Ends a daemon in order.
    fn stop(&mut self, daemon: Daemon) -> Result<(), Fault> {
        let (status, _, log) = daemon.stop();
        self.log = log;
        match status.success() {
            true => Ok(()),
            false => Err(Fault::Daemon(format!("it does not stop well: {status}"))),
        }
    }

    /// Notes the end of a daemon, which must be our doing.
    fn killed(&mut self, daemon: Daemon) -> Result<(), Fault> {
        let (status, log) = daemon.ended();
        self.log = log;
        if status.signal() == Some(Signal::KILL.as_raw()) {
            self.summary.kills += 1;
            return Ok(());
        }
        Err(Fault::Daemon(format!("it ended by itself: {status}")))
    }

    /// A random part of a time.
    fn part_of(&mut self, time: Duration) -> Duration {
        let nanos = u64::try_from(time.as_nanos()).expect("a short time");
        Duration::from_nanos(self.random.below(nanos.max(1)))
    }

    /// A kill while nobody is connected yet.
    fn kill_while_starting(&mut self) -> Result<(), Fault> {
        let delay = self.part_of(self.start_time * 5 / 4);
        let daemon = self.rig.launch();
        let killer = Killer::start(&daemon, delay);
        let ready = daemon.await_ready();
        killer.finish();
        self.summary.while_starting += u64::from(!ready);
        self.killed(daemon)
    }

    /// A kill under load, or while the disk is read or requests are repeated.
    fn kill_while_serving(&mut self) -> Result<(), Fault> {
        let daemon = self.start()?;
        let result = self.serve(&daemon);
        if result.is_err() {
            self.log = daemon.log();
        }
        let link = result?;
        self.killed(daemon)?;
        match link {
            Some(link) => self.client.bury(link),
            None => Ok(()),
        }
    }

    /// Everything between a start and a kill. Returns the session if there was one.
    fn serve(&mut self, daemon: &Daemon) -> Result<Option<Link>, Fault> {
        self.check_snapshots(daemon)?;
        let rebooted = self.plan.after == After::Reboot;
        let at_once = !rebooted && self.random.below(4) == 0;
        let mut killer = None;
        if at_once {
            // In the midst of the set-up of rings, perhaps, or of what is repeated.
            let delay = self.part_of(LOAD_MAX / 2);
            killer = Some(Killer::start(daemon, delay));
        }
        let mut link = match self.client.connect(&self.rig.socket()) {
            Ok(link) => link,
            Err(fault) => {
                let Some(killer) = killer else {
                    return Err(fault);
                };
                // The daemon is dead, or will be: only what it acknowledged counts.
                killer.finish();
                return Ok(None);
            }
        };
        if !at_once {
            let never = AtomicBool::new(false);
            if rebooted {
                self.client.adopt(&mut link, &never)?;
            } else {
                self.client.verify(&mut link, &never)?;
            }
            self.summary.verified += 1;
        }
        let snapshot = self.take_snapshot(daemon);
        let delay = self.part_of(LOAD_MAX);
        let killer = killer.unwrap_or_else(|| Killer::start(daemon, delay));
        let result = self.client.load(&mut link, killer.flag());
        killer.finish();
        if let Some(snapshot) = snapshot {
            match snapshot.join().expect("the command line") {
                Some(name) => self.snapshots.push(name),
                None => self.summary.while_snapshotting += 1,
            }
        }
        result.map(|()| Some(link))
    }

    /// Sometimes begins to take a snapshot.
    fn take_snapshot(&mut self, daemon: &Daemon) -> Option<Snapshot> {
        let wanted = !self.plan.overwrites_only
            && self.snapshots_asked < SNAPSHOTS_MAX
            && self.random.below(3) == 0;
        if !wanted {
            return None;
        }
        self.snapshots_asked += 1;
        let name = format!("s{}", self.snapshots_asked);
        let control = daemon.control().to_str()?.to_owned();
        Some(thread::spawn(move || {
            let ran = command(["--control", &control, "snapshot", "create", &name, VOLUME]);
            (ran.code == Some(0)).then_some(name)
        }))
    }

    /// Snapshots that were acknowledged are there.
    fn check_snapshots(&self, daemon: &Daemon) -> Result<(), Fault> {
        // Losing the cache must not lose them either, nor a reboot.
        let listed = daemon.cli(["snapshot", "list", VOLUME, "--json"]).ok();
        for name in &self.snapshots {
            if !listed.contains(&format!("\"{name}\"")) {
                let what = format!("snapshot {name} is gone; there are: {listed}");
                return Err(Fault::Daemon(what));
            }
        }
        Ok(())
    }

    /// After the last kill: everything is repeated and checked, and again after a stop in order.
    fn end(&mut self) -> Result<(), Fault> {
        let never = AtomicBool::new(false);
        for last in [false, true] {
            let daemon = self.start()?;
            let mut link = self.client.connect(&self.rig.socket())?;
            if self.plan.after == After::Reboot && !last {
                self.client.adopt(&mut link, &never)?;
            }
            self.client.settle(&mut link, &never)?;
            self.client.verify(&mut link, &never)?;
            self.summary.verified += 1;
            self.check_snapshots(&daemon)?;
            self.client.leave(link);
            self.stop(daemon)?;
        }
        self.rig.check().map_err(Fault::Daemon)
    }
}
