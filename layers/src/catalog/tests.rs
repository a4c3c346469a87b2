//! The rules of a catalog, and what its two implementations promise.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

mod lifecycle;
mod many;
// What it compares is compared in debug builds only.
#[cfg(debug_assertions)]
mod random;

use std::fs;
use std::path::Path;

use uuid::Uuid;

use super::memory::{CommitPoint, MemoryCatalog, MemoryDisk};
use super::sqlite::{CATALOG_NAME, SCHEMA, SCHEMA_VERSION, SqliteCatalog, journal_of};
use super::*;
use crate::error::Error;

fn id(n: u128) -> LayerId {
    LayerId(Uuid::from_u128(n))
}

fn layer(n: u128, parent: Option<u128>, state: LayerState) -> LayerRow {
    LayerRow {
        id: id(n),
        parent: parent.map(id),
        size: Sector(1000),
        state,
        base: None,
        created_ns: 7,
    }
}

fn base(n: u128) -> LayerRow {
    LayerRow {
        base: Some(RawBase {
            path: "/images/\u{e9}t\u{e9}.raw".into(),
            len: 512_000,
            mtime_ns: -1,
        }),
        ..layer(n, None, LayerState::Sealed)
    }
}

fn volume(name: &str, active: u128) -> VolumeRow {
    VolumeRow {
        name: name.into(),
        active: id(active),
        size: Sector(1000),
        created_ns: 8,
        attachment: None,
        kind: VolumeKind::Normal,
        armed: false,
        attached_from: None,
        failed: None,
    }
}

fn snapshot(name: &str, layer: u128, created_ns: u64) -> SnapshotRow {
    SnapshotRow {
        volume: "vm".into(),
        name: name.into(),
        layer: id(layer),
        group: Uuid::from_u128(99),
        created_ns,
        size: Sector(1000),
    }
}

/// A volume over a raw base.
fn start() -> Vec<Change> {
    vec![
        Change::AddLayer(base(1)),
        Change::AddLayer(layer(2, Some(1), LayerState::Active)),
        Change::AddVolume(volume("vm", 2)),
    ]
}

/// The transaction of a snapshot.
fn take_snapshot(name: &str, old: u128, new: u128, at: u64) -> Vec<Change> {
    vec![
        Change::SetLayerState {
            layer: id(old),
            state: LayerState::Sealing,
        },
        Change::AddLayer(layer(new, Some(old), LayerState::Active)),
        Change::SetActive {
            volume: "vm".into(),
            layer: id(new),
        },
        Change::AddSnapshot(snapshot(name, old, at)),
    ]
}

fn attach(socket: &str) -> Change {
    Change::SetAttachment {
        volume: "vm".into(),
        attachment: Some(Attachment {
            socket: socket.into(),
            queues: 4,
            read_only: true,
        }),
    }
}

/// Every kind of change, in four commits.
fn history() -> Vec<Vec<Change>> {
    vec![
        start(),
        take_snapshot("monday", 2, 3, 50),
        vec![
            Change::SetLayerState {
                layer: id(2),
                state: LayerState::Sealed,
            },
            attach("/run/vm.sock"),
        ],
        // An older instant that is added later: kept in order all the same.
        take_snapshot("sunday", 3, 4, 40),
        vec![
            Change::RemoveSnapshot {
                volume: "vm".into(),
                name: "monday".into(),
            },
            Change::AddLayer(layer(5, None, LayerState::Active)),
            Change::AddVolume(volume("gone", 5)),
        ],
        // The parts of a volume may go in any order within a commit.
        vec![
            Change::RemoveLayer(id(5)),
            Change::RemoveVolume("gone".into()),
        ],
    ]
}

fn new_store() -> CatalogState {
    CatalogState::empty(StoreId(Uuid::from_u128(0x5709)))
}

/// Commits to both catalogs, which hold the same each time, also when they are opened anew. Returns what they hold at the end.
fn commit_to_both(
    history: Vec<Vec<Change>>,
    mut look: impl FnMut(&CatalogState, &MemoryDisk),
) -> CatalogState {
    let dir = tempfile::tempdir().unwrap();
    let disk = MemoryDisk::new(new_store());
    let mut memory = MemoryCatalog::open(&disk).unwrap();
    let mut sqlite = SqliteCatalog::create(dir.path(), &new_store()).unwrap();
    for changes in history {
        memory.commit(&changes).unwrap();
        sqlite.commit(&changes).unwrap();
        assert_eq!(memory.state(), sqlite.state());
        drop(sqlite);
        sqlite = SqliteCatalog::open(dir.path()).unwrap();
        assert_eq!(memory.state(), sqlite.state());
        look(memory.state(), &disk);
    }
    sqlite.state().clone()
}

#[test]
fn both_catalogs_hold_what_was_committed() {
    let state = commit_to_both(history(), |state, disk| {
        assert_eq!(MemoryCatalog::open(disk).unwrap().state(), state);
    });
    assert_eq!(state.layers.len(), 4);
    assert_eq!(state.volumes.len(), 1);
    assert_eq!(state.snapshots.len(), 1);
    assert_eq!(state.layers[&id(1)], base(1));
    assert_eq!(
        state
            .chain(id(4))
            .iter()
            .map(|row| row.id)
            .collect::<Vec<_>>(),
        [4, 3, 2, 1].map(id)
    );
    assert_eq!(
        state.children(id(2)).map(|row| row.id).collect::<Vec<_>>(),
        [id(3)]
    );
    let attachment = state.volumes["vm"].attachment.as_ref().unwrap();
    assert_eq!(
        (attachment.socket.as_path(), attachment.queues),
        (Path::new("/run/vm.sock"), 4)
    );
    assert!(attachment.read_only);
}

#[test]
fn changes_that_break_a_rule_change_nothing() {
    let cases: Vec<(&str, Vec<Change>)> = vec![
        ("layer twice", vec![Change::AddLayer(base(1))]),
        (
            "dangling parent",
            vec![Change::AddLayer(layer(9, Some(8), LayerState::Active))],
        ),
        (
            "child of an active layer",
            vec![Change::AddLayer(layer(9, Some(2), LayerState::Active))],
        ),
        (
            "circle",
            vec![
                Change::AddLayer(layer(8, Some(9), LayerState::Sealed)),
                Change::AddLayer(layer(9, Some(8), LayerState::Sealed)),
            ],
        ),
        ("layer in use", vec![Change::RemoveLayer(id(2))]),
        ("parent in use", vec![Change::RemoveLayer(id(1))]),
        ("no such layer", vec![Change::RemoveLayer(id(7))]),
        (
            "back in life",
            vec![Change::SetLayerState {
                layer: id(1),
                state: LayerState::Active,
            }],
        ),
        ("volume twice", vec![Change::AddVolume(volume("vm", 2))]),
        (
            "active layer of two",
            vec![Change::AddVolume(volume("other", 2))],
        ),
        (
            "sealed layer as active",
            vec![Change::SetActive {
                volume: "vm".into(),
                layer: id(1),
            }],
        ),
        ("no such volume", vec![Change::RemoveVolume("other".into())]),
        (
            "snapshot of an active layer",
            vec![Change::AddSnapshot(snapshot("s", 2, 1))],
        ),
        (
            "snapshot of another size",
            vec![Change::AddSnapshot(SnapshotRow {
                size: Sector(1),
                ..snapshot("s", 1, 1)
            })],
        ),
        (
            "snapshot of no volume",
            vec![Change::AddSnapshot(SnapshotRow {
                volume: "other".into(),
                ..snapshot("s", 1, 1)
            })],
        ),
        (
            "snapshot twice",
            vec![
                Change::AddSnapshot(snapshot("s", 1, 1)),
                Change::AddSnapshot(snapshot("s", 1, 2)),
            ],
        ),
        (
            "volume with snapshots",
            vec![
                Change::AddSnapshot(snapshot("s", 1, 1)),
                Change::RemoveVolume("vm".into()),
            ],
        ),
        ("no name", vec![Change::AddSnapshot(snapshot("", 1, 1))]),
        (
            "long name",
            vec![Change::AddSnapshot(snapshot(&"x".repeat(65), 1, 1))],
        ),
        (
            "no such snapshot",
            vec![Change::RemoveSnapshot {
                volume: "vm".into(),
                name: "s".into(),
            }],
        ),
        (
            "after 2262",
            vec![Change::AddSnapshot(snapshot("s", 1, 1 << 63))],
        ),
        (
            "size 0",
            vec![Change::AddLayer(LayerRow {
                size: Sector(0),
                ..layer(9, None, LayerState::Sealed)
            })],
        ),
        (
            "base of another size",
            vec![Change::AddLayer(LayerRow {
                size: Sector(999),
                ..base(9)
            })],
        ),
        (
            "base that is active",
            vec![Change::AddLayer(LayerRow {
                state: LayerState::Active,
                ..base(9)
            })],
        ),
    ];
    let dir = tempfile::tempdir().unwrap();
    let mut sqlite = SqliteCatalog::create(dir.path(), &new_store()).unwrap();
    sqlite.commit(&start()).unwrap();
    let before = sqlite.state().clone();
    for (what, changes) in cases {
        // A good change before the bad one must not stay either.
        let changes: Vec<_> = [attach("/run/x")].into_iter().chain(changes).collect();
        let error = sqlite.commit(&changes).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{what}: {error}");
        assert_eq!(*sqlite.state(), before, "{what}");
    }
    drop(sqlite);
    assert_eq!(*SqliteCatalog::open(dir.path()).unwrap().state(), before);
}

#[test]
fn the_schema_refuses_what_the_rules_refuse() {
    // The second line of defence: the same mistakes made behind the catalog's back.
    let dir = tempfile::tempdir().unwrap();
    let mut sqlite = SqliteCatalog::create(dir.path(), &new_store()).unwrap();
    sqlite.commit(&start()).unwrap();
    drop(sqlite);
    let db = rusqlite::Connection::open(dir.path().join(CATALOG_NAME)).unwrap();
    db.pragma_update(None, "foreign_keys", true).unwrap();
    for statement in [
        "UPDATE layers SET sectors = 0",
        "UPDATE layers SET state = 'odd'",
        "UPDATE layers SET parent = uuid",
        "UPDATE layers SET parent = x'00112233445566778899aabbccddeeff' WHERE parent IS NOT NULL",
        "UPDATE layers SET base_bytes = 512 WHERE base_path IS NOT NULL",
        "UPDATE layers SET base_mtime_ns = NULL WHERE base_path IS NOT NULL",
        "UPDATE volumes SET name = ''",
        "UPDATE volumes SET socket = x'2f'",
        "UPDATE volumes SET sectors = 'many'",
        "DELETE FROM layers",
        "INSERT INTO store (id, uuid) VALUES (2, x'00112233445566778899aabbccddeeff')",
    ] {
        assert!(db.execute(statement, []).is_err(), "{statement}");
    }
}

#[test]
fn rows_changed_behind_our_back_are_damage() {
    for statement in [
        "UPDATE layers SET state = 'sealed'",
        "UPDATE volumes SET sectors = 1001",
        "UPDATE volumes SET active = x'00112233445566778899aabbccddeeff'",
        "UPDATE layers SET uuid = x'00000000000000000000000000000000' WHERE parent IS NULL",
        "UPDATE layers SET created_ns = 'x'",
        "PRAGMA application_id = 1",
        "PRAGMA user_version = 0",
        "DELETE FROM store",
        "DROP TABLE snapshots",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut sqlite = SqliteCatalog::create(dir.path(), &new_store()).unwrap();
        sqlite.commit(&start()).unwrap();
        drop(sqlite);
        let db = rusqlite::Connection::open(dir.path().join(CATALOG_NAME)).unwrap();
        db.execute_batch(&format!(
            "PRAGMA foreign_keys = OFF; PRAGMA ignore_check_constraints = ON; PRAGMA writable_schema = ON; \
             UPDATE sqlite_schema SET sql = replace(sql, ' STRICT', '') WHERE type = 'table'; \
             PRAGMA writable_schema = RESET; {statement}"
        ))
        .unwrap();
        drop(db);
        let error = SqliteCatalog::open(dir.path()).unwrap_err();
        assert!(
            matches!(error, Error::Corrupt { .. }),
            "{statement}: {error}"
        );
    }
}

#[test]
fn a_newer_catalog_and_a_damaged_one_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    drop(SqliteCatalog::create(dir.path(), &new_store()).unwrap());
    let path = dir.path().join(CATALOG_NAME);
    let whole = fs::read(&path).unwrap();
    let db = rusqlite::Connection::open(&path).unwrap();
    db.pragma_update(None, "user_version", SCHEMA_VERSION + 1)
        .unwrap();
    drop(db);
    let error = SqliteCatalog::open(dir.path()).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    for bytes in [Vec::new(), b"not a database".repeat(1000), {
        let mut bytes = whole.clone();
        bytes[4096..].fill(0xaa);
        bytes
    }] {
        fs::write(&path, bytes).unwrap();
        let error = SqliteCatalog::open(dir.path()).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    }
    fs::remove_file(&path).unwrap();
    assert!(matches!(
        SqliteCatalog::open(dir.path()),
        Err(Error::Io { .. })
    ));
}

#[test]
fn a_store_with_layers_and_no_catalog_is_not_a_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let made = SqliteCatalog::open_or_create(dir.path()).unwrap();
    let store = made.state().store;
    drop(made);
    assert_eq!(
        SqliteCatalog::open_or_create(dir.path())
            .unwrap()
            .state()
            .store,
        store
    );
    fs::create_dir_all(dir.path().join("layers").join(id(1).to_string())).unwrap();
    fs::remove_file(dir.path().join(CATALOG_NAME)).unwrap();
    let error = SqliteCatalog::open_or_create(dir.path()).unwrap_err();
    assert!(
        error.to_string().contains("check --rebuild-catalog"),
        "{error}"
    );
    assert!(!dir.path().join(CATALOG_NAME).exists());
}

#[test]
fn a_commit_that_was_cut_off_is_rolled_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut sqlite = SqliteCatalog::create(dir.path(), &new_store()).unwrap();
    sqlite.commit(&start()).unwrap();
    let path = dir.path().join(CATALOG_NAME);
    drop(sqlite);
    let before = fs::read(&path).unwrap();
    // With no room in its page cache SQLite writes into the file before the commit; a copy taken then is a crash.
    let crash = tempfile::tempdir().unwrap();
    let mut db = rusqlite::Connection::open(&path).unwrap();
    db.pragma_update(None, "cache_size", 1).unwrap();
    let transaction = db.transaction().unwrap();
    for n in 0..500u128 {
        let uuid = Uuid::from_u128(1000 + n);
        transaction
            .execute(
                "INSERT INTO layers (uuid, sectors, state, created_ns) VALUES (?1, 1, 'sealed', 0)",
                [uuid.as_bytes()],
            )
            .unwrap();
    }
    for file in [path.clone(), journal_of(&path)] {
        fs::copy(&file, crash.path().join(file.file_name().unwrap())).unwrap();
    }
    assert_ne!(fs::read(crash.path().join(CATALOG_NAME)).unwrap(), before);
    drop(transaction);
    let sqlite = SqliteCatalog::open(crash.path()).unwrap();
    assert_eq!(sqlite.state().layers.len(), 2);
}

#[test]
fn a_full_disk_refuses_a_commit_and_nothing_more() {
    let dir = tempfile::tempdir().unwrap();
    let mut sqlite = SqliteCatalog::create(dir.path(), &new_store()).unwrap();
    sqlite.commit(&start()).unwrap();
    let before = sqlite.state().clone();
    let many: Vec<_> = (100..1000)
        .map(|n| Change::AddLayer(layer(n, None, LayerState::Sealed)))
        .collect();
    sqlite.limit_pages(20);
    let error = sqlite.commit(&many).unwrap_err();
    assert!(matches!(error, Error::Catalog { .. }), "{error}");
    assert_eq!(*sqlite.state(), before);
    // It was rolled back cleanly, so that smaller commits go on.
    sqlite.commit(&[attach("/run/vm.sock")]).unwrap();
    drop(sqlite);
    let sqlite = SqliteCatalog::open(dir.path()).unwrap();
    assert_eq!(sqlite.state().layers, before.layers);
    assert!(sqlite.state().volumes["vm"].attachment.is_some());
}

#[test]
fn a_catalog_that_is_not_what_it_should_be_takes_no_more_commits() {
    let dir = tempfile::tempdir().unwrap();
    let mut sqlite = SqliteCatalog::create(dir.path(), &new_store()).unwrap();
    sqlite.commit(&start()).unwrap();
    sqlite.execute("DELETE FROM volumes");
    let before = sqlite.state().clone();
    assert!(matches!(
        sqlite.commit(&[attach("/a")]),
        Err(Error::Catalog { .. })
    ));
    assert!(matches!(
        sqlite.commit(&[attach("/b")]),
        Err(Error::Busy { .. })
    ));
    assert_eq!(*sqlite.state(), before);
}

#[test]
fn a_failed_commit_in_memory_changes_nothing() {
    let disk = MemoryDisk::new(new_store());
    let mut memory = MemoryCatalog::open(&disk).unwrap();
    disk.fail_next_commit();
    assert!(matches!(
        memory.commit(&start()),
        Err(Error::Catalog { .. })
    ));
    assert_eq!(*memory.state(), new_store());
    assert_eq!(disk.state(), new_store());
    memory.commit(&start()).unwrap();
    assert_eq!(disk.commits(), 1);
}

#[test]
fn an_observer_sees_the_state_before_and_after() {
    let disk = MemoryDisk::new(new_store());
    let seen = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    disk.set_observer({
        let (disk, seen) = (disk.clone(), seen.clone());
        move |point| {
            seen.lock()
                .unwrap()
                .push((point, disk.crash_image().state().layers.len()))
        }
    });
    MemoryCatalog::open(&disk)
        .unwrap()
        .commit(&start())
        .unwrap();
    assert_eq!(
        *seen.lock().unwrap(),
        [(CommitPoint::Before, 0), (CommitPoint::After, 2)]
    );
}

#[test]
fn the_schema_is_the_one_that_is_described() {
    let described = include_str!("../../FORMAT.md");
    let sql = described
        .split("```sql\n")
        .nth(1)
        .unwrap()
        .split("```")
        .next()
        .unwrap();
    assert_eq!(sql, SCHEMA);
}
