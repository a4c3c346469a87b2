//! A vhost-user-blk daemon that gives virtual machines layered disks.
//!
//! ```text
//! stratablk CLI / curl -> control socket (control) -> Store: volumes, snapshots       control plane
//! front-end socket -> attach -> vhost (session, handler) -> commands to workers       device set-up
//! guest ring -> worker -> virtio (ring, chain, request) -> Volume                     data plane
//! ```
//!
//! [`daemon`] puts the planes together and takes them apart again; [`cli`] is the command line, most of it a client of the
//! control socket.

pub mod attach;
#[cfg(feature = "canary")]
pub mod canary;
#[cfg(not(feature = "canary"))]
mod canary;
pub mod cli;
pub mod config;
pub mod confine;
pub mod control;
pub mod daemon;
mod notify;
pub mod opener;
pub mod provider;
pub mod signal;
pub mod takeover;
pub mod vhost;
pub mod virtio;
pub mod worker;
