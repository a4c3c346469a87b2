//! The names in the maps of sealed layers, brought up to date.
//!
//! A sealed layer's map has the names that were true when it was sealed, and a catalog that is made anew believes them. That
//! does no harm while the layer is whole. Before anything is taken out of it, and before its volume's name may mean another
//! volume, the map must say what the catalog says.
//!
//! DURABILITY: the layer's checksums are told of the map that is to come, then that replaces the old one as a whole, by a
//! rename. A crash leaves the old names or the new ones, and checksums that belong to either.

use uuid::Uuid;

use crate::catalog::{JobId, LayerState};
use crate::error::{Error, Result};
use crate::mapfile::{MapFile, MapHeader, MapState, map_path};
use crate::store::Store;
use crate::sumfile;
use crate::units::LayerId;

use super::collect::jobs_on;

/// In which order the maps of a volume get another name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// So that its active layer has it if any has.
    ActiveFirst,
    /// So that its active layer has it only if all have.
    ActiveLast,
}

/// The largest map that is written anew while a command waits: that takes some 30 ms.
const AT_ONCE_BYTES_MAX: u64 = 1 << 20;

impl Store {
    /// Lets the map of a sealed layer name the snapshot that the catalog knows of, or none. The caller holds the command lock,
    /// and nobody else replaces the map.
    pub(crate) fn write_true_names(&self, layer: LayerId) -> Result<()> {
        let written = MapFile::read_header(&self.media, layer)?;
        if self.named_truly(written.clone()) == written {
            return Ok(());
        }
        let (map, header, set, _) = MapFile::open(&self.media, layer)?;
        let header = self.named_truly(header);
        sumfile::foresee(&self.media, layer, map.incarnation())?;
        MapFile::succeed(&self.media, &header, map.incarnation(), &set)?;
        self.show_header(layer, header);
        Ok(())
    }

    /// After the name of a layer has gone: lets its map no longer say it, if that takes no time. Otherwise the job does that
    /// which joins the layer. `new`: jobs that nobody has taken up yet. A failure is for the log.
    pub(crate) fn forget_name(&self, layer: LayerId, new: &[JobId]) {
        let (sealed, at_work) = {
            let inner = self.inner();
            let state = inner.catalog.state();
            let row = state.layers.get(&layer);
            let sealed = row.is_some_and(|row| row.state == LayerState::Sealed);
            let mut jobs = jobs_on(state, layer).into_iter();
            (sealed, jobs.any(|job| !new.contains(&job.id)))
        };
        if !sealed || at_work {
            return;
        }
        let path = map_path(layer);
        let written = (self.media.stat(&path).map_err(self.io("stat", &path))).and_then(|stat| {
            if stat.len <= AT_ONCE_BYTES_MAX {
                self.write_true_names(layer)?;
            }
            Ok(())
        });
        if let Err(error) = written {
            self.maintenance.note(format!(
                "layer {layer}: its map has the name of a deleted snapshot until it is joined with another: {error}"
            ));
        }
    }

    /// Lets the maps of the layers from `top` down of volume `from` say `to`. The volume is closed, and all that was
    /// written to it is flushed. The caller holds the command lock.
    pub(crate) fn rename_in_maps(
        &self,
        top: LayerId,
        from: &str,
        to: &str,
        order: Order,
    ) -> Result<()> {
        let mut chain: Vec<LayerId> = {
            let inner = self.inner();
            let chain = inner.catalog.state().chain_of(top);
            chain.into_iter().map(|row| row.id).collect()
        };
        if order == Order::ActiveFirst {
            chain.reverse();
        }
        for layer in chain {
            let written = MapFile::read_header(&self.media, layer)?;
            // One that is still to be sealed gets its names then.
            if written.volume != from || (layer != top && written.state == MapState::Active) {
                continue;
            }
            let inner = self.inner();
            let job = jobs_on(inner.catalog.state(), layer)
                .first()
                .map(|job| job.id.0);
            drop(inner);
            if let Some(job) = job {
                return Err(Error::Busy {
                    what: format!(
                        "job {job} works on a layer of volume {from:?}; wait for it (stratablk job wait {job})"
                    ),
                });
            }
            let (map, mut header, set, _) = MapFile::open(&self.media, layer)?;
            if header.state == MapState::Sealed {
                header = self.named_truly(header);
            }
            to.clone_into(&mut header.volume);
            sumfile::foresee(&self.media, layer, map.incarnation())?;
            map.replace(&self.media, &header, &set)?;
            self.show_header(layer, header);
        }
        Ok(())
    }

    /// Lets those that have a layer open know what its map says now.
    fn show_header(&self, layer: LayerId, header: MapHeader) {
        let known = self.inner().layers.get(&layer).cloned();
        if let Some(known) = known.and_then(|known| known.upgrade()) {
            known.set_header(header);
        }
    }

    /// A header with the snapshot that the catalog knows of, or none.
    fn named_truly(&self, mut header: MapHeader) -> MapHeader {
        let inner = self.inner();
        let rows: Vec<_> = inner.catalog.state().names_of(header.layer).collect();
        let mut names = rows.iter().map(|row| (&row.volume, &row.name));
        if names.any(|is| is == (&header.volume, &header.snapshot)) {
            return header;
        }
        match rows.first() {
            Some(row) => {
                header.volume.clone_from(&row.volume);
                header.snapshot.clone_from(&row.name);
                header.group = row.group;
                header.snapshot_ns = row.created_ns;
            }
            None => {
                header.snapshot.clear();
                header.group = Uuid::nil();
                header.snapshot_ns = 0;
            }
        }
        header
    }
}
