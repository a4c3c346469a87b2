//! The real catalog: a SQLite database, `catalog.db` in the store's directory. Schema, modes and their reasons are in
//! `FORMAT.md`.

pub(crate) mod files;
mod reserve;
mod rows;
mod schema;
mod write;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::{Connection, ErrorCode, OpenFlags};
use uuid::Uuid;

use super::change::Undo;
use super::{Catalog, CatalogState, Change};
use crate::error::{Error, Result};
use crate::mapfile::LAYERS_DIR;
use crate::units::StoreId;

pub(crate) use files::{io_error, journal_of, remove_if_there, sync_dir};
use rows::load;
use schema::{APPLICATION_ID, QUERIES, QUERIES_1, QUERIES_2, Queries};
pub use schema::{SCHEMA, SCHEMA_VERSION};
use write::{fill, write_touched};

/// The catalog's name in the store's directory.
pub const CATALOG_NAME: &str = "catalog.db";
/// The name of a catalog that is being created.
const NEW_NAME: &str = "catalog.db.new";
/// The catalog of a store, open. The store's lock is held by whoever opened it.
#[derive(Debug)]
pub struct SqliteCatalog {
    /// The database.
    db: Connection,
    /// Its file.
    path: PathBuf,
    /// What the last successful commit left.
    state: Arc<CatalogState>,
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
        state.verify().map_err(|what| Error::Invalid {
            field: "catalog",
            what,
        })?;
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
            fill(&transaction, state)?;
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

    /// Opens the catalog of the store in `dir`, rolls back a commit that was interrupted, and checks every row. An older
    /// version is replaced by one of this version, all or nothing and durable.
    ///
    /// # Errors
    /// `Unsupported` for a newer version; `Corrupt` for a damaged database, or rows that break a rule; `Catalog`, `Io`.
    pub fn open(dir: &Path) -> Result<Self> {
        let (db, path, version, state) = read(dir)?;
        if version != SCHEMA_VERSION {
            // DURABILITY: the old catalog was read, so that an interrupted commit to it is rolled back, and its journal is of
            // no more use. The new one takes its place whole, by a rename.
            db.close()
                .map_err(|(_, source)| Error::Catalog { path, source })?;
            return Self::create(dir, &state);
        }
        Ok(Self::of(db, path, state))
    }

    /// The same for a catalog of this version; one of another is refused, and stays as it is but for a commit that was
    /// interrupted.
    ///
    /// # Errors
    /// `Unsupported` for another version; otherwise as `open`.
    pub fn open_as_it_is(dir: &Path) -> Result<Self> {
        let (db, path, version, state) = read(dir)?;
        if version != SCHEMA_VERSION {
            return Err(Error::Unsupported {
                path,
                what: format!(
                    "catalog version {version}, and a program that takes over leaves it as it is, so it must be \
                     {SCHEMA_VERSION}; stop the daemon in order and start this one without --takeover"
                ),
            });
        }
        Ok(Self::of(db, path, state))
    }

    /// An open one of this version.
    fn of(db: Connection, path: PathBuf, state: CatalogState) -> Self {
        // Changes nothing, but opens the journal. On a full disk it cannot, and the first commit does it.
        drop(db.pragma_update(None, "user_version", SCHEMA_VERSION));
        Self {
            db,
            path,
            state: Arc::new(state),
            failed: None,
        }
    }

    /// What the catalog of the store in `dir` holds, of whatever version it is. Changes nothing, but that a commit which
    /// was interrupted is rolled back.
    ///
    /// # Errors
    /// As `open`.
    pub fn look(dir: &Path) -> Result<CatalogState> {
        read(dir).map(|(_, _, _, state)| state)
    }

    /// Lets the database grow to so many pages: a small full disk.
    #[cfg(test)]
    pub(super) fn limit_pages(&self, pages: u32) {
        let set = self
            .db
            .pragma_update_and_check(None, "max_page_count", pages, |_| Ok(()));
        assert_eq!(set, Ok(()));
    }

    /// Changes rows behind the back of the state in memory.
    #[cfg(test)]
    pub(super) fn execute(&self, statement: &str) {
        let done = self.db.execute(statement, []);
        assert!(done.is_ok(), "{done:?}");
    }

    /// Writes the rows that changes touched, as one transaction.
    fn write(&mut self, undo: &Undo) -> rusqlite::Result<()> {
        let transaction = self.db.transaction()?;
        write_touched(&transaction, &undo.touched(), &self.state)?;
        // Dropping a transaction that was not committed rolls it back.
        transaction.commit()
    }
}

impl Catalog for SqliteCatalog {
    fn state(&self) -> &CatalogState {
        &self.state
    }

    fn share(&self) -> Arc<CatalogState> {
        Arc::clone(&self.state)
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
        let undo = Arc::make_mut(&mut self.state).change(changes)?;
        let frees = changes.iter().any(Change::frees_space);
        let written = self.write(&undo).or_else(|error| {
            let full = error.sqlite_error_code() == Some(ErrorCode::DiskFull);
            if full && frees && reserve::give_up(&self.path) {
                return self.write(&undo);
            }
            Err(error)
        });
        match written {
            Ok(()) => {
                if !frees {
                    reserve::keep(&self.path);
                }
                Ok(())
            }
            Err(source) => {
                Arc::make_mut(&mut self.state).undo(undo);
                // A failed commit was rolled back, or was not: SQLite reports a failure after the point of no return
                // (the sync of the directory) in the same way. Look.
                let unchanged = load(&self.db, &QUERIES)
                    .is_ok_and(|read| read.is_ok_and(|read| read == *self.state));
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
    // The store's lock keeps others out anyway. The journal stays open and is made void in place: a commit opens nothing, which
    // a process with a full table of descriptors could not do, and needs no sync of the directory, which SQLite leaves out
    // where it cannot open that.
    db.pragma_update_and_check(None, "locking_mode", "EXCLUSIVE", |_| Ok(()))?;
    db.pragma_update(None, "temp_store", "MEMORY")?;
    Ok(db)
}

/// Opens a catalog of any version that is known: the database, its file, the version, and what it holds.
fn read(dir: &Path) -> Result<(Connection, PathBuf, i64, CatalogState)> {
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
    let queries: &Queries = match version {
        SCHEMA_VERSION => &QUERIES,
        2 => &QUERIES_2,
        1 => &QUERIES_1,
        _ if version > SCHEMA_VERSION => {
            return Err(Error::Unsupported {
                path,
                what: format!(
                    "catalog version {version}; this one knows versions 1 to {SCHEMA_VERSION}"
                ),
            });
        }
        _ => {
            return Err(Error::Corrupt {
                path,
                what: format!("catalog version {version}, which never was"),
            });
        }
    };
    let damage = |what| Error::Corrupt {
        path: path.clone(),
        what,
    };
    if let Some(what) = integrity(&db).map_err(fail)? {
        return Err(damage(what));
    }
    let state = load(&db, queries).map_err(fail)?.map_err(damage)?;
    Ok((db, path, version, state))
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
