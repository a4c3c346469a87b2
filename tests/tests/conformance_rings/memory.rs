//! Rings and requests whose memory is wrong, goes away or changes (line 14).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use stratablk_tests::frontend::Answer;
use stratablk_tests::guest::{Guest, GuestOptions, Verdict};
use stratablk_tests::launch::Server;
use stratablk_tests::memory::{Buffer, POISON};
use stratablk_tests::request::{S_OK, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES, header, segment};
use stratablk_tests::ring::{DESCRIPTOR_BYTES, F_INDIRECT, F_NEXT, F_WRITE};
use stratablk_tests::wait::{PATIENCE, readable};
use stratablk_tests::wire::code;

/// Ring addresses that are no one's, unaligned, or leave their region are refused at once or break the ring.
#[test]
fn c14_ring_addresses_outside_memory_are_refused() {
    let mut server = Server::start();
    let options = GuestOptions::default();
    let end = options.memory.regions()[0].info;
    let last = end.uva + end.bytes;
    let cases: [(&str, u64); 7] = [
        ("null", 0),
        ("nobody's", 0x1234_5678_9000),
        ("behind its region", last),
        ("over the end of its region", last - 16),
        ("over 64 bits", u64::MAX - 15),
        ("a guest address", end.gpa),
        ("unaligned", end.uva + (1 << 20) + 1),
    ];
    for (name, address) in cases {
        for part in 0..3 {
            let mut guest = Guest::negotiate(&server.socket(), GuestOptions::default());
            let mut addresses = guest.vring_addresses(0);
            match part {
                0 => addresses.descriptors = address,
                1 => addresses.used = address,
                _ => addresses.available = address,
            }
            guest.front_end.set_vring_num(0, 128);
            guest.front_end.set_vring_base(0, 0);
            let answer = guest
                .front_end
                .attempt(code::SET_VRING_ADDR, &addresses.encode(), &[]);
            if !answer.is_no() {
                guest.set_events(0);
                guest.front_end.enable_vring(0, true);
                let buffers = guest.read_of(0);
                guest.rings[0].submit(&buffers);
                let fds = [guest.rings[0].error_fd(), guest.front_end.wire.as_fd()];
                assert_ne!(
                    readable(fds, PATIENCE),
                    [false; 2],
                    "part {part} {name} is reported"
                );
                assert_eq!(
                    guest.last_byte(buffers[2]),
                    POISON,
                    "part {part} {name}: no request ran"
                );
            }
            drop(guest);
            server.assert_serves();
        }
    }
}

/// A ring whose memory is taken away stops; requests whose data lies there fail; nothing else happens.
#[test]
fn c14_a_ring_whose_memory_goes_away_stops() {
    let mut server = Server::start();
    let mut guest = server.guest();
    let buffers = guest.read_of(0);
    guest.run(&buffers);
    let info = guest.memory.regions()[0].info;
    let answer = guest.front_end.remove_region(&info);
    if answer == Answer::Accepted {
        let buffers = guest.read_of(0);
        guest.rings[0].submit(&buffers);
        let verdict = guest.verdict();
        assert!(
            matches!(verdict, Verdict::RingBroken | Verdict::Closed),
            "{verdict:?}"
        );
        assert_eq!(guest.last_byte(buffers[2]), POISON, "not carried out");
    }
    drop(guest);
    server.assert_serves();
}

/// Guest memory whose file is cut under the device fails the requests that need it, and nothing else. The ring may break: such
/// a front-end has taken away what all its requests rest on. More of this in `lost_memory.rs`.
#[test]
fn c14_data_in_memory_that_shrinks_fails() {
    let mut server = Server::start();
    for (kind, writable) in [(T_IN, true), (T_OUT, false)] {
        let mut guest = server.guest();
        let gpa = guest.memory.regions()[1].info.gpa;
        guest.memory.regions()[1].shrink();
        let data = Buffer {
            gpa,
            len: 4096,
            writable,
        };
        let status = guest.status();
        let chain = [guest.header(kind, 0), data, status];
        guest.rings[0].submit(&chain);
        let verdict = guest.verdict();
        assert!(
            matches!(verdict, Verdict::Returned(_) | Verdict::RingBroken),
            "request type {kind}: {verdict:?}"
        );
        assert_ne!(guest.last_byte(status), S_OK, "request type {kind}");
        drop(guest);
        server.assert_serves();
    }
    // What a failed write leaves in its own sectors is not defined.
    server.assert_base(8, 8, "nothing was written elsewhere");
}

/// The same with headers, segments, tables and status bytes there, which the device reads and writes itself.
#[test]
fn c14_headers_in_memory_that_shrinks_fail() {
    let mut server = Server::start();
    for part in 0..4 {
        let mut guest = server.guest();
        let gpa = guest.memory.regions()[1].info.gpa;
        guest.memory.regions()[1].shrink();
        let gone = |len, writable| Buffer { gpa, len, writable };
        let status = guest.status();
        let chain = match part {
            0 => vec![gone(16, false), status],
            1 => vec![guest.header(T_WRITE_ZEROES, 0), gone(16, false), status],
            2 => vec![guest.header(T_FLUSH, 0), gone(1, true)],
            _ => vec![guest.header(8, 0), gone(20, true), status],
        };
        guest.rings[0].submit(&chain);
        let verdict = guest.verdict();
        assert!(
            matches!(verdict, Verdict::Returned(_) | Verdict::RingBroken),
            "part {part}: {verdict:?}"
        );
        assert_ne!(guest.last_byte(status), S_OK, "part {part}");
        drop(guest);
        server.assert_serves();
    }
    server.assert_base(0, 8, "nothing was zeroed");
}

/// CVE-2015-8550: a guest that rewrites headers, descriptors and segments while they are read gains nothing.
#[test]
fn c14_memory_that_changes_under_the_device() {
    let mut server = Server::start();
    let mut guest = server.guest();
    let memory = Arc::clone(&guest.memory);
    let stop = AtomicBool::new(false);
    let data = guest.memory.writable(4096);
    let out = guest.memory.readable(&segment(0, 8, 0));
    let (head, status) = (guest.header(T_IN, 0), guest.status());
    let table = guest.rings[0].addresses.descriptors;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut round = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                round = round.wrapping_add(1);
                let kind = [T_IN, 8, T_FLUSH, 99][usize::try_from(round % 4).expect("small")];
                memory.write(head.gpa, &header(kind, round << (round % 60)));
                memory.write(
                    out.gpa,
                    &segment(round << (round % 50), 8, u32::from(round.is_multiple_of(3))),
                );
                let len = if round.is_multiple_of(2) {
                    u32::MAX
                } else {
                    4096
                };
                let flags = [F_WRITE | F_NEXT, F_NEXT, F_INDIRECT, F_WRITE]
                    [usize::try_from(round % 4).expect("small")];
                for slot in 0..128 {
                    let at = table + DESCRIPTOR_BYTES * slot;
                    memory.write(at + 8, &len.to_le_bytes());
                    memory.write(at + 12, &flags.to_le_bytes());
                }
            }
        });
        for _ in 0..300 {
            let ring = &mut guest.rings[0];
            ring.submit(&[head, out, data, status]);
            // Whatever becomes of it: the chain may be nonsense by now.
            if !matches!(guest.verdict(), Verdict::Returned(_)) {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    drop(guest);
    let last = server.sectors() - 1;
    server.assert_base(last, 1, "the disk");
    server.assert_serves();
}
