//! A new checkpoint for an active layer whose journal has grown long.
//!
//! DURABILITY: the checkpoint says what the map's file said before, and nothing else. The map in memory would not do: it speaks
//! of data that is in no file yet. Flushes wait meanwhile; reads and writes do not.

use crate::error::Result;
use crate::layer::Layer;
use crate::map::SectorSet;
use crate::mapfile::{MapFile, MapHeader};
use crate::store::Store;
use crate::volume::Volume;

impl Store {
    /// Writes the checkpoints that volumes have asked for, and to the catalog which volumes have failed. Waits for something to
    /// do; returns `false` once the store is closed. The daemon calls it in a loop on a thread of its own.
    pub fn maintain(&self) -> bool {
        let Some(volumes) = self.maintenance.wait() else {
            return false;
        };
        // Not behind a command that may take long.
        self.record_failures();
        if volumes.is_empty() {
            return true;
        }
        let _command = self.command();
        for name in volumes {
            let volume = self.inner().open.get(&name).cloned();
            if let Some(Err(error)) = volume.map(|volume| self.checkpoint(&volume)) {
                self.maintenance
                    .note(format!("volume {name}: no checkpoint: {error}"));
            }
        }
        true
    }

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
        volume.lead_blocking();
        let result = volume
            .lead_flush()
            .and_then(|()| self.checkpoint_active(volume));
        volume.flushes().finish_blocking();
        result
    }

    /// Writes the checkpoint; the caller leads the flushes, so that nobody appends to the journal.
    pub(crate) fn checkpoint_active(&self, volume: &Volume) -> Result<()> {
        let chain = volume.newest_chain();
        let Some(layer) = chain.active().filter(|layer| !layer.is_sealed()) else {
            return Ok(());
        };
        let set = MapFile::read(&self.media, layer.id())?.set;
        self.replace_map(volume, layer, &layer.header(), &set, "a checkpoint failed")
    }

    /// Gives an active layer another map, by a caller who leads the flushes of its volume. Where nobody can say
    /// which of the two is in force, the volume has failed, and `why` begins the reason.
    pub(crate) fn replace_map(
        &self,
        volume: &Volume,
        layer: &Layer,
        header: &MapHeader,
        set: &SectorSet,
        why: &str,
    ) -> Result<()> {
        let incarnation = layer.journal().as_ref().map_or(0, MapFile::incarnation);
        match MapFile::succeed(&self.media, header, incarnation, set) {
            Ok(file) => {
                *layer.journal() = Some(file);
                Ok(())
            }
            Err(failure) => {
                if !failure.old_in_force {
                    volume.fail(&format!("{why}: {}", failure.error));
                }
                Err(failure.error)
            }
        }
    }
}
