//! Bad input and damaged files.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use stratablk_tests::daemon::{Daemon, binary, temp_dir};

use crate::{Fixture, layers_of, map_of, refused, show, write_image};

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
        f.daemon.has_logged(layer.as_str().unwrap()),
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
    assert!(f.daemon.has_logged(layer.as_str().unwrap()));
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
