//! The copy itself. Which way is the fastest depends on the machine, so it can be chosen, and the limit is that of the best.

use clap::ValueEnum;

/// How bytes are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CopyKind {
    /// The library's memcpy.
    Memcpy,
    /// The processor's own instruction for copying (`rep movsb`), where there is one.
    Rep,
}

impl CopyKind {
    /// What was the fastest way where it was measured: `rep movsb` writes whole lines without reading them first.
    pub const FASTEST: Self = if cfg!(target_arch = "x86_64") {
        Self::Rep
    } else {
        Self::Memcpy
    };
}

/// Copies `len` bytes.
///
/// # Safety
/// `from` is valid for reads and `to` for writes of `len` bytes, they do not overlap, and no Rust reference to the bytes at
/// `to` exists.
#[inline]
#[expect(unsafe_code, reason = "copies raw memory")]
pub unsafe fn copy(kind: CopyKind, from: *const u8, to: *mut u8, len: usize) {
    match kind {
        #[cfg(target_arch = "x86_64")]
        CopyKind::Rep => {
            // SAFETY:
            // - reads `len` bytes at `from` and writes as many at `to`, which the caller promises to be valid;
            // - the direction flag is clear, as the ABI has it; no flags are changed.
            unsafe {
                std::arch::asm!(
                    "rep movsb",
                    inout("rcx") len => _,
                    inout("rsi") from => _,
                    inout("rdi") to => _,
                    options(nostack, preserves_flags),
                );
            }
        }
        _ => {
            // SAFETY:
            // - the caller promises validity and that the two do not overlap; bytes need no alignment.
            unsafe { std::ptr::copy_nonoverlapping(from, to, len) };
        }
    }
}
