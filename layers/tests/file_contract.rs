//! The file contract, checked against every implementation: one suite, a module for each.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "file_contract/merging.rs"]
mod merging;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use merging::{copies, links};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use stratablk_layers::file::host::{HostMedia, HostOptions};
use stratablk_layers::file::sim::{Random, SimMedia};
use stratablk_layers::file::{Engine, File, FileToken, IoDone, IoOp, Media, OpenMode, Segment};

/// Bytes of the file that random operations work on.
const FILE_BYTES: usize = 192 * 1024;
/// Bytes of a page of the host's cache.
const PAGE: usize = 4096;

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

/// Lengths that sum up to `total`; multiples of 512 if `whole`.
fn cut(total: usize, whole: bool, random: &mut Random) -> Vec<usize> {
    let unit = if whole { 512 } else { 1 };
    let mut lengths = Vec::new();
    let mut left = total;
    while left > 0 && lengths.len() < 20 {
        let len = (random.index(left / unit + 1) * unit).min(left);
        lengths.push(len);
        left -= len;
        if random.chance(60) {
            break;
        }
    }
    lengths.push(left);
    lengths
}

/// An operation of the random test that is under way.
enum Pending {
    Read { buffers: Buffers, expected: Vec<u8> },
    Write { _buffers: Buffers },
    Other,
}

fn random_operations(bed: &Bed, seed: u64) {
    let random = &mut Random::new(seed);
    let file = bed.create(&format!("random-{seed}"));
    let token = file.token();
    let mut engine = bed.media.engine(8).unwrap();
    let mut model: Vec<u8> = Vec::new();
    let mut pending: BTreeMap<u64, (std::ops::Range<usize>, bool, Pending)> = BTreeMap::new();
    let mut done = Vec::new();
    for user in 0..1500u64 {
        // Whole sectors mostly, since that is what direct files are for.
        let unit = if random.chance(200) { 512 } else { 1 };
        let start = random.index(FILE_BYTES / unit) * unit;
        let room = if random.chance(200) {
            8192.min(FILE_BYTES - start)
        } else {
            FILE_BYTES - start
        };
        let len = random.index(room / unit + 1) * unit;
        let range = start..start + len;
        let kind = random.index(10);
        let changes = kind >= 4;
        // Operations that overlap have no order; those on one page neither if one of them goes through the host's cache.
        let pages = start / PAGE * PAGE
            ..(start + len)
                .next_multiple_of(PAGE)
                .max(start / PAGE * PAGE + PAGE);
        let clash =
            |other: &std::ops::Range<usize>| other.start < pages.end && pages.start < other.end;
        while engine.room() == 0
            || pending
                .values()
                .any(|(other, theirs, _)| clash(other) && (changes || *theirs))
        {
            engine.kick().unwrap();
            engine.wait().unwrap();
            engine.reap(&mut done).unwrap();
            finish(&mut done, &mut pending);
        }
        let offset = start as u64;
        let odd = random.chance(128);
        let lengths = cut(len, random.chance(128) && unit == 512, random);
        match kind {
            0..4 => {
                let mut buffers = Buffers::new(&lengths, odd, random);
                let mut expected = vec![0; len];
                let there = model.len().saturating_sub(start).min(len);
                if there > 0 {
                    expected[..there].copy_from_slice(&model[start..start + there]);
                }
                let segments = buffers.segments();
                submit(
                    engine.as_mut(),
                    IoOp::Read {
                        file: token,
                        offset,
                        segments: &segments,
                    },
                    user,
                );
                pending.insert(user, (pages, false, Pending::Read { buffers, expected }));
            }
            4..8 => {
                let mut buffers = Buffers::new(&lengths, odd, random);
                let bytes = pattern(len, random);
                buffers.fill(&bytes);
                let segments = buffers.segments();
                submit(
                    engine.as_mut(),
                    IoOp::Write {
                        file: token,
                        offset,
                        segments: &segments,
                    },
                    user,
                );
                if len > 0 {
                    model.resize(model.len().max(range.end), 0);
                    model[range].copy_from_slice(&bytes);
                }
                pending.insert(user, (pages, true, Pending::Write { _buffers: buffers }));
            }
            8 => {
                submit(
                    engine.as_mut(),
                    IoOp::Punch {
                        file: token,
                        offset,
                        len: len as u64,
                    },
                    user,
                );
                let end = range.end.min(model.len());
                if start < end {
                    model[start..end].fill(0);
                }
                pending.insert(user, (pages, true, Pending::Other));
            }
            _ => {
                submit(engine.as_mut(), IoOp::SyncData { file: token }, user);
                pending.insert(user, (0..0, false, Pending::Other));
            }
        }
        if random.chance(80) {
            engine.kick().unwrap();
        }
        if random.chance(60) {
            engine.reap(&mut done).unwrap();
            finish(&mut done, &mut pending);
        }
        if random.chance(8) {
            // The synchronous view of the same file.
            settle(engine.as_mut(), &mut pending);
            let start = random.index(FILE_BYTES);
            let len = random.index(10_000);
            if random.chance(128) {
                let bytes = pattern(len, random);
                file.write_at(&bytes, start as u64).unwrap();
                if len > 0 {
                    model.resize(model.len().max(start + len), 0);
                    model[start..start + len].copy_from_slice(&bytes);
                }
            }
            assert_eq!(file.len().unwrap(), model.len() as u64);
            check(file.as_ref(), &model);
        }
    }
    settle(engine.as_mut(), &mut pending);
    check(file.as_ref(), &model);
    file.set_len(1000).unwrap();
    model.truncate(1000);
    model.resize(5000, 0);
    file.set_len(5000).unwrap();
    check(file.as_ref(), &model);
}

/// Checks and forgets what has completed.
fn finish(
    done: &mut Vec<IoDone>,
    pending: &mut BTreeMap<u64, (std::ops::Range<usize>, bool, Pending)>,
) {
    for IoDone { user, result } in done.drain(..) {
        let (_, _, pending) = pending.remove(&user).unwrap();
        result.unwrap_or_else(|error| panic!("operation {user}: {error}"));
        if let Pending::Read { buffers, expected } = pending {
            assert!(
                buffers.bytes() == expected,
                "operation {user} read something else"
            );
        }
    }
}

fn settle(
    engine: &mut dyn Engine,
    pending: &mut BTreeMap<u64, (std::ops::Range<usize>, bool, Pending)>,
) {
    let mut done = Vec::new();
    engine.kick().unwrap();
    while engine.under_way() > 0 {
        engine.wait().unwrap();
        engine.reap(&mut done).unwrap();
        finish(&mut done, pending);
    }
    assert!(pending.is_empty());
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

fn past_the_end(bed: &Bed) {
    let random = &mut Random::new(1);
    let file = bed.create("short");
    let bytes = pattern(1000, random);
    file.write_at(&bytes, 0).unwrap();
    assert_eq!(file.len().unwrap(), 1000);
    let mut engine = bed.media.engine(4).unwrap();
    for (offset, lengths) in [
        (0u64, vec![4096]),
        (512, vec![512, 512, 512]),
        (512, vec![100, 7, 3989]),
        (8192, vec![1024]),
    ] {
        let mut buffers = Buffers::new(&lengths, false, random);
        let segments = buffers.segments();
        one(
            engine.as_mut(),
            IoOp::Read {
                file: file.token(),
                offset,
                segments: &segments,
            },
        )
        .unwrap();
        let read = buffers.bytes();
        let start = usize::try_from(offset).unwrap();
        for (at, byte) in read.iter().enumerate() {
            assert_eq!(
                *byte,
                bytes.get(start + at).copied().unwrap_or(0),
                "byte {at} from {offset}"
            );
        }
    }
    // Nothing to read is no error.
    one(
        engine.as_mut(),
        IoOp::Read {
            file: file.token(),
            offset: 0,
            segments: &[],
        },
    )
    .unwrap();
    // Offsets that no file has are one.
    let mut buffers = Buffers::new(&[512], false, random);
    let segments = buffers.segments();
    for offset in [u64::MAX - 511, u64::MAX, i64::MAX as u64] {
        one(
            engine.as_mut(),
            IoOp::Read {
                file: file.token(),
                offset,
                segments: &segments,
            },
        )
        .unwrap_err();
        one(
            engine.as_mut(),
            IoOp::Write {
                file: file.token(),
                offset,
                segments: &segments,
            },
        )
        .unwrap_err();
    }
    assert_eq!(file.len().unwrap(), 1000);
}

fn holes(bed: &Bed) {
    let file = bed.create("holes");
    let mut model = vec![0x5a; 100_000];
    file.write_at(&model, 0).unwrap();
    let mut engine = bed.media.engine(4).unwrap();
    for (offset, len) in [
        (4096, 8192),
        (20_000, 30),
        (30_001, 9000),
        (70_000, 0),
        (98_000, 50_000),
        (200_000, 10),
    ] {
        one(
            engine.as_mut(),
            IoOp::Punch {
                file: file.token(),
                offset: offset as u64,
                len,
            },
        )
        .unwrap();
        let end = (offset + usize::try_from(len).unwrap()).min(model.len());
        if offset < end {
            model[offset..end].fill(0);
        }
        assert_eq!(file.len().unwrap(), 100_000, "a punch changed the length");
        check(file.as_ref(), &model);
    }
    file.punch(50_000, 10_000).unwrap();
    model[50_000..60_000].fill(0);
    check(file.as_ref(), &model);
    let before = bed.media.stat(Path::new("holes")).unwrap().allocated;
    file.sync_data().unwrap();
    file.punch(0, 100_000).unwrap();
    file.sync_data().unwrap();
    let after = bed.media.stat(Path::new("holes")).unwrap().allocated;
    assert!(
        after == 0 || after < before,
        "a punch gave no space back: {before}, {after}"
    );
}

fn many_segments(bed: &Bed) {
    let random = &mut Random::new(2);
    let file = bed.create("many");
    let mut engine = bed.media.engine(4).unwrap();
    for lengths in [vec![512; 3000], vec![16; 3200], vec![1; 2048]] {
        let mut write = Buffers::new(&lengths, true, random);
        let bytes = pattern(lengths.iter().sum(), random);
        write.fill(&bytes);
        let segments = write.segments();
        one(
            engine.as_mut(),
            IoOp::Write {
                file: file.token(),
                offset: 512,
                segments: &segments,
            },
        )
        .unwrap();
        let mut read = Buffers::new(&lengths, true, random);
        let segments = read.segments();
        one(
            engine.as_mut(),
            IoOp::Read {
                file: file.token(),
                offset: 512,
                segments: &segments,
            },
        )
        .unwrap();
        assert!(read.bytes() == bytes);
    }
}

fn full_depth(bed: &Bed) {
    const DEPTH: u32 = 16;
    let random = &mut Random::new(3);
    let file = bed.create("depth");
    let mut engine = bed.media.engine(DEPTH).unwrap();
    for round in 0..20u8 {
        let mut buffers: Vec<Buffers> = (0..DEPTH)
            .map(|_| Buffers::new(&[4096], false, random))
            .collect();
        assert_eq!(engine.under_way(), 0);
        for (user, buffers) in (0u64..).zip(&mut buffers) {
            assert!(engine.room() > 0);
            buffers.memory.fill(round);
            let segments = buffers.segments();
            submit(
                engine.as_mut(),
                IoOp::Write {
                    file: file.token(),
                    offset: user * 4096,
                    segments: &segments,
                },
                user,
            );
        }
        assert_eq!((engine.room(), engine.under_way()), (0, DEPTH as usize));
        engine.kick().unwrap();
        engine.kick().unwrap();
        let results = drain(engine.as_mut());
        assert_eq!(results.len(), DEPTH as usize);
        assert!(results.into_values().all(|result| result.is_ok()));
        check(file.as_ref(), &vec![round; DEPTH as usize * 4096]);
    }
    // Nothing under way: these return at once.
    engine.wait().unwrap();
    let mut done = Vec::new();
    engine.reap(&mut done).unwrap();
    assert!(done.is_empty());
}

fn dropped_under_way(bed: &Bed) {
    let random = &mut Random::new(4);
    let file = bed.create("dropped");
    file.write_at(&pattern(1 << 20, random), 0).unwrap();
    for round in 0..30 {
        let mut buffers: Vec<Buffers> = (0..8)
            .map(|_| Buffers::new(&[65536, 65536], round % 2 == 0, random))
            .collect();
        let mut engine = bed.media.engine(8).unwrap();
        for (user, buffers) in (0u64..).zip(&mut buffers) {
            let segments = buffers.segments();
            let (file, offset) = (file.token(), user * 131_072);
            let op = if user % 2 == 0 {
                IoOp::Read {
                    file,
                    offset,
                    segments: &segments,
                }
            } else {
                IoOp::Write {
                    file,
                    offset,
                    segments: &segments,
                }
            };
            submit(engine.as_mut(), op, user);
            if user == 5 {
                engine.kick().unwrap();
            }
        }
        drop(engine);
        // Nobody may write to them any more.
        let before: Vec<Vec<u8>> = buffers.iter().map(Buffers::bytes).collect();
        std::thread::yield_now();
        assert!(
            before
                .iter()
                .zip(&buffers)
                .all(|(before, now)| *before == now.bytes())
        );
    }
}

fn moved_to_a_thread(bed: &Bed) {
    let random = &mut Random::new(5);
    let file = bed.create("moved");
    let bytes = pattern(8192, random);
    file.write_at(&bytes, 0).unwrap();
    let token = file.token();
    let mut engine = bed.media.engine(4).unwrap();
    let wake = engine.wake_fd();
    let mut back = std::thread::scope(|scope| {
        let work = || {
            assert_eq!(engine.wake_fd(), wake);
            let mut buffers = Buffers::new(&[8192], false, &mut Random::new(0));
            let segments = buffers.segments();
            one(
                engine.as_mut(),
                IoOp::Read {
                    file: token,
                    offset: 0,
                    segments: &segments,
                },
            )
            .unwrap();
            assert!(buffers.bytes() == bytes);
            engine
        };
        let thread = scope.spawn(work);
        thread.join().unwrap()
    });
    // It stays with the thread that used it, but nothing hangs if that one is gone.
    let mut buffers = Buffers::new(&[512], false, random);
    let segments = buffers.segments();
    submit(
        back.as_mut(),
        IoOp::Read {
            file: token,
            offset: 0,
            segments: &segments,
        },
        1,
    );
    let _refused_or_done = back.kick();
    drop(back);
}

fn dropped_after_its_thread(bed: &Bed) {
    let random = &mut Random::new(6);
    let file = bed.create("orphan");
    file.write_at(&pattern(1 << 20, random), 0).unwrap();
    file.sync_data().unwrap();
    let token = file.token();
    let mut buffers: Vec<Buffers> = (0..8)
        .map(|_| Buffers::new(&[131_072], false, random))
        .collect();
    let segments: Vec<Vec<Segment>> = buffers.iter_mut().map(Buffers::segments).collect();
    let mut engine = bed.media.engine(8).unwrap();
    for (user, segments) in (0u64..).zip(&segments) {
        submit(
            engine.as_mut(),
            IoOp::Read {
                file: token,
                offset: user * 131_072,
                segments,
            },
            user,
        );
    }
    submit_elsewhere(engine);
    assert_eq!(buffers.len(), 8);
}

/// Kicks in a thread that ends before the engine is dropped here.
fn submit_elsewhere(mut engine: Box<dyn Engine>) {
    let kick = move || {
        engine.kick().unwrap();
        engine
    };
    drop(std::thread::spawn(kick).join().unwrap());
}

fn bad_files(bed: &Bed) {
    let random = &mut Random::new(8);
    let mut engine = bed.media.engine(4).unwrap();
    let mut buffers = Buffers::new(&[512], false, random);
    let segments = buffers.segments();
    for token in [FileToken(-1), FileToken(900_000)] {
        one(
            engine.as_mut(),
            IoOp::Read {
                file: token,
                offset: 0,
                segments: &segments,
            },
        )
        .unwrap_err();
        one(
            engine.as_mut(),
            IoOp::Write {
                file: token,
                offset: 0,
                segments: &segments,
            },
        )
        .unwrap_err();
        one(engine.as_mut(), IoOp::SyncData { file: token }).unwrap_err();
        one(
            engine.as_mut(),
            IoOp::Punch {
                file: token,
                offset: 0,
                len: 512,
            },
        )
        .unwrap_err();
    }
    drop(bed.create("sealed"));
    let sealed = bed
        .media
        .open(Path::new("sealed"), OpenMode::ReadOnly, bed.direct)
        .unwrap();
    one(
        engine.as_mut(),
        IoOp::Write {
            file: sealed.token(),
            offset: 0,
            segments: &segments,
        },
    )
    .unwrap_err();
    sealed.write_at(&[1; 512], 0).unwrap_err();
    sealed.set_len(10).unwrap_err();
    assert!(sealed.is_empty().unwrap());
    // The engine is as good as new.
    one(
        engine.as_mut(),
        IoOp::Read {
            file: sealed.token(),
            offset: 0,
            segments: &segments,
        },
    )
    .unwrap();
    assert_eq!(buffers.bytes(), vec![0; 512]);
}

fn wakes_its_owner(bed: &Bed) {
    let random = &mut Random::new(9);
    let file = bed.create("wake");
    file.write_at(&pattern(1 << 20, random), 0).unwrap();
    file.sync_data().unwrap();
    let mut engine = bed.media.engine(8).unwrap();
    let Some(fd) = engine.wake_fd() else { return };
    // SAFETY: the engine lives longer than the borrow.
    #[expect(unsafe_code, reason = "polls the descriptor that the contract names")]
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    for round in 0..200u64 {
        let mut buffers = Buffers::new(&[4096], false, random);
        let segments = buffers.segments();
        let token = file.token();
        let op = match round % 4 {
            0 => IoOp::Read {
                file: token,
                offset: round * 4096,
                segments: &segments,
            },
            1 => IoOp::Write {
                file: token,
                offset: round * 4096,
                segments: &segments,
            },
            2 => IoOp::SyncData { file: token },
            _ => IoOp::Read {
                file: token,
                offset: 0,
                segments: &[],
            },
        };
        submit(engine.as_mut(), op, round);
        engine.kick().unwrap();
        let mut done = Vec::new();
        while done.is_empty() {
            let mut fds = [PollFd::new(&fd, PollFlags::IN)];
            let deadline = Timespec {
                tv_sec: 20,
                tv_nsec: 0,
            };
            assert_eq!(
                poll(&mut fds, Some(&deadline)).unwrap(),
                1,
                "no wake-up in round {round}"
            );
            engine.reap(&mut done).unwrap();
        }
        assert_eq!((done.len(), done[0].user), (1, round));
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        assert_eq!(
            poll(&mut fds, Some(&now)).unwrap(),
            0,
            "readable with nothing under way"
        );
    }
}

fn names(bed: &Bed) {
    let media = &bed.media;
    let path = Path::new;
    media.create_dir(path("layers")).unwrap();
    assert_eq!(
        media.create_dir(path("layers")).unwrap_err().kind(),
        io::ErrorKind::AlreadyExists
    );
    media.create_dir(path("layers/b")).unwrap();
    media.create_dir(path("layers/a")).unwrap();
    assert_eq!(media.list(path("layers")).unwrap(), ["a", "b"]);
    assert_eq!(media.list(path("")).unwrap(), ["layers"]);
    let open = |name: &str, mode| media.open(path(name), mode, false);
    assert_eq!(
        open("layers/a/map", OpenMode::ReadOnly).unwrap_err().kind(),
        io::ErrorKind::NotFound
    );
    open("layers/a/map", OpenMode::CreateNew)
        .unwrap()
        .write_at(b"old", 0)
        .unwrap();
    assert_eq!(
        open("layers/a/map", OpenMode::CreateNew)
            .unwrap_err()
            .kind(),
        io::ErrorKind::AlreadyExists
    );
    let old = open("layers/a/map", OpenMode::ReadWrite).unwrap();
    let new = open("layers/a/map.new", OpenMode::CreateNew).unwrap();
    new.write_at(b"newer", 0).unwrap();
    new.sync_data().unwrap();
    media
        .rename(path("layers/a/map.new"), path("layers/a/map"))
        .unwrap();
    media.sync_dir(path("layers/a")).unwrap();
    media.sync_dir(path("")).unwrap();
    assert_eq!(media.list(path("layers/a")).unwrap(), ["map"]);
    let stat = media.stat(path("layers/a/map")).unwrap();
    assert_eq!((stat.len, stat.is_file), (5, true));
    assert!(stat.mtime_ns > 0);
    assert!(!media.stat(path("layers/a")).unwrap().is_file);
    // A file that was replaced goes on to be what it was.
    let mut three = [0; 3];
    old.read_at(&mut three, 0).unwrap();
    assert_eq!(&three, b"old");
    media.remove(path("layers/a/map")).unwrap();
    assert_eq!(
        media.remove(path("layers/a/map")).unwrap_err().kind(),
        io::ErrorKind::NotFound
    );
    assert_eq!(
        media.stat(path("layers/a/map")).unwrap_err().kind(),
        io::ErrorKind::NotFound
    );
    open("layers/b/data", OpenMode::CreateNew).unwrap();
    media.create_dir(path("layers/b/inner")).unwrap();
    open("layers/b/inner/x", OpenMode::CreateNew).unwrap();
    media.remove_dir_all(path("layers")).unwrap();
    assert!(media.list(path("")).unwrap().is_empty());
    for outside in ["..", "../x", "a/../../x"] {
        media
            .open(path(outside), OpenMode::ReadOnly, false)
            .unwrap_err();
        media.create_dir(path(outside)).unwrap_err();
    }
    assert!(media.display_path(path("x")).is_absolute());
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

#[test]
fn a_pipe_is_refused_without_waiting_for_its_other_end() {
    let bed = Bed::host(DISK, true, false);
    let path = bed.directory.as_ref().unwrap().path().join("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    for mode in [OpenMode::ReadOnly, OpenMode::ReadWrite] {
        let error = bed.media.open(&path, mode, false).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
    let error = bed
        .media
        .open(Path::new(""), OpenMode::ReadOnly, true)
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    assert!(!bed.media.stat(&path).unwrap().is_file);
}

#[test]
fn fallbacks_are_noted_once() {
    let bed = Bed::host(MEMORY, true, true);
    let first = bed.create("a");
    let second = bed.create("b");
    assert_eq!(first.alignment(), second.alignment());
    if first.alignment() == 1 {
        let notes = bed.media.notes();
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert!(notes[0].contains("page cache"), "{notes:?}");
    }
    assert!(bed.media.notes().is_empty());
}

#[test]
fn direct_files_are_direct_where_the_disk_can() {
    let bed = Bed::host(DISK, true, true);
    let file = bed.create("direct");
    let notes = bed.media.notes();
    assert!(
        (file.alignment() == 512) == notes.is_empty(),
        "alignment {} with notes {notes:?}",
        file.alignment()
    );
    println!("alignment {} on {DISK}, notes {notes:?}", file.alignment());
}

#[test]
fn absolute_paths_lead_outside_the_store() {
    let bed = Bed::host(DISK, true, false);
    let other = tempfile::tempdir_in(DISK).unwrap();
    let base: PathBuf = other.path().join("base.raw");
    std::fs::write(&base, b"base").unwrap();
    let file = bed.media.open(&base, OpenMode::ReadOnly, false).unwrap();
    let mut bytes = [0; 6];
    file.read_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"base\0\0");
    assert_eq!(bed.media.stat(&base).unwrap().len, 4);
    assert_eq!(bed.media.display_path(&base), base);
}
