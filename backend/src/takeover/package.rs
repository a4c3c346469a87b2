//! All that goes from one process to the next.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use super::READY_LIMIT;
use super::wire::{Letter, SocketName, exactly, lend, receive, send, strange};
use crate::attach::HandedAttachment;
use crate::attach::socket::HandedSocket;
use crate::control::attachments::Terms;
use crate::vhost::message::{DESCRIPTORS_MAX, Message};
use crate::vhost::session::adopt::HandedSession;

/// The most volumes, sessions of a volume, and messages of a session. Not limits of the daemon, but of what is believed.
const COUNT_MAX: usize = 1 << 16;

/// An attached volume.
#[derive(Debug)]
pub struct HandedVolume {
    /// Its name.
    pub name: String,
    /// How it is served.
    pub terms: Terms,
    /// Its socket and its sessions.
    pub attachment: HandedAttachment,
}

/// All of it.
#[derive(Debug)]
pub struct Package {
    /// Since when guests wait, by [`super::now_ns`].
    pub since_ns: u64,
    /// The control socket.
    pub control: HandedSocket,
    /// The socket for who takes over next.
    pub takeover: HandedSocket,
    /// The lock of the store.
    pub lock: OwnedFd,
    /// What is served.
    pub volumes: Vec<HandedVolume>,
}

/// A socket's name.
fn name_of(socket: &HandedSocket) -> SocketName {
    SocketName {
        path: socket.path.as_os_str().as_bytes().to_owned(),
        inode: socket.inode,
    }
}

/// A socket of that name.
fn socket_of(name: SocketName, listener: OwnedFd) -> HandedSocket {
    HandedSocket {
        listener,
        path: PathBuf::from(std::ffi::OsString::from_vec(name.path)),
        inode: name.inode,
    }
}

/// A count that can be.
fn bounded(count: usize) -> io::Result<usize> {
    if count > COUNT_MAX {
        return Err(strange("more than can be was handed over"));
    }
    Ok(count)
}

impl Package {
    /// How many sessions there are.
    pub fn sessions(&self) -> usize {
        let sessions = |volume: &HandedVolume| volume.attachment.sessions.len();
        self.volumes.iter().map(sessions).sum()
    }

    /// Sends it, each letter once `has_room` says that there is room for it.
    ///
    /// # Errors
    /// The other process has gone; the host's answer; those of `has_room`.
    pub(super) fn send(
        &self,
        stream: &UnixStream,
        has_room: &dyn Fn() -> io::Result<()>,
    ) -> io::Result<()> {
        let head = Letter::Head {
            since_ns: self.since_ns,
            ready_within_ms: u64::try_from(READY_LIMIT.as_millis()).unwrap_or(u64::MAX),
            control: name_of(&self.control),
            takeover: name_of(&self.takeover),
            volumes: self.volumes.len(),
        };
        let descriptors = [
            self.control.listener.as_fd(),
            self.takeover.listener.as_fd(),
            self.lock.as_fd(),
        ];
        has_room()?;
        send(stream, &head, &descriptors)?;
        for volume in &self.volumes {
            let socket = &volume.attachment.socket;
            let letter = Letter::Volume {
                name: volume.name.clone(),
                shown: volume.terms.socket.clone(),
                queues: volume.terms.queues,
                read_only: volume.terms.read_only,
                socket: name_of(socket),
                sessions: volume.attachment.sessions.len(),
            };
            has_room()?;
            send(stream, &letter, &[socket.listener.as_fd()])?;
            for session in &volume.attachment.sessions {
                send_session(stream, session, has_room)?;
            }
        }
        Ok(())
    }

    /// Receives one, whose first letter has come.
    ///
    /// # Errors
    /// `UnexpectedEof` if the other process has gone before the end; `InvalidData`; the host's answer.
    pub(super) fn receive(
        stream: &UnixStream,
        head: Letter,
        descriptors: Vec<OwnedFd>,
    ) -> io::Result<Self> {
        let Letter::Head {
            since_ns,
            control,
            takeover,
            volumes,
            ..
        } = head
        else {
            return Err(strange(
                "another letter than the first of what is handed over",
            ));
        };
        let [control_listener, takeover_listener, lock] = exactly(descriptors)?;
        let volumes = (0..bounded(volumes)?).map(|_| receive_volume(stream));
        Ok(Self {
            since_ns,
            control: socket_of(control, control_listener),
            takeover: socket_of(takeover, takeover_listener),
            lock,
            volumes: volumes.collect::<io::Result<_>>()?,
        })
    }
}

/// Sends a session.
fn send_session(
    stream: &UnixStream,
    session: &HandedSession,
    has_room: &dyn Fn() -> io::Result<()>,
) -> io::Result<()> {
    let letter = Letter::Session {
        facts: session.facts.clone(),
        messages: session.messages.len(),
    };
    has_room()?;
    send(stream, &letter, &[session.connection.as_fd()])?;
    let mut known: Vec<Arc<OwnedFd>> = Vec::new();
    for message in &session.messages {
        let before = known.len();
        let place = |descriptor: &Arc<OwnedFd>| {
            let found = known.iter().position(|one| Arc::ptr_eq(one, descriptor));
            found.unwrap_or_else(|| {
                known.push(Arc::clone(descriptor));
                known.len() - 1
            })
        };
        let letter = Letter::Message {
            code: message.code,
            body: message.body.clone(),
            descriptors: message.descriptors.iter().map(place).collect(),
        };
        has_room()?;
        send(
            stream,
            &letter,
            &lend(known.get(before..).unwrap_or_default()),
        )?;
    }
    Ok(())
}

/// Receives a volume.
fn receive_volume(stream: &UnixStream) -> io::Result<HandedVolume> {
    let (letter, descriptors) = receive(stream)?;
    let Letter::Volume {
        name,
        shown,
        queues,
        read_only,
        socket,
        sessions,
    } = letter
    else {
        return Err(strange("another letter than that of a volume"));
    };
    let [listener] = exactly(descriptors)?;
    let sessions = (0..bounded(sessions)?).map(|_| receive_session(stream));
    Ok(HandedVolume {
        name,
        terms: Terms {
            socket: shown,
            queues,
            read_only,
        },
        attachment: HandedAttachment {
            socket: socket_of(socket, listener),
            sessions: sessions.collect::<io::Result<_>>()?,
        },
    })
}

/// Receives a session.
fn receive_session(stream: &UnixStream) -> io::Result<HandedSession> {
    let (letter, descriptors) = receive(stream)?;
    let Letter::Session { facts, messages } = letter else {
        return Err(strange("another letter than that of a session"));
    };
    let [connection] = exactly(descriptors)?;
    let mut known: Vec<Arc<OwnedFd>> = Vec::new();
    let message = |_| {
        let (letter, came) = receive(stream)?;
        let Letter::Message {
            code,
            body,
            descriptors,
        } = letter
        else {
            return Err(strange("another letter than that of a message"));
        };
        known.extend(came.into_iter().map(Arc::new));
        let named = |place: usize| {
            let descriptor = known.get(place).map(Arc::clone);
            descriptor.ok_or_else(|| strange("a message with a descriptor that did not come"))
        };
        if descriptors.len() > DESCRIPTORS_MAX {
            return Err(strange("a message with too many descriptors"));
        }
        Ok(Message {
            code,
            body,
            descriptors: descriptors
                .into_iter()
                .map(named)
                .collect::<io::Result<_>>()?,
        })
    };
    Ok(HandedSession {
        connection,
        facts,
        messages: (0..bounded(messages)?)
            .map(message)
            .collect::<io::Result<_>>()?,
    })
}
