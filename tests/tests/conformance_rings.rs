//! The rules for split rings (lines 17 to 22 of the conformance list), and what hostile guests did to the rings of other
//! back-ends, each checked from a guest's side.
//!
//! Every test that sends nonsense ends with a new front-end that is served.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use stratablk_tests::disk::Disk;
use stratablk_tests::frontend::{Answer, vring_state};
use stratablk_tests::guest::{Guest, GuestOptions, USUAL_FEATURES, Verdict};
use stratablk_tests::launch::Server;
use stratablk_tests::memory::{Buffer, GuestMemory, POISON, RegionInfo};
use stratablk_tests::pattern;
use stratablk_tests::request::feature::{
    BLK_BARRIER, BLK_GEOMETRY, BLK_LIFETIME, BLK_SCSI, BLK_SECURE_ERASE, BLK_SIZE_MAX, BLK_ZONED,
    IN_ORDER, NOTIFICATION_DATA, NOTIFY_ON_EMPTY, RING_EVENT_IDX, RING_INDIRECT, RING_PACKED,
    RING_RESET, SR_IOV, VERSION_1,
};
use stratablk_tests::request::{S_OK, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES, header, segment};
use stratablk_tests::ring::{
    DESCRIPTOR_BYTES, Descriptor, F_INDIRECT, F_NEXT, F_WRITE, NO_INTERRUPT, Used, indirect,
};
use stratablk_tests::wait::{PATIENCE, QUIET, readable, take_signals};
use stratablk_tests::wire::code;

/// A session without EVENT_IDX.
fn without_event_idx(server: &Server) -> Guest {
    let features = USUAL_FEATURES & !RING_EVENT_IDX;
    server.guest_with(GuestOptions {
        features,
        ..GuestOptions::default()
    })
}

/// Runs a request and takes its notification, so that a notification of the ring's start is out of the way: devices may
/// send one.
#[track_caller]
fn settle(guest: &mut Guest) {
    let buffers = guest.read_of(0);
    guest.run(&buffers);
    // A used entry can be seen before its notification comes.
    while readable([guest.rings[0].call_fd()], QUIET) == [true] {
        take_signals(guest.rings[0].call_fd());
    }
}

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

/// Line 17: a chain in an indirect table is carried out.
#[test]
fn c17_indirect_chains_work() {
    let server = Server::start();
    let mut guest = server.guest();
    assert_ne!(
        guest.features & RING_INDIRECT,
        0,
        "INDIRECT_DESC is offered"
    );
    for sector in 0..20 {
        let buffers = guest.read_of(sector);
        let table = indirect(&guest.memory, &buffers);
        assert!(
            matches!(submit_raw(&mut guest, &[table]), Verdict::Returned(used) if used.len == 513)
        );
        guest.assert_read(&buffers, sector);
    }
}

/// Line 17: the WRITE flag of the descriptor of a table means nothing.
#[test]
fn c17_write_flag_of_a_table_is_ignored() {
    let server = Server::start();
    let mut guest = server.guest();
    let buffers = guest.read_of(9);
    let table = indirect(&guest.memory, &buffers);
    let verdict = submit_raw(
        &mut guest,
        &[Descriptor {
            flags: F_INDIRECT | F_WRITE,
            ..table
        }],
    );
    assert!(matches!(verdict, Verdict::Returned(_)), "{verdict:?}");
    guest.assert_read(&buffers, 9);
}

/// Line 17: normal descriptors may come before the one with the table.
#[test]
fn c17_normal_descriptors_before_a_table_work() {
    let server = Server::start();
    let mut guest = server.guest();
    let buffers = guest.read_of(12);
    let [first, rest] = buffers[0].split(5);
    let table = indirect(&guest.memory, &[rest, buffers[1], buffers[2]]);
    let verdict = submit_raw(&mut guest, &[Descriptor::of(first), table]);
    assert!(matches!(verdict, Verdict::Returned(_)), "{verdict:?}");
    guest.assert_read(&buffers, 12);
    let buffers = guest.read_of(13);
    let table = indirect(&guest.memory, &buffers[2..]);
    let normal = [
        Descriptor::of(buffers[0]),
        Descriptor::of(buffers[1]),
        table,
    ];
    let verdict = submit_raw(&mut guest, &normal);
    assert!(matches!(verdict, Verdict::Returned(_)), "{verdict:?}");
    guest.assert_read(&buffers, 13);
}

/// Line 17: a table in a table is refused.
#[test]
fn c17_nested_tables_are_refused() {
    let mut server = Server::start();
    assert_chain_refused(&mut server, "a table in a table", |guest, status| {
        let inner = indirect(&guest.memory, &[guest.header(T_FLUSH, 0), status]);
        let outer = guest.memory.readable(&inner.encode());
        vec![Descriptor::table(outer.gpa, outer.len)]
    });
    assert_chain_refused(&mut server, "a table that holds itself", |guest, _| {
        let gpa = guest.memory.allocate(DESCRIPTOR_BYTES, 16);
        let itself = Descriptor::table(gpa, 16);
        guest.memory.write(gpa, &itself.encode());
        vec![itself]
    });
}

/// Line 17: tables of no length, of a length that is not whole descriptors, or outside memory are refused.
#[test]
fn c17_odd_tables_are_refused() {
    let mut server = Server::start();
    for bytes in [0, 1, 8, 15, 17, 31, 33, 40, u32::MAX] {
        assert_chain_refused(
            &mut server,
            &format!("a table of {bytes} bytes"),
            |guest, status| {
                let table = indirect(&guest.memory, &[guest.header(T_FLUSH, 0), status]);
                vec![Descriptor {
                    len: bytes,
                    ..table
                }]
            },
        );
    }
    for addr in [0, 1 << 45, u64::MAX - 15, u64::MAX - 31] {
        assert_chain_refused(&mut server, &format!("a table at {addr:#x}"), |_, _| {
            vec![Descriptor::table(addr, 32)]
        });
    }
    assert_chain_refused(&mut server, "a table over the end of memory", |guest, _| {
        vec![Descriptor::table(guest.memory.end() - 16, 32)]
    });
}

/// Line 17: a descriptor with a table and a successor is refused: nothing may follow a table.
#[test]
fn c17_a_table_ends_its_chain() {
    let mut server = Server::start();
    assert_chain_refused(
        &mut server,
        "a descriptor behind a table",
        |guest, status| {
            let read = guest.read_of(0);
            let table = indirect(&guest.memory, &read[..2]);
            vec![table, Descriptor::of(status)]
        },
    );
}

/// Line 17: inside a table `next` counts from the table's start; beyond its end it is refused, in a circle it ends.
#[test]
fn c17_links_inside_a_table_are_checked() {
    let mut server = Server::start();
    for next in [2, 3, 100, u16::MAX] {
        assert_chain_refused(
            &mut server,
            &format!("a link to {next} of 2"),
            |guest, status| {
                let first = Descriptor::of(guest.header(T_FLUSH, 0)).then(next);
                let bytes = [first.encode(), Descriptor::of(status).encode()].concat();
                let table = guest.memory.readable(&bytes);
                vec![Descriptor::table(table.gpa, table.len)]
            },
        );
    }
    assert_chain_refused(&mut server, "a circle in a table", |guest, status| {
        let first = Descriptor::of(guest.header(T_FLUSH, 0)).then(1);
        let bytes = [first.encode(), Descriptor::of(status).then(1).encode()].concat();
        let table = guest.memory.readable(&bytes);
        vec![Descriptor::table(table.gpa, table.len)]
    });
}

/// Line 17: a table may be as long as the ring, whatever part of it the chain uses.
#[test]
fn c17_tables_as_long_as_the_ring_work() {
    let server = Server::start();
    let mut guest = server.guest();
    let count = u32::from(guest.rings[0].size);
    let area = guest.memory.writable((count - 2) * 512 + 1);
    let [data, status] = area.split(area.len - 1);
    let buffers = [vec![guest.header(T_IN, 0)], data.pieces(512), vec![status]].concat();
    assert_eq!(u32::try_from(buffers.len()), Ok(count));
    let table = indirect(&guest.memory, &buffers);
    let verdict = submit_raw(&mut guest, &[table]);
    assert!(matches!(verdict, Verdict::Returned(_)), "{verdict:?}");
    assert_eq!(guest.last_byte(status), S_OK);
    pattern::assert_same(
        &guest.memory.bytes(data),
        &pattern::base(0, u64::from(count) - 2),
        "a read",
    );
}

/// Line 17: a table of an enormous number of descriptors, all valid, costs its guest a request and no more.
#[test]
fn c17_enormous_tables_are_refused() {
    let mut server = Server::start();
    let before = server.process.resident_kib();
    assert_chain_refused(&mut server, "32768 descriptors", |guest, status| {
        let byte = guest.memory.readable(&[0]);
        let buffers: Vec<_> = std::iter::repeat_n(byte, 32_767).chain([status]).collect();
        vec![indirect(&guest.memory, &buffers)]
    });
    assert!(
        server.process.resident_kib() < before + 64 * 1024,
        "memory did not grow"
    );
}

/// Line 18: `used_event` decides when the guest is told, also within a batch: not before it is passed, and then surely.
#[test]
fn c18_used_event_is_honoured_in_a_batch() {
    let server = Server::start();
    let mut guest = server.guest();
    assert_ne!(guest.features & RING_EVENT_IDX, 0, "EVENT_IDX is offered");
    settle(&mut guest);
    let chains: Vec<_> = (0..8).map(|sector| guest.read_of(sector)).collect();
    let ring = &mut guest.rings[0];
    // Only the eighth used entry from here passes this index.
    ring.set_used_event(ring.used_index().wrapping_add(7));
    for chain in &chains[..7] {
        ring.submit(chain);
    }
    assert!(
        stratablk_tests::wait::until(|| ring.pending() == 7),
        "seven are done"
    );
    assert_eq!(readable([ring.call_fd()], QUIET), [false], "told too early");
    ring.submit(&chains[7]);
    assert_eq!(
        readable([ring.call_fd()], PATIENCE),
        [true],
        "not told of the eighth"
    );
    for _ in 0..8 {
        assert!(ring.take().is_some());
    }
    for (sector, chain) in chains.iter().enumerate() {
        guest.assert_read(chain, u64::try_from(sector).expect("small"));
    }
}

/// Line 18: a batch whose used entries step over `used_event` is told of, wherever in the batch that lies.
#[test]
fn c18_a_batch_that_crosses_used_event_notifies() {
    let server = Server::start();
    for event in [0, 1, 7, 14, 15] {
        let mut guest = server.guest();
        settle(&mut guest);
        let chains: Vec<_> = (0..16).map(|sector| guest.read_of(sector)).collect();
        let ring = &mut guest.rings[0];
        ring.set_used_event(ring.used_index().wrapping_add(event));
        for chain in &chains {
            let head = ring.chain(chain);
            ring.stage(head);
        }
        ring.expose();
        ring.kick();
        assert_eq!(
            readable([ring.call_fd()], PATIENCE),
            [true],
            "event {event}"
        );
        assert!(
            ring.pending() > event,
            "told of {} with event {event}",
            ring.pending()
        );
    }
}

/// Line 18: indices run through 65,535 to 0 without a lost or a doubled request, with and without EVENT_IDX.
#[test]
fn c18_indices_wrap_at_16_bits() {
    let server = Server::start();
    for features in [USUAL_FEATURES, USUAL_FEATURES & !RING_EVENT_IDX] {
        for base in [65_400, 65_535] {
            let options = GuestOptions {
                features,
                base,
                ring_size: 64,
                ..GuestOptions::default()
            };
            let mut guest = server.guest_with(options);
            let chains: Vec<_> = (0..8).map(|_| guest.read_of(0)).collect();
            let mut done = 0_u64;
            while done < 240 {
                let ring = &mut guest.rings[0];
                let from = ring.available_index();
                for (index, chain) in chains.iter().enumerate() {
                    let sector = done + u64::try_from(index).expect("small");
                    guest.memory.write(chain[0].gpa, &header(T_IN, sector));
                    let head = ring.chain(chain);
                    ring.stage(head);
                }
                ring.expose();
                if done == 0 {
                    // A ring starts with a kick, whatever its memory says.
                    ring.kick();
                } else {
                    ring.kick_if_wanted(from);
                }
                for _ in &chains {
                    ring.wait();
                }
                for (index, chain) in chains.iter().enumerate() {
                    guest.assert_read(chain, done + u64::try_from(index).expect("small"));
                }
                done += 8;
            }
            assert_eq!(guest.rings[0].pending(), 0);
        }
    }
}

/// Line 18: a driver that kicks only when it is asked to is never forgotten, and one that waits only for notifications is
/// always told, whatever the device's polling does.
#[test]
fn c18_no_notification_is_lost() {
    let server = Server::start();
    for features in [USUAL_FEATURES, USUAL_FEATURES & !RING_EVENT_IDX] {
        let mut guest = server.guest_with(GuestOptions {
            features,
            ..GuestOptions::default()
        });
        let buffers = guest.read_of(4);
        for round in 0..1500_u32 {
            let ring = &mut guest.rings[0];
            let from = ring.available_index();
            let head = ring.chain(&buffers);
            ring.publish(head);
            ring.kick_if_wanted(from);
            ring.wait();
            // Pauses of all lengths, so that requests meet a device that polls, falls asleep, or sleeps.
            for _ in 0..(round * 7919) % 30_000 {
                std::hint::spin_loop();
            }
        }
        guest.assert_read(&buffers, 4);
    }
}

/// Line 18: without EVENT_IDX the guest's NO_INTERRUPT flag is obeyed.
#[test]
fn c18_no_interrupt_is_obeyed_without_event_idx() {
    let server = Server::start();
    let mut guest = without_event_idx(&server);
    settle(&mut guest);
    guest.rings[0].set_flags(NO_INTERRUPT);
    for sector in 0..50 {
        let buffers = guest.read_of(sector);
        guest.rings[0].submit(&buffers);
        guest.rings[0].spin();
        guest.assert_read(&buffers, sector);
    }
    assert_eq!(
        readable([guest.rings[0].call_fd()], QUIET),
        [false],
        "told against its wish"
    );
    guest.rings[0].set_flags(0);
    let buffers = guest.read_of(7);
    guest.run(&buffers);
    guest.assert_read(&buffers, 7);
}

/// Line 18: without EVENT_IDX the place of `used_event` means nothing.
#[test]
fn c18_used_event_is_ignored_without_event_idx() {
    let server = Server::start();
    let mut guest = without_event_idx(&server);
    for sector in 0..20 {
        guest.rings[0].set_used_event(30_000);
        let buffers = guest.read_of(sector);
        guest.run(&buffers);
        guest.assert_read(&buffers, sector);
    }
}

/// Line 18: with EVENT_IDX the NO_INTERRUPT flag means nothing.
#[test]
fn c18_no_interrupt_is_ignored_with_event_idx() {
    let server = Server::start();
    let mut guest = server.guest();
    guest.rings[0].set_flags(NO_INTERRUPT);
    let buffers = guest.read_of(2);
    guest.run(&buffers);
    guest.assert_read(&buffers, 2);
}

/// Line 19: requests may complete in any order, each exactly once; IN_ORDER is not promised.
#[test]
fn c19_in_order_is_not_offered_and_each_completes_once() {
    let server = Server::start();
    let mut guest = server.guest();
    assert_eq!(
        guest.front_end.features() & IN_ORDER,
        0,
        "IN_ORDER is not offered"
    );
    for round in 0..20 {
        let chains: Vec<_> = (0..32)
            .map(|sector| guest.read_of(round * 32 + sector))
            .collect();
        let ring = &mut guest.rings[0];
        let mut heads: Vec<u32> = chains
            .iter()
            .map(|chain| u32::from(ring.chain(chain)))
            .collect();
        for &head in &heads {
            ring.stage(u16::try_from(head).expect("a head"));
        }
        ring.expose();
        ring.kick();
        let mut seen: Vec<u32> = chains.iter().map(|_| ring.wait().head).collect();
        seen.sort_unstable();
        heads.sort_unstable();
        assert_eq!(seen, heads, "each head once");
        for (index, chain) in chains.iter().enumerate() {
            guest.assert_read(chain, round * 32 + u64::try_from(index).expect("small"));
        }
        // The memory of a round is not used again: 20 rounds fit.
    }
}

/// Line 20: packed rings are not offered.
#[test]
fn c20_packed_is_not_offered() {
    let server = Server::start();
    assert_eq!(server.guest().front_end.features() & RING_PACKED, 0);
}

/// Line 21: the reset of single rings is not offered.
#[test]
fn c21_ring_reset_is_not_offered() {
    let server = Server::start();
    assert_eq!(server.guest().front_end.features() & RING_RESET, 0);
}

/// Line 22: nothing is offered that does not work.
#[test]
fn c22_only_what_works_is_offered() {
    let server = Server::start();
    let offered = server.guest().front_end.features();
    let never = NOTIFY_ON_EMPTY
        | BLK_BARRIER
        | BLK_SCSI
        | BLK_GEOMETRY
        | BLK_SIZE_MAX
        | BLK_LIFETIME
        | BLK_SECURE_ERASE
        | BLK_ZONED
        | NOTIFICATION_DATA
        | SR_IOV;
    assert_eq!(offered & never, 0, "{offered:#x}");
    assert_ne!(offered & VERSION_1, 0, "{offered:#x}");
}

/// Line 22: features that were not offered cannot be taken.
#[test]
fn c22_features_not_offered_are_refused() {
    let mut server = Server::start();
    for bit in [RING_PACKED, IN_ORDER, BLK_SECURE_ERASE, 1 << 63] {
        let mut front_end = stratablk_tests::frontend::FrontEnd::connect(&server.socket());
        front_end.negotiate_protocol(stratablk_tests::guest::USUAL_PROTOCOL);
        let features = front_end.features() | bit;
        let answer = front_end.attempt(code::SET_FEATURES, &features.to_le_bytes(), &[]);
        assert!(answer.is_no(), "feature {bit:#x}: {answer:?}");
        drop(front_end);
        server.assert_serves();
    }
}

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

/// Line 17: as many segments as `seg_max` allows fit one request also where the ring is shorter, as Linux makes them.
#[test]
fn c17_seg_max_segments_fit_a_short_ring() {
    let server = Server::start();
    let mut guest = server.guest_with(GuestOptions {
        ring_size: 16,
        ..GuestOptions::default()
    });
    let bytes = guest.front_end.config(12, 4);
    let count = u32::from_le_bytes(bytes.try_into().expect("4 bytes")).min(1022);
    let area = guest.memory.writable(count * 512 + 1);
    let [data, status] = area.split(area.len - 1);
    let buffers = [vec![guest.header(T_IN, 0)], data.pieces(512), vec![status]].concat();
    let table = indirect(&guest.memory, &buffers);
    let verdict = submit_raw(&mut guest, &[table]);
    assert!(matches!(verdict, Verdict::Returned(_)), "{verdict:?}");
    assert_eq!(guest.last_byte(status), S_OK);
    pattern::assert_same(
        &guest.memory.bytes(data),
        &pattern::base(0, u64::from(count)),
        "a read",
    );
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

/// Several rings work at once, each with its own heads and events.
#[test]
fn c19_rings_work_side_by_side() {
    let server = Server::start();
    let guest = server.guest_with(GuestOptions {
        queues: 2,
        ..GuestOptions::default()
    });
    let Guest {
        front_end,
        memory,
        rings,
        ..
    } = guest;
    std::thread::scope(|scope| {
        for mut ring in rings {
            let memory = Arc::clone(&memory);
            let first = u64::from(ring.index) * 512;
            let chains: Vec<[Buffer; 3]> = (0..16)
                .map(|_| {
                    [
                        memory.readable(&[0; 16]),
                        memory.writable(512),
                        memory.writable(1),
                    ]
                })
                .collect();
            scope.spawn(move || {
                for round in 0..30 {
                    for (index, chain) in chains.iter().enumerate() {
                        let sector = first + round * 16 + u64::try_from(index).expect("small");
                        memory.write(chain[0].gpa, &header(T_IN, sector));
                        memory.write(chain[2].gpa, &[POISON]);
                        ring.submit(chain);
                    }
                    for _ in &chains {
                        ring.wait();
                    }
                    for (index, chain) in chains.iter().enumerate() {
                        let sector = first + round * 16 + u64::try_from(index).expect("small");
                        assert_eq!(memory.bytes(chain[2]), [S_OK]);
                        pattern::assert_same(
                            &memory.bytes(chain[1]),
                            &pattern::base(sector, 1),
                            "a read",
                        );
                    }
                }
            });
        }
    });
    drop(front_end);
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

/// A disk works through a table for every request, as Linux guests do.
#[test]
fn c17_a_disk_through_the_usual_wrapper() {
    let server = Server::start();
    let mut disk = Disk::new(server.guest());
    disk.write(1, &pattern::stamped(4, 1, 100));
    pattern::assert_same(&disk.read(1, 100), &pattern::stamped(4, 1, 100), "the disk");
}
