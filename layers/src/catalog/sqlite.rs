//! The real catalog: a SQLite database, `catalog.db` in the store's directory. Schema, modes and their reasons are in
//! `FORMAT.md`.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rusqlite::{Connection, ErrorCode, OpenFlags, Row, params};
use uuid::Uuid;

use super::{
    Catalog, CatalogState, Change, LayerRow, LayerState, SnapshotRow, VolumeKind, VolumeRow,
};
use crate::error::{Error, Result};
use crate::format::header::RawBase;
use crate::mapfile::LAYERS_DIR;
use crate::store::Attachment;
use crate::units::{LayerId, Sector, StoreId};

/// The catalog's name in the store's directory.
pub const CATALOG_NAME: &str = "catalog.db";
/// The name of a catalog that is being created.
const NEW_NAME: &str = "catalog.db.new";
/// The version that this code writes and reads.
pub const SCHEMA_VERSION: i64 = 1;
/// Says that a database is one of ours.
const APPLICATION_ID: i64 = 0x5354_5241;

/// The tables of version 1, as printed in `FORMAT.md`.
pub const SCHEMA: &str = "\
CREATE TABLE store (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    uuid BLOB NOT NULL CHECK (length(uuid) = 16)
) STRICT;
CREATE TABLE layers (
    uuid BLOB NOT NULL PRIMARY KEY CHECK (length(uuid) = 16),
    parent BLOB REFERENCES layers (uuid) DEFERRABLE INITIALLY DEFERRED CHECK (parent <> uuid),
    sectors INTEGER NOT NULL CHECK (sectors BETWEEN 1 AND 137438953472),
    state TEXT NOT NULL CHECK (state IN ('active', 'sealing', 'sealed')),
    base_path BLOB CHECK (length(base_path) BETWEEN 1 AND 3072),
    base_bytes INTEGER CHECK (base_bytes = sectors * 512),
    base_mtime_ns INTEGER,
    created_ns INTEGER NOT NULL CHECK (created_ns >= 0),
    CHECK ((base_path IS NULL) = (base_bytes IS NULL) AND (base_path IS NULL) = (base_mtime_ns IS NULL)),
    CHECK (base_path IS NULL OR (parent IS NULL AND state = 'sealed'))
) STRICT, WITHOUT ROWID;
CREATE TABLE volumes (
    name TEXT NOT NULL PRIMARY KEY CHECK (length(CAST(name AS BLOB)) BETWEEN 1 AND 64),
    active BLOB NOT NULL UNIQUE REFERENCES layers (uuid) DEFERRABLE INITIALLY DEFERRED,
    sectors INTEGER NOT NULL CHECK (sectors BETWEEN 1 AND 137438953472),
    created_ns INTEGER NOT NULL CHECK (created_ns >= 0),
    socket BLOB CHECK (length(socket) > 0),
    queues INTEGER CHECK (queues BETWEEN 1 AND 65535),
    read_only INTEGER CHECK (read_only IN (0, 1)),
    CHECK ((socket IS NULL) = (queues IS NULL) AND (socket IS NULL) = (read_only IS NULL))
) STRICT, WITHOUT ROWID;
CREATE TABLE snapshots (
    volume TEXT NOT NULL REFERENCES volumes (name) DEFERRABLE INITIALLY DEFERRED,
    name TEXT NOT NULL CHECK (length(CAST(name AS BLOB)) BETWEEN 1 AND 64),
    layer BLOB NOT NULL REFERENCES layers (uuid) DEFERRABLE INITIALLY DEFERRED,
    instant BLOB NOT NULL CHECK (length(instant) = 16),
    created_ns INTEGER NOT NULL CHECK (created_ns >= 0),
    sectors INTEGER NOT NULL CHECK (sectors BETWEEN 1 AND 137438953472),
    PRIMARY KEY (volume, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX layers_by_parent ON layers (parent);
CREATE INDEX snapshots_by_layer ON snapshots (layer);
";

/// The catalog of a store, open. The store's lock is held by whoever opened it.
#[derive(Debug)]
pub struct SqliteCatalog {
    /// The database.
    db: Connection,
    /// Its file.
    path: PathBuf,
    /// What the last successful commit left.
    state: CatalogState,
    /// Why nobody knows any more what the medium holds.
    failed: Option<String>,
}

impl SqliteCatalog {
    /// Opens the catalog of the store in `dir`, or makes an empty one for a new store. A store that has layers and no
    /// catalog is not new.
    ///
    /// # Errors
    /// As for [`SqliteCatalog::open`] and [`SqliteCatalog::create`]; `Corrupt` if only the catalog is missing.
    pub fn open_or_create(dir: &Path) -> Result<Self> {
        let path = dir.join(CATALOG_NAME);
        if path.try_exists().map_err(io_error("stat", &path))? {
            return Self::open(dir);
        }
        let layers = dir.join(LAYERS_DIR);
        let orphans = match fs::read_dir(&layers) {
            Ok(entries) => entries
                .filter_map(|entry| entry.ok())
                .filter(|entry| {
                    entry
                        .file_name()
                        .to_str()
                        .is_some_and(|name| Uuid::try_parse(name).is_ok())
                })
                .count(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(io_error("list", &layers)(error)),
        };
        if orphans > 0 {
            return Err(Error::Corrupt {
                path,
                what: format!(
                    "it is missing, while {} holds {orphans} layers; put it back, or \
                     make a new one from the layers with `check --rebuild-catalog`",
                    layers.display()
                ),
            });
        }
        Self::create(dir, &CatalogState::empty(StoreId(Uuid::new_v4())))
    }

    /// Writes a new catalog with `state` in it, in place of the one in `dir` if there is one. All or nothing, and
    /// durable on return.
    ///
    /// # Errors
    /// `Invalid` if the state breaks a rule; `Catalog`, `Io`.
    pub fn create(dir: &Path, state: &CatalogState) -> Result<Self> {
        let changes = state.as_changes();
        CatalogState::empty(state.store).after(&changes)?;
        let (new, path) = (dir.join(NEW_NAME), dir.join(CATALOG_NAME));
        for leftover in [journal_of(&new), new.clone(), journal_of(&path)] {
            remove_if_there(&leftover)?;
        }
        let fail = |source| Error::Catalog {
            path: new.clone(),
            source,
        };
        let mut db = connect(&new, OpenFlags::SQLITE_OPEN_CREATE).map_err(fail)?;
        let made = (|| {
            let transaction = db.transaction()?;
            transaction.execute_batch(SCHEMA)?;
            transaction.execute(
                "INSERT INTO store (id, uuid) VALUES (1, ?1)",
                params![state.store.0.as_bytes()],
            )?;
            for change in &changes {
                execute(&transaction, change)?;
            }
            transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
            transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
            transaction.commit()
        })();
        made.and_then(|()| db.close().map_err(|(_, error)| error))
            .inspect_err(|_| drop(fs::remove_file(&new)))
            .map_err(fail)?;
        // DURABILITY: SQLite synced the file at its commit; from the rename on the store has this catalog.
        fs::rename(&new, &path).map_err(io_error("rename", &new))?;
        sync_dir(dir)?;
        Self::open(dir)
    }

    /// Opens the catalog of the store in `dir`, rolls back a commit that was interrupted, and checks every row.
    ///
    /// # Errors
    /// `Unsupported` for a newer version; `Corrupt` for a damaged database, or rows that break a rule; `Catalog`, `Io`.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(CATALOG_NAME);
        // Said by us rather than by the database, whose words for it are "unable to open".
        fs::metadata(&path).map_err(io_error("open", &path))?;
        let fail = |source| database_error(&path, source);
        let db = connect(&path, OpenFlags::empty()).map_err(fail)?;
        let pragma = |name| db.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
        let application = pragma("application_id").map_err(fail)?;
        if application != APPLICATION_ID {
            return Err(Error::Corrupt {
                path,
                what: format!("not a catalog: application id {application:#x}"),
            });
        }
        let version = pragma("user_version").map_err(fail)?;
        if version > SCHEMA_VERSION {
            return Err(Error::Unsupported {
                path,
                what: format!("catalog version {version}; this one knows version {SCHEMA_VERSION}"),
            });
        }
        if version != SCHEMA_VERSION {
            return Err(Error::Corrupt {
                path,
                what: format!("catalog version {version}, which never was"),
            });
        }
        let damage = |what| Error::Corrupt {
            path: path.clone(),
            what,
        };
        if let Some(what) = integrity(&db).map_err(fail)? {
            return Err(damage(what));
        }
        let state = load(&db).map_err(fail)?.map_err(damage)?;
        Ok(Self {
            db,
            path,
            state,
            failed: None,
        })
    }

    /// Lets the database grow to so many pages: a small full disk.
    #[cfg(test)]
    pub(super) fn limit_pages(&self, pages: u32) {
        let set = self
            .db
            .pragma_update_and_check(None, "max_page_count", pages, |_| Ok(()));
        assert_eq!(set, Ok(()));
    }

    /// Carries out the changes as one transaction.
    fn write(&mut self, changes: &[Change]) -> rusqlite::Result<()> {
        let transaction = self.db.transaction()?;
        for change in changes {
            execute(&transaction, change)?;
        }
        // Dropping a transaction that was not committed rolls it back.
        transaction.commit()
    }
}

impl Catalog for SqliteCatalog {
    fn state(&self) -> &CatalogState {
        &self.state
    }

    fn commit(&mut self, changes: &[Change]) -> Result<()> {
        if let Some(cause) = &self.failed {
            return Err(Error::Busy {
                what: format!(
                    "catalog {} takes no more changes, since an earlier failure \
                     ({cause}) left it open what it holds; restart the daemon",
                    self.path.display()
                ),
            });
        }
        let next = self.state.after(changes)?;
        match self.write(changes) {
            Ok(()) => {
                self.state = next;
                Ok(())
            }
            Err(source) => {
                // A failed commit was rolled back, or was not: SQLite reports a failure after the point of no return
                // (the sync of the directory) in the same way. Look.
                let unchanged =
                    load(&self.db).is_ok_and(|read| read.is_ok_and(|read| read == self.state));
                if !unchanged {
                    self.failed = Some(source.to_string());
                }
                Err(Error::Catalog {
                    path: self.path.clone(),
                    source,
                })
            }
        }
    }
}

/// Opens a database in the modes of `FORMAT.md`.
fn connect(path: &Path, more: OpenFlags) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | more;
    let db = Connection::open_with_flags(path, flags)?;
    db.pragma_update(None, "trusted_schema", false)?;
    db.pragma_update(None, "cell_size_check", true)?;
    db.pragma_update(None, "foreign_keys", true)?;
    db.pragma_update(None, "synchronous", "EXTRA")?;
    db.pragma_update_and_check(None, "journal_mode", "DELETE", |_| Ok(()))?;
    Ok(db)
}

/// What the database finds wrong with itself.
fn integrity(db: &Connection) -> rusqlite::Result<Option<String>> {
    let mut found = Vec::new();
    db.pragma_query(None, "integrity_check", |row| {
        found.push(row.get::<_, String>(0)?);
        Ok(())
    })?;
    if found != ["ok"] {
        return Ok(Some(found.join("; ")));
    }
    let mut dangling = None;
    db.pragma_query(None, "foreign_key_check", |row| {
        let (table, parent): (String, String) = (row.get(0)?, row.get(2)?);
        dangling = Some(format!(
            "a row of {table} refers to one of {parent} that does not exist"
        ));
        Ok(())
    })?;
    Ok(dangling)
}

/// Carries out one change.
fn execute(db: &Connection, change: &Change) -> rusqlite::Result<()> {
    let changed = match change {
        Change::AddLayer(row) => {
            let base = row.base.as_ref();
            db.prepare_cached(
                "INSERT INTO layers (uuid, parent, sectors, state, base_path, base_bytes, base_mtime_ns, created_ns) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            )?
            .execute(params![
                row.id.0.as_bytes(),
                row.parent.as_ref().map(|parent| parent.0.as_bytes()),
                integer(row.size.0)?,
                state_text(row.state),
                base.map(|base| base.path.as_os_str().as_bytes()),
                base.map(|base| integer(base.len)).transpose()?,
                base.map(|base| base.mtime_ns),
                integer(row.created_ns)?,
            ])?
        }
        Change::SetLayerState { layer, state } => db
            .prepare_cached("UPDATE layers SET state = ?2 WHERE uuid = ?1")?
            .execute(params![layer.0.as_bytes(), state_text(*state)])?,
        Change::RemoveLayer(layer) => db
            .prepare_cached("DELETE FROM layers WHERE uuid = ?1")?
            .execute(params![layer.0.as_bytes()])?,
        Change::AddVolume(row) => {
            let attachment = row.attachment.as_ref();
            db.prepare_cached(
                "INSERT INTO volumes (name, active, sectors, created_ns, socket, queues, read_only) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            )?
            .execute(params![
                row.name,
                row.active.0.as_bytes(),
                integer(row.size.0)?,
                integer(row.created_ns)?,
                attachment.map(|attachment| attachment.socket.as_os_str().as_bytes()),
                attachment.map(|attachment| attachment.queues),
                attachment.map(|attachment| attachment.read_only),
            ])?
        }
        Change::SetActive { volume, layer } => db
            .prepare_cached("UPDATE volumes SET active = ?2 WHERE name = ?1")?
            .execute(params![volume, layer.0.as_bytes()])?,
        Change::SetAttachment { volume, attachment } => {
            let attachment = attachment.as_ref();
            db.prepare_cached(
                "UPDATE volumes SET socket = ?2, queues = ?3, read_only = ?4 WHERE name = ?1",
            )?
            .execute(params![
                volume,
                attachment.map(|attachment| attachment.socket.as_os_str().as_bytes()),
                attachment.map(|attachment| attachment.queues),
                attachment.map(|attachment| attachment.read_only),
            ])?
        }
        Change::RemoveVolume(name) => db
            .prepare_cached("DELETE FROM volumes WHERE name = ?1")?
            .execute(params![name])?,
        Change::AddSnapshot(row) => db
            .prepare_cached(
                "INSERT INTO snapshots (volume, name, layer, instant, created_ns, sectors) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            )?
            .execute(params![
                row.volume,
                row.name,
                row.layer.0.as_bytes(),
                row.group.as_bytes(),
                integer(row.created_ns)?,
                integer(row.size.0)?,
            ])?,
        Change::RemoveSnapshot { volume, name } => db
            .prepare_cached("DELETE FROM snapshots WHERE volume = ?1 AND name = ?2")?
            .execute(params![volume, name])?,
        Change::SetParent { .. }
        | Change::SetBase { .. }
        | Change::Removed(_)
        | Change::SetSize { .. }
        | Change::SetKind { .. }
        | Change::SetArmed { .. }
        | Change::SetAttachedFrom { .. }
        | Change::AddJob(_)
        | Change::SetJob { .. }
        | Change::MoveJob { .. }
        | Change::RemoveJob(_) => return Err(rusqlite::Error::InvalidQuery),
    };
    // The state in memory said that there is such a row; a database that disagrees was changed behind our back.
    if changed == 1 {
        Ok(())
    } else {
        Err(rusqlite::Error::StatementChangedRows(changed))
    }
}

/// Reads everything. The outer error is the database's, the inner one says what is wrong with the rows.
fn load(db: &Connection) -> rusqlite::Result<Result<CatalogState, String>> {
    let store = db.query_row("SELECT uuid FROM store", [], |row| uuid(row, 0))?;
    let mut state = CatalogState::empty(StoreId(store));
    let mut rows = db.prepare(
        "SELECT uuid, parent, sectors, state, base_path, base_bytes, base_mtime_ns, created_ns FROM layers",
    )?;
    for row in rows.query_map([], layer_row)? {
        let row = row?;
        state.layers.insert(row.id, row);
    }
    let mut rows = db.prepare(
        "SELECT name, active, sectors, created_ns, socket, queues, read_only FROM volumes",
    )?;
    for row in rows.query_map([], volume_row)? {
        let row = row?;
        state.volumes.insert(row.name.clone(), row);
    }
    let mut rows = db.prepare(
        "SELECT volume, name, layer, instant, created_ns, sectors FROM snapshots ORDER BY created_ns, volume, name",
    )?;
    for row in rows.query_map([], snapshot_row)? {
        state.snapshots.push(row?);
    }
    Ok(state.verify().map(|()| state))
}

/// A row of `layers`.
fn layer_row(row: &Row<'_>) -> rusqlite::Result<LayerRow> {
    let text: String = row.get(3)?;
    let state = match text.as_str() {
        "active" => LayerState::Active,
        "sealing" => LayerState::Sealing,
        "sealed" => LayerState::Sealed,
        _ => return Err(conversion(3, format!("state {text:?}"))),
    };
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
        state,
        base,
        created_ns: unsigned(row, 7)?,
    })
}

/// A row of `volumes`.
fn volume_row(row: &Row<'_>) -> rusqlite::Result<VolumeRow> {
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
        kind: VolumeKind::Normal,
        armed: false,
        attached_from: None,
    })
}

/// A row of `snapshots`.
fn snapshot_row(row: &Row<'_>) -> rusqlite::Result<SnapshotRow> {
    Ok(SnapshotRow {
        volume: row.get(0)?,
        name: row.get(1)?,
        layer: LayerId(uuid(row, 2)?),
        group: uuid(row, 3)?,
        created_ns: unsigned(row, 4)?,
        size: Sector(unsigned(row, 5)?),
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

/// The database has signed integers only. The rules of the state exclude what does not fit.
fn integer(value: u64) -> rusqlite::Result<i64> {
    i64::try_from(value).map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))
}

/// How a state is written.
fn state_text(state: LayerState) -> &'static str {
    match state {
        LayerState::Active => "active",
        LayerState::Sealing => "sealing",
        LayerState::Sealed => "sealed",
    }
}

/// A column that does not hold what it should.
fn conversion(column: usize, what: String) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Text, what.into())
}

/// An error of reading: damage is told from what the host refused.
fn database_error(path: &Path, source: rusqlite::Error) -> Error {
    use rusqlite::Error as E;
    let damaged = match &source {
        E::SqliteFailure(failure, _) => matches!(
            failure.code,
            // `Unknown` is "SQL logic error": a table or column of the schema is missing.
            ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase | ErrorCode::Unknown
        ),
        E::FromSqlConversionFailure(..)
        | E::IntegralValueOutOfRange(..)
        | E::InvalidColumnType(..)
        | E::QueryReturnedNoRows
        | E::Utf8Error(..)
        | E::SqlInputError { .. } => true,
        _ => false,
    };
    let path = path.to_owned();
    if damaged {
        Error::Corrupt {
            path,
            what: source.to_string(),
        }
    } else {
        Error::Catalog { path, source }
    }
}

/// SQLite's rollback journal of a database.
pub(crate) fn journal_of(database: &Path) -> PathBuf {
    let mut name = database.file_name().unwrap_or(OsStr::new("")).to_owned();
    name.push("-journal");
    database.with_file_name(name)
}

/// Removes a file, which need not exist.
pub(crate) fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(io_error("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Makes the names in a directory durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    fs::File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(io_error("sync", dir))
}

/// Adds the operation and the file to the host's answer.
pub(crate) fn io_error<'a>(op: &'static str, path: &'a Path) -> impl Fn(io::Error) -> Error + 'a {
    move |source| Error::Io {
        op,
        path: path.to_owned(),
        source,
    }
}
