#![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

mod look;
mod processes;
mod refusals;
mod specification;

use std::fs::{File, OpenOptions, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::mem::offset_of;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rustix::fs::FallocateFlags;
use rustix::process::{Resource, Rlimit, setrlimit};
use tempfile::TempDir;
use uuid::Uuid;

use super::geometry::HEADER_BYTES;
use super::header::{Header, Refusal, seal};
use super::*;
use crate::units::{LayerId, LayerNumber, StoreId};

/// Names the folder of the parent's arena to a test that plays another process.
const CHILD_ENV: &str = "STRATABLK_TEST_ARENA_OF";
/// The store of all tests.
const STORE: StoreId = StoreId(Uuid::from_u128(0x5707e));

/// A folder with a store and room for its arena, on shared memory if there is any.
struct Home(TempDir);

impl Home {
    fn new() -> Self {
        let dir = tempfile::tempdir_in(place::DEFAULT_DIR).or_else(|_| tempfile::tempdir());
        let home = Self(dir.unwrap());
        std::fs::create_dir(home.0.path().join("store")).unwrap();
        home
    }

    fn place(&self) -> Place {
        place_in(self.0.path())
    }

    fn path(&self) -> PathBuf {
        self.place().path()
    }

    /// Leaves an arena behind.
    fn abandon(&self, sets: usize) {
        drop(Arena::create(&self.place(), sets).unwrap());
    }

    fn file(&self) -> File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.path())
            .unwrap()
    }

    fn header(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        self.file().read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// Changes the header of the arena that was left behind, and its checksum with it.
    fn forge(&self, at: usize, value: &[u8]) {
        let mut bytes = self.header();
        bytes[at..at + value.len()].copy_from_slice(value);
        seal(&mut bytes);
        self.file().write_all_at(&bytes, 0).unwrap();
    }
}

fn place_in(home: &Path) -> Place {
    Place::new(&home.join("store"), STORE, Some(home.to_owned())).unwrap()
}

fn layer(n: u128) -> LayerId {
    LayerId(Uuid::from_u128(n))
}

/// Fills a frame.
fn fill(arena: &Arena, set: usize, way: usize, byte: u8) {
    #[expect(unsafe_code, reason = "a frame is raw memory")]
    // SAFETY: the frame exists, and this thread is the only one that uses it.
    unsafe {
        arena.frame(set, way).write_bytes(byte, FRAME_BYTES);
    }
}

/// Whether all bytes of a frame are `byte`.
fn is_filled(arena: &Arena, set: usize, way: usize, byte: u8) -> bool {
    #[expect(unsafe_code, reason = "a frame is raw memory")]
    // SAFETY: the frame exists, and nobody changes it.
    let frame = unsafe { slice::from_raw_parts(arena.frame(set, way), FRAME_BYTES) };
    frame.iter().all(|found| *found == byte)
}

/// A value for each frame of a small arena.
fn mark(set: usize, way: usize) -> u8 {
    u8::try_from(set * WAYS + way + 1).unwrap()
}

/// Marks every frame and set.
fn mark_all(arena: &Arena) {
    for set in 0..arena.sets() {
        for way in 0..WAYS {
            fill(arena, set, way, mark(set, way));
            let word = &arena.all().get(set).unwrap().keys[way];
            word.store(mark(set, way).into(), Ordering::Relaxed);
        }
    }
}

/// Whether every frame and set is marked.
fn all_marked(arena: &Arena) -> bool {
    (0..arena.sets()).all(|set| {
        (0..WAYS).all(|way| {
            let word = arena.all().get(set).unwrap().keys[way].load(Ordering::Relaxed);
            word == mark(set, way).into() && is_filled(arena, set, way, mark(set, way))
        })
    })
}

/// Runs one test of this file in a process of its own, with an arena in `home`.
fn child(test: &str, home: &Home) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            &format!("cache::arena::tests::processes::{test}"),
            "--nocapture",
        ])
        .env(CHILD_ENV, home.0.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// The place for a test that runs as `child`; none if it runs as a test among others.
fn place_for_child() -> Option<Place> {
    std::env::var_os(CHILD_ENV).map(|home| place_in(Path::new(&home)))
}

#[test]
fn what_one_leaves_the_next_one_finds() {
    let home = Home::new();
    assert!(Arena::adopt(&home.place()).unwrap().is_none());
    let arena = Arena::create(&home.place(), 3).unwrap();
    assert_eq!(arena.path(), Some(home.path().as_path()));
    assert!(is_filled(&arena, 2, 15, 0));
    assert!((0..3).all(|set| arena.all().get(set).unwrap().keys[7].load(Ordering::Relaxed) == 0));
    mark_all(&arena);
    let numbers = [7, 8].map(|n| arena.numbers().number(layer(n)).unwrap());
    drop(arena);

    let arena = Arena::adopt(&home.place()).unwrap().unwrap();
    assert_eq!(arena.sets(), 3);
    assert!(arena.all().get(2).is_some() && arena.all().get(3).is_none());
    assert!(all_marked(&arena));
    assert_eq!(
        arena.numbers().layers(),
        [(numbers[0], layer(7)), (numbers[1], layer(8))]
    );
    // The check above can fail.
    fill(&arena, 1, 1, 0);
    assert!(!all_marked(&arena));
    let meta = std::fs::metadata(home.path()).unwrap();
    assert_eq!(meta.permissions().mode() & 0o7777, 0o600);
}

#[test]
fn frames_lie_way_by_way_and_suit_huge_pages() {
    let home = Home::new();
    for arena in [
        Arena::private(3).unwrap(),
        Arena::create(&home.place(), 3).unwrap(),
    ] {
        let first = arena.frame(0, 0);
        assert!(first.addr().is_multiple_of(2 << 20));
        assert!(
            std::ptr::from_ref(arena.all().first().unwrap())
                .addr()
                .is_multiple_of(2 << 20)
        );
        for (set, way, frame) in [(1, 0, 1), (2, 0, 2), (0, 1, 3), (2, 15, 47)] {
            assert_eq!(arena.frame(set, way), first.wrapping_add(frame * 4096));
        }
        let second = std::ptr::from_ref(arena.all().get(1).unwrap()).addr();
        assert_eq!(
            second - std::ptr::from_ref(arena.all().first().unwrap()).addr(),
            320
        );
    }
}

#[test]
fn a_private_arena_takes_memory_as_it_is_touched() {
    // 64 GiB.
    let arena = Arena::private(1 << 20).unwrap();
    assert_eq!((arena.sets(), arena.path()), (1 << 20, None));
    assert!(is_filled(&arena, (1 << 20) - 1, 15, 0));
    fill(&arena, (1 << 20) - 1, 15, 9);
    assert!(is_filled(&arena, (1 << 20) - 1, 15, 9));
    assert!(arena.all().get(1 << 20).is_none());
    arena.remove().unwrap();
    assert_eq!(arena.huge_pages(&AtomicBool::new(false)), 0);
    for sets in [0, usize::MAX, usize::MAX / 65536] {
        let error = Arena::private(sets).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
    }
}

#[test]
fn a_cache_that_does_not_fit_says_what_to_do() {
    let home = Home::new();
    let free = rustix::fs::statvfs(home.0.path()).unwrap();
    let sets = usize::try_from(free.f_blocks * free.f_frsize / 65536 + 1).unwrap();
    let error = Arena::create(&home.place(), sets).unwrap_err();
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
    let text = error.to_string();
    for word in [
        "GiB",
        "free there",
        "--cache-size",
        "--cache-dir",
        home.0.path().to_str().unwrap(),
    ] {
        assert!(text.contains(word), "{word}: {text}");
    }
    assert!(!home.path().exists(), "nothing is left of it");
    for sets in [0, usize::MAX] {
        let error = Arena::create(&home.place(), sets).unwrap_err();
        assert!(
            error.to_string().contains("there can be no cache"),
            "{error}"
        );
        assert!(!home.path().exists());
    }
    let mut nowhere = home.place();
    nowhere.dir.push("nowhere");
    let error = Arena::create(&nowhere, 1).unwrap_err();
    assert!(matches!(error, Error::Io { op: "create", .. }), "{error}");
    assert!(Arena::adopt(&nowhere).unwrap().is_none());
}

#[test]
fn a_host_that_reserves_nothing_is_asked_no_more() {
    let home = Home::new();
    home.abandon(1);
    let file = ArenaFile {
        // Not open for writing, so that there is no way to reserve.
        file: File::open(home.path()).unwrap().into(),
        path: home.path(),
    };
    let error = file.reserve(&Geometry::of(2).unwrap()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("the host cannot reserve it"), "{text}");
    assert!(text.contains("--cache-size"), "{text}");
}

#[test]
fn missing_pages_are_asked_for_again() {
    let home = Home::new();
    home.abandon(2);
    let file = home.file();
    let blocks = || file.metadata().unwrap().blocks();
    let whole = blocks();
    rustix::fs::fallocate(
        &file,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        36 << 20,
        65536,
    )
    .unwrap();
    assert!(blocks() < whole);
    drop(Arena::adopt(&home.place()).unwrap().unwrap());
    assert!(blocks() >= whole);
}

#[test]
fn an_orderly_end_leaves_nothing() {
    let home = Home::new();
    let arena = Arena::create(&home.place(), 1).unwrap();
    arena.remove().unwrap();
    assert!(!home.path().exists());
    // Whoever still works may go on.
    mark_all(&arena);
    assert!(all_marked(&arena));
    assert!(Arena::adopt(&home.place()).unwrap().is_none());
    // A file that took the place is not ours to remove.
    std::fs::write(home.path(), "another").unwrap();
    arena.remove().unwrap();
    assert!(home.path().exists());
    std::fs::remove_file(home.path()).unwrap();
    arena.remove().unwrap();
}

#[test]
fn huge_pages_change_nothing_but_speed() {
    let home = Home::new();
    // 4 MiB of frames.
    let arena = Arena::create(&home.place(), 64).unwrap();
    let byte = |set: usize, way: usize| u8::try_from((set * 31 + way * 7) % 251).unwrap();
    let frames = || (0..64).flat_map(|set| (0..WAYS).map(move |way| (set, way)));
    for (set, way) in frames() {
        fill(&arena, set, way, byte(set, way));
    }
    let stop = AtomicBool::new(true);
    assert_eq!(arena.huge_pages(&stop), 0);
    stop.store(false, Ordering::Relaxed);
    let done = arena.huge_pages(&stop);
    assert!(done.is_multiple_of(2 << 20) && done <= 4 << 20, "{done}");
    println!("{done} bytes in huge pages");
    for (set, way) in frames() {
        assert!(is_filled(&arena, set, way, byte(set, way)));
    }
    // Only whole chunks of the mapping.
    for offset in [1, 4096, 6 << 20, 1 << 40, !(HUGE_BYTES - 1)] {
        assert!(arena.memory.collapse(offset).is_err(), "{offset}");
    }
}

#[test]
fn memory_that_is_left_is_read_from_the_kernel() {
    let text = "MemTotal:  24683520 kB\nMemFree: 5 kB\nMemAvailable:   1024 kB\nSwapTotal: 9 kB\nSwapFree:  8 kB\n";
    assert_eq!(file::available_memory(text), Some(1032 << 10));
    assert_eq!(file::available_memory("MemAvailable: 4 kB\n"), Some(4096));
    let none = [
        "",
        "MemFree: 5 kB\n",
        "MemAvailable: x kB\n",
        "MemAvailable: 5\n",
        "MemAvailable: 18446744073709551615 kB\n",
    ];
    for text in none {
        assert_eq!(file::available_memory(text), None, "{text}");
    }
    let real = std::fs::read_to_string("/proc/meminfo").unwrap();
    assert!(file::available_memory(&real).is_some_and(|bytes| bytes > 1 << 20));
}

#[test]
fn a_shortage_of_either_kind_is_seen_beforehand() {
    let shortage =
        |held, free, memory| file::shortage(&file::Room { held, free, memory }, 10 << 20);
    let (enough, few) = (Some(10 << 20), Some((10 << 20) - 1));
    for (free, memory) in [
        (enough, enough),
        (enough, None),
        (None, enough),
        (None, None),
    ] {
        assert_eq!(shortage(0, free, memory), None);
    }
    assert_eq!(shortage(1, few, few), None);
    assert_eq!(
        shortage(0, few, enough).unwrap(),
        "only 9.9 MiB are free there"
    );
    assert_eq!(
        shortage(0, enough, few).unwrap(),
        "the host has only 9.9 MiB of memory left"
    );
}
