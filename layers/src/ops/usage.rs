//! What volumes take on the host, alone and together.

use crate::error::{Error, Result};
use crate::lifecycle::Usage;
use crate::store::Store;

impl Store {
    /// What a volume, or each of them, takes.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn usage(&self, _volume: Option<&str>) -> Result<Vec<Usage>> {
        Err(Error::Busy {
            what: "not there yet".into(),
        })
    }
}
