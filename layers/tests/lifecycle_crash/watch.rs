//! Examines images at the crash points of a run.

use std::sync::{Arc, Mutex, Weak};

use stratablk_layers::catalog::memory::MemoryDisk;
use stratablk_layers::file::sim::{CrashPoint, Event, Random, SimMedia, Survival};
use stratablk_layers::store::{Store, StoreOptions};

use crate::found::{Image, Verdict, examine, small_cache};
use crate::oracle::Promise;
use crate::trace;
use crate::tree::Oracle;

/// Images by kind, and what was done with them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Images {
    /// After a power cut.
    pub power: u64,
    /// After a kill, with the arena.
    pub kill: u64,
    /// Made of those, by a second crash.
    pub second: u64,
    /// Of those after a power cut or kill: in the midst of a command.
    pub in_command: u64,
    /// The same in the midst of a step of a job.
    pub in_job: u64,
    /// Steps of jobs taken in images.
    pub job_steps: u64,
}

impl Images {
    /// All of them.
    pub fn all(&self) -> u64 {
        self.power + self.kill + self.second
    }

    /// Adds others.
    pub fn add(&mut self, other: &Self) {
        self.power += other.power;
        self.kill += other.kill;
        self.second += other.second;
        self.in_command += other.in_command;
        self.in_job += other.in_job;
        self.job_steps += other.job_steps;
    }
}

/// What the run is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Activity {
    /// Guests are served.
    #[default]
    Guests,
    /// A command is under way.
    Command(String),
    /// A job takes a step.
    Job,
}

/// What is needed at a crash point.
pub struct Watch {
    /// Names the run.
    pub seed: u64,
    /// What may be found.
    pub oracle: Oracle,
    /// What was wrong.
    pub violations: Vec<String>,
    /// Images examined.
    pub images: Images,
    /// Chooses images.
    pub random: Random,
    /// What the run is doing.
    pub activity: Activity,
    /// How a new daemon is set up.
    pub options: StoreOptions,
    /// The catalog's medium.
    pub durable: MemoryDisk,
    /// Whose arena is found after a kill.
    pub store: Weak<Store>,
    /// The run is to go on from the image of a crash in the midst of what it is doing.
    pub wanted: bool,
    /// That image, and what may be found in it.
    pub successor: Option<(Image, Oracle)>,
    /// One in so many crash points is looked at while guests are served; more of them else.
    pub rarity: u64,
}

/// What the run and the observer of its media share.
pub type Shared = Arc<Mutex<Watch>>;

impl Watch {
    /// Looks at an image of this instant, perhaps.
    pub fn look(&mut self, media: &SimMedia, point: &CrashPoint) {
        if !self.violations.is_empty() {
            return;
        }
        trace(|| format!("point {}: {:?} {}", point.number, point.event, point.path));
        let weight = match (&self.activity, &point.event) {
            (Activity::Guests, Event::Written | Event::Created) => 1,
            (Activity::Guests, _) | (Activity::Job | Activity::Command(_), Event::Written) => 2,
            (Activity::Job | Activity::Command(_), _) => 6,
        };
        if self.wanted && self.successor.is_none() && self.random.chance(24) {
            let choice = self.random.number();
            if let Some((image, what)) = self.crash(media, choice) {
                trace(|| format!("the run goes on from here: {what}"));
                self.successor = Some((image, self.oracle.clone()));
            }
        }
        if self.random.below(self.rarity) >= weight {
            return;
        }
        let choice = self.random.number();
        let Some((image, what)) = self.crash(media, choice) else {
            return;
        };
        match self.activity {
            Activity::Guests => {}
            Activity::Command(_) => self.images.in_command += 1,
            Activity::Job => self.images.in_job += 1,
        }
        match image.promise {
            Promise::Flushed => self.images.power += 1,
            Promise::Acknowledged => self.images.kill += 1,
        }
        let further = choice >> 16 & 3 != 0;
        trace(|| format!("image {choice:#x}: {what}, further: {further}"));
        let Verdict {
            problems,
            second,
            job_steps,
        } = examine(image, &self.oracle, choice, further);
        self.images.second += second;
        self.images.job_steps += job_steps;
        let (activity, seed) = (&self.activity, self.seed);
        self.violations.extend(problems.into_iter().map(|problem| {
            format!(
                "seed {seed}, crash point {} ({:?} {}) in {activity:?}, {what}: {problem}",
                point.number, point.event, point.path
            )
        }));
    }

    /// One image.
    pub fn crash(&self, media: &SimMedia, choice: u64) -> Option<(Image, String)> {
        let options = if choice.is_multiple_of(5) {
            small_cache(1 + choice % 3, None)
        } else {
            self.options.clone()
        };
        let image = |media, arena, promise| Image {
            media,
            catalog: self.durable.crash_image(),
            arena,
            options,
            promise,
        };
        if choice >> 8 & 1 == 0 {
            let survival = match choice % 10 {
                0 => Survival::Nothing,
                1 => Survival::Everything,
                _ => Survival::Seeded(choice),
            };
            let found = media.crash_image_with(survival);
            return Some((
                image(found, None, Promise::Flushed),
                format!("power cut, {survival:?}"),
            ));
        }
        let found = media.kill_image(choice);
        if choice >> 9 & 15 == 3 {
            // An operator has removed the arena: what was flushed is there.
            return Some((
                image(found, None, Promise::Flushed),
                format!("killed ({choice:#x}), the arena removed"),
            ));
        }
        let store = self.store.upgrade()?;
        let arena = store.cache_arena().copy().unwrap();
        Some((
            image(found, Some(arena), Promise::Acknowledged),
            format!("killed ({choice:#x})"),
        ))
    }

    /// Notes that something was wrong.
    pub fn violation(&mut self, what: String) {
        let (seed, activity) = (self.seed, &self.activity);
        self.violations
            .push(format!("seed {seed}, in {activity:?}: {what}"));
    }
}
