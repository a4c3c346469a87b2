//! The commands on the tree of layers against the real daemon: each with what it prints, for people and as JSON.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use stratablk_tests::daemon::{Daemon, Ran, run, stratablk, temp_dir};
use stratablk_tests::disk::Disk;
use stratablk_tests::wait::until;
use tempfile::TempDir;

/// The size of the disks here.
const DISK_BYTES: usize = 4 << 20;

/// A store with its daemon, and a directory for images and sockets beside it.
struct Fixture {
    /// The daemon; ends before its directory.
    daemon: Daemon,
    /// Everything lies in here.
    dir: TempDir,
}

impl Fixture {
    /// A daemon on an empty store.
    fn new() -> Self {
        let dir = temp_dir();
        let daemon = Daemon::on_store(&dir.path().join("store"));
        Self { daemon, dir }
    }

    /// A path in the directory.
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a line of words against the daemon; `@/` stands for the directory.
    fn line(&self, line: &str) -> Ran {
        let here = format!("{}/", self.dir.path().display());
        self.daemon.cli(
            line.split_whitespace()
                .map(|word| word.replace("@/", &here)),
        )
    }

    /// The JSON of a command that goes well.
    #[track_caller]
    fn json(&self, line: &str) -> Value {
        self.line(&format!("{line} --json")).json()
    }

    /// A command that must be refused with these words, in text and in JSON.
    #[track_caller]
    fn refused(&self, line: &str, words: &[&str]) {
        let text = self.line(line).refused();
        let json = self.line(&format!("{line} --json")).refused();
        let json: Value = serde_json::from_str(&json).unwrap();
        let message = json["error"]["message"].as_str().unwrap();
        for word in words {
            assert!(text.contains(word), "{line}: {word:?} is not in {text}");
            assert!(
                message.contains(word),
                "{line}: {word:?} is not in {message}"
            );
        }
    }

    /// Starts a guest on a volume that is not attached yet, has it write one byte all over these sectors, and ends it.
    fn write(&self, volume: &str, sector: u64, sectors: usize, byte: u8) {
        self.guest(volume, |disk| {
            disk.write(sector, &vec![byte; sectors * 512]);
            disk.flush();
        });
    }

    /// The first byte of a sector of a volume.
    fn byte(&self, volume: &str, sector: u64) -> u8 {
        self.guest(volume, |disk| disk.read(sector, 1)[0])
    }

    /// Lets a guest use a volume that is not attached.
    fn guest<T>(&self, volume: &str, work: impl FnOnce(&mut Disk) -> T) -> T {
        let socket = format!("{volume}.sock");
        self.line(&format!("volume attach {volume} --socket @/{socket}"))
            .ok();
        let result = work(&mut Disk::connect(&self.path(&socket)));
        self.line(&format!("volume detach {volume}")).ok();
        result
    }

    /// A volume `web` with snapshots `s1` (all ones in the first MiB) and `s2` (twos in its first half), and threes since in
    /// the first 4 KiB.
    fn with_history() -> Self {
        let f = Self::new();
        f.line(&format!("volume create web --size {DISK_BYTES}"))
            .ok();
        f.write("web", 0, 2048, 1);
        f.line("snapshot create s1 web").ok();
        f.write("web", 0, 1024, 2);
        f.line("snapshot create s2 web").ok();
        f.write("web", 0, 8, 3);
        f
    }

    /// An image of sectors that each hold their number, all through.
    fn image(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        let sectors = (0..DISK_BYTES / 512).map(|n| vec![u8::try_from(n % 251).unwrap(); 512]);
        fs::write(&path, sectors.collect::<Vec<_>>().concat()).unwrap();
        path
    }

    /// Waits until no job is under way, and none is about to be.
    #[track_caller]
    fn jobs_done(&self) {
        let mut seen = Value::Null;
        let done = until(|| {
            let (jobs, tree) = (self.json("job list"), self.json("tree"));
            let jobs_done = jobs["jobs"]
                .as_array()
                .unwrap()
                .iter()
                .all(|job| job["state"] == "done");
            let mut layers = tree["layers"].as_array().unwrap().iter();
            let unnamed = layers.any(|layer| layer["kind"] == "unnamed");
            seen = json!([jobs, tree]);
            jobs_done && !unnamed
        });
        assert!(done, "{seen}");
    }
}

#[test]
fn a_restore_goes_back_and_the_tree_branches() {
    let f = Fixture::with_history();
    let text = f.line("snapshot restore web s1 --keep s3").ok();
    assert!(
        text.starts_with("web restored to snapshot s1 in ")
            && text.ends_with(" ms; what was written since is kept as snapshot s3\n"),
        "{text}"
    );
    assert_eq!(f.byte("web", 0), 1);
    let tree = f.line("tree web").ok();
    let names: Vec<&str> = tree
        .lines()
        .map(|line| line.split(" [").next().unwrap())
        .collect();
    let expected = [
        "snapshot web@s1",
        "\u{251c}\u{2500} snapshot web@s2",
        "\u{2502}  \u{2514}\u{2500} snapshot web@s3",
        "\u{2514}\u{2500} current state of web",
    ];
    assert_eq!(names, expected, "{tree}");
    let text = f.line("snapshot restore web s3").ok();
    assert!(
        text.ends_with("; what was written since is thrown away\n"),
        "{text}"
    );
    assert_eq!(f.byte("web", 0), 3);
    let report = f.json("snapshot restore web s2");
    assert_eq!(report["volumes"], json!(["web"]));
    assert_eq!(f.byte("web", 0), 2);
    f.refused("snapshot restore web never", &["snapshot", "never"]);
    f.refused("snapshot restore nobody s1", &["volume", "nobody"]);
    f.refused("snapshot restore web s1 --keep s2", &["s2", "exists"]);
}

#[test]
fn a_restore_under_a_running_guest_is_refused() {
    let f = Fixture::with_history();
    f.line("volume attach web --socket @/web.sock").ok();
    let mut disk = Disk::connect(&f.path("web.sock"));
    assert_eq!(disk.read(0, 1)[0], 3);
    f.refused(
        "snapshot restore web s1",
        &["web", "shut the guest down", "volume detach"],
    );
    f.refused(
        "volume set web --type immutable",
        &["web", "shut the guest down"],
    );
    assert_eq!(disk.read(0, 1)[0], 3);
    drop(disk);
    let done = until(|| f.line("snapshot restore web s1").code == Some(0));
    assert!(done, "the guest has gone");
    let mut disk = Disk::connect(&f.path("web.sock"));
    assert_eq!(disk.read(0, 1)[0], 1, "the attachment is the same");
}

#[test]
fn a_snapshot_is_deleted_in_each_way() {
    for way in ["", " --way up", " --way down"] {
        let f = Fixture::with_history();
        let plan = f
            .line(&format!("snapshot delete web s1 --dry-run{way}"))
            .ok();
        assert!(
            plan.starts_with("deleting snapshot web@s1 would do this:\n"),
            "{plan}"
        );
        assert!(
            plan.contains("joined with what lies over it: web@s2"),
            "{plan}"
        );
        assert!(
            plan.contains("WAY (* is taken)") && plan.contains("TO COPY"),
            "{plan}"
        );
        let chosen = plan.lines().find(|line| line.starts_with('*')).unwrap();
        assert!(
            way.is_empty() || chosen.contains(way.trim_start_matches(" --way ")),
            "{plan}"
        );
        assert_eq!(
            f.json("snapshot list web")["snapshots"]
                .as_array()
                .unwrap()
                .len(),
            2
        );

        let text = f.line(&format!("snapshot delete web s1 --wait{way}")).ok();
        assert!(text.starts_with("snapshot web@s1 deleted\n"), "{text}");
        assert!(text.contains(" of web@s1 done, "), "{text}");
        let tree = f.line("tree").ok();
        assert_eq!(tree.lines().count(), 2, "{tree}");
        assert_eq!(
            (f.byte("web", 0), f.byte("web", 8), f.byte("web", 1024)),
            (3, 2, 1)
        );
        f.line("snapshot restore web s2").ok();
        assert_eq!((f.byte("web", 0), f.byte("web", 1024)), (2, 1));
    }
}

#[test]
fn what_becomes_of_a_deleted_snapshot_is_told() {
    let f = Fixture::with_history();
    f.line("clone web@s1 copy").ok();
    let text = f.line("snapshot delete web s1 --dry-run").ok();
    assert!(
        text.contains("stays without a name until one of the 2 layers over it"),
        "{text}"
    );
    let report = f.json("snapshot delete web s1");
    assert_eq!(report["fate"], json!({ "kind": "kept", "children": 2 }));
    assert!(f.line("tree").ok().contains("(unnamed)"));
    f.line("volume delete copy").ok();
    f.jobs_done();
    let tree = f.line("tree").ok();
    assert!(!tree.contains("(unnamed)"), "{tree}");
    assert_eq!((f.byte("web", 0), f.byte("web", 1024)), (3, 1));

    f.line("snapshot restore web s2 --keep leaf").ok();
    let text = f.line("snapshot delete web leaf").ok();
    assert!(
        text.contains("nothing needs its data, which is removed at once"),
        "{text}"
    );
    f.refused("snapshot delete web leaf", &["snapshot", "leaf"]);
    f.refused("snapshot delete web s2 --into-base", &["base"]);
}

#[test]
fn a_push_down_copies_into_each_child() {
    let f = Fixture::with_history();
    f.line("clone web@s1 copy").ok();
    let report = f.json("snapshot delete web s1 --push-down --wait");
    let jobs = report["jobs"].as_array().unwrap();
    assert!(!jobs.is_empty(), "{report}");
    assert!(jobs.iter().all(|job| job["state"] == "done"), "{report}");
    f.jobs_done();
    let tree = f.line("tree").ok();
    assert!(!tree.contains("(unnamed)"), "{tree}");
    assert_eq!(
        (f.byte("copy", 0), f.byte("web", 0), f.byte("web", 1024)),
        (1, 3, 1)
    );
}

#[test]
fn a_base_is_written_only_if_asked_for() {
    let f = Fixture::new();
    let image = f.image("disk.img");
    let before = fs::read(&image).unwrap();
    f.line("volume create web --base @/disk.img").ok();
    f.write("web", 8, 8, 9);
    f.line("snapshot create s1 web").ok();
    f.write("web", 16, 8, 8);
    assert!(fs::read(&image).unwrap() == before);
    f.line("snapshot delete web s1 --into-base --wait").ok();
    f.jobs_done();
    let after = fs::read(&image).unwrap();
    assert!(after[4096..8192].iter().all(|byte| *byte == 9));
    assert!(after[..4096] == before[..4096] && after[8192..] == before[8192..]);
    assert_eq!((f.byte("web", 8), f.byte("web", 16)), (9, 8));
}

#[test]
fn jobs_are_listed_paused_limited_resumed_and_waited_for() {
    let f = Fixture::with_history();
    assert!(f.line("job list").ok().starts_with("no jobs; "));
    // So slowly that it does not end by itself.
    let report = f.json("snapshot delete web s1 --way up --rate 64K");
    let job = &report["jobs"][0];
    let id = &job["id"];
    assert_eq!(job["rate_bytes_per_s"], 64 << 10, "{report}");
    let text = f.line(&format!("job pause {id}")).ok();
    assert!(text.contains(" of web@s1 is paused at "), "{text}");
    let list = f.line("job list").ok();
    assert!(
        list.starts_with("JOB  WHAT") && list.contains("paused"),
        "{list}"
    );
    let tree = f.line("tree").ok();
    assert!(tree.contains("merging up, paused at "), "{tree}");
    let shown = f.line(&format!("job show {id}")).ok();
    assert!(shown.contains("limit      64 KiB/s"), "{shown}");
    let limited = f.line(&format!("job limit {id} none")).ok();
    assert!(!limited.contains("at most"), "{limited}");
    assert_eq!(f.json(&format!("job show {id}"))["state"], "paused");
    f.line(&format!("job resume {id}")).ok();
    let waited = f.line(&format!("job wait {id}"));
    assert!(
        waited.stderr.is_empty() || waited.stderr.starts_with("job "),
        "{}",
        waited.stderr
    );
    let text = waited.ok();
    assert!(text.contains(" of web@s1 done, "), "{text}");
    assert_eq!(f.json(&format!("job wait {id}"))["state"], "done");
    f.refused(&format!("job pause {id}"), &["job"]);
    f.refused("job show 77", &["job", "77"]);
}

#[test]
fn a_deletion_whose_join_is_left_to_later_can_be_waited_for() {
    let f = Fixture::with_history();
    let report = f.json("snapshot delete web s1 --way up --rate 64K");
    let id = &report["jobs"][0]["id"];
    f.line(&format!("job pause {id}")).ok();
    let control = f.daemon.control().to_str().unwrap().to_owned();
    let text = std::thread::scope(|scope| {
        let delete = "snapshot delete web s2 --wait";
        let words = ["--control", &control]
            .into_iter()
            .chain(delete.split_whitespace());
        let waits = scope.spawn(move || run(words).ok());
        let deleted = || f.json("snapshot list web")["snapshots"] == json!([]);
        assert!(until(deleted));
        assert!(!waits.is_finished());
        f.line(&format!("job limit {id} none")).ok();
        f.line(&format!("job resume {id}")).ok();
        waits.join().unwrap()
    });
    assert!(text.contains(&format!("after job {id} ")), "{text}");
    let tree = f.json("tree");
    assert_eq!(tree["layers"].as_array().unwrap().len(), 1, "{tree}");
    assert_eq!(
        (f.byte("web", 0), f.byte("web", 8), f.byte("web", 1024)),
        (3, 2, 1)
    );
}

#[test]
fn a_cancelled_job_leaves_the_disk_and_can_be_resumed() {
    let f = Fixture::with_history();
    let report = f.json("snapshot delete web s1 --way up --rate 64K");
    let id = &report["jobs"][0]["id"];
    assert_eq!(f.json(&format!("job cancel {id}"))["state"], "cancelled");
    let message = f.line(&format!("job wait {id}")).refused();
    assert!(
        message.contains("was cancelled") && message.contains("job resume"),
        "{message}"
    );
    assert_eq!(
        (f.byte("web", 0), f.byte("web", 8), f.byte("web", 1024)),
        (3, 2, 1)
    );
    f.line(&format!("job limit {id} none")).ok();
    f.line(&format!("job resume {id}")).ok();
    f.line(&format!("job wait {id}")).ok();
    assert_eq!(
        (f.byte("web", 0), f.byte("web", 8), f.byte("web", 1024)),
        (3, 2, 1)
    );
}

#[test]
fn an_interrupted_wait_leaves_the_job_alone() {
    let f = Fixture::with_history();
    let report = f.json("snapshot delete web s1 --way up --rate 64K");
    let id = &report["jobs"][0]["id"];
    let control = f.daemon.control().as_os_str().to_owned();
    let args = ["job", "wait", &id.to_string(), "--control"].map(std::ffi::OsString::from);
    let mut command = stratablk(args.into_iter().chain([control]));
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Its first line comes when it listens for Ctrl-C.
    let mut stderr = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut stderr, &mut line).unwrap();
    assert!(line.starts_with(&format!("job {id}: ")), "{line}");
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut stderr, &mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest}");
    assert!(rest.contains(&format!("job {id} goes on")), "{rest}");
    assert!(
        ["queued", "running"]
            .contains(&f.json(&format!("job show {id}"))["state"].as_str().unwrap())
    );
}

#[test]
fn volumes_have_types() {
    let f = Fixture::new();
    let text = f
        .line("volume create kiosk --size 1M --type immutable")
        .ok();
    assert_eq!(text, "immutable volume kiosk of 1 MiB created\n");
    f.line("volume create log --size 1M --type writethrough")
        .ok();
    f.line("volume create web --size 1M").ok();
    assert!(
        f.line("volume list").ok().contains("NAME   TYPE"),
        "{}",
        f.line("volume list").ok()
    );
    assert!(
        f.line("volume show log")
            .ok()
            .contains("type          writethrough")
    );
    let report = f.json("snapshot create s1 --all");
    let volumes = report["snapshots"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["volume"].clone());
    assert_eq!(volumes.collect::<Vec<_>>(), ["web"]);
    f.refused("snapshot create s2 log", &["log", "writethrough"]);
    f.refused("snapshot create s2 kiosk", &["kiosk", "immutable"]);
    f.write("kiosk", 0, 8, 7);
    assert_eq!(f.byte("kiosk", 0), 0, "thrown away at the next start");
    assert!(
        f.line("tree")
            .ok()
            .contains("current state of kiosk (immutable)")
    );
    let text = f.line("volume set kiosk --type normal").ok();
    assert_eq!(text, "volume kiosk is normal now\n");
    f.write("kiosk", 0, 8, 7);
    assert_eq!(f.byte("kiosk", 0), 7);
    f.line("volume set web --type readonly").ok();
    f.guest("web", |disk| assert_ne!(disk.try_write(0, &[1; 512]), 0));
    assert_eq!(f.line("volume create x --size 1M --type odd").code, Some(2));
}

#[test]
fn each_attachment_of_a_multiattach_volume_is_a_volume_of_its_own() {
    let f = Fixture::new();
    f.line("volume create template --size 1M").ok();
    f.write("template", 0, 8, 5);
    f.line("volume set template --type multiattach").ok();
    let text = f.line("volume attach template --socket @/a.sock").ok();
    let start = "volume template-1, made for this attachment of template, is served on ";
    assert!(text.starts_with(start), "{text}");
    assert_eq!(
        f.json("volume attach template --socket @/b.sock --as vm2")["name"],
        "vm2"
    );
    for (socket, byte) in [("a.sock", 1), ("b.sock", 2)] {
        let mut disk = Disk::connect(&f.path(socket));
        assert_eq!(disk.read(0, 1)[0], 5);
        disk.write(0, &[byte; 512]);
        disk.flush();
    }
    let text = f.line("volume detach template-1").ok();
    assert_eq!(text, "volume template-1 detached and thrown away\n");
    let text = f.line("volume detach vm2 --keep-as kept").ok();
    assert_eq!(text, "volume vm2 detached, and kept as kept\n");
    assert_eq!(f.byte("kept", 0), 2);
    f.refused("volume detach kept --keep-as other", &["kept"]);
    let names: Vec<_> = f.json("volume list")["volumes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|volume| volume["name"].clone())
        .collect();
    assert_eq!(names, ["kept", "template"]);
}

#[test]
fn a_volume_is_resized() {
    let f = Fixture::new();
    f.line("volume create web --size 1M").ok();
    f.write("web", 0, 2048, 1);
    let text = f.line("volume resize web +1M").ok();
    assert_eq!(text, "volume web has 2 MiB now (2097152 bytes)\n");
    assert_eq!((f.byte("web", 2047), f.byte("web", 2048)), (1, 0));
    assert_eq!(f.json("volume resize web 3M")["size_bytes"], 3 << 20);
    f.refused("volume resize web 2M", &["--shrink"]);
    f.line("volume resize web 1M --shrink").ok();
    f.refused("volume resize web 512K --shrink", &["--force"]);
    f.line("volume resize web 512K --shrink --force").ok();
    f.line("volume resize web 1M").ok();
    assert_eq!(
        (f.byte("web", 1023), f.byte("web", 1024)),
        (1, 0),
        "what was cut off is gone"
    );
    f.refused("volume resize nobody 1M", &["volume", "nobody"]);
    f.refused("volume resize web 100", &["size"]);
}

#[test]
fn a_running_guest_sees_a_larger_disk() {
    let f = Fixture::new();
    f.line("volume create web --size 1M").ok();
    f.line("volume attach web --socket @/web.sock").ok();
    let mut disk = Disk::connect(&f.path("web.sock"));
    assert_ne!(disk.try_write(2048, &[1; 512]), 0);
    f.line("volume resize web 2M").ok();
    disk.write(2048, &[1; 512]);
    assert_eq!(disk.read(2048, 1), [1; 512]);
    f.refused("volume resize web 1M --shrink --force", &["web"]);
}

#[test]
fn an_import_needs_its_image_no_more() {
    let f = Fixture::new();
    let image = f.image("disk.img");
    let text = f.line("import @/disk.img web --wait").ok();
    assert!(
        text.starts_with("volume web of 4 MiB imported\njob 1: import of web done, 4 MiB"),
        "{text}"
    );
    fs::remove_file(image).unwrap();
    assert_eq!(f.byte("web", 1000), u8::try_from(1000 % 251).unwrap());
    assert_eq!(f.json("volume show web")["base"], Value::Null);
    f.refused("import @/disk.img other", &["disk.img"]);
    f.image("disk.img");
    f.refused("import @/disk.img web", &["web", "exists"]);
    let import = f.json("import @/disk.img other --wait");
    assert_eq!(
        (&import["volume"]["name"], &import["job"]["state"]),
        (&json!("other"), &json!("done"))
    );
}

#[test]
fn a_clone_of_the_running_state_becomes_independent() {
    let f = Fixture::with_history();
    let text = f.line("clone web copy").ok();
    assert_eq!(text, "volume copy of 4 MiB created from web\n");
    f.line("volume create copy2 --from web").ok();
    f.write("web", 0, 8, 4);
    assert_eq!(
        (f.byte("copy", 0), f.byte("copy2", 1024), f.byte("web", 0)),
        (3, 1, 4)
    );
    let text = f.line("volume flatten copy --wait").ok();
    assert!(text.contains("flatten of copy done, "), "{text}");
    assert_eq!(f.line("tree copy").ok().lines().count(), 1);
    assert_eq!(
        (f.byte("copy", 0), f.byte("copy", 8), f.byte("copy", 1024)),
        (3, 2, 1)
    );
    let job = f.json("volume flatten copy2");
    assert_eq!(job["kind"], "flatten");
    f.jobs_done();
    f.refused("volume flatten nobody", &["volume", "nobody"]);
    f.refused("clone web@never x", &["snapshot", "never"]);
}

#[test]
fn differences_are_lines_of_json() {
    let f = Fixture::with_history();
    let lines = |line: &str| -> Vec<Value> {
        let text = f.line(line).ok();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    };
    let half = json!({ "offset": 0, "length": 1024 * 512, "zero": false });
    assert_eq!(lines("diff web@s1 web@s2"), std::slice::from_ref(&half));
    assert_eq!(lines("diff web@s1 web@s2 --json"), [half]);
    assert_eq!(
        lines("diff web@s2"),
        [json!({ "offset": 0, "length": 4096, "zero": false })]
    );
    assert_eq!(lines("diff web@s2 web@s2"), Vec::<Value>::new());
    f.refused("diff web@never", &["snapshot", "never"]);
    f.refused("diff web@s1 nobody", &["volume", "nobody"]);
}

#[test]
fn what_volumes_take_is_told() {
    let f = Fixture::with_history();
    f.line("clone web@s1 copy").ok();
    let text = f.line("du").ok();
    assert!(
        text.starts_with("VOLUME  EXCLUSIVE  SHARED  BASE\ncopy "),
        "{text}"
    );
    let usage = f.json("du copy web");
    let names: Vec<_> = usage["volumes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v["volume"].clone())
        .collect();
    assert_eq!(names, ["copy", "web"]);
    assert_eq!(usage["volumes"][0]["shared_bytes"], 1 << 20, "{usage}");
    assert!(
        usage["volumes"][1]["exclusive_bytes"].as_u64().unwrap() >= 516 << 10,
        "{usage}"
    );
    f.refused("du nobody", &["volume", "nobody"]);
}

#[test]
fn a_job_goes_on_after_the_daemon_was_killed() {
    let f = Fixture::with_history();
    let report = f.json("snapshot delete web s1 --way up --rate 64K");
    let id = report["jobs"][0]["id"].clone();
    let Fixture { daemon, dir } = f;
    daemon.kill();
    let daemon = Daemon::on_store(&dir.path().join("store"));
    let f = Fixture { daemon, dir };
    f.line(&format!("job limit {id} none")).ok();
    f.line(&format!("job wait {id}")).ok();
    assert_eq!(
        (f.byte("web", 0), f.byte("web", 8), f.byte("web", 1024)),
        (3, 2, 1)
    );
    let Fixture { daemon, dir } = f;
    let (status, _, log) = daemon.stop();
    assert!(status.success(), "{log}");
    let store = dir.path().join("store").into_os_string();
    let cache = dir.path().as_os_str().to_owned();
    let args = ["check", "--json", "--store"].map(std::ffi::OsString::from);
    let check = args.into_iter().chain([store, "--cache-dir".into(), cache]);
    let check = stratablk_tests::daemon::run(check).json();
    assert_eq!(check["errors"].as_array().map_or(0, Vec::len), 0, "{check}");
}
