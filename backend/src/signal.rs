//! An event fd of our own, by which one thread wakes another that waits for descriptors.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A flag that can be waited for. Reads and writes never block.
#[derive(Debug)]
pub struct Signal(EventFd);

impl Signal {
    /// A flag that is down.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?))
    }

    /// Another handle of the same flag.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// Puts the flag up: the descriptor is readable.
    pub fn raise(&self) {
        // EAGAIN: the counter is full, so the flag is up.
        let _ = self.0.write(1);
    }

    /// Takes the flag down. Returns whether it was up; of several that try, one gets it.
    pub fn take(&self) -> bool {
        self.0.read().is_ok()
    }

    /// Whether the flag is up, which it stays.
    pub fn is_up(&self) -> bool {
        let mut fds = [PollFd::new(self, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// Takes the flag down.
    pub fn lower(&self) {
        // EAGAIN: it was down.
        let _ = self.0.read();
    }
}

impl AsFd for Signal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        #[expect(
            unsafe_code,
            reason = "`EventFd` lends its descriptor only as a number"
        )]
        // SAFETY: the descriptor is open for as long as the event fd is borrowed, and so is what is returned.
        unsafe {
            BorrowedFd::borrow_raw(self.0.as_raw_fd())
        }
    }
}

impl AsRawFd for Signal {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
