//! Which sectors may differ between two points in the life of disks.
//!
//! Only the maps of layers are asked: what lies above the newest layer that both points have in common decides. Nobody is kept
//! from writing meanwhile, but for the flush of what is asked for as it is now.

mod ranges;
#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]
mod tests;

use std::collections::HashSet;
use std::sync::Weak;

use crate::catalog::{CatalogState, LayerRow};
use crate::error::Result;
use crate::layer::LayerMap;
use crate::lifecycle::{DiffRange, Point};
use crate::map::SectorSet;
use crate::mapfile::MapFile;
use crate::store::Store;
use crate::units::{LayerId, Sector};

use ranges::Ranges;

impl Store {
    /// The runs of sectors that layers say differ from `from` to `to`, in order, each as long as possible. What no layer
    /// between them touched is not among them; what was written with the same content is. Where they have no layer in
    /// common, it is all that either holds. Where the disks differ in size, the rest of the larger one is among them.
    ///
    /// # Errors
    /// `NotFound`; `Failed` if what was written could not be flushed; `Corrupt`, `Unsupported`, `Io`.
    pub fn diff(&self, from: &Point, to: &Point) -> Result<Vec<DiffRange>> {
        // Neither layers nor their maps are merged meanwhile.
        let _command = self.command();
        for point in [from, to] {
            self.flush_point(point)?;
        }
        let state = self.inner().catalog.share();
        let ((from, from_size), (to, to_size)) = (place(&state, from)?, place(&state, to)?);
        let (from, to) = (state.chain(from), state.chain(to));
        let below_from: HashSet<LayerId> = from.iter().map(|row| row.id).collect();
        let above = to.iter().take_while(|row| !below_from.contains(&row.id));
        let (to_side, common) = to.split_at(above.count());
        let newest_common = common.first().map(|row| row.id);
        let from_side = from.iter().take_while(|row| Some(row.id) != newest_common);

        let mut ranges = Ranges::default();
        for row in to_side {
            self.with_set(row, |set| ranges.above_to(set))?;
        }
        for row in from_side {
            self.with_set(row, |set| ranges.above_from(set))?;
        }
        ranges.sized(from_size, to_size);
        for row in common {
            if ranges.is_resolved() {
                break;
            }
            self.with_set(row, |set| ranges.below_both(set))?;
        }
        Ok(ranges.into_ranges())
    }

    /// Makes the maps say all that was written at a point that still moves.
    fn flush_point(&self, point: &Point) -> Result<()> {
        let row = self.volume_row(&point.volume)?;
        match &point.snapshot {
            None => self.flush_idle(&row),
            Some(_) => Ok(()),
        }
    }

    /// Shows what a layer holds: of one in use what it holds at this moment, else what its files say.
    fn with_set(&self, row: &LayerRow, show: impl FnOnce(&SectorSet)) -> Result<()> {
        let open = self.inner().layers.get(&row.id).and_then(Weak::upgrade);
        match open {
            None => show(&MapFile::read(&self.media, row.id)?.set),
            Some(layer) => match &*layer.map_full() {
                LayerMap::Active(map) => show(&map.to_set()),
                LayerMap::Sealed(set) => show(set),
            },
        }
        Ok(())
    }
}

/// The layer that a point is the content of, and the size of its disk.
fn place(state: &CatalogState, point: &Point) -> Result<(LayerId, Sector)> {
    let Some(name) = &point.snapshot else {
        let volume = state.volume(&point.volume)?;
        return Ok((volume.active, volume.size));
    };
    let row = state.snapshot_of(&point.volume, name)?;
    Ok((row.layer, row.size))
}
