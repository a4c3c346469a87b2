//! Which arena a store used last. A file in the store's directory names it, so that a daemon that is told to keep its cache
//! elsewhere still finds what was left, and never takes over an arena that another one has come after.
//!
//! An orderly end that leaves no arena removes this file first. So one that names an arena that is not there, in the same boot,
//! tells that somebody removed it, with what it may have held; and where there is no such file, no arena is taken over.
//!
//! CRASH: written after the arena is there and before anything is served; replaced by a rename. It needs no sync: an arena does
//! not outlive the boot, so what a power cut leaves here names a file that is not adopted.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::error::{Error, Result};

use super::place::Place;

/// The file in the store's directory.
pub const NAME: &str = "cache.last";

/// The arena that the store in `dir` used last; `None` if it never had one.
///
/// # Errors
/// `Io`.
pub fn read(dir: &Path) -> Result<Option<PathBuf>> {
    let path = dir.join(NAME);
    match std::fs::read(&path) {
        Ok(bytes) => Ok(Some(PathBuf::from(OsString::from_vec(bytes)))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Io {
            op: "read",
            path,
            source,
        }),
    }
}

/// Says that the store in `dir` uses this arena now. Needs no space where that is said already: a store on a full disk opens.
///
/// # Errors
/// `Io`.
pub fn write(dir: &Path, arena: &Path) -> Result<()> {
    if read(dir)?.as_deref() == Some(arena) {
        return Ok(());
    }
    let (path, new) = (dir.join(NAME), dir.join("cache.last.new"));
    std::fs::write(&new, arena.as_os_str().as_bytes())
        .and_then(|()| std::fs::rename(&new, &path))
        .map_err(|source| Error::Io {
            op: "write",
            path,
            source,
        })
}

/// What there is to say if the arena that was used last is one of this boot and is not there any more. `boot`: in which boot
/// the store was open last.
pub fn loss(last: Option<&Path>, boot: Option<Uuid>, wanted: &Place) -> Option<String> {
    let last = last.filter(|_| boot == Some(wanted.boot))?;
    let found = std::fs::symlink_metadata(last);
    let is_gone = found.is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound);
    is_gone.then(|| {
        format!(
            "the cache that a daemon left behind, {}, is gone: what guests wrote to it and no flush covered is lost",
            last.display()
        )
    })
}

/// The place of the arena that was used last, where that is not `wanted`: with the same name in another directory. What is
/// written there by somebody else leads nowhere, since the name says which store it is of.
pub fn elsewhere(last: Option<&Path>, wanted: &Place) -> Option<Place> {
    let last = last.filter(|last| **last != *wanted.path())?;
    let place = Place {
        dir: last.parent()?.to_owned(),
        ..wanted.clone()
    };
    (place.path() == last).then_some(place)
}
