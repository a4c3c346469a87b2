//! The files of layers that are no longer in the catalog.
//!
//! DURABILITY: the transaction that takes a layer out of the catalog dooms it; then its directory is removed, at once or at
//! the next start; then the names of all layers are synced, so that it cannot come back; then the catalog forgets it.

use std::io;
use std::path::Path;

use crate::catalog::Change;
use crate::mapfile::{LAYERS_DIR, layer_dir};
use crate::store::Store;
use crate::units::LayerId;

impl Store {
    /// Removes the files of all doomed layers: for the start, and for commands right after their commit. What cannot be
    /// removed now is noted, and removed at the next start.
    pub(crate) fn remove_doomed(&self) {
        let doomed: Vec<LayerId> = {
            let inner = self.inner();
            let doomed = &inner.catalog.state().doomed;
            // Some may still be read: their turn comes when they are not.
            let board = self.jobs.board();
            let unused = |layer: &&LayerId| !board.retiring.contains(layer);
            doomed.iter().filter(unused).copied().collect()
        };
        if doomed.is_empty() {
            return;
        }
        let mut removed = Vec::with_capacity(doomed.len());
        for id in doomed {
            self.cache.forget(id);
            match self.media.remove_dir_all(&layer_dir(id)) {
                Ok(()) => removed.push(Change::Removed(id)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    removed.push(Change::Removed(id));
                }
                Err(error) => self.maintenance.note(format!(
                    "layer {id}: its files could not be removed, which is tried again at the next start: {error}"
                )),
            }
        }
        if removed.is_empty() {
            return;
        }
        let layers = Path::new(LAYERS_DIR);
        let forgotten = self
            .media
            .sync_dir(layers)
            .map_err(self.io("sync", layers))
            .and_then(|()| self.inner().catalog.commit(&removed));
        if let Err(error) = forgotten {
            self.maintenance.note(format!(
                "{} layers that were removed are looked for again at the next start: {error}",
                removed.len()
            ));
        }
    }
}
