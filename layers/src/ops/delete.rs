//! Deleting a volume with its snapshots.
//!
//! DURABILITY: one catalog transaction forgets the volume, its snapshots and every layer that nothing else needs; only then
//! are the files removed (`doomed.rs`), at the next start if not now.

use crate::catalog::Change;
use crate::error::{Error, Result};
use crate::store::Store;

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
        {
            let _write_back = self.write_back.hold();
            let mut inner = self.inner();
            let open = inner.open.get(name);
            if open.is_some_and(|volume| std::sync::Arc::strong_count(volume) > 1) {
                return Err(in_use());
            }
            let state = inner.catalog.state();
            let snapshots = state.snapshots_of(name).into_iter();
            let mut changes: Vec<Change> = snapshots
                .map(|row| Change::RemoveSnapshot {
                    volume: name.to_owned(),
                    name: row.name.clone(),
                })
                .collect();
            changes.push(Change::RemoveVolume(name.to_owned()));
            let removed = state.needed_only_by(name);
            changes.extend(removed.iter().map(|id| Change::RemoveLayer(*id)));
            // If this fails the volume is as it was, open and with all that waits to be written back.
            inner.catalog.commit(&changes)?;
            // A volume that is open without being attached is closed; its content goes, so it needs no flush.
            inner.open.remove(name);
            inner.forget_unused_layers();
            for id in &removed {
                inner.unsettled.remove(id);
            }
        }
        self.remove_doomed();
        Ok(())
    }
}
