//! What a thread of the daemon can do after it was taken over, tried from inside: `stratablk-confined` confines itself as
//! that thread is and tries one thing. What it needs works, all else fails, and all of it works where nothing is
//! confined, so that a failure means the confinement and nothing else.
//!
//! Also: options of the daemon that have to do with it.
#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};

use stratablk_tests::daemon::{Daemon, run, temp_dir};
use stratablk_tests::disk::Disk;
use tempfile::TempDir;

/// What came of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// It worked.
    Done,
    /// The call failed with this error.
    Refused(i32),
    /// The process was ended.
    Ended,
}

use Outcome::{Done, Ended, Refused};

/// Landlock's answer.
const DENIED: Outcome = Refused(libc::EACCES);
/// The answer to a call that is not on the list.
const UNLISTED: Outcome = Refused(libc::ENOSYS);

/// All kinds of threads.
const ROLES: [&str; 5] = ["control", "work", "attachment", "worker", "files"];

/// A place with files to try things on, and somebody else to hurt.
struct Place {
    /// The files.
    dir: TempDir,
    /// A port of this host.
    port: TcpListener,
    /// Another process.
    victim: Child,
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = self.victim.kill();
        let _ = self.victim.wait();
    }
}

impl Place {
    /// A new one.
    fn new() -> Self {
        let dir = temp_dir();
        for (folder, file) in [
            ("store", "file"),
            ("base", "image"),
            ("other", "secret"),
            ("allowed", "image"),
        ] {
            fs::create_dir(dir.path().join(folder)).unwrap();
            fs::write(dir.path().join(folder).join(file), "data").unwrap();
        }
        fs::create_dir(dir.path().join("sockets")).unwrap();
        drop(UnixListener::bind(dir.path().join("sockets/s")).unwrap());
        let victim = Command::new("sleep")
            .arg("600")
            .stdout(Stdio::null())
            .spawn();
        Self {
            dir,
            port: TcpListener::bind("127.0.0.1:0").unwrap(),
            victim: victim.expect("sleep"),
        }
    }

    /// Tries one thing as one kind of thread.
    fn attempt(&self, role: &str, attempt: &str, options: &[&str]) -> Outcome {
        let output = Command::new(env!("CARGO_BIN_EXE_stratablk-confined"))
            .args([role, attempt, "--dir"])
            .arg(self.dir.path())
            .args([
                "--port",
                &self.port.local_addr().unwrap().port().to_string(),
            ])
            .args(["--pid", &self.victim.id().to_string()])
            .args(options)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        match (output.status.signal(), output.status.code(), said.as_str()) {
            (Some(libc::SIGSYS), _, "") => Ended,
            (None, Some(0), "done") => Done,
            (None, Some(0), number) if number.parse::<i32>().is_ok() => {
                Refused(number.parse().unwrap())
            }
            _ => panic!("{role}, {attempt}: {output:?}"),
        }
    }
}

/// Tries each thing as each kind of thread, and without confinement, each in a place of its own.
fn all(table: &[(&str, [Outcome; 5])], options: &[&str]) {
    for (attempt, expected) in table {
        assert_eq!(
            Place::new().attempt("none", attempt, options),
            Done,
            "{attempt} where nothing is confined"
        );
        for (role, expected) in ROLES.iter().zip(expected) {
            assert_eq!(
                Place::new().attempt(role, attempt, options),
                *expected,
                "{attempt} as {role}"
            );
        }
    }
}

#[test]
fn what_threads_need_works() {
    all(
        &[
            ("work", [Done; 5]),
            ("message", [Done, UNLISTED, Done, UNLISTED, UNLISTED]),
            ("start-threads", [Done, DENIED, Done, DENIED, DENIED]),
        ],
        &[],
    );
}

#[test]
fn files_are_out_of_reach() {
    all(
        &[
            // control, work, attachment, worker, files
            ("read-secret", [Done, Done, DENIED, DENIED, DENIED]),
            ("read-base", [Done, Done, DENIED, DENIED, DENIED]),
            ("write-base", [Done, Done, DENIED, DENIED, DENIED]),
            ("read-store", [Done, Done, Done, DENIED, DENIED]),
            ("make-in-store", [Done, Done, Done, DENIED, DENIED]),
            ("make-dir-in-store", [Done, Done, Done, UNLISTED, UNLISTED]),
            ("make-outside", [DENIED, DENIED, DENIED, DENIED, DENIED]),
            ("remove-secret", [Done, Done, DENIED, UNLISTED, UNLISTED]),
            ("remove-socket", [Done, Done, Done, UNLISTED, UNLISTED]),
            (
                "make-socket",
                [Done, UNLISTED, UNLISTED, UNLISTED, UNLISTED],
            ),
            ("link", [UNLISTED; 5]),
        ],
        &[],
    );
}

#[test]
fn with_allow_the_control_side_is_bounded_too() {
    all(
        &[
            ("read-secret", [DENIED; 5]),
            (
                "remove-secret",
                [DENIED, DENIED, DENIED, UNLISTED, UNLISTED],
            ),
            ("write-base", [DENIED; 5]),
            ("read-allowed", [Done, Done, DENIED, DENIED, DENIED]),
            ("write-allowed", [Done, Done, DENIED, DENIED, DENIED]),
            ("make-in-allowed", [DENIED; 5]),
            (
                "make-socket",
                [DENIED, UNLISTED, UNLISTED, UNLISTED, UNLISTED],
            ),
            (
                "make-socket-in-allowed",
                [Done, UNLISTED, UNLISTED, UNLISTED, UNLISTED],
            ),
        ],
        &["--bounded"],
    );
}

#[test]
fn hostile_calls_end_the_process() {
    let calls = [
        "exec",
        "tcp",
        "ptrace",
        "mount",
        "bpf",
        "setns",
        "other-memory",
        "keys",
        "handle",
    ];
    all(&calls.map(|call| (call, [Ended; 5])), &[]);
    // Who starts no threads is not even asked what kind of process it wants.
    all(&[("fork", [Ended, DENIED, Ended, DENIED, DENIED])], &[]);
}

#[test]
fn unlisted_calls_are_answered_as_by_an_older_kernel() {
    all(
        &[
            ("kill", [UNLISTED; 5]),
            ("new-code", [UNLISTED; 5]),
            ("ring", [Done, UNLISTED, Done, UNLISTED, UNLISTED]),
        ],
        &[],
    );
}

/// Whether the tests run as root, who alone can become others.
fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// What `/proc` says of each thread of a daemon, in lines of its status: its name and the value of a field.
fn threads(daemon: &Daemon, field: &str) -> Vec<(String, String)> {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    let value = |status: &str, field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        line.unwrap_or_default()
            .trim_start_matches(':')
            .trim()
            .to_owned()
    };
    tasks
        .filter_map(|task| fs::read_to_string(task.ok()?.path().join("status")).ok())
        .map(|status| (value(&status, "Name"), value(&status, field)))
        .collect()
}

#[test]
fn every_thread_of_the_daemon_is_confined() {
    let dir = temp_dir();
    fs::write(dir.path().join("base.img"), vec![7; 1 << 20]).unwrap();
    let daemon = Daemon::start(
        ["--confine", "require", "--store"]
            .map(Into::into)
            .into_iter()
            .chain([dir.path().join("store").into_os_string()]),
        &dir.path().join("store/control.sock"),
    );
    let (base, socket) = (dir.path().join("base.img"), dir.path().join("s"));
    daemon
        .line(&format!("volume create web --base {}", base.display()))
        .ok();
    daemon
        .line(&format!("volume attach web --socket {}", socket.display()))
        .ok();
    let mut disk = Disk::connect(&socket);
    disk.write(0, &[1; 512]);
    disk.flush();
    let all = threads(&daemon, "Seccomp_filters");
    let names: Vec<&str> = all.iter().map(|(name, _)| name.as_str()).collect();
    for expected in [
        "stratablk",
        "attachment",
        "worker-0",
        "write-back",
        "upkeep",
        "jobs",
    ] {
        assert!(names.contains(&expected), "{expected} in {names:?}");
    }
    for (name, filters) in all {
        let filters: u32 = filters.parse().unwrap();
        // The one of the whole process, and one of its own.
        assert!(filters >= 2, "{name} has {filters}");
    }
    for (name, value) in threads(&daemon, "NoNewPrivs") {
        assert_eq!(value, "1", "{name}");
    }
    for (name, value) in threads(&daemon, "CapEff") {
        let none = u64::from_str_radix(&value, 16) == Ok(0);
        assert!(
            none || !(name.starts_with("worker") || name == "write-back"),
            "{name}"
        );
    }
    let metrics = Command::new("curl")
        .args(["-s", "--unix-socket"])
        .arg(daemon.control())
        .arg("http://localhost/metrics")
        .output();
    if let Ok(metrics) = metrics {
        let text = String::from_utf8_lossy(&metrics.stdout).into_owned();
        assert!(
            text.contains("\nstratablk_refused_calls_total 0\n"),
            "{text}"
        );
    }
    let (status, _, log) = daemon.stop();
    assert!(status.success(), "{log}");
    assert!(
        !log.contains("not confined") && !log.contains("system call"),
        "{log}"
    );
}

#[test]
fn what_is_outside_allow_is_refused_by_name() {
    let dir = temp_dir();
    let at = |name: &str| dir.path().join(name);
    for folder in ["images", "run", "elsewhere"] {
        fs::create_dir(at(folder)).unwrap();
    }
    for image in ["images/a.img", "elsewhere/b.img"] {
        fs::write(at(image), vec![1; 1 << 20]).unwrap();
    }
    let args = [
        "--store".into(),
        at("store").into_os_string(),
        "--allow-read".into(),
        at("images").into_os_string(),
        "--allow".into(),
        at("run").into_os_string(),
    ];
    let refused = run(["serve", "--store", "s", "--allow", "/nowhere/at/all"]).refused();
    assert!(
        refused.contains("--allow /nowhere/at/all: ")
            && refused.contains("before the daemon starts"),
        "{refused}"
    );
    let daemon = Daemon::start(&args, &at("store/control.sock"));
    let line =
        |words: &str| daemon.line(&words.replace("@/", &format!("{}/", dir.path().display())));
    let refused = line("volume create b --base @/elsewhere/b.img").refused();
    assert!(
        refused.contains("--allow-read") && refused.contains("elsewhere"),
        "{refused}"
    );
    std::os::unix::fs::symlink(at("elsewhere/b.img"), at("images/link.img")).unwrap();
    let refused = line("volume create b --base @/images/link.img").refused();
    assert!(
        refused.contains("leads to") && refused.contains("elsewhere` as well"),
        "{refused}"
    );
    let refused = line("import @/elsewhere/b.img b").refused();
    assert!(refused.contains("--allow-read"), "{refused}");
    line("volume create a --base @/images/a.img").ok();
    let refused = line("volume attach a --socket @/elsewhere/a.sock").refused();
    assert!(
        refused.contains("--allow ") && refused.contains("elsewhere"),
        "{refused}"
    );
    line("volume attach a --socket @/run/a.sock").ok();
    let mut disk = Disk::connect(&at("run/a.sock"));
    assert_eq!(disk.read(0, 8), vec![1; 4096]);
    drop(disk);
    line("snapshot create one a").ok();
    line("volume detach a").ok();
    let refused = line("snapshot delete a one --into-base").refused();
    assert!(refused.contains("--allow "), "{refused}");
    line("volume attach a --socket @/run/a.sock").ok();
    daemon.stop();
    // What the store remembers needs no option, and neither does the store itself.
    let args = [
        &args[..2],
        &["--allow".into(), at("elsewhere").into_os_string()],
    ]
    .concat();
    let daemon = Daemon::start(&args, &at("store/control.sock"));
    let mut disk = Disk::connect(&at("run/a.sock"));
    assert_eq!(disk.read(0, 8), vec![1; 4096]);
    drop(disk);
    let (status, _, log) = daemon.stop();
    assert!(status.success(), "{log}");
}

#[test]
fn a_volume_that_lies_over_its_image_again_starts() {
    let dir = temp_dir();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir(at("images")).unwrap();
    fs::write(at("images/a.img"), vec![1; 1 << 20]).unwrap();
    let args = ["--store".into(), at("store").into_os_string()];
    let start = || Daemon::start(&args, &at("store/control.sock"));
    let daemon = start();
    let line = |daemon: &Daemon, words: &str| {
        daemon
            .line(&words.replace("@/", &format!("{}/", dir.path().display())))
            .ok()
    };
    line(&daemon, "volume create a --base @/images/a.img");
    line(&daemon, "snapshot create one a");
    line(&daemon, "volume flatten a --wait");
    let (status, _, log) = daemon.stop();
    assert!(status.success(), "{log}");
    // Attached while nothing of the image is below it.
    let daemon = start();
    line(&daemon, "volume attach a --socket @/a.sock");
    line(&daemon, "snapshot restore a one");
    let mut disk = Disk::connect(&at("a.sock"));
    assert_eq!(disk.read(0, 8), vec![1; 4096]);
    drop(disk);
    let (status, _, log) = daemon.stop();
    assert!(status.success() && !log.contains("denied"), "{log}");
}

#[test]
fn sockets_can_be_opened_to_a_group() {
    let dir = temp_dir();
    let gid = fs::metadata(dir.path()).unwrap().gid();
    let store = dir.path().join("store");
    let start = |group: &str| {
        let args = [
            "--store".into(),
            store.clone().into_os_string(),
            "--socket-group".into(),
            group.into(),
        ];
        Daemon::try_start(args, &store.join("control.sock"))
    };
    let refused = start("no-such-group").unwrap_err().refused();
    assert!(
        refused.contains("--socket-group no-such-group"),
        "{refused}"
    );
    assert!(!store.exists(), "nothing was made");
    let daemon = start(&gid.to_string()).unwrap();
    let socket = dir.path().join("s");
    daemon.line("volume create web --size 1M").ok();
    daemon
        .line(&format!("volume attach web --socket {}", socket.display()))
        .ok();
    let found = fs::metadata(&socket).unwrap();
    assert_eq!((found.mode() & 0o777, found.gid()), (0o660, gid));
}

#[test]
fn root_becomes_another_user() {
    let dir = temp_dir();
    let store = dir.path().join("store");
    let start = |user: &str, more: &[&str]| {
        let args = ["--user", user, "--store", store.to_str().unwrap()];
        Daemon::try_start(args.iter().chain(more), &store.join("control.sock"))
    };
    if !is_root() {
        let refused = start("nobody", &[]).unwrap_err().refused();
        assert!(refused.contains("only root"), "{refused}");
        return;
    }
    for (user, what) in [
        ("no-such-user", "no such user"),
        ("nobody:no-such-group", "no group"),
        ("root", "that is root"),
    ] {
        let refused = start(user, &[]).unwrap_err().refused();
        assert!(refused.contains(what), "{refused}");
    }
    // The user may enter the directory and not write to it.
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
    let refused = start("nobody", &[]).unwrap_err().refused();
    assert!(refused.contains("make a store in"), "{refused}");
    fs::create_dir(&store).unwrap();
    let refused = start("nobody", &[]).unwrap_err().refused();
    assert!(refused.contains("chown -R nobody"), "{refused}");
    let (uid, gid) = (65534, 12345);
    std::os::unix::fs::chown(dir.path(), Some(uid), None).unwrap();
    std::os::unix::fs::chown(&store, Some(uid), None).unwrap();
    let daemon = start("nobody:12346", &["--socket-group", "12345"]).unwrap();
    for (name, value) in threads(&daemon, "Uid") {
        assert_eq!(value, "65534\t65534\t65534\t65534", "{name}");
    }
    for (name, value) in threads(&daemon, "Gid") {
        assert_eq!(value, "12346\t12346\t12346\t12346", "{name}");
    }
    for (name, value) in threads(&daemon, "Groups") {
        assert_eq!(value, gid.to_string(), "{name}");
    }
    for (name, value) in threads(&daemon, "CapPrm") {
        assert_eq!(u64::from_str_radix(&value, 16), Ok(0), "{name}");
    }
    let socket = dir.path().join("s");
    daemon.line("volume create web --size 1M").ok();
    daemon
        .line(&format!("volume attach web --socket {}", socket.display()))
        .ok();
    assert_eq!(fs::metadata(&socket).unwrap().gid(), gid);
    let mut disk = Disk::connect(&socket);
    disk.write(5, &[9; 512]);
    disk.flush();
    drop(disk);
    let (status, _, log) = daemon.stop();
    assert!(status.success(), "{log}");
    assert_eq!(fs::metadata(store.join("catalog.db")).unwrap().uid(), uid);
}
