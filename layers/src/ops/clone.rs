//! What a clone starts from: the sealed layer of a snapshot, or what a volume holds now, which is sealed for it.
//!
//! DURABILITY: sealing a volume's active layer has the order of a snapshot; see there.

use crate::catalog::{LayerState, VolumeKind};
use crate::error::{Error, Result};
use crate::store::Store;
use crate::units::{LayerId, Sector};

impl Store {
    /// A sealed layer with what a volume holds now, and the size of its disk. Machines that use it go on.
    pub(crate) fn seal_for_clone(&self, volume: &str) -> Result<(LayerId, Sector)> {
        let row = self.volume_row(volume)?;
        let refused = |what: &str| Error::Invalid {
            field: "from",
            what: format!("{volume} is of type {what}"),
        };
        match row.kind {
            VolumeKind::Normal | VolumeKind::Readonly => {}
            // It is never written to: its content is all there is.
            VolumeKind::Multiattach => return Ok((self.sealed_content(&row)?, row.size)),
            VolumeKind::Immutable => {
                return Err(refused(
                    "immutable, and what it holds now must not become what it starts from; make it normal first, which \
                     keeps what it holds (stratablk volume set, with --type normal)",
                ));
            }
            VolumeKind::Writethrough => {
                return Err(refused(
                    "writethrough, which is never split into layers; make it normal first",
                ));
            }
        }
        if let Some(below) = self.sealed_below(&row)
            && self.active_is_empty(&row)?
        {
            return Ok((below, row.size));
        }
        self.check_base_of(row.active)?;
        self.seal_running(&row)?;
        Ok((row.active, row.size))
    }

    /// Joins what was sealed for a clone that failed with the layer above it.
    pub(crate) fn collect_sealed(&self, volume: &str) {
        // Without that volume nothing was sealed.
        if let Ok(row) = self.volume_row(volume) {
            self.collect_after(&[row.active]);
        }
    }

    /// The sealed layer of a snapshot, and the size of its disk.
    pub(crate) fn sealed_layer_of(
        &self,
        volume: &str,
        snapshot: &str,
    ) -> Result<(LayerId, Sector)> {
        let inner = self.inner();
        let state = inner.catalog.state();
        let row = state.snapshot_of(volume, snapshot)?;
        let sealed = state
            .layers
            .get(&row.layer)
            .is_some_and(|layer| layer.state == LayerState::Sealed);
        if !sealed {
            return Err(Error::Busy {
                what: format!(
                    "snapshot {volume}@{snapshot} was never completed, since writing it failed; \
                     restart the daemon, which completes it"
                ),
            });
        }
        Ok((row.layer, row.size))
    }
}
