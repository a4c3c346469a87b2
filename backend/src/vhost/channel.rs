//! The way back to the front-end: the socket of SET_BACKEND_REQ_FD.
//!
//! One message goes there: that the configuration changed (a disk grew). It is sent without waiting for room and without
//! asking for a reply, so a front-end that never reads its socket holds up nobody; one message of 12 bytes is either
//! sent whole or not at all.
//!
//! The crate's own sender offers no such message and waits without a limit, hence this one.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::net::SendFlags;

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG.
const CONFIG_CHANGE: u32 = 2;
/// Version 1 of the protocol, no reply wanted.
const FLAGS: u32 = 1;

/// The socket.
#[derive(Debug)]
pub struct Channel(Arc<OwnedFd>);

impl Channel {
    /// Takes the socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self(Arc::new(socket))
    }

    /// The socket.
    pub fn descriptor(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.0)
    }

    /// Tells the front-end to read the configuration again.
    ///
    /// # Errors
    /// `WouldBlock` if it has not read what was sent before; otherwise the host's answer.
    pub fn config_changed(&self) -> io::Result<()> {
        let mut message = [0; 12];
        let words = [CONFIG_CHANGE, FLAGS, 0];
        for (place, word) in message.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *place = word.to_le_bytes();
        }
        rustix::net::send(&self.0, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_front_end_that_never_reads_holds_up_nobody() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let channel = Channel::new(ours.into());
        let full = (0..1_000_000)
            .find_map(|_| channel.config_changed().err())
            .unwrap();
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        let mut message = [0; 12];
        theirs.read_exact(&mut message).unwrap();
        assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        drop(theirs);
        assert!(channel.config_changed().is_err());
    }
}
