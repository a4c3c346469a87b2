//! The rules for virtio-blk requests (lines 1 to 16 of the conformance list), each checked from a guest's side.
//!
//! Every test has its own back-end on an image full of [`pattern::base`], so the disk always has data below its active
//! layer. Every test that sends nonsense ends with a new front-end that is served.

use std::collections::BTreeSet;

use stratablk_tests::disk::Disk;
use stratablk_tests::guest::{Guest, GuestOptions, USUAL_FEATURES};
use stratablk_tests::launch::{Server, ServerOptions};
use stratablk_tests::memory::{Buffer, GuestMemory, PAGE, POISON, RegionInfo};
use stratablk_tests::pattern::{self, SECTOR};
use stratablk_tests::request::feature::{
    BLK_BLK_SIZE, BLK_CONFIG_WCE, BLK_DISCARD, BLK_FLUSH, BLK_MQ, BLK_RO, BLK_SEG_MAX,
    BLK_TOPOLOGY, BLK_WRITE_ZEROES,
};
use stratablk_tests::request::{
    S_IOERR, S_OK, S_UNSUPP, T_DISCARD, T_FLUSH, T_GET_ID, T_GET_LIFETIME, T_IN, T_OUT, T_SCSI_CMD,
    T_SECURE_ERASE, T_WRITE_ZEROES, T_ZONED, UNMAP, header, segment,
};
use stratablk_tests::ring::DESCRIPTOR_BYTES;

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

/// A session with rings long enough for requests in many small pieces.
fn long_rings(server: &Server) -> Guest {
    server.guest_with(GuestOptions {
        ring_size: 256,
        ..GuestOptions::default()
    })
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

/// The whole disk.
fn whole(disk: &mut Disk, server: &Server) -> Vec<u8> {
    let step = 2048;
    (0..server.sectors())
        .step_by(2048)
        .flat_map(|at| disk.read(at, step.min(server.sectors() - at)))
        .collect()
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

/// Line 4: on a read-only disk a write fails and changes nothing, whether the guest took the bit or not; discard and
/// write-zeroes likewise.
#[test]
fn c04_read_only_changes_not_one_byte() {
    for features in [USUAL_FEATURES, USUAL_FEATURES & !BLK_RO] {
        let mut server = Server::start_with(ServerOptions {
            read_only: true,
            ..ServerOptions::default()
        });
        let guest = server.guest_with(GuestOptions {
            features,
            ..GuestOptions::default()
        });
        assert_ne!(
            guest.front_end.features() & BLK_RO,
            0,
            "read-only is offered"
        );
        let mut disk = Disk::new(guest);
        assert_eq!(disk.try_write(0, &pattern::stamped(1, 0, 8)), S_IOERR);
        assert_eq!(disk.try_segments(T_DISCARD, &[segment(0, 8, 0)]), S_IOERR);
        for flags in [0, UNMAP] {
            assert_eq!(
                disk.try_segments(T_WRITE_ZEROES, &[segment(0, 8, flags)]),
                S_IOERR
            );
        }
        pattern::assert_same(
            &whole(&mut disk, &server),
            &pattern::base(0, server.sectors()),
            "the disk",
        );
        drop(disk);
        server.terminate();
        let image = std::fs::read(server.image()).expect("the image");
        pattern::assert_same(
            &image,
            &pattern::base(0, server.sectors()),
            "the image changed",
        );
    }
}

/// Line 4: the base image of a disk that can be written is never written either.
#[test]
fn c04_base_image_is_never_written() {
    let mut server = Server::start();
    let mut disk = server.disk();
    disk.write(0, &pattern::stamped(1, 0, 64));
    disk.write_zeroes(64, 64, true);
    disk.discard(128, 64);
    disk.flush();
    drop(disk);
    server.terminate();
    let image = std::fs::read(server.image()).expect("the image");
    pattern::assert_same(
        &image,
        &pattern::base(0, server.sectors()),
        "the image changed",
    );
}

/// Line 5: a discard that asks for unmap is unsupported and changes nothing.
#[test]
fn c05_discard_with_unmap_flag_is_unsupported() {
    let mut server = Server::start();
    let mut disk = server.disk();
    assert_eq!(
        disk.try_segments(T_DISCARD, &[segment(8, 8, UNMAP)]),
        S_UNSUPP
    );
    pattern::assert_same(&disk.read(8, 8), &pattern::base(8, 8), "the disk");
    drop(disk);
    server.assert_serves();
}

/// Line 5: unknown flags of discard and write-zeroes are unsupported, each bit of them, in any segment.
#[test]
fn c05_unknown_flags_are_unsupported() {
    let mut server = Server::start();
    let mut disk = server.disk();
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        for bit in 1..32 {
            let status = disk.try_segments(kind, &[segment(8, 8, 1 << bit)]);
            assert_eq!(status, S_UNSUPP, "request type {kind}, flag bit {bit}");
        }
        assert_eq!(
            disk.try_segments(kind, &[segment(8, 8, u32::MAX)]),
            S_UNSUPP
        );
        pattern::assert_same(
            &disk.read(8, 8),
            &pattern::base(8, 8),
            &format!("request type {kind}"),
        );
        let second = [segment(16, 1, 0), segment(24, 8, 2)];
        assert_eq!(
            disk.try_segments(kind, &second),
            S_UNSUPP,
            "flag in the second segment"
        );
        pattern::assert_same(
            &disk.read(24, 8),
            &pattern::base(24, 8),
            &format!("request type {kind}"),
        );
    }
    drop(disk);
    server.assert_serves();
}

/// Line 6: zeroed and discarded ranges read as zeroes although the base below holds data, whatever part of a cluster they
/// cover, and their neighbours keep their content.
#[test]
fn c06_zeroed_ranges_hide_the_base() {
    let server = Server::start();
    let mut disk = server.disk();
    let mut model = pattern::base(0, server.sectors());
    let ranges: [(u64, u32); 9] = [
        (0, 1),
        (3, 2),
        (7, 2),
        (16, 8),
        (33, 30),
        (71, 1),
        (80, 16),
        (100, 300),
        (511, 130),
    ];
    for (index, &(sector, count)) in ranges.iter().enumerate() {
        match index % 3 {
            0 => disk.write_zeroes(sector, count, false),
            1 => disk.write_zeroes(sector, count, true),
            _ => disk.discard(sector, count),
        }
        let start = usize::try_from(sector).expect("small") * SECTOR;
        model[start..][..usize::try_from(count).expect("small") * SECTOR].fill(0);
    }
    pattern::assert_same(&whole(&mut disk, &server), &model, "the disk");
}

/// Line 6: each of the three ways to zero, on each sub-range of a cluster.
#[test]
fn c06_every_part_of_a_cluster_can_be_zeroed() {
    let server = Server::start();
    let mut disk = server.disk();
    let mut cluster = 0;
    for way in 0..3 {
        for from in 0..8_u32 {
            for to in from + 1..=8 {
                let sector = cluster * 8;
                cluster += 1;
                let (at, count) = (sector + u64::from(from), to - from);
                match way {
                    0 => disk.write_zeroes(at, count, false),
                    1 => disk.write_zeroes(at, count, true),
                    _ => disk.discard(at, count),
                }
                let mut expected = pattern::base(sector, 8);
                let bytes = usize::try_from(from).expect("small") * SECTOR
                    ..usize::try_from(to).expect("small") * SECTOR;
                expected[bytes].fill(0);
                pattern::assert_same(
                    &disk.read(sector, 8),
                    &expected,
                    &format!("way {way}, sectors {from}..{to}"),
                );
            }
        }
    }
}

/// Line 6: partial writes into a zeroed cluster show the new sectors between zeroes, and zeroing them again hides both.
#[test]
fn c06_partial_writes_into_zeroed_clusters() {
    let server = Server::start();
    let mut disk = server.disk();
    for (base, way) in [(0, 0), (64, 1), (128, 2)] {
        match way {
            0 => disk.write_zeroes(base, 24, false),
            1 => disk.write_zeroes(base, 24, true),
            _ => disk.discard(base, 24),
        }
        let mut model = vec![0; 24 * SECTOR];
        for (offset, count) in [(2, 1), (7, 2), (12, 3), (23, 1)] {
            let data = pattern::stamped(5, base + offset, count);
            disk.write(base + offset, &data);
            let at = usize::try_from(offset).expect("small") * SECTOR;
            model[at..at + data.len()].copy_from_slice(&data);
        }
        pattern::assert_same(
            &disk.read(base, 24),
            &model,
            &format!("way {way}: after partial writes"),
        );
        disk.write_zeroes(base + 1, 7, way == 1);
        model[SECTOR..8 * SECTOR].fill(0);
        pattern::assert_same(
            &disk.read(base, 24),
            &model,
            &format!("way {way}: after zeroing a part again"),
        );
        pattern::assert_same(
            &disk.read(base + 24, 1),
            &pattern::base(base + 24, 1),
            "the neighbour",
        );
    }
}

/// Line 6: zeroes stay zeroes for the next front-end and after a restart.
#[test]
fn c06_zeroes_outlive_sessions_and_restarts() {
    let mut server = Server::start();
    let mut disk = server.disk();
    disk.write_zeroes(3, 18, false);
    disk.write_zeroes(43, 18, true);
    disk.discard(83, 18);
    disk.flush();
    drop(disk);
    let check = |server: &Server, when: &str| {
        let mut model = pattern::base(0, 128);
        for from in [3, 43, 83] {
            model[from * SECTOR..(from + 18) * SECTOR].fill(0);
        }
        pattern::assert_same(&server.disk().read(0, 128), &model, when);
    };
    check(&server, "in the next session");
    server.terminate();
    server.restart();
    check(&server, "after a restart");
}

/// Line 7: malformed discards and write-zeroes fail and change nothing.
#[test]
fn c07_malformed_segments_change_nothing() {
    let mut server = Server::start();
    let guest = server.guest();
    let limit = |sectors, count| (config_u32(&guest, sectors), config_u32(&guest, count));
    let limits = [
        (
            T_DISCARD,
            limit(field::MAX_DISCARD_SECTORS, field::MAX_DISCARD_SEG),
        ),
        (
            T_WRITE_ZEROES,
            limit(field::MAX_WRITE_ZEROES_SECTORS, field::MAX_WRITE_ZEROES_SEG),
        ),
    ];
    let mut disk = Disk::new(guest);
    let end = server.sectors();
    for (kind, (sectors_max, segments_max)) in limits {
        assert!(sectors_max > 0 && segments_max > 0, "offered with limits");
        let mut cases = vec![
            ("beyond the end", vec![segment(end - 1, 2, 0)]),
            ("at the end", vec![segment(end, 1, 0)]),
            ("far beyond the end", vec![segment(1 << 40, 8, 0)]),
            ("a sum beyond 64 bits", vec![segment(u64::MAX, 1, 0)]),
            ("a sum of 0 in 64 bits", vec![segment(u64::MAX - 7, 8, 0)]),
            ("bytes beyond 64 bits", vec![segment(1 << 55, 8, 0)]),
            ("all 32 bits of length", vec![segment(8, u32::MAX, 0)]),
        ];
        if let Some(more) = sectors_max.checked_add(1) {
            cases.push(("more sectors than allowed", vec![segment(0, more, 0)]));
        }
        if segments_max < 16_000 {
            let many = vec![segment(end, 0, 0); usize::try_from(segments_max).expect("small") + 1];
            cases.push(("more segments than allowed", many));
        }
        for (name, segments) in cases {
            let status = disk.try_segments(kind, &segments);
            assert!(
                [S_IOERR, S_UNSUPP].contains(&status),
                "{kind}, {name}: status {status}"
            );
        }
        for bytes in [0, 1, 8, 15, 17, 24, 31, 33] {
            let out = [segment(8, 8, 0), segment(16, 8, 0), segment(24, 8, 0)].concat();
            let data = (bytes > 0).then(|| disk.guest.memory.readable(&out[..bytes]));
            let status = disk.guest.request(kind, 0, data);
            assert!(
                [S_IOERR, S_UNSUPP].contains(&status),
                "{kind}, {bytes} bytes: {status}"
            );
        }
        let into = disk.guest.memory.writable(16);
        assert_ne!(
            disk.guest.request(kind, 0, Some(into)),
            S_OK,
            "{kind}: a writable segment"
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

/// Line 7: when one of several segments is bad, nothing outside the good ones changes.
#[test]
fn c07_one_bad_segment_spares_everything_outside() {
    let mut server = Server::start();
    let mut disk = server.disk();
    let end = server.sectors();
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        let segments = [segment(8, 8, 0), segment(end - 8, 16, 0), segment(32, 8, 0)];
        assert_ne!(disk.try_segments(kind, &segments), S_OK);
        let now = whole(&mut disk, &server);
        let was = pattern::base(0, end);
        for sector in
            (0..end).filter(|sector| !(8..16).contains(sector) && !(32..40).contains(sector))
        {
            let bytes = usize::try_from(sector).expect("small") * SECTOR;
            assert!(
                now[bytes..bytes + SECTOR] == was[bytes..bytes + SECTOR],
                "sector {sector}"
            );
        }
    }
    drop(disk);
    server.assert_serves();
}

/// Line 7: as many segments as the configuration space allows are carried out.
#[test]
fn c07_all_segments_allowed_are_carried_out() {
    let server = Server::start();
    let guest = server.guest();
    let count = u64::from(config_u32(&guest, field::MAX_DISCARD_SEG)).min(256);
    let mut disk = Disk::new(guest);
    let segments: Vec<_> = (0..count).map(|index| segment(index * 3, 1, 0)).collect();
    assert_eq!(disk.try_segments(T_DISCARD, &segments), S_OK);
    for index in 0..count {
        let mut expected = pattern::base(index * 3, 3);
        expected[..SECTOR].fill(0);
        pattern::assert_same(
            &disk.read(index * 3, 3),
            &expected,
            &format!("segment {index}"),
        );
    }
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

/// Line 10: a flush with a sector or with data is a driver's error and harms nobody.
#[test]
fn c10_odd_flushes_do_no_harm() {
    let mut server = Server::start();
    let mut guest = server.guest();
    let status = guest.request(T_FLUSH, 77, None);
    assert!([S_OK, S_IOERR].contains(&status), "status {status}");
    let out = guest.memory.readable(&[0x55; 512]);
    let status = guest.request(T_FLUSH, 0, Some(out));
    assert!([S_OK, S_IOERR].contains(&status), "status {status}");
    let into = guest.memory.writable(512);
    let (status, used) = guest.request_used(T_FLUSH, u64::MAX, Some(into));
    assert!([S_OK, S_IOERR].contains(&status), "status {status}");
    assert!(
        used.len <= 1 || !guest.memory.bytes(into).contains(&POISON),
        "an honest used length"
    );
    assert_eq!(guest.request(T_FLUSH, 0, None), S_OK);
    drop(guest);
    server.assert_serves();
}

/// What a session writes before its back-end is killed, and what must be there afterwards.
fn write_of_all_kinds(disk: &mut Disk) {
    disk.write(5, &pattern::stamped(1, 5, 30));
    disk.write_zeroes(100, 9, false);
    disk.write_zeroes(120, 9, true);
    disk.discard(140, 9);
    disk.write(142, &pattern::stamped(2, 142, 2));
}

/// Checks what [`write_of_all_kinds`] wrote.
fn check_all_kinds(disk: &mut Disk) {
    let mut model = pattern::base(0, 200);
    let put = |model: &mut Vec<u8>, at: usize, data: &[u8]| {
        model[at * SECTOR..][..data.len()].copy_from_slice(data);
    };
    put(&mut model, 5, &pattern::stamped(1, 5, 30));
    for at in [100, 120, 140] {
        put(&mut model, at, &[0; 9 * SECTOR]);
    }
    put(&mut model, 142, &pattern::stamped(2, 142, 2));
    pattern::assert_same(&disk.read(0, 200), &model, "what was stable is there");
}

/// Line 10: what completed before a flush was submitted is there after the back-end was killed.
#[test]
fn c10_flushed_writes_outlive_the_process() {
    let mut server = Server::start();
    let mut disk = server.disk();
    write_of_all_kinds(&mut disk);
    disk.flush();
    server.process.kill();
    drop(disk);
    server.restart();
    check_all_kinds(&mut server.disk());
}

/// Line 11 (a): with neither FLUSH nor CONFIG_WCE taken, a write is stable once it completed.
#[test]
fn c11_without_flush_writes_are_stable_at_completion() {
    let mut server = Server::start();
    let features = USUAL_FEATURES & !BLK_FLUSH & !BLK_CONFIG_WCE;
    let guest = server.guest_with(GuestOptions {
        features,
        ..GuestOptions::default()
    });
    let mut disk = Disk::new(guest);
    write_of_all_kinds(&mut disk);
    server.process.kill();
    drop(disk);
    server.restart();
    check_all_kinds(&mut server.disk());
}

/// Line 11 (b): with `writeback` set to 0 by the guest, a write is stable once it completed.
#[test]
fn c11_with_writeback_off_writes_are_stable_at_completion() {
    let mut server = Server::start();
    let mut disk = server.disk();
    assert!(
        !disk
            .guest
            .front_end
            .set_config(field::WRITEBACK, &[0])
            .is_no()
    );
    write_of_all_kinds(&mut disk);
    server.process.kill();
    drop(disk);
    server.restart();
    check_all_kinds(&mut server.disk());
}

/// Line 12: CONFIG_WCE is never offered without FLUSH.
#[test]
fn c12_config_wce_comes_with_flush() {
    let server = Server::start();
    let offered = server.guest().front_end.features();
    assert!(
        offered & BLK_FLUSH != 0 || offered & BLK_CONFIG_WCE == 0,
        "{offered:#x}"
    );
    assert_eq!(offered & BLK_CONFIG_WCE, BLK_CONFIG_WCE, "{offered:#x}");
}

/// Line 12: with CONFIG_WCE but without FLUSH the cache mode begins as write-through.
#[test]
fn c12_config_wce_without_flush_begins_write_through() {
    let server = Server::start();
    let features = USUAL_FEATURES & !BLK_FLUSH;
    let guest = server.guest_with(GuestOptions {
        features,
        ..GuestOptions::default()
    });
    assert_eq!(guest.front_end.config(field::WRITEBACK, 1), [0]);
    drop(guest);
    let guest = server.guest();
    assert_eq!(
        guest.front_end.config(field::WRITEBACK, 1),
        [1],
        "with both it is write-back"
    );
}

/// Line 12: the guest's choice is read back, does not outlive its session, and only 0 and 1 are choices.
#[test]
fn c12_writeback_is_the_guests_choice() {
    let mut server = Server::start();
    let mut disk = server.disk();
    for value in [0, 1, 0] {
        assert!(
            !disk
                .guest
                .front_end
                .set_config(field::WRITEBACK, &[value])
                .is_no()
        );
        assert_eq!(disk.guest.front_end.config(field::WRITEBACK, 1), [value]);
        disk.write(9, &pattern::stamped(u64::from(value), 9, 3));
    }
    let answer = disk.guest.front_end.set_config(field::WRITEBACK, &[2]);
    drop(disk);
    let guest = server.guest();
    assert_eq!(
        guest.front_end.config(field::WRITEBACK, 1),
        [1],
        "after an answer of {answer:?}"
    );
    drop(guest);
    server.assert_serves();
}

/// Line 12: the unused bytes of the configuration space are zero.
#[test]
fn c12_unused_bytes_are_zero() {
    let server = Server::start();
    let guest = server.guest();
    let config = guest.front_end.config(0, 60);
    assert_eq!(config[33], 0, "unused0");
    assert_eq!(config[57..60], [0; 3], "unused1");
}

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
