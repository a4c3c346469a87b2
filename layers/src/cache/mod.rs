//! The sector cache of a store: its memory, and which layer is which in it.

#[cfg(not(loom))]
pub mod arena;
#[cfg(loom)]
#[path = "arena/model.rs"]
pub mod arena;
pub mod numbers;
pub mod set;
