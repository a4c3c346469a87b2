//! System calls that a thread made and may not make: counted, told in the log, and answered as by a kernel that has
//! no such call.
//!
//! A call that is not on a list is a fault of the list more often than an attack: a newer C library, another allocator. To
//! it an older kernel is nothing new, and it does without; so the answer is ENOSYS, and the log tells what to add. Calls that
//! nothing but an attack would make do not come here, they end the process (see [`super::seccomp`]).
//!
//! The kernel sends SIGSYS for such a call. The handler runs in the midst of anything: it allocates nothing and takes no
//! lock, writes a line with one system call that every thread may make, and changes the result of the call that was refused.

use std::ffi::{c_int, c_void};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

/// Lines that are written at most: a loop must not fill the log.
const LINES_MAX: u64 = 20;
/// `si_code` of a SIGSYS that seccomp sends.
const SYS_SECCOMP: c_int = 1;

/// How many calls were refused.
static REFUSED: AtomicU64 = AtomicU64::new(0);

/// How many system calls were refused since the daemon started, for the metrics.
pub fn refused_calls() -> u64 {
    // ORDERING: Relaxed; a figure.
    REFUSED.load(Ordering::Relaxed)
}

/// What the kernel tells of such a signal: the head of its `siginfo_t`.
#[repr(C)]
struct Facts {
    /// SIGSYS.
    _signo: c_int,
    /// What the filter says.
    _errno: c_int,
    /// Who sends it.
    code: c_int,
    /// Where the call was made.
    _address: *mut c_void,
    /// The number of the call.
    call: c_int,
    /// The architecture that numbers it.
    _arch: u32,
}

/// Takes the signal over, for all threads.
pub(super) fn install() -> io::Result<()> {
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_sigsys;
    #[expect(unsafe_code, reason = "a plain structure of C")]
    // SAFETY: numbers, a set of bits and an optional pointer; zero means the default action, no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    // On the stack that the Rust runtime gives each thread for signals.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    #[expect(unsafe_code, reason = "signal actions are C")]
    // SAFETY: the structure lives until it returns; the handler is fit for its flags.
    let result = unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The handler.
extern "C" fn on_sigsys(_number: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    #[expect(unsafe_code, reason = "what the kernel hands to a handler")]
    // SAFETY: the kernel hands out a whole structure with SA_SIGINFO, whose head is laid out so on all 64-bit machines.
    let facts = unsafe { &*info.cast::<Facts>() };
    if facts.code != SYS_SECCOMP {
        // Somebody sent it by `kill`; it says nothing.
        return;
    }
    // ORDERING: Relaxed; a figure.
    if REFUSED.fetch_add(1, Ordering::Relaxed) < LINES_MAX {
        tell(facts.call);
    }
    #[expect(unsafe_code, reason = "what the kernel hands to a handler")]
    // SAFETY: with SA_SIGINFO it is the interrupted context, which is ours to change until the handler returns.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    answer(context, -i64::from(libc::ENOSYS));
}

/// Writes a line on stderr without anything that a handler may not do.
fn tell(call: c_int) {
    let mut line =
        *b"stratablk: system call .......... is not on the list of its thread and was refused\n";
    let mut rest = call.unsigned_abs();
    let place = line.iter().position(|byte| *byte == b'.').unwrap_or(0);
    for digit in line.iter_mut().skip(place).take(10).rev() {
        *digit = match rest {
            0 => b' ',
            // A digit.
            _ => b'0' + u8::try_from(rest % 10).unwrap_or(0),
        };
        rest /= 10;
    }
    // Nobody may be reading.
    let _ = rustix::io::write(io::stderr(), &line);
}

/// Sets what the call returns.
#[cfg(target_arch = "x86_64")]
fn answer(context: &mut libc::ucontext_t, value: i64) {
    if let Some(register) = context.uc_mcontext.gregs.get_mut(libc::REG_RAX as usize) {
        *register = value;
    }
}

/// Sets what the call returns.
#[cfg(target_arch = "aarch64")]
fn answer(context: &mut libc::ucontext_t, value: i64) {
    if let Some(register) = context.uc_mcontext.regs.first_mut() {
        *register = value.cast_unsigned();
    }
}

/// There are no filters on other machines.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn answer(_context: &mut libc::ucontext_t, _value: i64) {}
