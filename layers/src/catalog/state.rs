//! Ways to find the rows of a catalog.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::ops::Deref;

use super::index::{Index, order};
use super::{CatalogState, JobKind, JobRow, LayerRow, Rows, SnapshotRow, VolumeRow};
use crate::units::{LayerId, StoreId};

impl Rows {
    /// The rows of a store without layers.
    pub fn empty(store: StoreId) -> Self {
        Self {
            store,
            layers: BTreeMap::new(),
            volumes: BTreeMap::new(),
            snapshots: Vec::new(),
            jobs: BTreeMap::new(),
            next_job: 1,
            doomed: BTreeSet::new(),
        }
    }
}

/// The rows can be read, and only read: the index follows them.
impl Deref for CatalogState {
    type Target = Rows;

    fn deref(&self) -> &Rows {
        &self.rows
    }
}

/// The index follows from the rows.
impl PartialEq for CatalogState {
    fn eq(&self, other: &Self) -> bool {
        self.rows == other.rows
    }
}

impl Eq for CatalogState {}

impl fmt::Debug for CatalogState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.rows.fmt(f)
    }
}

impl CatalogState {
    /// The catalog of a store without layers.
    pub fn empty(store: StoreId) -> Self {
        Self {
            rows: Rows::empty(store),
            index: Index::default(),
        }
    }

    /// The catalog with these rows.
    ///
    /// # Errors
    /// The first rule that they break, in words.
    pub fn new(rows: Rows) -> Result<Self, String> {
        let index = Index::of(&rows);
        let state = Self { rows, index };
        state.verify()?;
        Ok(state)
    }

    /// The snapshot of this name.
    pub fn snapshot(&self, volume: &str, name: &str) -> Option<&SnapshotRow> {
        let created_ns = self.index.taken.get(volume)?.get(name)?;
        self.snapshot_at((*created_ns, volume, name))
    }

    /// The snapshot in this place of the order.
    pub(super) fn snapshot_at(&self, key: (u64, &str, &str)) -> Option<&SnapshotRow> {
        let at = self
            .snapshots
            .binary_search_by(|row| order(row).cmp(&key))
            .ok()?;
        self.snapshots.get(at)
    }

    /// The snapshots of a volume, oldest first.
    pub fn snapshots_of(&self, volume: &str) -> Vec<&SnapshotRow> {
        let taken = self.index.taken.get(volume);
        let mut keys: Vec<(u64, &str, &str)> = taken
            .into_iter()
            .flatten()
            .map(|(name, created_ns)| (*created_ns, volume, name.as_str()))
            .collect();
        keys.sort_unstable();
        keys.into_iter()
            .filter_map(|key| self.snapshot_at(key))
            .collect()
    }

    /// How many snapshots a volume has.
    pub fn snapshot_count(&self, volume: &str) -> usize {
        self.index.taken.get(volume).map_or(0, BTreeMap::len)
    }

    /// The snapshots that name a layer, oldest first.
    pub fn names_of(&self, layer: LayerId) -> impl Iterator<Item = &SnapshotRow> {
        let keys = self.index.named.of(&layer);
        keys.filter_map(|(at, volume, name)| self.snapshot_at((*at, volume, name)))
    }

    /// The layers whose parent is this one.
    pub fn children(&self, layer: LayerId) -> impl Iterator<Item = &LayerRow> {
        let ids = self.index.children.of(&layer);
        ids.filter_map(|id| self.layers.get(id))
    }

    /// How many layers have this one as their parent.
    pub fn child_count(&self, layer: LayerId) -> usize {
        self.index.children.count(&layer)
    }

    /// The volume whose active layer this is.
    pub fn active_of(&self, layer: LayerId) -> Option<&VolumeRow> {
        let name = self.index.actives.of(&layer).next()?;
        self.volumes.get(name)
    }

    /// The volumes that are attachments of a multiattach volume, by name.
    pub fn attachments_of(&self, volume: &str) -> impl Iterator<Item = &VolumeRow> {
        let names = self.index.attached.of(volume);
        names.filter_map(|name| self.volumes.get(name))
    }

    /// The jobs that take from a layer or give to it, by number.
    pub fn jobs_of(&self, layer: LayerId) -> impl Iterator<Item = &JobRow> {
        let mut sources = self.index.sources.of(&layer).peekable();
        let mut targets = self.index.targets.of(&layer).peekable();
        // No job has one layer as both.
        let ids = std::iter::from_fn(move || match (sources.peek(), targets.peek()) {
            (Some(source), Some(target)) if source < target => sources.next(),
            (Some(_), None) => sources.next(),
            _ => targets.next(),
        });
        ids.filter_map(|id| self.jobs.get(id))
    }

    /// Whether a layer's map may say that this is its parent: it is, or a job that gives to the layer will end with it.
    pub fn may_have_parent(&self, layer: LayerId, parent: Option<LayerId>) -> bool {
        let now = self.layers.get(&layer).map(|row| row.parent);
        let jobs = self.index.targets.of(&layer);
        let mut jobs = jobs.filter_map(|id| self.jobs.get(id));
        now == Some(parent) || jobs.any(|job| self.parent_after(job) == parent)
    }

    /// The parent that the target of a job has at the end.
    pub(crate) fn parent_after(&self, job: &JobRow) -> Option<LayerId> {
        match job.kind {
            JobKind::Flatten | JobKind::Import => None,
            JobKind::IntoBase | JobKind::Scrub => {
                self.layers.get(&job.target).and_then(|row| row.parent)
            }
            JobKind::Merge | JobKind::PushDown => {
                self.layers.get(&job.source).and_then(|row| row.parent)
            }
        }
    }

    /// A layer and all those below it, from the top down. Ends early at a parent that does not exist or comes up again,
    /// neither of which a verified state has.
    pub fn chain(&self, top: LayerId) -> Vec<&LayerRow> {
        self.walk(Some(top)).collect()
    }

    /// The layers from this one down.
    pub(crate) fn walk(&self, top: Option<LayerId>) -> impl Iterator<Item = &LayerRow> {
        let mut next = top.and_then(|id| self.layers.get(&id));
        let step = move || {
            let row = next?;
            next = row.parent.and_then(|id| self.layers.get(&id));
            Some(row)
        };
        // No more than there are: a circle, which only rows that were not verified yet have, comes to an end too.
        std::iter::from_fn(step).take(self.layers.len())
    }

    /// How many layers there are from this one down, it counted, and the lowest of them.
    pub fn depth(&self, layer: LayerId) -> (usize, LayerId) {
        let count_down = |(count, _), row: &LayerRow| (count + 1, row.id);
        self.walk(Some(layer)).fold((0, layer), count_down)
    }

    /// The layers that would serve nobody if a volume and its snapshots were gone: children before their parents.
    pub fn needed_only_by(&self, volume: &str) -> Vec<LayerId> {
        let active = self.volumes.get(volume).map(|row| row.active);
        let named = self.snapshots_of(volume).into_iter().map(|row| row.layer);
        let mut next: Vec<LayerId> = active.into_iter().chain(named).collect();
        let mut freed_children: HashMap<LayerId, usize> = HashMap::new();
        let mut freed = Vec::new();
        let mut seen = BTreeSet::new();
        while let Some(layer) = next.pop() {
            let children = freed_children.get(&layer).copied().unwrap_or(0);
            let others = self
                .active_of(layer)
                .is_some_and(|other| other.name != volume)
                || self.names_of(layer).any(|row| row.volume != volume);
            if others || children < self.child_count(layer) || !seen.insert(layer) {
                continue;
            }
            freed.push(layer);
            if let Some(parent) = self.layers.get(&layer).and_then(|row| row.parent) {
                *freed_children.entry(parent).or_default() += 1;
                next.push(parent);
            }
        }
        freed
    }
}

/// How deep layers lie, and what is at the bottom, found once for each: for who asks for many.
#[derive(Debug, Default)]
pub struct Depths {
    /// How many layers there are from this one down, and the last of them.
    known: HashMap<LayerId, (usize, LayerId)>,
}

impl Depths {
    /// As `CatalogState::depth`.
    pub fn of(&mut self, state: &CatalogState, layer: LayerId) -> (usize, LayerId) {
        let mut path = Vec::new();
        let mut below = (0, layer);
        for row in state.walk(Some(layer)) {
            if let Some(known) = self.known.get(&row.id) {
                below = *known;
                break;
            }
            path.push(row.id);
            below = (0, row.id);
        }
        for id in path.into_iter().rev() {
            below.0 += 1;
            self.known.insert(id, below);
        }
        below
    }
}
