//! Looking at layers from the bottom of a disk to its end, in runs: what the sources of a job say together, and what its target
//! says already.

use std::sync::Arc;

use crate::layer::{Layer, LayerMap};
use crate::map::{ActiveMap, ClusterState, SectorSet, Table};
use crate::units::{CLUSTER_SECTORS, Cluster, LayerSlot, Sector, SectorMask};

/// Sectors of a cluster, as a length in memory.
const SECTORS: usize = 8;

const _: () = assert!(SECTORS as u64 == CLUSTER_SECTORS);

/// What the sources say about a run of clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// Nothing.
    Absent,
    /// They are zeroes.
    Zero,
    /// All sectors are data of this source.
    Whole(usize),
    /// Look at each cluster.
    Mixed,
}

/// What the sources say about one cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Composed {
    /// Data and zeroes.
    pub state: ClusterState,
    /// The source of each sector that is data.
    from: [u32; SECTORS],
}

impl Composed {
    /// A cluster without data.
    pub(super) const fn of(state: ClusterState) -> Self {
        Self {
            state,
            from: [0; SECTORS],
        }
    }

    /// The sectors that are data of a source.
    pub(super) fn data_of(&self, source: usize) -> SectorMask {
        let mut mask = 0;
        for (index, from) in self.from.iter().enumerate() {
            let bit = 1 << index;
            if self.state.data.0 & bit != 0 && usize::try_from(*from).ok() == Some(source) {
                mask |= bit;
            }
        }
        SectorMask(mask)
    }
}

/// Sealed layers that lie over each other, as one.
#[derive(Debug)]
pub(super) struct Sources {
    /// Oldest first.
    layers: Vec<Arc<Layer>>,
    /// The one in slot n is at n - 1.
    table: Table,
    /// What the oldest one is taken to hold, where that is more exact than what it says: a raw image has holes.
    bottom: Option<SectorSet>,
    /// The end of the disk that they are looked at for.
    size: Sector,
}

impl Sources {
    /// Looks at these layers, oldest first, as the lower part of a disk of this size.
    pub(super) fn new(size: Sector, layers: Vec<Arc<Layer>>) -> Self {
        Self::with_bottom(size, layers, None)
    }

    /// The same, where the oldest layer is taken to hold this: it has to be zeroes where this says so.
    pub(super) fn with_bottom(
        size: Sector,
        layers: Vec<Arc<Layer>>,
        bottom: Option<SectorSet>,
    ) -> Self {
        let table = Table::new(size.0.div_ceil(CLUSTER_SECTORS));
        for (slot, layer) in (1..).map(LayerSlot).zip(&layers) {
            match (&**layer.map(), &bottom) {
                (_, Some(set)) if slot == LayerSlot(1) => table.load_layer(slot, set),
                (LayerMap::Active(map), _) => table.load_layer(slot, &map.to_set()),
                (LayerMap::Sealed(set), _) => table.load_layer(slot, set),
            }
        }
        Self {
            layers,
            table,
            bottom,
            size,
        }
    }

    /// One layer, whatever it is.
    pub(super) fn of(size: Sector, layer: &Arc<Layer>) -> Self {
        Self::new(size, vec![Arc::clone(layer)])
    }

    /// The layers, oldest first.
    pub(super) fn layers(&self) -> &[Arc<Layer>] {
        &self.layers
    }

    /// Clusters of the disk.
    pub(super) fn clusters(&self) -> u64 {
        self.table.clusters()
    }

    /// The sectors of a cluster that lie on the disk.
    pub(super) fn on_disk(&self, cluster: Cluster) -> SectorMask {
        let left = self.size.0.saturating_sub(cluster.first_sector().0);
        let count = u32::try_from(left.min(CLUSTER_SECTORS)).unwrap_or(0);
        SectorMask::span(0, count)
    }

    /// What they say about the clusters from `at`, and about how many of those before `end`; that is not 0 if `at` lies before
    /// it.
    pub(super) fn run(&self, at: Cluster, end: u64) -> (u64, Content) {
        let left = end.saturating_sub(at.0);
        let Some(run) = self.table.runs(at, left).next() else {
            return (left, Content::Absent);
        };
        let word = run.resolve;
        let content = if word.slot == LayerSlot::NONE {
            Content::Absent
        } else if word.mask == SectorMask::NONE {
            Content::Zero
        } else if word.mask == SectorMask::ALL {
            Content::Whole(usize::try_from(word.slot.0 - 1).unwrap_or(usize::MAX))
        } else {
            return (1, Content::Mixed);
        };
        let last = self.clusters().saturating_sub(1);
        if let Content::Whole(_) = content
            && self.on_disk(Cluster(last)) != SectorMask::ALL
        {
            // The last cluster of a disk may be cut short.
            if at.0 == last {
                return (1, Content::Mixed);
            }
            return (run.count.min(left).min(last.saturating_sub(at.0)), content);
        }
        (run.count.min(left), content)
    }

    /// What they say about one cluster.
    pub(super) fn cluster(&self, cluster: Cluster) -> Composed {
        let mut state = ClusterState::ABSENT;
        let mut from = [0; SECTORS];
        let top = usize::try_from(self.table.get(cluster).slot.0).unwrap_or(0);
        for index in (0..top.min(self.layers.len())).rev() {
            let Some(layer) = self.layers.get(index) else {
                break;
            };
            let (data, zero) = match &self.bottom {
                Some(set) if index == 0 => set.cluster(cluster),
                _ => layer.cluster(cluster),
            };
            let index = u32::try_from(index).unwrap_or(u32::MAX);
            let new = SectorMask(data.0 & !state.data.0);
            for (bit, place) in (0..).map(|bit| 1u8 << bit).zip(&mut from).take(8) {
                if new.0 & bit != 0 {
                    *place = index;
                }
            }
            state.data = SectorMask(state.data.0 | new.0);
            if state.data == SectorMask::ALL {
                break;
            }
            if zero != SectorMask::NONE {
                state.rest_zero = true;
                break;
            }
        }
        let on_disk = self.on_disk(cluster);
        state.data = SectorMask(state.data.0 & on_disk.0);
        Composed { state, from }
    }
}

/// What the target of a job holds.
#[derive(Debug)]
pub(super) enum Held<'a> {
    /// Nothing.
    Nothing,
    /// As an active layer says.
    Active(&'a ActiveMap),
    /// As a sealed layer says; the table leads to it alone.
    Sealed(&'a SectorSet, &'a Table),
}

impl Held<'_> {
    /// What it says about the clusters from `at`, and about how many of those before `end`.
    pub(super) fn run(&self, at: Cluster, end: u64) -> (u64, ClusterState) {
        let left = end.saturating_sub(at.0);
        match self {
            Self::Nothing => (left, ClusterState::ABSENT),
            Self::Active(map) => map.run(at, left).unwrap_or((left, ClusterState::ABSENT)),
            Self::Sealed(set, table) => {
                let Some(run) = table.runs(at, left).next() else {
                    return (left, ClusterState::ABSENT);
                };
                let count = run.count.min(left);
                let word = run.resolve;
                if word.slot == LayerSlot::NONE {
                    (count, ClusterState::ABSENT)
                } else if word.mask == SectorMask::NONE {
                    (count, ClusterState::ZERO)
                } else if word.mask == SectorMask::ALL {
                    let data = SectorMask::ALL;
                    let rest_zero = false;
                    (count, ClusterState { data, rest_zero })
                } else {
                    (1, state_in(set, at))
                }
            }
        }
    }
}

/// What a set says about a cluster.
pub(super) fn state_in(set: &SectorSet, cluster: Cluster) -> ClusterState {
    let (data, zero) = set.cluster(cluster);
    ClusterState {
        data,
        rest_zero: zero != SectorMask::NONE,
    }
}

/// The table of one set, for `Held`.
pub(super) fn table_of(clusters: u64, set: &SectorSet) -> Table {
    let table = Table::new(clusters);
    table.load_layer(LayerSlot(1), set);
    table
}
