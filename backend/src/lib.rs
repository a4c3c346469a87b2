//! A vhost-user-blk daemon that gives virtual machines layered disks.
//!
//! ```text
//! stratablk CLI / curl -> control socket (control) -> Store: volumes, snapshots       control plane
//! guest ring -> worker -> request -> Volume                                           data plane
//! ```
//!
//! [`daemon`] puts the two together and takes them apart again; [`cli`] is the command line, most of it a client of the
//! control socket.

pub mod cli;
pub mod config;
pub mod control;
pub mod daemon;
mod notify;
