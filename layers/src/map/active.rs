//! What an unsealed layer holds: the truth about its clusters, which of it the layer's journal lacks, and where data may
//! still wait in frames of the cache.
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
//!
//! Beside the state a word has two flags, which are work for whoever collects: *unjournaled* (the journal lacks this state)
//! and *dirty* (a frame of this cluster may hold data that the layer's file lacks). A region with flagged words is marked.
//! Either flag may be set without need, which costs a look. What must not be is a flag that is missing, or without a mark:
//!
//! - who makes a word unjournaled marks its region before it lets go of the cluster's frame (`write_cluster`) or before
//!   it is acknowledged (`zero`, and `write`, which is for those who have no frames);
//! - who makes a word unjournaled while leading the volume's flushes (`merge_below`, and `write` past the cache) marks its
//!   region before it gives the lead back;
//! - who makes a clean frame dirty sets the flag and marks the region before it lets go of the frame;
//! - who collects takes the flags, and for each of them does the work or sets it again, before the next one may collect.
//!
//! Memory a TiB of disk: 73 KiB if all of it is alike; at worst 512 MiB of words, 4 MiB of nodes and those 73 KiB.

use crate::map::changed::ChangedRegions;
use crate::map::fault::{Fault, planted};
use crate::map::radix::{Radix, Updated};
use crate::map::record::{Coalesce, MapRecord, cluster_parts};
use crate::map::set::SectorSet;
use crate::units::{CLUSTER_SECTORS, Cluster, SectorMask, SectorRange};

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

    /// What a layer in this state and one below it say together.
    #[must_use]
    pub const fn over(self, below: Self) -> Self {
        if self.rest_zero {
            return self;
        }
        let data = SectorMask(self.data.0 | below.data.0);
        Self {
            data,
            rest_zero: below.rest_zero && data.0 != SectorMask::ALL.0,
        }
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

/// Bit of a word: a frame of the cluster may hold data that the layer's file lacks.
const DIRTY: u16 = 1 << 10;
/// What a collection takes.
const FLAGS: u16 = UNJOURNALED | DIRTY;

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

/// What a collection took: see [`ActiveMap::collect`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use = "what was collected is in no other place"]
pub struct Collected {
    /// What the journal lacks: absolute, in the order of the sectors, without overlap.
    pub records: Vec<MapRecord>,
    /// The clusters whose frames may be dirty, as runs (first, count), in order and as long as possible.
    pub dirty: Vec<(Cluster, u64)>,
    /// Whether the limit ended the collection and marked regions are left.
    pub more: bool,
}

impl Collected {
    /// Whether nothing was taken.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty() && self.dirty.is_empty()
    }
}

/// The map of a layer that takes writes, or took them until a moment ago. Any thread may call anything at any time, but
/// see [`ActiveMap::collect`] and [`ActiveMap::write_cluster`].
#[derive(Debug)]
pub struct ActiveMap {
    /// The words.
    radix: Radix<u16>,
    /// The regions with flagged words.
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
    pub fn clusters(&self) -> u64 {
        self.radix.clusters()
    }

    /// Adds clusters at the end, about which the layer says nothing, while others use the map.
    pub fn grow(&self, clusters: u64) {
        // What marks them first: whoever knows of a cluster may mark it.
        self.changed.grow(clusters);
        self.radix.grow(clusters);
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
    ///
    /// For who has no frames: nobody may call `write_cluster` for the same clusters at the same time, since that relies on
    /// marks that were made under the lock of a frame.
    pub fn write(&self, range: SectorRange) -> Change {
        let mut change = Change::Nothing;
        for part in cluster_parts(range) {
            let seen = self.update(part.first.0, part.count, |old| old.with(part.mask), |_| {});
            if seen == Change::Words {
                change = Change::Words;
            }
        }
        change
    }

    /// These sectors of the cluster now have their data in its frame, which the caller holds locked; `dirtied` says that the
    /// frame was clean before (or new). The mask is not empty. Others may read, zero and collect meanwhile.
    ///
    /// Overwriting sectors of a dirty frame costs loads only, and marks nothing: who made the word what it is has marked
    /// it under the same lock. (A zeroed word, which is made without that lock, has no sectors to overwrite.) A clean frame
    /// that becomes dirty always costs a compare-and-swap and a mark, also if the flag is there: a mere look at the flag and
    /// a collector's mere look at the frame could miss each other.
    pub fn write_cluster(&self, cluster: Cluster, mask: SectorMask, dirtied: bool) -> Change {
        debug_assert!(mask != SectorMask::NONE, "a write of nothing");
        let touch = dirtied && !planted(Fault::LookBeforeDirtying);
        let step = |old: u16| {
            let before = state(old);
            let after = before.with(mask);
            let unjournaled = if after == before { 0 } else { UNJOURNALED };
            let dirty = if dirtied { DIRTY } else { 0 };
            let new = word(after) | old & FLAGS | unjournaled | dirty;
            (touch || new != old).then_some(new)
        };
        if step(self.radix.get(cluster.0)).is_none() {
            return Change::Nothing;
        }
        let mut change = Change::Nothing;
        self.radix.update(cluster.0, 1, step, |run| {
            // The flags are no concern of the resolve table's.
            if state(run.old) != state(run.new) {
                change = Change::Words;
            }
        });
        if !planted(Fault::MarkAfterUnlock) {
            self.changed.mark(cluster.0, cluster.0);
        }
        change
    }

    /// These clusters now hold also what the layer below said about each of them, as far as they said nothing: its sectors of
    /// data lie in this layer's file, at their own place, in a file that is marked as unsynced. Refresh the table after it.
    ///
    /// The caller leads the volume's flushes from before it looked at what the layer holds, over its writes to the file, until
    /// after this: nobody writes back, zeroes or writes through meanwhile, so a sector that this layer did not hold had no data
    /// in the file to lose, and what a guest writes in the meantime waits in a frame, which is newer than the file.
    ///
    /// A guest's write that finds the sectors here relies on marks that it did not make (`write_cluster`). The one that is
    /// made here comes after the word, without the frame's lock; but nobody collects before the lead is given back,
    /// which comes after the mark.
    pub fn merge_below(&self, first: Cluster, count: u64, below: ClusterState) -> Change {
        if planted(Fault::HandOverWithoutMark) {
            let step = |old| Some(word(state(old).over(below)) | old & FLAGS | UNJOURNALED);
            self.radix.update(first.0, count, step, |_| {});
            return Change::Words;
        }
        self.update(first.0, count, |state| state.over(below), |_| {})
    }

    /// These clusters are zeroes now. Their frames are the caller's to trim, each under its lock, after this.
    ///
    /// A dirty word stays dirty: until the frame is trimmed a write may find it dirty and rely on the flag.
    pub fn zero(&self, first: Cluster, count: u64) -> Change {
        self.zero_and(first, count, |_, _| {})
    }

    /// The same; hands on each run of clusters that held data until then, after their words were changed.
    pub fn zero_and(
        &self,
        first: Cluster,
        count: u64,
        mut had_data: impl FnMut(Cluster, u64),
    ) -> Change {
        self.update(
            first.0,
            count,
            |_| ClusterState::ZERO,
            |run| {
                if state(run.old).data != SectorMask::NONE {
                    had_data(Cluster(run.first), run.count);
                }
            },
        )
    }

    /// Changes states, and marks the regions that are left with unjournaled words.
    fn update(
        &self,
        first: u64,
        count: u64,
        next: impl Fn(ClusterState) -> ClusterState,
        mut each: impl FnMut(&Updated<u16>),
    ) -> Change {
        let mut change = Change::Nothing;
        let mut marked: Option<(u64, u64)> = None;
        let kept = if planted(Fault::ZeroForgetsDirty) {
            0
        } else {
            DIRTY
        };
        let step = |old: u16| {
            let new = next(state(old));
            (new != state(old)).then(|| word(new) | UNJOURNALED | old & kept)
        };
        self.radix.update(first, count, step, |run: Updated<u16>| {
            each(&run);
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

    /// Sets a flag of `count` clusters from `first` and marks their regions.
    fn flag(&self, flag: u16, first: Cluster, count: u64) {
        let end = first.0.saturating_add(count).min(self.clusters());
        if first.0 < end {
            self.radix
                .update(first.0, end - first.0, |old| Some(old | flag), |_| {});
            self.changed.mark(first.0, end - 1);
        }
    }

    /// The cluster's frame is dirty, though a collection took its flag: it changed while it was written back.
    pub fn mark_dirty(&self, cluster: Cluster) {
        self.flag(DIRTY, cluster, 1);
    }

    /// Whether all collections up to now have what the layer says about the cluster. A frame must not become clean
    /// otherwise: sectors that were written into it after its flags were taken, and before it was copied, are in the file
    /// then, but no journal says so.
    pub fn is_journaled(&self, cluster: Cluster) -> bool {
        self.radix.get(cluster.0) & UNJOURNALED == 0
    }

    /// Whether there may be something to collect. A cheap look without a promise, for a timer.
    pub fn has_marks(&self) -> bool {
        self.changed.any()
    }

    /// Takes the flags of marked regions: everything that was written or zeroed before this call (as far as that happened
    /// before it), perhaps some of what happens meanwhile. Ends after the region in which the number of clusters taken
    /// comes to `limit`, and says so in `more`; what was not taken stays marked. Collections with a limit go around the
    /// disk, each from where the last one ended, so that everything marked has its turn; a flush has none
    /// (`usize::MAX`).
    ///
    /// The caller makes sure of this. Only one thread at a time collects from a map, and the records of an earlier
    /// collection come before those of a later one in the journal. Before the next collection begins, the frame of each
    /// dirty cluster was made clean or was marked again (`mark_dirty`), and the records are durable or were put back. A frame
    /// is looked at after its flag was taken; one that is locked then counts as dirty.
    ///
    /// What is neither done nor put back is lost from here: the layer must fail then.
    pub fn collect(&self, limit: usize) -> Collected {
        let mut records = Vec::new();
        let mut dirty: Vec<(Cluster, u64)> = Vec::new();
        let mut coalesce = Coalesce::new(|record| records.push(record));
        let limit = u64::try_from(limit).unwrap_or(u64::MAX);
        let more = self.changed.take(limit, |first, count| {
            let mut taken = 0;
            let step = |old: u16| (old & FLAGS != 0).then_some(old & !FLAGS);
            self.radix.update(first, count, step, |run| {
                let first = Cluster(run.first);
                if run.old & FLAGS != 0 {
                    taken += run.count;
                }
                if run.old & UNJOURNALED != 0 {
                    coalesce.clusters(first, run.count, state(run.old));
                }
                if run.old & DIRTY != 0 {
                    match dirty.last_mut() {
                        Some((last, count)) if last.0 + *count == first.0 => *count += run.count,
                        _ => dirty.push((first, run.count)),
                    }
                }
            });
            taken
        });
        coalesce.finish();
        // In order already, but for a collection that went around the end.
        records.sort_by_key(|record| record.range.start);
        dirty.sort_by_key(|(first, _)| *first);
        Collected {
            records,
            dirty,
            more,
        }
    }

    /// Takes back what a collection took, if nothing came of it. Only for who collects, before the next collection.
    ///
    /// Flags are all that is set. Where a cluster was written or zeroed since, its word says what is true now and the flags
    /// are set already, or cost a record that says it once more.
    pub fn put_back(&self, collected: &Collected) {
        self.put_back_records(&collected.records);
        for (first, count) in &collected.dirty {
            self.flag(DIRTY, *first, *count);
        }
    }

    /// Makes the clusters of these records unjournaled again.
    fn put_back_records(&self, records: &[MapRecord]) {
        for range in records.iter().map(|record| record.range) {
            let first = range.start.cluster();
            let end = range.end().0.div_ceil(CLUSTER_SECTORS);
            self.flag(UNJOURNALED, first, end - first.0);
        }
    }

    /// Runs of clusters (first, count) that are not zero, or that the journal does not say are zero.
    pub fn not_recorded_zero(
        &self,
        first: Cluster,
        count: u64,
    ) -> impl Iterator<Item = (Cluster, u64)> {
        let wanted = |word: u16| state(word) != ClusterState::ZERO || word & UNJOURNALED != 0;
        let runs = self.radix.runs(first.0, count, wanted);
        runs.filter(|run| run.value)
            .map(|run| (Cluster(run.first), run.count))
    }

    /// Takes the records that say that these clusters are zero, as far as the journal lacks them, or has them since a moment
    /// ago: what a write-zeroes has to write before it is acknowledged. `None`, and nothing taken, if one of the clusters was
    /// written since, so that its record must wait for its data: flush then. Only for who collects, as if it were a collection;
    /// the records can be put back. Dirty flags and marks stay.
    pub fn zero_records(&self, first: Cluster, count: u64) -> Option<Vec<MapRecord>> {
        let written = |word: u16| word & UNJOURNALED != 0 && state(word).data != SectorMask::NONE;
        let mut runs = self.radix.runs(first.0, count, written);
        if runs.any(|run| run.value) {
            return None;
        }
        let mut records = Vec::new();
        let mut coalesce = Coalesce::new(|record| records.push(record));
        let mut too_late = false;
        let step = |old: u16| {
            let take = old & UNJOURNALED != 0 && state(old) == ClusterState::ZERO;
            take.then_some(old & !UNJOURNALED)
        };
        self.radix.update(first.0, count, step, |run| {
            if run.old != run.new {
                coalesce.clusters(Cluster(run.first), run.count, ClusterState::ZERO);
            }
            too_late |= written(run.new);
        });
        coalesce.finish();
        if too_late && !planted(Fault::ZeroWithoutRecord) {
            // A write came in between. Without its zeroes' record this cluster would be what it was before them.
            self.put_back_records(&records);
            return None;
        }
        Some(records)
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
