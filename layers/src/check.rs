//! Verifies a store offline, and rebuilds its catalog from its layers.
//!
//! The check changes nothing but what opening a database changes (a commit that was interrupted is rolled back). It
//! takes the store's lock, so that it never looks at a store in motion. Damage is not an error of the check but a
//! [`Finding`]: it goes on and reports all there is.

mod jobs;
mod rebuild;
mod scrub;
mod shared;
#[cfg(test)]
mod tests;
mod unwritten;

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use crate::catalog::sqlite::{CATALOG_NAME, SqliteCatalog};
use crate::catalog::{CatalogState, LayerRow, LayerState};
use crate::error::{Error, Result};
use crate::file::Media;
use crate::format::header::RawBase;
use crate::lock::StoreLock;
use crate::map::set::SectorSet;
use crate::mapfile::{
    LAYERS_DIR, LayerKind, MapFile, MapHeader, MapState, Recovery, data_path, layer_dir, map_path,
};
use crate::units::{LayerId, SECTOR_BYTES, Sector};

pub use rebuild::{Rebuilt, rebuild_catalog};
pub use unwritten::unwritten;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Worth knowing, needs nothing.
    Note,
    /// Not as it should be; no data that was flushed is affected.
    Warning,
    /// Data is lost, or the store will refuse to open something.
    Error,
}

/// Something that the check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// The layer that it is about.
    pub layer: Option<LayerId>,
    /// What was found.
    pub what: String,
    /// What to do about it.
    pub fix: String,
}

/// What the check looked at, and what it found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// All findings, in the order in which they came up.
    pub findings: Vec<Finding>,
    /// Layers looked at.
    pub layers: usize,
    /// Volumes in the catalog.
    pub volumes: usize,
    /// Snapshots in the catalog.
    pub snapshots: usize,
    /// Layers whose data was held against checksums.
    pub scrubbed_layers: usize,
    /// Bytes of that data.
    pub scrubbed_bytes: u64,
    /// Whether the host's page cache could not be gone past for some of it.
    pub through_page_cache: bool,
}

impl Report {
    /// Whether there is no error among the findings.
    pub fn is_sound(&self) -> bool {
        self.findings
            .iter()
            .all(|finding| finding.severity < Severity::Error)
    }

    /// Adds a finding.
    fn add(
        &mut self,
        severity: Severity,
        layer: Option<LayerId>,
        what: impl Into<String>,
        fix: impl Into<String>,
    ) {
        self.findings.push(Finding {
            severity,
            layer,
            what: what.into(),
            fix: fix.into(),
        });
    }
}

/// How thoroughly to check.
#[derive(Clone, Copy, Debug, Default)]
pub struct CheckOptions {
    /// Read the maps' headers only, not their checkpoints and journals.
    pub headers_only: bool,
    /// Hold the data of sealed layers against their checksums: reads all of it.
    pub scrub: bool,
}

/// The advice where a layer's own bytes are lost.
const FIX_RESTORE: &str = "restore the layer's directory from a backup; \
    volumes and snapshots over it cannot be opened until then";
/// The advice where the catalog is lost and the layers are not.
const FIX_REBUILD: &str = "make a new catalog from the layers with `check --rebuild-catalog`; the old one is kept beside it";

/// Checks the store in `dir`; `media` is the same directory.
///
/// # Errors
/// `Busy` with the holder's pid while the store is in use; `Invalid` if there is no store; `Io`.
pub fn check(dir: &Path, media: &Arc<dyn Media>, options: CheckOptions) -> Result<Report> {
    let _lock = lock_store(dir)?;
    let mut report = Report::default();
    let state = match SqliteCatalog::look(dir) {
        Ok(state) => Some(state),
        Err(error) => {
            let fix = match error {
                Error::Unsupported { .. } => "use the newer version that wrote it",
                _ => FIX_REBUILD,
            };
            report.add(Severity::Error, None, error.to_string(), fix);
            None
        }
    };
    check_layers(state.as_ref(), media, options, &mut report)?;
    if let Some(state) = &state {
        shared::check(dir, state, &mut report);
        failures(state, &mut report);
    }
    leftovers(dir, &mut report)?;
    Ok(report)
}

/// Volumes that take no more writes.
fn failures(state: &CatalogState, report: &mut Report) {
    for row in state.volumes.values() {
        if let Some(cause) = &row.failed {
            report.add(
                Severity::Warning,
                Some(row.active),
                format!("volume {:?} takes no more writes since an earlier failure: {cause}", row.name),
                "find out why the host failed, start the daemon, and recover the volume (stratablk volume recover), or go back \
                 to a snapshot",
            );
        }
    }
}

/// Checks the layers of a store against a catalog that is known: for simulations.
///
/// # Errors
/// `Io`.
pub fn check_against(
    state: &CatalogState,
    media: &Arc<dyn Media>,
    options: CheckOptions,
) -> Result<Report> {
    let mut report = Report::default();
    check_layers(Some(state), media, options, &mut report)?;
    Ok(report)
}

/// The layers, against the catalog if there is one.
fn check_layers(
    state: Option<&CatalogState>,
    media: &Arc<dyn Media>,
    options: CheckOptions,
    report: &mut Report,
) -> Result<()> {
    let mut directories = layer_directories(media, report)?;
    let all = directories.clone();
    if let Some(state) = state {
        report.volumes = state.volumes.len();
        report.snapshots = state.snapshots.len();
        for row in state.layers.values() {
            report.layers += 1;
            if directories.remove(&row.id) {
                check_layer(media, Some((state, row)), row.id, &all, options, report);
            } else {
                report.add(
                    Severity::Error,
                    Some(row.id),
                    format!(
                        "{} is missing",
                        media.display_path(&layer_dir(row.id)).display()
                    ),
                    FIX_RESTORE,
                );
            }
        }
        for layer in directories {
            if state.doomed.contains(&layer) {
                jobs::doomed(media, layer, report);
            } else {
                orphan(media, layer, report);
            }
        }
        jobs::waiting(state, report);
    } else {
        for layer in directories {
            report.layers += 1;
            check_layer(media, None, layer, &all, options, report);
        }
    }
    Ok(())
}

/// Takes the lock of a store that exists; a directory that is no store is not touched.
fn lock_store(dir: &Path) -> Result<StoreLock> {
    let is_store = [CATALOG_NAME, LAYERS_DIR]
        .iter()
        .any(|name| dir.join(name).exists());
    if !is_store {
        return Err(Error::Invalid {
            field: "store",
            what: format!(
                "{} is not a store: it has neither {CATALOG_NAME} nor {LAYERS_DIR}",
                dir.display()
            ),
        });
    }
    StoreLock::acquire(dir)
}

/// The layers that have a directory.
fn layer_directories(media: &Arc<dyn Media>, report: &mut Report) -> Result<BTreeSet<LayerId>> {
    let path = Path::new(LAYERS_DIR);
    let names = match media.list(path) {
        Ok(names) => names,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(source) => {
            return Err(Error::Io {
                op: "list",
                path: media.display_path(path),
                source,
            });
        }
    };
    let mut layers = BTreeSet::new();
    for name in names {
        match layer_of(&name) {
            Some(layer) => {
                layers.insert(layer);
            }
            None => report.add(
                Severity::Note,
                None,
                format!(
                    "{} is not a layer",
                    media.display_path(&path.join(&name)).display()
                ),
                "it is not touched; remove it if you know that it is of no use",
            ),
        }
    }
    Ok(layers)
}

/// The layer that a directory is named after, in the one spelling that names have.
fn layer_of(name: &str) -> Option<LayerId> {
    let layer = LayerId(Uuid::try_parse(name).ok()?);
    (layer.to_string() == name).then_some(layer)
}

/// Files beside the catalog that are left from something.
fn leftovers(dir: &Path, report: &mut Report) -> Result<()> {
    let fail = |source| Error::Io {
        op: "list",
        path: dir.to_owned(),
        source,
    };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(fail)? {
        names.push(
            entry
                .map_err(fail)?
                .file_name()
                .to_string_lossy()
                .into_owned(),
        );
    }
    names.sort();
    for name in names {
        if name.starts_with("catalog.db.new") {
            report.add(
                Severity::Note,
                None,
                format!("{name} is left from a catalog whose creation was interrupted"),
                "nothing; it is removed when the next one is created",
            );
        } else if name.starts_with("catalog.db.bak-") {
            report.add(
                Severity::Note,
                None,
                format!("{name} is a catalog that was replaced by a rebuilt one"),
                "remove it when all volumes are known to be well",
            );
        }
    }
    Ok(())
}

/// A directory that the catalog does not know.
fn orphan(media: &Arc<dyn Media>, layer: LayerId, report: &mut Report) {
    let of = match MapFile::read_header(media, layer) {
        Ok(header) if header.volume.is_empty() => "it belongs to no volume".to_owned(),
        Ok(header) => format!("it was made for volume {:?}", header.volume),
        Err(error) => format!("it has no readable map ({error})"),
    };
    report.add(
        Severity::Warning,
        Some(layer),
        format!(
            "{} is not in the catalog: left from something that was interrupted; {of}",
            media.display_path(&layer_dir(layer)).display()
        ),
        "if no volume or snapshot is missed, remove the directory",
    );
}

/// Checks one layer: its files against the catalog's row, if there is a catalog.
fn check_layer(
    media: &Arc<dyn Media>,
    row: Option<(&CatalogState, &LayerRow)>,
    layer: LayerId,
    all: &BTreeSet<LayerId>,
    options: CheckOptions,
    report: &mut Report,
) {
    for name in media.list(&layer_dir(layer)).unwrap_or_default() {
        match name.as_str() {
            "map" | "data" | "sums" | "bad" => {}
            "sums.new" | "bad.new" => report.add(
                Severity::Note,
                Some(layer),
                format!("{name} is left from a scrub that was interrupted"),
                "nothing; it is removed when it is made anew",
            ),
            "map.new" => report.add(
                Severity::Note,
                Some(layer),
                "map.new is left from a replacement of the map that was interrupted; the map itself is whole",
                "nothing; it is removed when the store is next opened",
            ),
            "data.new" => report.add(
                Severity::Note,
                Some(layer),
                "data.new is left from a merge that was interrupted; the data itself is whole",
                "nothing; it is removed when the job goes on",
            ),
            _ => report.add(
                Severity::Note,
                Some(layer),
                format!("{name:?} in the layer's directory is not part of the layer"),
                "it is not touched; remove it if you know that it is of no use",
            ),
        }
    }
    let contents = if options.headers_only {
        MapFile::read_header(media, layer).map(|header| (header, None))
    } else {
        MapFile::read(media, layer).map(|read| {
            (
                read.header,
                Some((read.set, read.recovery, read.incarnation)),
            )
        })
    };
    let (header, contents) = match contents {
        Ok(contents) => contents,
        Err(error) => {
            let fix = match error {
                Error::Unsupported { .. } => "use the newer version that wrote it",
                _ => FIX_RESTORE,
            };
            report.add(Severity::Error, Some(layer), error.to_string(), fix);
            return;
        }
    };
    if let Some((state, row)) = row {
        compare(state, row, &header, report);
    } else if let Some(parent) = header.parent.filter(|parent| !all.contains(parent)) {
        report.add(
            Severity::Error,
            Some(layer),
            format!("its parent {parent} has no directory"),
            FIX_RESTORE,
        );
    }
    let set = contents.as_ref().map(|(set, _, _)| set);
    let under_way = row.map_or_else(Default::default, |(state, _)| jobs::under_way(state, layer));
    match &header.kind {
        LayerKind::Differencing => {
            check_data(media, &header, set, under_way.shares_file, report);
        }
        LayerKind::RawBase(_) if under_way.writes_base => {}
        LayerKind::RawBase(base) => check_base(media, layer, base, report),
    }
    let sealed = header.state == MapState::Sealed && header.kind == LayerKind::Differencing;
    if sealed {
        scrub::known_bad(media, &header, report);
    }
    if let Some((set, recovery, incarnation)) = &contents {
        check_recovery(layer, recovery, report);
        if options.scrub && sealed {
            scrub::check(media, &header, set, *incarnation, report);
        }
    }
}

/// The catalog's row against the map's header.
fn compare(state: &CatalogState, row: &LayerRow, header: &MapHeader, report: &mut Report) {
    let text = |layer: Option<LayerId>| layer.map_or("none".to_owned(), |layer| layer.to_string());
    let base = match &header.kind {
        LayerKind::Differencing => None,
        LayerKind::RawBase(base) => Some(base),
    };
    let base_text = |base: Option<&RawBase>| {
        base.map_or("none".to_owned(), |base| {
            format!(
                "{} of {} bytes, modified at {} ns",
                base.path.display(),
                base.len,
                base.mtime_ns
            )
        })
    };
    let mut differences = Vec::new();
    if state.store != header.store {
        differences.push(("store", state.store.to_string(), header.store.to_string()));
    }
    if !state.may_have_parent(row.id, header.parent) {
        differences.push(("parent", text(row.parent), text(header.parent)));
    }
    // Of a layer that takes writes the catalog is right, and the map follows it.
    let resizing = row.size != header.size && row.state == LayerState::Active;
    if resizing {
        report.add(
            Severity::Note,
            Some(row.id),
            format!(
                "its disk got {} sectors, and its map still says {}",
                row.size, header.size
            ),
            "nothing; it is finished when the volume is next opened",
        );
    } else if row.size != header.size {
        differences.push((
            "size in sectors",
            row.size.to_string(),
            header.size.to_string(),
        ));
    }
    let base_is_written = jobs::under_way(state, row.id).writes_base && base.is_some();
    if row.base.as_ref() != base && !base_is_written {
        differences.push(("base", base_text(row.base.as_ref()), base_text(base)));
    }
    let states_fit = match row.state {
        LayerState::Active => header.state == MapState::Active,
        LayerState::Sealing => true,
        LayerState::Sealed => header.state == MapState::Sealed,
    };
    if !states_fit {
        differences.push((
            "state",
            format!("{:?}", row.state),
            format!("{:?}", header.state),
        ));
    }
    for (what, catalog, map) in differences {
        report.add(
            Severity::Error,
            Some(row.id),
            format!("{what}: the catalog says {catalog}, the map's header says {map}"),
            "if the catalog is an old copy, make a new one with `check --rebuild-catalog`; \
             if the layer is, restore its directory",
        );
    }
    if row.state == LayerState::Sealing {
        report.add(
            Severity::Note,
            Some(row.id),
            "its sealing was interrupted",
            "nothing; it is finished when the store is next opened",
        );
    }
}

/// The data file, as far as can be told without knowing what should be in it. One that is shared with another layer may be
/// longer than the disk.
fn check_data(
    media: &Arc<dyn Media>,
    header: &MapHeader,
    set: Option<&SectorSet>,
    shared: bool,
    report: &mut Report,
) {
    let layer = Some(header.layer);
    let path = data_path(header.layer);
    let shown = media.display_path(&path);
    let stat = match media.stat(&path) {
        Ok(stat) => stat,
        Err(error) => {
            report.add(
                Severity::Error,
                layer,
                format!("{}: {error}", shown.display()),
                FIX_RESTORE,
            );
            return;
        }
    };
    if !stat.is_file {
        report.add(
            Severity::Error,
            layer,
            format!("{} is not a regular file", shown.display()),
            FIX_RESTORE,
        );
        return;
    }
    let longest = header.sectors_end().saturating_mul(SECTOR_BYTES);
    if stat.len > longest && !shared {
        report.add(
            Severity::Note,
            layer,
            format!(
                "{} has {} bytes, a disk of {} sectors has room for {longest}",
                shown.display(),
                stat.len,
                header.size
            ),
            "nothing; making the disk smaller was interrupted, and what lies behind its end is never read",
        );
    }
    if let Some(what) = set.and_then(|set| cut_off(set, header.size, stat.len)) {
        report.add(
            Severity::Error,
            layer,
            format!("{} {what}", shown.display()),
            FIX_RESTORE,
        );
    }
}

/// What is wrong with a data file of this length, of which a map of a disk of this size says so, or `None`. Data is in its file
/// before a map says that it is.
pub(crate) fn cut_off(set: &SectorSet, size: Sector, len: u64) -> Option<String> {
    let needed = set.data_end().0.min(size.0).saturating_mul(SECTOR_BYTES);
    (len < needed).then(|| {
        format!(
            "was cut off: it has {len} bytes, the map says that there is data up to byte {needed}"
        )
    })
}

/// The raw image against what the store remembers of it.
fn check_base(media: &Arc<dyn Media>, layer: LayerId, base: &RawBase, report: &mut Report) {
    let fix = "a base must never change: restore the image, with its time of modification; \
               or create new volumes from it as it is now";
    match media.stat(&base.path) {
        Err(error) => report.add(
            Severity::Error,
            Some(layer),
            format!("base {}: {error}", base.path.display()),
            "put the image back where it was",
        ),
        Ok(stat) => {
            if let Some(what) = base_change(base, &stat) {
                let path = media.display_path(&base.path);
                report.add(
                    Severity::Error,
                    Some(layer),
                    Error::BaseChanged { path, layer, what }.to_string(),
                    fix,
                );
            }
        }
    }
}

/// In what a raw image differs from what is remembered of it, or `None`.
pub fn base_change(base: &RawBase, now: &crate::file::FileStat) -> Option<String> {
    if !now.is_file {
        return Some("it is no longer a regular file".into());
    }
    if now.len != base.len {
        return Some(format!(
            "its size went from {} to {} bytes",
            base.len, now.len
        ));
    }
    if now.mtime_ns != base.mtime_ns {
        return Some(format!(
            "its time of modification went from {} to {} ns since 1970",
            base.mtime_ns, now.mtime_ns
        ));
    }
    None
}

/// What the journal's end says.
fn check_recovery(layer: LayerId, recovery: &Recovery, report: &mut Report) {
    if recovery.dropped_bytes > 0 {
        report.add(
            Severity::Warning,
            Some(layer),
            format!(
                "the journal of {} ends with {} bytes of a flush that was cut off and never acknowledged; \
                 {} records up to commit {} are good",
                map_path(layer).display(),
                recovery.dropped_bytes,
                recovery.records,
                recovery.epoch.0
            ),
            "nothing; the bytes are dropped when the store is next opened",
        );
    }
}
