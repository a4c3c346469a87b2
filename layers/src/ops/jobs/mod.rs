//! Jobs: what takes long, done in the background, step by step, and resumed after a crash.
//!
//! DURABILITY: a job's row says what is to be done and whether it is to be done now. How far it is nobody writes down: the maps
//! of its layers say it.

pub(crate) mod info;
pub(crate) mod rate;
mod run;

use std::path::Path;

use crate::catalog::{CatalogState, Change, JobId, JobKind, JobRow, JobState, VolumeKind, Way};
use crate::check::base_change;
use crate::error::{Error, Result};
use crate::lifecycle::{JobInfo, Phase};
use crate::store::{Store, VolumeSource, now_ns};
use crate::units::LayerId;

use super::kind::starts_anew;

pub(crate) use info::Jobs;

/// Holds back jobs that are added while it is there, so that their limits can be set before they begin.
#[derive(Debug)]
#[must_use = "jobs are held back only while it is there"]
pub struct JobsHeld<'a>(&'a Store);

impl Drop for JobsHeld<'_> {
    fn drop(&mut self) {
        {
            let mut board = self.0.jobs.board();
            board.holders = board.holders.saturating_sub(1);
            if board.holders == 0 {
                board.held_from = None;
            }
        }
        self.0.jobs.wake();
    }
}

impl Store {
    /// Holds back jobs that are added from now on, until what it returns is dropped. Jobs that are there go on.
    pub fn hold_new_jobs(&self) -> JobsHeld<'_> {
        let inner = self.inner();
        let next = JobId(inner.catalog.state().next_job);
        let mut board = self.jobs.board();
        board.holders += 1;
        board.held_from = board.held_from.or(Some(next));
        JobsHeld(self)
    }

    /// The change that adds a job, the `nth` (from 0) that a transaction adds. `source` lies below `target`; a target that is
    /// active may be given with `Way::InPlace`, which then begins with a snapshot without a name.
    pub(crate) fn job_change(
        &self,
        nth: u64,
        kind: JobKind,
        subject: String,
        source: LayerId,
        target: LayerId,
        way: Way,
    ) -> Change {
        let next = self.inner().catalog.state().next_job;
        Change::AddJob(JobRow {
            id: JobId(next.saturating_add(nth)),
            kind,
            subject,
            source,
            target,
            way,
            state: JobState::Queued,
            error: None,
            rate: None,
            created_ns: now_ns(),
        })
    }

    /// Remembers to what rate a layer is to be joined with the one above, by a job that may be made later.
    pub(crate) fn keep_rate(&self, layer: LayerId, rate: Option<u64>) {
        let inner = self.inner();
        let known = &inner.catalog.state().layers;
        let mut board = self.jobs.board();
        board.rates.retain(|layer, _| known.contains_key(layer));
        if let Some(rate) = rate.filter(|_| known.contains_key(&layer)) {
            board.rates.insert(layer, rate);
        }
    }

    /// The jobs that have not ended, and those that ended since the store was opened (the last 100), by number.
    pub fn jobs(&self) -> Vec<JobInfo> {
        let rows: Vec<JobRow> = {
            let inner = self.inner();
            inner.catalog.state().jobs.values().cloned().collect()
        };
        let board = self.jobs.board();
        let mut jobs: Vec<JobInfo> = board.all_ended().cloned().collect();
        jobs.extend(rows.iter().map(|row| board.describe(row)));
        jobs.extend(board.scrubs.infos(&board));
        // Out of the catalog, and not told to have ended yet: a moment later it is.
        jobs.extend(board.ending(|id| rows.iter().any(|row| row.id == id) || board.scrubs.has(id)));
        jobs.sort_by_key(|job| job.id);
        jobs.dedup_by_key(|job| job.id);
        jobs
    }

    /// One job.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn job(&self, id: JobId) -> Result<JobInfo> {
        self.jobs()
            .into_iter()
            .find(|job| job.id == id)
            .ok_or_else(|| Error::NotFound {
                kind: "job",
                name: id.0.to_string(),
            })
    }

    /// Lets a job rest, durably, until it is resumed. One that has ended cannot be paused.
    ///
    /// # Errors
    /// `NotFound`, `Invalid`.
    pub fn pause_job(&self, id: JobId) -> Result<JobInfo> {
        self.set_job(id, |row| match row.state {
            JobState::Queued | JobState::Paused => {
                row.state = JobState::Paused;
                Ok(())
            }
            JobState::Stopped => Err(invalid(id, "has stopped; resume it or leave it")),
        })
    }

    /// Lets a job that rests, was cancelled or failed go on.
    ///
    /// # Errors
    /// `NotFound`, `Invalid`.
    pub fn resume_job(&self, id: JobId) -> Result<JobInfo> {
        self.set_job(id, |row| {
            row.state = JobState::Queued;
            row.error = None;
            Ok(())
        })
    }

    /// Stops a job for good. What it has moved stays moved: every disk reads the same whether or not it ends. The layer it
    /// worked on stays, without a name, until somebody resumes the job. A copy is not resumed but begun anew.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` if it has ended; `Busy` if it cannot be left half done (then pause it).
    pub fn cancel_job(&self, id: JobId) -> Result<JobInfo> {
        if self.cancel_scrub(id) {
            return self.job(id);
        }
        let command = self.command();
        let row = self.job_row(id)?;
        if self.is_begun_in_place(&row) {
            return Err(Error::Busy {
                what: format!(
                    "job {} has begun to move data in place and cannot be left half done; pause it instead \
                     (stratablk job pause {})",
                    id.0, id.0
                ),
            });
        }
        let into_base = row.kind == JobKind::IntoBase;
        if into_base && self.has_changed_base(&row) {
            return Err(Error::Busy {
                what: format!(
                    "job {} has begun to write to the image, which is half changed; pause it instead (stratablk job pause {})",
                    id.0, id.0
                ),
            });
        }
        if into_base || row.way == Way::Copy && !self.is_finished_in_map(&row) {
            // Nothing waits for it: what it was to free is freed when there is nothing left to copy, or by another one.
            // Held for both, so that nobody finds the job in neither place.
            let mut inner = self.inner();
            inner.catalog.commit(&[Change::RemoveJob(id)])?;
            self.jobs.board().ended_row(&row, Phase::Cancelled);
            drop(inner);
            if into_base {
                self.share_base_again(row.source);
            } else {
                // Joins that it stood in the way of.
                self.collect_everywhere();
            }
            self.jobs.wake();
            return self.job(id);
        }
        drop(command);
        let job = self.set_job(id, |row| {
            row.state = JobState::Stopped;
            row.error = None;
            Ok(())
        })?;
        // Perhaps for good.
        self.want_sums([row.source, row.target]);
        Ok(job)
    }

    /// Limits a job to so many bytes a second, or no longer.
    ///
    /// # Errors
    /// `NotFound`, `Invalid`.
    pub fn limit_job(&self, id: JobId, rate: Option<u64>) -> Result<JobInfo> {
        self.set_job(id, |row| {
            row.rate = rate.filter(|rate| *rate > 0);
            Ok(())
        })
    }

    /// Makes a volume independent of all layers below its active one, as a job. Its snapshots stay what they are. Of an
    /// immutable or multiattach volume the layer that it starts from becomes independent: its active one is thrown away.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` if nothing lies below it; `Busy` if its layers are being merged already.
    pub fn flatten(&self, volume: &str) -> Result<JobInfo> {
        let _command = self.command();
        self.add_flatten(volume)
    }

    /// Creates a volume with the content of a raw image, which can be used at once; a job makes it independent of the image.
    ///
    /// # Errors
    /// As `create_volume`.
    pub fn import(&self, name: &str, image: &Path) -> Result<JobInfo> {
        let _command = self.command();
        let id = JobId(self.inner().catalog.state().next_job);
        let source = VolumeSource::Base(image.to_owned());
        let (kind, job) = (VolumeKind::Normal, JobKind::Import);
        self.create_in_command(name, &source, kind, Some(job))?;
        self.jobs.wake();
        self.job(id)
    }

    /// Adds a job that copies all that lies below a volume's active layer, or below what it starts from, into that.
    fn add_flatten(&self, volume: &str) -> Result<JobInfo> {
        let row = self.volume_row(volume)?;
        let target = if starts_anew(row.kind) {
            self.sealed_content(&row)?
        } else {
            row.active
        };
        let source = {
            let inner = self.inner();
            let state = inner.catalog.state();
            let chain = state.chain_of(target);
            if let Some(job) =
                job_within(state, &chain.iter().map(|row| row.id).collect::<Vec<_>>())
            {
                return Err(Error::Busy {
                    what: format!(
                        "job {} works on layers of volume {volume:?}; wait for it (stratablk job wait {}) and try again",
                        job.id.0, job.id.0
                    ),
                });
            }
            let root = chain.first().map(|row| row.id);
            let root = root.filter(|root| *root != target);
            root.ok_or_else(|| Error::Invalid {
                field: "volume",
                what: if target == row.active {
                    format!(
                        "{volume:?} is independent already: nothing lies below its active layer"
                    )
                } else {
                    format!(
                        "{volume:?} is independent already: nothing lies below what it starts from"
                    )
                },
            })?
        };
        let (kind, subject) = (JobKind::Flatten, volume.to_owned());
        let change = self.job_change(0, kind, subject, source, target, Way::Copy);
        let Change::AddJob(row) = &change else {
            unreachable!("a job is added");
        };
        let id = row.id;
        self.inner().catalog.commit(&[change])?;
        self.jobs.wake();
        self.job(id)
    }

    /// A job that has not ended.
    fn job_row(&self, id: JobId) -> Result<JobRow> {
        let row = self.inner().catalog.state().jobs.get(&id).cloned();
        match row {
            Some(row) => Ok(row),
            None => {
                self.job(id)?;
                Err(invalid(id, "has ended"))
            }
        }
    }

    /// Changes how a job stands, durably.
    fn set_job(
        &self,
        id: JobId,
        mut change: impl FnMut(&mut JobRow) -> Result<()>,
    ) -> Result<JobInfo> {
        let has_scrub = self.jobs.board().scrubs.has(id);
        if has_scrub && let Some(changed) = self.set_scrub(id, &mut change) {
            changed?;
            return self.job(id);
        }
        let _command = self.command();
        let before = self.job_row(id)?;
        let mut row = before.clone();
        change(&mut row)?;
        if row != before {
            self.inner().catalog.commit(&[Change::SetJob {
                id,
                state: row.state,
                error: row.error,
                rate: row.rate,
            }])?;
        }
        self.jobs.wake();
        self.job(id)
    }

    /// Whether a job into a user's image has begun to write to it. One that is gone is none to take care of.
    fn has_changed_base(&self, row: &JobRow) -> bool {
        let base = {
            let inner = self.inner();
            let source = inner.catalog.state().layers.get(&row.source);
            source.and_then(|source| source.base.clone())
        };
        base.is_some_and(|base| {
            let stat = self.media.stat(&base.path);
            stat.is_ok_and(|stat| base_change(&base, &stat).is_some())
        })
    }

    /// Whether a job's target has the source's file: it cannot be left half done then.
    fn is_begun_in_place(&self, row: &JobRow) -> bool {
        is_begun_in_place(self.inner().catalog.state(), row)
    }
}

/// The same, as a catalog says.
pub(crate) fn is_begun_in_place(state: &CatalogState, row: &JobRow) -> bool {
    let target = state.layers.get(&row.target);
    // Before its beginning the target lies directly over the source.
    row.way == Way::InPlace && target.is_some_and(|target| target.parent != Some(row.source))
}

/// The change that adds a job, with a limit.
pub(crate) fn with_rate(mut change: Change, rate: Option<u64>) -> Change {
    if let Change::AddJob(row) = &mut change {
        row.rate = rate.filter(|rate| *rate > 0);
    }
    change
}

/// A job on any of these layers, which are all of a chain from its root up, stopped ones left out. A job of another disk
/// over all of them is one too: it takes from them.
fn job_within<'a>(state: &'a CatalogState, layers: &[LayerId]) -> Option<&'a JobRow> {
    let over = |target: LayerId| {
        let top = layers.last();
        layers.contains(&target) || state.chain(target).iter().any(|row| Some(&row.id) == top)
    };
    let works = |job: &&JobRow| {
        job.state != JobState::Stopped && layers.contains(&job.source) && over(job.target)
    };
    state.jobs.values().find(works)
}

/// A job that cannot do this.
fn invalid(id: JobId, what: &str) -> Error {
    Error::Invalid {
        field: "job",
        what: format!("job {} {what}", id.0),
    }
}
