//! The running daemon's side.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use super::package::Package;
use super::wire::{Letter, difference, formats, receive, send, strange, wait, wait_until};
use super::{READY_LIMIT, VERSION};

/// How long a new process may take over a letter before anything is handed over, or to read what is.
const LETTER_LIMIT: Duration = Duration::from_secs(5);
/// How much longer than the new process the running daemon waits for it to be ready. By then it has ended by itself.
const MARGIN: Duration = Duration::from_secs(2);
/// How often to look whether this process is being stopped.
const LOOK_PERIOD: Duration = Duration::from_millis(50);
/// How often somebody is told that the new process does not end.
const COMPLAINT_PERIOD: Duration = Duration::from_secs(10);
/// How long to wait for a new process that goes on to have told the service manager.
const FAREWELL_LIMIT: Duration = Duration::from_secs(2);

/// A new process that wants to take over.
#[derive(Debug)]
pub struct Candidate {
    /// The connection.
    stream: UnixStream,
    /// Dropped when this is over: then the next one may come. Told something if none may.
    turn: mpsc::Sender<()>,
    /// Its process.
    pid: i32,
    /// How many descriptors it may have.
    pub descriptors_max: u64,
}

/// How a hand-over ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Everything is the new process's.
    Theirs,
    /// Everything is the running daemon's, as before.
    Ours,
}

/// Greets new processes that come, on a thread that ends with the process, one after the other.
///
/// # Errors
/// The host has no thread or descriptor left.
pub fn listen(
    listener: &UnixListener,
    store: String,
) -> io::Result<tokio::sync::mpsc::Receiver<Candidate>> {
    let listener = listener.try_clone()?;
    listener.set_nonblocking(false)?;
    let (found, candidates) = tokio::sync::mpsc::channel(1);
    thread::Builder::new()
        .name("takeover".into())
        .spawn(move || {
            loop {
                match listener.accept() {
                    Ok((stream, _)) => {
                        let (turn, over) = mpsc::channel();
                        match greet(&stream, &store) {
                            Ok((pid, descriptors_max)) => {
                                let candidate = Candidate {
                                    stream,
                                    turn,
                                    pid,
                                    descriptors_max,
                                };
                                // Who comes when all was handed over comes to the other process.
                                if found.blocking_send(candidate).is_err() || over.recv().is_ok() {
                                    return;
                                }
                            }
                            Err(error) => tracing::warn!("a process does not take over: {error}"),
                        }
                    }
                    Err(error) => {
                        tracing::warn!("the takeover socket cannot accept: {error}");
                        thread::park_timeout(LETTER_LIMIT);
                    }
                }
            }
        })?;
    Ok(candidates)
}

/// Looks who has come and whether it can be understood. Returns its process, and how many descriptors it may have.
fn greet(stream: &UnixStream, store: &str) -> io::Result<(i32, u64)> {
    let peer = rustix::net::sockopt::socket_peercred(stream)?;
    if !peer.uid.is_root() && peer.uid != rustix::process::geteuid() {
        return Err(strange(format!(
            "process {} of user {} may not",
            peer.pid.as_raw_nonzero(),
            peer.uid.as_raw()
        )));
    }
    stream.set_read_timeout(Some(LETTER_LIMIT))?;
    stream.set_write_timeout(Some(LETTER_LIMIT))?;
    let (hello, _) = receive(stream)?;
    let Letter::Hello {
        version,
        program,
        formats: theirs,
        descriptors_max,
    } = hello
    else {
        return Err(strange("it did not say hello"));
    };
    if version != VERSION {
        let why = format!(
            "the running daemon, of version {}, hands over in version {VERSION} of the protocol, and not in version {version}; \
             stop it and start the new one",
            env!("CARGO_PKG_VERSION")
        );
        send(stream, &Letter::Refused { why }, &[])?;
        return Err(strange(format!("version {version} of the protocol")));
    }
    // What it would write could not be gone back to, and what is there it would have to rewrite first.
    if let Some(difference) = difference(&formats(), &theirs) {
        let why = format!(
            "the running daemon, of version {}, keeps the store in other formats ({difference}); \
             stop it in order and start the new one without --takeover",
            env!("CARGO_PKG_VERSION")
        );
        send(stream, &Letter::Refused { why }, &[])?;
        return Err(strange(format!("other formats ({difference})")));
    }
    tracing::info!(pid = %peer.pid.as_raw_nonzero(), %program, "a new process takes over");
    let welcome = Letter::Welcome {
        store: store.to_owned(),
        formats: formats(),
        pid: std::process::id(),
        program: env!("CARGO_PKG_VERSION").to_owned(),
    };
    send(stream, &welcome, &[])?;
    Ok((peer.pid.as_raw_nonzero().get(), descriptors_max))
}

impl Candidate {
    /// Sends it away. Nothing has changed.
    pub fn refuse(self, why: &str) {
        tracing::warn!("nothing is handed over: {why}");
        let why = why.to_owned();
        // It may have gone by itself.
        let _ = send(&self.stream, &Letter::Refused { why }, &[]);
    }

    /// Hands everything over, unless this process is `stopped` before the other one may have the store. If all is ours again
    /// the new process has gone, or has not touched anything and cannot any more.
    pub fn hand_over(self, package: &Package, stopped: &AtomicBool) -> Outcome {
        let goes_on = |error: io::Error| {
            tracing::error!("the new process does not take over: {error}; this one goes on");
        };
        if let Err(error) = self.show(package, stopped) {
            // It does not hear that it may, and the connection goes with this.
            if error.kind() == io::ErrorKind::Interrupted {
                tracing::warn!("nothing is handed over: {error}");
            } else {
                goes_on(error);
            }
            tracing::warn!(
                pid = self.pid,
                "if it does not end by itself, end it (kill -9 {}): as long as it lives it keeps the store's lock and all \
                 connections open",
                self.pid
            );
            return Outcome::Ours;
        }
        if let Err(error) = self.give() {
            goes_on(error);
            self.await_end();
            return Outcome::Ours;
        }
        // A receiver less: the thread is gone, which greets nobody either.
        let _ = self.turn.send(());
        // What it has to say to the service manager has to come before our end.
        let _ = wait(&self.stream, FAREWELL_LIMIT);
        Outcome::Theirs
    }

    /// Sends everything, and waits until it is there. Nothing of it may be used yet.
    fn show(&self, package: &Package, stopped: &AtomicBool) -> io::Result<()> {
        let deadline = Instant::now() + LETTER_LIMIT;
        // Before each letter: there is room for it then, so that it does not block.
        let has_room = || self.wait_for(PollFlags::OUT, deadline, LETTER_LIMIT, Some(stopped));
        package.send(&self.stream, &has_room)?;
        self.expect(&Letter::Received, LETTER_LIMIT, Some(stopped))?;
        look(stopped)
    }

    /// Lets the new process have the store, waits until it is ready, and says that all is its.
    fn give(&self) -> io::Result<()> {
        send(&self.stream, &Letter::Open, &[])?;
        self.expect(&Letter::Ready, READY_LIMIT + MARGIN, None)?;
        // One that is gone does not get it, and so has not taken anything from a ring.
        send(&self.stream, &Letter::Yours, &[])
    }

    /// Waits until the connection is ready for that, by a deadline that is `limit` from some time on, and not when this process
    /// is `stopped`.
    fn wait_for(
        &self,
        events: PollFlags,
        deadline: Instant,
        limit: Duration,
        stopped: Option<&AtomicBool>,
    ) -> io::Result<()> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let period = stopped.map_or(left, |_| left.min(LOOK_PERIOD));
            if wait_until(&self.stream, events, period)? {
                return Ok(());
            }
            stopped.map_or(Ok(()), look)?;
            if left.is_zero() {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("it neither says nor reads anything for {limit:?}"),
                ));
            }
        }
    }

    /// Waits for a letter, not for longer than that, and not when this process is `stopped`.
    fn expect(
        &self,
        letter: &Letter,
        limit: Duration,
        stopped: Option<&AtomicBool>,
    ) -> io::Result<()> {
        self.wait_for(PollFlags::IN, Instant::now() + limit, limit, stopped)?;
        match receive(&self.stream) {
            Ok((said, _)) if std::mem::discriminant(&said) == std::mem::discriminant(letter) => {
                Ok(())
            }
            Ok(_) => Err(strange("it says something else than it should")),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(strange("it has ended; its log says why"))
            }
            Err(error) => Err(error),
        }
    }

    /// Waits until the new process has ended, which it does by itself.
    fn await_end(&self) {
        // What it may have said too late.
        let mut rest = [0; 64];
        loop {
            match wait(&self.stream, COMPLAINT_PERIOD) {
                Ok(false) => tracing::error!(
                    "the new process neither takes over nor ends, and guests wait: end it (kill -9)"
                ),
                Ok(true) => match io::Read::read(&mut &self.stream, &mut rest) {
                    Ok(1..) => {}
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Ok(0) | Err(_) => return,
                },
                Err(_) => return,
            }
        }
    }
}

/// Fails if this process is being stopped.
fn look(stopped: &AtomicBool) -> io::Result<()> {
    // ORDERING: Relaxed; it is looked at again, and who looks too early goes on as if it had come later.
    if stopped.load(Ordering::Relaxed) {
        let what = "this process is being stopped";
        return Err(io::Error::new(io::ErrorKind::Interrupted, what));
    }
    Ok(())
}
