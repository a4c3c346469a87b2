//! The command line against the real daemon: every form that scripts rely on, and what happens to input that cannot be.
//!
//! A refusal means: exit code 1, a message that says what is wrong, and nothing changed; [`Unchanged`] holds on to the last.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod cache;
mod check;
mod lifetime;
mod one_disk;
mod output;
mod refusals;
mod works;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::Value;
use stratablk_tests::daemon::{DEADLINE, Daemon, Ran, temp_dir};
use stratablk_tests::wait::until;
use tempfile::TempDir;

/// A store with its daemon, and a directory for images and sockets beside it.
struct Fixture {
    /// Everything lies in here; goes last.
    dir: TempDir,
    /// The daemon.
    daemon: Daemon,
}

impl Fixture {
    /// A daemon on an empty store.
    fn new() -> Self {
        let dir = temp_dir();
        let daemon = Daemon::on_store(&dir.path().join("store"));
        Self { dir, daemon }
    }

    /// A daemon on an empty store whose cache has a directory of its own, which goes with the test, and holds on to what is
    /// written until a flush.
    fn with_cache_here() -> Self {
        let dir = cache_dir();
        let daemon = Self::cached(&dir);
        Self { dir, daemon }
    }

    /// The daemon of `with_cache_here`, in a directory that is there.
    fn cached(dir: &TempDir) -> Daemon {
        let store = dir.path().join("store");
        let args = ["--cache-size=1M", "--dirty-age=86400", "--cache-dir"].map(OsStr::new);
        let paths = [
            dir.path().as_os_str(),
            OsStr::new("--store"),
            store.as_os_str(),
        ];
        Daemon::start(args.into_iter().chain(paths), &store.join("control.sock"))
    }

    /// What the cache has done.
    fn cache(&self) -> Value {
        self.line("stats --json").json()["cache"].clone()
    }

    /// Waits until these figures of the cache are so; counters are told a moment after what they count.
    #[track_caller]
    fn cache_becomes(&self, figures: &[(&str, u64)]) {
        let mut cache = Value::Null;
        let done = until(|| {
            cache = self.cache();
            figures.iter().all(|(name, value)| cache[*name] == *value)
        });
        assert!(done, "never {figures:?}: {cache}");
    }

    /// A path in the directory.
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The store's directory.
    fn store(&self) -> PathBuf {
        self.path("store")
    }

    /// Runs a line of words against the daemon; `@/` stands for the directory.
    fn line(&self, line: &str) -> Ran {
        let here = format!("{}/", self.dir.path().display());
        self.daemon.cli(
            line.split_whitespace()
                .map(|word| word.replace("@/", &here)),
        )
    }

    /// An image of this many bytes, each sector filled with its number.
    fn image(&self, name: &str, bytes: usize) -> PathBuf {
        let path = self.path(name);
        write_image(&path, bytes);
        path
    }

    /// Stops the daemon, changes something, starts it again.
    fn restart_after(self, change: impl FnOnce(&Path)) -> Self {
        let Self { dir, daemon } = self;
        let (status, _, log) = daemon.stop();
        assert!(status.success(), "{log}");
        change(&dir.path().join("store"));
        let daemon = Daemon::on_store(&dir.path().join("store"));
        Self { dir, daemon }
    }
}

/// A directory in shared memory, if there is any.
fn cache_dir() -> TempDir {
    let mut builder = tempfile::Builder::new();
    builder.prefix("stratablk-cli-");
    let dir = builder.tempdir_in("/dev/shm");
    dir.or_else(|_| builder.tempdir()).unwrap()
}

/// Writes an image of this many bytes, each sector filled with its number.
fn write_image(path: &Path, bytes: usize) {
    let content: Vec<u8> = (0..bytes)
        .map(|at| u8::try_from(at / 512 % 251).unwrap())
        .collect();
    fs::write(path, content).unwrap();
}

/// What must be the same after a refusal: all that the daemon tells, and the names in the store.
#[derive(Debug, PartialEq)]
struct Unchanged {
    /// Volumes, snapshots, tree.
    told: Vec<Value>,
    /// Directories of layers.
    layers: BTreeSet<PathBuf>,
}

impl Unchanged {
    /// How things are now.
    fn of(fixture: &Fixture) -> Self {
        let told = ["volume list --json", "snapshot list --json", "tree --json"];
        Self {
            told: told.iter().map(|line| fixture.line(line).json()).collect(),
            layers: layers_of(&fixture.store()),
        }
    }
}

/// The directories of layers in a store.
fn layers_of(store: &Path) -> BTreeSet<PathBuf> {
    let Ok(entries) = fs::read_dir(store.join("layers")) else {
        return BTreeSet::new();
    };
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// Runs a line that must be refused with all of `words` in its message, and change nothing.
#[track_caller]
fn refused(fixture: &Fixture, line: &str, words: &[&str]) {
    let before = Unchanged::of(fixture);
    let message = fixture.line(line).refused();
    for word in words {
        assert!(
            message.contains(word),
            "{line}: {word:?} is not in: {message}"
        );
    }
    assert!(message.starts_with("stratablk: "), "{message}");
    // Who looks whether a socket is in use comes to it for a moment, like a front-end.
    let same = until(|| Unchanged::of(fixture) == before);
    assert!(
        same,
        "{line}: {before:?} became {:?}",
        Unchanged::of(fixture)
    );
}

/// The volume as `volume show --json` prints it.
fn show(fixture: &Fixture, name: &str) -> Value {
    fixture.line(&format!("volume show {name} --json")).json()
}

/// Asks a vhost-user back-end for its features and returns the length of its reply's payload.
fn vhost_features(mut stream: &UnixStream) -> u32 {
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let words =
        |request: u32, flags: u32, size: u32| [request, flags, size].map(u32::to_le_bytes).concat();
    stream.write_all(&words(1, 1, 0)).unwrap();
    let mut header = [0; 12];
    stream.read_exact(&mut header).unwrap();
    assert_eq!(
        header[..8],
        words(1, 5, 0)[..8],
        "GET_FEATURES, version 1, a reply"
    );
    u32::from_le_bytes(header[8..].try_into().unwrap())
}

/// The map file of a volume's active layer, of its base, or of a snapshot, by its layer's id.
fn map_of(store: &Path, layer: &Value) -> PathBuf {
    store
        .join("layers")
        .join(layer.as_str().unwrap())
        .join("map")
}
