//! A directory as a medium, for the unit tests of maps and of the check: no engines, but a log of what was done, and
//! one operation that fails on demand.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::file::{Directory, Engine, File, FileIdentity, FileStat, FileToken, Media, OpenMode};

/// What was done, and what is to fail.
#[derive(Debug, Default)]
struct Log {
    /// "sync map.new", "rename map.new map", ...
    done: Vec<String>,
    /// The entry that fails instead of being done.
    fail: Option<String>,
}

/// A directory.
#[derive(Clone, Debug)]
pub struct TestMedia {
    /// The store's directory.
    root: PathBuf,
    /// Shared with the open files.
    log: Arc<Mutex<Log>>,
}

impl TestMedia {
    /// The medium of this directory, with a directory for layers.
    pub fn new(root: &Path) -> Self {
        fs::create_dir_all(root.join("layers")).unwrap();
        Self {
            root: root.to_owned(),
            log: Arc::default(),
        }
    }

    /// What was done since the last call.
    pub fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap_or_else(PoisonError::into_inner).done)
    }

    /// Lets the next operation with this log entry fail as on a full disk.
    pub fn fail(&self, entry: &str) {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).fail = Some(entry.to_owned());
    }

    /// Logs an operation, or fails it.
    fn log(&self, entry: String) -> io::Result<()> {
        self.fail_planned(&entry)?;
        self.log
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .done
            .push(entry);
        Ok(())
    }

    /// Fails an operation that changes nothing and is not logged, if it is its turn.
    fn fail_planned(&self, entry: &str) -> io::Result<()> {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        match log.fail.take_if(|fail| *fail == entry) {
            Some(_) => Err(io::ErrorKind::StorageFull.into()),
            None => Ok(()),
        }
    }
}

/// The last part of a path.
fn name(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

/// An open directory.
#[derive(Debug)]
struct TestDirectory {
    /// The name in the log.
    name: String,
    /// Of its log.
    media: TestMedia,
}

impl Directory for TestDirectory {
    fn sync(&self) -> io::Result<()> {
        self.media.log(format!("sync {}", self.name))
    }
}

/// An open file, with the name it was opened by.
#[derive(Debug)]
struct TestFile {
    /// The file.
    file: fs::File,
    /// The name in the log.
    name: String,
    /// Of its log.
    media: TestMedia,
}

impl File for TestFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.file.read_at(&mut buf[done..], offset + done as u64)? {
                0 => break,
                count => done += count,
            }
        }
        buf[done..].fill(0);
        Ok(())
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.media.log(format!("write {}", self.name))?;
        self.file.write_all_at(buf, offset)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.media.log(format!("sync {}", self.name))?;
        self.file.sync_data()
    }
    fn punch(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }
    fn token(&self) -> FileToken {
        FileToken(self.file.as_raw_fd())
    }
    fn alignment(&self) -> u64 {
        1
    }
}

impl Media for TestMedia {
    fn open(&self, path: &Path, mode: OpenMode, _direct: bool) -> io::Result<Arc<dyn File>> {
        let file = fs::OpenOptions::new()
            .read(true)
            .write(mode != OpenMode::ReadOnly)
            .create_new(mode == OpenMode::CreateNew)
            .open(self.root.join(path))?;
        Ok(Arc::new(TestFile {
            file,
            name: name(path),
            media: self.clone(),
        }))
    }
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(self.root.join(path))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.log(format!("rename {} {}", name(from), name(to)))?;
        fs::rename(self.root.join(from), self.root.join(to))
    }
    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.log(format!("link {} {}", name(from), name(to)))?;
        fs::hard_link(self.root.join(from), self.root.join(to))
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(self.root.join(path))
    }
    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir_all(self.root.join(path))
    }
    fn open_dir(&self, path: &Path) -> io::Result<Box<dyn Directory>> {
        self.fail_planned(&format!("open {}", name(path)))?;
        Ok(Box::new(TestDirectory {
            media: self.clone(),
            name: name(path),
        }))
    }
    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.root.join(path))? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }
    fn stat(&self, path: &Path) -> io::Result<FileStat> {
        let stat = fs::metadata(self.root.join(path))?;
        Ok(FileStat {
            len: stat.len(),
            mtime_ns: stat.mtime() * 1_000_000_000 + stat.mtime_nsec(),
            allocated: stat.blocks() * 512,
            is_file: stat.is_file(),
            identity: FileIdentity {
                device: stat.dev(),
                inode: stat.ino(),
            },
        })
    }
    fn display_path(&self, path: &Path) -> PathBuf {
        self.root.join(path)
    }
    fn engine(&self, _depth: u32) -> io::Result<Box<dyn Engine>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
