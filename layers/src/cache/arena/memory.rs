//! The pages of an arena in this process: sets first, frames after them, starting at a multiple of 2 MiB.

use std::fs::File;
use std::io;
use std::ptr::{self, NonNull};

use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::geometry::HUGE;

/// `madvise(2)`: replace the small pages of a range by huge ones, now. Not all C libraries have it.
const MADV_COLLAPSE: libc::c_int = 25;

/// Private memory of less than this has small pages: to zero huge ones would cost more than they are worth.
const HUGE_WORTH: usize = 8 * HUGE;

/// Mapped pages. Unmapped on drop.
#[derive(Debug)]
pub struct Memory {
    /// The first byte, at a multiple of 2 MiB.
    start: NonNull<u8>,
    /// Bytes that are mapped.
    len: usize,
}

#[expect(
    unsafe_code,
    reason = "a mapping belongs to the process, not to a thread"
)]
// SAFETY: the pointer is only handed out; who follows it answers for what it does there.
unsafe impl Send for Memory {}
#[expect(
    unsafe_code,
    reason = "a mapping belongs to the process, not to a thread"
)]
// SAFETY: as for `Send`; no method changes `self`.
unsafe impl Sync for Memory {}

/// The error of a length that no process can map.
fn too_large() -> io::Error {
    io::Error::from(rustix::io::Errno::NOMEM)
}

/// Unmaps pages that nothing refers to.
///
/// # Safety
/// The range was mapped by this module, as whole pages, and no one uses it any more.
#[expect(unsafe_code, reason = "unmapping")]
unsafe fn unmap(start: *mut u8, len: usize) {
    if len == 0 {
        return;
    }
    // SAFETY: passed on to the caller.
    let result = unsafe { rustix::mm::munmap(start.cast(), len) };
    // Fails only for a range that is not made of pages, or if a mapping is to be cut in two and there are too many;
    // then the pages stay, which harms no one.
    debug_assert!(result.is_ok(), "munmap: {result:?}");
}

impl Memory {
    /// Addresses for `len` bytes, at a multiple of 2 MiB, with nothing behind them yet.
    fn addresses(len: u64) -> io::Result<Self> {
        let len = usize::try_from(len)
            .ok()
            .and_then(|len| len.checked_next_multiple_of(rustix::param::page_size()))
            .filter(|len| *len > 0)
            .ok_or_else(too_large)?;
        let room = len.checked_add(HUGE).ok_or_else(too_large)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        #[expect(unsafe_code, reason = "reserving addresses")]
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing that exists.
        let found = unsafe {
            rustix::mm::mmap_anonymous(ptr::null_mut(), room, ProtFlags::empty(), flags)
        }?;
        let found: *mut u8 = found.cast();
        let before = found.addr().next_multiple_of(HUGE) - found.addr();
        let start = found.wrapping_add(before);
        #[expect(unsafe_code, reason = "giving back what alignment does not need")]
        // SAFETY: these are the first `before` <= HUGE bytes of the new mapping, whole pages since both ends are.
        unsafe {
            unmap(found, before);
        }
        #[expect(unsafe_code, reason = "giving back what alignment does not need")]
        // SAFETY: these are the last bytes of the new mapping: `before + len + (HUGE - before)` is its length.
        unsafe {
            unmap(start.wrapping_add(len), HUGE - before);
        }
        let start = NonNull::new(start).ok_or_else(too_large)?;
        Ok(Self { start, len })
    }

    /// Zeroes that belong to this process alone, taken from the host page by page as they are touched.
    ///
    /// # Errors
    /// The host has no room.
    pub fn anonymous(len: u64) -> io::Result<Self> {
        let memory = Self::addresses(len)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        #[expect(unsafe_code, reason = "mapping over the addresses just reserved")]
        // SAFETY: what is replaced is this mapping's own reservation, which nothing refers to.
        unsafe {
            rustix::mm::mmap_anonymous(memory.start.as_ptr().cast(), memory.len, protection, flags)
        }?;
        if memory.len < HUGE_WORTH {
            return Ok(memory);
        }
        #[expect(unsafe_code, reason = "advice on this mapping")]
        // SAFETY: this advice changes no content; the range is this mapping. A kernel without huge pages refuses, and
        // nothing depends on it.
        let _ = unsafe {
            rustix::mm::madvise(
                memory.start.as_ptr().cast(),
                memory.len,
                Advice::LinuxHugepage,
            )
        };
        Ok(memory)
    }

    /// The bytes of a file from `offset` on, shared with whoever maps the file next. The file must have pages for all of
    /// them and keep its length, otherwise touching them raises SIGBUS.
    ///
    /// # Errors
    /// The host's answer.
    pub fn shared(file: &File, offset: u64, len: u64) -> io::Result<Self> {
        let memory = Self::addresses(len)?;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        #[expect(unsafe_code, reason = "mapping over the addresses just reserved")]
        // SAFETY: what is replaced is this mapping's own reservation, which nothing refers to.
        unsafe {
            rustix::mm::mmap(
                memory.start.as_ptr().cast(),
                memory.len,
                protection,
                flags,
                file,
                offset,
            )
        }?;
        Ok(memory)
    }

    /// The first byte.
    #[inline]
    pub fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Asks for one huge page at `offset`, a multiple of 2 MiB, in place of the small ones; waits until it is there.
    /// Others may use the memory meanwhile: what they find does not change, at worst they wait.
    ///
    /// # Errors
    /// There is no such chunk of the mapping, or the host's answer.
    pub fn collapse(&self, offset: u64) -> io::Result<()> {
        let offset = usize::try_from(offset).map_err(|_| too_large())?;
        let inside = offset.checked_add(HUGE).is_some_and(|end| end <= self.len);
        if !inside || !offset.is_multiple_of(HUGE) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let chunk = self.start.as_ptr().wrapping_add(offset);
        #[expect(unsafe_code, reason = "an advice that rustix does not have")]
        // SAFETY: the range lies in this mapping, and this advice changes no content.
        let result = unsafe { libc::madvise(chunk.cast(), HUGE, MADV_COLLAPSE) };
        if result == 0 {
            return Ok(());
        }
        Err(io::Error::last_os_error())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "unmapping what the constructors mapped")]
        // SAFETY: the mapping is this value's own, and references into it borrow from its owner.
        unsafe {
            unmap(self.start.as_ptr(), self.len);
        }
    }
}
