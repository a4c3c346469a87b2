//! The committed bytes of version 1: `tests/golden/store` is a whole store, `FORMAT.md` prints one of its maps. They are
//! decoded, encoded again byte for byte, and damaged in every way that one byte can be.
//!
//! A change of the format that breaks these tests needs a new version, and new files beside these.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use stratablk_layers::catalog::sqlite::SqliteCatalog;
use stratablk_layers::catalog::{
    Catalog, CatalogState, Change, LayerRow, LayerState, SnapshotRow, VolumeKind, VolumeRow,
};
use stratablk_layers::error::Error;
use stratablk_layers::format::header::{LayerKind, MapHeader, MapState, RawBase};
use stratablk_layers::format::journal::{self, Entry, JournalEnd, Seed};
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

/// What the golden catalog holds.
fn catalog_state() -> CatalogState {
    let row = |layer: LayerId, state, base| LayerRow {
        id: layer,
        parent: header(layer).parent,
        size: Sector(SECTORS),
        state,
        base,
        created_ns: header(layer).created_ns,
    };
    let mut state = CatalogState::empty(store());
    for row in [
        row(base(), LayerState::Sealed, Some(raw_base())),
        row(sealed(), LayerState::Sealed, None),
        row(active(), LayerState::Active, None),
    ] {
        state.layers.insert(row.id, row);
    }
    state.volumes.insert(
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
        },
    );
    state.snapshots.push(SnapshotRow {
        volume: "vm".into(),
        name: header(sealed()).snapshot,
        layer: sealed(),
        group: group(),
        created_ns: header(sealed()).snapshot_ns,
        size: Sector(SECTORS),
    });
    state
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

#[test]
fn the_golden_catalog_is_read() {
    // Opening may write (SQLite's journal), so on a copy.
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("catalog.db");
    fs::copy(golden().join("store/catalog.db"), &copy).unwrap();
    let catalog = SqliteCatalog::open(dir.path()).unwrap();
    assert_eq!(*catalog.state(), catalog_state());
    drop(catalog);
    fs::copy(golden().join("newer-catalog.db"), &copy).unwrap();
    let error = SqliteCatalog::open(dir.path()).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
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
    let state = catalog_state();
    let layers = state.layers.values().cloned().map(Change::AddLayer);
    let volumes = state.volumes.values().cloned().map(Change::AddVolume);
    let snapshots = state.snapshots.iter().cloned().map(Change::AddSnapshot);
    let changes: Vec<_> = layers.chain(volumes).chain(snapshots).collect();
    let empty = CatalogState::empty(store());
    let mut catalog = SqliteCatalog::create(&golden().join("store"), &empty).unwrap();
    catalog.commit(&changes).unwrap();
    drop(catalog);
    // The user version lies at byte 60 of a database, most significant byte first.
    let mut bytes = fs::read(golden().join("store/catalog.db")).unwrap();
    bytes[63] = 2;
    fs::write(golden().join("newer-catalog.db"), bytes).unwrap();
    println!("{}", dump(&encode(active())));
}
