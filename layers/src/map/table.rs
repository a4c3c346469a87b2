//! The resolve table of one volume: for each cluster the newest layer that says anything about it.
//!
//! A word is a layer's slot (24 bits) and a mask of sectors (8 bits):
//!
//! | word            | meaning                                                                                     |
//! |-----------------|---------------------------------------------------------------------------------------------|
//! | slot 0          | no layer says anything: the cluster reads as zeroes                                         |
//! | slot, mask 0    | that layer zeroes the whole cluster                                                         |
//! | slot, mask      | that layer's file holds these sectors; of the others ask the maps, beginning with its own   |
//!
//! What a reader may rely on:
//! - Slots never fall, but from one sealed layer to another when the two are merged (`replace`). Once a write to slot s was
//!   acknowledged, nobody finds an older slot in its clusters but of a layer that has taken its data over.
//! - The mask is exact for a layer whose writers have all ended, that is for every sealed one; while that is merged, an older
//!   word may have fewer sectors than its map, never one that is not there any more as long as the reader is announced.
//! - For a layer that may still have writers, the mask is a hint only. While requests on the same cluster are under way it
//!   may fall behind requests that were acknowledged since: the word has no room for a version, so a slow refresh can put
//!   back what was true when it looked, until it looks again. So **of an unsealed layer take only the slot from here, and
//!   ask its `ActiveMap` for the sectors**; its word is the instant of a write. Whether a layer is sealed must be known
//!   *before* the table is read: one that is sealed after that had writers when the word was read. The same holds for
//!   whoever would skip a write or zero because the table says that there is nothing to do.
//!
//! The table is derived from the maps by `refresh`, which every write calls after it changed its map.

use crate::limits::SLOT_MAX;
use crate::map::active::{ActiveMap, Change};
use crate::map::fault::{Fault, planted};
use crate::map::radix::{Radix, SPAN_CLUSTERS};
use crate::map::record::cluster_parts;
use crate::map::set::SectorSet;
use crate::units::{Cluster, LayerSlot, SectorMask};

/// Where to look for a cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resolve {
    /// The newest layer that says anything about the cluster; `NONE` if no layer does.
    pub slot: LayerSlot,
    /// The sectors whose data lie in its file. None of them: it zeroes the whole cluster.
    pub mask: SectorMask,
}

/// A run of clusters with the same answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResolveRun {
    /// The first cluster.
    pub first: Cluster,
    /// How many; never 0.
    pub count: u64,
    /// The answer for each of them.
    pub resolve: Resolve,
}

/// The word of a slot and a mask.
fn word(slot: LayerSlot, mask: SectorMask) -> u32 {
    slot.0 << 8 | u32::from(mask.0)
}

/// The slot in a word.
const fn slot(word: u32) -> LayerSlot {
    LayerSlot(word >> 8)
}

/// The answer in a word.
const fn resolve(word: u32) -> Resolve {
    Resolve {
        slot: slot(word),
        mask: SectorMask(word.to_le_bytes()[0]),
    }
}

/// Panics unless a layer may have this slot: a greater one would run into no mask, but 0 means "no layer".
fn check(slot: LayerSlot) {
    assert!(
        slot != LayerSlot::NONE && slot.0 <= SLOT_MAX,
        "slot {} is none of a layer's",
        slot.0
    );
}

/// The resolve table. Any thread may call anything at any time.
#[derive(Debug)]
pub struct Table {
    /// The words.
    radix: Radix<u32>,
}

impl Table {
    /// The table of a disk about which no layer says anything.
    pub fn new(clusters: u64) -> Self {
        Self {
            radix: Radix::new(clusters, 0),
        }
    }

    /// How many clusters the disk has.
    pub fn clusters(&self) -> u64 {
        self.radix.clusters()
    }

    /// Adds clusters at the end, about which no layer says anything, while others use the table.
    pub fn grow(&self, clusters: u64) {
        self.radix.grow(clusters);
    }

    /// Where to look for a cluster. At most three loads.
    #[inline]
    pub fn get(&self, cluster: Cluster) -> Resolve {
        resolve(self.radix.get(cluster.0))
    }

    /// The answers for `count` clusters from `first` in runs, each as long as possible. Does not allocate.
    pub fn runs(&self, first: Cluster, count: u64) -> impl Iterator<Item = ResolveRun> {
        self.radix
            .runs(first.0, count, resolve)
            .map(|run| ResolveRun {
                first: Cluster(run.first),
                count: run.count,
                resolve: run.value,
            })
    }

    /// Puts a sealed layer on top, at open: call it for the oldest layer first. Clusters of the set beyond the end are
    /// left out. Costs steps by the number of runs and of regions, not of clusters, as far as they are uniform.
    ///
    /// # Panics
    /// If the slot is 0 or more than `SLOT_MAX`.
    pub fn load_layer(&self, layer: LayerSlot, set: &SectorSet) {
        check(layer);
        for part in set.zero_runs().flat_map(cluster_parts) {
            // Zeroes of a part of a cluster stand beside data, which say so below.
            if part.mask == SectorMask::ALL {
                let zero = word(layer, SectorMask::NONE);
                self.radix
                    .update(part.first.0, part.count, |_| Some(zero), |_| {});
            }
        }
        for part in set.data_runs().flat_map(cluster_parts) {
            let step = |old| {
                // A cluster may have several runs.
                let seen = if slot(old) == layer {
                    resolve(old).mask.0
                } else {
                    0
                };
                Some(word(layer, SectorMask(seen | part.mask.0)))
            };
            self.radix.update(part.first.0, part.count, step, |_| {});
        }
    }

    /// Turns the words of two sealed layers into those of one of them, for `count` clusters from `first`: it has taken over
    /// what the other one held there, and `set` says what it holds now. Words of newer layers stay as they are, and so do
    /// clusters about which the set says nothing.
    ///
    /// The data is in the file of `to`, and its set says so to readers, before this. Readers that have seen an older word may
    /// still use it when this returns. Costs steps by the number of runs and of regions, not of clusters, as far as they are
    /// uniform.
    ///
    /// # Panics
    /// If a slot is 0 or more than `SLOT_MAX`.
    pub fn replace(
        &self,
        first: Cluster,
        count: u64,
        from: LayerSlot,
        to: LayerSlot,
        set: &SectorSet,
    ) {
        check(from);
        check(to);
        for (first, count, state) in set.states(first, count) {
            let wanted = word(to, state.data);
            let step = |old: u32| {
                let theirs = [from, to].contains(&slot(old)) || planted(Fault::ReplaceBeatsNewer);
                (theirs && old != wanted).then_some(wanted)
            };
            self.radix.update(first.0, count, step, |_| {});
        }
    }

    /// Brings the table up to date with the map of the layer in slot `layer`, for `count` clusters from `first`. Every
    /// write calls it after it changed the map (with what that said) and before it is acknowledged; writes of an older
    /// generation give their own layer's slot and never replace a newer one.
    ///
    /// Without change in map and table it costs loads only.
    ///
    /// # Panics
    /// If the slot is 0 or more than `SLOT_MAX`.
    pub fn refresh(
        &self,
        layer: LayerSlot,
        map: &ActiveMap,
        first: Cluster,
        count: u64,
        change: Change,
    ) {
        check(layer);
        if change == Change::Nothing && self.knows(layer, first, count) {
            return;
        }
        let end = first.0.saturating_add(count).min(self.clusters());
        let mut at = first.0;
        while at < end {
            // Not beyond a span: a long run would have to be looked at again as a whole if any part of it changed.
            let stop = end.min((at / SPAN_CLUSTERS + 1) * SPAN_CLUSTERS);
            at = self.refresh_run(layer, map, at, stop, change);
        }
    }

    /// Whether all of these clusters lead to this layer or a newer one. Who changed nothing in the map needs no more than
    /// that: the mask is the business of the one who did.
    #[inline]
    fn knows(&self, layer: LayerSlot, first: Cluster, count: u64) -> bool {
        if count == 1 {
            return self.get(first).slot >= layer;
        }
        self.runs(first, count).all(|run| run.resolve.slot >= layer)
    }

    /// Refreshes the clusters of one state from `at`; returns the first that was not.
    fn refresh_run(
        &self,
        layer: LayerSlot,
        map: &ActiveMap,
        at: u64,
        stop: u64,
        change: Change,
    ) -> u64 {
        loop {
            let Some((count, state)) = map.run(Cluster(at), stop - at) else {
                return stop;
            };
            if state.is_absent() {
                return at + count;
            }
            let wanted = word(layer, state.data);
            let mut stored = false;
            let step = |old: u32| {
                if slot(old) > layer && !planted(Fault::OlderSlotWins) {
                    return None;
                }
                if old != wanted {
                    stored = true;
                    return Some(wanted);
                }
                // ORDERING: who changed the map takes part in the modification order of the table even if the word is
                // right already. Else a slow refresh could replace it afterwards by what the map said earlier, without
                // seeing the change when it looks again. Who changed nothing relies on the one who did.
                (change == Change::Words && !planted(Fault::RefreshWithoutTouch)).then_some(old)
            };
            self.radix.update(at, count, step, |_| {});
            // Look again: if the map changed since it was read, what was just stored may have replaced something newer.
            // The one who changed it either refreshes after this store and corrects it, or did so before, and then the
            // compare-and-swap above has made its change visible here.
            if !stored
                || planted(Fault::RefreshOnce)
                || map.run(Cluster(at), count) == Some((count, state))
            {
                return at + count;
            }
        }
    }

    /// Bytes of memory that the table takes. Visits every node: for metrics.
    pub fn memory_bytes(&self) -> u64 {
        self.radix.memory_bytes()
    }
}
