//! The only place that names atomic types: the standard library's, or loom's when a model runs.
//!
//! Everything lock-free in this package takes its atomics from here, so that `RUSTFLAGS="--cfg loom"` model-checks the
//! very code that ships. What each atomic is for, and why its orderings are enough, is in `CONCURRENCY.md`.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence,
};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence,
};

/// Threads for the scenarios that run both as models and on real threads.
#[cfg(all(test, loom))]
pub(crate) use loom::thread;
/// Threads for the scenarios that run both as models and on real threads.
#[cfg(all(test, not(loom)))]
pub(crate) use std::thread;

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
