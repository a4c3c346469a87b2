//! The stores that the next process finds when this one is killed: those to a used ring and to an inflight region.
//!
//! All of them go through one function, so that a unit test can let a thread "die" after any one of them: what it stores
//! from then on is not there. What it keeps in memory of its own dies with it anyway.

use std::sync::atomic::Ordering;

use vm_memory::AtomicInteger;

/// Stores a value where another process finds it.
#[inline]
pub fn store<T: AtomicInteger>(place: &T, value: T::V, order: Ordering) {
    #[cfg(test)]
    if !death::survives() {
        return;
    }
    place.store(value, order);
}

/// When a thread of a unit test dies.
#[cfg(test)]
pub mod death {
    use std::cell::Cell;

    thread_local! {
        /// How many stores are left to it; `None`: it does not die.
        static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
        /// How many it has made.
        static MADE: Cell<usize> = const { Cell::new(0) };
    }

    /// This thread dies after so many stores, or not at all.
    pub fn after(stores: Option<usize>) {
        LEFT.set(stores);
        MADE.set(0);
    }

    /// How many stores it has made since.
    pub fn made() -> usize {
        MADE.get()
    }

    /// Whether it is dead: the next store would not be made.
    pub fn is_here() -> bool {
        LEFT.get() == Some(0)
    }

    /// Counts a store. Returns whether it is made.
    pub fn survives() -> bool {
        if is_here() {
            return false;
        }
        LEFT.set(LEFT.get().map(|left| left - 1));
        MADE.set(MADE.get() + 1);
        true
    }
}
