//! Aligned memory that stands in for buffers which a direct transfer cannot use.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::ptr::NonNull;

/// Alignment of the memory: a page, which satisfies every device.
pub(in crate::file) const BOUNCE_ALIGN: usize = 4096;

/// Zeroed memory on a page boundary.
#[derive(Debug)]
pub(in crate::file) struct Bounce {
    /// First byte; owned.
    base: NonNull<u8>,
    /// Size and alignment, as needed to free it.
    layout: Layout,
}

// SAFETY: the memory is owned by this value alone, like that of a `Vec`.
#[expect(unsafe_code, reason = "an owned allocation behind a raw pointer")]
unsafe impl Send for Bounce {}

impl Bounce {
    /// `len` bytes (at least one page) of zeroes.
    pub(in crate::file) fn new(len: usize) -> io::Result<Self> {
        let layout = Layout::from_size_align(len.max(BOUNCE_ALIGN), BOUNCE_ALIGN)
            .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        // SAFETY: the layout's size is not zero.
        #[expect(unsafe_code, reason = "aligned allocation")]
        let base = unsafe { alloc_zeroed(layout) };
        match NonNull::new(base) {
            Some(base) => Ok(Self { base, layout }),
            None => handle_alloc_error(layout),
        }
    }

    /// The first byte. Valid for reads and writes of the length given to `new` while `self` lives.
    pub(in crate::file) fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        // SAFETY:
        // - `base` came from `alloc_zeroed` with this very layout.
        // - Nobody else owns it, and `Transfer` drops it only when the kernel has let go of it.
        #[expect(unsafe_code, reason = "aligned allocation")]
        unsafe {
            dealloc(self.base.as_ptr(), self.layout);
        }
    }
}
