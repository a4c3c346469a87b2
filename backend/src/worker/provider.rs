//! Where a session gets its disk from, and when it lets it go.
//!
//! A disk is opened when the first ring of a session starts and let go when the last one has stopped, so that between runs
//! of a machine others may change what the disk holds. What is needed in between (features, configuration space) the
//! provider knows without opening anything.

use std::io;
use std::sync::Arc;

use stratablk_layers::units::Sector;

use super::disk::DiskSource;

/// What is known of the machine when the first of its rings starts. See `vhost::disk_use` for how that is found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineStart {
    /// The first start of this session, and nothing tells that the machine has used the disk before.
    Fresh,
    /// The first start of this session, by a machine that has used the disk before and goes on with it.
    Continued,
    /// Rings ran in this session before: firmware handed over to an operating system, or the guest rebooted.
    Again,
}

/// Gives out one disk, to one session after the other.
pub trait DiskProvider: Send + Sync + 'static {
    /// The disk.
    type Disk: DiskSource;

    /// The disk's name.
    fn name(&self) -> &str;

    /// The disk's size now.
    fn capacity(&self) -> Sector;

    /// Whether the disk may not be changed, whoever asks.
    fn read_only(&self) -> bool;

    /// Opens the disk: rings start. The caller drops what it was given before it opens the disk again.
    ///
    /// # Errors
    /// Why it cannot be opened; no ring starts then.
    fn open(&self, start: MachineStart) -> io::Result<Arc<Self::Disk>>;

    /// The caller has dropped the disk: all rings have stopped.
    fn closed(&self);

    /// Saves what the disk holds, for a machine that is saved, and returns the record that names it. No ring runs.
    ///
    /// # Errors
    /// Why it cannot be saved.
    fn save_state(&self) -> io::Result<Vec<u8>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Looks whether the disk holds exactly what such a record names, for a machine that goes on from there. Changes nothing.
    ///
    /// # Errors
    /// Why it cannot.
    fn load_state(&self, _record: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// A session in which rings ran has ended, and not because we wanted it to: the machine may be off.
    fn machine_left(&self);
}

/// A disk that is always open and serves whoever comes.
#[derive(Debug)]
pub struct AlwaysOpen<D>(pub Arc<D>);

impl<D: DiskSource> DiskProvider for AlwaysOpen<D> {
    type Disk = D;

    fn name(&self) -> &str {
        self.0.name()
    }

    fn capacity(&self) -> Sector {
        self.0.capacity()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn open(&self, _start: MachineStart) -> io::Result<Arc<D>> {
        Ok(Arc::clone(&self.0))
    }

    fn closed(&self) {}

    fn machine_left(&self) {}
}
