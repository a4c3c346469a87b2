//! Round trips, and bytes that may be anything: with wrong checksums, and with right ones over nonsense.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that cannot be set up fails"
)]

use proptest::prelude::*;
use uuid::Uuid;

use super::header::{HEADER_BYTES, LayerKind, MapHeader, MapState, RawBase};
use super::journal::{Entry, RECORD_BYTES, Seed};
use super::*;
use crate::catalog::VolumeKind;
use crate::map::record::{MapRecord, RecordKind};
use crate::units::{Epoch, Sector, SectorRange, StoreId};

const SIZE: u64 = 40_000;
const VOLUME_KINDS: [VolumeKind; 5] = [
    VolumeKind::Normal,
    VolumeKind::Immutable,
    VolumeKind::Writethrough,
    VolumeKind::Multiattach,
    VolumeKind::Readonly,
];

fn map_header() -> impl Strategy<Value = MapHeader> {
    let base = ("/[a-z/]{0,40}", any::<i64>()).prop_map(|(path, mtime_ns)| {
        LayerKind::RawBase(RawBase {
            path: path.into(),
            len: SIZE * 512,
            mtime_ns,
        })
    });
    let kind = prop_oneof![Just(LayerKind::Differencing), base];
    (
        kind,
        any::<bool>(),
        proptest::option::of(2u128..),
        "\\PC{0,16}",
        "\\PC{0,16}",
        any::<(u128, u64, u64)>(),
        0..VOLUME_KINDS.len(),
    )
        .prop_map(
            |(kind, sealed, parent, volume, snapshot, (group, created_ns, snapshot_ns), nth)| {
                let is_base = kind != LayerKind::Differencing;
                MapHeader {
                    store: StoreId(Uuid::from_u128(3)),
                    layer: LayerId(Uuid::from_u128(1)),
                    parent: parent
                        .filter(|_| !is_base)
                        .map(|parent| LayerId(Uuid::from_u128(parent))),
                    size: Sector(SIZE),
                    kind,
                    state: if sealed || is_base {
                        MapState::Sealed
                    } else {
                        MapState::Active
                    },
                    volume,
                    volume_kind: VOLUME_KINDS[nth],
                    snapshot,
                    group: Uuid::from_u128(group),
                    created_ns,
                    snapshot_ns,
                }
            },
        )
}

/// Data anywhere; zeroes in whole clusters.
fn record() -> impl Strategy<Value = MapRecord> {
    (any::<bool>(), 0..SIZE, 1..3000u64).prop_map(|(data, start, count)| {
        let (kind, unit) = if data {
            (RecordKind::Data, 1)
        } else {
            (RecordKind::Zero, 8)
        };
        let start = start / unit * unit;
        let count = count.next_multiple_of(unit).min(SIZE - start);
        MapRecord {
            kind,
            range: SectorRange::new(Sector(start), count).unwrap(),
        }
    })
}

fn groups() -> impl Strategy<Value = Vec<Vec<MapRecord>>> {
    proptest::collection::vec(proptest::collection::vec(record(), 0..6), 0..6)
}

fn set_of(records: &[MapRecord]) -> SectorSet {
    let mut set = SectorSet::empty();
    records.iter().for_each(|record| set.apply(record));
    set
}

/// The bytes of a map with these groups in its journal.
fn image(
    map: &MapHeader,
    checkpoint: &[MapRecord],
    groups: &[Vec<MapRecord>],
) -> (Header, Vec<u8>) {
    let (header, mut bytes) = checkpoint::encode(map, 7, &set_of(checkpoint)).unwrap();
    let mut sequence = 1;
    for (epoch, group) in (1..).zip(groups) {
        let commit = Entry::Commit {
            epoch: Epoch(epoch),
            records: group.len() as u64,
        };
        for entry in group.iter().copied().map(Entry::Change).chain([commit]) {
            bytes.extend_from_slice(&journal::encode(Seed::of(&header), sequence, &entry));
            sequence += 1;
        }
    }
    (header, bytes)
}

/// Makes the header's own checksum right again.
fn fix_header(bytes: &mut [u8]) {
    bytes[12..16].fill(0);
    let crc = crc32c::crc32c(&bytes[..HEADER_BYTES]);
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
}

/// Makes the checksum of the record at `at` right again.
fn fix_record(header: &Header, bytes: &mut [u8], at: usize) {
    let mut covered = header.map.layer.0.as_bytes().to_vec();
    covered.extend_from_slice(&header.incarnation.to_le_bytes());
    covered.extend_from_slice(&bytes[at + 4..at + RECORD_BYTES]);
    bytes[at..at + 4].copy_from_slice(&crc32c::crc32c(&covered).to_le_bytes());
}

/// An active map with three groups.
fn sample() -> (Header, Vec<u8>) {
    let map = MapHeader {
        store: StoreId(Uuid::from_u128(3)),
        layer: LayerId(Uuid::from_u128(1)),
        parent: None,
        size: Sector(SIZE),
        kind: LayerKind::Differencing,
        state: MapState::Active,
        volume: "v".into(),
        volume_kind: VolumeKind::Normal,
        snapshot: String::new(),
        group: Uuid::nil(),
        created_ns: 1,
        snapshot_ns: 0,
    };
    let change = |kind, start| MapRecord {
        kind,
        range: SectorRange::new(Sector(start), 64).unwrap(),
    };
    let group = |n: u64| {
        vec![
            change(RecordKind::Data, n * 1000),
            change(RecordKind::Zero, n * 1000 + 512),
        ]
    };
    image(&map, &group(9), &[group(1), group(2), group(3)])
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(
        map in map_header(),
        records in proptest::collection::vec(record(), 0..10),
        groups in groups(),
    ) {
        let differencing = map.kind == LayerKind::Differencing;
        let groups = if map.state == MapState::Active { groups } else { Vec::new() };
        let (header, bytes) = image(&map, &records, &groups);
        let read = decode_map(&bytes).unwrap();
        prop_assert_eq!(&read.header, &header);
        prop_assert_eq!(read.header.incarnation, 7);
        let all: Vec<_> = records.iter().chain(groups.iter().flatten()).copied().collect();
        let expected = if differencing { set_of(&all) } else { SectorSet::everything(Sector(SIZE)) };
        prop_assert_eq!(read.set, expected);
        prop_assert_eq!(read.journal.epoch.0, groups.len() as u64);
        prop_assert_eq!(read.journal.end, bytes.len() as u64);
        prop_assert_eq!(read.journal.dropped_bytes, 0);
        prop_assert_eq!(header.encode().unwrap(), &bytes[..HEADER_BYTES]);
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..9000)) {
        prop_assert!(decode_map(&bytes).is_err());
    }

    #[test]
    fn any_header_with_a_right_checksum_is_decoded_or_refused(
        changes in proptest::collection::vec((16..HEADER_BYTES, any::<u8>()), 1..6),
    ) {
        let (_, mut bytes) = sample();
        for (at, byte) in changes {
            // Most fields lie at the start, so half of the changes go there.
            let at = if byte & 1 == 0 { 16 + at % 320 } else { at };
            bytes[at] = byte;
        }
        fix_header(&mut bytes);
        if let Ok(read) = decode_map(&bytes) {
            prop_assert!(read.header.encode().is_ok(), "what is read can be written");
        }
    }

    #[test]
    fn any_checkpoint_with_a_right_checksum_is_decoded_or_refused(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let (header, mut bytes) = sample();
        let (start, end) = (HEADER_BYTES, usize::try_from(header.checkpoint.end()).unwrap());
        for (at, byte) in changes {
            bytes[start + at.index(end - start)] = byte;
        }
        let data = start + usize::try_from(u64::from_le_bytes(bytes[160..168].try_into().unwrap())).unwrap();
        let zero = data + usize::try_from(u64::from_le_bytes(bytes[168..176].try_into().unwrap())).unwrap();
        let crcs = [crc32c::crc32c(&bytes[start..data]), crc32c::crc32c(&bytes[data..zero])];
        bytes[176..180].copy_from_slice(&crcs[0].to_le_bytes());
        bytes[180..184].copy_from_slice(&crcs[1].to_le_bytes());
        fix_header(&mut bytes);
        if let Ok(read) = decode_map(&bytes) {
            for run in read.set.data_runs().chain(read.set.zero_runs()) {
                prop_assert!(run.end().0 <= SIZE.next_multiple_of(8));
            }
        }
    }

    #[test]
    fn any_record_with_a_right_checksum_is_decoded_or_refused(
        slot in 0usize..9, at in 4usize..RECORD_BYTES, byte in any::<u8>(), cut in 0usize..200,
    ) {
        let (header, mut bytes) = sample();
        let start = usize::try_from(header.checkpoint.journal_offset()).unwrap() + slot * RECORD_BYTES;
        bytes[start + at] = byte;
        fix_record(&header, &mut bytes, start);
        bytes.truncate(bytes.len() - cut);
        if let Ok(read) = decode_map(&bytes) {
            prop_assert!(read.journal.end <= bytes.len() as u64);
            prop_assert!(read.journal.epoch.0 <= 3);
        }
    }

    #[test]
    fn a_journal_reads_the_same_in_pieces_of_any_size(
        sizes in proptest::collection::vec(1usize..100, 1..40),
        flip in 0usize..288,
    ) {
        let (header, mut bytes) = sample();
        let start = usize::try_from(header.checkpoint.journal_offset()).unwrap();
        bytes[start + flip] ^= 1;
        bytes.extend_from_slice(&[0; 37]);
        let whole = decode_map(&bytes).map(|map| (map.set, map.journal));
        let set = checkpoint::decode(&header, &bytes[HEADER_BYTES..start]).unwrap();
        let mut replay = Replay::new(&header, set);
        let mut rest = &bytes[start..];
        for size in sizes.iter().cycle() {
            let (piece, after) = rest.split_at((*size).min(rest.len()));
            replay.feed(piece);
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(replay.finish(), whole);
    }
}

#[test]
fn a_right_checksum_over_nonsense_is_damage_and_no_torn_tail() {
    let (header, whole) = sample();
    let start = usize::try_from(header.checkpoint.journal_offset()).unwrap();
    let last_commit = start + 8 * RECORD_BYTES;
    let last_change = last_commit - RECORD_BYTES;
    let cases = [
        ("unknown kind", last_change + 4, 4u8),
        ("padding", last_change + 5, 1),
        ("start beyond the disk", last_change + 20, 1),
        ("no sectors", last_change + 24, 0),
        ("count beyond the disk", last_change + 28, 1),
        ("overflowing count", last_change + 31, 0xff),
        ("epoch of a commit", last_commit + 16, 5),
        ("count of a commit", last_commit + 24, 1),
    ];
    for (what, at, byte) in cases {
        let mut bytes = whole.clone();
        bytes[at] = byte;
        fix_record(&header, &mut bytes, at - (at - start) % RECORD_BYTES);
        let error = decode_map(&bytes).unwrap_err();
        assert!(
            matches!(error, FormatError::Corrupt { .. }),
            "{what}: {error}"
        );
    }
}

#[test]
fn records_of_another_layer_or_incarnation_never_count() {
    let (header, bytes) = sample();
    let start = usize::try_from(header.checkpoint.journal_offset()).unwrap();
    let journal = &bytes[start..];
    let mut other_layer = header.clone();
    other_layer.map.layer = LayerId(Uuid::from_u128(2));
    let mut other_incarnation = header.clone();
    other_incarnation.incarnation += 1;
    for (header, kept) in [(header, 3), (other_layer, 0), (other_incarnation, 0)] {
        let mut replay = Replay::new(&header, SectorSet::empty());
        replay.feed(journal);
        let (_, end) = replay.finish().unwrap();
        assert_eq!(end.epoch, Epoch(kept));
        assert_eq!(end.dropped_bytes == 0, kept == 3);
    }
}

#[test]
fn zeroes_inside_of_a_cluster_come_with_data_for_the_rest() {
    let (header, whole) = sample();
    let seed = Seed::of(&header);
    let change = |kind, start, count| {
        let range = SectorRange::new(Sector(start), count).unwrap();
        Entry::Change(MapRecord { kind, range })
    };
    // Cluster 2500, about which the map says nothing yet.
    let cases = [
        (
            change(RecordKind::Zero, 20_003, 5),
            change(RecordKind::Data, 20_000, 3),
            true,
        ),
        (
            change(RecordKind::Zero, 20_003, 5),
            change(RecordKind::Data, 20_000, 2),
            false,
        ),
        (
            change(RecordKind::Zero, 20_000, 5),
            change(RecordKind::Data, 20_005, 3),
            true,
        ),
        (
            change(RecordKind::Zero, 19_992, 9),
            change(RecordKind::Data, 20_002, 6),
            false,
        ),
        (
            change(RecordKind::Data, 20_003, 5),
            change(RecordKind::Data, 20_000, 2),
            true,
        ),
    ];
    for (first, second, good) in cases {
        let mut bytes = whole.clone();
        let commit = Entry::Commit {
            epoch: Epoch(4),
            records: 2,
        };
        for (sequence, entry) in (10..).zip([first, second, commit]) {
            bytes.extend_from_slice(&journal::encode(seed, sequence, &entry));
        }
        let read = decode_map(&bytes);
        assert_eq!(read.is_ok(), good, "{first:?}, {second:?}: {read:?}");
        if let Ok(read) = read {
            // What is accepted can be written as a checkpoint, and read again.
            let (_, bytes) = checkpoint::encode(&header.map, 8, &read.set).unwrap();
            assert_eq!(decode_map(&bytes).unwrap().set, read.set);
        }
    }
}

#[test]
fn a_type_of_volume_that_is_not_known_is_a_normal_one() {
    let (header, bytes) = sample();
    for (bit, byte, kind) in [
        (0, 1, VolumeKind::Normal),
        (1, 0, VolumeKind::Normal),
        (1, 1, VolumeKind::Immutable),
        (1, 3, VolumeKind::Multiattach),
        (1, 5, VolumeKind::Normal),
        (0x81, 4, VolumeKind::Readonly),
    ] {
        let mut bytes = bytes.clone();
        bytes[24] = bit;
        bytes[320] = byte;
        fix_header(&mut bytes);
        let read = Header::decode(&bytes).unwrap();
        assert_eq!(read.map.volume_kind, kind);
        let mut map = read.map;
        map.volume_kind = VolumeKind::Normal;
        assert_eq!(map, header.map);
    }
}
