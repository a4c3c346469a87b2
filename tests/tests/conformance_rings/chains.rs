//! Chains and indices that hostile guests make, and sizes of rings (line 13).

use stratablk_tests::frontend::{Answer, vring_state};
use stratablk_tests::guest::{Guest, GuestOptions, Verdict};
use stratablk_tests::launch::Server;
use stratablk_tests::memory::{Buffer, GuestMemory, RegionInfo};
use stratablk_tests::pattern;
use stratablk_tests::request::{S_OK, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES};
use stratablk_tests::ring::{Descriptor, indirect};
use stratablk_tests::wait::{PATIENCE, readable, take_signals};
use stratablk_tests::wire::code;

use crate::{assert_chain_refused, assert_refused};

/// SPDK before 19.01: a chain that runs in a circle ends its request, not the device.
#[test]
fn c13_circular_chains_end() {
    let mut server = Server::start();
    for length in [1_u16, 2, 3, 100] {
        let mut guest = server.guest();
        let (head, status) = (guest.header(T_FLUSH, 0), guest.status());
        for slot in 0..length {
            let part = if slot == 0 { head } else { status };
            guest.rings[0].write_descriptor(slot, Descriptor::of(part).then((slot + 1) % length));
        }
        guest.rings[0].publish(0);
        guest.rings[0].kick();
        let verdict = guest.verdict();
        assert!(
            !matches!(verdict, Verdict::Returned(used) if used.len != 0)
                && verdict != Verdict::Silent,
            "a circle of {length}: {verdict:?}"
        );
        drop(guest);
        server.assert_serves();
    }
}

/// CVE-2022-2132 and line 13: a chain longer than the longest ring, by way of a table, is given back. (Linux makes chains
/// longer than its ring when that is shorter than `seg_max`, so the length of the ring itself is no good bound.)
#[test]
fn c13_chains_longer_than_any_ring_are_refused() {
    let mut server = Server::start();
    for count in [1025, 5000] {
        assert_chain_refused(
            &mut server,
            &format!("{count} descriptors"),
            |guest, status| {
                let byte = guest.memory.readable(&[0]);
                let buffers: Vec<_> = [guest.header(T_FLUSH, 0)]
                    .into_iter()
                    .chain(std::iter::repeat_n(byte, count - 2))
                    .chain([status])
                    .collect();
                vec![indirect(&guest.memory, &buffers)]
            },
        );
    }
}

/// Line 13: a link to a slot that the ring does not have is refused.
#[test]
fn c13_links_out_of_the_table_are_refused() {
    let mut server = Server::start();
    for next in [128_u16, 129, 4096, u16::MAX] {
        let mut guest = server.guest();
        let status = guest.status();
        guest.rings[0].write_descriptor(0, Descriptor::of(guest.header(T_FLUSH, 0)).then(next));
        guest.rings[0].publish(0);
        guest.rings[0].kick();
        let verdict = guest.verdict();
        assert_refused(&guest, verdict, status, &format!("a link to {next}"));
        drop(guest);
        server.assert_serves();
    }
}

/// Line 13: a head that the ring does not have breaks the ring or is dropped, nothing else.
#[test]
fn c13_heads_out_of_the_table_do_no_harm() {
    let mut server = Server::start();
    for head in [128_u16, 1000, u16::MAX] {
        let mut guest = server.guest();
        guest.rings[0].publish(head);
        guest.rings[0].kick();
        let verdict = guest.verdict();
        assert_ne!(verdict, Verdict::Silent, "head {head} is reported");
        drop(guest);
        server.assert_serves();
    }
}

/// CVE-2016-6490: descriptors of no length end nowhere in a loop, and do not hide the parts between them.
#[test]
fn c13_descriptors_of_no_length_are_passed_over() {
    let mut server = Server::start();
    let mut guest = server.guest();
    let buffers = guest.read_of(6);
    let nothing = |buffer: Buffer| Buffer { len: 0, ..buffer };
    let chain = [
        nothing(buffers[0]),
        buffers[0],
        nothing(buffers[1]),
        buffers[1],
        nothing(buffers[1]),
        buffers[2],
    ];
    let head = guest.rings[0].submit(&chain);
    let verdict = guest.verdict();
    match verdict {
        Verdict::Returned(used) if guest.last_byte(buffers[2]) == S_OK => {
            assert_eq!((used.head, used.len), (u32::from(head), 513));
            guest.assert_read(&buffers, 6);
        }
        verdict => assert_refused(&guest, verdict, buffers[2], "empty descriptors"),
    }
    drop(guest);
    let mut guest = server.guest();
    let all: Vec<_> = (0..128)
        .map(|_| Buffer {
            len: 0,
            ..buffers[0]
        })
        .collect();
    guest.rings[0].submit(&all);
    let verdict = guest.verdict();
    assert!(
        !matches!(verdict, Verdict::Silent),
        "nothing but empty descriptors"
    );
    drop(guest);
    server.assert_serves();
}

/// CVE-2016-7422: lengths near 2^32, and sums beyond it, are refused.
#[test]
fn c13_huge_lengths_are_refused() {
    let mut server = Server::start();
    for (kind, writable) in [(T_IN, true), (T_OUT, false), (T_WRITE_ZEROES, false)] {
        for len in [u32::MAX, u32::MAX - 511, 1 << 31] {
            assert_chain_refused(&mut server, &format!("{len:#x} bytes"), |guest, status| {
                let data = Descriptor::of(Buffer {
                    gpa: 1 << 20,
                    len,
                    writable,
                });
                vec![
                    Descriptor::of(guest.header(kind, 0)),
                    data,
                    Descriptor::of(status),
                ]
            });
        }
    }
    server.assert_serves();
}

/// CVE-2016-7422: lengths are added up in more than 32 bits: 4 GiB and a sector are not a sector.
#[test]
fn c13_sums_beyond_32_bits_are_refused() {
    let mut server = Server::start();
    for kind in [T_IN, T_OUT] {
        let memory = GuestMemory::new(&[
            RegionInfo {
                gpa: 0,
                bytes: 4 << 20,
                uva: 1 << 40,
                mmap_offset: 0,
            },
            RegionInfo {
                gpa: 4 << 20,
                bytes: 16 << 20,
                uva: 1 << 41,
                mmap_offset: 0,
            },
        ]);
        let options = GuestOptions {
            ring_size: 512,
            memory,
            ..GuestOptions::default()
        };
        let mut guest = server.guest_with(options);
        let status = guest.status();
        let part = Buffer {
            gpa: 4 << 20,
            len: 16 << 20,
            writable: kind == T_IN,
        };
        let mut chain = vec![guest.header(kind, 0)];
        chain.extend(std::iter::repeat_n(part, 256));
        chain.extend([Buffer { len: 512, ..part }, status]);
        guest.rings[0].submit(&chain);
        let verdict = guest.verdict();
        assert_refused(&guest, verdict, status, &format!("request type {kind}"));
        drop(guest);
        server.assert_serves();
    }
}

/// Line 13: what the device reads must come before what it writes.
#[test]
fn c13_readable_after_writable_is_refused() {
    let mut server = Server::start();
    assert_chain_refused(&mut server, "data behind the status", |guest, status| {
        let data = guest.memory.readable(&pattern::stamped(1, 0, 1));
        [guest.header(T_OUT, 0), status, data]
            .map(Descriptor::of)
            .to_vec()
    });
    server.assert_base(0, 1, "nothing was written");
}

/// CVE-2026-45782: a head that is in flight is not taken a second time.
#[test]
fn c13_a_head_in_flight_is_not_taken_twice() {
    let mut server = Server::start();
    let mut guest = server.guest();
    let area = guest.memory.writable(1 << 20);
    let status = guest.status();
    let chain = [guest.header(T_IN, 0), area, status];
    let ring = &mut guest.rings[0];
    let head = ring.chain(&chain);
    for _ in 0..16 {
        ring.stage(head);
    }
    ring.expose();
    ring.kick();
    let mut lengths = Vec::new();
    while lengths.len() < 16 {
        match guest.verdict() {
            Verdict::Returned(used) => {
                assert_eq!(used.head, u32::from(head));
                lengths.push(used.len);
            }
            Verdict::Silent => panic!("{lengths:?}, then neither given back nor reported"),
            Verdict::RingBroken | Verdict::Closed => break,
        }
    }
    assert!(
        lengths.len() < 16 || lengths.contains(&0),
        "carried out 16 times: {lengths:?}"
    );
    drop(guest);
    server.assert_serves();
}

/// An available index that runs further ahead than the ring is long is not believed.
#[test]
fn c13_an_available_index_that_jumps_is_not_believed() {
    let mut server = Server::start();
    for jump in [129_u16, 1000, 32_768, u16::MAX] {
        let mut guest = server.guest();
        let buffers = guest.read_of(0);
        let head = guest.rings[0].chain(&buffers);
        assert_eq!(head, 0, "all entries of the available ring name this chain");
        guest.rings[0].set_available_index(jump);
        guest.rings[0].kick();
        let fds = [guest.rings[0].error_fd(), guest.front_end.wire.as_fd()];
        assert_ne!(
            readable(fds, PATIENCE),
            [false; 2],
            "a jump by {jump} is reported"
        );
        assert!(
            guest.rings[0].used_index() <= 128,
            "a jump by {jump} is not carried out"
        );
        drop(guest);
        server.assert_serves();
    }
}

/// An available index that goes backwards is a jump as well.
#[test]
fn c13_an_available_index_that_goes_back_is_not_believed() {
    let mut server = Server::start();
    let mut guest = server.guest();
    for sector in 0..3 {
        let buffers = guest.read_of(sector);
        guest.run(&buffers);
    }
    guest.rings[0].set_available_index(1);
    guest.rings[0].kick();
    let fds = [guest.rings[0].error_fd(), guest.front_end.wire.as_fd()];
    assert_ne!(
        readable(fds, PATIENCE),
        [false; 2],
        "a step back is reported"
    );
    assert_eq!(
        guest.rings[0].used_index(),
        3,
        "nothing was carried out again"
    );
    drop(guest);
    server.assert_serves();
}

/// One broken ring leaves the other rings of its guest alone, or costs the connection; never another guest's.
#[test]
fn c13_a_broken_ring_harms_no_other() {
    let mut server = Server::start();
    let mut guest = server.guest_with(GuestOptions {
        queues: 2,
        ..GuestOptions::default()
    });
    guest.rings[0].set_available_index(30_000);
    guest.rings[0].kick();
    let verdict = guest.verdict();
    assert_ne!(verdict, Verdict::Silent);
    if verdict == Verdict::RingBroken {
        let buffers = guest.read_of(5);
        guest.rings[1].submit(&buffers);
        guest.rings[1].wait();
        guest.assert_read(&buffers, 5);
    }
    drop(guest);
    server.assert_serves();
}

/// CVE-2026-5747: the size of a ring that runs cannot be changed.
#[test]
fn c13_queue_size_is_frozen_while_the_ring_runs() {
    let mut server = Server::start();
    for size in [256, 64, 1, 1024] {
        let mut guest = server.guest();
        let buffers = guest.read_of(1);
        guest.run(&buffers);
        let answer = guest
            .front_end
            .attempt(code::SET_VRING_NUM, &vring_state(0, size), &[]);
        assert!(answer.is_no(), "size {size}: {answer:?}");
        if answer != Answer::Closed {
            let buffers = guest.read_of(2);
            guest.run(&buffers);
            guest.assert_read(&buffers, 2);
        }
        drop(guest);
        server.assert_serves();
    }
}

/// The addresses and the base of a ring that runs cannot be changed either.
#[test]
fn c13_addresses_and_base_are_frozen_while_the_ring_runs() {
    let mut server = Server::start();
    for request in [code::SET_VRING_ADDR, code::SET_VRING_BASE] {
        let mut guest = server.guest();
        let buffers = guest.read_of(1);
        guest.run(&buffers);
        let mut addresses = guest.vring_addresses(0);
        addresses.descriptors = guest.memory.uva(guest.memory.allocate(4096, 4096));
        let payload = if request == code::SET_VRING_ADDR {
            addresses.encode()
        } else {
            vring_state(0, 40)
        };
        let answer = guest.front_end.attempt(request, &payload, &[]);
        assert!(answer.is_no(), "request {request}: {answer:?}");
        if answer != Answer::Closed {
            let buffers = guest.read_of(2);
            guest.run(&buffers);
            guest.assert_read(&buffers, 2);
        }
        drop(guest);
        server.assert_serves();
    }
}

/// Sizes that are no power of two, zero or beyond 32,768 are refused.
#[test]
fn c13_odd_queue_sizes_are_refused() {
    let mut server = Server::start();
    for size in [0, 3, 100, 129, 65_536, 32_769, 1 << 31, u32::MAX] {
        let guest = Guest::negotiate(&server.socket(), GuestOptions::default());
        let answer = guest
            .front_end
            .attempt(code::SET_VRING_NUM, &vring_state(0, size), &[]);
        assert!(answer.is_no(), "size {size}: {answer:?}");
        drop(guest);
        server.assert_serves();
    }
}

/// Rings of all usual sizes work, down to the smallest that holds a request.
#[test]
fn c13_usual_queue_sizes_work() {
    let server = Server::start();
    for ring_size in [4, 16, 64, 128, 256, 512, 1024] {
        let mut guest = server.guest_with(GuestOptions {
            ring_size,
            ..GuestOptions::default()
        });
        for sector in 0..20 {
            let buffers = guest.read_of(sector);
            guest.run(&buffers);
            guest.assert_read(&buffers, sector);
        }
    }
}

/// A burst as long as the ring is carried out whole, and memory does not grow with it (CVE-2016-5403).
#[test]
fn c13_bursts_as_long_as_the_ring() {
    let server = Server::start();
    let memory = GuestMemory::new(&[RegionInfo {
        gpa: 0,
        bytes: 16 << 20,
        uva: 1 << 40,
        mmap_offset: 0,
    }]);
    let options = GuestOptions {
        ring_size: 1024,
        memory,
        ..GuestOptions::default()
    };
    let mut guest = server.guest_with(options);
    let mut chains = Vec::new();
    for sector in 0..1024 {
        let buffers = guest.read_of(sector);
        let table = indirect(&guest.memory, &buffers);
        chains.push((buffers, table));
    }
    let mut settled = 0;
    for round in 0..12 {
        let ring = &mut guest.rings[0];
        for (_, table) in &chains {
            let head = ring.link(&[*table]);
            ring.stage(head);
        }
        ring.expose();
        ring.kick();
        for _ in &chains {
            ring.wait();
        }
        take_signals(ring.call_fd());
        if round == 2 {
            settled = server.process.resident_kib();
        }
    }
    for (sector, (buffers, _)) in chains.iter().enumerate() {
        guest.assert_read(buffers, u64::try_from(sector).expect("small"));
    }
    let grown = server.process.resident_kib().saturating_sub(settled);
    assert!(grown < 8 * 1024, "memory grew by {grown} KiB");
}
