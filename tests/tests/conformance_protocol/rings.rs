//! Rings from the protocol's side: when they start, stop, and are enabled (lines 23 to 28).

use std::os::fd::AsFd;

use stratablk_tests::disk::Disk;
use stratablk_tests::frontend::FrontEnd;
use stratablk_tests::guest::{Guest, GuestOptions, USUAL_FEATURES, USUAL_PROTOCOL};
use stratablk_tests::launch::Server;
use stratablk_tests::memory::memfd;
use stratablk_tests::pattern;
use stratablk_tests::request::feature::{BLK_FLUSH, PROTOCOL_FEATURES, VERSION_1};
use stratablk_tests::request::{S_OK, T_IN, protocol};
use stratablk_tests::wait::{PATIENCE, QUIET, event, readable, take_signals, until};
use stratablk_tests::wire::code;

use crate::{assert_idle, greeted, run_read};

/// Line 23: protocol features are asked for and chosen before SET_FEATURES, even before SET_OWNER.
#[test]
fn c23_protocol_features_come_before_set_features() {
    let server = Server::start();
    let mut front_end = FrontEnd::connect(&server.socket());
    assert_ne!(front_end.features() & PROTOCOL_FEATURES, 0);
    let offered = front_end.protocol_features();
    for bit in [
        protocol::MQ,
        protocol::LOG_SHMFD,
        protocol::REPLY_ACK,
        protocol::BACKEND_REQ,
        protocol::CONFIG,
        protocol::RESET_DEVICE,
        protocol::CONFIGURE_MEM_SLOTS,
        protocol::INFLIGHT_SHMFD,
        protocol::DEVICE_STATE,
    ] {
        assert_ne!(offered & bit, 0, "protocol feature {bit:#x} is offered");
    }
    assert_eq!(
        offered & protocol::STATUS,
        0,
        "what does not work is not offered"
    );
    front_end.set_protocol_features(offered & USUAL_PROTOCOL);
    assert_eq!(front_end.config(0, 8), server.sectors().to_le_bytes());
    assert_eq!(front_end.ask(code::GET_QUEUE_NUM, &[], &[]).as_u64(), 2);
}

/// Line 23: without protocol features in SET_FEATURES all rings are enabled at once.
#[test]
fn c23_without_protocol_features_rings_start_enabled() {
    let server = Server::start();
    let features = USUAL_FEATURES & !PROTOCOL_FEATURES;
    let mut guest = server.guest_with(GuestOptions {
        features,
        ..GuestOptions::default()
    });
    run_read(&mut guest, 1);
}

/// Lines 23 and 24: with protocol features rings start disabled, and a kick before they are enabled is not lost.
#[test]
fn c23_with_protocol_features_rings_start_disabled() {
    let server = Server::start();
    let mut guest = Guest::negotiate(&server.socket(), GuestOptions::default());
    guest.set_up_ring(0);
    guest.set_events(0);
    let buffers = guest.read_of(2);
    guest.rings[0].submit(&buffers);
    assert_idle(&guest, "a disabled ring ran");
    guest.front_end.enable_vring(0, true);
    guest.rings[0].wait();
    guest.assert_read(&buffers, 2);
}

/// Line 23: a second SET_FEATURES leaves rings as they are, enabled or disabled.
#[test]
fn c23_second_set_features_keeps_ring_states() {
    let server = Server::start();
    let mut guest = server.guest();
    run_read(&mut guest, 0);
    guest.front_end.set_features(guest.features);
    run_read(&mut guest, 1);
    guest.front_end.enable_vring(0, false);
    guest.front_end.set_features(guest.features);
    let buffers = guest.read_of(2);
    guest.rings[0].submit(&buffers);
    assert_idle(&guest, "a disabled ring ran");
    guest.front_end.enable_vring(0, true);
    guest.rings[0].wait();
    guest.assert_read(&buffers, 2);
}

/// Line 24: a ring starts with a kick, also with one that came before the back-end was told of the event.
#[test]
fn c24_a_kick_before_its_event_is_known_counts() {
    let server = Server::start();
    let mut guest = Guest::negotiate(&server.socket(), GuestOptions::default());
    let buffers = guest.read_of(3);
    guest.rings[0].submit(&buffers);
    // What was made available belongs behind the base that the back-end is told.
    let ring = &guest.rings[0];
    guest.front_end.set_vring_num(0, u32::from(ring.size));
    guest.front_end.set_vring_base(0, 0);
    guest.front_end.set_vring_addr(&guest.vring_addresses(0));
    guest.set_events(0);
    guest.front_end.enable_vring(0, true);
    guest.rings[0].wait();
    guest.assert_read(&buffers, 3);
}

/// Line 24: SET_VRING_KICK does not change whether a ring is enabled, and a running ring takes the new event.
#[test]
fn c24_set_vring_kick_keeps_the_enabled_state() {
    let server = Server::start();
    let mut guest = server.guest();
    run_read(&mut guest, 0);
    guest.rings[0].replace_events();
    guest.set_events(0);
    run_read(&mut guest, 1);
    guest.front_end.enable_vring(0, false);
    guest.set_events(0);
    let buffers = guest.read_of(2);
    guest.rings[0].submit(&buffers);
    assert_idle(&guest, "a disabled ring ran");
    guest.front_end.enable_vring(0, true);
    guest.rings[0].wait();
    guest.assert_read(&buffers, 2);
}

/// Line 24: the event for used entries may change while the ring runs; the old one is left alone from then on.
#[test]
fn c24_call_may_change_while_running() {
    let server = Server::start();
    let mut guest = server.guest();
    for sector in 0..20 {
        run_read(&mut guest, sector);
        let old = guest.rings[0].replace_call();
        let ring = &guest.rings[0];
        guest
            .front_end
            .set_vring_fd(code::SET_VRING_CALL, 0, Some(ring.call_fd()));
        take_signals(&old);
        run_read(&mut guest, sector);
        assert_eq!(take_signals(&old), 0, "the old event was signalled");
    }
}

/// Line 24: the event for errors may change while the ring runs, and breaks no request.
#[test]
fn c24_err_may_change_while_running() {
    let server = Server::start();
    let mut guest = server.guest();
    let error = event();
    for fd in [Some(error.as_fd()), None, Some(error.as_fd())] {
        guest.front_end.set_vring_fd(code::SET_VRING_ERR, 0, fd);
        run_read(&mut guest, 4);
    }
    guest.rings[0].set_available_index(20_000);
    guest.rings[0].kick();
    let fds = [error.as_fd(), guest.front_end.wire.as_fd()];
    assert_ne!(readable(fds, PATIENCE), [false; 2], "the new event is used");
}

/// Line 24: bit 8 of SET_VRING_CALL: the driver polls, nobody is told.
#[test]
fn c24_no_call_descriptor_means_polling_driver() {
    let server = Server::start();
    let mut guest = server.guest();
    run_read(&mut guest, 0);
    guest.front_end.set_vring_fd(code::SET_VRING_CALL, 0, None);
    while take_signals(guest.rings[0].call_fd()) != 0 {}
    for sector in 0..20 {
        let buffers = guest.read_of(sector);
        guest.rings[0].submit(&buffers);
        guest.rings[0].spin();
        guest.assert_read(&buffers, sector);
    }
    assert_eq!(
        take_signals(guest.rings[0].call_fd()),
        0,
        "the old event was signalled"
    );
    let ring = &guest.rings[0];
    guest
        .front_end
        .set_vring_fd(code::SET_VRING_CALL, 0, Some(ring.call_fd()));
    run_read(&mut guest, 5);
}

/// Line 24: bit 8 of SET_VRING_KICK: the back-end looks for requests itself.
#[test]
fn c24_no_kick_descriptor_means_polling_device() {
    let server = Server::start();
    let mut guest = Guest::negotiate(&server.socket(), GuestOptions::default());
    guest.set_up_ring(0);
    guest.set_events(0);
    guest.front_end.set_vring_fd(code::SET_VRING_KICK, 0, None);
    guest.front_end.enable_vring(0, true);
    for sector in 0..20 {
        let buffers = guest.read_of(sector);
        let ring = &mut guest.rings[0];
        let head = ring.chain(&buffers);
        ring.publish(head);
        ring.wait();
        guest.assert_read(&buffers, sector);
    }
}

/// Line 24: a ring that is disabled keeps its requests; enabling it carries them out.
#[test]
fn c24_disabled_rings_keep_their_requests() {
    let server = Server::start();
    let mut guest = server.guest();
    for sector in 0..5 {
        run_read(&mut guest, sector);
        guest.front_end.enable_vring(0, false);
        let buffers = guest.read_of(sector + 10);
        guest.rings[0].submit(&buffers);
        assert_idle(&guest, "a disabled ring ran");
        guest.front_end.enable_vring(0, true);
        guest.rings[0].wait();
        guest.assert_read(&buffers, sector + 10);
    }
}

/// Line 25: GET_VRING_BASE completes what is in flight, replies the last available index, and nothing touches guest memory
/// afterwards; started again at that index, the ring carries out the rest.
#[test]
fn c25_get_vring_base_drains() {
    let server = Server::start();
    for _ in 0..5 {
        let mut guest = server.guest_with(GuestOptions {
            ring_size: 256,
            ..GuestOptions::default()
        });
        let chains: Vec<_> = (0..60)
            .map(|index| {
                [
                    guest.header(T_IN, index * 8),
                    guest.memory.writable(64 << 10),
                    guest.status(),
                ]
            })
            .collect();
        for chain in &chains {
            guest.rings[0].submit(chain);
        }
        let base = guest.front_end.stop_vring(0);
        let memory = guest.memory.snapshot();
        take_signals(guest.rings[0].call_fd());
        let done = guest.rings[0].used_index();
        assert_eq!(u32::from(done), base, "what was fetched was completed");
        guest.rings[0].kick();
        let quiet = readable([guest.rings[0].call_fd()], QUIET);
        assert!(
            guest.memory.snapshot() == memory,
            "guest memory was written after the stop"
        );
        assert_eq!(quiet, [false], "told after the stop");

        // The events are gone with the stop, as front-ends have it.
        guest.rings[0].replace_events();
        let ring = &guest.rings[0];
        guest.front_end.set_vring_num(0, u32::from(ring.size));
        guest.front_end.set_vring_base(0, base);
        guest.front_end.set_vring_addr(&guest.vring_addresses(0));
        guest.set_events(0);
        guest.front_end.enable_vring(0, true);
        guest.rings[0].kick();
        let mut completed = 0;
        while completed < chains.len() {
            guest.rings[0].wait();
            completed += 1;
        }
        for (index, chain) in chains.iter().enumerate() {
            let sector = u64::try_from(index).expect("small") * 8;
            assert_eq!(guest.last_byte(chain[2]), S_OK);
            pattern::assert_same(
                &guest.memory.bytes(chain[1]),
                &pattern::base(sector, 128),
                "a read",
            );
        }
        assert_eq!(guest.front_end.stop_vring(0), 60);
    }
}

/// Line 25: a ring that never ran replies the base that it was given; stopping twice is harmless.
#[test]
fn c25_stopping_an_idle_ring_replies_its_base() {
    let server = Server::start();
    let guest = Guest::negotiate(
        &server.socket(),
        GuestOptions {
            base: 77,
            ..GuestOptions::default()
        },
    );
    guest.set_up_ring(0);
    assert_eq!(guest.front_end.stop_vring(0), 77);
    assert_eq!(guest.front_end.stop_vring(0), 77);
    drop(guest);
    let mut guest = server.guest();
    for sector in 0..3 {
        run_read(&mut guest, sector);
    }
    assert_eq!(guest.front_end.stop_vring(0), 3);
    assert_eq!(guest.front_end.stop_vring(0), 3);
}

/// Lines 25 and 38: firmware hands over to a kernel: the ring is stopped, and started at 0 at another place and size on the
/// same connection.
#[test]
fn c25_rings_restart_at_another_place() {
    let server = Server::start();
    let mut guest = server.guest();
    for size in [16, 256, 64] {
        run_read(&mut guest, 1);
        guest.front_end.stop_vring(0);
        let event_idx = guest.features & stratablk_tests::request::feature::RING_EVENT_IDX != 0;
        guest.rings[0] = stratablk_tests::ring::Ring::new(&guest.memory, 0, size, event_idx, 0);
        guest.start_ring(0);
        run_read(&mut guest, 2);
        assert_eq!(guest.rings[0].used_index(), 1, "begins at 0 again");
    }
}

/// Line 26: with all rings stopped the back-end writes nothing and tells nothing, but answers.
#[test]
fn c26_a_suspended_device_is_still_and_answers() {
    let server = Server::start();
    let mut guest = server.guest_with(GuestOptions {
        queues: 2,
        ..GuestOptions::default()
    });
    for index in 0..2 {
        let buffers = guest.read_of(0);
        guest.rings[index].submit(&buffers);
        guest.rings[index].wait();
    }
    for index in 0..2 {
        guest.front_end.stop_vring(index);
    }
    for ring in &guest.rings {
        while take_signals(ring.call_fd()) != 0 {}
    }
    let buffers = guest.read_of(1);
    guest.rings[0].submit(&buffers);
    guest.rings[1].submit(&buffers);
    let before = guest.memory.snapshot();
    assert_eq!(guest.front_end.config(0, 8), server.sectors().to_le_bytes());
    assert_ne!(guest.front_end.features() & VERSION_1, 0);
    assert_ne!(guest.front_end.protocol_features() & protocol::CONFIG, 0);
    assert!(guest.front_end.is_quiet(), "a message out of nowhere");
    assert!(
        guest.memory.snapshot() == before,
        "guest memory was written"
    );
    for ring in &guest.rings {
        assert_eq!(take_signals(ring.call_fd()), 0, "told while suspended");
    }
}

/// Line 28: without INFLIGHT negotiated its messages are refused. See `inflight.rs` for what they do with it.
#[test]
fn c28_inflight_messages_are_refused_and_leak_nothing() {
    let mut server = Server::start();
    server.assert_serves();
    let baseline = server.idle_fds();
    let file = memfd(4096);
    // mmap size, offset, and far more queues than there can be (CVE-2021-3839).
    let mut payload = [4096_u64, 0].map(u64::to_le_bytes).concat();
    payload.extend([u16::MAX, u16::MAX].map(u16::to_le_bytes).concat());
    payload.extend([0; 4]);
    for request in [code::GET_INFLIGHT_FD, code::SET_INFLIGHT_FD] {
        for fds in [0, 1, 8] {
            let front_end = greeted(&server);
            let answer = front_end.attempt(request, &payload, &vec![file.as_fd(); fds]);
            assert!(
                answer.is_no(),
                "request {request} with {fds} descriptors: {answer:?}"
            );
        }
    }
    server.assert_serves();
    assert!(
        until(|| server.process.open_fds() <= baseline),
        "descriptors leaked (CVE-2022-0669)"
    );
}

/// The table of front-ends: Firecracker takes CONFIG only, no FLUSH, no INDIRECT, one queue of 256.
#[test]
fn c23_a_front_end_like_firecracker() {
    let server = Server::start();
    let features = VERSION_1
        | PROTOCOL_FEATURES
        | stratablk_tests::request::feature::RING_EVENT_IDX
        | stratablk_tests::request::feature::BLK_RO;
    let guest = server.guest_with(GuestOptions {
        features,
        protocol: protocol::CONFIG,
        ring_size: 256,
        ..GuestOptions::default()
    });
    assert_eq!(guest.features & BLK_FLUSH, 0);
    let mut disk = Disk::new(guest);
    assert_eq!(
        disk.guest.front_end.config(0, 60)[..8],
        server.sectors().to_le_bytes()
    );
    disk.write(3, &pattern::stamped(1, 3, 9));
    pattern::assert_same(&disk.read(3, 9), &pattern::stamped(1, 3, 9), "the disk");
}
