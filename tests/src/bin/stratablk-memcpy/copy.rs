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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_copies_all_bytes_and_no_other() {
        let from: Vec<u8> = (0..=255).cycle().take(5000).collect();
        for kind in CopyKind::value_variants() {
            for (start, len) in [(0, 0), (1, 1), (3, 511), (0, 4096), (7, 4993)] {
                let mut to = vec![0xee; 5000 + 1];
                let place = to.as_mut_ptr();
                #[expect(unsafe_code, reason = "what is tested")]
                // SAFETY: both vectors have at least `start + len` bytes, and nothing else uses them meanwhile.
                unsafe {
                    copy(*kind, from.as_ptr().wrapping_add(start), place, len);
                }
                assert_eq!(to.get(..len), from.get(start..start + len), "{kind:?}");
                assert!(to.iter().skip(len).all(|byte| *byte == 0xee), "{kind:?}");
            }
        }
    }
}
