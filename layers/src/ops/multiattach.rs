//! Attachments of a multiattach volume: each has a volume of its own over what the multiattach volume holds.

use crate::error::{Error, Result};
use crate::lifecycle::Given;
use crate::store::Store;

impl Store {
    /// Makes a volume for an attachment of a multiattach volume: `name`, or the first free of NAME-1, NAME-2 and so on.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` if it is of another type; `Exists`.
    pub fn give_attachment(&self, _volume: &str, _name: Option<&str>) -> Result<Given> {
        Err(Error::Busy {
            what: "not there yet".into(),
        })
    }

    /// Ends an attachment: its volume is deleted, or kept as a normal volume of the name `keep_as`.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` if it is no attachment; `Busy` while it is open; `Exists`.
    pub fn take_attachment(&self, _volume: &str, _keep_as: Option<&str>) -> Result<()> {
        Err(Error::Busy {
            what: "not there yet".into(),
        })
    }
}
