//! Taking over what a process that was killed has left in the cache's arena.
//!
//! Clean frames stay as they are, but for those of layers to whose files something was being written past the cache
//! (`flush::through`). Dirty frames hold writes that were acknowledged and are in no file: each is entered into its
//! layer's map, written, and committed, before the layer is used for anything else. So a crash in the middle of it changes
//! nothing, and nothing else has to know that there was one.

use std::collections::BTreeMap;

use crate::cache::access::Clean;
use crate::cache::set::FrameKey;
use crate::cache::staging::Page;
use crate::catalog::{LayerRow, LayerState};
use crate::error::{Error, Result};
use crate::flush;
use crate::layer::LayerMap;
use crate::store::Store;
use crate::units::{Cluster, LayerId, SectorMask};

impl Store {
    /// Puts the arena in order and settles its dirty frames. What cannot be settled now stays where it is, and its volumes
    /// refuse to open; the others go on.
    pub(crate) fn adopt_frames(&self) {
        let mut left: BTreeMap<LayerId, Vec<(Cluster, SectorMask)>> = BTreeMap::new();
        let mut frames = 0;
        let past = self.cache.past();
        {
            let inner = self.inner();
            let layers = &inner.catalog.state().layers;
            let known = |number| {
                let layer = self.cache.layer(number);
                layer.is_some_and(|layer| layers.contains_key(&layer))
            };
            self.cache.sets().recover(known, &past, |key, dirty| {
                if let Some(layer) = self.cache.layer(key.layer()) {
                    left.entry(layer).or_default().push((key.cluster(), dirty));
                    frames += 1;
                }
            });
        }
        for number in past {
            // What stays marked costs frames at the next start, and nothing else.
            if let Err(error) = self.cache.set_past(number, false) {
                self.maintenance.note(format!("the cache: {error}"));
            }
        }
        self.cache.dirtied(frames);
        if frames > 0 {
            self.maintenance.note(format!(
                "took over {frames} clusters of {} layers that were written and not yet in their files when the last \
                 daemon ended",
                left.len()
            ));
        }
        let mut rows: Vec<LayerRow> = {
            let inner = self.inner();
            let layers = &inner.catalog.state().layers;
            left.keys()
                .filter_map(|layer| layers.get(layer).cloned())
                .collect()
        };
        // Older layers first, as in a flush.
        rows.sort_by_key(|row| self.cache.arena().numbers().find(row.id));
        self.inner().unsettled = left;
        for row in rows {
            if let Err(error) = self.settle_left(&row) {
                self.maintenance.note(format!(
                    "layer {}: what was left in the cache cannot be written now: {error}",
                    row.id
                ));
            }
        }
    }

    /// Writes and commits what an earlier process left dirty of a layer, if there is anything.
    ///
    /// # Errors
    /// `Io` and what opening the layer may answer. It can be tried again.
    pub(crate) fn settle_left(&self, row: &LayerRow) -> Result<()> {
        let Some(mut left) = self.inner().unsettled.get(&row.id).cloned() else {
            return Ok(());
        };
        left.sort_unstable_by_key(|(cluster, _)| cluster.0);
        self.settle(row, &left)?;
        self.inner().unsettled.remove(&row.id);
        Ok(())
    }

    /// The same, for what is known to be there.
    fn settle(&self, row: &LayerRow, left: &[(Cluster, SectorMask)]) -> Result<()> {
        if row.state == LayerState::Sealed {
            return self.clean_sealed(row, left);
        }
        let layer = std::sync::Arc::new(self.load_layer(row)?);
        match &**layer.map() {
            LayerMap::Active(map) => {
                for (cluster, dirty) in left.iter().filter(|(at, _)| at.0 < map.clusters()) {
                    // Whether it is new to the map or not: it is dirty, and so it is written.
                    let _ = map.write_cluster(*cluster, *dirty, true);
                }
            }
            LayerMap::Sealed(_) => return self.clean_sealed(row, left),
        }
        let works = flush::look([&layer].into_iter(), usize::MAX);
        flush::carry_out(&self.cache, &works, true).map_err(|error| Error::Io {
            op: "write back",
            path: self.media.display_path(&crate::mapfile::data_path(row.id)),
            source: error.into_inner(),
        })
    }

    /// The frames of a layer that is sealed are in its file: it was sealed after they had been written.
    fn clean_sealed(&self, row: &LayerRow, left: &[(Cluster, SectorMask)]) -> Result<()> {
        let number = self.cache.number(row.id)?;
        let mut page = Page::zeroed();
        for (cluster, _) in left {
            let key = FrameKey::new(number, *cluster);
            if let Some(copied) = self.cache.copy_dirty(key, &mut page) {
                let clean = self.cache.clean(&copied);
                debug_assert_eq!(clean, Clean::Cleaned, "nobody else uses the arena yet");
            }
        }
        Ok(())
    }
}
