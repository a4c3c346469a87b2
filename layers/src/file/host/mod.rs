//! A store's files on the host.
//!
//! Paths inside the store are opened relative to a descriptor of its directory, so that they stay inside it and go on to
//! mean the same if the directory is renamed. Only raw bases have absolute paths.

mod bounce;
mod copy;
pub(in crate::file) mod direct;
mod file;
mod open;
pub(in crate::file) mod transfer;
mod tree;
mod zeroes;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

use self::direct::DirectFiles;
use super::posix::PosixEngine;
use super::uring::UringEngine;
use super::{Directory, Engine, File, FileIdentity, FileStat, Media, OpenMode};

/// How a [`HostMedia`] works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostOptions {
    /// Use io_uring where it works; plain system calls otherwise.
    pub io_uring: bool,
}

impl Default for HostOptions {
    fn default() -> Self {
        Self { io_uring: true }
    }
}

/// The directory of a store on the host. See the module's text.
#[derive(Debug)]
pub struct HostMedia {
    /// The store's directory.
    root: OwnedFd,
    /// Its absolute path, to be shown.
    root_path: PathBuf,
    /// How to work.
    options: HostOptions,
    /// Open direct files, shared with the engines.
    direct: Arc<DirectFiles>,
    /// What to say, and what was said.
    notes: Mutex<Notes>,
}

/// Each note is given out once.
#[derive(Debug, Default)]
struct Notes {
    /// All that came up.
    all: Vec<String>,
    /// How many of them were given out.
    told: usize,
}

impl HostMedia {
    /// The store in `root`, an existing directory.
    ///
    /// # Errors
    /// The host's answer to opening the directory.
    pub fn new(root: PathBuf, options: HostOptions) -> io::Result<Self> {
        let root_path = std::path::absolute(root)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = uninterrupted(|| rustix::fs::open(&root_path, flags, Mode::empty()))?;
        Ok(Self {
            root,
            root_path,
            options,
            direct: Arc::default(),
            notes: Mutex::default(),
        })
    }

    /// Remembers something worth a log entry, unless it came up before.
    fn note(&self, text: String) {
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        if !notes.all.contains(&text) {
            notes.all.push(text);
        }
    }
}

/// Checks that a path is absolute, or stays inside the store. The empty path means the store's directory.
fn checked(path: &Path) -> io::Result<&Path> {
    if path.as_os_str().is_empty() {
        return Ok(Path::new("."));
    }
    let inside = |component| matches!(component, Component::Normal(_) | Component::CurDir);
    if path.is_absolute() || path.components().all(inside) {
        return Ok(path);
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        "a relative path must stay inside the store",
    ))
}

/// Makes a system call again if a signal cut it short.
fn uninterrupted<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other.map_err(io::Error::from),
        }
    }
}

impl Media for HostMedia {
    fn open(&self, path: &Path, mode: OpenMode, direct: bool) -> io::Result<Arc<dyn File>> {
        let opened = open::open(&self.root, checked(path)?, mode, direct)?;
        if let Some(reason) = opened.fallback {
            // Without the file's name: the next file has another one, and the same reason.
            self.note(format!(
                "files in {} are opened through the page cache: {reason}",
                self.root_path.display()
            ));
        }
        Ok(Arc::new(file::HostFile::new(
            opened.fd,
            opened.direct,
            opened.in_memory,
            &self.direct,
        )?))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        Ok(rustix::fs::mkdirat(&self.root, checked(path)?, Mode::RWXU)?)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        Ok(rustix::fs::renameat(
            &self.root,
            checked(from)?,
            &self.root,
            checked(to)?,
        )?)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        Ok(rustix::fs::linkat(
            &self.root,
            checked(from)?,
            &self.root,
            checked(to)?,
            AtFlags::empty(),
        )?)
    }

    fn copy(
        &self,
        from: &Arc<dyn File>,
        to: &Arc<dyn File>,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        copy::copy(from, to, offset, len)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(
            &self.root,
            checked(path)?,
            AtFlags::empty(),
        )?)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        tree::remove_all(&self.root, checked(path)?)
    }

    fn open_dir(&self, path: &Path) -> io::Result<Box<dyn Directory>> {
        let directory = tree::open_dir(&self.root, checked(path)?)?;
        Ok(Box::new(directory))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let directory = tree::open_dir(&self.root, checked(path)?)?;
        let mut names = Vec::new();
        for name in tree::names(&directory)? {
            names.push(String::from_utf8_lossy(name.to_bytes()).into_owned());
        }
        names.sort();
        Ok(names)
    }

    fn stat(&self, path: &Path) -> io::Result<FileStat> {
        let path = checked(path)?;
        let directory = if path.is_absolute() {
            CWD
        } else {
            rustix::fd::AsFd::as_fd(&self.root)
        };
        let stat = uninterrupted(|| {
            rustix::fs::statx(directory, path, AtFlags::empty(), StatxFlags::BASIC_STATS)
        })?;
        Ok(FileStat {
            len: stat.stx_size,
            mtime_ns: stat
                .stx_mtime
                .tv_sec
                .saturating_mul(1_000_000_000)
                .saturating_add(i64::from(stat.stx_mtime.tv_nsec)),
            allocated: stat.stx_blocks.saturating_mul(512),
            is_file: FileType::from_raw_mode(stat.stx_mode.into()) == FileType::RegularFile,
            identity: FileIdentity {
                device: u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor),
                inode: stat.stx_ino,
            },
        })
    }

    fn canonical(&self, path: &Path) -> io::Result<PathBuf> {
        std::fs::canonicalize(path)
    }

    fn display_path(&self, path: &Path) -> PathBuf {
        self.root_path.join(path)
    }

    fn engine(&self, depth: u32) -> io::Result<Box<dyn Engine>> {
        if self.options.io_uring {
            match UringEngine::new(depth, Arc::clone(&self.direct)) {
                Ok(engine) => return Ok(Box::new(engine)),
                Err(error) => {
                    self.note(format!(
                        "plain system calls are used in place of io_uring: {error}"
                    ));
                }
            }
        }
        Ok(Box::new(PosixEngine::new(depth, Arc::clone(&self.direct))?))
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        let new = notes.all.get(notes.told..).unwrap_or_default().to_vec();
        notes.told = notes.all.len();
        new
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn each_note_is_given_out_once() {
        let directory = tempfile::tempdir().unwrap();
        let media = HostMedia::new(directory.path().to_owned(), HostOptions::default()).unwrap();
        media.note("first".to_owned());
        media.note("first".to_owned());
        media.note("second".to_owned());
        assert_eq!(media.notes(), ["first", "second"]);
        media.note("first".to_owned());
        media.note("third".to_owned());
        assert_eq!(media.notes(), ["third"]);
        assert!(media.notes().is_empty());
    }

    #[test]
    fn relative_paths_stay_inside() {
        for path in ["", ".", "layers", "layers/x/data", "/else/where", "/a/../b"] {
            checked(Path::new(path)).unwrap();
        }
        for path in ["..", "a/../..", "layers/../../x"] {
            checked(Path::new(path)).unwrap_err();
        }
    }
}
