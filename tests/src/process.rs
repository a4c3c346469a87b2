//! What the host tells about a process from outside.

use std::fs;
use std::path::PathBuf;
use std::process::Child;

/// What a process has of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Descriptors.
    pub fds: usize,
    /// Threads.
    pub threads: usize,
    /// Memory, in KiB.
    pub resident_kib: usize,
    /// Mappings of the memory of guests of ours.
    pub guest_mappings: usize,
}

impl Holdings {
    /// What it has now.
    ///
    /// # Panics
    /// It does not run.
    #[track_caller]
    pub fn of(pid: u32) -> Self {
        let path = |name| format!("/proc/{pid}/{name}");
        let count = |name| fs::read_dir(path(name)).expect("it runs").count();
        let status = fs::read_to_string(path("status")).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let word = line.and_then(|line| line.split_whitespace().next());
        let maps = fs::read_to_string(path("maps")).expect("it runs");
        Self {
            fds: count("fd"),
            threads: count("task"),
            resident_kib: word.and_then(|word| word.parse().ok()).expect("a number"),
            guest_mappings: maps
                .lines()
                .filter(|line| line.contains("/memfd:guest"))
                .count(),
        }
    }

    /// Whether it is no more than that, each by itself.
    pub const fn fit_in(&self, most: &Self) -> bool {
        self.fds <= most.fds
            && self.threads <= most.threads
            && self.resident_kib <= most.resident_kib
            && self.guest_mappings <= most.guest_mappings
    }
}

impl std::ops::Add for Holdings {
    type Output = Self;

    fn add(self, more: Self) -> Self {
        Self {
            fds: self.fds + more.fds,
            threads: self.threads + more.threads,
            resident_kib: self.resident_kib + more.resident_kib,
            guest_mappings: self.guest_mappings + more.guest_mappings,
        }
    }
}

/// A process under watch.
#[derive(Debug)]
pub struct Process {
    /// The child.
    pub child: Child,
}

impl Process {
    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("a child of ours").is_none()
    }

    /// How many file descriptors it has open.
    pub fn open_fds(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id()))
            .expect("a living process")
            .count()
    }

    /// How much memory it holds, in KiB.
    pub fn resident_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))
            .expect("a living process");
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .expect("VmRSS");
        line.split_whitespace()
            .nth(1)
            .and_then(|word| word.parse().ok())
            .expect("a number")
    }

    /// How many mappings of memory files it has.
    pub fn memfd_mappings(&self) -> usize {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.child.id()))
            .expect("a living process");
        maps.lines()
            .filter(|line| line.contains("/memfd:guest"))
            .count()
    }

    /// Asks it to end (SIGTERM).
    pub fn terminate(&self) {
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        rustix::process::kill_process(pid.expect("a pid"), rustix::process::Signal::TERM)
            .expect("a child of ours");
    }

    /// Ends it at once (SIGKILL) and waits for its end.
    pub fn kill(&mut self) {
        self.child.kill().expect("a child of ours");
        self.child.wait().expect("a child of ours");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// Ends a child at once, if it still runs, and removes what it would leave in shared memory for a next one: there is none.
pub fn end(child: &mut Child) {
    // Of a child that was waited for, the number may be another's by now.
    let caches = match child.try_wait() {
        Ok(None) => caches(child.id()),
        _ => Vec::new(),
    };
    // It may have ended already; then there is nobody to kill.
    drop(child.kill());
    drop(child.wait());
    for path in caches {
        // It goes by itself with an orderly end, or with its folder.
        drop(fs::remove_file(path));
    }
}

/// The caches of daemons that a process has mapped.
fn caches(pid: u32) -> Vec<PathBuf> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let paths = maps
        .lines()
        .filter_map(|line| Some(PathBuf::from(&line[line.find('/')?..])));
    let is_cache = |path: &PathBuf| {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        name.starts_with("stratablk-") && name.ends_with(".cache")
    };
    let mut paths: Vec<PathBuf> = paths.filter(is_cache).collect();
    paths.dedup();
    paths
}
