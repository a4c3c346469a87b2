//! The vhost-user side: what a front-end negotiates, shares and asks for.
//!
//! A [`session`] reads one front-end's messages, each of them with a deadline, and hands them to the [`handler`], which
//! keeps the state of the device and of each of its rings (`vring`), opens the disk for them ([`disk_use`], one session at a
//! time: [`turn`]), and commands the workers. [`features`] and [`config_space`] say what the device is, [`memory`],
//! [`mapping`], [`dirty_log`] and [`inflight`] are what the front-end shares, [`device_state`] is what it saves and loads,
//! [`guard`] keeps the daemon alive when it takes shared memory away, [`channel`] is the way back to it. As [`message`]s
//! a session goes to another process.
//! Nothing here touches a request; nothing here imports a layer's map or file.

pub mod channel;
pub mod config_space;
pub mod device_state;
pub mod dirty_log;
pub mod disk_use;
pub mod event;
pub mod features;
pub mod guard;
pub mod handler;
pub mod inflight;
pub mod mapping;
pub mod memory;
pub mod message;
pub mod refusal;
pub mod session;
pub mod state;
pub mod turn;
pub mod under_way;
mod vring;
