//! Jobs: what takes long, done in the background, step by step, and resumed after a crash.

use std::path::Path;

use crate::catalog::JobId;
use crate::error::{Error, Result};
use crate::lifecycle::JobInfo;
use crate::store::Store;

impl Store {
    /// The jobs that have not ended, and those that ended since the store was opened (the last 100), by number.
    pub fn jobs(&self) -> Vec<JobInfo> {
        Vec::new()
    }

    /// One job.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn job(&self, id: JobId) -> Result<JobInfo> {
        Err(Error::NotFound {
            kind: "job",
            name: id.0.to_string(),
        })
    }

    /// Lets a job rest, durably, until it is resumed. One that has ended cannot be paused.
    ///
    /// # Errors
    /// `NotFound`, `Invalid`.
    pub fn pause_job(&self, id: JobId) -> Result<JobInfo> {
        self.job(id)
    }

    /// Lets a job that rests, was cancelled or failed go on.
    ///
    /// # Errors
    /// `NotFound`, `Invalid`.
    pub fn resume_job(&self, id: JobId) -> Result<JobInfo> {
        self.job(id)
    }

    /// Stops a job for good. What it has moved stays moved: every disk reads the same whether or not it ends. The layer it
    /// worked on stays, without a name, until somebody resumes the job.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` if it has ended; `Busy` if it cannot be left half done (then pause it).
    pub fn cancel_job(&self, id: JobId) -> Result<JobInfo> {
        self.job(id)
    }

    /// Limits a job to so many bytes a second, or no longer.
    ///
    /// # Errors
    /// `NotFound`, `Invalid`.
    pub fn limit_job(&self, id: JobId, _rate: Option<u64>) -> Result<JobInfo> {
        self.job(id)
    }

    /// Makes a volume independent of all layers below its active one, as a job. Its snapshots stay what they are.
    ///
    /// # Errors
    /// `NotFound`; `Busy` if it is being flattened already.
    pub fn flatten(&self, volume: &str) -> Result<JobInfo> {
        Err(Error::NotFound {
            kind: "volume",
            name: volume.to_owned(),
        })
    }

    /// Creates a volume with the content of a raw image, which can be used at once; a job makes it independent of the image.
    ///
    /// # Errors
    /// As `create_volume`.
    pub fn import(&self, name: &str, _image: &Path) -> Result<JobInfo> {
        Err(Error::NotFound {
            kind: "image",
            name: name.to_owned(),
        })
    }

    /// Carries out jobs, the oldest first, until the store is closed: for a thread of its own. Returns `false` once it is
    /// closed, and `true` after each step or wait.
    pub fn run_jobs(&self) -> bool {
        false
    }

    /// Takes one step of the oldest job that is not paused or stopped, without any wait: for simulations. Returns whether
    /// there was one.
    pub fn job_step(&self) -> bool {
        false
    }
}
