//! The only place that names atomic types: the standard library's, or loom's when a model runs.
//!
//! Everything lock-free in this package takes its atomics from here, so that `RUSTFLAGS="--cfg loom"` model-checks the
//! very code that ships. What each atomic is for, and why its orderings are enough, is in `CONCURRENCY.md`.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence,
};
#[cfg(not(any(loom, test)))]
pub(crate) use std::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence,
};

/// Atomics that can end a thread's work at any store, for tests of what is left then.
#[cfg(all(test, not(loom)))]
pub(crate) mod fused;
#[cfg(all(test, not(loom)))]
pub(crate) use fused::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};
#[cfg(all(test, not(loom)))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering, fence};

/// A number that only grows, and only by the control plane's hand: the size of a disk. Everybody looks at it all the time and
/// nothing depends on when they see it grow, so that models know nothing of it: each look would be one more point at which
/// they try every other thread.
#[derive(Debug)]
pub(crate) struct Size(std::sync::atomic::AtomicU64);

impl Size {
    /// A size to begin with.
    pub(crate) const fn new(size: u64) -> Self {
        Self(std::sync::atomic::AtomicU64::new(size))
    }

    /// The size now.
    #[inline]
    pub(crate) fn get(&self) -> u64 {
        // ORDERING: Acquire; pairs with `grow`. Who sees a size sees what was made for it.
        self.0.load(std::sync::atomic::Ordering::Acquire)
    }

    /// Makes it larger, once everything is there that it takes.
    pub(crate) fn grow(&self, size: u64) {
        // ORDERING: Release; see `get`.
        self.0.fetch_max(size, std::sync::atomic::Ordering::Release);
    }
}

/// Threads: to give way to another one, and for the scenarios that run both as models and on real threads.
#[cfg(loom)]
pub(crate) use loom::thread;
/// Threads: to give way to another one, and for the scenarios that run both as models and on real threads.
#[cfg(not(loom))]
pub(crate) use std::thread;

/// Short waits for another thread; a model switches to it at once.
#[cfg(loom)]
pub(crate) mod hint {
    pub(crate) use loom::thread::yield_now as spin_loop;
}
/// Short waits for another thread.
#[cfg(not(loom))]
pub(crate) use std::hint;

/// The pointer in an atomic that nobody else can reach.
#[cfg(not(loom))]
pub(crate) fn exclusive<T>(cell: &mut AtomicPtr<T>) -> *mut T {
    *cell.get_mut()
}

/// The pointer in an atomic that nobody else can reach.
#[cfg(loom)]
pub(crate) fn exclusive<T>(cell: &mut AtomicPtr<T>) -> *mut T {
    cell.with_mut(|pointer| *pointer)
}
