//! Memory that a back-end can reach: an anonymous file, mapped shared, every page touched beforehand.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A shared mapping of an anonymous file. The back-end maps the same file.
#[derive(Debug)]
pub struct DmaMemory {
    /// The file behind the mapping; kept open as long as a back-end may be given it.
    file: File,
    /// Where it is mapped.
    start: NonNull<u8>,
    /// Bytes of the mapping.
    len: usize,
}

#[expect(
    unsafe_code,
    reason = "a raw pointer to a mapping may move between threads"
)]
// SAFETY:
// - the mapping belongs to this value alone and is not tied to a thread.
unsafe impl Send for DmaMemory {}

impl DmaMemory {
    /// Maps `len` bytes (at least one) and writes to each page, so that no later access faults and no page is the
    /// kernel's shared page of zeroes.
    ///
    /// # Errors
    /// The host's answer if it has no memory or no file descriptor left.
    pub fn new(len: usize) -> io::Result<Self> {
        let file: File = memfd_create("dma", MemfdFlags::CLOEXEC)?.into();
        file.set_len(u64::try_from(len).map_err(io::Error::other)?)?;
        // SAFETY:
        // - no address is asked for, so no existing mapping is replaced.
        #[expect(unsafe_code, reason = "mapping memory")]
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )
        }?;
        let start = NonNull::new(start.cast::<u8>())
            .ok_or_else(|| io::Error::other("the kernel mapped address 0"))?;
        let mut memory = Self { file, start, len };
        memory.slice_mut(0, len).fill(0xa5);
        Ok(memory)
    }

    /// The file behind the mapping, to hand to a back-end.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The address of the first byte.
    pub fn address(&self) -> usize {
        self.start.as_ptr() as usize
    }

    /// Bytes of the mapping.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Always false; there is no empty mapping.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A pointer to `len` bytes at `offset`, for a request.
    ///
    /// # Panics
    /// If the range lies outside the mapping.
    pub fn pointer(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "{offset}+{len} lies outside {} bytes",
            self.len
        );
        self.start.as_ptr().wrapping_add(offset)
    }

    /// The bytes `offset .. offset + len`. The caller sees to it that no request with these bytes is under way.
    ///
    /// # Panics
    /// If the range lies outside the mapping.
    pub fn slice(&self, offset: usize, len: usize) -> &[u8] {
        let start = self.pointer(offset, len);
        // SAFETY:
        // - the range was checked to lie inside the mapping, which lives as long as `self`;
        // - no Rust reference changes it meanwhile, since `slice_mut` needs `&mut self`;
        // - the back-end writes only to buffers of requests under way, which callers never look at.
        #[expect(unsafe_code, reason = "access to a mapping")]
        unsafe {
            std::slice::from_raw_parts(start, len)
        }
    }

    /// The same, to write to.
    ///
    /// # Panics
    /// If the range lies outside the mapping.
    pub fn slice_mut(&mut self, offset: usize, len: usize) -> &mut [u8] {
        let start = self.pointer(offset, len);
        // SAFETY:
        // - the range was checked to lie inside the mapping, which lives as long as `self`;
        // - `&mut self` excludes every other Rust reference;
        // - the back-end touches only buffers of requests under way, which callers never look at.
        #[expect(unsafe_code, reason = "access to a mapping")]
        unsafe {
            std::slice::from_raw_parts_mut(start, len)
        }
    }
}

impl Drop for DmaMemory {
    fn drop(&mut self) {
        // SAFETY:
        // - this is the whole mapping made in `new`, and nobody can hold a reference into it any more.
        #[expect(unsafe_code, reason = "undoes the mapping made in new")]
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap: {unmapped:?}");
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failure here is the test's failure")]

    use super::*;

    #[test]
    fn memory_is_touched_and_shared_with_its_file() {
        let mut memory = DmaMemory::new(8192).unwrap();
        assert!(memory.slice(0, 8192).iter().all(|byte| *byte == 0xa5));
        memory.slice_mut(4096, 3).copy_from_slice(b"abc");
        let mut seen = [0; 3];
        std::os::unix::fs::FileExt::read_exact_at(&memory.file, &mut seen, 4096).unwrap();
        assert_eq!(&seen, b"abc");
    }

    #[test]
    #[should_panic(expected = "lies outside")]
    fn a_range_past_the_end_is_refused() {
        let memory = DmaMemory::new(4096).unwrap();
        memory.slice(4095, 2);
    }
}
