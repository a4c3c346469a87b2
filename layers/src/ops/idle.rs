//! Commands that need a volume to themselves: nobody sends it requests while they run, and it is closed at their end.
//!
//! DURABILITY: the files of a new active layer are written and synced before the one catalog transaction of the command. What
//! it seals has been flushed before that transaction, and is sealed after it, by this command or by the next start. What it
//! throws away leaves the catalog in that transaction and is removed after it; the catalog remembers that it is doomed.

#[cfg(all(test, not(loom)))]
#[expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]
mod tests;

use std::sync::Arc;

use crate::canary::{self, Canary};
use crate::catalog::{CatalogState, Change, LayerState, VolumeRow};
use crate::error::{Error, Result};
use crate::layer::LayerMap;
use crate::mapfile::{MapFile, layer_dir};
use crate::store::{Inner, Store};
use crate::turns::Turn;
use crate::units::{LayerId, Sector};
use crate::volume::Volume;

use super::collect::span;
use super::create::Made;

/// What becomes of an active layer that another one replaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Replaced {
    /// It is thrown away.
    Discarded,
    /// It is sealed, with what it holds.
    Sealed,
}

/// A command under way. Nobody else's is until this is dropped.
#[derive(Debug)]
#[must_use = "the command is over when this is dropped"]
pub(crate) struct Command<'a> {
    /// The store.
    store: &'a Store,
    /// Its turn, which passes on after all else.
    _turn: Turn<'a>,
}

impl<'a> Command<'a> {
    /// Begins.
    pub(crate) fn new(store: &'a Store, turn: Turn<'a>) -> Self {
        Self { store, _turn: turn }
    }
}

impl Drop for Command<'_> {
    fn drop(&mut self) {
        self.store.inner().reserved.clear();
    }
}

impl Store {
    /// Refuses a volume that is open for requests. It stays unused until the end of the caller's command: whoever wants to
    /// open it waits for that.
    pub(crate) fn check_idle(&self, name: &str) -> Result<()> {
        let _write_back = self.write_back.hold();
        let mut inner = self.inner();
        inner.check_idle(name)?;
        inner.reserved.insert(name.to_owned());
        Ok(())
    }

    /// Makes everything that was written to an idle volume durable in the files of its layers.
    pub(crate) fn flush_idle(&self, row: &VolumeRow) -> Result<()> {
        let open = self.inner().open.get(&row.name).cloned();
        match open {
            Some(volume) => volume.flush_blocking(),
            None => {
                self.check_not_failed(row)?;
                self.settle_chain(row.active)
            }
        }
    }

    /// Before the active layer of an idle volume is thrown away: older layers of it that a failed snapshot could not seal
    /// keep what they hold, where somebody names them.
    pub(crate) fn flush_below(&self, row: &VolumeRow) -> Result<()> {
        let Some(volume) = self.inner().open.get(&row.name).cloned() else {
            return match self.is_sealing_below(row) {
                true => self.check_not_failed(row),
                false => Ok(()),
            };
        };
        let named = {
            let inner = self.inner();
            let state = inner.catalog.state();
            let chain = volume.newest_chain();
            chain
                .unsealed()
                .filter(|layer| layer.id() != row.active && !layer.is_sealed())
                .any(|layer| state.names_of(layer.id()).next().is_some())
        };
        if named {
            volume.flush_blocking()
        } else {
            Ok(())
        }
    }

    /// Writes what an earlier process left dirty of a chain.
    fn settle_chain(&self, top: LayerId) -> Result<()> {
        let rows: Vec<_> = {
            let inner = self.inner();
            let chain = inner.catalog.state().chain_of(top);
            chain.into_iter().cloned().collect()
        };
        rows.iter().try_for_each(|row| self.settle_left(row))
    }

    /// Makes an active layer over `parent` and adds the changes that put it in the place of the one that the volume has.
    pub(crate) fn replace_active(
        &self,
        row: &VolumeRow,
        parent: LayerId,
        size: Sector,
        old: Replaced,
        made: &mut Made,
        changes: &mut Vec<Change>,
    ) -> Result<()> {
        let (layer, new) = self.make_active_layer(&row.name, row.kind, Some(parent), size, made)?;
        changes.push(Change::AddLayer(new));
        if old == Replaced::Sealed {
            changes.push(Change::SetLayerState {
                layer: row.active,
                state: LayerState::Sealing,
            });
        }
        changes.push(Change::SetActive {
            volume: row.name.clone(),
            layer: layer.id(),
        });
        if size != row.size {
            changes.push(row.sized(size));
        }
        if old == Replaced::Discarded {
            changes.extend(jobs_into(self.inner().catalog.state(), &[row.active]));
            // What failed is thrown away.
            changes.push(Change::SetFailed {
                volume: row.name.clone(),
                cause: None,
            });
            changes.push(Change::RemoveLayer(row.active));
        }
        Ok(())
    }

    /// Commits the changes of a command that has these volumes to itself, closes them, and forgets and removes the layers
    /// that went. Before the commit nothing has changed.
    pub(crate) fn commit_idle(
        &self,
        volumes: &[&str],
        changes: &[Change],
        gone: &[LayerId],
    ) -> Result<()> {
        {
            // Nobody writes back meanwhile: a layer that goes is not worth it, and one that is sealed is clean.
            let _write_back = self.write_back.hold();
            let closed: Vec<Arc<Volume>> = {
                let mut inner = self.inner();
                volumes.iter().try_for_each(|name| inner.check_idle(name))?;
                if canary::is_set(Canary::RemoveBeforeCommit) {
                    for id in gone {
                        let dir = layer_dir(*id);
                        self.media
                            .remove_dir_all(&dir)
                            .map_err(self.io("remove", &dir))?;
                    }
                }
                inner.catalog.commit(changes)?;
                for id in gone {
                    inner.unsettled.remove(id);
                }
                volumes
                    .iter()
                    .filter_map(|name| inner.open.remove(*name))
                    .collect()
            };
            drop(closed);
            self.inner().forget_unused_layers();
            for id in gone {
                self.cache.forget(*id);
            }
        }
        let of_jobs = |change: &Change| matches!(change, Change::AddJob(_) | Change::RemoveJob(_));
        if changes.iter().any(of_jobs) {
            self.jobs.wake();
        }
        if !gone.is_empty() {
            self.remove_doomed();
        }
        Ok(())
    }

    /// Seals layers of closed volumes whose state is Sealing. What cannot be sealed now is sealed at the next start.
    pub(crate) fn seal_idle(&self, layers: &[LayerId]) {
        for id in layers {
            let row = self.inner().catalog.state().layers.get(id).cloned();
            if let Some(row) = row.filter(|row| row.state == LayerState::Sealing) {
                self.finish_sealing(&row);
            }
        }
    }

    /// Whether the active layer of a volume holds nothing at all: no data and no zeroes.
    pub(crate) fn active_is_empty(&self, row: &VolumeRow) -> Result<bool> {
        let open = self.inner().open.get(&row.name).cloned();
        if let Some(active) = open.and_then(|volume| volume.newest_chain().active().cloned()) {
            return Ok(match &**active.map() {
                LayerMap::Active(map) if !map.has_marks() => {
                    let set = map.to_set();
                    set.data_sectors() == 0 && set.zero_sectors() == 0
                }
                LayerMap::Active(_) | LayerMap::Sealed(_) => false,
            });
        }
        if self.inner().unsettled.contains_key(&row.active) {
            return Ok(false);
        }
        let set = MapFile::read(&self.media, row.active)?.set;
        Ok(set.data_sectors() == 0 && set.zero_sectors() == 0)
    }

    /// A volume's row.
    pub(crate) fn volume_row(&self, name: &str) -> Result<VolumeRow> {
        self.inner().catalog.state().volume(name).cloned()
    }
}

impl Inner {
    /// Refuses a volume that anybody but the store holds. The write-back thread is kept from holding any.
    pub(crate) fn check_idle(&self, name: &str) -> Result<()> {
        match self.open.get(name) {
            Some(volume) if Arc::strong_count(volume) > 1 => Err(Error::Busy {
                what: format!(
                    "volume {name:?} is in use by a machine; stop the machine, or detach the volume \
                     (stratablk volume detach {name})"
                ),
            }),
            _ => Ok(()),
        }
    }
}

/// The changes that end the jobs whose target is one of these layers, which go. A job's target is its topmost layer, and
/// nothing lies over a layer that goes but what goes as well: so these are all jobs that touch them. (A target of data
/// that goes into a base is never among them.)
pub(crate) fn jobs_into(state: &CatalogState, gone: &[LayerId]) -> Vec<Change> {
    gone.iter()
        .flat_map(|id| state.jobs_of(*id).filter(|job| job.target == *id))
        .map(|job| Change::RemoveJob(job.id))
        .collect()
}

/// These layers and what lies directly below them: what a command has touched that takes the first away.
pub(crate) fn with_parents(
    state: &CatalogState,
    layers: impl Iterator<Item = LayerId>,
) -> Vec<LayerId> {
    let mut touched: Vec<LayerId> = layers.collect();
    let jobs: Vec<LayerId> = (touched.iter())
        .flat_map(|id| state.jobs_of(*id))
        .flat_map(|job| span(state, job.source, job.target))
        .collect();
    touched.extend(jobs);
    let parent = |id: &LayerId| state.layers.get(id).and_then(|row| row.parent);
    let parents: Vec<LayerId> = touched.iter().filter_map(parent).collect();
    touched.extend(parents);
    touched.sort_unstable();
    touched.dedup();
    touched
}
