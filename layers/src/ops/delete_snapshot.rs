//! Deleting a snapshot: its name goes at once, its data when it is not needed any more.

use crate::error::{Error, Result};
use crate::lifecycle::{DeleteOptions, DeleteReport};
use crate::store::Store;

impl Store {
    /// Says what deleting a snapshot would do and cost, and changes nothing.
    ///
    /// # Errors
    /// `NotFound`, `Invalid`, `Busy`.
    pub fn plan_delete_snapshot(
        &self,
        _volume: &str,
        _snapshot: &str,
        _options: DeleteOptions,
    ) -> Result<DeleteReport> {
        Err(Error::Busy {
            what: "not there yet".into(),
        })
    }

    /// Deletes a snapshot. Its name is gone on return, durably; what is to be copied is copied by jobs.
    ///
    /// # Errors
    /// `NotFound`, `Invalid`, `Busy`.
    pub fn delete_snapshot(
        &self,
        _volume: &str,
        _snapshot: &str,
        _options: DeleteOptions,
    ) -> Result<DeleteReport> {
        Err(Error::Busy {
            what: "not there yet".into(),
        })
    }
}
