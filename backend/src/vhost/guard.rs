//! What happens when memory that a front-end shares goes away: the front-end loses its disk, and nobody else notices.
//!
//! A front-end can cut the file behind its memory at any moment. The next access of ours to a page behind the new end raises
//! SIGBUS, which ends the process. Here is a handler that puts anonymous pages of zeroes in place of such memory and
//! notes that it is lost. The interrupted access goes on, with zeroes or into the void; whoever made it looks at the note
//! before it believes anything that it has read, and before it tells anybody that it is done ([`losses`]).
//!
//! # The whole region, not the page
//! One mapping is replaced by one mapping. Page by page, each page would become a mapping of its own, and a front-end that
//! has every second page touched would use up the mappings that the host allows a process, for everybody; pages of hugetlbfs
//! cannot be replaced one by one at all; and each page would fault again. What is left of the region is of no use
//! anyway: its front-end has broken the promise that all else rests on, so all its rings stop. Replacing a region twice,
//! when two threads fault at once, puts zeroes in place of zeroes.
//!
//! # What the handler may do
//! It runs in the midst of anything. So it takes no lock, allocates nothing, logs nothing: it reads a table of fixed
//! size, stores two atomics and makes one `mmap`. POSIX does not list `mmap` among the functions that a handler may call,
//! because a library might do more than the system call; `rustix` makes the bare system call, which touches neither
//! `errno` nor any lock of this process. A fault that is not ours goes to whoever had the signal before (the Rust runtime,
//! which reports stack overflows), or ends the process, as it would without us.
//!
//! If the replacement is refused the process ends as well. That takes a host that counts every private page beforehand
//! (`vm.overcommit_memory` = 2) and has no room for as many as the region has.
//!
//! INVARIANT: an entry is in the table while its region is mapped, and is gone before it is unmapped. A thread faults on a
//! region only while somebody keeps it mapped; so the entry that the handler looks for never changes under it.

use std::ffi::{c_int, c_void};
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::mm::{MapFlags, ProtFlags};

/// How many regions can be guarded at once: as many as the host allows a process mappings, unless it was told otherwise
/// (`vm.max_map_count` is 65,530). What is not used of the table takes no memory.
const REGIONS_MAX: usize = 1 << 16;

/// A place for a region in the table.
///
/// Changed under the lock of [`BOOKS`], read by the handler without it: an odd version, or one that has changed when the
/// fields have been read, means that somebody is changing the entry, so that it cannot be the one that is looked for.
#[derive(Debug)]
struct Entry {
    /// Counts the changes of the next two, twice each.
    version: AtomicU32,
    /// Whether the region was replaced by zeroes.
    lost: AtomicBool,
    /// Its first address.
    start: AtomicUsize,
    /// Its bytes; 0: no region.
    len: AtomicUsize,
}

/// Something on cache lines of its own: all workers look at it all the time, and must not wait for who writes beside it.
#[derive(Debug)]
#[repr(align(128))]
struct Alone<T>(T);

/// The part of the bookkeeping that the handler does not read.
#[derive(Debug)]
struct Books {
    /// Whether the handler is set.
    installed: bool,
    /// Entries before [`USED`] that are free.
    free: Vec<&'static Entry>,
}

/// The regions. Static, since the handler has nothing else to find them by.
static TABLE: [Entry; REGIONS_MAX] = [const { Entry::empty() }; REGIONS_MAX];
/// Entries behind this many were never used.
static USED: AtomicUsize = AtomicUsize::new(0);
/// How many regions were lost so far, wrapping around.
static LOSSES: Alone<AtomicU32> = Alone(AtomicU32::new(0));
/// What whoever changes the table needs besides.
static BOOKS: Mutex<Books> = Mutex::new(Books {
    installed: false,
    free: Vec::new(),
});
/// Who had the signal before. Set before the handler is.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// How many regions were lost so far, in the whole process: if that has not changed, neither has any region's
/// [`Guarded::is_lost`]. Costs one load of a word that is hardly ever written.
///
/// ORDERING: the fence keeps the load behind all loads before it. So who reads the same number before and after reading
/// guest memory has read what the guest put there: the handler counts before it puts zeroes in place. A thread that
/// stores to guest memory, and wants to know that it was not the void, needs a SeqCst fence between the stores and this.
#[inline]
pub fn losses() -> u32 {
    fence(Ordering::Acquire);
    LOSSES.0.load(Ordering::Relaxed)
}

/// A region of foreign memory that may go away without ending this process. To be dropped before it is unmapped.
#[derive(Debug)]
pub struct Guarded(&'static Entry);

impl Guarded {
    /// Guards a mapping of `len` bytes at `start`, both multiples of its page size. Nothing but foreign bytes may lie there,
    /// which are reached by volatile and atomic accesses only: the pages may be replaced at any time.
    ///
    /// # Errors
    /// `OutOfMemory` if too many regions are guarded; the host's refusal of a signal handler.
    pub fn new(start: usize, len: usize) -> io::Result<Self> {
        let mut books = BOOKS.lock().unwrap_or_else(PoisonError::into_inner);
        if !books.installed {
            install()?;
            books.installed = true;
        }
        let entry = match books.free.pop() {
            Some(entry) => entry,
            None => {
                let used = USED.load(Ordering::Relaxed);
                let entry = TABLE.get(used).ok_or_else(|| {
                    io::Error::new(
                        io::ErrorKind::OutOfMemory,
                        format!("more than {REGIONS_MAX} mappings of front-ends' memory"),
                    )
                })?;
                // ORDERING: Relaxed; written under the lock. A handler that looks for this entry runs on a thread that was
                // given the region afterwards, and so sees this too.
                USED.store(used + 1, Ordering::Relaxed);
                entry
            }
        };
        entry.lost.store(false, Ordering::Relaxed);
        entry.change(start, len);
        Ok(Self(entry))
    }

    /// Whether the region was replaced by zeroes. Exact once [`losses`] has been looked at.
    pub fn is_lost(&self) -> bool {
        self.0.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let mut books = BOOKS.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.change(0, 0);
        books.free.push(self.0);
    }
}

impl Entry {
    /// An entry of no region.
    const fn empty() -> Self {
        Self {
            version: AtomicU32::new(0),
            lost: AtomicBool::new(false),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
        }
    }

    /// Makes it the entry of another region. One thread at a time.
    ///
    /// ORDERING: the Release fence keeps the fields behind the odd version, the Release store keeps the even one behind the
    /// fields; they pair with the Acquire fence and the Acquire load in `claims`.
    fn change(&self, start: usize, len: usize) {
        let version = self.version.load(Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(2), Ordering::Release);
    }

    /// The region, if it holds this address.
    ///
    /// ORDERING: see `change`.
    fn claims(&self, address: usize) -> Option<(usize, usize)> {
        let version = self.version.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Relaxed);
        let len = self.len.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let whole = version.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == version;
        (whole && address.checked_sub(start)? < len).then_some((start, len))
    }

    /// Puts zeroes in place of the region, which is `start` and `len`. Returns whether that went well.
    ///
    /// ORDERING: the note and the count come before the zeroes can be read: they are SeqCst, and the system call is a full
    /// barrier, as is the fault by which another thread comes to the new pages. The count comes after the note (Release), so
    /// that who sees the count (and its Acquire fence) sees the note.
    fn replace(&self, start: usize, len: usize) -> bool {
        if !self.lost.swap(true, Ordering::SeqCst) {
            LOSSES.0.fetch_add(1, Ordering::SeqCst);
        }
        let place: *mut c_void = ptr::with_exposed_provenance_mut(start);
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        #[expect(unsafe_code, reason = "replacing a mapping in place")]
        // SAFETY:
        // - The range is exactly one mapping of ours, and stays so while this runs: the interrupted access is to it.
        // - It can be read and written as before, and holds bytes that anybody may change anyway.
        let mapped = unsafe {
            rustix::mm::mmap_anonymous(place, len, ProtFlags::READ | ProtFlags::WRITE, flags)
        };
        mapped.is_ok()
    }
}

/// Takes the signal over.
fn install() -> io::Result<()> {
    let previous = set_action(None)?;
    // Set already if the last attempt failed behind this point; nothing has changed since.
    PREVIOUS.get_or_init(|| previous);
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_sigbus;
    let mut action = default_action();
    action.sa_sigaction = handler as usize;
    // On the stack that the Rust runtime gives each thread for signals.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    set_action(Some(&action)).map(drop)
}

/// What the kernel does unless told otherwise.
fn default_action() -> libc::sigaction {
    #[expect(unsafe_code, reason = "a plain structure of C")]
    // SAFETY: numbers, a set of bits and an optional pointer; zero means the default action, no flags, an empty mask.
    unsafe {
        std::mem::zeroed()
    }
}

/// Tells the kernel what to do at SIGBUS, if anything, and returns what it did before. Fit for the handler.
fn set_action(action: Option<&libc::sigaction>) -> io::Result<libc::sigaction> {
    let mut before = default_action();
    let action = action.map_or(ptr::null(), ptr::from_ref);
    #[expect(unsafe_code, reason = "signal actions are C")]
    // SAFETY: both structures live until it returns; the handler, if one is set, is fit for its flags.
    let result = unsafe { libc::sigaction(libc::SIGBUS, action, &raw mut before) };
    match result {
        0 => Ok(before),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The handler.
extern "C" fn on_sigbus(number: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    #[expect(unsafe_code, reason = "what the kernel hands to a handler")]
    // SAFETY: the kernel hands out a whole structure with SA_SIGINFO.
    let facts = unsafe { &*info };
    // Of the other codes some carry no address: the signal may come from `kill`.
    if matches!(facts.si_code, libc::BUS_ADRERR | libc::BUS_MCEERR_AR) {
        #[expect(unsafe_code, reason = "the address is part of a union")]
        // SAFETY: with these codes it is the address of the fault.
        let address = unsafe { facts.si_addr() }.addr();
        // ORDERING: Relaxed; see where it is stored.
        let used = USED.load(Ordering::Relaxed);
        let found = TABLE
            .iter()
            .take(used)
            .find_map(|entry| Some((entry, entry.claims(address)?)));
        if let Some((entry, (start, len))) = found
            && entry.replace(start, len)
        {
            return;
        }
    }
    pass_on(number, info, context);
}

/// A signal that is not ours: does what would have been done without us.
fn pass_on(number: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let previous = PREVIOUS.get();
    let before = previous.map_or(libc::SIG_DFL, |action| action.sa_sigaction);
    if before == libc::SIG_DFL || before == libc::SIG_IGN {
        // The kernel lets nobody ignore a fault. Another signal is sent, since the one at hand need not have been a fault; it
        // arrives when this handler returns.
        let _ = set_action(Some(&default_action()));
        #[expect(unsafe_code, reason = "sends a signal")]
        // SAFETY: takes a number.
        unsafe {
            libc::raise(number)
        };
    } else if previous.is_some_and(|action| action.sa_flags & libc::SA_SIGINFO != 0) {
        type Detailed = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);
        #[expect(unsafe_code, reason = "handlers are kept as numbers")]
        // SAFETY: with that flag the kernel called it as such a function.
        let handler = unsafe { std::mem::transmute::<usize, Detailed>(before) };
        handler(number, info, context);
    } else {
        #[expect(unsafe_code, reason = "handlers are kept as numbers")]
        // SAFETY: without that flag the kernel called it as such a function.
        let handler = unsafe { std::mem::transmute::<usize, extern "C" fn(c_int)>(before) };
        handler(number);
    }
}

#[cfg(test)]
mod tests;
