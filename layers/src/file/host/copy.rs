//! Copies between files of the host: shared where the file system can share, else moved by the kernel, else by hand.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rustix::fs::FsWord;
use rustix::io::Errno;

use super::bounce::Bounce;
use super::direct;
use crate::file::{COPY_BYTES, File, copy_through};

/// Magic numbers of file systems in which two files may share space: XFS, Btrfs, bcachefs, OCFS2, ZFS; and of NFS and CIFS,
/// whose servers may.
const SHARING: [FsWord; 7] = [
    0x5846_5342,
    0x9123_683e,
    0xca45_1a4e,
    0x7461_636f,
    0x2fc1_2fc1,
    0x6969,
    0xff53_4d42,
];
/// What is shared begins and ends at multiples of this, or of less.
const BLOCK_BYTES: u64 = 4096;

/// See `Media::copy`.
pub(super) fn copy(
    from: &Arc<dyn File>,
    to: &Arc<dyn File>,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    let end = offset
        .checked_add(len)
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut at = offset;
    if worth_asking(from, to, offset, len)? {
        while at < end {
            match copy_some(from, to, at, end - at) {
                // The end of the file, after which there are zeroes; or an answer of a kernel that cannot.
                Ok(0) => break,
                Ok(count) => at = at.saturating_add(count).min(end),
                Err(Errno::INTR) => {}
                Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM) => {
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
    if at == end {
        return Ok(());
    }
    let bytes = usize::try_from(end - at).unwrap_or(COPY_BYTES);
    let bytes = bytes.min(COPY_BYTES);
    let memory = Bounce::new(bytes)?;
    #[expect(unsafe_code, reason = "a view of our own allocation")]
    // SAFETY: initialised memory of this length that nobody else knows, for as long as `memory` lives.
    let buffer = unsafe { std::slice::from_raw_parts_mut(memory.as_ptr(), bytes) };
    copy_through(buffer, from, to, at, end - at)
}

/// Whether the kernel is to be asked. Of direct files only if it can let them share space: otherwise it would move the data
/// through the page cache, or not at all.
fn worth_asking(
    from: &Arc<dyn File>,
    to: &Arc<dyn File>,
    offset: u64,
    len: u64,
) -> io::Result<bool> {
    let is_direct = |file: &Arc<dyn File>| direct::is_direct(file.token());
    if !is_direct(from) && !is_direct(to) {
        return Ok(true);
    }
    let blocks = offset.is_multiple_of(BLOCK_BYTES) && len.is_multiple_of(BLOCK_BYTES);
    Ok(blocks && SHARING.contains(&rustix::fs::fstatfs(descriptor(to))?.f_type))
}

/// Lets the kernel copy. Returns how many bytes it did.
fn copy_some(
    from: &Arc<dyn File>,
    to: &Arc<dyn File>,
    offset: u64,
    len: u64,
) -> rustix::io::Result<u64> {
    let (mut read_at, mut write_at) = (offset, offset);
    let len = usize::try_from(len).unwrap_or(usize::MAX).min(1 << 30);
    let count = rustix::fs::copy_file_range(
        descriptor(from),
        Some(&mut read_at),
        descriptor(to),
        Some(&mut write_at),
        len,
    )?;
    Ok(count as u64)
}

/// The descriptor of an open file of the host.
fn descriptor(file: &Arc<dyn File>) -> BorrowedFd<'_> {
    #[expect(unsafe_code, reason = "the token of an open file is a number")]
    // SAFETY: the file is open as long as it is borrowed; it is one of this media's, as the caller of `Media::copy` promised.
    unsafe {
        BorrowedFd::borrow_raw(direct::descriptor(file.token()))
    }
}
