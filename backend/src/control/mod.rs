//! The control plane: HTTP/1.1 with JSON over a Unix socket.
//!
//! ```text
//! connection (server) -> route (routes) -> a thread that may block (gate) -> command (commands) -> store, attachments
//! ```
//!
//! Everything here is bounded: connections, sizes, times, commands at once. Guest requests never pass through it.

pub mod attachments;
pub mod commands;
mod convert;
mod crowd;
pub mod error;
pub mod events;
pub mod gate;
pub mod metrics;
pub mod openapi;
pub mod routes;
pub mod server;
pub mod socket;
pub mod spare;
mod stall;
pub mod timestamp;
pub mod types;
mod watch;
