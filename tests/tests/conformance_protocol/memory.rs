//! Guest memory: tables of regions, and regions one by one (line 32).

use std::os::fd::AsFd;

use stratablk_tests::frontend::{Answer, memory_table, single_region};
use stratablk_tests::guest::{GuestOptions, USUAL_FEATURES};
use stratablk_tests::launch::Server;
use stratablk_tests::memory::{PAGE, POISON, Region, RegionInfo, memfd};
use stratablk_tests::pattern;
use stratablk_tests::request::{S_OK, T_IN};
use stratablk_tests::wait::until;
use stratablk_tests::wire::code;

use crate::{greeted, run_read, spare_region};

/// Line 32: at least 32 regions can be added one by one, serve requests, and be removed. Each keeps one descriptor, for who
/// takes over, and gives it up when it is removed.
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
    let kept = fds + regions.len();
    let closed = until(|| server.process.open_fds() <= kept);
    assert!(closed, "more than a descriptor a region stays open");
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
    let closed = until(|| server.process.open_fds() <= fds);
    assert!(closed, "descriptors of removed regions stay open");
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
    server.assert_fds_closed(baseline);
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
    server.assert_nothing_kept(baseline);
}
