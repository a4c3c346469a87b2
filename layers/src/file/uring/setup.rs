//! Makes a ring with the best flags that the kernel has, sees that it knows our operations, and forbids it all others.
//!
//! What a ring does for us no filter of system calls sees: it could open files, connect to hosts and send descriptors. So a
//! ring is made disabled, told the operations of the engine, and only then enabled (Linux 5.10). From then on it refuses
//! any other, and any change of its set-up, to whoever holds it.

use std::io;

use io_uring::register::Restriction;
use io_uring::{IoUring, Probe, opcode};

/// The operations that the engine uses, and their names in `io_uring(7)`.
const OPERATIONS: [(u8, &str); 7] = [
    (opcode::Nop::CODE, "NOP"),
    (opcode::Read::CODE, "READ"),
    (opcode::Readv::CODE, "READV"),
    (opcode::Write::CODE, "WRITE"),
    (opcode::Writev::CODE, "WRITEV"),
    (opcode::Fsync::CODE, "FSYNC"),
    (opcode::Fallocate::CODE, "FALLOCATE"),
];

/// Makes a ring of at least `entries` submissions and checks the operations.
///
/// Completions of operations that did not end at once are posted when the submitting thread next enters the kernel or is
/// waiting in it (cooperative task work, Linux 5.19); before that, they interrupt it. Two flags that promise more are left
/// out, since each breaks a promise of `Engine`:
/// - DEFER_TASKRUN posts completions only to an owner who asks for them. Whoever polls the ring's descriptor is not woken
///   by them (seen on Linux 6.18), so that `wake_fd` would need an eventfd and a read of it for every batch.
/// - SINGLE_ISSUER ties the ring to a thread. An engine that is dropped by another one, after a panic for example, could
///   not wait for the operations under way.
pub(super) fn make(entries: u32) -> io::Result<IoUring> {
    let mut refused = io::ErrorKind::Unsupported.into();
    // From the newest kernels to the oldest; before Linux 5.10 a ring cannot be restricted.
    for (restricted, quick) in [(true, true), (true, false), (false, false)] {
        let mut builder = IoUring::builder();
        builder.dontfork();
        if restricted {
            builder.setup_r_disabled();
        }
        if quick {
            builder
                .setup_submit_all()
                .setup_coop_taskrun()
                .setup_taskrun_flag();
        }
        match builder.build(entries) {
            Ok(ring) => {
                check(&ring)?;
                if restricted {
                    restrict(&ring)?;
                }
                return Ok(ring);
            }
            // Unknown flags; anything else (forbidden, no memory, not built in) will not change without them.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refused = error,
            Err(error) => return Err(error),
        }
    }
    Err(refused)
}

/// Forbids a ring that is disabled all operations that the engine does not use, for good, and enables it.
fn restrict(ring: &IoUring) -> io::Result<()> {
    let mut restrictions = OPERATIONS.map(|(code, _)| Restriction::sqe_op(code));
    ring.submitter().register_restrictions(&mut restrictions)?;
    ring.submitter().register_enable_rings()
}

/// Whether the kernel knows every operation that the engine uses, and never drops a completion.
fn check(ring: &IoUring) -> io::Result<()> {
    let unsupported = |what: &str| io::Error::new(io::ErrorKind::Unsupported, what.to_owned());
    if !ring.params().is_feature_nodrop() {
        return Err(unsupported("this kernel's io_uring may drop completions"));
    }
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    match OPERATIONS
        .iter()
        .find(|(code, _)| !probe.is_supported(*code))
    {
        None => Ok(()),
        Some((_, name)) => Err(unsupported(&format!(
            "this kernel's io_uring has no {name}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

    use std::ffi::CStr;

    use io_uring::{squeue, types};

    use super::*;

    /// Where a path is.
    const PATH: &CStr = c"/etc/hostname";

    /// Submits an entry and returns what became of it.
    fn outcome(ring: &mut IoUring, entry: &squeue::Entry) -> i32 {
        #[expect(unsafe_code, reason = "submits an entry of io_uring")]
        // SAFETY: what the entry points to is static.
        unsafe { ring.submission().push(entry) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        ring.completion().next().unwrap().result()
    }

    /// Entries that open a file, make a socket, and carry a flag that the engine does not use.
    fn others() -> [squeue::Entry; 3] {
        [
            opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), PATH.as_ptr()).build(),
            opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
            opcode::Nop::new().build().flags(squeue::Flags::ASYNC),
        ]
    }

    #[test]
    fn a_ring_does_what_the_engine_needs_and_nothing_else() {
        let mut ring = make(4).unwrap();
        assert_eq!(outcome(&mut ring, &opcode::Nop::new().build()), 0);
        for entry in others() {
            assert_eq!(outcome(&mut ring, &entry), -libc::EACCES, "{entry:?}");
        }
        let files = ring.submitter().register_files(&[0]);
        assert_eq!(files.unwrap_err().raw_os_error(), Some(libc::EACCES));
    }

    #[test]
    fn a_ring_without_restrictions_would_do_it() {
        let mut ring = IoUring::new(4).unwrap();
        for entry in others() {
            assert!(outcome(&mut ring, &entry) >= 0, "{entry:?}");
        }
    }
}
