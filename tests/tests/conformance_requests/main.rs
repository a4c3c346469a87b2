//! The rules for virtio-blk requests (lines 1 to 16 of the conformance list), each checked from a guest's side.
//!
//! Every test has its own back-end on an image full of [`base`](stratablk_tests::pattern::base), so the disk always has
//! data below its active layer. Every test that sends nonsense ends with a new front-end that is served.

mod changes;
mod config;
mod durability;
mod memory;
mod requests;

use stratablk_tests::disk::Disk;
use stratablk_tests::guest::{Guest, GuestOptions};
use stratablk_tests::launch::Server;

/// Offsets of the fields of the configuration space.
mod field {
    pub const CAPACITY: u32 = 0;
    pub const SEG_MAX: u32 = 12;
    pub const BLK_SIZE: u32 = 20;
    pub const WRITEBACK: u32 = 32;
    pub const NUM_QUEUES: u32 = 34;
    pub const MAX_DISCARD_SECTORS: u32 = 36;
    pub const MAX_DISCARD_SEG: u32 = 40;
    pub const MAX_WRITE_ZEROES_SECTORS: u32 = 48;
    pub const MAX_WRITE_ZEROES_SEG: u32 = 52;
    pub const WRITE_ZEROES_MAY_UNMAP: u32 = 56;
}

/// A 32-bit field of the configuration space.
fn config_u32(guest: &Guest, offset: u32) -> u32 {
    let bytes = guest.front_end.config(offset, 4);
    u32::from_le_bytes(bytes.try_into().expect("4 bytes"))
}

/// A session with rings long enough for requests in many small pieces.
fn long_rings(server: &Server) -> Guest {
    server.guest_with(GuestOptions {
        ring_size: 256,
        ..GuestOptions::default()
    })
}

/// The whole disk.
fn whole(disk: &mut Disk, server: &Server) -> Vec<u8> {
    let step = 2048;
    (0..server.sectors())
        .step_by(2048)
        .flat_map(|at| disk.read(at, step.min(server.sectors() - at)))
        .collect()
}
