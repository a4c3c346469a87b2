//! Writing past the cache: what is left for a write when all frames of a set hold data that can be written nowhere, because
//! the volumes that it belongs to have failed or their disks are full. Slow, but it ends.
//!
//! By who leads, since nobody else changes a layer's files: the data is written and synced, its record is written, and then
//! it is published and frames that others made of the cluster, before or meanwhile, are trimmed.
//!
//! CRASH: until they are, a clean frame may have what the file had before. A process that took it over would read that now and
//! the other later, from the file, though nobody has written in between. So a mark in the arena says while this lasts that
//! clean frames of the layer are not to be taken over.

use std::io;
use std::sync::Arc;

use crate::cache::Cache;
use crate::canary::{self, Canary};
use crate::error::Error;
use crate::layer::{Layer, LayerMap};
use crate::map::{MapRecord, RecordKind, Table};
use crate::units::{
    CLUSTER_SECTORS, Cluster, LayerSlot, SECTOR_BYTES, Sector, SectorMask, SectorRange,
};

use super::{journal_unsynced, never_full};

/// Where a write goes.
#[derive(Clone, Debug)]
pub struct Through {
    /// To this layer, whose generation the request keeps from ending.
    pub layer: Arc<Layer>,
    /// The layer's slot.
    pub slot: LayerSlot,
}

impl Through {
    /// Writes sectors. The bytes are as many.
    ///
    /// # Errors
    /// The host's answer: of a full disk (nothing is lost then), or to be latched.
    pub fn write(
        &self,
        cache: &Cache,
        table: &Table,
        range: SectorRange,
        bytes: &[u8],
    ) -> io::Result<()> {
        let map = self.layer.map();
        let LayerMap::Active(map) = &**map else {
            return Err(io::Error::other("a sealed layer takes no writes"));
        };
        if !canary::is_set(Canary::TrustPast) {
            let marked = cache.set_past(self.layer.number(), true);
            // Of a full disk too: the request waits then, and nothing was written.
            marked.map_err(host_answer)?;
        }
        self.layer.mark_unsynced();
        self.layer
            .data()
            .write_at(bytes, range.start.0 * SECTOR_BYTES)?;
        if self.layer.take_unsynced() {
            self.layer.sync_data().map_err(never_full)?;
        }
        let record = MapRecord {
            kind: RecordKind::Data,
            range,
        };
        // Without the record nobody asks the file for these sectors, or they hold a write that was never acknowledged.
        journal_unsynced(&self.layer, &[record])?;
        // Nobody else collects, so that whoever writes to these clusters at the same time may rely on marks that are made
        // a moment late.
        let changed = map.write(range);
        let (first, last) = (range.start.cluster(), Sector(range.end().0 - 1).cluster());
        for cluster in (first.0..=last.0).map(Cluster) {
            let mask = within(cluster, range);
            cache.trim(self.layer.number(), cluster, 1, |cluster| {
                SectorMask(map.get(cluster).data.0 & !mask.0)
            });
        }
        table.refresh(self.slot, map, first, last.0 - first.0 + 1, changed);
        // After an error it stays, and so it does where it cannot be taken away: that costs clean frames at the next start.
        let _ = cache.set_past(self.layer.number(), false);
        Ok(())
    }
}

/// The sectors of a cluster that lie in a range that touches it.
fn within(cluster: Cluster, range: SectorRange) -> SectorMask {
    let start = cluster.first_sector().0;
    let from = range.start.0.max(start) - start;
    let to = range.end().0.min(start + CLUSTER_SECTORS) - start;
    let narrow = |sector: u64| u32::try_from(sector).unwrap_or(0);
    SectorMask::span(narrow(from), narrow(to - from))
}

/// What the host has said.
fn host_answer(error: Error) -> io::Error {
    match error {
        Error::Io { source, .. } => source,
        other => io::Error::other(other),
    }
}
