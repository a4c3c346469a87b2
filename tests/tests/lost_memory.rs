//! A front-end that takes its memory away while it is served: it gets errors and loses its rings; other front-ends notice
//! nothing, and it may come again with memory that stays.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use stratablk_tests::daemon::{Daemon, temp_dir};
use stratablk_tests::dirty_log::DirtyLog;
use stratablk_tests::disk::Disk;
use stratablk_tests::frontend::VringAddresses;
use stratablk_tests::guest::{Guest, GuestOptions, Verdict};
use stratablk_tests::launch::Server;
use stratablk_tests::load::driver::{Driver, Options, Request, Wait};
use stratablk_tests::load::ledger::Ledger;
use stratablk_tests::load::run::{Limits, run, sweep};
use stratablk_tests::load::workload::{Mix, Pattern, Steps, Workload};
use stratablk_tests::memory::{Buffer, POISON};
use stratablk_tests::pattern;
use stratablk_tests::process::Holdings;
use stratablk_tests::request::feature::VHOST_LOG_ALL;
use stratablk_tests::request::{
    HEADER_BYTES, S_IOERR, S_OK, T_DISCARD, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES, header, segment,
};
use stratablk_tests::ring::indirect;
use stratablk_tests::wait::{PATIENCE, readable, until};

/// What the daemon may have more of when all is over: frames of its cache that were never touched before, all 16 MiB of it.
const SLACK: Holdings = Holdings {
    fds: 0,
    threads: 0,
    resident_kib: 20 << 10,
    guest_mappings: 0,
};

/// A guest whose rings lie in its first region, and a buffer in its second.
#[track_caller]
fn guest_and_buffer(server: &Server, queues: u32, len: u32, writable: bool) -> (Guest, Buffer) {
    let guest = server.guest_with(GuestOptions {
        queues,
        ..GuestOptions::default()
    });
    let gpa = guest.memory.regions()[1].info.gpa;
    (guest, Buffer { gpa, len, writable })
}

/// Takes the second region away.
fn lose(guest: &Guest) {
    guest.memory.regions()[1].shrink();
}

/// Waits until the device declares a ring broken.
#[track_caller]
fn assert_breaks(guest: &Guest, ring: usize) {
    let fds = [guest.rings[ring].error_fd()];
    assert_eq!(readable(fds, PATIENCE), [true], "ring {ring} breaks");
}

/// Submits a chain whose memory is gone, which must not succeed.
#[track_caller]
fn assert_fails(guest: &mut Guest, chain: &[Buffer], what: &str) {
    let status = chain[chain.len() - 1];
    guest.rings[0].submit(chain);
    let verdict = guest.verdict();
    assert!(
        matches!(verdict, Verdict::Returned(_) | Verdict::RingBroken),
        "{what}: {verdict:?}"
    );
    let byte = guest.last_byte(status);
    assert!(
        [S_IOERR, POISON].contains(&byte),
        "{what}: status {byte}, {verdict:?}"
    );
}

/// Reads of sectors that no layer holds are made by the device's own stores, whatever lies below.
#[test]
fn a_read_into_lost_memory_fails_and_all_rings_break() {
    let mut server = Server::start();
    let (mut guest, data) = guest_and_buffer(&server, 2, 4096, true);
    let zeroes = guest.memory.readable(&segment(0, 8, 0));
    assert_eq!(guest.request(T_WRITE_ZEROES, 0, Some(zeroes)), S_OK);
    lose(&guest);
    let status = guest.status();
    let chain = [guest.header(T_IN, 0), data, status];
    assert_fails(&mut guest, &chain, "a read");
    assert_breaks(&guest, 0);
    // The other ring may have another worker, which finds out when it has something to do.
    let good = guest.memory.writable(512);
    let status = guest.status();
    let chain = [guest.header(T_IN, 16), good, status];
    guest.rings[1].submit(&chain);
    assert_breaks(&guest, 1);
    assert_eq!(guest.last_byte(status), POISON, "not carried out");
    // Nor does a ring run again before its memory is replaced.
    guest.front_end.stop_vring(0);
    guest.rings[0].restart(0);
    guest.rings[0].replace_events();
    guest.start_ring(0);
    let status = guest.status();
    let chain = [guest.header(T_FLUSH, 0), status];
    guest.rings[0].submit(&chain);
    assert_breaks(&guest, 0);
    drop(guest);
    server.assert_serves();
}

#[test]
fn a_write_from_lost_memory_fails_and_touches_its_own_sectors_only() {
    let mut server = Server::start();
    let (mut guest, data) = guest_and_buffer(&server, 1, 4096, false);
    lose(&guest);
    let status = guest.status();
    let chain = [guest.header(T_OUT, 16), data, status];
    assert_fails(&mut guest, &chain, "a write");
    drop(guest);
    server.assert_serves();
    let mut disk = server.disk();
    for sector in [0, 24] {
        pattern::assert_same(
            &disk.read(sector, 16),
            &pattern::base(sector, 16),
            "around a failed write",
        );
    }
    // The same front-end, with memory that stays.
    let new = pattern::stamped(1, 16, 8);
    disk.write(16, &new);
    disk.flush();
    pattern::assert_same(&disk.read(16, 8), &new, "written again");
}

/// Half of a header or of a segment that reads as zeroes would name sector 0.
#[test]
fn a_request_of_which_a_part_is_lost_is_not_carried_out() {
    let mut server = Server::start();
    let cases = ["a write", "a read", "a discard", "an indirect table"];
    for (case, what) in cases.into_iter().enumerate() {
        let (mut guest, gone) = guest_and_buffer(&server, 1, 8, false);
        let new = guest.memory.readable(&pattern::stamped(9, 16, 8));
        let into = guest.memory.writable(4096);
        let status = guest.status();
        let half = |guest: &Guest, bytes: [u8; 16]| guest.memory.readable(&bytes[..8]);
        let chain = match case {
            0 => vec![half(&guest, header(T_OUT, 16)), gone, new, status],
            1 => vec![half(&guest, header(T_IN, 16)), gone, into, status],
            2 => vec![
                guest.header(T_DISCARD, 0),
                // The sector is gone, the count and the flags are there.
                gone,
                guest.memory.readable(&segment(16, 8, 0)[8..]),
                status,
            ],
            _ => vec![guest.header(T_OUT, 16), new, status],
        };
        if case == 3 {
            let table = indirect(&guest.memory, &chain);
            guest
                .memory
                .write(gone.gpa, &guest.memory.read(table.addr, 48));
            let moved = stratablk_tests::ring::Descriptor::table(gone.gpa, 48);
            lose(&guest);
            let head = guest.rings[0].link(&[moved]);
            guest.rings[0].publish(head);
            guest.rings[0].kick();
            guest.verdict();
        } else {
            lose(&guest);
            assert_fails(&mut guest, &chain, what);
        }
        assert_breaks(&guest, 0);
        if case == 1 {
            assert!(guest.memory.bytes(into).iter().all(|&byte| byte == POISON));
        }
        drop(guest);
        server.assert_serves();
        pattern::assert_same(&server.disk().read(0, 64), &pattern::base(0, 64), what);
    }
}

#[test]
fn a_ring_in_lost_memory_breaks() {
    let mut server = Server::start();
    for used_before in [false, true] {
        let (mut guest, _) = guest_and_buffer(&server, 2, HEADER_BYTES, false);
        if used_before {
            let into = guest.memory.writable(512);
            assert_eq!(guest.request(T_IN, 0, Some(into)), S_OK);
        }
        // Rings and all; we must not look at them any more either.
        guest.memory.regions()[0].shrink();
        for ring in 0..2 {
            guest.rings[ring].kick();
            assert_breaks(&guest, ring);
        }
        // It can still be talked to.
        for ring in 0..2 {
            guest.front_end.stop_vring(ring);
        }
        drop(guest);
        server.assert_serves();
    }
}

/// Marks that nobody can read any more would let a migration miss pages.
#[test]
fn a_dirty_log_in_lost_memory_breaks_the_rings() {
    let mut server = Server::start();
    let (mut guest, _) = guest_and_buffer(&server, 1, HEADER_BYTES, false);
    let log = DirtyLog::covering(guest.memory.end());
    let reply = guest
        .front_end
        .set_log_base(log.bytes, log.offset, log.as_fd());
    assert!(reply.is_some(), "SET_LOG_BASE is answered");
    guest.front_end.set_features(guest.features | VHOST_LOG_ALL);
    guest.front_end.set_vring_addr(&VringAddresses {
        flags: 1,
        log: guest.rings[0].addresses.used,
        ..guest.vring_addresses(0)
    });
    let into = guest.memory.writable(512);
    assert_eq!(guest.request(T_IN, 0, Some(into)), S_OK);
    assert!(!log.take().is_empty(), "pages are marked");
    log.shrink();
    let chain = [guest.header(T_IN, 0), into, guest.status()];
    guest.rings[0].submit(&chain);
    assert_breaks(&guest, 0);
    drop(guest);
    server.assert_serves();
}

#[test]
fn another_front_end_goes_on_meanwhile() {
    const BYTES: u64 = 16 << 20;
    const BLOCK: u64 = 4096;
    const SEED: u64 = 5;
    let dir = temp_dir();
    let daemon = Daemon::on_store(&dir.path().join("store"));
    let socket = |name: &str| dir.path().join(format!("{name}.sock"));
    for name in ["good", "bad"] {
        daemon
            .line(&format!("volume create {name} --size 16M"))
            .ok();
        let place = socket(name);
        daemon
            .line(&format!(
                "volume attach {name} --queues 2 --socket {}",
                place.display()
            ))
            .ok();
    }
    let mut driver = Driver::connect(Options {
        queues: 2,
        wait: Wait::Sleep,
        ..Options::new(&socket("good"))
    })
    .expect("a session");
    // What a first session leaves is not counted.
    drop(Disk::connect(&socket("bad")));
    let holdings = || Holdings::of(daemon.pid());
    let before = holdings();
    let mut ledger = Ledger::new(0, SEED, 0, BYTES, false).expect("a ledger");
    let done = AtomicBool::new(false);
    let (operations, rounds) = std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let mut operations = 0;
            let mut round = SEED;
            while !done.load(Ordering::Relaxed) {
                round += 1;
                let mix = Mix::Mixed { read_percent: 50 };
                let workload = Workload {
                    pattern: Pattern::Random,
                    mix,
                    block_bytes: BLOCK,
                    start: 0,
                    len: BYTES,
                    seed: round,
                };
                let steps = Steps::new(&workload, BYTES).expect("it fits");
                let limits = Limits {
                    slice: Duration::ZERO,
                    warmup: Duration::ZERO,
                    time: None,
                    count: Some(2000),
                    server_pid: None,
                };
                let result = run(&mut driver, steps, mix, &limits, Some(&mut ledger), round);
                let result = result.unwrap_or_else(|error| panic!("round {round}: {error}"));
                operations += result.reads + result.writes;
            }
            driver.run(0, Request::Flush).expect("a flush");
            let swept = sweep(&mut driver, &mut ledger, 0, BYTES);
            assert_eq!(
                swept.unwrap_or_else(|error| panic!("{error}")),
                BYTES / BLOCK
            );
            operations
        });
        let mut rounds = 0;
        // At least so often, and at least until the load was under way.
        for kind in [T_IN, T_OUT].into_iter().cycle().take(40) {
            let mut guest = Guest::start(&socket("bad"), GuestOptions::default());
            let gpa = guest.memory.regions()[1].info.gpa;
            lose(&guest);
            let data = Buffer {
                gpa,
                len: 65536,
                writable: kind == T_IN,
            };
            let chain = [guest.header(kind, 512), data, guest.status()];
            assert_fails(&mut guest, &chain, "with a neighbour");
            rounds += 1;
        }
        done.store(true, Ordering::Relaxed);
        (load.join().expect("the load is right"), rounds)
    });
    println!("{operations} operations beside {rounds} losses");
    assert!(
        operations >= 2000,
        "the neighbour did {operations} operations"
    );
    // The one who lost its memory is served again as soon as it brings some that stays.
    let mut disk = Disk::connect(&socket("bad"));
    let new = pattern::stamped(1, 512, 8);
    disk.write(512, &new);
    pattern::assert_same(&disk.read(512, 8), &new, "after all that");
    drop(disk);
    let given_back = until(|| holdings().fit_in(&(before + SLACK)));
    assert!(given_back, "{before:?} became {:?}", holdings());
    let (status, _, log) = daemon.stop();
    assert!(status.success(), "{log}");
    assert!(log.contains("took away memory"), "{log}");
}
