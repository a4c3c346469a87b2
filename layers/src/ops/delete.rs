//! Deleting a volume with its snapshots.
//!
//! DURABILITY: one catalog transaction forgets the volume, its snapshots and every layer that nothing else needs; only then
//! are the files removed. A crash in between leaves files that no catalog entry names.

use std::collections::BTreeSet;

use crate::catalog::{CatalogState, Change};
use crate::error::{Error, Result};
use crate::mapfile::layer_dir;
use crate::store::Store;
use crate::units::LayerId;

impl Store {
    /// Deletes a volume with its snapshots. Layers that clones need stay, unnamed.
    ///
    /// # Errors
    /// `NotFound`; `Busy` while it is attached or open.
    pub fn delete_volume(&self, name: &str) -> Result<()> {
        let _command = self.command();
        let attached = self
            .inner()
            .catalog
            .state()
            .volume(name)?
            .attachment
            .is_some();
        let in_use = || Error::Busy {
            what: format!(
                "volume {name:?} is attached; detach it first (stratablk volume detach {name})"
            ),
        };
        if attached {
            return Err(in_use());
        }
        let removed = {
            let _write_back = self.write_back.hold();
            let mut inner = self.inner();
            let open = inner.open.get(name);
            if open.is_some_and(|volume| std::sync::Arc::strong_count(volume) > 1) {
                return Err(in_use());
            }
            let state = inner.catalog.state();
            let mut changes: Vec<Change> = state
                .snapshots
                .iter()
                .filter(|row| row.volume == name)
                .map(|row| Change::RemoveSnapshot {
                    volume: name.to_owned(),
                    name: row.name.clone(),
                })
                .collect();
            changes.push(Change::RemoveVolume(name.to_owned()));
            let removed = unneeded_without(state, name);
            changes.extend(removed.iter().map(|id| Change::RemoveLayer(*id)));
            // If this fails the volume is as it was, open and with all that waits to be written back.
            inner.catalog.commit(&changes)?;
            // A volume that is open without being attached is closed; its content goes, so it needs no flush.
            inner.open.remove(name);
            inner.forget_unused_layers();
            for id in &removed {
                inner.unsettled.remove(id);
            }
            removed
        };
        for id in removed {
            self.cache.forget(id);
            // Gone from the catalog: what cannot be removed now is reported by `stratablk check`.
            if let Err(error) = self.media.remove_dir_all(&layer_dir(id)) {
                self.maintenance.note(format!(
                    "layer {id}: its files could not be removed: {error}"
                ));
            }
        }
        Ok(())
    }
}

/// The layers that nothing needs once a volume and its snapshots are gone, children before parents.
fn unneeded_without(state: &CatalogState, volume: &str) -> Vec<LayerId> {
    let actives = state
        .volumes
        .values()
        .filter(|row| row.name != volume)
        .map(|row| row.active);
    let snapshots = state
        .snapshots
        .iter()
        .filter(|row| row.volume != volume)
        .map(|row| row.layer);
    let mut needed = BTreeSet::new();
    for top in actives.chain(snapshots) {
        // From the top downwards: below a layer that is known to be needed everything is.
        for layer in state.chain_of(top).iter().rev() {
            if !needed.insert(layer.id) {
                break;
            }
        }
    }
    let mine = state.volumes.get(volume).map(|row| row.active).into_iter();
    let mine = mine.chain(
        state
            .snapshots
            .iter()
            .filter(|row| row.volume == volume)
            .map(|row| row.layer),
    );
    let mut unneeded = Vec::new();
    let mut seen = BTreeSet::new();
    for top in mine {
        for layer in state.chain_of(top).iter().rev() {
            if needed.contains(&layer.id) {
                break;
            }
            if seen.insert(layer.id) {
                unneeded.push(layer.id);
            }
        }
    }
    unneeded
}
