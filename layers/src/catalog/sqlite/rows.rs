//! Rows, as they are read.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use rusqlite::{Connection, Row};
use uuid::Uuid;

use super::schema::Queries;
use crate::catalog::{CatalogState, JobId, JobRow, LayerRow, Rows, SnapshotRow, VolumeRow};
use crate::format::header::RawBase;
use crate::store::Attachment;
use crate::units::{LayerId, Sector, StoreId};

/// Reads everything. The outer error is the database's, the inner one says what is wrong with the rows.
pub(super) fn load(
    db: &Connection,
    queries: &Queries,
) -> rusqlite::Result<Result<CatalogState, String>> {
    let (store, next_job) = db.query_row(queries.store, [], |row| {
        Ok((StoreId(uuid(row, 0)?), unsigned(row, 1)?))
    })?;
    let mut rows = Rows::empty(store);
    rows.next_job = next_job;
    each(db, queries.layers, layer, |row| {
        rows.layers.insert(row.id, row);
    })?;
    each(db, queries.volumes, volume, |row| {
        rows.volumes.insert(row.name.clone(), row);
    })?;
    each(db, queries.snapshots, snapshot, |row| {
        rows.snapshots.push(row);
    })?;
    each(db, queries.jobs, job, |row| {
        rows.jobs.insert(row.id, row);
    })?;
    each(
        db,
        queries.doomed,
        |row| uuid(row, 0),
        |id| {
            rows.doomed.insert(LayerId(id));
        },
    )?;
    Ok(CatalogState::new(rows))
}

/// Reads a table.
fn each<T>(
    db: &Connection,
    query: &str,
    read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
    mut put: impl FnMut(T),
) -> rusqlite::Result<()> {
    for row in db.prepare(query)?.query_map([], read)? {
        put(row?);
    }
    Ok(())
}

/// A row of `layers`.
fn layer(row: &Row<'_>) -> rusqlite::Result<LayerRow> {
    let base = match row.get::<_, Option<Vec<u8>>>(4)? {
        Some(path) => Some(RawBase {
            path: PathBuf::from(OsString::from_vec(path)),
            len: unsigned(row, 5)?,
            mtime_ns: row.get(6)?,
        }),
        None => None,
    };
    let parent = match row.get_ref(1)? {
        rusqlite::types::ValueRef::Null => None,
        _ => Some(LayerId(uuid(row, 1)?)),
    };
    Ok(LayerRow {
        id: LayerId(uuid(row, 0)?),
        parent,
        size: Sector(unsigned(row, 2)?),
        state: word(row, 3, layer_state::read)?,
        base,
        created_ns: unsigned(row, 7)?,
    })
}

/// A row of `volumes`.
fn volume(row: &Row<'_>) -> rusqlite::Result<VolumeRow> {
    let attachment = match row.get::<_, Option<Vec<u8>>>(4)? {
        Some(socket) => Some(Attachment {
            socket: PathBuf::from(OsString::from_vec(socket)),
            queues: row.get(5)?,
            read_only: row.get(6)?,
        }),
        None => None,
    };
    Ok(VolumeRow {
        name: row.get(0)?,
        active: LayerId(uuid(row, 1)?),
        size: Sector(unsigned(row, 2)?),
        created_ns: unsigned(row, 3)?,
        attachment,
        kind: word(row, 7, volume_kind::read)?,
        armed: row.get(8)?,
        attached_from: row.get(9)?,
        failed: row.get(10)?,
    })
}

/// A row of `snapshots`.
fn snapshot(row: &Row<'_>) -> rusqlite::Result<SnapshotRow> {
    Ok(SnapshotRow {
        volume: row.get(0)?,
        name: row.get(1)?,
        layer: LayerId(uuid(row, 2)?),
        group: uuid(row, 3)?,
        created_ns: unsigned(row, 4)?,
        size: Sector(unsigned(row, 5)?),
    })
}

/// A row of `jobs`.
fn job(row: &Row<'_>) -> rusqlite::Result<JobRow> {
    let rate: Option<i64> = row.get(8)?;
    Ok(JobRow {
        id: JobId(unsigned(row, 0)?),
        kind: word(row, 1, job_kind::read)?,
        subject: row.get(2)?,
        source: LayerId(uuid(row, 3)?),
        target: LayerId(uuid(row, 4)?),
        way: word(row, 5, way::read)?,
        state: word(row, 6, job_state::read)?,
        error: row.get(7)?,
        rate: rate.map(|_| unsigned(row, 8)).transpose()?,
        created_ns: unsigned(row, 9)?,
    })
}

/// A column of 16 bytes.
fn uuid(row: &Row<'_>, column: usize) -> rusqlite::Result<Uuid> {
    row.get::<_, [u8; 16]>(column).map(Uuid::from_bytes)
}

/// A column that is never negative.
fn unsigned(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    let value: i64 = row.get(column)?;
    u64::try_from(value).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(column, value))
}

/// A column that holds one of a few words.
fn word<T>(
    row: &Row<'_>,
    column: usize,
    read: impl FnOnce(&str) -> Option<T>,
) -> rusqlite::Result<T> {
    let text: String = row.get(column)?;
    read(&text).ok_or_else(|| {
        let what = format!("{text:?} is not one of the words that there are");
        rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Text, what.into())
    })
}

/// How the values of a type are written.
macro_rules! words {
    ($(#[doc = $doc:literal])* $name:ident: $type:path { $($value:ident = $word:literal,)+ }) => {
        $(#[doc = $doc])*
        pub(super) mod $name {
            use $type as T;

            /// How a value is written.
            pub fn text(value: T) -> &'static str {
                match value {
                    $(T::$value => $word,)+
                }
            }

            /// The value that is written so.
            pub fn read(word: &str) -> Option<T> {
                match word {
                    $($word => Some(T::$value),)+
                    _ => None,
                }
            }
        }
    };
}

words! {
    /// States of layers.
    layer_state: crate::catalog::LayerState {
        Active = "active",
        Sealing = "sealing",
        Sealed = "sealed",
    }
}
words! {
    /// Kinds of volumes.
    volume_kind: crate::catalog::VolumeKind {
        Normal = "normal",
        Immutable = "immutable",
        Writethrough = "writethrough",
        Multiattach = "multiattach",
        Readonly = "readonly",
    }
}
words! {
    /// Kinds of jobs.
    job_kind: crate::catalog::JobKind {
        Merge = "merge",
        PushDown = "push-down",
        Flatten = "flatten",
        Import = "import",
        IntoBase = "into-base",
        Scrub = "scrub",
    }
}
words! {
    /// Ways that data goes.
    way: crate::catalog::Way {
        Up = "up",
        Down = "down",
        InPlace = "in-place",
        Copy = "copy",
    }
}
words! {
    /// States of jobs.
    job_state: crate::catalog::JobState {
        Queued = "queued",
        Paused = "paused",
        Stopped = "stopped",
    }
}
