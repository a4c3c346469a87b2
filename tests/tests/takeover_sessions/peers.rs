//! What the other process says, or leaves unsaid, has no effect on guests but that they wait.

use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use stratablk_tests::daemon::{Daemon, stratablk, temp_dir};

use super::*;

/// How long the daemon may take to stop.
const STOP_MAX: Duration = Duration::from_secs(8);
/// Much less than a new process may take over a letter.
const SOON: Duration = Duration::from_secs(3);

/// Sends a letter without descriptors.
fn say(mut stream: &UnixStream, letter: &Value) {
    let text = letter.to_string();
    let mut bytes = u32::try_from(text.len()).unwrap().to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(text.as_bytes());
    stream.write_all(&bytes).unwrap();
}

/// The next letter; its descriptors are closed.
fn hear(mut stream: &UnixStream) -> Value {
    let mut head = [0; 8];
    stream.read_exact(&mut head).unwrap();
    let [a, b, c, d, ..] = head;
    let len = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap();
    let mut text = vec![0; len];
    stream.read_exact(&mut text).unwrap();
    serde_json::from_slice(&text).unwrap()
}

/// Waits until the other side has closed the connection.
fn await_end(mut stream: &UnixStream) {
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
}

/// A real new process that has come to us as if we were the daemon, and what it has said.
fn comer(store: &Path) -> (Daemon, UnixStream, Value) {
    let listener = UnixListener::bind(store.join("takeover.sock")).unwrap();
    let arguments = ["serve", "--takeover", "--store", store.to_str().unwrap()];
    let daemon = Daemon::launch(&mut stratablk(arguments), &store.join("control.sock"));
    let (stream, _) = listener.accept().unwrap();
    let hello = hear(&stream);
    assert_eq!(hello["letter"], "hello");
    (daemon, stream, hello)
}

/// What a new process says first.
fn hello() -> Value {
    let dir = temp_dir();
    let (daemon, stream, hello) = comer(dir.path());
    drop(stream);
    let (status, log) = daemon.ended();
    assert_eq!(status.code(), Some(1), "{log}");
    hello
}

/// The same letter of a program that has the next version of the catalog.
fn of_next_version(mut letter: Value) -> Value {
    let version = letter["formats"]["catalog"].as_i64().unwrap();
    letter["formats"]["catalog"] = json!(version + 1);
    letter
}

/// Goes to the daemon as a new process.
fn go(host: &Host, hello: &Value) -> UnixStream {
    let stream = UnixStream::connect(host.store().join("takeover.sock")).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    say(&stream, hello);
    stream
}

/// Takes everything that is handed over, up to the last message.
fn take_all(stream: &UnixStream) {
    let mut left = hear(stream)["volumes"].as_u64().unwrap();
    while left > 0 {
        let letter = hear(stream);
        left -= 1;
        left += letter["sessions"].as_u64().unwrap_or(0);
        // Of a session; a message itself has a body.
        left += letter["messages"].as_u64().unwrap_or(0);
    }
}

/// A new process that the daemon deals with.
fn welcomed(host: &Host) -> UnixStream {
    let stream = go(host, &hello());
    assert_eq!(hear(&stream)["letter"], "welcome");
    stream
}

/// One that may open the store.
fn take_store(host: &Host) -> UnixStream {
    let stream = welcomed(host);
    take_all(&stream);
    say(&stream, &json!({"letter": "received"}));
    assert_eq!(hear(&stream)["letter"], "open");
    stream
}

/// A host with a disk in use that holds `stamped(8, 0, 1)`.
fn busy_host() -> (Host, Disk) {
    let (host, socket) = host();
    let mut disk = Disk::connect(&socket);
    disk.write(0, &stamped(8, 0, 1));
    (host, disk)
}

/// Ends a test in which the daemon has gone: the next one has all that was written.
fn is_there_again(mut host: Host, disk: Disk) {
    host.serve();
    let mut disk = disk.reconnect(&host.path("disk.sock"));
    assert_eq!(disk.read(0, 1), stamped(8, 0, 1));
    drop(disk);
    host.finish();
}

#[test]
fn a_program_with_other_formats_is_told_to_wait_for_an_orderly_end() {
    let (mut host, mut disk) = busy_host();
    let stream = go(&host, &of_next_version(hello()));
    let answer = hear(&stream);
    assert_eq!(answer["letter"], "refused");
    let why = answer["why"].as_str().unwrap();
    assert!(why.contains("catalog: version"), "{why}");
    assert!(
        why.contains("start the new one without --takeover"),
        "{why}"
    );
    assert_eq!(disk.read(0, 1), stamped(8, 0, 1));
    host.succeed();
    assert_eq!(disk.read(0, 1), stamped(8, 0, 1));
    drop(disk);
    host.finish();
}

#[test]
fn a_daemon_with_other_formats_is_not_taken_over() {
    let dir = temp_dir();
    let (daemon, stream, hello) = comer(dir.path());
    let welcome = json!({
        "letter": "welcome", "store": "any", "pid": 1, "program": "0", "formats": hello["formats"],
    });
    say(&stream, &of_next_version(welcome));
    let (status, log) = daemon.ended();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("catalog: version"), "{log}");
    assert!(log.contains("without --takeover"), "{log}");
}

/// A new process that stops (SIGSTOP) before it may have the store is not waited for.
#[test]
fn one_that_says_nothing_is_left_alone() {
    let (mut host, mut disk) = busy_host();
    let stream = welcomed(&host);
    // The daemon has it in the socket, and no answer.
    let data = stamped(8, 1, 1);
    disk.write(0, &data);
    let log = || host.daemon.as_ref().unwrap().log();
    assert!(stratablk_tests::wait::until(
        || log().contains("this one goes on")
    ));
    disk.write(0, &stamped(8, 0, 1));
    // It may be stopped, and has descriptors of everything.
    let named = format!("kill -9 {}", std::process::id());
    assert!(stratablk_tests::wait::until(|| log().contains(&named)));
    await_end(&stream);
    host.succeed();
    assert_eq!(disk.read(0, 1), stamped(8, 0, 1));
    drop(disk);
    host.finish();
}

#[test]
fn a_daemon_that_was_not_given_away_is_stopped_in_order_and_at_once() {
    let (mut host, disk) = busy_host();
    let stream = welcomed(&host);
    assert_eq!(hear(&stream)["letter"], "head");
    let began = Instant::now();
    let daemon = host.daemon.take().unwrap();
    daemon.signal(Signal::TERM);
    let (status, log) = daemon.ended();
    assert!(status.success(), "{log}");
    assert!(log.contains("everything is flushed"), "{log}");
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    drop(stream);
    is_there_again(host, disk);
}

/// One that has the store is waited for, and serves or ends; the daemon still stops when it is told to, though not in order.
#[test]
fn a_daemon_that_waits_can_be_stopped() {
    let (mut host, disk) = busy_host();
    let stream = take_store(&host);
    let began = Instant::now();
    let daemon = host.daemon.take().unwrap();
    daemon.signal(Signal::TERM);
    let (status, log) = daemon.ended();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(
        log.contains("stopped while another process took over"),
        "{log}"
    );
    assert!(began.elapsed() < STOP_MAX, "{:?}", began.elapsed());
    drop(stream);
    // Nothing is lost by it.
    is_there_again(host, disk);
}

/// Where the new process gives up, the daemon goes on just long enough to end in order.
#[test]
fn a_stop_amid_a_takeover_that_fails_is_in_order() {
    let (mut host, disk) = busy_host();
    let stream = take_store(&host);
    let daemon = host.daemon.take().unwrap();
    daemon.signal(Signal::TERM);
    assert!(daemon.wait_for("SIGTERM"));
    drop(stream);
    let (status, log) = daemon.ended();
    assert!(status.success(), "{log}");
    assert!(log.contains("everything is flushed"), "{log}");
    is_there_again(host, disk);
}

/// A service manager that a new process takes over under.
struct Manager {
    /// Where it hears.
    place: PathBuf,
    /// What it hears by.
    socket: UnixDatagram,
}

impl Manager {
    /// One of this host.
    fn of(host: &Host) -> Self {
        let place = host.path("notify");
        let socket = UnixDatagram::bind(&place).unwrap();
        let patience = Some(Duration::from_secs(30));
        socket.set_read_timeout(patience).unwrap();
        Self { place, socket }
    }

    /// The next thing that it is told.
    fn told(&self) -> String {
        let mut said = [0; 64];
        let count = self.socket.recv(&mut said).unwrap();
        String::from_utf8_lossy(&said[..count]).into_owned()
    }

    /// Begins a takeover.
    fn next(&self, host: &Host) -> Daemon {
        let store = host.store();
        let mut next = stratablk(["serve", "--takeover", "--store", store.to_str().unwrap()]);
        next.env("NOTIFY_SOCKET", &self.place);
        Daemon::launch(&mut next, &store.join("control.sock"))
    }
}

#[test]
fn a_service_manager_is_told_who_serves_before_anything_else() {
    let (mut host, mut disk) = busy_host();
    let manager = Manager::of(&host);
    let next = manager.next(&host);
    assert_eq!(manager.told(), format!("MAINPID={}", next.pid()));
    assert_eq!(manager.told(), "READY=1");
    let (status, log) = host.daemon.replace(next).unwrap().ended();
    assert!(status.success(), "{log}");
    assert_eq!(disk.read(0, 1), stamped(8, 0, 1));
    drop(disk);
    host.finish();
    assert_eq!(manager.told(), "STOPPING=1");
}

#[test]
fn a_new_daemon_that_is_stopped_as_soon_as_it_serves_ends_in_order() {
    for _ in 0..TAKEOVERS {
        let (mut host, disk) = busy_host();
        let manager = Manager::of(&host);
        let next = manager.next(&host);
        manager.told();
        next.signal(Signal::TERM);
        let (status, log) = next.ended();
        assert!(status.success(), "{log}");
        assert!(log.contains("everything is flushed"), "{log}");
        let (status, log) = host.daemon.take().unwrap().ended();
        assert!(status.success(), "{log}");
        is_there_again(host, disk);
    }
}
