//! The dirty log: a bitmap in shared memory in which the back-end marks each 4 KiB page of guest memory that it writes.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU8, Ordering};

use vm_memory::volatile_memory::VolatileMemory;
use vm_memory::{Bytes, FileOffset, MmapRegion};

use crate::memory::{PAGE, memfd};

/// The log, with bytes behind its end that nobody may touch.
#[derive(Debug)]
pub struct DirtyLog {
    /// The shared file.
    file: File,
    /// Our view of it.
    mapping: MmapRegion,
    /// Where the log begins in the file.
    pub offset: u64,
    /// Bytes that the back-end is told of.
    pub bytes: u64,
}

impl DirtyLog {
    /// A log for all guest addresses below `end`.
    pub fn covering(end: u64) -> Self {
        Self::new(0, end.div_ceil(PAGE).div_ceil(8))
    }

    /// A log of so many bytes at an offset of its file, which goes on for at least a page.
    pub fn new(offset: u64, bytes: u64) -> Self {
        let total = (offset + bytes).next_multiple_of(PAGE) + PAGE;
        let file = memfd(total);
        let shared = file.try_clone().expect("a second descriptor");
        let size = usize::try_from(total).expect("64-bit host");
        let mapping = MmapRegion::from_file(FileOffset::new(shared, 0), size).expect("a mapping");
        Self {
            file,
            mapping,
            offset,
            bytes,
        }
    }

    /// The file, to be sent along.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Cuts the file to nothing under everybody who has mapped it. Nobody here may touch the log afterwards.
    pub fn shrink(&self) {
        self.file.set_len(0).expect("a memfd can be cut");
    }

    /// Takes all marks: the numbers of the pages that were written since the last call.
    pub fn take(&self) -> Vec<u64> {
        let mut pages = Vec::new();
        for byte in 0..self.bytes {
            let at = usize::try_from(self.offset + byte).expect("64-bit host");
            let cell = self
                .mapping
                .get_atomic_ref::<AtomicU8>(at)
                .expect("inside the log");
            // ORDERING: what was written before the mark is visible to who takes it.
            let bits = cell.swap(0, Ordering::AcqRel);
            pages.extend(
                (0..8)
                    .filter(|bit| bits & (1 << bit) != 0)
                    .map(|bit| byte * 8 + bit),
            );
        }
        pages
    }

    /// Whether all bytes of the file outside the log are still zero.
    pub fn is_clean_outside(&self) -> bool {
        let mut all = vec![0; self.mapping.size()];
        let slice = self
            .mapping
            .get_slice(0, all.len())
            .expect("the whole file");
        slice.read_slice(&mut all, 0).expect("inside the slice");
        let start = usize::try_from(self.offset).expect("64-bit host");
        let end = usize::try_from(self.offset + self.bytes).expect("64-bit host");
        all[..start]
            .iter()
            .chain(&all[end..])
            .all(|&byte| byte == 0)
    }
}
