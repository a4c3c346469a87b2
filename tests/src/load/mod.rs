//! A front-end that shares no code with the daemon, the load it makes, and the checks of what it read.
//!
//! ```text
//! Workload (which request?) -> run (when? how long did it take?) -> Driver (crate virtio-driver) -> back-end
//!                                 |
//!                 Ledger, History (stamped blocks: what may a read, or a snapshot, hold?)
//! ```
//!
//! Works against every vhost-user-blk back-end that offers CONFIG, REPLY_ACK and CONFIGURE_MEM_SLOTS. The program
//! `stratablk-load` is its command line.

pub mod cut;
pub mod driver;
pub mod ledger;
pub mod memory;
pub mod process;
pub mod random;
pub mod report;
pub mod run;
pub mod stamp;
pub mod straight;
pub mod timeline;
pub mod workload;
