//! Which sectors may differ between two points in the life of disks.

use crate::error::{Error, Result};
use crate::lifecycle::{DiffRange, Point};
use crate::store::Store;

impl Store {
    /// The runs of sectors that layers say differ from `from` to `to`, in order, each as long as possible. What no layer
    /// between them touched is not among them; what was written with the same content is.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` if the two have no layer in common and neither is empty.
    pub fn diff(&self, _from: &Point, _to: &Point) -> Result<Vec<DiffRange>> {
        Err(Error::Busy {
            what: "not there yet".into(),
        })
    }
}
