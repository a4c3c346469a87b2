//! The file contract: what a layer's files promise, whoever implements them.
//!
//! Two views of the same files. [`Media`] and [`File`] are synchronous and serve the control plane (maps, journals,
//! recovery). [`Engine`] is asynchronous and serves one queue context (guest data, flushes). Three implementations:
//! `uring` and `posix` on the host, `sim` in memory with faults and crashes from a seed.
//!
//! # What everybody may assume
//! - A read or write that succeeds moved every byte; short reads and writes are continued inside, and reading past
//!   the end of a file yields zeroes (data files only grow by writing or `set_len`).
//! - Bytes never written, or punched, read as zeroes.
//! - What was written is visible to every later read of any view at once, but survives power loss only after a
//!   `sync_data` of that file that began after the write completed and succeeded. Until then any subset of the written
//!   *sectors* (512 bytes) may survive, in any order; a sector itself is old or new, never a mix.
//! - A new, renamed or removed name survives power loss only after `sync_dir` of its directory.
//! - After a failed `sync_data` the file's unsynced content is unknown; the caller latches the failure.

pub mod host;
pub mod posix;
pub mod sim;
pub mod uring;

use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Names an open file to the [`Engine`]s of the same [`Media`]: on a host the file descriptor and what the engine must know
/// of the file, in a simulation an index. Nobody else looks into it. Valid as long as the [`File`] it came from is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileToken(pub i32);

/// How to open a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// Reads only; a write is an error.
    ReadOnly,
    /// Reads and writes.
    ReadWrite,
    /// Reads and writes a new, empty file; an error if the name exists.
    CreateNew,
}

/// What is known of a file without opening it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileStat {
    /// Length in bytes.
    pub len: u64,
    /// Last change of the content, nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Bytes that the file takes on its device.
    pub allocated: u64,
    /// Whether it is a regular file (not a directory, device or socket).
    pub is_file: bool,
    /// Which file it is, whatever its names.
    pub identity: FileIdentity,
}

/// Tells one file from another, as long as both are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileIdentity {
    /// The device that it is on.
    pub device: u64,
    /// Its number there.
    pub inode: u64,
}

/// Runs that [`File::data_ranges`] gives out at most: a file in more pieces than this is not worth a look at each.
pub const DATA_RANGES_MAX: usize = 1 << 16;

/// An open file. Synchronous; may block; callable from any thread.
pub trait File: Send + Sync + std::fmt::Debug {
    /// Fills `buf` from byte `offset`; zeroes past the end.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `buf` at byte `offset`, growing the file if need be.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// Makes all completed writes survive power loss (content and the length needed to read it).
    fn sync_data(&self) -> io::Result<()>;
    /// Gives the space of `len` bytes from `offset` back; they read as zeroes. Must not change the length.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Sets the length; new bytes read as zeroes and take no space.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Whether the length is 0.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// The bytes before `to`, from `from` on, that may be other than zero: runs in order, as first byte and end. What lies
    /// between them takes no space. At most [`DATA_RANGES_MAX`] of them, the last of which then goes on to the end. `None`:
    /// nobody knows.
    fn data_ranges(&self, from: u64, to: u64) -> io::Result<Option<Vec<Range<u64>>>> {
        let _ = (from, to);
        Ok(None)
    }
    /// Lets the host forget what it keeps of the file in memory and could read again, so that the next reads are answered by
    /// the medium. Where it cannot, nothing happens.
    fn drop_cached(&self) -> io::Result<()> {
        Ok(())
    }
    /// Which file it is, whatever its names are now. `None`: nobody knows.
    fn identity(&self) -> io::Result<Option<FileIdentity>> {
        Ok(None)
    }
    /// Locks the file for as long as it is open here, against everybody who opens it anew: together with others, or alone, each
    /// in the place of the other. Advisory: known to who asks for such a lock as well. `false`: the file system has none.
    ///
    /// # Errors
    /// `WouldBlock`: somebody else has a lock that excludes this one; who asked to be alone has one together with others then.
    fn lock(&self, alone: bool) -> io::Result<bool> {
        let _ = alone;
        Ok(true)
    }
    /// The name of this open file for the engines of the same media.
    fn token(&self) -> FileToken;
    /// Alignment in bytes that data transfers through an [`Engine`] need (memory address, offset and length):
    /// 1 for buffered files, 512 for direct ones.
    fn alignment(&self) -> u64;
}

/// An open directory. Any thread.
pub trait Directory: Send + std::fmt::Debug {
    /// Makes the names in it survive power loss.
    fn sync(&self) -> io::Result<()>;
}

/// The directory tree of one store. Synchronous; callable from any thread. Paths are relative to the store unless
/// absolute (raw bases).
pub trait Media: Send + Sync + std::fmt::Debug {
    /// Opens a file. `direct` asks for transfers that bypass the host's page cache; where the file system cannot,
    /// the file is opened buffered (and says so once in [`Media::notes`]).
    fn open(&self, path: &Path, mode: OpenMode, direct: bool) -> io::Result<Arc<dyn File>>;
    /// Makes a directory; an error if it exists.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Renames a file over another, atomically. If both are names of one file already, nothing happens: `from` stays.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Gives a file a second name, in whichever directory; an error if that exists, or if the file system has no such thing.
    /// The file is there as long as one of its names is, or somebody has it open.
    fn link(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Makes `len` bytes from `offset` of one file of this media those of another one, at the same place; past its end they are
    /// zeroes. Where the file system can, the two share the space from then on. As durable as a write: not before `to` is
    /// synced; and after a failure any part of the bytes may have been changed. Nobody writes to either place meanwhile.
    fn copy(
        &self,
        from: &Arc<dyn File>,
        to: &Arc<dyn File>,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        let mut buffer = vec![0; COPY_BYTES];
        copy_through(&mut buffer, from, to, offset, len)
    }
    /// Removes a name of a file, and the file with its last one.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Removes a directory with everything in it.
    fn remove_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Opens a directory, to sync it later whatever there is of descriptors then.
    fn open_dir(&self, path: &Path) -> io::Result<Box<dyn Directory>>;
    /// Makes the names in a directory survive power loss.
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.open_dir(path)?.sync()
    }
    /// The names in a directory, sorted.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;
    /// What is known of a file; follows symbolic links.
    fn stat(&self, path: &Path) -> io::Result<FileStat>;
    /// The absolute path of a file outside of the store, without symbolic links.
    fn canonical(&self, path: &Path) -> io::Result<PathBuf> {
        std::path::absolute(path)
    }
    /// The path to show to a person: absolute on a host.
    fn display_path(&self, path: &Path) -> PathBuf;
    /// A new engine for one queue context; `depth` operations at most are under way at once.
    fn engine(&self, depth: u32) -> io::Result<Box<dyn Engine>>;
    /// A name that nothing has: random, but in a simulation the same in every run of a seed.
    fn fresh_id(&self) -> uuid::Uuid {
        uuid::Uuid::new_v4()
    }
    /// Lets go on whatever else there is, where nothing happens by itself: in a simulation on one thread, whose commands would
    /// else wait forever for requests that it has under way. Returns whether this is one; if not, the caller waits.
    fn go_on(&self) -> bool {
        false
    }
    /// Lines worth a log entry that came up since the last call (fall-backs taken).
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Bytes that a copy holds in memory at once.
const COPY_BYTES: usize = 1 << 20;

/// Copies by reading and writing.
fn copy_through(
    buffer: &mut [u8],
    from: &Arc<dyn File>,
    to: &Arc<dyn File>,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    let end = offset
        .checked_add(len)
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut at = offset;
    while at < end {
        let count = usize::try_from(end - at).unwrap_or(buffer.len());
        let count = count.min(buffer.len());
        let part = buffer.get_mut(..count).unwrap_or_default();
        from.read_at(part, at)?;
        to.write_at(part, at)?;
        at += count as u64;
    }
    Ok(())
}

/// A piece of memory that takes part in a transfer. Whoever submits it promises that it stays valid, and is not used as
/// a Rust reference by anybody, until the operation's completion was reaped.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Segment {
    /// First byte.
    pub base: *mut u8,
    /// Length in bytes.
    pub len: usize,
}

#[expect(unsafe_code, reason = "a segment is an address with a length")]
// SAFETY: a segment owns nothing and is never dereferenced but by who was promised that its memory is valid for an
// operation, on whichever thread that runs (`Engine::submit`, `QueueContext::submit`).
unsafe impl Send for Segment {}

/// One asynchronous operation.
#[derive(Clone, Copy, Debug)]
pub enum IoOp<'a> {
    /// Fills the segments from byte `offset`; zeroes past the end.
    Read {
        /// Which file.
        file: FileToken,
        /// First byte in the file.
        offset: u64,
        /// Where the bytes go.
        segments: &'a [Segment],
    },
    /// Writes the segments at byte `offset`.
    Write {
        /// Which file.
        file: FileToken,
        /// First byte in the file.
        offset: u64,
        /// Where the bytes come from.
        segments: &'a [Segment],
    },
    /// As [`File::sync_data`].
    SyncData {
        /// Which file.
        file: FileToken,
    },
    /// As [`File::punch`].
    Punch {
        /// Which file.
        file: FileToken,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

/// The end of an operation.
#[derive(Debug)]
pub struct IoDone {
    /// The number given to [`Engine::submit`].
    pub user: u64,
    /// How it ended.
    pub result: io::Result<()>,
}

/// Carries out operations for one queue context. Not shared between threads, but may be moved to another one.
///
/// Operations under way at the same time have no order among each other. The engine copies the list of segments (not
/// the bytes) before `submit` returns. Memory may have any alignment, also for direct files, whose [`File::alignment`] it
/// is fast to keep to. Dropping an engine waits for what was kicked; what was not is never carried out.
pub trait Engine: Send {
    /// How many more operations can be submitted now.
    fn room(&self) -> usize;
    /// Queues an operation. The caller checked `room() > 0`.
    ///
    /// # Safety
    /// Until the completion with this `user` number was reaped (or the engine was dropped, which waits for all of
    /// them): every segment is valid for reads (`Write`) or writes (`Read`) of its length, no Rust reference to
    /// its bytes is alive, and `file` stays open.
    #[expect(unsafe_code, reason = "raw memory crosses this seam without a copy")]
    unsafe fn submit(&mut self, op: IoOp<'_>, user: u64);
    /// Hands what was queued to the kernel. Does not wait. Cheap if there is nothing.
    fn kick(&mut self) -> io::Result<()>;
    /// Appends what has completed to `done`. Does not wait.
    fn reap(&mut self, done: &mut Vec<IoDone>) -> io::Result<()>;
    /// Waits until at least one operation has completed; returns at once if none is under way. Kicks first. `reap` before
    /// sleeping on `wake_fd` again: completions that this has seen do not make it readable any more.
    fn wait(&mut self) -> io::Result<()>;
    /// Operations submitted and not yet reaped.
    fn under_way(&self) -> usize;
    /// Is readable when `reap` may have something new (level-triggered). The thread that kicked has to be the one that
    /// waits for it. `None` in a simulation, where nothing happens by itself: use `reap` and `wait` there.
    fn wake_fd(&self) -> Option<RawFd>;
}
