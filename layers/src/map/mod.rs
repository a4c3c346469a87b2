//! Where the sectors of a disk lie: the maps of its layers and the table that resolves a cluster in one step.
//!
//! ```text
//! Table       one a volume   cluster -> newest layer that says anything + which sectors   lock-free, O(1) in depth
//! ActiveMap   one a layer    what an unsealed layer holds, what waits to be made durable   lock-free
//! SectorSet   one a layer    what a sealed layer holds                                    immutable once sealed
//! ```
//!
//! A write changes the `ActiveMap` of its layer (the truth) and then refreshes the `Table` from it (the index). `Table`
//! and `ActiveMap` are both a [`radix::Radix`], whose memory follows fragmentation. Why this is right under concurrency
//! is in `CONCURRENCY.md`; the scenarios named there are in `scenarios.rs`.
//!
//! Nothing here does I/O, blocks or takes a lock.

mod active;
mod changed;
pub(crate) mod fault;
mod grown;
#[cfg(all(test, not(loom)))]
mod model;
mod radix;
pub mod record;
#[cfg(test)]
mod scenarios;
pub(crate) mod sectors;
pub mod set;
mod table;

pub use active::{ActiveMap, Change, ClusterState, Collected};
pub use record::{MapRecord, RecordKind};
pub use set::{Exposed, SectorSet};
pub use table::{Resolve, ResolveRun, Table};
