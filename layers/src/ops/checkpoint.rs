//! A new checkpoint for an active layer whose journal has grown long.
//!
//! DURABILITY: the checkpoint says what the map's file said before, and nothing else. The map in memory would not do: it speaks
//! of data that is in no file yet. It is written while flushes go on; they wait only until it has taken the map's place, with
//! what they appended meanwhile. Reads and writes do not.

use crate::error::{Error, Result};
use crate::layer::Layer;
use crate::map::{MapRecord, SectorSet};
use crate::mapfile::{MapFile, MapHeader, Mark, ReplaceError, Successor};
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
        let chain = volume.newest_chain();
        let Some(layer) = chain.active().filter(|layer| !layer.is_sealed()) else {
            return Ok(());
        };
        let mark = self.led(volume, || mark(layer))?;
        let next = Successor::write(&self.media, &layer.header(), mark)?;
        let why = "a checkpoint failed";
        self.led(volume, || {
            self.put_in_force(volume, layer, next, std::iter::empty(), why)
        })
    }

    /// Does something while nobody else writes to the files of the active layer of a volume or appends to its map, and all that
    /// was written before is in them.
    pub(crate) fn led<T>(&self, volume: &Volume, act: impl FnOnce() -> Result<T>) -> Result<T> {
        volume.lead_blocking();
        volume.end_lead(act)
    }

    /// Gives an active layer the map that was written for it, with what was appended to the one in force since and then
    /// `more`, by a caller who leads the flushes of its volume and holds the command lock. As `replace_map` otherwise.
    pub(crate) fn put_in_force(
        &self,
        volume: &Volume,
        layer: &Layer,
        next: Successor,
        more: impl Iterator<Item = MapRecord>,
        why: &str,
    ) -> Result<()> {
        let mut journal = layer.journal();
        let Some(old) = journal.as_ref() else {
            return Err(no_journal(layer));
        };
        let taken = next.take_over(old, more);
        let taken = taken.map(|map| *journal = Some(map));
        drop(journal);
        taken.map_err(|failure| in_doubt(volume, failure, why))
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
        let file = MapFile::succeed(&self.media, header, incarnation, set)
            .map_err(|failure| in_doubt(volume, failure, why))?;
        *layer.journal() = Some(file);
        Ok(())
    }
}

/// Up to where the map of an active layer is copied, by a caller who leads the flushes of its volume.
pub(crate) fn mark(layer: &Layer) -> Result<Mark> {
    let journal = layer.journal();
    let map = journal.as_ref().ok_or_else(|| no_journal(layer))?;
    Ok(map.mark())
}

/// A layer that takes no records.
fn no_journal(layer: &Layer) -> Error {
    Error::Busy {
        what: format!("layer {} takes no writes now", layer.id()),
    }
}

/// Where nobody can say which of two maps is in force, the volume has failed.
fn in_doubt(volume: &Volume, failure: ReplaceError, why: &str) -> Error {
    if !failure.old_in_force {
        volume.fail(&format!("{why}: {}", failure.error));
    }
    failure.error
}
