//! The disk of a machine that is saved, and of one that goes on from what was saved.
//!
//! DURABILITY: saving is a snapshot, with its order; it is done before the state is given out. Going on changes nothing.

use crate::catalog::{CatalogState, LayerState};
use crate::error::{Error, Result};
use crate::saved::SavedState;
use crate::store::{Selection, Store};
use crate::units::LayerId;

/// A refusal of a saved state.
fn refused(what: impl Into<String>) -> Error {
    Error::Invalid {
        field: "saved state",
        what: what.into(),
    }
}

impl Store {
    /// Seals what a volume holds and names it by a record for whoever saves the machine. A snapshot keeps it until the operator
    /// deletes it.
    ///
    /// # Errors
    /// As `snapshot`.
    pub fn save_state(&self, volume: &str) -> Result<SavedState> {
        let id = self.media.fresh_id().simple().to_string();
        let snapshot = format!("state-{}", id.get(..8).unwrap_or(&id));
        let report = self.snapshot(&snapshot, &Selection::Volumes(vec![volume.to_owned()]))?;
        let taken = report.snapshots.first();
        let taken = taken.ok_or_else(|| refused("it was not taken"))?;
        let inner = self.inner();
        let row = inner.catalog.state().snapshot_of(volume, &snapshot)?;
        Ok(SavedState {
            store: self.id(),
            layer: taken.layer,
            size: row.size,
            created_ns: taken.created_ns,
            volume: volume.to_owned(),
            snapshot,
        })
    }

    /// Looks whether a volume holds exactly what was saved: nothing was written to it since, or it was restored to it, or made
    /// from it. Changes nothing.
    ///
    /// # Errors
    /// `Invalid`, with what the operator can do.
    pub fn check_state(&self, volume: &str, saved: &SavedState) -> Result<()> {
        let _command = self.command();
        if saved.store != self.id() {
            return Err(refused(format!(
                "it was saved in store {}, and this is {}",
                saved.store,
                self.id()
            )));
        }
        let row = self.volume_row(volume)?;
        let (named, below) = {
            let inner = self.inner();
            let state = inner.catalog.state();
            let named = name_of(state, saved.layer);
            (named, below(state, row.active) == Some(saved.layer))
        };
        let Some((from, snapshot)) = named else {
            return Err(refused(format!(
                "what was saved is not there any more: snapshot {}@{} was deleted",
                saved.volume, saved.snapshot
            )));
        };
        if below && row.size == saved.size && self.active_is_empty(&row)? {
            return Ok(());
        }
        let restore = if from == volume {
            format!("go back to it first (stratablk snapshot restore {volume} {snapshot}), or ")
        } else {
            String::new()
        };
        Err(refused(format!(
            "volume {volume} does not hold what was saved; {restore}attach a clone of it in its place (stratablk clone \
             {from}@{snapshot} NAME)"
        )))
    }
}

/// The volume and the name of a snapshot of this layer, which is sealed.
fn name_of(state: &CatalogState, layer: LayerId) -> Option<(String, String)> {
    let row = state.layers.get(&layer)?;
    let name = state.names_of(layer).next()?;
    (row.state == LayerState::Sealed).then(|| (name.volume.clone(), name.name.clone()))
}

/// The layer below this one.
fn below(state: &CatalogState, layer: LayerId) -> Option<LayerId> {
    state.layers.get(&layer)?.parent
}
