//! Fuzz targets, one a module: each takes bytes, plays a hostile guest, front-end, file or client with them, and panics if
//! something is wrong that must not be. `fuzz_targets/` gives them to libFuzzer.
//!
//! Inputs are made of fields that are read front to back ([`input::Input`]); where they end, zeroes follow, so that every
//! input means something and shorter ones mean less. Checksums are made right by the targets, or nothing would ever get
//! past them.

pub mod catalog;
pub mod chains;
pub mod checkpoint;
pub mod control;
pub mod host;
pub mod inflight;
pub mod input;
pub mod map_journal;
pub mod memory;
pub mod scratch;
pub mod store;
pub mod sums;
pub mod vhost_user;
