//! A store with one attached volume over a base full of stamped data, and who kills the daemon that serves it.

use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::home::{Cache, Home};
use super::oracle::Oracle;
use crate::daemon::Daemon;

/// The volume.
pub const VOLUME: &str = "disk";
/// Its queues.
pub const QUEUES: usize = 2;

/// All that outlives a daemon.
#[derive(Debug)]
pub struct Rig(Home);

impl Deref for Rig {
    type Target = Home;

    fn deref(&self) -> &Home {
        &self.0
    }
}

impl Rig {
    /// Makes a base that holds what the oracle says, and a store with a volume over it. `in_memory`: on tmpfs.
    ///
    /// # Panics
    /// The host or the daemon refuses.
    pub fn new(oracle: &Oracle, in_memory: bool, cache: Cache) -> Self {
        let rig = Self(Home::new("kill", in_memory, cache));
        rig.image("base.img", oracle);
        let (image, socket) = (rig.path("base.img"), rig.socket());
        let (image, socket) = (image.display(), socket.display());
        rig.set_up(&[
            format!("volume create {VOLUME} --base {image}"),
            format!("volume attach {VOLUME} --queues {QUEUES} --socket {socket}"),
        ]);
        rig
    }

    /// The volume's socket.
    pub fn socket(&self) -> PathBuf {
        self.path("disk.sock")
    }
}

/// Kills a daemon at some instant, from a thread of its own.
#[derive(Debug)]
pub struct Killer {
    /// Set just before the kill.
    killed: Arc<AtomicBool>,
    /// Ends with the kill.
    thread: JoinHandle<()>,
}

impl Killer {
    /// Kills `daemon` after that time, unless it ends before.
    ///
    /// # Panics
    /// The host refuses.
    pub fn start(daemon: &Daemon, delay: Duration) -> Self {
        Self::of_process(daemon.pid(), delay)
    }

    /// The same of any process of ours that was not waited for.
    ///
    /// # Panics
    /// The host refuses.
    pub fn of_process(pid: u32, delay: Duration) -> Self {
        let pid = rustix::process::Pid::from_raw(i32::try_from(pid).expect("a pid"));
        let pidfd = pidfd_open(pid.expect("not 0"), PidfdFlags::empty());
        let pidfd: OwnedFd = pidfd.expect("the daemon was not waited for");
        let killed = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&killed);
        let thread = thread::spawn(move || {
            let timeout = Timespec::try_from(delay).expect("a short time");
            let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
            // However it ends: an early end of the daemon shows when it is waited for.
            let _ = poll(&mut fds, Some(&timeout));
            flag.store(true, Ordering::Relaxed);
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        });
        Self { killed, thread }
    }

    /// Readable by whoever drives the load: time to look at what became of the daemon.
    pub fn flag(&self) -> &AtomicBool {
        &self.killed
    }

    /// Waits for the kill.
    ///
    /// # Panics
    /// The thread did.
    pub fn finish(self) {
        self.thread.join().expect("the killer");
    }
}
