//! Merging layers while disks are in use. See `docs/decisions/0008-merging-in-place.md`.
//!
//! A job is taken up (`load`), moves its data in steps (`gather` for what goes up, `down` for what goes down), and ends
//! (`finish`). Between any two turns nothing is held: the command lock is free, no flush is led, no volume is kept open. What
//! is known of the job in memory is checked against the catalog at every turn, and dropped and made anew where they differ.

mod begin;
mod cost;
mod down;
mod finish;
mod gather;
mod load;
mod piece;
mod walk;

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};

use crate::catalog::{CatalogState, Change, JobId, JobRow, JobState, LayerState};
use crate::error::Result;
use crate::lifecycle::Phase;
use crate::ops::scrub::Scrubber;
use crate::store::Store;
use crate::units::{Generation, LayerId};
use crate::volume::Volume;

use self::begin::Begin;
use self::down::Down;
use self::gather::Gather;
use self::load::Loaded;

/// How a turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// So many bytes were moved; perhaps none, but something was done.
    Moved(u64),
    /// Something was done that is no job's of the catalog and keeps to its rate by itself.
    Aside,
    /// Requests or flushes under way must end first.
    Waits,
    /// Nothing is to be done.
    Idle,
}

/// Whether a turn may wait for the flush that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patience {
    /// Waits.
    Wait,
    /// Says that it would have to.
    Try,
}

impl Patience {
    /// Takes the lead of a volume's flushes. Returns whether it has it.
    fn lead(self, volume: &Volume) -> bool {
        match self {
            Self::Wait => {
                volume.lead_blocking();
                true
            }
            Self::Try => volume.flushes().try_lead(),
        }
    }

    /// Flushes a volume and does something while it leads; `None` if it could not.
    fn led<T>(self, volume: &Volume, act: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
        match self.lead(volume) {
            true => volume.end_lead(act).map(Some),
            false => Ok(None),
        }
    }
}

/// What whoever carries out jobs knows from one turn to the next.
#[derive(Debug, Default)]
pub(crate) struct Runner {
    /// The job at work.
    work: Option<Work>,
    /// Layers that are gone for all but requests under way.
    retiring: Vec<Retiring>,
    /// Jobs that wait for something that may take long: those of other trees go first.
    stuck: BTreeSet<JobId>,
    /// Turns in a row in which the job at work could only wait.
    waits: u32,
    /// What is done when no job can go on.
    scrubber: Scrubber,
}

/// So often a job only waits before one of another tree goes first: about a second of a thread that sleeps in between.
const WAITS_MAX: u32 = 200;

/// Layers that left their chains.
#[derive(Debug)]
struct Retiring {
    /// The first generation that does not know them.
    generation: Generation,
    /// Their names.
    layers: Vec<LayerId>,
}

/// What jobs of other trees there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Others {
    /// None, or nobody needs to know yet.
    None,
    /// Some that are not known to be stuck.
    Free,
    /// They are all stuck.
    Stuck,
}

/// A job that was taken up.
#[derive(Debug)]
struct Work {
    /// What the catalog said of it.
    row: JobRow,
    /// What is done.
    kind: Kind,
}

/// What a job does.
#[derive(Debug)]
enum Kind {
    /// It seals a layer that takes writes, so that it can be moved.
    Begin(Begin),
    /// It moves data into the upper layer.
    Gather(Box<Gather>),
    /// It moves data into the lower layer.
    Down(Box<Down>),
}

impl Store {
    /// Takes one turn of the oldest job that is to be carried out. Returns how it ended, and the job's rate.
    pub(crate) fn take_turn(&self, patience: Patience) -> (Turn, Option<u64>) {
        let mut runner = self
            .jobs
            .runner
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let retired = self.retire(&mut runner);
        if retired {
            return (Turn::Moved(0), None);
        }
        self.note_lost_jobs();
        let (next, others) = self.next_job(&mut runner);
        let Some(row) = next else {
            runner.work = None;
            {
                let mut board = self.jobs.board();
                let running = board.running.filter(|id| board.scrubs.has(*id));
                board.running = running;
            }
            let turn = self.scrub_turn(&mut runner.scrubber, patience);
            let waits = turn == Turn::Idle && !runner.retiring.is_empty();
            if turn == Turn::Idle && !waits {
                runner.scrubber.try_again(&self.damage.lost());
            }
            return (if waits { Turn::Waits } else { turn }, None);
        };
        let rate = row.rate;
        match self.turn_of(&mut runner, &row, patience) {
            Ok(turn) => {
                match turn {
                    Turn::Moved(bytes) => {
                        runner.waits = 0;
                        self.jobs.board().moved(bytes);
                    }
                    // One that was not even taken up has nothing to wait for that ends soon.
                    _ if runner.work.is_none() => runner.waits = WAITS_MAX,
                    _ => runner.waits = runner.waits.saturating_add(1),
                }
                if runner.waits >= WAITS_MAX && others != Others::None {
                    runner.waits = 0;
                    // What is known of it is found again when it is taken up anew.
                    runner.work = None;
                    self.jobs.board().running = None;
                    if others == Others::Stuck {
                        // They have been waiting for longer.
                        runner.stuck.clear();
                    }
                    runner.stuck.insert(row.id);
                }
                if turn == Turn::Waits {
                    // Until it can go on there is time.
                    let other = self.scrub_turn(&mut runner.scrubber, patience);
                    if other == Turn::Aside {
                        return (other, rate);
                    }
                }
                (turn, rate)
            }
            Err(error) => {
                runner.work = None;
                (self.stop_job(&row, &error.to_string()), None)
            }
        }
    }

    /// The job that has the next turn: the oldest, but for those in trees of jobs that are stuck; these once there is no other.
    /// Also whether jobs of other trees would have it if this one were stuck.
    fn next_job(&self, runner: &mut Runner) -> (Option<JobRow>, Others) {
        let inner = self.inner();
        let state = inner.catalog.state();
        let held_from = self.jobs.board().held_from;
        let may_begin =
            |row: &&JobRow| row.state == JobState::Queued && held_from.is_none_or(|id| row.id < id);
        let queued: Vec<&JobRow> = state.jobs.values().filter(may_begin).collect();
        let is_queued = |id: &JobId| queued.iter().any(|row| row.id == *id);
        runner.stuck.retain(is_queued);
        let root = |row: &JobRow| state.chain_of(row.target).first().map(|row| row.id);
        let stuck = |runner: &Runner| -> Vec<Option<LayerId>> {
            let rows = queued.iter().filter(|row| runner.stuck.contains(&row.id));
            rows.map(|row| root(row)).collect()
        };
        let free = |roots: &[Option<LayerId>]| {
            let mut rows = queued.iter();
            rows.find(|row| roots.is_empty() || !roots.contains(&root(row)))
                .copied()
        };
        let mut roots = stuck(runner);
        let mut next = free(&roots);
        if next.is_none() && !roots.is_empty() {
            runner.stuck.clear();
            roots.clear();
            next = free(&roots);
        }
        let Some(next) = next else {
            return (None, Others::None);
        };
        if runner.waits + 1 < WAITS_MAX && runner.work.is_some() {
            // Not to be asked yet.
            return (Some(next.clone()), Others::None);
        }
        let own = root(next);
        let others = if !queued.iter().any(|row| root(row) != own) {
            Others::None
        } else if free(&[roots.as_slice(), &[own]].concat()).is_some() {
            Others::Free
        } else {
            Others::Stuck
        };
        (Some(next.clone()), others)
    }

    /// A turn of this job.
    fn turn_of(&self, runner: &mut Runner, row: &JobRow, patience: Patience) -> Result<Turn> {
        let same = |work: &Work| {
            let (has, wants) = (&work.row, row);
            (has.id, has.source, has.target, has.way)
                == (wants.id, wants.source, wants.target, wants.way)
        };
        let mut work = match runner.work.take().filter(same) {
            Some(work) => work,
            None => match self.load_job(row)? {
                Loaded::Work(kind) => Work {
                    row: row.clone(),
                    kind,
                },
                Loaded::NotYet => return Ok(Turn::Waits),
                Loaded::Obsolete(why) => {
                    self.drop_job(row, &why)?;
                    return Ok(Turn::Moved(0));
                }
            },
        };
        let step = match &mut work.kind {
            Kind::Begin(begin) => self.begin_turn(row, begin, patience)?,
            Kind::Gather(gather) => self.gather_turn(row, gather, patience)?,
            Kind::Down(down) => self.down_turn(row, down)?,
        };
        Ok(match step {
            Step::Moved(bytes) => {
                runner.work = Some(work);
                Turn::Moved(bytes)
            }
            Step::Waits => {
                runner.work = Some(work);
                Turn::Waits
            }
            // What is known is out of date.
            Step::Again => Turn::Moved(0),
            Step::Finish => match self.finish_job(runner, row, &mut work.kind, patience)? {
                Step::Waits => {
                    runner.work = Some(work);
                    Turn::Waits
                }
                Step::Moved(bytes) => {
                    runner.work = Some(work);
                    Turn::Moved(bytes)
                }
                Step::Again | Step::Finish => Turn::Moved(0),
            },
        })
    }

    /// Ends a job that cannot go on, until somebody resumes it.
    fn stop_job(&self, row: &JobRow, error: &str) -> Turn {
        let _command = self.command();
        self.jobs.board().running = None;
        self.maintenance.note(format!(
            "job {} ({}) has stopped: {error}",
            row.id.0, row.subject
        ));
        let now = {
            let inner = self.inner();
            inner.catalog.state().jobs.get(&row.id).cloned()
        };
        let Some(now) = now.filter(|now| now.state == JobState::Queued) else {
            return Turn::Moved(0);
        };
        let stopped = self.inner().catalog.commit(&[Change::SetJob {
            id: row.id,
            state: JobState::Stopped,
            error: Some(error.to_owned()),
            rate: now.rate,
        }]);
        match stopped {
            Ok(()) => {
                self.want_sums([row.source, row.target]);
                Turn::Moved(0)
            }
            // It is tried again as if nothing had been.
            Err(_) => Turn::Waits,
        }
    }

    /// Ends a job that has nothing to do, since the layers are not what it was begun for.
    fn drop_job(&self, row: &JobRow, why: &str) -> Result<()> {
        let _command = self.command();
        {
            // Held for both, so that nobody finds the job in neither place.
            let mut inner = self.inner();
            if inner.catalog.state().jobs.contains_key(&row.id) {
                inner.catalog.commit(&[Change::RemoveJob(row.id)])?;
            }
            self.jobs.board().ended_row(row, Phase::Cancelled);
        }
        self.want_sums([row.source, row.target]);
        self.maintenance.note(format!(
            "job {} ({}) has nothing to do: {why}",
            row.id.0, row.subject
        ));
        self.collect_unnamed()
    }

    /// Notes the end of jobs that others have ended with their layers.
    fn note_lost_jobs(&self) {
        let known: Vec<_> = {
            let inner = self.inner();
            inner.catalog.state().jobs.keys().copied().collect()
        };
        let mut board = self.jobs.board();
        let lost = board.lost(|id| known.binary_search(&id).is_ok() || board.scrubs.has(id));
        for id in lost {
            board.ended(id, Phase::Cancelled);
        }
    }

    /// The open volumes over a layer.
    fn volumes_over(&self, layer: LayerId) -> Vec<Arc<Volume>> {
        let inner = self.inner();
        let open = inner.open.values();
        open.filter(|volume| volume.newest_chain().slot_of(layer).is_some())
            .cloned()
            .collect()
    }

    /// Whether a job is still what it was, and to be carried out: its layers lie over each other as `chain` says, from the
    /// target down, and the target is in this state. The caller holds the command lock.
    fn is_as_it_was(&self, row: &JobRow, chain: &[LayerId], target: LayerState) -> bool {
        let inner = self.inner();
        let state = inner.catalog.state();
        let queued = state
            .jobs
            .get(&row.id)
            .is_some_and(|now| now.state == JobState::Queued && now.target == row.target);
        let of_target = state.layers.get(&row.target).map(|row| row.state);
        queued && of_target == Some(target) && lies_so(state, chain)
    }
}

/// Whether these layers lie over each other, from the top down.
fn lies_so(state: &CatalogState, chain: &[LayerId]) -> bool {
    let parent = |layer: &LayerId| state.layers.get(layer).map(|row| row.parent);
    chain
        .iter()
        .zip(chain.iter().skip(1))
        .all(|(upper, lower)| parent(upper) == Some(Some(*lower)))
        && chain.iter().all(|layer| state.layers.contains_key(layer))
}

/// What a turn of a job came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// So many bytes were moved, or something else was done.
    Moved(u64),
    /// It cannot go on now.
    Waits,
    /// The layers are not what they were: the job is to be taken up anew.
    Again,
    /// All is moved.
    Finish,
}
