//! Commands on jobs.

use std::time::Instant;

use stratablk_layers::catalog::JobId;
use stratablk_layers::lifecycle::JobInfo;
use stratablk_layers::{self as layers};

use super::super::convert;
use super::super::error::{ApiError, Result};
use super::super::types::{Job, JobChange, JobList, ScrubRequest};
use super::Commands;

impl Commands {
    /// The jobs that have not ended, and those that ended lately.
    pub fn jobs(&self) -> JobList {
        JobList {
            jobs: self.store.jobs().into_iter().map(convert::job).collect(),
        }
    }

    /// One job.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn job(&self, id: u64) -> Result<Job> {
        Ok(convert::job(self.store.job(JobId(id))?))
    }

    /// Holds the sealed layers of a volume, or of all, against their checksums.
    ///
    /// # Errors
    /// `NotFound`; `Invalid`.
    pub fn scrub(&self, request: ScrubRequest) -> Result<Job> {
        check_rate(request.rate_bytes_per_s)?;
        let rate = request.rate_bytes_per_s;
        let job = self.store.scrub(request.volume.as_deref(), rate)?;
        self.job_begun(job.id, None)
    }

    /// Lets a job rest until it is resumed.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` if it has ended.
    pub fn pause_job(&self, id: u64) -> Result<Job> {
        let job = self.store.pause_job(JobId(id));
        self.job_changed(job, "paused")
    }

    /// Lets a job go on that rests, was cancelled, or failed.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` if it is done.
    pub fn resume_job(&self, id: u64) -> Result<Job> {
        let job = self.store.resume_job(JobId(id));
        self.job_changed(job, "resumed")
    }

    /// Stops a job for good.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` if it has ended; `Busy` if it cannot be left half done.
    pub fn cancel_job(&self, id: u64) -> Result<Job> {
        let job = self.store.cancel_job(JobId(id));
        self.job_changed(job, "cancelled")
    }

    /// Limits a job.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` if it has ended, or for a limit that cannot be.
    pub fn change_job(&self, id: u64, change: JobChange) -> Result<Job> {
        check_rate(change.rate_bytes_per_s)?;
        let job = self.store.limit_job(JobId(id), change.rate_bytes_per_s);
        self.job_changed(job, "limited")
    }

    /// Tells of jobs what has changed since the last look.
    pub fn observe_jobs(&self) {
        self.watch
            .look(self.jobs().jobs, Instant::now(), &self.events);
    }

    /// A job that a command has just begun, with the limit that it gets. It may have ended already.
    pub(super) fn job_begun(&self, id: JobId, rate: Option<u64>) -> Result<Job> {
        if rate.is_some() {
            match self.store.limit_job(id, rate) {
                // It was faster.
                Ok(_) | Err(layers::Error::Invalid { .. } | layers::Error::NotFound { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let job = convert::job(self.store.job(id)?);
        tracing::info!(job = job.id, subject = %job.subject, way = job.way.name(), "begun");
        self.observe_jobs();
        Ok(job)
    }

    /// A job that a command has changed.
    fn job_changed(&self, job: layers::error::Result<JobInfo>, how: &str) -> Result<Job> {
        let job = convert::job(job?);
        tracing::info!(job = job.id, subject = %job.subject, "{how}");
        self.observe_jobs();
        Ok(job)
    }
}

/// Checks the limit of a job.
///
/// # Errors
/// `Invalid`.
pub(super) fn check_rate(rate: Option<u64>) -> Result<()> {
    if rate == Some(0) {
        let what = "0 bytes a second would never end; pause the job instead";
        return Err(ApiError::invalid("rate_bytes_per_s", what));
    }
    Ok(())
}
