//! A map's life as a file: created, appended to, torn, damaged, replaced.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::fs;

use uuid::Uuid;

use super::*;
use crate::catalog::VolumeKind;
use crate::map::record::RecordKind;
use crate::test_media::TestMedia;
use crate::units::{Sector, SectorRange, StoreId};

/// A store directory with one layer directory in it.
struct Fixture {
    dir: tempfile::TempDir,
    media: TestMedia,
    store: Arc<dyn Media>,
    header: MapHeader,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let media = TestMedia::new(dir.path());
        let layer = LayerId(Uuid::from_u128(0xa));
        media.create_dir(&layer_dir(layer)).unwrap();
        Self {
            store: Arc::new(media.clone()),
            media,
            dir,
            header: MapHeader {
                store: StoreId(Uuid::from_u128(0x5)),
                layer,
                parent: None,
                size: Sector(10_001),
                kind: LayerKind::Differencing,
                state: MapState::Active,
                volume: "disk".into(),
                volume_kind: VolumeKind::Normal,
                snapshot: String::new(),
                group: Uuid::nil(),
                created_ns: 1,
                snapshot_ns: 0,
            },
        }
    }

    fn create(&self) -> MapFile {
        MapFile::create(&self.store, &self.header, &SectorSet::empty()).unwrap()
    }

    fn open(&self) -> Result<(MapFile, MapHeader, SectorSet, Recovery)> {
        MapFile::open(&self.store, self.header.layer)
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(self.dir.path().join(map_path(self.header.layer))).unwrap()
    }

    fn set_bytes(&self, bytes: &[u8]) {
        fs::write(self.dir.path().join(map_path(self.header.layer)), bytes).unwrap();
    }
}

fn record(kind: RecordKind, start: u64, count: u64) -> MapRecord {
    MapRecord {
        kind,
        range: SectorRange::new(Sector(start), count).unwrap(),
    }
}

/// Group `n` of the tests: one Data record of its own, and a few more.
fn group(n: u64) -> Vec<MapRecord> {
    (0..n % 3 + 1)
        .map(|i| record(RecordKind::Data, n * 64 + i * 16, 8))
        .chain([record(RecordKind::Zero, 8000 + n * 8, 8)])
        .collect()
}

fn apply(map: &mut MapFile, set: &mut SectorSet, records: &[MapRecord]) {
    let (offset, bytes) = map.append(records);
    map.file().write_at(&bytes, offset).unwrap();
    map.file().sync_data().unwrap();
    for record in records {
        set.apply(record);
    }
}

#[test]
fn groups_come_back_in_order_and_go_on_where_they_ended() {
    let fixture = Fixture::new();
    let mut map = fixture.create();
    let mut expected = SectorSet::empty();
    for n in 0..20 {
        apply(&mut map, &mut expected, &group(n));
    }
    drop(map);
    let (mut map, header, set, recovery) = fixture.open().unwrap();
    assert_eq!(header, fixture.header);
    assert_eq!(set, expected);
    assert_eq!((recovery.epoch, recovery.dropped_bytes), (Epoch(20), 0));
    assert_eq!(
        map.incarnation(),
        1,
        "nothing was torn, so nothing is replaced"
    );
    apply(&mut map, &mut expected, &group(20));
    let journal = map.journal_bytes();
    drop(map);
    let (map, _, set, recovery) = fixture.open().unwrap();
    assert_eq!((set, recovery.epoch), (expected, Epoch(21)));
    assert_eq!(map.journal_bytes(), journal);
}

#[test]
fn opening_an_active_map_syncs_it_before_anything_can_be_appended() {
    let fixture = Fixture::new();
    let mut map = fixture.create();
    let (offset, bytes) = map.append(&group(1));
    // The daemon dies between writing and syncing.
    map.file().write_at(&bytes, offset).unwrap();
    drop(map);
    fixture.media.take_log();
    drop(fixture.open().unwrap());
    let log = fixture.media.take_log();
    assert_eq!(log.len(), 2, "{log:?}");
    assert_eq!(log[0], "sync map");
    assert!(log[1].starts_with("sync"), "its name too: {log:?}");
}

#[test]
fn a_tail_cut_at_any_byte_is_dropped_and_replaced_away() {
    let fixture = Fixture::new();
    let mut map = fixture.create();
    let mut expected = SectorSet::empty();
    apply(&mut map, &mut expected, &group(1));
    let (offset, bytes) = map.append(&group(2));
    map.file().write_at(&bytes, offset).unwrap();
    let whole = fixture.bytes();
    for cut in offset..offset + bytes.len() as u64 {
        fixture.set_bytes(&whole[..usize::try_from(cut).unwrap()]);
        let (map, _, set, recovery) = fixture.open().unwrap();
        assert_eq!(set, expected, "cut at {cut}");
        assert_eq!(recovery.epoch, Epoch(1), "cut at {cut}");
        let last = whole[..usize::try_from(cut).unwrap()]
            .iter()
            .rposition(|byte| *byte != 0);
        let dropped = (last.unwrap() as u64 + 1).saturating_sub(offset);
        assert_eq!(recovery.dropped_bytes, dropped, "cut at {cut}");
        let replaced = u64::from(dropped > 0);
        assert_eq!(map.incarnation(), 1 + replaced, "cut at {cut}");
        assert_eq!(
            map.journal_bytes() == 0,
            dropped > 0,
            "a replaced map starts a new journal"
        );
    }
}

#[test]
fn records_of_a_dropped_group_never_join_a_later_one() {
    // The story: group 2 is torn so that its first sector is lost and its second survives. After recovery another
    // group 2 is written over the first sector, and crashes before its own second sector. Were the map not replaced
    // in between, the old commit record would close the new group: same layer, same incarnation, fitting sequence.
    let fixture = Fixture::new();
    let mut map = fixture.create();
    let mut expected = SectorSet::empty();
    apply(&mut map, &mut expected, &group(1));
    let many: Vec<_> = (0..32)
        .map(|n| record(RecordKind::Data, n * 100, 8))
        .collect();
    let (offset, bytes) = map.append(&many);
    let sector = usize::try_from(offset.next_multiple_of(512) - offset).unwrap();
    map.file()
        .write_at(&bytes[sector..], offset + sector as u64)
        .unwrap();
    drop(map);
    let (mut map, _, set, recovery) = fixture.open().unwrap();
    assert_eq!(set, expected);
    assert!(recovery.dropped_bytes > 0);
    let others: Vec<_> = (0..32)
        .map(|n| record(RecordKind::Zero, n * 200, 8))
        .collect();
    let (offset, bytes) = map.append(&others);
    map.file().write_at(&bytes[..sector], offset).unwrap();
    drop(map);
    let (_, _, set, recovery) = fixture.open().unwrap();
    assert_eq!(set, expected);
    assert!(recovery.dropped_bytes > 0);
}

#[test]
fn every_subset_of_the_sectors_of_one_group_is_a_torn_tail() {
    let fixture = Fixture::new();
    let mut map = fixture.create();
    let mut expected = SectorSet::empty();
    apply(&mut map, &mut expected, &group(1));
    let before = fixture.bytes();
    let many: Vec<_> = (0..90)
        .map(|n| record(RecordKind::Data, n * 100, 8))
        .collect();
    let (offset, bytes) = map.append(&many);
    map.file().write_at(&bytes, offset).unwrap();
    let after = fixture.bytes();
    let mut whole = expected.clone();
    many.iter().for_each(|record| whole.apply(record));
    let first = usize::try_from(offset / 512).unwrap();
    let sectors = after.len().div_ceil(512) - first;
    assert_eq!(
        sectors, 6,
        "enough to be interesting, few enough to try all"
    );
    for survivors in 0..1u32 << sectors {
        let mut image = before.clone();
        image.resize(after.len(), 0);
        for sector in (0..sectors).filter(|sector| survivors & (1 << sector) != 0) {
            let start = (first + sector) * 512;
            let end = (start + 512).min(after.len());
            image[start..end].copy_from_slice(&after[start..end]);
        }
        fixture.set_bytes(&image);
        let (_, _, set, recovery) = fixture.open().unwrap();
        if survivors + 1 == 1 << sectors {
            assert_eq!((set, recovery.dropped_bytes), (whole.clone(), 0));
        } else {
            assert_eq!(set, expected, "sectors {survivors:#b}");
            assert_eq!(
                recovery.dropped_bytes > 0,
                survivors != 0,
                "sectors {survivors:#b}"
            );
        }
    }
}

#[test]
fn damage_before_a_synced_group_is_refused_with_what_was_lost() {
    let fixture = Fixture::new();
    let mut map = fixture.create();
    let mut set = SectorSet::empty();
    for n in 1..=5 {
        apply(&mut map, &mut set, &group(n));
    }
    let mut bytes = fixture.bytes();
    // The first record of group 3: behind groups 1 (2 records, 1 commit) and 2 (4 records, 1 commit).
    let start = usize::try_from(map.header.checkpoint.journal_offset()).unwrap();
    let at = start + (group(1).len() + group(2).len() + 2) * 32;
    bytes[at + 17] ^= 0x40;
    fixture.set_bytes(&bytes);
    let error = fixture.open().unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    let text = error.to_string();
    for part in [
        "at byte ",
        "commits 3 to 5",
        "commits up to 2",
        &fixture.header.layer.to_string(),
    ] {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    assert_eq!(fixture.bytes(), bytes, "a refused map is left as it is");
}

#[test]
fn a_record_behind_the_next_commit_proves_damage_too() {
    // Group 2 was synced and damaged, group 3 is torn: its first record is there and its commit is not.
    let fixture = Fixture::new();
    let mut map = fixture.create();
    let mut set = SectorSet::empty();
    apply(&mut map, &mut set, &group(1));
    apply(&mut map, &mut set, &group(2));
    let (offset, bytes) = map.append(&group(3));
    map.file().write_at(&bytes[..32], offset).unwrap();
    let mut image = fixture.bytes();
    let start = usize::try_from(map.header.checkpoint.journal_offset()).unwrap();
    image[start + (group(1).len() + 1) * 32] ^= 1;
    fixture.set_bytes(&image);
    assert!(matches!(fixture.open(), Err(Error::Corrupt { .. })));
}

#[test]
fn a_damaged_checkpoint_names_layer_and_bitmap() {
    let fixture = Fixture::new();
    let mut set = SectorSet::empty();
    set.apply(&record(RecordKind::Data, 0, 80));
    set.apply(&record(RecordKind::Zero, 800, 80));
    MapFile::create(&fixture.store, &fixture.header, &set).unwrap();
    let whole = fixture.bytes();
    let (map, ..) = fixture.open().unwrap();
    let data = map.header.checkpoint.offset();
    let zero = data + u64::from_le_bytes(whole[160..168].try_into().unwrap());
    for (offset, what) in [(data + 3, "data bitmap"), (zero + 3, "zero bitmap")] {
        let mut bytes = whole.clone();
        bytes[usize::try_from(offset).unwrap()] ^= 0x10;
        fixture.set_bytes(&bytes);
        let text = fixture.open().unwrap_err().to_string();
        assert!(text.contains(what), "{text}");
        assert!(text.contains(&fixture.header.layer.to_string()), "{text}");
    }
    fixture.set_bytes(&whole[..4096 + 10]);
    assert!(
        fixture
            .open()
            .unwrap_err()
            .to_string()
            .contains("the file ends inside of its checkpoint")
    );
}

#[test]
fn a_map_is_replaced_in_the_order_that_survives_a_crash() {
    let fixture = Fixture::new();
    let mut map = fixture.create();
    let mut set = SectorSet::empty();
    apply(&mut map, &mut set, &group(1));
    fixture.media.take_log();
    let sealed = MapHeader {
        state: MapState::Sealed,
        snapshot: "monday".into(),
        group: Uuid::from_u128(77),
        snapshot_ns: 5,
        ..fixture.header.clone()
    };
    let new = map.replace(&fixture.store, &sealed, &set).unwrap();
    assert_eq!(
        fixture.media.take_log(),
        [
            "write map.new".to_owned(),
            "sync map.new".into(),
            "rename map.new map".into(),
            format!("sync {}", fixture.header.layer)
        ]
    );
    assert_eq!(
        (new.incarnation(), new.epoch(), new.journal_bytes()),
        (2, Epoch(0), 0)
    );
    assert_eq!(
        MapFile::read_header(&fixture.store, sealed.layer).unwrap(),
        sealed
    );
    let contents = MapFile::read(&fixture.store, sealed.layer).unwrap();
    assert_eq!(contents.set, set);
}

#[test]
fn a_full_disk_while_replacing_leaves_the_old_map_in_force() {
    let fixture = Fixture::new();
    let mut map = fixture.create();
    let mut set = SectorSet::empty();
    apply(&mut map, &mut set, &group(1));
    for (step, safe) in [
        ("write map.new".to_owned(), true),
        ("sync map.new".into(), true),
        (format!("open {}", fixture.header.layer), true),
        ("rename map.new map".into(), false),
        (format!("sync {}", fixture.header.layer), false),
    ] {
        fixture.media.fail(&step);
        let error = map
            .replace(&fixture.store, &fixture.header, &set)
            .unwrap_err();
        assert_eq!(error.old_in_force, safe, "{step}");
        assert!(matches!(error.error, Error::Io { .. }));
        if safe {
            assert!(
                !fixture
                    .dir
                    .path()
                    .join(new_map_path(fixture.header.layer))
                    .exists(),
                "{step}"
            );
            apply(&mut map, &mut set, &group(2));
            assert_eq!(
                MapFile::read(&fixture.store, fixture.header.layer)
                    .unwrap()
                    .set,
                set
            );
        }
    }
}

#[test]
fn the_leftover_of_a_replacement_is_ignored_and_removed() {
    let fixture = Fixture::new();
    let mut map = fixture.create();
    let mut set = SectorSet::empty();
    apply(&mut map, &mut set, &group(1));
    let leftover = fixture.dir.path().join(new_map_path(fixture.header.layer));
    fs::write(&leftover, b"half a map").unwrap();
    assert_eq!(fixture.open().unwrap().2, set);
    assert!(!leftover.exists());
}

#[test]
fn a_map_in_the_wrong_directory_is_refused() {
    let fixture = Fixture::new();
    fixture.create();
    let other = LayerId(Uuid::from_u128(0xb));
    fixture.store.create_dir(&layer_dir(other)).unwrap();
    fs::copy(
        fixture.dir.path().join(map_path(fixture.header.layer)),
        fixture.dir.path().join(map_path(other)),
    )
    .unwrap();
    assert!(matches!(
        MapFile::open(&fixture.store, other),
        Err(Error::Corrupt { .. })
    ));
}

#[test]
fn a_sealed_map_has_nothing_behind_its_checkpoint() {
    let mut fixture = Fixture::new();
    fixture.header.state = MapState::Sealed;
    fixture.create();
    let mut bytes = fixture.bytes();
    bytes.resize(bytes.len() + 4096, 0);
    fixture.set_bytes(&bytes);
    fixture.open().unwrap();
    bytes.push(1);
    fixture.set_bytes(&bytes);
    assert!(matches!(fixture.open(), Err(Error::Corrupt { .. })));
}

#[test]
#[should_panic(expected = "a sealed map takes no records")]
fn a_sealed_map_takes_no_records() {
    let mut fixture = Fixture::new();
    fixture.header.state = MapState::Sealed;
    fixture.create().append(&group(1));
}

#[test]
fn a_raw_base_holds_everything() {
    let mut fixture = Fixture::new();
    fixture.header.state = MapState::Sealed;
    fixture.header.kind = LayerKind::RawBase(RawBase {
        path: "/images/debian.raw".into(),
        len: 10_001 * 512,
        mtime_ns: -5,
    });
    fixture.create();
    let (_, header, set, _) = fixture.open().unwrap();
    assert_eq!(header, fixture.header);
    assert_eq!(set, SectorSet::everything(Sector(10_001)));
    assert_eq!(fixture.bytes().len(), 4096);
}

#[test]
fn a_header_that_could_not_be_read_back_is_never_written() {
    let fixture = Fixture::new();
    let bad: [fn(&mut MapHeader); 6] = [
        |header| header.size = Sector(0),
        |header| header.size = Sector((1 << 37) + 1),
        |header| header.volume = "x".repeat(65),
        |header| header.snapshot = "a\0b".into(),
        |header| header.parent = Some(header.layer),
        |header| {
            header.kind = LayerKind::RawBase(RawBase {
                path: "relative".into(),
                len: 10_001 * 512,
                mtime_ns: 0,
            });
            header.state = MapState::Sealed;
        },
    ];
    for change in bad {
        let mut header = fixture.header.clone();
        change(&mut header);
        let error = MapFile::create(&fixture.store, &header, &SectorSet::empty()).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
    }
    assert!(
        !fixture
            .dir
            .path()
            .join(map_path(fixture.header.layer))
            .exists()
    );
}

#[test]
fn a_successor_says_what_was_appended_while_it_was_written_and_what_it_was_given() {
    let fixture = Fixture::new();
    let (mut map, mut said) = (fixture.create(), SectorSet::empty());
    apply(&mut map, &mut said, &group(1));
    let mark = map.mark();
    // More may be in the file already, whole or in part.
    apply(&mut map, &mut said, &group(2));
    let mut header = fixture.header.clone();
    header.size = Sector(20_000);
    let next = Successor::write(&fixture.store, &header, mark).unwrap();
    apply(&mut map, &mut said, &group(3));
    let more = [record(RecordKind::Data, 19_000, 8)];
    let next = next.take_over(&map, more.into_iter()).unwrap();
    assert_eq!(next.incarnation(), map.incarnation() + 1);
    said.apply(&more[0]);
    drop((map, next));
    let (_, found, set, _) = fixture.open().unwrap();
    assert_eq!((found.size, set), (Sector(20_000), said));
}

#[test]
fn a_successor_knows_nothing_of_groups_that_were_taken_back() {
    let fixture = Fixture::new();
    let (mut map, mut said) = (fixture.create(), SectorSet::empty());
    apply(&mut map, &mut said, &group(1));
    let next = Successor::write(&fixture.store, &fixture.header, map.mark()).unwrap();
    let end = map.end();
    apply(&mut map, &mut SectorSet::empty(), &group(2));
    map.take_back(end).unwrap();
    apply(&mut map, &mut said, &group(4));
    drop(next.take_over(&map, std::iter::empty()).unwrap());
    assert_eq!(fixture.open().unwrap().2, said);
}

#[test]
fn a_successor_that_is_given_up_leaves_the_map_and_nothing_else() {
    let fixture = Fixture::new();
    let (mut map, mut said) = (fixture.create(), SectorSet::empty());
    apply(&mut map, &mut said, &group(1));
    let (mark, before) = (map.mark(), fixture.bytes());
    let new = fixture.dir.path().join(new_map_path(fixture.header.layer));
    let next = Successor::write(&fixture.store, &fixture.header, mark).unwrap();
    assert!(new.exists());
    drop(next);
    assert!(!new.exists());

    // The map has been replaced meanwhile.
    let next = Successor::write(&fixture.store, &fixture.header, mark).unwrap();
    let set = SectorSet::empty();
    let other = map.replace(&fixture.store, &fixture.header, &set).unwrap();
    let failure = next.take_over(&other, std::iter::empty()).unwrap_err();
    assert!(failure.old_in_force, "{failure:?}");
    assert!(!new.exists());
    Successor::write(&fixture.store, &fixture.header, mark).unwrap_err();

    // What it is to copy is not there.
    fixture.set_bytes(&before);
    let mut map = fixture.open().unwrap().0;
    map.append(&group(2));
    Successor::write(&fixture.store, &fixture.header, map.mark()).unwrap_err();
    let next = Successor::write(&fixture.store, &fixture.header, mark).unwrap();
    let failure = next.take_over(&map, std::iter::empty()).unwrap_err();
    assert!(failure.old_in_force, "{failure:?}");
}
