//! Rows of a catalog: those of a good store with some of them changed, opened by everything that opens a catalog.
//!
//! Input: bits, and then edits of rows, pragmas and bytes of the database.
//!
//! What must hold: the catalog is refused, or what it says keeps all rules; where the check finds nothing, the store opens,
//! and the check finds nothing afterwards.

use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;

use rusqlite::types::Value;
use rusqlite::{Connection, params_from_iter};
use stratablk_layers::catalog::sqlite::{CATALOG_NAME, SqliteCatalog};
use stratablk_layers::catalog::{CatalogState, LayerRow};
use stratablk_layers::check::{CheckOptions, Report, check};
use stratablk_layers::file::Media;
use stratablk_layers::file::host::{HostMedia, HostOptions};
use stratablk_layers::store::Store;

use crate::input::Input;
use crate::store::{Template, options};

/// The tables, and their columns.
const TABLES: [(&str, &[&str]); 6] = [
    ("store", &["id", "uuid", "next_job"]),
    (
        "layers",
        &[
            "uuid",
            "parent",
            "sectors",
            "state",
            "base_path",
            "base_bytes",
            "base_mtime_ns",
            "created_ns",
        ],
    ),
    (
        "volumes",
        &[
            "name",
            "active",
            "sectors",
            "created_ns",
            "socket",
            "queues",
            "read_only",
            "kind",
            "armed",
            "attached_from",
            "failed",
        ],
    ),
    (
        "snapshots",
        &[
            "volume",
            "name",
            "layer",
            "instant",
            "created_ns",
            "sectors",
        ],
    ),
    (
        "jobs",
        &[
            "id",
            "kind",
            "subject",
            "source",
            "target",
            "way",
            "state",
            "error",
            "rate",
            "created_ns",
        ],
    ),
    ("doomed", &["uuid"]),
];
/// Words that columns may hold.
const WORDS: [&str; 24] = [
    "active",
    "sealing",
    "sealed",
    "normal",
    "immutable",
    "writethrough",
    "multiattach",
    "readonly",
    "merge",
    "push-down",
    "flatten",
    "import",
    "into-base",
    "up",
    "down",
    "in-place",
    "copy",
    "queued",
    "paused",
    "stopped",
    "a",
    "b",
    "",
    "a@s1",
];
/// Edits of an input, at most.
const EDITS_MAX: usize = 24;

/// One row.
type Row = Vec<Value>;
/// All rows, by table.
type Rows = Vec<Vec<Row>>;

thread_local! {
    /// The store, made by the first input.
    static TEMPLATE: RefCell<Option<(Template, Rows)>> = const { RefCell::new(None) };
}

/// Reads all rows.
fn read(path: &Path) -> rusqlite::Result<Rows> {
    let db = Connection::open(path)?;
    TABLES
        .iter()
        .map(|(table, columns)| {
            let mut query = db.prepare(&format!("SELECT {} FROM {table}", columns.join(", ")))?;
            let rows = query.query_map([], |row| {
                (0..columns.len()).map(|column| row.get(column)).collect()
            })?;
            rows.collect()
        })
        .collect()
}

/// Writes rows in place of those that are there. Rows that the database refuses are left out.
fn write(path: &Path, rows: &Rows, plain: bool) -> rusqlite::Result<()> {
    let mut db = Connection::open(path)?;
    db.pragma_update(None, "synchronous", "OFF")?;
    db.pragma_update_and_check(None, "journal_mode", "MEMORY", |_| Ok(()))?;
    db.pragma_update(None, "ignore_check_constraints", true)?;
    db.pragma_update(None, "foreign_keys", false)?;
    let transaction = db.transaction()?;
    for ((table, columns), rows) in TABLES.iter().zip(rows) {
        let (names, marks) = (columns.join(", "), vec!["?"; columns.len()].join(", "));
        if plain {
            transaction.execute_batch(&format!(
                "DROP TABLE {table}; CREATE TABLE {table} ({names});"
            ))?;
        } else {
            transaction.execute(&format!("DELETE FROM {table}"), [])?;
        }
        let mut insert = transaction.prepare(&format!(
            "INSERT OR IGNORE INTO {table} ({names}) VALUES ({marks})"
        ))?;
        for row in rows {
            // A value of a type that the table does not take.
            let _ = insert.execute(params_from_iter(row));
        }
    }
    transaction.commit()
}

/// A value: of another row, a word, a number, or anything.
fn value(input: &mut Input<'_>, rows: &Rows) -> Value {
    match input.u8() % 8 {
        0 => Value::Null,
        1 => {
            let bits = u32::from(input.u8() % 64);
            Value::Integer((1i64 << bits).wrapping_add(i64::from(input.u8()) - 128))
        }
        2 => Value::Integer(i64::from(input.u16())),
        3 => Value::Text(WORDS[usize::from(input.u8()) % WORDS.len()].into()),
        4 => Value::Text(String::from_utf8_lossy(input.string()).into_owned()),
        5 => Value::Blob(input.string().to_vec()),
        _ => {
            let table = &rows[usize::from(input.u8()) % rows.len()];
            let row = table.get(usize::from(input.u8()) % table.len().max(1));
            let column = usize::from(input.u8());
            row.map_or(Value::Null, |row| row[column % row.len()].clone())
        }
    }
}

/// Changes rows.
fn edit(input: &mut Input<'_>, rows: &mut Rows) {
    let kind = input.u8();
    let table = usize::from(input.u8()) % rows.len();
    let count = rows[table].len().max(1);
    let place = usize::from(input.u8()) % count;
    let columns = TABLES[table].1.len();
    match kind % 6 {
        0 if place < rows[table].len() => drop(rows[table].remove(place)),
        1 => {
            let mut row = rows[table]
                .get(place)
                .cloned()
                .unwrap_or_else(|| vec![Value::Null; columns]);
            for _ in 0..=kind >> 6 {
                let column = usize::from(input.u8()) % columns;
                row[column] = value(input, rows);
            }
            rows[table].push(row);
        }
        _ => {
            let column = usize::from(input.u8()) % columns;
            let value = value(input, rows);
            if let Some(row) = rows[table].get_mut(place) {
                row[column] = value;
            }
        }
    }
}

/// One input.
///
/// # Panics
/// If something does not hold that must.
pub fn run(bytes: &[u8]) {
    TEMPLATE.with_borrow_mut(|template| {
        let (template, rows) = template.get_or_insert_with(|| {
            let template = Template::new("catalog", true);
            let rows = read(&template.store().join(CATALOG_NAME)).expect("a catalog");
            (template, rows)
        });
        template.restore();
        let mut input = Input(bytes);
        let bits = input.u8();
        let mut rows = rows.clone();
        for _ in 0..EDITS_MAX {
            if input.is_empty() {
                break;
            }
            edit(&mut input, &mut rows);
        }
        let path = template.store().join(CATALOG_NAME);
        write(&path, &rows, bits & 3 == 3).expect("a catalog");
        if bits & 0x80 != 0 {
            damage(&path, bytes);
        }
        judge(&template.store(), template.path());
    });
}

/// Changes bytes of the database, places and bytes taken from the end of the input.
fn damage(path: &Path, bytes: &[u8]) {
    let mut file = std::fs::read(path).expect("a catalog");
    for change in bytes.rchunks_exact(3).take(4) {
        let place = usize::from(change[0]) << 8 | usize::from(change[1]);
        let len = file.len();
        file[place % len] = change[2];
    }
    std::fs::write(path, file).expect("a catalog");
}

/// What the check says.
fn verdict(dir: &Path) -> Report {
    let media = HostMedia::new(dir.to_owned(), HostOptions { io_uring: false }).expect("a folder");
    let media: Arc<dyn Media> = Arc::new(media);
    check(dir, &media, CheckOptions::default()).expect("the check goes on whatever it finds")
}

/// Whether all raw images are ours: nothing else of the host is to be touched.
fn is_harmless(state: &CatalogState, dir: &Path) -> bool {
    let ours = |row: &LayerRow| {
        row.base.as_ref().is_none_or(|base| {
            let path = base.path.as_path();
            path.starts_with(dir) && !path.components().any(|part| part.as_os_str() == "..")
        })
    };
    state.layers.values().all(ours)
}

/// Opens the store in all ways.
fn judge(dir: &Path, all: &Path) {
    let state = match SqliteCatalog::look(dir) {
        Ok(state) => state,
        Err(_) => {
            assert!(
                !verdict(dir).is_sound(),
                "the check finds nothing in what is refused"
            );
            let opened = Store::open(dir, options());
            assert!(opened.is_err(), "a catalog is opened that cannot be read");
            return;
        }
    };
    // Also checks that what was read keeps the rules.
    let again = all.join("again");
    std::fs::create_dir(&again).expect("a folder");
    drop(SqliteCatalog::create(&again, &state).expect("what is read can be written"));
    let read = SqliteCatalog::look(&again).expect("what is written can be read");
    assert!(read == state, "what is written is read");
    if !is_harmless(&state, all) {
        return;
    }
    let before = verdict(dir);
    let store = match Store::open(dir, options()) {
        Ok(store) => store,
        Err(error) => {
            assert!(
                !before.is_sound(),
                "the check finds nothing, and the store is refused: {error}"
            );
            return;
        }
    };
    use_all(&store);
    drop(store);
    let after = verdict(dir);
    assert!(
        after.is_sound() || !before.is_sound(),
        "{:?}, before: {:?}",
        after.findings,
        before.findings
    );
}

/// Uses all that there is in the store. What fails says so.
fn use_all(store: &Store) {
    let _ = (
        store.tree(None),
        store.usage(None),
        store.jobs(),
        store.snapshots(None),
    );
    for volume in store.volumes() {
        if let Ok(open) = store.open_volume(&volume.name) {
            let _ = open.capacity();
            drop(open);
        }
        let _ = store.tree(Some(&volume.name));
    }
    for _ in 0..8 {
        if !store.job_step() {
            break;
        }
    }
    let _ = store.flush_all();
    let _ = store.notes();
}
