//! Zeroes written in place of a hole, for file systems that cannot punch one.

use std::io;
use std::os::fd::{BorrowedFd, RawFd};

use rustix::io::Errno;

use super::bounce::Bounce;

/// Bytes written by one call.
const CHUNK_BYTES: usize = 1 << 20;

/// Writes zeroes over `len` bytes from `offset`, as far as the file reaches: its length must not change. Blocks.
pub(in crate::file) fn write_zeroes(fd: RawFd, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: the operation's submitter promised that the file stays open until its completion.
    #[expect(unsafe_code, reason = "the token of an open file is a number")]
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let file_len = u64::try_from(rustix::fs::fstat(fd)?.st_size).unwrap_or(0);
    let end = offset.saturating_add(len).min(file_len);
    let chunk = usize::try_from(end.saturating_sub(offset))
        .unwrap_or(CHUNK_BYTES)
        .min(CHUNK_BYTES);
    if chunk == 0 {
        return Ok(());
    }
    let zeroes = Bounce::new(chunk)?;
    let mut at = offset;
    while at < end {
        let count = usize::try_from(end - at).unwrap_or(chunk).min(chunk);
        // SAFETY: the bounce holds `chunk >= count` initialised bytes, and nobody writes to it.
        #[expect(unsafe_code, reason = "a view of our own allocation")]
        let bytes = unsafe { std::slice::from_raw_parts(zeroes.as_ptr(), count) };
        match rustix::io::pwrite(fd, bytes, at) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => at += written as u64,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn zeroes_stay_inside_the_file() {
        let file = tempfile::tempfile().unwrap();
        let len = 3 * CHUNK_BYTES + 777;
        file.write_all_at(&vec![9; len], 0).unwrap();
        write_zeroes(file.as_raw_fd(), 100, CHUNK_BYTES as u64 + 50).unwrap();
        write_zeroes(file.as_raw_fd(), (len - 10) as u64, u64::MAX).unwrap();
        write_zeroes(file.as_raw_fd(), len as u64 + 5000, 10).unwrap();
        let mut bytes = vec![1; len + 1];
        assert_eq!(
            file.read_at(&mut bytes, 0).unwrap(),
            len,
            "the length changed"
        );
        for (at, byte) in bytes.iter().take(len).enumerate() {
            let zeroed = (100..CHUNK_BYTES + 150).contains(&at) || at >= len - 10;
            assert_eq!(*byte, if zeroed { 0 } else { 9 }, "byte {at}");
        }
    }
}
