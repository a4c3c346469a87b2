//! A session's use of its disk: opened when its first ring starts, let go when the last one has stopped.
//!
//! # When a machine starts
//! A disk may be one that begins anew with every start of its machine. The protocol does not say when a machine starts; it
//! has to be told from what comes before the first ring of a connection runs.
//!
//! | what happens                                    | connection | first ring begins at             | is a start |
//! |-------------------------------------------------|------------|----------------------------------|------------|
//! | a machine is switched on                        | new        | entry 0 of a ring never used     | yes        |
//! | firmware hands over to an operating system      | the same   | entry 0                          | no         |
//! | a guest reboots, and its front-end keeps the connection | the same | entry 0                    | no         |
//! | a guest reboots, and its front-end connects anew | new       | entry 0 of a ring never used     | yes        |
//! | we were restarted, or the connection was lost   | new        | another entry, or a ring in use  | no         |
//! | the same, of a front-end with an inflight buffer | new       | any, but the buffer was used     | no         |
//! | a machine is restored from a file, or migrated  | new        | another entry, or a loaded state | no         |
//!
//! A ring in use is told by the used ring, which its driver has zeroed at the beginning and into which only a device writes.
//! So also a ring that was left at entry 65,536, which is 0 again, is no new one. An inflight buffer that was used tells it
//! too, even of a machine that was given nothing back yet: its first requests are under way. One that we have just made says
//! nothing.
//!
//! What remains: a machine that has made no request at all cannot be told from one that starts, but it cannot tell what its
//! disk held before either. A front-end that enables each ring before it says anything of the next is judged by
//! the first alone; none that is known does so with a first ring that was never used. And a driver that does not zero its
//! rings is taken for one that goes on: nothing is thrown away that somebody may need.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use stratablk_layers::units::Sector;

use super::inflight::InflightBuffer;
use super::memory::GuestMemory;
use super::turn::Turns;
use super::vring::Vring;
use crate::worker::disk::DiskSource;
use crate::worker::provider::{DiskProvider, MachineStart};

/// The use of a disk by one session. Dropping it lets the disk go.
pub struct DiskUse<P: DiskProvider> {
    /// Gives the disk out.
    provider: Arc<P>,
    /// Whether the session began with a disk that may not be changed: what its front-end was told by the features.
    read_only: bool,
    /// The disk, while rings run.
    disk: Option<Arc<P::Disk>>,
    /// Whether rings have run in this session; also for who outlives it.
    begun: Arc<AtomicBool>,
    /// The saved state that the machine goes on from, until its rings start.
    loaded: Option<Vec<u8>>,
    /// Whose rings run. It is this session's turn while it has the disk.
    turns: Arc<Turns>,
}

impl<P: DiskProvider> DiskUse<P> {
    /// A session begins. `read_only`: whether it may not change the disk even if others may. `begun` is set when
    /// the disk is first opened, which is when it is the session's turn.
    pub fn new(
        provider: Arc<P>,
        read_only: bool,
        begun: Arc<AtomicBool>,
        turns: Arc<Turns>,
    ) -> Self {
        Self {
            read_only: read_only || provider.read_only(),
            provider,
            disk: None,
            begun,
            loaded: None,
            turns,
        }
    }

    /// Goes on with what another process has begun: its front-end was told so, and its machine goes on from this state.
    pub fn adopt(&mut self, read_only: bool, loaded: Option<Vec<u8>>) {
        self.read_only = read_only;
        self.loaded = loaded;
    }

    /// The saved state that the machine is to go on from.
    pub fn loaded(&self) -> Option<&[u8]> {
        self.loaded.as_deref()
    }

    /// The disk's name.
    pub fn name(&self) -> &str {
        self.provider.name()
    }

    /// Whether the front-end is told that the disk is read-only.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether the disk may not be changed now. It may have become so since the front-end was told otherwise.
    pub fn may_not_change(&self) -> bool {
        self.read_only || self.provider.read_only()
    }

    /// The size of the disk now.
    pub fn capacity(&self) -> Sector {
        // A disk that grows has its new size once requests may use it.
        let open = self.disk.as_ref().map(|disk| disk.capacity());
        open.unwrap_or_else(|| self.provider.capacity())
    }

    /// The disk, for a ring that starts; opened if none of the others runs. These are all rings of the session, in this memory,
    /// and what their requests under way are tracked in.
    ///
    /// # Errors
    /// Why it cannot be opened; `ResourceBusy` if another session's rings run and do not stop.
    pub fn open(
        &mut self,
        rings: &[Vring],
        memory: &GuestMemory,
        inflight: Option<&InflightBuffer>,
    ) -> io::Result<Arc<P::Disk>> {
        if let Some(disk) = &self.disk {
            return Ok(Arc::clone(disk));
        }
        let start = if self.begun.load(Ordering::Relaxed) {
            MachineStart::Again
        } else if inflight.is_some_and(InflightBuffer::has_history)
            || self.loaded.is_some()
            || was_in_use(rings, memory)
        {
            MachineStart::Continued
        } else {
            MachineStart::Fresh
        };
        let provider = &self.provider;
        if !self.turns.take(start == MachineStart::Fresh) {
            let name = provider.name();
            tracing::error!(
                volume = name,
                "in use by another front-end's rings; no ring starts"
            );
            return Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                format!("volume {name} is in use by another front-end's rings"),
            ));
        }
        // Between the load and now another front-end may have written.
        let loaded = self.loaded.as_deref();
        let same = loaded.map_or(Ok(()), |record| provider.load_state(record));
        let opened = same.and_then(|()| provider.open(start));
        let disk = opened.inspect_err(|error| {
            tracing::error!(volume = provider.name(), %error, "cannot be opened; no ring starts");
            self.turns.give_back(|| provider.machine_left());
        })?;
        self.loaded = None;
        if !self.begun.swap(true, Ordering::Relaxed) {
            self.turns.begin();
        }
        self.disk = Some(Arc::clone(&disk));
        Ok(disk)
    }

    /// Saves what the disk holds; see [`DiskProvider::save_state`].
    ///
    /// # Errors
    /// Why it cannot be saved; `ResourceBusy` if another session's rings run.
    pub fn save(&self) -> io::Result<Vec<u8>> {
        self.alone(|| self.provider.save_state())
    }

    /// Lets the machine go on from a saved state, if that is what the disk holds.
    ///
    /// # Errors
    /// Why it cannot; `ResourceBusy` if another session's rings run.
    pub fn load(&mut self, record: Vec<u8>) -> io::Result<()> {
        // One that fails leaves no earlier one behind.
        self.loaded = None;
        self.alone(|| self.provider.load_state(&record))?;
        self.loaded = Some(record);
        Ok(())
    }

    /// The device is reset: it goes on from no saved state.
    pub fn reset(&mut self) {
        self.loaded = None;
    }

    /// Does something while no rings run.
    fn alone<T>(&self, what: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if !self.turns.take(false) {
            let name = self.provider.name();
            return Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                format!("volume {name} is in use by another front-end's rings"),
            ));
        }
        let done = what();
        self.turns.give_back(|| self.provider.machine_left());
        done
    }

    /// Lets the disk go. No worker has it any more.
    pub fn release(&mut self) {
        if let Some(disk) = self.disk.take() {
            drop(disk);
            self.provider.closed();
            self.turns.give_back(|| self.provider.machine_left());
        }
    }
}

impl<P: DiskProvider> Drop for DiskUse<P> {
    fn drop(&mut self) {
        self.release();
    }
}

/// Whether the machine has used the disk before this session, as far as its rings tell.
fn was_in_use(rings: &[Vring], memory: &GuestMemory) -> bool {
    rings.iter().any(|ring| {
        ring.base() != 0
            || ring
                .locate(memory)
                .is_some_and(|layout| layout.was_written())
    })
}
