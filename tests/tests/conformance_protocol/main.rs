//! The rules for vhost-user (lines 23 to 37 of the conformance list, without the inflight buffer and device state), and what
//! hostile front-ends did to other back-ends, each checked from a front-end's side.
//!
//! Every test that sends nonsense ends with a new front-end that is served.

mod hostile;
mod log;
mod memory;
mod messages;
mod program;
mod rings;

use stratablk_tests::frontend::FrontEnd;
use stratablk_tests::guest::{Guest, USUAL_PROTOCOL};
use stratablk_tests::launch::Server;
use stratablk_tests::memory::{Region, RegionInfo};
use stratablk_tests::wait::{QUIET, readable};

/// Runs a read on the first ring.
#[track_caller]
fn run_read(guest: &mut Guest, sector: u64) {
    let buffers = guest.read_of(sector);
    guest.run(&buffers);
    guest.assert_read(&buffers, sector);
}

/// Checks that nothing is done for a while with what was submitted to the first ring.
#[track_caller]
fn assert_idle(guest: &Guest, what: &str) {
    let before = guest.rings[0].used_index();
    readable([guest.front_end.wire.as_fd()], QUIET);
    assert_eq!(guest.rings[0].used_index(), before, "{what}");
}

/// A session that has negotiated the protocol, but no more.
#[track_caller]
fn greeted(server: &Server) -> FrontEnd {
    let mut front_end = FrontEnd::connect(&server.socket());
    front_end.negotiate_protocol(USUAL_PROTOCOL);
    front_end
}

/// A region behind the guest's usual memory.
fn spare_region(index: u64) -> Region {
    const BYTES: u64 = 64 << 10;
    let gpa = (1 << 30) + index * BYTES;
    Region::new(RegionInfo {
        gpa,
        bytes: BYTES,
        uva: 0x7e00_0000_0000 + index * BYTES,
        mmap_offset: 0,
    })
}

/// Each line of the list that holds for this version has a test that names it. 34 (device state) is about a feature that is
/// not offered, which line 23 checks; 38 (what counts as the start of a machine) has a file of its own.
#[test]
fn every_line_has_a_test() {
    let sources = [
        include_str!("../conformance_requests/changes.rs"),
        include_str!("../conformance_requests/config.rs"),
        include_str!("../conformance_requests/durability.rs"),
        include_str!("../conformance_requests/memory.rs"),
        include_str!("../conformance_requests/requests.rs"),
        include_str!("../conformance_rings/chains.rs"),
        include_str!("../conformance_rings/indirect.rs"),
        include_str!("../conformance_rings/memory.rs"),
        include_str!("../conformance_rings/notifications.rs"),
        include_str!("../inflight.rs"),
        include_str!("hostile.rs"),
        include_str!("log.rs"),
        include_str!("memory.rs"),
        include_str!("messages.rs"),
        include_str!("program.rs"),
        include_str!("rings.rs"),
    ];
    for line in (1..=37).filter(|line| *line != 34) {
        let start = format!("\nfn c{line:02}_");
        assert!(
            sources.iter().any(|text| text.contains(&start)),
            "line {line} has no test"
        );
    }
}
