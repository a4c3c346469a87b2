//! What the store knows beyond its layers' files: which layers there are, the volumes over them, the names of
//! snapshots, and how volumes are attached.
//!
//! A catalog is a value ([`CatalogState`]) and a way to make a list of changes to it durable, all or nothing
//! ([`Catalog::commit`]). The rules that a state must keep are in one place, `rules.rs`; they are checked before anything is
//! written and after everything is read. `sqlite` is the real catalog, `memory.rs` the simulated one.
//!
//! A commit costs by its changes and not by the rows that there are: `change.rs` makes the changes in place and can take
//! them back, `rules.rs` looks at the rows that were touched and their neighbours, and `index.rs` finds those.

mod change;
mod index;
pub mod memory;
mod moves;
mod rules;
pub mod sqlite;
mod state;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use uuid::Uuid;

use crate::error::Result;
use crate::format::header::RawBase;
use crate::store::Attachment;
use crate::units::{LayerId, Sector, StoreId};

use index::Index;
pub(crate) use state::Depths;

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

/// What happens to the writes of a volume, by the names that VirtualBox gave these.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum VolumeKind {
    /// They stay until a restore.
    #[default]
    Normal,
    /// They are thrown away at every start of the machine.
    Immutable,
    /// They stay, and snapshots leave the volume out.
    Writethrough,
    /// It takes none: each attachment gets a volume of its own over it.
    Multiattach,
    /// It takes none.
    Readonly,
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
    /// What happens to its writes.
    pub kind: VolumeKind,
    /// Whether the next start of a machine throws away what was written since the last one. Only of an immutable volume.
    pub armed: bool,
    /// The multiattach volume whose attachment this is.
    pub attached_from: Option<String>,
    /// Why it takes no more writes, since one of them or a sync failed. Until somebody recovers it.
    pub failed: Option<String>,
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

/// Names a job; never used twice in a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub u64);

/// What a job is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobKind {
    /// Joins an unnamed layer with its only child.
    Merge,
    /// Copies an unnamed layer into one of its children, which then no longer needs it.
    PushDown,
    /// Makes a volume independent of the layers below its active one.
    Flatten,
    /// As `Flatten`, for a volume that was made for it.
    Import,
    /// Moves what a layer holds into the user's base below it.
    IntoBase,
    /// Holds data against its checksums. Never in a catalog: nothing of it survives its daemon but what it found.
    Scrub,
}

/// Which way the data goes. `source` and `target` are those of the job: `source` is below `target`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the source, and the layers between it and the target, into the target; what was moved is taken out of the source.
    Up,
    /// From the target into the source's file, which becomes the target's at the end. Both are sealed.
    Down,
    /// The target has the source's file already (another name of it); what lies between goes into it.
    InPlace,
    /// As `Up`; the sources stay as they are.
    Copy,
}

/// How a job stands, as far as it is durable. One that has ended is not in the catalog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobState {
    /// Waits for its turn, or has it.
    Queued,
    /// Waits for a `resume`.
    Paused,
    /// Was cancelled, or failed: nothing more happens unless it is resumed. Kept so that nobody begins it anew by itself.
    Stopped,
}

/// A job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobRow {
    /// Its name.
    pub id: JobId,
    /// What it is for.
    pub kind: JobKind,
    /// What people know it by: "web@before-upgrade", or a volume's name.
    pub subject: String,
    /// The lowest layer that it takes from.
    pub source: LayerId,
    /// The layer above that takes it, and is left at the end.
    pub target: LayerId,
    /// Which way the data goes.
    pub way: Way,
    /// How it stands.
    pub state: JobState,
    /// Why it stopped, if that was a failure.
    pub error: Option<String>,
    /// At most so many bytes a second.
    pub rate: Option<u64>,
    /// When it was created: nanoseconds since 1970.
    pub created_ns: u64,
}

/// The rows of a catalog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rows {
    /// The store's name.
    pub store: StoreId,
    /// All layers.
    pub layers: BTreeMap<LayerId, LayerRow>,
    /// All volumes, by name.
    pub volumes: BTreeMap<String, VolumeRow>,
    /// All snapshots, oldest first.
    pub snapshots: Vec<SnapshotRow>,
    /// The jobs that have not ended.
    pub jobs: BTreeMap<JobId, JobRow>,
    /// The number of the next job.
    pub next_job: u64,
    /// Layers that are no longer in the catalog and whose files may not be gone yet. They are removed at the next start.
    pub doomed: BTreeSet<LayerId>,
}

/// All that a catalog holds: rows that keep every rule, to be read as fields of [`Rows`], and ways to find them. Only a
/// commit changes it.
#[derive(Clone)]
pub struct CatalogState {
    /// The rows.
    rows: Rows,
    /// Where rows are, by what they refer to.
    index: Index,
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
    /// A layer lies over another one from now on.
    SetParent {
        /// The layer.
        layer: LayerId,
        /// The layer below; `None`: none.
        parent: Option<LayerId>,
    },
    /// A raw base was changed by the store itself.
    SetBase {
        /// The layer that stands for it.
        layer: LayerId,
        /// What is remembered of the file now.
        base: RawBase,
    },
    /// A layer goes, its files are doomed. Nothing may refer to it at the end of the commit.
    RemoveLayer(LayerId),
    /// The files of a layer that went are gone.
    Removed(LayerId),
    /// A new volume.
    AddVolume(VolumeRow),
    /// A volume's writes go to another layer.
    SetActive {
        /// The volume.
        volume: String,
        /// Its new active layer.
        layer: LayerId,
    },
    /// The disk of a volume, and with it its active layer, has another size.
    SetSize {
        /// The volume.
        volume: String,
        /// Its new size.
        size: Sector,
    },
    /// A volume's writes are treated differently.
    SetKind {
        /// The volume.
        volume: String,
        /// How from now on.
        kind: VolumeKind,
    },
    /// The next start of a machine throws away what an immutable volume holds, or does not.
    SetArmed {
        /// The volume.
        volume: String,
        /// Whether it does.
        armed: bool,
    },
    /// A volume is an attachment of a multiattach volume, or no longer.
    SetAttachedFrom {
        /// The volume.
        volume: String,
        /// The multiattach volume.
        from: Option<String>,
    },
    /// A volume is attached differently, or no longer.
    SetAttachment {
        /// The volume.
        volume: String,
        /// How from now on.
        attachment: Option<Attachment>,
    },
    /// A volume takes no more writes, or takes them again.
    SetFailed {
        /// The volume.
        volume: String,
        /// Why it takes none.
        cause: Option<String>,
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
    /// A new job, with the number that is next.
    AddJob(JobRow),
    /// The number that is next is given to something that is not in the catalog.
    TakeJobNumber,
    /// A job stands differently.
    SetJob {
        /// The job.
        id: JobId,
        /// How it stands.
        state: JobState,
        /// Why it stopped.
        error: Option<String>,
        /// Its limit.
        rate: Option<u64>,
    },
    /// A job works between other layers from now on: one that it worked on was replaced by another.
    MoveJob {
        /// The job.
        id: JobId,
        /// The lowest layer that it takes from.
        source: LayerId,
        /// The layer above that takes it.
        target: LayerId,
    },
    /// A job has ended.
    RemoveJob(JobId),
}

impl Change {
    /// Whether something goes by it whose space is given back then.
    pub fn frees_space(&self) -> bool {
        match self {
            Self::RemoveLayer(_)
            | Self::Removed(_)
            | Self::RemoveVolume(_)
            | Self::RemoveSnapshot { .. } => true,
            Self::SetAttachment { attachment, .. } => attachment.is_none(),
            _ => false,
        }
    }
}

/// A catalog, open. Serialised by its owner.
pub trait Catalog: Send + std::fmt::Debug {
    /// What the last successful commit left.
    fn state(&self) -> &CatalogState;

    /// The same, to keep: for who looks at many rows, with nobody waiting. The next commit copies them all if it is still
    /// kept then.
    fn share(&self) -> Arc<CatalogState>;

    /// Makes the changes, in order, as one: after power loss at any time either all are there or none. Durable on return.
    ///
    /// # Errors
    /// `Invalid` if the changes contradict the state or leave it against its rules; `Catalog` if the database refuses
    /// (a full disk). In both cases nothing has changed. `Busy` if an earlier failure left it unknown what the
    /// medium holds: nothing more is accepted until the catalog is opened again.
    fn commit(&mut self, changes: &[Change]) -> Result<()>;
}
