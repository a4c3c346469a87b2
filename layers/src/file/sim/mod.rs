//! A store's files in memory, with faults and power losses from a seed. Deterministic: the same calls and seeds give the
//! same run. For tests; made for one thread at a time, but safe to share.
//!
//! # Fault model
//! What may happen, and so what the code above must survive:
//!
//! **Power loss** ([`SimMedia::crash_image`]), at any instant, leaves of each file
//! - every sector (512 bytes) with its content as of the last sync that covered it, or as of any one later write; sectors
//!   are independent of each other and never mixed inside;
//! - of writes and punches under way in an [`Engine`], any of their sectors;
//! - a length that it had at the last sync or later; lengths survive in order, like all metadata, but independently of
//!   the sectors: a file may have grown without the data (zeroes are read), or have lost data with its growth.
//!
//! **A sync** of a file covers the writes that completed before it was kicked. Those that complete while it is under way
//! stay unsynced.
//!
//! **Names**: the changes of one directory survive as a prefix, in order, as in a journaling file system; those of
//! different directories are independent, except that a rename between two happens in both or in neither. A change is
//! durable only after a sync of its directory. Syncing a file does not make its name durable, and syncing a new directory
//! does not make the directory's own name durable. Removing a directory removes the names in it first, each a change of its
//! own. Each change is atomic. A file may have several names, in several directories: each is a change of its own directory,
//! and the file is there as long as one of them is.
//!
//! **A killed process** ([`SimMedia::kill_image`]) loses only what was not kicked, and perhaps parts of what was under way;
//! what it did not sync a power cut may still take. ([`Survival::Everything`]: as if the host then synced all of it.)
//!
//! **Failures by plan** ([`Fault`]): any operation fails with EIO or ENOSPC after part of its effect; a failed sync may
//! drop the unsynced pages, so that a later sync which succeeds does not cover them and reads may find the old content;
//! and, as a canary only, a sync may lie.
//!
//! **Asynchronous operations** complete in any order, some of them many reaps later. A write's bytes are taken at its
//! kick; some of its sectors may be seen by others before it completes.
//!
//! Not modelled: sectors that change by themselves (but see [`SimMedia::rot`]), torn sectors, misdirected writes.
//!
//! # Cost
//! A crash image shares all content with its original; it copies the 4 KiB chunks that unsynced writes touch and the
//! names of directories with unsynced changes.

mod content;
mod crash;
mod disk;
mod engine;
mod faults;
mod names;
mod observe;
mod random;
mod world;

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use self::faults::{Fault, FaultEffect, FaultPoint, Survival};
pub use self::observe::{CrashPoint, Event, Observer};
pub use self::random::Random;

use self::world::{World, path_text};
use super::{Directory, Engine, File, FileStat, FileToken, Media, OpenMode};

/// A handle to a simulated directory of files; clones are handles to the same one. See the module's text.
#[derive(Clone)]
pub struct SimMedia {
    shared: Arc<Shared>,
}

/// What all handles share.
struct Shared {
    world: Mutex<World>,
    watch: Mutex<Watch>,
}

/// Who is told of crash points.
#[derive(Default)]
struct Watch {
    /// Crash points so far.
    count: u64,
    /// Taken out while it is called, so that it may use the media.
    observer: Option<Observer>,
}

impl std::fmt::Debug for SimMedia {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimMedia").finish_non_exhaustive()
    }
}

impl SimMedia {
    /// An empty store.
    pub fn new(seed: u64) -> Self {
        Self::with(World::new(seed))
    }

    fn with(world: World) -> Self {
        Self {
            shared: Arc::new(Shared {
                world: Mutex::new(world),
                watch: Mutex::default(),
            }),
        }
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.shared
            .world
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self) -> MutexGuard<'_, Watch> {
        self.shared
            .watch
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A fresh media as found after a power loss at this instant: nothing open, no faults planned, no observer. The same
    /// instant and seed give the same image.
    pub fn crash_image(&self, seed: u64) -> Self {
        self.crash_image_with(Survival::Seeded(seed))
    }

    /// As `crash_image`, with a say in what survives.
    pub fn crash_image_with(&self, survival: Survival) -> Self {
        Self::with(self.world().after_crash(survival))
    }

    /// A fresh media as found after the process that used it was killed at this instant, while the host goes on: everything
    /// written is there, and what was not synced may still be lost by a power cut. Of operations under way any part is done.
    /// The same instant and seed give the same image.
    pub fn kill_image(&self, seed: u64) -> Self {
        Self::with(self.world().after_kill(seed))
    }

    /// Calls `observer` at every crash point from now on, in place of the one before.
    pub fn set_observer(&self, observer: Observer) {
        self.watch().observer = Some(observer);
    }

    /// Takes the observer out.
    pub fn clear_observer(&self) {
        self.watch().observer = None;
    }

    /// How many crash points there were.
    pub fn crash_points(&self) -> u64 {
        self.watch().count
    }

    /// Makes a crash point of something that happens outside of the media, such as a commit of the catalog.
    pub fn mark(&self, what: &'static str) {
        self.point(Event::Marked(what), "".into());
    }

    /// A crash point. The caller holds no lock.
    fn point(&self, event: Event, path: Arc<str>) {
        let (number, observer) = {
            let mut watch = self.watch();
            watch.count += 1;
            (watch.count, watch.observer.take())
        };
        let Some(mut observer) = observer else { return };
        observer(
            self,
            &CrashPoint {
                number,
                event,
                path,
            },
        );
        let mut watch = self.watch();
        if watch.observer.is_none() {
            watch.observer = Some(observer);
        }
    }

    /// Plans a failure.
    pub fn inject(&self, fault: Fault) {
        self.world().plan.add(fault);
    }

    /// Forgets the planned failures.
    pub fn clear_faults(&self) {
        self.world().plan.clear();
    }

    /// How many operations failed by plan.
    pub fn faults_hit(&self) -> u64 {
        self.world().plan.hits
    }

    /// The name of the file or directory with which that happened last.
    pub fn last_fault(&self) -> Option<String> {
        self.world().plan.last.clone()
    }

    /// Puts a file that is durable at once, with the directories that lead to it: a raw base, or a fixture. Replaces a file
    /// of that name.
    ///
    /// # Errors
    /// If the path leads through a file.
    pub fn install(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.world().install(path, bytes)
    }

    /// Changes bytes of a file under everybody's feet, durably and without changing its time: rot of the medium.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn rot(&self, path: &Path, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.world().rot(path, offset, bytes)
    }
}

/// An open directory of a simulation.
#[derive(Debug)]
struct SimDirectory {
    /// Where it is.
    media: SimMedia,
    /// Which it is.
    path: PathBuf,
}

impl Directory for SimDirectory {
    fn sync(&self) -> io::Result<()> {
        let (media, path) = (&self.media, &self.path);
        media.point(Event::SyncDirBegun, path_text(path));
        let result = media.world().sync_dir(path);
        media.point(Event::SyncDirEnded, path_text(path));
        result
    }
}

impl Media for SimMedia {
    fn open(&self, path: &Path, mode: OpenMode, direct: bool) -> io::Result<Arc<dyn File>> {
        let (token, created) = self.world().open(path, mode)?;
        let file = Arc::new(SimFile {
            media: self.clone(),
            token,
            direct,
        });
        if created {
            self.point(Event::Created, path_text(path));
        }
        Ok(file)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.world().create_dir(path)?;
        self.point(Event::Created, path_text(path));
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.world().rename(from, to)?;
        self.point(Event::Renamed, path_text(to));
        Ok(())
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.world().link(from, to)?;
        self.point(Event::Created, path_text(to));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.world().remove(path)?;
        self.point(Event::Removed, path_text(path));
        Ok(())
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.world().remove_dir_all(path)?;
        self.point(Event::Removed, path_text(path));
        Ok(())
    }

    fn open_dir(&self, path: &Path) -> io::Result<Box<dyn Directory>> {
        Ok(Box::new(SimDirectory {
            media: self.clone(),
            path: path.to_owned(),
        }))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.world().list(path)
    }

    fn stat(&self, path: &Path) -> io::Result<FileStat> {
        self.world().stat(path)
    }

    fn display_path(&self, path: &Path) -> PathBuf {
        Path::new("/simulated/store").join(path)
    }

    fn fresh_id(&self) -> uuid::Uuid {
        self.world().ids.fresh()
    }

    fn go_on(&self) -> bool {
        self.point(Event::Waiting, "".into());
        true
    }

    fn engine(&self, depth: u32) -> io::Result<Box<dyn Engine>> {
        Ok(Box::new(engine::SimEngine::new(self.clone(), depth)))
    }
}

/// An open file of a simulation.
#[derive(Debug)]
struct SimFile {
    media: SimMedia,
    token: i32,
    direct: bool,
}

impl Drop for SimFile {
    fn drop(&mut self) {
        self.media.world().close(self.token);
    }
}

impl File for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.media.world().read(self.token, buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let (result, path) = self.media.world().write(self.token, buf, offset);
        self.media.point(Event::Written, path);
        result
    }

    fn sync_data(&self) -> io::Result<()> {
        let (mark, path) = {
            let world = self.media.world();
            (world.sync_mark(self.token), world.path(self.token))
        };
        self.media.point(Event::SyncBegun, path);
        let (result, path) = self.media.world().sync(self.token, mark);
        self.media.point(Event::SyncEnded, path);
        result
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let (result, path) = self.media.world().punch(self.token, offset, len);
        self.media.point(Event::Punched, path);
        result
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let (result, path) = self.media.world().set_len(self.token, len);
        self.media.point(Event::LengthSet, path);
        result
    }

    fn len(&self) -> io::Result<u64> {
        self.media.world().len(self.token)
    }

    fn data_ranges(&self, from: u64, to: u64) -> io::Result<Option<Vec<Range<u64>>>> {
        self.media
            .world()
            .data_ranges(self.token, from, to)
            .map(Some)
    }

    fn token(&self) -> FileToken {
        FileToken(self.token)
    }

    fn alignment(&self) -> u64 {
        if self.direct { 512 } else { 1 }
    }
}
