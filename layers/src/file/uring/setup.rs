//! Makes a ring with the best flags that the kernel has, and makes sure that it knows our operations.

use std::io;

use io_uring::{IoUring, Probe, opcode};

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
    let mut builder = IoUring::builder();
    builder
        .dontfork()
        .setup_submit_all()
        .setup_coop_taskrun()
        .setup_taskrun_flag();
    let ring = match builder.build(entries) {
        // Unknown flags; anything else (forbidden, no memory, not built in) will not change without them.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let mut builder = IoUring::builder();
            builder.dontfork();
            builder.build(entries)?
        }
        other => other?,
    };
    check(&ring)?;
    Ok(ring)
}

/// Whether the kernel knows every operation that the engine uses, and never drops a completion.
fn check(ring: &IoUring) -> io::Result<()> {
    let unsupported = |what: &str| io::Error::new(io::ErrorKind::Unsupported, what.to_owned());
    if !ring.params().is_feature_nodrop() {
        return Err(unsupported("this kernel's io_uring may drop completions"));
    }
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [
        (opcode::Nop::CODE, "NOP"),
        (opcode::Read::CODE, "READ"),
        (opcode::Readv::CODE, "READV"),
        (opcode::Write::CODE, "WRITE"),
        (opcode::Writev::CODE, "WRITEV"),
        (opcode::Fsync::CODE, "FSYNC"),
        (opcode::Fallocate::CODE, "FALLOCATE"),
    ];
    match needed.iter().find(|(code, _)| !probe.is_supported(*code)) {
        None => Ok(()),
        Some((_, name)) => Err(unsupported(&format!(
            "this kernel's io_uring has no {name}"
        ))),
    }
}
