//! The processes around a run: CPU time of the back-end, the CPU of this thread.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rustix::thread::{CpuSet, sched_setaffinity};

/// CPU time that a process used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuTime {
    /// In user mode.
    pub user: Duration,
    /// In the kernel.
    pub system: Duration,
}

impl CpuTime {
    /// What was used since `earlier`.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            user: self.user.saturating_sub(earlier.user),
            system: self.system.saturating_sub(earlier.system),
        }
    }
}

/// The CPU time of all threads of process `pid` so far, in steps of the kernel's tick (10 ms as a rule).
///
/// # Errors
/// If there is no such process.
pub fn cpu_time(pid: u32) -> io::Result<CpuTime> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let ticks = rustix::param::clock_ticks_per_second();
    parse_stat(&stat, ticks).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("/proc/{pid}/stat: {stat:?}"),
        )
    })
}

/// Fields 14 and 15 of a `stat` line. The name in parentheses may hold anything, so counting starts after its last ")".
fn parse_stat(stat: &str, ticks_per_second: u64) -> Option<CpuTime> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let mut next = || {
        let ticks: u64 = fields.next()?.parse().ok()?;
        let nanoseconds = ticks
            .checked_mul(1_000_000_000)?
            .checked_div(ticks_per_second)?;
        Some(Duration::from_nanos(nanoseconds))
    };
    Some(CpuTime {
        user: next()?,
        system: next()?,
    })
}

/// How long threads have waited for a CPU while they could have run. Hosts that do not count that say 0.
#[derive(Debug)]
pub struct CpuWaits {
    /// The kernel's files of the threads.
    files: Vec<fs::File>,
}

impl CpuWaits {
    /// Of the calling thread, and of those of process `pid` whose names start like this.
    ///
    /// # Errors
    /// There is no such process.
    pub fn new(pid: u32, names: &str) -> io::Result<Self> {
        let mut files = Vec::from_iter(fs::File::open("/proc/thread-self/schedstat"));
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let task = task?.path();
            // One that has ended meanwhile waits for nothing.
            let name = fs::read_to_string(task.join("comm")).unwrap_or_default();
            if name.starts_with(names) {
                files.extend(fs::File::open(task.join("schedstat")));
            }
        }
        Ok(Self { files })
    }

    /// How long so far.
    pub fn so_far(&self) -> Duration {
        let times = self.files.iter().filter_map(|file| {
            let mut text = [0; 64];
            let read = file.read_at(&mut text, 0).ok()?;
            let text = std::str::from_utf8(text.get(..read)?).ok()?;
            let nanoseconds = text.split_ascii_whitespace().nth(1)?;
            Some(Duration::from_nanos(nanoseconds.parse().ok()?))
        });
        times.sum()
    }
}

/// Keeps the calling thread on one CPU.
///
/// # Errors
/// If there is no such CPU or it may not be used.
pub fn pin_to_cpu(cpu: usize) -> io::Result<()> {
    if cpu >= CpuSet::MAX_CPU {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("there is no CPU {cpu}"),
        ));
    }
    let mut set = CpuSet::new();
    set.set(cpu);
    Ok(sched_setaffinity(None, &set)?)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failure here is the test's failure")]

    use super::*;

    #[test]
    fn the_name_of_a_process_may_hold_anything() {
        let stat = "12 (a) b (c) S 1 12 12 0 -1 4194560 1 2 3 4 150 25 7 8 20 0 3 0";
        let time = parse_stat(stat, 100).unwrap();
        assert_eq!(time.user, Duration::from_millis(1500));
        assert_eq!(time.system, Duration::from_millis(250));
    }

    #[test]
    fn this_process_uses_cpu_time() {
        let before = cpu_time(std::process::id()).unwrap();
        let start = std::time::Instant::now();
        let used = loop {
            let used = cpu_time(std::process::id()).unwrap().since(&before);
            if used.user + used.system > Duration::ZERO || start.elapsed() > Duration::from_secs(10)
            {
                break used;
            }
        };
        assert!(used.user + used.system > Duration::ZERO);
    }

    #[test]
    fn a_process_that_is_not_there_is_an_error() {
        assert!(cpu_time(u32::MAX).is_err());
    }
}
