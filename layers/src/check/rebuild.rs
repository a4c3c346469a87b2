//! A new catalog from the headers of the layers.
//!
//! A header has the names that were true when its map was last written. That is enough for all layers, for every volume
//! (its active layer carries its name and type) and for every snapshot whose layer was sealed; it is not enough for
//! attachments, nor for names that were removed or changed since. Where headers contradict each other nothing is guessed.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Report, layer_directories, lock_store, shared};
use crate::catalog::sqlite::{CATALOG_NAME, SqliteCatalog, io_error, journal_of, sync_dir};
use crate::catalog::{
    Catalog, CatalogState, LayerRow, LayerState, Rows, SnapshotRow, VolumeKind, VolumeRow,
};
use crate::error::{Error, Result};
use crate::file::Media;
use crate::mapfile::{LAYERS_DIR, LayerKind, MapFile, MapHeader, MapState, map_path};
use crate::ops::kind::starts_anew;
use crate::store::now_ns;
use crate::units::LayerId;

/// What a rebuilt catalog has, and what it cannot have.
#[derive(Clone, Debug, Default)]
pub struct Rebuilt {
    /// Layers found.
    pub layers: usize,
    /// Volumes found.
    pub volumes: usize,
    /// Snapshots found.
    pub snapshots: usize,
    /// What could not be known, and what was decided.
    pub notes: Vec<String>,
    /// Where the old catalog is, if there was one.
    pub backup: Option<PathBuf>,
}

/// Makes a new catalog for the store in `dir` from its layers' headers alone. The old one is kept as
/// `catalog.db.bak-N`. All or nothing.
///
/// # Errors
/// `Busy` while the store is in use; `Corrupt` if a header cannot be read or headers contradict each other: nothing
/// was changed; `Invalid` if there is no store, or no layer; `Io`, `Catalog`.
pub fn rebuild_catalog(dir: &Path, media: &Arc<dyn Media>) -> Result<Rebuilt> {
    let _lock = lock_store(dir)?;
    let mut rebuilt = Rebuilt::default();
    let headers = read_headers(media, &mut rebuilt.notes)?;
    let state = assemble(dir, &headers, &mut rebuilt.notes).map_err(|what| Error::Corrupt {
        path: media.display_path(Path::new(LAYERS_DIR)),
        what,
    })?;
    rebuilt.backup = back_up(dir)?;
    let catalog = SqliteCatalog::create(dir, &state)?;
    rebuilt.layers = catalog.state().layers.len();
    rebuilt.volumes = catalog.state().volumes.len();
    rebuilt.snapshots = catalog.state().snapshots.len();
    rebuilt.notes.push(
        "attachments are not in the layers: attach each volume again; those that were made for attachments of a multiattach \
         volume are normal ones now"
            .into(),
    );
    Ok(rebuilt)
}

/// The headers of all layers. A directory without a map is a layer whose creation was interrupted.
fn read_headers(
    media: &Arc<dyn Media>,
    notes: &mut Vec<String>,
) -> Result<BTreeMap<LayerId, MapHeader>> {
    let mut report = Report::default();
    let mut headers = BTreeMap::new();
    for layer in layer_directories(media, &mut report)? {
        match MapFile::read_header(media, layer) {
            Ok(header) => {
                headers.insert(layer, header);
            }
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => notes.push(format!(
                "layer {layer} is left out: it has no map ({}), so its creation was interrupted",
                media.display_path(&map_path(layer)).display()
            )),
            Err(error) => return Err(error),
        }
    }
    notes.extend(report.findings.into_iter().map(|finding| finding.what));
    if headers.is_empty() {
        return Err(Error::Invalid {
            field: "store",
            what: format!(
                "{} holds no layer to make a catalog from",
                media.display_path(Path::new(LAYERS_DIR)).display()
            ),
        });
    }
    Ok(headers)
}

/// The catalog that these headers describe.
fn assemble(
    dir: &Path,
    headers: &BTreeMap<LayerId, MapHeader>,
    notes: &mut Vec<String>,
) -> Result<CatalogState, String> {
    let store = match headers.values().next() {
        Some(first) => first.store,
        None => return Err("there is no layer".into()),
    };
    let mut rows = Rows::empty(store);
    rows.next_job = next_job(dir);
    let parents: BTreeSet<LayerId> = headers
        .values()
        .filter_map(|header| header.parent)
        .collect();
    for header in headers.values() {
        if header.store != store {
            return Err(format!(
                "its layers are of two stores: {} and {}; move the layers of one of them away",
                store, header.store
            ));
        }
        if let Some(parent) = header.parent.filter(|parent| !headers.contains_key(parent)) {
            return Err(format!(
                "layer {} has parent {parent}, which is not there; put it back, or move away the layers over it",
                header.layer
            ));
        }
        let has_children = parents.contains(&header.layer);
        let layer_state = match header.state {
            MapState::Sealed => LayerState::Sealed,
            MapState::Active if has_children => {
                notes.push(format!(
                    "layer {} of volume {:?} was being sealed; if that was for a snapshot, its name is not known",
                    header.layer, header.volume
                ));
                LayerState::Sealing
            }
            MapState::Active => LayerState::Active,
        };
        let base = match &header.kind {
            LayerKind::Differencing => None,
            LayerKind::RawBase(base) => Some(base.clone()),
        };
        rows.layers.insert(
            header.layer,
            LayerRow {
                id: header.layer,
                parent: header.parent,
                size: header.size,
                state: layer_state,
                base,
                created_ns: header.created_ns,
            },
        );
        if layer_state == LayerState::Active {
            add_volume(&mut rows, header, notes)?;
        }
    }
    for volume in rows.volumes.values_mut() {
        volume.created_ns = oldest(headers, volume);
    }
    add_snapshots(&mut rows, headers, notes)?;
    shared::add_jobs(dir, &mut rows, notes);
    CatalogState::new(rows)
}

/// The number of the next job: none that the old catalog gave out, or, where nobody can tell, the time in seconds, since
/// there are fewer jobs than that. An interrupted commit is left as it is, for the backup.
fn next_job(dir: &Path) -> u64 {
    let whole = matches!(journal_of(&dir.join(CATALOG_NAME)).try_exists(), Ok(false));
    match whole.then(|| SqliteCatalog::look(dir)) {
        Some(Ok(old)) => old.next_job,
        Some(Err(_)) | None => (now_ns() / 1_000_000_000).max(1),
    }
}

/// The volume of an active layer.
fn add_volume(rows: &mut Rows, header: &MapHeader, notes: &mut Vec<String>) -> Result<(), String> {
    if header.volume.is_empty() {
        notes.push(format!(
            "layer {} is active and belongs to no volume",
            header.layer
        ));
        return Ok(());
    }
    match rows.volumes.entry(header.volume.clone()) {
        Entry::Occupied(other) => Err(format!(
            "layers {} and {} both say that they are the active layer of volume {:?} \
             (created at {} and {} ns since 1970); move away the directory of the one that is a leftover",
            other.get().active,
            header.layer,
            header.volume,
            other.get().created_ns,
            header.created_ns
        )),
        Entry::Vacant(place) => {
            let mut kind = header.volume_kind;
            if starts_anew(kind) && header.parent.is_none() {
                notes.push(format!(
                    "volume {:?} started from a layer again and again that is no longer below it: it is a normal one",
                    header.volume
                ));
                kind = VolumeKind::Normal;
            }
            if kind == VolumeKind::Immutable {
                notes.push(format!(
                    "volume {:?} is immutable and keeps what was written to it last until the host or its machine is \
                     started for the second time",
                    header.volume
                ));
            }
            place.insert(VolumeRow {
                name: header.volume.clone(),
                active: header.layer,
                size: header.size,
                created_ns: header.created_ns,
                attachment: None,
                kind,
                armed: false,
                attached_from: None,
                failed: None,
            });
            Ok(())
        }
    }
}

/// When a volume was created: with the oldest of the layers below its active one that have its name.
fn oldest(headers: &BTreeMap<LayerId, MapHeader>, volume: &VolumeRow) -> u64 {
    let mut seen = BTreeSet::new();
    let mut created_ns = volume.created_ns;
    let mut next = Some(volume.active);
    while let Some(header) = next.and_then(|layer| headers.get(&layer)) {
        // Headers that form a circle are found by the state's own rules, afterwards.
        if !seen.insert(header.layer) {
            break;
        }
        if header.volume == volume.name {
            created_ns = created_ns.min(header.created_ns);
        }
        next = header.parent;
    }
    created_ns
}

/// The snapshots that name sealed layers.
fn add_snapshots(
    rows: &mut Rows,
    headers: &BTreeMap<LayerId, MapHeader>,
    notes: &mut Vec<String>,
) -> Result<(), String> {
    let mut found: BTreeMap<(&str, &str), &MapHeader> = BTreeMap::new();
    for header in headers.values() {
        if header.state != MapState::Sealed
            || header.snapshot.is_empty()
            || header.volume.is_empty()
        {
            continue;
        }
        let full = format!("{}@{}", header.volume, header.snapshot);
        if !rows.volumes.contains_key(&header.volume) {
            notes.push(format!(
                "layer {} was snapshot {full}, whose volume is gone: it stays, without a name",
                header.layer
            ));
            continue;
        }
        match found.entry((&header.volume, &header.snapshot)) {
            Entry::Vacant(place) => {
                place.insert(header);
            }
            Entry::Occupied(mut place) => {
                let other = *place.get();
                if other.snapshot_ns == header.snapshot_ns {
                    return Err(format!(
                        "layers {} and {} both say that they are snapshot {full}, of the same instant",
                        other.layer, header.layer
                    ));
                }
                let older = if other.snapshot_ns < header.snapshot_ns {
                    place.insert(header)
                } else {
                    header
                };
                notes.push(format!(
                    "layer {} was an earlier snapshot {full}, which was deleted: it stays, without a name",
                    older.layer
                ));
            }
        }
    }
    if !found.is_empty() {
        notes.push(
            "snapshots that were deleted while their layer had to stay, whole, are back if its map is large".into(),
        );
    }
    let mut snapshots: Vec<_> = found
        .into_values()
        .map(|header| SnapshotRow {
            volume: header.volume.clone(),
            name: header.snapshot.clone(),
            layer: header.layer,
            group: header.group,
            created_ns: header.snapshot_ns,
            size: header.size,
        })
        .collect();
    snapshots.sort_by(|one, other| {
        (one.created_ns, &one.volume, &one.name).cmp(&(
            other.created_ns,
            &other.volume,
            &other.name,
        ))
    });
    rows.snapshots = snapshots;
    Ok(())
}

/// Copies the old catalog, with the journal of a commit that was interrupted, to the first name that is free.
fn back_up(dir: &Path) -> Result<Option<PathBuf>> {
    let path = dir.join(CATALOG_NAME);
    if !path.try_exists().map_err(io_error("stat", &path))? {
        return Ok(None);
    }
    let mut number = 1u32;
    let backup = loop {
        let backup = dir.join(format!("{CATALOG_NAME}.bak-{number}"));
        if !backup.try_exists().map_err(io_error("stat", &backup))? {
            break backup;
        }
        number += 1;
    };
    // DURABILITY: a synced copy is there before the old catalog is replaced.
    for (from, to) in [
        (journal_of(&path), journal_of(&backup)),
        (path.clone(), backup.clone()),
    ] {
        match fs::copy(&from, &to) {
            Ok(_) => fs::File::open(&to)
                .and_then(|file| file.sync_all())
                .map_err(io_error("sync", &to))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound && from != path => {}
            Err(error) => return Err(io_error("copy", &to)(error)),
        }
    }
    sync_dir(dir)?;
    Ok(Some(backup))
}
