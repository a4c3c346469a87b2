//! The engine for hosts without io_uring: each operation is a plain system call, made when the queue is kicked.
//!
//! It keeps every promise of [`Engine`] except that it overlaps nothing: `kick` blocks while operations run. An eventfd
//! stands in for the ring's descriptor, so that a loop which waits for [`Engine::wake_fd`] works with either.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::host::direct::DirectFiles;
use super::host::transfer::{Call, Step, Transfer};
use super::{Engine, IoDone, IoOp};

/// What is added to the eventfd's counter. Any value but 0 and the greatest would do, so that its byte order is no matter.
const WAKE_ONCE: [u8; 8] = [1; 8];

/// See the module's text.
#[derive(Debug)]
pub struct PosixEngine {
    /// Submitted, not kicked: how `begin` ended.
    queued: Vec<Queued>,
    /// Transfers of finished operations, kept for their capacity.
    spare: Vec<Transfer>,
    /// Kicked, not reaped.
    done: Vec<IoDone>,
    /// Readable while `done` holds anything.
    wake: OwnedFd,
    /// Operations under way at most.
    depth: usize,
    /// The media's direct files.
    files: Arc<DirectFiles>,
}

/// An operation that waits for the kick.
#[derive(Debug)]
struct Queued {
    user: u64,
    transfer: Transfer,
    step: Step,
}

impl PosixEngine {
    /// An engine for files of the media that `files` belongs to.
    pub(in crate::file) fn new(depth: u32, files: Arc<DirectFiles>) -> io::Result<Self> {
        Ok(Self {
            queued: Vec::new(),
            spare: Vec::new(),
            done: Vec::new(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            depth: usize::try_from(depth).unwrap_or(usize::MAX).max(1),
            files,
        })
    }
}

impl Engine for PosixEngine {
    fn room(&self) -> usize {
        self.depth.saturating_sub(self.under_way())
    }

    #[expect(unsafe_code, reason = "the contract of the trait")]
    unsafe fn submit(&mut self, op: IoOp<'_>, user: u64) {
        debug_assert!(self.room() > 0, "submitted without room");
        let mut transfer = self.spare.pop().unwrap_or_else(Transfer::idle);
        // SAFETY: the caller's promise is the one that `begin` asks for; the transfer ends before the completion is
        // reaped, or is never started.
        let step = unsafe { transfer.begin(op, &self.files) };
        self.queued.push(Queued {
            user,
            transfer,
            step,
        });
    }

    fn kick(&mut self) -> io::Result<()> {
        if self.queued.is_empty() {
            return Ok(());
        }
        for mut queued in self.queued.drain(..) {
            let result = match queued.step {
                Step::Done(result) => result,
                Step::Again => finish(&mut queued.transfer, &self.files),
            };
            queued.transfer.clear();
            self.spare.push(queued.transfer);
            self.done.push(IoDone {
                user: queued.user,
                result,
            });
        }
        loop {
            match rustix::io::write(&self.wake, &WAKE_ONCE) {
                // A counter about to overflow is a counter that is readable.
                Ok(_) | Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn reap(&mut self, done: &mut Vec<IoDone>) -> io::Result<()> {
        if self.done.is_empty() {
            return Ok(());
        }
        done.append(&mut self.done);
        loop {
            match rustix::io::read(&self.wake, &mut [0u8; 8]) {
                Ok(_) | Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        // Everything that was kicked has completed already.
        if self.done.is_empty() {
            self.kick()
        } else {
            Ok(())
        }
    }

    fn under_way(&self) -> usize {
        self.queued.len() + self.done.len()
    }

    fn wake_fd(&self) -> Option<RawFd> {
        Some(self.wake.as_raw_fd())
    }
}

/// Carries out one operation and returns when it has ended. For the synchronous [`super::File`].
///
/// # Safety
/// As for [`Engine::submit`], until this returns.
#[expect(unsafe_code, reason = "passes the contract of `submit` on")]
pub(in crate::file) unsafe fn run(op: IoOp<'_>, files: &DirectFiles) -> io::Result<()> {
    let mut transfer = Transfer::idle();
    // SAFETY: as promised by the caller.
    match unsafe { transfer.begin(op, files) } {
        Step::Done(result) => result,
        Step::Again => finish(&mut transfer, files),
    }
}

/// Makes the calls that a begun transfer asks for, to its end.
pub(in crate::file) fn finish(transfer: &mut Transfer, files: &DirectFiles) -> io::Result<()> {
    loop {
        let answer = make(transfer.call());
        if let Step::Done(result) = transfer.advance(answer, files) {
            return result;
        }
    }
}

/// Makes one system call. Answers as io_uring does: what was done, or a negative error number.
fn make(call: Call) -> i32 {
    let answer = match call {
        Call::Read(fd, base, len, offset) => vectored_read(fd, &one(base, len), offset),
        Call::ReadVectored(fd, list, count, offset) => {
            // SAFETY: `Transfer::call` points into its own list, which holds `count` entries and does not change before
            // `advance`.
            #[expect(unsafe_code, reason = "the list of a transfer")]
            let list = unsafe { std::slice::from_raw_parts(list, count as usize) };
            vectored_read(fd, list, offset)
        }
        Call::Write(fd, base, len, offset) => {
            vectored_write(fd, &one(base.cast_mut(), len), offset)
        }
        Call::WriteVectored(fd, list, count, offset) => {
            // SAFETY: as for `ReadVectored`.
            #[expect(unsafe_code, reason = "the list of a transfer")]
            let list = unsafe { std::slice::from_raw_parts(list, count as usize) };
            vectored_write(fd, list, offset)
        }
        Call::SyncData(fd) => {
            // SAFETY: takes no memory.
            #[expect(unsafe_code, reason = "a system call by descriptor number")]
            let answer = unsafe { libc::fdatasync(fd) };
            isize::try_from(answer).unwrap_or(-1)
        }
        Call::Punch(fd, offset, len) => {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            // SAFETY: takes no memory.
            #[expect(unsafe_code, reason = "a system call by descriptor number")]
            let answer =
                unsafe { libc::fallocate(fd, mode, file_offset(offset), file_offset(len)) };
            isize::try_from(answer).unwrap_or(-1)
        }
    };
    if answer < 0 {
        return io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO)
            .wrapping_neg();
    }
    // A call moves less than 2 GiB.
    i32::try_from(answer).unwrap_or(i32::MAX)
}

/// A list of one segment.
fn one(base: *mut u8, len: u32) -> [libc::iovec; 1] {
    [libc::iovec {
        iov_base: base.cast(),
        iov_len: len as usize,
    }]
}

/// An offset as the kernel takes it; `Transfer::begin` refused what does not fit.
fn file_offset(offset: u64) -> libc::off_t {
    libc::off_t::try_from(offset).unwrap_or(libc::off_t::MAX)
}

/// preadv.
fn vectored_read(fd: RawFd, list: &[libc::iovec], offset: u64) -> isize {
    let count = libc::c_int::try_from(list.len()).unwrap_or(0);
    // SAFETY:
    // - `list` is valid for `count` entries.
    // - Each entry is valid for writes: promised to `Transfer::begin`.
    #[expect(unsafe_code, reason = "reads into a caller's raw memory")]
    unsafe {
        libc::preadv(fd, list.as_ptr(), count, file_offset(offset))
    }
}

/// pwritev.
fn vectored_write(fd: RawFd, list: &[libc::iovec], offset: u64) -> isize {
    let count = libc::c_int::try_from(list.len()).unwrap_or(0);
    // SAFETY:
    // - `list` is valid for `count` entries.
    // - Each entry is valid for reads: promised to `Transfer::begin`.
    #[expect(unsafe_code, reason = "writes from a caller's raw memory")]
    unsafe {
        libc::pwritev(fd, list.as_ptr(), count, file_offset(offset))
    }
}
