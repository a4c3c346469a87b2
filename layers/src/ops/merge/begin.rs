//! The beginning of a merge in place: the layer that takes writes is sealed without a name, and the new one over it gets the
//! file of the lowest as its own.
//!
//! DURABILITY, in this order:
//! 1. the new layer's data is another name of the source's file; its map is empty; both and their directory are synced;
//! 2. one catalog transaction adds the layer, makes it active, marks the old one as sealing and lets the job go to the new one:
//!    from here on the job cannot be undone, since the source's file is written to;
//! 3. as for a snapshot, from its instant on.
//!
//! A crash before 2 leaves a directory with an empty map, which is removed; the source keeps its own name of the file.

use std::sync::Arc;

use crate::catalog::{Change, JobRow, LayerRow, LayerState, VolumeRow};
use crate::error::Result;
use crate::layer::Layer;
use crate::mapfile::data_path;
use crate::store::Store;

use super::{Patience, Step};
use crate::ops::create::Made;
use crate::units::{Generation, LayerId};

/// The beginning of a job that moves data in place.
#[derive(Debug)]
pub(super) enum Begin {
    /// It has not begun.
    New {
        /// The layer that takes writes.
        target: LayerRow,
        /// The layer below, whose file the new one gets.
        source: LayerRow,
    },
    /// The layer between is being sealed. Nothing is held meanwhile: a command that needs the volume for itself may come.
    Sealing {
        /// The layer.
        layer: LayerId,
        /// The first generation whose requests do not write to it.
        generation: Generation,
    },
}

impl Begin {
    /// It has not begun.
    pub(super) fn new(target: LayerRow, source: LayerRow) -> Self {
        Self::New { target, source }
    }
}

impl Store {
    /// One turn of the beginning.
    pub(super) fn begin_turn(
        &self,
        row: &JobRow,
        begin: &mut Begin,
        patience: Patience,
    ) -> Result<Step> {
        match begin {
            Begin::New { target, source } => {
                let layer = target.id;
                let Some(generation) = self.begin_in_place(row, target, source)? else {
                    return Ok(Step::Again);
                };
                *begin = Begin::Sealing { layer, generation };
                Ok(Step::Moved(0))
            }
            Begin::Sealing { layer, generation } => {
                if !self.clock.quiescent(*generation) {
                    return Ok(Step::Waits);
                }
                let _command = self.command();
                let Some(volume) = self.volumes_over(*layer).into_iter().next() else {
                    return Ok(Step::Again);
                };
                let mut pending = self.pending_unnamed(volume, *generation, *layer);
                if patience == Patience::Wait {
                    self.sync_snapshot_blocking(&mut pending);
                } else if !self.sync_snapshot(&mut pending) {
                    return Ok(Step::Waits);
                }
                self.finish_snapshot(pending)?;
                Ok(Step::Again)
            }
        }
    }

    /// Steps 1 to 3. Returns the first generation that writes to the new layer; `None` if nothing was done.
    fn begin_in_place(
        &self,
        row: &JobRow,
        target: &LayerRow,
        source: &LayerRow,
    ) -> Result<Option<Generation>> {
        let _command = self.command();
        if !self.is_as_it_was(row, &[target.id, source.id], LayerState::Active) {
            return Ok(None);
        }
        let volume = {
            let inner = self.inner();
            let mut volumes = inner.catalog.state().volumes.values();
            let volume = volumes.find(|volume| volume.active == target.id);
            volume.cloned()
        };
        let Some(of) = volume else {
            return Ok(None);
        };
        let volume = self.open_volume_in_command(&of.name)?;
        volume.check_failure()?;
        volume.newest_chain().next_slot()?;
        let mut made = Made::default();
        let committed = self.commit_in_place(row, target, source, &of, &mut made);
        match committed {
            Ok(active) => Ok(Some(self.begin_unnamed(&volume, active)?)),
            Err(error) => {
                self.unmake(&made);
                Err(error)
            }
        }
    }

    /// Steps 1 and 2.
    fn commit_in_place(
        &self,
        job: &JobRow,
        target: &LayerRow,
        source: &LayerRow,
        volume: &VolumeRow,
        made: &mut Made,
    ) -> Result<Arc<Layer>> {
        let file = data_path(source.id);
        let (active, row) = self.make_linked_layer(volume, target.id, target.size, &file, made)?;
        self.inner().catalog.commit(&[
            Change::AddLayer(row),
            Change::SetLayerState {
                layer: target.id,
                state: LayerState::Sealing,
            },
            Change::SetActive {
                volume: volume.name.clone(),
                layer: active.id(),
            },
            Change::MoveJob {
                id: job.id,
                source: source.id,
                target: active.id(),
            },
        ])?;
        Ok(active)
    }

    /// Goes on with a layer that could not be sealed, or was not yet. `None` if a snapshot is at it.
    pub(super) fn seal_again(&self, layer: &LayerRow) -> Result<Option<Begin>> {
        if self.volumes_over(layer.id).is_empty() {
            self.try_finish_sealing(layer)?;
            return Ok(None);
        }
        Ok(Some(Begin::Sealing {
            layer: layer.id,
            generation: self.clock.advance(),
        }))
    }
}
