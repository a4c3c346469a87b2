//! The cache and its figures.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;

use stratablk_tests::daemon::{Daemon, run, stratablk, temp_dir};
use stratablk_tests::disk::Disk;
use stratablk_tests::wait::until;
use tempfile::TempDir;

use crate::{Fixture, cache_dir};

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
    // The store knows where it is, whatever the next daemon is to use.
    assert_eq!(check(&cache, &["--json"]).json()["unwritten_clusters"], 2);

    let daemon = Fixture::cached(&dir);
    assert!(
        daemon.has_logged("took over 2 clusters"),
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
fn a_cache_that_somebody_removed_is_missed() {
    let f = Fixture::with_cache_here();
    f.line("volume create web --size 1M").ok();
    f.line("volume attach web --socket @/web.sock").ok();
    let mut disk = Disk::connect(&f.path("web.sock"));
    disk.write(64, &[7; 4096]);
    let Fixture { dir, daemon } = f;
    daemon.kill();
    drop(disk);
    let left = fs::read_dir(dir.path()).unwrap();
    let mut left = left.map(|entry| entry.unwrap().path());
    let left = left.find(|path| path.extension() == Some(OsStr::new("cache")));
    fs::remove_file(left.unwrap()).unwrap();
    let store = dir.path().join("store");
    let check = || {
        let words = ["check".as_ref(), "--store".as_ref(), store.as_os_str()];
        let here = ["--cache-dir".as_ref(), dir.path().as_os_str()];
        run(words.into_iter().chain(here)).ok()
    };
    let text = check();
    assert!(
        text.contains("warning: ") && text.contains("is gone: what guests wrote"),
        "{text}"
    );
    let daemon = Fixture::cached(&dir);
    assert!(
        daemon.has_logged("is gone: what guests wrote"),
        "{}",
        daemon.log()
    );
    // Once is enough, and an orderly end leaves nothing to be missed.
    assert!(daemon.stop().0.success());
    assert!(!check().contains("is gone"));
    let daemon = Fixture::cached(&dir);
    assert!(!daemon.log().contains("is gone"), "{}", daemon.log());
    assert!(daemon.stop().0.success());
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
    assert!(daemon.has_logged("is not on tmpfs"), "{}", daemon.log());
    daemon.line("stats").ok();
    assert!(daemon.stop().0.success());
    assert_eq!(caches_in(&dir), 0);
}
