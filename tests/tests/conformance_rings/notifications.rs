//! Notifications, completions, and what is offered (lines 18 to 22).

use std::sync::Arc;

use stratablk_tests::guest::{Guest, GuestOptions, USUAL_FEATURES};
use stratablk_tests::launch::Server;
use stratablk_tests::memory::{Buffer, POISON};
use stratablk_tests::pattern;
use stratablk_tests::request::feature::{
    BLK_BARRIER, BLK_GEOMETRY, BLK_LIFETIME, BLK_SCSI, BLK_SECURE_ERASE, BLK_SIZE_MAX, BLK_ZONED,
    IN_ORDER, NOTIFICATION_DATA, NOTIFY_ON_EMPTY, RING_EVENT_IDX, RING_PACKED, RING_RESET, SR_IOV,
    VERSION_1,
};
use stratablk_tests::request::{S_OK, T_IN, header};
use stratablk_tests::ring::NO_INTERRUPT;
use stratablk_tests::wait::{PATIENCE, QUIET, readable, take_signals};
use stratablk_tests::wire::code;

/// A session without EVENT_IDX.
fn without_event_idx(server: &Server) -> Guest {
    let features = USUAL_FEATURES & !RING_EVENT_IDX;
    server.guest_with(GuestOptions {
        features,
        ..GuestOptions::default()
    })
}

/// Runs a request and takes its notification, so that a notification of the ring's start is out of the way: devices may
/// send one.
#[track_caller]
fn settle(guest: &mut Guest) {
    let buffers = guest.read_of(0);
    guest.run(&buffers);
    // A used entry can be seen before its notification comes.
    while readable([guest.rings[0].call_fd()], QUIET) == [true] {
        take_signals(guest.rings[0].call_fd());
    }
}

/// Line 18: `used_event` decides when the guest is told, also within a batch: not before it is passed, and then surely.
#[test]
fn c18_used_event_is_honoured_in_a_batch() {
    let server = Server::start();
    let mut guest = server.guest();
    assert_ne!(guest.features & RING_EVENT_IDX, 0, "EVENT_IDX is offered");
    settle(&mut guest);
    let chains: Vec<_> = (0..8).map(|sector| guest.read_of(sector)).collect();
    let ring = &mut guest.rings[0];
    // Only the eighth used entry from here passes this index.
    ring.set_used_event(ring.used_index().wrapping_add(7));
    for chain in &chains[..7] {
        ring.submit(chain);
    }
    assert!(
        stratablk_tests::wait::until(|| ring.pending() == 7),
        "seven are done"
    );
    assert_eq!(readable([ring.call_fd()], QUIET), [false], "told too early");
    ring.submit(&chains[7]);
    assert_eq!(
        readable([ring.call_fd()], PATIENCE),
        [true],
        "not told of the eighth"
    );
    for _ in 0..8 {
        assert!(ring.take().is_some());
    }
    for (sector, chain) in chains.iter().enumerate() {
        guest.assert_read(chain, u64::try_from(sector).expect("small"));
    }
}

/// Line 18: a batch whose used entries step over `used_event` is told of, wherever in the batch that lies.
#[test]
fn c18_a_batch_that_crosses_used_event_notifies() {
    let server = Server::start();
    for event in [0, 1, 7, 14, 15] {
        let mut guest = server.guest();
        settle(&mut guest);
        let chains: Vec<_> = (0..16).map(|sector| guest.read_of(sector)).collect();
        let ring = &mut guest.rings[0];
        ring.set_used_event(ring.used_index().wrapping_add(event));
        for chain in &chains {
            let head = ring.chain(chain);
            ring.stage(head);
        }
        ring.expose();
        ring.kick();
        assert_eq!(
            readable([ring.call_fd()], PATIENCE),
            [true],
            "event {event}"
        );
        assert!(
            ring.pending() > event,
            "told of {} with event {event}",
            ring.pending()
        );
    }
}

/// Line 18: indices run through 65,535 to 0 without a lost or a doubled request, with and without EVENT_IDX.
#[test]
fn c18_indices_wrap_at_16_bits() {
    let server = Server::start();
    for features in [USUAL_FEATURES, USUAL_FEATURES & !RING_EVENT_IDX] {
        for base in [65_400, 65_535] {
            let options = GuestOptions {
                features,
                base,
                ring_size: 64,
                ..GuestOptions::default()
            };
            let mut guest = server.guest_with(options);
            let chains: Vec<_> = (0..8).map(|_| guest.read_of(0)).collect();
            let mut done = 0_u64;
            while done < 240 {
                let ring = &mut guest.rings[0];
                let from = ring.available_index();
                for (index, chain) in chains.iter().enumerate() {
                    let sector = done + u64::try_from(index).expect("small");
                    guest.memory.write(chain[0].gpa, &header(T_IN, sector));
                    let head = ring.chain(chain);
                    ring.stage(head);
                }
                ring.expose();
                if done == 0 {
                    // A ring starts with a kick, whatever its memory says.
                    ring.kick();
                } else {
                    ring.kick_if_wanted(from);
                }
                for _ in &chains {
                    ring.wait();
                }
                for (index, chain) in chains.iter().enumerate() {
                    guest.assert_read(chain, done + u64::try_from(index).expect("small"));
                }
                done += 8;
            }
            assert_eq!(guest.rings[0].pending(), 0);
        }
    }
}

/// Line 18: a driver that kicks only when it is asked to is never forgotten, and one that waits only for notifications is
/// always told, whatever the device's polling does.
#[test]
fn c18_no_notification_is_lost() {
    let server = Server::start();
    for features in [USUAL_FEATURES, USUAL_FEATURES & !RING_EVENT_IDX] {
        let mut guest = server.guest_with(GuestOptions {
            features,
            ..GuestOptions::default()
        });
        let buffers = guest.read_of(4);
        for round in 0..1500_u32 {
            let ring = &mut guest.rings[0];
            let from = ring.available_index();
            let head = ring.chain(&buffers);
            ring.publish(head);
            ring.kick_if_wanted(from);
            ring.wait();
            // Pauses of all lengths, so that requests meet a device that polls, falls asleep, or sleeps.
            for _ in 0..(round * 7919) % 30_000 {
                std::hint::spin_loop();
            }
        }
        guest.assert_read(&buffers, 4);
    }
}

/// Line 18: without EVENT_IDX the guest's NO_INTERRUPT flag is obeyed.
#[test]
fn c18_no_interrupt_is_obeyed_without_event_idx() {
    let server = Server::start();
    let mut guest = without_event_idx(&server);
    settle(&mut guest);
    guest.rings[0].set_flags(NO_INTERRUPT);
    for sector in 0..50 {
        let buffers = guest.read_of(sector);
        guest.rings[0].submit(&buffers);
        guest.rings[0].spin();
        guest.assert_read(&buffers, sector);
    }
    assert_eq!(
        readable([guest.rings[0].call_fd()], QUIET),
        [false],
        "told against its wish"
    );
    guest.rings[0].set_flags(0);
    let buffers = guest.read_of(7);
    guest.run(&buffers);
    guest.assert_read(&buffers, 7);
}

/// Line 18: without EVENT_IDX the place of `used_event` means nothing.
#[test]
fn c18_used_event_is_ignored_without_event_idx() {
    let server = Server::start();
    let mut guest = without_event_idx(&server);
    for sector in 0..20 {
        guest.rings[0].set_used_event(30_000);
        let buffers = guest.read_of(sector);
        guest.run(&buffers);
        guest.assert_read(&buffers, sector);
    }
}

/// Line 18: with EVENT_IDX the NO_INTERRUPT flag means nothing.
#[test]
fn c18_no_interrupt_is_ignored_with_event_idx() {
    let server = Server::start();
    let mut guest = server.guest();
    guest.rings[0].set_flags(NO_INTERRUPT);
    let buffers = guest.read_of(2);
    guest.run(&buffers);
    guest.assert_read(&buffers, 2);
}

/// Line 19: requests may complete in any order, each exactly once; IN_ORDER is not promised.
#[test]
fn c19_in_order_is_not_offered_and_each_completes_once() {
    let server = Server::start();
    let mut guest = server.guest();
    assert_eq!(
        guest.front_end.features() & IN_ORDER,
        0,
        "IN_ORDER is not offered"
    );
    for round in 0..20 {
        let chains: Vec<_> = (0..32)
            .map(|sector| guest.read_of(round * 32 + sector))
            .collect();
        let ring = &mut guest.rings[0];
        let mut heads: Vec<u32> = chains
            .iter()
            .map(|chain| u32::from(ring.chain(chain)))
            .collect();
        for &head in &heads {
            ring.stage(u16::try_from(head).expect("a head"));
        }
        ring.expose();
        ring.kick();
        let mut seen: Vec<u32> = chains.iter().map(|_| ring.wait().head).collect();
        seen.sort_unstable();
        heads.sort_unstable();
        assert_eq!(seen, heads, "each head once");
        for (index, chain) in chains.iter().enumerate() {
            guest.assert_read(chain, round * 32 + u64::try_from(index).expect("small"));
        }
        // The memory of a round is not used again: 20 rounds fit.
    }
}

/// Line 20: packed rings are not offered.
#[test]
fn c20_packed_is_not_offered() {
    let server = Server::start();
    assert_eq!(server.guest().front_end.features() & RING_PACKED, 0);
}

/// Line 21: the reset of single rings is not offered.
#[test]
fn c21_ring_reset_is_not_offered() {
    let server = Server::start();
    assert_eq!(server.guest().front_end.features() & RING_RESET, 0);
}

/// Line 22: nothing is offered that does not work.
#[test]
fn c22_only_what_works_is_offered() {
    let server = Server::start();
    let offered = server.guest().front_end.features();
    let never = NOTIFY_ON_EMPTY
        | BLK_BARRIER
        | BLK_SCSI
        | BLK_GEOMETRY
        | BLK_SIZE_MAX
        | BLK_LIFETIME
        | BLK_SECURE_ERASE
        | BLK_ZONED
        | NOTIFICATION_DATA
        | SR_IOV;
    assert_eq!(offered & never, 0, "{offered:#x}");
    assert_ne!(offered & VERSION_1, 0, "{offered:#x}");
}

/// Line 22: features that were not offered cannot be taken.
#[test]
fn c22_features_not_offered_are_refused() {
    let mut server = Server::start();
    for bit in [RING_PACKED, IN_ORDER, BLK_SECURE_ERASE, 1 << 63] {
        let mut front_end = stratablk_tests::frontend::FrontEnd::connect(&server.socket());
        front_end.negotiate_protocol(stratablk_tests::guest::USUAL_PROTOCOL);
        let features = front_end.features() | bit;
        let answer = front_end.attempt(code::SET_FEATURES, &features.to_le_bytes(), &[]);
        assert!(answer.is_no(), "feature {bit:#x}: {answer:?}");
        drop(front_end);
        server.assert_serves();
    }
}

/// Several rings work at once, each with its own heads and events.
#[test]
fn c19_rings_work_side_by_side() {
    let server = Server::start();
    let guest = server.guest_with(GuestOptions {
        queues: 2,
        ..GuestOptions::default()
    });
    let Guest {
        front_end,
        memory,
        rings,
        ..
    } = guest;
    std::thread::scope(|scope| {
        for mut ring in rings {
            let memory = Arc::clone(&memory);
            let first = u64::from(ring.index) * 512;
            let chains: Vec<[Buffer; 3]> = (0..16)
                .map(|_| {
                    [
                        memory.readable(&[0; 16]),
                        memory.writable(512),
                        memory.writable(1),
                    ]
                })
                .collect();
            scope.spawn(move || {
                for round in 0..30 {
                    for (index, chain) in chains.iter().enumerate() {
                        let sector = first + round * 16 + u64::try_from(index).expect("small");
                        memory.write(chain[0].gpa, &header(T_IN, sector));
                        memory.write(chain[2].gpa, &[POISON]);
                        ring.submit(chain);
                    }
                    for _ in &chains {
                        ring.wait();
                    }
                    for (index, chain) in chains.iter().enumerate() {
                        let sector = first + round * 16 + u64::try_from(index).expect("small");
                        assert_eq!(memory.bytes(chain[2]), [S_OK]);
                        pattern::assert_same(
                            &memory.bytes(chain[1]),
                            &pattern::base(sector, 1),
                            "a read",
                        );
                    }
                }
            });
        }
    });
    drop(front_end);
}
