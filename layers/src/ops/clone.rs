//! What a clone starts from: the sealed layer of a snapshot.

use crate::catalog::LayerState;
use crate::error::{Error, Result};
use crate::store::Store;
use crate::units::{LayerId, Sector};

impl Store {
    /// The sealed layer of a snapshot, and the size of its disk.
    pub(crate) fn sealed_layer_of(
        &self,
        volume: &str,
        snapshot: &str,
    ) -> Result<(LayerId, Sector)> {
        let inner = self.inner();
        let state = inner.catalog.state();
        state.volume(volume)?;
        let row = state
            .snapshot(volume, snapshot)
            .ok_or_else(|| Error::NotFound {
                kind: "snapshot",
                name: format!("{volume}@{snapshot}"),
            })?;
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
