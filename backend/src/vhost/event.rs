//! The event fds of a ring: kicks from the guest, calls and errors to it.
//!
//! They come from the front-end, so only real event fds are accepted: a pipe or a file in their place could make a
//! worker block in a read or a write.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::io::ReadWriteFlags;

/// The number 1 in the byte order of the machines that this runs on; any non-zero number would do.
const ONE: [u8; 8] = [1, 0, 0, 0, 0, 0, 0, 0];

/// An event fd of the front-end's.
#[derive(Debug)]
pub struct Event {
    /// The descriptor.
    fd: Arc<OwnedFd>,
    /// Whether reads and writes of it may block. The flag belongs to the front-end too, so we do not change it.
    blocking: bool,
}

impl Event {
    /// Takes a descriptor that came with a message.
    ///
    /// # Errors
    /// `InvalidInput` if it is no event fd.
    pub fn new(file: File) -> io::Result<Self> {
        let fd = Arc::new(OwnedFd::from(file));
        let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
        // Without /proc there is no telling; such a front-end can then only stall its own worker.
        if let Ok(target) = rustix::fs::readlink(link, Vec::new())
            && target.as_bytes() != b"anon_inode:[eventfd]"
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the descriptor is no event fd",
            ));
        }
        let blocking = !rustix::fs::fcntl_getfl(&fd)?.contains(OFlags::NONBLOCK);
        Ok(Self { fd, blocking })
    }

    /// The descriptor.
    pub fn descriptor(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.fd)
    }

    /// Wakes whoever waits for it. An event that is full already wakes them as well, so nothing is lost.
    pub fn signal(&self) {
        if self.blocking {
            // A full counter would block the write for as long as the front-end likes.
            let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
            let now = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            match rustix::event::poll(&mut fds, Some(&now)) {
                Ok(ready) if ready > 0 => {}
                _ => return,
            }
        }
        // EAGAIN: the counter is full, so the event is signalled. Nothing else can go wrong with an event fd.
        let _ = rustix::io::write(&self.fd, &ONE);
    }

    /// Takes back the signals that nobody has waited for, if there are any. Does not block.
    pub fn drain(&self) {
        let mut count = [0; 8];
        let mut buffers = [io::IoSliceMut::new(&mut count)];
        // EAGAIN: there were none.
        let _ = rustix::io::preadv2(&self.fd, &mut buffers, u64::MAX, ReadWriteFlags::NOWAIT);
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Event {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// How a ring's guest says that there is work.
#[derive(Debug)]
pub enum Kick {
    /// By an event fd.
    Event(Event),
    /// Not at all: the ring must be looked at from time to time.
    Poll,
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]
    use std::os::fd::FromRawFd;
    use std::os::fd::IntoRawFd;

    use super::*;
    use vmm_sys_util::eventfd::EventFd;

    fn file_of(event: EventFd) -> File {
        #[expect(unsafe_code, reason = "the event fd is given away")]
        // SAFETY: `into_raw_fd` gave up ownership.
        unsafe {
            File::from_raw_fd(event.into_raw_fd())
        }
    }

    #[test]
    fn signals_and_drains_without_blocking() {
        for flags in [0, libc::EFD_NONBLOCK] {
            let theirs = EventFd::new(flags).unwrap();
            let ours = Event::new(file_of(theirs.try_clone().unwrap())).unwrap();
            ours.signal();
            ours.signal();
            assert_eq!(theirs.read().unwrap(), 2);
            ours.drain();
            theirs.write(7).unwrap();
            ours.drain();
            ours.signal();
            assert_eq!(theirs.read().unwrap(), 1);
        }
    }

    #[test]
    fn a_full_counter_does_not_block() {
        for flags in [0, libc::EFD_NONBLOCK] {
            let theirs = EventFd::new(flags).unwrap();
            theirs.write(u64::MAX - 1).unwrap();
            let ours = Event::new(file_of(theirs.try_clone().unwrap())).unwrap();
            ours.signal();
            assert_eq!(theirs.read().unwrap(), u64::MAX - 1);
        }
    }

    #[test]
    fn only_event_fds_are_accepted() {
        let (reader, writer) = std::io::pipe().unwrap();
        assert!(Event::new(File::from(OwnedFd::from(reader))).is_err());
        assert!(Event::new(File::from(OwnedFd::from(writer))).is_err());
        assert!(Event::new(File::open("/dev/null").unwrap()).is_err());
    }
}
