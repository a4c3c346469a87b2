//! Taking a job up: its layers, as they are now, and what is left to be done.

use std::sync::Arc;

use crate::catalog::{CatalogState, JobKind, JobRow, LayerRow, LayerState, Way};
use crate::error::{Error, Result};
use crate::file::{File, OpenMode};
use crate::layer::Layer;
use crate::map::{MapRecord, RecordKind, SectorSet};
use crate::mapfile::{MapFile, MapHeader, RawBase, data_path, sync_name};
use crate::ops::open::clusters;
use crate::store::Store;
use crate::sumfile;
use crate::units::{
    CLUSTER_BYTES, CLUSTER_SECTORS, Cluster, LayerId, SECTOR_BYTES, Sector, SectorRange,
};

use super::Kind;
use super::begin::Begin;
use super::down::{Down, sealed_set};
use super::gather::{Gather, Into, SealedTarget};
use super::walk::{Sources, table_of};

/// What came of taking a job up.
#[derive(Debug)]
pub(super) enum Loaded {
    /// It can go on.
    Work(Kind),
    /// It has to wait for a snapshot.
    NotYet,
    /// There is nothing to do, for this reason.
    Obsolete(String),
}

/// The layers of a job from its target down to the lowest that it takes from; `None` if they are not there or do not lie so.
fn span(state: &CatalogState, job: &JobRow) -> Option<Vec<LayerRow>> {
    let whole = matches!(job.kind, JobKind::Flatten | JobKind::Import);
    let mut span = Vec::new();
    // From the bottom.
    for row in state.chain_of(job.target).into_iter().rev() {
        span.push(row.clone());
        if row.id == job.source && !whole {
            break;
        }
    }
    let reached = whole || span.last().is_some_and(|row| row.id == job.source);
    (reached && span.len() > 1).then_some(span)
}

/// Why two layers must not be joined now.
fn not_joinable(state: &CatalogState, source: &LayerRow) -> Option<String> {
    if state.children(source.id).count() != 1 {
        return Some(format!("layer {} has several children", source.id));
    }
    if let Some(row) = state.snapshots.iter().find(|row| row.layer == source.id) {
        let (volume, name) = (&row.volume, &row.name);
        return Some(format!(
            "snapshot {volume}@{name} names layer {}",
            source.id
        ));
    }
    None
}

impl Store {
    /// Takes a job up.
    pub(super) fn load_job(&self, row: &JobRow) -> Result<Loaded> {
        let _command = self.command();
        let (span, obstacle, volume) = {
            let inner = self.inner();
            let state = inner.catalog.state();
            let span = span(state, row);
            let source = span.as_ref().and_then(|span| span.last());
            let obstacle = source
                .filter(|_| matches!(row.kind, JobKind::Merge | JobKind::IntoBase))
                .and_then(|source| not_joinable(state, source));
            let active = state
                .volumes
                .values()
                .find(|volume| volume.active == row.target);
            (span, obstacle, active.map(|volume| volume.name.clone()))
        };
        let in_place = row.way == Way::InPlace;
        let begun = in_place && span.as_ref().is_some_and(|span| span.len() > 2);
        let (Some(span), None) = (span, &obstacle) else {
            let why = obstacle.unwrap_or_else(|| "its layers are gone".into());
            if begun {
                // The target has the source's file: nothing else may be done with them.
                return Err(Error::Busy { what: why });
            }
            return Ok(Loaded::Obsolete(why));
        };
        let (Some(target), Some(source)) = (span.first(), span.last()) else {
            return Ok(Loaded::Obsolete("its layers are gone".into()));
        };
        if target.state == LayerState::Sealing {
            return Ok(Loaded::NotYet);
        }
        if let Some(sealing) = span
            .iter()
            .skip(1)
            .find(|row| row.state != LayerState::Sealed)
        {
            return self.seal_again(sealing).map(|begin| {
                begin.map_or(Loaded::NotYet, |begin| Loaded::Work(Kind::Begin(begin)))
            });
        }
        let sealed = |row: &&LayerRow| row.state == LayerState::Sealed;
        for sealed in span.iter().filter(sealed).filter(|row| row.base.is_none()) {
            self.check_undamaged(sealed.id)?;
        }
        // DURABILITY: the name of a deleted snapshot must be gone for good before its layer is no longer what it promised.
        for sealed in span.iter().filter(sealed) {
            self.write_true_names(sealed.id)?;
            // DURABILITY: nor may its checksums be those of other data. What is only copied from keeps them.
            if row.way != Way::Copy || sealed.id == row.target {
                sumfile::remove(&self.media, sealed.id)?;
            }
        }
        let mixed = span.len() != 2 || target.size != source.size;
        let active = target.state == LayerState::Active;
        let kind = match (row.kind, row.way) {
            (JobKind::IntoBase, _) if active => {
                return Ok(Loaded::Obsolete("the layer takes writes".into()));
            }
            (JobKind::IntoBase, _) => Kind::Down(Box::new(self.load_down(row, target, source)?)),
            (_, Way::InPlace) if active && !mixed => {
                Kind::Begin(Begin::new(target.clone(), source.clone()))
            }
            // A snapshot was quicker.
            (_, Way::InPlace | Way::Down) if !active && !mixed => {
                Kind::Down(Box::new(self.load_down(row, target, source)?))
            }
            _ => {
                let gather = self.load_gather(row, &span, volume.as_deref(), begun)?;
                Kind::Gather(Box::new(gather))
            }
        };
        let left = match &kind {
            Kind::Begin(_) => self.allocated(target.id),
            Kind::Gather(gather) => gather.bytes_left(),
            Kind::Down(down) => down.bytes_left(),
        };
        self.jobs.board().began(row, left);
        Ok(Loaded::Work(kind))
    }

    /// A layer of a job.
    fn job_layer(&self, row: &LayerRow) -> Result<Arc<Layer>> {
        self.settle_left(row)?;
        let mut known = self.inner().layers.clone();
        let layer = self.layer(row, &mut known)?;
        self.inner().layers.insert(row.id, Arc::downgrade(&layer));
        Ok(layer)
    }

    /// The data of a layer, to be written to.
    fn job_file(&self, layer: LayerId) -> Result<Arc<dyn File>> {
        let path = data_path(layer);
        self.media
            .open(&path, OpenMode::ReadWrite, self.options.direct_io)
            .map_err(self.io("open", &path))
    }

    /// The map of a sealed layer that a job changes.
    ///
    /// DURABILITY: it may have taken its name a moment before an earlier daemon died. What it says counts for the job as
    /// committed, so that places are given back for it; so its name has to survive a power cut before anything else happens.
    fn job_map(&self, layer: LayerId) -> Result<(MapFile, MapHeader, SectorSet)> {
        let (map, header, set, _) = MapFile::open(&self.media, layer)?;
        sync_name(&self.media, layer)?;
        Ok((map, header, set))
    }

    /// A job that moves data up.
    fn load_gather(
        &self,
        row: &JobRow,
        span: &[LayerRow],
        volume: Option<&str>,
        begun_in_place: bool,
    ) -> Result<Gather> {
        let Some((target_row, below)) = span.split_first() else {
            return Err(gone(row));
        };
        let mut layers = below
            .iter()
            .map(|row| self.job_layer(row))
            .collect::<Result<Vec<_>>>()?;
        let punched = match row.way {
            Way::Copy => Vec::new(),
            // All but the one whose file the target has.
            Way::InPlace if begun_in_place => below
                .iter()
                .take(below.len().saturating_sub(1))
                .map(|row| self.job_file(row.id))
                .collect::<Result<Vec<_>>>()?,
            Way::Up | Way::Down | Way::InPlace => below
                .iter()
                .map(|row| self.job_file(row.id))
                .collect::<Result<Vec<_>>>()?,
        };
        layers.reverse();
        let bottom = match (row.way, below.last().and_then(|row| row.base.as_ref())) {
            (Way::Copy, Some(base)) if matches!(row.kind, JobKind::Flatten | JobKind::Import) => {
                self.data_of_base(base)?
            }
            _ => None,
        };
        let sources = Sources::with_bottom(target_row.size, layers, bottom);
        let (target, into) = match volume {
            Some(name) => {
                let volume = self.open_volume_in_command(name)?;
                volume.check_failure()?;
                let chain = volume.newest_chain();
                let target = chain.active().filter(|layer| layer.id() == row.target);
                let target = Arc::clone(target.ok_or_else(|| gone(row))?);
                (target, Into::Active(Arc::downgrade(&volume)))
            }
            None => {
                let target = self.job_layer(target_row)?;
                let (map, header, set) = self.job_map(row.target)?;
                if sealed_set(&target) != set {
                    // An earlier turn failed after its map had taken the name: it counts, so readers must know of it before
                    // the sources lose anything.
                    target.replace_set(set.clone());
                    let ids: Vec<LayerId> = span.iter().map(|row| row.id).collect();
                    self.lead_to(&target, &ids, Cluster(0), sources.clusters());
                }
                let sealed = SealedTarget {
                    file: self.job_file(row.target)?,
                    header,
                    incarnation: map.incarnation(),
                    table: table_of(sources.clusters(), &set),
                    records: Vec::new(),
                };
                (target, Into::Sealed(Box::new(sealed)))
            }
        };
        Ok(Gather::new(
            span.iter().map(|row| row.id).collect(),
            sources,
            begun_in_place.then_some(0),
            target,
            into,
            punched,
            row.way == Way::Copy,
        ))
    }

    /// Where a raw image has data, in whole clusters, and zeroes else; `None` if all of it may be data. (Zeroes, and not
    /// nothing: words of tables that lead to the image have to lead to the target. And to the end of the last cluster, also
    /// where the image ends within it: zeroes of a part of a cluster count only beside data.)
    fn data_of_base(&self, base: &RawBase) -> Result<Option<SectorSet>> {
        let io = |error| self.io("look for holes in base", &base.path)(error);
        let file = self.media.open(&base.path, OpenMode::ReadOnly, false);
        let ranges = file.and_then(|file| file.data_ranges(0, base.len));
        let Some(ranges) = ranges.map_err(io)? else {
            return Ok(None);
        };
        let mut set = SectorSet::empty();
        let clusters = clusters(Sector(base.len / SECTOR_BYTES));
        if let Some(range) = SectorRange::new(Sector(0), clusters * CLUSTER_SECTORS) {
            let kind = RecordKind::Zero;
            set.apply(&MapRecord { kind, range });
        }
        for range in ranges {
            let start = range.start / CLUSTER_BYTES * CLUSTER_BYTES;
            let end = range.end.next_multiple_of(CLUSTER_BYTES).min(base.len);
            let start = Sector(start / SECTOR_BYTES);
            if let Some(range) = SectorRange::new(start, end / SECTOR_BYTES - start.0) {
                let kind = RecordKind::Data;
                set.apply(&MapRecord { kind, range });
            }
        }
        set.optimize();
        Ok(Some(set))
    }

    /// A job that moves data down.
    fn load_down(&self, row: &JobRow, upper: &LayerRow, lower: &LayerRow) -> Result<Down> {
        let upper_layer = self.job_layer(upper)?;
        let lower_layer = self.job_layer(lower)?;
        let (upper_map, upper_header, _) = self.job_map(upper.id)?;
        let (lower_map, lower_header, _) = self.job_map(lower.id)?;
        let into_base = row.kind == JobKind::IntoBase;
        let (lower_file, upper_file) = match &lower.base {
            Some(base) if into_base => {
                let file = self
                    .media
                    .open(&base.path, OpenMode::ReadWrite, self.options.direct_io)
                    .map_err(self.io("open base", &base.path))?;
                let upper_file = self.job_file(upper.id)?;
                // In the place of the lock that whoever reads it has; until the job has ended.
                self.lock_base(lower_layer.data(), &base.path, true)?;
                (file, upper_file)
            }
            None if !into_base => (self.job_file(lower.id)?, self.job_file(upper.id)?),
            _ => return Err(gone(row)),
        };
        Ok(Down::new(
            upper_layer,
            (upper_file, upper_header, upper_map.incarnation()),
            lower_layer,
            (lower_file, lower_header, lower_map.incarnation()),
            upper.size,
        ))
    }
}

/// The layers of a job are not what it needs.
pub(super) fn gone(row: &JobRow) -> Error {
    Error::Busy {
        what: format!("the layers of job {} are not what they were", row.id.0),
    }
}
