//! What a map's journal says: absolute statements about runs of sectors.

use crate::map::active::ClusterState;
use crate::units::{CLUSTER_SECTORS, Cluster, Sector, SectorMask, SectorRange};

/// What a layer says about a run of sectors. What it says nothing about is its parent's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RecordKind {
    /// The layer's file holds their data.
    Data,
    /// They read as zeroes, whatever the layer's file or its parent holds.
    Zero,
}

/// One statement about a run of sectors. It holds whatever was said before, so that records may be applied again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MapRecord {
    /// What is said.
    pub kind: RecordKind,
    /// About which sectors; never empty in what this package writes.
    pub range: SectorRange,
}

/// A run of clusters of which the same sectors are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ClusterPart {
    /// The first cluster.
    pub(crate) first: Cluster,
    /// How many clusters; never 0.
    pub(crate) count: u64,
    /// Which sectors of each; never none. Less than all only if `count` is 1.
    pub(crate) mask: SectorMask,
}

/// Cuts a run of sectors where clusters begin: at most a part of one cluster, whole clusters, and a part of one cluster.
pub(crate) fn cluster_parts(range: SectorRange) -> impl Iterator<Item = ClusterPart> {
    let mut at = range.start;
    // Ranges are made by `SectorRange::new`, or end within 64 bits by the limit of a disk's size.
    let mut left = range.count;
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let first = at.cluster();
        let index = at.index_in_cluster();
        let (count, mask, sectors) = if index == 0 && left >= CLUSTER_SECTORS {
            let count = left / CLUSTER_SECTORS;
            (count, SectorMask::ALL, count * CLUSTER_SECTORS)
        } else {
            let sectors = left.min(CLUSTER_SECTORS - u64::from(index));
            let span = u32::try_from(sectors).unwrap_or(0);
            (1, SectorMask::span(index, span), sectors)
        };
        at = Sector(at.0 + sectors);
        left -= sectors;
        Some(ClusterPart { first, count, mask })
    })
}

/// Turns the states of clusters, in order, into as few records as will say it, and hands each on when it is complete.
///
/// The records come in the order of their sectors and never overlap, so that every prefix of them is true as well: a
/// cluster with some sectors of data and the rest zero yields Zero for the rest only, never Zero for all of it first.
pub(crate) struct Coalesce<F: FnMut(MapRecord)> {
    /// The record that may still grow.
    last: Option<MapRecord>,
    /// Takes complete records.
    sink: F,
}

impl<F: FnMut(MapRecord)> Coalesce<F> {
    /// Hands complete records to `sink`.
    pub(crate) const fn new(sink: F) -> Self {
        Self { last: None, sink }
    }

    /// Adds a run of clusters of the same state, not before the last one.
    pub(crate) fn clusters(&mut self, first: Cluster, count: u64, state: ClusterState) {
        let start = first.first_sector().0;
        if state.data == SectorMask::ALL {
            self.sectors(RecordKind::Data, start, count * CLUSTER_SECTORS);
        } else if state.data == SectorMask::NONE {
            if state.rest_zero {
                self.sectors(RecordKind::Zero, start, count * CLUSTER_SECTORS);
            }
        } else {
            for cluster in 0..count {
                for index in 0..CLUSTER_SECTORS {
                    let sector = start + cluster * CLUSTER_SECTORS + index;
                    if state.data.0 >> index & 1 == 1 {
                        self.sectors(RecordKind::Data, sector, 1);
                    } else if state.rest_zero {
                        self.sectors(RecordKind::Zero, sector, 1);
                    }
                }
            }
        }
    }

    /// Adds a run of sectors to the last record, or begins a new one.
    fn sectors(&mut self, kind: RecordKind, start: u64, count: u64) {
        if let Some(last) = &mut self.last {
            if last.kind == kind && last.range.end().0 == start {
                last.range.count += count;
                return;
            }
            (self.sink)(*last);
        }
        let range = SectorRange {
            start: Sector(start),
            count,
        };
        self.last = Some(MapRecord { kind, range });
    }

    /// Hands on the last record.
    pub(crate) fn finish(mut self) {
        if let Some(last) = self.last.take() {
            (self.sink)(last);
        }
    }
}
