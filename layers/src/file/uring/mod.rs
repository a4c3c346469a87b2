//! The engine on io_uring: one ring for one queue context.
//!
//! # How it works
//! - Each operation takes a slot, which owns its list of segments until the end. A slot has at most one entry with the
//!   kernel at a time; short transfers and long lists go on with another entry from the same slot. So a completion queue
//!   of twice the depth cannot overflow.
//! - `submit` only writes an entry into shared memory; `kick` hands all of them over in one system call. Transfers that
//!   the page cache can serve are carried out inside that call, and their completions lie in shared memory afterwards.
//! - Other completions are posted when the submitting thread enters the kernel, or waits in it. For a thread that only
//!   looks at shared memory the kernel raises a flag, on which `reap` enters.
//! - Buffered writes are plain system calls in `submit` as well: the kernel would hand each to another thread on file systems
//!   that cannot write without waiting (ext4), at several times the cost of the copy. See decision 0006.
//! - Files in memory (tmpfs) are read and written by plain system calls in `submit`: they have nothing to wait for, but the
//!   kernel would hand each transfer to another thread, at three times the cost.
//! - Operations that end without the ring (these; nothing to transfer, nonsense) go through the ring as a no-op, so that
//!   [`Engine::wake_fd`] announces them as well.
//!
//! # Threads
//! The engine may move between threads at any time, and any of them may drop it.
//!
//! # Invariant
//! `unsubmitted <= in_ring`, and `in_ring` slots have exactly one entry each in one of the two queues or in the kernel.

mod setup;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::{EnterFlags, IoUring, opcode, squeue, types};

use super::host::direct::{self, DirectFiles};
use super::host::transfer::{Call, Step, Transfer};
use super::{Engine, IoDone, IoOp, posix};

/// Operations under way at most, whatever the caller asks for.
const DEPTH_MAX: u32 = 4096;
/// How often a submission that the kernel cannot take now is tried while nothing is under way that could free anything.
const SUBMIT_RETRIES_MAX: u32 = 10_000;

/// See the module's text.
pub struct UringEngine {
    /// The ring.
    ring: IoUring,
    /// One for each operation that can be under way.
    slots: Vec<Slot>,
    /// Indices of free slots; the one freed last is used first.
    free: Vec<u32>,
    /// Entries pushed whose completion was not taken yet.
    in_ring: usize,
    /// Of these, entries that the kernel has not seen.
    unsubmitted: usize,
    /// Completions taken (by `wait`) and not reaped.
    done: Vec<IoDone>,
    /// The media's direct files.
    files: Arc<DirectFiles>,
}

/// The place of one operation.
#[derive(Debug)]
struct Slot {
    /// The submitter's number.
    user: u64,
    /// The operation.
    transfer: Transfer,
    /// How it ended, if that was known before the kernel saw it.
    verdict: Option<io::Result<()>>,
}

impl std::fmt::Debug for UringEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UringEngine")
            .field("depth", &self.slots.len())
            .field("in_ring", &self.in_ring)
            .field("unsubmitted", &self.unsubmitted)
            .finish_non_exhaustive()
    }
}

impl UringEngine {
    /// An engine for files of the media that `files` belongs to.
    ///
    /// # Errors
    /// What the kernel says if it has no io_uring, forbids it, or lacks an operation.
    pub(in crate::file) fn new(depth: u32, files: Arc<DirectFiles>) -> io::Result<Self> {
        let depth = depth.clamp(1, DEPTH_MAX);
        let ring = setup::make(depth)?;
        let slot = || Slot {
            user: 0,
            transfer: Transfer::idle(),
            verdict: None,
        };
        Ok(Self {
            ring,
            slots: std::iter::repeat_with(slot).take(depth as usize).collect(),
            free: (0..depth).rev().collect(),
            in_ring: 0,
            unsubmitted: 0,
            done: Vec::new(),
            files,
        })
    }

    /// Hands the queued entries over and waits for `want` completions.
    fn enter(&mut self, want: usize) -> io::Result<()> {
        let mut retries = 0;
        loop {
            match self.ring.submit_and_wait(want) {
                Ok(submitted) => {
                    self.unsubmitted = self.unsubmitted.saturating_sub(submitted);
                    if self.unsubmitted == 0 || want > 0 {
                        return Ok(());
                    }
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => continue,
                    // The kernel is short of memory or its backlog is full. What is under way will make room, and
                    // whoever reaps it tries again.
                    Some(libc::EAGAIN | libc::EBUSY) if self.in_ring > self.unsubmitted => {
                        return Ok(());
                    }
                    Some(libc::EAGAIN | libc::EBUSY) if retries < SUBMIT_RETRIES_MAX => {}
                    _ => return Err(error),
                },
            }
            retries += 1;
            if retries > SUBMIT_RETRIES_MAX {
                return Err(io::Error::from_raw_os_error(libc::EBUSY));
            }
            std::thread::yield_now();
        }
    }

    /// Takes completions from shared memory: appends those of finished operations to `done`, and queues the next entry of
    /// those that go on.
    fn take(&mut self, done: &mut Vec<IoDone>) {
        let (_, mut entries, mut completions) = self.ring.split();
        completions.sync();
        for completion in &mut completions {
            self.in_ring -= 1;
            let Ok(index) = u32::try_from(completion.user_data()) else {
                continue;
            };
            let Some(slot) = self.slots.get_mut(index as usize) else {
                continue;
            };
            let step = match slot.verdict.take() {
                Some(result) => Step::Done(result),
                None => slot.transfer.advance(completion.result(), &self.files),
            };
            let result = match step {
                Step::Done(result) => result,
                Step::Again => {
                    if push(&mut entries, &entry(slot.transfer.call(), index)) {
                        self.in_ring += 1;
                        self.unsubmitted += 1;
                        continue;
                    }
                    // Cannot be: there are as many entries as slots.
                    Err(io::ErrorKind::QuotaExceeded.into())
                }
            };
            slot.transfer.clear();
            done.push(IoDone {
                user: slot.user,
                result,
            });
            self.free.push(index);
        }
    }

    /// Whether the kernel has completions that only an `enter` brings into shared memory.
    fn wants_enter(&mut self) -> bool {
        let entries = self.ring.submission();
        entries.taskrun() || entries.cq_overflow()
    }
}

/// The entry for a system call.
fn entry(call: Call, index: u32) -> squeue::Entry {
    let entry = match call {
        Call::Read(fd, base, len, offset) => opcode::Read::new(types::Fd(fd), base, len)
            .offset(offset)
            .build(),
        Call::ReadVectored(fd, list, count, offset) => {
            opcode::Readv::new(types::Fd(fd), list, count)
                .offset(offset)
                .build()
        }
        Call::Write(fd, base, len, offset) => opcode::Write::new(types::Fd(fd), base, len)
            .offset(offset)
            .build(),
        Call::WriteVectored(fd, list, count, offset) => {
            opcode::Writev::new(types::Fd(fd), list, count)
                .offset(offset)
                .build()
        }
        Call::SyncData(fd) => opcode::Fsync::new(types::Fd(fd))
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        Call::Punch(fd, offset, len) => opcode::Fallocate::new(types::Fd(fd), len)
            .offset(offset)
            .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
            .build(),
    };
    entry.user_data(u64::from(index))
}

/// Queues an entry; `false` if there is no place.
fn push(entries: &mut squeue::SubmissionQueue<'_>, entry: &squeue::Entry) -> bool {
    // SAFETY:
    // - The memory and the list that the entry points to belong to a slot's transfer, which does not change before the
    //   entry's completion was taken; the submitter promised the same of the bytes.
    // - Dropping the engine waits for all entries that the kernel has seen.
    #[expect(unsafe_code, reason = "hands raw memory to the kernel")]
    unsafe {
        entries.push(entry).is_ok()
    }
}

impl Engine for UringEngine {
    fn room(&self) -> usize {
        self.free.len().saturating_sub(self.done.len())
    }

    #[expect(unsafe_code, reason = "the contract of the trait")]
    unsafe fn submit(&mut self, op: IoOp<'_>, user: u64) {
        debug_assert!(self.room() > 0, "submitted without room");
        let place = self.free.pop();
        let slot = place.and_then(|index| Some((index, self.slots.get_mut(index as usize)?)));
        let Some((index, slot)) = slot else {
            // The caller broke the rule; it hears of it in the way of every other failure.
            self.done.push(IoDone {
                user,
                result: Err(io::ErrorKind::QuotaExceeded.into()),
            });
            return;
        };
        slot.user = user;
        let (IoOp::Read { file, .. }
        | IoOp::Write { file, .. }
        | IoOp::SyncData { file }
        | IoOp::Punch { file, .. }) = op;
        let buffered_write = matches!(op, IoOp::Write { .. }) && !direct::is_direct(file);
        let at_once = direct::is_in_memory(file) || buffered_write;
        // SAFETY: the caller's promise is the one that `begin` asks for; it holds until the completion is reaped, which is
        // after `advance` said `Done`.
        let entry = match unsafe { slot.transfer.begin(op, &self.files) } {
            Step::Again if !at_once => entry(slot.transfer.call(), index),
            step => {
                let result = match step {
                    Step::Done(result) => result,
                    Step::Again => posix::finish(&mut slot.transfer, &self.files),
                };
                slot.verdict = Some(result);
                opcode::Nop::new().build().user_data(u64::from(index))
            }
        };
        if push(&mut self.ring.submission(), &entry) {
            self.in_ring += 1;
            self.unsubmitted += 1;
        } else {
            // Cannot be: there are as many entries as slots.
            self.free.push(index);
            self.done.push(IoDone {
                user,
                result: Err(io::ErrorKind::QuotaExceeded.into()),
            });
        }
    }

    fn kick(&mut self) -> io::Result<()> {
        if self.unsubmitted == 0 {
            Ok(())
        } else {
            self.enter(0)
        }
    }

    fn reap(&mut self, done: &mut Vec<IoDone>) -> io::Result<()> {
        done.append(&mut self.done);
        if self.in_ring == 0 {
            return Ok(());
        }
        if self.ring.completion().is_empty() {
            if self.in_ring == self.unsubmitted || !self.wants_enter() {
                return Ok(());
            }
            self.enter(0)?;
        }
        self.take(done);
        self.kick()
    }

    fn wait(&mut self) -> io::Result<()> {
        let mut done = std::mem::take(&mut self.done);
        let mut result = Ok(());
        while done.is_empty() && self.in_ring > 0 {
            if self.ring.completion().is_empty() {
                result = self.enter(1);
                if result.is_err() {
                    break;
                }
            }
            self.take(&mut done);
        }
        self.done = done;
        result
    }

    fn under_way(&self) -> usize {
        self.slots.len() - self.free.len() + self.done.len()
    }

    fn wake_fd(&self) -> Option<RawFd> {
        Some(self.ring.as_raw_fd())
    }
}

impl Drop for UringEngine {
    fn drop(&mut self) {
        // Entries that the kernel has not seen are never submitted: `enter` is told to take none of them.
        while self.in_ring > self.unsubmitted {
            let taken = self.ring.completion().count();
            self.in_ring -= taken.min(self.in_ring);
            if taken > 0 {
                continue;
            }
            // SAFETY: neither signal mask nor timeout is passed.
            #[expect(unsafe_code, reason = "a wait that submits nothing has no safe form")]
            let answer = unsafe {
                let flags = EnterFlags::GETEVENTS.bits();
                self.ring
                    .submitter()
                    .enter::<libc::sigset_t>(0, 1, flags, None)
            };
            if let Err(error) = answer
                && error.raw_os_error() != Some(libc::EINTR)
            {
                // The kernel is short of something. Going on without the completions is no choice, since the
                // memory would be freed under its hands.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}
