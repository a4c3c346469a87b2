//! Where rows are, by what they refer to. What is here follows from the rows and is never stored.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};

use super::{JobId, JobKind, JobRow, LayerRow, Rows, SnapshotRow, VolumeRow};
use crate::units::LayerId;

/// Values in groups; a group without values does not exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Groups<K, V> {
    /// The groups.
    groups: BTreeMap<K, BTreeSet<V>>,
}

impl<K, V> Default for Groups<K, V> {
    fn default() -> Self {
        Self {
            groups: BTreeMap::new(),
        }
    }
}

impl<K: Ord, V: Ord> Groups<K, V> {
    /// Puts a value into a group.
    fn add(&mut self, key: K, value: V) {
        self.groups.entry(key).or_default().insert(value);
    }

    /// Takes a value out of a group.
    fn remove<Q: Ord + ?Sized>(&mut self, key: &Q, value: &V)
    where
        K: Borrow<Q>,
    {
        if let Some(group) = self.groups.get_mut(key) {
            group.remove(value);
            if group.is_empty() {
                self.groups.remove(key);
            }
        }
    }

    /// The values of a group, in order.
    pub fn of<'a, Q: Ord + ?Sized>(
        &'a self,
        key: &Q,
    ) -> impl Iterator<Item = &'a V> + use<'a, K, V, Q>
    where
        K: Borrow<Q>,
    {
        self.groups.get(key).into_iter().flatten()
    }

    /// How many values a group has.
    pub fn count<Q: Ord + ?Sized>(&self, key: &Q) -> usize
    where
        K: Borrow<Q>,
    {
        self.groups.get(key).map_or(0, BTreeSet::len)
    }
}

/// How the snapshots of a layer are known: by their place in the order of all.
pub(super) type SnapshotKey = (u64, String, String);

/// The place of a snapshot in the order of all: oldest first, and then so that it is always the same.
pub(super) fn order(row: &SnapshotRow) -> (u64, &str, &str) {
    (row.created_ns, &row.volume, &row.name)
}

/// All there is to find rows by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Index {
    /// Layers by their parent.
    pub children: Groups<LayerId, LayerId>,
    /// Volumes by their active layer. Between the changes of a commit there may be two.
    pub actives: Groups<LayerId, String>,
    /// Volumes by the multiattach volume that they are attachments of.
    pub attached: Groups<String, String>,
    /// Snapshots by their layer.
    pub named: Groups<LayerId, SnapshotKey>,
    /// When a volume's snapshots were taken, by their names.
    pub taken: BTreeMap<String, BTreeMap<String, u64>>,
    /// Jobs by the layer that they take from.
    pub sources: Groups<LayerId, JobId>,
    /// Jobs by the layer that they give to.
    pub targets: Groups<LayerId, JobId>,
    /// Jobs by the layers that no other job that changes layers may have to do with.
    pub claims: Groups<LayerId, JobId>,
    /// Jobs that copy a layer into one of its children, by that layer: there may be several.
    pub pushes: Groups<LayerId, JobId>,
}

impl Index {
    /// The index of these rows.
    pub fn of(rows: &Rows) -> Self {
        let mut index = Self::default();
        for row in rows.layers.values() {
            index.add_layer(row);
        }
        for row in rows.volumes.values() {
            index.add_volume(row);
        }
        for row in &rows.snapshots {
            index.add_snapshot(row);
        }
        for row in rows.jobs.values() {
            index.add_job(row);
        }
        index
    }

    /// A layer is there.
    pub fn add_layer(&mut self, row: &LayerRow) {
        if let Some(parent) = row.parent {
            self.children.add(parent, row.id);
        }
    }

    /// A layer is gone.
    pub fn remove_layer(&mut self, row: &LayerRow) {
        if let Some(parent) = row.parent {
            self.children.remove(&parent, &row.id);
        }
    }

    /// A volume is there.
    pub fn add_volume(&mut self, row: &VolumeRow) {
        self.actives.add(row.active, row.name.clone());
        if let Some(from) = &row.attached_from {
            self.attached.add(from.clone(), row.name.clone());
        }
    }

    /// A volume is gone.
    pub fn remove_volume(&mut self, row: &VolumeRow) {
        self.actives.remove(&row.active, &row.name);
        if let Some(from) = &row.attached_from {
            self.attached.remove(from, &row.name);
        }
    }

    /// A snapshot is there.
    pub fn add_snapshot(&mut self, row: &SnapshotRow) {
        let key = (row.created_ns, row.volume.clone(), row.name.clone());
        self.named.add(row.layer, key);
        self.taken
            .entry(row.volume.clone())
            .or_default()
            .insert(row.name.clone(), row.created_ns);
    }

    /// A snapshot is gone.
    pub fn remove_snapshot(&mut self, row: &SnapshotRow) {
        let key = (row.created_ns, row.volume.clone(), row.name.clone());
        self.named.remove(&row.layer, &key);
        if let Some(names) = self.taken.get_mut(&row.volume) {
            names.remove(&row.name);
            if names.is_empty() {
                self.taken.remove(&row.volume);
            }
        }
    }

    /// A job is there.
    pub fn add_job(&mut self, row: &JobRow) {
        self.sources.add(row.source, row.id);
        self.targets.add(row.target, row.id);
        for layer in claimed(row) {
            self.claims.add(layer, row.id);
        }
        if row.kind == JobKind::PushDown {
            self.pushes.add(row.source, row.id);
        }
    }

    /// A job is gone.
    pub fn remove_job(&mut self, row: &JobRow) {
        self.sources.remove(&row.source, &row.id);
        self.targets.remove(&row.target, &row.id);
        for layer in claimed(row) {
            self.claims.remove(&layer, &row.id);
        }
        if row.kind == JobKind::PushDown {
            self.pushes.remove(&row.source, &row.id);
        }
    }
}

/// The layers that a job needs for itself.
fn claimed(row: &JobRow) -> impl Iterator<Item = LayerId> {
    let (source, target) = match row.kind {
        JobKind::Merge | JobKind::IntoBase => (Some(row.source), Some(row.target)),
        JobKind::PushDown => (None, Some(row.target)),
        JobKind::Flatten | JobKind::Import | JobKind::Scrub => (None, None),
    };
    source.into_iter().chain(target)
}
