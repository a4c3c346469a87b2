//! How one queue context hands something to another: a short list and an event fd. For flush groups only; no guest
//! read or write passes here.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use crate::flush::zeroes::ZeroRange;
use crate::sync::{AtomicBool, Ordering};
use crate::volume::RequestError;

/// A request that waits for a flush, and where it lives.
#[derive(Clone, Debug)]
pub struct Waiter {
    /// The context that owns the request.
    pub mailbox: Arc<Mailbox>,
    /// Its number there.
    pub request: usize,
    /// What is to be zeroed.
    pub zero: Option<ZeroRange>,
    /// Whether a flush is asked for, and not only that.
    pub flush: bool,
}

/// What can be handed over.
#[derive(Debug)]
pub enum Mail {
    /// The flush that a request waited for has ended.
    FlushDone {
        /// The request's number.
        request: usize,
        /// How the flush ended.
        result: Result<(), RequestError>,
    },
    /// A frame may be free for a request that was put aside.
    Retry {
        /// None will be for a long time: all that is dirty can be written nowhere.
        stuck: bool,
    },
    /// Those that wait for space on the host may try again.
    Room,
    /// The receiver carries out the next flush, for these (one of them its own).
    Lead(Vec<Waiter>),
}

/// The letters for one queue context.
#[derive(Debug)]
pub struct Mailbox {
    /// Letters not yet taken.
    letters: Mutex<Vec<Mail>>,
    /// Whether there may be letters: lets the owner look without the lock.
    flag: AtomicBool,
    /// Wakes the owner.
    event: OwnedFd,
}

impl Mailbox {
    /// An empty one.
    ///
    /// # Errors
    /// The host has no file descriptor left.
    pub fn new() -> std::io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            letters: Mutex::new(Vec::new()),
            flag: AtomicBool::new(false),
            event,
        })
    }

    /// Puts a letter in and wakes the owner.
    pub fn send(&self, letter: Mail) {
        self.letters
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(letter);
        // The counter of an event fd cannot overflow with one letter a request; a full counter has woken the owner anyway.
        // Before the flag: an owner that took the letter in between, for the sake of another one, would find the event fd
        // readable and the flag clear, and be woken for ever.
        let _ = rustix::io::write(&self.event, &ONE);
        // ORDERING: Release, after the letter; pairs with the swap in `take`.
        self.flag.store(true, Ordering::Release);
    }

    /// Takes all letters. Cheap if there are none.
    pub fn take(&self) -> Vec<Mail> {
        // ORDERING: the plain load only saves work: a letter that it misses has also written the event fd, which stays
        // readable until a call that sees the flag, and so makes the owner look again. The swap is Acquire; pairs with the
        // Release in `send`.
        if !self.flag.load(Ordering::Relaxed) || !self.flag.swap(false, Ordering::Acquire) {
            return Vec::new();
        }
        let mut counter = [0u8; 8];
        // Nothing to read means that another call has reset the counter already.
        let _ = rustix::io::read(&self.event, &mut counter);
        std::mem::take(&mut *self.letters.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Becomes readable when there are letters.
    pub fn wake_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

/// The increment of the event fd, in the byte order of the machine, as the kernel wants it.
#[expect(
    clippy::host_endian_bytes,
    reason = "a value for the kernel of this machine, not a format"
)]
const ONE: [u8; 8] = 1u64.to_ne_bytes();
