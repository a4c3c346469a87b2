//! The message layer of vhost-user, written from the protocol document and able to break every rule of it.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::wait::{PATIENCE, readable};

/// The numbers of the requests that a front-end sends.
pub mod code {
    #![expect(missing_docs, reason = "the names are those of the protocol document")]
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
    pub const SET_DEVICE_STATE_FD: u32 = 42;
    pub const CHECK_DEVICE_STATE: u32 = 43;
}

/// The version of the protocol, in the low bits of a header's flags.
pub const VERSION: u32 = 1;
/// The flag of a reply.
pub const REPLY: u32 = 4;
/// The flag that asks for a reply to a message that has none of its own.
pub const NEED_REPLY: u32 = 8;
/// Bytes of a header.
pub const HEADER_BYTES: usize = 12;

/// A message that came from the back-end.
#[derive(Debug)]
pub struct Message {
    /// The request that it answers.
    pub request: u32,
    /// Version and flags.
    pub flags: u32,
    /// What follows the header.
    pub payload: Vec<u8>,
    /// A file descriptor that came with it.
    pub file: Option<File>,
}

impl Message {
    /// The payload as one 64-bit number.
    ///
    /// # Panics
    /// If it has another size.
    #[track_caller]
    pub fn as_u64(&self) -> u64 {
        let bytes = self.payload.as_slice().try_into();
        u64::from_le_bytes(bytes.unwrap_or_else(|_| panic!("a reply of 8 bytes, not {self:?}")))
    }
}

/// The header of a message.
pub fn header(request: u32, flags: u32, payload_bytes: u32) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[..4].copy_from_slice(&request.to_le_bytes());
    bytes[4..8].copy_from_slice(&flags.to_le_bytes());
    bytes[8..].copy_from_slice(&payload_bytes.to_le_bytes());
    bytes
}

/// One end of a connection.
#[derive(Debug)]
pub struct Wire {
    /// The connected socket.
    stream: UnixStream,
}

impl Wire {
    /// Connects to a back-end that listens.
    ///
    /// # Errors
    /// The host's answer.
    pub fn connect(path: &Path) -> io::Result<Self> {
        Self::from_stream(UnixStream::connect(path)?)
    }

    /// Speaks over a socket that is connected already.
    ///
    /// # Errors
    /// If the host refuses time limits on it.
    pub fn from_stream(stream: UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { stream })
    }

    /// Sends bytes as they are, with file descriptors at the first of them.
    ///
    /// # Errors
    /// `BrokenPipe` or `ConnectionReset` when the back-end hung up.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let sent = self.stream.send_with_fds(&[bytes], &raw)?;
        if sent != bytes.len() {
            return Err(io::Error::new(
                ErrorKind::WriteZero,
                "the socket took only a part",
            ));
        }
        Ok(())
    }

    /// Sends one message.
    ///
    /// # Errors
    /// As [`send_bytes`](Self::send_bytes).
    pub fn send(
        &self,
        request: u32,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let payload_bytes = u32::try_from(payload.len()).expect("a short payload");
        let mut bytes = header(request, flags, payload_bytes).to_vec();
        bytes.extend_from_slice(payload);
        self.send_bytes(&bytes, fds)
    }

    /// Receives one message; `None` when the back-end hung up.
    ///
    /// # Errors
    /// `WouldBlock` when nothing came in time, `UnexpectedEof` when a message broke off.
    pub fn receive(&self) -> io::Result<Option<Message>> {
        let mut head = [0; HEADER_BYTES];
        let (count, file) = match self.stream.recv_with_fd(&mut head) {
            Ok((0, _)) => return Ok(None),
            Ok(received) => received,
            Err(error) if error.errno() == libc::ECONNRESET => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        (&self.stream).read_exact(&mut head[count..])?;
        let field =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let mut payload = vec![0; usize::try_from(field(8)).expect("a reply fits")];
        assert!(payload.len() <= 4096, "a reply of {} bytes", payload.len());
        (&self.stream).read_exact(&mut payload)?;
        Ok(Some(Message {
            request: field(0),
            flags: field(4),
            payload,
            file,
        }))
    }

    /// Waits no longer than that for room to send.
    pub fn limit_sending(&self, time: Duration) {
        self.stream
            .set_write_timeout(Some(time))
            .expect("a connected socket");
    }

    /// Whether the back-end sends nothing and does not hang up for that time.
    pub fn is_silent(&self, time: Duration) -> bool {
        readable([self.stream.as_fd()], time) == [false]
    }

    /// The socket, for a wait on several things.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
