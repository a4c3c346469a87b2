//! Layouts, statuses and types of requests, names, and ranges of sectors (lines 1 to 3, 8 and 9).

use std::collections::BTreeSet;

use stratablk_tests::disk::Disk;
use stratablk_tests::guest::Guest;
use stratablk_tests::launch::Server;
use stratablk_tests::memory::{Buffer, POISON};
use stratablk_tests::pattern::{self, SECTOR};
use stratablk_tests::request::{
    S_IOERR, S_OK, S_UNSUPP, T_DISCARD, T_FLUSH, T_GET_ID, T_GET_LIFETIME, T_IN, T_OUT, T_SCSI_CMD,
    T_SECURE_ERASE, T_WRITE_ZEROES, T_ZONED, header, segment,
};

use crate::{long_rings, whole};

/// A buffer cut at these places (bytes from its start, ascending).
fn cut(buffer: Buffer, places: &[u32]) -> Vec<Buffer> {
    let bounds: Vec<u32> = [&[0], places, &[buffer.len]].concat();
    let piece = |from: u32, to: u32| {
        let gpa = buffer.gpa + u64::from(from);
        Buffer {
            gpa,
            len: to - from,
            writable: buffer.writable,
        }
    };
    bounds
        .windows(2)
        .map(|pair| piece(pair[0], pair[1]))
        .collect()
}

/// The areas of a request, each in one piece of memory, to be cut into descriptors at will.
struct Areas {
    /// Header and the data that the device reads.
    readable: Buffer,
    /// The data that the device writes, and the status.
    writable: Buffer,
}

impl Areas {
    /// Lays a request out.
    fn new(guest: &Guest, kind: u32, sector: u64, out: &[u8], in_bytes: u32) -> Self {
        let bytes = [&header(kind, sector)[..], out].concat();
        Self {
            readable: guest.memory.readable(&bytes),
            writable: guest.memory.writable(in_bytes + 1),
        }
    }

    /// Ways to cut them that a driver may choose.
    fn layouts(&self) -> Vec<(&'static str, Vec<Buffer>)> {
        let (r, w) = (self.readable, self.writable);
        let classic = |r: Buffer| if r.len > 16 { cut(r, &[16]) } else { vec![r] };
        let tail = |w: Buffer| {
            if w.len > 1 {
                cut(w, &[w.len - 1])
            } else {
                vec![w]
            }
        };
        let bytes: Vec<u32> = (1..16).collect();
        vec![
            (
                "header, data and status apart",
                [classic(r), tail(w)].concat(),
            ),
            ("one descriptor a direction", vec![r, w]),
            (
                "header cut after its first byte",
                [cut(r, &[1]), tail(w)].concat(),
            ),
            (
                "header in halves, the second with the data",
                [cut(r, &[8]), vec![w]].concat(),
            ),
            ("header in single bytes", [cut(r, &bytes), tail(w)].concat()),
            (
                "header in three, data and status joined",
                [cut(r, &[4, 8]), vec![w]].concat(),
            ),
            (
                "all in pieces of 7 bytes",
                [r.pieces(7), w.pieces(7)].concat(),
            ),
        ]
    }
}

/// Runs a request in every layout; `check` sees each status and the data that came.
fn in_all_layouts(
    guest: &mut Guest,
    kind: u32,
    sector: u64,
    out: &[u8],
    in_bytes: u32,
    mut check: impl FnMut(&mut Guest, &str, u8, Vec<u8>),
) {
    for index in 0.. {
        let areas = Areas::new(guest, kind, sector, out, in_bytes);
        let Some((name, chain)) = areas.layouts().into_iter().nth(index) else {
            break;
        };
        guest.run(&chain);
        let mut data = guest.memory.bytes(areas.writable);
        let status = data.pop().expect("a status");
        check(guest, name, status, data);
    }
}

/// Line 1: a read works however its descriptors are cut.
#[test]
fn c01_read_in_any_layout() {
    let server = Server::start();
    let mut guest = long_rings(&server);
    in_all_layouts(&mut guest, T_IN, 5, &[], 1024, |_, name, status, data| {
        assert_eq!(status, S_OK, "{name}");
        pattern::assert_same(&data, &pattern::base(5, 2), name);
    });
}

/// Line 1: a write works however its descriptors are cut.
#[test]
fn c01_write_in_any_layout() {
    let server = Server::start();
    let mut guest = long_rings(&server);
    for version in 0..7 {
        let data = pattern::stamped(version + 1, 11, 2);
        let areas = Areas::new(&guest, T_OUT, 11, &data, 0);
        let (name, chain) = areas
            .layouts()
            .swap_remove(usize::try_from(version).expect("small"));
        guest.run(&chain);
        assert_eq!(guest.last_byte(areas.writable), S_OK, "{name}");
        let back = guest.memory.writable(1024);
        assert_eq!(guest.request(T_IN, 11, Some(back)), S_OK);
        assert_eq!(guest.memory.bytes(back), data, "{name}");
    }
}

/// Line 1: a flush works however its descriptors are cut.
#[test]
fn c01_flush_in_any_layout() {
    let server = Server::start();
    let mut guest = long_rings(&server);
    in_all_layouts(&mut guest, T_FLUSH, 0, &[], 0, |_, name, status, _| {
        assert_eq!(status, S_OK, "{name}");
    });
}

/// Line 1: the name of the disk comes however its descriptors are cut.
#[test]
fn c01_get_id_in_any_layout() {
    let server = Server::start();
    let mut guest = long_rings(&server);
    let mut seen = BTreeSet::new();
    in_all_layouts(&mut guest, T_GET_ID, 0, &[], 20, |_, name, status, data| {
        assert_eq!(status, S_OK, "{name}");
        seen.insert(data);
    });
    assert_eq!(seen.len(), 1, "always the same name: {seen:?}");
}

/// Lines 1 and 7: discard and write-zeroes work however their descriptors are cut, also inside a segment.
#[test]
fn c01_discard_and_write_zeroes_in_any_layout() {
    let server = Server::start();
    let mut guest = long_rings(&server);
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        for index in 0..7 {
            let fill = guest.memory.readable(&pattern::stamped(9, 32, 8));
            assert_eq!(guest.request(T_OUT, 32, Some(fill)), S_OK);
            let out = [segment(32, 3, 0), segment(36, 2, 0)].concat();
            let areas = Areas::new(&guest, kind, 0, &out, 0);
            let (name, chain) = areas.layouts().swap_remove(index);
            guest.run(&chain);
            assert_eq!(guest.last_byte(areas.writable), S_OK, "{kind}: {name}");
            let back = guest.memory.writable(8 * 512);
            assert_eq!(guest.request(T_IN, 32, Some(back)), S_OK);
            let mut expected = pattern::stamped(9, 32, 8);
            expected[..3 * SECTOR].fill(0);
            expected[4 * SECTOR..6 * SECTOR].fill(0);
            pattern::assert_same(
                &guest.memory.bytes(back),
                &expected,
                &format!("{kind}: {name}"),
            );
        }
    }
}

/// Line 2: the status is the last byte that the device may write, wherever the last descriptor begins.
#[test]
fn c02_status_is_the_last_writable_byte() {
    let server = Server::start();
    let mut guest = server.guest();
    for kind in [T_OUT, T_FLUSH] {
        let data = guest.memory.readable(&pattern::base(3, 1));
        let status = guest.memory.writable(8);
        let mut chain = vec![guest.header(kind, if kind == T_OUT { 3 } else { 0 })];
        chain.extend((kind == T_OUT).then_some(data));
        chain.push(status);
        let used = guest.run(&chain);
        assert_eq!(guest.last_byte(status), S_OK, "request type {kind}");
        assert!(used.len <= 8, "used length {}", used.len);
    }
    let area = guest.memory.writable(513);
    let chain = [vec![guest.header(T_IN, 7)], cut(area, &[508])].concat();
    guest.run(&chain);
    let mut bytes = guest.memory.bytes(area);
    assert_eq!(bytes.pop(), Some(S_OK));
    pattern::assert_same(&bytes, &pattern::base(7, 1), "the disk");
}

/// Line 3: request types that do not exist, or were not offered, are unsupported; the queue goes on.
#[test]
fn c03_unknown_types_are_unsupported() {
    let mut server = Server::start();
    let mut guest = server.guest();
    let mut kinds = vec![3, 5, 6, 7, 9, 12, 27, 99, 0x100, 0x8000_0000, 0xffff_ffff];
    kinds.extend([T_GET_LIFETIME, T_SECURE_ERASE, T_SCSI_CMD]);
    kinds.extend(T_ZONED);
    for kind in kinds {
        assert_eq!(
            guest.request(kind, 0, None),
            S_UNSUPP,
            "request type {kind} without data"
        );
        let out = guest.memory.readable(&[0; 32]);
        assert_eq!(
            guest.request(kind, 0, Some(out)),
            S_UNSUPP,
            "request type {kind} with data"
        );
        let into = guest.memory.writable(64);
        assert_eq!(
            guest.request(kind, 0, Some(into)),
            S_UNSUPP,
            "request type {kind} for data"
        );
        let into = guest.memory.writable(512);
        assert_eq!(
            guest.request(T_IN, 1, Some(into)),
            S_OK,
            "a read after request type {kind}"
        );
    }
    drop(guest);
    server.assert_serves();
}

/// Line 8: the name is text, padded with NUL, and goes into 20 bytes.
#[test]
fn c08_get_id_is_text_padded_with_nul() {
    let server = Server::start();
    let mut disk = server.disk();
    let id = disk.id();
    let text: Vec<u8> = id.iter().copied().take_while(|&byte| byte != 0).collect();
    assert!(!text.is_empty(), "a name");
    assert!(text.iter().all(u8::is_ascii_graphic), "text: {id:?}");
    assert!(
        id[text.len()..].iter().all(|&byte| byte == 0),
        "NUL: {id:?}"
    );
}

/// Line 8: a shorter buffer than the name takes is never overrun; a longer one does no harm.
#[test]
fn c08_get_id_stays_in_its_buffer() {
    let mut server = Server::start();
    let id = server.disk().id();
    let mut guest = server.guest();
    for len in [1, 8, 19, 20, 21, 64] {
        let area = guest.memory.writable(128);
        let [buffer, guard] = area.split(len);
        let (status, used) = guest.request_used(T_GET_ID, 0, Some(buffer));
        assert!(
            [S_OK, S_IOERR].contains(&status),
            "{len} bytes: status {status}"
        );
        assert!(
            guest.memory.bytes(guard).iter().all(|&byte| byte == POISON),
            "{len} bytes: overrun"
        );
        let bytes = guest.memory.bytes(buffer);
        let count = bytes.len().min(id.len());
        if status == S_OK {
            assert_eq!(bytes[..count], id[..count], "{len} bytes");
        }
        assert!(used.len <= len + 1, "{len} bytes: used length {}", used.len);
    }
    drop(guest);
    server.assert_serves();
}

/// Line 9: a length that is not whole sectors fails, in both directions, and changes nothing.
#[test]
fn c09_partial_sectors_fail() {
    let mut server = Server::start();
    let mut guest = server.guest();
    for len in [1, 100, 511, 513, 1023, 4095, 4097] {
        let into = guest.memory.writable(len);
        assert_eq!(
            guest.request(T_IN, 8, Some(into)),
            S_IOERR,
            "reading {len} bytes"
        );
        let out = guest
            .memory
            .readable(&vec![0x11; usize::try_from(len).expect("small")]);
        assert_eq!(
            guest.request(T_OUT, 8, Some(out)),
            S_IOERR,
            "writing {len} bytes"
        );
    }
    let mut disk = Disk::new(guest);
    pattern::assert_same(&disk.read(8, 16), &pattern::base(8, 16), "the disk");
    drop(disk);
    server.assert_serves();
}

/// Line 9: a range that leaves the disk, or 64 bits, fails as a whole; there is no short read or write.
#[test]
fn c09_ranges_beyond_the_end_fail() {
    let mut server = Server::start();
    let mut disk = server.disk();
    let end = server.sectors();
    let cases = [
        (end, 1),
        (end - 1, 2),
        (end - 7, 8),
        (end + 1, 1),
        (1 << 32, 1),
        (1 << 54, 1),
        (1 << 55, 1),
        ((1 << 55) - 1, 2),
        (u64::MAX, 1),
        (u64::MAX - 1, 8),
        (u64::MAX / 512, 1),
        (1 << 63, 1),
    ];
    for (sector, count) in cases {
        assert_eq!(
            disk.try_read(sector, count),
            Err(S_IOERR),
            "reading {count} at {sector}"
        );
        let data = pattern::stamped(1, 0, count);
        assert_eq!(
            disk.try_write(sector, &data),
            S_IOERR,
            "writing {count} at {sector}"
        );
    }
    pattern::assert_same(
        &whole(&mut disk, &server),
        &pattern::base(0, end),
        "the disk",
    );
    drop(disk);
    server.assert_serves();
}

/// Line 9: reads and writes reach the very last sector, and sectors are always of 512 bytes.
#[test]
fn c09_sectors_are_512_bytes_up_to_the_last() {
    let server = Server::start();
    let mut disk = server.disk();
    let end = server.sectors();
    for sector in [0, 1, 7, 8, 9, end - 9, end - 1] {
        pattern::assert_same(
            &disk.read(sector, 1),
            &pattern::base(sector, 1),
            &format!("sector {sector}"),
        );
        let data = pattern::stamped(2, sector, 1);
        disk.write(sector, &data);
        pattern::assert_same(&disk.read(sector, 1), &data, &format!("sector {sector}"));
    }
    pattern::assert_same(&disk.read(2, 5), &pattern::base(2, 5), "untouched");
}

/// Line 9: reads see writes, for lengths and offsets across clusters, in any order.
#[test]
fn c09_reads_see_writes() {
    let server = Server::start();
    let mut disk = server.disk();
    let mut model = pattern::base(0, server.sectors());
    let mut seed = 12_345_u64;
    for version in 1..150 {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let sector = (seed >> 33) % 2000;
        let count = 1 + (seed >> 20) % 40;
        let data = pattern::stamped(version, sector, count);
        disk.write(sector, &data);
        model[usize::try_from(sector).expect("small") * SECTOR..][..data.len()]
            .copy_from_slice(&data);
        let at = (seed >> 40) % 2000;
        let expected = &model[usize::try_from(at).expect("small") * SECTOR..][..64 * SECTOR];
        pattern::assert_same(&disk.read(at, 64), expected, &format!("step {version}"));
    }
    pattern::assert_same(&whole(&mut disk, &server), &model, "the disk");
}
