//! One layer: its data file, and which sectors it holds.
//!
//! ```text
//! Active --(a snapshot's instant)--> Sealing --(drained, synced, checkpoint written)--> Sealed
//! ```
//!
//! An active layer's map changes under the hands of the workers. After the instant of a snapshot only writes of the old
//! generation may still come in; once they are drained the map is frozen, and sealing turns it into a `SectorSet`.
//! What the sealed layers of a chain hold together never changes again; which of two neighbours holds what does, while they are
//! merged (`replace_set`).

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::{ArcSwap, ArcSwapOption};

use crate::file::File;
use crate::map::{ActiveMap, SectorSet};
use crate::mapfile::{MapFile, MapHeader};
use crate::sync::{AtomicBool, Ordering};
use crate::units::{Cluster, LayerId, LayerNumber, SectorMask};

/// Which sectors a layer holds.
#[derive(Debug)]
pub enum LayerMap {
    /// Changed by workers.
    Active(ActiveMap),
    /// Takes no more writes. Replaced as a whole while the layer is merged with a neighbour.
    Sealed(SectorSet),
}

/// One layer of one or more chains.
#[derive(Debug)]
pub struct Layer {
    /// Its name on disk.
    id: LayerId,
    /// What its map file says about it. Control plane only.
    header: Mutex<Arc<MapHeader>>,
    /// Its number in the sector cache.
    number: LayerNumber,
    /// The data of cluster n lies at byte n * 4096 of it.
    data: Arc<dyn File>,
    /// What it holds; replaced when it is sealed, and when it is merged after that.
    map: ArcSwap<LayerMap>,
    /// Whether data was written that no sync has covered yet.
    unsynced: AtomicBool,
    /// The map's file, to append to; `None` once sealed.
    journal: Mutex<Option<MapFile>>,
    /// Data that is known to be damaged in the file: never served. Only of a sealed layer.
    bad: ArcSwapOption<SectorSet>,
}

impl Layer {
    /// A layer that takes writes.
    pub fn active(
        header: MapHeader,
        number: LayerNumber,
        data: Arc<dyn File>,
        map: ActiveMap,
        journal: MapFile,
    ) -> Self {
        Self::new(header, number, data, LayerMap::Active(map), Some(journal))
    }

    /// A layer of either state.
    fn new(
        header: MapHeader,
        number: LayerNumber,
        data: Arc<dyn File>,
        map: LayerMap,
        journal: Option<MapFile>,
    ) -> Self {
        Self {
            id: header.layer,
            header: Mutex::new(Arc::new(header)),
            number,
            data,
            map: ArcSwap::from_pointee(map),
            unsynced: AtomicBool::new(false),
            journal: Mutex::new(journal),
            bad: ArcSwapOption::empty(),
        }
    }

    /// A layer that never changes.
    pub fn sealed(
        header: MapHeader,
        number: LayerNumber,
        data: Arc<dyn File>,
        set: SectorSet,
    ) -> Self {
        Self::new(header, number, data, LayerMap::Sealed(set), None)
    }

    /// Its name on disk.
    pub fn id(&self) -> LayerId {
        self.id
    }

    /// Its number in the sector cache: the first half of the keys of its frames.
    pub fn number(&self) -> LayerNumber {
        self.number
    }

    /// What its map file says about it: of an active layer also what the next one will say.
    pub fn header(&self) -> Arc<MapHeader> {
        Arc::clone(&self.header.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Its map file says this from now on: another parent, or that it is sealed. It is still the same layer.
    pub fn set_header(&self, header: MapHeader) {
        debug_assert_eq!(header.layer, self.id);
        *self.header.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(header);
    }

    /// Its data.
    pub fn data(&self) -> &Arc<dyn File> {
        &self.data
    }

    /// What it holds, for a longer time. Of a layer that takes writes it stays the truth until the layer is sealed, and what
    /// it says then stays true.
    pub fn map_full(&self) -> Arc<LayerMap> {
        self.map.load_full()
    }

    /// What it holds.
    pub fn map(&self) -> arc_swap::Guard<Arc<LayerMap>> {
        self.map.load()
    }

    /// Whether it takes no more writes.
    pub fn is_sealed(&self) -> bool {
        matches!(**self.map.load(), LayerMap::Sealed(_))
    }

    /// Whether anything of it waits to be written back or recorded. A cheap look without a promise.
    pub fn has_marks(&self) -> bool {
        match &**self.map.load() {
            LayerMap::Active(map) => map.has_marks(),
            LayerMap::Sealed(_) => false,
        }
    }

    /// Which sectors of a cluster it holds as data, and which it holds as zeroes. The rest its parent answers for.
    pub fn cluster(&self, cluster: Cluster) -> (SectorMask, SectorMask) {
        match &**self.map.load() {
            LayerMap::Active(map) => {
                let state = map.get(cluster);
                let zero = if state.rest_zero {
                    SectorMask(!state.data.0)
                } else {
                    SectorMask::NONE
                };
                (state.data, zero)
            }
            LayerMap::Sealed(set) => set.cluster(cluster),
        }
    }

    /// Says that data is being written to the file.
    pub fn mark_unsynced(&self) {
        // ORDERING: a read-modify-write (not "load, store if clear"), so that a flush which swaps the flag afterwards
        // synchronises with this writer, and a writer that comes after the swap sets it anew. AcqRel; pairs with
        // `take_unsynced`.
        self.unsynced.swap(true, Ordering::AcqRel);
    }

    /// Whether data was written since the last call; the caller syncs the file now or latches the failure.
    pub fn take_unsynced(&self) -> bool {
        self.unsynced.swap(false, Ordering::AcqRel)
    }

    /// The map's file, to append to; `None` once sealed. Held for encoding only, never over a write or sync of a guest.
    pub fn journal(&self) -> MutexGuard<'_, Option<MapFile>> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Turns the layer into a sealed one. The caller has drained it, synced its data and made `set`, which equals
    /// its map, durable.
    pub fn seal(&self, set: SectorSet) {
        self.map.store(Arc::new(LayerMap::Sealed(set)));
        *self.journal() = None;
    }

    /// Another set for a layer that is sealed: what a merge has given it or taken from it. Readers see the old one or the
    /// new one, whole.
    ///
    /// What is gained must be in the data file, and no frame of this layer may hold something else there. When the neighbour
    /// has gained what this one is to lose, and the tables have followed, the order depends on which of them is the upper one,
    /// since readers ask the upper one first:
    /// - upwards: advance the clock; wait until no request of before is under way (`Clock::quiescent_for_reads`); the lower
    ///   layer loses it; its place may be given back;
    /// - downwards: the upper layer loses it; advance the clock; wait; its place may be given back.
    ///
    /// See section 8 of `CONCURRENCY.md`.
    pub fn replace_set(&self, set: SectorSet) {
        debug_assert!(
            self.is_sealed(),
            "the map of a layer that takes writes is changed by them"
        );
        // ORDERING: ArcSwap publishes with Release and readers load with Acquire: who sees this set sees what was done to the
        // neighbour's before.
        self.map.store(Arc::new(LayerMap::Sealed(set)));
    }

    /// Whether any of these sectors is known to be damaged in the file. Asked before each read of the file, so cheap where
    /// nothing is.
    pub fn is_bad(&self, cluster: Cluster, mask: SectorMask) -> bool {
        // ORDERING: as for the map: who sees the set sees all of it.
        let bad = self.bad.load();
        bad.as_ref()
            .is_some_and(|bad| bad.cluster(cluster).0.0 & mask.0 != 0)
    }

    /// This of the file's data is known to be damaged from now on. Reads that looked before may still be under way, and frames
    /// may have been filled with it: who wants them gone advances the clock, waits until nobody reads as before, and trims.
    pub fn set_bad(&self, bad: Option<Arc<SectorSet>>) {
        debug_assert!(bad.is_none() || self.is_sealed());
        self.bad.store(bad);
    }

    /// Syncs the data file; for the control plane.
    ///
    /// # Errors
    /// The host's answer.
    pub fn sync_data(&self) -> io::Result<()> {
        self.data.sync_data()
    }
}
