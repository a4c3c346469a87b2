//! What the engines must know of a file: whether it bypasses the page cache, with what alignment, and whether it lives in
//! memory.
//!
//! A token is the file descriptor with a bit for each of these, so that the common case (a buffered file, or a transfer
//! that is aligned to sectors) needs no look-up. Only a transfer that is not asks [`DirectFiles`].

use std::collections::HashMap;
use std::io;
use std::os::fd::RawFd;
use std::sync::{Mutex, PoisonError};

use crate::file::FileToken;
use crate::units::SECTOR_BYTES;

/// Set in the token of a direct file.
const DIRECT_BIT: i32 = 1 << 30;
/// Set in the token of a file that has no device below it (tmpfs): its transfers never wait for one.
const MEMORY_BIT: i32 = 1 << 29;
/// Descriptors have to stay below the bits. Linux allows more, but no real limit comes near it.
const DESCRIPTORS: std::ops::Range<RawFd> = 0..MEMORY_BIT;

/// The token of an open file; fails for a descriptor that leaves no place for the bits.
pub(in crate::file) fn token(fd: RawFd, direct: bool, in_memory: bool) -> io::Result<FileToken> {
    if !DESCRIPTORS.contains(&fd) {
        return Err(io::Error::from_raw_os_error(libc::EMFILE));
    }
    let direct = if direct { DIRECT_BIT } else { 0 };
    let in_memory = if in_memory { MEMORY_BIT } else { 0 };
    Ok(FileToken(fd | direct | in_memory))
}

/// The descriptor in a token. A negative token stays negative: the kernel answers EBADF.
pub(in crate::file) fn descriptor(token: FileToken) -> RawFd {
    if token.0 < 0 {
        token.0
    } else {
        token.0 & !(DIRECT_BIT | MEMORY_BIT)
    }
}

/// Whether the token is one of a file in memory.
pub(in crate::file) fn is_in_memory(token: FileToken) -> bool {
    token.0 >= 0 && token.0 & MEMORY_BIT != 0
}

/// Whether the token is one of a direct file.
pub(in crate::file) fn is_direct(token: FileToken) -> bool {
    token.0 >= 0 && token.0 & DIRECT_BIT != 0
}

/// What a direct file asks of a transfer, and what helps those that do not comply.
#[derive(Clone, Copy, Debug)]
pub(in crate::file) struct DirectFile {
    /// Alignment of memory addresses in bytes; at most 512.
    pub memory_bytes: u64,
    /// Alignment of offsets and lengths in bytes; at most 512.
    pub offset_bytes: u64,
    /// The same file opened through the page cache, for writes that are not whole sectors; `None` if read-only.
    pub buffered_twin: Option<RawFd>,
}

impl DirectFile {
    /// The strictest that a file opened direct may be: everything in whole sectors.
    pub(in crate::file) const STRICT: Self = Self {
        memory_bytes: SECTOR_BYTES,
        offset_bytes: SECTOR_BYTES,
        buffered_twin: None,
    };
}

/// The direct files that are open in one media.
#[derive(Debug, Default)]
pub(in crate::file) struct DirectFiles {
    /// By descriptor. Locked when a file is opened or closed and for transfers that are not aligned to sectors.
    by_descriptor: Mutex<HashMap<RawFd, DirectFile>>,
}

impl DirectFiles {
    /// Remembers a file that was opened.
    pub(in crate::file) fn insert(&self, fd: RawFd, file: DirectFile) {
        self.by_descriptor
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(fd, file);
    }

    /// Forgets a file. Must be called before the descriptor is closed, since it may be given out again at once.
    pub(in crate::file) fn remove(&self, fd: RawFd) {
        self.by_descriptor
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&fd);
    }

    /// What is known of a file; the strictest if nothing is.
    pub(in crate::file) fn get(&self, fd: RawFd) -> DirectFile {
        let files = self
            .by_descriptor
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        files.get(&fd).copied().unwrap_or(DirectFile::STRICT)
    }
}
