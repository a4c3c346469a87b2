//! The state machine against answers that real kernels give rarely.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;
use crate::file::FileToken;

/// A direct file that says it takes anything by 512 bytes.
const DIRECT: RawFd = 5;
/// Its twin.
const TWIN: RawFd = 6;

fn files() -> DirectFiles {
    let files = DirectFiles::default();
    files.insert(
        DIRECT,
        DirectFile {
            buffered_twin: Some(TWIN),
            ..DirectFile::STRICT
        },
    );
    files
}

fn direct_token() -> FileToken {
    direct::token(DIRECT, true, false).unwrap()
}

/// Sectors on a page boundary.
#[repr(C, align(4096))]
struct Aligned([u8; 2048]);

fn begin(transfer: &mut Transfer, op: IoOp<'_>, files: &DirectFiles) -> Step {
    // SAFETY: each test below keeps the memory, untouched, until `Done`; no kernel takes part.
    #[expect(unsafe_code, reason = "the contract of `begin`")]
    unsafe {
        transfer.begin(op, files)
    }
}

/// Writes as the kernel would for the call that is asked for.
fn answer_read(call: Call, byte: u8, len: usize) {
    let Call::Read(_, base, room, _) = call else {
        panic!("{call:?}")
    };
    assert!(len <= room as usize);
    // SAFETY: the call's memory is valid for `room` bytes.
    #[expect(unsafe_code, reason = "plays the kernel")]
    unsafe {
        std::ptr::write_bytes(base, byte, len);
    }
}

#[test]
fn short_transfers_go_on_where_they_stopped() {
    let files = files();
    let mut memory = [0u8; 300];
    let base = memory.as_mut_ptr();
    let segments = [0, 100, 200].map(|at| Segment {
        base: base.wrapping_add(at),
        len: 100,
    });
    let mut transfer = Transfer::idle();
    let op = IoOp::Write {
        file: FileToken(9),
        offset: 1000,
        segments: &segments,
    };
    assert!(matches!(begin(&mut transfer, op, &files), Step::Again));
    assert!(matches!(
        transfer.call(),
        Call::WriteVectored(9, _, 3, 1000)
    ));
    assert!(matches!(transfer.advance(150, &files), Step::Again));
    assert!(matches!(
        transfer.call(),
        Call::WriteVectored(9, _, 2, 1150)
    ));
    assert!(matches!(
        transfer.advance(-libc::EINTR, &files),
        Step::Again
    ));
    assert!(matches!(transfer.advance(100, &files), Step::Again));
    let Call::Write(9, from, 50, 1250) = transfer.call() else {
        panic!("{:?}", transfer.call())
    };
    assert_eq!(from, base.wrapping_add(250).cast_const());
    assert!(matches!(transfer.advance(50, &files), Step::Done(Ok(()))));
    // A write that moves nothing has failed.
    assert!(matches!(begin(&mut transfer, op, &files), Step::Again));
    assert!(matches!(transfer.advance(0, &files), Step::Done(Err(_))));
    // So has one that is told to try again for ever.
    assert!(matches!(begin(&mut transfer, op, &files), Step::Again));
    let mut tries = 0;
    while matches!(transfer.advance(-libc::EAGAIN, &files), Step::Again) {
        tries += 1;
    }
    assert_eq!(tries, RETRIES_MAX);
}

#[test]
fn a_read_that_a_direct_file_refuses_is_made_by_whole_pages() {
    let files = files();
    let mut memory = Aligned([1; 2048]);
    let segments = [Segment {
        base: memory.0.as_mut_ptr(),
        len: 1024,
    }];
    let mut transfer = Transfer::idle();
    let op = IoOp::Read {
        file: direct_token(),
        offset: 4608,
        segments: &segments,
    };
    assert!(matches!(begin(&mut transfer, op, &files), Step::Again));
    assert!(matches!(transfer.call(), Call::Read(DIRECT, _, 1024, 4608)));
    assert!(matches!(
        transfer.advance(-libc::EINVAL, &files),
        Step::Again
    ));
    let call = transfer.call();
    assert!(matches!(call, Call::Read(DIRECT, _, 4096, 4096)));
    // The file ends inside: 700 bytes of what was wanted are there.
    answer_read(call, 7, 512 + 700);
    assert!(matches!(
        transfer.advance(512 + 700, &files),
        Step::Done(Ok(()))
    ));
    let expected = |at| if at < 700 { 7 } else { u8::from(at >= 1024) };
    assert!(
        memory
            .0
            .iter()
            .enumerate()
            .all(|(at, byte)| *byte == expected(at))
    );
    // A second refusal is the end.
    assert!(matches!(begin(&mut transfer, op, &files), Step::Again));
    assert!(matches!(
        transfer.advance(-libc::EINVAL, &files),
        Step::Again
    ));
    assert!(matches!(
        transfer.advance(-libc::EINVAL, &files),
        Step::Done(Err(_))
    ));
}

#[test]
fn a_write_that_a_direct_file_refuses_goes_through_its_twin() {
    let files = files();
    let mut memory = Aligned([1; 2048]);
    let base = memory.0.as_mut_ptr();
    let mut transfer = Transfer::idle();
    let whole = [Segment { base, len: 1024 }];
    let op = IoOp::Write {
        file: direct_token(),
        offset: 512,
        segments: &whole,
    };
    assert!(matches!(begin(&mut transfer, op, &files), Step::Again));
    assert!(matches!(transfer.call(), Call::Write(DIRECT, ..)));
    assert!(matches!(
        transfer.advance(-libc::EINVAL, &files),
        Step::Again
    ));
    assert!(matches!(transfer.call(), Call::Write(TWIN, _, 1024, 512)));
    assert!(matches!(transfer.advance(1024, &files), Step::Done(Ok(()))));
    // Memory at an odd address is copied first, and only refused memory goes to the twin.
    let odd = [Segment {
        base: base.wrapping_add(3),
        len: 512,
    }];
    let op = IoOp::Write {
        file: direct_token(),
        offset: 512,
        segments: &odd,
    };
    assert!(matches!(begin(&mut transfer, op, &files), Step::Again));
    let Call::Write(DIRECT, from, 512, 512) = transfer.call() else {
        panic!("{:?}", transfer.call())
    };
    assert!(from.addr().is_multiple_of(BOUNCE_ALIGN));
    assert!(matches!(
        transfer.advance(-libc::EINVAL, &files),
        Step::Again
    ));
    let Call::Write(TWIN, from, 512, 512) = transfer.call() else {
        panic!("{:?}", transfer.call())
    };
    assert_eq!(from, base.wrapping_add(3).cast_const());
    // Parts of sectors at once.
    let part = [Segment { base, len: 100 }];
    let op = IoOp::Write {
        file: direct_token(),
        offset: 512,
        segments: &part,
    };
    assert!(matches!(begin(&mut transfer, op, &files), Step::Again));
    assert!(matches!(transfer.call(), Call::Write(TWIN, _, 100, 512)));
    // Without a twin it is refused.
    files.remove(DIRECT);
    assert!(matches!(
        begin(&mut transfer, op, &files),
        Step::Done(Err(_))
    ));
}

#[test]
fn lists_longer_than_one_call_takes_are_split() {
    let files = files();
    let mut memory = vec![0u8; 3000];
    let base = memory.as_mut_ptr();
    let segments: Vec<Segment> = (0..3000)
        .map(|at| Segment {
            base: base.wrapping_add(at),
            len: 1,
        })
        .collect();
    let mut transfer = Transfer::idle();
    let op = IoOp::Write {
        file: FileToken(9),
        offset: 0,
        segments: &segments,
    };
    assert!(matches!(begin(&mut transfer, op, &files), Step::Again));
    for (count, offset) in [(1024, 0), (1024, 1024), (952, 2048)] {
        let Call::WriteVectored(9, _, asked, at) = transfer.call() else {
            panic!("not vectored")
        };
        assert_eq!((asked, at), (count, offset));
        let step = transfer.advance(i32::try_from(count).unwrap(), &files);
        assert_eq!(matches!(step, Step::Done(Ok(()))), count == 952);
    }
}
