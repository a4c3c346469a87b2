//! One operation on a host file from its start to its end, whoever makes the system calls.
//!
//! An engine asks for the [`Call`] to make, makes it in its own way and hands the kernel's answer to
//! [`Transfer::advance`], until that says `Done`. Here and nowhere else are: the continuation of short transfers,
//! zeroes past the end of a file, lists longer than IOV_MAX, retries, and the help for transfers that a direct file
//! refuses.
//!
//! # Transfers that are not aligned, on direct files
//! - Memory not aligned: through a [`Bounce`].
//! - A read of other than whole sectors: the sectors around it are read into a bounce.
//! - A write of other than whole sectors: through the page cache, by the file's buffered twin. The kernel keeps both
//!   views the same: it flushes the pages before a direct read, and drops them after a direct write.
//! - EINVAL although all looked aligned: the same help once more with the alignment of a page.
//!
//! A write through the twin must not run at the same time as another write to the same page of the file: the kernel would
//! fill the page, and write it back, with the other one's old bytes. Requests of whole sectors never come here.

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::RawFd;

use super::bounce::{BOUNCE_ALIGN, Bounce};
use super::direct::{self, DirectFile, DirectFiles};
use crate::file::{IoOp, Segment};
use crate::units::SECTOR_BYTES;

/// Segments that one system call takes (IOV_MAX).
const SEGMENTS_MAX: usize = 1024;
/// Bytes that one system call is asked for; the kernel stops a little below 2 GiB anyway.
const CALL_BYTES_MAX: usize = 1 << 30;
/// How often an answer that means "try again" is believed without any progress.
const RETRIES_MAX: u32 = 10_000;
/// Capacity of a segment list that a finished transfer keeps for the next one.
const KEPT_SEGMENTS_MAX: usize = 256;

/// The system call that a transfer needs next. Pointers stay valid until the answer was given to `advance`.
#[derive(Clone, Copy, Debug)]
pub(in crate::file) enum Call {
    /// pread into one buffer.
    Read(RawFd, *mut u8, u32, u64),
    /// preadv: descriptor, list, count, offset.
    ReadVectored(RawFd, *const libc::iovec, u32, u64),
    /// pwrite from one buffer.
    Write(RawFd, *const u8, u32, u64),
    /// pwritev: descriptor, list, count, offset.
    WriteVectored(RawFd, *const libc::iovec, u32, u64),
    /// fdatasync.
    SyncData(RawFd),
    /// fallocate with PUNCH_HOLE and KEEP_SIZE: descriptor, offset, length.
    Punch(RawFd, u64, u64),
}

/// What follows the kernel's answer.
#[derive(Debug)]
pub(in crate::file) enum Step {
    /// Another call is needed: see [`Transfer::call`].
    Again,
    /// The operation has ended.
    Done(io::Result<()>),
}

/// Which operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    SyncData,
    Punch,
}

/// Memory in place of the caller's.
#[derive(Debug)]
struct Detour {
    /// The aligned memory.
    bounce: Bounce,
    /// The caller's segments.
    segments: Vec<libc::iovec>,
    /// Where the wanted bytes begin in the bounce (a read of the sectors around them).
    skip: usize,
    /// Where they begin in the file.
    offset: u64,
}

/// The state of one operation. Reused for the next one to keep the capacity of its list.
#[derive(Debug)]
pub(in crate::file) struct Transfer {
    kind: Kind,
    /// What the calls go to; may change to the buffered twin.
    fd: RawFd,
    /// Whether `fd` is direct.
    direct: bool,
    /// Whether the help for an unexpected EINVAL was used up.
    helped: bool,
    /// The next byte in the file.
    offset: u64,
    /// Bytes left (of a punch: all of them).
    left: u64,
    /// What is left to transfer is `segments[first..]`, with the first one shortened by what was done of it.
    segments: Vec<libc::iovec>,
    /// See `segments`.
    first: usize,
    /// Set if the segments are not the caller's.
    detour: Option<Detour>,
    /// Answers without progress in a row.
    retries: u32,
}

#[expect(
    unsafe_code,
    reason = "raw pointers to a caller's memory, which is not tied to a thread"
)]
// SAFETY: the pointers are only handed to the kernel or used for copies under the promise of `Engine::submit`, which holds
// on whatever thread the engine is.
unsafe impl Send for Transfer {}

impl Transfer {
    /// A transfer that does nothing yet.
    pub(in crate::file) fn idle() -> Self {
        Self {
            kind: Kind::SyncData,
            fd: -1,
            direct: false,
            helped: false,
            offset: 0,
            left: 0,
            segments: Vec::new(),
            first: 0,
            detour: None,
            retries: 0,
        }
    }

    /// Starts an operation. `Again` means that `call` has something to do.
    ///
    /// # Safety
    /// As for [`crate::file::Engine::submit`], until `advance` answered `Done`. For a write the segments are valid now.
    #[expect(unsafe_code, reason = "passes the contract of `submit` on")]
    pub(in crate::file) unsafe fn begin(&mut self, op: IoOp<'_>, files: &DirectFiles) -> Step {
        let (kind, token, offset, segments) = match op {
            IoOp::Read {
                file,
                offset,
                segments,
            } => (Kind::Read, file, offset, segments),
            IoOp::Write {
                file,
                offset,
                segments,
            } => (Kind::Write, file, offset, segments),
            IoOp::SyncData { file } => (Kind::SyncData, file, 0, &[][..]),
            IoOp::Punch { file, offset, .. } => (Kind::Punch, file, offset, &[][..]),
        };
        self.kind = kind;
        self.fd = direct::descriptor(token);
        self.direct = direct::is_direct(token);
        self.helped = false;
        self.offset = offset;
        self.left = 0;
        self.first = 0;
        self.detour = None;
        self.retries = 0;
        self.segments.clear();
        let mut unaligned = offset;
        for segment in segments {
            if segment.len == 0 {
                continue;
            }
            let Some(left) = self.left.checked_add(segment.len as u64) else {
                return Step::Done(Err(io::ErrorKind::InvalidInput.into()));
            };
            self.left = left;
            unaligned |= segment.base.addr() as u64 | segment.len as u64;
            self.segments.push(libc::iovec {
                iov_base: segment.base.cast(),
                iov_len: segment.len,
            });
        }
        if let IoOp::Punch { len, .. } = op {
            self.left = len;
        }
        if offset
            .checked_add(self.left)
            .is_none_or(|end| i64::try_from(end).is_err())
        {
            return Step::Done(Err(io::ErrorKind::InvalidInput.into()));
        }
        if self.left == 0 && kind != Kind::SyncData {
            return Step::Done(Ok(()));
        }
        let transfers = matches!(kind, Kind::Read | Kind::Write);
        if transfers && self.direct && !unaligned.is_multiple_of(SECTOR_BYTES) {
            let file = files.get(self.fd);
            if !self.aligned_for(&file)
                && let Err(error) = self.take_detour(&file)
            {
                return Step::Done(Err(error));
            }
        }
        Step::Again
    }

    /// Whether the file takes the transfer as it is.
    fn aligned_for(&self, file: &DirectFile) -> bool {
        let fits = |value: u64, align: u64| value.is_multiple_of(align);
        fits(self.offset, file.offset_bytes)
            && self.segments.iter().all(|segment| {
                fits(segment.iov_len as u64, file.offset_bytes)
                    && fits(segment.iov_base.addr() as u64, file.memory_bytes)
            })
    }

    /// Redirects a transfer that its direct file would refuse: see the module's text.
    fn take_detour(&mut self, file: &DirectFile) -> io::Result<()> {
        let whole = self.offset.is_multiple_of(file.offset_bytes)
            && self.left.is_multiple_of(file.offset_bytes);
        if self.kind == Kind::Write && (self.helped || !whole) {
            let Some(twin) = file.buffered_twin else {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "a write of other than whole sectors to a direct file",
                ));
            };
            self.fd = twin;
            self.direct = false;
            return Ok(());
        }
        // An EINVAL is answered with the alignment of a page for the offset as well: 4Kn devices ask for it.
        let align = if self.helped {
            BOUNCE_ALIGN as u64
        } else {
            file.offset_bytes
        };
        let too_big = || io::Error::from(io::ErrorKind::InvalidInput);
        let end = (self.offset + self.left)
            .checked_next_multiple_of(align)
            .ok_or_else(too_big)?;
        let skip = self.offset % align;
        let bytes = end - (self.offset - skip);
        let size = usize::try_from(bytes).map_err(|_| too_big())?;
        let bounce = Bounce::new(size)?;
        if self.kind == Kind::Write {
            let mut at = 0;
            for segment in self.segments.iter().skip(self.first) {
                // SAFETY:
                // - The caller promised that the segment is valid for reads; the bounce has room for the sum of them.
                // - They do not overlap: the bounce was allocated just now.
                #[expect(unsafe_code, reason = "gathers a caller's raw memory")]
                unsafe {
                    copy(
                        segment.iov_base.cast(),
                        bounce.as_ptr().wrapping_add(at),
                        segment.iov_len,
                    );
                }
                at += segment.iov_len;
            }
        }
        let whole = libc::iovec {
            iov_base: bounce.as_ptr().cast(),
            iov_len: size,
        };
        let rest = self.segments.split_off(self.first);
        self.segments.clear();
        self.segments.push(whole);
        self.first = 0;
        let offset = self.offset;
        self.offset -= skip;
        self.left = bytes;
        let skip = usize::try_from(skip).map_err(|_| too_big())?;
        self.detour = Some(Detour {
            bounce,
            segments: rest,
            skip,
            offset,
        });
        Ok(())
    }

    /// The system call to make now.
    pub(in crate::file) fn call(&self) -> Call {
        let window = self.segments.get(self.first..).unwrap_or_default();
        #[expect(
            clippy::cast_possible_truncation,
            reason = "both are bounded by constants below 2^32"
        )]
        let (len, count) = (
            window
                .first()
                .map_or(0, |segment| segment.iov_len.min(CALL_BYTES_MAX)) as u32,
            window.len().min(SEGMENTS_MAX) as u32,
        );
        let base = window.first().map_or(std::ptr::null_mut(), |segment| {
            segment.iov_base.cast::<u8>()
        });
        match self.kind {
            Kind::Read if count == 1 => Call::Read(self.fd, base, len, self.offset),
            Kind::Read => Call::ReadVectored(self.fd, window.as_ptr(), count, self.offset),
            Kind::Write if count == 1 => Call::Write(self.fd, base, len, self.offset),
            Kind::Write => Call::WriteVectored(self.fd, window.as_ptr(), count, self.offset),
            Kind::SyncData => Call::SyncData(self.fd),
            Kind::Punch => Call::Punch(self.fd, self.offset, self.left),
        }
    }

    /// Takes the kernel's answer: what was done, or a negative error number.
    pub(in crate::file) fn advance(&mut self, answer: i32, files: &DirectFiles) -> Step {
        let Ok(done) = u64::try_from(answer) else {
            return self.failed(answer.wrapping_neg(), files);
        };
        match self.kind {
            Kind::SyncData | Kind::Punch => Step::Done(Ok(())),
            Kind::Read | Kind::Write if done >= self.left => {
                self.finish_read(self.left);
                Step::Done(Ok(()))
            }
            Kind::Write if done == 0 => Step::Done(Err(io::ErrorKind::WriteZero.into())),
            Kind::Read if done == 0 => {
                self.finish_read(0);
                Step::Done(Ok(()))
            }
            Kind::Read if self.direct && !(self.offset + done).is_multiple_of(SECTOR_BYTES) => {
                // A direct read stops inside a sector only where the file ends, and could not go on from there.
                self.finish_read(done);
                Step::Done(Ok(()))
            }
            Kind::Read | Kind::Write => {
                self.retries = 0;
                self.skip(done);
                Step::Again
            }
        }
    }

    /// An error number: try again, help, or the end.
    fn failed(&mut self, errno: i32, files: &DirectFiles) -> Step {
        match errno {
            libc::EINTR | libc::EAGAIN if self.retries < RETRIES_MAX => {
                self.retries += 1;
                Step::Again
            }
            libc::EINVAL if self.direct && !self.helped && self.kind != Kind::Punch => {
                self.helped = true;
                self.restore();
                match self.take_detour(&files.get(self.fd)) {
                    Ok(()) => Step::Again,
                    Err(_) => Step::Done(Err(io::Error::from_raw_os_error(errno))),
                }
            }
            libc::EOPNOTSUPP | libc::ENOSYS if self.kind == Kind::Punch => {
                let twin = if self.direct {
                    files.get(self.fd).buffered_twin
                } else {
                    None
                };
                Step::Done(super::zeroes::write_zeroes(
                    twin.unwrap_or(self.fd),
                    self.offset,
                    self.left,
                ))
            }
            _ => Step::Done(Err(io::Error::from_raw_os_error(errno))),
        }
    }

    /// Takes back a detour that was no use. What it had transferred is transferred once more.
    fn restore(&mut self) {
        let Some(detour) = self.detour.take() else {
            return;
        };
        self.segments.clear();
        self.first = 0;
        self.offset = detour.offset;
        self.left = 0;
        for segment in detour.segments {
            self.left += segment.iov_len as u64;
            self.segments.push(segment);
        }
    }

    /// Notes that `done` more bytes were transferred; `done < left`.
    fn skip(&mut self, done: u64) {
        self.offset += done;
        self.left -= done;
        // `done` is a positive i32, so that it fits.
        let mut done = usize::try_from(done).unwrap_or(usize::MAX);
        while let Some(segment) = self.segments.get_mut(self.first) {
            if done < segment.iov_len {
                segment.iov_base = segment.iov_base.cast::<u8>().wrapping_add(done).cast();
                segment.iov_len -= done;
                return;
            }
            done -= segment.iov_len;
            self.first += 1;
        }
    }

    /// Ends a read of which `done` more bytes were there: zeroes for the rest, and the bounce goes to its owner.
    fn finish_read(&mut self, done: u64) {
        if self.kind != Kind::Read {
            return;
        }
        if done < self.left {
            self.skip(done);
            for segment in self.segments.iter().skip(self.first) {
                // SAFETY: the caller promised that the segment is valid for writes (or it is our bounce), and the kernel
                // has answered: it no longer uses it.
                #[expect(unsafe_code, reason = "fills a caller's raw memory")]
                unsafe {
                    std::ptr::write_bytes(segment.iov_base.cast::<u8>(), 0, segment.iov_len);
                }
            }
        }
        let Some(detour) = self.detour.take() else {
            return;
        };
        let mut at = detour.skip;
        for segment in &detour.segments {
            // SAFETY:
            // - The caller promised that the segment is valid for writes; the bounce holds `skip` and the sum of them.
            // - They do not overlap: the bounce is an allocation of its own.
            #[expect(unsafe_code, reason = "scatters into a caller's raw memory")]
            unsafe {
                copy(
                    detour.bounce.as_ptr().wrapping_add(at),
                    segment.iov_base.cast(),
                    segment.iov_len,
                );
            }
            at += segment.iov_len;
        }
    }

    /// Lets go of what the operation held; to be called after `Done`, before the next `begin`.
    pub(in crate::file) fn clear(&mut self) {
        self.detour = None;
        self.segments.clear();
        self.segments.shrink_to(KEPT_SEGMENTS_MAX);
    }
}

/// Copies between raw memory that does not overlap.
///
/// # Safety
/// `from` is valid for reads and `to` for writes of `len` bytes, and they do not overlap.
#[expect(unsafe_code, reason = "raw memory crosses the engine's seam")]
unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: as promised by the caller.
    unsafe { std::ptr::copy_nonoverlapping(from, to, len) }
}

/// One segment over a whole slice, for the synchronous calls.
pub(in crate::file) fn segment_of(buf: *mut u8, len: usize) -> Segment {
    Segment { base: buf, len }
}
