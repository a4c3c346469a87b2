//! The standard library's atomics with a fuse: a test lets a thread's work end right before any of its stores, as the end of
//! the process would. Without a fuse they are what they wrap.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::Ordering;

/// Loads after which a thread under a fuse counts as waiting for another one, which will never come.
const LOADS_MAX: u64 = 10_000;

thread_local! {
    /// Stores and loads that this thread may still make; `None`: any number.
    static FUSE: Cell<Option<(u64, u64)>> = const { Cell::new(None) };
}

/// The end of a thread's work.
struct Blown;

/// Runs something that ends before its store number `stores`, counted from 0. `None` if it did end so, or if it waited.
pub(crate) fn with_fuse<T>(stores: u64, work: impl FnOnce() -> T) -> Option<T> {
    FUSE.set(Some((stores, LOADS_MAX)));
    let result = catch_unwind(AssertUnwindSafe(work));
    FUSE.set(None);
    match result {
        Ok(value) => Some(value),
        Err(payload) if payload.is::<Blown>() => None,
        Err(payload) => resume_unwind(payload),
    }
}

/// How many stores something makes.
pub(crate) fn stores(work: impl FnOnce()) -> u64 {
    FUSE.set(Some((u64::MAX, u64::MAX)));
    work();
    let left = FUSE.replace(None);
    left.map_or(0, |(stores, _)| u64::MAX - stores)
}

/// A store is about to be made.
fn store() {
    burn(|(stores, loads)| Some((stores.checked_sub(1)?, loads)));
}

/// A load is about to be made.
fn load() {
    burn(|(stores, loads)| Some((stores, loads.checked_sub(1)?)));
}

/// Makes the fuse shorter, or ends the work.
fn burn(shorter: impl FnOnce((u64, u64)) -> Option<(u64, u64)>) {
    let Some(fuse) = FUSE.get() else {
        return;
    };
    let left = shorter(fuse);
    FUSE.set(left);
    if left.is_none() {
        // Without the hook that prints.
        resume_unwind(Box::new(Blown));
    }
}

/// A type that is loaded and stored.
macro_rules! fused {
    ($name:ident, $int:ty) => {
        /// As that of the standard library.
        #[derive(Debug, Default)]
        #[repr(transparent)]
        pub struct $name(std::sync::atomic::$name);

        impl $name {
            pub const fn new(value: $int) -> Self {
                Self(std::sync::atomic::$name::new(value))
            }

            pub fn load(&self, order: Ordering) -> $int {
                load();
                self.0.load(order)
            }

            pub fn store(&self, value: $int, order: Ordering) {
                store();
                self.0.store(value, order);
            }
        }
    };
}

/// A type that is compared and swapped as well.
macro_rules! fused_swap {
    ($name:ident, $int:ty) => {
        fused!($name, $int);

        impl $name {
            pub fn compare_exchange(
                &self,
                old: $int,
                new: $int,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$int, $int> {
                load();
                store();
                self.0.compare_exchange(old, new, success, failure)
            }
        }
    };
}

fused!(AtomicU8, u8);
fused_swap!(AtomicU16, u16);
fused_swap!(AtomicU32, u32);
fused_swap!(AtomicU64, u64);

/// What only one of the types is used for.
macro_rules! fused_fetch {
    ($($method:ident)*) => {
        impl AtomicU64 {
            $(pub fn $method(&self, value: u64, order: Ordering) -> u64 {
                store();
                self.0.$method(value, order)
            })*
        }
    };
}

fused_fetch!(swap fetch_add fetch_sub fetch_or fetch_and fetch_max);
