//! An attachment: a disk served on a socket, to one front-end after the other.
//!
//! A thread accepts a front-end, serves it to its end, cleans up what it left, and accepts the next. What a front-end
//! does, or does not do, keeps nobody from stopping the attachment: everything that waits for it also waits for the stop.

pub mod socket;

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};

use self::socket::{Listening, Socket};
use crate::confine::{self, Role};
use crate::signal::Signal;
use crate::vhost::handler::{Handler, HandlerSetup};
use crate::vhost::session::{End, Outside, Patience, serve};
use crate::vhost::state::SessionState;
use crate::worker::counters::{Counters, Totals};
use crate::worker::disk::DiskSource;
use crate::worker::provider::{AlwaysOpen, DiskProvider};

pub use self::socket::SocketSource;

/// The most queues that a device can have.
pub const QUEUES_MAX: u16 = 64;
/// How long to wait after the host refused to accept a front-end, for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

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
    /// Whether no front-end can come any more: the only connection has ended.
    pub ended: bool,
    /// Rings that are being served.
    pub rings_running: usize,
    /// Virtio features that the front-end took.
    pub features: u64,
    /// Front-ends that were served, the present one included.
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

/// What the attachment's thread and its handle share.
#[derive(Debug)]
struct Shared {
    /// Written when the attachment is to stop.
    stop: Signal,
    /// What is known of the present session.
    state: Arc<SessionState>,
    /// One a worker; they outlive the sessions.
    counters: Vec<Arc<Counters>>,
    /// Whether a front-end is connected.
    connected: AtomicBool,
    /// Whether the thread has ended.
    ended: AtomicBool,
    /// Front-ends that were served.
    sessions: AtomicU64,
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
        start(provider, source, options)
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
    start(Arc::new(AlwaysOpen(disk)), source, options)
}

/// See [`Attachment::start`].
fn start<P: DiskProvider>(
    provider: Arc<P>,
    source: SocketSource,
    options: AttachOptions,
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
        state: Arc::default(),
        counters: (0..workers).map(|_| Arc::default()).collect(),
        connected: AtomicBool::new(false),
        ended: AtomicBool::new(false),
        sessions: AtomicU64::new(0),
    });
    let path = match &source {
        SocketSource::Listen(path) => Some(path.clone()),
        SocketSource::Fd(_) => None,
    };
    let socket = Socket::open(source, options.group)?;
    let server = Server {
        provider,
        options,
        shared: Arc::clone(&shared),
    };
    let thread = thread::Builder::new()
        .name("attachment".into())
        .spawn(move || {
            confine::enter(Role::Attachment {
                socket: path.as_deref(),
                base: server.provider.base().as_deref(),
            });
            server.run(socket);
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

    /// Tells the thread to stop and waits for it.
    fn halt(&mut self) {
        self.shared.stop.raise();
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
        AttachmentStatus {
            connected: self.shared.connected.load(Ordering::Relaxed),
            ended: self.shared.ended.load(Ordering::Relaxed),
            rings_running: usize::try_from(self.shared.state.rings()).unwrap_or(usize::MAX),
            features: self.shared.state.features(),
            sessions: self.shared.sessions.load(Ordering::Relaxed),
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

    /// Tells the front-end that the size of the disk has changed, if there is one that wants to know. Does not wait.
    ///
    /// # Errors
    /// The front-end does not read its messages.
    pub fn notify_resize(&self) -> io::Result<()> {
        self.shared.state.config_changed()
    }
}

impl Drop for AttachmentHandle {
    fn drop(&mut self) {
        self.halt();
    }
}

/// The attachment's thread.
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
    fn run(&self, socket: Socket) {
        match socket {
            Socket::Connected(stream) => {
                self.serve(stream, None);
            }
            Socket::Listening(listening) => self.accept_all(&listening),
        }
        self.shared.ended.store(true, Ordering::Relaxed);
    }

    /// Serves one front-end after the other.
    fn accept_all(&self, listening: &Listening) {
        let place = listening.display();
        loop {
            match self.accept(listening) {
                Ok(Some(stream)) => {
                    if matches!(self.serve(stream, Some(listening)), End::Stopped) {
                        return;
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    tracing::error!(socket = %place, %error, "cannot accept a front-end");
                    if self.pause() {
                        return;
                    }
                }
            }
        }
    }

    /// Waits for a front-end; `None` when told to stop.
    fn accept(&self, listening: &Listening) -> io::Result<Option<UnixStream>> {
        loop {
            let mut fds = [
                PollFd::new(&self.shared.stop, PollFlags::IN),
                PollFd::new(&listening.listener, PollFlags::IN),
            ];
            match rustix::event::poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let [stop, _] = fds;
            if !stop.revents().is_empty() {
                return Ok(None);
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

    /// Serves one front-end to its end.
    fn serve(&self, stream: UnixStream, listening: Option<&Listening>) -> End {
        self.shared.sessions.fetch_add(1, Ordering::Relaxed);
        self.shared.connected.store(true, Ordering::Relaxed);
        tracing::info!(volume = self.provider.name(), "a front-end connected");
        let end = self.session(stream, listening);
        // If we are told to stop, the machine may go on with who serves it next.
        if self.shared.state.has_begun() && !matches!(end, End::Stopped) {
            self.provider.machine_left();
        }
        self.shared.connected.store(false, Ordering::Relaxed);
        match &end {
            End::Closed | End::Stopped => {
                tracing::info!(volume = self.provider.name(), "the session ended: {end}");
            }
            other => tracing::warn!(volume = self.provider.name(), "the session ended: {other}"),
        }
        end
    }

    /// Everything that a session needs, made anew and gone with it.
    fn session(&self, stream: UnixStream, listening: Option<&Listening>) -> End {
        let trouble = match Signal::new() {
            Ok(trouble) => Arc::new(trouble),
            Err(error) => return error.into(),
        };
        let handler = Handler::new(HandlerSetup {
            provider: Arc::clone(&self.provider),
            read_only: self.options.read_only,
            queues: self.options.queues,
            counters: self.shared.counters.clone(),
            state: Arc::clone(&self.shared.state),
            trouble: Arc::clone(&trouble),
        });
        let rivals = listening.map(|listening| listening.listener.as_fd());
        let outside = Outside::new(&self.shared.stop, &*trouble, rivals);
        serve(stream, handler, outside, self.options.patience)
    }
}

/// Whether an accept failed for a reason that is over already.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
    )
}
