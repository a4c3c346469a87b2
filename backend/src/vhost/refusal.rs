//! Refusals of messages, and whose fault they are: who takes a session over has to know whether somebody else may fare better.

use std::io;

use vhost::vhost_user::Error;

use super::memory::MemoryError;

/// Why a message was refused, as far as it is known who has to do with it. Any other error is of the host or of the disk.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// What the front-end has said, or its guest has written, cannot be.
    #[error("{0}")]
    Theirs(String),
    /// This process may have less than it takes.
    #[error("{0}")]
    Scarce(String),
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Self::ReqHandlerError(io::Error::new(io::ErrorKind::InvalidInput, refusal))
    }
}

/// A refusal of what the front-end asked for. The session goes on if the front-end can be told.
pub fn refuse(what: impl Into<String>) -> Error {
    Refusal::Theirs(what.into()).into()
}

/// Whether the host refused for want of something that this process may have little of.
pub fn is_scarce(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errno = error.raw_os_error();
    let scarce = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::AGAIN];
    errno.is_some_and(|errno| scarce.iter().any(|one| one.raw_os_error() == errno))
        || error.kind() == io::ErrorKind::OutOfMemory
}

/// A refusal of something that the front-end shares. It is the front-end's, as is any trouble with it.
pub fn refuse_shared(error: io::Error) -> Error {
    if is_scarce(&error) {
        host(error)
    } else {
        refuse(error.to_string())
    }
}

/// A refusal of memory.
pub fn refuse_memory(error: &MemoryError) -> Error {
    match error {
        MemoryError::TooManyFiles(_) => Refusal::Scarce(error.to_string()).into(),
        MemoryError::Map { source, .. } if is_scarce(source) => {
            Refusal::Scarce(error.to_string()).into()
        }
        _ => refuse(error.to_string()),
    }
}

/// An answer of the host's.
pub fn host(error: io::Error) -> Error {
    Error::ReqHandlerError(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a session finds in an error: whether it is the front-end's.
    fn is_theirs(error: Error) -> bool {
        let Error::ReqHandlerError(error) = error else {
            panic!("{error}");
        };
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
        matches!(inner, Some(Refusal::Theirs(_)))
    }

    #[test]
    fn what_the_host_lacks_is_not_the_front_ends() {
        let guest = vm_memory::GuestAddress(0);
        let map = |source| refuse_memory(&MemoryError::Map { guest, source });
        let os = |errno: rustix::io::Errno| io::Error::from(errno);
        assert!(!is_theirs(refuse_memory(&MemoryError::TooManyFiles(32))));
        assert!(!is_theirs(map(os(rustix::io::Errno::MFILE))));
        assert!(!is_theirs(map(io::ErrorKind::OutOfMemory.into())));
        assert!(!is_theirs(refuse_shared(os(rustix::io::Errno::NOMEM))));
        assert!(!is_theirs(host(os(rustix::io::Errno::ACCESS))));
        assert!(is_theirs(map(io::ErrorKind::InvalidInput.into())));
        assert!(is_theirs(map(os(rustix::io::Errno::NOTCONN))));
        assert!(is_theirs(refuse_memory(&MemoryError::TooMany)));
        assert!(is_theirs(refuse("a ring")));
    }
}
