//! The file of an arena: found, vetted, locked, made and removed.
//!
//! The directory is usually open to every user of the host. So a file is used or removed only if it is a regular file
//! of this user that no one else could have opened, and links are not followed.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use super::geometry::{Geometry, HEADER_BYTES};
use super::header::{Header, MAGIC, Refusal};
use super::place::Place;
use crate::cache::numbers::WAY_OUT;
use crate::error::{Error, Result};

/// Permissions of an arena: it holds guest data.
const MODE: u32 = 0o600;
/// Bytes that are asked of the file system at once: a signal in between makes it give up what it did for a request.
const RESERVE_BYTES: u64 = 1 << 30;
/// `f_type` of tmpfs.
const TMPFS_MAGIC: i64 = 0x0102_1994;
/// Where the kernel says how much memory there is.
const MEMINFO: &str = "/proc/meminfo";
/// Bytes of a block, as `stat` counts them.
const STAT_BLOCK: u64 = 512;

/// The file of an arena, open and locked. The lock goes with this.
#[derive(Debug)]
pub struct ArenaFile {
    /// The file itself.
    pub file: Arc<File>,
    /// Its path.
    pub path: PathBuf,
}

/// What a file under an arena's name is worth.
#[derive(Debug)]
pub enum Verdict {
    /// Everything fits: it holds what a dead process had in memory.
    Adoptable(Geometry),
    /// Nothing in it is of use to anyone: it was never finished, or is of another boot.
    Stale,
    /// It may hold something of this store, and cannot be used.
    Unusable(Error),
    /// It may hold something of another store.
    Foreign(Error),
}

/// The host's answer to an operation on a file.
fn failed(op: &'static str, path: &Path) -> impl FnOnce(Errno) -> Error {
    let path = path.to_owned();
    move |errno| Error::Io {
        op,
        path,
        source: errno.into(),
    }
}

/// The same, for errors of the standard library.
fn io_failed(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { op, path, source }
}

/// Refuses whatever is not a file that only this user can have written.
fn vet(stat: &Stat, path: &Path) -> Result<()> {
    let user = rustix::process::geteuid().as_raw();
    let mode = stat.st_mode & 0o7777;
    let what = if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        "is no regular file".to_owned()
    } else if stat.st_uid != user {
        format!(
            "belongs to user {}, and this process is user {user}",
            stat.st_uid
        )
    } else if stat.st_nlink > 1 {
        format!("has {} names", stat.st_nlink)
    } else if mode != MODE {
        format!("has mode {mode:04o}, not {MODE:04o}: others could have written to it")
    } else {
        return Ok(());
    };
    Err(Error::Invalid {
        field: "cache file",
        what: format!(
            "{} {what}; it is not used and not removed, since it may hold writes of a daemon that was killed. If a daemon of \
             that user has served this store, start it once more as that user and stop it in order, or give the file to this \
             one (chown, chmod 600). If it is not a file of this store's daemon, remove it or choose another --cache-dir",
            path.display()
        ),
    })
}

/// Bytes of memory that could be had without harm, by what the kernel says; `None` if it does not.
pub(super) fn available_memory(meminfo: &str) -> Option<u64> {
    let field = |name: &str| {
        let mut lines = meminfo.lines().filter_map(|line| line.strip_prefix(name));
        let value = lines.next()?.trim().strip_suffix(" kB")?;
        value.parse::<u64>().ok()?.checked_mul(1024)
    };
    let swap = field("SwapFree:").unwrap_or(0);
    field("MemAvailable:")?.checked_add(swap)
}

/// What is known of the room for an arena.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// Bytes that the file has already.
    pub held: u64,
    /// Bytes that the file system has left, if there is a limit.
    pub free: Option<u64>,
    /// Bytes of memory that the host has left, if the file system lies in memory: it may promise more than there is, and
    /// to take that would bring down others before it fails.
    pub memory: Option<u64>,
}

/// Why there is no room for `bytes` bytes, if so.
pub(super) fn shortage(room: &Room, bytes: u64) -> Option<String> {
    let more = bytes.saturating_sub(room.held);
    if let Some(free) = room.free.filter(|free| *free < more) {
        return Some(format!("only {} are free there", human(free)));
    }
    let memory = room.memory.filter(|memory| *memory < more)?;
    Some(format!(
        "the host has only {} of memory left",
        human(memory)
    ))
}

/// Bytes as people say them.
fn human(bytes: u64) -> String {
    let tenths = |unit: u64| (bytes / unit, bytes % unit * 10 / unit);
    let ((gib, gib_tenth), (mib, mib_tenth)) = (tenths(1 << 30), tenths(1 << 20));
    if gib > 0 {
        format!("{gib}.{gib_tenth} GiB")
    } else {
        format!("{mib}.{mib_tenth} MiB")
    }
}

/// The error of an arena that does not fit.
fn no_room(path: &Path, bytes: u64, why: &str) -> Error {
    let dir = path.parent().unwrap_or(path).display();
    Error::Invalid {
        field: "cache size",
        what: format!(
            "the cache needs {} in {dir}, and {why}; choose a smaller --cache-size or another --cache-dir",
            human(bytes)
        ),
    }
}

impl ArenaFile {
    /// Opens and locks the file at a place, if there is one.
    ///
    /// # Errors
    /// `Invalid` if it is not one to trust, `Busy` if another process has it, `Io`.
    pub fn open(place: &Place) -> Result<Option<Self>> {
        let path = place.path();
        // First by name: of a file that is not ours, `open` would say no more than "permission denied".
        match rustix::fs::lstat(&path) {
            Ok(stat) => vet(&stat, &path)?,
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(failed("stat", &path)(errno)),
        }
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(failed("open", &path)(errno)),
        };
        let file = Self {
            file: Arc::new(file),
            path,
        };
        file.lock()?;
        let stat = file.stat()?;
        if stat.st_nlink == 0 {
            // Its holder removed it between our `open` and our lock.
            return Ok(None);
        }
        vet(&stat, &file.path)?;
        Ok(Some(file))
    }

    /// Makes a new, empty file at a place where there is none, and locks it.
    ///
    /// # Errors
    /// `Io`, `Busy`.
    pub fn create(place: &Place) -> Result<Self> {
        let path = place.path();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(MODE)
            .custom_flags((OFlags::NOFOLLOW | OFlags::CLOEXEC).bits().cast_signed())
            .open(&path)
            .map_err(io_failed("create", &path))?;
        let file = Self {
            file: Arc::new(file),
            path,
        };
        file.lock()?;
        // The process's umask may have taken more than we want.
        rustix::fs::fchmod(&*file.file, Mode::from_raw_mode(MODE))
            .map_err(failed("set the mode of", &file.path))?;
        Ok(file)
    }

    /// Takes the lock that says that a process uses the arena.
    fn lock(&self) -> Result<()> {
        match rustix::fs::flock(&*self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(()),
            Err(Errno::WOULDBLOCK) => Err(Error::Busy {
                what: format!(
                    "the cache {} is in use by another process; stop it first",
                    self.path.display()
                ),
            }),
            Err(errno) => Err(failed("lock", &self.path)(errno)),
        }
    }

    /// What the host knows of the file.
    fn stat(&self) -> Result<Stat> {
        rustix::fs::fstat(&*self.file).map_err(failed("stat", &self.path))
    }

    /// Removes the file, unless the name is another's by now.
    ///
    /// # Errors
    /// `Io`.
    pub fn remove(&self) -> Result<()> {
        let ours = self.stat()?;
        match rustix::fs::lstat(&self.path) {
            Ok(named) if (named.st_dev, named.st_ino) == (ours.st_dev, ours.st_ino) => {}
            Ok(_) | Err(Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(failed("stat", &self.path)(errno)),
        }
        rustix::fs::unlink(&self.path).map_err(failed("remove", &self.path))
    }

    /// How much the file may grow to.
    fn room(&self) -> Result<Room> {
        let stat = rustix::fs::fstatvfs(&*self.file).map_err(failed("stat", &self.path))?;
        let kind = rustix::fs::fstatfs(&*self.file).map_err(failed("stat", &self.path))?;
        // A host that does not say is asked without knowing.
        let meminfo = || std::fs::read_to_string(MEMINFO).unwrap_or_default();
        Ok(Room {
            held: allocated(&self.stat()?),
            // A file system without a limit says that it has no blocks at all.
            free: (stat.f_blocks > 0).then(|| stat.f_bavail.saturating_mul(stat.f_frsize)),
            memory: (kind.f_type == TMPFS_MAGIC)
                .then(meminfo)
                .and_then(|text| available_memory(&text)),
        })
    }

    /// Makes the file as long as it has to be, with a page for every byte that is to be mapped.
    ///
    /// # Errors
    /// `Invalid` if there is no room, saying what to do.
    pub fn reserve(&self, geometry: &Geometry) -> Result<()> {
        let bytes = geometry.reserved_bytes();
        if let Some(limit) = getrlimit(Resource::Fsize)
            .current
            .filter(|limit| *limit < geometry.len)
        {
            // Beyond it there is a signal instead of an answer.
            let why = format!("no file may be longer than {} (RLIMIT_FSIZE)", human(limit));
            return Err(no_room(&self.path, geometry.len, &why));
        }
        // Asked beforehand, so that a hopeless attempt does not first take all the memory there is.
        if let Some(why) = shortage(&self.room()?, bytes) {
            return Err(no_room(&self.path, bytes, &why));
        }
        for (start, len) in geometry.reserved() {
            let end = start.saturating_add(len);
            let mut at = start;
            while at < end {
                let next = at.saturating_add(RESERVE_BYTES).min(end);
                match rustix::fs::fallocate(&*self.file, FallocateFlags::empty(), at, next - at) {
                    Ok(()) => at = next,
                    Err(Errno::INTR) => {}
                    Err(errno) => {
                        let why = format!("the host cannot reserve it: {}", io::Error::from(errno));
                        return Err(no_room(&self.path, bytes, &why));
                    }
                }
            }
        }
        Ok(())
    }

    /// Makes an arena of a file whose parts are in place. Until the magic is there, which goes last, it is none.
    ///
    /// # Errors
    /// `Io`.
    pub fn write_header(&self, place: &Place, geometry: &Geometry) -> Result<()> {
        let bytes = Header::encode(place, geometry);
        let (magic, rest) = bytes.split_at(MAGIC.len());
        self.file
            .write_all_at(rest, MAGIC.len() as u64)
            .and_then(|()| self.file.write_all_at(magic, 0))
            .map_err(io_failed("write", &self.path))
    }

    /// What the file is worth to the store at a place.
    ///
    /// # Errors
    /// `Io` if it cannot be read.
    pub fn judge(&self, place: &Place) -> Result<Verdict> {
        let mut bytes = [0; HEADER_BYTES];
        match self.file.read_exact_at(&mut bytes, 0) {
            Ok(()) => {}
            // The header's page is the first thing that its creator reserves.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Ok(Verdict::Stale);
            }
            Err(error) => return Err(io_failed("read", &self.path)(error)),
        }
        let path = self.path.clone();
        let header = match Header::decode(&bytes, place.boot) {
            Ok(header) => header,
            Err(Refusal::Unfinished | Refusal::OtherBoot) => return Ok(Verdict::Stale),
            Err(Refusal::Corrupt(what)) => {
                let what = format!("{what}; {WAY_OUT}");
                return Ok(Verdict::Unusable(Error::Corrupt { path, what }));
            }
            Err(Refusal::Unsupported(what)) => {
                let what = format!("{what}; {WAY_OUT}");
                return Ok(Verdict::Unusable(Error::Unsupported { path, what }));
            }
        };
        if header.store != place.store || header.store_dir != place.store_dir {
            let what = format!(
                "{} is the cache of store {} in directory {:x} of device {:x}, not of store {} in directory {:x} of device \
                 {:x}; choose another --cache-dir, or {WAY_OUT}",
                path.display(),
                header.store,
                header.store_dir.ino,
                header.store_dir.dev,
                place.store,
                place.store_dir.ino,
                place.store_dir.dev,
            );
            let field = "cache file";
            return Ok(Verdict::Foreign(Error::Invalid { field, what }));
        }
        let len = u64::try_from(self.stat()?.st_size).unwrap_or(0);
        if len != header.geometry.len {
            let what = format!(
                "{len} bytes long instead of {}; {WAY_OUT}",
                header.geometry.len
            );
            return Ok(Verdict::Unusable(Error::Corrupt { path, what }));
        }
        Ok(Verdict::Adoptable(header.geometry))
    }

    /// Sees to it that a finished arena lacks no page.
    ///
    /// # Errors
    /// As `reserve`.
    pub fn complete(&self, geometry: &Geometry) -> Result<()> {
        // Whoever made the file reserved everything; asking for each page again would delay every restart.
        if allocated(&self.stat()?) >= geometry.reserved_bytes() {
            return Ok(());
        }
        self.reserve(geometry)
    }
}

impl Drop for ArenaFile {
    fn drop(&mut self) {
        // Closing alone does not do it if another thread is starting a program just now: until that one's `exec` it has
        // the descriptor too. An unlock that fails leaves it at that.
        let _ = rustix::fs::flock(&*self.file, FlockOperation::Unlock);
    }
}

/// Bytes that the file system has given to a file.
fn allocated(stat: &Stat) -> u64 {
    u64::try_from(stat.st_blocks)
        .unwrap_or(0)
        .saturating_mul(STAT_BLOCK)
}
