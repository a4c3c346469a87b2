//! The data plane's facade: one disk, and the context through which one worker thread serves its queues.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use crate::error::Result;
use crate::file::Segment;
use crate::units::{Sector, SectorRange};

/// What a request wants. Ranges are already known to lie inside the capacity; they are checked again all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fills the segments from the disk, starting at this sector.
    Read(Sector),
    /// Writes the segments to the disk, starting at this sector.
    Write(Sector),
    /// Makes the range read as zeroes. With `unmap` its space is given back as well.
    WriteZeroes {
        /// Which sectors.
        range: SectorRange,
        /// Whether the space may be given back.
        unmap: bool,
    },
    /// The guest no longer needs the range. It reads as zeroes afterwards; its space is given back.
    Discard(SectorRange),
    /// Makes everything that completed before this was submitted survive power loss.
    Flush,
}

/// What a completion promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Survives power loss after the next completed flush.
    AfterFlush,
    /// Survives power loss once completed (write-through).
    OnCompletion,
}

/// Why a request failed. The guest sees an I/O error whatever the reason; the words go to the log and the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestError {
    /// The range lies outside the disk, the length is not whole sectors, or the memory does not match.
    OutOfRange,
    /// A write, discard or write-zeroes on a read-only volume.
    ReadOnly,
    /// The host failed to read or write.
    Io,
    /// An earlier write or sync failed; the volume takes no more writes and flushes.
    Failed,
}

/// The end of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The number that the caller gave.
    pub token: u64,
    /// How it ended. On success of a read all segments are filled.
    pub result: std::result::Result<(), RequestError>,
}

/// One disk, open for requests. Shared by all its queue contexts and the control plane.
#[derive(Debug)]
pub struct Volume {}

impl Volume {
    /// The volume's name; never changes.
    pub fn name(&self) -> &str {
        ""
    }

    /// The size of the disk.
    pub fn capacity(&self) -> Sector {
        Sector(0)
    }

    /// Why the volume takes no more writes, or `None` while all is well.
    pub fn failure(&self) -> Option<String> {
        None
    }

    /// A context for one worker thread. `read_only` refuses everything that would change the disk.
    ///
    /// # Errors
    /// `Io` if the host has no resources for it.
    pub fn context(self: &Arc<Self>, read_only: bool) -> Result<QueueContext> {
        let _ = read_only;
        Ok(QueueContext {})
    }
}

/// Carries out the requests of one worker thread (of one or more of its queues). Not shared between threads.
///
/// The caller's loop: read the available index; `begin_batch`; `submit` each request; `kick`; later `poll`.
/// Dropping a context waits for everything that is under way.
#[derive(Debug)]
pub struct QueueContext {}

impl QueueContext {
    /// Fixes the chain for the requests that follow. Must be called after the available index that announced
    /// them was read (with Acquire), so that a request which a guest issued after it saw another one complete can never
    /// run in an older generation than that one did.
    pub fn begin_batch(&mut self) {}

    /// Starts a request. It completes in a later `poll`, exactly once, with this `token`, even if it failed at once.
    /// Never blocks. `segments` are the guest's data in order (none for the operations without data); the list is copied.
    ///
    /// # Safety
    /// Until the completion with this token was polled (or the context was dropped) all segments are valid for reads
    /// (`Write`) or writes (`Read`) of their length, and no Rust reference to their bytes is used meanwhile.
    #[expect(unsafe_code, reason = "guest memory crosses this seam without a copy")]
    pub unsafe fn submit(
        &mut self,
        operation: Operation,
        durability: Durability,
        segments: &[Segment],
        token: u64,
    ) {
        let _ = (operation, durability, segments, token);
    }

    /// Hands what was queued to the kernel. Call once after a batch. Does not wait.
    pub fn kick(&mut self) {}

    /// Appends the requests that have ended to `done`. Does not wait.
    pub fn poll(&mut self, done: &mut Vec<Completion>) {
        let _ = done;
    }

    /// Waits until `poll` may have something new, at most `timeout_ms` (-1: for ever). For drains and tests; a worker
    /// puts `wake_fds` into its own wait instead.
    ///
    /// # Errors
    /// The host's answer to `poll(2)`.
    pub fn wait(&mut self, timeout_ms: i32) -> io::Result<()> {
        let _ = timeout_ms;
        Ok(())
    }

    /// File descriptors that become readable when `poll` may have something new. They stay the same for the life of
    /// the context; level-triggered waits are right.
    pub fn wake_fds(&self) -> Vec<RawFd> {
        Vec::new()
    }

    /// Requests submitted and not yet polled.
    pub fn under_way(&self) -> usize {
        0
    }
}
