//! Directories on the host, always by descriptor.

use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, Mode, OFlags};
use rustix::io::Errno;

use super::uninterrupted;
use crate::file::Directory;

/// Directories inside directories that a removal goes down; a store has three.
const DEPTH_MAX: u32 = 16;

/// Opens a directory to read it or to sync it.
pub(super) fn open_dir(at: &OwnedFd, path: impl rustix::path::Arg + Copy) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    uninterrupted(|| rustix::fs::openat(at, path, flags, Mode::empty()))
}

impl Directory for OwnedFd {
    fn sync(&self) -> io::Result<()> {
        uninterrupted(|| rustix::fs::fsync(self))
    }
}

/// The names in a directory without "." and "..", in no order.
pub(super) fn names(directory: &OwnedFd) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    Ok(names)
}

/// Removes a directory with everything in it. Symbolic links are removed, never followed.
pub(super) fn remove_all(root: &OwnedFd, path: &Path) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = uninterrupted(|| rustix::fs::openat(root, path, flags, Mode::empty()))?;
    empty(&directory, DEPTH_MAX)?;
    Ok(rustix::fs::unlinkat(root, path, AtFlags::REMOVEDIR)?)
}

/// Removes everything in a directory.
fn empty(directory: &OwnedFd, depth: u32) -> io::Result<()> {
    if depth == 0 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "directories nest too deep",
        ));
    }
    for name in names(directory)? {
        match rustix::fs::unlinkat(directory, &name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::ISDIR | Errno::PERM) => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let inner =
                    uninterrupted(|| rustix::fs::openat(directory, &name, flags, Mode::empty()))?;
                empty(&inner, depth - 1)?;
                rustix::fs::unlinkat(directory, &name, AtFlags::REMOVEDIR)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
