//! Another size for a disk: more while it is used, less only while it is not.

use crate::error::{Error, Result};
use crate::lifecycle::ResizeOptions;
use crate::store::{Store, VolumeInfo};

impl Store {
    /// Changes the size of a volume. What a larger disk gains reads as zeroes, also where layers below are as large.
    ///
    /// # Errors
    /// `NotFound`, `Invalid`; `Busy` for a smaller size while it is open.
    pub fn resize(
        &self,
        _volume: &str,
        _bytes: u64,
        _options: ResizeOptions,
    ) -> Result<VolumeInfo> {
        Err(Error::Busy {
            what: "not there yet".into(),
        })
    }
}
