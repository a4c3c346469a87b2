//! What the store knows beyond its layers' files: which layers there are, the volumes over them, the names of
//! snapshots, and how volumes are attached.
//!
//! A catalog is a value ([`CatalogState`]) and a way to make a list of changes to it durable, all or nothing
//! ([`Catalog::commit`]). The rules that a state must keep are checked in one place, `state.rs`, before anything is
//! written and after everything is read. `sqlite.rs` is the real catalog, `memory.rs` the simulated one.

pub mod memory;
pub mod sqlite;
mod state;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::error::Result;
use crate::format::header::RawBase;
use crate::store::Attachment;
use crate::units::{LayerId, Sector, StoreId};

/// The life of a layer: only ever from left to right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LayerState {
    /// The top of a volume; takes all its writes.
    Active,
    /// No new writes, and its map is not sealed yet.
    Sealing,
    /// Never changes again.
    Sealed,
}

/// A layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerRow {
    /// Its name.
    pub id: LayerId,
    /// The layer below.
    pub parent: Option<LayerId>,
    /// The size of the disk.
    pub size: Sector,
    /// How far its life has got.
    pub state: LayerState,
    /// The raw image that it stands for.
    pub base: Option<RawBase>,
    /// When it was created: nanoseconds since 1970.
    pub created_ns: u64,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeRow {
    /// Its name.
    pub name: String,
    /// The layer that takes its writes.
    pub active: LayerId,
    /// The size of the disk.
    pub size: Sector,
    /// When it was created: nanoseconds since 1970.
    pub created_ns: u64,
    /// How it is attached to a front-end.
    pub attachment: Option<Attachment>,
}

/// A snapshot: a name for a layer that takes no more writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotRow {
    /// The volume that it was taken of.
    pub volume: String,
    /// Its name; unique for the volume.
    pub name: String,
    /// The layer.
    pub layer: LayerId,
    /// Equal for all snapshots of one instant.
    pub group: Uuid,
    /// The instant: nanoseconds since 1970.
    pub created_ns: u64,
    /// The size of the disk.
    pub size: Sector,
}

/// All that a catalog holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CatalogState {
    /// The store's name.
    pub store: StoreId,
    /// All layers.
    pub layers: BTreeMap<LayerId, LayerRow>,
    /// All volumes, by name.
    pub volumes: BTreeMap<String, VolumeRow>,
    /// All snapshots, oldest first.
    pub snapshots: Vec<SnapshotRow>,
}

/// One change. What it adds must not exist, what it changes or removes must.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A new layer.
    AddLayer(LayerRow),
    /// A layer gets further in its life.
    SetLayerState {
        /// The layer.
        layer: LayerId,
        /// Its new state.
        state: LayerState,
    },
    /// A layer goes. Nothing may refer to it at the end of the commit.
    RemoveLayer(LayerId),
    /// A new volume.
    AddVolume(VolumeRow),
    /// A volume's writes go to another layer.
    SetActive {
        /// The volume.
        volume: String,
        /// Its new active layer.
        layer: LayerId,
    },
    /// A volume is attached differently, or no longer.
    SetAttachment {
        /// The volume.
        volume: String,
        /// How from now on.
        attachment: Option<Attachment>,
    },
    /// A volume goes. Its snapshots must be gone at the end of the commit.
    RemoveVolume(String),
    /// A new snapshot.
    AddSnapshot(SnapshotRow),
    /// A snapshot's name goes.
    RemoveSnapshot {
        /// The volume.
        volume: String,
        /// The snapshot.
        name: String,
    },
}

/// A catalog, open. Serialised by its owner.
pub trait Catalog: Send + std::fmt::Debug {
    /// What the last successful commit left.
    fn state(&self) -> &CatalogState;

    /// Makes the changes, in order, as one: after power loss at any time either all are there or none. Durable on return.
    ///
    /// # Errors
    /// `Invalid` if the changes contradict the state or leave it against its rules; `Catalog` if the database refuses
    /// (a full disk). In both cases nothing has changed. `Busy` if an earlier failure left it unknown what the
    /// medium holds: nothing more is accepted until the catalog is opened again.
    fn commit(&mut self, changes: &[Change]) -> Result<()>;
}
