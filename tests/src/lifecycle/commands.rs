//! Names, what is known of what they hold, and random commands that change them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value as Json;

use super::rig::VOLUMES;
use crate::daemon::Daemon;
use crate::kill::oracle::Value;
use crate::load::random::Random;

/// Snapshots, beyond which they are deleted rather than taken.
const SNAPSHOTS_MAX: usize = 24;
/// Clones, beyond which they are deleted rather than made.
const CLONES_MAX: usize = 6;

/// Whether a name is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is.
    There,
    /// A command that was to make it was cut off, or one that was to remove it.
    Unknown,
}

/// What is known of a name.
#[derive(Clone, Debug)]
pub struct Known {
    /// Whether it is there.
    pub fate: Fate,
    /// Which of the volumes it came from, whose stamps it has.
    pub family: usize,
    /// Equal for the snapshots of one command.
    pub group: u64,
    /// What it holds, once that is known.
    pub copy: Option<Arc<Vec<Value>>>,
}

/// A volume, or a snapshot of one.
pub type Name = (String, Option<String>);

/// How a name is written.
pub fn text(name: &Name) -> String {
    match &name.1 {
        None => name.0.clone(),
        Some(snapshot) => format!("{}@{snapshot}", name.0),
    }
}

/// All names but those of the volumes that guests use, and the commands that change them.
#[derive(Debug)]
pub struct Tree {
    /// What is known.
    pub names: BTreeMap<Name, Known>,
    /// Sizes of the volumes that guests use, in sectors, as they will be once their guests have looked again.
    pub sectors: [usize; 2],
    /// Picks commands.
    random: Random,
    /// Names that were given out.
    given: u64,
    /// Commands that were done, by their first words, and those that were refused.
    pub counts: BTreeMap<&'static str, (u64, u64)>,
    /// Refusals, the last of each kind of command.
    pub refusals: BTreeMap<&'static str, String>,
}

impl Tree {
    /// Nothing but the two volumes, of that many sectors.
    pub fn new(seed: u64, sectors: usize) -> Self {
        Self {
            names: BTreeMap::new(),
            sectors: [sectors; 2],
            random: Random::new(seed ^ 0x7472_6565),
            given: 0,
            counts: BTreeMap::new(),
            refusals: BTreeMap::new(),
        }
    }

    /// A number that was not given out yet.
    pub fn fresh(&mut self) -> u64 {
        self.given += 1;
        self.given
    }

    /// Runs a command. `Some(true)`: done; `Some(false)`: refused; `None`: cut off by a kill.
    fn command(
        &mut self,
        kind: &'static str,
        daemon: &Daemon,
        line: &str,
        killed: &AtomicBool,
    ) -> Option<bool> {
        let ran = daemon.line(line);
        let counts = self.counts.entry(kind).or_default();
        if ran.code == Some(0) {
            counts.0 += 1;
            return Some(true);
        }
        if killed.load(Ordering::Relaxed) {
            return None;
        }
        counts.1 += 1;
        self.refusals.insert(kind, ran.stderr);
        Some(false)
    }

    /// One of the names that are surely there and of this kind.
    pub fn pick(&mut self, wanted: impl Fn(&Name, &Known) -> bool) -> Option<(Name, Known)> {
        let all: Vec<(Name, Known)> = self
            .names
            .iter()
            .filter(|(name, known)| known.fate == Fate::There && wanted(name, known))
            .map(|(name, known)| (name.clone(), known.clone()))
            .collect();
        let index = self.random.below(all.len().max(1) as u64);
        all.into_iter().nth(usize::try_from(index).expect("small"))
    }

    /// How many names are snapshots (or clones).
    fn count(&self, snapshots: bool) -> usize {
        let names = self.names.keys();
        names.filter(|name| name.1.is_some() == snapshots).count()
    }

    /// A random command that guests do not notice.
    pub fn any(&mut self, daemon: &Daemon, killed: &AtomicBool) {
        match self.random.below(100) {
            0..26 => self.snapshot(daemon, killed, [None, None]),
            26..56 => self.delete_snapshot(daemon, killed),
            56..68 => self.clone_of_something(daemon, killed),
            68..76 => self.delete_clone(daemon, killed),
            76..80 => self.flatten(daemon, killed),
            80..90 => self.control_job(daemon, killed),
            90..94 => self.grow(daemon, killed),
            _ => {
                let lines = ["tree", "du", "volume list", "job list"];
                let index = usize::try_from(self.random.below(4)).expect("small");
                self.command("look", daemon, lines[index], killed);
            }
        }
    }

    /// A snapshot of one or both volumes; what it holds if that is known.
    pub fn snapshot(
        &mut self,
        daemon: &Daemon,
        killed: &AtomicBool,
        copies: [Option<Arc<Vec<Value>>>; 2],
    ) {
        if self.count(true) >= SNAPSHOTS_MAX {
            return self.delete_snapshot(daemon, killed);
        }
        let group = self.fresh();
        let name = format!("s{group}");
        let exact = copies.iter().all(Option::is_some);
        let members: Vec<usize> = match self.random.below(4) {
            _ if exact => vec![0, 1],
            0 => vec![0],
            1 => vec![1],
            _ => vec![0, 1],
        };
        let volumes: Vec<&str> = members.iter().map(|family| VOLUMES[*family]).collect();
        let line = format!("snapshot create {name} {}", volumes.join(" "));
        let done = self.command("snapshot create", daemon, &line, killed);
        if done == Some(false) {
            return;
        }
        for family in members {
            let known = Known {
                fate: fate_of(done),
                family,
                group,
                copy: copies[family].clone(),
            };
            let key = (VOLUMES[family].to_owned(), Some(name.clone()));
            self.names.insert(key, known);
        }
    }

    /// A snapshot goes.
    fn delete_snapshot(&mut self, daemon: &Daemon, killed: &AtomicBool) {
        let Some((name, _)) = self.pick(|name, _| name.1.is_some()) else {
            return;
        };
        let how = ["", "", " --push-down", " --way up", " --way down"];
        let how = how[usize::try_from(self.random.below(5)).expect("small")];
        let (volume, snapshot) = (&name.0, name.1.as_deref().unwrap_or_default());
        let line = format!("snapshot delete {volume} {snapshot}{how}");
        let done = self.command("snapshot delete", daemon, &line, killed);
        self.gone(&name, done);
    }

    /// A name was to go.
    fn gone(&mut self, name: &Name, done: Option<bool>) {
        match done {
            Some(true) => drop(self.names.remove(name)),
            Some(false) => {}
            None => {
                if let Some(known) = self.names.get_mut(name) {
                    known.fate = Fate::Unknown;
                }
            }
        }
    }

    /// A volume that starts as a snapshot, or as what a guest's volume holds now.
    fn clone_of_something(&mut self, daemon: &Daemon, killed: &AtomicBool) {
        if self.count(false) >= CLONES_MAX {
            return self.delete_clone(daemon, killed);
        }
        let group = self.fresh();
        let name = format!("c{group}");
        let source = match self.random.below(3) {
            0 => None,
            _ => self.pick(|_, _| true),
        };
        let (from, family, copy) = match source {
            Some((from, known)) => (text(&from), known.family, known.copy),
            None => {
                let family = usize::try_from(self.random.below(2)).expect("small");
                (VOLUMES[family].to_owned(), family, None)
            }
        };
        let line = format!("clone {from} {name}");
        let done = self.command("clone", daemon, &line, killed);
        if done != Some(false) {
            let known = Known {
                fate: fate_of(done),
                family,
                group,
                copy,
            };
            self.names.insert((name, None), known);
        }
    }

    /// A clone goes.
    fn delete_clone(&mut self, daemon: &Daemon, killed: &AtomicBool) {
        if let Some((name, _)) = self.pick(|name, _| name.1.is_none()) {
            let line = format!("volume delete {}", name.0);
            let done = self.command("volume delete", daemon, &line, killed);
            self.gone(&name, done);
        }
    }

    /// A clone, or a volume that a guest uses, is made independent.
    fn flatten(&mut self, daemon: &Daemon, killed: &AtomicBool) {
        let clone = self.pick(|name, _| name.1.is_none());
        let family = usize::try_from(self.random.below(2)).expect("small");
        let name = clone.map_or(VOLUMES[family].to_owned(), |(name, _)| name.0);
        self.command("flatten", daemon, &format!("volume flatten {name}"), killed);
    }

    /// A volume gets larger while its guest uses it.
    fn grow(&mut self, daemon: &Daemon, killed: &AtomicBool) {
        let family = usize::try_from(self.random.below(2)).expect("small");
        let sectors =
            self.sectors[family] + 8 + usize::try_from(self.random.below(64)).expect("small");
        let line = format!("volume resize {} {}", VOLUMES[family], sectors * 512);
        if self.command("resize", daemon, &line, killed) == Some(true) {
            self.sectors[family] = sectors;
        }
    }

    /// Somebody interferes with a job.
    fn control_job(&mut self, daemon: &Daemon, killed: &AtomicBool) {
        let ran = daemon.line("job list --json");
        let Ok(listed) = serde_json::from_str::<Json>(&ran.stdout) else {
            return;
        };
        let open: Vec<u64> = jobs(&listed)
            .into_iter()
            .filter(|(_, state)| state != "done")
            .map(|(id, _)| id)
            .collect();
        let Some(id) = open.first() else {
            return;
        };
        let what = ["pause", "pause", "resume", "resume", "resume", "cancel"];
        let what = what[usize::try_from(self.random.below(6)).expect("small")];
        self.command("job control", daemon, &format!("job {what} {id}"), killed);
    }

    /// What is there, after a start: sure names must be, unknown ones turn out, and nothing else is there.
    ///
    /// # Errors
    /// What is not as it must be.
    pub fn reconcile(&mut self, daemon: &Daemon) -> Result<(), String> {
        let there = names(daemon)?;
        let known: BTreeSet<Name> = self.names.keys().cloned().collect();
        let foreign: Vec<&Name> = there.difference(&known).collect();
        if !foreign.is_empty() {
            return Err(format!(
                "what was deleted or never made is there: {foreign:?}"
            ));
        }
        let mut lost = Vec::new();
        let mut groups: BTreeMap<u64, Vec<bool>> = BTreeMap::new();
        self.names.retain(|name, known| {
            let is_there = there.contains(name);
            match known.fate {
                Fate::There if !is_there => lost.push(name.clone()),
                Fate::There => {}
                // Of those that were being made: all of a group or none.
                Fate::Unknown if known.copy.is_none() => {
                    groups.entry(known.group).or_default().push(is_there);
                }
                Fate::Unknown => {}
            }
            known.fate = Fate::There;
            is_there
        });
        let in_part = |there: &Vec<bool>| there.contains(&true) && there.contains(&false);
        match groups.values().any(in_part) {
            _ if !lost.is_empty() => Err(format!("what was made is gone: {lost:?}")),
            true => Err(format!("a group snapshot is there in part: {groups:?}")),
            false => Ok(()),
        }
    }
}

/// Whether a name is there after a command.
fn fate_of(done: Option<bool>) -> Fate {
    match done {
        Some(_) => Fate::There,
        None => Fate::Unknown,
    }
}

/// The JSON of a list.
fn list(daemon: &Daemon, line: &str) -> Result<Json, String> {
    let ran = daemon.line(&format!("{line} --json"));
    serde_json::from_str(&ran.stdout).map_err(|error| format!("{line}: {error}: {}", ran.stderr))
}

/// The names that are there.
fn names(daemon: &Daemon) -> Result<BTreeSet<Name>, String> {
    let (volumes, snapshots) = (list(daemon, "volume list")?, list(daemon, "snapshot list")?);
    let text = |json: &Json| json.as_str().unwrap_or_default().to_owned();
    let rows = |json: &Json| json.as_array().cloned().unwrap_or_default();
    let volumes = rows(&volumes["volumes"]);
    let clones = volumes
        .iter()
        .map(|volume| (text(&volume["name"]), None))
        .filter(|name| !VOLUMES.contains(&name.0.as_str()));
    let snapshots = rows(&snapshots["snapshots"]);
    let snapshots = snapshots
        .iter()
        .map(|row| (text(&row["volume"]), Some(text(&row["name"]))));
    Ok(clones.chain(snapshots).collect())
}

/// The size of a volume in bytes.
///
/// # Errors
/// The daemon does not tell.
pub fn size_of(daemon: &Daemon, volume: &str) -> Result<u64, String> {
    let shown = list(daemon, &format!("volume show {volume}"))?;
    let bytes = shown["size_bytes"].as_u64();
    bytes.ok_or_else(|| format!("no size in {shown}"))
}

/// Numbers and states of the jobs in a list.
fn jobs(listed: &Json) -> Vec<(u64, String)> {
    let rows = listed["jobs"].as_array().cloned().unwrap_or_default();
    let pair = |row: &Json| {
        let state = row["state"].as_str().unwrap_or_default().to_owned();
        Some((row["id"].as_u64()?, state))
    };
    rows.iter().filter_map(pair).collect()
}

/// Numbers and states of the jobs that are known.
///
/// # Errors
/// The daemon does not tell.
pub fn all_jobs(daemon: &Daemon) -> Result<Vec<(u64, String)>, String> {
    list(daemon, "job list").map(|listed| jobs(&listed))
}
