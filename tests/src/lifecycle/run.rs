//! Rounds of start, load with commands, and kill.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::commands::{Known, Name, Tree, all_jobs, size_of, text};
use super::rig::{Rig, VOLUMES};
use crate::daemon::{DEADLINE, Daemon};
use crate::kill::client::{Client, Counts, Fault, Mix};
use crate::kill::home::Cache;
use crate::kill::oracle::{SECTOR_BYTES, Value};
use crate::kill::rig::Killer;
use crate::load::random::Random;

/// Sectors of the disks: 4 MiB, few enough to be rewritten often and read as a whole again and again.
const SECTORS: usize = 8 * 1024;
/// The longest load between two kills.
const LOAD_MAX: Duration = Duration::from_millis(1500);
/// How long all jobs may take at the end.
const JOBS_MAX: Duration = Duration::from_secs(60);
/// The clone that is made to read a snapshot.
const LOOK: &str = "look";

/// What to do.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Everything random follows from it, but the instants of the kills.
    pub seed: u64,
    /// How often to kill.
    pub kills: u64,
    /// Whether the store lies in memory.
    pub in_memory: bool,
    /// How the daemon caches.
    pub cache: Cache,
}

/// What was done.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Kills.
    pub kills: u64,
    /// What the guests did.
    pub counts: Vec<Counts>,
    /// Whole reads of disks, and of snapshots and clones.
    pub verified: (u64, u64),
    /// Restores.
    pub restores: u64,
    /// Commands by kind: done and refused.
    pub commands: BTreeMap<&'static str, (u64, u64)>,
    /// The last refusal of each kind.
    pub refusals: BTreeMap<&'static str, String>,
    /// Jobs that were under way at the end.
    pub jobs_left: usize,
}

/// A run that failed, with all that is needed to look into it.
#[derive(Debug)]
pub struct Failure {
    /// As asked for.
    pub plan: Plan,
    /// How far it came.
    pub summary: Summary,
    /// What went wrong.
    pub what: String,
    /// The end of the last daemon's log.
    pub log: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            plan,
            summary,
            what,
            log,
        } = self;
        let seed = plan.seed;
        write!(
            f,
            "{what}\nagain with STRATABLK_LIFECYCLE_SEED={seed}\n{plan:?}\n{summary:?}\nlog:\n{log}"
        )
    }
}

/// A run under way.
struct Life {
    /// As asked for.
    plan: Plan,
    /// What outlives the daemons.
    rig: Rig,
    /// The guests of the two volumes.
    clients: Vec<Client>,
    /// All other names.
    tree: Tree,
    /// Picks what to do.
    random: Random,
    /// What was done.
    summary: Summary,
    /// The last log.
    log: String,
}

/// Carries out a plan.
///
/// # Errors
/// The first thing that is wrong.
///
/// # Panics
/// The host refuses what a test needs.
pub fn run(plan: Plan) -> Result<Summary, Box<Failure>> {
    let mut clients: Vec<Client> = (0..2)
        .map(|family| Client::new(plan.seed * 2 + family, SECTORS, Mix::Everything))
        .collect();
    let rig = Rig::new(&clients[0].oracle, plan.in_memory, plan.cache);
    clients[1].oracle.assume(&vec![Value::Zeroes; SECTORS]);
    let mut life = Life {
        plan,
        rig,
        clients,
        tree: Tree::new(plan.seed, SECTORS),
        random: Random::new(plan.seed ^ 0x6c69_6665),
        summary: Summary::default(),
        log: String::new(),
    };
    let result = life.go();
    life.summary.counts = life.clients.iter().map(|client| client.counts).collect();
    life.summary.commands = std::mem::take(&mut life.tree.counts);
    life.summary.refusals = std::mem::take(&mut life.tree.refusals);
    match result {
        Ok(()) => Ok(life.summary),
        Err(what) => Err(Box::new(Failure {
            plan,
            summary: life.summary,
            what,
            log: life.log,
        })),
    }
}

/// A guest's failure in words.
fn told(volume: &str, fault: &Fault) -> String {
    format!("{volume}: {fault}")
}

impl Life {
    /// All rounds, and the end.
    fn go(&mut self) -> Result<(), String> {
        while self.summary.kills < self.plan.kills {
            let daemon = self.start()?;
            let result = self.round(&daemon);
            if result.is_err() {
                self.log = daemon.log();
            }
            result?;
            self.killed(daemon)?;
        }
        self.end()
    }

    /// Starts a daemon and waits until it is ready.
    fn start(&mut self) -> Result<Daemon, String> {
        let daemon = self.rig.launch();
        if daemon.await_ready() {
            return Ok(daemon);
        }
        let (status, log) = daemon.ended();
        self.log = log;
        Err(format!("the daemon does not start: {status}"))
    }

    /// Notes the end of a daemon, which must be our doing.
    fn killed(&mut self, daemon: Daemon) -> Result<(), String> {
        let (status, log) = daemon.ended();
        self.log = log;
        if status.signal() == Some(Signal::KILL.as_raw()) {
            self.summary.kills += 1;
            return Ok(());
        }
        Err(format!("the daemon ended by itself: {status}"))
    }

    /// Everything between a start and a kill.
    fn round(&mut self, daemon: &Daemon) -> Result<(), String> {
        self.tree.reconcile(daemon)?;
        self.measure(daemon)?;
        for _ in 0..2 {
            self.look_at_one(daemon)?;
        }
        if self.random.below(2) == 0 {
            self.at_rest(daemon)?;
        }
        self.load(daemon)
    }

    /// Volumes may have grown: what their guests find when they look again.
    fn measure(&mut self, daemon: &Daemon) -> Result<(), String> {
        for (family, client) in self.clients.iter_mut().enumerate() {
            let bytes = size_of(daemon, VOLUMES[family])?;
            let sectors = usize::try_from(bytes).expect("64-bit host") / SECTOR_BYTES;
            client.oracle.grow(sectors);
            self.tree.sectors[family] = sectors;
        }
        Ok(())
    }

    /// Reads a snapshot or clone, and holds it against its flat copy.
    fn look_at_one(&mut self, daemon: &Daemon) -> Result<(), String> {
        let Some((name, known)) = self.tree.pick(|_, _| true) else {
            return Ok(());
        };
        self.look_at(daemon, &name, &known)
    }

    /// The same of this one.
    fn look_at(&mut self, daemon: &Daemon, name: &Name, known: &Known) -> Result<(), String> {
        let oracle = &self.clients[known.family].oracle;
        let found = if name.1.is_some() {
            let made = daemon.line(&format!("clone {} {LOOK}", text(name)));
            if made.code != Some(0) {
                return Err(format!("no clone of {}: {}", text(name), made.stderr));
            }
            let found = self.rig.read(daemon, LOOK, oracle);
            let gone = daemon.line(&format!("volume delete {LOOK}"));
            if gone.code != Some(0) {
                return Err(format!("{LOOK} cannot be deleted: {}", gone.stderr));
            }
            found
        } else {
            self.rig.read(daemon, &name.0, oracle)
        };
        let found = found.map_err(|what| format!("{}: {what}", text(name)))?;
        self.summary.verified.1 += 1;
        match &known.copy {
            Some(copy) => match copy.iter().zip(&found).position(|(was, is)| was != is) {
                Some(sector) => Err(format!(
                    "{}: sector {sector} holds {}, and held {} before",
                    text(name),
                    found[sector],
                    copy[sector]
                )),
                None if copy.len() != found.len() => {
                    Err(format!("{} has another size", text(name)))
                }
                None => Ok(()),
            },
            None => {
                if let Some(known) = self.tree.names.get_mut(name) {
                    known.copy = Some(Arc::new(found));
                }
                Ok(())
            }
        }
    }

    /// Lets the guests end what they have begun, and leave.
    fn settle(&mut self) -> Result<(), String> {
        let never = AtomicBool::new(false);
        for (family, client) in self.clients.iter_mut().enumerate() {
            let volume = VOLUMES[family];
            let fault = |fault: Fault| told(volume, &fault);
            let mut link = client.connect(&self.rig.socket(volume)).map_err(fault)?;
            client.settle(&mut link, &never).map_err(fault)?;
            client.verify(&mut link, &never).map_err(fault)?;
            self.summary.verified.0 += 1;
        }
        Ok(())
    }

    /// While the guests are at rest: snapshots whose content is known exactly, and restores.
    fn at_rest(&mut self, daemon: &Daemon) -> Result<(), String> {
        self.settle()?;
        let never = AtomicBool::new(false);
        let copies = [0, 1].map(|family| {
            let values = self.clients[family].oracle.values();
            values.map(Arc::new)
        });
        if copies.iter().any(Option::is_none) {
            return Err("a guest has left something under way".into());
        }
        self.tree.snapshot(daemon, &never, copies);
        self.restore(daemon)
    }

    /// Restores the volumes of a snapshot, all of them or one.
    fn restore(&mut self, daemon: &Daemon) -> Result<(), String> {
        let Some((name, known)) = self
            .tree
            .pick(|name, known| name.1.is_some() && known.copy.is_some())
        else {
            return Ok(());
        };
        let group = known.group;
        let members: Vec<(Name, Known)> = self
            .tree
            .names
            .iter()
            .filter(|(other, known)| other.1.is_some() && known.group == group)
            .map(|(name, known)| (name.clone(), known.clone()))
            .collect();
        let only = members.len() > 1
            && (self.random.below(2) == 0 || members.iter().any(|(_, known)| known.copy.is_none()));
        let keep = (self.random.below(2) == 0).then(|| self.tree.fresh());
        let snapshot = name.1.clone().unwrap_or_default();
        let mut line = format!("snapshot restore {} {snapshot}", name.0);
        if only {
            line += " --only";
        }
        if let Some(kept) = keep {
            line += &format!(" --keep k{kept}");
        }
        // The daemon may not have noticed yet that the guests have left, or that a job is at the volume for a moment.
        let began = Instant::now();
        loop {
            let ran = daemon.line(&line);
            if ran.code == Some(0) {
                break;
            }
            if !only && ran.stderr.contains("--only") {
                // A part of the group is gone.
                return Ok(());
            }
            if !ran.stderr.contains("use") || began.elapsed() > DEADLINE {
                return Err(format!("{line}: {}", ran.stderr));
            }
        }
        self.summary.restores += 1;
        for (member, known) in members {
            if only && member != name {
                continue;
            }
            let oracle = &mut self.clients[known.family].oracle;
            if let Some(group) = keep {
                let kept = Known {
                    group,
                    copy: oracle.values().map(Arc::new),
                    ..known.clone()
                };
                let key = (member.0.clone(), Some(format!("k{group}")));
                self.tree.names.insert(key, kept);
            }
            let copy = known.copy.ok_or("a restored snapshot is not known")?;
            oracle.assume(&copy);
            self.tree.sectors[known.family] = copy.len();
        }
        Ok(())
    }

    /// Guests and commands until the daemon is killed.
    fn load(&mut self, daemon: &Daemon) -> Result<(), String> {
        let mut links = Vec::new();
        let never = AtomicBool::new(false);
        for (family, client) in self.clients.iter_mut().enumerate() {
            let fault = |fault: Fault| told(VOLUMES[family], &fault);
            let socket = self.rig.socket(VOLUMES[family]);
            let mut link = client.connect(&socket).map_err(fault)?;
            client.verify(&mut link, &never).map_err(fault)?;
            self.summary.verified.0 += 1;
            links.push(link);
        }
        let nanos = u64::try_from(LOAD_MAX.as_nanos()).expect("short");
        let delay = Duration::from_nanos(self.random.below(nanos));
        let killer = Killer::start(daemon, delay);
        let flag = killer.flag();
        let (clients, tree) = (&mut self.clients, &mut self.tree);
        let results: Vec<Result<(), Fault>> = thread::scope(|scope| {
            let guests: Vec<_> = clients
                .iter_mut()
                .zip(&mut links)
                .map(|(client, link)| scope.spawn(move || client.load(link, flag)))
                .collect();
            while !flag.load(std::sync::atomic::Ordering::Relaxed) {
                tree.any(daemon, flag);
            }
            let joined = guests.into_iter().map(|guest| guest.join());
            joined.map(|result| result.expect("a guest")).collect()
        });
        killer.finish();
        for (family, result) in results.into_iter().enumerate() {
            result.map_err(|fault| told(VOLUMES[family], &fault))?;
        }
        for (family, link) in links.into_iter().enumerate() {
            let buried = self.clients[family].bury(link);
            buried.map_err(|fault| told(VOLUMES[family], &fault))?;
        }
        Ok(())
    }

    /// After the last kill: all jobs end, everything is read, before and after a stop in order, and the store is sound.
    fn end(&mut self) -> Result<(), String> {
        for last in [false, true] {
            let daemon = self.start()?;
            let result = self.look_at_all(&daemon, last);
            self.log = daemon.log();
            result?;
            let (status, _, log) = daemon.stop();
            self.log = log;
            if !status.success() {
                return Err(format!("the daemon does not stop well: {status}"));
            }
        }
        self.rig.check()
    }

    /// Reads everything, and lets all jobs end the first time.
    fn look_at_all(&mut self, daemon: &Daemon, last: bool) -> Result<(), String> {
        self.tree.reconcile(daemon)?;
        self.measure(daemon)?;
        self.settle()?;
        if !last {
            self.finish_jobs(daemon)?;
            self.settle()?;
        }
        for (name, known) in self.tree.names.clone() {
            self.look_at(daemon, &name, &known)?;
        }
        Ok(())
    }

    /// Resumes what rests and waits for all jobs.
    fn finish_jobs(&mut self, daemon: &Daemon) -> Result<(), String> {
        let began = Instant::now();
        let mut first = true;
        loop {
            let jobs = all_jobs(daemon)?;
            let open: Vec<_> = jobs.iter().filter(|(_, state)| state != "done").collect();
            if first {
                self.summary.jobs_left = open.len();
                first = false;
            }
            if let Some((id, _)) = open.iter().find(|(_, state)| state == "failed") {
                let shown = daemon.line(&format!("job show {id}"));
                return Err(format!("a job failed on a good host: {}", shown.stdout));
            }
            for (id, state) in &open {
                // A cancelled copy has ended, and cannot be resumed.
                if state == "paused" || state == "cancelled" {
                    daemon.line(&format!("job resume {id}"));
                }
            }
            if open.iter().all(|(_, state)| state == "cancelled") {
                return Ok(());
            }
            if began.elapsed() > JOBS_MAX {
                return Err(format!("jobs do not end: {jobs:?}"));
            }
        }
    }
}
