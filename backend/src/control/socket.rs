//! The control socket's file: made in private, put in place whole, taken away only if it is still ours.
//!
//! A socket file appears with the permissions that the umask leaves and can be connected to at once. So it is made in a
//! new directory that only we can enter, gets its mode and group there, and is then renamed to its place. The rename also
//! replaces the stale file of a daemon that died.
//!
//! Paths longer than a Unix socket address has room for are reached through a file descriptor of their directory.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use crate::attach::socket::HandedSocket;
use crate::confine::accounts;

/// Bytes of a path that a Unix socket address has room for, without the final NUL.
pub const PATH_BYTES_MAX: usize = 107;

/// Why a control socket could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A daemon listens on it.
    #[error(
        "control socket {0} belongs to a running daemon; stop that one, or choose another path with --control"
    )]
    InUse(PathBuf),
    /// Something else has the name.
    #[error("{0} exists and is not a socket; choose another path with --control")]
    NotASocket(PathBuf),
    /// No such group.
    #[error("no group {0:?} in /etc/group; give a group's name or number to --control-group")]
    NoSuchGroup(String),
    /// The host refused.
    #[error("control socket {path}: {source}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
}

/// A listening control socket. Its file goes when this is dropped.
#[derive(Debug)]
pub struct ControlSocket {
    /// The file.
    path: PathBuf,
    /// Its device and inode, to know it again.
    identity: (u64, u64),
    /// Whether the file stays, since somebody else listens on the socket.
    stays: bool,
}

impl ControlSocket {
    /// Makes the socket at `path`: for this user only, or for a group as well.
    ///
    /// # Errors
    /// See [`SocketError`]; nothing is left behind.
    pub fn bind(path: &Path, group: Option<&str>) -> Result<(Self, UnixListener), SocketError> {
        let io = |source| SocketError::Io {
            path: path.to_owned(),
            source,
        };
        let gid = group.map(group_id).transpose()?;
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io(error)),
            Ok(found) if !found.file_type().is_socket() => {
                return Err(SocketError::NotASocket(path.to_owned()));
            }
            Ok(_) => match connect(path) {
                Ok(_) => return Err(SocketError::InUse(path.to_owned())),
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    tracing::info!(path = %path.display(), "replacing the socket of a daemon that died");
                }
                // Too busy to accept is alive as well.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(SocketError::InUse(path.to_owned()));
                }
                Err(error) => return Err(io(error)),
            },
        }
        let private = PrivateDir::beside(path).map_err(io)?;
        let made = private.path.join("s");
        let (listener, identity) = listen(&made, gid)
            .and_then(|listened| fs::rename(&made, path).map(|()| listened))
            .map_err(io)?;
        Ok((
            Self {
                path: path.to_owned(),
                identity,
                stays: false,
            },
            listener,
        ))
    }

    /// Goes on with a socket that another process has made.
    pub fn adopt(handed: HandedSocket) -> (Self, UnixListener) {
        let socket = Self {
            path: handed.path,
            identity: handed.inode,
            stays: false,
        };
        (socket, handed.listener.into())
    }

    /// Lets another process go on with it.
    pub fn hand_over(mut self, listener: UnixListener) -> HandedSocket {
        self.stays = true;
        HandedSocket {
            listener: listener.into(),
            path: std::mem::take(&mut self.path),
            inode: self.identity,
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if self.stays {
            return;
        }
        let ours =
            fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), "the control socket's file stays: {error}");
        }
    }
}

/// Listens on a new socket and gives its file the right mode and group. Also returns its device and inode.
fn listen(path: &Path, gid: Option<u32>) -> io::Result<(UnixListener, (u64, u64))> {
    let listener = with_address(path, |address| UnixListener::bind(address))?;
    if let Some(gid) = gid {
        std::os::unix::fs::chown(path, None, Some(gid))?;
    }
    let mode = if gid.is_some() { 0o660 } else { 0o600 };
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    let meta = fs::symlink_metadata(path)?;
    Ok((listener, (meta.dev(), meta.ino())))
}

/// Connects to a socket, whatever the length of its path.
///
/// # Errors
/// The host's answer.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    with_address(path, |address| UnixStream::connect(address))
}

/// Calls `use_it` with a path for the same socket that is short enough for an address.
fn with_address<T>(path: &Path, use_it: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    if path.as_os_str().as_bytes().len() <= PATH_BYTES_MAX {
        return use_it(path);
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return use_it(path);
    };
    // Alive until the address was used.
    let dir: OwnedFd = rustix::fs::open(
        parent,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    use_it(
        &Path::new("/proc/self/fd")
            .join(dir.as_raw_fd().to_string())
            .join(name),
    )
}

/// A directory that only this user can enter, removed with all it holds when dropped.
#[derive(Debug)]
struct PrivateDir {
    /// Where it is.
    path: PathBuf,
}

impl PrivateDir {
    /// Makes one in the same directory as `path`, so that a rename from it stays on one file system.
    fn beside(path: &Path) -> io::Result<Self> {
        let name = format!(".stratablk-{}", uuid::Uuid::new_v4().simple());
        let path = path.with_file_name(name);
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self { path })
    }
}

impl Drop for PrivateDir {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), "a temporary directory stays: {error}");
        }
    }
}

/// The number of a group that was given by name or number for the control socket.
fn group_id(group: &str) -> Result<u32, SocketError> {
    accounts::group(group)
        .map_err(|source| SocketError::Io {
            path: "/etc/group".into(),
            source,
        })?
        .ok_or_else(|| SocketError::NoSuchGroup(group.to_owned()))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    /// The permission bits of a file.
    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn private_by_default_and_gone_when_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let (socket, _listener) = ControlSocket::bind(&path, None).unwrap();
        assert_eq!(mode(&path), 0o600);
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "no temporary directory stays"
        );
        connect(&path).unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_group_may_use_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let gid = fs::metadata(dir.path()).unwrap().gid();
        let (_socket, _listener) = ControlSocket::bind(&path, Some(&gid.to_string())).unwrap();
        assert_eq!(mode(&path), 0o660);
        assert_eq!(fs::metadata(&path).unwrap().gid(), gid);
        let refused = ControlSocket::bind(&dir.path().join("b"), Some("no such group"));
        assert!(matches!(refused, Err(SocketError::NoSuchGroup(_))));
    }

    #[test]
    fn a_stale_socket_is_replaced_a_live_one_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        drop(UnixListener::bind(&path).unwrap());
        let (_socket, _listener) = ControlSocket::bind(&path, None).unwrap();
        assert!(matches!(
            ControlSocket::bind(&path, None),
            Err(SocketError::InUse(_))
        ));
        connect(&path).unwrap();
    }

    #[test]
    fn another_file_is_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "data").unwrap();
        assert!(matches!(
            ControlSocket::bind(&path, None),
            Err(SocketError::NotASocket(_))
        ));
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn the_file_of_a_successor_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let (socket, listener) = ControlSocket::bind(&path, None).unwrap();
        drop(listener);
        let (_second, _listener) = ControlSocket::bind(&path, None).unwrap();
        drop(socket);
        connect(&path).unwrap();
    }

    #[test]
    fn long_paths_work() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(200));
        fs::create_dir(&deep).unwrap();
        let path = deep.join("control.sock");
        let (_socket, _listener) = ControlSocket::bind(&path, None).unwrap();
        connect(&path).unwrap();
        assert!(matches!(
            ControlSocket::bind(&path, None),
            Err(SocketError::InUse(_))
        ));
    }
}
