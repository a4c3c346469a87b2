//! The options of the sector cache: their words, their bounds, and what the host says about its directory.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use stratablk_layers::cache::arena::place::DEFAULT_DIR;
use stratablk_layers::cache::{CACHE_BYTES_MIN, CacheOptions, FRAME_BYTES, OnFull};

use super::{Failure, size};
use crate::control::types::ErrorKind;

/// The largest cache; few hosts have so much memory, and addresses for more are hard to come by.
const CACHE_BYTES_MAX: u64 = 64 << 40;
/// The longest dirty age: a day.
const DIRTY_AGE_MAX_S: f64 = 86_400.0;
/// `f_type` of tmpfs.
const TMPFS_MAGIC: i64 = 0x0102_1994;
/// `f_type` of ramfs.
const RAMFS_MAGIC: i64 = 0x8584_58f6;

/// How the cache is set up. All sizes are bytes, or with K, M, G or T, each 1024 times the one before.
#[derive(Clone, Debug, Args)]
pub struct CacheArgs {
    /// Memory for the cache of recently used data, shared by all volumes and taken at the start: bytes, or with K, M, G
    /// or T; at least 64K
    #[arg(long, value_name = "SIZE", env = "STRATABLK_CACHE_SIZE", default_value = "256M", value_parser = cache_size)]
    pub cache_size: u64,
    /// Where the cache's memory file lies; it must be in memory, so that it outlives the daemon and not the machine
    #[arg(long, value_name = "DIR", env = "STRATABLK_CACHE_DIR", default_value = DEFAULT_DIR)]
    pub cache_dir: PathBuf,
    /// Keep the cache's memory after an orderly end, for a warm start
    #[arg(long)]
    pub cache_keep: bool,
    /// How much written data may wait in the cache for being written to the files: bytes, or with K, M, G or T; from 4K
    /// to the size of the cache [default: half of the cache]
    #[arg(long, value_name = "SIZE", value_parser = dirty_limit)]
    pub dirty_limit: Option<u64>,
    /// How long written data may wait in the cache: seconds, from 0 to 86400, such as 0.5
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0, value_parser = dirty_age)]
    pub dirty_age: f64,
    /// What becomes of guests' requests that need space while the host has none: they wait until there is room, or fail
    /// with an I/O error. Nothing that was acknowledged is lost by either
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = OnEnospc::Hold)]
    pub on_enospc: OnEnospc,
}

/// What becomes of requests that need space while the host has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OnEnospc {
    /// They wait.
    Hold,
    /// They fail.
    Report,
}

impl CacheArgs {
    /// The options for the store.
    ///
    /// # Errors
    /// Options that do not fit each other, or a directory that is none.
    pub(super) fn options(self) -> Result<CacheOptions, Failure> {
        if let Some(limit) = self.dirty_limit.filter(|limit| *limit > self.cache_size) {
            return Err(Failure::Usage(format!(
                "--dirty-limit {} is more than the whole cache, --cache-size {}; make the cache larger or the limit smaller",
                size::show(limit),
                size::show(self.cache_size)
            )));
        }
        if !in_memory(&self.cache_dir)? {
            tracing::warn!(
                "--cache-dir {} is not on tmpfs: a cache on a disk is slow, and of no use after the machine was down. Choose a \
                 directory in memory, such as {DEFAULT_DIR}",
                self.cache_dir.display()
            );
        }
        Ok(CacheOptions {
            bytes: self.cache_size,
            dirty_bytes: self.dirty_limit,
            dirty_age: Duration::from_secs_f64(self.dirty_age),
            place: Some(self.cache_dir),
            keep: self.cache_keep,
            huge_pages: true,
            on_full: match self.on_enospc {
                OnEnospc::Hold => OnFull::Hold,
                OnEnospc::Report => OnFull::Report,
            },
        })
    }
}

/// Whether a directory lies in memory.
fn in_memory(dir: &Path) -> Result<bool, Failure> {
    let refuse = |what: String| {
        let what = format!(
            "--cache-dir {}: {what}; choose a directory in memory, such as {DEFAULT_DIR}",
            dir.display()
        );
        Failure::of(ErrorKind::Invalid, what)
    };
    match std::fs::metadata(dir) {
        Ok(meta) if meta.is_dir() => {}
        Ok(_) => return Err(refuse("not a directory".into())),
        Err(error) => return Err(refuse(error.to_string())),
    }
    let kind = rustix::fs::statfs(dir)
        .map_err(|errno| refuse(std::io::Error::from(errno).to_string()))?
        .f_type;
    Ok(matches!(kind, TMPFS_MAGIC | RAMFS_MAGIC))
}

/// A size that is at least `min`.
fn at_least(min: u64, text: &str) -> Result<u64, String> {
    let bytes = size::parse(text)?;
    if bytes < min {
        return Err(format!(
            "{} is too little; give at least {}K",
            size::show(bytes),
            min / 1024
        ));
    }
    Ok(bytes)
}

/// The size of a cache.
fn cache_size(text: &str) -> Result<u64, String> {
    let bytes = at_least(CACHE_BYTES_MIN, text)?;
    if bytes > CACHE_BYTES_MAX {
        let max = CACHE_BYTES_MAX >> 40;
        return Err(format!(
            "{} is too much; give at most {max}T",
            size::show(bytes)
        ));
    }
    Ok(bytes)
}

/// A bound on dirty data.
fn dirty_limit(text: &str) -> Result<u64, String> {
    at_least(FRAME_BYTES, text)
}

/// How long data may be dirty.
fn dirty_age(text: &str) -> Result<f64, String> {
    seconds(0.0, DIRTY_AGE_MAX_S, text)
}

/// A time in seconds, as people write it: `5`, `0.5`.
///
/// # Errors
/// Words for a person who wrote something else.
pub fn seconds(min: f64, max: f64, text: &str) -> Result<f64, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| "write a number of seconds, such as 5 or 0.5".to_owned())?;
    if (min..=max).contains(&seconds) {
        Ok(seconds)
    } else {
        Err(format!("write a number of seconds from {min} to {max}"))
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    /// Options that are well.
    fn args(dir: &Path) -> CacheArgs {
        CacheArgs {
            cache_size: 1 << 20,
            cache_dir: dir.to_owned(),
            cache_keep: true,
            dirty_limit: Some(1 << 20),
            dirty_age: 0.25,
            on_enospc: OnEnospc::Hold,
        }
    }

    #[test]
    fn options_arrive_as_they_were_given() {
        let dir = tempfile::tempdir().unwrap();
        let options = args(dir.path()).options().unwrap();
        let expected = CacheOptions {
            bytes: 1 << 20,
            dirty_bytes: Some(1 << 20),
            dirty_age: Duration::from_millis(250),
            place: Some(dir.path().to_owned()),
            keep: true,
            huge_pages: true,
            on_full: OnFull::Hold,
        };
        assert_eq!(options, expected);
    }

    #[test]
    fn options_that_do_not_fit_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut more = args(dir.path());
        more.dirty_limit = Some((1 << 20) + 1);
        let Err(Failure::Usage(message)) = more.options() else {
            panic!("a limit beyond the cache");
        };
        assert!(message.contains("--dirty-limit") && message.contains("--cache-size"));

        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        for path in [file, dir.path().join("missing")] {
            let Err(Failure::Failed(detail)) = args(&path).options() else {
                panic!("{} is no directory", path.display());
            };
            assert!(detail.message.contains("--cache-dir"), "{}", detail.message);
        }
    }

    #[test]
    fn file_systems_in_memory_are_known() {
        assert!(in_memory(Path::new(DEFAULT_DIR)).unwrap());
        assert!(!in_memory(Path::new("/proc")).unwrap());
    }
}
