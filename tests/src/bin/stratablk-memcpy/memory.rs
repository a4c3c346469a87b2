//! The memory that is the disk: anonymous, and every page touched before anything is measured.

use std::io;
use std::ptr::NonNull;

use clap::ValueEnum;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// Which pages the memory has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Pages {
    /// The usual ones.
    Small,
    /// Huge ones, where the kernel gives them.
    Huge,
}

/// A private mapping.
#[derive(Debug)]
pub struct Memory {
    /// Where it is.
    start: NonNull<u8>,
    /// Bytes of it.
    len: usize,
}

#[expect(unsafe_code, reason = "a raw pointer to a mapping, used by workers")]
// SAFETY: the mapping belongs to no thread, and its bytes are only reached through raw pointers.
unsafe impl Send for Memory {}
#[expect(unsafe_code, reason = "a raw pointer to a mapping, used by workers")]
// SAFETY: as above; `place` hands out addresses and touches nothing.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps `bytes` and writes zeroes to all of them, so that no page is missing or the kernel's shared one.
    ///
    /// # Errors
    /// The host's answer if it has no memory.
    pub fn new(bytes: u64, pages: Pages) -> io::Result<Self> {
        let len = usize::try_from(bytes).map_err(io::Error::other)?;
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        #[expect(unsafe_code, reason = "mapping memory")]
        // SAFETY: no address is asked for, so no existing mapping is replaced.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), len, flags, MapFlags::PRIVATE) }?;
        let start = NonNull::new(start.cast::<u8>())
            .ok_or_else(|| io::Error::other("the kernel mapped address 0"))?;
        let memory = Self { start, len };
        let advice = match pages {
            Pages::Small => Advice::LinuxNoHugepage,
            Pages::Huge => Advice::LinuxHugepage,
        };
        #[expect(unsafe_code, reason = "chooses the pages of the mapping")]
        // SAFETY: this is the mapping just made; the advice changes none of its bytes.
        unsafe { madvise(start.as_ptr().cast(), len, advice) }?;
        #[expect(unsafe_code, reason = "touches the mapping")]
        // SAFETY: all bytes lie in the mapping just made, which nobody else knows yet.
        unsafe {
            std::ptr::write_bytes(start.as_ptr(), 0, len);
        }
        Ok(memory)
    }

    /// Bytes of it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The address of `len` bytes at `offset`, or `None` if they do not lie inside.
    #[inline]
    pub fn place(&self, offset: u64, len: usize) -> Option<*mut u8> {
        let start = usize::try_from(offset).ok()?;
        (start.checked_add(len)? <= self.len).then(|| self.start.as_ptr().wrapping_add(start))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "undoes the mapping made in new")]
        // SAFETY: this is the whole mapping, and every worker that knew addresses in it held this value.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap: {unmapped:?}");
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failure here is the test's failure")]

    use super::*;

    #[test]
    fn only_what_lies_inside_has_a_place() {
        for pages in Pages::value_variants() {
            let memory = Memory::new(8192, *pages).unwrap();
            assert_eq!(memory.len(), 8192);
            assert!(memory.place(0, 8192).is_some());
            assert!(memory.place(8192, 0).is_some());
            assert!(memory.place(4096, 4097).is_none());
            assert!(memory.place(u64::MAX, 1).is_none());
            assert!(memory.place(1, usize::MAX).is_none());
        }
    }
}
