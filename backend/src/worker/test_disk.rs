//! A disk for unit tests that answers when the test says so.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use stratablk_layers::file::Segment;
use stratablk_layers::units::Sector;
use stratablk_layers::volume::{Completion, Durability, Operation, RequestError};

use super::disk::{DiskContext, DiskSource};
use crate::signal::Signal;

/// How long anything may take.
const DEADLINE: Duration = Duration::from_secs(10);

/// What a context was asked to do, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    BeginBatch,
    Submit(Operation, Durability),
    Kick,
}

#[derive(Debug, Default)]
pub struct FakeState {
    /// What was asked, in order.
    pub asked: Vec<Asked>,
    /// Tokens that wait to be answered, with the first byte of a read's memory.
    pub held: Vec<(u64, Option<usize>)>,
    /// Answers to hand out.
    ready: Vec<Completion>,
    /// Whether requests are answered at once.
    at_once: bool,
    /// Whether the next batch panics.
    pub panic: bool,
}

/// A disk of 1000 sectors full of 0x5a.
#[derive(Debug)]
pub struct FakeDisk {
    state: Mutex<FakeState>,
    wake: Signal,
}

pub struct FakeContext(Arc<FakeDisk>);

impl FakeDisk {
    pub fn new(at_once: bool) -> Arc<Self> {
        let state = FakeState {
            at_once,
            ..FakeState::default()
        };
        Arc::new(Self {
            state: Mutex::new(state),
            wake: Signal::new().unwrap(),
        })
    }

    pub fn state(&self) -> MutexGuard<'_, FakeState> {
        self.state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Answers everything that is held.
    pub fn release(&self, result: Result<(), RequestError>) {
        let mut state = self.state();
        for (token, memory) in std::mem::take(&mut state.held) {
            if let Some(address) = memory {
                #[expect(unsafe_code, reason = "plays a device that writes guest memory")]
                // SAFETY: the worker promised the memory until the completion is polled.
                unsafe {
                    std::ptr::with_exposed_provenance_mut::<u8>(address).write_volatile(0x5a);
                }
            }
            state.ready.push(Completion { token, result });
        }
        drop(state);
        self.wake.raise();
    }

    /// Waits until so many requests are held.
    pub fn wait_held(&self, count: usize) {
        let start = Instant::now();
        while self.state().held.len() < count {
            assert!(start.elapsed() < DEADLINE, "{:?}", self.state());
            std::thread::yield_now();
        }
    }
}

impl DiskSource for FakeDisk {
    type Context = FakeContext;

    fn name(&self) -> &str {
        "fake"
    }

    fn capacity(&self) -> Sector {
        Sector(1000)
    }

    fn context(self: &Arc<Self>, _read_only: bool) -> stratablk_layers::Result<FakeContext> {
        Ok(FakeContext(Arc::clone(self)))
    }
}

impl DiskContext for FakeContext {
    fn begin_batch(&mut self) {
        let mut state = self.0.state();
        assert!(!state.panic, "as the test wants it");
        state.asked.push(Asked::BeginBatch);
    }

    #[expect(unsafe_code, reason = "the seam of a disk")]
    unsafe fn submit(
        &mut self,
        operation: Operation,
        durability: Durability,
        segments: &[Segment],
        token: u64,
    ) {
        let reads = matches!(operation, Operation::Read(_));
        let first = segments.first().filter(|_| reads);
        let memory = first.map(|segment| segment.base.expose_provenance());
        let mut state = self.0.state();
        state.asked.push(Asked::Submit(operation, durability));
        state.held.push((token, memory));
        let at_once = state.at_once;
        drop(state);
        if at_once {
            self.0.release(Ok(()));
        }
    }

    fn kick(&mut self) {
        self.0.state().asked.push(Asked::Kick);
    }

    fn poll(&mut self, done: &mut Vec<Completion>) {
        self.0.wake.lower();
        done.append(&mut self.0.state().ready);
    }

    fn wake_fds(&self) -> Vec<RawFd> {
        vec![self.0.wake.as_raw_fd()]
    }

    fn under_way(&self) -> usize {
        let state = self.0.state();
        state.held.len() + state.ready.len()
    }

    fn end_held(&mut self, _chosen: &dyn Fn(u64) -> bool) -> bool {
        // Nothing of this disk waits for space.
        false
    }
}
