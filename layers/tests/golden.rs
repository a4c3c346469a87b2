//! The committed bytes of version 1: `tests/golden/store` is a whole store, `FORMAT.md` prints one of its maps. They are
//! decoded, encoded again byte for byte, and damaged in every way that one byte can be. `catalog-2.db` and `catalog-3.db` are
//! catalogs of those versions with something of everything.
//!
//! A change of the format that breaks these tests needs a new version, and new files beside these.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use stratablk_layers::catalog::sqlite::SqliteCatalog;
use stratablk_layers::catalog::{
    Catalog, CatalogState, JobId, JobKind, JobRow, JobState, LayerRow, LayerState, Rows,
    SnapshotRow, VolumeKind, VolumeRow, Way,
};
use stratablk_layers::error::Error;
use stratablk_layers::format::header::{LayerKind, MapHeader, MapState, RawBase};
use stratablk_layers::format::journal::{self, Entry, JournalEnd, Seed};
use stratablk_layers::format::sums::{
    Extent, SumsHeader, decode_bad, decode_block, encode_bad, encode_block,
};
use stratablk_layers::format::{FormatError, Map, checkpoint, decode_map};
use stratablk_layers::map::record::{MapRecord, RecordKind};
use stratablk_layers::map::set::SectorSet;
use stratablk_layers::store::Attachment;
use stratablk_layers::units::{Epoch, LayerId, Sector, SectorRange, StoreId};
use uuid::Uuid;

/// Sectors of the golden disk: not whole clusters.
const SECTORS: u64 = 204_803;

fn id(text: &str) -> LayerId {
    LayerId(text.parse().unwrap())
}

fn store() -> StoreId {
    StoreId("c0ffee00-1234-4abc-8def-0123456789ab".parse().unwrap())
}

fn base() -> LayerId {
    id("11111111-1111-4111-8111-111111111111")
}

fn sealed() -> LayerId {
    id("22222222-2222-4222-8222-222222222222")
}

fn active() -> LayerId {
    id("33333333-3333-4333-8333-333333333333")
}

fn group() -> Uuid {
    "99999999-9999-4999-8999-999999999999".parse().unwrap()
}

fn raw_base() -> RawBase {
    RawBase {
        path: "/images/debian-12.raw".into(),
        len: SECTORS * 512,
        mtime_ns: 1_700_000_000_123_456_789,
    }
}

fn header(layer: LayerId) -> MapHeader {
    let of_snapshot = MapHeader {
        store: store(),
        layer: sealed(),
        parent: Some(base()),
        size: Sector(SECTORS),
        kind: LayerKind::Differencing,
        state: MapState::Sealed,
        volume: "vm".into(),
        volume_kind: VolumeKind::Normal,
        snapshot: "m\u{e5}ndag".into(),
        group: group(),
        created_ns: 1_700_000_100_000_000_000,
        snapshot_ns: 1_700_000_200_000_000_000,
    };
    if layer == base() {
        MapHeader {
            layer,
            parent: None,
            kind: LayerKind::RawBase(raw_base()),
            volume: String::new(),
            snapshot: String::new(),
            group: Uuid::nil(),
            created_ns: 1_700_000_050_000_000_000,
            snapshot_ns: 0,
            ..of_snapshot
        }
    } else if layer == sealed() {
        of_snapshot
    } else {
        MapHeader {
            layer,
            parent: Some(sealed()),
            state: MapState::Active,
            snapshot: String::new(),
            group: Uuid::nil(),
            created_ns: 1_700_000_200_000_000_000,
            snapshot_ns: 0,
            ..of_snapshot
        }
    }
}

fn record(kind: RecordKind, start: u64, count: u64) -> MapRecord {
    MapRecord {
        kind,
        range: SectorRange::new(Sector(start), count).unwrap(),
    }
}

/// What the checkpoints of the golden maps hold: single sectors, runs, and both sides of 65,536.
fn checkpoint_set() -> SectorSet {
    let mut set = SectorSet::empty();
    for start in [3, 11, 17, 40_000] {
        set.apply(&record(RecordKind::Data, start, 1));
    }
    set.apply(&record(RecordKind::Data, 65_000, 1_000));
    set.apply(&record(RecordKind::Zero, 80_000, 50_000));
    set.apply(&record(RecordKind::Data, 100_003, 2));
    set
}

/// The journal of the active map: three groups.
fn groups() -> [Vec<MapRecord>; 3] {
    [
        vec![record(RecordKind::Data, 0, 8)],
        vec![
            record(RecordKind::Zero, 65_000, 16),
            record(RecordKind::Data, 65_003, 2),
            record(RecordKind::Data, 204_800, 8),
        ],
        vec![record(RecordKind::Zero, 0, 8)],
    ]
}

/// What the active map holds after its first groups.
fn set_after(count: usize) -> SectorSet {
    let mut set = checkpoint_set();
    for record in groups().iter().take(count).flatten() {
        set.apply(record);
    }
    set
}

/// The bytes that a golden map must have.
fn encode(layer: LayerId) -> Vec<u8> {
    let incarnation = if layer == active() { 3 } else { 2 };
    let (header, mut bytes) =
        checkpoint::encode(&header(layer), incarnation, &checkpoint_set()).unwrap();
    if layer == active() {
        let mut sequence = 1;
        for (epoch, group) in (1..).zip(groups()) {
            let records = group.len() as u64;
            let commit = Entry::Commit {
                epoch: Epoch(epoch),
                records,
            };
            for entry in group.into_iter().map(Entry::Change).chain([commit]) {
                bytes.extend_from_slice(&journal::encode(Seed::of(&header), sequence, &entry));
                sequence += 1;
            }
        }
    }
    bytes
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn map_of(layer: LayerId) -> PathBuf {
    golden()
        .join("store/layers")
        .join(layer.to_string())
        .join("map")
}

/// What the golden catalog of version 1 holds.
fn catalog_1() -> Rows {
    let row = |layer: LayerId, state, base| LayerRow {
        id: layer,
        parent: header(layer).parent,
        size: Sector(SECTORS),
        state,
        base,
        created_ns: header(layer).created_ns,
    };
    let mut rows = Rows::empty(store());
    for row in [
        row(base(), LayerState::Sealed, Some(raw_base())),
        row(sealed(), LayerState::Sealed, None),
        row(active(), LayerState::Active, None),
    ] {
        rows.layers.insert(row.id, row);
    }
    rows.volumes.insert(
        "vm".into(),
        VolumeRow {
            name: "vm".into(),
            active: active(),
            size: Sector(SECTORS),
            created_ns: header(sealed()).created_ns,
            attachment: Some(Attachment {
                socket: "/run/stratablk/vm.sock".into(),
                queues: 2,
                read_only: false,
            }),
            kind: VolumeKind::Normal,
            armed: false,
            attached_from: None,
            failed: None,
        },
    );
    rows.snapshots.push(SnapshotRow {
        volume: "vm".into(),
        name: header(sealed()).snapshot,
        layer: sealed(),
        group: group(),
        created_ns: header(sealed()).snapshot_ns,
        size: Sector(SECTORS),
    });
    rows
}

/// What the golden catalog of version 2 holds: that of version 1, and something of all that is new.
fn catalog_2() -> Rows {
    let mut rows = catalog_1();
    let mut add = |n: u8, parent, state, size| {
        let id = LayerId(Uuid::from_bytes([n; 16]));
        let row = LayerRow {
            id,
            parent,
            size: Sector(size),
            state,
            base: None,
            created_ns: 1_700_000_300_000_000_000,
        };
        rows.layers.insert(id, row);
        id
    };
    let unnamed = add(0x44, Some(sealed()), LayerState::Sealed, SECTORS);
    let named = add(0x55, Some(unnamed), LayerState::Sealed, SECTORS + 8);
    let actives = [
        add(0x66, Some(named), LayerState::Active, SECTORS + 8),
        add(0x77, None, LayerState::Active, 8),
        add(0x88, Some(named), LayerState::Active, SECTORS + 16),
        add(0x99, Some(sealed()), LayerState::Active, SECTORS),
        add(0xaa, Some(sealed()), LayerState::Active, SECTORS),
    ];
    for (name, active, kind, armed, from) in [
        ("each-start", actives[0], VolumeKind::Immutable, true, None),
        ("log", actives[1], VolumeKind::Writethrough, false, None),
        (
            "desk-1",
            actives[2],
            VolumeKind::Normal,
            false,
            Some("desk"),
        ),
        ("desk", actives[3], VolumeKind::Multiattach, false, None),
        ("image", actives[4], VolumeKind::Readonly, false, None),
    ] {
        let row = VolumeRow {
            name: name.into(),
            active,
            size: rows.layers[&active].size,
            created_ns: 1_700_000_300_000_000_000,
            attachment: None,
            kind,
            armed,
            attached_from: from.map(str::to_owned),
            failed: None,
        };
        rows.volumes.insert(name.into(), row);
    }
    for (id, kind, way, state, source, target) in [
        (
            3,
            JobKind::Merge,
            Way::Down,
            JobState::Queued,
            unnamed,
            named,
        ),
        (
            4,
            JobKind::Flatten,
            Way::Copy,
            JobState::Stopped,
            base(),
            actives[0],
        ),
        (
            7,
            JobKind::PushDown,
            Way::Copy,
            JobState::Paused,
            sealed(),
            actives[4],
        ),
    ] {
        let row = JobRow {
            id: JobId(id),
            kind,
            subject: format!("vm@{id}"),
            source,
            target,
            way,
            state,
            error: (state == JobState::Stopped).then(|| "no space left on device".into()),
            rate: (id == 7).then_some(1 << 20),
            created_ns: 1_700_000_400_000_000_000 + id,
        };
        rows.jobs.insert(row.id, row);
    }
    rows.next_job = 9;
    rows.doomed.insert(LayerId(Uuid::from_bytes([0xdd; 16])));
    rows
}

/// The lines that `FORMAT.md` prints of a file: 16 bytes each, those of zeroes left out.
fn dump(bytes: &[u8]) -> String {
    let mut text = String::new();
    for (line, chunk) in bytes.chunks(16).enumerate() {
        if chunk.iter().any(|byte| *byte != 0) {
            write!(text, "{:05x} ", line * 16).unwrap();
            for byte in chunk {
                write!(text, " {byte:02x}").unwrap();
            }
            text.push('\n');
        }
    }
    text
}

/// The bytes that a dump of a file of this length stands for.
fn undump(text: &str, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    for line in text.lines() {
        let (at, line) = line.split_once("  ").unwrap();
        let at = usize::from_str_radix(at, 16).unwrap();
        for (i, byte) in line.split(' ').enumerate() {
            bytes[at + i] = u8::from_str_radix(byte, 16).unwrap();
        }
    }
    bytes
}

#[test]
fn the_golden_maps_are_encoded_byte_for_byte() {
    for layer in [base(), sealed(), active()] {
        let bytes = fs::read(map_of(layer)).unwrap();
        assert_eq!(dump(&encode(layer)), dump(&bytes), "{layer}");
        assert_eq!(encode(layer).len(), bytes.len());
    }
}

#[test]
fn the_golden_maps_are_decoded() {
    for layer in [base(), sealed(), active()] {
        let read = decode_map(&fs::read(map_of(layer)).unwrap()).unwrap();
        assert_eq!(read.header.map, header(layer));
        let (set, epoch) = match layer {
            _ if layer == base() => (SectorSet::everything(Sector(SECTORS)), 0),
            _ if layer == sealed() => (checkpoint_set(), 0),
            _ => (set_after(3), 3),
        };
        assert_eq!(read.set, set);
        assert_eq!(
            (read.journal.epoch, read.journal.dropped_bytes),
            (Epoch(epoch), 0)
        );
    }
}

#[test]
fn the_bytes_printed_in_the_specification_are_those_of_the_file() {
    let text = include_str!("../FORMAT.md");
    let printed = text.split("```hex\n").nth(1).unwrap();
    let printed = printed.split("```").next().unwrap();
    let bytes = fs::read(map_of(active())).unwrap();
    assert_eq!(undump(printed, bytes.len()), bytes);
    let read = decode_map(&undump(printed, bytes.len())).unwrap();
    assert_eq!(read.set, set_after(3));
}

/// What the specification prints of the checksums: three clusters of the sealed layer.
fn golden_sums() -> (SumsHeader, [u32; 3]) {
    let mut set = SectorSet::empty();
    set.apply(&record(RecordKind::Data, 6, 4));
    set.apply(&record(RecordKind::Data, 800, 8));
    let header = SumsHeader {
        store: store(),
        layer: sealed(),
        incarnation: 3,
        extent: Extent::of(&set),
        taken_ns: 1_700_000_300_000_000_000,
    };
    (header, [0x8a91_36aa, 0x62a8_ab43, 0x46dd_794e])
}

/// What it prints of damage: one of these clusters.
fn golden_bad() -> SectorSet {
    let mut bad = SectorSet::empty();
    bad.apply(&record(RecordKind::Data, 800, 8));
    bad
}

/// Which bytes of the files of checksums and of damage are printed: those of the second and third block of hexadecimal digits.
fn printed(nth: usize, len: usize) -> Vec<u8> {
    let text = include_str!("../FORMAT.md");
    let printed = text.split("```hex\n").nth(nth).unwrap();
    undump(printed.split("```").next().unwrap(), len)
}

#[test]
fn checksums_and_damage_are_those_of_the_specification() {
    let (header, sums) = golden_sums();
    assert_eq!((header.extent.clusters, header.extent.sectors), (3, 12));
    let mut bytes = header.encode();
    bytes.extend(encode_block(sealed(), 0, &sums));
    assert_eq!(header.extent.file_bytes(), Some(bytes.len() as u64));
    let bad = encode_bad(store(), sealed(), &golden_bad(), 1_700_000_400_000_000_000);
    if std::env::var_os("WRITE_GOLDEN").is_some() {
        println!("{}\n{} bytes\n{}", dump(&bytes), bad.len(), dump(&bad));
    }
    assert_eq!(dump(&printed(2, bytes.len())), dump(&bytes));
    assert_eq!(dump(&printed(3, bad.len())), dump(&bad));
    assert_eq!(SumsHeader::decode(&bytes), Ok(header));
    let block = decode_block(sealed(), 0, &bytes[4096..]).unwrap();
    assert_eq!(block[..3], sums);
    assert!(block[3..].iter().all(|sum| *sum == 0));
    assert_eq!(decode_bad(&bad), Ok((store(), sealed(), golden_bad())));
    // Whatever one bit is flipped, it is noticed; and a block is no other one.
    for place in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[place] ^= 0x10;
        let header = SumsHeader::decode(&flipped);
        let block = decode_block(sealed(), 0, &flipped[4096..]);
        assert!(header.is_err() || block.is_none(), "{place}");
        assert!(SumsHeader::decode(&flipped[..place.min(4095)]).is_err());
    }
    for place in 0..bad.len() {
        let mut flipped = bad.clone();
        flipped[place] ^= 0x10;
        assert!(decode_bad(&flipped).is_err(), "{place}");
        assert!(decode_bad(&bad[..place]).is_err(), "{place}");
    }
    assert_eq!(decode_block(sealed(), 1, &bytes[4096..]), None);
    assert_eq!(decode_block(active(), 0, &bytes[4096..]), None);
    assert_eq!(decode_block(sealed(), 0, &bytes[4097..]), None);
    for at in [8, 16] {
        let mut newer = bytes[..4096].to_vec();
        newer[at] = 9;
        newer[12..16].fill(0);
        let crc = crc32c::crc32c(&newer);
        newer[12..16].copy_from_slice(&crc.to_le_bytes());
        let error = SumsHeader::decode(&newer).unwrap_err();
        assert!(matches!(error, FormatError::Unsupported { .. }), "{error}");
    }
}

#[test]
fn newer_versions_are_refused_as_such() {
    for (name, part) in [
        (
            "newer-version.map",
            "map version 2; this one knows version 1",
        ),
        ("newer-feature.map", "unknown incompatible features 0x80"),
    ] {
        let error = decode_map(&fs::read(golden().join(name)).unwrap()).unwrap_err();
        assert!(matches!(error, FormatError::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
    // A compatible feature that is not known is ignored.
    let read = decode_map(&fs::read(golden().join("newer-compatible.map")).unwrap()).unwrap();
    assert_eq!(read.set, set_after(3));
}

/// What became of a damaged map.
#[derive(Debug, PartialEq)]
enum Fate {
    /// Refused.
    Refused,
    /// Read up to this commit, and the rest reported.
    Dropped(u64),
    /// Nothing was noticed.
    Unnoticed,
}

/// The fate of bytes that were once a golden map. Whatever is read must be what the map once held.
fn fate(bytes: &[u8], whole: &Map) -> Fate {
    match decode_map(bytes) {
        Err(FormatError::Corrupt { .. }) => Fate::Refused,
        Err(error) => panic!("no damage makes a newer version: {error}"),
        Ok(read) if read == *whole => Fate::Unnoticed,
        Ok(read) => {
            assert_eq!(read.header, whole.header);
            assert!(read.journal.dropped_bytes > 0, "{read:?}");
            let epoch = read.journal.epoch.0;
            assert_eq!(read.set, set_after(usize::try_from(epoch).unwrap()));
            Fate::Dropped(epoch)
        }
    }
}

#[test]
fn no_damage_of_one_byte_goes_unnoticed() {
    // Harmless bytes: none. Header, checkpoint and padding are refused. In the journal, damage of group 1 or 2 is proven
    // by what follows the group; damage of the last group cannot be told from a flush that was cut off, so the group is
    // dropped and reported.
    let mut dropped = 0;
    for layer in [base(), sealed(), active()] {
        let bytes = fs::read(map_of(layer)).unwrap();
        let whole = decode_map(&bytes).unwrap();
        let last_group = if layer == active() {
            bytes.len() - 2 * 32
        } else {
            bytes.len()
        };
        for at in 0..bytes.len() {
            for flip in (0..8).map(|bit| 1 << bit).chain([0xff]) {
                let mut damaged = bytes.clone();
                damaged[at] ^= flip;
                let expected = if at < last_group {
                    Fate::Refused
                } else {
                    Fate::Dropped(2)
                };
                let fate = fate(&damaged, &whole);
                assert_eq!(
                    fate, expected,
                    "byte {at} of layer {layer}, flipped {flip:#x}"
                );
                dropped += usize::from(fate != Fate::Refused);
            }
        }
    }
    assert_eq!(dropped, 2 * 32 * 9);
}

#[test]
fn a_map_cut_at_any_byte_is_refused_or_reported() {
    let bytes = fs::read(map_of(active())).unwrap();
    let whole = decode_map(&bytes).unwrap();
    let start = usize::try_from(whole.header.checkpoint.journal_offset()).unwrap();
    let mut commits = vec![start];
    for group in groups() {
        commits.push(commits.last().unwrap() + (group.len() + 1) * 32);
    }
    for len in 0..bytes.len() {
        let read = decode_map(&bytes[..len]);
        if len < start {
            assert!(matches!(read, Err(FormatError::Corrupt { .. })), "{len}");
            continue;
        }
        let read = read.unwrap();
        let kept = commits.iter().filter(|end| **end <= len).count() - 1;
        assert_eq!(read.journal.epoch.0, kept as u64, "{len}");
        assert_eq!(read.set, set_after(kept), "{len}");
        let last = bytes[..len].iter().rposition(|byte| *byte != 0).unwrap();
        let dropped = (last + 1).saturating_sub(commits[kept]);
        assert_eq!(read.journal.dropped_bytes, dropped as u64, "{len}");
    }
}

#[test]
fn garbage_behind_the_journal_is_reported_and_zeroes_are_nothing() {
    let mut bytes = fs::read(map_of(active())).unwrap();
    let whole = decode_map(&bytes).unwrap();
    let len = bytes.len();
    bytes.resize(len + 10_000, 0);
    assert_eq!(decode_map(&bytes).unwrap(), whole);
    bytes[len + 5_000] = 1;
    let read = decode_map(&bytes).unwrap();
    assert_eq!(read.set, whole.set);
    let expected = JournalEnd {
        dropped_bytes: 5_001,
        ..whole.journal
    };
    assert_eq!(read.journal, expected);
}

#[test]
fn damage_in_the_middle_says_what_was_lost() {
    let mut bytes = fs::read(map_of(active())).unwrap();
    let whole = decode_map(&bytes).unwrap();
    let start = usize::try_from(whole.header.checkpoint.journal_offset()).unwrap();
    bytes[start + 2 * 32 + 9] ^= 1;
    let text = decode_map(&bytes).unwrap_err().to_string();
    let place = format!("at byte {}", start + 64);
    for part in [&place, "lost: commits 2 to 3", "commits up to 1"] {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

/// What the golden catalog of version 3 holds: that of version 2, and a volume that has failed.
fn catalog_3() -> Rows {
    let mut rows = catalog_2();
    let row = rows.volumes.get_mut("log").unwrap();
    row.failed = Some("a flush failed: Input/output error (os error 5)".into());
    rows
}

/// A directory with a copy of a golden catalog in it, since opening one may write.
fn copy_of(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(golden().join(name), dir.path().join("catalog.db")).unwrap();
    dir
}

/// The version of the catalog in a directory: at byte 60, most significant byte first.
fn version_in(dir: &Path) -> u8 {
    fs::read(dir.join("catalog.db")).unwrap()[63]
}

#[test]
fn the_golden_catalogs_are_read() {
    for (name, version, rows) in [
        ("store/catalog.db", 1, catalog_1()),
        ("catalog-2.db", 2, catalog_2()),
        ("catalog-3.db", 3, catalog_3()),
    ] {
        let dir = copy_of(name);
        let expected = CatalogState::new(rows).unwrap();
        // Looking changes nothing, opening makes it one of the newest version.
        assert_eq!(SqliteCatalog::look(dir.path()).unwrap(), expected);
        assert_eq!(version_in(dir.path()), version);
        let catalog = SqliteCatalog::open(dir.path()).unwrap();
        assert_eq!(*catalog.state(), expected);
        drop(catalog);
        assert_eq!(version_in(dir.path()), 3);
        let catalog = SqliteCatalog::open(dir.path()).unwrap();
        assert_eq!(*catalog.state(), expected);
        drop(catalog);
        let names = fs::read_dir(dir.path()).unwrap();
        assert_eq!(names.count(), 1, "nothing is left beside the catalog");
    }
    let dir = copy_of("newer-catalog.db");
    let error = SqliteCatalog::open(dir.path()).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
}

#[test]
fn an_upgrade_that_was_cut_off_leaves_the_old_catalog_or_the_new() {
    // Before the rename: a part of the new one lies beside the old one.
    let dir = copy_of("store/catalog.db");
    let new = dir.path().join("catalog.db.new");
    fs::write(
        &new,
        &fs::read(golden().join("catalog-2.db")).unwrap()[..5000],
    )
    .unwrap();
    fs::write(dir.path().join("catalog.db.new-journal"), "part").unwrap();
    let catalog = SqliteCatalog::open(dir.path()).unwrap();
    assert_eq!(*catalog.state(), CatalogState::new(catalog_1()).unwrap());
    assert!(!new.exists());
    // Where it cannot be made, the old one stays.
    let dir = copy_of("store/catalog.db");
    fs::create_dir(dir.path().join("catalog.db.new")).unwrap();
    assert!(SqliteCatalog::open(dir.path()).is_err());
    assert_eq!(version_in(dir.path()), 1);
    let state = SqliteCatalog::look(dir.path()).unwrap();
    assert_eq!(state, CatalogState::new(catalog_1()).unwrap());
}

/// Writes the golden files and prints the lines for `FORMAT.md`, if `WRITE_GOLDEN` is set. For a new version only: those
/// of released versions never change.
#[test]
#[ignore = "writes the fixtures"]
fn write_the_golden_files() {
    if std::env::var_os("WRITE_GOLDEN").is_none() {
        return;
    }
    for layer in [base(), sealed(), active()] {
        fs::create_dir_all(map_of(layer).parent().unwrap()).unwrap();
        fs::write(map_of(layer), encode(layer)).unwrap();
    }
    for (name, at, value) in [
        ("newer-version.map", 8, 2u8),
        ("newer-feature.map", 16, 0x80),
        ("newer-compatible.map", 24, 0x80),
    ] {
        let mut bytes = encode(active());
        bytes[at] = value;
        bytes[12..16].fill(0);
        let crc = crc32c::crc32c(&bytes[..4096]);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        fs::write(golden().join(name), bytes).unwrap();
    }
    // Those of versions 1 and 2 can no longer be written.
    let dir = tempfile::tempdir().unwrap();
    let state = CatalogState::new(catalog_3()).unwrap();
    drop(SqliteCatalog::create(dir.path(), &state).unwrap());
    let mut bytes = fs::read(dir.path().join("catalog.db")).unwrap();
    fs::write(golden().join("catalog-3.db"), &bytes).unwrap();
    bytes[63] = 4;
    fs::write(golden().join("newer-catalog.db"), bytes).unwrap();
    println!("{}", dump(&encode(active())));
}
