//! What it would cost to join two layers, counted in their maps.

use crate::catalog::{LayerRow, LayerState, Way};
use crate::error::{Error, Result};
use crate::layer::LayerMap;
use crate::lifecycle::WayCost;
use crate::map::SectorSet;
use crate::mapfile::{MapFile, RawBase, map_path};
use crate::store::Store;
use crate::units::{CLUSTER_BYTES, CLUSTER_SECTORS, LayerId, SECTOR_BYTES, Sector};

use crate::ops::jobs::info::STEP_BYTES;

impl Store {
    /// What it costs to join two layers, each way that there is; one of them is chosen.
    pub(crate) fn way_costs(&self, lower: LayerId, upper: LayerId) -> Result<Vec<WayCost>> {
        let rows = {
            let inner = self.inner();
            let layers = &inner.catalog.state().layers;
            (layers.get(&lower).cloned(), layers.get(&upper).cloned())
        };
        let (Some(lower_row), Some(upper_row)) = rows else {
            return Err(Error::NotFound {
                kind: "layer",
                name: format!("{lower} or {upper}"),
            });
        };
        let (lower_set, upper_set) = (self.set_of(&lower_row)?, self.set_of(&upper_row)?);
        let mut ways = vec![(Way::Up, lower_set.under(&upper_set).data_sectors())];
        // The file of the lower one is the upper one's at the end.
        if lower_row.size == upper_row.size && lower_row.base.is_none() {
            let way = match upper_row.state {
                LayerState::Active => Way::InPlace,
                LayerState::Sealing | LayerState::Sealed => Way::Down,
            };
            ways.push((way, upper_set.data_sectors()));
        }
        let cheapest = ways.iter().min_by_key(|(_, sectors)| *sectors);
        let chosen = cheapest.map(|(way, _)| *way);
        let maps = self.map_bytes(lower).saturating_add(self.map_bytes(upper));
        let board = self.jobs.board();
        let cost = |(way, sectors): (Way, u64)| {
            let bytes = sectors.saturating_mul(SECTOR_BYTES);
            WayCost {
                way,
                bytes,
                space: bytes.min(STEP_BYTES).saturating_add(maps),
                estimate: board.estimate(bytes),
                chosen: chosen == Some(way),
            }
        };
        Ok(ways.into_iter().map(cost).collect())
    }

    /// Bytes of a layer's data that have a place in the base below it.
    pub(crate) fn within_base(&self, layer: LayerId, base: LayerId) -> Result<u64> {
        let (row, file) = {
            let inner = self.inner();
            let layers = &inner.catalog.state().layers;
            let row = layers.get(&layer).cloned();
            (row, layers.get(&base).and_then(|row| row.base.clone()))
        };
        let (Some(row), Some(file)) = (row, file) else {
            return Err(Error::NotFound {
                kind: "layer",
                name: format!("{layer} or {base}"),
            });
        };
        let end = end_within(&file, row.size);
        Ok(data_before(&self.set_of(&row)?, end).saturating_mul(SECTOR_BYTES))
    }

    /// What a layer holds now.
    fn set_of(&self, row: &LayerRow) -> Result<SectorSet> {
        let known = {
            let inner = self.inner();
            inner.layers.get(&row.id).and_then(std::sync::Weak::upgrade)
        };
        match known {
            Some(layer) => Ok(match &**layer.map() {
                LayerMap::Active(map) => map.to_set(),
                LayerMap::Sealed(set) => set.clone(),
            }),
            None => Ok(MapFile::read(&self.media, row.id)?.set),
        }
    }

    /// Bytes of a layer's map file; 0 where that cannot be told.
    fn map_bytes(&self, layer: LayerId) -> u64 {
        self.media
            .stat(&map_path(layer))
            .map_or(0, |stat| stat.allocated)
    }
}

/// Up to where a disk of this size fits into the base below it. A base never gets longer: what lies beyond its last whole
/// cluster stays where it is.
pub(super) fn end_within(base: &RawBase, size: Sector) -> Sector {
    if base.len / SECTOR_BYTES < size.0 {
        Sector(base.len / CLUSTER_BYTES * CLUSTER_SECTORS)
    } else {
        size
    }
}

/// Sectors with data before this one.
pub(super) fn data_before(set: &SectorSet, end: Sector) -> u64 {
    let runs = set.data_runs();
    runs.map(|run| run.end().0.min(end.0).saturating_sub(run.start.0))
        .sum()
}
