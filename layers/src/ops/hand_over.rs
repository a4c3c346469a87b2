//! A store that goes from one process to the next, while the machines that use it run on.
//!
//! DURABILITY: the one that lets it go drops it as a crash would, and makes nothing durable for that: what was acknowledged
//! is in the files, or in dirty frames of the cache's memory file. The one that goes on opens it as after a crash. In between
//! only the lock has to be held, which both have: it belongs to the open file, and goes with the last descriptor of it.
//!
//! What the one that goes on has opened the other may have to open again, so both must write the same formats, and nothing may
//! be brought into another one before it is certain who goes on.

use std::os::fd::OwnedFd;
use std::path::Path;

use crate::cache::arena;
use crate::catalog::sqlite::{SCHEMA_VERSION, SqliteCatalog};
use crate::error::Result;
use crate::format::{header, sums};
use crate::lock::{LOCK_NAME, StoreLock};
use crate::saved;
use crate::store::{Store, StoreOptions};

impl Store {
    /// As [`Store::open`], for who goes on where another process has let the store go, or is to do so before it ends: with a
    /// descriptor of its lock ([`Store::lock_descriptor`]), so that nobody comes between.
    ///
    /// # Errors
    /// As `open`; `Unsupported` for an older format too, which stays as it is.
    pub fn open_handed_over(dir: &Path, options: StoreOptions, lock: OwnedFd) -> Result<Self> {
        let lock = StoreLock::adopt(dir, lock)?;
        let catalog = SqliteCatalog::open_as_it_is(dir)?;
        Self::open_locked(dir, options, lock, catalog)
    }

    /// The versions of all formats in which this program writes what another one reads afterwards, by their names.
    pub fn formats() -> [(&'static str, i64); 5] {
        [
            ("catalog", SCHEMA_VERSION),
            ("cache", i64::from(arena::header::VERSION)),
            ("map", i64::from(header::VERSION)),
            ("checksums", i64::from(sums::VERSION)),
            ("saved state", i64::from(saved::VERSION)),
        ]
    }

    /// A descriptor that carries the store's lock too; `None` in a simulation.
    ///
    /// # Errors
    /// `Io`.
    pub fn lock_descriptor(&self) -> Result<Option<OwnedFd>> {
        let descriptor = self.lock.as_ref().map(StoreLock::descriptor).transpose();
        descriptor.map_err(self.io("copy the descriptor of", Path::new(LOCK_NAME)))
    }

    /// Whether a volume waits for space on the host with requests under way: then they cannot end now.
    pub fn waits_for_space(&self) -> Option<String> {
        let inner = self.inner();
        let mut waiting = inner
            .open
            .iter()
            .filter(|(_, volume)| volume.waits_for_space());
        waiting.next().map(|(name, _)| name.clone())
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

    use super::*;
    use crate::catalog::sqlite::CATALOG_NAME;
    use crate::error::Error;

    /// The catalog's version as the file has it.
    fn version(dir: &Path) -> i64 {
        let db = rusqlite::Connection::open(dir.join(CATALOG_NAME)).unwrap();
        db.pragma_query_value(None, "user_version", |row| row.get(0))
            .unwrap()
    }

    #[test]
    fn a_catalog_of_another_version_is_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        drop(Store::open(dir.path(), StoreOptions::default()).unwrap());
        for other in [SCHEMA_VERSION - 1, SCHEMA_VERSION + 1] {
            let db = rusqlite::Connection::open(dir.path().join(CATALOG_NAME)).unwrap();
            db.pragma_update(None, "user_version", other).unwrap();
            drop(db);
            let lock = StoreLock::acquire(dir.path()).unwrap();
            let handed = lock.descriptor().unwrap();
            let opened = Store::open_handed_over(dir.path(), StoreOptions::default(), handed);
            let error = opened.unwrap_err();
            assert!(matches!(error, Error::Unsupported { .. }), "{error}");
            assert_eq!(version(dir.path()), other, "as it was");
        }
        let db = rusqlite::Connection::open(dir.path().join(CATALOG_NAME)).unwrap();
        db.pragma_update(None, "user_version", SCHEMA_VERSION)
            .unwrap();
        drop(db);
        let lock = StoreLock::acquire(dir.path()).unwrap();
        let handed = lock.descriptor().unwrap();
        drop(Store::open_handed_over(dir.path(), StoreOptions::default(), handed).unwrap());
    }
}
