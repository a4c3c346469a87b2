//! The sockets that front-ends connect to.
//!
//! A path is taken over from a dead server and never from a live one, and nothing but a socket is ever removed. The
//! permissions of a new socket are in force from the moment its name appears.

use std::fs::Permissions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Permissions of a socket.
const MODE: u32 = 0o600;
/// The same where a group may use it.
const MODE_GROUP: u32 = 0o660;
/// Front-ends that may wait in the queue of the socket.
const BACKLOG: i32 = 16;

/// Where front-ends connect.
#[derive(Debug)]
pub enum SocketSource {
    /// A socket to make at this path.
    Listen(PathBuf),
    /// A socket that the daemon was given, listening or connected; the kernel knows which.
    Fd(OwnedFd),
    /// A socket that another process has made and listened on, with its name.
    Handed(HandedSocket),
}

/// A listening socket between two processes. Its name stays when this is dropped.
#[derive(Debug)]
pub struct HandedSocket {
    /// The socket.
    pub listener: OwnedFd,
    /// The path of its name.
    pub path: PathBuf,
    /// Device and number of the socket's inode.
    pub inode: (u64, u64),
}

/// A socket, ready for use.
#[derive(Debug)]
pub enum Socket {
    /// Front-ends come one after the other.
    Listening(Listening),
    /// There is one front-end, and no other after it.
    Connected(UnixStream),
}

/// A listening socket.
#[derive(Debug)]
pub struct Listening {
    /// The socket; does not block.
    pub listener: UnixListener,
    /// Its name, if it is one of ours.
    name: Option<Name>,
}

/// The name of a socket that we made. The name is removed on drop, unless it belongs to another socket by then.
#[derive(Debug)]
struct Name {
    /// The path.
    path: PathBuf,
    /// Device and number of the socket's inode.
    inode: (u64, u64),
    /// Whether it stays, since somebody else listens on the socket, or may.
    stays: bool,
}

impl Drop for Name {
    fn drop(&mut self) {
        if self.stays {
            return;
        }
        let ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == self.inode);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a socket");
        }
    }
}

/// An error that names the path.
fn at(path: &Path, kind: io::ErrorKind, what: impl std::fmt::Display) -> io::Error {
    io::Error::new(kind, format!("socket {}: {what}", path.display()))
}

impl Socket {
    /// Makes or takes the socket. A new one is for its owner, and the members of `group` if one is given.
    ///
    /// # Errors
    /// `AddrInUse` if a live server or something that is no socket has the path; otherwise the host's answer.
    pub fn open(source: SocketSource, group: Option<u32>) -> io::Result<Self> {
        match source {
            SocketSource::Listen(path) => Ok(Self::Listening(Listening::at(path, group)?)),
            SocketSource::Handed(HandedSocket {
                listener,
                path,
                inode,
            }) => {
                let listener = UnixListener::from(listener);
                listener.set_nonblocking(true)?;
                Ok(Self::Listening(Listening {
                    listener,
                    name: Some(Name {
                        path,
                        inode,
                        // Until it is certain that it is ours.
                        stays: true,
                    }),
                }))
            }
            SocketSource::Fd(fd) => {
                let stream = rustix::net::sockopt::socket_domain(&fd)? == AddressFamily::UNIX
                    && rustix::net::sockopt::socket_type(&fd)? == SocketType::STREAM;
                if !stream {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidInput,
                        "the descriptor is no Unix stream socket",
                    ));
                }
                rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
                if rustix::net::sockopt::socket_acceptconn(&fd)? {
                    let listener = UnixListener::from(fd);
                    listener.set_nonblocking(true)?;
                    Ok(Self::Listening(Listening {
                        listener,
                        name: None,
                    }))
                } else {
                    let stream = UnixStream::from(fd);
                    stream.set_nonblocking(false)?;
                    Ok(Self::Connected(stream))
                }
            }
        }
    }
}

impl Listening {
    /// Makes a socket at this path.
    fn at(path: PathBuf, group: Option<u32>) -> io::Result<Self> {
        clear_the_way(&path)?;
        let named = |error: Errno| {
            let error = io::Error::from(error);
            at(&path, error.kind(), error)
        };
        let address = SocketAddrUnix::new(&path).map_err(named)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(named)?;
        // The name gets the socket's permissions, less the umask: never more than what was asked for.
        rustix::fs::fchmod(&socket, Mode::from_raw_mode(MODE)).map_err(named)?;
        rustix::net::bind(&socket, &address).map_err(named)?;
        let found = std::fs::symlink_metadata(&path)?;
        let name = Name {
            inode: (found.dev(), found.ino()),
            path: path.clone(),
            stays: false,
        };
        let mode = match group {
            None => MODE,
            Some(gid) => {
                std::os::unix::fs::chown(&path, None, Some(gid))
                    .map_err(|error| at(&path, error.kind(), format!("group {gid}: {error}")))?;
                MODE_GROUP
            }
        };
        std::fs::set_permissions(&path, Permissions::from_mode(mode))?;
        rustix::net::listen(&socket, BACKLOG).map_err(named)?;
        Ok(Self {
            listener: UnixListener::from(socket),
            name: Some(name),
        })
    }

    /// Says that nobody else listens on it: it was handed over, and is ours now.
    pub fn is_ours(&mut self) {
        if let Some(name) = &mut self.name {
            name.stays = false;
        }
    }

    /// Lets another process listen on it. `None` for a socket without a name of ours.
    pub fn hand_over(self) -> Option<HandedSocket> {
        let mut name = self.name?;
        name.stays = true;
        Some(HandedSocket {
            listener: self.listener.into(),
            path: std::mem::take(&mut name.path),
            inode: name.inode,
        })
    }

    /// Where it is, for log lines.
    pub fn display(&self) -> String {
        match &self.name {
            Some(name) => name.path.display().to_string(),
            None => "an inherited socket".into(),
        }
    }
}

/// Removes a socket that nobody listens on.
fn clear_the_way(path: &Path) -> io::Result<()> {
    let found = match std::fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(at(path, error.kind(), error)),
    };
    if !found.file_type().is_socket() {
        return Err(at(
            path,
            io::ErrorKind::AddrInUse,
            "the path exists and is no socket; choose another one or remove it",
        ));
    }
    match try_connect(path) {
        // Nobody listens.
        Err(Errno::CONNREFUSED) => std::fs::remove_file(path),
        // Somebody does; with a full queue it would have us wait.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Err(at(
            path,
            io::ErrorKind::AddrInUse,
            "a live server listens on it",
        )),
        Err(Errno::NOENT) => Ok(()),
        Err(error) => {
            let error = io::Error::from(error);
            Err(at(path, error.kind(), error))
        }
    }
}

/// Connects to a socket without waiting.
fn try_connect(path: &Path) -> rustix::io::Result<()> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&probe, &address)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]
    use super::*;

    fn listen(path: &Path) -> io::Result<Socket> {
        Socket::open(SocketSource::Listen(path.into()), None)
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let live = listen(&path).unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let refused = listen(&path).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);
        assert!(refused.to_string().contains(path.to_str().unwrap()));
        assert!(path.exists());
        drop(live);
        assert!(!path.exists(), "the name goes with the socket");
    }

    #[test]
    fn a_group_may_use_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let gid = std::fs::metadata(dir.path()).unwrap().gid();
        let _socket = Socket::open(SocketSource::Listen(path.clone()), Some(gid)).unwrap();
        let found = std::fs::metadata(&path).unwrap();
        assert_eq!((found.mode() & 0o777, found.gid()), (0o660, gid));
    }

    #[test]
    fn only_sockets_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        std::fs::write(&path, b"data").unwrap();
        assert_eq!(listen(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
        assert!(listen(&dir.path().join("no/such/dir")).is_err());
        assert!(listen(&dir.path().join("x".repeat(200))).is_err());
    }

    #[test]
    fn a_name_that_belongs_to_somebody_else_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = listen(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let second = listen(&path).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
    }

    #[test]
    fn a_name_that_was_handed_over_stays_until_it_is_ours() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let hand_over = || {
            let Socket::Listening(listening) = listen(&path).unwrap() else {
                panic!("it listens");
            };
            let handed = SocketSource::Handed(listening.hand_over().unwrap());
            let Socket::Listening(listening) = Socket::open(handed, None).unwrap() else {
                panic!("it listens still");
            };
            listening
        };
        drop(hand_over());
        assert!(path.exists(), "whoever handed it over goes on with it");
        let mut listening = hand_over();
        listening.is_ours();
        drop(listening);
        assert!(!path.exists());
    }

    #[test]
    fn the_kernel_tells_listening_from_connected() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let socket = Socket::open(SocketSource::Fd(listener.into()), None).unwrap();
        assert!(matches!(socket, Socket::Listening(_)));
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let socket = Socket::open(SocketSource::Fd(ours.into()), None).unwrap();
        assert!(matches!(socket, Socket::Connected(_)));
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(Socket::open(SocketSource::Fd(file.into()), None).is_err());
    }
}
