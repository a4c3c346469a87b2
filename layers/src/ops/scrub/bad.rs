//! What is known to be damaged: never served, shown to whoever asks, remembered over a restart, and mended where a frame of the
//! cache still has what was lost.
//!
//! Where the file that remembers it is damaged itself, all data of the layer counts as damaged. That a scrub of it is due is
//! known by that, also after a restart: the file is replaced, or removed, at the end of one and not before.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::badfile::{self, bad_path};
use crate::cache::set::FrameKey;
use crate::cache::staging::Page;
use crate::error::{Error, Result};
use crate::file::{File, OpenMode};
use crate::map::{MapRecord, RecordKind, SectorSet};
use crate::mapfile::{MapFile, data_path};
use crate::store::{Store, now_ns};
use crate::units::{CLUSTER_BYTES, CLUSTER_SECTORS, LayerId, SECTOR_BYTES, SectorMask};
use crate::verify::{Mismatch, sum_of};

/// Data of sealed layers that is known to be damaged.
#[derive(Debug, Default)]
pub(crate) struct Damage {
    /// What is known.
    known: Mutex<Known>,
}

/// What is known to be damaged.
#[derive(Debug, Default)]
struct Known {
    /// By layer; none that is whole.
    bad: BTreeMap<LayerId, Arc<SectorSet>>,
    /// Those of them of which all counts as damaged, since what was known is lost.
    lost: BTreeSet<LayerId>,
}

impl Damage {
    /// What is known, whatever happened to an earlier holder of the lock.
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of one layer.
    pub(crate) fn of(&self, layer: LayerId) -> Option<Arc<SectorSet>> {
        self.known().bad.get(&layer).cloned()
    }

    /// Whether nothing is damaged.
    pub(crate) fn is_none(&self) -> bool {
        self.known().bad.is_empty()
    }

    /// Whether it is not known what is damaged of a layer, so that all of it counts as such.
    pub(super) fn is_lost(&self, layer: LayerId) -> bool {
        self.known().lost.contains(&layer)
    }

    /// The layers of which that is not known.
    pub(crate) fn lost(&self) -> BTreeSet<LayerId> {
        self.known().lost.clone()
    }

    /// Of all.
    pub(crate) fn all(&self) -> Vec<(LayerId, Arc<SectorSet>)> {
        let known = self.known();
        let all = known.bad.iter();
        let all = all.map(|(layer, bad)| (*layer, Arc::clone(bad)));
        all.collect()
    }

    /// Bytes of one layer.
    pub(crate) fn bytes(&self, layer: LayerId) -> u64 {
        let bad = self.of(layer);
        bad.map_or(0, |bad| bad.data_sectors() * SECTOR_BYTES)
    }

    /// Replaces what is known of a layer.
    fn put(&self, layer: LayerId, bad: Option<Arc<SectorSet>>) {
        let mut known = self.known();
        known.lost.remove(&layer);
        match bad {
            Some(bad) => known.bad.insert(layer, bad),
            None => known.bad.remove(&layer),
        };
    }

    /// What was known of a layer is lost; this is all that it holds.
    fn put_lost(&self, layer: LayerId, all: Arc<SectorSet>) {
        let mut known = self.known();
        known.bad.insert(layer, all);
        known.lost.insert(layer);
    }

    /// Forgets layers that are gone.
    fn keep(&self, is_there: impl Fn(LayerId) -> bool) {
        let mut known = self.known();
        known.bad.retain(|layer, _| is_there(*layer));
        known.lost.retain(|layer| is_there(*layer));
    }
}

impl Store {
    /// What is known to be damaged of a sealed layer, from memory or from its file. All that it holds if the file is damaged;
    /// a scrub of it is due then.
    ///
    /// # Errors
    /// `Io`: nobody can know now. Of its map, if that is needed: `Corrupt`, `Unsupported`.
    pub(crate) fn look_for_bad(&self, layer: LayerId) -> Result<Option<Arc<SectorSet>>> {
        if let Some(bad) = self.damage.of(layer) {
            return Ok(Some(bad));
        }
        match badfile::read(&self.media, self.id(), layer) {
            Ok(None) => Ok(None),
            Ok(Some(bad)) => {
                let bad = Arc::new(bad);
                self.damage.put(layer, Some(Arc::clone(&bad)));
                Ok(Some(bad))
            }
            Err(error @ (Error::Corrupt { .. } | Error::Unsupported { .. })) => {
                self.lose_bad(layer, &error).map(Some)
            }
            Err(error) => Err(error),
        }
    }

    /// What is damaged of a layer is not known any more, so nothing of it is served. Returns all that it holds.
    fn lose_bad(&self, layer: LayerId, error: &Error) -> Result<Arc<SectorSet>> {
        let mut all = SectorSet::empty();
        for range in MapFile::read(&self.media, layer)?.set.data_runs() {
            let kind = RecordKind::Data;
            all.apply(&MapRecord { kind, range });
        }
        all.optimize();
        let all = Arc::new(all);
        self.damage.put_lost(layer, Arc::clone(&all));
        self.show_bad(layer, Some(Arc::clone(&all)));
        self.maintenance.note(format!(
            "layer {layer}: what an earlier scrub found damaged is not known any more, so all reads of it fail until it was \
             scrubbed, which is done by itself: {error}"
        ));
        self.want_sums([layer]);
        Ok(all)
    }

    /// Lets readers know what is damaged of a layer.
    fn show_bad(&self, layer: LayerId, bad: Option<Arc<SectorSet>>) {
        let known = self.inner().layers.get(&layer).and_then(Weak::upgrade);
        if let Some(known) = known {
            known.set_bad(bad);
        }
    }

    /// Forgets the damage of layers that are gone.
    pub(super) fn forget_gone(&self) {
        let inner = self.inner();
        let layers = &inner.catalog.state().layers;
        self.damage.keep(|layer| layers.contains_key(&layer));
    }

    /// Refuses to move data out of a layer, or over it, of which some is known to be damaged: what is moved would pass for
    /// good.
    pub(crate) fn check_undamaged(&self, layer: LayerId) -> Result<()> {
        self.look_for_bad(layer)?;
        self.check_still_undamaged(layer)
    }

    /// The same of a layer whose file was looked at: what was found since is in memory.
    pub(crate) fn check_still_undamaged(&self, layer: LayerId) -> Result<()> {
        let Some(bad) = self.damage.of(layer) else {
            return Ok(());
        };
        if self.damage.is_lost(layer) {
            return Err(Error::Corrupt {
                path: self.media.display_path(&bad_path(layer)),
                what: "what is damaged of its layer is not known until a scrub of that has ended, which is done by itself; \
                       then resume the job"
                    .into(),
            });
        }
        Err(Error::Corrupt {
            path: self.media.display_path(&data_path(layer)),
            what: format!(
                "{} bytes of it are known to be; restore them from a backup, scrub it (stratablk scrub), then resume the job",
                bad.data_sectors() * SECTOR_BYTES
            ),
        })
    }

    /// Remembers what is damaged of a layer, in place of what was known before: durably, then for readers. The caller holds
    /// the command lock.
    pub(super) fn set_bad(&self, layer: LayerId, bad: &SectorSet) -> Result<()> {
        let is_new = bad.data_sectors() > 0;
        let shown = is_new.then(|| Arc::new(bad.clone()));
        // For readers first: if it cannot be written, it is not served at least as long as this daemon lives.
        self.damage.put(layer, shown.clone());
        self.show_bad(layer, shown);
        badfile::write(&self.media, self.id(), layer, bad, now_ns())
    }

    /// Takes what the cache has of damaged sectors out of it: it may have been read from the file.
    pub(super) fn trim_bad(&self, layer: LayerId, bad: &SectorSet) {
        let Some(number) = self.cache.arena().numbers().find(layer) else {
            return;
        };
        for run in bad.data_runs() {
            let first = run.start.cluster();
            let end = run.end().0.div_ceil(CLUSTER_SECTORS);
            let count = end.saturating_sub(first.0);
            self.cache.trim(number, first, count, |_| SectorMask::NONE);
        }
    }

    /// Mends a cluster of a layer's file if the cache still has what was there. Returns whether it did: the file was written,
    /// synced and read again.
    pub(super) fn mend(
        &self,
        layer: LayerId,
        one: &Mismatch,
        read_again: impl Fn() -> Option<u32>,
    ) -> Result<bool> {
        let Some(number) = self.cache.arena().numbers().find(layer) else {
            return Ok(false);
        };
        let mut page = Page::zeroed();
        let key = FrameKey::new(number, one.cluster);
        let has = self.cache.copy_frame(key, &mut page);
        if !has.contains(one.held) || sum_of(&page.0, one.held) != one.expected {
            return Ok(false);
        }
        let path = data_path(layer);
        let file = self
            .media
            .open(&path, OpenMode::ReadWrite, false)
            .map_err(self.io("open", &path))?;
        self.write_held(&file, layer, one, &page)?;
        file.sync_data().map_err(self.io("sync", &path))?;
        // Where reads are not direct, so that the medium is asked.
        file.drop_cached().map_err(self.io("read", &path))?;
        Ok(read_again() == Some(one.expected))
    }

    /// Writes the sectors of a cluster that a layer holds.
    fn write_held(
        &self,
        file: &Arc<dyn File>,
        layer: LayerId,
        one: &Mismatch,
        page: &Page,
    ) -> Result<()> {
        for run in crate::cache::runs(one.held) {
            let bytes = page.0.get(run.offset()..run.offset() + run.bytes());
            let offset = one.cluster.0 * CLUSTER_BYTES + run.offset() as u64;
            file.write_at(bytes.unwrap_or_default(), offset)
                .map_err(self.io("write", &data_path(layer)))?;
        }
        Ok(())
    }
}
