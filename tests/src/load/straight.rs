//! The same workload without a back-end: one thread that reads, writes and syncs a file with plain system calls. What a
//! disk of the daemon is compared with where the host's file system decides the figure.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use super::random::Random;
use super::run::{Limits, Measurement, RunError};
use super::workload::{Mix, Steps};

/// Runs `steps` one after the other in requests of `block_bytes`. The order of addresses is the one that a disk would see.
///
/// # Errors
/// The host's answer to the first call that fails, or a workload without anything to count.
pub fn run_straight(
    file: &File,
    mut steps: Steps,
    mix: Mix,
    block_bytes: usize,
    limits: &Limits,
    seed: u64,
) -> Result<Measurement, RunError> {
    let mut buffer = vec![0; block_bytes];
    Random::new(seed ^ 0x6461_7461).fill(&mut buffer);
    let mut result = Measurement::new(limits)?;
    let mut start = Instant::now();
    let mut last = start;
    let mut measuring = limits.warmup.is_zero();
    while let Some(step) = steps.next_step() {
        let issued = Instant::now();
        if step.is_read {
            file.read_exact_at(&mut buffer, step.offset)
        } else {
            file.write_all_at(&buffer, step.offset)
        }
        .map_err(RunError::File)?;
        if mix == Mix::WriteFlush {
            file.sync_data().map_err(RunError::File)?;
        }
        let now = Instant::now();
        if measuring {
            result.count(step.is_read, now - issued);
            result.reached(now - start, now - last, 1);
            let operations = result.reads + result.writes;
            let out_of_time = limits.time.is_some_and(|time| now - start >= time);
            if out_of_time || limits.count.is_some_and(|count| operations >= count) {
                break;
            }
        } else if now - start >= limits.warmup {
            measuring = true;
            start = now;
        }
        last = now;
    }
    if result.latency.is_empty() {
        return Err(RunError::Nothing);
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failure here is the test's failure")]

    use std::time::Duration;

    use super::*;
    use crate::load::workload::{Pattern, Workload};

    #[test]
    fn every_block_is_written_once_and_counted() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(16 * 4096).unwrap();
        let workload = Workload {
            pattern: Pattern::Once {
                stride_bytes: 4096,
                skip: 0,
            },
            mix: Mix::WriteFlush,
            block_bytes: 4096,
            start: 0,
            len: 16 * 4096,
            seed: 3,
        };
        let limits = Limits {
            warmup: Duration::ZERO,
            time: None,
            count: None,
            server_pid: None,
            slice: Duration::from_millis(1),
        };
        let steps = Steps::new(&workload, 16 * 4096).unwrap();
        let result = run_straight(&file, steps, Mix::WriteFlush, 4096, &limits, 3).unwrap();
        assert_eq!((result.reads, result.writes), (0, 16));
        assert_eq!(result.latency.len(), 16);
        let counted: u64 = result.timeline.unwrap().counts().iter().sum();
        assert_eq!(counted, 16);
        let mut written = vec![0; 16 * 4096];
        file.read_exact_at(&mut written, 0).unwrap();
        assert!(
            written
                .chunks(4096)
                .all(|block| block.iter().any(|byte| *byte != 0))
        );
    }
}
