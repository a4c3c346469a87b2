//! When a machine starts, as an immutable volume has to tell: it throws away what was written, then and only then.
//!
//! Each test writes stamped sectors, does what a front-end does in one case, and reads which of the stamps are there. See
//! `vhost::disk_use` in the daemon for the rule.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::PathBuf;

use stratablk_layers::catalog::VolumeKind;
use stratablk_layers::store::{Store, StoreOptions, VolumeSource};
use stratablk_tests::daemon::{DEADLINE, Daemon, temp_dir};
use stratablk_tests::disk::Disk;
use stratablk_tests::guest::{Guest, GuestOptions, USUAL_PROTOCOL};
use stratablk_tests::inflight::Entry;
use stratablk_tests::pattern::{base, stamped};
use stratablk_tests::request::{T_IN, protocol};
use stratablk_tests::ring::Ring;
use stratablk_tests::wire::code;
use tempfile::TempDir;

/// The size of the disk.
const SECTORS: u64 = 2048;
/// Where the stamps go: sectors of three clusters, the last one in part.
const STAMP: (u64, u64) = (77, 19);

/// A daemon that serves one volume.
struct Bed {
    /// The daemon; `None` while it is down.
    daemon: Option<Daemon>,
    /// Its store, the image and the socket.
    dir: TempDir,
}

impl Bed {
    /// A volume of this type over an image full of [`base`], attached.
    fn new(kind: VolumeKind) -> Self {
        let dir = temp_dir();
        let image = dir.path().join("image");
        fs::write(&image, base(0, SECTORS)).unwrap();
        let store = Store::open(&dir.path().join("store"), StoreOptions::default()).unwrap();
        let source = VolumeSource::Base(image);
        store.create_volume_of("disk", &source, kind).unwrap();
        drop(store);
        let mut bed = Self { daemon: None, dir };
        bed.serve();
        bed.attach();
        bed
    }

    /// Starts the daemon, which serves what was attached before.
    fn serve(&mut self) {
        self.daemon = Some(Daemon::on_store(&self.dir.path().join("store")));
    }

    /// The daemon is killed, and another takes its place.
    fn kill_and_serve(&mut self) {
        self.daemon.take().unwrap().kill();
        self.serve();
    }

    /// The daemon is stopped in order, and another takes its place.
    fn stop_and_serve(&mut self) {
        let (status, _, log) = self.daemon.take().unwrap().stop();
        assert!(status.success(), "{log}");
        self.serve();
    }

    /// Waits until the end of the last session is over and done with.
    #[track_caller]
    fn wait_left(&self) {
        let deadline = std::time::Instant::now() + DEADLINE;
        loop {
            let daemon = self.daemon.as_ref().unwrap();
            let shown = daemon.line("volume show disk --json").json();
            if shown["attachment"]["connections"] == 0 {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "{shown}");
        }
    }

    /// The socket.
    fn socket(&self) -> PathBuf {
        self.dir.path().join("disk.sock")
    }

    /// Runs a line of words.
    #[track_caller]
    fn line(&self, line: &str) {
        self.daemon.as_ref().unwrap().line(line).ok();
    }

    /// Attaches the volume.
    fn attach(&self) {
        let socket = self.socket();
        self.line(&format!("volume attach disk --socket {}", socket.display()));
    }

    /// A machine is switched on: a new connection, and rings that were never used.
    #[track_caller]
    fn switch_on(&self) -> Disk {
        Disk::connect(&self.socket())
    }

    /// A front-end comes with rings that begin there.
    #[track_caller]
    fn come(&self, base: u16) -> Disk {
        let options = GuestOptions {
            base,
            ..GuestOptions::default()
        };
        Disk::new(Guest::start(&self.socket(), options))
    }

    /// The machine that runs lost its connection and goes on.
    #[track_caller]
    fn go_on(&self, disk: Disk) -> Disk {
        disk.reconnect(&self.socket())
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(daemon) = &self.daemon
        {
            eprintln!("log of the daemon:\n{}", daemon.log());
        }
    }
}

/// Writes a stamp.
#[track_caller]
fn stamp(disk: &mut Disk, version: u64) {
    let (sector, count) = STAMP;
    disk.write(sector, &stamped(version, sector, count));
}

/// Which stamp is there: 0 for the image's own content.
#[track_caller]
fn found(disk: &mut Disk) -> u64 {
    let (sector, count) = STAMP;
    let data = disk.read(sector, count);
    let version = (0..100).find(|version| data == stamped(*version, sector, count));
    version.expect("one stamp, whole")
}

/// The rings stop and start at entry 0 again, on the same connection, in memory that was zeroed.
#[track_caller]
fn restart_rings(disk: &mut Disk) {
    disk.guest.front_end.stop_vring(0);
    disk.guest.rings[0].restart(0);
    disk.guest.start_ring(0);
}

#[test]
fn a_new_connection_with_unused_rings_is_a_start() {
    let bed = Bed::new(VolumeKind::Immutable);
    for version in 1..4 {
        let mut disk = bed.switch_on();
        assert_eq!(found(&mut disk), 0, "start {version}");
        stamp(&mut disk, version);
        if version == 2 {
            disk.flush();
        }
        assert_eq!(found(&mut disk), version);
    }
}

#[test]
fn other_types_keep_what_was_written() {
    for kind in [VolumeKind::Normal, VolumeKind::Writethrough] {
        let bed = Bed::new(kind);
        stamp(&mut bed.switch_on(), 1);
        let mut disk = bed.switch_on();
        assert_eq!(found(&mut disk), 1, "{kind:?}");
    }
}

#[test]
fn firmware_that_hands_over_is_no_start() {
    let bed = Bed::new(VolumeKind::Immutable);
    stamp(&mut bed.switch_on(), 1);
    let mut disk = bed.switch_on();
    assert_eq!(found(&mut disk), 0, "the firmware is");
    stamp(&mut disk, 2);
    for version in 2..4 {
        restart_rings(&mut disk);
        assert_eq!(found(&mut disk), version);
        stamp(&mut disk, version + 1);
    }
    drop(disk);
    assert_eq!(found(&mut bed.switch_on()), 0);
}

#[test]
fn a_reboot_on_the_same_connection_is_no_start() {
    let bed = Bed::new(VolumeKind::Immutable);
    let mut disk = bed.switch_on();
    for (version, reset_device) in [(1, false), (2, true), (3, true)] {
        stamp(&mut disk, version);
        if reset_device {
            disk.guest.front_end.tell(code::RESET_DEVICE, &[], &[]);
        } else {
            disk.guest.front_end.stop_vring(0);
        }
        let features = disk.guest.features;
        disk.guest.front_end.set_features(features);
        let regions = disk.guest.memory.regions();
        disk.guest.front_end.set_mem_table(regions);
        disk.guest.rings[0].restart(0);
        disk.guest.start_ring(0);
        assert_eq!(found(&mut disk), version);
    }
    drop(disk);
    assert_eq!(found(&mut bed.switch_on()), 0);
}

#[test]
fn a_front_end_that_comes_back_goes_on_and_the_next_start_is_one() {
    let bed = Bed::new(VolumeKind::Immutable);
    let mut disk = bed.switch_on();
    for version in 1..4 {
        stamp(&mut disk, version);
        disk = bed.go_on(disk);
        assert_eq!(found(&mut disk), version);
    }
    drop(disk);
    assert_eq!(found(&mut bed.switch_on()), 0);
}

#[test]
fn a_front_end_whose_ring_has_come_around_to_entry_0_goes_on() {
    let bed = Bed::new(VolumeKind::Immutable);
    stamp(&mut bed.switch_on(), 1);
    let mut disk = bed.come(u16::MAX);
    assert_eq!(found(&mut disk), 1, "it goes on");
    assert_eq!(disk.guest.rings[0].available_index(), 0);
    let mut disk = bed.go_on(disk);
    assert_eq!(found(&mut disk), 1, "and so it does here");
    drop(disk);
    assert_eq!(found(&mut bed.switch_on()), 0);
}

#[test]
fn a_daemon_that_is_restarted_under_a_machine_resets_nothing() {
    let restarts: [fn(&mut Bed); 2] = [Bed::kill_and_serve, Bed::stop_and_serve];
    for restart in restarts {
        let mut bed = Bed::new(VolumeKind::Immutable);
        let mut disk = bed.switch_on();
        stamp(&mut disk, 1);
        restart(&mut bed);
        let mut disk = bed.go_on(disk);
        assert_eq!(found(&mut disk), 1);
        stamp(&mut disk, 2);
        drop(disk);
        assert_eq!(found(&mut bed.switch_on()), 0, "the next start");
    }
}

#[test]
fn a_daemon_that_is_restarted_under_a_machine_resets_nothing_whatever_the_rings_begin_with() {
    let mut bed = Bed::new(VolumeKind::Immutable);
    let mut disk = bed.switch_on();
    stamp(&mut disk, 1);
    bed.kill_and_serve();
    drop(disk);
    // Some connection without a ring is no session of a machine.
    drop(Guest::negotiate(&bed.socket(), GuestOptions::default()));
    let mut disk = bed.switch_on();
    assert_eq!(found(&mut disk), 1, "may be the machine that ran");
    stamp(&mut disk, 2);
    drop(disk);
    assert_eq!(found(&mut bed.switch_on()), 0, "cannot be");
}

#[test]
fn a_machine_that_goes_on_is_not_reset_by_a_daemon_that_is_killed_later() {
    let mut bed = Bed::new(VolumeKind::Immutable);
    let mut disk = bed.switch_on();
    stamp(&mut disk, 1);
    // Armed when the connection was lost, and no longer once the machine was back.
    let mut disk = bed.go_on(disk);
    assert_eq!(found(&mut disk), 1);
    bed.kill_and_serve();
    drop(disk);
    assert_eq!(found(&mut bed.switch_on()), 1);
}

#[test]
fn a_start_is_remembered_over_a_kill_while_no_machine_runs() {
    let mut bed = Bed::new(VolumeKind::Immutable);
    let mut disk = bed.switch_on();
    stamp(&mut disk, 1);
    disk.guest.front_end.stop_vring(0);
    drop(disk);
    bed.wait_left();
    bed.kill_and_serve();
    assert_eq!(found(&mut bed.switch_on()), 0);
}

/// A machine with an inflight buffer, of which nothing but that buffer says that it goes on.
#[test]
fn a_machine_whose_inflight_buffer_was_used_goes_on() {
    let mut bed = Bed::new(VolumeKind::Immutable);
    stamp(&mut bed.switch_on(), 1);
    // A new buffer says nothing.
    let (guest, inflight) = Guest::start_tracked(&bed.socket(), GuestOptions::default());
    let mut disk = Disk::new(guest);
    assert_eq!(found(&mut disk), 0, "a start");
    stamp(&mut disk, 2);
    // Another machine comes and leaves meanwhile, so that a start would show.
    bed.kill_and_serve();
    drop(disk);
    rearm(&bed);
    // Rings of zeroes, from entry 0, and a request under way in the buffer: the first of its life, say.
    let options = GuestOptions {
        protocol: USUAL_PROTOCOL | protocol::INFLIGHT_SHMFD,
        ..GuestOptions::default()
    };
    let mut guest = Guest::negotiate(&bed.socket(), options);
    let data = guest.memory.writable(512);
    let chain = [guest.header(T_IN, 0), data, guest.status()];
    let head = guest.rings[0].chain(&chain);
    guest.rings[0].publish(head);
    for head in 0..128 {
        inflight.set_entry(0, head, Entry::default());
    }
    let entry = Entry {
        in_flight: 1,
        next: 0,
        counter: 2,
    };
    inflight.set_entry(0, head, entry);
    inflight.set_head(0, [1, 128, 0, 0]);
    inflight.hand_over(&guest.front_end);
    guest.set_up_ring_at(0, 0);
    guest.set_events(0);
    guest.enable_ring(0);
    assert_eq!(guest.rings[0].wait().head, u32::from(head));
    let mut disk = Disk::new(guest);
    assert_eq!(found(&mut disk), 2, "it goes on");
    drop(disk);
    assert_eq!(found(&mut bed.switch_on()), 0, "and the next start is one");
}

/// The same over a kill of the daemon, as it happens: nothing is reset, whatever was under way.
#[test]
fn a_machine_that_comes_back_with_its_inflight_buffer_goes_on() {
    let mut bed = Bed::new(VolumeKind::Immutable);
    let (guest, inflight) = Guest::start_tracked(&bed.socket(), GuestOptions::default());
    let mut disk = Disk::new(guest);
    for version in 1..4 {
        stamp(&mut disk, version);
        bed.kill_and_serve();
        let mut guest = disk.guest;
        // Handed over by a connection that is lost at once; so the volume is armed when the machine is back.
        if version == 2 {
            guest = guest.reconnect_with(&bed.socket(), Some(&inflight), Ring::used_index);
        }
        let guest = guest.reconnect_with(&bed.socket(), Some(&inflight), Ring::used_index);
        disk = Disk::new(guest);
        assert_eq!(found(&mut disk), version);
    }
    drop(disk);
    assert_eq!(found(&mut bed.switch_on()), 0);
}

/// The next machine that comes with a new ring starts: one that ran has left.
#[track_caller]
fn rearm(bed: &Bed) {
    let guest = Guest::start(&bed.socket(), goes_on());
    drop(guest);
    // Served, so the end of the session before is over and done with.
    drop(Guest::negotiate(&bed.socket(), GuestOptions::default()));
}

/// Rings that begin at another entry.
fn goes_on() -> GuestOptions {
    GuestOptions {
        base: 4711,
        ..GuestOptions::default()
    }
}

/// A machine that was saved and comes back, here or on another host, brings the state of its rings with it. A state of the
/// device is loaded before that by front-ends that have one; nothing is offered to load it with yet.
#[test]
fn a_machine_that_is_restored_goes_on() {
    let bed = Bed::new(VolumeKind::Immutable);
    stamp(&mut bed.switch_on(), 1);
    let mut disk = bed.come(4711);
    assert_eq!(found(&mut disk), 1);
    drop(disk);
    assert_eq!(found(&mut bed.switch_on()), 0);
}

#[test]
fn a_volume_that_is_attached_anew_starts_anew() {
    let bed = Bed::new(VolumeKind::Immutable);
    let mut disk = bed.switch_on();
    stamp(&mut disk, 1);
    bed.line("volume detach disk");
    drop(disk);
    bed.attach();
    assert_eq!(found(&mut bed.switch_on()), 0);
}
