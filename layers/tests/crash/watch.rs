//! Examines images at every crash point of a run.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};

use stratablk_layers::catalog::memory::MemoryDisk;
use stratablk_layers::file::sim::{CrashPoint, Random, SimMedia, Survival};
use stratablk_layers::store::{Store, StoreOptions};

use crate::oracle::{Disk, Promise};
use crate::recovered::{Found, Verdict, examine, small_cache};
use crate::workload::trace;

/// Which crashes a run is looked at for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Crashes {
    /// The power is cut.
    #[default]
    Power,
    /// The daemon is killed.
    Kill,
    /// One or the other.
    Both,
    /// The daemon is killed and its arena removed, and what was acknowledged is demanded all the same: a canary.
    KillWithoutArena,
}

/// Images by kind.
#[derive(Clone, Copy, Debug, Default)]
pub struct Images {
    /// After a power cut.
    pub power: u64,
    /// After a kill, with the arena.
    pub kill: u64,
    /// After a kill, without it.
    pub gone: u64,
    /// Made of those, by a second crash.
    pub second: u64,
}

impl Images {
    /// All of them.
    pub fn all(&self) -> u64 {
        self.power + self.kill + self.gone + self.second
    }

    /// Adds others.
    pub fn add(&mut self, other: &Self) {
        self.power += other.power;
        self.kill += other.kill;
        self.gone += other.gone;
        self.second += other.second;
    }
}

/// What is needed at a crash point.
pub struct Watch {
    /// What may be found.
    pub disks: BTreeMap<String, Disk>,
    /// What was wrong.
    pub violations: Vec<String>,
    /// Images examined.
    pub images: Images,
    /// Chooses images.
    pub random: Random,
    /// Which crashes to look at.
    pub crashes: Crashes,
    /// Whether the host may lose what it was told to write and say that it is written afterwards: then a daemon that is
    /// started again on the same host cannot know, and there are power cuts only.
    pub lossy: bool,
    /// How a new daemon is set up.
    pub options: StoreOptions,
    /// The catalog's medium.
    pub durable: MemoryDisk,
    /// Whose arena is found after a kill.
    pub store: Weak<Store>,
}

impl Watch {
    /// Looks at images of this instant.
    pub fn look(&mut self, seed: u64, media: &SimMedia, point: &CrashPoint) {
        if !self.violations.is_empty() {
            return;
        }
        trace(|| format!("point {}: {:?} {}", point.number, point.event, point.path));
        for _ in 0..2 {
            let choice = self.random.number();
            let Some((found, what)) = self.crash(media, choice) else {
                continue;
            };
            let Verdict { problems, images } = examine(found, &self.disks, choice);
            self.images.second += images.saturating_sub(1);
            self.violations.extend(problems.into_iter().map(|problem| {
                format!(
                    "seed {seed}, crash point {} ({:?} {}), {what}: {problem}",
                    point.number, point.event, point.path
                )
            }));
        }
    }

    /// One image.
    fn crash(&mut self, media: &SimMedia, choice: u64) -> Option<(Found, String)> {
        let kill = match self.crashes {
            Crashes::Power => false,
            Crashes::Kill | Crashes::KillWithoutArena => true,
            Crashes::Both => choice & 1 == 0 && !self.lossy,
        };
        let options = if choice.is_multiple_of(5) {
            small_cache(1 + choice % 3, None)
        } else {
            self.options.clone()
        };
        let found = |media, arena, promise| Found {
            media,
            catalog: self.durable.crash_image(),
            arena,
            options,
            promise,
        };
        if !kill {
            let survival = match choice % 10 {
                0 => Survival::Nothing,
                1 => Survival::Everything,
                _ => Survival::Seeded(choice),
            };
            self.images.power += 1;
            let image = media.crash_image_with(survival);
            return Some((
                found(image, None, Promise::Flushed),
                format!("power cut, {survival:?}"),
            ));
        }
        let image = media.kill_image(choice);
        if self.crashes == Crashes::KillWithoutArena {
            self.images.gone += 1;
            let found = found(image, None, Promise::Acknowledged);
            return Some((found, "killed, the arena lost".into()));
        }
        if choice >> 8 & 15 == 3 {
            // An operator has removed the arena: what was flushed is there.
            self.images.gone += 1;
            let found = found(image, None, Promise::Flushed);
            return Some((found, "killed, the arena removed".into()));
        }
        let store = self.store.upgrade()?;
        self.images.kill += 1;
        let arena = store.cache_arena().copy().unwrap();
        Some((
            found(image, Some(arena), Promise::Acknowledged),
            "killed".into(),
        ))
    }

    /// Notes that something was wrong.
    pub fn violation(&mut self, what: String) {
        self.violations.push(what);
    }
}

/// What the workload and the observer of its media share.
pub type Shared = Arc<Mutex<Watch>>;
