//! A guest and its front-end that try to reach another volume's data by the disk that they have.
//!
//! Two volumes of one store, over one base, are served at once. One is full of a stamp of its owner; the other one's
//! guest sends every request that could lead beyond its end, into the words of other layers, or into memory that is not
//! its own. Afterwards nothing that it read holds the other's stamp, and the other volume holds nothing else.
#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::fs;
use std::path::PathBuf;

use stratablk_tests::daemon::{Daemon, temp_dir};
use stratablk_tests::disk::Disk;
use stratablk_tests::guest::Verdict;
use stratablk_tests::load::random::Random;
use stratablk_tests::memory::Buffer;
use stratablk_tests::request::{
    S_OK, T_DISCARD, T_IN, T_OUT, T_WRITE_ZEROES, UNMAP, header, segment,
};
use stratablk_tests::ring::{Descriptor, indirect};
use tempfile::TempDir;

/// Sectors of the hostile guest's volume, and of the base.
const MINE: u64 = 1024;
/// Sectors of the other volume, which is larger: there is something at the addresses behind the end of the first.
const THEIRS: u64 = 4096;
/// What the other volume is full of.
const STAMP: &[u8; 8] = b"THEIRS!!";
/// What the hostile guest writes.
const MARK: &[u8; 8] = b"HOSTILE!";
/// Requests of the random part.
const REQUESTS: u64 = 4_000;

/// A store with two volumes that are served.
struct Rig {
    /// The files.
    dir: TempDir,
    /// The daemon.
    daemon: Daemon,
}

impl Rig {
    /// Sets it up, and fills the other volume, in two layers.
    fn new() -> Self {
        let dir = temp_dir();
        let base = dir.path().join("base.img");
        fs::write(&base, vec![0xba; usize::try_from(MINE).unwrap() * 512]).unwrap();
        let daemon = Daemon::on_store(&dir.path().join("store"));
        let rig = Self { dir, daemon };
        rig.line(&format!("volume create mine --base {}", base.display()));
        rig.line(&format!("volume create theirs --base {}", base.display()));
        rig.line(&format!("volume resize theirs {}", THEIRS * 512));
        for volume in ["mine", "theirs"] {
            let socket = rig.socket(volume);
            rig.line(&format!(
                "volume attach {volume} --socket {}",
                socket.display()
            ));
        }
        let mut theirs = rig.disk("theirs");
        for half in [0, 1] {
            let words = usize::try_from(THEIRS / 2).unwrap() * 64;
            let data = STAMP.repeat(words);
            let first = half * (THEIRS / 2);
            for (part, at) in data.chunks(1 << 20).zip((first..).step_by(2048)) {
                theirs.write(at, part);
            }
            theirs.flush();
            rig.line(&format!("snapshot create s{half} theirs"));
        }
        drop(theirs);
        rig
    }

    /// Where a volume is served.
    fn socket(&self, volume: &str) -> PathBuf {
        self.dir.path().join(format!("{volume}.sock"))
    }

    /// A session with a volume.
    fn disk(&self, volume: &str) -> Disk {
        Disk::connect(&self.socket(volume))
    }

    /// A command that must succeed.
    fn line(&self, line: &str) {
        self.daemon.line(line).ok();
    }

    /// Checks that the other volume is as it was, also after a restart, and the store sound.
    fn finish(mut self) {
        untouched(&mut self.disk("theirs")).unwrap();
        self.line("snapshot create end theirs");
        let store = self.dir.path().join("store");
        let (status, _, log) = self.daemon.stop();
        assert!(status.success(), "{log}");
        assert!(!log.contains("panicked"), "{log}");
        let store_text = store.to_str().unwrap();
        stratablk_tests::daemon::run(["check", "--store", store_text]).ok();
        self.daemon = Daemon::on_store(&store);
        untouched(&mut self.disk("theirs")).unwrap();
    }
}

/// Whether the other volume holds its stamp everywhere and nothing else.
fn untouched(theirs: &mut Disk) -> Result<(), String> {
    for at in (0..THEIRS).step_by(512) {
        let found = theirs.read(at, 512);
        if let Some(place) = found.chunks(8).position(|word| word != STAMP) {
            return Err(format!(
                "word {place} behind sector {at} is not the owner's"
            ));
        }
    }
    Ok(())
}

/// Whether what a hostile guest has read is its own: the base, its marks, zeroes.
fn own(data: &[u8]) -> Result<(), String> {
    match data.chunks(8).find(|word| *word == STAMP) {
        Some(_) => Err("the guest has read what belongs to the other volume".into()),
        None => Ok(()),
    }
}

/// Sectors from which a request of this length leads somewhere else, if anything is multiplied, added or cut off wrongly.
fn hostile_sectors() -> Vec<u64> {
    let mut all = vec![
        MINE,
        MINE + 1,
        MINE - 1,
        THEIRS - 1,
        THEIRS,
        u64::MAX,
        u64::MAX - 7,
    ];
    for bit in [24, 31, 32, 40, 51, 52, 54, 55, 56, 61, 62, 63] {
        let base = 1_u64 << bit;
        all.extend([base, base - 1, base + 1, base + 8, base - 8]);
        // What is left when the upper bits fall off lies in the disk, or right behind it.
        all.extend([base + MINE, base + MINE / 2]);
    }
    all
}

#[test]
fn ranges_beyond_the_end_lead_nowhere() {
    let rig = Rig::new();
    let mut mine = rig.disk("mine");
    let mark = MARK.repeat(64 * 8);
    for sector in hostile_sectors() {
        for sectors in [8_u64, 1] {
            if sector.checked_add(sectors).is_some_and(|end| end <= MINE) {
                continue;
            }
            let what = format!("{sectors} sectors at {sector}");
            let read = mine.try_read(sector, sectors);
            assert!(read.is_err(), "reading {what}");
            let bytes = usize::try_from(sectors).unwrap() * 512;
            assert_ne!(
                mine.try_write(sector, &mark[..bytes]),
                S_OK,
                "writing {what}"
            );
            let count = u32::try_from(sectors).unwrap();
            for (kind, flags) in [(T_DISCARD, 0), (T_WRITE_ZEROES, 0), (T_WRITE_ZEROES, UNMAP)] {
                let status = mine.try_segments(kind, &[segment(sector, count, flags)]);
                assert_ne!(status, S_OK, "request {kind} of {what}");
            }
        }
        // A count that wraps around to a place in the disk.
        for count in [u32::MAX, u32::MAX - 7, 1 << 31] {
            let status = mine.try_segments(T_DISCARD, &[segment(sector, count, 0)]);
            assert_ne!(status, S_OK, "{count} sectors at {sector}");
        }
    }
    assert_eq!(
        mine.read(0, MINE),
        vec![0xba; usize::try_from(MINE).unwrap() * 512]
    );
    drop(mine);
    rig.finish();
}

#[test]
fn tables_and_buffers_outside_memory_lead_nowhere() {
    let rig = Rig::new();
    // The other guest's memory is mapped in the same process meanwhile, at the same guest addresses.
    let mut theirs = rig.disk("theirs");
    untouched(&mut theirs).unwrap();
    let mut mine = rig.disk("mine");
    let end = mine.guest.memory.end();
    let outside = [end, end + 4096, end - 256, u64::MAX - 511, 1 << 63, 0];
    for address in outside {
        for kind in [T_IN, T_OUT] {
            let memory = &mine.guest.memory;
            let head = memory.readable(&header(kind, 0));
            let data = Buffer {
                gpa: address,
                len: 512,
                writable: kind == T_IN,
            };
            let status = mine.guest.status();
            let table = indirect(memory, &[head, data, status]);
            for descriptor in [table, Descriptor::table(address, 48)] {
                let ring = &mut mine.guest.rings[0];
                let head = ring.link(&[descriptor]);
                ring.publish(head);
                ring.kick();
                let verdict = mine.guest.verdict();
                assert!(
                    !matches!(verdict, Verdict::Silent),
                    "{kind} at {address:#x}"
                );
                assert_ne!(mine.guest.last_byte(status), S_OK, "{kind} at {address:#x}");
                if !matches!(verdict, Verdict::Returned(_)) {
                    drop(mine);
                    mine = rig.disk("mine");
                    break;
                }
            }
        }
    }
    own(&mine.read(0, MINE)).unwrap();
    untouched(&mut theirs).unwrap();
    drop((mine, theirs));
    rig.finish();
}

#[test]
fn random_requests_stay_in_their_volume() {
    let rig = Rig::new();
    let mut theirs = rig.disk("theirs");
    let mut mine = rig.disk("mine");
    let mut random = Random::new(0x0150_1a7e);
    let places = hostile_sectors();
    for number in 0..REQUESTS {
        let count = 1 + random.below(64);
        let sector = match random.below(3) {
            0 => random.word(),
            1 => places[usize::try_from(random.below(places.len() as u64)).unwrap()],
            _ => random.below(MINE + 64),
        };
        let inside = sector.checked_add(count).is_some_and(|end| end <= MINE);
        let done = match random.below(4) {
            0 => match mine.try_read(sector, count) {
                Ok(data) => {
                    own(&data).unwrap();
                    true
                }
                Err(_) => false,
            },
            1 => {
                let data = MARK.repeat(usize::try_from(count).unwrap() * 64);
                mine.try_write(sector, &data) == S_OK
            }
            2 => mine.try_flush() == S_OK && inside,
            _ => {
                let flags = u32::try_from(random.below(2)).unwrap();
                let segments = [segment(sector, u32::try_from(count).unwrap(), flags)];
                mine.try_segments(T_WRITE_ZEROES, &segments) == S_OK
            }
        };
        assert_eq!(
            done, inside,
            "request {number}: {count} sectors at {sector}"
        );
        if number % 500 == 0 {
            rig.line(&format!("snapshot create n{number} mine theirs"));
            untouched(&mut theirs).unwrap();
        }
    }
    own(&mine.read(0, MINE)).unwrap();
    drop((mine, theirs));
    rig.finish();
}

/// The alarms ring: foreign bytes in either volume are found.
#[test]
fn a_breach_would_be_noticed() {
    let rig = Rig::new();
    let mut theirs = rig.disk("theirs");
    untouched(&mut theirs).unwrap();
    own(&theirs.read(THEIRS - 1, 1)).unwrap_err();
    theirs.write(THEIRS - 1, &MARK.repeat(64));
    untouched(&mut theirs).unwrap_err();
}
