//! Stands in for `crate::attach` until that is there: listens and serves nothing.
#![expect(dead_code, reason = "goes away with the merge")]
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;

use stratablk_layers::volume::Volume;

pub struct Attachment;
pub struct AttachOptions {
    pub queues: u16,
    pub workers: usize,
    pub read_only: bool,
}
pub enum SocketSource {
    Listen(PathBuf),
    Fd(OwnedFd),
}
#[derive(Debug)]
pub struct AttachmentHandle(Option<(UnixListener, PathBuf)>);
#[derive(Default)]
pub struct AttachmentStatus {
    pub connected: bool,
    pub rings_running: usize,
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub discards: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub errors: u64,
}

impl Attachment {
    pub fn start(
        _: Arc<Volume>,
        socket: SocketSource,
        _: AttachOptions,
    ) -> io::Result<AttachmentHandle> {
        Ok(AttachmentHandle(match socket {
            SocketSource::Listen(path) => {
                if UnixStream::connect(&path).is_ok() {
                    return Err(io::Error::new(
                        io::ErrorKind::AddrInUse,
                        format!("{} is in use", path.display()),
                    ));
                }
                let _ = std::fs::remove_file(&path);
                Some((UnixListener::bind(&path)?, path))
            }
            SocketSource::Fd(_) => None,
        }))
    }
}
impl AttachmentHandle {
    pub fn stop(self) {
        if let Some((_, path)) = self.0 {
            let _ = std::fs::remove_file(path);
        }
    }
    pub fn status(&self) -> AttachmentStatus {
        AttachmentStatus::default()
    }
}
