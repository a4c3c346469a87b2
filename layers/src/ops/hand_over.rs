//! A store that goes from one process to the next, while the machines that use it run on.
//!
//! DURABILITY: the one that lets it go drops it as a crash would, and makes nothing durable for that: what was acknowledged
//! is in the files, or in dirty frames of the cache's memory file. The one that goes on opens it as after a crash. In between
//! only the lock has to be held, which both have: it belongs to the open file, and goes with the last descriptor of it.

use std::os::fd::OwnedFd;
use std::path::Path;

use crate::error::Result;
use crate::lock::{LOCK_NAME, StoreLock};
use crate::store::{Store, StoreOptions};

impl Store {
    /// As [`Store::open`], for who goes on where another process has let the store go, or is to do so before it ends: with a
    /// descriptor of its lock ([`Store::lock_descriptor`]), so that nobody comes between.
    ///
    /// # Errors
    /// As `open`.
    pub fn open_handed_over(dir: &Path, options: StoreOptions, lock: OwnedFd) -> Result<Self> {
        Self::open_locked(dir, options, StoreLock::adopt(dir, lock)?)
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
