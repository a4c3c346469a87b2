//! The inflight buffer, lines 27 and 28 of the conformance list: what it says while requests are under way, what becomes of
//! them when the daemon is killed, and what a front-end may do with it that means harm.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::fd::AsFd;

use stratablk_tests::disk::Disk;
use stratablk_tests::frontend::{Answer, FrontEnd, vring_state};
use stratablk_tests::guest::{Guest, GuestOptions, USUAL_PROTOCOL};
use stratablk_tests::inflight::{Entry, Inflight, Shape};
use stratablk_tests::launch::Server;
use stratablk_tests::load::random::Random;
use stratablk_tests::memory::{Buffer, POISON, memfd};
use stratablk_tests::pattern::{base, stamped};
use stratablk_tests::request::{S_OK, T_IN, T_OUT, protocol};
use stratablk_tests::ring::{Descriptor, Ring, Used};
use stratablk_tests::wait::{PATIENCE, QUIET, readable, take_signals, until};
use stratablk_tests::wire::code;

/// A connection with the inflight feature, and nothing more.
#[track_caller]
fn greeted(server: &Server) -> FrontEnd {
    let mut front_end = FrontEnd::connect(&server.socket());
    front_end.negotiate_protocol(USUAL_PROTOCOL | protocol::INFLIGHT_SHMFD);
    // Acknowledgements come once the features were chosen.
    let features = front_end.features();
    front_end.set_features(features);
    front_end
}

/// A guest with an inflight buffer.
#[track_caller]
fn tracked(server: &Server, queues: u32) -> (Guest, Inflight) {
    Guest::start_tracked(
        &server.socket(),
        GuestOptions {
            queues,
            ..GuestOptions::default()
        },
    )
}

/// A request of one sector that is on its way.
struct Sent {
    head: u16,
    data: Buffer,
    status: Buffer,
}

/// Puts a request for one sector into a ring, without a kick.
fn stage(guest: &mut Guest, ring: usize, kind: u32, sector: u64, version: u64) -> Sent {
    let data = match kind {
        T_OUT => guest.memory.readable(&stamped(version, sector, 1)),
        _ => guest.memory.writable(512),
    };
    let status = guest.status();
    let chain = [guest.header(kind, sector), data, status];
    let head = guest.rings[ring].chain(&chain);
    guest.rings[ring].publish(head);
    Sent { head, data, status }
}

/// A daemon is killed in a guest's back, and another serves.
#[track_caller]
fn kill_and_serve(server: &mut Server) {
    server.process.kill();
    server.restart();
}

/// What a region says that a ring without requests under way has been used with.
#[track_caller]
fn assert_at_rest(inflight: &Inflight, ring: &Ring) {
    let queue = u16::try_from(ring.index).unwrap();
    // The guest may see a request before the daemon has noted that.
    let at_rest = until(|| {
        let [.., used] = inflight.head(queue);
        used == ring.used_index() && inflight.under_way(queue).is_empty()
    });
    assert!(at_rest, "{:?}", inflight.head(queue));
}

#[test]
fn c27_a_new_buffer_is_empty_and_as_asked_for() {
    let server = Server::start();
    let front_end = greeted(&server);
    for (queues, size, stride) in [(1, 128, 2112), (2, 256, 4160), (1, 1, 64), (2, 1024, 16448)] {
        let inflight = Inflight::get(&front_end, queues, size);
        let shape = Shape {
            bytes: stride * u64::from(queues),
            offset: 0,
            queues,
            size,
        };
        assert_eq!(inflight.shape, shape);
        assert_eq!(inflight.file.metadata().unwrap().len(), shape.bytes);
        for queue in 0..queues {
            assert_eq!(inflight.features(queue), 0);
            assert_eq!(inflight.head(queue), [1, size, 0, 0]);
            let entries = (0..size).map(|head| inflight.entry(queue, head));
            assert!(entries.into_iter().all(|entry| entry == Entry::default()));
        }
        inflight.hand_over(&front_end);
        inflight.hand_over(&front_end);
    }
}

#[test]
fn c27_a_buffer_cannot_be_cut() {
    let server = Server::start();
    let inflight = Inflight::get(&greeted(&server), 1, 128);
    for len in [0, inflight.shape.bytes - 1, inflight.shape.bytes + 1] {
        inflight.file.set_len(len).unwrap_err();
    }
}

#[test]
fn c27_requests_are_noted_in_order_and_cleared() {
    let server = Server::start();
    let (mut guest, inflight) = tracked(&server, 2);
    let mut last = [0; 2];
    for round in 0..300 {
        for queue in [0, 1] {
            let sent = stage(&mut guest, queue, T_IN, round % 64, 0);
            guest.rings[queue].kick();
            assert_eq!(guest.rings[queue].wait().head, u32::from(sent.head));
            assert_eq!(guest.memory.bytes(sent.data), base(round % 64, 1));
            let region = u16::try_from(queue).unwrap();
            let entry = inflight.entry(region, sent.head);
            assert!(entry.counter > last[queue], "{entry:?}");
            last[queue] = entry.counter;
            let noted = until(|| inflight.head(region)[2] == sent.head);
            assert!(noted, "{:?}", inflight.head(region));
        }
    }
    for ring in &guest.rings {
        assert_at_rest(&inflight, ring);
    }
}

/// What a killed daemon leaves when none of its stores reached the used ring: the next one does it all.
#[test]
fn c27_what_was_under_way_is_carried_out_once_and_before_anything_new() {
    // Where the front-end says that the ring goes on: where QEMU says, and where cloud-hypervisor does.
    let bases: [fn(&Ring) -> u16; 2] = [Ring::used_index, Ring::available_index];
    for from in bases {
        let mut server = Server::start();
        let (mut guest, inflight) = tracked(&server, 1);
        let warm = stage(&mut guest, 0, T_IN, 0, 0);
        guest.rings[0].kick();
        assert_eq!(guest.rings[0].wait().head, u32::from(warm.head));
        assert_at_rest(&inflight, &guest.rings[0]);
        server.process.kill();
        // The first two as if taken, in the other order, the third one as if not.
        let sent: Vec<Sent> = (1..=3)
            .map(|version| stage(&mut guest, 0, T_OUT, 9, version))
            .collect();
        for (place, counter) in [(0, 1000), (1, 999)] {
            let entry = Entry {
                in_flight: 1,
                next: 0,
                counter,
            };
            inflight.set_entry(0, sent[place].head, entry);
        }
        server.restart();
        let mut guest = guest.reconnect_with(&server.socket(), Some(&inflight), from);
        let mut returned: Vec<u32> = sent.iter().map(|_| guest.rings[0].wait().head).collect();
        returned.sort_unstable();
        let mut heads: Vec<u32> = sent.iter().map(|sent| u32::from(sent.head)).collect();
        heads.sort_unstable();
        assert_eq!(returned, heads);
        assert!(sent.iter().all(|sent| guest.last_byte(sent.status) == S_OK));
        assert_eq!(guest.rings[0].wait_for(QUIET), None, "once");
        assert_at_rest(&inflight, &guest.rings[0]);
        assert!(inflight.entry(0, sent[2].head).counter > 1000);
        let found = Disk::new(guest).read(9, 1);
        assert!((1..=3).any(|version| found == stamped(version, 9, 1)));
    }
}

/// A daemon that was killed behind its store to the used ring's index: the batch is not carried out again, all of it.
#[test]
fn c27_a_batch_that_the_guest_could_see_is_not_carried_out_again() {
    let mut server = Server::start();
    let (mut guest, inflight) = tracked(&server, 1);
    let sent: Vec<Sent> = (0..5)
        .map(|sector| stage(&mut guest, 0, T_IN, sector, 0))
        .collect();
    guest.rings[0].kick();
    let returned: Vec<Used> = sent.iter().map(|_| guest.rings[0].wait()).collect();
    assert_at_rest(&inflight, &guest.rings[0]);
    server.process.kill();
    // As it was after that store: the last three were a batch, and a sixth request is under way.
    let sixth = stage(&mut guest, 0, T_IN, 5, 0);
    let mut next = 0;
    for (used, counter) in returned.iter().zip(10..) {
        let head = u16::try_from(used.head).unwrap();
        let entry = Entry {
            in_flight: u8::from(counter >= 12),
            next,
            counter,
        };
        inflight.set_entry(0, head, entry);
        next = head;
    }
    let entry = Entry {
        in_flight: 1,
        next: 0,
        counter: 99,
    };
    inflight.set_entry(0, sixth.head, entry);
    let used = guest.rings[0].used_index();
    inflight.set_head(0, [1, 128, next, used.wrapping_sub(3)]);
    for sent in &sent {
        guest.memory.write(sent.data.gpa, &[POISON; 512]);
    }
    server.restart();
    let mut guest = guest.reconnect_with(&server.socket(), Some(&inflight), Ring::available_index);
    assert_eq!(guest.rings[0].wait().head, u32::from(sixth.head));
    assert_eq!(guest.memory.bytes(sixth.data), base(5, 1));
    assert_eq!(guest.rings[0].wait_for(QUIET), None, "nothing else");
    for sent in &sent {
        assert_eq!(guest.memory.bytes(sent.data), [POISON; 512], "not again");
    }
    assert_at_rest(&inflight, &guest.rings[0]);
}

/// What a daemon had published and was killed before it told the guest.
#[test]
fn c28_a_guest_that_was_not_told_is_told_by_the_next_daemon() {
    let mut server = Server::start();
    let (mut guest, inflight) = tracked(&server, 1);
    let sent = stage(&mut guest, 0, T_IN, 3, 0);
    guest.rings[0].kick();
    assert_eq!(readable([guest.rings[0].call_fd()], PATIENCE), [true]);
    kill_and_serve(&mut server);
    // As if nobody had been told.
    take_signals(guest.rings[0].call_fd());
    let mut guest = guest.reconnect_with(&server.socket(), Some(&inflight), Ring::used_index);
    assert_eq!(readable([guest.rings[0].call_fd()], PATIENCE), [true]);
    assert_eq!(guest.rings[0].wait().head, u32::from(sent.head));
}

/// The guest rewrites descriptors between kill and replay: they are read like any others.
#[test]
fn c27_a_chain_that_was_rewritten_is_judged_anew() {
    let mut server = Server::start();
    let (mut guest, inflight) = tracked(&server, 1);
    server.process.kill();
    let sent = stage(&mut guest, 0, T_IN, 3, 0);
    let entry = Entry {
        in_flight: 1,
        next: 0,
        counter: 7,
    };
    inflight.set_entry(0, sent.head, entry);
    // Around in a circle.
    let circle = Descriptor::of(sent.data).then(sent.head);
    guest.rings[0].write_descriptor(sent.head, circle);
    server.restart();
    let mut guest = guest.reconnect_with(&server.socket(), Some(&inflight), Ring::used_index);
    let used = guest.rings[0].wait();
    assert_eq!((used.head, used.len), (u32::from(sent.head), 0));
    assert_eq!(guest.request(T_IN, 0, Some(sent.data)), S_OK);
    assert_at_rest(&inflight, &guest.rings[0]);
}

/// Stopped in order, a ring leaves nothing under way, and goes on where it was: on this connection and on another.
#[test]
fn c25_a_ring_that_was_stopped_leaves_nothing_under_way() {
    let server = Server::start();
    let (mut guest, inflight) = tracked(&server, 1);
    for round in 0..6 {
        let sent: Vec<Sent> = (0..20)
            .map(|sector| stage(&mut guest, 0, T_IN, sector, 0))
            .collect();
        guest.rings[0].kick();
        guest.rings[0].wait();
        let stopped = guest.front_end.stop_vring(0);
        assert_eq!(u16::try_from(stopped).unwrap(), guest.rings[0].used_index());
        assert!(inflight.under_way(0).is_empty());
        assert_eq!(inflight.head(0)[3], guest.rings[0].used_index());
        if round % 2 == 0 {
            inflight.hand_over(&guest.front_end);
            guest.set_up_ring_at(0, u16::try_from(stopped).unwrap());
            guest.set_events(0);
        } else {
            guest = guest.reconnect_with(&server.socket(), Some(&inflight), Ring::used_index);
        }
        let mut left = sent.len() - 1;
        while left > 0 {
            guest.rings[0].wait();
            left -= 1;
        }
        assert_eq!(guest.rings[0].wait_for(QUIET), None);
    }
}

/// A front-end that resets its rings may keep the buffer: nothing is under way in it.
#[test]
fn c27_a_ring_that_begins_anew_with_a_drained_buffer_does() {
    let server = Server::start();
    let (mut guest, inflight) = tracked(&server, 1);
    for _ in 0..3 {
        for sector in 0..200 {
            let data = guest.memory.writable(512);
            assert_eq!(guest.request(T_IN, sector, Some(data)), S_OK);
        }
        guest.front_end.stop_vring(0);
        guest.rings[0].restart(0);
        inflight.hand_over(&guest.front_end);
        guest.start_ring(0);
    }
    assert_eq!(guest.rings[0].available_index(), 0);
}

#[test]
fn c27_a_buffer_cannot_change_under_a_ring() {
    let server = Server::start();
    let (mut guest, inflight) = tracked(&server, 1);
    let other = Inflight::get(&guest.front_end, 1, 128);
    assert!(other.set(&guest.front_end).is_no());
    guest.front_end.enable_vring(0, false);
    assert!(other.set(&guest.front_end).is_no(), "disabled is in use");
    guest.front_end.enable_vring(0, true);
    let data = guest.memory.writable(512);
    assert_eq!(guest.request(T_IN, 0, Some(data)), S_OK);
    assert_at_rest(&inflight, &guest.rings[0]);
    assert_eq!(other.head(0), [1, 128, 0, 0], "untouched");
    guest.front_end.stop_vring(0);
    other.hand_over(&guest.front_end);
}

/// CVE-2021-3839: numbers of queues and entries that no device has; and sizes and places that do not fit.
#[test]
fn c27_shapes_that_cannot_be_are_refused() {
    let mut server = Server::start();
    server.assert_serves();
    let memory = server.process.resident_kib();
    for (queues, size) in [
        (0, 128),
        (1, 0),
        (3, 128),
        (1, 1025),
        (u16::MAX, u16::MAX),
        (2, u16::MAX),
    ] {
        let given = Inflight::try_get(&greeted(&server), queues, size);
        assert!(given.is_none(), "{queues} queues of {size}");
    }
    let good = Inflight::get(&greeted(&server), 2, 128);
    let bytes = good.shape.bytes;
    let forged = |change: fn(&mut Shape)| {
        let mut shape = good.shape;
        change(&mut shape);
        shape
    };
    let shapes = [
        forged(|shape| shape.queues = 0),
        forged(|shape| shape.queues = 3),
        forged(|shape| shape.queues = u16::MAX),
        forged(|shape| shape.size = 0),
        forged(|shape| shape.size = 129),
        forged(|shape| shape.size = 64),
        forged(|shape| shape.size = u16::MAX),
        forged(|shape| shape.bytes = 0),
        forged(|shape| shape.bytes -= 1),
        forged(|shape| shape.offset = 4096),
        forged(|shape| shape.offset = 1),
        forged(|shape| shape.offset = u64::MAX),
        forged(|shape| (shape.bytes, shape.offset) = (u64::MAX, u64::MAX)),
        forged(|shape| shape.offset = 1 << 63),
    ];
    for shape in shapes {
        let payload = shape.encode();
        let answer =
            greeted(&server).attempt(code::SET_INFLIGHT_FD, &payload, &[good.file.as_fd()]);
        assert!(answer.is_no(), "{shape:?}: {answer:?}");
    }
    // A larger file, and a larger claim: no more is mapped than is needed.
    let large = memfd(1 << 40);
    let mut shape = good.shape;
    shape.bytes = 1 << 40;
    let answer = greeted(&server).attempt(code::SET_INFLIGHT_FD, &shape.encode(), &[large.as_fd()]);
    assert_eq!(answer, Answer::Accepted);
    // Files that are too small, and no files.
    for file in [
        memfd(0),
        memfd(bytes - 1),
        std::fs::File::open("/dev/zero").unwrap(),
    ] {
        let answer =
            greeted(&server).attempt(code::SET_INFLIGHT_FD, &good.shape.encode(), &[file.as_fd()]);
        assert!(answer.is_no(), "{file:?}: {answer:?}");
    }
    server.assert_serves();
    assert!(server.process.resident_kib() < memory + 4096);
}

/// CVE-2022-0669: descriptors that come with the messages and should not.
#[test]
fn c27_no_descriptor_is_kept() {
    let mut server = Server::start();
    server.assert_serves();
    let baseline = server.idle_fds();
    let good = Inflight::get(&greeted(&server), 1, 128);
    for count in [0, 2, 8] {
        let fds = vec![good.file.as_fd(); count];
        let set = greeted(&server).attempt(code::SET_INFLIGHT_FD, &good.shape.encode(), &fds);
        assert!(set.is_no(), "{count} descriptors: {set:?}");
    }
    for count in [1, 8] {
        let fds = vec![good.file.as_fd(); count];
        let get = greeted(&server).try_ask(code::GET_INFLIGHT_FD, &good.shape.encode(), &fds);
        assert!(get.is_none(), "{count} descriptors: {get:?}");
    }
    let front_end = greeted(&server);
    for _ in 0..50 {
        drop(Inflight::get(&front_end, 2, 1024));
        good.hand_over(&front_end);
    }
    drop(front_end);
    server.assert_serves();
    assert!(until(|| server.process.open_fds() <= baseline));
}

/// Regions of a kind that is not known, and such as cannot be this ring's.
#[test]
fn c27_regions_that_cannot_be_are_refused() {
    let mut server = Server::start();
    let forge: [fn(&Inflight); 4] = [
        |inflight| inflight.set_head(0, [2, 128, 0, 0]),
        |inflight| inflight.set_head(0, [u16::MAX, 128, 0, 0]),
        |inflight| inflight.set_head(0, [1, 127, 0, 0]),
        |inflight| inflight.set_features(0, 1 << 63),
    ];
    for forge in forge {
        let front_end = greeted(&server);
        let inflight = Inflight::get(&front_end, 1, 128);
        forge(&inflight);
        assert!(inflight.set(&front_end).is_no(), "{:?}", inflight.head(0));
    }
    // A ring with more entries than its region.
    let options = || GuestOptions {
        protocol: USUAL_PROTOCOL | protocol::INFLIGHT_SHMFD,
        ..GuestOptions::default()
    };
    let guest = Guest::negotiate(&server.socket(), options());
    let small = Inflight::get(&guest.front_end, 1, 64);
    small.hand_over(&guest.front_end);
    assert!(starts(&guest).is_no());
    drop(guest);
    // Requests under way in a ring that was never used.
    let guest = Guest::negotiate(&server.socket(), options());
    let stale = Inflight::get(&guest.front_end, 1, 128);
    let entry = Entry {
        in_flight: 1,
        ..Entry::default()
    };
    stale.set_entry(0, 3, entry);
    stale.set_head(0, [1, 128, 0, 500]);
    stale.hand_over(&guest.front_end);
    assert!(starts(&guest).is_no());
    drop(guest);
    server.assert_serves();
}

/// One that nobody ever wrote is as good as new: other back-ends give such ones out.
#[test]
fn c27_a_blank_buffer_is_made_a_new_one() {
    let server = Server::start();
    let guest = Guest::negotiate(
        &server.socket(),
        GuestOptions {
            protocol: USUAL_PROTOCOL | protocol::INFLIGHT_SHMFD,
            ..GuestOptions::default()
        },
    );
    let inflight = Inflight {
        shape: Shape {
            bytes: 2112,
            offset: 4096 + 8,
            queues: 1,
            size: 128,
        },
        file: memfd(4096 + 8 + 2112),
    };
    inflight.hand_over(&guest.front_end);
    guest.start_ring(0);
    let mut disk = Disk::new(guest);
    assert_eq!(disk.read(5, 2), base(5, 2));
    assert_at_rest(&inflight, &disk.guest.rings[0]);
    assert_eq!(inflight.head(0)[..2], [1, 128]);
}

/// Enables the first ring, whatever comes of it.
#[track_caller]
fn starts(guest: &Guest) -> Answer {
    guest.set_up_ring(0);
    guest.set_events(0);
    let payload = vring_state(0, 1);
    guest
        .front_end
        .attempt(code::SET_VRING_ENABLE, &payload, &[])
}

/// A front-end that cuts its buffer under us loses its rings, and nobody else anything.
#[test]
fn c27_a_buffer_that_is_cut_breaks_its_rings_only() {
    let mut server = Server::start();
    for before_start in [true, false] {
        let mut guest = Guest::negotiate(
            &server.socket(),
            GuestOptions {
                protocol: USUAL_PROTOCOL | protocol::INFLIGHT_SHMFD,
                ..GuestOptions::default()
            },
        );
        let file = memfd(8192);
        let inflight = Inflight {
            shape: Shape {
                bytes: 2112,
                offset: 4096,
                queues: 1,
                size: 128,
            },
            file,
        };
        inflight.hand_over(&guest.front_end);
        if before_start {
            inflight.file.set_len(0).unwrap();
            assert!(starts(&guest).is_no());
        } else {
            guest.start_ring(0);
            let data = guest.memory.writable(512);
            assert_eq!(guest.request(T_IN, 0, Some(data)), S_OK);
            inflight.file.set_len(0).unwrap();
            for sector in 0..3 {
                stage(&mut guest, 0, T_IN, sector, 0);
                guest.rings[0].kick();
            }
            assert_eq!(readable([guest.rings[0].error_fd()], PATIENCE), [true]);
        }
        drop(guest);
        server.assert_serves();
    }
}

/// Buffers full of anything: refused, or served until the ring breaks. What matters is who is left.
#[test]
fn c27_whatever_a_buffer_says_the_daemon_serves_on() {
    let mut server = Server::start();
    server.assert_serves();
    let mut random = Random::new(27);
    let mut started = 0;
    for _ in 0..60 {
        let mut guest = Guest::negotiate(
            &server.socket(),
            GuestOptions {
                protocol: USUAL_PROTOCOL | protocol::INFLIGHT_SHMFD,
                ..GuestOptions::default()
            },
        );
        let inflight = Inflight::get(&guest.front_end, 1, 128);
        for _ in 0..random.below(40) {
            let entry = Entry {
                in_flight: u8::try_from(random.below(3)).unwrap(),
                next: half(&mut random),
                counter: [0, 1, u64::MAX, random.word()][usize::try_from(random.below(4)).unwrap()],
            };
            let head = u16::try_from(random.below(128)).unwrap();
            inflight.set_entry(0, head, entry);
        }
        // The used index of the ring is 0.
        inflight.set_head(
            0,
            [
                1,
                128,
                half(&mut random),
                0_u16.wrapping_sub(half(&mut random)),
            ],
        );
        inflight.hand_over(&guest.front_end);
        for sector in 0..4 {
            stage(&mut guest, 0, T_IN, sector, 0);
        }
        if starts(&guest) == Answer::Accepted {
            started += 1;
            guest.rings[0].kick();
            let fds = [guest.rings[0].call_fd(), guest.rings[0].error_fd()];
            assert_ne!(readable(fds, PATIENCE), [false; 2]);
            let payload = vring_state(0, 0);
            let enable = code::SET_VRING_ENABLE;
            guest.front_end.attempt(enable, &payload, &[]);
        }
    }
    println!("{started} of 60 started");
    server.assert_serves();
}

/// Small numbers more often than not.
fn half(random: &mut Random) -> u16 {
    let bound = [8, 128, 1 << 16][usize::try_from(random.below(3)).unwrap()];
    u16::try_from(random.below(bound)).unwrap()
}
