//! Failures by plan: which operation fails, and how.

use super::random::Random;

/// What a fault waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultPoint {
    /// A read.
    Read,
    /// A write.
    Write,
    /// A punch.
    Punch,
    /// A sync of a file.
    SyncData,
    /// A sync of a directory.
    SyncDir,
    /// Creating a file, a directory or another name of a file.
    Create,
    /// A rename; named by its target.
    Rename,
    /// Opening a file that is there.
    Open,
    /// Setting a file's length.
    SetLen,
    /// Removing a file, or a directory with all in it.
    Remove,
}

/// How an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultEffect {
    /// EIO. A failed write may have changed any of its sectors; a failed sync made nothing durable and lost nothing: a
    /// later one that succeeds covers the same writes.
    Error,
    /// ENOSPC. A failed write has changed some of its first sectors.
    NoSpace,
    /// EIO, of syncs of files: as Linux does, the unsynced sectors count as clean from now on. Any of them may never
    /// become durable, whatever later syncs claim, and reads may find the old content or the new.
    LostPages,
    /// Success is claimed and nothing was done (of syncs only): a canary, to see the alarms ring.
    ClaimSuccess,
}

/// One planned failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which operations.
    pub point: FaultPoint,
    /// Only those on files or directories of this name (the last part of the path).
    pub name: Option<String>,
    /// How many of them succeed first.
    pub after: u64,
    /// How many fail then; `u64::MAX` for all.
    pub times: u64,
    /// How they fail.
    pub effect: FaultEffect,
}

/// The faults of a media.
#[derive(Debug, Default)]
pub(super) struct Plan {
    faults: Vec<Fault>,
    /// Operations that failed by plan.
    pub hits: u64,
    /// The name of the last file or directory with which that happened.
    pub last: Option<String>,
}

impl Plan {
    pub(super) fn add(&mut self, fault: Fault) {
        self.faults.push(fault);
    }

    pub(super) fn clear(&mut self) {
        self.faults.clear();
    }

    /// Counts an operation and answers how it has to fail. Every matching fault counts it; the first that is due decides.
    pub(super) fn next(&mut self, point: FaultPoint, path: &str) -> Option<FaultEffect> {
        let name = path.rsplit('/').next().unwrap_or(path);
        let mut effect = None;
        for fault in &mut self.faults {
            if fault.point != point || fault.name.as_deref().is_some_and(|wanted| wanted != name) {
                continue;
            }
            if fault.after > 0 {
                fault.after -= 1;
            } else if fault.times > 0 && effect.is_none() {
                if fault.times != u64::MAX {
                    fault.times -= 1;
                }
                effect = Some(fault.effect);
            }
        }
        if effect.is_some() {
            self.hits += 1;
            self.last = Some(name.to_owned());
        }
        effect
    }
}

/// How much of what was not synced survives a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survival {
    /// Each sector and each change of names by chance.
    Seeded(u64),
    /// Nothing: the cruellest disk.
    Nothing,
    /// Everything, writes under way as well: what a killed process leaves behind while its host goes on.
    Everything,
}

/// Draws what survives.
#[derive(Debug)]
pub(super) enum Fate {
    All,
    None,
    /// `of_256` of 256 sectors.
    Some {
        random: Random,
        of_256: u64,
    },
}

impl Fate {
    pub(super) fn new(survival: Survival) -> Self {
        match survival {
            Survival::Everything => Self::All,
            Survival::Nothing => Self::None,
            Survival::Seeded(seed) => Self::Some {
                random: Random::new(seed),
                of_256: 128,
            },
        }
    }

    /// Draws a new share for the next file: all, none and nearly so must occur too.
    pub(super) fn draw_share(&mut self) {
        if let Self::Some { random, of_256 } = self {
            const SHARES: [u64; 5] = [0, 16, 128, 240, 256];
            *of_256 = SHARES
                .get(random.index(SHARES.len()))
                .copied()
                .unwrap_or(128);
        }
    }

    /// Whether the next sector survives.
    pub(super) fn survives(&mut self) -> bool {
        match self {
            Self::All => true,
            Self::None => false,
            Self::Some { random, of_256 } => random.chance(*of_256),
        }
    }

    /// How many of `count` ordered changes survive: a prefix.
    pub(super) fn prefix(&mut self, count: usize) -> usize {
        match self {
            Self::All => count,
            Self::None => 0,
            Self::Some { random, of_256 } => match *of_256 {
                0 => 0,
                256 => count,
                _ => random.index(count + 1),
            },
        }
    }
}
