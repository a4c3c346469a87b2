//! The commands of a store, one a file, each with its durable order at the top.

mod adopt;
mod boot;
mod checkpoint;
pub mod clone;
mod collect;
pub(crate) mod create;
mod delete;
mod delete_snapshot;
mod diff;
mod doomed;
pub mod facts;
mod fit;
mod groups;
pub(crate) mod idle;
pub(crate) mod jobs;
pub(crate) mod kind;
mod lookup;
pub(crate) mod merge;
mod multiattach;
pub mod names;
mod open;
mod resize;
mod restore;
pub mod snapshot;
mod tree;
mod true_names;
mod usage;
