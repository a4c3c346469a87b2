//! The rules for vhost-user (lines 23 to 37 of the conformance list, without the inflight buffer and device state), and what
//! hostile front-ends did to other back-ends, each checked from a front-end's side.
//!
//! Every test that sends nonsense ends with a new front-end that is served.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use stratablk_tests::daemon::stratablk;
use stratablk_tests::dirty_log::DirtyLog;
use stratablk_tests::disk::Disk;
use stratablk_tests::frontend::{
    Answer, FrontEnd, NO_FD, VringAddresses, config, memory_table, single_region, vring_state,
};
use stratablk_tests::guest::{Guest, GuestOptions, USUAL_FEATURES, USUAL_PROTOCOL};
use stratablk_tests::launch::{Program, Server, ServerOptions};
use stratablk_tests::memory::{Buffer, PAGE, POISON, Region, RegionInfo, memfd};
use stratablk_tests::pattern;
use stratablk_tests::process::Process;
use stratablk_tests::request::feature::{BLK_FLUSH, PROTOCOL_FEATURES, VERSION_1, VHOST_LOG_ALL};
use stratablk_tests::request::{S_OK, T_GET_ID, T_IN, T_OUT, protocol};
use stratablk_tests::wait::{PATIENCE, QUIET, event, readable, take_signals, until};
use stratablk_tests::wire::{NEED_REPLY, REPLY, VERSION, Wire, code};

/// The buffers of a read of one sector.
fn read_of(guest: &Guest, sector: u64) -> [Buffer; 3] {
    [
        guest.header(T_IN, sector),
        guest.memory.writable(512),
        guest.status(),
    ]
}

/// Checks that a read has been carried out.
#[track_caller]
fn assert_read(guest: &Guest, buffers: &[Buffer; 3], sector: u64) {
    assert_eq!(guest.last_byte(buffers[2]), S_OK, "sector {sector}");
    pattern::assert_same(
        &guest.memory.bytes(buffers[1]),
        &pattern::base(sector, 1),
        "a read",
    );
}

/// Runs a read on the first ring.
#[track_caller]
fn run_read(guest: &mut Guest, sector: u64) {
    let buffers = read_of(guest, sector);
    guest.run(&buffers);
    assert_read(guest, &buffers, sector);
}

/// Checks that nothing is done for a while with what was submitted to the first ring.
#[track_caller]
fn assert_idle(guest: &Guest, what: &str) {
    let before = guest.rings[0].used_index();
    readable([guest.front_end.wire.as_fd()], QUIET);
    assert_eq!(guest.rings[0].used_index(), before, "{what}");
}

/// A session that has negotiated the protocol, but no more.
#[track_caller]
fn greeted(server: &Server) -> FrontEnd {
    let mut front_end = FrontEnd::connect(&server.socket());
    front_end.negotiate_protocol(USUAL_PROTOCOL);
    front_end
}

/// A region behind the guest's usual memory.
fn spare_region(index: u64) -> Region {
    const BYTES: u64 = 64 << 10;
    let gpa = (1 << 30) + index * BYTES;
    Region::new(RegionInfo {
        gpa,
        bytes: BYTES,
        uva: 0x7e00_0000_0000 + index * BYTES,
        mmap_offset: 0,
    })
}

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
    ] {
        assert_ne!(offered & bit, 0, "protocol feature {bit:#x} is offered");
    }
    for bit in [protocol::STATUS, protocol::DEVICE_STATE] {
        assert_eq!(
            offered & bit,
            0,
            "protocol feature {bit:#x} does not work yet"
        );
    }
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
    let buffers = read_of(&guest, 2);
    guest.rings[0].submit(&buffers);
    assert_idle(&guest, "a disabled ring ran");
    guest.front_end.enable_vring(0, true);
    guest.rings[0].wait();
    assert_read(&guest, &buffers, 2);
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
    let buffers = read_of(&guest, 2);
    guest.rings[0].submit(&buffers);
    assert_idle(&guest, "a disabled ring ran");
    guest.front_end.enable_vring(0, true);
    guest.rings[0].wait();
    assert_read(&guest, &buffers, 2);
}

/// Line 24: a ring starts with a kick, also with one that came before the back-end was told of the event.
#[test]
fn c24_a_kick_before_its_event_is_known_counts() {
    let server = Server::start();
    let mut guest = Guest::negotiate(&server.socket(), GuestOptions::default());
    let buffers = read_of(&guest, 3);
    guest.rings[0].submit(&buffers);
    // What was made available belongs behind the base that the back-end is told.
    let ring = &guest.rings[0];
    guest.front_end.set_vring_num(0, u32::from(ring.size));
    guest.front_end.set_vring_base(0, 0);
    guest.front_end.set_vring_addr(&guest.vring_addresses(0));
    guest.set_events(0);
    guest.front_end.enable_vring(0, true);
    guest.rings[0].wait();
    assert_read(&guest, &buffers, 3);
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
    let buffers = read_of(&guest, 2);
    guest.rings[0].submit(&buffers);
    assert_idle(&guest, "a disabled ring ran");
    guest.front_end.enable_vring(0, true);
    guest.rings[0].wait();
    assert_read(&guest, &buffers, 2);
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
        let buffers = read_of(&guest, sector);
        guest.rings[0].submit(&buffers);
        guest.rings[0].spin();
        assert_read(&guest, &buffers, sector);
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
        let buffers = read_of(&guest, sector);
        let ring = &mut guest.rings[0];
        let head = ring.chain(&buffers);
        ring.publish(head);
        ring.wait();
        assert_read(&guest, &buffers, sector);
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
        let buffers = read_of(&guest, sector + 10);
        guest.rings[0].submit(&buffers);
        assert_idle(&guest, "a disabled ring ran");
        guest.front_end.enable_vring(0, true);
        guest.rings[0].wait();
        assert_read(&guest, &buffers, sector + 10);
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
        let buffers = read_of(&guest, 0);
        guest.rings[index].submit(&buffers);
        guest.rings[index].wait();
    }
    for index in 0..2 {
        guest.front_end.stop_vring(index);
    }
    for ring in &guest.rings {
        while take_signals(ring.call_fd()) != 0 {}
    }
    let buffers = read_of(&guest, 1);
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

/// Line 29: a message with need_reply gets exactly one reply, one without gets none; what has a reply of its own gets no
/// second one.
#[test]
fn c29_exactly_one_reply() {
    let server = Server::start();
    let guest = server.guest();
    let front_end = &guest.front_end;
    let log = DirtyLog::covering(guest.memory.end());
    let features = guest.features.to_le_bytes();
    let log_base = [log.bytes, 0].map(u64::to_le_bytes).concat();
    let get_config = config(0, 8, 0, &[0; 8]);
    let set_config = config(32, 1, 0, &[1]);
    let call = 0_u64.to_le_bytes();
    let fd = guest.rings[0].call_fd();
    let acked: [(u32, &[u8], &[BorrowedFd<'_>]); 5] = [
        (code::SET_OWNER, &[], &[]),
        (code::SET_FEATURES, &features, &[]),
        (code::SET_CONFIG, &set_config, &[]),
        (code::SET_VRING_CALL, &call, &[fd]),
        (code::SET_VRING_ENABLE, &vring_state(0, 1), &[]),
    ];
    for (request, payload, fds) in acked {
        let replies = front_end.replies_to(request, VERSION | NEED_REPLY, payload, fds);
        assert_eq!(
            replies.len(),
            1,
            "request {request} with need_reply: {replies:?}"
        );
        assert_eq!(replies[0].as_u64(), 0, "request {request}");
        let replies = front_end.replies_to(request, VERSION, payload, fds);
        assert!(
            replies.is_empty(),
            "request {request} without need_reply: {replies:?}"
        );
    }
    let answered: [(u32, &[u8], &[BorrowedFd<'_>]); 7] = [
        (code::GET_PROTOCOL_FEATURES, &[], &[]),
        (code::GET_QUEUE_NUM, &[], &[]),
        (code::GET_MAX_MEM_SLOTS, &[], &[]),
        (code::GET_CONFIG, &get_config, &[]),
        (code::SET_LOG_BASE, &log_base, &[log.as_fd()]),
        (code::GET_VRING_BASE, &vring_state(1, 0), &[]),
        (code::GET_VRING_BASE, &vring_state(0, 0), &[]),
    ];
    for (request, payload, fds) in answered {
        for flags in [VERSION, VERSION | NEED_REPLY] {
            let replies = front_end.replies_to(request, flags, payload, fds);
            assert_eq!(
                replies.len(),
                1,
                "request {request}, flags {flags}: {replies:?}"
            );
            assert_eq!(replies[0].request, request);
        }
    }
}

/// Line 29: a refused message with need_reply gets one reply that is not zero, if the connection is kept.
#[test]
fn c29_refusals_are_not_zero() {
    let mut server = Server::start();
    for (request, payload) in [
        (code::SET_VRING_NUM, vring_state(0, 100)),
        (code::SET_VRING_ENABLE, vring_state(99, 1)),
        (code::SET_CONFIG, config(0, 8, 0, &[1; 8])),
        (code::REM_MEM_REG, single_region(&spare_region(3).info)),
    ] {
        let front_end = greeted(&server);
        front_end.set_features(front_end.features() & USUAL_FEATURES);
        let answer = front_end.attempt(request, &payload, &[]);
        assert!(answer.is_no(), "request {request}: {answer:?}");
        if answer != Answer::Closed {
            assert!(
                front_end.is_quiet() || front_end.is_closed(),
                "request {request}: more than one reply"
            );
        }
        drop(front_end);
        server.assert_serves();
    }
}

/// Line 29: need_reply means nothing before REPLY_ACK was chosen.
#[test]
fn c29_no_reply_without_reply_ack() {
    let server = Server::start();
    let protocol = protocol::CONFIG | protocol::MQ;
    let guest = server.guest_with(GuestOptions {
        protocol,
        ..GuestOptions::default()
    });
    let features = guest.features.to_le_bytes();
    let replies =
        guest
            .front_end
            .replies_to(code::SET_FEATURES, VERSION | NEED_REPLY, &features, &[]);
    assert!(replies.is_empty(), "{replies:?}");
}

/// Line 30: the reply to GET_CONFIG is as long as asked for, at any offset, with zeroes past the structure.
#[test]
fn c30_get_config_serves_any_size_and_offset() {
    let server = Server::start();
    let front_end = greeted(&server);
    let whole = front_end.config(0, 256);
    assert_eq!(whole[..8], server.sectors().to_le_bytes());
    assert!(
        whole[60..].iter().all(|&byte| byte == 0),
        "zeroes past the structure"
    );
    for size in [1, 2, 7, 8, 20, 24, 59, 60, 61, 64, 72, 96, 128, 255, 256] {
        for offset in [0, 1, 7, 20, 32, 34, 36, 57, 59, 60, 61, 100, 200, 255] {
            if offset + size <= 256 {
                let (from, to) = (offset as usize, (offset + size) as usize);
                assert_eq!(
                    front_end.config(offset, size),
                    whole[from..to],
                    "{size} bytes at {offset}"
                );
            }
        }
    }
}

/// Line 30: GET_CONFIG of no bytes, or whose payload contradicts it, is refused; beyond the 256 bytes of the protocol the
/// reply may be a refusal, but never shorter than what it says.
#[test]
fn c30_odd_get_config_is_refused() {
    let mut server = Server::start();
    for (name, payload, may_work) in [
        ("no bytes", config(0, 0, 0, &[]), false),
        ("too long", config(0, 257, 0, &[0; 257]), true),
        ("over the end", config(200, 57, 0, &[0; 57]), true),
        (
            "a sum beyond 32 bits",
            config(u32::MAX, 8, 0, &[0; 8]),
            false,
        ),
        ("a payload too short", config(0, 60, 0, &[0; 8]), false),
        ("a payload too long", config(0, 8, 0, &[0; 60]), false),
        ("unknown flags", config(0, 8, 0x80, &[0; 8]), true),
        ("a cut header", vec![0; 7], false),
    ] {
        let front_end = greeted(&server);
        if let Some(reply) = front_end.try_ask(code::GET_CONFIG, &payload, &[]) {
            let whole = may_work && reply.payload.len() == payload.len();
            assert!(reply.payload.is_empty() || whole, "{name}: {reply:?}");
        }
        drop(front_end);
        server.assert_serves();
    }
}

/// Line 30: a guest can write `writeback` and nothing else.
#[test]
fn c30_set_config_takes_writeback_only() {
    let mut server = Server::start();
    let front_end = greeted(&server);
    let before = front_end.config(0, 60);
    drop(front_end);
    for offset in (0..60).filter(|&offset| offset != 32) {
        let front_end = greeted(&server);
        front_end.set_features(front_end.features() & USUAL_FEATURES);
        let answer = front_end.set_config(offset, &[0x5a]);
        assert!(answer.is_no(), "offset {offset}: {answer:?}");
        drop(front_end);
        let front_end = greeted(&server);
        assert_eq!(front_end.config(0, 60), before, "offset {offset}");
    }
    let guest = server.guest();
    for value in [0, 1] {
        assert_eq!(guest.front_end.set_config(32, &[value]), Answer::Accepted);
        assert_eq!(guest.front_end.config(32, 1), [value]);
    }
    drop(guest);
    server.assert_serves();
}

/// Line 30: SET_CONFIG with an odd size, place or flags is refused and changes nothing.
#[test]
fn c30_odd_set_config_is_refused() {
    let mut server = Server::start();
    let before = greeted(&server).config(0, 60);
    for (name, payload) in [
        ("no bytes", config(32, 0, 0, &[])),
        ("beyond the space", config(300, 1, 0, &[1])),
        ("far beyond the space", config(u32::MAX, 1, 0, &[1])),
        ("writeback and its neighbour", config(32, 2, 0, &[1, 1])),
        ("a payload too short", config(32, 8, 0, &[0])),
        ("unknown flags", config(32, 1, 0x40, &[0])),
        ("the whole space, changed", config(0, 60, 0, &[0x77; 60])),
    ] {
        let front_end = greeted(&server);
        let answer = front_end.attempt(code::SET_CONFIG, &payload, &[]);
        assert!(answer.is_no(), "{name}: {answer:?}");
        drop(front_end);
        assert_eq!(greeted(&server).config(0, 60), before, "{name}");
        server.assert_serves();
    }
}

/// Line 31: RESET_DEVICE stops the rings and forgets features, and keeps the connection, its protocol features and the disk.
#[test]
fn c31_reset_device_keeps_connection_and_disk() {
    let server = Server::start();
    let mut disk = server.disk();
    disk.write(4, &pattern::stamped(1, 4, 4));
    let mut guest = disk.guest;
    guest.front_end.tell(code::RESET_DEVICE, &[], &[]);
    let buffers = read_of(&guest, 0);
    guest.rings[0].submit(&buffers);
    assert_idle(&guest, "a ring ran after the reset");
    assert_eq!(
        guest.front_end.config(0, 8),
        server.sectors().to_le_bytes(),
        "protocol features kept"
    );
    guest.front_end.set_features(guest.features);
    guest.front_end.set_mem_table(guest.memory.regions());
    guest.rings[0].restart(0);
    guest.rings[0].replace_events();
    guest.start_ring(0);
    let mut disk = Disk::new(guest);
    pattern::assert_same(&disk.read(4, 4), &pattern::stamped(1, 4, 4), "the disk");
}

/// Line 31: RESET_OWNER is ignored or disables rings; the connection lives.
#[test]
fn c31_reset_owner_does_little() {
    let mut server = Server::start();
    let mut guest = server.guest();
    run_read(&mut guest, 0);
    let answer = guest.front_end.attempt(code::RESET_OWNER, &[], &[]);
    if answer == Answer::Accepted {
        guest.front_end.enable_vring(0, true);
        run_read(&mut guest, 1);
    }
    drop(guest);
    server.assert_serves();
}

/// Line 31: the status messages are not offered and are refused.
#[test]
fn c31_status_is_refused() {
    let mut server = Server::start();
    let front_end = greeted(&server);
    assert_eq!(front_end.protocol_features() & protocol::STATUS, 0);
    assert!(
        front_end
            .attempt(code::SET_STATUS, &0_u64.to_le_bytes(), &[])
            .is_no()
    );
    drop(front_end);
    server.assert_serves();
}

/// Line 32: at least 32 regions can be added one by one, serve requests, and be removed; their descriptors are closed after
/// the mapping.
#[test]
fn c32_many_memory_slots() {
    let mut server = Server::start();
    let mut guest = server.guest();
    let slots = guest
        .front_end
        .ask(code::GET_MAX_MEM_SLOTS, &[], &[])
        .as_u64();
    assert!(slots >= 32, "{slots} slots");
    let fds = server.idle_fds();
    let regions: Vec<_> = (0..30).map(spare_region).collect();
    for region in &regions {
        assert_eq!(guest.front_end.add_region(region), Answer::Accepted);
    }
    let closed = until(|| server.process.open_fds() <= fds);
    assert!(closed, "region descriptors stay open");
    let memory = stratablk_tests::memory::GuestMemory::new(&[RegionInfo {
        gpa: 1 << 32,
        bytes: PAGE,
        uva: 1 << 46,
        mmap_offset: PAGE,
    }]);
    assert_eq!(
        guest.front_end.add_region(&memory.regions()[0]),
        Answer::Accepted
    );
    let into = memory.writable(512);
    assert_eq!(guest.request(T_IN, 6, Some(into)), S_OK);
    pattern::assert_same(
        &memory.bytes(into),
        &pattern::base(6, 1),
        "a read into an added region",
    );
    for region in &regions {
        assert_eq!(
            guest.front_end.remove_region(&region.info),
            Answer::Accepted
        );
    }
    assert_eq!(
        guest.front_end.remove_region(&memory.regions()[0].info),
        Answer::Accepted
    );
    assert_ne!(
        guest.request(T_IN, 6, Some(into)),
        S_OK,
        "a read into a removed region"
    );
    run_read(&mut guest, 7);
    assert_eq!(
        server.process.memfd_mappings(),
        2,
        "removed regions are unmapped"
    );
    drop(guest);
    assert!(
        until(|| server.process.memfd_mappings() == 0),
        "a closed session leaves no mapping"
    );
    server.assert_serves();
}

/// Line 32: the most slots that are promised are taken, and one more is refused.
#[test]
fn c32_promised_slots_are_taken_and_no_more() {
    let mut server = Server::start();
    let front_end = greeted(&server);
    front_end.set_features(front_end.features() & USUAL_FEATURES);
    let slots = front_end.ask(code::GET_MAX_MEM_SLOTS, &[], &[]).as_u64();
    for index in 0..slots {
        let answer = front_end.add_region(&spare_region(index));
        assert_eq!(answer, Answer::Accepted, "region {index} of {slots}");
    }
    assert!(
        front_end.add_region(&spare_region(slots)).is_no(),
        "one more than {slots}"
    );
    drop(front_end);
    server.assert_serves();
}

/// Line 32: ADD_MEM_REG has exactly one descriptor.
#[test]
fn c32_add_region_has_one_descriptor() {
    let mut server = Server::start();
    server.assert_serves();
    let baseline = server.idle_fds();
    for count in [0, 2, 3, 32] {
        let guest = server.guest();
        let region = spare_region(0);
        let fds = vec![region.as_fd(); count];
        let answer = guest
            .front_end
            .attempt(code::ADD_MEM_REG, &single_region(&region.info), &fds);
        assert!(answer.is_no(), "{count} descriptors: {answer:?}");
        drop(guest);
        server.assert_serves();
    }
    assert!(
        until(|| server.process.open_fds() <= baseline),
        "descriptors leaked"
    );
}

/// Line 32: REM_MEM_REG names a region by guest address, front-end address and size, and by nothing else; a descriptor with
/// it is closed.
#[test]
fn c32_remove_region_matches_place_and_size() {
    let mut server = Server::start();
    let info = spare_region(0).info;
    for (name, wrong) in [
        (
            "guest address",
            RegionInfo {
                gpa: info.gpa + PAGE,
                ..info
            },
        ),
        (
            "front-end address",
            RegionInfo {
                uva: info.uva + PAGE,
                ..info
            },
        ),
        (
            "size",
            RegionInfo {
                bytes: info.bytes / 2,
                ..info
            },
        ),
    ] {
        let guest = server.guest();
        assert_eq!(
            guest.front_end.add_region(&spare_region(0)),
            Answer::Accepted
        );
        let answer = guest.front_end.remove_region(&wrong);
        assert!(answer.is_no(), "another {name}: {answer:?}");
        drop(guest);
        server.assert_serves();
    }
    let guest = server.guest();
    let fds = server.idle_fds();
    assert_eq!(
        guest.front_end.add_region(&spare_region(0)),
        Answer::Accepted
    );
    let region = spare_region(1);
    let payload = single_region(&RegionInfo {
        mmap_offset: 12_288,
        ..info
    });
    let answer = guest
        .front_end
        .attempt(code::REM_MEM_REG, &payload, &[region.as_fd()]);
    assert_eq!(
        answer,
        Answer::Accepted,
        "another mmap offset, and a stray descriptor"
    );
    let closed = until(|| server.process.open_fds() <= fds);
    assert!(closed, "the stray descriptor is closed");
    let answer = guest.front_end.remove_region(&info);
    assert!(answer.is_no(), "removed twice: {answer:?}");
    drop(guest);
    server.assert_serves();
}

/// Line 32: a running device takes a new memory table; requests in flight keep the old mapping until they end.
#[test]
fn c32_memory_table_may_change_while_running() {
    let server = Server::start();
    let mut guest = server.guest_with(GuestOptions {
        ring_size: 256,
        ..GuestOptions::default()
    });
    let chains: Vec<_> = (0..32)
        .map(|index| {
            [
                guest.header(T_IN, index * 8),
                guest.memory.writable(64 << 10),
                guest.status(),
            ]
        })
        .collect();
    for round in 0..10_u64 {
        for chain in &chains {
            guest.memory.write(chain[2].gpa, &[POISON]);
            guest.rings[0].submit(chain);
        }
        if round % 2 == 0 {
            guest.front_end.set_mem_table(guest.memory.regions());
        } else {
            assert_eq!(
                guest.front_end.add_region(&spare_region(round)),
                Answer::Accepted
            );
        }
        for _ in &chains {
            guest.rings[0].wait();
        }
        for (index, chain) in chains.iter().enumerate() {
            assert_eq!(guest.last_byte(chain[2]), S_OK, "round {round}");
            let sector = u64::try_from(index).expect("small") * 8;
            pattern::assert_same(
                &guest.memory.bytes(chain[1]),
                &pattern::base(sector, 128),
                "a read",
            );
        }
    }
}

/// Line 32: regions that overlap, overflow, are empty or reach past their file are refused, added one by one or in a table.
#[test]
fn c32_impossible_regions_are_refused() {
    let mut server = Server::start();
    let good = RegionInfo {
        gpa: 1 << 30,
        bytes: 1 << 20,
        uva: 1 << 45,
        mmap_offset: 0,
    };
    let cases = [
        (
            "the same place",
            RegionInfo {
                uva: 1 << 44,
                ..good
            },
        ),
        (
            "overlap at the end",
            RegionInfo {
                gpa: good.gpa + good.bytes - PAGE,
                uva: 1 << 44,
                ..good
            },
        ),
        (
            "overlap at the start",
            RegionInfo {
                gpa: good.gpa - PAGE,
                uva: 1 << 44,
                ..good
            },
        ),
        (
            "inside",
            RegionInfo {
                gpa: good.gpa + PAGE,
                bytes: PAGE,
                uva: 1 << 44,
                ..good
            },
        ),
        (
            "no length",
            RegionInfo {
                gpa: 1 << 33,
                bytes: 0,
                uva: 1 << 44,
                ..good
            },
        ),
        (
            "guest addresses beyond 64 bits",
            RegionInfo {
                gpa: u64::MAX - PAGE + 1,
                bytes: 2 * PAGE,
                ..good
            },
        ),
        (
            "front-end addresses beyond 64 bits",
            RegionInfo {
                gpa: 1 << 33,
                uva: u64::MAX - PAGE,
                ..good
            },
        ),
        (
            "an offset beyond 64 bits",
            RegionInfo {
                gpa: 1 << 33,
                uva: 1 << 44,
                mmap_offset: u64::MAX - PAGE + 1,
                ..good
            },
        ),
        (
            "past the file",
            RegionInfo {
                gpa: 1 << 33,
                uva: 1 << 44,
                mmap_offset: PAGE,
                ..good
            },
        ),
        (
            "longer than the file",
            RegionInfo {
                gpa: 1 << 33,
                uva: 1 << 44,
                bytes: good.bytes + PAGE,
                ..good
            },
        ),
        (
            "enormous",
            RegionInfo {
                gpa: 1 << 33,
                uva: 1 << 44,
                bytes: 1 << 60,
                ..good
            },
        ),
    ];
    let file = memfd(good.bytes);
    for (name, bad) in cases {
        for table in [false, true] {
            let front_end = greeted(&server);
            front_end.set_features(front_end.features() & USUAL_FEATURES);
            let answer = if table {
                let payload = memory_table(&[good, bad]);
                front_end.attempt(code::SET_MEM_TABLE, &payload, &[file.as_fd(), file.as_fd()])
            } else {
                let payload = single_region(&good);
                let answer = front_end.attempt(code::ADD_MEM_REG, &payload, &[file.as_fd()]);
                assert_eq!(answer, Answer::Accepted);
                front_end.attempt(code::ADD_MEM_REG, &single_region(&bad), &[file.as_fd()])
            };
            assert!(answer.is_no(), "{name}, in a table: {table}: {answer:?}");
            drop(front_end);
            server.assert_serves();
        }
    }
}

/// Lines 32 and 36: the number of regions, the payload and the number of descriptors must agree.
#[test]
fn c36_memory_tables_that_contradict_themselves_are_refused() {
    let mut server = Server::start();
    server.assert_serves();
    let baseline = server.idle_fds();
    let regions: Vec<_> = (0..40).map(spare_region).collect();
    let infos: Vec<_> = regions.iter().map(|region| region.info).collect();
    let fds: Vec<_> = regions.iter().map(Region::as_fd).collect();
    let claim = |claimed: u32, infos: &[RegionInfo]| {
        let mut payload = memory_table(infos);
        payload[..4].copy_from_slice(&claimed.to_le_bytes());
        payload
    };
    let cases = [
        ("no region", claim(0, &[]), 0),
        ("no region, a descriptor", claim(0, &[]), 1),
        ("one descriptor too few", memory_table(&infos[..2]), 1),
        ("one descriptor too many", memory_table(&infos[..2]), 3),
        ("no descriptor", memory_table(&infos[..2]), 0),
        ("fewer regions than claimed", claim(3, &infos[..2]), 3),
        ("more regions than claimed", claim(1, &infos[..2]), 1),
        ("far more claimed", claim(u32::MAX, &infos[..2]), 2),
        (
            "a product that overflows",
            claim(0x0800_0000, &infos[..2]),
            2,
        ),
        ("more than a table holds", memory_table(&infos), 40),
    ];
    for (name, payload, count) in cases {
        let front_end = greeted(&server);
        let answer = front_end.attempt(code::SET_MEM_TABLE, &payload, &fds[..count]);
        assert!(answer.is_no(), "{name}: {answer:?}");
        drop(front_end);
        server.assert_serves();
    }
    assert!(
        until(|| server.process.open_fds() <= baseline),
        "descriptors leaked"
    );
    assert!(
        until(|| server.process.memfd_mappings() == 0),
        "mappings leaked"
    );
}

/// Starts the dirty log of a running guest as a migration does: log, features, then the rings again with the log flag.
#[track_caller]
fn start_logging(guest: &Guest, log: &DirtyLog) {
    let reply = guest
        .front_end
        .set_log_base(log.bytes, log.offset, log.as_fd());
    assert!(reply.is_some(), "SET_LOG_BASE is answered");
    guest.front_end.set_features(guest.features | VHOST_LOG_ALL);
    for (index, ring) in guest.rings.iter().enumerate() {
        let addresses = guest.vring_addresses(index);
        let logged = VringAddresses {
            flags: 1,
            log: ring.addresses.used,
            ..addresses
        };
        guest.front_end.set_vring_addr(&logged);
    }
}

/// Ends it.
#[track_caller]
fn stop_logging(guest: &Guest) {
    guest.front_end.set_features(guest.features);
    for index in 0..guest.rings.len() {
        guest
            .front_end
            .set_vring_addr(&guest.vring_addresses(index));
    }
}

/// The pages that a range of guest memory touches.
fn pages(gpa: u64, bytes: u64) -> BTreeSet<u64> {
    (gpa / PAGE..=(gpa + bytes - 1) / PAGE).collect()
}

/// The pages of some buffers.
fn pages_of(buffers: &[Buffer]) -> BTreeSet<u64> {
    buffers
        .iter()
        .flat_map(|buffer| pages(buffer.gpa, u64::from(buffer.len)))
        .collect()
}

/// Line 33: every page that the device writes is marked: read data, the name, status bytes, the used ring. Nothing else is.
#[test]
fn c33_every_written_page_is_logged() {
    let server = Server::start();
    let mut guest = server.guest();
    run_read(&mut guest, 0);
    let log = DirtyLog::covering(guest.memory.end());
    start_logging(&guest, &log);
    run_read(&mut guest, 1);
    let used_ring = guest.rings[0].addresses.used / PAGE;
    let page = |guest: &Guest, bytes| Buffer {
        gpa: guest.memory.allocate(u64::from(bytes), PAGE),
        len: bytes,
        writable: true,
    };
    let unaligned = Buffer {
        gpa: guest.memory.allocate(4 * PAGE, PAGE) + 3000,
        len: 8192,
        writable: true,
    };
    let out = Buffer {
        writable: false,
        ..page(&guest, 4096)
    };
    for (name, kind, data) in [
        ("a read of a page", T_IN, page(&guest, 4096)),
        ("a read across pages", T_IN, unaligned),
        ("a read of a sector", T_IN, page(&guest, 512)),
        ("a long read", T_IN, page(&guest, 128 << 10)),
        ("the name", T_GET_ID, page(&guest, 20)),
        ("a write", T_OUT, out),
    ] {
        let status = page(&guest, 1);
        let chain = [guest.header(kind, 0), data, status];
        log.take();
        guest.run(&chain);
        assert_eq!(guest.last_byte(status), S_OK, "{name}");
        let mut expected = pages_of(&[status]);
        if data.writable {
            expected.extend(pages_of(&[data]));
        }
        expected.insert(used_ring);
        let marked: BTreeSet<u64> = log.take().into_iter().collect();
        assert_eq!(marked, expected, "{name}");
    }
    assert!(log.is_clean_outside());
}

/// Line 33: logging starts and stops under a running guest, more than once, and with another log.
#[test]
fn c33_logging_starts_and_stops_on_the_fly() {
    let server = Server::start();
    let mut guest = server.guest();
    let first = DirtyLog::covering(guest.memory.end());
    for round in 0..3 {
        run_read(&mut guest, round);
        assert!(first.take().is_empty(), "marks without logging");
        start_logging(&guest, &first);
        first.take();
        run_read(&mut guest, round);
        assert!(first.take().len() >= 2, "no marks with logging");
        let second = DirtyLog::covering(guest.memory.end());
        assert!(
            guest
                .front_end
                .set_log_base(second.bytes, 0, second.as_fd())
                .is_some()
        );
        // Where the device asks for the next kick it writes to the used ring, and marks that, after a completion.
        first.take();
        run_read(&mut guest, round);
        assert!(first.take().is_empty(), "marks in the old log");
        assert!(second.take().len() >= 2, "no marks in the new log");
        stop_logging(&guest);
        second.take();
        run_read(&mut guest, round);
        assert!(second.take().is_empty(), "marks after the end of logging");
    }
}

/// Line 33: without the flag of the ring its used ring is not marked.
#[test]
fn c33_used_ring_is_logged_only_if_asked() {
    let server = Server::start();
    let mut guest = server.guest();
    run_read(&mut guest, 0);
    let log = DirtyLog::covering(guest.memory.end());
    assert!(
        guest
            .front_end
            .set_log_base(log.bytes, 0, log.as_fd())
            .is_some()
    );
    guest.front_end.set_features(guest.features | VHOST_LOG_ALL);
    let used_ring = guest.rings[0].addresses.used / PAGE;
    let buffers = read_of(&guest, 1);
    log.take();
    guest.run(&buffers);
    let marked: BTreeSet<u64> = log.take().into_iter().collect();
    assert_eq!(marked, pages_of(&buffers[1..]));
    assert!(!marked.contains(&used_ring));
}

/// Line 33: a page is marked, atomically, before the guest can see that its request is done.
#[test]
fn c33_marks_come_before_completions() {
    let server = Server::start();
    let mut guest = server.guest();
    let log = DirtyLog::covering(guest.memory.end());
    run_read(&mut guest, 0);
    start_logging(&guest, &log);
    let seen = std::sync::Mutex::new(BTreeSet::new());
    let done = AtomicBool::new(false);
    let start = guest.memory.allocate(64 * PAGE, PAGE);
    std::thread::scope(|scope| {
        // Takes marks all the time, so that a back-end which does not set bits atomically loses some.
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let mut seen = seen.lock().expect("no panic");
                seen.extend(log.take());
                drop(seen);
                std::thread::yield_now();
            }
        });
        let (header, status) = (guest.header(T_IN, 0), guest.status());
        for round in 0..300_u64 {
            let into = Buffer {
                gpa: start + (round % 64) * PAGE,
                len: 512,
                writable: true,
            };
            guest.run(&[header, into, status]);
            let mut seen = seen.lock().expect("no panic");
            seen.extend(log.take());
            let marked = seen.contains(&(into.gpa / PAGE));
            seen.clear();
            if !marked {
                done.store(true, Ordering::Relaxed);
            }
            drop(seen);
            assert!(marked, "round {round}: completed before it was marked");
        }
        done.store(true, Ordering::Relaxed);
    });
}

/// CVE-2019-14835: a log that is too short for the guest's memory is never overrun.
#[test]
fn c33_short_logs_are_not_overrun() {
    let mut server = Server::start();
    for (offset, bytes) in [(0, 1), (0, 8), (4096, 40), (0, 33)] {
        let mut guest = server.guest();
        run_read(&mut guest, 0);
        let log = DirtyLog::new(offset, bytes);
        if guest
            .front_end
            .set_log_base(bytes, offset, log.as_fd())
            .is_some()
        {
            let features = guest.features | VHOST_LOG_ALL;
            if !guest
                .front_end
                .attempt(code::SET_FEATURES, &features.to_le_bytes(), &[])
                .is_no()
            {
                let buffers = read_of(&guest, 1);
                guest.rings[0].submit(&buffers);
                guest.verdict();
            }
        }
        assert!(
            log.is_clean_outside(),
            "{bytes} bytes at {offset}: written outside"
        );
        drop(guest);
        server.assert_serves();
        assert!(
            log.is_clean_outside(),
            "{bytes} bytes at {offset}: written outside"
        );
    }
}

/// CVE-2019-14835: a log whose size and place do not fit its file is refused; the used ring's log address may be anything.
#[test]
fn c33_impossible_logs_are_refused() {
    let mut server = Server::start();
    server.assert_serves();
    let baseline = server.idle_fds();
    let file = memfd(4096);
    for (bytes, offset) in [
        (0, 0),
        (4097, 0),
        (4096, 1),
        (4096, 4096),
        (1 << 40, 0),
        (u64::MAX, 0),
        (u64::MAX, 1),
        (8, u64::MAX - 7),
        (8, 1 << 62),
    ] {
        let mut guest = server.guest();
        let reply = guest.front_end.set_log_base(bytes, offset, file.as_fd());
        let refused = reply
            .as_ref()
            .is_none_or(|reply| reply.payload.len() == 8 && reply.as_u64() != 0);
        assert!(refused, "{bytes} bytes at {offset}: {reply:?}");
        if reply.is_some() {
            run_read(&mut guest, 0);
        }
        drop(guest);
        server.assert_serves();
    }
    let log = DirtyLog::covering(16 << 20);
    for address in [u64::MAX, u64::MAX - 3, 1 << 50, 1] {
        let mut guest = server.guest();
        run_read(&mut guest, 0);
        start_logging(&guest, &log);
        let addresses = VringAddresses {
            flags: 1,
            log: address,
            ..guest.vring_addresses(0)
        };
        let answer = guest
            .front_end
            .attempt(code::SET_VRING_ADDR, &addresses.encode(), &[]);
        if !answer.is_no() {
            let buffers = read_of(&guest, 1);
            guest.rings[0].submit(&buffers);
            guest.verdict();
        }
        assert!(log.is_clean_outside(), "log address {address:#x}");
        drop(guest);
        server.assert_serves();
    }
    let payload = [4096_u64, 0].map(u64::to_le_bytes).concat();
    for fds in [0, 2] {
        let guest = server.guest();
        let reply = guest
            .front_end
            .try_ask(code::SET_LOG_BASE, &payload, &vec![file.as_fd(); fds]);
        let refused = reply
            .as_ref()
            .is_none_or(|reply| reply.payload.len() == 8 && reply.as_u64() != 0);
        assert!(refused, "{fds} descriptors: {reply:?}");
    }
    server.assert_serves();
    assert!(
        until(|| server.process.open_fds() <= baseline),
        "descriptors leaked"
    );
}

/// Line 35: the channel for the back-end's own requests is taken; a front-end that never reads it is served on.
#[test]
fn c35_backend_channel_is_taken_and_need_not_be_read() {
    let mut server = Server::start();
    let mut guest = server.guest();
    for _ in 0..3 {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        guest
            .front_end
            .tell(code::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
        drop(theirs);
        for sector in 0..20 {
            run_read(&mut guest, sector);
        }
        assert!(
            Wire::from_stream(ours).expect("a socket").is_silent(QUIET),
            "nothing to say, and not closed"
        );
    }
    drop(guest);
    server.assert_serves();
}

/// Line 35: what is no socket is refused as a channel, and more than one descriptor as well.
#[test]
fn c35_a_channel_must_be_a_socket() {
    let mut server = Server::start();
    server.assert_serves();
    let baseline = server.idle_fds();
    let file = memfd(4096);
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    let cases: [(&str, Vec<BorrowedFd<'_>>); 3] = [
        ("a file", vec![file.as_fd()]),
        ("nothing", vec![]),
        ("two sockets", vec![ours.as_fd(), theirs.as_fd()]),
    ];
    for (name, fds) in cases {
        let guest = server.guest();
        let answer = guest.front_end.attempt(code::SET_BACKEND_REQ_FD, &[], &fds);
        assert!(answer.is_no(), "{name}: {answer:?}");
        drop(guest);
        server.assert_serves();
    }
    assert!(
        until(|| server.process.open_fds() <= baseline),
        "descriptors leaked"
    );
}

/// Line 36: messages may arrive in pieces of any size.
#[test]
fn c36_messages_arrive_in_pieces() {
    let server = Server::start();
    let front_end = greeted(&server);
    let whole = front_end.config(0, 60);
    let payload = config(0, 60, 0, &[0; 60]);
    let size = u32::try_from(payload.len()).expect("short");
    let bytes = [
        &stratablk_tests::wire::header(code::GET_CONFIG, VERSION, size)[..],
        &payload,
    ]
    .concat();
    for piece in [1, 5, 12, 13, 40] {
        for part in bytes.chunks(piece) {
            front_end
                .wire
                .send_bytes(part, &[])
                .expect("the back-end reads");
        }
        assert_eq!(
            front_end.reply_to(code::GET_CONFIG).payload[12..],
            whole[..],
            "pieces of {piece}"
        );
    }
    // Several messages in one go.
    front_end
        .wire
        .send_bytes(&bytes.repeat(5), &[])
        .expect("the back-end reads");
    for _ in 0..5 {
        assert_eq!(
            front_end.reply_to(code::GET_CONFIG).payload[12..],
            whole[..]
        );
    }
}

/// Line 36: descriptors that come with messages that have none are closed, and the message is refused or carried out.
#[test]
fn c36_extra_descriptors_are_closed() {
    let mut server = Server::start();
    server.assert_serves();
    let baseline = server.idle_fds();
    let file = memfd(4096);
    let features = 0_u64.to_le_bytes();
    let get_config = config(0, 8, 0, &[0; 8]);
    let messages: [(u32, &[u8]); 10] = [
        (code::GET_FEATURES, &[]),
        (code::SET_OWNER, &[]),
        (code::SET_FEATURES, &features),
        (code::GET_CONFIG, &get_config),
        (code::SET_VRING_NUM, &vring_state(0, 128)),
        (code::GET_VRING_BASE, &vring_state(0, 0)),
        (code::SET_VRING_KICK, &features),
        (code::SET_VRING_CALL, &NO_FD.to_le_bytes()),
        (code::SET_LOG_FD, &[]),
        (999, &[]),
    ];
    for (request, payload) in messages {
        for count in [2, 7, 33, 200] {
            let front_end = greeted(&server);
            front_end
                .wire
                .send(request, VERSION, payload, &vec![file.as_fd(); count])
                .expect("the back-end reads");
            drop(front_end);
        }
        server.assert_serves();
        assert!(
            until(|| server.process.open_fds() <= baseline),
            "request {request}: descriptors leaked"
        );
    }
}

/// Line 36: a message that needs a descriptor and has none, or says that it has none and has one, is refused.
#[test]
fn c36_missing_and_unannounced_descriptors_are_refused() {
    let mut server = Server::start();
    let file = event();
    for request in [
        code::SET_VRING_KICK,
        code::SET_VRING_CALL,
        code::SET_VRING_ERR,
    ] {
        for (name, number, fds) in [
            ("missing", 0, vec![]),
            ("unannounced", NO_FD, vec![file.as_fd()]),
        ] {
            let guest = server.guest();
            let answer = guest
                .front_end
                .attempt(request, &u64::to_le_bytes(number), &fds);
            assert!(answer.is_no(), "request {request}, {name}: {answer:?}");
            drop(guest);
            server.assert_serves();
        }
    }
}

/// Line 36: a payload that is longer or shorter than its message is refused, or the connection is closed.
#[test]
fn c36_payloads_of_a_wrong_size_are_refused() {
    let mut server = Server::start();
    for request in [
        code::SET_FEATURES,
        code::SET_OWNER,
        code::SET_PROTOCOL_FEATURES,
        code::SET_VRING_NUM,
        code::SET_VRING_ADDR,
        code::SET_VRING_BASE,
        code::SET_VRING_ENABLE,
        code::SET_CONFIG,
        code::ADD_MEM_REG,
        code::REM_MEM_REG,
    ] {
        for size in [1, 3, 9, 17, 39, 41, 4096] {
            let front_end = greeted(&server);
            let answer = front_end.attempt(request, &vec![0xff; size], &[]);
            assert!(
                answer.is_no(),
                "request {request} of {size} bytes: {answer:?}"
            );
        }
        server.assert_serves();
    }
}

/// Line 36: a header that announces an enormous payload ends the connection at once, without waiting for it.
#[test]
fn c36_enormous_payloads_end_the_connection() {
    let mut server = Server::start();
    let before = server.process.resident_kib();
    for size in [4097, 1 << 20, 1 << 31, u32::MAX] {
        let front_end = greeted(&server);
        let head = stratablk_tests::wire::header(code::SET_FEATURES, VERSION, size);
        front_end
            .wire
            .send_bytes(&head, &[])
            .expect("the back-end reads");
        assert!(front_end.is_closed(), "{size} bytes");
        drop(front_end);
        server.assert_serves();
    }
    assert!(
        server.process.resident_kib() < before + 32 * 1024,
        "memory did not grow"
    );
}

/// Line 36: unknown requests, other versions and replies that nobody asked for are refused.
#[test]
fn c36_unknown_requests_are_refused() {
    let mut server = Server::start();
    for request in [0, 27, 45, 100, 1 << 16, u32::MAX] {
        let front_end = greeted(&server);
        let answer = front_end.attempt(request, &[], &[]);
        assert!(answer.is_no(), "request {request}: {answer:?}");
        drop(front_end);
        server.assert_serves();
    }
    for flags in [0, 2, 3, VERSION | REPLY, VERSION | 0xffff_fff0] {
        let front_end = greeted(&server);
        front_end
            .wire
            .send(code::GET_FEATURES, flags, &[], &[])
            .expect("the back-end reads");
        assert!(front_end.is_closed(), "flags {flags:#x}");
        drop(front_end);
        server.assert_serves();
    }
}

/// CVE-2011-2512: numbers of rings that do not exist, also negative ones, are refused in every message.
#[test]
fn c36_ring_numbers_are_checked() {
    let mut server = Server::start();
    let fd = event();
    for index in [
        2_u32,
        3,
        127,
        128,
        255,
        256,
        0x7fff_ffff,
        0x8000_0000,
        u32::MAX,
    ] {
        for request in [
            code::SET_VRING_NUM,
            code::SET_VRING_BASE,
            code::SET_VRING_ENABLE,
        ] {
            let guest = Guest::negotiate(&server.socket(), GuestOptions::default());
            let answer = guest
                .front_end
                .attempt(request, &vring_state(index, 1), &[]);
            assert!(
                answer.is_no(),
                "request {request}, ring {index}: {answer:?}"
            );
        }
        let guest = Guest::negotiate(&server.socket(), GuestOptions::default());
        let addresses = VringAddresses {
            index,
            ..guest.vring_addresses(0)
        };
        assert!(
            guest
                .front_end
                .attempt(code::SET_VRING_ADDR, &addresses.encode(), &[])
                .is_no(),
            "{index}"
        );
        drop(guest);
        let guest = Guest::negotiate(&server.socket(), GuestOptions::default());
        let reply = guest
            .front_end
            .try_ask(code::GET_VRING_BASE, &vring_state(index, 0), &[]);
        assert!(
            reply.is_none_or(|reply| reply.payload.len() != 8),
            "GET_VRING_BASE of ring {index}"
        );
        drop(guest);
        if (2..256).contains(&index) {
            for request in [
                code::SET_VRING_KICK,
                code::SET_VRING_CALL,
                code::SET_VRING_ERR,
            ] {
                let guest = Guest::negotiate(&server.socket(), GuestOptions::default());
                let number = u64::from(index).to_le_bytes();
                let answer = guest.front_end.attempt(request, &number, &[fd.as_fd()]);
                assert!(
                    answer.is_no(),
                    "request {request}, ring {index}: {answer:?}"
                );
            }
        }
        server.assert_serves();
    }
}

/// Line 36: messages in an order that makes no sense are refused or kept for later; they harm nothing.
#[test]
fn c36_messages_out_of_order_do_no_harm() {
    let mut server = Server::start();
    let fd = event();
    let zero = 0_u64.to_le_bytes();
    let enable = vring_state(0, 1);
    let base = vring_state(0, 5);
    let addresses = VringAddresses {
        index: 0,
        flags: 0,
        descriptors: 4096,
        used: 8192,
        available: 12_288,
        log: 0,
    };
    let addresses = addresses.encode();
    let region = single_region(&spare_region(0).info);
    let messages: [(u32, &[u8], &[BorrowedFd<'_>]); 9] = [
        (code::SET_VRING_KICK, &zero, &[fd.as_fd()]),
        (code::SET_VRING_CALL, &zero, &[fd.as_fd()]),
        (code::SET_VRING_ENABLE, &enable, &[]),
        (code::SET_VRING_BASE, &base, &[]),
        (code::SET_VRING_ADDR, &addresses, &[]),
        (code::RESET_DEVICE, &[], &[]),
        (code::REM_MEM_REG, &region, &[]),
        (code::SET_FEATURES, &zero, &[]),
        (code::SET_PROTOCOL_FEATURES, &zero, &[]),
    ];
    for skip in 0..messages.len() {
        let mut front_end = Some(FrontEnd::connect(&server.socket()));
        for (request, payload, fds) in messages.iter().cycle().skip(skip).take(messages.len()) {
            let open = front_end
                .take()
                .unwrap_or_else(|| FrontEnd::connect(&server.socket()));
            if open.attempt(*request, payload, fds) != Answer::Closed {
                front_end = Some(open);
            }
        }
        drop(front_end);
        server.assert_serves();
    }
}

/// Line 36: a front-end that goes away at any step of its handshake leaves nothing behind.
#[test]
fn c36_front_ends_that_vanish_leave_nothing() {
    let mut server = Server::start();
    server.assert_serves();
    let baseline = server.idle_fds();
    drop(FrontEnd::connect(&server.socket()));
    let front_end = FrontEnd::connect(&server.socket());
    front_end
        .wire
        .send_bytes(&[1, 0, 0], &[])
        .expect("the back-end reads");
    drop(front_end);
    let front_end = greeted(&server);
    let head = stratablk_tests::wire::header(code::SET_FEATURES, VERSION, 8);
    front_end
        .wire
        .send_bytes(&[&head[..], &[0; 3]].concat(), &[])
        .expect("the back-end reads");
    drop(front_end);
    let front_end = greeted(&server);
    let file = memfd(4096);
    let head = stratablk_tests::wire::header(code::SET_MEM_TABLE, VERSION, 40);
    front_end
        .wire
        .send_bytes(&head, &[file.as_fd()])
        .expect("the back-end reads");
    drop(front_end);
    drop(Guest::negotiate(&server.socket(), GuestOptions::default()));
    let guest = Guest::negotiate(&server.socket(), GuestOptions::default());
    guest.set_up_ring(0);
    guest.set_events(0);
    drop(guest);
    let mut guest = server.guest();
    for sector in 0..32 {
        let buffers = read_of(&guest, sector);
        guest.rings[0].submit(&buffers);
    }
    drop(guest);
    server.assert_serves();
    assert!(
        until(|| server.process.open_fds() <= baseline),
        "descriptors leaked"
    );
    assert!(
        until(|| server.process.memfd_mappings() == 0),
        "mappings leaked"
    );
}

/// Line 36: a front-end that sends and never reads holds up nobody once it is gone.
#[test]
fn c36_front_ends_that_never_read_hold_up_nobody() {
    let mut server = Server::start();
    let front_end = greeted(&server);
    front_end.wire.limit_sending(Duration::from_millis(100));
    let payload = config(0, 256, 0, &[0; 256]);
    let stuck = (0..200_000).any(|_| {
        front_end
            .wire
            .send(code::GET_CONFIG, VERSION, &payload, &[])
            .is_err()
    });
    assert!(
        stuck,
        "the replies pile up until the back-end reads no more"
    );
    drop(front_end);
    server.assert_serves();
}

/// Line 36: hundreds of sessions, one after another, leave descriptors, mappings and memory as they were.
#[test]
fn c36_many_sessions_leave_nothing() {
    let mut server = Server::start();
    let session = |server: &Server| {
        let mut guest = server.guest();
        run_read(&mut guest, 3);
    };
    for _ in 0..20 {
        session(&server);
    }
    let (fds, memory) = (server.idle_fds(), server.process.resident_kib());
    for _ in 0..150 {
        session(&server);
    }
    server.assert_serves();
    assert!(
        until(|| server.process.open_fds() <= fds),
        "descriptors leaked"
    );
    assert!(
        until(|| server.process.memfd_mappings() == 0),
        "mappings leaked"
    );
    let grown = server.process.resident_kib().saturating_sub(memory);
    assert!(grown < 4096, "memory grew by {grown} KiB");
}

/// Line 36: a front-end that connects and says nothing holds up nobody: the next one is served while it is still there.
#[test]
fn c36_a_silent_front_end_gives_way() {
    let mut server = Server::start();
    let silent = FrontEnd::connect(&server.socket());
    server.assert_serves();
    assert!(silent.is_closed(), "the silent one was given up");
}

/// Line 36: so does one that stops in its handshake.
#[test]
fn c36_a_front_end_stuck_in_its_handshake_gives_way() {
    let mut server = Server::start();
    let stuck = greeted(&server);
    server.assert_serves();
    assert!(stuck.is_closed(), "the stuck one was given up");
}

/// Line 36: so does one that stops in the midst of a message.
#[test]
fn c36_a_front_end_stuck_in_a_message_gives_way() {
    let mut server = Server::start();
    let guest = server.guest();
    let head = stratablk_tests::wire::header(code::SET_FEATURES, VERSION, 8);
    guest
        .front_end
        .wire
        .send_bytes(&head, &[])
        .expect("the back-end reads");
    server.assert_serves();
    assert!(guest.front_end.is_closed(), "the stuck one was given up");
}

/// Line 36: a front-end that runs may be silent for as long as it likes; the next one waits for its turn.
#[test]
fn c36_an_idle_guest_is_not_driven_out() {
    let server = Server::start();
    let mut guest = server.guest();
    run_read(&mut guest, 0);
    let waiting = FrontEnd::connect(&server.socket());
    waiting
        .wire
        .send(code::GET_FEATURES, VERSION, &[], &[])
        .expect("a place in the queue");
    assert!(
        waiting.wire.is_silent(Duration::from_millis(1300)),
        "two at a time"
    );
    run_read(&mut guest, 1);
    drop(guest);
    assert_ne!(waiting.reply_to(code::GET_FEATURES).as_u64(), 0);
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
                    let buffers = read_of(&guest, sector);
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
        let buffers = read_of(&guest, sector);
        guest.rings[index].submit(&buffers);
        guest.rings[index].wait();
        assert_read(&guest, &buffers, sector);
    }
}

/// Each line of the list that holds for this version has a test that names it. 27 (the inflight buffer) and 38 (what counts as
/// the start of a machine) have files of their own; 34 (device state) is about a feature that is not offered.
#[test]
fn every_line_has_a_test() {
    let sources = [
        include_str!("conformance_requests.rs"),
        include_str!("conformance_rings.rs"),
        include_str!("conformance_protocol.rs"),
    ];
    for line in (1..=37).filter(|line| ![27, 34].contains(line)) {
        let start = format!("\nfn c{line:02}_");
        assert!(
            sources.iter().any(|text| text.contains(&start)),
            "line {line} has no test"
        );
    }
}
