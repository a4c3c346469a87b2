//! A new checkpoint for an active layer whose journal has grown long.
//!
//! DURABILITY: everything that the checkpoint says is durable before it takes the name of the map: the map is read first, the
//! data synced second, the checkpoint written third. Flushes wait meanwhile; reads and writes do not.

use crate::error::Result;
use crate::layer::LayerMap;
use crate::mapfile::{MapFile, data_path};
use crate::store::Store;
use crate::volume::Volume;

impl Store {
    /// Writes a checkpoint of the active layer of a volume, so that its journal starts anew. The daemon does it by itself
    /// when a journal has grown long.
    ///
    /// # Errors
    /// `NotFound`, `Failed`, `Io`.
    pub fn checkpoint_volume(&self, name: &str) -> Result<()> {
        let _command = self.command();
        let volume = self.open_volume_in_command(name)?;
        self.checkpoint(&volume)
    }

    /// As `checkpoint_volume`, for a caller who holds the command lock.
    pub(crate) fn checkpoint(&self, volume: &Volume) -> Result<()> {
        volume.flushes().lead_blocking();
        let result = volume
            .lead_flush()
            .and_then(|()| self.checkpoint_active(volume));
        volume.flushes().finish_blocking();
        result
    }

    /// Writes the checkpoint; the caller leads the flushes, so that nobody appends to the journal.
    fn checkpoint_active(&self, volume: &Volume) -> Result<()> {
        let chain = volume.newest_chain();
        let Some(layer) = chain.active() else {
            return Ok(());
        };
        let set = match &**layer.map() {
            LayerMap::Active(map) => map.to_set(),
            LayerMap::Sealed(_) => return Ok(()),
        };
        let path = data_path(layer.id());
        if let Err(error) = layer.sync_data().map_err(self.io("sync", &path)) {
            volume.fail(&format!("a checkpoint failed: {error}"));
            return Err(error);
        }
        let incarnation = layer.journal().as_ref().map_or(0, MapFile::incarnation);
        match MapFile::succeed(&self.media, layer.header(), incarnation, &set) {
            Ok(file) => {
                *layer.journal() = Some(file);
                Ok(())
            }
            Err(failure) => {
                if !failure.old_in_force {
                    volume.fail(&format!("a checkpoint failed: {}", failure.error));
                }
                Err(failure.error)
            }
        }
    }
}
