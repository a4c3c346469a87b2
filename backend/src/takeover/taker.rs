//! The new process's side.
//!
//! It touches nothing before it was told `Open`. From the first letter of what is handed over it has limited time to be ready.
//! Then, and whenever it cannot be, it ends at
//! once, as by a crash: so nothing of what it was handed is closed in order, no name is removed, and the running daemon,
//! which has a handle of all of it, sees by the end of the connection that it may go on.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::package::Package;
use super::wire::{Letter, difference, formats, receive, send, strange, wait};
use super::{VERSION, socket_path};
use crate::control::socket::connect;

/// How long the running daemon may take over a letter.
const LETTER_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take to end commands and jobs, and to flush; guests are served meanwhile.
const HAND_OVER_LIMIT: Duration = Duration::from_secs(120);

/// How long somebody may take to read why the process ends.
const WORDS_LIMIT: Duration = Duration::from_millis(500);

/// The running daemon, which has handed everything over and waits. To be dropped only when everything is ours: it takes the
/// end of the connection for the end of this process, which has the store open.
#[derive(Debug)]
pub struct Predecessor {
    /// The connection; closed when nothing has to be said any more.
    stream: UnixStream,
    /// Dropped when the time does not count any more.
    in_time: mpsc::Sender<()>,
}

/// Asks the daemon of the store in `dir` for everything, and waits for it.
///
/// # Errors
/// There is no daemon, it refuses, or it does not speak as it should. It goes on then.
pub fn ask(dir: &Path) -> io::Result<(Package, Predecessor)> {
    let stream = connect(&socket_path(dir)).map_err(|error| {
        let what = match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                "no daemon runs that could hand over; start without --takeover".to_owned()
            }
            _ => error.to_string(),
        };
        io::Error::new(error.kind(), what)
    })?;
    stream.set_write_timeout(Some(LETTER_LIMIT))?;
    stream.set_read_timeout(Some(LETTER_LIMIT))?;
    let hello = Letter::Hello {
        version: VERSION,
        program: env!("CARGO_PKG_VERSION").to_owned(),
        formats: formats(),
        descriptors_max: descriptors_max(),
    };
    send(&stream, &hello, &[])?;
    // It may be at work with another one.
    stream.set_read_timeout(Some(HAND_OVER_LIMIT))?;
    match receive(&stream).map_err(in_words)? {
        (
            Letter::Welcome {
                pid,
                program,
                formats: theirs,
                ..
            },
            _,
        ) => {
            if let Some(difference) = difference(&formats(), &theirs) {
                return Err(io::Error::other(format!(
                    "the running daemon keeps the store in other formats ({difference}); \
                     stop it in order and start this one without --takeover"
                )));
            }
            tracing::info!(pid, %program, "taking over");
        }
        (Letter::Refused { why }, _) => return Err(io::Error::other(why)),
        _ => return Err(strange("the running daemon says something strange")),
    }
    let (head, descriptors) = receive(&stream).map_err(in_words)?;
    let limit = match &head {
        Letter::Head {
            ready_within_ms, ..
        } => Duration::from_millis(*ready_within_ms),
        Letter::Refused { why } => return Err(io::Error::other(why.clone())),
        _ => return Err(strange("the running daemon says something strange")),
    };
    let in_time = watch(limit)?;
    stream.set_read_timeout(Some(limit))?;
    let package = Package::receive(&stream, head, descriptors).map_err(in_words)?;
    // From here on the other one waits for our end, so that only one has the store; if it does not any more, we may not.
    send(&stream, &Letter::Received, &[]).map_err(in_words)?;
    match receive(&stream).map_err(in_words)? {
        (Letter::Open, _) => {}
        _ => return Err(strange("the running daemon says something strange")),
    }
    Ok((package, Predecessor { stream, in_time }))
}

/// How many descriptors this process may have.
fn descriptors_max() -> u64 {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current.unwrap_or(u64::MAX)
}

/// What the end of the connection means before everything is here.
fn in_words(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionReset => io::Error::new(
            error.kind(),
            "the running daemon ended, or gave up, before it had handed everything over; \
             if none runs, start without --takeover",
        ),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => io::Error::new(
            io::ErrorKind::TimedOut,
            "the running daemon does not hand over in time, and goes on",
        ),
        _ => error,
    }
}

/// Ends the process if what is returned is not dropped in time: then it must not go on, since the running daemon does.
fn watch(limit: Duration) -> io::Result<mpsc::Sender<()>> {
    let (in_time, late) = mpsc::channel::<()>();
    thread::Builder::new().name("watch".into()).spawn(move || {
        if late.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
            last_words(format!(
                "not ready after {limit:?}; the running daemon goes on and this one ends"
            ));
            std::process::abort();
        }
    })?;
    Ok(in_time)
}

/// Says why the process ends. Whoever should read that may not, and guests wait for the end: so not for long.
pub fn last_words(why: String) {
    let (said, heard) = mpsc::channel::<()>();
    let speaker = thread::Builder::new().spawn(move || {
        eprintln!("stratablk: {why}");
        drop(said);
    });
    // Without a thread it is left unsaid.
    if speaker.is_ok() {
        let _ = heard.recv_timeout(WORDS_LIMIT);
    }
}

impl Predecessor {
    /// Says that everything is ready, and waits until everything is ours. The connection stays open, also after an error.
    ///
    /// # Errors
    /// The running daemon says otherwise; the process must end.
    pub fn relieve(&self) -> io::Result<()> {
        // One that is gone leaves everything to us.
        let _ = send(&self.stream, &Letter::Ready, &[]);
        loop {
            // Bounded by the watch.
            if !wait(&self.stream, LETTER_LIMIT)? {
                continue;
            }
            match receive(&self.stream) {
                Ok((Letter::Yours, _)) => break,
                Err(error) if is_end(&error) => {
                    tracing::warn!("the daemon before ended before it was told to");
                    break;
                }
                Ok(_) => return Err(strange("the running daemon says something strange")),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// What is left of it when everything is ours. The running daemon is told of nothing more when that is dropped.
    pub fn relieved(self) -> Relieved {
        // Time does not count any more.
        drop(self.in_time);
        Relieved {
            _stream: self.stream,
        }
    }
}

/// Whether an error says that the other process has gone.
fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
    )
}

/// The daemon before, which ends when this is dropped.
#[derive(Debug)]
pub struct Relieved {
    /// The connection.
    _stream: UnixStream,
}
