//! The file contract, checked against every implementation: one suite, a module for each.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod host;
mod merging;
mod names;
mod random;
mod threads;
mod transfers;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use merging::{copies, links};
use names::{bad_files, names};
use random::random_operations;
use stratablk_layers::file::host::{HostMedia, HostOptions};
use stratablk_layers::file::sim::{Random, SimMedia};
use stratablk_layers::file::{Engine, File, IoDone, IoOp, Media, OpenMode, Segment};
use threads::{dropped_after_its_thread, dropped_under_way, moved_to_a_thread};
use transfers::{full_depth, holes, many_segments, past_the_end, wakes_its_owner};

/// A media to test, and the directory that it needs.
struct Bed {
    media: Arc<dyn Media>,
    direct: bool,
    directory: Option<tempfile::TempDir>,
}

impl Bed {
    /// Files below `parent` on the host.
    fn host(parent: &str, io_uring: bool, direct: bool) -> Self {
        let directory = tempfile::tempdir_in(parent).unwrap();
        let media = HostMedia::new(directory.path().to_owned(), HostOptions { io_uring }).unwrap();
        Self {
            media: Arc::new(media),
            direct,
            directory: Some(directory),
        }
    }

    fn sim(direct: bool) -> Self {
        Self {
            media: Arc::new(SimMedia::new(7)),
            direct,
            directory: None,
        }
    }

    fn create(&self, name: &str) -> Arc<dyn File> {
        self.media
            .open(Path::new(name), OpenMode::CreateNew, self.direct)
            .unwrap()
    }
}

/// Memory for one operation, cut into segments. Reached by raw pointers only while the operation is under way.
struct Buffers {
    memory: Vec<u8>,
    /// Where each segment lies in `memory`.
    places: Vec<std::ops::Range<usize>>,
}

impl Buffers {
    /// Segments of these lengths with gaps between, so that they lie at odd addresses if `odd`.
    fn new(lengths: &[usize], odd: bool, random: &mut Random) -> Self {
        let mut places = Vec::new();
        let mut end = 0;
        for len in lengths {
            let gap = if odd { random.index(40) } else { 0 };
            places.push(end + gap..end + gap + len);
            end += gap + len;
        }
        Self {
            memory: vec![0xee; end],
            places,
        }
    }

    fn fill(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        for place in &self.places {
            let (head, tail) = rest.split_at(place.len());
            self.memory[place.clone()].copy_from_slice(head);
            rest = tail;
        }
    }

    fn bytes(&self) -> Vec<u8> {
        self.places
            .iter()
            .flat_map(|place| self.memory[place.clone()].iter().copied())
            .collect()
    }

    fn segments(&mut self) -> Vec<Segment> {
        let base = self.memory.as_mut_ptr();
        let segment = |place: &std::ops::Range<usize>| Segment {
            base: base.wrapping_add(place.start),
            len: place.len(),
        };
        self.places.iter().map(segment).collect()
    }
}

/// Submits. The tests keep buffers and files until the completion was reaped or the engine dropped.
fn submit(engine: &mut dyn Engine, op: IoOp<'_>, user: u64) {
    // SAFETY: every caller below keeps what the operation uses, untouched, until its end.
    #[expect(unsafe_code, reason = "the contract under test")]
    unsafe {
        engine.submit(op, user);
    }
}

/// Waits until nothing is under way.
fn drain(engine: &mut dyn Engine) -> BTreeMap<u64, io::Result<()>> {
    let mut results = BTreeMap::new();
    let mut done = Vec::new();
    while engine.under_way() > 0 {
        engine.wait().unwrap();
        engine.reap(&mut done).unwrap();
        for IoDone { user, result } in done.drain(..) {
            assert!(
                results.insert(user, result).is_none(),
                "{user} completed twice"
            );
        }
    }
    results
}

/// Carries out one operation.
fn one(engine: &mut dyn Engine, op: IoOp<'_>) -> io::Result<()> {
    submit(engine, op, 77);
    engine.kick().unwrap();
    let mut results = drain(engine);
    assert_eq!(results.len(), 1);
    results.remove(&77).unwrap()
}

fn pattern(len: usize, random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0; len];
    for eight in bytes.chunks_mut(8) {
        let number = random.number().to_le_bytes();
        eight.copy_from_slice(&number[..eight.len()]);
    }
    bytes
}

/// The whole file and some bytes after it.
fn check(file: &dyn File, model: &[u8]) {
    let mut bytes = vec![0xaa; model.len() + 777];
    file.read_at(&mut bytes, 0).unwrap();
    assert!(
        bytes[..model.len()] == *model,
        "the file differs from its model"
    );
    assert!(
        bytes[model.len()..].iter().all(|byte| *byte == 0),
        "bytes after the end"
    );
}

/// The suite for one implementation.
macro_rules! contract {
    ($name:ident, $bed:expr) => {
        mod $name {
            use super::*;

            #[test]
            fn random_operations() {
                for seed in 0..6 {
                    super::random_operations(&$bed, seed);
                }
            }
            contract!(@tests $bed; past_the_end, holes, many_segments, full_depth, dropped_under_way,
                moved_to_a_thread, dropped_after_its_thread, bad_files, wakes_its_owner, names, links, copies);
        }
    };
    (@tests $bed:expr; $($test:ident),+) => {
        $(
            #[test]
            fn $test() {
                super::$test(&$bed);
            }
        )+
    };
}

/// On the disk that the project lies on.
const DISK: &str = env!("CARGO_TARGET_TMPDIR");

/// In memory; has no direct transfers on older kernels.
const MEMORY: &str = "/dev/shm";

contract!(uring, Bed::host(DISK, true, false));

contract!(uring_direct, Bed::host(DISK, true, true));

contract!(uring_in_memory, Bed::host(MEMORY, true, true));

contract!(posix, Bed::host(DISK, false, false));

contract!(posix_direct, Bed::host(DISK, false, true));

contract!(sim, Bed::sim(false));

contract!(sim_direct, Bed::sim(true));
