//! Restore: a volume goes on from a snapshot.

use crate::error::{Error, Result};
use crate::lifecycle::{RestoreOptions, RestoreReport};
use crate::store::Store;

impl Store {
    /// Makes a volume hold what a snapshot of it holds; with a snapshot of a group, all volumes of the group, or none.
    ///
    /// # Errors
    /// `NotFound`, `Invalid`, `Exists`; `Busy` while one of them is open for requests.
    pub fn restore(
        &self,
        _volume: &str,
        _snapshot: &str,
        _options: &RestoreOptions,
    ) -> Result<RestoreReport> {
        Err(Error::Busy {
            what: "not there yet".into(),
        })
    }
}
