//! The commands of a store, one a file, each with its durable order at the top.

pub mod clone;
mod checkpoint;
mod create;
mod delete;
mod lookup;
mod names;
mod open;
pub mod snapshot;
mod tree;
