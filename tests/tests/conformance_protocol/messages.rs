//! Messages and their replies, the configuration space, resets, the back-end's own channel (lines 29 to 31, and 35).

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use stratablk_tests::dirty_log::DirtyLog;
use stratablk_tests::disk::Disk;
use stratablk_tests::frontend::{Answer, config, single_region, vring_state};
use stratablk_tests::guest::{GuestOptions, USUAL_FEATURES};
use stratablk_tests::launch::Server;
use stratablk_tests::memory::memfd;
use stratablk_tests::pattern;
use stratablk_tests::request::protocol;
use stratablk_tests::wait::QUIET;
use stratablk_tests::wire::{NEED_REPLY, VERSION, Wire, code};

use crate::{assert_idle, greeted, run_read, spare_region};

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
    let buffers = guest.read_of(0);
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
    server.assert_fds_closed(baseline);
}
