//! Descriptors are what a session has most of, and what a host may have few of.

use std::process::Command;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};
use stratablk_tests::daemon::{Daemon, stratablk};

use super::*;

/// How many descriptors the daemon has open.
fn open(host: &Host) -> u64 {
    let pid = host.daemon.as_ref().unwrap().pid();
    let found = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    u64::try_from(found.count()).unwrap()
}

/// Lets the daemon have so many descriptors. Returns how many it might have.
fn limit(host: &Host, current: u64) -> u64 {
    let pid = i32::try_from(host.daemon.as_ref().unwrap().pid()).unwrap();
    let all = getrlimit(Resource::Nofile);
    let new = Rlimit {
        current: Some(current),
        ..all
    };
    let old = prlimit(Pid::from_raw(pid), Resource::Nofile, new).unwrap();
    old.current.unwrap()
}

/// Lets this process have as many as it may.
fn many_here() {
    let all = getrlimit(Resource::Nofile);
    let new = Rlimit {
        current: all.maximum,
        ..all
    };
    setrlimit(Resource::Nofile, new).unwrap();
}

/// A guest whose memory is of so many files more.
fn guest(socket: &std::path::Path, files: u64) -> (Disk, Vec<Region>) {
    let disk = Disk::connect(socket);
    let more = more_regions(&disk, files, Region::new);
    (disk, more)
}

/// Adds regions to a guest's memory.
fn more_regions(disk: &Disk, count: u64, make: impl Fn(RegionInfo) -> Region) -> Vec<Region> {
    let end = disk.guest.memory.end().next_multiple_of(1 << 21);
    let made = (0..count).map(|region| {
        make(RegionInfo {
            gpa: end + region * (1 << 21),
            bytes: 1 << 16,
            uva: 0x1000_0000_0000 + region * (1 << 21),
            mmap_offset: region * (1 << 16),
        })
    });
    let made: Vec<Region> = made.collect();
    for region in &made {
        assert!(!disk.guest.front_end.add_region(region).is_no());
    }
    made
}

/// Ends a test: the daemon has about as many descriptors as `before`, and still lets go of these regions.
fn finish_with(before: u64, host: Host, disk: Disk, more: &[Region]) {
    let now = open(&host);
    assert!(now < before + 8, "{before} descriptors became {now}");
    for region in more {
        assert!(!disk.guest.front_end.remove_region(&region.info).is_no());
    }
    drop(disk);
    host.finish();
}

/// Fewer than its sessions have, so that nothing of them can be copied, and more than it takes to move them.
const FEW: u64 = 48;
/// Files of a guest's memory.
const FILES: u64 = 60;

#[test]
fn a_table_that_is_nearly_full_is_enough_for_both_ways() {
    many_here();
    let (mut host, socket) = host();
    let (mut disk, more) = guest(&socket, FILES);
    let before = open(&host);
    for round in 0..TAKEOVERS {
        disk.write(round, &stamped(6, round, 1));
        limit(&host, open(&host) + FEW);
        // Forth.
        host.succeed();
        assert_eq!(disk.read(round, 1), stamped(6, round, 1));
        // And back.
        limit(&host, open(&host) + FEW);
        let failed = host.try_succeed_with(&["--cache-size", "8T"]);
        assert!(failed.is_err());
        assert_eq!(disk.read(round, 1), stamped(6, round, 1));
    }
    finish_with(before, host, disk, &more);
}

#[test]
fn a_table_that_is_full_is_told_before_anything_changes() {
    many_here();
    let (mut host, socket) = host();
    let (mut disk, _more) = guest(&socket, 8);
    let way_back = stamped(6, 1, 1);
    disk.write(0, &way_back);
    let all = limit(&host, open(&host) + 4);
    let refused = host.try_succeed().unwrap_err();
    assert!(refused.contains("descriptors left"), "{refused}");
    assert_eq!(disk.read(0, 1), way_back);
    limit(&host, all);
    host.succeed();
    assert_eq!(disk.read(0, 1), way_back);
    drop(disk);
    host.finish();
}

/// What the new process lacks costs no front-end its disk, however many others it could serve: the daemon that runs has it.
#[test]
fn a_new_process_that_cannot_serve_all_serves_none() {
    many_here();
    let (mut host, socket) = host();
    host.line("volume create other --size 1M").ok();
    host.attach("other", 1);
    let (mut disk, _more) = guest(&socket, FILES);
    let mut other = Disk::connect(&host.path("other.sock"));
    disk.write(0, &stamped(6, 0, 1));
    other.write(0, &stamped(6, 1, 1));
    let store = host.store();
    let next = stratablk(["serve", "--takeover", "--store", store.to_str().unwrap()]);
    let mut few = Command::new("sh");
    few.args(["-c", "ulimit -n 1024; exec \"$0\" \"$@\""])
        .arg(next.get_program())
        .args(next.get_args());
    let refused = Daemon::spawn(&mut few, &store.join("control.sock"));
    let refused = refused.unwrap_err().stderr;
    assert!(refused.contains("volume disk"), "{refused}");
    assert!(refused.contains("memory of more than"), "{refused}");
    for _ in 0..2 {
        assert_eq!(disk.read(0, 1), stamped(6, 0, 1));
        assert_eq!(other.read(0, 1), stamped(6, 1, 1));
        assert!(disk.guest.front_end.is_quiet());
        host.succeed();
    }
    drop((disk, other));
    host.finish();
}

#[test]
fn regions_of_one_file_keep_one_descriptor() {
    let (mut host, socket) = host();
    let mut disk = Disk::connect(&socket);
    let file = stratablk_tests::memory::memfd(40 << 16);
    let before = open(&host);
    let more = more_regions(&disk, 40, |info| Region::of_file(info, &file));
    assert_eq!(open(&host), before + 1);
    for round in 0..TAKEOVERS {
        disk.write(round, &stamped(7, round, 1));
        host.succeed();
        assert_eq!(disk.read(round, 1), stamped(7, round, 1));
    }
    finish_with(before, host, disk, &more);
}
