//! Layered disks on a directory of sparse files.
//!
//! ```text
//! request -> QueueContext (volume) -> resolve table (where?) -> engine (fetch / store) -> layer files     data plane
//! Store::snapshot, clone, ... -> catalog commit -> publish a new Chain with its generation               control plane
//! ```
//!
//! This package knows nothing of virtio, sockets, JSON or command lines. [`store::Store`] is the facade of the control
//! plane, [`volume::Volume`] and [`volume::QueueContext`] are the facade of the data plane. The bytes on disk are
//! specified in `FORMAT.md`, the lock-free parts in `CONCURRENCY.md`.

pub mod badfile;
pub mod cache;
pub mod canary;
pub mod catalog;
mod chain;
pub mod check;
mod context;
pub mod error;
pub mod file;
mod flush;
pub mod format;
mod generation;
mod layer;
pub mod lifecycle;
pub mod limits;
pub mod lock;
mod mailbox;
mod maintenance;
pub mod map;
pub mod mapfile;
mod ops;
mod resolve;
pub mod saved;
mod segments;
pub mod store;
pub mod sumfile;
pub(crate) mod sync;
#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]
mod test_media;
mod turns;
pub mod units;
mod verify;
pub mod volume;

pub use error::{Error, Result};
pub use ops::names::check as check_name;
pub use ops::snapshot::PendingSnapshot;
