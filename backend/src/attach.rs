//! An attachment: a disk served on a socket.
//!
//! A thread accepts front-ends. Each of them is served by a thread of its own ([`sessions`]), so that one can negotiate while
//! another one runs a guest, as in a live migration; the rings of only one run at a time (`vhost::turn`). What a front-end
//! does, or does not do, keeps nobody from stopping the attachment: everything that waits for it also waits for the stop.

mod sessions;
pub mod socket;

#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};

use self::sessions::{Place, SESSIONS_MAX, Sessions};
use self::socket::{HandedSocket, Listening, Socket};
use crate::confine::{self, Role};
use crate::signal::Signal;
use crate::vhost::handler::{Handler, HandlerSetup};
use crate::vhost::memory;
use crate::vhost::session::adopt::{
    Adoption, Fared, HandedSession, Release, Teller, serve_adopted,
};
use crate::vhost::session::{End, Outside, Patience, serve};
use crate::vhost::turn::Turns;
use crate::vhost::under_way::UnderWay;
use crate::worker::counters::{Counters, Totals};
use crate::worker::disk::DiskSource;
use crate::worker::provider::{AlwaysOpen, DiskProvider};

pub use self::socket::SocketSource;

/// The most queues that a device can have.
pub const QUEUES_MAX: u16 = 64;
/// How long to wait after the host refused to accept a front-end, for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a front-end that starts its rings waits for those of another to stop.
const TURN_PATIENCE: Duration = Duration::from_secs(2);

/// How a disk is served.
#[derive(Clone, Copy, Debug)]
pub struct AttachOptions {
    /// How many virtqueues are offered: 1 to [`QUEUES_MAX`].
    pub queues: u16,
    /// How many threads serve them at most; 0: as many as there are queues, but no more than processors.
    pub workers: usize,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// The group that may use a socket that is made, besides its owner.
    pub group: Option<u32>,
    /// How long a front-end may take.
    pub patience: Patience,
}

impl Default for AttachOptions {
    fn default() -> Self {
        Self {
            queues: 1,
            workers: 0,
            read_only: false,
            group: None,
            patience: Patience::default(),
        }
    }
}

/// How an attachment fares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttachmentStatus {
    /// Whether a front-end is connected.
    pub connected: bool,
    /// Front-ends that are connected.
    pub connections: usize,
    /// Whether no front-end can come any more: the only connection has ended.
    pub ended: bool,
    /// Rings that are being served.
    pub rings_running: usize,
    /// Virtio features that the front-end took: the one whose rings run, or the latest.
    pub features: u64,
    /// Front-ends that were served, the present ones included.
    pub sessions: u64,
    /// Reads that ended.
    pub reads: u64,
    /// Writes that ended.
    pub writes: u64,
    /// Flushes that ended.
    pub flushes: u64,
    /// Discards and write-zeroes that ended.
    pub discards: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Bytes discarded or zeroed.
    pub discarded_bytes: u64,
    /// Requests that failed, malformed ones included.
    pub errors: u64,
}

/// What the attachment's threads and its handle share.
#[derive(Debug)]
struct Shared {
    /// Written when the attachment is to stop.
    stop: Signal,
    /// The front-ends that are connected.
    sessions: Arc<Sessions>,
    /// Whose rings run.
    turns: Arc<Turns>,
    /// One a worker; they outlive the sessions. A worker writes its own without a lock: the rings of one session run at a time.
    counters: Vec<Arc<Counters>>,
    /// Whether the thread has ended.
    ended: AtomicBool,
    /// Written when everything is to go on in another process.
    hand_over: Signal,
    /// What has been handed over so far.
    handed: Mutex<Handed>,
}

/// What an attachment hands over.
#[derive(Debug, Default)]
struct Handed {
    /// Where front-ends connect.
    socket: Option<HandedSocket>,
    /// Those that are connected.
    sessions: Vec<HandedSession>,
}

/// An attachment between two processes.
#[derive(Debug)]
pub struct HandedAttachment {
    /// Where front-ends connect.
    pub socket: HandedSocket,
    /// Those that are connected.
    pub sessions: Vec<HandedSession>,
}

/// Bounds what front-ends can use up of the descriptors that the process may have: those of one volume get at most an eighth
/// for the files of their memory, which is all that costs more than a few. Only the first call counts.
pub fn share_descriptors(all: u64) {
    let all = usize::try_from(all).unwrap_or(usize::MAX);
    memory::bound_files(all / SESSIONS_MAX / 8);
}

/// What was handed over with an attachment's socket, for its thread to begin with.
struct Begun {
    /// The sessions.
    sessions: Vec<Adoption>,
    /// When new front-ends may come.
    release: Arc<Release>,
}

/// Makes attachments.
#[derive(Debug)]
pub struct Attachment;

/// An attachment. Dropping it stops it.
#[derive(Debug)]
pub struct AttachmentHandle {
    /// What is shared with the thread.
    shared: Arc<Shared>,
    /// The thread.
    thread: Option<JoinHandle<()>>,
}

impl Attachment {
    /// Serves a disk on a socket. The socket can be connected to on return. The disk is open while rings run.
    ///
    /// # Errors
    /// `InvalidInput` for a number of queues that cannot be; `AddrInUse` if a live server or something that is no socket
    /// has the path; otherwise the host's answer.
    pub fn start<P: DiskProvider>(
        provider: Arc<P>,
        source: SocketSource,
        options: AttachOptions,
    ) -> io::Result<AttachmentHandle> {
        start(provider, source, options, None)
    }

    /// The same for a socket and its front-ends that another process has served. Each of them is told of to `told`; their rings
    /// run, and new front-ends come, when `release` is up.
    ///
    /// # Errors
    /// The host's answer.
    pub fn adopt<P: DiskProvider>(
        provider: Arc<P>,
        handed: HandedAttachment,
        options: AttachOptions,
        told: &mpsc::Sender<Fared>,
        release: &Arc<Release>,
    ) -> io::Result<AttachmentHandle> {
        let adopt = |session: HandedSession| {
            Ok(Adoption {
                told: Teller::new(provider.name(), &session, told.clone()),
                session,
                pair: UnixStream::pair()?,
                release: Arc::clone(release),
            })
        };
        let sessions = handed.sessions.into_iter().map(adopt);
        let begun = Begun {
            sessions: sessions.collect::<io::Result<_>>()?,
            release: Arc::clone(release),
        };
        let source = SocketSource::Handed(handed.socket);
        start(provider, source, options, Some(begun))
    }
}

/// As [`Attachment::start`], for a disk that stays open.
///
/// # Errors
/// See there.
pub fn start_disk<D: DiskSource>(
    disk: Arc<D>,
    source: SocketSource,
    options: AttachOptions,
) -> io::Result<AttachmentHandle> {
    start(Arc::new(AlwaysOpen(disk)), source, options, None)
}

/// See [`Attachment::start`] and [`Attachment::adopt`].
fn start<P: DiskProvider>(
    provider: Arc<P>,
    source: SocketSource,
    options: AttachOptions,
    begun: Option<Begun>,
) -> io::Result<AttachmentHandle> {
    if options.queues == 0 || options.queues > QUEUES_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} queues; 1 to {QUEUES_MAX} would do", options.queues),
        ));
    }
    let queues = usize::from(options.queues);
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let workers = match options.workers {
        0 => processors.min(queues),
        wanted => wanted.min(queues),
    };
    let shared = Arc::new(Shared {
        stop: Signal::new()?,
        sessions: Arc::new(Sessions::new()?),
        turns: Arc::new(Turns::new(TURN_PATIENCE)),
        counters: (0..workers).map(|_| Arc::default()).collect(),
        ended: AtomicBool::new(false),
        hand_over: Signal::new()?,
        handed: Mutex::default(),
    });
    let path = match &source {
        SocketSource::Listen(path) => Some(path.clone()),
        SocketSource::Handed(handed) => Some(handed.path.clone()),
        SocketSource::Fd(_) => None,
    };
    let socket = Socket::open(source, options.group)?;
    let server = Arc::new(Server {
        provider,
        options,
        shared: Arc::clone(&shared),
    });
    let thread = thread::Builder::new()
        .name("attachment".into())
        .spawn(move || {
            confine::enter(Role::Attachment {
                socket: path.as_deref(),
            });
            server.run(socket, begun);
        })?;
    Ok(AttachmentHandle {
        shared,
        thread: Some(thread),
    })
}

impl AttachmentHandle {
    /// Stops serving: completes what is under way, closes the socket and removes its name.
    pub fn stop(mut self) {
        self.halt();
    }

    /// Whether a state of a device is being transferred, which cannot go on in another process.
    pub fn is_transferring(&self) -> bool {
        self.shared.sessions.is_transferring()
    }

    /// What its front-ends have under way now.
    pub fn under_way(&self) -> UnderWay {
        self.shared.sessions.under_way()
    }

    /// Begins to end the attachment for another process to go on with it: rings stop when what is under way has completed.
    pub fn begin_hand_over(&self) {
        self.shared.turns.stop();
        self.shared.hand_over.raise();
    }

    /// Ends it so. The front-ends stay connected and the socket keeps its name. `None` if it cannot go on elsewhere.
    pub fn hand_over(mut self) -> Option<HandedAttachment> {
        self.begin_hand_over();
        self.join();
        let handed = self.shared.handed.lock();
        let mut handed = handed.unwrap_or_else(PoisonError::into_inner);
        Some(HandedAttachment {
            socket: handed.socket.take()?,
            sessions: std::mem::take(&mut handed.sessions),
        })
    }

    /// Tells the thread to stop and waits for it.
    fn halt(&mut self) {
        self.shared.stop.raise();
        self.shared.turns.stop();
        self.join();
    }

    /// Waits for the thread.
    fn join(&mut self) {
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of an attachment panicked");
        }
    }

    /// How the attachment fares.
    pub fn status(&self) -> AttachmentStatus {
        let mut totals = Totals::default();
        for counters in &self.shared.counters {
            counters.add_to(&mut totals);
        }
        let sessions = &self.shared.sessions;
        let connections = sessions.connected();
        AttachmentStatus {
            connected: connections > 0,
            connections,
            ended: self.shared.ended.load(Ordering::Relaxed),
            rings_running: sessions.rings(),
            features: sessions.features(),
            sessions: sessions.served(),
            reads: totals.reads,
            writes: totals.writes,
            flushes: totals.flushes,
            discards: totals.zeroes,
            read_bytes: totals.read_bytes,
            written_bytes: totals.written_bytes,
            discarded_bytes: totals.zeroed_bytes,
            errors: totals.errors,
        }
    }

    /// Tells the front-ends that the size of the disk has changed, those that want to know. Does not wait.
    ///
    /// # Errors
    /// One of them does not read its messages.
    pub fn notify_resize(&self) -> io::Result<()> {
        self.shared.sessions.config_changed()
    }
}

impl Drop for AttachmentHandle {
    fn drop(&mut self) {
        self.halt();
    }
}

/// A front-end to be served.
enum Coming {
    /// One that has just connected.
    New(UnixStream),
    /// One that another process has served.
    Adopted(Box<Adoption>),
}

/// The attachment's threads.
struct Server<P> {
    /// Gives the disk out.
    provider: Arc<P>,
    /// How it is served.
    options: AttachOptions,
    /// What the handle sees.
    shared: Arc<Shared>,
}

impl<P: DiskProvider> Server<P> {
    /// Serves until told to stop, or until the only connection has ended.
    fn run(self: &Arc<Self>, socket: Socket, begun: Option<Begun>) {
        match socket {
            Socket::Connected(stream) => {
                self.serve(Coming::New(stream), &self.shared.sessions.place(), false);
            }
            Socket::Listening(mut listening) => {
                self.accept_all(&mut listening, begun);
                if self.shared.hand_over.is_up() {
                    self.handed().socket = listening.hand_over();
                }
            }
        }
        self.shared.ended.store(true, Ordering::Relaxed);
    }

    /// Serves all front-ends that come, until told to stop; then they are gone.
    fn accept_all(self: &Arc<Self>, listening: &mut Listening, begun: Option<Begun>) {
        let place = listening.display();
        let mut threads = Vec::new();
        if let Some(begun) = begun {
            for session in begun.sessions {
                // One that has no thread is told of by its end.
                match self.start_session(Coming::Adopted(Box::new(session))) {
                    Ok(thread) => threads.push(thread),
                    Err(error) => {
                        tracing::error!(socket = %place, %error, "a front-end is lost");
                    }
                }
            }
            begun.release.wait();
            listening.is_ours();
        }
        // Whether the last one could not be accepted: a host that has nothing left is told of once.
        let mut refused = false;
        loop {
            let accepted = self.accept(listening);
            threads.retain(|thread: &JoinHandle<()>| !thread.is_finished());
            let started = match accepted {
                Ok(Some(stream)) => self
                    .start_session(Coming::New(stream))
                    .map(|new| threads.push(new)),
                Ok(None) => break,
                Err(error) => Err(error),
            };
            let before = std::mem::replace(&mut refused, started.is_err());
            if let Err(error) = started {
                if !before {
                    tracing::error!(socket = %place, %error, "cannot accept a front-end");
                }
                if self.pause() {
                    break;
                }
            }
        }
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!(socket = %place, "the thread of a session panicked");
            }
        }
    }

    /// Gives a front-end a place and a thread.
    fn start_session(self: &Arc<Self>, coming: Coming) -> io::Result<JoinHandle<()>> {
        let place = self.shared.sessions.place();
        let server = Arc::clone(self);
        // It gives up what this thread has given up already: a thread begins with the limits of its parent.
        thread::Builder::new()
            .name("session".into())
            .spawn(move || server.serve(coming, &place, true))
    }

    /// Waits for a front-end and a place for it; `None` when told to stop or to hand over.
    fn accept(&self, listening: &Listening) -> io::Result<Option<UnixStream>> {
        let sessions = &self.shared.sessions;
        // Whether somebody was seen waiting for a place, which those who hold one were told.
        let mut crowded = false;
        loop {
            let full = sessions.is_full();
            let mut fds = vec![
                PollFd::new(&self.shared.stop, PollFlags::IN),
                PollFd::new(&self.shared.hand_over, PollFlags::IN),
                PollFd::new(&sessions.freed, PollFlags::IN),
            ];
            if !crowded {
                fds.push(PollFd::new(&listening.listener, PollFlags::IN));
            }
            match rustix::event::poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
            let mut is_ready = || ready.next().unwrap_or(false);
            let stopped = is_ready();
            if is_ready() || stopped {
                return Ok(None);
            }
            if is_ready() {
                sessions.freed.lower();
                sessions.crowded.lower();
                crowded = false;
                continue;
            }
            if !is_ready() {
                continue;
            }
            if full {
                crowded = true;
                sessions.crowded.raise();
                continue;
            }
            match listening.listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    return Ok(Some(stream));
                }
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits a while. Returns whether the attachment is to stop.
    fn pause(&self) -> bool {
        let mut fds = [PollFd::new(&self.shared.stop, PollFlags::IN)];
        let pause = Timespec::try_from(ACCEPT_PAUSE).ok();
        let ready = rustix::event::poll(&mut fds, pause.as_ref());
        ready.is_ok_and(|count| count > 0)
    }

    /// Serves one front-end to its end. `may_be_many`: others may wait for its place.
    fn serve(&self, coming: Coming, place: &Place, may_be_many: bool) {
        let what = match &coming {
            Coming::New(_) => "a front-end connected",
            Coming::Adopted(_) => "a front-end stays connected",
        };
        tracing::info!(volume = self.provider.name(), "{what}");
        let end = self.session(coming, place, may_be_many);
        let end = match end {
            End::HandedOver(handed) => {
                self.handed().sessions.push(*handed);
                return;
            }
            end => end,
        };
        // If we are told to stop, the machine may go on with who serves it next.
        if place.state.has_begun() && !matches!(end, End::Stopped | End::Leaving) {
            self.shared.turns.end(|| self.provider.machine_left());
        }
        match &end {
            End::Closed | End::Stopped => {
                tracing::info!(volume = self.provider.name(), "the session ended: {end}");
            }
            other => tracing::warn!(volume = self.provider.name(), "the session ended: {other}"),
        }
    }

    /// Everything that a session needs, made anew and gone with it.
    fn session(&self, coming: Coming, place: &Place, may_be_many: bool) -> End {
        let trouble = match Signal::new() {
            Ok(trouble) => Arc::new(trouble),
            Err(error) => return error.into(),
        };
        let handler = Handler::new(HandlerSetup {
            provider: Arc::clone(&self.provider),
            read_only: self.options.read_only,
            queues: self.options.queues,
            counters: self.shared.counters.clone(),
            state: Arc::clone(&place.state),
            turns: Arc::clone(&self.shared.turns),
            trouble: Arc::clone(&trouble),
        });
        let rivals = may_be_many.then_some(&self.shared.sessions.crowded);
        let outside = Outside::new(&self.shared.stop, &*trouble, rivals);
        let patience = self.options.patience;
        match coming {
            // There is no other connection, so there is nobody to go on with it.
            Coming::New(stream) if !may_be_many => serve(stream, handler, outside, patience),
            Coming::New(stream) => {
                let outside = outside.with_hand_over(&self.shared.hand_over);
                serve(stream, handler, outside, patience)
            }
            Coming::Adopted(adoption) => {
                let outside = outside.with_hand_over(&self.shared.hand_over);
                serve_adopted(*adoption, handler, outside, patience)
            }
        }
    }

    /// What has been handed over so far.
    fn handed(&self) -> std::sync::MutexGuard<'_, Handed> {
        let handed = self.shared.handed.lock();
        handed.unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether an accept failed for a reason that is over already.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
    )
}
