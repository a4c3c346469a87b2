//! Opening: layers from their files, volumes from their layers, and what a crash interrupted.
//!
//! DURABILITY: a layer found in the state Sealing belongs to a snapshot whose catalog transaction was committed; its map
//! (checkpoint and journal up to the last commit record) is all there is, so it is written as a sealed map, and the
//! catalog follows.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Weak};

use crate::catalog::{Change, JobKind, LayerRow, LayerState, VolumeKind};
use crate::chain::Chain;
use crate::check::{base_change, cut_off};
use crate::error::{Error, Result};
use crate::file::{File, OpenMode};
use crate::layer::{Layer, LayerMap};
use crate::map::{ActiveMap, SectorSet, Table};
use crate::mapfile::{
    LAYERS_DIR, LayerKind, MapFile, MapHeader, MapState, RawBase, data_path, layer_dir, map_path,
    sync_name,
};
use crate::store::{Inner, Store};
use crate::units::{
    CLUSTER_SECTORS, Cluster, LayerId, LayerSlot, SECTOR_BYTES, Sector, SectorMask,
};
use crate::volume::{Shared, Volume};

impl Store {
    /// Opens a volume for requests: builds its resolve table. All openers share one. One that is open already is given at
    /// once, whatever command is under way, unless that needs it for itself.
    ///
    /// # Errors
    /// `NotFound`, `BaseChanged`, `Corrupt`, `Unsupported`, `Io`.
    pub fn open_volume(&self, name: &str) -> Result<Arc<Volume>> {
        {
            let inner = self.inner();
            if let Some(volume) = inner.open.get(name)
                && !inner.reserved.contains(name)
            {
                return Ok(Arc::clone(volume));
            }
        }
        let _command = self.command();
        self.open_volume_in_command(name)
    }

    /// As `open_volume`, for a caller who holds the command lock.
    pub(crate) fn open_volume_in_command(&self, name: &str) -> Result<Arc<Volume>> {
        let (row, rows, mut known) = {
            let inner = self.inner();
            if let Some(volume) = inner.open.get(name) {
                return Ok(Arc::clone(volume));
            }
            let state = inner.catalog.state();
            let row = state.volume(name)?.clone();
            let rows: Vec<LayerRow> = state.chain_of(row.active).into_iter().cloned().collect();
            let known: HashMap<LayerId, Weak<Layer>> = rows
                .iter()
                .filter_map(|row| Some((row.id, Weak::clone(inner.layers.get(&row.id)?))))
                .collect();
            (row, rows, known)
        };
        for row in &rows {
            self.settle_left(row)?;
        }
        let layers = rows
            .iter()
            .map(|row| self.layer(row, &mut known))
            .collect::<Result<Vec<_>>>()?;
        let table = build_table(row.size, &layers);
        let chain = Chain::new(self.clock.now(), layers);
        let volume = Arc::new(Volume::new(
            name,
            row.size,
            table,
            chain,
            Shared {
                clock: Arc::clone(&self.clock),
                media: Arc::clone(&self.media),
                maintenance: Arc::clone(&self.maintenance),
                cache: Arc::clone(&self.cache),
            },
        ));
        if let Some(cause) = self.failure_of(&row) {
            volume.had_failed(cause);
        }
        self.write_back.add(&volume);
        let mut inner = self.inner();
        inner.layers.extend(known);
        inner.open.insert(name.to_owned(), Arc::clone(&volume));
        Ok(volume)
    }

    /// Flushes a volume and closes it, if only the store itself still holds it. One that has failed stays open, so that its
    /// failure is not forgotten by detaching it.
    ///
    /// # Errors
    /// `Failed` if what was written could not be flushed.
    pub(crate) fn close_volume(&self, name: &str) -> Result<()> {
        let Some(volume) = self.inner().open.get(name).cloned() else {
            return Ok(());
        };
        let flushed = volume.flush_blocking();
        // What became dirty since must keep its marks.
        if flushed.is_ok() {
            self.forget_clean(name, volume);
        }
        flushed
    }

    /// Closes a volume that was flushed, if only the store and the caller hold it, and nothing was written to it since.
    fn forget_clean(&self, name: &str, volume: Arc<Volume>) {
        let _write_back = self.write_back.hold();
        let mut inner = self.inner();
        // With `inner` held nobody gets hold of it any more; who did before may have written and gone again.
        if Arc::strong_count(&volume) > 2 || volume.is_dirty() {
            return;
        }
        inner.open.remove(name);
        drop(volume);
        inner.forget_unused_layers();
    }

    /// A layer, from memory if an open volume uses it, else from its files.
    pub(crate) fn layer(
        &self,
        row: &LayerRow,
        known: &mut HashMap<LayerId, Weak<Layer>>,
    ) -> Result<Arc<Layer>> {
        if let Some(layer) = known.get(&row.id).and_then(Weak::upgrade) {
            return Ok(layer);
        }
        let layer = Arc::new(self.load_layer(row)?);
        known.insert(row.id, Arc::downgrade(&layer));
        Ok(layer)
    }

    /// Opens the files of a layer.
    pub(crate) fn load_layer(&self, row: &LayerRow) -> Result<Layer> {
        let (journal, header, set, recovery) = MapFile::open(&self.media, row.id)?;
        let (journal, header, set) = self.fit(row, journal, header, set)?;
        self.check_header(row, &header)?;
        let number = self.cache.number(row.id)?;
        if let LayerKind::RawBase(base) = &header.kind {
            let data = self.open_base(row.id, base)?;
            return Ok(Layer::sealed(header, number, data, set));
        }
        let path = data_path(row.id);
        let sealed = header.state == MapState::Sealed;
        let mode = if sealed {
            OpenMode::ReadOnly
        } else {
            OpenMode::ReadWrite
        };
        let data = self
            .media
            .open(&path, mode, self.options.direct_io)
            .map_err(self.io("open", &path))?;
        // What a file lacks reads as zeroes, which nobody wrote.
        let len = data.len().map_err(self.io("look at", &path))?;
        if let Some(what) = cut_off(&set, row.size, len) {
            return Err(Error::Corrupt {
                path: self.media.display_path(&path),
                what: format!("it {what}"),
            });
        }
        if sealed {
            let layer = Layer::sealed(header, number, data, set);
            layer.set_bad(self.look_for_bad(row.id)?);
            return Ok(layer);
        }
        if recovery.dropped_bytes > 0 {
            self.maintenance.note(format!(
                "layer {} of volume {}: dropped {} bytes behind the last commit record of its journal (epoch {}): \
                 writes that no flush had covered when the host went down",
                row.id, header.volume, recovery.dropped_bytes, recovery.epoch.0
            ));
        }
        let map = ActiveMap::from_set(clusters(row.size), &set);
        let layer = Layer::active(header, number, data, map, journal);
        // DURABILITY: a daemon that was killed may have left written data in the host's page cache. It is seen by reads from
        // now on, so the first flush has to sync it.
        layer.mark_unsynced();
        Ok(layer)
    }

    /// A map file must be the one that the catalog means.
    fn check_header(&self, row: &LayerRow, header: &MapHeader) -> Result<()> {
        let mismatch = |what: String| Error::Corrupt {
            path: self.media.display_path(&map_path(row.id)),
            what,
        };
        if header.store != self.id() {
            return Err(mismatch(format!(
                "it belongs to store {}, not {}",
                header.store,
                self.id()
            )));
        }
        if header.layer != row.id {
            return Err(mismatch(format!(
                "it describes layer {}, not {}",
                header.layer, row.id
            )));
        }
        let may_have_parent = || {
            let inner = self.inner();
            let state = inner.catalog.state();
            state.may_have_parent(row.id, header.parent)
        };
        if header.parent != row.parent && !may_have_parent() {
            return Err(mismatch(
                "its parent is not the one that the catalog names".into(),
            ));
        }
        let (active, sealed) = (
            header.state == MapState::Active,
            header.state == MapState::Sealed,
        );
        if row.state == LayerState::Active && !active || row.state == LayerState::Sealed && !sealed
        {
            // An older catalog is in the place of the newer one: what was written since is in a layer that it does not know.
            return Err(mismatch(format!(
                "its layer is {:?}, the catalog says {:?}; if the catalog is an old copy, make a new one with `check \
                 --rebuild-catalog`",
                header.state, row.state
            )));
        }
        if header.size != row.size {
            return Err(mismatch(format!(
                "its disk has {} sectors, the catalog says {}",
                header.size, row.size
            )));
        }
        Ok(())
    }

    /// Opens a raw base, which must be the file that the store remembers.
    fn open_base(&self, layer: LayerId, base: &RawBase) -> Result<Arc<dyn File>> {
        let file = self
            .media
            .open(&base.path, OpenMode::ReadOnly, self.options.direct_io)
            .map_err(self.io("open base", &base.path))?;
        // First, so that nobody changes it after the look.
        self.lock_base(&file, &base.path, false)?;
        self.check_base(layer, base)?;
        Ok(file)
    }

    /// Locks a raw base that is open, so that other daemons do not write to it meanwhile, or not use it at all.
    pub(crate) fn lock_base(&self, file: &Arc<dyn File>, path: &Path, alone: bool) -> Result<()> {
        match file.lock(alone) {
            Ok(true) => Ok(()),
            Ok(false) => {
                self.maintenance.note(format!(
                    "base {}: its file system has no locks, so nobody can tell whether another daemon uses it",
                    path.display()
                ));
                Ok(())
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Err(Error::Busy {
                what: match alone {
                    true => format!(
                        "{} is used by another daemon or program, whose disks would change; stop that first",
                        path.display()
                    ),
                    false => format!(
                        "another daemon or program writes to {}; wait until it has ended",
                        path.display()
                    ),
                },
            }),
            Err(error) => Err(self.io("lock", path)(error)),
        }
    }

    /// Refuses a raw base that is not the file that the store remembers.
    fn check_base(&self, layer: LayerId, base: &RawBase) -> Result<()> {
        {
            // The store itself is writing to it, or was.
            let inner = self.inner();
            let mut jobs = inner.catalog.state().jobs.values();
            if jobs.any(|job| job.kind == JobKind::IntoBase && job.source == layer) {
                return Ok(());
            }
        }
        let stat = self
            .media
            .stat(&base.path)
            .map_err(self.io("open base", &base.path))?;
        match base_change(base, &stat) {
            None => Ok(()),
            Some(what) => Err(Error::BaseChanged {
                path: base.path.clone(),
                layer,
                what,
            }),
        }
    }

    /// As `check_base`, for the base at the bottom of a chain, if it has one.
    pub(crate) fn check_base_of(&self, top: LayerId) -> Result<()> {
        let root = {
            let inner = self.inner();
            let chain = inner.catalog.state().chain_of(top);
            chain.first().map(|row| (row.id, row.base.clone()))
        };
        match root {
            Some((layer, Some(base))) => self.check_base(layer, &base),
            _ => Ok(()),
        }
    }

    /// Finishes what a crash interrupted: layers that were being sealed, and the remains of commands that had not been
    /// committed.
    pub(crate) fn recover(&self) -> Result<()> {
        if !self.exists(Path::new(LAYERS_DIR)) {
            self.media
                .create_dir(Path::new(LAYERS_DIR))
                .map_err(self.io("create", Path::new(LAYERS_DIR)))?;
            self.media
                .sync_dir(Path::new(""))
                .map_err(self.io("sync", Path::new("")))?;
        }
        let sealing: Vec<LayerRow> = {
            let inner = self.inner();
            let rows = inner.catalog.state().layers.values();
            rows.filter(|row| row.state == LayerState::Sealing)
                .cloned()
                .collect()
        };
        self.forget_unfinished(&sealing);
        for row in sealing {
            self.finish_sealing(&row);
        }
        self.undo_half_kept();
        self.remove_doomed();
        self.remove_remains()?;
        self.collect_everywhere();
        Ok(())
    }

    /// Seals a layer whose snapshot was committed before the crash. If that cannot be done now, it stays as it is: its
    /// volumes refuse to open or go on with it unsealed, and the others go on.
    pub(crate) fn finish_sealing(&self, row: &LayerRow) {
        if let Err(error) = self.try_finish_sealing(row) {
            self.maintenance
                .note(format!("layer {} cannot be sealed now: {error}", row.id));
        }
    }

    /// DURABILITY: data that a killed daemon left in the host's page cache is synced before a map says for good that it is
    /// there.
    pub(crate) fn try_finish_sealing(&self, row: &LayerRow) -> Result<()> {
        self.check_no_failure_over(row.id)?;
        self.settle_left(row)?;
        let (map, header, set, recovery) = MapFile::open(&self.media, row.id)?;
        let (map, header, set) = self.fit(row, map, header, set)?;
        self.check_header(row, &header)?;
        if header.state != MapState::Sealed {
            if recovery.dropped_bytes > 0 {
                self.maintenance.note(format!(
                    "layer {} of volume {}: dropped {} bytes behind the last commit record of its journal",
                    row.id, header.volume, recovery.dropped_bytes
                ));
            }
            let path = data_path(row.id);
            self.media
                .open(&path, OpenMode::ReadWrite, false)
                .and_then(|data| data.sync_data())
                .map_err(self.io("sync", &path))?;
            let sealed = self.sealed_header(header);
            map.replace(&self.media, &sealed, &set)?;
        } else {
            sync_name(&self.media, row.id)?;
        }
        let change = Change::SetLayerState {
            layer: row.id,
            state: LayerState::Sealed,
        };
        let mut inner = self.inner();
        inner.catalog.commit(&[change])?;
        self.want_sums([row.id]);
        // A job may still know it from when it took writes.
        let known = inner.layers.get(&row.id).and_then(Weak::upgrade);
        if let Some(layer) = known.filter(|layer| !layer.is_sealed()) {
            layer.seal(set);
        }
        Ok(())
    }

    /// The header of a layer once it is sealed: it carries the name of the snapshot that it stands for.
    pub(crate) fn sealed_header(&self, mut header: MapHeader) -> MapHeader {
        header.state = MapState::Sealed;
        header.volume_kind = VolumeKind::Normal;
        let inner = self.inner();
        if let Some(row) = inner.catalog.state().names_of(header.layer).next() {
            header.volume.clone_from(&row.volume);
            header.snapshot.clone_from(&row.name);
            header.group = row.group;
            header.snapshot_ns = row.created_ns;
        }
        header
    }

    /// Removes layers that no catalog entry names, but only those that hold nothing: the remains of a command that
    /// failed before its commit. Anything else is left for `stratablk check` to report.
    fn remove_remains(&self) -> Result<()> {
        let names = self
            .media
            .list(Path::new(LAYERS_DIR))
            .map_err(self.io("list", Path::new(LAYERS_DIR)))?;
        for name in names {
            // Only the spelling that the store itself uses: anything else is not its own to remove.
            let id = uuid::Uuid::parse_str(&name).map(LayerId);
            let Some(id) = id.ok().filter(|id| id.to_string() == name) else {
                continue;
            };
            let known = {
                let inner = self.inner();
                let state = inner.catalog.state();
                state.layers.contains_key(&id) || state.doomed.contains(&id)
            };
            if known {
                continue;
            }
            let empty = if self.exists(&map_path(id)) {
                MapFile::open(&self.media, id).is_ok_and(|(_, header, set, _)| {
                    matches!(header.kind, LayerKind::RawBase(_))
                        || (set.data_sectors() == 0 && set.zero_sectors() == 0)
                })
            } else {
                // The map is written last when a layer is made, so without one no write was ever acknowledged.
                true
            };
            if empty {
                self.media
                    .remove_dir_all(&layer_dir(id))
                    .map_err(self.io("remove", &layer_dir(id)))?;
            } else {
                self.maintenance.note(format!(
                    "layer {id} is in the store but not in its catalog; left alone (see `stratablk check`)"
                ));
            }
        }
        Ok(())
    }

    /// Whether a name exists.
    fn exists(&self, path: &Path) -> bool {
        self.media.stat(path).is_ok()
    }
}

impl Inner {
    /// Forgets layers that no open volume holds any more.
    pub(crate) fn forget_unused_layers(&mut self) {
        self.layers.retain(|_, layer| layer.strong_count() > 0);
    }
}

/// Clusters of a disk, the last one perhaps cut short.
pub(crate) fn clusters(size: Sector) -> u64 {
    size.0.div_ceil(CLUSTER_SECTORS)
}

/// The resolve table of a chain: layers oldest first, each over those before it.
///
/// A layer that says something only about sectors behind the end of the disk, in the last cluster, which is cut short, is no
/// layer to look at there: a merge does not move those sectors, so the word would name a layer that goes. There are such layers
/// below a disk that was made smaller: a larger one below that has data only where the smaller one does not reach. Words that
/// come later are of sectors on the disk, and where a disk grows its active layer hides what is below (`fit`).
fn build_table(size: Sector, layers: &[Arc<Layer>]) -> Table {
    let table = Table::new(clusters(size));
    let last = Cluster(clusters(size).saturating_sub(1));
    let on_disk = SectorMask::span(
        0,
        u32::try_from(
            size.0
                .saturating_sub(last.first_sector().0)
                .min(CLUSTER_SECTORS),
        )
        .unwrap_or(0),
    );
    for (slot, layer) in (1..).map(LayerSlot).zip(layers) {
        let (data, zero) = layer.cluster(last);
        let behind = (data.0 | zero.0) != 0 && (data.0 | zero.0) & on_disk.0 == 0;
        match &**layer.map() {
            LayerMap::Active(map) if behind => {
                table.load_layer(slot, &map.to_set().without(last, 1));
            }
            LayerMap::Active(map) => table.load_layer(slot, &map.to_set()),
            LayerMap::Sealed(set) if behind => table.load_layer(slot, &set.without(last, 1)),
            LayerMap::Sealed(set) => table.load_layer(slot, set),
        }
    }
    table
}

/// What a raw base holds: every sector of its file.
pub(crate) fn base_set(len: u64) -> SectorSet {
    SectorSet::everything(Sector(len / SECTOR_BYTES))
}
