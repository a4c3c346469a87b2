//! A front-end's file mapped into this process: guest memory or a dirty log.
//!
//! The mapping outlives the file descriptor, which its owner may (and should) close at once; a copy of it is kept, for who
//! serves the front-end after us (see [`super::message`]), one of each file. The bytes belong to another
//! process, so they are only ever reached with the volatile and atomic accesses of `vm-memory`, never as a Rust
//! reference to plain data. A file that is too short for what was asked is refused. One that is cut later costs its
//! front-end the disk, and nobody else anything: see [`super::guard`].
//!
//! `vm-memory` maps a file only if it may keep the descriptor, so the pages are mapped and unmapped here, and lent to its
//! region in between.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::FileType;
use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::MmapRegion;
use vm_memory::volatile_memory::{Error as VolatileError, VolatileMemory, VolatileSlice};

use super::guard::Guarded;

/// `f_type` of hugetlbfs, whose mappings must start at a multiple of its page size.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Mapped pages of a file, unmapped on drop.
#[derive(Debug)]
struct Pages(MmapRegion);

/// A shared, writable mapping of a part of a file. Unmapped on drop.
#[derive(Debug)]
pub struct Mapping {
    /// Sees to it that the process survives if the file is cut. Before `pages`, so that it is dropped first.
    guard: Guarded,
    /// What is mapped, from a page boundary of the file on.
    pages: Pages,
    /// Bytes between the start of `pages` and the first byte that was asked for.
    skip: usize,
    /// Bytes that were asked for.
    len: usize,
    /// The file. Mappings of one file may share it.
    file: Arc<OwnedFd>,
    /// Device and number of the file's inode.
    inode: (u64, u64),
    /// Where in it they begin.
    offset: u64,
}

/// An error of our own making.
fn refused(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

impl Mapping {
    /// Maps `len` bytes of `file` from byte `offset`. The offset need not be aligned.
    ///
    /// # Errors
    /// `InvalidInput` if this is no regular file or it does not hold `offset + len` bytes; otherwise the host's answer.
    pub fn shared(file: &File, offset: u64, len: u64) -> io::Result<Self> {
        Self::beside(file, offset, len, &[])
    }

    /// The same, beside others of one front-end: where one of them is of that file, its descriptor is kept and no other.
    ///
    /// # Errors
    /// As `shared`.
    pub fn beside(file: &File, offset: u64, len: u64, others: &[&Self]) -> io::Result<Self> {
        let stat = rustix::fs::fstat(file)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(refused("the descriptor is no regular file or memfd".into()));
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let end = offset.checked_add(len);
        if len == 0 || end.is_none_or(|end| end > size) {
            return Err(refused(format!(
                "{len} bytes at {offset} do not lie in a file of {size} bytes"
            )));
        }
        let page = mapping_granule(file)?;
        let skip = offset % page;
        let start_in_file = offset - skip;
        let too_large = |_| refused("the mapping does not fit in this process".into());
        let mapped = usize::try_from(len + skip).map_err(too_large)?;
        let len = usize::try_from(len).map_err(too_large)?;
        if isize::try_from(mapped).is_err() {
            return Err(refused("the mapping does not fit in this process".into()));
        }
        // On hugetlbfs both ends must be multiples of the huge page.
        let page_usize = usize::try_from(page).map_err(too_large)?;
        let mapped = mapped
            .checked_next_multiple_of(page_usize)
            .ok_or_else(|| refused("the mapping does not fit in this process".into()))?;
        let skip = usize::try_from(skip).map_err(too_large)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        #[expect(unsafe_code, reason = "mapping a front-end's memory")]
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing that exists.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                mapped,
                protection,
                flags,
                file,
                start_in_file,
            )
        }?;
        #[expect(unsafe_code, reason = "lending the mapping to `vm-memory`")]
        // SAFETY:
        // - `mapped` bytes are mapped at `start` with that protection and those flags, until `drop` unmaps them.
        // - The region does not unmap what it was given.
        let pages = unsafe {
            let (protection, flags) = (protection.bits().cast_signed(), flags.bits().cast_signed());
            MmapRegion::build_raw(start.cast(), mapped, protection, flags)
        };
        // Refused only if `start` is not at a page boundary, which the kernel rules out.
        let pages = Pages(pages.map_err(io::Error::other)?);
        let inode = (stat.st_dev, stat.st_ino);
        let kept = others.iter().find(|other| other.inode == inode);
        let file = match kept {
            // Both can be mapped to be written, and nothing else of a descriptor counts.
            Some(other) => Arc::clone(&other.file),
            None => Arc::new(OwnedFd::from(file.try_clone()?)),
        };
        Ok(Self {
            guard: Guarded::new(start.expose_provenance(), mapped)?,
            pages,
            skip,
            len,
            file,
            inode,
            offset,
        })
    }

    /// The file, and where in it the first byte lies.
    pub const fn source(&self) -> (&Arc<OwnedFd>, u64) {
        (&self.file, self.offset)
    }

    /// Device and number of the file's inode.
    pub const fn inode(&self) -> (u64, u64) {
        self.inode
    }

    /// Whether its owner cut the file, so that it holds zeroes now. Exact once [`super::guard::losses`] was looked at.
    pub fn is_lost(&self) -> bool {
        self.guard.is_lost()
    }
}

impl VolatileMemory for Mapping {
    type B = ();

    /// Bytes that were asked for.
    fn len(&self) -> usize {
        self.len
    }

    #[inline]
    fn get_slice(&self, offset: usize, count: usize) -> Result<VolatileSlice<'_>, VolatileError> {
        self.compute_end_offset(offset, count)?;
        self.pages.0.get_slice(self.skip + offset, count)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let start = self.0.as_ptr().cast();
        #[expect(unsafe_code, reason = "unmapping what `shared` mapped")]
        // SAFETY:
        // - Start and size are those of the mapping made in `Mapping::shared`, or of what replaced it in place, and nobody
        //   else unmaps it.
        // - Slices borrow the mapping; addresses taken from them must not outlive the `Arc` that their users hold.
        let unmapped = unsafe { rustix::mm::munmap(start, self.0.size()) };
        debug_assert!(unmapped.is_ok(), "munmap of a mapping of ours failed");
    }
}

/// What offsets of mappings of this file must be multiples of.
fn mapping_granule(file: &File) -> io::Result<u64> {
    let stat = rustix::fs::fstatfs(file)?;
    let page = rustix::param::page_size() as u64;
    let huge = u64::try_from(stat.f_type).is_ok_and(|kind| kind == HUGETLBFS_MAGIC);
    match u64::try_from(stat.f_bsize) {
        Ok(size) if huge && size.is_power_of_two() => Ok(size.max(page)),
        _ => Ok(page),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]
    use super::*;

    fn memfd(len: u64) -> File {
        let fd = rustix::fs::memfd_create("mapping", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(len).unwrap();
        file
    }

    #[test]
    fn maps_at_an_unaligned_offset() {
        use std::os::unix::fs::FileExt;
        let file = memfd(16384);
        file.write_all_at(b"needle", 5000).unwrap();
        let map = Mapping::shared(&file, 5000, 6).unwrap();
        drop(file);
        let mut bytes = [0; 6];
        map.get_slice(0, 6).unwrap().copy_to(&mut bytes);
        assert_eq!(&bytes, b"needle");
        assert!(map.get_slice(1, 6).is_err());
        assert!(map.get_slice(usize::MAX, 2).is_err());
    }

    #[test]
    fn mappings_of_one_file_keep_one_descriptor() {
        let (file, other) = (memfd(8192), memfd(8192));
        let first = Mapping::shared(&file, 0, 4096).unwrap();
        let again = file.try_clone().unwrap();
        let same = Mapping::beside(&again, 4096, 4096, &[&first]).unwrap();
        assert!(Arc::ptr_eq(first.source().0, same.source().0));
        assert_eq!(same.source().1, 4096);
        let foreign = Mapping::beside(&other, 0, 4096, &[&first, &same]).unwrap();
        assert!(!Arc::ptr_eq(first.source().0, foreign.source().0));
        assert_ne!(first.inode(), foreign.inode());
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        let file = memfd(8192);
        for (offset, len) in [
            (0, 8193),
            (8192, 1),
            (u64::MAX, 2),
            (4096, u64::MAX),
            (0, 0),
        ] {
            assert!(
                Mapping::shared(&file, offset, len).is_err(),
                "{offset} {len}"
            );
        }
        assert!(Mapping::shared(&File::open("/dev/zero").unwrap(), 0, 4096).is_err());
        assert!(Mapping::shared(&File::open("/").unwrap(), 0, 1).is_err());
    }
}
