//! Starting and stopping.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::process::Signal;
use stratablk_tests::daemon::{DEADLINE, Daemon};

use crate::Fixture;

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
