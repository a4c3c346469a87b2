//! How one queue context hands something to another: a short list and an event fd. For flush groups only; no guest
//! read or write passes here.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use crate::flush::zeroes::ZeroRange;
use crate::map::fault::{self, Fault};
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
    /// Whether there may be letters.
    notice: Notice<OwnedFd>,
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
            notice: Notice::new(event),
        })
    }

    /// Puts a letter in and wakes the owner.
    pub fn send(&self, letter: Mail) {
        self.letters
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(letter);
        self.notice.give();
    }

    /// Takes all letters. Cheap if there are none.
    pub fn take(&self) -> Vec<Mail> {
        if !self.notice.take() {
            return Vec::new();
        }
        std::mem::take(&mut *self.letters.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Becomes readable when there are letters.
    pub fn wake_fd(&self) -> RawFd {
        self.notice.event.as_raw_fd()
    }
}

/// What wakes a thread that sleeps: it stays set until it is reset.
trait Event {
    /// Wakes the thread.
    fn set(&self);
    /// Lets it sleep again.
    fn reset(&self);
}

impl Event for OwnedFd {
    fn set(&self) {
        // The counter of an event fd cannot overflow with one letter a request; a full counter has woken the owner anyway.
        let _ = rustix::io::write(self, &ONE);
    }

    fn reset(&self) {
        let mut counter = [0u8; 8];
        // Nothing to read means that another call has reset the counter already.
        let _ = rustix::io::read(self, &mut counter);
    }
}

/// That there is something to take, for an owner who sleeps and for one who is at work and looks now and then.
#[derive(Debug)]
struct Notice<E> {
    /// Lets the owner look without a system call.
    flag: AtomicBool,
    /// Wakes the owner.
    event: E,
}

impl<E: Event> Notice<E> {
    /// Nothing is there.
    fn new(event: E) -> Self {
        Self {
            flag: AtomicBool::new(false),
            event,
        }
    }

    /// Something was put there.
    fn give(&self) {
        // ORDERING: Release, after what was put there; pairs with the swap in `take`. Before the event: who is woken by it has
        // a CPU at once, often this thread's own, and would find nothing, be woken again, and so on until this thread is
        // given one again: milliseconds.
        if !fault::planted(Fault::WakeBeforeFlag) {
            self.flag.store(true, Ordering::Release);
        }
        self.event.set();
        // ORDERING: Release, as above. Once more: an owner who took it in between, since it was at work, has the event set
        // behind it and the flag clear, and would be woken for ever. It looks once for nothing instead.
        if !fault::planted(Fault::FlagOnlyBeforeWake) {
            self.flag.store(true, Ordering::Release);
        }
    }

    /// Whether there may be something.
    fn take(&self) -> bool {
        // ORDERING: the plain load only saves work: what it misses has also set the event, which stays so until a call that
        // sees the flag, and so makes the owner look again. The swap is Acquire; pairs with the Releases in `give`.
        if !self.flag.load(Ordering::Relaxed) || !self.flag.swap(false, Ordering::Acquire) {
            return false;
        }
        self.event.reset();
        true
    }
}

/// The increment of the event fd, in the byte order of the machine, as the kernel wants it.
#[expect(
    clippy::host_endian_bytes,
    reason = "a value for the kernel of this machine, not a format"
)]
const ONE: [u8; 8] = 1u64.to_ne_bytes();

#[cfg(test)]
mod scenarios {
    //! One who puts something there and an owner who takes it: woken by the event, or at work and looking anyway.

    use super::*;
    use crate::sync::thread;

    /// An event of a model.
    #[derive(Debug)]
    struct Flag(AtomicBool);

    impl Event for Flag {
        fn set(&self) {
            // ORDERING: AcqRel, as strong as the kernel's counter.
            self.0.swap(true, Ordering::AcqRel);
        }
        fn reset(&self) {
            // ORDERING: as above.
            self.0.swap(false, Ordering::AcqRel);
        }
    }

    impl Flag {
        /// Whether it wakes the owner now.
        fn is_set(&self) -> bool {
            // ORDERING: as above.
            self.0.load(Ordering::Acquire)
        }
    }

    /// The owner looks once while it is at work (or not), sleeps, and must find what is there when it is woken.
    fn owner_is_woken(at_work: bool) {
        let notice = Arc::new(Notice::new(Flag(AtomicBool::new(false))));
        let giver = {
            let notice = Arc::clone(&notice);
            thread::spawn(move || notice.give())
        };
        let mut taken = at_work && notice.take();
        if notice.event.is_set() {
            let found = notice.take();
            assert!(found || taken, "woken for something that it cannot see");
            taken |= found;
        }
        giver.join().expect("the giver");
        while notice.event.is_set() {
            assert!(notice.take(), "woken for ever");
            taken = true;
        }
        assert!(taken, "never woken");
    }

    #[cfg(loom)]
    #[test]
    fn loom_mailbox_owner_asleep() {
        loom::model(|| owner_is_woken(false));
    }

    #[cfg(loom)]
    #[test]
    fn loom_mailbox_owner_at_work() {
        loom::model(|| owner_is_woken(true));
    }

    #[cfg(loom)]
    #[test]
    #[should_panic(expected = "woken for something that it cannot see")]
    fn loom_mailbox_caught_wake_before_flag() {
        fault::plant(Fault::WakeBeforeFlag);
        loom::model(|| owner_is_woken(false));
    }

    #[cfg(loom)]
    #[test]
    #[should_panic(expected = "woken for ever")]
    fn loom_mailbox_caught_flag_only_before_wake() {
        fault::plant(Fault::FlagOnlyBeforeWake);
        loom::model(|| owner_is_woken(true));
    }

    #[cfg(not(loom))]
    #[test]
    fn an_owner_finds_what_it_is_woken_for() {
        for at_work in [false, true] {
            for _ in 0..2000 {
                owner_is_woken(at_work);
            }
        }
    }
}
