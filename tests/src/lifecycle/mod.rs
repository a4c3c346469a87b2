//! The life of a tree of real disks: commands in a random stream, guests that verify what they read, and a daemon that is
//! killed at any moment.
//!
//! ```text
//! Rig (store, images, sockets, cache) -> daemon, killed at some instant -> restarted -> ...
//! Client of `kill` on each of two volumes            the command line, in a random stream
//!                      \                              /
//!                       Life (names, flat copies) ---
//! ```
//!
//! What a snapshot or clone holds is known exactly if it was taken while the guests were at rest, and else from the first time
//! that it is read; from then on it must stay so, whatever is merged, deleted or restored around it. [`gaps`], [`control`] and
//! [`judge`] look for requests that a command keeps waiting.

pub mod commands;
pub mod control;
pub mod gaps;
pub mod judge;
pub mod rig;
pub mod run;
