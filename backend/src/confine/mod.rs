//! What the daemon gives up before it serves: privileges, directories and system calls that it will not need.
//!
//! A guest that takes over a thread of ours, by a fault that nobody knows of, should find nothing there to go on with. So
//! the process gives up what all of it can do without ([`begin`]), and then each thread, by the work that it does,
//! what the others need ([`enter`]). What was given up cannot be had back, and is given up by every thread that this
//! one starts; so whoever starts others keeps what they need.
//!
//! | thread | files that it can open | system calls |
//! |---|---|---|
//! | worker, write-back, huge-pages | none; others have opened them | memory, waiting, transfers on open files |
//! | attachment | the store, its socket's name (to remove) | also files, messages, threads |
//! | jobs, upkeep | as control | no sockets, no threads |
//! | control | the store, what it is told to use; see [`Places`] | all that the daemon makes |
//!
//! All threads share their memory. So these are walls against a thread that is made to make calls it should not; code that
//! can write anywhere in our memory can have another thread work for it, and is held by what the process has given up as
//! a whole.
//!
//! This is a matter of the process, and so is its state here: it is set once, before the threads are started, and
//! without it (in unit tests, in commands other than `serve`) nothing is given up.

pub mod accounts;
mod domain;
pub mod reach;
mod refused;
mod seccomp;
mod user;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::OnceLock;

pub use self::domain::Places;
pub use self::refused::refused_calls;
pub use self::user::UserError;

/// Whether to confine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// As far as the kernel can, with a line in the log where it cannot.
    #[default]
    Auto,
    /// All of it, or do not start.
    Require,
    /// Not at all.
    Off,
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "require" => Ok(Self::Require),
            "off" => Ok(Self::Off),
            _ => Err("write auto, require or off".into()),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Require => "require",
            Self::Off => "off",
        })
    }
}

/// What the command line says of it.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Whether to confine.
    pub mode: Mode,
    /// The user to become: `NAME` or `NAME:GROUP`.
    pub user: Option<String>,
    /// Directories in which images may be read and written and sockets be made.
    pub allow: Vec<PathBuf>,
    /// Directories in which images may be read.
    pub allow_read: Vec<PathBuf>,
}

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role<'a> {
    /// Serves the control socket, carries out commands, starts the others.
    Control,
    /// Jobs and upkeep.
    Work,
    /// Speaks with front-ends, starts workers.
    Attachment {
        /// The socket that it listens on, whose name it removes in the end.
        socket: Option<&'a Path>,
    },
    /// Serves rings.
    Worker,
    /// Works on memory and open files only.
    Files,
}

/// Why the daemon is not confined as it was asked to be.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// The user could not be switched.
    #[error(transparent)]
    User(#[from] UserError),
    /// The kernel refused, or has no such thing.
    #[error(
        "--confine require: {what}: {source}; see whether the kernel has it, or use --confine auto"
    )]
    Refused {
        /// What was to be done.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Something that the process gives up.
type Step = fn() -> io::Result<()>;

/// How this process is confined; unset: not at all.
static MODE: OnceLock<Mode> = OnceLock::new();
/// Where its files lie, once that is known.
static PLACES: OnceLock<Places> = OnceLock::new();

/// Becomes another user if that was asked for, and gives up what no thread needs. To be called while there is only one
/// thread, and before files are opened or made. `dir` is the store, `groups` are those that sockets are opened to.
///
/// # Errors
/// See [`ConfineError`]. Nothing was opened or made.
pub fn begin(settings: &Settings, dir: &Path, groups: &[u32]) -> Result<(), ConfineError> {
    let mode = settings.mode;
    // Never an option: what is made here is nobody else's business. Sockets get their modes explicitly.
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    if let Some(user) = &settings.user {
        user::switch(user, dir, groups)?;
    }
    if mode == Mode::Off {
        tracing::warn!("--confine off: threads keep all privileges of the daemon");
        return Ok(());
    }
    let steps: [(&'static str, Step); 5] = [
        ("no new privileges", no_new_privileges),
        ("no core files", user::no_core_files),
        ("capabilities", user::shed_for_all),
        ("seccomp", seccomp::for_all),
        ("Landlock", domain::probe),
    ];
    for (what, step) in steps {
        match step() {
            Ok(()) => {}
            Err(source) if mode == Mode::Require => {
                return Err(ConfineError::Refused { what, source });
            }
            Err(error) => tracing::warn!("not confined by {what}: {error}"),
        }
    }
    // Only ever set here, by the only thread.
    let _ = MODE.set(mode);
    Ok(())
}

/// No program that is executed gets more privileges than this process has; the other steps rest on it.
fn no_new_privileges() -> io::Result<()> {
    Ok(rustix::thread::set_no_new_privs(true)?)
}

/// Says where the files lie that threads may open from now on. To be called before the threads that open them
/// are confined.
pub fn settle(places: Places) {
    if MODE.get().is_some() && PLACES.set(places).is_err() {
        tracing::error!("the places of the confinement were set already");
    }
}

/// Gives up what this thread does not need for its work. Does nothing unless [`begin`] has begun.
///
/// What the kernel cannot do was found out then. If it fails now all the same, as it may for want of memory, the
/// process goes on with a thread that is less confined, or ends, as `--confine` says; nothing acknowledged is lost by that.
pub fn enter(role: Role<'_>) {
    let Some(mode) = MODE.get() else {
        return;
    };
    let steps = [
        ("Landlock", domain::enter(role, PLACES.get())),
        ("capabilities", user::shed(role)),
        // Last: it forbids the other two.
        ("seccomp", seccomp::narrow(role)),
    ];
    for (what, result) in steps {
        if let Err(error) = result {
            tracing::error!(?role, "a thread is not confined by {what}: {error}");
            if *mode == Mode::Require {
                tracing::error!("--confine require: the daemon ends");
                std::process::abort();
            }
        }
    }
}

/// Whether this process is confined to `places`, and to which.
fn places() -> Option<&'static Places> {
    PLACES.get()
}
