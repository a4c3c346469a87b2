//! What others may know of a session, and use of it.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use stratablk_layers::units::Sector;

use super::channel::Channel;
use super::under_way::Activity;

/// What others may know of a session, and use of it, while it lasts.
#[derive(Debug, Default)]
pub struct SessionState {
    /// Rings that workers serve.
    pub(super) rings: AtomicU32,
    /// Virtio features that the front-end took.
    pub(super) features: AtomicU64,
    /// Whether rings have run in it.
    pub(super) begun: Arc<AtomicBool>,
    /// The size that the front-end last read, in sectors, and 1 more; 0 if none has.
    told: AtomicU64,
    /// The same of any front-end, whichever was last. One that connects anew need not read it again, so it outlives the
    /// session.
    last_told: Arc<AtomicU64>,
    /// Whether a state of the device is being transferred.
    transferring: AtomicBool,
    /// The way back to the front-end. The lock also orders notifications and the stop of the last ring.
    channel: Mutex<Option<Channel>>,
    /// What it does now.
    pub(super) activity: Activity,
}

impl SessionState {
    /// A session begins. `last_told` is what the attachment keeps from one to the next.
    pub fn new(last_told: Arc<AtomicU64>) -> Self {
        Self {
            told: AtomicU64::new(last_told.load(Ordering::Relaxed)),
            last_told,
            ..Self::default()
        }
    }

    /// Rings that workers serve.
    pub fn rings(&self) -> u32 {
        self.rings.load(Ordering::Relaxed)
    }

    /// Virtio features that the front-end took.
    pub fn features(&self) -> u64 {
        self.features.load(Ordering::Relaxed)
    }

    /// Whether rings have run in it.
    pub fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Relaxed)
    }

    /// Whether a state of the device is being transferred.
    pub fn is_transferring(&self) -> bool {
        self.transferring.load(Ordering::Relaxed)
    }

    /// Says whether it is.
    pub(super) fn transfers(&self, transferring: bool) {
        self.transferring.store(transferring, Ordering::Relaxed);
    }

    /// Locks the channel. It is whole even if a thread panicked with the lock.
    pub(super) fn channel(&self) -> std::sync::MutexGuard<'_, Option<Channel>> {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the front-end that the configuration changed, if it has asked for such messages and rings are running: while
    /// all are stopped, the device is suspended and says nothing.
    ///
    /// # Errors
    /// The front-end does not read its messages.
    pub fn config_changed(&self) -> io::Result<()> {
        let channel = self.channel();
        match &*channel {
            Some(channel) if self.rings() > 0 => channel.config_changed(),
            _ => Ok(()),
        }
    }

    /// The size that the front-end knows, if it does.
    pub(super) fn size_told(&self) -> Option<Sector> {
        self.told.load(Ordering::Relaxed).checked_sub(1).map(Sector)
    }

    /// The front-end reads that the disk has this size.
    pub(super) fn told(&self, capacity: Sector) {
        let value = capacity.0.saturating_add(1);
        self.told.store(value, Ordering::Relaxed);
        self.last_told.store(value, Ordering::Relaxed);
    }

    /// A ring runs from now on, on a disk of this size. While none did nobody could be told of another size: so if the
    /// front-end knows another one, it is told to look now.
    pub(super) fn ring_started(&self, capacity: Sector) {
        let channel = self.channel();
        let first = self.rings.fetch_add(1, Ordering::Relaxed) == 0;
        let told = self.told.load(Ordering::Relaxed);
        if first
            && told != 0
            && told != capacity.0.saturating_add(1)
            && let Some(channel) = &*channel
            && let Err(error) = channel.config_changed()
        {
            tracing::warn!("the front-end was not told of the new size: {error}");
        }
    }
}
