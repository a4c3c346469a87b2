//! A directory for stores, best in memory. `scripts/fuzz` makes one and removes it, whatever becomes of the fuzzer.

use std::path::{Path, PathBuf};
use std::{env, fs, process};

/// A directory of this process, empty at first.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// The directory of this name.
    ///
    /// # Panics
    /// If the host has no place for it.
    pub fn new(name: &str) -> Self {
        let path = env::temp_dir().join(format!("stratablk-fuzz-{name}-{}", process::id()));
        let scratch = Self(path);
        scratch.clear();
        scratch
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Empties it.
    ///
    /// # Panics
    /// If the host will not.
    pub fn clear(&self) {
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => panic!("{error}"),
            _ => {}
        }
        fs::create_dir_all(&self.0).unwrap_or_else(|error| panic!("{}: {error}", self.0.display()));
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // The system's folder for such things is emptied by others, too.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Copies a folder of plain files and folders.
///
/// # Panics
/// If the host will not.
pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if source.is_dir() {
            copy(&source, &target);
        } else {
            fs::copy(&source, &target).expect("a copy");
        }
    }
}
