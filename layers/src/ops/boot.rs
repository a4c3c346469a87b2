//! After a boot of the host: no machine has outlived it, so the next start of each is a new one, also of those whose end
//! nobody was there to see. The file `boot` in the store's directory names the boot in which the store was open last.
//!
//! DURABILITY: all immutable volumes are armed in one catalog transaction; only then is the new name written, to a file that is
//! synced and takes the old one's name, and the directory is synced. A crash in between arms them again, and they were not
//! served meanwhile.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use uuid::Uuid;

use crate::cache::arena::place::this_boot;
use crate::catalog::sqlite::files::{io_error, sync_dir};
use crate::catalog::{Change, VolumeKind};
use crate::error::Result;
use crate::store::Store;

/// The file in the store's directory.
const NAME: &str = "boot";
/// What it is called until it is whole.
const NEW: &str = "boot.new";

impl Store {
    /// Arms all immutable volumes if the store in `dir` was open last in another boot, or nobody knows in which.
    pub(crate) fn arm_after_boot(&self, dir: &Path) -> Result<()> {
        let boot = this_boot()?;
        if last_boot(dir)? == Some(boot) {
            return Ok(());
        }
        let changes: Vec<Change> = {
            let inner = self.inner();
            let volumes = inner.catalog.state().volumes.values();
            volumes
                .filter(|row| row.kind == VolumeKind::Immutable && !row.armed)
                .map(|row| Change::SetArmed {
                    volume: row.name.clone(),
                    armed: true,
                })
                .collect()
        };
        if !changes.is_empty() {
            self.inner().catalog.commit(&changes)?;
            self.maintenance.note(format!(
                "the host was started since: {} immutable volumes start afresh with their next machine",
                changes.len()
            ));
        }
        write(dir, boot)
    }
}

/// The boot in which the store was open last; `None` if the file is not there or names none.
pub(crate) fn last_boot(dir: &Path) -> Result<Option<Uuid>> {
    let path = dir.join(NAME);
    match std::fs::read(&path) {
        Ok(bytes) => Ok(Uuid::try_parse_ascii(bytes.trim_ascii()).ok()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error("read", &path)(error)),
    }
}

/// Says that the store is open in this boot.
fn write(dir: &Path, boot: Uuid) -> Result<()> {
    let (path, new) = (dir.join(NAME), dir.join(NEW));
    File::create(&new)
        .and_then(|mut file| {
            writeln!(file, "{boot}")?;
            file.sync_all()
        })
        .map_err(io_error("write", &new))?;
    std::fs::rename(&new, &path).map_err(io_error("rename", &new))?;
    sync_dir(dir)
}
