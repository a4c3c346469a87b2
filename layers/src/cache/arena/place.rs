//! Where the arena of a store is to be found, and by what it is recognised.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::error::{Error, Result};
use crate::units::StoreId;

/// Where arenas lie unless one says otherwise: memory that outlives a process and not a boot.
pub const DEFAULT_DIR: &str = "/dev/shm";
/// Where the kernel names the boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Which directory: as the file system knows it, whatever its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirId {
    /// The file system.
    pub dev: u64,
    /// The directory in it.
    pub ino: u64,
}

/// Where the arena of a store lies, and what must be true of a file there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The directory of the arena.
    pub dir: PathBuf,
    /// The store.
    pub store: StoreId,
    /// The directory of the store: a copy of a store has its uuid and another directory.
    pub store_dir: DirId,
    /// The boot that this process lives in.
    pub boot: Uuid,
}

impl Place {
    /// The place for the store in `store_dir`, in the default directory or in `dir`.
    ///
    /// # Errors
    /// `Io` if the store's directory or the name of the boot cannot be had.
    pub fn new(store_dir: &Path, store: StoreId, dir: Option<PathBuf>) -> Result<Self> {
        let stat = rustix::fs::stat(store_dir).map_err(|errno| Error::Io {
            op: "stat",
            path: store_dir.to_owned(),
            source: errno.into(),
        })?;
        let dir = dir.unwrap_or_else(|| DEFAULT_DIR.into());
        Ok(Self {
            // However it is written: the path is remembered and compared.
            dir: std::fs::canonicalize(&dir).unwrap_or(dir),
            store,
            store_dir: DirId {
                dev: stat.st_dev,
                ino: stat.st_ino,
            },
            boot: this_boot()?,
        })
    }

    /// The arena's path. The name holds the inode of the store's directory, so that a copy of a store does not come upon
    /// the original's arena.
    pub fn path(&self) -> PathBuf {
        let (store, ino) = (self.store, self.store_dir.ino);
        self.dir.join(format!("stratablk-{store}-{ino:x}.cache"))
    }
}

/// The name of the boot that this process lives in.
///
/// # Errors
/// `Io` or `Corrupt` if it cannot be had.
pub fn this_boot() -> Result<Uuid> {
    boot_id(Path::new(BOOT_ID))
}

/// The name of a boot, in a file of the kernel.
fn boot_id(path: &Path) -> Result<Uuid> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::Io {
        op: "read",
        path: path.to_owned(),
        source,
    })?;
    Uuid::try_parse(text.trim()).map_err(|error| Error::Corrupt {
        path: path.to_owned(),
        what: format!("{text:?} is no boot id: {error}"),
    })
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

    use super::*;

    #[test]
    fn a_copy_of_a_store_has_a_place_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let store = StoreId(Uuid::from_u128(0xab));
        let place = |name: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(&path).unwrap();
            Place::new(&path, store, None).unwrap()
        };
        let (original, copy) = (place("original"), place("copy"));
        assert_ne!(original.path(), copy.path());
        assert_eq!(place("copy"), copy);
        let ino = original.store_dir.ino;
        assert_eq!(
            original.path(),
            Path::new("/dev/shm").join(format!(
                "stratablk-00000000-0000-0000-0000-0000000000ab-{ino:x}.cache"
            )),
        );
    }

    #[test]
    fn a_boot_without_a_name_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("boot_id");
        assert!(matches!(boot_id(&path), Err(Error::Io { op: "read", .. })));
        std::fs::write(&path, "not yet\n").unwrap();
        let error = boot_id(&path).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
        std::fs::write(&path, "0000abcd-0000-4000-8000-000000000001\n").unwrap();
        assert_eq!(boot_id(&path).unwrap().as_u128() >> 96, 0xabcd);
    }
}
