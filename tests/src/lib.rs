//! Front-ends, harnesses and oracles that test stratablk from outside, through its sockets.
//!
//! ```text
//! Server (launch) -> FrontEnd (messages) -> Guest (memory + rings) -> Disk (whole requests)
//! ```
//!
//! Each stage can be used without the next one: a hostile test speaks raw messages or writes raw descriptors, a plain one
//! uses [`disk::Disk`]. Nothing here shares code with the daemon, so that a misreading of a specification shows.
//! Some parts use no driver of their own: [`daemon`] runs the real daemon and its command line, [`load`] drives disks with an
//! independent driver, [`kill`] kills the daemon under such a load, [`machine`] boots real Linux guests, and
//! [`qmp`] has them migrate.
//! A failed expectation panics: everything in this package runs inside tests.

pub mod daemon;
pub mod dirty_log;
pub mod disk;
pub mod far;
pub mod frontend;
pub mod guest;
pub mod host;
pub mod inflight;
pub mod kill;
pub mod launch;
pub mod lifecycle;
pub mod lines;
pub mod load;
pub mod machine;
pub mod memory;
pub mod pattern;
pub mod process;
pub mod qmp;
pub mod request;
pub mod ring;
pub mod wait;
pub mod wire;
