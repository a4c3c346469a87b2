//! Waits with a deadline, so that no test sleeps and none hangs.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::os::fd::{AsFd, OwnedFd};

/// How long an answer that must come may take, on a machine that is busy with other tests.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How long a test watches for something that must not happen.
pub const QUIET: Duration = Duration::from_millis(60);

/// Waits until one of the file descriptors is readable (or hung up) and tells which are; all false after `timeout`.
pub fn readable<const N: usize>(fds: [BorrowedFd<'_>; N], timeout: Duration) -> [bool; N] {
    let deadline = Instant::now() + timeout;
    let mut entries = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    loop {
        let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now()))
            .expect("a short time fits");
        match poll(&mut entries, Some(&left)) {
            Ok(_) => return entries.each_ref().map(|entry| !entry.revents().is_empty()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("poll failed: {error}"),
        }
    }
}

/// Repeats `probe` until it is true; false after [`PATIENCE`]. For states of the host that no descriptor announces.
pub fn until(mut probe: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    let timer = event();
    loop {
        if probe() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        readable([timer.as_fd()], Duration::from_millis(2));
    }
}

/// A new event descriptor that never blocks its reader.
pub fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
}

/// Adds one to an event descriptor.
pub fn signal(fd: impl AsFd) {
    rustix::io::write(fd, &1_u64.to_le_bytes()).expect("an eventfd takes a signal");
}

/// Takes the count of an event descriptor; 0 if nobody signalled it.
pub fn take_signals(fd: impl AsFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(fd, &mut count) {
        Ok(_) => u64::from_le_bytes(count),
        Err(rustix::io::Errno::AGAIN) => 0,
        Err(error) => panic!("reading an eventfd failed: {error}"),
    }
}
