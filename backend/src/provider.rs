//! The disks that the daemon serves: volumes of its store, opened while rings run.
//!
//! The store keeps a volume in memory after it was let go, until somebody wants to change what it holds. So a machine that
//! stops and starts its rings finds its disk as it left it and at once, and a command that changes the disk finds out by
//! the store that nobody uses it: it is the store that says no to one of the two when they come together.
//!
//! # Immutable volumes
//! Such a volume is reset when a machine starts ([`MachineStart::Fresh`]) if it is *armed*, which the store remembers. It is
//! armed when it is given its type, attached or detached, and whenever a machine leaves. It is disarmed when a machine
//! starts or goes on. So while a machine runs it is disarmed, and stays so if this process is killed or stops:
//! whoever is served next by the new one cannot be told from the machine that ran, and nothing is thrown away.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use stratablk_layers::Error;
use stratablk_layers::catalog::VolumeKind;
use stratablk_layers::saved::SavedState;
use stratablk_layers::store::Store;
use stratablk_layers::units::Sector;
use stratablk_layers::volume::Volume;

use crate::opener::Opener;
use crate::worker::provider::{DiskProvider, MachineStart};

/// A volume of the store.
#[derive(Debug)]
pub struct StoredDisk {
    /// The store.
    store: Arc<Store>,
    /// The volume.
    name: String,
    /// Its size when it was last asked for, in sectors.
    capacity: AtomicU64,
    /// Opens it.
    opener: Arc<Opener>,
}

impl StoredDisk {
    /// A volume of that name, which has been opened before to see whether it can be.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn new(store: Arc<Store>, name: &str, opener: Arc<Opener>) -> Result<Self, Error> {
        let capacity = store.volume_facts(name)?.size.0;
        Ok(Self {
            store,
            name: name.to_owned(),
            capacity: AtomicU64::new(capacity),
            opener,
        })
    }

    /// Why the volume takes no more writes, whether or not rings run.
    pub fn failure(&self) -> Option<String> {
        self.store.volume_facts(&self.name).ok()?.failure
    }

    /// Whether what it has to write waits for space on the host.
    pub fn waits_for_space(&self) -> bool {
        let facts = self.store.volume_facts(&self.name);
        facts.is_ok_and(|facts| facts.no_space)
    }

    /// Has a thread do something with the volume that may open whatever files that takes.
    fn with_files<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store, &str) -> Result<T, Error> + Send + 'static,
    ) -> io::Result<T> {
        let (store, name) = (Arc::clone(&self.store), self.name.clone());
        let done = self.opener.run(move || work(&store, &name))?;
        done.map_err(io::Error::other)
    }

    /// Its type. One that is not there any more is not to be written.
    fn kind(&self) -> VolumeKind {
        let facts = self.store.volume_facts(&self.name);
        facts.map_or(VolumeKind::Readonly, |facts| facts.kind)
    }
}

/// Resets or disarms an immutable volume, as the start of this machine demands.
fn settle(store: &Store, volume: &str, start: MachineStart) -> Result<(), Error> {
    let facts = store.volume_facts(volume)?;
    if facts.kind != VolumeKind::Immutable || !facts.armed {
        return Ok(());
    }
    match start {
        MachineStart::Fresh => {
            if store.machine_starts(volume)? {
                tracing::info!(%volume, "reset, since a machine starts");
            }
        }
        MachineStart::Continued => {
            store.arm(volume, false)?;
            tracing::info!(%volume, "not reset, since the machine goes on");
        }
        MachineStart::Again => {}
    }
    Ok(())
}

impl DiskProvider for StoredDisk {
    type Disk = Volume;

    fn name(&self) -> &str {
        &self.name
    }

    fn capacity(&self) -> Sector {
        if let Ok(facts) = self.store.volume_facts(&self.name) {
            self.capacity.store(facts.size.0, Ordering::Relaxed);
        }
        Sector(self.capacity.load(Ordering::Relaxed))
    }

    fn read_only(&self) -> bool {
        matches!(self.kind(), VolumeKind::Readonly | VolumeKind::Multiattach)
    }

    fn open(&self, start: MachineStart) -> io::Result<Arc<Volume>> {
        self.with_files(move |store, name| {
            settle(store, name, start)?;
            store.open_volume(name)
        })
    }

    fn closed(&self) {
        tracing::debug!(volume = %self.name, "no ring runs");
    }

    fn save_state(&self) -> io::Result<Vec<u8>> {
        let saved = self.with_files(Store::save_state)?;
        tracing::info!(volume = %self.name, snapshot = %saved.snapshot, "saved with its machine");
        Ok(saved.encode())
    }

    fn load_state(&self, record: &[u8]) -> io::Result<()> {
        let saved = SavedState::decode(record);
        let saved = saved.map_err(|what| io::Error::new(io::ErrorKind::InvalidData, what))?;
        self.with_files(move |store, name| store.check_state(name, &saved))
    }

    fn machine_left(&self) {
        let volume = &self.name;
        let facts = self.store.volume_facts(volume);
        if facts.is_ok_and(|facts| facts.kind == VolumeKind::Immutable && !facts.armed)
            && let Err(error) = self.store.arm(volume, true)
        {
            tracing::error!(%volume, %error, "the next start of a machine will not reset it");
        }
    }
}
