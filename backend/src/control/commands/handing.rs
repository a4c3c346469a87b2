//! A store and what is served of it, from one process to the next: see [`crate::takeover`].

use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::Commands;
use crate::provider::StoredDisk;
use crate::takeover::package::HandedVolume;
use crate::vhost::session::adopt::{Fared, Release};

/// How often to look whether somebody else has let go of what is to be dropped. Nothing tells, and it is a matter of
/// microseconds.
const LOOK_PERIOD: Duration = Duration::from_micros(50);
/// How often to say that it takes long.
const COMPLAINT_PERIOD: Duration = Duration::from_secs(5);
/// How long requests and messages may take that are under way when everything is to be handed over. Guests do not wait for it.
const UNDER_WAY_PATIENCE: Duration = Duration::from_secs(3);

impl Commands {
    /// The lock of the store, if everything can be handed over now that was flushed.
    ///
    /// # Errors
    /// Why it cannot, in words.
    pub fn lock_to_hand_over(&self) -> Result<OwnedFd, String> {
        if let Some(volume) = self.attachments.transferring() {
            let what = "the state of its machine is being transferred";
            return Err(format!("volume {volume:?}: {what}; try again"));
        }
        let lock = self.store.lock_descriptor();
        let lock = lock.map_err(|error| error.to_string())?;
        lock.ok_or_else(|| "the store is not locked".to_owned())
    }

    /// Waits until what front-ends have under way now has ended, while they are served.
    ///
    /// # Errors
    /// Why nothing is to be handed over, in words: some of it does not end, and all would wait for it once rings are stopped.
    pub fn await_under_way(&self) -> Result<(), String> {
        let Some(volume) = self.attachments.await_under_way(UNDER_WAY_PATIENCE) else {
            return Ok(());
        };
        Err(format!(
            "volume {volume:?}: a request, or a message of its front-end, has not ended for {UNDER_WAY_PATIENCE:?}, and all \
             guests would have to wait for it; try again when its bases and its front-end's memory answer"
        ))
    }

    /// Ends the threads of jobs and of upkeep, which then let go of this. No command runs, nor will any.
    pub fn rest(&self) {
        self.store.close();
        self.await_jobs_idle();
    }

    /// Writes what is dirty, while guests are served, so that there is little to be written while they wait. May block for as
    /// long as the host does.
    ///
    /// # Errors
    /// Why nothing is to be handed over, in words: what there is no space for now, the next process could not write either, and
    /// would not serve. A volume that has failed is marked as such, and will be served as it is.
    pub fn flush_before(&self) -> Result<(), String> {
        let flushed = self.store.flush_all();
        if let Some(volume) = self.store.waits_for_space() {
            return Err(format!("volume {volume:?} waits for space on the host"));
        }
        if let Err(error) = flushed {
            tracing::warn!("not everything could be flushed: {error}");
        }
        Ok(())
    }

    /// Ends everything for another process to go on with it: rings when what is under way has completed, and the store as a
    /// crash would. Its lock goes with this too, unless there is a descriptor of it elsewhere.
    pub fn hand_over(self) -> Vec<HandedVolume> {
        let began = Instant::now();
        let attachments = self.attachments.hand_over();
        let drained = began.elapsed();
        let Self {
            store,
            attachments: table,
            opener,
            ..
        } = self;
        drop((table, opener));
        drop(sole(store, "the store"));
        tracing::debug!(?drained, closed = ?began.elapsed(), "the parts of that in this process");
        let volumes = attachments
            .into_iter()
            .map(|(name, terms, attachment)| HandedVolume {
                name,
                terms,
                attachment,
            });
        volumes.collect()
    }

    /// Serves a volume that another process has served until now.
    ///
    /// # Errors
    /// There is no such volume; the host's answer.
    pub fn adopt(
        &self,
        handed: HandedVolume,
        told: &mpsc::Sender<Fared>,
        release: &Arc<Release>,
    ) -> std::io::Result<()> {
        let (store, opener) = (Arc::clone(&self.store), Arc::clone(&self.opener));
        let disk = StoredDisk::new(store, &handed.name, opener).map_err(std::io::Error::other)?;
        let disk = Arc::new(disk);
        self.attachments
            .adopt(disk, handed.terms, handed.attachment, told, release)
    }
}

/// What an `Arc` holds, once all others have dropped theirs.
pub fn sole<T>(mut shared: Arc<T>, what: &str) -> T {
    let mut told = Instant::now();
    loop {
        match Arc::try_unwrap(shared) {
            Ok(found) => return found,
            Err(still) => shared = still,
        }
        if told.elapsed() > COMPLAINT_PERIOD {
            told = Instant::now();
            tracing::error!("{what} is in use still");
        }
        thread::park_timeout(LOOK_PERIOD);
    }
}
