//! Letters between the two processes: JSON with a length in front, and descriptors beside it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize};
use stratablk_layers::store::Store;

use crate::vhost::handler::hand_over::Facts;
use crate::vhost::message::DESCRIPTORS_MAX;

/// The longest letter.
const LETTER_BYTES_MAX: usize = 1 << 20;
/// Bytes in front of a letter: its length, and how many descriptors come with it.
const HEAD_BYTES: usize = 8;

/// A socket's name.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SocketName {
    /// The bytes of its path.
    pub path: Vec<u8>,
    /// Device and number of the socket's inode.
    pub inode: (u64, u64),
}

/// What the two say.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "letter", rename_all = "snake_case")]
pub enum Letter {
    /// The new process is there.
    Hello {
        /// What it speaks.
        version: u32,
        /// The version of its program, for people.
        program: String,
        /// What it writes; see [`formats`]. A program that speaks another version may not say it.
        #[serde(default)]
        formats: Formats,
        /// How many descriptors it may have.
        #[serde(default)]
        descriptors_max: u64,
    },
    /// It will be handed everything.
    Welcome {
        /// The store.
        store: String,
        /// What the running daemon writes.
        formats: Formats,
        /// The running daemon's process.
        pid: u32,
        /// The version of its program, for people.
        program: String,
    },
    /// It will not, and nothing has changed.
    Refused {
        /// Why, for people.
        why: String,
    },
    /// The first of what is handed over; comes with the listening sockets for commands and for the next one to take over, and
    /// the lock of the store.
    Head {
        /// Since when guests wait.
        since_ns: u64,
        /// How long the new process may take to be ready.
        ready_within_ms: u64,
        /// The control socket.
        control: SocketName,
        /// The socket for who takes over next.
        takeover: SocketName,
        /// How many volumes follow.
        volumes: usize,
    },
    /// An attached volume; comes with its listening socket.
    Volume {
        /// Its name.
        name: String,
        /// The socket as it is shown to people.
        shown: String,
        /// How many virtqueues are offered.
        queues: u16,
        /// Whether guests may only read.
        read_only: bool,
        /// The socket.
        socket: SocketName,
        /// How many sessions follow.
        sessions: usize,
    },
    /// A session; comes with its connection.
    Session {
        /// What no message says.
        facts: Facts,
        /// How many messages follow.
        messages: usize,
    },
    /// What a front-end has said, with its descriptors.
    Message {
        /// The number of the message.
        code: u32,
        /// What follows its header.
        body: Vec<u8>,
        /// Which of the descriptors that came with messages of its session it brings, this letter's last: where several bring
        /// one descriptor, it is sent once.
        descriptors: Vec<usize>,
    },
    /// The new process has been handed everything, and asks whether it may have the store.
    Received,
    /// It may. Until it has ended nobody else may.
    Open,
    /// The new process has all that it needs.
    Ready,
    /// Everything is its.
    Yours,
}

/// The versions of formats, by their names.
pub type Formats = BTreeMap<String, i64>;

/// The versions of all that both processes write: what the one has written the other must be able to read.
pub fn formats() -> Formats {
    let named = |(name, version): (&str, i64)| (name.to_owned(), version);
    Store::formats().into_iter().map(named).collect()
}

/// Why two processes cannot have one store after each other, if they write it in other formats.
pub fn difference(ours: &Formats, theirs: &Formats) -> Option<String> {
    let version = |formats: &Formats, name| {
        let known = formats.get(name);
        known.map_or("none".to_owned(), |version| format!("version {version}"))
    };
    let names: BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
    let mut differ = names
        .into_iter()
        .filter(|name| ours.get(*name) != theirs.get(*name));
    let name = differ.next()?;
    let (ours, theirs) = (version(ours, name), version(theirs, name));
    Some(format!("{name}: {ours} here and {theirs} there"))
}

/// An answer that does not fit.
pub fn strange(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_string())
}

/// Sends a letter.
///
/// # Errors
/// The other process has gone or does not read; the host's answer.
pub fn send(
    stream: &UnixStream,
    letter: &Letter,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let text = serde_json::to_vec(letter).map_err(strange)?;
    if text.len() > LETTER_BYTES_MAX || descriptors.len() > DESCRIPTORS_MAX {
        return Err(strange("a letter is too long"));
    }
    let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX).to_le_bytes();
    let mut bytes = Vec::from(number(text.len()));
    bytes.extend(number(descriptors.len()));
    bytes.extend(text);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(strange("a letter has too many descriptors"));
    }
    let slices = [io::IoSlice::new(&bytes)];
    let flags = SendFlags::NOSIGNAL;
    // A socket with a time limit is not gone on with by itself after a signal.
    let mut sent = retry_on_intr(|| rustix::net::sendmsg(stream, &slices, &mut control, flags))?;
    while let Some(rest) = bytes.get(sent..).filter(|rest| !rest.is_empty()) {
        sent += retry_on_intr(|| rustix::net::send(stream, rest, flags))?;
    }
    Ok(())
}

/// Waits for a letter.
///
/// # Errors
/// `UnexpectedEof` if the other process has gone; `InvalidData`; the host's answer.
pub fn receive(stream: &UnixStream) -> io::Result<(Letter, Vec<OwnedFd>)> {
    let mut head = [0; HEAD_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [io::IoSliceMut::new(&mut head)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = retry_on_intr(|| rustix::net::recvmsg(stream, &mut slices, &mut control, flags))?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(came) = message {
            descriptors.extend(came);
        }
    }
    if got.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    // What is there of it came with the first byte.
    io::Read::read_exact(&mut &*stream, head.get_mut(got.bytes..).unwrap_or_default())?;
    let [l0, l1, l2, l3, d0, d1, d2, d3] = head;
    let len = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
    let count = usize::try_from(u32::from_le_bytes([d0, d1, d2, d3])).unwrap_or(usize::MAX);
    if len > LETTER_BYTES_MAX || count > DESCRIPTORS_MAX {
        return Err(strange("no letter of a takeover"));
    }
    if got.flags.contains(ReturnFlags::CTRUNC) {
        return Err(strange(
            "not all descriptors could be received; raise the limit of open files (`ulimit -Hn`)",
        ));
    }
    if count != descriptors.len() {
        return Err(strange("a letter came with other descriptors than it says"));
    }
    let mut text = vec![0; len];
    io::Read::read_exact(&mut &*stream, &mut text)?;
    let letter = serde_json::from_slice(&text).map_err(strange)?;
    Ok((letter, descriptors))
}

/// Waits until something has come or the other process has gone, but not for longer than that. Returns whether it was so.
///
/// # Errors
/// The host's answer.
pub fn wait(stream: &UnixStream, time: Duration) -> io::Result<bool> {
    wait_until(stream, PollFlags::IN, time)
}

/// The same for any readiness. The end of the connection is one of each.
///
/// # Errors
/// As `wait`.
pub fn wait_until(stream: &UnixStream, events: PollFlags, time: Duration) -> io::Result<bool> {
    let mut fds = [PollFd::new(stream, events)];
    let time = Timespec::try_from(time).map_err(strange)?;
    match rustix::event::poll(&mut fds, Some(&time)) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// The descriptors of a letter that comes with so many.
///
/// # Errors
/// `InvalidData` for another number.
pub fn exactly<const N: usize>(descriptors: Vec<OwnedFd>) -> io::Result<[OwnedFd; N]> {
    let wrong = |_| strange("a letter came with other descriptors than it should");
    descriptors.try_into().map_err(wrong)
}

/// Borrows descriptors.
pub fn lend(descriptors: &[Arc<OwnedFd>]) -> Vec<BorrowedFd<'_>> {
    descriptors.iter().map(|one| one.as_fd()).collect()
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::io::Write;

    use super::*;

    #[test]
    fn letters_come_as_they_were_sent() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file: OwnedFd = tempfile::tempfile().unwrap().into();
        let body = vec![7; 200_000];
        let writer = std::thread::spawn(move || {
            let letter = Letter::Message {
                code: 5,
                body,
                descriptors: vec![0],
            };
            send(&ours, &letter, &[file.as_fd()]).unwrap();
            send(&ours, &Letter::Ready, &[]).unwrap();
        });
        let (letter, descriptors) = receive(&theirs).unwrap();
        assert!(matches!(letter, Letter::Message { code: 5, body, .. } if body.len() == 200_000));
        assert!(exactly::<1>(descriptors).is_ok());
        assert!(matches!(receive(&theirs).unwrap().0, Letter::Ready));
        writer.join().unwrap();
        let gone = receive(&theirs).unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn formats_that_differ_are_named() {
        let ours = formats();
        assert!(ours.contains_key("catalog") && ours.contains_key("cache"));
        assert_eq!(difference(&ours, &ours), None);
        let mut theirs = ours.clone();
        *theirs.get_mut("catalog").unwrap() += 1;
        let told = difference(&ours, &theirs).unwrap();
        assert!(told.starts_with("catalog: version "), "{told}");
        let mut theirs = ours.clone();
        theirs.insert("more".into(), 1);
        let told = difference(&ours, &theirs).unwrap();
        assert_eq!(told, "more: none here and version 1 there");
        assert!(difference(&ours, &Formats::new()).is_some());
    }

    /// A socket with a time limit has calls fail that a signal comes in the midst of.
    #[test]
    fn a_signal_is_no_end_of_a_letter() {
        use std::os::unix::thread::JoinHandleExt;
        use std::sync::atomic::{AtomicBool, Ordering};
        use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

        extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(SIGRTMIN(), nothing).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        for stream in [&ours, &theirs] {
            let limit = Some(Duration::from_secs(20));
            stream.set_write_timeout(limit).unwrap();
            stream.set_read_timeout(limit).unwrap();
        }
        let body = vec![7; 200_000];
        let done = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&done);
        let writer = std::thread::spawn(move || {
            let letter = Letter::Message {
                code: 5,
                body,
                descriptors: Vec::new(),
            };
            // More than the socket holds, so that it waits.
            let sent = (0..20).try_for_each(|_| send(&ours, &letter, &[]));
            ended.store(true, Ordering::SeqCst);
            sent
        });
        assert_ne!(writer.as_pthread_t(), 0);
        for _ in 0..20 {
            for _ in 0..50 {
                if !done.load(Ordering::SeqCst) {
                    // One that has just ended does not mind.
                    let _ = writer.kill(0);
                }
            }
            receive(&theirs).unwrap();
        }
        writer.join().unwrap().unwrap();
    }

    #[test]
    fn what_is_no_letter_is_refused() {
        for bytes in [
            &b"GET / HT"[..],
            &[1, 0],
            &[3, 0, 0, 0, 0, 0, 0, 0, b'{', b'}', b' '],
        ] {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            ours.write_all(bytes).unwrap();
            drop(ours);
            assert!(receive(&theirs).is_err(), "{bytes:?}");
        }
    }
}
