//! Volumes that have failed, over the end of the daemon, and their recovery.
//!
//! A write or sync that fails leaves it open what the medium holds: the host may have dropped what it could not write, and
//! says so once only. So the volume takes no more writes and no flush of it succeeds, until it is recovered or what it holds
//! is thrown away. A failure is latched in memory, marked in the arena, which the next process of the same boot finds, and
//! then written to the catalog, by another thread, since those who write to files open none. A host that goes down
//! before that leaves nothing to be forgotten: what is read afterwards is what the medium holds.
//!
//! DURABILITY, of a recovery, for each layer that takes writes, oldest first:
//! 1. all that its map's file says it holds, and what is dirty in the cache, is written again, from the cache where that has
//!    it, else from what the host reads. The map in memory would not do: it speaks of data that a job has brought and not
//!    committed, which may be lost here and is still where it came from;
//! 2. the data is synced;
//! 3. its map is replaced by one checkpoint of all that, synced; only then its frames are clean.
//!
//! After all of them the catalog forgets the failure, and then the arena does; a crash before that leaves the volume failed.

use std::collections::BTreeSet;

use crate::cache::access::Clean;
use crate::cache::runs;
use crate::cache::set::FrameKey;
use crate::cache::staging::Page;
use crate::catalog::{Catalog, CatalogState, Change, LayerRow, LayerState, VolumeRow};
use crate::error::{Error, Result};
use crate::layer::{Layer, LayerMap};
use crate::lifecycle::RecoverReport;
use crate::map::{MapRecord, RecordKind, SectorSet};
use crate::mapfile::{MapFile, data_path};
use crate::store::Store;
use crate::units::{Cluster, LayerId, SECTOR_BYTES, Sector, SectorMask, SectorRange};
use crate::volume::Volume;

/// Sectors that are written at once.
const CHUNK_SECTORS: u64 = 2048;
/// Bytes of a sector, as a length in memory.
const SECTOR_LEN: usize = 512;
/// Unreadable ranges that are told.
const UNREADABLE_MAX: usize = 1000;
/// Why a volume has failed of which nobody knows more.
const MARKED: &str = "a write or a sync failed before the last daemon ended";

impl Store {
    /// Writes to the catalog which open volumes have failed. Where that fails it says so, the arena still knows, and whoever
    /// maintains the store tries it again.
    pub fn record_failures(&self) {
        let mut inner = self.inner();
        let state = inner.catalog.state();
        let unknown = |name: &String| {
            let row = state.volumes.get(name);
            row.is_some_and(|row| row.failed.is_none())
        };
        let changes: Vec<Change> = inner
            .open
            .iter()
            .filter(|(name, _)| unknown(name))
            .filter_map(|(name, volume)| Some(set_failed(name, Some(volume.failure()?))))
            .collect();
        let committed = commit_some(&mut *inner.catalog, &changes);
        drop(inner);
        let news = self.maintenance.recorded(committed.is_ok());
        if let Err(error) = committed
            && news
        {
            self.maintenance.note(format!(
                "which volumes have failed cannot be written to the catalog now, and is tried again: {error}"
            ));
        }
    }

    /// Writes to the catalog which volumes have failed as the arena says that was found.
    pub(crate) fn record_marked(&self) {
        let marked = self.only_marked();
        let changes: Vec<Change> = marked
            .iter()
            .map(|name| set_failed(name, Some(MARKED.into())))
            .collect();
        for name in &marked {
            self.maintenance.failed(name, MARKED);
        }
        let committed = commit_some(&mut *self.inner().catalog, &changes);
        if let Err(error) = committed {
            // The marks are asked as long as there is no more.
            self.maintenance.note(format!(
                "which volumes have failed cannot be written to the catalog now: {error}"
            ));
        }
    }

    /// Volumes of which only the arena says that they have failed.
    pub(crate) fn only_marked(&self) -> Vec<String> {
        let marked: BTreeSet<LayerId> = self.cache.failed().into_iter().collect();
        if marked.is_empty() {
            return Vec::new();
        }
        let inner = self.inner();
        let state = inner.catalog.state();
        let rows = state.volumes.values().filter(|row| row.failed.is_none());
        rows.filter(|row| unsealed(state, row).any(|layer| marked.contains(&layer)))
            .map(|row| row.name.clone())
            .collect()
    }

    /// Whether the cache holds nothing that is nowhere else, but what is dirty of open volumes.
    pub(crate) fn may_lose_cache(&self) -> bool {
        self.inner().unsettled.is_empty() && self.only_marked().is_empty()
    }

    /// Why a volume has failed that is not open.
    pub(crate) fn failure_of(&self, row: &VolumeRow) -> Option<String> {
        if row.failed.is_some() {
            return row.failed.clone();
        }
        let marked = self.cache.failed();
        if marked.is_empty() {
            return None;
        }
        let inner = self.inner();
        let mut layers = unsealed(inner.catalog.state(), row);
        layers
            .any(|layer| marked.contains(&layer))
            .then(|| MARKED.to_owned())
    }

    /// Refuses a volume that has failed and is not open.
    pub(crate) fn check_not_failed(&self, row: &VolumeRow) -> Result<()> {
        match self.failure_of(row) {
            None => Ok(()),
            Some(cause) => Err(Error::Failed {
                volume: row.name.clone(),
                cause,
            }),
        }
    }

    /// Whether a layer below the active one of a volume waits to be sealed.
    pub(crate) fn is_sealing_below(&self, row: &VolumeRow) -> bool {
        let inner = self.inner();
        let mut layers = unsealed(inner.catalog.state(), row);
        layers.any(|layer| layer != row.active)
    }

    /// Refuses a layer that is not sealed yet while a volume over it has failed: nobody knows whether its file has all that
    /// its map says.
    pub(crate) fn check_no_failure_over(&self, layer: LayerId) -> Result<()> {
        let marked = self.cache.failed().contains(&layer);
        let inner = self.inner();
        let state = inner.catalog.state();
        let found = state.volumes.values().find(|row| {
            let open = inner.open.get(&row.name);
            let failed = row.failed.is_some() || open.is_some_and(|open| open.has_failed());
            (failed || marked) && unsealed(state, row).any(|id| id == layer)
        });
        match found {
            None => Ok(()),
            Some(row) => Err(Error::Failed {
                volume: row.name.clone(),
                cause: row.failed.clone().unwrap_or_else(|| MARKED.into()),
            }),
        }
    }

    /// Takes snapshots back that were under way when one of their volumes failed: whole or not at all. Their layers stay,
    /// without a name. A snapshot that was acknowledged has none of these layers.
    pub(crate) fn forget_unfinished(&self, sealing: &[LayerRow]) {
        let failed = |row: &&LayerRow| self.check_no_failure_over(row.id).is_err();
        let layers: Vec<LayerId> = sealing.iter().filter(failed).map(|row| row.id).collect();
        if layers.is_empty() {
            return;
        }
        let mut inner = self.inner();
        let state = inner.catalog.state();
        let groups: BTreeSet<uuid::Uuid> = layers
            .iter()
            .flat_map(|layer| state.names_of(*layer))
            .map(|row| row.group)
            .collect();
        let rows = state.snapshots.iter();
        let changes: Vec<Change> = rows
            .filter(|row| groups.contains(&row.group))
            .map(|row| Change::RemoveSnapshot {
                volume: row.volume.clone(),
                name: row.name.clone(),
            })
            .collect();
        if changes.is_empty() {
            return;
        }
        match inner.catalog.commit(&changes) {
            Ok(()) => self.maintenance.note(format!(
                "{} snapshots were not taken, since a volume failed while they were under way",
                changes.len()
            )),
            Err(error) => self.maintenance.note(format!(
                "snapshots that were under way when a volume failed cannot be taken back now: {error}"
            )),
        }
    }

    /// Lets a volume that has failed take writes again: all that it holds since its last snapshot is written once more, and
    /// synced. What the host has lost meanwhile cannot be got back, and nobody can tell what that is, so it is for the caller
    /// to look at the disk afterwards as after a power cut.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` if the volume has not failed; `Busy` while it is in use; `Io` if the host fails again: then it
    /// stays as it is, and this can be tried again.
    pub fn recover_volume(&self, name: &str) -> Result<RecoverReport> {
        let _command = self.command();
        self.check_idle(name)?;
        let row = self.volume_row(name)?;
        let volume = self.open_volume_in_command(name)?;
        let Some(cause) = volume.failure() else {
            return Err(Error::Invalid {
                field: "volume",
                what: format!("{name} has not failed; there is nothing to recover"),
            });
        };
        let mut report = RecoverReport {
            cause,
            ..RecoverReport::default()
        };
        volume.lead_blocking();
        let written = self.write_again(&volume, &mut report);
        volume.flushes().finish_blocking();
        written?;
        let layers: Vec<LayerId> = {
            let inner = self.inner();
            unsealed(inner.catalog.state(), &row).collect()
        };
        drop(volume);
        self.commit_idle(&[name], &[set_failed(name, None)], &[])?;
        for layer in &layers {
            if let Some(number) = self.cache.arena().numbers().find(*layer) {
                // Frames may hold what a job had brought and the host has lost: its next try writes to the file.
                let dirty = self.cache.sets().drop_layer(number);
                self.cache.cleaned(dirty);
                self.cache.set_failed(number, false)?;
            }
        }
        self.seal_idle(&layers);
        self.collect_after(&layers);
        Ok(report)
    }

    /// Steps 1 to 3 for all layers of a volume that take writes, or did.
    fn write_again(&self, volume: &Volume, report: &mut RecoverReport) -> Result<()> {
        let chain = volume.newest_chain();
        for layer in chain.unsealed() {
            let map = layer.map_full();
            let LayerMap::Active(map) = &*map else {
                continue;
            };
            let mut set = MapFile::read(&self.media, layer.id())?.set;
            let dirty = self.dirty_in(layer, &map.to_set());
            for range in &dirty {
                set.apply(&MapRecord {
                    kind: RecordKind::Data,
                    range: *range,
                });
            }
            for run in set.data_runs() {
                self.write_run_again(layer, run, report)?;
            }
            let path = data_path(layer.id());
            layer.sync_data().map_err(self.io("sync", &path))?;
            let incarnation = layer.journal().as_ref().map_or(0, MapFile::incarnation);
            let header = (*layer.header()).clone();
            let file = MapFile::succeed(&self.media, &header, incarnation, &set)?;
            *layer.journal() = Some(file);
            self.clean_frames(layer, &set)?;
        }
        Ok(())
    }

    /// The dirty sectors of a layer that holds these.
    fn dirty_in(&self, layer: &Layer, held: &SectorSet) -> Vec<SectorRange> {
        let mut page = Page::zeroed();
        let mut found = Vec::new();
        for cluster in clusters_of(held) {
            let key = FrameKey::new(layer.number(), cluster);
            let copied = self.cache.copy_dirty(key, &mut page);
            for run in copied.into_iter().flat_map(|copied| runs(copied.dirty)) {
                let start = Sector(cluster.first_sector().0 + u64::from(run.first));
                found.extend(SectorRange::new(start, u64::from(run.count)));
            }
        }
        found
    }

    /// Step 1 for some sectors.
    fn write_run_again(
        &self,
        layer: &Layer,
        run: SectorRange,
        report: &mut RecoverReport,
    ) -> Result<()> {
        let path = data_path(layer.id());
        let mut at = run.start.0;
        let end = run.end().0;
        while at < end {
            // Up to a multiple, so that no cluster is in two of them.
            let next = (at / CHUNK_SECTORS + 1) * CHUNK_SECTORS;
            let count = next.min(end) - at;
            let mut piece = Chunk::read(layer, Sector(at), count);
            piece.overlay(self, layer);
            for (range, bytes) in piece.known() {
                let written = layer.data().write_at(bytes, range.start.0 * SECTOR_BYTES);
                written.map_err(self.io("write", &path))?;
                report.written_bytes += range.count * SECTOR_BYTES;
            }
            for range in piece.unknown() {
                report.unreadable_bytes += range.count * SECTOR_BYTES;
                if report.unreadable.len() < UNREADABLE_MAX {
                    report.unreadable.push(range);
                }
            }
            at += count;
        }
        Ok(())
    }

    /// Step 3, second half: all that is dirty of a layer is in its file and map.
    fn clean_frames(&self, layer: &Layer, set: &SectorSet) -> Result<()> {
        let mut page = Page::zeroed();
        for cluster in clusters_of(set) {
            let key = FrameKey::new(layer.number(), cluster);
            let Some(copied) = self.cache.copy_dirty(key, &mut page) else {
                continue;
            };
            if self.cache.clean(&copied) == Clean::Changed {
                return Err(Error::Busy {
                    what: format!("layer {} was written to meanwhile", layer.id()),
                });
            }
        }
        Ok(())
    }
}

/// Commits changes, if there are any.
fn commit_some(catalog: &mut dyn Catalog, changes: &[Change]) -> Result<()> {
    match changes {
        [] => Ok(()),
        changes => catalog.commit(changes),
    }
}

/// The clusters that data of a set lies in; one may come up twice.
fn clusters_of(set: &SectorSet) -> impl Iterator<Item = Cluster> {
    set.data_runs().flat_map(|run| {
        let last = Sector(run.end().0.saturating_sub(1)).cluster();
        (run.start.cluster().0..=last.0).map(Cluster)
    })
}

/// Some sectors of a layer, as far as they are known.
struct Chunk {
    /// The first.
    start: Sector,
    /// Their bytes.
    bytes: Vec<u8>,
    /// Which of them are known.
    known: Vec<bool>,
}

impl Chunk {
    /// What the layer's file says; where a part cannot be read, sector by sector.
    fn read(layer: &Layer, start: Sector, count: u64) -> Self {
        let count = usize::try_from(count).unwrap_or(0);
        let mut bytes = vec![0; count * SECTOR_LEN];
        let mut known = vec![true; count];
        let offset = start.0 * SECTOR_BYTES;
        if layer.data().read_at(&mut bytes, offset).is_err() {
            let sectors = bytes.chunks_mut(SECTOR_LEN).zip(&mut known);
            for (at, (sector, known)) in (start.0..).zip(sectors) {
                *known = layer.data().read_at(sector, at * SECTOR_BYTES).is_ok();
            }
        }
        Self {
            start,
            bytes,
            known,
        }
    }

    /// What the cache has is what was written last, and is taken in its place.
    fn overlay(&mut self, store: &Store, layer: &Layer) {
        let mut page = Page::zeroed();
        let mut last = None;
        let mut valid = SectorMask::NONE;
        let sectors = self.bytes.chunks_mut(SECTOR_LEN).zip(&mut self.known);
        for (at, (bytes, known)) in (self.start.0..).map(Sector).zip(sectors) {
            let cluster = at.cluster();
            if last != Some(cluster) {
                last = Some(cluster);
                let key = FrameKey::new(layer.number(), cluster);
                valid = store.cache.copy_frame(key, &mut page);
            }
            let within = at.index_in_cluster();
            let mask = SectorMask::span(within, 1);
            let place = page.0.chunks(SECTOR_LEN).nth(within as usize);
            if let Some(place) = place.filter(|_| valid.contains(mask)) {
                bytes.copy_from_slice(place);
                *known = true;
            }
        }
    }

    /// Runs of sectors that are known, with their bytes.
    fn known(&self) -> impl Iterator<Item = (SectorRange, &[u8])> {
        self.runs(true).filter_map(|(first, range)| {
            let count = usize::try_from(range.count).ok()?;
            let bytes = self
                .bytes
                .get(first * SECTOR_LEN..(first + count) * SECTOR_LEN)?;
            Some((range, bytes))
        })
    }

    /// Runs of sectors that are not.
    fn unknown(&self) -> impl Iterator<Item = SectorRange> {
        self.runs(false).map(|(_, range)| range)
    }

    /// Runs of sectors that are known, or not, with the number of the first in the chunk.
    fn runs(&self, known: bool) -> impl Iterator<Item = (usize, SectorRange)> {
        let mut first = 0;
        self.known.chunk_by(|a, b| a == b).filter_map(move |run| {
            let at = first;
            first += run.len();
            let start = Sector(self.start.0 + at as u64);
            let range = SectorRange::new(start, run.len() as u64)?;
            (run.first() == Some(&known)).then_some((at, range))
        })
    }
}

/// The change that says why a volume takes no more writes.
fn set_failed(volume: &str, cause: Option<String>) -> Change {
    Change::SetFailed {
        volume: volume.to_owned(),
        cause,
    }
}

/// The layers of a volume that are not sealed: the active one, and those below it that wait for that.
fn unsealed(state: &CatalogState, row: &VolumeRow) -> impl Iterator<Item = LayerId> {
    let chain = state.walk(Some(row.active));
    chain
        .filter(|layer| layer.state != LayerState::Sealed)
        .map(|layer| layer.id)
}
