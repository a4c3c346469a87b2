//! A turn of what scrubs and takes checksums: which layer comes next, and how scrubs end.
//!
//! Layers that a job changes are left alone: their data moves.

use std::collections::BTreeSet;
use std::time::Instant;

use crate::catalog::{JobId, JobRow, JobState, LayerState};
use crate::lifecycle::{Phase, ScrubReport};
use crate::ops::collect::jobs_on;
use crate::ops::jobs::is_begun_in_place;
use crate::ops::jobs::rate::Bucket;
use crate::ops::merge::{Patience, Turn};
use crate::store::Store;
use crate::sumfile;
use crate::units::LayerId;

use super::NAMED_MAX;
use super::layer::{Kind, Next, Work};

/// Bytes that are read in one turn.
const PIECE_BYTES: u64 = 1 << 20;
/// Bytes that are read in one turn however low the rate.
const LIMITED_BYTES_MIN: u64 = 64 << 10;
/// So often a layer is begun anew because it changed meanwhile.
const BEGINS_MAX: u32 = 3;

/// So many turns without work lie at most between two attempts to scrub a layer of which nothing is served.
const IDLE_TURNS_MAX: u32 = 1024;

/// What is known from one turn to the next.
#[derive(Debug, Default)]
pub(crate) struct Scrubber {
    /// Whether all layers were looked at once.
    looked: bool,
    /// Layers that need checksums, or to be held against theirs since what was damaged of them is not known any more.
    missing: BTreeSet<LayerId>,
    /// Those of them that a job has changed and works on still. Looked at again when a job has ended or stopped.
    blocked: BTreeSet<LayerId>,
    /// The layer at work.
    work: Option<Work>,
    /// Keeps it to its rate.
    bucket: Bucket,
    /// The next turn of whoever keeps to the rate.
    due: Option<Instant>,
    /// Layers of which nothing is served and that could not be scrubbed.
    stuck: Stuck,
}

/// When layers that could not be scrubbed are tried again, counted in turns without work: after 1, then 2, then 4 and so on.
#[derive(Debug, Default)]
struct Stuck {
    /// Turns since the last time.
    waited: u32,
    /// Turns in which nothing is tried.
    paused: u32,
}

impl Stuck {
    /// Counts a turn. Returns whether it is time.
    fn waits(&mut self) -> bool {
        self.waited += 1;
        let is_time = self.waited > self.paused;
        if is_time {
            self.waited = 0;
            self.paused = (self.paused * 2 + 1).min(IDLE_TURNS_MAX);
        }
        is_time
    }
}

/// Why a layer is left alone.
pub(super) enum Obstacle {
    /// It is gone, or it is none to look at.
    Gone,
    /// A job works on it.
    Job(JobId),
}

impl Scrubber {
    /// The next layer that nobody asked for: first of those of which nothing is served until then.
    fn next_missing(&mut self, lost: &BTreeSet<LayerId>) -> Option<LayerId> {
        let first = self.missing.intersection(lost).next();
        let next = *first.or_else(|| self.missing.first())?;
        self.missing.remove(&next);
        Some(next)
    }

    /// After a turn in which nobody had work: what of `lost` could not be scrubbed is tried again from time to time, since
    /// guests wait for it.
    pub(crate) fn try_again(&mut self, lost: &BTreeSet<LayerId>) {
        let waits = |layer: &&LayerId| self.missing.contains(layer) || self.blocked.contains(layer);
        let stuck: Vec<LayerId> = lost.iter().filter(|layer| !waits(layer)).copied().collect();
        if stuck.is_empty() {
            self.stuck = Stuck::default();
        } else if self.stuck.waits() {
            self.missing.extend(stuck);
        }
    }
}

impl Store {
    /// A turn. Whoever is patient keeps to the rate.
    pub(crate) fn scrub_turn(&self, scrubber: &mut Scrubber, patience: Patience) -> Turn {
        let now = Instant::now();
        if patience == Patience::Wait && scrubber.due.is_some_and(|due| due > now) {
            return Turn::Waits;
        }
        if !scrubber.looked {
            scrubber.looked = true;
            self.look_at_all(scrubber);
        }
        let sealed = std::mem::take(&mut self.jobs.board().scrubs.sealed);
        if !sealed.is_empty() {
            scrubber.missing.append(&mut scrubber.blocked);
        }
        scrubber.missing.extend(sealed);
        let (turn, bytes, rate) = self.scrub_piece(scrubber);
        scrubber.due = Some(now + scrubber.bucket.took(bytes, rate, now));
        let at_work = scrubber.work.as_ref();
        let at_work = at_work.is_some_and(|work| matches!(work.kind, Kind::Take(..)));
        let waiting = scrubber.missing.union(&scrubber.blocked);
        let lost = self.damage.lost();
        let waiting = waiting.filter(|layer| !lost.contains(*layer)).count();
        self.jobs.board().scrubs.waiting = waiting + usize::from(at_work);
        turn
    }

    /// The rest of a turn. Returns how it ended, how much was read, and to what rate that is to be kept.
    fn scrub_piece(&self, scrubber: &mut Scrubber) -> (Turn, u64, Option<u64>) {
        let work = match scrubber.work.take() {
            Some(work) if self.goes_on(&work) => work,
            stale => {
                if let Some(stale) = stale {
                    self.put_back(scrubber, stale);
                }
                match self.next_work(scrubber) {
                    Ok(Some(work)) => work,
                    Ok(None) => return (Turn::Idle, 0, None),
                    // It was said why.
                    Err(()) => return (Turn::Aside, 0, None),
                }
            }
        };
        let rate = self.scrub_rate(work.of);
        let most = match rate {
            Some(rate) => PIECE_BYTES.min((rate / 4).max(LIMITED_BYTES_MIN)),
            None => PIECE_BYTES,
        };
        let (layer, of, begins) = (work.layer, work.of, work.begins);
        let next = match &work.kind {
            Kind::Take(..) => self.take_piece(work, most),
            Kind::Verify(..) => self.verify_piece(work, most),
        };
        let bytes = match next {
            Ok(Next::Goes(work, bytes)) => {
                scrubber.work = Some(work);
                bytes
            }
            Ok(Next::Waits(work)) => {
                scrubber.work = Some(work);
                return (Turn::Waits, 0, rate);
            }
            Ok(Next::Done) => {
                scrubber.missing.remove(&layer);
                0
            }
            Ok(Next::Again(work)) if begins < BEGINS_MAX => {
                match self.begin(work.layer, of, begins + 1) {
                    Ok(work) => scrubber.work = work,
                    Err(error) => self.left_out(layer, of, &error.to_string()),
                }
                0
            }
            Ok(Next::Again(_)) => {
                self.left_out(layer, of, "it was changed again and again meanwhile");
                0
            }
            Err(error) => {
                scrubber.missing.remove(&layer);
                sumfile::discard(&self.media, layer);
                self.left_out(layer, of, &error.to_string());
                0
            }
        };
        if of.is_some() {
            self.jobs.board().moved(bytes);
        }
        (Turn::Aside, bytes, rate)
    }

    /// Looks which layers have no checksums, and what an earlier scrub found.
    fn look_at_all(&self, scrubber: &mut Scrubber) {
        let layers: Vec<LayerId> = {
            let inner = self.inner();
            let rows = inner.catalog.state().layers.values();
            rows.filter(|row| row.state == LayerState::Sealed && row.base.is_none())
                .map(|row| row.id)
                .collect()
        };
        for layer in layers {
            if let Err(error) = self.look_for_bad(layer) {
                self.maintenance.note(format!(
                    "layer {layer}: what an earlier scrub found damaged cannot be known now: {error}"
                ));
            }
            if !sumfile::exists(&self.media, layer) {
                scrubber.missing.insert(layer);
            }
        }
    }

    /// Whether the layer at work is still to be looked at, and may be.
    fn goes_on(&self, work: &Work) -> bool {
        let wanted = match work.of {
            None => true,
            Some(id) => {
                let board = self.jobs.board();
                board.scrubs.next().is_some_and(|scrub| scrub.row.id == id)
            }
        };
        wanted && self.obstacle(work.layer).is_none()
    }

    /// What keeps a layer from being looked at. A job that has not begun to change it, or only copies from it, does not: as
    /// long as there are checksums, they are those of the data.
    pub(super) fn obstacle(&self, layer: LayerId) -> Option<Obstacle> {
        let fits = {
            let inner = self.inner();
            let row = inner.catalog.state().layers.get(&layer);
            row.is_some_and(|row| row.state == LayerState::Sealed && row.base.is_none())
        };
        if !fits {
            return Some(Obstacle::Gone);
        }
        let job = self.job_on(layer);
        let job = job.filter(|_| !sumfile::exists(&self.media, layer));
        job.map(Obstacle::Job)
    }

    /// A job that moves data of a layer, or may begin to at any moment. One that has stopped does not: before it goes on it
    /// removes checksums. But where its target has its source's file guests write to that.
    pub(super) fn job_on(&self, layer: LayerId) -> Option<JobId> {
        let inner = self.inner();
        let state = inner.catalog.state();
        let moves = |job: &&JobRow| job.state != JobState::Stopped || is_begun_in_place(state, job);
        let mut jobs = jobs_on(state, layer).into_iter();
        jobs.find(moves).map(|job| job.id)
    }

    /// A layer that cannot go on now is looked at from its beginning later.
    fn put_back(&self, scrubber: &mut Scrubber, work: Work) {
        if work.of.is_none() || matches!(work.kind, Kind::Take(..)) {
            // What was begun is removed when it is begun anew; if it never is, `check` names it.
            scrubber.missing.insert(work.layer);
        }
        if let Some(id) = work.of
            && let Some(scrub) = self.jobs.board().scrubs.rows.get_mut(&id)
        {
            scrub.layers.push_front(work.layer);
        }
    }

    /// The rate of a scrub, or of what is done by itself.
    fn scrub_rate(&self, of: Option<JobId>) -> Option<u64> {
        match of {
            None => self.options.sums_rate,
            Some(id) => {
                let board = self.jobs.board();
                board.scrubs.rows.get(&id).and_then(|scrub| scrub.row.rate)
            }
        }
    }

    /// Takes up the next layer: of the oldest scrub, or one that needs checksums. `Err`: that one is not to be, and it was said
    /// why.
    fn next_work(&self, scrubber: &mut Scrubber) -> std::result::Result<Option<Work>, ()> {
        let next = {
            let mut board = self.jobs.board();
            let held_from = board.held_from;
            let scrub = board.scrubs.next().map(|scrub| scrub.row.id);
            let scrub = scrub.filter(|id| held_from.is_none_or(|held| *id < held));
            scrub.map(|id| {
                let scrub = board.scrubs.rows.get_mut(&id);
                (id, scrub.and_then(|scrub| scrub.layers.pop_front()))
            })
        };
        let (layer, of) = match next {
            Some((id, Some(layer))) => (layer, Some(id)),
            Some((id, None)) => {
                self.end_of_scrub(id);
                return Err(());
            }
            None => match scrubber.next_missing(&self.damage.lost()) {
                Some(layer) => (layer, None),
                None => return Ok(None),
            },
        };
        if let Some(id) = of {
            self.show_progress(id, layer);
        }
        match self.obstacle(layer) {
            Some(Obstacle::Job(_)) if of.is_none() => {
                scrubber.blocked.insert(layer);
                Err(())
            }
            Some(Obstacle::Job(job)) => {
                let what = format!("job {} works on it", job.0);
                self.left_out(layer, of, &what);
                Err(())
            }
            Some(Obstacle::Gone) => {
                self.forget_gone();
                self.report(of, |report| {
                    report.layers_total = report.layers_total.saturating_sub(1)
                });
                Err(())
            }
            None => match self.begin(layer, of, 1) {
                Ok(Some(work)) => Ok(Some(work)),
                Ok(None) => Err(()),
                Err(error) => {
                    self.left_out(layer, of, &error.to_string());
                    Err(())
                }
            },
        }
    }

    /// Tells how much is before a scrub that takes up a layer.
    fn show_progress(&self, id: JobId, layer: LayerId) {
        let layers: Vec<LayerId> = {
            let board = self.jobs.board();
            if board.running == Some(id) {
                return;
            }
            let scrub = board.scrubs.rows.get(&id);
            let layers = scrub.map(|scrub| scrub.layers.iter().copied().collect());
            layers.unwrap_or_default()
        };
        let left = layers.into_iter().chain([layer]);
        let left = left.map(|layer| self.allocated(layer)).sum();
        let mut board = self.jobs.board();
        let row = board.scrubs.rows.get(&id).map(|scrub| scrub.row.clone());
        if let Some(row) = row {
            board.began(&row, left);
        }
    }

    /// Changes what a scrub reports.
    pub(super) fn report(&self, of: Option<JobId>, change: impl FnOnce(&mut ScrubReport)) {
        let mut board = self.jobs.board();
        if let Some(scrub) = of.and_then(|id| board.scrubs.rows.get_mut(&id)) {
            change(&mut scrub.report);
        }
    }

    /// A layer was not looked at, or not to its end.
    pub(super) fn left_out(&self, layer: LayerId, of: Option<JobId>, why: &str) {
        if self
            .obstacle(layer)
            .is_some_and(|what| matches!(what, Obstacle::Gone))
        {
            return;
        }
        match of {
            None if self.damage.is_lost(layer) => self.maintenance.note(format!(
                "layer {layer}: all reads of it fail until it was scrubbed, which was not possible: {why}"
            )),
            None => self.maintenance.note(format!(
                "layer {layer}: its checksums are not taken until it is scrubbed: {why}"
            )),
            Some(_) => self.report(of, |report| {
                report.left_out_total += 1;
                if report.left_out.len() < NAMED_MAX {
                    report.left_out.push((layer, why.to_owned()));
                }
            }),
        }
    }

    /// All layers of a scrub were looked at.
    fn end_of_scrub(&self, id: JobId) {
        let mut board = self.jobs.board();
        let report = board.scrubs.rows.get(&id).map(|scrub| scrub.report.clone());
        let error = report.and_then(|report| report.failure());
        let phase = if error.is_some() {
            Phase::Failed
        } else {
            Phase::Done
        };
        board.end_scrub(id, phase, error);
        if board.running == Some(id) {
            board.running = None;
        }
    }
}
