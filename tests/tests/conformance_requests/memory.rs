//! What the device reads and writes of guest memory, and claims to have written (lines 13 and 14).

use stratablk_tests::disk::Disk;
use stratablk_tests::guest::{Guest, GuestOptions};
use stratablk_tests::launch::Server;
use stratablk_tests::memory::{Buffer, GuestMemory, PAGE, POISON, RegionInfo};
use stratablk_tests::pattern;
use stratablk_tests::request::{
    S_IOERR, S_OK, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES, header, segment,
};
use stratablk_tests::ring::DESCRIPTOR_BYTES;

/// Line 13: the used length counts the bytes that the device wrote, status included.
#[test]
fn c13_used_length_counts_what_was_written() {
    let server = Server::start();
    let mut guest = server.guest();
    let into = guest.memory.writable(4096);
    assert_eq!(
        guest.request_used(T_IN, 0, Some(into)).1.len,
        4097,
        "a read"
    );
    let into = guest.memory.writable(20);
    assert_eq!(
        guest.request_used(T_GET_ID, 0, Some(into)).1.len,
        21,
        "the name"
    );
    let out = guest.memory.readable(&pattern::base(0, 8));
    assert_eq!(guest.request_used(T_OUT, 0, Some(out)).1.len, 1, "a write");
    assert_eq!(guest.request_used(T_FLUSH, 0, None).1.len, 1, "a flush");
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        let out = guest.memory.readable(&segment(0, 8, 0));
        assert_eq!(
            guest.request_used(kind, 0, Some(out)).1.len,
            1,
            "request type {kind}"
        );
    }
}

/// Line 13: a failed request never claims bytes that the device did not write.
#[test]
fn c13_failed_requests_claim_nothing_unwritten() {
    let mut server = Server::start();
    let mut guest = server.guest();
    let end = server.sectors();
    for (kind, sector, len) in [
        (T_IN, end, 512),
        (T_IN, end - 1, 4096),
        (T_IN, 0, 700),
        (99, 0, 512),
        (T_GET_ID, 0, 8),
        (T_FLUSH, 0, 64),
    ] {
        let area = guest.memory.writable(len + 1);
        let used = guest.run(&[guest.header(kind, sector), area]);
        let bytes = guest.memory.bytes(area);
        assert!(
            used.len <= len + 1,
            "request type {kind}: used length {}",
            used.len
        );
        let claimed = usize::try_from(used.len).expect("small");
        let lie = bytes[..claimed].contains(&POISON);
        // One byte claimed for a status that is not the first byte is what drivers expect of every back-end.
        assert!(
            claimed <= 1 || !lie,
            "request type {kind}: claims {claimed} bytes, wrote fewer"
        );
    }
    drop(guest);
    server.assert_serves();
}

/// Line 13: a chain without a place for a status is given back with nothing written.
#[test]
fn c13_malformed_chains_are_given_back_with_length_zero() {
    let mut server = Server::start();
    let mut guest = server.guest();
    let head = guest.header(T_IN, 0);
    let out = guest.memory.readable(&pattern::base(0, 1));
    let short = guest.memory.readable(&header(T_FLUSH, 0)[..15]);
    let nothing = Buffer {
        len: 0,
        ..guest.status()
    };
    let status = guest.status();
    let cases = [
        ("a header alone", vec![head]),
        ("no writable byte", vec![guest.header(T_OUT, 0), out]),
        ("an empty status", vec![head, nothing]),
    ];
    for (name, chain) in cases {
        assert_eq!(guest.run(&chain).len, 0, "{name}");
    }
    for (name, chain) in [
        ("a short header", vec![short, status]),
        ("no header", vec![status]),
    ] {
        let used = guest.run(&chain);
        let value = guest.last_byte(status);
        assert!(
            used.len == 0 || value != S_OK,
            "{name}: length {}, status {value}",
            used.len
        );
        assert_ne!(value, S_OK, "{name}");
    }
    drop(guest);
    server.assert_serves();
}

/// Line 14: nothing that the device may only read is ever written: headers, data, segments, descriptors, the available
/// ring.
#[test]
fn c14_readable_memory_is_never_written() {
    let mut server = Server::start();
    let mut guest = server.guest();
    let into = guest.memory.writable(512);
    let name = guest.memory.writable(20);
    let out = guest.memory.readable(&pattern::base(1, 1));
    let parts = guest.memory.readable(&segment(4, 1, 0));
    for (kind, data) in [
        (T_IN, Some(into)),
        (T_OUT, Some(out)),
        (T_FLUSH, None),
        (T_GET_ID, Some(name)),
        (T_DISCARD, Some(parts)),
        (T_WRITE_ZEROES, Some(parts)),
        (77, Some(out)),
        // Data in the wrong direction: a read into readable memory must not happen.
        (T_IN, Some(out)),
        (T_GET_ID, Some(parts)),
    ] {
        let (head, status) = (guest.header(kind, 0), guest.status());
        let chain: Vec<_> = [head].into_iter().chain(data).chain([status]).collect();
        let ring = &mut guest.rings[0];
        let first = ring.chain(&chain);
        let (table, available) = (ring.addresses.descriptors, ring.addresses.available);
        let count = usize::from(ring.size);
        let memory = std::sync::Arc::clone(&guest.memory);
        let look = |chain: &[Buffer]| {
            let readable: Vec<_> = chain
                .iter()
                .filter(|b| !b.writable)
                .map(|&b| memory.bytes(b))
                .collect();
            let slots = usize::try_from(DESCRIPTOR_BYTES).expect("small") * count;
            (
                memory.read(table, slots),
                memory.read(available + 4, 2 * count),
                readable,
            )
        };
        ring.stage(first);
        let before = look(&chain);
        ring.expose();
        ring.kick();
        ring.wait();
        assert!(look(&chain) == before, "request type {kind}");
    }
    drop(guest);
    server.assert_serves();
}

/// Line 14: addresses outside the memory table fail their request and nothing else.
#[test]
fn c14_addresses_outside_memory_fail() {
    let mut server = Server::start();
    const BYTES: u64 = 2 << 20;
    let memory = GuestMemory::new(&[
        RegionInfo {
            gpa: 0,
            bytes: BYTES,
            uva: 0x7000_0000_0000,
            mmap_offset: 0,
        },
        RegionInfo {
            gpa: 2 * BYTES,
            bytes: BYTES,
            uva: 0x7100_0000_0000,
            mmap_offset: PAGE,
        },
    ]);
    let end = memory.end();
    let mut guest = server.guest_with(GuestOptions {
        memory,
        ..GuestOptions::default()
    });
    let places = [
        ("in the hole", BYTES + 4096),
        ("into the hole", BYTES - 256),
        ("out of the hole", 2 * BYTES - 256),
        ("behind the end", end),
        ("over the end", end - 256),
        ("far away", 1 << 45),
        ("up to 2^64", u64::MAX - 511),
        ("over 2^64", u64::MAX - 100),
        ("a front-end address", 0x7000_0000_0000),
    ];
    for (name, gpa) in places {
        for writable in [true, false] {
            let data = Buffer {
                gpa,
                len: 512,
                writable,
            };
            let kind = if writable { T_IN } else { T_OUT };
            let status = guest.status();
            let used = guest.run(&[guest.header(kind, 8), data, status]);
            let value = guest.last_byte(status);
            assert!(
                value == S_IOERR || (value == POISON && used.len == 0),
                "data {name}: {value}"
            );
        }
        let status = guest.status();
        let lost = Buffer {
            gpa,
            len: 16,
            writable: false,
        };
        if !name.contains("the hole") && !name.contains("over the") {
            let used = guest.run(&[lost, status]);
            let value = guest.last_byte(status);
            assert!(
                value == S_IOERR || (value == POISON && used.len == 0),
                "header {name}: {value}"
            );
            let lost = Buffer {
                gpa,
                len: 1,
                writable: true,
            };
            guest.run(&[guest.header(T_FLUSH, 0), lost]);
        }
    }
    let mut disk = Disk::new(guest);
    pattern::assert_same(
        &disk.read(8, 1),
        &pattern::base(8, 1),
        "nothing was written",
    );
    drop(disk);
    server.assert_serves();
}

/// Line 14: a buffer may cross from one region into the next, which are not neighbours in the back-end's own memory.
#[test]
fn c14_buffers_cross_regions() {
    let server = Server::start();
    let mut guest = server.guest();
    let border = guest.memory.regions()[1].info.gpa;
    let cross = |len: u32, before: u64, writable| Buffer {
        gpa: border - before,
        len,
        writable,
    };
    let poke = |guest: &Guest, buffer: Buffer, bytes: &[u8]| {
        let at = usize::try_from(border - buffer.gpa).expect("small");
        guest.memory.write(buffer.gpa, &bytes[..at]);
        guest.memory.write(border, &bytes[at..]);
    };
    let peek = |guest: &Guest, buffer: Buffer| {
        let at = usize::try_from(border - buffer.gpa).expect("small");
        let rest = usize::try_from(buffer.len).expect("small") - at;
        [
            guest.memory.read(buffer.gpa, at),
            guest.memory.read(border, rest),
        ]
        .concat()
    };
    let data = cross(2048, 700, true);
    assert_eq!(guest.request(T_IN, 20, Some(data)), S_OK);
    pattern::assert_same(
        &peek(&guest, data),
        &pattern::base(20, 4),
        "a read across the border",
    );
    let data = cross(2048, 1, false);
    poke(&guest, data, &pattern::stamped(3, 40, 4));
    assert_eq!(guest.request(T_OUT, 40, Some(data)), S_OK);
    let head = cross(16, 9, false);
    poke(&guest, head, &header(T_IN, 40));
    let (back, status) = (guest.memory.writable(2048), guest.status());
    guest.run(&[head, back, status]);
    assert_eq!(guest.last_byte(status), S_OK, "a header across the border");
    pattern::assert_same(
        &guest.memory.bytes(back),
        &pattern::stamped(3, 40, 4),
        "a write across the border",
    );
    let name = cross(20, 13, true);
    assert_eq!(guest.request(T_GET_ID, 0, Some(name)), S_OK);
    let part = cross(16, 3, false);
    poke(&guest, part, &segment(40, 4, 0));
    assert_eq!(guest.request(T_WRITE_ZEROES, 0, Some(part)), S_OK);
    assert_eq!(guest.request(T_IN, 40, Some(back)), S_OK);
    assert_eq!(
        guest.memory.bytes(back),
        [0; 2048],
        "a segment across the border"
    );
}
