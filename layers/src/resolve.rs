//! Which layer answers for which sectors of a range.
//!
//! The resolve table answers for whole clusters in one load. Only where the newest layer holds part of a cluster are
//! older maps asked, newest first; that is rare and the only work that grows with the depth of a chain.
//!
//! INVARIANT: the mask in a word is believed only for a layer that was sealed before the table was looked at (the chain
//! knows which). While writes to a cluster overlap, a slow refresh may put an older mask back for a moment, even after a
//! newer write was acknowledged; the slot never falls. So for a layer that takes writes, or did so until a moment
//! ago, the word says which layer, and the layer's own map says which sectors.

use std::ops::Range;

use crate::chain::Chain;
use crate::layer::LayerMap;
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

/// The table names a layer that the chain does not know; the caller takes the newest chain and asks again. The newest one,
/// taken after this answer, knows it: layers are published before words name them, and leave after the last such word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownLayer;

/// Replaces the content of `parts` by the parts of `range`, in order, neighbours with one source joined.
///
/// Total: every sector of the range gets a source. Sees each cluster as it is or as a concurrent write makes it.
///
/// # Errors
/// `UnknownLayer` if another worker published a layer that `chain` does not know; `parts` is then meaningless.
pub fn resolve(
    table: &Table,
    chain: &Chain,
    range: SectorRange,
    parts: &mut Vec<Part>,
) -> Result<(), UnknownLayer> {
    parts.clear();
    if range.count == 0 {
        return Ok(());
    }
    let first = range.start.cluster();
    let last = Sector(range.end().0 - 1).cluster();
    for run in table.runs(first, last.0 - first.0 + 1) {
        let word = run.resolve;
        if word.slot != LayerSlot::NONE && !chain.has(word.slot) {
            return Err(UnknownLayer);
        }
        let from = run.first.first_sector().0.max(range.start.0);
        let to = ((run.first.0 + run.count) * CLUSTER_SECTORS).min(range.end().0);
        if word.slot == LayerSlot::NONE {
            push(parts, Source::Zero, from, to);
        } else if !chain.was_sealed(word.slot) {
            resolve_unsealed(chain, word.slot, run.first, run.count, from..to, parts);
        } else if word.mask == SectorMask::NONE {
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

/// Appends the parts of the sectors `wanted`, which lie in `count` clusters from `first`, and of which the layer in `slot`
/// is the newest to say anything.
fn resolve_unsealed(
    chain: &Chain,
    slot: LayerSlot,
    first: Cluster,
    count: u64,
    wanted: Range<u64>,
    parts: &mut Vec<Part>,
) {
    let Some(layer) = chain.layer(slot) else {
        return push(parts, Source::Zero, wanted.start, wanted.end);
    };
    let map = layer.map();
    let LayerMap::Active(map) = &**map else {
        // Sealed since the chain was made.
        for sector in wanted {
            let source = resolve_sector(chain, slot, SectorMask::NONE, Sector(sector));
            push(parts, source, sector, sector + 1);
        }
        return;
    };
    for (first, count, state) in map.runs(first, count) {
        let from = first.first_sector().0.max(wanted.start);
        let to = ((first.0 + count) * CLUSTER_SECTORS).min(wanted.end);
        if state.data == SectorMask::ALL {
            push(parts, Source::Layer(slot), from, to);
        } else if state.data == SectorMask::NONE && state.rest_zero {
            push(parts, Source::Zero, from, to);
        } else {
            for sector in from..to {
                let source = resolve_sector(chain, slot, state.data, Sector(sector));
                push(parts, source, sector, sector + 1);
            }
        }
    }
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
///
/// A merge between two of these layers may change both maps meanwhile. Going downwards finds what is moved all the same: the
/// map that gains it says so first; a lower one loses it only when nobody can have passed the upper one's older map any more;
/// an upper one loses it before the clock is advanced, so that whoever may still find it there is waited for (see
/// `CONCURRENCY.md`, section 8).
#[cold]
fn older(chain: &Chain, slot: LayerSlot, cluster: Cluster, bit: SectorMask) -> Source {
    for (below, layer) in chain.downwards(slot) {
        let (data, zero) = layer.cluster(cluster);
        if data.contains(bit) {
            return Source::Layer(below);
        }
        if zero.contains(bit) {
            return Source::Zero;
        }
    }
    Source::Zero
}

/// The same as [`resolve`], by the maps of all layers, newest first, and without the table. The net under a word that names a
/// layer which has left its chain: no race of a reader with a removal comes to that (`QueueContext::read_again` says why), so
/// debug builds stop there, and where the layer leaves (`ops/merge/finish`).
#[cold]
pub fn resolve_by_maps(chain: &Chain, range: SectorRange, parts: &mut Vec<Part>) {
    parts.clear();
    for sector in range.start.0..range.end().0 {
        let at = Sector(sector);
        let bit = SectorMask::span(at.index_in_cluster(), 1);
        let source = older(chain, chain.active_slot(), at.cluster(), bit);
        push(parts, source, sector, sector + 1);
    }
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
