//! Messages that are nonsense, and front-ends that are slow, silent or gone (line 36).

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use stratablk_tests::frontend::{
    Answer, FrontEnd, NO_FD, VringAddresses, config, single_region, vring_state,
};
use stratablk_tests::guest::{Guest, GuestOptions};
use stratablk_tests::launch::Server;
use stratablk_tests::memory::memfd;
use stratablk_tests::wait::{event, until};
use stratablk_tests::wire::{REPLY, VERSION, code};

use crate::{greeted, run_read, spare_region};

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
        let buffers = guest.read_of(sector);
        guest.rings[0].submit(&buffers);
    }
    drop(guest);
    server.assert_serves();
    server.assert_nothing_kept(baseline);
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
    server.assert_nothing_kept(fds);
    let grown = server.process.resident_kib().saturating_sub(memory);
    assert!(grown < 4096, "memory grew by {grown} KiB");
}

/// How many front-ends are served at a time; see `attach::sessions` in the daemon.
const PLACES: usize = 8;

/// The next front-end is served although all places are taken, and one of those who take them has to go.
#[track_caller]
fn assert_gives_way(server: &mut Server, crowd: &[FrontEnd]) {
    assert_eq!(crowd.len(), PLACES);
    server.assert_serves();
    assert!(
        crowd.iter().any(FrontEnd::is_closed),
        "one of them was given up"
    );
}

/// Line 36: front-ends that connect and say nothing hold up nobody: the next one is served while they are still there.
#[test]
fn c36_a_silent_front_end_gives_way() {
    let mut server = Server::start();
    let silent: Vec<_> = (0..PLACES)
        .map(|_| FrontEnd::connect(&server.socket()))
        .collect();
    assert_gives_way(&mut server, &silent);
}

/// Line 36: so do those that stop in their handshake.
#[test]
fn c36_a_front_end_stuck_in_its_handshake_gives_way() {
    let mut server = Server::start();
    let stuck: Vec<_> = (0..PLACES).map(|_| greeted(&server)).collect();
    assert_gives_way(&mut server, &stuck);
}

/// Line 36: so do those that stop in the midst of a message.
#[test]
fn c36_a_front_end_stuck_in_a_message_gives_way() {
    let mut server = Server::start();
    let stuck: Vec<_> = (0..PLACES).map(|_| greeted(&server)).collect();
    let head = stratablk_tests::wire::header(code::SET_FEATURES, VERSION, 8);
    for front_end in &stuck {
        let sent = front_end.wire.send_bytes(&head, &[]);
        sent.expect("the back-end reads");
    }
    assert_gives_way(&mut server, &stuck);
}

/// Line 36: a front-end that runs may be silent for as long as it likes; others are answered meanwhile, however many come.
#[test]
fn c36_an_idle_guest_is_not_driven_out() {
    let server = Server::start();
    let mut guest = server.guest();
    run_read(&mut guest, 0);
    let mut crowd = Vec::new();
    for _ in 0..2 * PLACES {
        let other = FrontEnd::connect(&server.socket());
        let sent = other.wire.send(code::GET_FEATURES, VERSION, &[], &[]);
        sent.expect("a place, or one in the queue");
        crowd.push(other);
    }
    let last = crowd.last().expect("there are some");
    assert_ne!(last.reply_to(code::GET_FEATURES).as_u64(), 0);
    run_read(&mut guest, 1);
}
