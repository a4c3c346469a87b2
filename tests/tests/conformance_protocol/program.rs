//! The program itself: its arguments, its sockets and its end (line 37).

use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use stratablk_tests::daemon::stratablk;
use stratablk_tests::disk::Disk;
use stratablk_tests::frontend::FrontEnd;
use stratablk_tests::guest::{Guest, GuestOptions};
use stratablk_tests::launch::{Program, Server, ServerOptions};
use stratablk_tests::pattern;
use stratablk_tests::process::Process;
use stratablk_tests::wire::{Wire, code};

use crate::greeted;

/// Line 37: the back-end ends quickly and with status 0 on SIGTERM: idle, with a silent front-end, with one that runs.
#[test]
fn c37_sigterm_ends_it_quickly() {
    for situation in 0..4 {
        let mut server = Server::start();
        let started = Instant::now();
        let status = match situation {
            0 => server.terminate(),
            1 => {
                let _silent = FrontEnd::connect(&server.socket());
                server.terminate()
            }
            2 => {
                let front_end = greeted(&server);
                front_end
                    .wire
                    .send_bytes(&[2, 0, 0, 0, 1], &[])
                    .expect("the back-end reads");
                server.terminate()
            }
            _ => {
                let mut guest = server.guest();
                for sector in 0..32 {
                    let buffers = guest.read_of(sector);
                    guest.rings[0].submit(&buffers);
                }
                server.terminate()
            }
        };
        assert!(status.success(), "situation {situation}: {status}");
        assert!(
            started.elapsed() < Duration::from_secs(5),
            "situation {situation}"
        );
        assert!(
            !server.socket().exists(),
            "situation {situation}: the socket is left"
        );
    }
}

/// Line 37: `--fd` takes a socket that listens, or one that is connected.
#[test]
fn c37_fd_takes_listening_and_connected_sockets() {
    if Program::chosen() != Program::Stratablk {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let image = dir.path().join("image");
    std::fs::write(&image, pattern::base(0, 64)).expect("an image");
    let serve = |socket: std::os::fd::OwnedFd| {
        // The shell moves its standard input to a descriptor that the program inherits.
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "exec \"$0\" serve --blk-file \"$1\" --fd 3 3<&0 </dev/null",
        ]);
        command.arg(stratablk([""; 0]).get_program()).arg(&image);
        command
            .stdin(Stdio::from(socket))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Process {
            child: command.spawn().expect("a shell"),
        }
    };
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).expect("a socket");
    let process = serve(listener.into());
    for _ in 0..2 {
        pattern::assert_same(
            &Disk::connect(&path).read(5, 3),
            &pattern::base(5, 3),
            "listening",
        );
    }
    drop(process);
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    let process = serve(theirs.into());
    let front_end = FrontEnd::new(Wire::from_stream(ours).expect("a socket"));
    let guest = Guest::negotiate_over(front_end, GuestOptions::default());
    guest.start_ring(0);
    pattern::assert_same(
        &Disk::new(guest).read(5, 3),
        &pattern::base(5, 3),
        "connected",
    );
    drop(process);
}

/// Line 37: `--print-capabilities` prints one JSON document that says what the program is.
#[test]
fn c37_print_capabilities_is_json() {
    if Program::chosen() != Program::Stratablk {
        return;
    }
    let output = stratablk(["--print-capabilities"])
        .output()
        .expect("the program");
    assert!(output.status.success(), "{output:?}");
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(json["type"], "block");
    let features = json["features"].as_array().expect("features");
    for feature in ["read-only", "blk-file"] {
        assert!(features.iter().any(|have| have == feature), "{feature}");
    }
}

/// Line 37: the description for management software names the program and its type.
#[test]
fn c37_description_for_management_software() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../backend/share/50-stratablk.json"
    );
    let text = std::fs::read_to_string(path).expect("the description");
    let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(json["type"], "block");
    assert!(
        json["binary"]
            .as_str()
            .is_some_and(|binary| binary.ends_with("stratablk"))
    );
}

/// Line 37: what cannot work fails early, with a message and a status.
#[test]
fn c37_it_fails_early() {
    if Program::chosen() != Program::Stratablk {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let odd = dir.path().join("odd");
    std::fs::write(&odd, [0; 700]).expect("an image");
    for (name, image) in [
        ("no file", dir.path().join("missing")),
        ("an odd size", odd),
    ] {
        let output = stratablk(["serve", "--blk-file"])
            .arg(&image)
            .arg("--socket-path")
            .arg(dir.path().join("socket"))
            .output()
            .expect("the program");
        assert_eq!(output.status.code(), Some(1), "{name}: {output:?}");
        assert!(!output.stderr.is_empty(), "{name}: no message");
        assert!(!dir.path().join("socket").exists(), "{name}: a socket");
    }
}

/// Line 37: a socket on which a live server listens is not taken over; a stale one is.
#[test]
fn c37_a_live_socket_is_not_taken_over() {
    if Program::chosen() != Program::Stratablk {
        return;
    }
    let mut server = Server::start();
    let dir = tempfile::tempdir().expect("a folder");
    let image = dir.path().join("image");
    std::fs::write(&image, pattern::base(0, 64)).expect("an image");
    let output = stratablk(["serve", "--blk-file"])
        .arg(&image)
        .arg("--socket-path")
        .arg(server.socket())
        .output()
        .expect("the program");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    server.assert_serves();
    server.process.kill();
    assert!(
        server.socket().exists(),
        "a killed server leaves its socket"
    );
    server.restart();
    server.assert_serves();
}

/// Line 37: the number of queues that was asked for is offered, and all of them work.
#[test]
fn c37_all_queues_work() {
    let server = Server::start_with(ServerOptions {
        queues: 4,
        ..ServerOptions::default()
    });
    let mut guest = server.guest_with(GuestOptions {
        queues: 4,
        ..GuestOptions::default()
    });
    assert_eq!(
        guest.front_end.ask(code::GET_QUEUE_NUM, &[], &[]).as_u64(),
        4
    );
    for index in 0..4 {
        let sector = u64::try_from(index).expect("small");
        let buffers = guest.read_of(sector);
        guest.rings[index].submit(&buffers);
        guest.rings[index].wait();
        guest.assert_read(&buffers, sector);
    }
}
