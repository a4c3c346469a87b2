//! What those who serve a volume ask all the time, without a look at its files.

use crate::catalog::VolumeKind;
use crate::error::Result;
use crate::store::Store;
use crate::units::Sector;

/// What the catalog says of a volume, and how it fares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeFacts {
    /// The size of its disk.
    pub size: Sector,
    /// What happens to its writes.
    pub kind: VolumeKind,
    /// Whether the next start of a machine throws away what was written since the last one.
    pub armed: bool,
    /// Why it takes no more writes.
    pub failure: Option<String>,
    /// Whether what it has to write waits for space on the host.
    pub no_space: bool,
}

impl Store {
    /// What there is to know of a volume without a look at its files.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn volume_facts(&self, name: &str) -> Result<VolumeFacts> {
        let inner = self.inner();
        let row = inner.catalog.state().volume(name)?;
        Ok(VolumeFacts {
            size: row.size,
            kind: row.kind,
            armed: row.armed,
            failure: (inner.open.get(name).and_then(|volume| volume.failure()))
                .or_else(|| row.failed.clone()),
            no_space: inner
                .open
                .get(name)
                .is_some_and(|volume| volume.waits_for_space()),
        })
    }
}
