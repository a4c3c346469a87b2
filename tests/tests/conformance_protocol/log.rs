//! The dirty log (line 33).

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use stratablk_tests::dirty_log::DirtyLog;
use stratablk_tests::frontend::{Answer, VringAddresses};
use stratablk_tests::guest::Guest;
use stratablk_tests::launch::Server;
use stratablk_tests::memory::{Buffer, GuestMemory, PAGE, RegionInfo, memfd};
use stratablk_tests::request::feature::VHOST_LOG_ALL;
use stratablk_tests::request::{S_OK, T_GET_ID, T_IN, T_OUT};
use stratablk_tests::wire::code;

use crate::run_read;

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

/// Lines 32 and 33: memory that comes and goes while the log is on is marked like any other, and what was marked stays.
#[test]
fn c33_regions_that_come_and_go_are_logged() {
    let server = Server::start();
    let mut guest = server.guest();
    run_read(&mut guest, 0);
    let added = GuestMemory::new(&[RegionInfo {
        gpa: 1 << 32,
        bytes: 4 * PAGE,
        uva: 1 << 46,
        mmap_offset: 0,
    }]);
    let region = &added.regions()[0];
    let log = DirtyLog::covering(added.end());
    start_logging(&guest, &log);
    let used_ring = guest.rings[0].addresses.used / PAGE;
    for round in 0..3 {
        assert_eq!(guest.front_end.add_region(region), Answer::Accepted);
        let into = added.writable(512);
        log.take();
        assert_eq!(guest.request(T_IN, 6, Some(into)), S_OK);
        assert_eq!(
            guest.front_end.remove_region(&region.info),
            Answer::Accepted
        );
        let marked: BTreeSet<u64> = log.take().into_iter().collect();
        assert!(
            marked.is_superset(&pages_of(&[into])) && marked.contains(&used_ring),
            "round {round}: {marked:?}"
        );
        // What is left goes on, with its log.
        let buffers = guest.read_of(1);
        guest.run(&buffers);
        let marked: BTreeSet<u64> = log.take().into_iter().collect();
        assert!(
            marked.is_superset(&pages_of(&buffers[1..])),
            "round {round}: {marked:?}"
        );
        assert!(
            marked.iter().all(|page| page * PAGE < 1 << 32),
            "round {round}: {marked:?}"
        );
    }
    assert!(log.is_clean_outside());
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
    let buffers = guest.read_of(1);
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
                let buffers = guest.read_of(1);
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
            let buffers = guest.read_of(1);
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
    server.assert_fds_closed(baseline);
}
