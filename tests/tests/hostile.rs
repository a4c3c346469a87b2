//! What was done to other back-ends by images and by crowds of front-ends, and must not be done to this one. Hostile rings
//! and messages are in the conformance tests, random ones in `fuzz/`.

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use stratablk_tests::disk::Disk;
use stratablk_tests::host::Host;
use stratablk_tests::pattern;
use stratablk_tests::process::Holdings;
use stratablk_tests::wait::{PATIENCE, until};

/// Connections that say nothing.
const CROWD: usize = 1000;
/// What those front-ends may take that are served at a time, eight of them: a few descriptors each, a thread and a worker, and
/// memory.
const SLACK: Holdings = Holdings {
    fds: 64,
    threads: 10,
    resident_kib: 4096,
    guest_mappings: 0,
};
/// Front-ends that are served at a time.
const PLACES: usize = 8;
/// Front-ends that never read: two of them for each place.
const SLOW: usize = 16;

/// The header of a qcow2 image that names another file as its backing file.
#[expect(clippy::big_endian_bytes, reason = "as qcow2 is")]
fn qcow2_over(backing: &str) -> Vec<u8> {
    let mut header = vec![0; 512];
    let name = u32::try_from(backing.len()).expect("a short name");
    header[..4].copy_from_slice(b"QFI\xfb");
    header[4..8].copy_from_slice(&2u32.to_be_bytes());
    header[8..16].copy_from_slice(&128u64.to_be_bytes());
    header[16..20].copy_from_slice(&name.to_be_bytes());
    header[20..24].copy_from_slice(&16u32.to_be_bytes());
    header[24..32].copy_from_slice(&(1u64 << 20).to_be_bytes());
    header[128..128 + backing.len()].copy_from_slice(backing.as_bytes());
    header
}

/// GHSA-jmr4-g2hv-mjj6, CVE-2008-2004 and their like: a guest that writes the header of a format to its disk, with a file of
/// the host as the backing file, reads those bytes back and no others, also after a restart and as a new base.
#[test]
fn a_disk_that_claims_to_have_a_format_is_raw() {
    let mut host = Host::new();
    host.noise("secret", 1 << 20);
    let header = qcow2_over(host.path("secret").to_str().expect("a plain name"));
    let image: Vec<u8> = [header.clone(), pattern::base(1, 2047)].concat();
    fs::write(host.path("image"), &image).expect("an image");
    host.watch(host.path("image"));
    host.line("volume create as-base --base @/image").ok();
    host.line("volume create written --size 1M").ok();
    for round in 0..2 {
        for volume in ["as-base", "written"] {
            if round == 0 {
                host.attach(volume, 1);
            }
            let mut disk = Disk::connect(&host.path(&format!("{volume}.sock")));
            if round == 0 && volume == "written" {
                disk.write(0, &image[..4096]);
                disk.flush();
            }
            pattern::assert_same(&disk.read(0, 8), &image[..4096], volume);
            let expected = if volume == "written" {
                vec![0; 512]
            } else {
                pattern::base(1000, 1)
            };
            pattern::assert_same(&disk.read(1000, 1), &expected, volume);
        }
        if round == 0 {
            host.stop();
            host.serve();
        }
    }
    host.finish();
}

/// Connects without waiting; `None` if the queue of the socket is full.
fn knock(address: &SocketAddrUnix) -> Option<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let socket = socket.expect("a socket");
    rustix::net::connect(&socket, address).ok().map(|()| socket)
}

/// What the daemon has of the host.
fn holdings(host: &Host) -> Holdings {
    Holdings::of(host.daemon.as_ref().expect("it runs").pid())
}

/// Checks that the daemon has little more than it had.
#[track_caller]
fn assert_little_more(host: &Host, before: Holdings) {
    let now = holdings(host);
    assert!(now.fit_in(&(before + SLACK)), "{before:?} became {now:?}");
}

/// Checks that what front-ends took is given back, once they are gone.
#[track_caller]
fn assert_given_back(host: &Host, before: Holdings) {
    let most = Holdings {
        resident_kib: before.resident_kib + SLACK.resident_kib,
        ..before
    };
    let good = until(|| holdings(host).fit_in(&most));
    assert!(good, "{before:?} became {:?}", holdings(host));
}

/// A thousand front-ends that connect and say nothing cost the daemon nothing: other volumes and the control socket answer,
/// memory and descriptors stay as they were, and once they are gone their own volume is served.
#[test]
fn a_crowd_that_says_nothing_holds_up_nobody_else() {
    let mut host = Host::new();
    host.noise("base", 1 << 20);
    host.line("volume create crowded --base @/base").ok();
    host.line("volume create quiet --size 1M").ok();
    host.attach("crowded", 1);
    let quiet = host.attach("quiet", 1);
    let mut disk = Disk::connect(&quiet.socket);
    disk.write(0, &pattern::base(0, 8));
    let before = holdings(&host);
    let address = SocketAddrUnix::new(host.path("crowded.sock")).expect("a short path");
    let mut crowd = Vec::new();
    let mut refused = 0;
    for knocks in 0..CROWD {
        match knock(&address) {
            Some(socket) => crowd.push(socket),
            None => refused += 1,
        }
        if knocks % 100 == 0 {
            disk.write(8, &pattern::stamped(1, 8, 8));
            pattern::assert_same(&disk.read(0, 8), &pattern::base(0, 8), "the other volume");
        }
    }
    assert_eq!(crowd.len() + refused, CROWD);
    let asked = Instant::now();
    host.line("volume list").ok();
    assert!(asked.elapsed() < PATIENCE, "the control socket answers");
    assert_little_more(&host, before);
    drop(crowd);
    drop(disk);
    let mut disk = Disk::connect(&host.path("crowded.sock"));
    assert_eq!(disk.read(0, 1).len(), 512);
    drop(disk);
    assert_given_back(&host, before);
    host.finish();
}

/// Front-ends that ask without end and never read an answer: each is let wait, and sent away for another one; the other volume
/// and the control socket notice nothing, and none of it is left when they are gone.
#[test]
fn front_ends_that_never_read_their_answers_hold_up_nobody_else() {
    let mut host = Host::new();
    host.noise("base", 1 << 20);
    host.line("volume create asked --base @/base").ok();
    host.line("volume create quiet --size 1M").ok();
    host.attach("asked", 1);
    let quiet = host.attach("quiet", 1);
    let mut disk = Disk::connect(&quiet.socket);
    disk.write(0, &pattern::base(0, 8));
    let before = holdings(&host);
    // GET_FEATURES, as the protocol numbers it: 12 bytes in, 20 out.
    let question: Vec<u8> = [1, 1, 0].into_iter().flat_map(u32::to_le_bytes).collect();
    let mut crowd = Vec::new();
    for round in 0..SLOW {
        let mut stream =
            UnixStream::connect(host.path("asked.sock")).expect("a place in the queue");
        stream.set_nonblocking(true).expect("a socket");
        // Until neither the daemon's answers nor our questions find room any more.
        let full = |stream: &mut UnixStream| {
            let written = stream.write(&question);
            written.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
        };
        assert!(
            until(|| full(&mut stream) || round >= PLACES),
            "the daemon reads without end"
        );
        crowd.push(stream);
        disk.write(8, &pattern::stamped(1, 8, 8));
        pattern::assert_same(&disk.read(0, 8), &pattern::base(0, 8), "the other volume");
    }
    host.line("volume list").ok();
    assert_little_more(&host, before);
    drop(crowd);
    drop(disk);
    let mut disk = Disk::connect(&host.path("asked.sock"));
    assert_eq!(disk.read(0, 1).len(), 512);
    drop(disk);
    assert_given_back(&host, before);
    host.finish();
}
