//! Makes a ring with the best set of flags that the kernel has, and makes sure that it knows our operations.

use std::io;

use io_uring::{IoUring, Probe, opcode};

/// The ways to set up a ring, best first; each is tried in turn, since kernels and sandboxes differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flavour {
    /// Completions are posted only when the owner asks (Linux 6.1): no interruption between, best batching.
    Deferred,
    /// One thread submits; the kernel does not interrupt it to post completions (Linux 6.0).
    SingleIssuer,
    /// As before, but any thread may submit (Linux 5.19).
    Cooperative,
    /// No flags.
    Plain,
}

/// A ring, and how it has to be used.
pub(super) struct Ring {
    /// The ring.
    pub ring: IoUring,
    /// Whether its owner must enable it before the first submission. Until then it belongs to no thread, so that it can
    /// be made in one and used in another.
    pub disabled: bool,
}

/// Makes a ring of at least `entries` submissions and checks the operations.
pub(super) fn make(entries: u32) -> io::Result<Ring> {
    let mut last = io::Error::from(io::ErrorKind::Unsupported);
    for flavour in [
        Flavour::Deferred,
        Flavour::SingleIssuer,
        Flavour::Cooperative,
        Flavour::Plain,
    ] {
        let mut builder = IoUring::builder();
        builder.dontfork();
        if flavour != Flavour::Plain {
            builder.setup_submit_all();
            builder.setup_taskrun_flag();
        }
        match flavour {
            Flavour::Deferred => {
                builder
                    .setup_single_issuer()
                    .setup_defer_taskrun()
                    .setup_r_disabled();
            }
            Flavour::SingleIssuer => {
                builder
                    .setup_single_issuer()
                    .setup_coop_taskrun()
                    .setup_r_disabled();
            }
            Flavour::Cooperative => {
                builder.setup_coop_taskrun();
            }
            Flavour::Plain => {}
        }
        match builder.build(entries) {
            Ok(ring) => {
                check(&ring)?;
                let disabled = matches!(flavour, Flavour::Deferred | Flavour::SingleIssuer);
                return Ok(Ring { ring, disabled });
            }
            // Unknown flags are EINVAL; anything else (forbidden, no memory, not built in) will not change.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
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
