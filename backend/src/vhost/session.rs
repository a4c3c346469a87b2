//! One front-end's session: its messages, one after the other, each with a deadline.
//!
//! The crate reads a message with blocking calls. So that no front-end can hold a thread, the session hands it a message
//! only when all of it has arrived and there is room for the reply; until then it waits for the socket together with
//! whatever may end the session. A front-end may be idle as long as it likes once it serves a guest, but may not
//! take longer than [`Patience::message`] over a message or the claim, and not longer than [`Patience::rival`] while another
//! front-end waits for a place.
//!
//! A message that is refused costs the front-end its session only if it could not be told otherwise.

pub mod adopt;

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE, VhostUserHeaderFlag};
use vhost::vhost_user::{BackendReqHandler, Error};

use self::adopt::HandedSession;
use super::handler::Handler;
use super::handler::hand_over::Facts;
use super::message::Message;
use crate::signal::Signal;
use crate::worker::provider::DiskProvider;

/// Bytes of a header.
const HEADER_BYTES: usize = 12;
/// How often an unfinished message is looked at. The socket is readable already, so waiting for it would not wait.
const UNFINISHED_PERIOD: Duration = Duration::from_millis(2);

/// How long a front-end may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// From the first byte of a message to its last, for reading its reply, and until it claims the device.
    pub message: Duration,
    /// The same while another front-end waits.
    pub rival: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            message: Duration::from_secs(30),
            rival: Duration::from_secs(1),
        }
    }
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// The front-end closed its socket.
    #[error("the front-end closed the connection")]
    Closed,
    /// Somebody else is to go on with it.
    #[error("the session goes on in another process")]
    HandedOver(Box<HandedSession>),
    /// The same, and it was not handed over yet.
    #[error("the session is to go on in another process")]
    Leaving,
    /// We were told to stop.
    #[error("the attachment is being stopped")]
    Stopped,
    /// A worker panicked.
    #[error("a worker failed")]
    WorkerFailed,
    /// The front-end took too long.
    #[error("the front-end took too long over a message")]
    TooSlow,
    /// A message was refused, and there was no way to say so.
    #[error("message {code}: {error}")]
    Refused {
        /// Its number.
        code: u32,
        /// Why.
        error: Error,
    },
    /// The host failed us.
    #[error("socket: {0}")]
    Host(#[from] io::Error),
}

impl From<rustix::io::Errno> for End {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::Host(errno.into())
    }
}

/// What may end a session from outside.
#[derive(Clone, Copy, Debug)]
pub struct Outside<'a> {
    /// Readable when the session is to stop.
    pub stop: BorrowedFd<'a>,
    /// Readable when it is to go on in another process.
    pub hand_over: Option<BorrowedFd<'a>>,
    /// Readable when a worker has panicked.
    pub trouble: BorrowedFd<'a>,
    /// Up while another front-end waits for a place. Who makes way for it takes it down, so that no other one does too.
    pub rivals: Option<&'a Signal>,
}

/// A message that can be read without waiting.
#[derive(Debug)]
struct Ready {
    /// Its number.
    code: u32,
    /// Whether it asks for an acknowledgement.
    need_reply: bool,
    /// The socket that it brings, if it is SET_BACKEND_REQ_FD.
    channel: Option<OwnedFd>,
}

/// The first bytes of the socket.
struct Peeked {
    /// The bytes, as far as they have arrived.
    header: [u8; HEADER_BYTES],
    /// How many have.
    len: usize,
    /// A descriptor that came with them, if it was asked for.
    descriptor: Option<OwnedFd>,
}

/// A session.
struct Session<'a, P: DiskProvider> {
    /// The connection.
    socket: &'a UnixStream,
    /// The device.
    handler: &'a Mutex<Handler<P>>,
    /// What may end it from outside.
    outside: Outside<'a>,
    /// How long the front-end may take.
    patience: Patience,
    /// When another front-end was first seen waiting.
    rival_since: Option<Instant>,
    /// When the session began.
    began: Instant,
}

/// Serves a front-end until it goes away or must.
pub fn serve<P: DiskProvider>(
    socket: UnixStream,
    handler: Handler<P>,
    outside: Outside<'_>,
    patience: Patience,
) -> End {
    let handler = Arc::new(Mutex::new(handler));
    let copy = match socket.try_clone() {
        Ok(copy) => copy,
        Err(error) => return error.into(),
    };
    // A body that does not follow its header, which only a front-end that splits a header can bring about.
    if let Err(error) = socket.set_read_timeout(Some(patience.rival)) {
        return error.into();
    }
    let reader = BackendReqHandler::from_stream(socket, Arc::clone(&handler));
    run(reader, copy, &handler, outside, patience)
}

/// Serves a front-end whose messages `reader` reads, from that socket.
fn run<P: DiskProvider>(
    mut reader: BackendReqHandler<Mutex<Handler<P>>>,
    socket: UnixStream,
    handler: &Mutex<Handler<P>>,
    outside: Outside<'_>,
    patience: Patience,
) -> End {
    let mut session = Session {
        socket: &socket,
        handler,
        outside,
        patience,
        rival_since: None,
        began: Instant::now(),
    };
    let end = loop {
        if let Err(end) = session.one_message(&mut reader) {
            break end;
        }
    };
    if matches!(end, End::Leaving) {
        let handed = session.hand_over();
        return handed.map_or_else(End::from, |(facts, messages)| {
            let connection = socket.into();
            End::HandedOver(Box::new(HandedSession {
                connection,
                facts,
                messages,
            }))
        });
    }
    // Before the socket closes, so that nothing touches guest memory any more when the front-end sees it closed.
    session.device().finish();
    end
}

/// Whether a message has a reply of its own, which is missing when it is refused.
fn has_reply(code: u32) -> bool {
    use FrontendReq as Req;
    let replies = [
        Req::GET_FEATURES,
        Req::GET_PROTOCOL_FEATURES,
        Req::GET_VRING_BASE,
        Req::GET_QUEUE_NUM,
        Req::GET_MAX_MEM_SLOTS,
        Req::GET_CONFIG,
        Req::GET_INFLIGHT_FD,
        Req::SET_LOG_BASE,
        Req::SET_DEVICE_STATE_FD,
        Req::CHECK_DEVICE_STATE,
    ];
    replies.iter().any(|reply| u32::from(*reply) == code)
}

impl<P: DiskProvider> Session<'_, P> {
    /// Locks the device. Only this thread does.
    fn device(&self) -> std::sync::MutexGuard<'_, Handler<P>> {
        self.handler.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the device for somebody else to go on with it.
    fn hand_over(&self) -> io::Result<(Facts, Vec<Message>)> {
        let mut device = self.device();
        let handed = device.hand_over();
        device.finish();
        handed
    }

    /// Waits for a message and has it handled.
    fn one_message(
        &mut self,
        reader: &mut BackendReqHandler<Mutex<Handler<P>>>,
    ) -> Result<(), End> {
        let ready = self.wait_for_message()?;
        self.wait_for_room()?;
        let _message = self.device().begin_message();
        let result = reader.handle_request();
        let mut device = self.device();
        device.adopt_channel(ready.channel.filter(|_| result.is_ok()));
        let told = ready.need_reply && device.acknowledges() && !has_reply(ready.code);
        // A guest's write of the configuration space that has no effect is no reason to take its disk away.
        let harmless = ready.code == u32::from(FrontendReq::SET_CONFIG);
        match result {
            Ok(()) => Ok(()),
            Err(Error::ReqHandlerError(why)) if told || harmless => {
                tracing::warn!(message = ready.code, %why, "refused a message");
                Ok(())
            }
            Err(Error::Disconnected | Error::SocketBroken(_)) => Err(End::Closed),
            Err(error) => Err(End::Refused {
                code: ready.code,
                error,
            }),
        }
    }

    /// Until when the front-end has for something that began then.
    fn deadline(&self, since: Instant) -> Instant {
        let alone = since + self.patience.message;
        match self.rival_since {
            Some(_) => alone.min(since + self.patience.rival),
            None => alone,
        }
    }

    /// Waits for the socket (`events`; never satisfied if empty), at most until `deadline` or for `at_most`. Returns what the
    /// socket is ready for.
    fn wait(
        &mut self,
        events: PollFlags,
        deadline: Option<Instant>,
        at_most: Option<Duration>,
    ) -> Result<PollFlags, End> {
        let now = Instant::now();
        if deadline.is_some_and(|deadline| deadline <= now) {
            // If it is only because of a rival, and that one has found a place, there is time again.
            return match (self.rival_since.take(), self.outside.rivals) {
                (Some(_), Some(rivals)) if !rivals.take() => Ok(PollFlags::empty()),
                _ => Err(End::TooSlow),
            };
        }
        let left = deadline.map(|deadline| deadline - now);
        let timeout = match (left, at_most) {
            (Some(left), Some(most)) => Some(left.min(most)),
            (left, most) => left.or(most),
        };
        let timeout = timeout.and_then(|time| Timespec::try_from(time).ok());
        let mut fds = vec![
            PollFd::new(self.socket, events),
            PollFd::from_borrowed_fd(self.outside.stop, PollFlags::IN),
            PollFd::from_borrowed_fd(self.outside.trouble, PollFlags::IN),
        ];
        let hand_over = self.outside.hand_over;
        fds.extend(hand_over.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        // Who serves a guest is in nobody's way.
        if (deadline.is_some() || !self.device().is_serving())
            && self.rival_since.is_none()
            && let Some(rivals) = self.outside.rivals
        {
            fds.push(PollFd::new(rivals, PollFlags::IN));
        }
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut ready = fds.iter().map(PollFd::revents);
        let socket = ready.next().unwrap_or(PollFlags::empty());
        let mut is_ready = || ready.next().is_some_and(|flags| !flags.is_empty());
        if is_ready() {
            return Err(End::Stopped);
        }
        if is_ready() {
            return Err(End::WorkerFailed);
        }
        if hand_over.is_some() && is_ready() {
            return Err(End::Leaving);
        }
        if is_ready() {
            self.rival_since = Some(Instant::now());
        }
        Ok(socket)
    }

    /// Waits until a whole message has arrived.
    fn wait_for_message(&mut self) -> Result<Ready, End> {
        let owned = self.device().is_owned();
        let serving = self.device().is_serving();
        if serving {
            self.rival_since = None;
        }
        let mut started = None;
        loop {
            let since = started.or((!owned).then_some(self.began));
            // A front-end that has claimed the device and uses no ring may wait for its guest as long as it likes, but not
            // for ever while another one waits for it.
            let idle = self.rival_since.filter(|_| owned && !serving);
            let deadline = since
                .map(|since| self.deadline(since))
                .or_else(|| idle.map(|rival| rival + self.patience.message));
            // An unfinished message has made the socket readable for good; only its end is news then.
            let ready = if started.is_some() {
                self.wait(PollFlags::RDHUP, deadline, Some(UNFINISHED_PERIOD))?
            } else {
                self.wait(PollFlags::IN | PollFlags::RDHUP, deadline, None)?
            };
            let ended = ready.intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR);
            let arrived = usize::try_from(rustix::io::ioctl_fionread(self.socket)?).unwrap_or(0);
            if arrived == 0 {
                if ended {
                    return Err(End::Closed);
                }
                continue;
            }
            if let Some(message) = self.ready_message(arrived)? {
                return Ok(message);
            }
            if ended {
                return Err(End::Closed);
            }
            started.get_or_insert_with(Instant::now);
        }
    }

    /// The next message, if all of it is among the bytes that have arrived.
    fn ready_message(&self, arrived: usize) -> Result<Option<Ready>, End> {
        let peeked = self.peek(false)?;
        let [c0, c1, c2, c3, f0, f1, f2, f3, s0, s1, s2, s3] = peeked.header;
        let code = u32::from_le_bytes([c0, c1, c2, c3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let size = u32::from_le_bytes([s0, s1, s2, s3]);
        if peeked.len < HEADER_BYTES {
            // A header in pieces of which one carries descriptors cannot be looked at as a whole, but can be read.
            return Ok((arrived >= HEADER_BYTES).then_some(Ready {
                code: 0,
                need_reply: false,
                channel: None,
            }));
        }
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        // One that is too large is refused by its header.
        if size <= MAX_MSG_SIZE && arrived < HEADER_BYTES + size {
            return Ok(None);
        }
        let brings_channel = code == u32::from(FrontendReq::SET_BACKEND_REQ_FD);
        Ok(Some(Ready {
            code,
            need_reply: flags & VhostUserHeaderFlag::NEED_REPLY.bits() != 0,
            channel: if brings_channel {
                self.peek(true)?.descriptor
            } else {
                None
            },
        }))
    }

    /// Looks at the next header without taking it. The crate gives no access to the socket that SET_BACKEND_REQ_FD brings, so
    /// it is copied here.
    fn peek(&self, with_descriptor: bool) -> Result<Peeked, End> {
        let mut header = [0; HEADER_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = if with_descriptor {
            RecvAncillaryBuffer::new(&mut space)
        } else {
            RecvAncillaryBuffer::default()
        };
        let mut buffers = [io::IoSliceMut::new(&mut header)];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = rustix::net::recvmsg(self.socket, &mut buffers, &mut control, flags)?;
        let mut descriptor = None;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
                descriptor = descriptors.next();
            }
        }
        Ok(Peeked {
            header,
            len: received.bytes,
            descriptor,
        })
    }

    /// Waits until a reply can be sent without waiting. The socket counts as writable while most of its buffer is free.
    fn wait_for_room(&mut self) -> Result<(), End> {
        let since = Instant::now();
        loop {
            let deadline = self.deadline(since);
            let ready = self.wait(PollFlags::OUT, Some(deadline), None)?;
            if ready.contains(PollFlags::OUT) {
                return Ok(());
            }
            if ready.intersects(PollFlags::HUP | PollFlags::ERR) {
                return Err(End::Closed);
            }
        }
    }
}

impl<'a> Outside<'a> {
    /// What may end a session.
    pub fn new(stop: &'a impl AsFd, trouble: &'a impl AsFd, rivals: Option<&'a Signal>) -> Self {
        Self {
            stop: stop.as_fd(),
            trouble: trouble.as_fd(),
            rivals,
            hand_over: None,
        }
    }

    /// The same, with what has sessions handed over.
    pub fn with_hand_over(self, hand_over: &'a impl AsFd) -> Self {
        Self {
            hand_over: Some(hand_over.as_fd()),
            ..self
        }
    }
}
