//! The transfer of a device's state, through a pipe of the front-end's.
//!
//! The state is a record of a few hundred bytes that names what the disk holds. It fits into any pipe, so it is saved without
//! waiting: a pipe that has no room is refused. A state that is loaded comes in the front-end's time, and may be anything: a
//! thread reads it, up to a bound and a deadline, and nobody else waits for the pipe.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use vhost::vhost_user::message::{VhostTransferStateDirection, VhostTransferStatePhase};

use super::disk_use::DiskUse;
use crate::confine::{self, Role};
use crate::worker::provider::DiskProvider;

/// The longest state that is read.
const STATE_BYTES_MAX: usize = 64 << 10;
/// What a pipe takes in one piece, if it takes anything.
const PIECE_BYTES: usize = 4096;
/// How long a front-end may take to send a state.
const SEND_PATIENCE: Duration = Duration::from_secs(10);
/// How long the check of a state waits for its end, which the front-end has sent before it asked.
const CHECK_PATIENCE: Duration = Duration::from_secs(1);

/// A transfer that has begun.
#[derive(Debug)]
pub enum Transfer {
    /// The state was saved and sent.
    Saved,
    /// A state is being read.
    Coming(Incoming),
}

/// A state that is being read.
#[derive(Debug)]
pub struct Incoming(Receiver<io::Result<Vec<u8>>>);

impl Transfer {
    /// Saves the state of a device whose rings are stopped, or begins to read one.
    ///
    /// # Errors
    /// Why it cannot be saved, or sent.
    pub fn begin<P: DiskProvider>(
        disk: &DiskUse<P>,
        direction: VhostTransferStateDirection,
        phase: VhostTransferStatePhase,
        file: File,
    ) -> io::Result<Self> {
        // There is no other.
        let VhostTransferStatePhase::STOPPED = phase;
        match direction {
            VhostTransferStateDirection::SAVE => {
                let saved = check_room(&file).and_then(|()| disk.save());
                let sent = saved.and_then(|record| send(file, &record));
                sent.inspect_err(|error| {
                    tracing::error!(volume = disk.name(), %error, "the state of the device was not saved");
                })?;
                Ok(Self::Saved)
            }
            VhostTransferStateDirection::LOAD => Ok(Self::Coming(Incoming::read(file)?)),
        }
    }

    /// How it ended. A state that came is loaded now.
    ///
    /// # Errors
    /// It did not come whole, or is not what the disk holds.
    pub fn check<P: DiskProvider>(self, disk: &mut DiskUse<P>) -> io::Result<()> {
        let Self::Coming(incoming) = self else {
            return Ok(());
        };
        let loaded = incoming.wait().and_then(|record| disk.load(record));
        loaded.inspect_err(|error| {
            tracing::error!(volume = disk.name(), %error, "the state of the device was not loaded");
        })
    }
}

/// Refuses a channel that would have us wait.
///
/// # Errors
/// `WouldBlock`, or the host's answer.
fn check_room(file: &File) -> io::Result<()> {
    if is_ready(file, PollFlags::OUT, Duration::ZERO)? {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::WouldBlock,
        "the front-end's channel for the state has no room",
    ))
}

/// Sends a state, and closes the channel.
///
/// # Errors
/// It is too long for one piece, the channel has no room, or the host's answer.
fn send(mut file: File, state: &[u8]) -> io::Result<()> {
    check_room(&file)?;
    if state.len() > PIECE_BYTES || file.write(state)? != state.len() {
        return Err(io::Error::other("the state was not sent in one piece"));
    }
    Ok(())
}

/// Waits until the channel is ready for something, or at an end. Returns whether it is.
fn is_ready(file: &File, events: PollFlags, patience: Duration) -> io::Result<bool> {
    let mut fds = [PollFd::new(file, events)];
    let timeout = Timespec::try_from(patience).map_err(io::Error::other)?;
    match rustix::event::poll(&mut fds, Some(&timeout)) {
        Ok(count) => Ok(count > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Reads a state to its end.
fn read_all(mut file: File) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + SEND_PATIENCE;
    let mut state = Vec::new();
    let mut piece = [0; PIECE_BYTES];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the front-end did not send all of the state in time",
            ));
        }
        if !is_ready(&file, PollFlags::IN, left)? {
            continue;
        }
        let count = file.read(&mut piece)?;
        if count == 0 {
            return Ok(state);
        }
        state.extend(piece.get(..count).unwrap_or_default());
        if state.len() > STATE_BYTES_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the state is longer than any of ours",
            ));
        }
    }
}

impl Incoming {
    /// Begins to read a state. The channel is closed at its end, or when it is refused.
    ///
    /// # Errors
    /// The host has no thread left.
    fn read(file: File) -> io::Result<Self> {
        let (sender, receiver) = channel();
        thread::Builder::new()
            .name("device-state".into())
            .spawn(move || {
                confine::enter(Role::Files);
                // Nobody wants it any more if the front-end has gone.
                let _ = sender.send(read_all(file));
            })?;
        Ok(Self(receiver))
    }

    /// The state, of which the front-end says that it has sent all.
    ///
    /// # Errors
    /// It is too long, or has no end.
    fn wait(self) -> io::Result<Vec<u8>> {
        match self.0.recv_timeout(CHECK_PATIENCE) {
            Ok(state) => state,
            Err(RecvTimeoutError::Timeout) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the front-end has not closed its channel for the state",
            )),
            Err(RecvTimeoutError::Disconnected) => {
                Err(io::Error::other("the thread that reads the state failed"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]
    use std::os::fd::OwnedFd;

    use super::*;

    /// A pipe: what is read from, what is written to.
    fn pipe() -> (File, File) {
        let (reader, writer) = std::io::pipe().unwrap();
        (
            File::from(OwnedFd::from(reader)),
            File::from(OwnedFd::from(writer)),
        )
    }

    #[test]
    fn a_state_comes_whole_or_not_at_all() {
        let (reader, mut writer) = pipe();
        let incoming = Incoming::read(reader).unwrap();
        writer.write_all(b"some").unwrap();
        writer.write_all(b" state").unwrap();
        drop(writer);
        assert_eq!(incoming.wait().unwrap(), b"some state");

        let (reader, writer) = pipe();
        let incoming = Incoming::read(reader).unwrap();
        let endless = incoming.wait().unwrap_err();
        assert_eq!(endless.kind(), io::ErrorKind::TimedOut);
        drop(writer);

        let (reader, mut writer) = pipe();
        let incoming = Incoming::read(reader).unwrap();
        // It is told off instead of waiting for a reader.
        let told = writer.write_all(&vec![1; 4 * STATE_BYTES_MAX]);
        assert_eq!(told.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        let long = incoming.wait().unwrap_err();
        assert_eq!(long.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_full_pipe_is_refused() {
        let (mut reader, mut writer) = pipe();
        send(writer.try_clone().unwrap(), b"state").unwrap();
        while check_room(&writer).is_ok() {
            writer.write_all(&[0; PIECE_BYTES]).unwrap();
        }
        let full = send(writer, b"state").unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        let mut state = [0; 5];
        reader.read_exact(&mut state).unwrap();
        assert_eq!(&state, b"state");
    }
}
