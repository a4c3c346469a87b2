//! The rules for split rings (lines 17 to 22 of the conformance list), and what hostile guests did to the rings of other
//! back-ends, each checked from a guest's side.
//!
//! Every test that sends nonsense ends with a new front-end that is served.

mod chains;
mod indirect;
mod memory;
mod notifications;

use stratablk_tests::guest::{Guest, Verdict};
use stratablk_tests::launch::Server;
use stratablk_tests::memory::{Buffer, POISON};
use stratablk_tests::request::S_OK;
use stratablk_tests::ring::{Descriptor, Used};

/// Submits descriptors as they are on the first ring and waits for what becomes of them.
#[track_caller]
fn submit_raw(guest: &mut Guest, descriptors: &[Descriptor]) -> Verdict {
    let ring = &mut guest.rings[0];
    let head = ring.link(descriptors);
    ring.publish(head);
    ring.kick();
    guest.verdict()
}

/// Checks that a chain was refused: given back (not as a success), or the ring or the connection was given up.
#[track_caller]
fn assert_refused(guest: &Guest, verdict: Verdict, status: Buffer, what: &str) {
    match verdict {
        Verdict::Returned(Used { len, .. }) => {
            let value = guest.last_byte(status);
            assert_ne!(value, S_OK, "{what}: carried out");
            assert!(
                len == 0 || value != POISON,
                "{what}: {len} bytes written, no status"
            );
        }
        Verdict::RingBroken | Verdict::Closed => {
            assert_ne!(guest.last_byte(status), S_OK, "{what}")
        }
        Verdict::Silent => panic!("{what}: neither given back nor reported"),
    }
}

/// Runs one malformed chain in a session of its own, then a new front-end.
#[track_caller]
fn assert_chain_refused(
    server: &mut Server,
    what: &str,
    build: impl FnOnce(&mut Guest, Buffer) -> Vec<Descriptor>,
) {
    let mut guest = server.guest();
    let status = guest.status();
    let descriptors = build(&mut guest, status);
    let verdict = submit_raw(&mut guest, &descriptors);
    assert_refused(&guest, verdict, status, what);
    if matches!(verdict, Verdict::Returned(_)) {
        let buffers = guest.read_of(3);
        guest.run(&buffers);
        guest.assert_read(&buffers, 3);
    }
    drop(guest);
    server.assert_serves();
}
