//! Sessions that go from one process to the next while their front-ends stay connected.
//!
//! Every wait of a session is between two messages, since nothing is taken from the socket before a message is there as a
//! whole. So it can be handed over in any of them, and what has arrived stays in the socket.
//!
//! Who takes it over is told what the front-end has said ([`Message`]) by way of a pair of sockets; when that is done, the
//! front-end's connection takes the place of the pair. That is one descriptor that comes to name another socket, so whatever
//! reads from it has no part in it.
//!
//! Each message is let go once it was told, and its descriptors with it. So a session has no more descriptors while it is taken
//! over than before and afterwards, but for a few; see [`DESCRIPTORS`].

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::DupFlags;
use rustix::net::RecvFlags;
use vhost::vhost_user::{BackendReqHandler, Error};

use super::{End, Outside, Patience, Session, run};
use crate::vhost::handler::Handler;
use crate::vhost::handler::hand_over::Facts;
use crate::vhost::message::Message;
use crate::vhost::refusal::{Refusal, is_scarce};
use crate::worker::provider::DiskProvider;

/// How many descriptors a session has while it is taken over that it has neither before nor afterwards: the connection between
/// the pair and what it stands for, both ends of the pair, and what a message brings.
pub const DESCRIPTORS: usize = 4;

/// How long one session may keep the others from being told of their memory.
const TURN_LIMIT: Duration = Duration::from_millis(500);

/// A session between two processes.
#[derive(Debug)]
pub struct HandedSession {
    /// The front-end's connection.
    pub connection: OwnedFd,
    /// What no message says.
    pub facts: Facts,
    /// What the front-end has said.
    pub messages: Vec<Message>,
}

/// Up when it is certain who serves what was handed over.
#[derive(Debug, Default)]
pub struct Release {
    /// Whether it is up.
    up: Mutex<bool>,
    /// Notified when it goes up.
    changed: Condvar,
    /// Whose turn it is to be told of a table of memory: its descriptors come all at once, one for each region, so that not
    /// all sessions should have such a message at a time.
    table: Mutex<Table>,
    /// Notified when a turn is over.
    next: Condvar,
}

/// Turns at messages that bring many descriptors.
#[derive(Debug, Default)]
struct Table {
    /// How many turns there were.
    turns: u64,
    /// When the one began that is not over.
    since: Option<Instant>,
}

/// A turn; over when this is dropped, and at the latest when the next one has waited for long enough: a file of a front-end's
/// may take as long as it likes to be looked at.
#[derive(Debug)]
struct Turn<'a> {
    /// Whose.
    release: &'a Release,
    /// Which it is.
    number: u64,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let table = self.release.table.lock();
        let mut table = table.unwrap_or_else(PoisonError::into_inner);
        if table.turns == self.number {
            table.since = None;
            self.release.next.notify_one();
        }
    }
}

impl Release {
    /// Waits for a turn.
    fn turn(&self) -> Turn<'_> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(since) = table.since {
            let left = TURN_LIMIT.saturating_sub(since.elapsed());
            if left.is_zero() {
                break;
            }
            let waited = self.next.wait_timeout(table, left);
            (table, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        table.turns += 1;
        table.since = Some(Instant::now());
        Turn {
            release: self,
            number: table.turns,
        }
    }

    /// Puts it up.
    pub fn raise(&self) {
        *self.up.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Waits until it is up.
    pub fn wait(&self) {
        let up = self.up.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_while(up, |up| !*up);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

/// How a session fared that is taken over, told before its rings run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Adopted {
    /// It had no rings to run.
    Idle,
    /// Its rings are ready to run.
    Ready,
    /// It had rings to run, and cannot, wherever it is tried: its front-end or its guest has seen to that.
    Lost,
    /// It cannot be served in this process, for this reason, and perhaps in another one.
    Failed(String),
}

/// How the session of a front-end of this volume fared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fared {
    /// The volume.
    pub volume: String,
    /// How it fared.
    pub how: Adopted,
}

/// A session to take over.
#[derive(Debug)]
pub struct Adoption {
    /// The session.
    pub session: HandedSession,
    /// Two connected sockets of ours, the session's end first.
    pub pair: (UnixStream, UnixStream),
    /// Told how it fared.
    pub told: Teller,
    /// When its rings may run.
    pub release: Arc<Release>,
}

/// Tells how a session fared, once: if nobody does, that this process could not serve it.
#[derive(Debug)]
pub struct Teller {
    /// Whoever counts; nobody any more when it was told.
    told: Option<mpsc::Sender<Fared>>,
    /// The volume.
    volume: String,
    /// Whether it had rings to run.
    serving: bool,
}

impl Teller {
    /// Tells of this session of a volume.
    pub fn new(volume: &str, session: &HandedSession, told: mpsc::Sender<Fared>) -> Self {
        Self {
            told: Some(told),
            volume: volume.to_owned(),
            serving: !session.facts.started.is_empty(),
        }
    }

    /// Tells that all is ready.
    fn ready(&mut self) {
        self.tell(if self.serving {
            Adopted::Ready
        } else {
            Adopted::Idle
        });
    }

    /// Tells that it ended before.
    fn ended(&mut self, end: &End) {
        let ours = match end {
            End::Refused {
                error: Error::ReqHandlerError(error),
                ..
            } => {
                let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
                match inner {
                    Some(Refusal::Theirs(_)) => false,
                    Some(Refusal::Scarce(_)) => true,
                    // Without rings it needs no disk: the one before may have had as little of it.
                    None => self.serving || is_scarce(error),
                }
            }
            // What it is told here is what was right before.
            _ => true,
        };
        self.tell(match (ours, self.serving) {
            (true, _) => Adopted::Failed(end.to_string()),
            (false, true) => Adopted::Lost,
            (false, false) => Adopted::Idle,
        });
    }

    /// Tells it, unless something was told.
    fn tell(&mut self, how: Adopted) {
        if let Some(told) = self.told.take() {
            let volume = std::mem::take(&mut self.volume);
            // A receiver less: nobody counts.
            let _ = told.send(Fared { volume, how });
        }
    }
}

impl Drop for Teller {
    fn drop(&mut self) {
        let why = "the host has no thread or descriptor left for its session";
        self.tell(Adopted::Failed(why.to_owned()));
    }
}

/// Serves a front-end whose session somebody else has begun, as [`super::serve`].
pub fn serve_adopted<P: DiskProvider>(
    adoption: Adoption,
    handler: Handler<P>,
    outside: Outside<'_>,
    patience: Patience,
) -> End {
    let handler = Arc::new(Mutex::new(handler));
    let Adoption {
        session,
        pair,
        mut told,
        release,
    } = adoption;
    let all = (&mut told, &*release);
    match take_over(session, pair, all, &handler, outside, patience) {
        Ok((reader, connection)) => run(reader, connection, &handler, outside, patience),
        Err(end) => {
            told.ended(&end);
            let mut device = handler.lock().unwrap_or_else(PoisonError::into_inner);
            device.finish();
            drop(device);
            // Before it is certain that we serve, its machine may go on elsewhere: it has not left.
            release.wait();
            end
        }
    }
}

/// What reads a session's messages.
type Reader<P> = BackendReqHandler<Mutex<Handler<P>>>;

/// Brings a device into the state that the session was in. Returns what reads the front-end's connection from now on, and a
/// handle of that.
fn take_over<P: DiskProvider>(
    session: HandedSession,
    (ours, feeder): (UnixStream, UnixStream),
    (told, release): (&mut Teller, &Release),
    handler: &Arc<Mutex<Handler<P>>>,
    outside: Outside<'_>,
    patience: Patience,
) -> Result<(Reader<P>, UnixStream), End> {
    let HandedSession {
        connection,
        facts,
        messages,
    } = session;
    let device = || handler.lock().unwrap_or_else(PoisonError::into_inner);
    device().adopt(&facts);
    let copy = ours.try_clone()?;
    let mut reader = BackendReqHandler::from_stream(ours, Arc::clone(handler));
    let mut session = Session {
        socket: &copy,
        handler,
        outside,
        patience,
        rival_since: None,
        began: Instant::now(),
    };
    for message in messages {
        let _turn = message.is_memory_table().then(|| release.turn());
        message.send(&feeder)?;
        // It is on its way; of what it brings the session needs no more than what arrives.
        drop(message);
        session.one_message(&mut reader)?;
        forget_replies(&feeder);
    }
    if !device().has_all(&facts) {
        return Err(io::Error::other("not all rings could be set up again").into());
    }
    let connection = UnixStream::from(connection);
    // As of any session.
    connection.set_read_timeout(Some(patience.rival))?;
    replace(&reader, &connection)?;
    // From here on nothing is needed of the host, so nothing can fail any more.
    told.ready();
    release.wait();
    device().release(&facts);
    Ok((reader, connection))
}

/// Takes what a session answers to messages of ours, which says nothing that it does not say by going on.
fn forget_replies(feeder: &UnixStream) {
    let mut bytes = [0; 512];
    // Nothing there ends it, and so would anything else.
    while rustix::net::recv(feeder, &mut bytes[..], RecvFlags::DONTWAIT)
        .is_ok_and(|(_, count)| count == bytes.len())
    {}
}

/// Lets the descriptor of the one name the socket of the other.
fn replace(reader: &impl AsRawFd, connection: &UnixStream) -> io::Result<()> {
    #[expect(
        unsafe_code,
        reason = "the crate lends its descriptor only as a number"
    )]
    // SAFETY:
    // - The descriptor is open for as long as the reader is borrowed, and belongs to it: it is not closed here.
    // - It stays open throughout: `dup3` makes it name the other socket in one step.
    let mut descriptor = unsafe { ManuallyDrop::new(OwnedFd::from_raw_fd(reader.as_raw_fd())) };
    rustix::io::dup3(connection, &mut descriptor, DupFlags::CLOEXEC)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_that_does_not_end_keeps_nobody_for_long() {
        let release = Release::default();
        let began = Instant::now();
        let stuck = release.turn();
        let next = release.turn();
        assert!(began.elapsed() >= TURN_LIMIT);
        let is_free = || {
            let table = release.table.lock();
            table.expect("nobody panics").since.is_none()
        };
        drop(stuck);
        assert!(!is_free(), "the end of another one's turn");
        drop(next);
        assert!(is_free());
    }
}
