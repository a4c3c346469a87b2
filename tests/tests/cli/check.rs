//! `check`, and catalogs that are made anew.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use stratablk_tests::daemon::{Daemon, run, temp_dir};

use crate::{Fixture, map_of};

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
