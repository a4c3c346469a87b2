//! Reads and writes: the end of a file, holes, many segments, many at once, waking.

use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use stratablk_layers::file::IoOp;
use stratablk_layers::file::sim::Random;

use crate::{Bed, Buffers, check, drain, one, pattern, submit};

pub fn past_the_end(bed: &Bed) {
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

pub fn holes(bed: &Bed) {
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

pub fn many_segments(bed: &Bed) {
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

pub fn full_depth(bed: &Bed) {
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

pub fn wakes_its_owner(bed: &Bed) {
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
