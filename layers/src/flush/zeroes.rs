//! Zeroing whole clusters: what a write-zeroes or a discard waits for, done by who leads the flushes.
//!
//! A zeroed cluster has no frame that could outlive the process, so its record must be in the journal (written, not synced)
//! before the request is acknowledged; and as long as the record is not there, the frames may be all that is left of
//! writes that were acknowledged. So nothing happens before the request's turn to be led has come, and then, with nobody else
//! writing to the layer's files:
//!
//! 1. the records are written;
//! 2. the map says zero, and frames are trimmed to what it says, each under its lock;
//! 3. the space is given back, of clusters that are still zero then: what is written meanwhile gets into the file later.
//!
//! CRASH: before 1 all is as it was. Between 1 and 2 dirty frames are taken over and win over the record, clean ones do not:
//! each sector is what was acknowledged, or zero. After 2 map, journal and frames agree. At all times a clean frame holds
//! what the file holds or what the map does not ask for.

use std::io;
use std::sync::Arc;

use crate::cache::Cache;
use crate::canary::{self, Canary};
use crate::chain::Chain;
use crate::file::FileToken;
use crate::layer::{Layer, LayerMap};
use crate::map::{ClusterState, MapRecord, RecordKind, Table};
use crate::units::{
    CLUSTER_BYTES, CLUSTER_SECTORS, Cluster, LayerSlot, Sector, SectorMask, SectorRange,
};

use super::journal_unsynced;

/// Whole clusters that a request zeroes.
#[derive(Clone, Debug)]
pub struct ZeroRange {
    /// In this layer, whose generation the request keeps from ending.
    pub layer: Arc<Layer>,
    /// The layer's slot.
    pub slot: LayerSlot,
    /// The first cluster.
    pub first: Cluster,
    /// How many.
    pub count: u64,
    /// Where what is to be zeroed ends: within the last cluster, if the disk ends there.
    pub end: Sector,
    /// Whether their space is given back.
    pub unmap: bool,
}

impl ZeroRange {
    /// Leaves the last cluster out if the disk does not end any more where the range does. Returns what is left of it to be
    /// zeroed by itself.
    pub fn cut_to(&mut self, capacity: Sector) -> Option<SectorRange> {
        let last = Cluster((self.first.0 + self.count).checked_sub(1)?).first_sector();
        let whole = self.count == 0 || self.end.0 >= last.0 + CLUSTER_SECTORS;
        if whole || capacity <= self.end {
            return None;
        }
        self.count -= 1;
        SectorRange::new(last, self.end.0.checked_sub(last.0)?)
    }
}

/// Clusters that held data until they were zeroed.
#[derive(Debug)]
pub struct Freed {
    /// Of this layer.
    layer: Arc<Layer>,
    /// The first.
    first: Cluster,
    /// How many.
    count: u64,
}

/// Runs of clusters: first and how many.
type Runs = Vec<(Cluster, u64)>;

/// Steps 1 and 2, for who leads. Returns what step 3 is about.
///
/// # Errors
/// The host's answer; to be latched.
pub fn carry_out(
    cache: &Cache,
    table: &Table,
    chain: &Chain,
    ranges: &[ZeroRange],
) -> io::Result<Vec<Freed>> {
    let todo: Vec<Runs> = ranges
        .iter()
        .map(|range| not_yet_zero(table, chain, range))
        .collect();
    if !canary::is_set(Canary::ZeroesWithoutRecord) {
        let mut left: Vec<(&Arc<Layer>, Runs)> = Vec::new();
        for (range, runs) in ranges.iter().zip(&todo) {
            match left
                .iter_mut()
                .find(|(layer, _)| Arc::ptr_eq(layer, &range.layer))
            {
                Some((_, all)) => all.extend(runs),
                None => left.push((&range.layer, runs.clone())),
            }
        }
        for (layer, runs) in left {
            record(layer, runs)?;
        }
    }
    let mut freed = Vec::new();
    for (range, runs) in ranges.iter().zip(todo) {
        publish(cache, table, range, &runs, &mut freed);
    }
    Ok(freed)
}

/// The clusters of a range that do not read as zeroes already, or only because of what this layer says and its journal does
/// not. Those that no layer says anything about, or that a sealed layer says are zero, do. The masks of unsealed layers are
/// not believed here: see `resolve`.
fn not_yet_zero(table: &Table, chain: &Chain, range: &ZeroRange) -> Runs {
    let map = range.layer.map();
    let LayerMap::Active(map) = &**map else {
        return Vec::new();
    };
    let mut runs = Vec::new();
    for run in table.runs(range.first, range.count) {
        let word = run.resolve;
        let reads_zero = word.slot == LayerSlot::NONE
            || (chain.was_sealed(word.slot) && word.mask == SectorMask::NONE);
        if !reads_zero {
            runs.extend(map.not_recorded_zero(run.first, run.count));
        }
    }
    runs
}

/// Step 1, for one layer.
fn record(layer: &Layer, mut runs: Runs) -> io::Result<()> {
    runs.sort_unstable_by_key(|(first, _)| *first);
    let mut records: Vec<MapRecord> = Vec::new();
    for (first, count) in runs {
        let start = first.first_sector();
        let sectors = count * CLUSTER_SECTORS;
        match records.last_mut() {
            // Requests may overlap.
            Some(last) if start <= last.range.end() => {
                let end = last.range.end().0.max(start.0 + sectors);
                last.range.count = end - last.range.start.0;
            }
            _ => records.push(MapRecord {
                kind: RecordKind::Zero,
                range: SectorRange {
                    start,
                    count: sectors,
                },
            }),
        }
    }
    journal_unsynced(layer, &records)
}

/// Step 2, for one range.
fn publish(cache: &Cache, table: &Table, range: &ZeroRange, runs: &Runs, freed: &mut Vec<Freed>) {
    let map = range.layer.map();
    let LayerMap::Active(map) = &**map else {
        return;
    };
    let number = range.layer.number();
    for (first, count) in runs {
        // First the map, then the frames: a write that comes in between has both as it wants them, since it changes the map
        // under its frame's lock, and the trim asks the map under the same lock.
        let changed = map.zero_and(*first, *count, |first, count| {
            cache.trim(number, first, count, |cluster| map.get(cluster).data);
            if range.unmap {
                freed.push(Freed {
                    layer: Arc::clone(&range.layer),
                    first,
                    count,
                });
            }
        });
        table.refresh(range.slot, map, *first, *count, changed);
        // The journal has them already. `None`: one was written meanwhile, and the next flush says it once more.
        drop(map.zero_records(*first, *count));
    }
}

impl Freed {
    /// What to give back in step 3: the file, and runs of bytes (offset, length).
    pub fn dead_bytes(&self) -> (FileToken, Vec<(u64, u64)>) {
        let map = self.layer.map();
        let runs = match &**map {
            LayerMap::Active(map) => {
                let runs = map.runs(self.first, self.count);
                let dead = runs.filter(|(_, _, state)| *state == ClusterState::ZERO);
                dead.map(|(first, count, _)| (first.0 * CLUSTER_BYTES, count * CLUSTER_BYTES))
                    .collect()
            }
            // Sealed since: it changes no more.
            LayerMap::Sealed(_) => Vec::new(),
        };
        (self.layer.data().token(), runs)
    }
}
