//! The configuration space (lines 15 and 16).

use stratablk_tests::launch::{Server, ServerOptions};
use stratablk_tests::pattern;
use stratablk_tests::request::feature::{
    BLK_BLK_SIZE, BLK_DISCARD, BLK_MQ, BLK_SEG_MAX, BLK_TOPOLOGY, BLK_WRITE_ZEROES,
};
use stratablk_tests::request::{S_OK, T_IN};

use crate::{config_u32, field, long_rings};

/// Line 15: the fields of the configuration space stand where the specification puts them, little-endian.
#[test]
fn c15_config_space_layout() {
    let server = Server::start_with(ServerOptions {
        queues: 3,
        ..ServerOptions::default()
    });
    let guest = server.guest();
    let offered = guest.front_end.features();
    for bit in [
        BLK_SEG_MAX,
        BLK_BLK_SIZE,
        BLK_TOPOLOGY,
        BLK_MQ,
        BLK_DISCARD,
        BLK_WRITE_ZEROES,
    ] {
        assert_ne!(offered & bit, 0, "feature {bit:#x} is offered");
    }
    let config = guest.front_end.config(0, 60);
    let half = |at: usize| u16::from_le_bytes([config[at], config[at + 1]]);
    let capacity = guest.front_end.config(field::CAPACITY, 8);
    assert_eq!(capacity, server.sectors().to_le_bytes());
    assert_eq!(config[..8], capacity[..]);
    assert!(config_u32(&guest, field::SEG_MAX) >= 126, "seg_max");
    let blk_size = config_u32(&guest, field::BLK_SIZE);
    assert!(
        blk_size.is_power_of_two() && blk_size >= 512,
        "blk_size {blk_size}"
    );
    let physical = u64::from(blk_size) << config[24];
    assert_eq!(physical, 4096, "the physical block is a cluster");
    assert_eq!(config[25], 0, "alignment_offset");
    assert_eq!(half(34), 3, "num_queues");
    assert!(
        config_u32(&guest, field::MAX_DISCARD_SECTORS) >= 8,
        "max_discard_sectors"
    );
    assert!(
        config_u32(&guest, field::MAX_DISCARD_SEG) >= 1,
        "max_discard_seg"
    );
    assert!(
        config_u32(&guest, field::MAX_WRITE_ZEROES_SECTORS) >= 8,
        "max_write_zeroes_sectors"
    );
    assert!(
        config_u32(&guest, field::MAX_WRITE_ZEROES_SEG) >= 1,
        "max_write_zeroes_seg"
    );
    assert_eq!(
        guest.front_end.config(field::WRITE_ZEROES_MAY_UNMAP, 1),
        [1]
    );
    assert_eq!(
        guest.front_end.config(field::NUM_QUEUES, 2),
        3_u16.to_le_bytes()
    );
}

/// Line 15: a request of as many data segments as `seg_max` promises is carried out.
#[test]
fn c15_seg_max_segments_are_taken() {
    let server = Server::start();
    let mut guest = long_rings(&server);
    let count = config_u32(&guest, field::SEG_MAX).min(254);
    let sectors = u64::from(count);
    let area = guest.memory.writable(count * 512 + 1);
    let chain: Vec<_> = [vec![guest.header(T_IN, 0)], area.pieces(512)].concat();
    guest.run(&chain);
    assert_eq!(guest.last_byte(area), S_OK);
    let mut data = guest.memory.bytes(area);
    data.pop();
    pattern::assert_same(&data, &pattern::base(0, sectors), "the disk");
}

/// Line 16: the configuration space can be read before features are chosen, and says the same afterwards.
#[test]
fn c16_config_is_readable_before_features() {
    let server = Server::start();
    let mut early = stratablk_tests::frontend::FrontEnd::connect(&server.socket());
    early.negotiate_protocol(stratablk_tests::guest::USUAL_PROTOCOL);
    let before = early.config(0, 60);
    assert_eq!(before[..8], server.sectors().to_le_bytes());
    drop(early);
    assert_eq!(server.guest().front_end.config(0, 60), before);
}
