//! The command line against the real daemon: every form that scripts rely on, and what happens to input that cannot be.
//!
//! A refusal means: exit code 1, a message that says what is wrong, and nothing changed; [`Unchanged`] holds on to the last.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::Signal;
use serde_json::Value;
use stratablk_tests::daemon::{DEADLINE, Daemon, Ran, binary, run, stratablk, temp_dir};
use stratablk_tests::disk::Disk;
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
    assert_eq!(Unchanged::of(fixture), before, "{line}");
}

/// The volume as `volume show --json` prints it.
fn show(fixture: &Fixture, name: &str) -> Value {
    fixture.line(&format!("volume show {name} --json")).json()
}

// ---- what works

#[test]
fn a_volume_lives_from_create_to_delete() {
    let f = Fixture::new();
    f.line("volume create data --size 10M").ok();
    let volume = show(&f, "data");
    assert_eq!(volume["size_bytes"], 10 << 20);
    assert_eq!(volume["base"], Value::Null);
    assert_eq!(volume["attachment"], Value::Null);
    assert!(f.line("volume list").ok().contains("data"));
    assert!(f.line("volume show data").ok().contains("10 MiB"));
    f.line("volume delete data").ok();
    assert_eq!(
        f.line("volume list --json").json()["volumes"],
        Value::Array(Vec::new())
    );
    assert_eq!(layers_of(&f.store()), BTreeSet::new(), "its files are gone");
}

#[test]
fn a_base_is_used_in_place() {
    let f = Fixture::new();
    let image = f.image("disk.img", 8192);
    let before = fs::read(&image).unwrap();
    f.line("volume create web --base @/disk.img").ok();
    let volume = show(&f, "web");
    assert_eq!(volume["size_bytes"], 8192);
    assert_eq!(volume["base"], image.to_str().unwrap());
    assert_eq!(volume["depth"], 2);
    assert!(f.line("tree").ok().contains("disk.img"));
    f.line("volume delete web").ok();
    assert_eq!(fs::read(&image).unwrap(), before);
}

#[test]
fn a_relative_base_is_of_the_client() {
    let f = Fixture::new();
    f.image("disk.img", 512);
    let mut command = stratablk(["volume", "create", "web", "--base", "disk.img"]);
    command
        .env("STRATABLK_CONTROL", f.daemon.control())
        .current_dir(f.dir.path());
    Ran::from(command.output().unwrap()).ok();
    assert_eq!(
        show(&f, "web")["base"],
        f.path("disk.img").to_str().unwrap()
    );
}

#[test]
fn snapshots_and_clones_make_a_tree() {
    let f = Fixture::new();
    f.image("disk.img", 1 << 20);
    f.line("volume create web --base @/disk.img").ok();
    f.line("volume create db --size 1M").ok();
    let text = f.line("snapshot create s1 web db").ok();
    assert!(
        text.starts_with("snapshot s1 of ") && text.contains("no request waited"),
        "{text}"
    );
    let report = f.line("snapshot create s2 --all --json").json();
    assert_eq!(report["snapshots"].as_array().unwrap().len(), 2);
    let groups: BTreeSet<_> = report["snapshots"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["group"].to_string())
        .collect();
    assert_eq!(groups.len(), 1, "one instant");

    f.line("clone web@s1 copy").ok();
    f.line("volume create copy2 --from web@s2").ok();
    let snapshots = f.line("snapshot list --json").json();
    assert_eq!(snapshots["snapshots"].as_array().unwrap().len(), 4);
    let of_web = f.line("snapshot list web --json").json();
    let names: Vec<_> = of_web["snapshots"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["name"].clone())
        .collect();
    assert_eq!(names, ["s1", "s2"], "oldest first");

    let tree = f.line("tree").ok();
    for part in [
        "base ",
        "snapshot web@s1",
        "snapshot web@s2",
        "current state of web",
        "current state of copy",
        "\u{2514}\u{2500} ",
    ] {
        assert!(tree.contains(part), "{part} is not in\n{tree}");
    }
    let tree = f.line("tree db").ok();
    assert!(
        tree.contains("state of db") && !tree.contains("state of web"),
        "{tree}"
    );
}

#[test]
fn an_attachment_is_remembered_over_restarts_and_crashes() {
    let f = Fixture::new();
    f.line("volume create web --size 1M").ok();
    f.line("volume attach web --socket @/web.sock --queues 2")
        .ok();
    let socket = f.path("web.sock");
    let served = |f: &Fixture| {
        let attachment = show(f, "web")["attachment"].clone();
        assert_eq!(attachment["queues"], 2);
        assert_eq!(attachment["state"], "listening");
        UnixStream::connect(&socket).unwrap();
    };
    served(&f);
    f.line("volume attach web --socket @/web.sock --queues 2")
        .ok();

    let f = f.restart_after(|_| assert!(!socket.exists(), "an orderly end removes the socket"));
    served(&f);

    let Fixture { dir, daemon } = f;
    daemon.kill();
    assert!(socket.exists(), "a crash leaves the socket");
    let daemon = Daemon::on_store(&dir.path().join("store"));
    let f = Fixture { dir, daemon };
    served(&f);

    f.line("volume detach web").ok();
    assert!(!socket.exists());
    let f = f.restart_after(|_| {});
    assert_eq!(show(&f, "web")["attachment"], Value::Null);
}

#[test]
fn a_front_end_shows_while_it_is_there() {
    let f = Fixture::new();
    f.line("volume create web --size 1M").ok();
    f.line("volume attach web --socket @/web.sock").ok();
    let shown = |state: &str| {
        let deadline = std::time::Instant::now() + DEADLINE;
        while show(&f, "web")["attachment"]["state"] != state {
            assert!(std::time::Instant::now() < deadline, "never {state}");
        }
    };
    shown("listening");
    let front_end = UnixStream::connect(f.path("web.sock")).unwrap();
    assert_eq!(vhost_features(&front_end), 8);
    shown("connected");
    assert!(f.line("volume list").ok().contains("connected"));
    drop(front_end);
    shown("listening");
}

#[test]
fn the_control_socket_goes_before_and_after_the_command() {
    let f = Fixture::new();
    let control = f.daemon.control().to_str().unwrap().to_owned();
    for words in [
        ["--control", &control, "volume", "list"],
        ["volume", "--control", &control, "list"],
        ["volume", "list", "--control", &control],
    ] {
        run(words).ok();
    }
    let from_env = |words: &[&str]| {
        let mut command = stratablk(words);
        Ran::from(command.env("STRATABLK_CONTROL", &control).output().unwrap())
    };
    from_env(&["volume", "list"]).ok();
    from_env(&["volume", "list", "--json"]).json();
}

#[test]
fn capabilities_are_json() {
    let capabilities = run(["--print-capabilities"]).json();
    assert_eq!(capabilities["type"], "block");
    let features = capabilities["features"].as_array().unwrap();
    assert!(features.contains(&"read-only".into()) && features.contains(&"blk-file".into()));
}

#[test]
fn the_control_socket_is_private() {
    let f = Fixture::new();
    let mode = fs::symlink_metadata(f.daemon.control())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o7777, 0o600);
}

// ---- the cache

#[test]
fn stats_move_as_guests_read_and_write() {
    let f = Fixture::with_cache_here();
    let image = fs::read(f.image("disk.img", 1 << 20)).unwrap();
    f.line("volume create web --base @/disk.img").ok();
    f.line("volume attach web --socket @/web.sock").ok();
    let mut disk = Disk::connect(&f.path("web.sock"));
    f.cache_becomes(&[
        ("size_bytes", 1 << 20),
        ("used_bytes", 0),
        ("hits", 0),
        ("misses", 0),
    ]);

    assert_eq!(disk.read(8, 8), image[4096..8192]);
    f.cache_becomes(&[
        ("hits", 0),
        ("misses", 1),
        ("fills", 1),
        ("used_bytes", 4096),
    ]);
    assert_eq!(disk.read(8, 8), image[4096..8192]);
    f.cache_becomes(&[("hits", 1), ("misses", 1), ("fills", 1), ("bypasses", 0)]);

    disk.write(64, &[7; 4096]);
    f.cache_becomes(&[
        ("writes", 1),
        ("dirty_bytes", 4096),
        ("write_backs", 0),
        ("used_bytes", 8192),
    ]);
    disk.write(64, &[8; 4096]);
    f.cache_becomes(&[("writes", 2), ("dirty_bytes", 4096)]);
    disk.flush();
    f.cache_becomes(&[("write_backs", 1), ("dirty_bytes", 0), ("used_bytes", 8192)]);
    assert_eq!(disk.read(64, 8), [8; 4096]);
    f.cache_becomes(&[("hits", 2), ("misses", 1)]);

    // More than the cache holds: something has to go.
    for sector in (0..2048).step_by(8) {
        disk.read(sector, 8);
    }
    for sector in (0..2048).step_by(8) {
        disk.write(sector, &[9; 4096]);
    }
    assert!(
        until(|| f.cache()["evictions"].as_u64().unwrap() > 0),
        "{}",
        f.cache()
    );

    let text = f.line("stats").ok();
    assert!(text.starts_with("cache size    1 MiB\nused "), "{text}");
    assert!(
        text.contains("hit rate ") && text.contains("VOLUME "),
        "{text}"
    );
    let volume = f.line("stats --json").json()["volumes"][0].clone();
    assert_eq!(
        (&volume["name"], &volume["state"]),
        (&"web".into(), &"connected".into())
    );
    assert_eq!(volume["requests"]["flushes"], 1, "{volume}");
    let mut control = UnixStream::connect(f.daemon.control()).unwrap();
    let request = "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    control.write_all(request.as_bytes()).unwrap();
    let mut metrics = String::new();
    control.read_to_string(&mut metrics).unwrap();
    let misses = format!("\nstratablk_cache_misses_total {}\n", f.cache()["misses"]);
    assert!(metrics.contains(&misses), "{misses} is not in {metrics}");
}

#[test]
fn stats_can_be_watched() {
    let f = Fixture::new();
    let control = f.daemon.control().to_str().unwrap();
    let mut child = stratablk(["stats", "--watch", "0.1", "--control", control])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    // The second look is the first that knows of an earlier one.
    assert!(lines.any(|line| line.unwrap() == "hits          0 (0 a second)"));
    // A watcher whose reader has gone ends by itself, and well.
    drop(lines);
    assert!(until(|| child.try_wait().unwrap().is_some()));
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let ran = f.line("stats --watch 1 --json");
    assert_eq!(ran.code, Some(2), "{ran:?}");
}

#[test]
fn a_killed_daemon_loses_nothing_and_the_next_one_starts_warm() {
    let f = Fixture::with_cache_here();
    let image = fs::read(f.image("disk.img", 1 << 20)).unwrap();
    f.line("volume create web --base @/disk.img").ok();
    f.line("volume attach web --socket @/web.sock").ok();
    let mut disk = Disk::connect(&f.path("web.sock"));
    assert_eq!(disk.read(8, 8), image[4096..8192]);
    disk.write(64, &[7; 4096]);
    disk.write(800, &[8; 512]);
    f.cache_becomes(&[("dirty_bytes", 8192), ("write_backs", 0)]);
    let Fixture { dir, daemon } = f;
    daemon.kill();
    drop(disk);

    // A look at the files alone is told what is not in them.
    let store = dir.path().join("store");
    let cache = dir.path().join("cache-of-another");
    fs::create_dir(&cache).unwrap();
    let check = |cache: &Path, more: &[&str]| {
        let words = [
            "check".as_ref(),
            "--store".as_ref(),
            store.as_os_str(),
            "--cache-dir".as_ref(),
            cache.as_os_str(),
        ];
        run(words.into_iter().chain(more.iter().map(OsStr::new)))
    };
    let text = check(dir.path(), &[]).ok();
    assert!(
        text.contains("note: 2 clusters were written and are not in the files yet"),
        "{text}"
    );
    assert!(
        text.contains("start the daemon") && text.contains("\nsound: "),
        "{text}"
    );
    assert_eq!(
        check(dir.path(), &["--json"]).json()["unwritten_clusters"],
        2
    );
    assert_eq!(check(&cache, &["--json"]).json()["unwritten_clusters"], 0);

    let daemon = Fixture::cached(&dir);
    assert!(
        daemon.log().contains("took over 2 clusters"),
        "{}",
        daemon.log()
    );
    let f = Fixture { dir, daemon };
    f.cache_becomes(&[("dirty_bytes", 0), ("used_bytes", 3 * 4096)]);
    let mut disk = Disk::connect(&f.path("web.sock"));
    assert_eq!(disk.read(64, 8), [7; 4096]);
    assert_eq!(disk.read(800, 1), [8; 512]);
    assert_eq!(disk.read(8, 8), image[4096..8192]);
    f.cache_becomes(&[("hits", 3), ("misses", 0)]);

    // After an orderly end nothing is left, in the cache or of it.
    disk.write(72, &[9; 4096]);
    drop(disk);
    let Fixture { dir, daemon } = f;
    assert!(daemon.stop().0.success());
    assert_eq!(caches_in(&dir), 0);
    assert_eq!(
        check(dir.path(), &["--json"]).json()["unwritten_clusters"],
        0
    );
}

#[test]
fn a_daemon_that_cannot_start_leaves_no_cache() {
    let dir = cache_dir();
    let (store, control) = (dir.path().join("store"), dir.path().join("precious"));
    fs::write(&control, "data").unwrap();
    let args = ["--store", "--control", "--cache-dir"].map(OsStr::new);
    let paths = [store.as_path(), &control, dir.path()].map(Path::as_os_str);
    let args = args.into_iter().zip(paths).flat_map(<[&OsStr; 2]>::from);
    Daemon::try_start(args, &control).unwrap_err().refused();
    assert!(store.exists(), "it came as far as that");
    assert_eq!(caches_in(&dir), 0);
}

/// How many caches are in a directory.
fn caches_in(dir: &TempDir) -> usize {
    let names = fs::read_dir(dir.path()).unwrap();
    names
        .filter(|name| name.as_ref().unwrap().path().extension() == Some(OsStr::new("cache")))
        .count()
}

#[test]
fn options_of_the_cache_that_cannot_be_are_refused() {
    let dir = cache_dir();
    let store = dir.path().join("store");
    let (place, store_arg) = (dir.path().to_str().unwrap(), store.to_str().unwrap());
    let refused = |code: i32, option: [&str; 2], words: &[&str]| {
        let name = option[0].split('=').next().unwrap();
        let mut args = vec!["serve", "--store", store_arg];
        args.extend(option);
        if name != "--cache-dir" {
            args.extend(["--cache-dir", place]);
        }
        let ran = run(args);
        let message = &ran.stderr;
        assert_eq!(
            (ran.code, ran.stdout.as_str()),
            (Some(code), ""),
            "{option:?}: {message}"
        );
        for word in words.iter().chain([&name]) {
            assert!(
                message.contains(word),
                "{option:?}: {word:?} is not in: {message}"
            );
        }
        assert!(!store.exists(), "{option:?}");
    };
    refused(2, ["--cache-size", "0"], &["at least 64K"]);
    refused(2, ["--cache-size", "65535"], &["at least 64K"]);
    refused(2, ["--cache-size", "65T"], &["at most 64T"]);
    refused(2, ["--cache-size", "much"], &["such as 10G"]);
    refused(2, ["--dirty-limit", "0"], &["at least 4K"]);
    refused(
        2,
        ["--dirty-limit", "257M"],
        &["--cache-size 256 MiB", "smaller"],
    );
    refused(2, ["--dirty-age", "86401"], &["from 0 to 86400"]);
    refused(2, ["--dirty-age=-1", "--cache-keep"], &["from 0 to 86400"]);
    refused(
        1,
        ["--cache-dir", "/no/such/directory"],
        &["No such file", "/dev/shm"],
    );
    refused(
        1,
        ["--cache-dir", "/proc/version"],
        &["not a directory", "/dev/shm"],
    );
}

#[test]
fn a_cache_that_does_not_fit_is_refused() {
    let dir = cache_dir();
    let store = dir.path().join("store");
    let ran = run([
        "serve",
        "--cache-size=60T",
        "--cache-dir",
        dir.path().to_str().unwrap(),
        "--store",
        store.to_str().unwrap(),
    ]);
    let message = ran.refused();
    assert!(
        message.contains("--cache-size") && message.contains("only"),
        "{message}"
    );
    assert_eq!(caches_in(&dir), 0);
}

#[test]
fn a_cache_on_a_disk_is_served_with_a_warning() {
    let dir = temp_dir();
    if rustix::fs::statfs(dir.path()).unwrap().f_type == 0x0102_1994 {
        eprintln!(
            "{} is in memory: nothing to be seen here",
            dir.path().display()
        );
        return;
    }
    let daemon = Fixture::cached(&dir);
    assert!(daemon.log().contains("is not on tmpfs"), "{}", daemon.log());
    daemon.line("stats").ok();
    assert!(daemon.stop().0.success());
    assert_eq!(caches_in(&dir), 0);
}

// ---- one disk

/// Starts `serve --blk-file` on an image of 1 MiB.
fn one_disk(dir: &Path, more: &[&str]) -> Result<Daemon, Ran> {
    let image = dir.join("disk.img");
    if !image.exists() {
        write_image(&image, 1 << 20);
    }
    let mut args = vec!["--blk-file", image.to_str().unwrap()];
    args.extend(more);
    Daemon::try_start(args, &dir.join("disk.img.strata/control.sock"))
}

#[test]
fn one_disk_needs_no_set_up_and_keeps_its_store() {
    let dir = temp_dir();
    let socket = dir.path().join("disk.sock");
    let args = ["--socket-path", socket.to_str().unwrap()];
    let daemon = one_disk(dir.path(), &args).unwrap();
    UnixStream::connect(&socket).unwrap();
    daemon.line("snapshot create s1 disk").ok();
    let volume = daemon.line("volume show disk --json").json();
    assert_eq!(volume["attachment"]["socket"], args[1]);
    let (status, _, log) = daemon.stop();
    assert!(status.success(), "{log}");
    assert!(!socket.exists());

    let daemon = one_disk(dir.path(), &args).unwrap();
    let snapshots = daemon.line("snapshot list --json").json();
    assert_eq!(snapshots["snapshots"][0]["name"], "s1");
}

#[test]
fn one_disk_is_read_only_if_asked() {
    let dir = temp_dir();
    let socket = dir.path().join("disk.sock");
    let args = [
        "--socket-path",
        socket.to_str().unwrap(),
        "--read-only",
        "--queues",
        "3",
    ];
    let daemon = one_disk(dir.path(), &args).unwrap();
    let attachment = daemon.line("volume show disk --json").json()["attachment"].clone();
    assert_eq!(attachment["read_only"], true);
    assert_eq!(attachment["queues"], 3);
}

/// Starts one-disk mode with a socket as an inherited file descriptor.
fn one_disk_on_fd(dir: &Path, socket: &OwnedFd) -> Daemon {
    // A copy without CLOEXEC, at a number that nobody else of this process is given meanwhile.
    let copy = socket.try_clone().unwrap();
    fcntl_setfd(&copy, FdFlags::empty()).unwrap();
    one_disk(dir, &["--fd", &copy.as_raw_fd().to_string()]).unwrap()
}

#[test]
fn one_disk_takes_a_listening_socket() {
    let dir = temp_dir();
    let path = dir.path().join("listening");
    let listener = OwnedFd::from(UnixListener::bind(&path).unwrap());
    let _daemon = one_disk_on_fd(dir.path(), &listener);
    drop(listener);
    assert_eq!(vhost_features(&UnixStream::connect(&path).unwrap()), 8);
}

#[test]
fn one_disk_takes_a_connected_socket() {
    let dir = temp_dir();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let theirs = OwnedFd::from(theirs);
    let daemon = one_disk_on_fd(dir.path(), &theirs);
    drop(theirs);
    assert_eq!(vhost_features(&ours), 8);
    // Nobody else can come, so the daemon ends with its front-end.
    drop(ours);
    let (status, log) = daemon.ended();
    assert_eq!(status.code(), Some(0), "{log}");
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

#[test]
fn one_disk_that_cannot_be_served_leaves_nothing_behind() {
    let dir = temp_dir();
    let socket = dir.path().join("disk.sock");
    let args = ["--socket-path", socket.to_str().unwrap()];
    let in_dir = |name: &str| fs::exists(dir.path().join(name)).unwrap();

    let missing = dir.path().join("missing.img");
    let words = [
        "serve",
        "--blk-file",
        missing.to_str().unwrap(),
        "--socket-path",
        args[1],
    ];
    assert!(run(words).refused().contains("missing.img"));
    assert!(!in_dir("missing.img.strata"));

    write_image(&dir.path().join("disk.img"), 1000);
    let ran = one_disk(dir.path(), &args).unwrap_err();
    assert!(ran.refused().contains("1000 bytes"));
    assert!(!in_dir("disk.img.strata"));

    write_image(&dir.path().join("disk.img"), 1024);
    let _live = UnixListener::bind(&socket).unwrap();
    let ran = one_disk(dir.path(), &args).unwrap_err();
    assert!(ran.refused().contains("disk.sock"));
    assert!(!in_dir("disk.img.strata"));
}

#[test]
fn a_number_that_is_no_socket_is_refused() {
    let dir = temp_dir();
    for fd in ["0", "77", "-1"] {
        let ran = one_disk(dir.path(), &["--fd", fd].map(|word| word)).unwrap_err();
        assert_ne!(ran.code, Some(0), "{fd}");
        assert!(!dir.path().join("disk.img.strata").exists());
    }
}

// ---- starting and stopping

#[test]
fn sigterm_ends_it_in_order() {
    let f = Fixture::new();
    f.line("volume create web --size 1M").ok();
    f.line("volume attach web --socket @/web.sock").ok();
    // A front-end that says nothing, and a control client that says half a sentence.
    let _front_end = UnixStream::connect(f.path("web.sock")).unwrap();
    let mut client = UnixStream::connect(f.daemon.control()).unwrap();
    client.write_all(b"GET /v1/vol").unwrap();
    let control = f.daemon.control().to_owned();
    let (status, took, log) = f.daemon.stop();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert!(!control.exists());
}

#[test]
fn an_event_stream_does_not_hold_up_the_end() {
    let f = Fixture::new();
    let mut stream = UnixStream::connect(f.daemon.control()).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
        .write_all(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let mut heard = String::new();
    let mut hear_until = |what: &str| {
        let mut buf = [0; 4096];
        while !heard.contains(what) {
            let length = stream.read(&mut buf).unwrap();
            assert_ne!(length, 0, "{what:?} never came: {heard}");
            heard.push_str(&String::from_utf8_lossy(&buf[..length]));
        }
    };
    hear_until("text/event-stream");
    f.line("volume create web --size 1M").ok();
    hear_until("event: volume-created");
    f.line("snapshot create s1 web").ok();
    hear_until("event: snapshot-created");
    let (status, took, log) = f.daemon.stop();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[test]
fn a_second_daemon_is_refused_with_the_pid_of_the_first() {
    let f = Fixture::new();
    let other = f.path("other.sock");
    let args = [
        "--store",
        f.store().to_str().unwrap(),
        "--control",
        other.to_str().unwrap(),
    ]
    .map(ToOwned::to_owned);
    let message = Daemon::try_start(args, &other).unwrap_err().refused();
    assert!(message.contains(&f.daemon.pid().to_string()), "{message}");
    f.line("volume list").ok();
}

#[test]
fn the_control_socket_of_a_live_daemon_is_not_taken() {
    let f = Fixture::new();
    let args = [
        "--store",
        f.path("store2").to_str().unwrap(),
        "--control",
        f.daemon.control().to_str().unwrap(),
    ]
    .map(ToOwned::to_owned);
    let message = Daemon::try_start(args, f.daemon.control())
        .unwrap_err()
        .refused();
    assert!(message.contains("control.sock"), "{message}");
    f.line("volume list").ok();
}

#[test]
fn the_store_is_free_again_after_a_crash() {
    let f = Fixture::new();
    f.line("volume create web --size 1M").ok();
    let Fixture { dir, daemon } = f;
    daemon.signal(Signal::KILL);
    drop(daemon);
    let daemon = Daemon::on_store(&dir.path().join("store"));
    daemon.line("volume show web").ok();
}

// ---- bad input

#[test]
fn a_missing_base_is_refused() {
    let f = Fixture::new();
    refused(
        &f,
        "volume create web --base @/missing.img",
        &["missing.img", "No such file"],
    );
}

#[test]
fn a_base_that_is_not_whole_sectors_is_refused() {
    let f = Fixture::new();
    f.image("odd.img", 1000);
    refused(
        &f,
        "volume create web --base @/odd.img",
        &["odd.img", "1000", "512"],
    );
    f.image("empty.img", 0);
    refused(&f, "volume create web --base @/empty.img", &["empty.img"]);
    refused(&f, "volume create web --base @/store", &["store"]);
}

#[test]
fn a_size_that_cannot_be_is_refused() {
    let f = Fixture::new();
    refused(&f, "volume create web --size 1000", &["size", "512"]);
    refused(&f, "volume create web --size 0", &["size"]);
    refused(&f, "volume create web --size 1P", &["size"]);
}

#[test]
fn a_name_that_is_taken_is_refused() {
    let f = Fixture::new();
    f.line("volume create web --size 1M").ok();
    refused(&f, "volume create web --size 2M", &["web", "exists"]);
    f.line("snapshot create s1 web").ok();
    refused(&f, "snapshot create s1 web", &["s1", "exists"]);
    f.line("volume create db --size 1M").ok();
    refused(&f, "snapshot create s1 db web", &["s1", "exists"]);
}

#[test]
fn a_name_that_scripts_would_stumble_over_is_refused() {
    let f = Fixture::new();
    f.line("volume create web --size 1M").ok();
    for name in ["a/b", "a@b", ".hidden", "..", "\u{e4}", &"n".repeat(65)] {
        refused(
            &f,
            &format!("volume create {name} --size 1M"),
            &["cannot be used"],
        );
        refused(
            &f,
            &format!("snapshot create {name} web"),
            &["cannot be used"],
        );
        refused(&f, &format!("volume show {name}"), &["no volume"]);
    }
}

#[test]
fn an_unknown_volume_or_snapshot_is_refused() {
    let f = Fixture::new();
    f.line("volume create web --size 1M").ok();
    for line in [
        "volume show nobody",
        "volume delete nobody",
        "volume attach nobody --socket @/s",
        "volume detach nobody",
        "snapshot create s1 nobody",
        "snapshot create s1 web nobody",
        "snapshot list nobody",
        "tree nobody",
        "clone nobody@s1 copy",
    ] {
        refused(&f, line, &["volume", "nobody"]);
    }
    refused(&f, "clone web@never copy", &["snapshot", "never"]);
    refused(
        &f,
        "volume create copy --from web@never",
        &["snapshot", "never"],
    );
    assert!(!f.path("s").exists());
}

#[test]
fn an_attachment_that_cannot_be_is_refused() {
    let f = Fixture::new();
    f.line("volume create web --size 1M").ok();
    f.line("volume create db --size 1M").ok();
    let _live = UnixListener::bind(f.path("live.sock")).unwrap();
    fs::write(f.path("precious"), "data").unwrap();

    refused(&f, "volume attach web --socket @/live.sock", &["live.sock"]);
    refused(&f, "volume attach web --socket @/precious", &["precious"]);
    refused(
        &f,
        "volume attach web --socket @/no/such/directory/s",
        &["directory"],
    );
    refused(
        &f,
        &format!("volume attach web --socket @/{}", "s".repeat(108)),
        &["socket", "107"],
    );
    refused(&f, "volume detach web", &["not attached"]);
    assert_eq!(fs::read(f.path("precious")).unwrap(), b"data");
    UnixStream::connect(f.path("live.sock")).unwrap();

    f.line("volume attach web --socket @/web.sock").ok();
    refused(&f, "volume attach db --socket @/web.sock", &["web.sock"]);
    refused(
        &f,
        "volume attach web --socket @/other.sock",
        &["web.sock", "detach"],
    );
    refused(&f, "volume delete web", &["web", "detach"]);
    assert!(!f.path("other.sock").exists());
}

#[test]
fn a_store_of_a_newer_version_is_refused() {
    let f = Fixture::new();
    f.line("volume create web --size 1M").ok();
    let Fixture { dir, daemon } = f;
    assert!(daemon.stop().0.success());
    let store = dir.path().join("store");
    let catalog = OpenOptions::new()
        .write(true)
        .open(store.join("catalog.db"))
        .unwrap();
    // SQLite keeps user_version, our format's version, at byte 60 of its header, most significant byte first.
    catalog.write_all_at(&[0, 0, 0, 99], 60).unwrap();
    let before = fs::read(store.join("catalog.db")).unwrap();

    let control = store.join("control.sock");
    let args = ["--store".to_owned(), store.to_str().unwrap().to_owned()];
    let message = Daemon::try_start(args, &control).unwrap_err().refused();
    assert!(
        message.contains("newer") && message.contains("catalog.db"),
        "{message}"
    );
    assert_eq!(fs::read(store.join("catalog.db")).unwrap(), before);
    assert!(!control.exists());
}

/// The map file of a volume's active layer, of its base, or of a snapshot, by its layer's id.
fn map_of(store: &Path, layer: &Value) -> PathBuf {
    store
        .join("layers")
        .join(layer.as_str().unwrap())
        .join("map")
}

#[test]
fn a_damaged_journal_tail_is_dropped_and_told() {
    let f = Fixture::new();
    f.line("volume create web --size 1M").ok();
    let layer = show(&f, "web")["active_layer"].clone();
    let f = f.restart_after(|store| {
        let mut map = OpenOptions::new()
            .append(true)
            .open(map_of(store, &layer))
            .unwrap();
        map.write_all(&[0xa5; 48]).unwrap();
    });
    f.line("volume attach web --socket @/web.sock").ok();
    assert!(f.daemon.wait_for("dropped 48 bytes"), "{}", f.daemon.log());
    assert!(
        f.daemon.log().contains(layer.as_str().unwrap()),
        "{}",
        f.daemon.log()
    );
}

#[test]
fn a_damaged_checkpoint_is_refused_with_its_layer() {
    let f = Fixture::new();
    f.line("volume create web --size 1M").ok();
    f.line("volume create db --size 1M").ok();
    f.line("snapshot create s1 web").ok();
    f.line("volume attach web --socket @/web.sock").ok();
    let layer = f.line("snapshot list web --json").json()["snapshots"][0]["layer"].clone();
    let f = f.restart_after(|store| {
        let map = File::options()
            .read(true)
            .write(true)
            .open(map_of(store, &layer))
            .unwrap();
        let mut byte = [0];
        map.read_exact_at(&mut byte, 4096).unwrap();
        map.write_all_at(&[!byte[0]], 4096).unwrap();
    });
    // The daemon serves the rest, and shows what is wrong.
    let attachment = show(&f, "web")["attachment"].clone();
    assert_eq!(attachment["state"], "failed");
    assert!(
        attachment["error"]
            .as_str()
            .unwrap()
            .contains(layer.as_str().unwrap()),
        "{attachment}"
    );
    assert!(f.daemon.log().contains(layer.as_str().unwrap()));
    f.line("volume attach db --socket @/db.sock").ok();
    refused(
        &f,
        "volume attach web --socket @/web.sock",
        &[layer.as_str().unwrap(), "damaged"],
    );
}

#[test]
fn a_base_that_changed_is_refused() {
    let f = Fixture::new();
    let image = f.image("disk.img", 8192);
    f.line("volume create web --base @/disk.img").ok();
    let times = fs::metadata(&image).unwrap().modified().unwrap();
    OpenOptions::new()
        .append(true)
        .open(&image)
        .unwrap()
        .write_all(&[1; 512])
        .unwrap();
    refused(
        &f,
        "volume attach web --socket @/web.sock",
        &["disk.img", "changed"],
    );

    // The same length, another time.
    write_image(&image, 8192);
    let file = File::options().write(true).open(&image).unwrap();
    file.set_modified(times + Duration::from_secs(1)).unwrap();
    refused(
        &f,
        "volume attach web --socket @/web.sock",
        &["disk.img", "changed"],
    );

    file.set_modified(times).unwrap();
    f.line("volume attach web --socket @/web.sock").ok();
}

#[test]
fn a_full_disk_refuses_new_volumes_and_snapshots() {
    // A small file system of our own needs a mount name space of our own.
    let unshare = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "true"])
        .status();
    let unshare: &[&str] = match unshare {
        Ok(status) if status.success() => &["--user", "--map-root-user", "--mount"],
        _ => &["--mount"],
    };
    let dir = temp_dir();
    let (store, control) = (dir.path().join("store"), dir.path().join("control.sock"));
    fs::create_dir(&store).unwrap();
    let mut command = Command::new("unshare");
    command.args(unshare).args(["sh", "-c"]).arg(
        "mount -t tmpfs -o size=2m,mode=700 tmpfs \"$1\" && exec \"$0\" serve --store \"$1\" --control \"$2\"",
    );
    command.arg(binary()).args([&store, &control]);
    let daemon = Daemon::spawn(&mut command, &control).unwrap();
    let f = Fixture { dir, daemon };
    let inside = PathBuf::from(format!("/proc/{}/root{}", f.daemon.pid(), store.display()));
    f.line("volume create web --size 1M").ok();
    let layers = layers_of(&inside);
    assert_eq!(layers.len(), 1);

    let filled = fill(&inside.join("fill"));
    refused(&f, "volume create db --size 1M", &["No space left"]);
    refused(&f, "snapshot create s1 web", &["No space left"]);
    assert_eq!(layers_of(&inside), layers);

    drop(filled);
    fs::remove_file(inside.join("fill")).unwrap();
    f.line("volume create db --size 1M").ok();
    f.line("snapshot create s1 web db").ok();
}

/// Writes a file until the file system is full.
fn fill(path: &Path) -> File {
    let mut file = File::create(path).unwrap();
    for length in [4096, 1] {
        while file.write_all(&vec![1; length]).is_ok() {}
    }
    file
}

// ---- usage and output

#[test]
fn what_is_not_understood_exits_with_2() {
    let usage = |words: &[&str]| {
        let ran = run(words);
        assert_eq!(
            (ran.code, ran.stdout.as_str()),
            (Some(2), ""),
            "{words:?}: {}",
            ran.stderr
        );
        ran.stderr
    };
    usage(&[]);
    usage(&["frobnicate"]);
    usage(&["volume", "create", "web"]);
    usage(&["volume", "create", "web", "--size", "ten"]);
    usage(&["snapshot", "create", "s1"]);
    usage(&["serve"]);
    let control = PathBuf::from("/run/stratablk/control.sock");
    if !control.exists() {
        assert!(usage(&["volume", "list"]).contains("--control"));
    }
}

#[test]
fn without_a_daemon_the_message_says_how_to_start_one() {
    let dir = temp_dir();
    let control = dir.path().join("control.sock");
    let message = run(["--control", control.to_str().unwrap(), "volume", "list"]).refused();
    assert!(
        message.contains("stratablk serve") && message.contains("control.sock"),
        "{message}"
    );
}

#[test]
fn errors_are_json_too_where_json_was_asked_for() {
    let f = Fixture::new();
    let error: Value =
        serde_json::from_str(&f.line("volume show nobody --json").refused()).unwrap();
    assert_eq!(error["error"]["kind"], "not_found");
    assert_eq!(error["error"]["field"], "volume");
    assert!(
        error["error"]["message"]
            .as_str()
            .unwrap()
            .contains("nobody")
    );
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let f = Fixture::new();
    f.line("volume create web --size 1M").ok();
    let mut command = stratablk([
        "volume",
        "list",
        "--control",
        f.daemon.control().to_str().unwrap(),
    ]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let ran = Ran::from(
        command
            .stdout(writer)
            .stderr(Stdio::piped())
            .output()
            .unwrap(),
    );
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
}

// ---- check

#[test]
fn check_finds_a_sound_store_sound_and_a_damaged_one_damaged() {
    let f = Fixture::new();
    f.line("volume create web --size 1M").ok();
    f.line("snapshot create s1 web").ok();
    let layer = f.line("snapshot list web --json").json()["snapshots"][0]["layer"].clone();
    let store = f.store();
    let store = store.to_str().unwrap();
    let held = run(["check", "--store", store]).refused();
    assert!(held.contains(&f.daemon.pid().to_string()), "{held}");

    let Fixture { dir: _dir, daemon } = f;
    assert!(daemon.stop().0.success());
    run(["check", "--store", store]).ok();
    run(["check", "--store", store, "--json"]).json();

    let map = File::options()
        .write(true)
        .open(map_of(Path::new(store), &layer))
        .unwrap();
    map.write_all_at(&[0xff], 4100).unwrap();
    let ran = run(["check", "--store", store]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stdout.contains(layer.as_str().unwrap()), "{ran:?}");
}

#[test]
fn a_lost_catalog_is_rebuilt_from_the_layers() {
    let f = Fixture::new();
    f.image("disk.img", 8192);
    f.line("volume create web --base @/disk.img").ok();
    f.line("snapshot create s1 web").ok();
    let store = f.store();
    let Fixture { dir: _dir, daemon } = f;
    assert!(daemon.stop().0.success());
    fs::write(store.join("catalog.db"), "not a database").unwrap();

    let args = ["--store".to_owned(), store.to_str().unwrap().to_owned()];
    let message = Daemon::try_start(args, &store.join("control.sock"))
        .unwrap_err()
        .refused();
    assert!(message.contains("catalog.db"), "{message}");
    run([
        "check",
        "--store",
        store.to_str().unwrap(),
        "--rebuild-catalog",
    ])
    .ok();
    let daemon = Daemon::on_store(&store);
    assert_eq!(
        daemon.line("volume show web --json").json()["size_bytes"],
        8192
    );
    assert_eq!(
        daemon.line("snapshot list --json").json()["snapshots"][0]["name"],
        "s1"
    );
}

#[test]
fn a_missing_store_is_not_created_by_check() {
    let dir = temp_dir();
    let store = dir.path().join("nothing");
    let message = run(["check", "--store", store.to_str().unwrap()]).refused();
    assert!(message.contains("nothing"), "{message}");
    assert!(!store.exists());
}
