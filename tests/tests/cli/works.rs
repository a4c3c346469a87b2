//! What works: volumes, bases, snapshots, attachments.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::Stdio;

use serde_json::Value;
use stratablk_tests::daemon::{DEADLINE, Daemon, Ran, run, stratablk};

use crate::{Fixture, layers_of, show, vhost_features};

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
fn a_daemon_does_not_take_the_socket_that_clients_are_told_of() {
    let f = Fixture::new();
    let store = f.path("other");
    let mut command = stratablk(["serve", "--cache-size", "1M"]);
    command
        .arg("--store")
        .arg(&store)
        .arg("--cache-dir")
        .arg(f.dir.path())
        .env("STRATABLK_CONTROL", f.daemon.control())
        .stderr(Stdio::piped());
    let mut daemon = command.spawn().unwrap();
    let log = BufReader::new(daemon.stderr.take().unwrap());
    let own = store.join("control.sock").display().to_string();
    let mut lines = Vec::new();
    for line in log.lines().map_while(Result::ok) {
        let ready = line.contains("ready:");
        lines.push(line);
        if ready {
            break;
        }
    }
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    let last = lines.last().unwrap();
    assert!(last.contains("ready") && last.contains(&own), "{lines:?}");
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
