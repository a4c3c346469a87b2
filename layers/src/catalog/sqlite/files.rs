//! The files of a database, and what the host says about them.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

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
