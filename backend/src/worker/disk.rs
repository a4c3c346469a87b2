//! What a worker asks of the disk behind it: the part of `stratablk_layers::volume` that serves requests, as a pair of
//! traits, so that workers can be tested against a disk that answers when the test says so.

use std::os::fd::RawFd;
use std::sync::Arc;

use stratablk_layers::Result;
use stratablk_layers::file::Segment;
use stratablk_layers::units::Sector;
use stratablk_layers::volume::{Completion, Durability, Operation, QueueContext, Volume};

/// A disk that requests can be sent to.
pub trait DiskSource: Send + Sync + 'static {
    /// Carries out the requests of one worker.
    type Context: DiskContext;
    /// The disk's name.
    fn name(&self) -> &str;
    /// The disk's size.
    fn capacity(&self) -> Sector;
    /// A context for one worker, made on its thread.
    ///
    /// # Errors
    /// `Io` if the host has no resources for it.
    fn context(self: &Arc<Self>, read_only: bool) -> Result<Self::Context>;
}

/// See [`QueueContext`], whose methods these are.
pub trait DiskContext {
    /// See [`QueueContext::begin_batch`].
    fn begin_batch(&mut self);
    /// See [`QueueContext::submit`].
    ///
    /// # Safety
    /// Until the completion with this token was polled (or the context was dropped) all segments are valid for reads
    /// (`Write`) or writes (`Read`) of their length, and no Rust reference to their bytes is used meanwhile.
    #[expect(unsafe_code, reason = "guest memory crosses this seam without a copy")]
    unsafe fn submit(
        &mut self,
        operation: Operation,
        durability: Durability,
        segments: &[Segment],
        token: u64,
    );
    /// See [`QueueContext::kick`].
    fn kick(&mut self);
    /// See [`QueueContext::poll`].
    fn poll(&mut self, done: &mut Vec<Completion>);
    /// See [`QueueContext::wake_fds`].
    fn wake_fds(&self) -> Vec<RawFd>;
    /// See [`QueueContext::under_way`].
    fn under_way(&self) -> usize;
    /// See [`QueueContext::end_held`].
    fn end_held(&mut self, chosen: &dyn Fn(u64) -> bool) -> bool;
}

impl DiskSource for Volume {
    type Context = QueueContext;

    fn name(&self) -> &str {
        self.name()
    }

    fn capacity(&self) -> Sector {
        self.capacity()
    }

    fn context(self: &Arc<Self>, read_only: bool) -> Result<QueueContext> {
        Self::context(self, read_only)
    }
}

impl DiskContext for QueueContext {
    fn begin_batch(&mut self) {
        self.begin_batch();
    }

    #[expect(unsafe_code, reason = "guest memory crosses this seam without a copy")]
    unsafe fn submit(
        &mut self,
        operation: Operation,
        durability: Durability,
        segments: &[Segment],
        token: u64,
    ) {
        // SAFETY: the caller promises what this asks for, in the same words.
        unsafe { self.submit(operation, durability, segments, token) }
    }

    fn kick(&mut self) {
        self.kick();
    }

    fn poll(&mut self, done: &mut Vec<Completion>) {
        self.poll(done);
    }

    fn wake_fds(&self) -> Vec<RawFd> {
        self.wake_fds()
    }

    fn under_way(&self) -> usize {
        self.under_way()
    }

    fn end_held(&mut self, chosen: &dyn Fn(u64) -> bool) -> bool {
        self.end_held(chosen)
    }
}
