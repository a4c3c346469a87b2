//! One disk: `serve --blk-file`.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::io::{FdFlags, fcntl_setfd};
use stratablk_tests::daemon::{Daemon, Ran, run, temp_dir};

use crate::{vhost_features, write_image};

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
