//! A machine that is saved with the state of its device, and one that goes on from there: on the disk that was saved, on a
//! clone of it, and on nothing else.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use stratablk_tests::daemon::{Daemon, Ran, temp_dir};
use stratablk_tests::disk::Disk;
use stratablk_tests::frontend::FrontEnd;
use stratablk_tests::guest::{Guest, GuestOptions, USUAL_PROTOCOL};
use stratablk_tests::pattern::stamped;
use stratablk_tests::request::protocol;
use stratablk_tests::wire::code;
use tempfile::TempDir;

/// The directions of a transfer.
const SAVE: u32 = 0;
const LOAD: u32 = 1;
/// The phase of a transfer: all rings are stopped.
const STOPPED: u32 = 0;
/// A reply that brings no descriptor, and is no error.
const DONE: u64 = 0x100;
/// Where the stamp goes.
const STAMP: (u64, u64) = (77, 19);

/// A daemon with a volume `web`, attached.
struct Bed {
    /// The daemon.
    daemon: Daemon,
    /// Its store and the sockets.
    dir: TempDir,
}

impl Bed {
    fn new() -> Self {
        let dir = temp_dir();
        let daemon = Daemon::on_store(&dir.path().join("store"));
        let bed = Self { daemon, dir };
        bed.line("volume create web --size 1M").ok();
        bed.attach("web");
        bed
    }

    /// Ends the daemon and starts another one.
    fn restart(self) -> Self {
        let Self { daemon, dir } = self;
        assert!(daemon.stop().0.success());
        let daemon = Daemon::on_store(&dir.path().join("store"));
        Self { daemon, dir }
    }

    fn line(&self, line: &str) -> Ran {
        self.daemon.line(line)
    }

    fn socket(&self, volume: &str) -> PathBuf {
        self.dir.path().join(format!("{volume}.sock"))
    }

    fn attach(&self, volume: &str) {
        let socket = self.socket(volume);
        self.line(&format!(
            "volume attach {volume} --socket {}",
            socket.display()
        ))
        .ok();
    }

    /// A front-end that can save and load, whose rings do not run yet.
    fn come(&self, volume: &str) -> Guest {
        let options = GuestOptions {
            protocol: USUAL_PROTOCOL | protocol::DEVICE_STATE,
            ..GuestOptions::default()
        };
        Guest::negotiate(&self.socket(volume), options)
    }

    /// One whose rings run.
    fn run(&self, volume: &str) -> Disk {
        start(self.come(volume))
    }

    /// The snapshot that was made for a saved state.
    fn snapshot(&self) -> String {
        let listed = self.line("snapshot list --json").json().to_string();
        let at = listed.find("state-").unwrap();
        listed[at..at + "state-".len() + 8].to_owned()
    }
}

/// Starts the ring.
fn start(guest: Guest) -> Disk {
    guest.start_ring(0);
    Disk::new(guest)
}

/// A pipe: what is read from, what is written to.
fn pipe() -> (File, File) {
    let (reader, writer) = std::io::pipe().unwrap();
    (
        File::from(OwnedFd::from(reader)),
        File::from(OwnedFd::from(writer)),
    )
}

/// Begins a transfer over this end of a pipe, which is given away. Returns the reply.
fn transfer(front_end: &FrontEnd, direction: u32, phase: u32, end: File) -> u64 {
    let payload = [direction.to_le_bytes(), phase.to_le_bytes()].concat();
    let reply = front_end.ask(code::SET_DEVICE_STATE_FD, &payload, &[end.as_fd()]);
    reply.as_u64()
}

/// Whether the back-end says that the last transfer went well.
fn check(front_end: &FrontEnd) -> bool {
    let reply = front_end.ask(code::CHECK_DEVICE_STATE, &[], &[]);
    reply.as_u64() == 0
}

/// Saves the state of a device whose rings are stopped.
fn save(front_end: &FrontEnd) -> Vec<u8> {
    let (mut reader, writer) = pipe();
    assert_eq!(transfer(front_end, SAVE, STOPPED, writer), DONE);
    let mut state = Vec::new();
    reader.read_to_end(&mut state).unwrap();
    assert!(check(front_end));
    state
}

/// Loads a state. Returns whether it was taken.
fn load(front_end: &FrontEnd, state: &[u8]) -> bool {
    let (reader, mut writer) = pipe();
    assert_eq!(transfer(front_end, LOAD, STOPPED, reader), DONE);
    // It may be too long to be read to its end.
    let _ = writer.write_all(state);
    drop(writer);
    check(front_end)
}

fn stamp(disk: &mut Disk, version: u64) {
    disk.write(STAMP.0, &stamped(version, STAMP.0, STAMP.1));
}

#[track_caller]
fn assert_stamp(disk: &mut Disk, version: u64) {
    let (sector, count) = STAMP;
    assert_eq!(disk.read(sector, count), stamped(version, sector, count));
}

/// A machine that wrote [`STAMP`] and was saved: its state, and the snapshot that keeps its disk.
fn saved() -> (Bed, Vec<u8>, String) {
    let bed = Bed::new();
    let mut disk = bed.run("web");
    stamp(&mut disk, 1);
    disk.guest.front_end.stop_vring(0);
    let state = save(&disk.guest.front_end);
    drop(disk);
    let snapshot = bed.snapshot();
    (bed, state, snapshot)
}

#[test]
fn c34_a_machine_goes_on_from_what_was_saved_and_from_nothing_else() {
    let (bed, state, snapshot) = saved();

    // Nothing was written since.
    let guest = bed.come("web");
    assert!(load(&guest.front_end, &state));
    let mut disk = start(guest);
    assert_stamp(&mut disk, 1);
    stamp(&mut disk, 2);
    drop(disk);

    // Now something was.
    let guest = bed.come("web");
    assert!(!load(&guest.front_end, &state));
    let mut disk = start(guest);
    assert_stamp(&mut disk, 2);
    drop(disk);
    let advice = format!("stratablk snapshot restore web {snapshot}");
    assert!(bed.daemon.has_logged(&advice), "{}", bed.daemon.log());

    bed.line(&format!("clone web@{snapshot} fork")).ok();
    bed.attach("fork");
    let guest = bed.come("fork");
    assert!(load(&guest.front_end, &state));
    assert_stamp(&mut start(guest), 1);

    bed.line("volume detach web").ok();
    bed.line(&format!("snapshot restore web {snapshot}")).ok();
    bed.attach("web");
    let guest = bed.come("web");
    assert!(load(&guest.front_end, &state));
    let mut disk = start(guest);
    assert_stamp(&mut disk, 1);
    drop(disk);
    // Another disk of the same size is none.
    bed.line("volume create other --size 1M").ok();
    bed.attach("other");
    assert!(!load(&bed.come("other").front_end, &state));
}

#[test]
fn c34_what_was_written_between_load_and_start_is_seen() {
    let bed = Bed::new();
    let guest = bed.come("web");
    let state = save(&guest.front_end);
    assert!(load(&guest.front_end, &state));
    let mut other = bed.run("web");
    stamp(&mut other, 1);
    drop(other);
    guest.set_up_ring(0);
    guest.set_events(0);
    let enable = [0u32.to_le_bytes(), 1u32.to_le_bytes()].concat();
    let enabled = guest
        .front_end
        .attempt(code::SET_VRING_ENABLE, &enable, &[]);
    assert!(enabled.is_no(), "{enabled:?}");
    assert_stamp(&mut bed.run("web"), 1);
}

#[test]
fn c34_no_state_is_transferred_while_rings_run() {
    let bed = Bed::new();
    let disk = bed.run("web");
    let front_end = &disk.guest.front_end;
    for direction in [SAVE, LOAD] {
        let (reader, writer) = pipe();
        let end = if direction == SAVE { writer } else { reader };
        let reply = transfer(front_end, direction, STOPPED, end);
        assert_ne!(reply & 0xff, 0, "direction {direction}: {reply:#x}");
        assert_ne!(reply & 0x100, 0, "it brings no descriptor");
        assert!(!check(front_end));
    }
}

#[test]
fn c34_hostile_states_are_refused() {
    let bed = Bed::new();
    let guest = bed.come("web");
    let front_end = &guest.front_end;
    assert!(!check(front_end), "nothing was transferred");
    let state = save(front_end);
    assert!(load(front_end, &state));
    let foreign = {
        let bed = Bed::new();
        save(&bed.come("web").front_end)
    };
    let mut damaged = state.clone();
    damaged[20] ^= 1;
    let longer = [&state[..], &[0]].concat();
    let long = vec![7; 1 << 20];
    let half = &state[..state.len() / 2];
    for hostile in [&foreign[..], &damaged, &longer, &long, half, &[]] {
        assert!(!load(front_end, hostile), "{} bytes", hostile.len());
    }
    // A channel that is never closed.
    let (reader, mut writer) = pipe();
    assert_eq!(transfer(front_end, LOAD, STOPPED, reader), DONE);
    writer.write_all(&state).unwrap();
    assert!(!check(front_end));
    // One that nobody reads.
    let (reader, writer) = pipe();
    drop(reader);
    let reply = transfer(front_end, SAVE, STOPPED, writer);
    assert_ne!(reply & 0xff, 0);
    // What keeps it was deleted.
    let snapshots = bed.line("snapshot list --json").json().to_string();
    for name in snapshots
        .split('"')
        .filter(|text| text.starts_with("state-"))
    {
        bed.line(&format!("snapshot delete web {name}")).ok();
    }
    assert!(!load(front_end, &state));
    assert_untouched(&mut start(guest));
}

/// The disk is as it was made.
fn assert_untouched(disk: &mut Disk) {
    assert!(disk.read(0, 64).iter().all(|&byte| byte == 0));
}

/// The case of an immutable volume that a new connection alone would reset: the machine is not switched on, but goes on.
#[test]
fn c38_a_machine_that_is_restored_with_its_state_resets_nothing() {
    let (bed, state, snapshot) = saved();
    for volume in ["restored", "started"] {
        bed.line(&format!("clone web@{snapshot} {volume}")).ok();
        bed.line(&format!("volume set {volume} --type immutable"))
            .ok();
        bed.attach(volume);
    }
    let goes_on = |volume: &str| format!("not reset, since the machine goes on volume={volume}");
    let guest = bed.come("restored");
    assert!(load(&guest.front_end, &state));
    let mut disk = start(guest);
    assert_stamp(&mut disk, 1);
    stamp(&mut disk, 2);
    // And one that is switched on, over the same disk.
    let mut other = bed.run("started");
    assert_stamp(&mut other, 1);
    drop(other);
    let told = bed.daemon.has_logged(&goes_on("restored"));
    let log = bed.daemon.log();
    assert!(told, "{log}");
    assert!(!log.contains(&goes_on("started")), "{log}");
}

/// What is below a volume may change while it is attached; saving and loading reach it all the same.
#[test]
fn c34_a_volume_that_lies_over_its_image_again_is_saved_and_loaded() {
    let mut bed = Bed::new();
    let image = bed.dir.path().join("image");
    std::fs::create_dir(&image).unwrap();
    let image = image.join("raw");
    std::fs::write(&image, stamped(7, 0, 2048)).unwrap();
    bed.line(&format!("volume create over --base {}", image.display()))
        .ok();
    bed.line("snapshot create one over").ok();
    bed.line("volume flatten over --wait").ok();
    bed = bed.restart();
    bed.attach("over");
    bed.line("snapshot restore over one").ok();
    let guest = bed.come("over");
    let state = save(&guest.front_end);
    drop(guest);
    bed = bed.restart();
    let guest = bed.come("over");
    assert!(load(&guest.front_end, &state), "{}", bed.daemon.log());
    assert_eq!(start(guest).read(0, 8), stamped(7, 0, 8));
}
