//! Copies between frames and memory that others may change meanwhile.
//!
//! A frame may be written by another thread while it is read (the reader notices afterwards and reads again), and guest memory
//! may be changed by its guest at any time. For Rust both would be data races if the copies were ordinary ones. So they are
//! one instruction of inline assembly, about whose accesses the compiler assumes nothing, or volatile words.

/// Copies `len` bytes.
///
/// # Safety
/// `from` is valid for reads and `to` for writes of `len` bytes; the two do not overlap; no Rust reference to the bytes is
/// used meanwhile. Either may be changed by others at the same time: what arrives is then any mix.
#[cfg(target_arch = "x86_64")]
#[inline]
#[expect(unsafe_code, reason = "copies memory that others may change")]
pub unsafe fn copy(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY:
    // - The caller promises that both ranges may be accessed, and the instruction touches nothing else.
    // - The direction flag is clear, as the ABI demands at all times.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rdi") to => _,
            inout("rsi") from => _,
            options(nostack, preserves_flags)
        );
    }
}

/// Copies `len` bytes.
///
/// # Safety
/// `from` is valid for reads and `to` for writes of `len` bytes; the two do not overlap; no Rust reference to the bytes is
/// used meanwhile. Either may be changed by others at the same time: what arrives is then any mix.
#[cfg(not(target_arch = "x86_64"))]
#[inline]
#[expect(unsafe_code, reason = "copies memory that others may change")]
pub unsafe fn copy(to: *mut u8, from: *const u8, len: usize) {
    let aligned = to.addr() % 8 == 0 && from.addr() % 8 == 0;
    let words = if aligned { len / 8 } else { 0 };
    for word in 0..words {
        // SAFETY: inside the range that the caller promises, aligned as just checked.
        let value = unsafe { from.cast::<u64>().add(word).read_volatile() };
        // SAFETY: as above.
        unsafe { to.cast::<u64>().add(word).write_volatile(value) };
    }
    for byte in words * 8..len {
        // SAFETY: inside the range that the caller promises.
        let value = unsafe { from.add(byte).read_volatile() };
        // SAFETY: as above.
        unsafe { to.add(byte).write_volatile(value) };
    }
}

/// Asks the processor for the cache line of an address that will be used soon. Any address is fine.
#[inline]
pub fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    #[expect(unsafe_code, reason = "an intrinsic")]
    // SAFETY: a hint, which never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
