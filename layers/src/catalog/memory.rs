//! The catalog of a simulated store: in memory, and as atomic and durable as the real one. It outlives the store that
//! uses it, so that a test can open the store again as after a crash, and it can be told to fail.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Catalog, CatalogState, Change};
use crate::error::{Error, Result};

/// When an observer is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitPoint {
    /// A commit begins: a crash now finds the old state.
    Before,
    /// A commit has succeeded: a crash now finds the new state.
    After,
}

/// Is told of every commit.
type Observer = Box<dyn FnMut(CommitPoint) + Send>;

/// What a medium holds.
struct Disk {
    /// As of the last commit. Shared with crash images until it changes.
    state: Arc<CatalogState>,
    /// The next commit fails and changes nothing.
    fail_next: bool,
    /// Commits that succeeded.
    commits: u64,
    /// Is told of every commit.
    observer: Option<Observer>,
}

/// The medium of a simulated catalog; clones are the same medium.
#[derive(Clone)]
pub struct MemoryDisk(Arc<Mutex<Disk>>);

impl MemoryDisk {
    /// A medium with this on it.
    pub fn new(state: CatalogState) -> Self {
        Self::with(Arc::new(state))
    }

    /// A medium with this on it.
    fn with(state: Arc<CatalogState>) -> Self {
        Self(Arc::new(Mutex::new(Disk {
            state,
            fail_next: false,
            commits: 0,
            observer: None,
        })))
    }

    /// What is on it now.
    pub fn state(&self) -> CatalogState {
        CatalogState::clone(&self.disk().state)
    }

    /// A medium of its own with the same on it: what a crash at this instant would find.
    pub fn crash_image(&self) -> Self {
        Self::with(Arc::clone(&self.disk().state))
    }

    /// Lets the next commit fail as on a full disk. Nothing changes by it.
    pub fn fail_next_commit(&self) {
        self.disk().fail_next = true;
    }

    /// Commits that succeeded.
    pub fn commits(&self) -> u64 {
        self.disk().commits
    }

    /// Has `observer` called before and after every commit, on the committing thread. It may use this medium.
    pub fn set_observer(&self, observer: impl FnMut(CommitPoint) + Send + 'static) {
        self.disk().observer = Some(Box::new(observer));
    }

    /// The medium. A panic of another holder cannot leave it half changed: each change is one assignment.
    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls the observer without holding the lock.
    fn observe(&self, point: CommitPoint) {
        let taken = self.disk().observer.take();
        if let Some(mut observer) = taken {
            observer(point);
            let mut disk = self.disk();
            if disk.observer.is_none() {
                disk.observer = Some(observer);
            }
        }
    }
}

impl fmt::Debug for MemoryDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryDisk")
            .field("commits", &self.commits())
            .finish_non_exhaustive()
    }
}

/// A catalog on a [`MemoryDisk`].
#[derive(Debug)]
pub struct MemoryCatalog {
    /// The medium.
    disk: MemoryDisk,
    /// What was read from it or written to it last.
    state: Arc<CatalogState>,
}

impl MemoryCatalog {
    /// Opens the catalog on a medium, with the same checks as the real one.
    ///
    /// # Errors
    /// `Corrupt` if the state breaks a rule.
    pub fn open(disk: &MemoryDisk) -> Result<Self> {
        let state = disk.state();
        state.verify().map_err(|what| Error::Corrupt {
            path: "memory".into(),
            what,
        })?;
        Ok(Self {
            disk: disk.clone(),
            state: Arc::new(state),
        })
    }
}

impl Catalog for MemoryCatalog {
    fn state(&self) -> &CatalogState {
        &self.state
    }

    fn share(&self) -> Arc<CatalogState> {
        Arc::clone(&self.state)
    }

    fn commit(&mut self, changes: &[Change]) -> Result<()> {
        let undo = Arc::make_mut(&mut self.state).change(changes)?;
        self.disk.observe(CommitPoint::Before);
        {
            let mut disk = self.disk.disk();
            if std::mem::take(&mut disk.fail_next) {
                drop(disk);
                Arc::make_mut(&mut self.state).undo(undo);
                return Err(Error::Catalog {
                    path: "memory".into(),
                    source: rusqlite::Error::SqliteFailure(
                        rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_FULL),
                        None,
                    ),
                });
            }
            // The same changes to the same state. They cost by themselves, as on a real medium, unless a crash image holds
            // the state of before.
            let written = Arc::make_mut(&mut disk.state).change(changes);
            if let Err(error) = written {
                drop(disk);
                Arc::make_mut(&mut self.state).undo(undo);
                return Err(error);
            }
            disk.commits += 1;
        }
        self.disk.observe(CommitPoint::After);
        Ok(())
    }
}
