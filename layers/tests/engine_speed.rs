//! How fast the engines are by themselves. Prints, judges nothing: run it by hand on a quiet machine,
//! `cargo test --release -p stratablk-layers --test engine_speed -- --ignored --nocapture`.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use stratablk_layers::file::host::{HostMedia, HostOptions};
use stratablk_layers::file::sim::Random;
use stratablk_layers::file::{Engine, File, IoOp, Media, OpenMode, Segment};

/// Bytes of an operation.
const BYTES: usize = 4096;
/// Operations under way at once.
const DEPTH: usize = 32;
/// Operations of the file.
const PLACES: u64 = 64 * 1024;

/// Memory for one operation, aligned as guests align theirs.
#[repr(C, align(4096))]
struct Page([u8; BYTES]);

/// The processor time of this process with all its threads, the kernel's workers for it as well.
fn processor_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap()
}

/// Runs random operations for a while: operations a second, and operations a second of processor time.
fn run(engine: &mut dyn Engine, file: &dyn File, write: bool, span: Duration) -> (f64, f64) {
    let mut pages: Vec<Page> = (0..DEPTH).map(|_| Page([1; BYTES])).collect();
    let segments: Vec<Segment> = pages
        .iter_mut()
        .map(|page| Segment {
            base: page.0.as_mut_ptr(),
            len: BYTES,
        })
        .collect();
    let mut random = Random::new(1);
    let mut done = Vec::with_capacity(DEPTH);
    let mut free: Vec<usize> = (0..DEPTH).collect();
    let mut count = 0u64;
    let start = Instant::now();
    let start_busy = processor_time();
    let mut stop = false;
    while !stop || engine.under_way() > 0 {
        stop = stop || start.elapsed() >= span;
        while let (false, Some(slot)) = (stop, free.pop()) {
            let offset = random.below(PLACES) * BYTES as u64;
            let segments = &segments[slot..=slot];
            let op = if write {
                IoOp::Write {
                    file: file.token(),
                    offset,
                    segments,
                }
            } else {
                IoOp::Read {
                    file: file.token(),
                    offset,
                    segments,
                }
            };
            // SAFETY: the pages outlive the loop, which ends when nothing is under way.
            #[expect(unsafe_code, reason = "the engine's contract")]
            unsafe {
                engine.submit(op, slot as u64);
            }
        }
        engine.kick().unwrap();
        engine.reap(&mut done).unwrap();
        if done.is_empty() {
            engine.wait().unwrap();
        }
        for completion in done.drain(..) {
            completion.result.unwrap();
            free.push(usize::try_from(completion.user).unwrap());
            count += 1;
        }
    }
    #[expect(
        clippy::cast_precision_loss,
        reason = "a count of operations for people to read"
    )]
    let count = count as f64;
    let busy = processor_time() - start_busy;
    (
        count / start.elapsed().as_secs_f64(),
        count / busy.as_secs_f64(),
    )
}

#[test]
#[ignore = "a measurement, not a check"]
fn random_operations_of_4_kib() {
    let span = Duration::from_secs(2);
    for direct in [false, true] {
        for parent in [env!("CARGO_TARGET_TMPDIR"), "/dev/shm"] {
            let directory = tempfile::tempdir_in(parent).unwrap();
            for io_uring in [true, false] {
                let media =
                    HostMedia::new(directory.path().to_owned(), HostOptions { io_uring }).unwrap();
                let name = format!("file-{io_uring}");
                let file = media
                    .open(Path::new(&name), OpenMode::CreateNew, direct)
                    .unwrap();
                let mebibyte = vec![7; 1 << 20];
                for at in 0..(PLACES * BYTES as u64) >> 20 {
                    file.write_at(&mebibyte, at << 20).unwrap();
                }
                file.sync_data().unwrap();
                if direct && file.alignment() == 1 {
                    continue;
                }
                let mut engine = media.engine(u32::try_from(DEPTH).unwrap()).unwrap();
                let engine_name = if io_uring { "uring" } else { "posix" };
                for write in [false, true] {
                    let (rate, busy_rate) = run(engine.as_mut(), file.as_ref(), write, span);
                    let what = if write { "writes" } else { "reads" };
                    let way = if direct { "direct" } else { "buffered" };
                    println!(
                        "{engine_name} {way} {what} at depth {DEPTH} in {parent}: {rate:.0}/s, \
                         {busy_rate:.0} a second of processor time"
                    );
                }
            }
        }
    }
}
