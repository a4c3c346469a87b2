//! What operators and their programs do to a daemon whose guests are at work: the guests notice nothing, all commands get an
//! answer, and when it is over everything is as it was.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::json;
use stratablk_tests::daemon::{DEADLINE, Daemon, run};
use stratablk_tests::disk::Disk;
use stratablk_tests::kill::background::Background;
use stratablk_tests::kill::client::{Client, Mix};
use stratablk_tests::kill::home::Cache;
use stratablk_tests::kill::oracle::SECTOR_BYTES;
use stratablk_tests::lifecycle::control::jobs_left;
use stratablk_tests::lifecycle::rig::{Rig, VOLUMES};
use stratablk_tests::load::random::Random;
use stratablk_tests::pattern;
use stratablk_tests::process::Holdings;
use stratablk_tests::wait::until;

/// Sectors of a disk: 8 MiB.
const SECTORS: usize = 16 * 1024;
/// Requests that the guest must complete to show that it goes on.
const PROGRESS: u64 = 200;
/// What the daemon may have besides: descriptors of who is connected at the moment of the look, a thread for each command
/// that may run at once, kept for a while, and what its allocator keeps.
const SLACK: Holdings = Holdings {
    fds: 8,
    threads: 32,
    resident_kib: 16 << 10,
    guest_mappings: 0,
};
/// What the allocator may keep of 512 connections, besides.
const KEPT_KIB: usize = 48 << 10;
/// Requests of one test.
const REQUESTS: usize = 10_000;
/// Commands of each client that changes the tree.
const COMMANDS: usize = 100;
/// How long a command takes that nobody holds up, on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(5);

/// A store with two volumes, its daemon, and a guest at work on one of them.
struct Site {
    /// Ends before the daemon does.
    guest: Option<Background>,
    /// The daemon.
    daemon: Daemon,
    /// All that outlives it.
    rig: Rig,
}

impl Site {
    /// Starts them.
    fn new(seed: u64) -> Self {
        let client = Client::new(seed, SECTORS, Mix::Everything);
        let rig = Rig::new(&client.oracle, true, Cache::SMALL);
        let daemon = rig.launch();
        assert!(daemon.await_ready(), "{}", daemon.log());
        let guest = Background::start(client, rig.socket(VOLUMES[0]));
        let site = Self {
            guest: Some(guest),
            daemon,
            rig,
        };
        site.assert_goes_on();
        site
    }

    /// Requests of the guest that have ended.
    #[track_caller]
    fn completed(&self) -> u64 {
        let shown = self
            .daemon
            .line(&format!("volume show {} --json", VOLUMES[0]))
            .json();
        let requests = &shown["attachment"]["requests"];
        assert_eq!(requests["errors"], 0, "{shown}");
        let count = |name| requests[name].as_u64().expect("a number");
        count("reads") + count("writes") + count("flushes") + count("discards")
    }

    /// The guest completes requests.
    #[track_caller]
    fn assert_goes_on(&self) {
        let before = self.completed();
        assert!(
            until(|| self.completed() > before + PROGRESS),
            "the guest stands still after {before} requests; log:\n{}",
            self.daemon.log()
        );
    }

    /// The daemon's descriptors.
    fn fds(&self) -> BTreeSet<u64> {
        let open = fs::read_dir(format!("/proc/{}/fd", self.daemon.pid())).expect("it runs");
        let number = |entry: fs::DirEntry| entry.file_name().to_str()?.parse().ok();
        open.flatten().filter_map(number).collect()
    }

    /// What the daemon has of the host.
    fn holdings(&self) -> Holdings {
        Holdings::of(self.daemon.pid())
    }

    /// The daemon has given back what it took meanwhile.
    #[track_caller]
    fn assert_has_no_more_than(&self, before: Holdings) {
        let good = until(|| self.holdings().fit_in(&(before + SLACK)));
        assert!(good, "{before:?} became {:?}", self.holdings());
    }

    /// The guest goes on to the end, the daemon stops in order, and its store is sound.
    #[track_caller]
    fn finish(mut self) {
        self.assert_goes_on();
        let counts = self.guest.take().expect("it is at work").finish();
        println!("{counts:?}");
        let (status, _, log) = self.daemon.stop();
        assert!(status.success(), "{status}: {log}");
        assert!(!log.contains("panicked"), "{log}");
        self.rig.check().unwrap_or_else(|what| panic!("{what}"));
    }
}

/// Connects to a control socket. A reply must come in time.
fn connect(control: &Path) -> UnixStream {
    let stream = UnixStream::connect(control).expect("it listens");
    stream.set_read_timeout(Some(DEADLINE)).expect("a socket");
    stream.set_write_timeout(Some(DEADLINE)).expect("a socket");
    stream
}

/// The whole reply, or what came of it before the connection was closed.
fn reply(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        Err(error) => panic!("no reply: {error}"),
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A request as text, the last one of its connection.
fn request(method: &str, target: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    )
}

/// Sends a request and returns the status and the rest of the reply.
fn ask(control: &Path, method: &str, target: &str, body: &str) -> (u16, String) {
    let mut stream = connect(control);
    stream
        .write_all(request(method, target, body).as_bytes())
        .expect("it reads");
    let text = reply(&mut stream);
    let status = text.get(9..12).and_then(|status| status.parse().ok());
    (
        status.unwrap_or_else(|| panic!("{method} {target}: {text:?}")),
        text,
    )
}

/// Daemons, checks and repairs on a store that is served are refused, whoever tries, and change nothing.
#[test]
fn a_store_has_one_daemon() {
    let site = Site::new(1);
    let store = site.rig.path("store");
    let (store, other) = (store.display().to_string(), site.rig.path("other.sock"));
    let pid = site.daemon.pid().to_string();
    let before = site.holdings();
    for _ in 0..4 {
        let args = [
            "--store",
            &store,
            "--control",
            other.to_str().expect("a plain path"),
        ];
        let message = Daemon::try_start(args, &other)
            .expect_err("a second daemon")
            .refused();
        assert!(
            message.contains(&pid) && message.contains(&store),
            "{message}"
        );
        let same = Daemon::try_start(["--store", &store], &other).expect_err("a second daemon");
        assert!(same.refused().contains(&pid));
        let checked = run(["check", "--store", &store]);
        assert_ne!(checked.code, Some(0), "{checked:?}");
        assert!(checked.stderr.contains(&pid), "{checked:?}");
    }
    site.assert_has_no_more_than(before);
    site.finish();
}

/// Looks in which a table of descriptors stays as it is, before it counts as full.
const SAME: u32 = 20;

/// Lets the daemon open nothing that it does not have open already, until dropped.
struct NoDescriptors {
    /// The daemon.
    pid: Pid,
    /// As it was.
    limit: Rlimit,
}

impl NoDescriptors {
    /// Sets the limit to the lowest number that is free, until it stays that: what the daemon still has to do in the background
    /// opens and closes files.
    fn impose(site: &Site) -> Self {
        let pid = i32::try_from(site.daemon.pid())
            .ok()
            .and_then(Pid::from_raw)
            .expect("a pid");
        let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
        let impose = |current| {
            let old = prlimit(Some(pid), Resource::Nofile, Rlimit { current, maximum });
            old.expect("a process of ours")
        };
        let lowest = || {
            let open = site.fds();
            (0..).find(|number| !open.contains(number))
        };
        let mut free = lowest();
        let limit = impose(free);
        let mut same = 0;
        let full = until(|| {
            let now = lowest();
            same = if now == free { same + 1 } else { 0 };
            if now < free {
                free = now;
                impose(free);
            }
            same >= SAME
        });
        assert!(full, "descriptors come and go: {:?}", site.fds());
        Self { pid, limit }
    }
}

impl Drop for NoDescriptors {
    fn drop(&mut self) {
        let old = Rlimit {
            current: self.limit.current,
            maximum: self.limit.maximum,
        };
        prlimit(Some(self.pid), Resource::Nofile, old).expect("a process of ours");
    }
}

/// A full table of descriptors: what needs none goes on, what needs one is refused with words, and it is over when it is over.
#[test]
fn a_full_table_of_descriptors_is_survived() {
    let site = Site::new(2);
    let [busy, quiet] = VOLUMES;
    let other = site.rig.path("new.sock").display().to_string();
    site.daemon
        .line(&format!("snapshot create first {busy} {quiet}"))
        .ok();
    let full = NoDescriptors::impose(&site);
    site.assert_goes_on();
    for line in [
        "volume create new --size 1M".to_owned(),
        format!("snapshot create second {busy}"),
        format!("volume create copy --from {busy}@first"),
        format!("volume create copy --from {busy}"),
    ] {
        let ran = site.daemon.line(&line);
        assert_eq!(ran.code, Some(1), "{line}: {ran:?}");
        assert!(ran.stderr.contains("open files"), "{line}: {ran:?}");
    }
    // Nothing stays of what was refused.
    let listed = site.daemon.line("volume list --json").ok();
    assert!(
        !listed.contains("\"new\"") && !listed.contains("copy"),
        "{listed}"
    );
    assert!(
        !site
            .daemon
            .line(&format!("snapshot list {busy} --json"))
            .ok()
            .contains("second")
    );
    // Its name goes. A job that cannot open what it needs fails with words, and can be taken up again.
    site.daemon
        .line(&format!("snapshot delete {quiet} first"))
        .ok();
    // Front-ends wait, or are sent away.
    let mut knock = connect(&site.rig.socket(quiet));
    // Clients that hold what is left make way for others.
    let idle: Vec<UnixStream> = (0..40).map(|_| connect(site.daemon.control())).collect();
    site.daemon.line("volume list").ok();
    site.assert_goes_on();
    // What is not needed can be given back.
    site.daemon.line(&format!("volume detach {quiet}")).ok();
    drop(full);
    drop(idle);
    knock.write_all(&[0]).ok();
    drop(knock);
    site.daemon.line(&site.rig.attach(quiet, 1)).ok();
    let mut disk = Disk::connect(&site.rig.socket(quiet));
    disk.write(0, &[7; SECTOR_BYTES]);
    disk.flush();
    assert_eq!(disk.read(0, 1), [7; SECTOR_BYTES]);
    drop(disk);
    site.daemon
        .line(&format!("snapshot create second {busy}"))
        .ok();
    site.daemon.line("volume create new --size 1M").ok();
    site.daemon
        .line(&format!("volume attach new --socket {other}"))
        .ok();
    site.daemon.line("volume detach new").ok();
    site.daemon.line("volume delete new").ok();
    let shown = site
        .daemon
        .line(&format!("volume show {busy} --json"))
        .json();
    assert!(shown["failure"].is_null(), "{shown}");
    site.finish();
}

/// Does something with so many connections at a time.
fn at_once<T: Send>(count: usize, what: impl Fn(usize) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let threads: Vec<_> = (0..count)
            .map(|number| {
                scope.spawn({
                    let what = &what;
                    move || what(number)
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a client"))
            .collect()
    })
}

/// Bytes that are no request, or one too large: each gets an answer or a closed connection, soon, and costs nothing.
#[test]
fn garbage_and_bodies_without_end_are_sent_away() {
    let site = Site::new(3);
    let control = site.daemon.control();
    let before = site.holdings();
    let mut random = Random::new(3);
    for _ in 0..200 {
        let mut noise = vec![0; 1 + usize::try_from(random.below(70_000)).expect("small")];
        random.fill(&mut noise);
        let mut stream = connect(control);
        // It may be sent away before it has said all.
        let _ = stream.write_all(&noise);
        let _ = stream.shutdown(Shutdown::Write);
        let text = reply(&mut stream);
        assert!(text.is_empty() || text.starts_with("HTTP/1.1 4"), "{text}");
    }
    // A gibibyte, with its length told and without.
    for head in ["Content-Length: 1073741824", "Transfer-Encoding: chunked"] {
        let mut stream = connect(control);
        let head = format!("POST /v1/volumes HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n");
        stream.write_all(head.as_bytes()).expect("it reads");
        let chunk = [b"10000\r\n".as_slice(), &[b' '; 0x10000], b"\r\n"].concat();
        let sent = (0..1 << 14)
            .take_while(|_| stream.write_all(&chunk).is_ok())
            .count();
        assert!(sent < 1 << 10, "{sent} chunks were taken");
        // The answer may be lost with what was not read.
        let mut text = Vec::new();
        let _ = stream.read_to_end(&mut text);
        let text = String::from_utf8_lossy(&text);
        assert!(
            text.is_empty() || text.starts_with("HTTP/1.1 413"),
            "{text}"
        );
    }
    // A head without an end.
    let mut stream = connect(control);
    stream.write_all(b"GET / HTTP/1.1\r\n").expect("it reads");
    let sent = (0..1 << 20)
        .take_while(|_| stream.write_all(b"X: y\r\n").is_ok())
        .count();
    assert!(sent < 1 << 20, "all of it was taken");
    site.assert_has_no_more_than(before);
    site.finish();
}

/// Ten thousand requests from eight clients, one connection each or one for each request; two in three are at fault.
#[test]
fn thousands_of_requests_are_answered() {
    let site = Site::new(4);
    let control = site.daemon.control();
    let before = site.holdings();
    let kinds = [
        ("GET", "/v1/volumes", "", 200),
        ("GET", "/v1/volumes/nobody", "", 404),
        (
            "POST",
            "/v1/snapshots",
            r#"{"name":"s","volumes":["nobody"]}"#,
            404,
        ),
        (
            "POST",
            "/v1/volumes",
            r#"{"name":"based","size_bytes":512}"#,
            409,
        ),
        ("GET", "/metrics", "", 200),
        ("DELETE", "/v1/volumes/based", "", 409),
    ];
    at_once(8, |client| {
        for number in 0..REQUESTS / 16 {
            let (method, target, body, expected) = kinds[(client + number) % kinds.len()];
            assert_eq!(
                ask(control, method, target, body).0,
                expected,
                "{method} {target}"
            );
        }
        // All at once, whose replies are read when all have been sent, or as it comes.
        let pipelined = request("GET", "/v1/status", "").replace("close", "keep-alive");
        let mut stream = connect(control);
        let mut writer = stream.try_clone().expect("a descriptor");
        let text = thread::scope(|scope| {
            scope.spawn(move || {
                for _ in 1..REQUESTS / 16 {
                    writer.write_all(pipelined.as_bytes()).expect("it reads");
                }
                writer
                    .write_all(request("GET", "/v1/status", "").as_bytes())
                    .expect("it reads");
            });
            reply(&mut stream)
        });
        assert_eq!(text.matches("HTTP/1.1 200").count(), REQUESTS / 16);
    });
    site.assert_has_no_more_than(before);
    site.finish();
}

/// Clients that come and do nothing, send a byte now and then, never read what they asked for, or never read events: twice
/// as many as there are places. Commands come through at once, and when all are gone nothing is left of them.
#[test]
fn clients_that_hang_keep_nobody_out() {
    let site = Site::new(5);
    let control = site.daemon.control();
    let openapi = request("GET", "/v1/openapi.json", "")
        .replace("close", "keep-alive")
        .repeat(20);
    let ways = [
        "",
        "GET /v1/status HTTP/1.1\r\nHos",
        "POST /v1/volumes HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
        &openapi,
        "GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n",
    ];
    let mut before = site.holdings();
    for first in [true, false] {
        let mut crowd = Vec::new();
        for number in 0..512 {
            let mut stream = connect(control);
            stream
                .write_all(ways[number % ways.len()].as_bytes())
                .expect("room in the socket");
            stream.set_nonblocking(true).expect("a socket");
            crowd.push(stream);
            // The slow ones say a little more.
            for stream in crowd.iter_mut().skip(1).step_by(ways.len()) {
                // Those that were closed do not.
                let _ = stream.write(b"x");
            }
            if number % 32 == 0 {
                let asked = Instant::now();
                assert_eq!(ask(control, "GET", "/v1/volumes", "").0, 200);
                assert!(
                    asked.elapsed() < AT_ONCE,
                    "after {number}: {:?}",
                    asked.elapsed()
                );
            }
        }
        // Events that nobody reads.
        for number in 0..300 {
            let body = format!(r#"{{"name":"v{number}","size_bytes":4096}}"#);
            assert_eq!(ask(control, "POST", "/v1/volumes", &body).0, 201);
            assert_eq!(
                ask(control, "DELETE", &format!("/v1/volumes/v{number}"), "").0,
                200
            );
        }
        site.assert_goes_on();
        assert!(
            site.fds().len() <= before.fds + 300,
            "more connections than places"
        );
        drop(crowd);
        if first {
            // What the allocator keeps of the first crowd serves the second.
            before.resident_kib += KEPT_KIB;
        }
        site.assert_has_no_more_than(before);
        before.resident_kib = site.holdings().resident_kib;
    }
    site.finish();
}

/// Eight clients change one tree at the same time, at random, over a guest at work: each command is carried out or refused
/// with words, and what is left is a sound tree in which nothing is lost.
#[test]
fn eight_clients_change_one_tree() {
    let site = Site::new(6);
    let control = site.daemon.control();
    let [busy, quiet] = VOLUMES;
    // What the disk that nobody uses holds must be found in it at the end, and in all clones of it.
    let marks: Vec<Vec<u8>> = (0..8)
        .map(|mark| pattern::stamped(mark, 8 * mark, 8))
        .collect();
    let mut disk = Disk::connect(&site.rig.socket(quiet));
    for (sector, mark) in (0..).step_by(8).zip(&marks) {
        disk.write(sector, mark);
    }
    disk.flush();
    drop(disk);
    let outcomes = at_once(8, |client| {
        let mut random = Random::new(600 + client as u64);
        let mut outcomes: BTreeMap<(&str, u16), u64> = BTreeMap::new();
        for _ in 0..COMMANDS {
            let pick = |random: &mut Random, words: &[&str]| {
                words[usize::try_from(random.below(words.len() as u64)).expect("small")].to_owned()
            };
            let volume = pick(&mut random, &[busy, quiet, "c0", "c1", "c2"]);
            let origin = pick(&mut random, &[busy, quiet]);
            let name = pick(
                &mut random,
                &["s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7"],
            );
            let copy = pick(&mut random, &["c0", "c1", "c2"]);
            let (kind, method, target, body) = match random.below(10) {
                0 | 1 => (
                    "snapshot",
                    "POST",
                    "/v1/snapshots".into(),
                    json!({ "name": name, "volumes": [volume] }),
                ),
                2 | 9 => (
                    "group",
                    "POST",
                    "/v1/snapshots".into(),
                    json!({ "name": name, "volumes": [busy, quiet] }),
                ),
                3 => (
                    "delete snapshot",
                    "DELETE",
                    format!("/v1/snapshots/{volume}/{name}"),
                    json!(null),
                ),
                4 => (
                    "push down",
                    "DELETE",
                    format!("/v1/snapshots/{volume}/{name}?push_down=true"),
                    json!(null),
                ),
                5 => (
                    "clone",
                    "POST",
                    "/v1/volumes".into(),
                    json!({ "name": copy, "from": { "volume": origin } }),
                ),
                6 => (
                    "delete volume",
                    "DELETE",
                    format!("/v1/volumes/{copy}"),
                    json!(null),
                ),
                7 => (
                    "flatten",
                    "POST",
                    format!("/v1/volumes/{copy}/flatten"),
                    json!({}),
                ),
                _ => (
                    "restore",
                    "POST",
                    format!("/v1/volumes/{quiet}/restore"),
                    json!({ "snapshot": name, "only": true }),
                ),
            };
            let body = if body.is_null() {
                String::new()
            } else {
                body.to_string()
            };
            let (status, text) = ask(control, method, &target, &body);
            // Done, or refused for what is so at the moment.
            assert!(
                [200, 201, 202, 204, 404, 409, 422].contains(&status),
                "{kind}: {text}"
            );
            assert!(
                status < 400 || text.contains("\"message\""),
                "{kind}: {text}"
            );
            *outcomes.entry((kind, status)).or_default() += 1;
        }
        outcomes
    });
    let mut all: BTreeMap<(&str, u16), u64> = BTreeMap::new();
    for (key, count) in outcomes.into_iter().flatten() {
        *all.entry(key).or_default() += count;
    }
    println!("{all:?}");
    for kind in [
        "snapshot",
        "group",
        "delete snapshot",
        "push down",
        "clone",
        "delete volume",
        "flatten",
        "restore",
    ] {
        assert!(
            all.iter()
                .any(|((done, status), _)| *done == kind && *status < 400),
            "no {kind} was done: {all:?}"
        );
    }
    assert!(until(|| jobs_left(control) == Ok(0)), "jobs do not end");
    let jobs = site.daemon.line("job list --json").ok();
    assert!(!jobs.contains("\"failed\""), "{jobs}");
    let volumes = site.daemon.line("volume list --json").json();
    let volumes = volumes["volumes"].as_array().expect("a list");
    let mut read = vec![quiet.to_owned()];
    for volume in volumes {
        assert!(volume["failure"].is_null(), "{volume}");
        let name = volume["name"].as_str().expect("a name");
        if ![busy, quiet].contains(&name) {
            site.daemon.line(&site.rig.attach(name, 1)).ok();
            // A copy of the disk at work holds other things.
            let base = volume["base"].is_null();
            if base {
                read.push(name.to_owned());
            }
        }
    }
    for volume in read {
        let mut disk = Disk::connect(&site.rig.socket(&volume));
        for (sector, mark) in (0..).step_by(8).zip(&marks) {
            pattern::assert_same(&disk.read(sector, 8), mark, &volume);
        }
    }
    site.finish();
}
