//! What `stratablk serve` was asked to do, checked and free of the command line.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use stratablk_layers::store::StoreOptions;

use crate::confine::Settings;

/// Where the front-end of one-disk mode connects.
#[derive(Debug)]
pub enum DiskSocket {
    /// A socket to listen on at this path.
    Path(PathBuf),
    /// A socket that the process was started with, listening or connected.
    Inherited(OwnedFd),
}

/// One disk without any set-up: `serve --blk-file`.
#[derive(Debug)]
pub struct OneDisk {
    /// The raw image, never written.
    pub file: PathBuf,
    /// Where the front-end connects.
    pub socket: DiskSocket,
    /// How many virtqueues are offered.
    pub queues: u16,
    /// Whether the guest may only read.
    pub read_only: bool,
}

/// What is served.
#[derive(Debug)]
pub enum Target {
    /// A store with whatever is attached in it.
    Store(PathBuf),
    /// One disk, its store beside its file.
    Disk(OneDisk),
}

impl OneDisk {
    /// The directories of the image and the socket.
    pub fn dirs(&self) -> Vec<PathBuf> {
        let socket = match &self.socket {
            DiskSocket::Path(path) => Some(path),
            DiskSocket::Inherited(_) => None,
        };
        let absolute = |path: &PathBuf| {
            let target = path.canonicalize().or_else(|_| std::path::absolute(path));
            Some(target.ok()?.parent()?.to_owned())
        };
        [Some(&self.file), socket]
            .into_iter()
            .flatten()
            .filter_map(absolute)
            .collect()
    }
}

impl Target {
    /// The store's directory: of one-disk mode, the file's name with `.strata` added.
    pub fn store(&self) -> PathBuf {
        let dir = match self {
            Self::Store(dir) => dir.clone(),
            Self::Disk(disk) => {
                let mut name = disk.file.as_os_str().to_owned();
                name.push(".strata");
                PathBuf::from(name)
            }
        };
        std::path::absolute(&dir).unwrap_or(dir)
    }
}

/// All of `stratablk serve`.
#[derive(Debug)]
pub struct ServeConfig {
    /// What is served.
    pub target: Target,
    /// The control socket; `None` for the one in the store.
    pub control: Option<PathBuf>,
    /// The group that may use the control socket too.
    pub control_group: Option<String>,
    /// The group that may use the sockets of front-ends too.
    pub socket_group: Option<String>,
    /// What the daemon gives up before it serves.
    pub confine: Settings,
    /// Worker threads an attachment, at most; `None` for one a CPU.
    pub workers: Option<usize>,
    /// How the store is opened.
    pub store_options: StoreOptions,
    /// Whether to go on where the daemon that runs is.
    pub takeover: bool,
    /// Whether to print one JSON document on stdout once ready.
    pub json: bool,
}

/// Takes over a socket that the process was started with (`--fd N`). Must be called before anything else of the process
/// opens files, and once for each number.
///
/// # Errors
/// The number is not that of an open socket.
pub fn inherit_socket(fd: RawFd) -> io::Result<OwnedFd> {
    if fd <= 2 {
        let what = "0 to 2 are standard input, output and error";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    // Asked through /proc first, so that a wrong number never becomes an `OwnedFd`.
    let target = std::fs::read_link(format!("/proc/self/fd/{fd}"))
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "no file is open there"))?;
    if !target.to_string_lossy().starts_with("socket:") {
        let what = format!("{} is not a socket", target.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    #[expect(unsafe_code, reason = "only a number crosses an exec")]
    // SAFETY:
    // - `fd` is open, as /proc just said, and no other thread runs yet that could close it.
    // - Nobody else owns it: it came with the exec, and this function is called once, before files are opened.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&owned, rustix::io::FdFlags::CLOEXEC)?;
    Ok(owned)
}
