//! Another size for a disk: more while it is used, less only while it is not.
//!
//! DURABILITY, more:
//! 1. the data file of the active layer gets longer and is synced;
//! 2. the map of the active layer is replaced by one of the new size, which says that what is gained is zeroes, as far as a
//!    layer below is larger;
//! 3. one catalog transaction: the commit point;
//! 4. tables and maps in memory get larger, what was gained is zeroed there, and last the capacity, by which requests
//!    are checked.
//!
//! DURABILITY, less:
//! 1. all that was written is flushed, and the volume closed;
//! 2. one catalog transaction: the commit point;
//! 3. the map of the active layer is replaced by what is left of it, and the data file is cut.
//!
//! A crash leaves the old or the new size, as the catalog says. Where the map says another, the next to open the layer makes up
//! for it (`fit`); a data file that is longer than the disk does no harm.

use crate::catalog::{VolumeKind, VolumeRow};
use crate::error::{Error, Result};
use crate::file::OpenMode;
use crate::layer::LayerMap;
use crate::lifecycle::ResizeOptions;
use crate::map::{ClusterState, Resolve};
use crate::mapfile::{MapFile, MapHeader, Successor, data_path};
use crate::store::{Store, VolumeInfo};
use crate::units::{CLUSTER_BYTES, CLUSTER_SECTORS, Cluster, SECTOR_BYTES, Sector, SectorMask};
use crate::volume::Volume;

use super::checkpoint::mark;
use super::create::disk_size;
use super::fit::{Gained, cut};
use super::open::clusters;

/// Why a volume has failed whose map may be of either size.
const FAILED: &str = "a change of size failed";

impl Store {
    /// Changes the size of a volume. What a larger disk gains reads as zeroes, also where layers below are as large.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for a size that cannot be, for a smaller one that was not allowed, or for a volume of a type
    /// that keeps its size; `Busy` for a smaller size while it is attached or open for requests, or while its active layer is
    /// merged; `Failed`, `Io`.
    pub fn resize(&self, volume: &str, bytes: u64, options: ResizeOptions) -> Result<VolumeInfo> {
        let _command = self.command();
        let row = self.volume_row(volume)?;
        let size = disk_size("size", bytes)?;
        self.check_resizable(&row)?;
        if size > row.size {
            self.grow(&row, size)?;
        } else if size < row.size {
            self.shrink(&row, size, options)?;
        }
        self.volume_info(volume)
    }

    /// Refuses volumes whose size is that of what they start from, and layers that a job works on.
    fn check_resizable(&self, row: &VolumeRow) -> Result<()> {
        let name = &row.name;
        let why = match row.kind {
            VolumeKind::Normal | VolumeKind::Writethrough => None,
            VolumeKind::Readonly => Some("is readonly, so nothing of it changes"),
            VolumeKind::Immutable | VolumeKind::Multiattach => {
                Some("starts from a content that never changes, nor does its size")
            }
        };
        if let Some(why) = why {
            return Err(Error::Invalid {
                field: "volume",
                what: format!(
                    "{name:?} {why}; make it a normal volume first (stratablk volume set {name} --type normal)"
                ),
            });
        }
        let inner = self.inner();
        let mut jobs = inner.catalog.state().jobs.values();
        match jobs.find(|job| job.target == row.active) {
            Some(job) => Err(Error::Busy {
                what: format!(
                    "job {} moves data into volume {name:?}; wait for it (stratablk job wait {}) or cancel it",
                    job.id.0, job.id.0
                ),
            }),
            None => Ok(()),
        }
    }

    /// Makes a disk larger, whether or not it is used. Flushes of guests wait for the exchange of the map only.
    fn grow(&self, row: &VolumeRow, size: Sector) -> Result<()> {
        let volume = self.open_volume_in_command(&row.name)?;
        let chain = volume.newest_chain();
        let active = chain.active().filter(|layer| !layer.is_sealed());
        let Some(layer) = active.filter(|layer| layer.id() == row.active) else {
            return Err(Error::Busy {
                what: format!("volume {:?} has no active layer now", row.name),
            });
        };
        self.lengthen(row.active, row.size, size)?;
        let gained = Gained::of(row.size, size, self.largest_below(row.active));
        // Most of what waits to be written is written before anybody has to wait for it.
        volume.flush_blocking()?;
        let mut header = MapHeader::clone(&layer.header());
        header.size = size;
        let mark = self.led(&volume, || mark(layer))?;
        let next = Successor::write(&self.media, &header, mark)?;
        self.led(&volume, || {
            self.put_in_force(&volume, layer, next, gained.records(), FAILED)
        })?;
        if let Err(error) = self.commit_size(row, size) {
            // What is appended from here on is for the old size again.
            self.led(&volume, || {
                let set = cut(&MapFile::read(&self.media, layer.id())?.set, row.size);
                self.replace_map(&volume, layer, &layer.header(), &set, FAILED)
            })?;
            return Err(error);
        }
        layer.set_header(header);
        if let LayerMap::Active(map) = &*layer.map_full() {
            let (table, slot) = (volume.table(), chain.active_slot());
            map.grow(clusters(size));
            table.grow(clusters(size));
            if gained != Gained::default() {
                self.led(&volume, || {
                    hide(&gained, |first, count, mask| {
                        let change = match mask {
                            SectorMask::ALL => map.zero(first, count),
                            data => {
                                let rest_zero = false;
                                map.merge_below(first, count, ClusterState { data, rest_zero })
                            }
                        };
                        table.refresh(slot, map, first, count, change);
                    });
                    Ok(())
                })?;
            }
        }
        // From here on requests use it.
        volume.grow(size);
        // A request that was checked by the old size may have taken the last cluster, cut short, for a whole one. It ends
        // before anybody is told of the new size.
        self.drain_changes(self.clock.advance());
        Ok(())
    }

    /// The commit point.
    fn commit_size(&self, row: &VolumeRow, size: Sector) -> Result<()> {
        self.inner().catalog.commit(&[row.sized(size)])
    }

    /// Makes a disk smaller that nobody uses.
    fn shrink(&self, row: &VolumeRow, size: Sector, options: ResizeOptions) -> Result<()> {
        let refuse = |what: String| Error::Invalid {
            field: "size",
            what,
        };
        if !options.shrink {
            return Err(refuse(format!(
                "{} bytes are less than the {} that volume {:?} has; what lies beyond would be lost \
                 (--shrink allows it)",
                size.0 * SECTOR_BYTES,
                row.size.0 * SECTOR_BYTES,
                row.name
            )));
        }
        // A machine that is paused goes on with the size that it knows.
        if row.attachment.is_some() {
            return Err(Error::Busy {
                what: format!(
                    "volume {:?} is attached, and a disk that is attached does not get smaller; detach it first \
                     (stratablk volume detach {})",
                    row.name, row.name
                ),
            });
        }
        self.check_idle(&row.name)?;
        self.close_volume(&row.name)?;
        let volume = self.open_volume_in_command(&row.name)?;
        volume.check_failure()?;
        if !options.force
            && let Some(last) = last_written(&volume, size)
        {
            return Err(refuse(format!(
                "volume {:?} has data up to byte {}, which a disk of {} bytes would cut off (--force does it)",
                row.name,
                last.0.min(row.size.0) * SECTOR_BYTES,
                size.0 * SECTOR_BYTES
            )));
        }
        drop(volume);
        self.commit_idle(&[row.name.as_str()], &[row.sized(size)], &[])?;
        self.cache.forget(row.active);
        if let Err(error) = self.cut_files(row, size) {
            self.maintenance.note(format!(
                "volume {:?} has its new size; the rest is done when it is next opened: {error}",
                row.name
            ));
        }
        Ok(())
    }

    /// Cuts the files of the active layer of a closed volume.
    fn cut_files(&self, row: &VolumeRow, size: Sector) -> Result<()> {
        let layer = {
            let inner = self.inner();
            inner.catalog.state().layers.get(&row.active).cloned()
        };
        if let Some(layer) = layer {
            drop(self.load_layer(&layer)?);
        }
        let path = data_path(row.active);
        let file = self
            .media
            .open(&path, OpenMode::ReadWrite, false)
            .map_err(self.io("open", &path))?;
        file.set_len(clusters(size) * CLUSTER_BYTES)
            .and_then(|()| file.sync_data())
            .map_err(self.io("cut", &path))
    }
}

/// Calls `hide` for what was gained: clusters of which all or some sectors are to be hidden.
fn hide(gained: &Gained, mut hide: impl FnMut(Cluster, u64, SectorMask)) {
    if let Some(tail) = gained.tail {
        let index = tail.start.index_in_cluster();
        let count = u32::try_from(tail.count).unwrap_or(0);
        hide(tail.start.cluster(), 1, SectorMask::span(index, count));
    }
    if let Some(zeroed) = gained.zeroed {
        hide(
            zeroed.start.cluster(),
            zeroed.count / CLUSTER_SECTORS,
            SectorMask::ALL,
        );
    }
}

/// The end of the last sectors beyond a size that hold data, of whichever layer; `None` if none do. Of a volume that was just
/// opened.
fn last_written(volume: &Volume, size: Sector) -> Option<Sector> {
    let chain = volume.newest_chain();
    let first = Cluster(clusters(size));
    let total = volume.table().clusters();
    let count = total.saturating_sub(first.0);
    let mut last = None;
    for run in volume.table().runs(first, count) {
        // The table was built from the maps a moment ago. A mask of none is zeroes, which hide what is below.
        if run.resolve != Resolve::default() && run.resolve.mask != SectorMask::NONE {
            last = Some(Cluster(run.first.0 + run.count).first_sector());
        }
    }
    last.or_else(|| {
        let tail = size.index_in_cluster();
        let behind = (tail > 0).then(|| SectorMask(!SectorMask::span(0, tail).0))?;
        let mut open = behind;
        for layer in chain.layers().iter().rev() {
            let (data, zero) = layer.cluster(size.cluster());
            if data.0 & open.0 != 0 {
                return Some(Cluster(size.cluster().0 + 1).first_sector());
            }
            open = SectorMask(open.0 & !zero.0);
        }
        None
    })
}
