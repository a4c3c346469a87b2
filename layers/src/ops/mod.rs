//! The commands of a store, one a file, each with its durable order at the top.

mod adopt;
mod checkpoint;
pub mod clone;
mod create;
mod delete;
mod lookup;
mod names;
mod open;
pub mod snapshot;
mod tree;
