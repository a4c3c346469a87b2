//! The lock of a store: one process at a time serves, checks or repairs it.
//!
//! `flock(2)` on the file `lock`, so that the kernel gives the lock up when its holder dies, however it dies. The file
//! holds the holder's pid, for the message to the one that comes second; nothing else relies on it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::error::{Error, Result};

/// The lock's name in the store's directory.
pub const LOCK_NAME: &str = "lock";

/// The lock of a store, held until this is dropped.
#[derive(Debug)]
pub struct StoreLock {
    /// Carries the lock as long as it is open, here or where a descriptor of it was handed to. Not inherited by programs that
    /// this process starts.
    file: File,
}

impl StoreLock {
    /// Takes the lock of the store in `dir`, which must exist. Does not wait.
    ///
    /// # Errors
    /// `Busy` with the holder's pid; `Io`.
    pub fn acquire(dir: &Path) -> Result<Self> {
        let path = dir.join(LOCK_NAME);
        let fail = |op| {
            let path = path.clone();
            move |source: io::Error| Error::Io { op, path, source }
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(fail("open"))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(Error::Busy {
                    what: held(dir.to_owned(), &mut file),
                });
            }
            Err(error) => return Err(fail("lock")(error.into())),
        }
        Self::named(file).map_err(fail("write"))
    }

    /// Goes on with the lock of the store in `dir`, of which its holder has handed over a descriptor. Nobody can come between
    /// the two, since the lock belongs to the open file that both have.
    ///
    /// # Errors
    /// `Busy` if the descriptor does not carry the lock of this store; `Io`.
    pub fn adopt(dir: &Path, descriptor: OwnedFd) -> Result<Self> {
        let path = dir.join(LOCK_NAME);
        let fail = |op| {
            let path = path.clone();
            move |source: io::Error| Error::Io { op, path, source }
        };
        let file = File::from(descriptor);
        let found = std::fs::metadata(&path).map_err(fail("stat"))?;
        let given = file.metadata().map_err(fail("stat"))?;
        let same = (found.dev(), found.ino()) == (given.dev(), given.ino());
        // Does nothing where the open file has the lock already.
        if !same || flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(Error::Busy {
                what: format!(
                    "the lock of store {} was not what was handed over; is another daemon at it?",
                    dir.display()
                ),
            });
        }
        Self::named(file).map_err(fail("write"))
    }

    /// Writes our pid into the file, which is locked: over the one before, which needs no space on a full disk.
    fn named(mut file: File) -> io::Result<Self> {
        let pid = format!("{}\n", std::process::id());
        file.rewind()?;
        file.write_all(pid.as_bytes())?;
        file.set_len(pid.len() as u64)?;
        Ok(Self { file })
    }

    /// A descriptor that carries the lock too, for whoever is to go on with it.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        self.file.try_clone().map(OwnedFd::from)
    }
}

/// Who holds the lock. A holder that has only just taken it may not have written its pid yet.
fn held(dir: PathBuf, file: &mut File) -> String {
    let mut text = String::new();
    let pid = file
        .take(32)
        .read_to_string(&mut text)
        .ok()
        .and_then(|_| text.trim().parse::<u32>().ok());
    let holder = pid.map_or("another process".to_owned(), |pid| format!("process {pid}"));
    format!(
        "store {} is in use by {holder}; stop it first",
        dir.display()
    )
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

    use super::*;

    #[test]
    fn the_second_one_is_told_the_pid_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let first = StoreLock::acquire(dir.path()).unwrap();
        // A lock belongs to an open file, so that one process can stand for two.
        let error = StoreLock::acquire(dir.path()).unwrap_err();
        assert!(matches!(error, Error::Busy { .. }));
        let pid = format!("process {};", std::process::id());
        assert!(error.to_string().contains(&pid), "{error}");
        drop(first);
        drop(StoreLock::acquire(dir.path()).unwrap());
    }

    #[test]
    fn a_lock_goes_on_where_its_descriptor_goes() {
        let dir = tempfile::tempdir().unwrap();
        let first = StoreLock::acquire(dir.path()).unwrap();
        let second = StoreLock::adopt(dir.path(), first.descriptor().unwrap()).unwrap();
        drop(first);
        assert!(StoreLock::acquire(dir.path()).is_err(), "held on");
        let other = std::fs::File::open(dir.path().join(LOCK_NAME)).unwrap();
        let refused = StoreLock::adopt(dir.path(), other.into()).unwrap_err();
        assert!(matches!(refused, Error::Busy { .. }), "not the open file");
        let foreign = tempfile::tempfile().unwrap();
        assert!(StoreLock::adopt(dir.path(), foreign.into()).is_err());
        drop(second);
        drop(StoreLock::acquire(dir.path()).unwrap());
    }

    #[test]
    fn a_dead_holders_pid_is_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(LOCK_NAME), "4194304 and more than that\n").unwrap();
        let lock = StoreLock::acquire(dir.path()).unwrap();
        let text = std::fs::read_to_string(dir.path().join(LOCK_NAME)).unwrap();
        assert_eq!(text, format!("{}\n", std::process::id()));
        drop(lock);
    }

    #[test]
    fn a_holder_without_a_pid_is_somebody() {
        let dir = tempfile::tempdir().unwrap();
        let _first = StoreLock::acquire(dir.path()).unwrap();
        std::fs::write(dir.path().join(LOCK_NAME), "").unwrap();
        let error = StoreLock::acquire(dir.path()).unwrap_err();
        assert!(error.to_string().contains("another process"), "{error}");
    }
}
