//! The dirty log: one bit a page of guest memory that was written, in memory shared with the front-end.
//!
//! Workers mark pages themselves, because guest data goes from the files into guest memory without passing through an
//! accessor that could do it. The log types of `vhost-user-backend` cannot be made from outside that crate and take
//! a lock a mark, hence this one. Every mark is bounded by the length of the log, whatever the address.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vm_memory::GuestAddress;
use vm_memory::volatile_memory::VolatileMemory;

use super::mapping::Mapping;
use super::memory::GuestMemory;

/// Bytes of guest memory that one bit stands for, on every architecture.
pub const LOG_PAGE_BYTES: u64 = 4096;
/// The largest log: enough for 64 TiB of guest memory.
const LOG_BYTES_MAX: u64 = (64 << 40) / LOG_PAGE_BYTES / 8;

/// A mapped dirty log.
#[derive(Debug)]
pub struct DirtyLog {
    /// The bitmap.
    mapping: Mapping,
}

impl DirtyLog {
    /// Maps a log of `len` bytes at `offset` of `file`. The caller closes the file.
    ///
    /// # Errors
    /// `InvalidInput` for a size that cannot be or a file that does not hold it; otherwise the host's answer.
    pub fn map(file: &File, offset: u64, len: u64) -> io::Result<Self> {
        if len > LOG_BYTES_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a dirty log of {len} bytes is larger than any guest needs"),
            ));
        }
        let mapping = Mapping::shared(file, offset, len)?;
        Ok(Self { mapping })
    }

    /// Its file, where in it the log begins, and how many bytes it has.
    pub fn source(&self) -> (&Arc<OwnedFd>, u64, u64) {
        let (file, offset) = self.mapping.source();
        (file, offset, self.mapping.len() as u64)
    }

    /// Whether the log has a bit for every page of this memory.
    pub fn covers(&self, memory: &GuestMemory) -> bool {
        memory
            .last_address()
            .is_none_or(|last| last.0 / LOG_PAGE_BYTES / 8 < self.mapping.len() as u64)
    }

    /// Whether the front-end has taken it away, so that marks are gone. Exact once [`super::guard::losses`] was looked at.
    pub fn is_lost(&self) -> bool {
        self.mapping.is_lost()
    }

    /// Marks the pages that hold `len` bytes from guest address `guest`. Pages outside the log are left out.
    ///
    /// ORDERING: the bits are set with a read-modify-write, so that marks of several workers in one byte do not undo each
    /// other. Relaxed is enough: the release store of the used index that follows publishes them.
    pub fn mark(&self, guest: GuestAddress, len: u64) {
        let Some(last) = len.checked_sub(1).map(|more| guest.0.saturating_add(more)) else {
            return;
        };
        for page in guest.0 / LOG_PAGE_BYTES..=last / LOG_PAGE_BYTES {
            let place = usize::try_from(page / 8).unwrap_or(usize::MAX);
            let Ok(byte) = self.mapping.get_atomic_ref::<AtomicU8>(place) else {
                return;
            };
            byte.fetch_or(1 << (page % 8), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]
    use std::os::unix::fs::FileExt;

    use super::super::memory::RegionSpec;
    use super::*;

    fn memfd(len: u64) -> File {
        let fd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(len).unwrap();
        file
    }

    #[test]
    fn marks_pages_and_nothing_past_the_end() {
        let file = memfd(4);
        let log = DirtyLog::map(&file, 0, 2).unwrap();
        log.mark(GuestAddress(4095), 2);
        log.mark(GuestAddress(9 * 4096), 4096);
        log.mark(GuestAddress(15 * 4096), 1 << 40);
        log.mark(GuestAddress(u64::MAX), 1);
        log.mark(GuestAddress(u64::MAX), u64::MAX);
        log.mark(GuestAddress(12 * 4096), 0);
        let mut bits = [0u8; 4];
        file.read_exact_at(&mut bits, 0).unwrap();
        assert_eq!(bits, [0b11, 0b1000_0010, 0, 0]);
    }

    #[test]
    fn a_log_must_cover_the_memory_and_fit_its_file() {
        let file = memfd(4096);
        assert!(DirtyLog::map(&file, 0, 4097).is_err());
        assert!(DirtyLog::map(&file, 0, u64::MAX).is_err());
        assert!(DirtyLog::map(&file, 4096, 1).is_err());
        let log = DirtyLog::map(&file, 0, 1).unwrap();
        let spec = |len| RegionSpec {
            guest: GuestAddress(0),
            user: 0,
            len,
            offset: 0,
        };
        let memory = |len| GuestMemory::from_table(&[spec(len)], vec![memfd(len)]).unwrap();
        assert!(log.covers(&memory(8 * 4096)));
        assert!(!log.covers(&memory(8 * 4096 + 1)));
        assert!(log.covers(&GuestMemory::default()));
    }
}
