//! Switches that break the order of a flush on purpose, so that a test can see the crash enumeration notice. Constant and
//! off unless the package is built with the feature `canary`.

#[cfg(feature = "canary")]
use std::cell::Cell;

#[cfg(feature = "canary")]
thread_local! {
    /// See `set_map_before_data`.
    static MAP_BEFORE_DATA: Cell<bool> = const { Cell::new(false) };
}

/// Makes flushes of this thread write and sync the map before the data that it speaks of.
#[cfg(feature = "canary")]
pub fn set_map_before_data(on: bool) {
    MAP_BEFORE_DATA.set(on);
}

/// Whether flushes write the map first.
#[cfg(feature = "canary")]
pub(crate) fn map_before_data() -> bool {
    MAP_BEFORE_DATA.get()
}

/// Whether flushes write the map first: never.
#[cfg(not(feature = "canary"))]
pub(crate) const fn map_before_data() -> bool {
    false
}
