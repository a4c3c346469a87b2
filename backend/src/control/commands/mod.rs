//! What the control plane can be asked to do, free of HTTP: each command checks its request, changes the store or the
//! attachments, and tells the listeners.
//!
//! Every method may block (files, database, a front-end that drains) and runs on a thread for that. A command that fails
//! leaves everything as it was. Once begun it runs to its end, whether or not its client is still there.

mod attaching;
mod handing;
mod jobs;
mod snapshots;
mod volumes;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use stratablk_layers::store::{self, Store};

pub use self::attaching::check_socket_path;
pub use self::handing::sole;
use super::attachments::Attachments;
use super::convert::{self, path_text};
use super::error::{ApiError, Result};
use super::events::Events;
use super::types::{CacheFigures, Stats, Status, Volume, VolumeList};
use super::watch::JobWatch;
use crate::confine::reach::{self, Want};
use crate::opener::Opener;

/// The daemon as its commands see it.
#[derive(Debug)]
pub struct Commands {
    /// The store.
    store: Arc<Store>,
    /// Its directory, absolute.
    dir: PathBuf,
    /// What is served now.
    attachments: Attachments,
    /// Opens volumes for attachments.
    opener: Arc<Opener>,
    /// Where changes are told.
    events: Arc<Events>,
    /// What was told of jobs.
    watch: JobWatch,
    /// Whether a thread carries out jobs.
    working: Mutex<bool>,
    /// Wakes who waits for the end of that thread.
    idle: Condvar,
    /// When the daemon started.
    started: Instant,
}

impl Commands {
    /// The commands on an open store. `workers_max` bounds the worker threads of each attachment.
    pub fn new(store: Store, dir: PathBuf, workers_max: usize) -> Self {
        let events = Arc::new(Events::default());
        let attachments = Attachments::new(workers_max, Arc::clone(&events));
        let commands = Self {
            store: Arc::new(store),
            dir,
            attachments,
            opener: Arc::default(),
            events,
            watch: JobWatch::default(),
            working: Mutex::new(false),
            idle: Condvar::new(),
            started: Instant::now(),
        };
        commands
            .watch
            .begin(&commands.jobs().jobs, commands.started);
        commands
    }

    /// Lets attachments have their volumes opened by threads with the rights of this one.
    ///
    /// # Errors
    /// The host's refusal of a thread.
    pub fn start_opener(&self) -> std::io::Result<()> {
        self.opener.start()
    }

    /// The same, with sockets for front-ends that the members of a group may use.
    pub fn with_socket_group(mut self, group: Option<u32>) -> Self {
        self.attachments = self.attachments.with_group(group);
        self
    }

    /// The directories of the images and sockets that the store remembers.
    pub fn remembered_places(&self) -> (Vec<PathBuf>, Vec<PathBuf>) {
        let (mut bases, mut sockets) = (BTreeSet::new(), BTreeSet::new());
        let dir = |path: PathBuf| path.parent().map(Path::to_owned);
        for info in self.store.volumes() {
            bases.extend(info.base.and_then(dir));
            sockets.extend(
                info.attachment
                    .and_then(|remembered| dir(remembered.socket)),
            );
        }
        (bases.into_iter().collect(), sockets.into_iter().collect())
    }

    /// Where changes are told.
    pub const fn events(&self) -> &Arc<Events> {
        &self.events
    }

    /// What is served now.
    pub const fn attachments(&self) -> &Attachments {
        &self.attachments
    }

    /// The daemon itself.
    pub fn status(&self) -> Status {
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            store_id: self.store.id().to_string(),
            store: path_text(&self.dir),
            uptime_s: self.started.elapsed().as_secs(),
            volumes: u64::try_from(self.store.volumes().len()).unwrap_or(u64::MAX),
            connected: u64::try_from(self.attachments.connected()).unwrap_or(u64::MAX),
            bad_bytes: self.store.bad_bytes(),
            layers_without_checksums: u64::try_from(self.store.layers_without_sums())
                .unwrap_or(u64::MAX),
        }
    }

    /// What the cache and the volumes have done.
    pub fn stats(&self) -> Stats {
        let volumes = self.volumes().volumes.into_iter();
        Stats {
            cache: self.cache(),
            volumes: volumes.map(convert::figures).collect(),
        }
    }

    /// What the cache has done.
    pub fn cache(&self) -> CacheFigures {
        convert::cache(&self.store.cache_stats())
    }

    /// All volumes, by name.
    pub fn volumes(&self) -> VolumeList {
        let volumes = self.store.volumes().into_iter();
        VolumeList {
            volumes: volumes.map(|info| self.view(info)).collect(),
        }
    }

    /// One volume.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn volume(&self, name: &str) -> Result<Volume> {
        Ok(self.view(self.store.volume_info(name)?))
    }

    /// A volume with its attachment. Every remembered attachment is in the table as well, served or failed.
    fn view(&self, info: store::VolumeInfo) -> Volume {
        let attachment = self.attachments.view(&info.name);
        convert::volume(info, attachment)
    }

    /// Writes what the store has to say into the log: what recovery dropped, which fall-backs were taken.
    pub fn log_notes(&self) {
        for note in self.store.notes() {
            tracing::warn!("{note}");
        }
    }

    /// Does the store's upkeep (checkpoints of long journals) until `close`; for a thread of its own.
    pub fn maintain(&self) {
        while self.store.maintain() {
            self.log_notes();
        }
    }

    /// Carries out jobs until `close`; for a thread of its own.
    pub fn run_jobs(&self) {
        *self.working() = true;
        // Also after a panic: whoever closes the store must not wait for ever.
        let _rests = Rests(self);
        while self.store.run_jobs() {
            self.observe_jobs();
            self.log_notes();
        }
    }

    /// Whether a thread carries out jobs; also after a panic, since each change is one assignment.
    fn working(&self) -> std::sync::MutexGuard<'_, bool> {
        self.working.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no job is at work any more, once the store is closed.
    fn await_jobs_idle(&self) {
        let mut working = self.working();
        while *working {
            working = self
                .idle
                .wait(working)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The last act: stops serving, then makes everything durable.
    ///
    /// # Errors
    /// The first failure, after everything was tried.
    pub fn close(&self) -> Result<()> {
        self.attachments.stop_all();
        // What a job writes must be written before the last flush.
        self.store.close();
        self.await_jobs_idle();
        let flushed = self.store.finish();
        self.log_notes();
        Ok(flushed?)
    }
}

/// The thread that carries out jobs has ended when this is dropped.
struct Rests<'a>(&'a Commands);

impl Drop for Rests<'_> {
    fn drop(&mut self) {
        *self.0.working() = false;
        self.0.idle.notify_all();
    }
}

/// Refuses a file of a request that the daemon is confined from.
fn check_reach(field: &str, path: &Path, want: Want) -> Result<()> {
    match reach::refusal(path, want) {
        None => Ok(()),
        Some(what) => Err(ApiError::invalid(field, what)),
    }
}

/// A path of a request, which must be absolute: the daemon's working directory is not its client's.
fn absolute(field: &str, path: String) -> Result<PathBuf> {
    let path = PathBuf::from(path);
    if !path.is_absolute() {
        return Err(ApiError::invalid(
            field,
            format!("{path:?} must be an absolute path"),
        ));
    }
    Ok(path)
}
