//! Opens files, and finds out whether a file can bypass the page cache.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

use super::bounce::Bounce;
use super::uninterrupted;
use crate::file::OpenMode;
use crate::units::SECTOR_BYTES;

/// Magic numbers of file systems that have no device: tmpfs, ramfs.
const IN_MEMORY: [rustix::fs::FsWord; 2] = [0x0102_1994, 0x8584_58f6];
/// A sector, as a size in memory.
const SECTOR: usize = 512;

/// What was opened.
#[derive(Debug)]
pub(super) struct Opened {
    /// The file.
    pub fd: OwnedFd,
    /// Set if it is direct.
    pub direct: Option<Direct>,
    /// Whether it lies in a file system without a device.
    pub in_memory: bool,
    /// Why it is not direct, although that was asked for.
    pub fallback: Option<String>,
}

/// What a direct file needs.
#[derive(Debug)]
pub(super) struct Direct {
    /// Alignment of memory addresses; at most a sector.
    pub memory_bytes: u64,
    /// Alignment of offsets and lengths; at most a sector.
    pub offset_bytes: u64,
    /// The same file through the page cache; `None` if read-only.
    pub buffered_twin: Option<OwnedFd>,
}

/// Opens a regular file. `path` is absolute or relative to `root`.
pub(super) fn open(
    root: &OwnedFd,
    path: &Path,
    mode: OpenMode,
    direct: bool,
) -> io::Result<Opened> {
    let access = match mode {
        OpenMode::ReadOnly => OFlags::RDONLY,
        OpenMode::ReadWrite => OFlags::RDWR,
        OpenMode::CreateNew => OFlags::RDWR | OFlags::CREATE | OFlags::EXCL,
    };
    let fd = open_regular(root, path, access)?;
    let in_memory = IN_MEMORY.contains(&uninterrupted(|| rustix::fs::fstatfs(&fd))?.f_type);
    if !direct {
        return Ok(Opened {
            fd,
            direct: None,
            in_memory,
            fallback: None,
        });
    }
    match make_direct(root, path, mode, &fd) {
        Ok(direct) => Ok(Opened {
            fd,
            direct: Some(direct),
            in_memory,
            fallback: None,
        }),
        Err(Refusal::Unable(reason)) => Ok(Opened {
            fd,
            direct: None,
            in_memory,
            fallback: Some(reason),
        }),
        Err(Refusal::Failed(error)) => Err(error),
    }
}

/// Opens a file and refuses all but regular ones. Opening a pipe must not wait for its other end, hence NONBLOCK; it is
/// taken back afterwards, since io_uring would heed it.
fn open_regular(root: &OwnedFd, path: &Path, access: OFlags) -> io::Result<OwnedFd> {
    let flags = access | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    let fd = uninterrupted(|| rustix::fs::openat(root, path, flags, Mode::RUSR | Mode::WUSR))?;
    let stat = uninterrupted(|| rustix::fs::fstat(&fd))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ));
    }
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags - OFlags::NONBLOCK)?;
    Ok(fd)
}

/// Why a file is not direct.
enum Refusal {
    /// Its file system cannot, or not in sectors.
    Unable(String),
    /// Something else went wrong.
    Failed(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

impl From<Errno> for Refusal {
    fn from(error: Errno) -> Self {
        Self::Failed(error.into())
    }
}

/// Makes an open file direct and opens its twin. Leaves `fd` as it was if that cannot be.
fn make_direct(
    root: &OwnedFd,
    path: &Path,
    mode: OpenMode,
    fd: &OwnedFd,
) -> Result<Direct, Refusal> {
    let stat = uninterrupted(|| {
        rustix::fs::statx(
            fd,
            "",
            AtFlags::EMPTY_PATH,
            StatxFlags::DIOALIGN | StatxFlags::BASIC_STATS,
        )
    })?;
    // The kernel answers what it knows; tells nothing for this file system before Linux 6.1 or for some of them.
    let known = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    let (memory_bytes, offset_bytes) = if known {
        (
            u64::from(stat.stx_dio_mem_align),
            u64::from(stat.stx_dio_offset_align),
        )
    } else {
        (SECTOR_BYTES, SECTOR_BYTES)
    };
    let sane = |bytes: u64| bytes.is_power_of_two() && bytes <= SECTOR_BYTES;
    if memory_bytes == 0 || offset_bytes == 0 {
        return Err(Refusal::Unable(
            "their file system has no direct transfers".to_owned(),
        ));
    }
    if !sane(memory_bytes) || !sane(offset_bytes) {
        return Err(Refusal::Unable(format!(
            "direct transfers would need an alignment of {} bytes",
            memory_bytes.max(offset_bytes)
        )));
    }
    let flags = rustix::fs::fcntl_getfl(fd)?;
    match rustix::fs::fcntl_setfl(fd, flags | OFlags::DIRECT) {
        Ok(()) => {}
        Err(Errno::INVAL | Errno::OPNOTSUPP) => {
            return Err(Refusal::Unable(
                "their file system has no direct transfers".to_owned(),
            ));
        }
        Err(error) => return Err(error.into()),
    }
    if !known && !trial(fd, mode, stat.stx_size)? {
        rustix::fs::fcntl_setfl(fd, flags)?;
        return Err(Refusal::Unable(
            "direct transfers of single sectors did not work".to_owned(),
        ));
    }
    let buffered_twin = match mode {
        OpenMode::ReadOnly => None,
        OpenMode::ReadWrite | OpenMode::CreateNew => {
            let twin = open_regular(root, path, OFlags::RDWR)?;
            let twin_stat = uninterrupted(|| rustix::fs::fstat(&twin))?;
            let stat = uninterrupted(|| rustix::fs::fstat(fd))?;
            if (stat.st_dev, stat.st_ino) != (twin_stat.st_dev, twin_stat.st_ino) {
                return Err(Refusal::Failed(io::Error::other(
                    "replaced while it was opened",
                )));
            }
            Some(twin)
        }
    };
    Ok(Direct {
        memory_bytes,
        offset_bytes,
        buffered_twin,
    })
}

/// Tries one sector. A new file gets a sector to try with, and loses it again; the end of any other file that is too
/// short proves nothing, so that it counts as a failure.
fn trial(fd: &OwnedFd, mode: OpenMode, len: u64) -> io::Result<bool> {
    // A page, of which the second sector is aligned to 512 bytes and to no more.
    let memory = Bounce::new(2 * SECTOR)?;
    let base = memory.as_ptr().wrapping_add(SECTOR);
    // SAFETY: the second sector of zeroed memory that nobody else knows.
    #[expect(unsafe_code, reason = "a view of our own allocation")]
    let sector = unsafe { std::slice::from_raw_parts_mut(base, SECTOR) };
    if mode == OpenMode::CreateNew {
        let written = uninterrupted(|| rustix::io::pwrite(fd, sector, 0)).is_ok();
        let read = written && uninterrupted(|| rustix::io::pread(fd, &mut *sector, 0)).is_ok();
        uninterrupted(|| rustix::fs::ftruncate(fd, 0))?;
        return Ok(read);
    }
    Ok(len > SECTOR_BYTES && uninterrupted(|| rustix::io::pread(fd, &mut *sector, 0)).is_ok())
}
