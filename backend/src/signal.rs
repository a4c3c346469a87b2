//! An event fd of our own, by which one thread wakes another that waits for descriptors.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::EventfdFlags;

/// A flag that can be waited for. Reads and writes never block.
#[derive(Debug)]
pub struct Signal(OwnedFd);

impl Signal {
    /// A flag that is down.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(fd))
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
        let _ = rustix::io::write(&self.0, &[1, 0, 0, 0, 0, 0, 0, 0]);
    }

    /// Takes the flag down.
    pub fn lower(&self) {
        let mut count = [0u8; 8];
        // EAGAIN: it was down.
        let _ = rustix::io::read(&self.0, &mut count);
    }
}

impl AsFd for Signal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Signal {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
