//! What front-ends have said and guests have under way when another daemon takes over: nothing of it has to be said again.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod descriptors;
mod hanging;
mod peers;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use stratablk_tests::dirty_log::DirtyLog;
use stratablk_tests::disk::Disk;
use stratablk_tests::frontend::{FrontEnd, VringAddresses};
use stratablk_tests::guest::{Guest, GuestOptions};
use stratablk_tests::host::{Host, MIB};
use stratablk_tests::memory::{GuestMemory, Region, RegionInfo};
use stratablk_tests::pattern::stamped;
use stratablk_tests::request::feature::{PROTOCOL_FEATURES, VHOST_LOG_ALL};
use stratablk_tests::request::{S_OK, T_IN};
use stratablk_tests::wait::QUIET;
use stratablk_tests::wire::{Wire, code, header};

/// BACKEND_CONFIG_CHANGE_MSG.
const CONFIG_CHANGE: u32 = 2;
/// Where `writeback` lies in the configuration space.
const WRITEBACK: u32 = 32;
/// How often one daemon takes over from the other in each test.
const TAKEOVERS: u64 = 3;

/// A host with an attached volume, and its socket.
fn host() -> (Host, std::path::PathBuf) {
    let mut host = Host::new();
    host.noise("image", MIB);
    host.line("volume create disk --base @/image").ok();
    host.attach("disk", 2);
    let socket = host.path("disk.sock");
    (host, socket)
}

#[test]
fn half_a_message_is_ended_with_the_next_daemon() {
    let (mut host, socket) = host();
    let silent = FrontEnd::connect(&socket);
    let talking = FrontEnd::connect(&socket);
    let message = header(code::GET_FEATURES, 1, 0);
    talking.wire.send_bytes(&message[..5], &[]).unwrap();
    host.succeed();
    talking.wire.send_bytes(&message[5..], &[]).unwrap();
    let features = talking.reply_to(code::GET_FEATURES).as_u64();
    assert_eq!(features, silent.features(), "one that had said nothing");
    drop((silent, talking));
    host.finish();
}

#[test]
fn a_guest_uses_its_disk_before_and_after() {
    // With and without the messages that enable rings.
    for features in [u64::MAX, !PROTOCOL_FEATURES] {
        let (mut host, socket) = host();
        let usual = GuestOptions::default();
        let options = GuestOptions {
            features: usual.features & features,
            queues: 2,
            ..usual
        };
        let mut disk = Disk::new(Guest::start(&socket, options));
        for round in 0..TAKEOVERS {
            let data = stamped(1, round, 8);
            disk.write(round * 8, &data);
            host.succeed();
            assert_eq!(disk.read(round * 8, 8), data);
            disk.flush();
        }
        let writes = disk.guest.rings[0].available_index();
        assert_eq!(disk.guest.front_end.stop_vring(0), u32::from(writes));
        drop(disk);
        host.finish();
    }
}

#[test]
fn the_cache_mode_and_the_way_back_stay() {
    let (mut host, socket) = host();
    let guest = Guest::start(&socket, GuestOptions::default());
    let (theirs, ours) = UnixStream::pair().unwrap();
    guest
        .front_end
        .tell(code::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
    drop(theirs);
    let way_back = Wire::from_stream(ours).unwrap();
    assert_eq!(guest.front_end.config(0, 8).len(), 8);
    guest.front_end.set_config(WRITEBACK, &[0]);
    for round in 1..=TAKEOVERS {
        host.succeed();
        assert_eq!(guest.front_end.config(WRITEBACK, 1), [0]);
        assert!(way_back.is_silent(QUIET), "nothing has changed");
        host.line("volume resize disk +1M").ok();
        let told = way_back.receive().unwrap().unwrap();
        assert_eq!(told.request, CONFIG_CHANGE, "round {round}");
        // To know the new size.
        guest.front_end.config(0, 8);
    }
    drop(guest);
    host.finish();
}

#[test]
fn a_ring_that_is_disabled_takes_nothing() {
    let (mut host, socket) = host();
    let mut disk = Disk::connect(&socket);
    disk.write(0, &stamped(1, 0, 1));
    disk.guest.front_end.enable_vring(0, false);
    let status = disk.guest.status();
    let data = disk.guest.memory.writable(512);
    let chain = [disk.guest.header(T_IN, 0), data, status];
    let head = disk.guest.rings[0].submit(&chain);
    host.succeed();
    assert!(disk.guest.rings[0].take().is_none());
    assert!(disk.guest.front_end.is_quiet());
    assert!(disk.guest.rings[0].take().is_none());
    disk.guest.front_end.enable_vring(0, true);
    let used = disk.guest.rings[0].wait();
    assert_eq!(used.head, u32::from(head));
    assert_eq!(disk.guest.last_byte(status), S_OK);
    assert_eq!(disk.guest.memory.bytes(data), stamped(1, 0, 1));
    drop(disk);
    host.finish();
}

#[test]
fn many_regions_of_memory_come_along() {
    let (mut host, socket) = host();
    let mut disk = Disk::connect(&socket);
    let end = disk.guest.memory.end().next_multiple_of(1 << 21);
    let more: Vec<Region> = (0..40)
        .map(|region| {
            Region::new(RegionInfo {
                gpa: end + region * (1 << 21),
                bytes: 1 << 16,
                uva: 0x1000_0000_0000 + region * (1 << 21),
                mmap_offset: 0,
            })
        })
        .collect();
    for region in &more {
        assert!(!disk.guest.front_end.add_region(region).is_no());
    }
    for round in 0..TAKEOVERS {
        disk.write(round, &stamped(2, round, 1));
        host.succeed();
        assert_eq!(disk.read(round, 1), stamped(2, round, 1));
    }
    for region in &more {
        assert!(!disk.guest.front_end.remove_region(&region.info).is_no());
    }
    drop(disk);
    host.finish();
}

#[test]
fn a_dirty_log_is_kept_on() {
    let (mut host, socket) = host();
    let options = GuestOptions {
        memory: GuestMemory::two_regions(),
        ..GuestOptions::default()
    };
    let mut disk = Disk::new(Guest::start(&socket, options));
    let log = DirtyLog::covering(disk.guest.memory.end());
    let reply = disk
        .guest
        .front_end
        .set_log_base(log.bytes, log.offset, log.as_fd());
    assert!(reply.is_some());
    disk.guest
        .front_end
        .set_features(disk.guest.features | VHOST_LOG_ALL);
    disk.guest.front_end.set_vring_addr(&VringAddresses {
        flags: 1,
        log: disk.guest.rings[0].addresses.used,
        ..disk.guest.vring_addresses(0)
    });
    for round in 0..TAKEOVERS {
        host.succeed();
        log.take();
        disk.read(round, 8);
        assert!(log.take().len() >= 2, "data and the used ring");
    }
    drop(disk);
    host.finish();
}

#[test]
fn an_immutable_volume_is_not_reset_under_its_machine() {
    let (mut host, socket) = host();
    host.line("volume detach disk").ok();
    host.line("volume set disk --type immutable").ok();
    host.attach("disk", 2);
    let mut disk = Disk::connect(&socket);
    let before = disk.read(0, 8);
    let data = stamped(3, 0, 8);
    disk.write(0, &data);
    for _ in 0..TAKEOVERS {
        host.succeed();
        assert_eq!(disk.read(0, 8), data, "the machine goes on");
    }
    drop(disk);
    let mut disk = Disk::connect(&socket);
    assert_eq!(disk.read(0, 8), before, "another one starts");
    drop(disk);
    host.finish();
}

#[test]
fn a_machine_with_an_inflight_buffer_goes_on_and_is_told_nothing_anew() {
    let (mut host, socket) = host();
    let (guest, _inflight) = Guest::start_tracked(&socket, GuestOptions::default());
    let mut disk = Disk::new(guest);
    for round in 0..TAKEOVERS {
        disk.write(round, &stamped(4, round, 1));
        host.succeed();
        assert_eq!(disk.read(round, 1), stamped(4, round, 1));
    }
    host.kill();
    host.serve();
    let mut disk = disk.reconnect(&socket);
    assert_eq!(disk.read(0, 1), stamped(4, 0, 1));
    drop(disk);
    host.finish();
}

/// A front-end that cannot be served any more, since its memory is gone, loses its connection, and holds up nobody. Where it is
/// the only one, the new process takes it for its own fault and leaves it to the one before.
#[test]
fn a_front_end_without_memory_holds_up_nobody() {
    let (mut host, socket) = host();
    host.line("volume create other --size 1M").ok();
    host.attach("other", 1);
    let cut = |socket: &std::path::Path| {
        let disk = Disk::connect(socket);
        for region in disk.guest.memory.regions() {
            region.shrink();
        }
        disk
    };
    let lost = cut(&socket);
    let mut disk = Disk::connect(&host.path("other.sock"));
    disk.write(0, &stamped(5, 0, 1));
    host.succeed();
    assert_eq!(disk.read(0, 1), stamped(5, 0, 1));
    assert!(lost.guest.front_end.is_closed());
    assert_eq!(Disk::connect(&socket).read(0, 1).len(), 512, "served again");
    drop((disk, lost));

    let lost = cut(&socket);
    let refused = host.try_succeed().unwrap_err();
    assert!(refused.contains("could be served"), "{refused}");
    assert!(lost.guest.front_end.is_closed());
    assert_eq!(Disk::connect(&socket).read(0, 1).len(), 512, "served again");
    assert!(host.line("volume list").ok().contains("other"));
    drop(lost);
    host.succeed();
    host.finish();
}
