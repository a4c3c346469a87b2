//! Files that were damaged by hand: what `check` says of each, and what the store does. It refuses what depends on the
//! damage, in words, and serves the rest; it never serves what is damaged as if it were good.
//!
//! Not here: bytes of a `data` file that changed, and data files of two layers that were swapped: all of them are as long as
//! the disk, and maps say which sectors a layer holds and not what is in them.
#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests: small numbers, and a panic is the verdict"
)]
#![expect(
    dead_code,
    reason = "shares the guest and the oracle of the crash tests"
)]

#[path = "crash/disk.rs"]
mod disk;
#[path = "crash/oracle.rs"]
mod oracle;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use disk::Queue;
use oracle::{Value, stamp};
use stratablk_layers::Error;
use stratablk_layers::catalog::sqlite::SqliteCatalog;
use stratablk_layers::catalog::{Catalog, Change};
use stratablk_layers::check::{CheckOptions, Report, Severity, check};
use stratablk_layers::file::Media;
use stratablk_layers::file::host::{HostMedia, HostOptions};
use stratablk_layers::store::{Selection, Store, StoreOptions, VolumeSource};
use stratablk_layers::units::{SECTOR_BYTES, Sector};
use stratablk_layers::volume::Operation;

/// Sectors of each disk.
const SECTORS: u64 = 256;

/// A store with the volume `web` (snapshots `first` and `second`, and flushed writes since) and the volume `other`, closed.
struct Fixture {
    dir: tempfile::TempDir,
    /// The directories of `first`, `second` and the active layer of `web`.
    layers: [PathBuf; 3],
    /// The catalog as it was before `second` was taken, and what belongs to it.
    old_catalog: Vec<u8>,
    /// What `web` reads.
    web: Vec<Value>,
    /// What `web` read before its last flush.
    web_before: Vec<Value>,
}

/// What becomes of `web`.
#[derive(Clone, Copy, Debug)]
enum Outcome {
    /// The store does not open, and says this.
    NoStore(&'static str),
    /// The volume does not open, with this message, and others do.
    NoVolume(&'static str),
    /// It reads what it should.
    Served,
    /// It reads what it did before its last flush, and the log says this: nobody can tell the damage from a power cut that tore
    /// a flush nobody was told of.
    Torn(&'static str),
}

/// A kind of damage.
struct Case {
    /// In words.
    name: &'static str,
    /// Does it.
    harm: fn(&Fixture),
    /// How bad `check` finds it, and words of its finding.
    found: (Severity, &'static str),
    /// What becomes of the volume.
    outcome: Outcome,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path()).unwrap();
        let size = VolumeSource::Size(SECTORS * SECTOR_BYTES);
        for name in ["web", "other"] {
            store.create_volume(name, &size).unwrap();
        }
        write(&store, "other", 0, SECTORS, 9);
        let mut web = vec![Value::Zero; SECTORS as usize];
        let mut put = |start: u64, count: u64, id| {
            write(&store, "web", start, count, id);
            web[start as usize..(start + count) as usize].fill(Value::Stamp(id));
            web.clone()
        };
        let mut layers = Vec::new();
        let mut old_catalog = Vec::new();
        for (name, start, id) in [("first", 0, 2), ("second", 60, 3)] {
            put(start, 100, id);
            let active = store.volume_info("web").unwrap().active;
            layers.push(dir.path().join("layers").join(active.to_string()));
            old_catalog = fs::read(dir.path().join("catalog.db")).unwrap();
            let volumes = Selection::Volumes(vec!["web".into()]);
            store.snapshot(name, &volumes).unwrap();
        }
        let active = store.volume_info("web").unwrap().active;
        layers.push(dir.path().join("layers").join(active.to_string()));
        put(200, 20, 4);
        let web_before = put(230, 5, 5);
        let web = put(240, 16, 6);
        store.finish().unwrap();
        Self {
            dir,
            layers: layers.try_into().unwrap(),
            old_catalog,
            web,
            web_before,
        }
    }

    fn catalog(&self) -> PathBuf {
        self.dir.path().join("catalog.db")
    }

    fn check(&self) -> Report {
        let options = HostOptions { io_uring: false };
        let media = HostMedia::new(self.dir.path().to_owned(), options).unwrap();
        let media: Arc<dyn Media> = Arc::new(media);
        check(self.dir.path(), &media, CheckOptions::default()).unwrap()
    }

    /// What the daemon does with it.
    fn assert_outcome(&self, case: &Case, when: &str) {
        let name = case.name;
        let store = match (open(self.dir.path()), case.outcome) {
            (Ok(_), Outcome::NoStore(_)) => panic!("{name}, {when}: the store opens"),
            (Err(error), Outcome::NoStore(words)) => {
                let told = error.to_string();
                assert!(told.contains(words), "{name}, {when}: {told}");
                return;
            }
            (opened, _) => opened.unwrap_or_else(|error| panic!("{name}, {when}: {error}")),
        };
        let all = vec![Value::Stamp(9); SECTORS as usize];
        assert_eq!(read(&store, "other").unwrap(), all, "{name}, {when}");
        let found = read(&store, "web");
        match case.outcome {
            Outcome::NoStore(_) => {}
            Outcome::NoVolume(words) => {
                let told = found
                    .map(|_| ())
                    .expect_err(&format!("{name}, {when}: served"));
                assert!(told.to_string().contains(words), "{name}, {when}: {told}");
                // Nor by what needs it.
                let volumes = Selection::Volumes(vec!["web".into()]);
                store.snapshot("third", &volumes).unwrap_err();
                let clone = VolumeSource::Volume("web".into());
                store.create_volume("clone", &clone).unwrap_err();
            }
            Outcome::Served => assert_eq!(found.unwrap(), self.web, "{name}, {when}"),
            Outcome::Torn(words) => {
                assert_eq!(found.unwrap(), self.web_before, "{name}, {when}");
                let notes = store.notes();
                let told = notes.iter().any(|note| note.contains(words));
                assert!(told || when != "at first", "{name}, {when}: {notes:?}");
            }
        }
    }
}

fn open(dir: &Path) -> Result<Store, Error> {
    Store::open(dir, StoreOptions::default())
}

fn write(store: &Store, name: &str, start: u64, count: u64, id: u64) {
    let context = store.open_volume(name).unwrap().context(false).unwrap();
    let mut queue = Queue::new(context);
    let bytes = (start..start + count)
        .flat_map(|sector| stamp(7, sector, id))
        .collect();
    queue.run(Operation::Write(Sector(start)), bytes).0.unwrap();
    queue.run(Operation::Flush, Vec::new()).0.unwrap();
}

fn read(store: &Store, name: &str) -> Result<Vec<Value>, Error> {
    let mut queue = Queue::new(store.open_volume(name)?.context(false)?);
    Ok(queue.read_all(7, SECTORS).unwrap())
}

/// Flips a bit.
fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

/// Cuts a file off.
fn cut(path: &Path, len: u64) {
    let file = fs::File::options().write(true).open(path).unwrap();
    assert!(file.metadata().unwrap().len() > len);
    file.set_len(len).unwrap();
}

/// Swaps two files or directories.
fn swap(a: &Path, b: &Path) {
    let between = a.with_extension("between");
    fs::rename(a, &between).unwrap();
    fs::rename(b, a).unwrap();
    fs::rename(between, b).unwrap();
}

/// The bytes of a map from its journal on, up to the last that is not zero.
fn journal(map: &Path) -> (usize, usize) {
    let bytes = fs::read(map).unwrap();
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap();
    // The header is 4096 bytes; the checkpoint of a new layer is small and padded to a multiple of 512.
    (4096 + 512, end)
}

const CASES: &[Case] = &[
    Case {
        name: "a bit of the header of a sealed layer's map",
        harm: |f| flip(&f.layers[0].join("map"), 40),
        found: (Severity::Error, "is damaged"),
        outcome: Outcome::NoVolume("is damaged"),
    },
    Case {
        name: "a bit of the checkpoint of a sealed layer's map",
        harm: |f| flip(&f.layers[1].join("map"), 4096 + 20),
        found: (Severity::Error, "is damaged"),
        outcome: Outcome::NoVolume("is damaged"),
    },
    Case {
        name: "a bit of the header of an active layer's map",
        harm: |f| flip(&f.layers[2].join("map"), 64),
        found: (Severity::Error, "is damaged"),
        outcome: Outcome::NoVolume("is damaged"),
    },
    Case {
        name: "a bit of the journal, in front of a later flush",
        harm: |f| {
            let map = f.layers[2].join("map");
            flip(&map, journal(&map).0 + 20);
        },
        found: (Severity::Error, "is damaged"),
        outcome: Outcome::NoVolume("is damaged"),
    },
    Case {
        name: "a bit of the last flush in the journal",
        harm: |f| {
            let map = f.layers[2].join("map");
            flip(&map, journal(&map).1 - 2);
        },
        found: (Severity::Warning, "journal"),
        outcome: Outcome::Torn("behind the last commit record of its journal"),
    },
    Case {
        name: "a map of which half is left",
        harm: |f| cut(&f.layers[0].join("map"), 2048),
        found: (Severity::Error, "is damaged"),
        outcome: Outcome::NoVolume("is damaged"),
    },
    Case {
        name: "an empty map",
        harm: |f| cut(&f.layers[2].join("map"), 0),
        found: (Severity::Error, "is damaged"),
        outcome: Outcome::NoVolume("is damaged"),
    },
    Case {
        name: "data of a sealed layer that was cut off",
        harm: |f| cut(&f.layers[0].join("data"), 50 * SECTOR_BYTES),
        found: (Severity::Error, "was cut off"),
        outcome: Outcome::NoVolume("was cut off"),
    },
    Case {
        name: "data of a sealed layer that is a sector too short",
        harm: |f| cut(&f.layers[1].join("data"), 159 * SECTOR_BYTES),
        found: (Severity::Error, "was cut off"),
        outcome: Outcome::NoVolume("was cut off"),
    },
    Case {
        name: "data of an active layer that was cut off",
        harm: |f| cut(&f.layers[2].join("data"), 240 * SECTOR_BYTES),
        found: (Severity::Error, "was cut off"),
        outcome: Outcome::NoVolume("was cut off"),
    },
    Case {
        name: "no data",
        harm: |f| fs::remove_file(f.layers[0].join("data")).unwrap(),
        found: (Severity::Error, "No such file"),
        outcome: Outcome::NoVolume("No such file"),
    },
    Case {
        name: "no map",
        harm: |f| fs::remove_file(f.layers[1].join("map")).unwrap(),
        found: (Severity::Error, "No such file"),
        outcome: Outcome::NoVolume("No such file"),
    },
    Case {
        name: "no directory of a sealed layer",
        harm: |f| fs::remove_dir_all(&f.layers[0]).unwrap(),
        found: (Severity::Error, "is missing"),
        outcome: Outcome::NoVolume("No such file"),
    },
    Case {
        name: "no directory of the active layer",
        harm: |f| fs::remove_dir_all(&f.layers[2]).unwrap(),
        found: (Severity::Error, "is missing"),
        outcome: Outcome::NoVolume("No such file"),
    },
    Case {
        name: "a directory in the place of data",
        harm: |f| {
            fs::remove_file(f.layers[1].join("data")).unwrap();
            fs::create_dir(f.layers[1].join("data")).unwrap();
        },
        found: (Severity::Error, "is not a regular file"),
        outcome: Outcome::NoVolume("data"),
    },
    Case {
        name: "two maps that were swapped",
        harm: |f| swap(&f.layers[0].join("map"), &f.layers[1].join("map")),
        found: (Severity::Error, "is damaged"),
        outcome: Outcome::NoVolume("is damaged"),
    },
    Case {
        name: "two layers that were swapped",
        harm: |f| swap(&f.layers[0], &f.layers[1]),
        found: (Severity::Error, "is damaged"),
        outcome: Outcome::NoVolume("is damaged"),
    },
    Case {
        name: "a layer that is there twice",
        harm: |f| {
            let twin = f
                .dir
                .path()
                .join("layers")
                .join("01234567-89ab-4def-8123-456789abcdef");
            fs::create_dir(&twin).unwrap();
            for name in ["map", "data"] {
                fs::copy(f.layers[1].join(name), twin.join(name)).unwrap();
            }
        },
        found: (Severity::Warning, "is not in the catalog"),
        outcome: Outcome::Served,
    },
    Case {
        name: "none, but the volume has failed",
        harm: |f| {
            let mut catalog = SqliteCatalog::open(f.dir.path()).unwrap();
            let failed = Change::SetFailed {
                volume: "web".into(),
                cause: Some("a flush failed".into()),
            };
            catalog.commit(&[failed]).unwrap();
        },
        found: (
            Severity::Warning,
            "takes no more writes since an earlier failure: a flush failed",
        ),
        outcome: Outcome::Served,
    },
    Case {
        name: "a catalog from before the last snapshot",
        harm: |f| fs::write(f.catalog(), &f.old_catalog).unwrap(),
        found: (
            Severity::Error,
            "state: the catalog says Active, the map's header says Sealed",
        ),
        outcome: Outcome::NoVolume("is damaged"),
    },
    Case {
        name: "a bit of the catalog's first bytes",
        harm: |f| flip(&f.catalog(), 3),
        found: (Severity::Error, "is damaged"),
        outcome: Outcome::NoStore("is damaged"),
    },
    Case {
        name: "half of the catalog",
        harm: |f| cut(&f.catalog(), fs::metadata(f.catalog()).unwrap().len() / 2),
        found: (Severity::Error, "is damaged"),
        outcome: Outcome::NoStore("is damaged"),
    },
    Case {
        name: "an empty catalog",
        harm: |f| cut(&f.catalog(), 0),
        found: (Severity::Error, "is damaged"),
        outcome: Outcome::NoStore("is damaged"),
    },
    Case {
        name: "no catalog",
        harm: |f| fs::remove_file(f.catalog()).unwrap(),
        found: (Severity::Error, "catalog.db"),
        outcome: Outcome::NoStore("it is missing"),
    },
    Case {
        name: "a journal of another catalog",
        harm: |f| fs::write(f.dir.path().join("catalog.db-journal"), [7; 600]).unwrap(),
        found: (Severity::Note, ""),
        outcome: Outcome::Served,
    },
];

#[test]
fn damage_is_found_and_never_served_as_good_data() {
    println!("{:<56} {:<60} daemon", "damage", "check says");
    for case in CASES {
        let fixture = Fixture::new();
        (case.harm)(&fixture);
        let report = fixture.check();
        let (severity, words) = case.found;
        let worst = report.findings.iter().map(|finding| finding.severity).max();
        let told: Vec<_> = (report.findings.iter())
            .filter(|finding| finding.severity == severity && finding.what.contains(words))
            .collect();
        let quiet = words.is_empty() && report.findings.is_empty();
        assert!(
            quiet || (!told.is_empty() && worst == Some(severity)),
            "{}: {:#?}",
            case.name,
            report.findings
        );
        assert!(told.iter().all(|finding| !finding.fix.is_empty()));
        let first = told.first().map_or("-", |finding| finding.what.as_str());
        let first = first.rsplit('/').next().unwrap_or(first);
        println!("{:<56} {:<60.60} {:?}", case.name, first, case.outcome);
        fixture.assert_outcome(case, "at first");
        fixture.assert_outcome(case, "the next time");
    }
    println!("{} kinds of damage", CASES.len());
}

#[test]
fn no_byte_of_a_map_or_of_the_catalog_changes_without_notice() {
    // What is served after any flip is what was there; of the active map's last flush, what was there before it.
    let fixture = Fixture::new();
    let mut refused = [0, 0];
    let files = [
        fixture.layers[0].join("map"),
        fixture.layers[2].join("map"),
        fixture.catalog(),
    ];
    for (number, path) in files.iter().enumerate() {
        let good = fs::read(path).unwrap();
        // All of them take minutes; each step is a prime, so that every field is met somewhere.
        let step = if number == 2 { 211 } else { 61 };
        for at in (number..good.len()).step_by(step) {
            flip(path, at);
            let seen = open(fixture.dir.path()).and_then(|store| read(&store, "web"));
            match seen {
                Err(_) => refused[usize::from(number == 2)] += 1,
                Ok(values) => {
                    let torn = number == 1 && values == fixture.web_before;
                    assert!(values == fixture.web || torn, "{} {at}", path.display());
                }
            }
            fs::write(path, &good).unwrap();
        }
    }
    let store = open(fixture.dir.path()).unwrap();
    assert_eq!(read(&store, "web").unwrap(), fixture.web);
    println!(
        "refused: {} flips of maps, {} of the catalog",
        refused[0], refused[1]
    );
    assert!(refused[0] > 20 && refused[1] > 5, "{refused:?}");
}
