//! A file system far away, of the kind that stops to answer: one image in a directory, served by this process through
//! `/dev/fuse`, which needs root.
//!
//! SPEC: include/uapi/linux/fuse.h of Linux, version 7.31.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::TempDir;

use crate::daemon::temp_dir;

/// Numbers of requests.
pub mod opcode {
    /// Looks a name up in a directory.
    pub const LOOKUP: u32 = 1;
    /// Asks for the attributes of a file.
    pub const GETATTR: u32 = 3;
    /// Opens a file.
    pub const OPEN: u32 = 14;
    /// Reads of a file.
    pub const READ: u32 = 15;
    /// Asks how much space there is.
    pub const STATFS: u32 = 17;
    /// Closes a file.
    pub const RELEASE: u32 = 18;
    /// A descriptor of a file is closed.
    pub const FLUSH: u32 = 25;
    /// Begins.
    pub const INIT: u32 = 26;
}

/// Requests that have no answer: FORGET, INTERRUPT and BATCH_FORGET.
const UNANSWERED: [u32; 3] = [2, 36, 42];
/// The number of the directory.
const ROOT: u64 = 1;
/// The number of the image.
const IMAGE: u64 = 2;
/// The name of the image.
const NAME: &[u8] = b"image\0";
/// How long what is known may be taken for true, in seconds: not at all.
const VALID: u64 = 0;
/// Reads are not answered from pages of the host.
const DIRECT_IO: u32 = 1;
/// The header of a request.
const HEADER_BYTES: usize = 40;
/// What the longest request may have.
const REQUEST_BYTES: usize = 1 << 17;
/// How long a request may take to come.
const PATIENCE: Duration = Duration::from_secs(30);

/// The file system. It is gone when this is dropped, and whoever waits for it gets an error.
pub struct Far {
    /// Where it is mounted. Goes after that.
    dir: TempDir,
    /// What is shared with who answers.
    shared: Arc<Shared>,
}

/// What answers, and who says when.
struct Shared {
    /// Where requests come from and answers go.
    device: File,
    /// The bytes of the image.
    image: Vec<u8>,
    /// Answers that are held back.
    held: Mutex<Held>,
    /// Notified when one is.
    more: Condvar,
}

/// Answers that are held back.
#[derive(Default)]
struct Held {
    /// To what kind of request.
    opcode: Option<u32>,
    /// The answers.
    answers: Vec<Vec<u8>>,
}

impl Far {
    /// Mounts one with such an image. `None` where that cannot be done: without root's rights, or in a host without FUSE.
    ///
    /// # Panics
    /// If the host refuses it for another reason.
    pub fn mount(image: Vec<u8>) -> Option<Self> {
        let dir = temp_dir();
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse");
        let device = match device {
            Err(error) if left_out(&error) => return None,
            device => device.expect("a device that is there opens"),
        };
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other\0",
            device.as_raw_fd()
        );
        let options = std::ffi::CStr::from_bytes_with_nul(options.as_bytes()).expect("no zeroes");
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        match mount("far", dir.path(), "fuse", flags, Some(options)) {
            Err(errno) if left_out(&errno.into()) => return None,
            mounted => mounted.expect("it can be mounted"),
        }
        let shared = Arc::new(Shared {
            device,
            image,
            held: Mutex::default(),
            more: Condvar::new(),
        });
        let answering = Arc::clone(&shared);
        std::thread::spawn(move || answering.answer_all());
        Some(Self { dir, shared })
    }

    /// The image.
    pub fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    /// From now on this kind of request is not answered.
    pub fn hold(&self, opcode: u32) {
        self.shared.held().opcode = Some(opcode);
    }

    /// Waits until so many wait for an answer.
    ///
    /// # Panics
    /// If they do not come.
    #[track_caller]
    pub fn wait_held(&self, count: usize) {
        let few = |held: &mut Held| held.answers.len() < count;
        let waited = self
            .shared
            .more
            .wait_timeout_while(self.shared.held(), PATIENCE, few);
        let (held, _) = waited.expect("nobody panics with it");
        assert!(held.answers.len() >= count, "{} came", held.answers.len());
    }

    /// Answers all that wait, and what comes from now on.
    pub fn release(&self) {
        let mut held = self.shared.held();
        held.opcode = None;
        for answer in held.answers.drain(..) {
            self.shared.send(&answer);
        }
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        let _ = unmount(self.dir.path(), UnmountFlags::FORCE | UnmountFlags::DETACH);
    }
}

impl Shared {
    /// Locks what is held back.
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().expect("nobody panics with it")
    }

    /// Sends an answer; who has asked may be gone.
    fn send(&self, answer: &[u8]) {
        let _ = (&self.device).write(answer);
    }

    /// Answers until there is nothing to answer any more.
    fn answer_all(&self) {
        let mut request = vec![0; REQUEST_BYTES];
        loop {
            let len = match (&self.device).read(&mut request) {
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(_) => return,
            };
            let (opcode, unique) = (u32_at(&request, 4), u64_at(&request, 8));
            if UNANSWERED.contains(&opcode) {
                continue;
            }
            let node = u64_at(&request, 16);
            let answer = match self.answer(opcode, node, &request[HEADER_BYTES..len]) {
                Ok(body) => framed(unique, 0, &body),
                Err(errno) => framed(unique, -errno.raw_os_error(), &[]),
            };
            let mut held = self.held();
            if held.opcode == Some(opcode) {
                held.answers.push(answer);
                self.more.notify_all();
            } else {
                self.send(&answer);
            }
        }
    }

    /// The answer to a request.
    fn answer(&self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, rustix::io::Errno> {
        use rustix::io::Errno;
        Ok(match opcode {
            opcode::INIT => {
                // Version; no reading ahead, no features; 12 requests in the background; writes of 4 KiB; times in ns.
                let mut answer = words(&[7, 31, 0, 0, 12 | 9 << 16, 4096, 1]);
                answer.resize(64, 0);
                answer
            }
            opcode::LOOKUP if (node, body) == (ROOT, NAME) => {
                let mut answer = longs(&[IMAGE, 0, VALID, VALID, 0]);
                answer.extend(self.attributes(IMAGE));
                answer
            }
            opcode::LOOKUP => return Err(Errno::NOENT),
            opcode::GETATTR => {
                let mut answer = longs(&[VALID, 0]);
                answer.extend(self.attributes(node));
                answer
            }
            opcode::OPEN => {
                let mut answer = longs(&[0]);
                answer.extend(words(&[DIRECT_IO, 0]));
                answer
            }
            opcode::READ => {
                let from = usize::try_from(u64_at(body, 8)).expect("64-bit host");
                let from = from.min(self.image.len());
                let len = usize::try_from(u32_at(body, 16)).expect("64-bit host");
                let to = from.saturating_add(len).min(self.image.len());
                self.image[from..to].to_vec()
            }
            opcode::STATFS => vec![0; 80],
            opcode::RELEASE | opcode::FLUSH => Vec::new(),
            _ => return Err(Errno::NOSYS),
        })
    }

    /// The attributes of a file.
    fn attributes(&self, node: u64) -> Vec<u8> {
        let (mode, bytes) = match node {
            IMAGE => (0o100_644, self.image.len()),
            _ => (0o040_755, 0),
        };
        let bytes = u64::try_from(bytes).expect("64-bit host");
        // Number, size, blocks, three times; their nanoseconds, mode, links, user, group, device, block size, flags.
        let mut attributes = longs(&[node, bytes, bytes.div_ceil(512), 0, 0, 0]);
        attributes.extend(words(&[0, 0, 0, mode, 1, 0, 0, 0, 4096, 0]));
        attributes
    }
}

/// Whether a host does not let us mount anything.
fn left_out(error: &io::Error) -> bool {
    let left_out = matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
    );
    if left_out {
        eprintln!("nothing far away can be mounted here: {error}");
    }
    left_out
}

/// An answer with its header.
fn framed(unique: u64, error: i32, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(16 + body.len()).expect("a short answer");
    let mut answer = words(&[len]);
    answer.extend(error.to_le_bytes());
    answer.extend(unique.to_le_bytes());
    answer.extend(body);
    answer
}

/// Fields of 4 bytes.
fn words(fields: &[u32]) -> Vec<u8> {
    fields
        .iter()
        .flat_map(|field| field.to_le_bytes())
        .collect()
}

/// Fields of 8 bytes.
fn longs(fields: &[u64]) -> Vec<u8> {
    fields
        .iter()
        .flat_map(|field| field.to_le_bytes())
        .collect()
}

/// A field of 4 bytes.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let field = bytes[at..at + 4].try_into();
    u32::from_le_bytes(field.expect("4 bytes"))
}

/// A field of 8 bytes.
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let field = bytes[at..at + 8].try_into();
    u64::from_le_bytes(field.expect("8 bytes"))
}
