//! What an unsealed layer holds: the truth about its clusters, and which of it the layer's journal lacks.
//!
//! ```text
//!            write                 zero
//! Absent ------------> Data(mask) ------> Zero        Data(mask): these sectors lie in the layer's file,
//!   |  zero              ^    |  zero      |          the others are the parent's, or zero once it was Zero
//!   +-------> Zero       +----+ write      | write
//!                                          v
//!                                   Data(mask) + rest zero
//! ```
//!
//! INVARIANT: a cluster never becomes Absent again; a mask never shrinks but by `zero`; a full mask has no rest.
//!
//! A word's change is one atomic step on one word, which is the instant of the write for this cluster. A read that finds
//! this layer in the resolve table asks here which sectors it holds.

use crate::map::changed::ChangedRegions;
use crate::map::fault::{Fault, planted};
use crate::map::radix::{Radix, Updated};
use crate::map::record::{Coalesce, MapRecord, cluster_parts};
use crate::map::set::SectorSet;
use crate::units::{Cluster, SectorMask, SectorRange};

/// What a layer says about one cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClusterState {
    /// The sectors whose data lie in this layer's file.
    pub data: SectorMask,
    /// Whether the other sectors are zeroes; else they are the parent's. Never set when there are no others.
    pub rest_zero: bool,
}

impl ClusterState {
    /// The layer says nothing about the cluster.
    pub const ABSENT: Self = Self {
        data: SectorMask::NONE,
        rest_zero: false,
    };
    /// The layer zeroes the whole cluster.
    pub const ZERO: Self = Self {
        data: SectorMask::NONE,
        rest_zero: true,
    };

    /// Whether the layer says nothing about the cluster.
    pub fn is_absent(self) -> bool {
        self == Self::ABSENT
    }

    /// The sectors that this layer zeroes.
    pub const fn zero(self) -> SectorMask {
        SectorMask(if self.rest_zero { !self.data.0 } else { 0 })
    }

    /// The state after these sectors were written.
    const fn with(self, mask: SectorMask) -> Self {
        let data = SectorMask(self.data.0 | mask.0);
        Self {
            data,
            rest_zero: self.rest_zero && data.0 != SectorMask::ALL.0,
        }
    }
}

/// Whether an operation changed any word of the map. The refresh of the resolve table needs to know: who changed nothing
/// may get by without a store, see `Table::refresh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "the resolve table is refreshed with it"]
pub enum Change {
    /// The map said all of it before.
    Nothing,
    /// At least one cluster's state is new.
    Words,
}

/// Bit of a word: the sectors outside the mask are zeroes.
const REST_ZERO: u16 = 1 << 8;
/// Bit of a word: the journal lacks this state.
const UNJOURNALED: u16 = 1 << 9;

/// A word without flags.
const fn word(state: ClusterState) -> u16 {
    state.data.0 as u16 | if state.rest_zero { REST_ZERO } else { 0 }
}

/// The state in a word.
const fn state(word: u16) -> ClusterState {
    ClusterState {
        data: SectorMask(word.to_le_bytes()[0]),
        rest_zero: word & REST_ZERO != 0,
    }
}

/// The map of a layer that takes writes, or took them until a moment ago. Any thread may call anything at any time, but
/// see [`ActiveMap::collect`].
#[derive(Debug)]
pub struct ActiveMap {
    /// The words.
    radix: Radix<u16>,
    /// The regions with unjournaled words.
    changed: ChangedRegions,
}

impl ActiveMap {
    /// The map of an empty layer.
    pub fn new(clusters: u64) -> Self {
        Self {
            radix: Radix::new(clusters, 0),
            changed: ChangedRegions::new(clusters),
        }
    }

    /// The map of a layer that holds this, all of it journaled. Clusters of the set beyond the end are left out.
    pub fn from_set(clusters: u64, set: &SectorSet) -> Self {
        let map = Self::new(clusters);
        for part in set.data_runs().flat_map(cluster_parts) {
            let step = |old| Some(word(state(old).with(part.mask)));
            map.radix.update(part.first.0, part.count, step, |_| {});
        }
        for part in set.zero_runs().flat_map(cluster_parts) {
            // A set's zeroes are all sectors of a cluster that are not data (see `SectorSet`).
            map.radix.update(
                part.first.0,
                part.count,
                |old| Some(old | REST_ZERO),
                |_| {},
            );
        }
        map
    }

    /// How many clusters the disk has.
    pub const fn clusters(&self) -> u64 {
        self.radix.clusters()
    }

    /// What the layer says about a cluster; `ABSENT` beyond the end. At most three loads.
    #[inline]
    pub fn get(&self, cluster: Cluster) -> ClusterState {
        state(self.radix.get(cluster.0))
    }

    /// The states of `count` clusters from `first` in runs (first cluster, how many, state), each as long as possible.
    /// Does not allocate.
    pub fn runs(
        &self,
        first: Cluster,
        count: u64,
    ) -> impl Iterator<Item = (Cluster, u64, ClusterState)> {
        let runs = self.radix.runs(first.0, count, state);
        runs.map(|run| (Cluster(run.first), run.count, run.value))
    }

    /// The longest run of clusters of one state that begins at `first`, at most `count` long; `None` if that is none.
    pub fn run(&self, first: Cluster, count: u64) -> Option<(u64, ClusterState)> {
        self.runs(first, count)
            .next()
            .map(|(_, count, state)| (count, state))
    }

    /// These sectors' data now lie in the layer's file. Call it when they do, and before the write is acknowledged.
    /// Overwriting what is mapped and journaled costs one load a cluster.
    pub fn write(&self, range: SectorRange) -> Change {
        let mut change = Change::Nothing;
        for part in cluster_parts(range) {
            let seen = self.update(part.first.0, part.count, |old| old.with(part.mask));
            if seen == Change::Words {
                change = Change::Words;
            }
        }
        change
    }

    /// These clusters are zeroes now.
    pub fn zero(&self, first: Cluster, count: u64) -> Change {
        self.update(first.0, count, |_| ClusterState::ZERO)
    }

    /// Changes states, and marks the regions that are left with unjournaled words.
    fn update(
        &self,
        first: u64,
        count: u64,
        next: impl Fn(ClusterState) -> ClusterState,
    ) -> Change {
        let mut change = Change::Nothing;
        let mut marked: Option<(u64, u64)> = None;
        let step = |old: u16| {
            let new = next(state(old));
            (new != state(old)).then(|| word(new) | UNJOURNALED)
        };
        self.radix.update(first, count, step, |run: Updated<u16>| {
            if run.old != run.new {
                change = Change::Words;
            } else if planted(Fault::MarkOnlyOwnChanges) {
                return;
            }
            if run.new & UNJOURNALED != 0 {
                let (low, _) = *marked.get_or_insert((run.first, run.first));
                marked = Some((low, run.first + run.count - 1));
            }
        });
        // A word that was found unjournaled counts as well: the one who made it so may not have marked it yet, and this
        // request is acknowledged without waiting for it. Regions between two marked ones only cost the collector a look.
        if let Some((low, high)) = marked {
            self.changed.mark(low, high);
        }
        change
    }

    /// Takes what the journal lacks: everything that was written or zeroed before this call (as far as that happened
    /// before it), perhaps some of what happens meanwhile. The records are absolute, in the order of their sectors, and
    /// do not overlap.
    ///
    /// The caller makes sure of two things. Only one thread at a time collects from a map, and the records of an
    /// earlier collection come before those of a later one in the journal. And no flush that began after a collection
    /// claims success before that collection's records are durable too, since they may hold what the flush covers.
    /// If they cannot be written they are lost from here: the layer must fail then.
    #[must_use = "the records are in no other place"]
    pub fn collect(&self) -> Vec<MapRecord> {
        let mut records = Vec::new();
        let mut coalesce = Coalesce::new(|record| records.push(record));
        self.changed.take(|first, count| {
            let step = |old: u16| (old & UNJOURNALED != 0).then_some(old & !UNJOURNALED);
            self.radix.update(first, count, step, |run| {
                if run.old & UNJOURNALED != 0 {
                    coalesce.clusters(Cluster(run.first), run.count, state(run.old));
                }
            });
        });
        coalesce.finish();
        records
    }

    /// Everything that the layer holds, for its checkpoint. Exact once nobody writes any more.
    pub fn to_set(&self) -> SectorSet {
        let mut set = SectorSet::empty();
        let mut coalesce = Coalesce::new(|record: MapRecord| set.apply(&record));
        for (first, count, state) in self.runs(Cluster(0), self.clusters()) {
            coalesce.clusters(first, count, state);
        }
        coalesce.finish();
        set.optimize();
        set
    }

    /// Bytes of memory that the map takes. Visits every node: for metrics.
    pub fn memory_bytes(&self) -> u64 {
        self.radix.memory_bytes() + self.changed.memory_bytes()
    }
}
