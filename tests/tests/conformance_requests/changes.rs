//! Read-only disks, discards and zeroes (lines 4 to 7).

use stratablk_tests::disk::Disk;
use stratablk_tests::guest::{GuestOptions, USUAL_FEATURES};
use stratablk_tests::launch::{Server, ServerOptions};
use stratablk_tests::pattern::{self, SECTOR};
use stratablk_tests::request::feature::BLK_RO;
use stratablk_tests::request::{
    S_IOERR, S_OK, S_UNSUPP, T_DISCARD, T_WRITE_ZEROES, UNMAP, segment,
};

use crate::{config_u32, field, whole};

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
