//! Creating a volume: an empty disk, a disk over a raw base, or a clone of a snapshot or of another volume.
//!
//! DURABILITY: the files of the new layers are written and synced, with their directories, before the one catalog
//! transaction that names them. A crash before it leaves layers that nobody names; they are removed at the next start.
//! A clone of a volume seals that one's active layer first, as a snapshot without a name; a crash in between leaves that
//! layer, which the next start joins with the one above.

use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use crate::catalog::{Change, JobKind, JobRow, LayerRow, LayerState, VolumeKind, VolumeRow, Way};
use crate::error::{Error, Result};
use crate::file::{File, FileIdentity, OpenMode};
use crate::layer::Layer;
use crate::limits::{BASE_PATH_BYTES_MAX, DISK_SECTORS_MAX};
use crate::map::{ActiveMap, SectorSet};
use crate::mapfile::{
    LAYERS_DIR, LayerKind, MapFile, MapHeader, MapState, RawBase, data_path, layer_dir,
};
use crate::store::{Store, VolumeInfo, VolumeSource, now_ns};
use crate::units::{CLUSTER_BYTES, LayerId, SECTOR_BYTES, Sector};

use super::kind::starts_anew;
use super::names;
use super::open::{base_set, clusters};

impl Store {
    /// Creates a volume. Durable on return.
    ///
    /// # Errors
    /// `Invalid`, `Exists`, `NotFound`, `Io` (a full disk): nothing is left behind.
    pub fn create_volume(&self, name: &str, source: &VolumeSource) -> Result<VolumeInfo> {
        self.create_volume_of(name, source, VolumeKind::Normal)
    }

    /// Creates a volume of any type. Durable on return.
    ///
    /// # Errors
    /// As `create_volume`.
    pub fn create_volume_of(
        &self,
        name: &str,
        source: &VolumeSource,
        kind: VolumeKind,
    ) -> Result<VolumeInfo> {
        let _command = self.command();
        self.create_in_command(name, source, kind, None)?;
        self.volume_info(name)
    }

    /// Creates a volume, and a job of this kind that makes it independent of its base, in one transaction. The caller holds the
    /// command lock.
    pub(crate) fn create_in_command(
        &self,
        name: &str,
        source: &VolumeSource,
        kind: VolumeKind,
        job: Option<JobKind>,
    ) -> Result<()> {
        names::check("name", name)?;
        if self.inner().catalog.state().volumes.contains_key(name) {
            return Err(Error::Exists {
                kind: "volume",
                name: name.to_owned(),
            });
        }
        let mut made = Made::default();
        let result = self.create_volume_files(name, source, kind, job, &mut made);
        if result.is_err() {
            self.unmake(&made);
            if let VolumeSource::Volume(volume) = source {
                self.collect_sealed(volume);
            }
        }
        result
    }

    /// Makes the layers and commits the volume.
    fn create_volume_files(
        &self,
        name: &str,
        source: &VolumeSource,
        kind: VolumeKind,
        job: Option<JobKind>,
        made: &mut Made,
    ) -> Result<()> {
        let mut changes = Vec::new();
        let (parent, size) = match source {
            VolumeSource::Size(bytes) => (None, disk_size("size", *bytes)?),
            VolumeSource::Base(path) => {
                let (layer, size) = self.base_layer(path, made, &mut changes)?;
                (Some(layer), size)
            }
            VolumeSource::Snapshot { volume, snapshot } => {
                let (layer, size) = self.sealed_layer_of(volume, snapshot)?;
                self.check_base_of(layer)?;
                (Some(layer), size)
            }
            VolumeSource::Volume(volume) => {
                let (layer, size) = self.seal_for_clone(volume)?;
                (Some(layer), size)
            }
        };
        let parent = match parent {
            None if starts_anew(kind) => {
                let row = self.make_empty_layer(name, size, made)?;
                let id = row.id;
                changes.push(Change::AddLayer(row));
                Some(id)
            }
            parent => parent,
        };
        let (layer, row) = self.make_active_layer(name, kind, parent, size, made)?;
        changes.push(Change::AddLayer(row));
        changes.push(Change::AddVolume(VolumeRow {
            name: name.to_owned(),
            active: layer.id(),
            size,
            created_ns: now_ns(),
            attachment: None,
            kind,
            armed: kind == VolumeKind::Immutable,
            attached_from: None,
            failed: None,
        }));
        if let (Some(kind), Some(base)) = (job, parent) {
            let subject = name.to_owned();
            changes.push(self.job_change(0, kind, subject, base, layer.id(), Way::Copy));
        }
        self.inner().catalog.commit(&changes)
    }

    /// The sealed layer that stands for a raw base: an existing one for the same unchanged file, or a new one.
    fn base_layer(
        &self,
        path: &Path,
        made: &mut Made,
        changes: &mut Vec<Change>,
    ) -> Result<(LayerId, Sector)> {
        let invalid = |what: String| Error::Invalid {
            field: "base",
            what,
        };
        // So that one file has one path here, by whichever name it was given.
        let path = (self.media.canonical(path))
            .map_err(|error| invalid(format!("{} cannot be used: {error}", path.display())))?;
        let stat = self
            .media
            .stat(&path)
            .map_err(|error| invalid(format!("{} cannot be used: {error}", path.display())))?;
        if !stat.is_file {
            return Err(invalid(format!("{} is not a regular file", path.display())));
        }
        if path.as_os_str().len() > BASE_PATH_BYTES_MAX {
            return Err(invalid(format!(
                "its path is longer than {BASE_PATH_BYTES_MAX} bytes"
            )));
        }
        if path.to_str().is_none() {
            return Err(invalid(format!(
                "{} is not UTF-8; rename it",
                path.display()
            )));
        }
        if stat.len == 0 || !stat.len.is_multiple_of(SECTOR_BYTES) {
            return Err(invalid(format!(
                "{} has {} bytes, which is not a positive multiple of {SECTOR_BYTES}; is it a raw image? \
                 (pad it: truncate -s %512 FILE)",
                path.display(),
                stat.len
            )));
        }
        let size = disk_size("base", stat.len)?;
        let base = RawBase {
            path: path.clone(),
            len: stat.len,
            mtime_ns: stat.mtime_ns,
        };
        self.check_not_changed_by_job(&path, stat.identity)?;
        let known = self
            .inner()
            .catalog
            .state()
            .layers
            .values()
            .find(|row| row.base.as_ref() == Some(&base))
            .map(|row| row.id);
        if let Some(layer) = known {
            return Ok((layer, size));
        }
        let file = self
            .media
            .open(&path, OpenMode::ReadOnly, false)
            .map_err(|error| invalid(format!("{} cannot be read: {error}", path.display())))?;
        self.lock_base(&file, &path, false)?;
        drop(file);
        let id = LayerId(self.media.fresh_id());
        let mut header = self.new_header(id, None, size, "", VolumeKind::Normal);
        header.kind = LayerKind::RawBase(base.clone());
        header.state = MapState::Sealed;
        made.layers.push(id);
        self.make_dir(id)?;
        MapFile::create(&self.media, &header, &base_set(stat.len))?;
        self.sync_layers_dir()?;
        changes.push(Change::AddLayer(LayerRow {
            id,
            parent: None,
            size,
            state: LayerState::Sealed,
            base: Some(base),
            created_ns: header.created_ns,
        }));
        Ok((id, size))
    }

    /// Refuses an image that a job writes to, or has begun to.
    fn check_not_changed_by_job(&self, path: &Path, identity: FileIdentity) -> Result<()> {
        let changed: Vec<_> = {
            let inner = self.inner();
            let state = inner.catalog.state();
            let jobs = (state.jobs.values()).filter(|job| job.kind == JobKind::IntoBase);
            let base = |job: &JobRow| Some((job.id, state.layers.get(&job.source)?.base.clone()?));
            jobs.filter_map(base).collect()
        };
        for (job, base) in changed {
            if self.is_file(&base.path, identity)? {
                let (path, job) = (path.display(), job.0);
                return Err(Error::Busy {
                    what: format!(
                        "job {job} writes to {path}; wait for it (stratablk job wait {job}) and try again"
                    ),
                });
            }
        }
        Ok(())
    }

    /// Whether there is a file of this path, and it is this one.
    pub(crate) fn is_file(&self, path: &Path, identity: FileIdentity) -> Result<bool> {
        match self.media.stat(path) {
            Ok(stat) => Ok(stat.identity == identity),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(self.io("stat", path)(error)),
        }
    }

    /// Makes the files of a new active layer, durable on return, and opens it.
    pub(crate) fn make_active_layer(
        &self,
        volume: &str,
        kind: VolumeKind,
        parent: Option<LayerId>,
        size: Sector,
        made: &mut Made,
    ) -> Result<(Arc<Layer>, LayerRow)> {
        let id = LayerId(self.media.fresh_id());
        let header = self.new_header(id, parent, size, volume, kind);
        made.layers.push(id);
        let data = self.make_data(id, size)?;
        let journal = MapFile::create(&self.media, &header, &SectorSet::empty())?;
        self.sync_layers_dir()?;
        let number = self.cache.number(id)?;
        let row = LayerRow {
            id,
            parent,
            size,
            state: LayerState::Active,
            base: None,
            created_ns: header.created_ns,
        };
        let layer = Layer::active(
            header,
            number,
            data,
            ActiveMap::new(clusters(size)),
            journal,
        );
        Ok((Arc::new(layer), row))
    }

    /// As `make_active_layer`, with another name of an existing file as its data. The map says nothing about it yet.
    pub(crate) fn make_linked_layer(
        &self,
        volume: &VolumeRow,
        parent: LayerId,
        size: Sector,
        file: &Path,
        made: &mut Made,
    ) -> Result<(Arc<Layer>, LayerRow)> {
        let id = LayerId(self.media.fresh_id());
        made.layers.push(id);
        self.make_dir(id)?;
        let path = data_path(id);
        self.media
            .link(file, &path)
            .map_err(self.io("link", &path))?;
        let header = self.new_header(id, Some(parent), size, &volume.name, volume.kind);
        self.open_new_layer(header)
    }

    /// The second half of making an active layer: its data file exists.
    fn open_new_layer(&self, header: MapHeader) -> Result<(Arc<Layer>, LayerRow)> {
        let (id, size) = (header.layer, header.size);
        let path = data_path(id);
        let data = self
            .media
            .open(&path, OpenMode::ReadWrite, self.options.direct_io)
            .map_err(self.io("open", &path))?;
        let journal = MapFile::create(&self.media, &header, &SectorSet::empty())?;
        self.sync_layers_dir()?;
        let row = LayerRow {
            id,
            parent: header.parent,
            size,
            state: LayerState::Active,
            base: None,
            created_ns: header.created_ns,
        };
        let number = self.cache.number(id)?;
        let map = ActiveMap::new(clusters(size));
        let layer = Layer::active(header, number, data, map, journal);
        Ok((Arc::new(layer), row))
    }

    /// Makes the files of a sealed layer that holds nothing, durable on return: what a volume starts from that has to start
    /// from something.
    fn make_empty_layer(&self, volume: &str, size: Sector, made: &mut Made) -> Result<LayerRow> {
        let id = LayerId(self.media.fresh_id());
        let mut header = self.new_header(id, None, size, volume, VolumeKind::Normal);
        header.state = MapState::Sealed;
        made.layers.push(id);
        self.make_data(id, size)?;
        MapFile::create(&self.media, &header, &SectorSet::empty())?;
        self.sync_layers_dir()?;
        Ok(LayerRow {
            id,
            parent: None,
            size,
            state: LayerState::Sealed,
            base: None,
            created_ns: header.created_ns,
        })
    }

    /// Makes the directory of a layer and its data file, which is as long as the disk and takes no space.
    fn make_data(&self, id: LayerId, size: Sector) -> Result<Arc<dyn File>> {
        self.make_dir(id)?;
        let path = data_path(id);
        let data = self
            .media
            .open(&path, OpenMode::CreateNew, self.options.direct_io)
            .map_err(self.io("create", &path))?;
        // The length is durable from the start, so that syncing data never has to write it.
        data.set_len(clusters(size) * CLUSTER_BYTES)
            .map_err(self.io("set the length of", &path))?;
        data.sync_data().map_err(self.io("sync", &path))?;
        Ok(data)
    }

    /// The header of a new differencing layer.
    fn new_header(
        &self,
        id: LayerId,
        parent: Option<LayerId>,
        size: Sector,
        volume: &str,
        kind: VolumeKind,
    ) -> MapHeader {
        MapHeader {
            store: self.id(),
            layer: id,
            parent,
            size,
            kind: LayerKind::Differencing,
            state: MapState::Active,
            volume: volume.to_owned(),
            volume_kind: kind,
            snapshot: String::new(),
            group: Uuid::nil(),
            created_ns: now_ns(),
            snapshot_ns: 0,
        }
    }

    /// Makes the directory of a layer.
    fn make_dir(&self, id: LayerId) -> Result<()> {
        let path = layer_dir(id);
        self.media
            .create_dir(&path)
            .map_err(self.io("create", &path))
    }

    /// Makes the names of new layers durable.
    fn sync_layers_dir(&self) -> Result<()> {
        self.media
            .sync_dir(Path::new(LAYERS_DIR))
            .map_err(self.io("sync", Path::new(LAYERS_DIR)))
    }

    /// Removes layers that were made for a command that failed before its commit.
    pub(crate) fn unmake(&self, made: &Made) {
        let committed: Vec<LayerId> = {
            let inner = self.inner();
            let state = inner.catalog.state();
            made.layers
                .iter()
                .copied()
                .filter(|id| state.layers.contains_key(id))
                .collect()
        };
        for id in made.layers.iter().filter(|id| !committed.contains(id)) {
            self.cache.forget(*id);
            // What cannot be removed now is removed at the next start.
            if let Err(error) = self.media.remove_dir_all(&layer_dir(*id)) {
                self.maintenance
                    .note(format!("layer {id}: remains of a failed command: {error}"));
            }
        }
    }
}

/// Layers made for a command, to be removed if it fails.
#[derive(Debug, Default)]
pub(crate) struct Made {
    /// Their names.
    pub layers: Vec<LayerId>,
}

/// The size of a disk of so many bytes.
pub(crate) fn disk_size(field: &'static str, bytes: u64) -> Result<Sector> {
    let sectors = bytes / SECTOR_BYTES;
    if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(Error::Invalid {
            field,
            what: format!("{bytes} bytes is not a positive multiple of {SECTOR_BYTES}"),
        });
    }
    if sectors > DISK_SECTORS_MAX {
        return Err(Error::Invalid {
            field,
            what: format!(
                "{bytes} bytes is more than the largest disk, {} TiB",
                DISK_SECTORS_MAX >> 31
            ),
        });
    }
    Ok(Sector(sectors))
}
