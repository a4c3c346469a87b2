//! What happens to the writes of a volume: its type.

use crate::catalog::VolumeKind;
use crate::error::{Error, Result};
use crate::store::Store;

impl Store {
    /// Gives a volume another type. What it holds now becomes what an immutable or multiattach volume starts from.
    ///
    /// # Errors
    /// `NotFound`; `Busy` while it is open; `Invalid` if it has attachments of its own.
    pub fn set_kind(&self, _volume: &str, _kind: VolumeKind) -> Result<()> {
        Err(Error::Busy {
            what: "not there yet".into(),
        })
    }

    /// Throws away what an immutable volume took since it was reset last, if it is armed, and disarms it: a machine starts.
    /// Does nothing to volumes of other types. Crash-safe: the old or the new content, whole. Returns whether it was reset.
    ///
    /// # Errors
    /// `NotFound`; `Busy` while it is open; `Io`.
    pub fn machine_starts(&self, _volume: &str) -> Result<bool> {
        Ok(false)
    }

    /// Arms or disarms an immutable volume: whether the next start of a machine resets it. Durable on return.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn arm(&self, _volume: &str, _armed: bool) -> Result<()> {
        Ok(())
    }
}
