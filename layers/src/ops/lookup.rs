//! Finding things in the catalog by name, and rows that follow from others.

use uuid::Uuid;

use crate::catalog::{CatalogState, Change, LayerRow, SnapshotRow, VolumeRow};
use crate::error::{Error, Result};
use crate::units::{LayerId, Sector};

impl CatalogState {
    /// The volume of this name.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn volume(&self, name: &str) -> Result<&VolumeRow> {
        self.volumes.get(name).ok_or_else(|| Error::NotFound {
            kind: "volume",
            name: name.to_owned(),
        })
    }

    /// The snapshot of this name of a volume.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn snapshot_of(&self, volume: &str, name: &str) -> Result<&SnapshotRow> {
        self.volume(volume)?;
        self.snapshot(volume, name).ok_or_else(|| Error::NotFound {
            kind: "snapshot",
            name: format!("{volume}@{name}"),
        })
    }

    /// A layer and all those below it, from the base up.
    pub fn chain_of(&self, top: LayerId) -> Vec<&LayerRow> {
        let mut chain = self.chain(top);
        chain.reverse();
        chain
    }
}

impl VolumeRow {
    /// A snapshot of what is in its active layer.
    pub(crate) fn to_snapshot(&self, name: &str, group: Uuid, created_ns: u64) -> SnapshotRow {
        SnapshotRow {
            volume: self.name.clone(),
            name: name.to_owned(),
            layer: self.active,
            group,
            created_ns,
            size: self.size,
        }
    }

    /// The change that gives it another size.
    pub(crate) fn sized(&self, size: Sector) -> Change {
        Change::SetSize {
            volume: self.name.clone(),
            size,
        }
    }
}
