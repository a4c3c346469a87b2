//! What the host knows of this process: descriptors, threads, mappings. What one input takes must be gone before the next.

use std::fs;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How long a thread that was waited for may take to leave the host's list.
const DEADLINE: Duration = Duration::from_secs(5);

/// Inputs between two looks at the host, which are dear. What leaks at all leaks at one of them.
const PERIOD: u32 = 16;

/// Inputs so far.
static INPUTS: AtomicU32 = AtomicU32::new(0);

/// Plays an input, and checks now and then that nothing of it is left.
///
/// # Panics
/// If there is.
pub fn leaves_nothing(play: impl FnOnce()) {
    // The first input of a process sets a signal handler and other things that stay.
    let looks = INPUTS.fetch_add(1, Ordering::Relaxed) % PERIOD == 1;
    let before = looks.then(Holdings::now);
    play();
    if let Some(before) = before {
        before.assert_no_more();
    }
}

/// What this process has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Open descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
    /// Mappings of memory that others share.
    pub shared: usize,
}

impl Holdings {
    /// What it has now.
    pub fn now() -> Self {
        let count = |path| fs::read_dir(path).map_or(0, |entries| entries.count());
        let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
        Self {
            descriptors: count("/proc/self/fd"),
            threads: count("/proc/self/task"),
            shared: maps
                .lines()
                .filter(|line| line.contains("/memfd:guest"))
                .count(),
        }
    }

    /// Checks that it has no more than it had.
    ///
    /// # Panics
    /// If it still has after a while.
    pub fn assert_no_more(&self) {
        let began = Instant::now();
        loop {
            let now = Self::now();
            let more = now.descriptors > self.descriptors
                || now.threads > self.threads
                || now.shared > self.shared;
            if !more {
                return;
            }
            assert!(
                began.elapsed() < DEADLINE,
                "left over: {now:?}, before: {self:?}"
            );
            std::thread::yield_now();
        }
    }
}
