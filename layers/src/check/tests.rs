//! Stores with one thing wrong each, and the catalog rebuilt.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::fs;
use std::path::PathBuf;

use super::*;
use crate::catalog::sqlite::SqliteCatalog;
use crate::catalog::{Catalog, Change, Rows, SnapshotRow, VolumeKind, VolumeRow};
use crate::file::FileStat;
use crate::map::record::{MapRecord, RecordKind};
use crate::mapfile::new_map_path;
use crate::store::Attachment;
use crate::test_media::TestMedia;
use crate::units::{Sector, SectorRange, StoreId};

const SECTORS: u64 = 1003;

mod jobs;

fn id(n: u128) -> LayerId {
    LayerId(Uuid::from_u128(n))
}

/// base 1 <- layer 2 (snapshot vm@monday) <- layer 3 (active layer of vm), and an empty layer 4 (active layer of other).
struct Fixture {
    dir: tempfile::TempDir,
    media: Arc<dyn Media>,
    base: PathBuf,
}

fn header(n: u128, parent: Option<u128>, volume: &str, snapshot: &str) -> MapHeader {
    MapHeader {
        store: StoreId(Uuid::from_u128(0x5709)),
        layer: id(n),
        parent: parent.map(id),
        size: Sector(SECTORS),
        kind: LayerKind::Differencing,
        state: if snapshot.is_empty() {
            MapState::Active
        } else {
            MapState::Sealed
        },
        volume: volume.into(),
        volume_kind: VolumeKind::Normal,
        snapshot: snapshot.into(),
        group: if snapshot.is_empty() {
            Uuid::nil()
        } else {
            Uuid::from_u128(0x9)
        },
        created_ns: 100 + u64::try_from(n).unwrap(),
        snapshot_ns: if snapshot.is_empty() { 0 } else { 103 },
    }
}

fn record(kind: RecordKind, start: u64, count: u64) -> MapRecord {
    MapRecord {
        kind,
        range: SectorRange::new(Sector(start), count).unwrap(),
    }
}

/// A few sectors of data, and zeroes up to the end of the last cluster.
fn some() -> SectorSet {
    let mut set = SectorSet::empty();
    set.apply(&record(RecordKind::Zero, 800, 208));
    set.apply(&record(RecordKind::Data, 5, 20));
    set.apply(&record(RecordKind::Data, 1001, 2));
    set
}

fn stat(media: &Arc<dyn Media>, path: &Path) -> FileStat {
    media.stat(path).unwrap()
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("image.raw");
        fs::write(&base, vec![1; usize::try_from(SECTORS * 512).unwrap()]).unwrap();
        let store = dir.path().join("store");
        fs::create_dir(&store).unwrap();
        let media: Arc<dyn Media> = Arc::new(TestMedia::new(&store));
        let raw = RawBase {
            path: base.clone(),
            len: SECTORS * 512,
            mtime_ns: stat(&media, &base).mtime_ns,
        };
        let mut base_header = header(1, None, "", "");
        base_header.kind = LayerKind::RawBase(raw.clone());
        base_header.state = MapState::Sealed;
        let fixture = Self { dir, media, base };
        fixture.layer(&base_header, &SectorSet::empty());
        fixture.layer(&header(2, Some(1), "vm", "monday"), &some());
        fixture.layer(&header(3, Some(2), "vm", ""), &some());
        fixture.layer(&header(4, None, "other", ""), &SectorSet::empty());

        let row = |n, parent: Option<u128>, state, base| LayerRow {
            id: id(n),
            parent: parent.map(id),
            size: Sector(SECTORS),
            state,
            base,
            created_ns: 100 + u64::try_from(n).unwrap(),
        };
        let volume = |name: &str, active, created_ns| VolumeRow {
            name: name.into(),
            active: id(active),
            size: Sector(SECTORS),
            created_ns,
            attachment: None,
            kind: VolumeKind::Normal,
            armed: false,
            attached_from: None,
            failed: None,
        };
        let empty = CatalogState::empty(StoreId(Uuid::from_u128(0x5709)));
        SqliteCatalog::create(&fixture.store(), &empty)
            .unwrap()
            .commit(&[
                Change::AddLayer(row(1, None, LayerState::Sealed, Some(raw))),
                Change::AddLayer(row(2, Some(1), LayerState::Sealed, None)),
                Change::AddLayer(row(3, Some(2), LayerState::Active, None)),
                Change::AddLayer(row(4, None, LayerState::Active, None)),
                Change::AddVolume(volume("vm", 3, 102)),
                Change::AddVolume(volume("other", 4, 104)),
                Change::AddSnapshot(SnapshotRow {
                    volume: "vm".into(),
                    name: "monday".into(),
                    layer: id(2),
                    group: Uuid::from_u128(0x9),
                    created_ns: 103,
                    size: Sector(SECTORS),
                }),
            ])
            .unwrap();
        fixture
    }

    fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn path(&self, relative: &Path) -> PathBuf {
        self.store().join(relative)
    }

    /// A layer's directory with a map, and a data file that is long enough.
    fn layer(&self, header: &MapHeader, set: &SectorSet) {
        self.media.create_dir(&layer_dir(header.layer)).unwrap();
        MapFile::create(&self.media, header, set).unwrap();
        if header.kind == LayerKind::Differencing {
            let data = fs::File::create(self.path(&data_path(header.layer))).unwrap();
            data.set_len(header.size.0 * 512).unwrap();
        }
    }

    /// Writes another map over a layer's.
    fn remap(&self, header: &MapHeader, set: &SectorSet) {
        MapFile::create(&self.media, header, set).unwrap();
    }

    fn check(&self) -> Report {
        check(&self.store(), &self.media, CheckOptions::default()).unwrap()
    }

    fn catalog(&self) -> CatalogState {
        SqliteCatalog::open(&self.store()).unwrap().state().clone()
    }

    fn commit(&self, changes: &[Change]) {
        SqliteCatalog::open(&self.store())
            .unwrap()
            .commit(changes)
            .unwrap();
    }

    fn rebuild(&self) -> Result<Rebuilt> {
        rebuild_catalog(&self.store(), &self.media)
    }
}

/// Changes a fixture.
type Harm = fn(&Fixture);

/// Damage: what is done, the severity and layer of the one finding, a part of its text.
fn damages() -> Vec<(Harm, Severity, Option<u128>, &'static str)> {
    use Severity::{Error, Note, Warning};
    vec![
        (
            |f| fs::remove_dir_all(f.path(&layer_dir(id(3)))).unwrap(),
            Error,
            Some(3),
            "is missing",
        ),
        (
            |f| fs::remove_file(f.path(&map_path(id(3)))).unwrap(),
            Error,
            Some(3),
            "open",
        ),
        (
            |f| fs::remove_file(f.path(&data_path(id(3)))).unwrap(),
            Error,
            Some(3),
            "data",
        ),
        (
            |f| f.remap(&header(3, None, "vm", ""), &some()),
            Error,
            Some(3),
            "parent",
        ),
        (
            |f| {
                let mut header = header(3, Some(2), "vm", "");
                header.size = Sector(1008);
                f.remap(&header, &some());
            },
            Note,
            Some(3),
            "its disk got 1003 sectors, and its map still says 1008",
        ),
        (
            |f| {
                let mut header = header(3, Some(2), "vm", "");
                header.store = StoreId(Uuid::from_u128(1));
                f.remap(&header, &some());
            },
            Error,
            Some(3),
            "store: ",
        ),
        (
            |f| f.remap(&header(3, Some(2), "vm", "x"), &some()),
            Error,
            Some(3),
            "state: ",
        ),
        (
            |f| f.remap(&header(2, Some(1), "vm", ""), &some()),
            Error,
            Some(2),
            "state: the catalog says Sealed",
        ),
        (
            |f| {
                let path = f.path(&map_path(id(2)));
                let mut bytes = fs::read(&path).unwrap();
                bytes[4100] ^= 1;
                fs::write(path, bytes).unwrap();
            },
            Error,
            Some(2),
            "checkpoint's data bitmap",
        ),
        (
            |f| {
                let path = f.path(&map_path(id(2)));
                let mut bytes = fs::read(&path).unwrap();
                bytes[8] = 9;
                bytes[12..16].fill(0);
                let crc = crc32c::crc32c(&bytes[..4096]);
                bytes[12..16].copy_from_slice(&crc.to_le_bytes());
                fs::write(path, bytes).unwrap();
            },
            Error,
            Some(2),
            "map version 9",
        ),
        (
            |f| {
                let (mut map, ..) = MapFile::open(&f.media, id(3)).unwrap();
                let (offset, bytes) = map.append(&[record(RecordKind::Data, 0, 8)]);
                map.file().write_at(&bytes[..40], offset).unwrap();
            },
            Warning,
            Some(3),
            "37 bytes of a flush",
        ),
        (
            |f| {
                let data = fs::File::options()
                    .write(true)
                    .open(f.path(&data_path(id(2))));
                data.unwrap().set_len(1008 * 512 + 1).unwrap();
            },
            Note,
            Some(2),
            "has room for",
        ),
        (
            |f| {
                let data = fs::File::options()
                    .write(true)
                    .open(f.path(&data_path(id(2))));
                data.unwrap().set_len(24 * 512).unwrap();
            },
            Error,
            Some(2),
            "was cut off",
        ),
        (
            |f| {
                fs::write(
                    &f.base,
                    vec![1; usize::try_from(SECTORS * 512 + 512).unwrap()],
                )
                .unwrap()
            },
            Error,
            Some(1),
            "its size went from",
        ),
        (
            |f| {
                let file = fs::File::options().write(true).open(&f.base).unwrap();
                file.set_modified(std::time::SystemTime::UNIX_EPOCH)
                    .unwrap();
            },
            Error,
            Some(1),
            "its time of modification went from",
        ),
        (
            |f| fs::remove_file(&f.base).unwrap(),
            Error,
            Some(1),
            "image.raw",
        ),
        (
            |f| f.layer(&header(8, None, "lost", ""), &SectorSet::empty()),
            Warning,
            Some(8),
            "it was made for volume \"lost\"",
        ),
        (
            |f| fs::create_dir(f.path(&layer_dir(id(8)))).unwrap(),
            Warning,
            Some(8),
            "no readable map",
        ),
        (
            |f| fs::write(f.path(&new_map_path(id(3))), "x").unwrap(),
            Note,
            Some(3),
            "map.new",
        ),
        (
            |f| fs::write(f.path(&layer_dir(id(3)).join("notes.txt")), "x").unwrap(),
            Note,
            Some(3),
            "notes.txt",
        ),
        (
            |f| fs::create_dir(f.path(Path::new("layers/odd"))).unwrap(),
            Note,
            None,
            "odd is not a layer",
        ),
        (
            |f| fs::write(f.path(Path::new("catalog.db.new")), "").unwrap(),
            Note,
            None,
            "catalog.db.new",
        ),
        (
            |f| {
                f.commit(&[
                    Change::SetLayerState {
                        layer: id(4),
                        state: LayerState::Sealing,
                    },
                    Change::RemoveVolume("other".into()),
                ]);
            },
            Note,
            Some(4),
            "sealing was interrupted",
        ),
    ]
}

#[test]
fn a_sound_store_has_no_findings() {
    let fixture = Fixture::new();
    let report = fixture.check();
    assert_eq!(report.findings, []);
    assert_eq!((report.layers, report.volumes, report.snapshots), (4, 2, 1));
    assert!(report.is_sound());
}

#[test]
fn every_damage_is_one_finding() {
    for (harm, severity, layer, part) in damages() {
        let fixture = Fixture::new();
        harm(&fixture);
        let report = fixture.check();
        assert_eq!(report.findings.len(), 1, "{part}: {:#?}", report.findings);
        let finding = &report.findings[0];
        assert!(
            finding.what.contains(part),
            "{part:?} is not in {:?}",
            finding.what
        );
        assert_eq!(
            (finding.severity, finding.layer),
            (severity, layer.map(id)),
            "{part}"
        );
        assert!(!finding.fix.is_empty());
        assert_eq!(report.is_sound(), severity < Severity::Error);
    }
}

#[test]
fn a_lost_catalog_is_a_finding_and_the_layers_are_still_checked() {
    let fixture = Fixture::new();
    fs::write(
        fixture.path(Path::new(CATALOG_NAME)),
        "garbage".repeat(2000),
    )
    .unwrap();
    fs::remove_dir_all(fixture.path(&layer_dir(id(2)))).unwrap();
    let report = fixture.check();
    assert!(report.findings[0].fix.contains("--rebuild-catalog"));
    assert!(report.findings[1].what.contains("has no directory"));
    assert_eq!(report.findings[1].layer, Some(id(3)));
    assert_eq!((report.findings.len(), report.layers), (2, 3));
}

#[test]
fn headers_alone_say_nothing_of_checkpoints() {
    let fixture = Fixture::new();
    let path = fixture.path(&map_path(id(2)));
    let mut bytes = fs::read(&path).unwrap();
    bytes[4100] ^= 1;
    fs::write(path, bytes).unwrap();
    let options = CheckOptions {
        headers_only: true,
        ..CheckOptions::default()
    };
    assert!(
        check(&fixture.store(), &fixture.media, options)
            .unwrap()
            .is_sound()
    );
}

#[test]
fn a_store_in_use_or_none_at_all_is_not_checked() {
    let fixture = Fixture::new();
    let lock = StoreLock::acquire(&fixture.store()).unwrap();
    let run = || check(&fixture.store(), &fixture.media, CheckOptions::default());
    assert!(matches!(run(), Err(crate::Error::Busy { .. })));
    assert!(matches!(fixture.rebuild(), Err(crate::Error::Busy { .. })));
    drop(lock);
    run().unwrap();
    let empty = tempfile::tempdir().unwrap();
    let error = check(empty.path(), &fixture.media, CheckOptions::default()).unwrap_err();
    assert!(matches!(error, crate::Error::Invalid { .. }));
    assert_eq!(
        fs::read_dir(empty.path()).unwrap().count(),
        0,
        "not even a lock"
    );
}

#[test]
fn a_rebuilt_catalog_is_the_old_one_without_attachments() {
    let fixture = Fixture::new();
    let before = fixture.catalog();
    fixture.commit(&[Change::SetAttachment {
        volume: "vm".into(),
        attachment: Some(Attachment {
            socket: "/run/vm.sock".into(),
            queues: 1,
            read_only: false,
        }),
    }]);
    for number in 1..3 {
        let old = fs::read(fixture.path(Path::new(CATALOG_NAME))).unwrap();
        let rebuilt = fixture.rebuild().unwrap();
        assert_eq!(
            (rebuilt.layers, rebuilt.volumes, rebuilt.snapshots),
            (4, 2, 1)
        );
        assert!(
            rebuilt
                .notes
                .iter()
                .any(|note| note.contains("attachments"))
        );
        assert_eq!(fixture.catalog(), before);
        let backup = rebuilt.backup.unwrap();
        assert!(backup.ends_with(format!("catalog.db.bak-{number}")));
        assert_eq!(fs::read(backup).unwrap(), old);
    }
    fs::remove_file(fixture.path(Path::new(CATALOG_NAME))).unwrap();
    assert_eq!(fixture.rebuild().unwrap().backup, None);
    let mut after = Rows::clone(&fixture.catalog());
    // Nobody knows any more which numbers were given out.
    assert!(after.next_job > 1_000_000_000);
    after.next_job = before.next_job;
    assert_eq!(after, *before);
}

#[test]
fn a_stale_rollback_journal_cannot_undo_a_rebuilt_catalog() {
    let fixture = Fixture::new();
    let before = fixture.catalog();
    // What the rebuilt catalog does not have, so that an undone one is told from it.
    fixture.commit(&[Change::SetAttachment {
        volume: "vm".into(),
        attachment: Some(Attachment {
            socket: "/run/vm.sock".into(),
            queues: 1,
            read_only: false,
        }),
    }]);
    let path = fixture.path(Path::new(CATALOG_NAME));
    let journal = crate::catalog::sqlite::journal_of(&path);
    let mut db = rusqlite::Connection::open(&path).unwrap();
    db.pragma_update(None, "cache_size", 1).unwrap();
    let transaction = db.transaction().unwrap();
    // So that the journal holds the page of the volumes, as it was.
    transaction
        .execute("UPDATE volumes SET queues = 7 WHERE queues > 0", [])
        .unwrap();
    for n in 0..500u128 {
        let uuid = Uuid::from_u128(1000 + n);
        let insert =
            "INSERT INTO layers (uuid, sectors, state, created_ns) VALUES (?1, 1, 'sealed', 0)";
        transaction.execute(insert, [uuid.as_bytes()]).unwrap();
    }
    let hot = fs::read(&journal).unwrap();
    drop(transaction);
    drop(db);
    fs::write(&journal, &hot).unwrap();
    let backup = fixture.rebuild().unwrap().backup.unwrap();
    assert!(!journal.exists());
    assert_eq!(
        fs::read(crate::catalog::sqlite::journal_of(&backup)).unwrap(),
        hot
    );
    let mut after = Rows::clone(&fixture.catalog());
    after.next_job = before.next_job;
    assert_eq!(after, *before);
}

#[test]
fn a_snapshot_that_was_under_way_keeps_its_data_and_loses_its_name() {
    // The new layers are there and the catalog's commit may or may not have happened; the old layer is not sealed.
    let fixture = Fixture::new();
    fixture.layer(&header(5, Some(3), "vm", ""), &SectorSet::empty());
    let rebuilt = fixture.rebuild().unwrap();
    let state = fixture.catalog();
    assert_eq!(state.volumes["vm"].active, id(5));
    assert_eq!(state.layers[&id(3)].state, LayerState::Sealing);
    assert_eq!(state.snapshots.len(), 1);
    assert!(
        rebuilt
            .notes
            .iter()
            .any(|note| note.contains("was being sealed"))
    );
}

#[test]
fn an_earlier_snapshot_of_the_same_name_stays_without_it() {
    let fixture = Fixture::new();
    let mut newer = header(6, Some(1), "vm", "monday");
    newer.snapshot_ns = 500;
    fixture.layer(&newer, &some());
    let rebuilt = fixture.rebuild().unwrap();
    let state = fixture.catalog();
    assert_eq!(state.snapshot("vm", "monday").unwrap().layer, id(6));
    assert!(
        rebuilt
            .notes
            .iter()
            .any(|note| note.contains(&id(2).to_string()))
    );
}

#[test]
fn layers_of_a_deleted_volume_stay_without_names() {
    let fixture = Fixture::new();
    fixture.layer(&header(6, Some(1), "deleted", "x"), &some());
    fs::create_dir(fixture.path(&layer_dir(id(7)))).unwrap();
    let rebuilt = fixture.rebuild().unwrap();
    assert_eq!((rebuilt.layers, rebuilt.snapshots), (5, 1));
    assert!(rebuilt.notes.iter().any(|note| note.contains("deleted@x")));
    assert!(rebuilt.notes.iter().any(|note| note.contains("has no map")));
}

#[test]
fn headers_that_contradict_each_other_are_refused_and_nothing_changes() {
    let cases: Vec<(Harm, &str)> = vec![
        (
            |f| f.layer(&header(5, Some(2), "vm", ""), &some()),
            "both say that they are the active layer",
        ),
        (
            |f| f.layer(&header(5, Some(9), "x", ""), &some()),
            "which is not there",
        ),
        (
            |f| {
                let mut header = header(5, None, "x", "");
                header.store = StoreId(Uuid::from_u128(1));
                f.layer(&header, &some());
            },
            "of two stores",
        ),
        (
            |f| {
                f.layer(&header(5, Some(6), "x", "a"), &some());
                f.layer(&header(6, Some(5), "x", "b"), &some());
            },
            "its own ancestor",
        ),
        (
            |f| f.layer(&header(5, Some(1), "vm", "monday"), &some()),
            "of the same instant",
        ),
        (
            |f| fs::write(f.path(&map_path(id(2))), vec![7; 5000]).unwrap(),
            "not a map",
        ),
    ];
    for (harm, part) in cases {
        let fixture = Fixture::new();
        harm(&fixture);
        let path = fixture.path(Path::new(CATALOG_NAME));
        let before = fs::read(&path).unwrap();
        let error = fixture.rebuild().unwrap_err();
        assert!(matches!(error, crate::Error::Corrupt { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
        assert_eq!(fs::read(&path).unwrap(), before);
        assert!(!fixture.path(Path::new("catalog.db.bak-1")).exists());
    }
    let fixture = Fixture::new();
    for n in 1..=4 {
        fs::remove_dir_all(fixture.path(&layer_dir(id(n)))).unwrap();
    }
    assert!(matches!(
        fixture.rebuild(),
        Err(crate::Error::Invalid { .. })
    ));
}

#[test]
fn the_golden_store_is_sound_but_for_its_base() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/store");
    let dir = tempfile::tempdir().unwrap();
    let media: Arc<dyn Media> = Arc::new(TestMedia::new(dir.path()));
    fs::copy(golden.join("catalog.db"), dir.path().join("catalog.db")).unwrap();
    for entry in fs::read_dir(golden.join("layers")).unwrap() {
        let name = entry.unwrap().file_name();
        let (from, to) = (
            golden.join("layers").join(&name),
            dir.path().join("layers").join(&name),
        );
        fs::create_dir(&to).unwrap();
        fs::copy(from.join("map"), to.join("map")).unwrap();
        // 100 MB of nothing: the golden store keeps its data files to itself.
        if !name.to_str().unwrap().starts_with("1111") {
            let data = fs::File::create(to.join("data")).unwrap();
            data.set_len(204_803 * 512).unwrap();
        }
    }
    let report = check(dir.path(), &media, CheckOptions::default()).unwrap();
    assert_eq!((report.layers, report.volumes, report.snapshots), (3, 1, 1));
    assert_eq!(report.findings.len(), 1, "{:#?}", report.findings);
    assert!(report.findings[0].what.contains("/images/debian-12.raw"));
    // Its headers make the same catalog again, but for the attachment.
    let before = SqliteCatalog::open(dir.path()).unwrap().state().clone();
    rebuild_catalog(dir.path(), &media).unwrap();
    let mut after = Rows::clone(SqliteCatalog::open(dir.path()).unwrap().state());
    assert_eq!(after.volumes["vm"].attachment, None);
    after.volumes.get_mut("vm").unwrap().attachment = before.volumes["vm"].attachment.clone();
    assert_eq!(after, *before);
}

#[test]
fn what_a_dead_daemon_left_in_the_cache_is_told_and_is_no_damage() {
    use std::sync::atomic::Ordering;

    use crate::cache::arena::{Arena, Place, last};
    use crate::cache::set::FrameKey;
    use crate::units::Cluster;

    let fixture = Fixture::new();
    let cache = tempfile::tempdir().unwrap();
    let told = || unwritten(&fixture.store(), cache.path().to_owned()).unwrap();
    assert_eq!(told(), (0, None), "there is no cache");

    let store = fixture.catalog().store;
    let place = Place::new(&fixture.store(), store, Some(cache.path().to_owned())).unwrap();
    let arena = Arena::create(&place, 1).unwrap();
    assert_eq!(told(), (0, None), "no daemon has used it");
    last::write(&fixture.store(), &place.path()).unwrap();
    // Two clusters of the active layer; one of a sealed layer, which has been written; one of a layer that is gone.
    for (way, n) in [3, 3, 2, 77].into_iter().enumerate() {
        let number = arena.numbers().number(id(n)).unwrap();
        let key = FrameKey::new(number, Cluster(way as u64));
        let set = arena.all().first().unwrap();
        set.keys[way].store(key.word(), Ordering::Relaxed);
        set.states[way].store(0x0101, Ordering::Relaxed);
    }
    let (clusters, finding) = told();
    let finding = finding.unwrap();
    assert_eq!(
        (clusters, finding.severity),
        (0, Severity::Warning),
        "it is in use"
    );
    drop(arena);

    let (clusters, finding) = told();
    let finding = finding.unwrap();
    assert_eq!((clusters, finding.severity), (2, Severity::Note));
    assert!(
        finding.what.starts_with("2 clusters were written"),
        "{finding:?}"
    );
    assert!(finding.fix.contains("start the daemon"), "{finding:?}");

    fs::write(place.path(), [0xff; 8192]).unwrap();
    let (_, finding) = told();
    assert_eq!(finding.unwrap().severity, Severity::Error);
}
