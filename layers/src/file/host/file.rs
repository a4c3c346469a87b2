//! One open file on the host.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FlockOperation, SeekFrom, seek};
use rustix::io::Errno;

use super::direct::{self, DirectFile, DirectFiles};
use super::open::Direct;
use super::transfer::segment_of;
use super::uninterrupted;
use crate::file::{DATA_RANGES_MAX, File, FileIdentity, FileToken, IoOp, posix};
use crate::units::SECTOR_BYTES;

/// See the module's text.
#[derive(Debug)]
pub(super) struct HostFile {
    /// The file.
    fd: OwnedFd,
    /// The same file through the page cache, if this one is direct and writable. Held open for `DirectFiles`.
    _buffered_twin: Option<OwnedFd>,
    /// The name for engines.
    token: FileToken,
    /// Where a direct file is registered.
    files: Arc<DirectFiles>,
}

impl HostFile {
    /// Wraps what was opened and registers it if it is direct.
    pub(super) fn new(
        fd: OwnedFd,
        direct: Option<Direct>,
        in_memory: bool,
        files: &Arc<DirectFiles>,
    ) -> io::Result<Self> {
        let token = direct::token(fd.as_raw_fd(), direct.is_some(), in_memory)?;
        let mut buffered_twin = None;
        if let Some(direct) = direct {
            buffered_twin = direct.buffered_twin;
            files.insert(
                fd.as_raw_fd(),
                DirectFile {
                    memory_bytes: direct.memory_bytes,
                    offset_bytes: direct.offset_bytes,
                    buffered_twin: buffered_twin.as_ref().map(AsRawFd::as_raw_fd),
                },
            );
        }
        Ok(Self {
            fd,
            _buffered_twin: buffered_twin,
            token,
            files: Arc::clone(files),
        })
    }
}

impl Drop for HostFile {
    fn drop(&mut self) {
        // Before the fields, and with them the descriptor, are dropped.
        if direct::is_direct(self.token) {
            self.files.remove(self.fd.as_raw_fd());
        }
    }
}

impl File for HostFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let segments = [segment_of(buf.as_mut_ptr(), buf.len())];
        let op = IoOp::Read {
            file: self.token,
            offset,
            segments: &segments,
        };
        // SAFETY: the slice is exclusively borrowed, and used by nobody else, until the call returns.
        #[expect(unsafe_code, reason = "the synchronous form of an engine's operation")]
        unsafe {
            posix::run(op, &self.files)
        }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let segments = [segment_of(buf.as_ptr().cast_mut(), buf.len())];
        let op = IoOp::Write {
            file: self.token,
            offset,
            segments: &segments,
        };
        // SAFETY: the slice is borrowed until the call returns, and a write only reads it.
        #[expect(unsafe_code, reason = "the synchronous form of an engine's operation")]
        unsafe {
            posix::run(op, &self.files)
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        // EINTR before anything happened is safe to repeat; every other failure is the caller's.
        uninterrupted(|| rustix::fs::fdatasync(&self.fd))
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let op = IoOp::Punch {
            file: self.token,
            offset,
            len,
        };
        // SAFETY: no memory takes part.
        #[expect(unsafe_code, reason = "the synchronous form of an engine's operation")]
        unsafe {
            posix::run(op, &self.files)
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        uninterrupted(|| rustix::fs::ftruncate(&self.fd, len))
    }

    fn len(&self) -> io::Result<u64> {
        let stat = uninterrupted(|| rustix::fs::fstat(&self.fd))?;
        u64::try_from(stat.st_size).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    fn drop_cached(&self) -> io::Result<()> {
        match rustix::fs::fadvise(&self.fd, 0, None, rustix::fs::Advice::DontNeed) {
            // File systems that keep nothing, or cannot forget it.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn identity(&self) -> io::Result<Option<FileIdentity>> {
        let stat = uninterrupted(|| rustix::fs::fstat(&self.fd))?;
        Ok(Some(FileIdentity {
            device: stat.st_dev,
            inode: stat.st_ino,
        }))
    }

    fn lock(&self, alone: bool) -> io::Result<bool> {
        let take = |operation| uninterrupted(|| rustix::fs::flock(&self.fd, operation));
        let taken = if alone {
            take(FlockOperation::NonBlockingLockExclusive).inspect_err(|_| {
                // The kernel has given up the one that there was. If it cannot be had again, somebody else is alone, and the
                // next who asks is told.
                let _ = take(FlockOperation::NonBlockingLockShared);
            })
        } else {
            take(FlockOperation::NonBlockingLockShared)
        };
        match taken {
            Ok(()) => Ok(true),
            Err(error) => match Errno::from_io_error(&error) {
                // Of the last kind are network file systems, which want a file that is open for writing.
                Some(
                    Errno::OPNOTSUPP | Errno::NOLCK | Errno::NOSYS | Errno::INVAL | Errno::BADF,
                ) => Ok(false),
                _ => Err(error),
            },
        }
    }

    fn data_ranges(&self, from: u64, to: u64) -> io::Result<Option<Vec<Range<u64>>>> {
        let mut ranges = Vec::new();
        let mut at = from;
        while at < to {
            // All transfers name their place, so where the descriptor stands is nobody's business.
            let start = match seek(&self.fd, SeekFrom::Data(at)) {
                Ok(start) if start < to => start,
                Ok(_) | Err(Errno::NXIO) => break,
                Err(Errno::INTR) => continue,
                Err(_) => return Ok(None),
            };
            if ranges.len() + 1 == DATA_RANGES_MAX {
                ranges.push(start..to);
                break;
            }
            let end = match uninterrupted(|| seek(&self.fd, SeekFrom::Hole(start))) {
                Ok(end) if end > start => end.min(to),
                Ok(_) | Err(_) => return Ok(None),
            };
            ranges.push(start..end);
            at = end;
        }
        Ok(Some(ranges))
    }

    fn token(&self) -> FileToken {
        self.token
    }

    fn alignment(&self) -> u64 {
        if direct::is_direct(self.token) {
            SECTOR_BYTES
        } else {
            1
        }
    }
}
