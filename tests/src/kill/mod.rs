//! Kills the daemon under a verified load, and checks that nothing is lost by it.
//!
//! ```text
//! Rig (store, base, socket, cache) -> daemon, killed at some instant -> restarted -> ...
//! Client (which request?) -> Link (a session of the independent driver) -> the daemon
//!    |
//! Oracle (what may each sector hold?)
//! ```
//!
//! The client plays a guest that survives the daemon: it keeps what was not completed, connects again to the same socket with
//! rings and memory of its own making, and submits that again. Or it is a machine with an inflight buffer, whose rings and
//! memory go from daemon to daemon ([`lasting`]); then it submits nothing again, and each request comes back once. The
//! same is done with rings and requests of the independent driver, behind a [`relay`]. [`run`] puts it all together, for a
//! daemon that is killed and for a host that loses power ([`run::After`]). [`rival`] counts, by the same oracle, what
//! another back-end loses.

pub mod background;
pub mod client;
pub mod home;
pub mod lasting;
pub mod oracle;
pub mod relay;
pub mod rig;
pub mod rival;
pub mod run;
