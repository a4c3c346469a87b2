//! Which layer answers for which sectors of a range.
//!
//! The resolve table answers for whole clusters in one load. Only where the newest layer holds part of a cluster are
//! older maps asked, newest first; that is rare and the only work that grows with the depth of a chain.

use crate::chain::Chain;
use crate::map::Table;
use crate::units::{CLUSTER_SECTORS, Cluster, LayerSlot, Sector, SectorMask, SectorRange};

/// Where the content of a run of sectors comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// They read as zeroes.
    Zero,
    /// They lie in the data file of the layer in this slot, at their own offset.
    Layer(LayerSlot),
}

/// A run of sectors with one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Where the content comes from.
    pub source: Source,
    /// Which sectors.
    pub range: SectorRange,
}

/// The table names a layer that is newer than the chain; the caller takes the newest chain and asks again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewerLayer;

/// Replaces the content of `parts` by the parts of `range`, in order, neighbours with one source joined.
///
/// Total: every sector of the range gets a source. Sees each cluster as it is or as a concurrent write makes it.
///
/// # Errors
/// `NewerLayer` if another worker published a layer that `chain` does not know; `parts` is then meaningless.
pub fn resolve(
    table: &Table,
    chain: &Chain,
    range: SectorRange,
    parts: &mut Vec<Part>,
) -> Result<(), NewerLayer> {
    parts.clear();
    if range.count == 0 {
        return Ok(());
    }
    let first = range.start.cluster();
    let last = Sector(range.end().0 - 1).cluster();
    for run in table.runs(first, last.0 - first.0 + 1) {
        let word = run.resolve;
        if word.slot > chain.active_slot() {
            return Err(NewerLayer);
        }
        let from = run.first.first_sector().0.max(range.start.0);
        let to = ((run.first.0 + run.count) * CLUSTER_SECTORS).min(range.end().0);
        if word.slot == LayerSlot::NONE || word.mask == SectorMask::NONE {
            push(parts, Source::Zero, from, to);
        } else if word.mask == SectorMask::ALL {
            push(parts, Source::Layer(word.slot), from, to);
        } else {
            for sector in from..to {
                let source = resolve_sector(chain, word.slot, word.mask, Sector(sector));
                push(parts, source, sector, sector + 1);
            }
        }
    }
    Ok(())
}

/// The source of one sector of a cluster whose newest layer, in `slot`, holds the sectors of `mask`.
fn resolve_sector(chain: &Chain, slot: LayerSlot, mask: SectorMask, sector: Sector) -> Source {
    let bit = SectorMask::span(sector.index_in_cluster(), 1);
    if mask.contains(bit) {
        return Source::Layer(slot);
    }
    older(chain, slot, sector.cluster(), bit)
}

/// Asks the maps from `slot` downwards, that layer's own first: it may say that the rest of the cluster is zero.
#[cold]
fn older(chain: &Chain, slot: LayerSlot, cluster: Cluster, bit: SectorMask) -> Source {
    for below in (1..=slot.0).rev().map(LayerSlot) {
        if let Some(layer) = chain.layer(below) {
            let (data, zero) = layer.cluster(cluster);
            if data.contains(bit) {
                return Source::Layer(below);
            }
            if zero.contains(bit) {
                return Source::Zero;
            }
        }
    }
    Source::Zero
}

/// Appends a run, joined with the last one where both have one source.
fn push(parts: &mut Vec<Part>, source: Source, from: u64, to: u64) {
    match parts.last_mut() {
        Some(last) if last.source == source && last.range.end().0 == from => {
            last.range.count += to - from;
        }
        _ => parts.push(Part {
            source,
            range: SectorRange {
                start: Sector(from),
                count: to - from,
            },
        }),
    }
}
