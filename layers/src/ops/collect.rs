//! Layers that nobody names: removed when nothing lies over them, joined with the layer above when one does.
//!
//! DURABILITY: one catalog transaction dooms the layers that go, ends the jobs that gave to them, and adds the jobs that join
//! others with their child. Only then are files removed. A crash before it leaves all as it was, and the next start
//! decides the same; after it the next start removes the files that are left.
//!
//! The whole catalog is looked at each time, once: a few hash operations a layer. Nothing can be missed so.

use std::collections::{HashMap, HashSet};

use crate::catalog::{
    CatalogState, Change, JobKind, LayerState, SnapshotRow, VolumeKind, VolumeRow, Way,
};
use crate::error::Result;
use crate::store::Store;
use crate::units::LayerId;

use super::idle::jobs_into;

impl Store {
    /// Removes and joins what no name, volume or job holds. Called at the end of every command that takes a name away,
    /// when a job has ended, and at the start. The caller holds the command lock.
    pub(crate) fn collect_unnamed(&self) -> Result<()> {
        let (gone, joins) = {
            let inner = self.inner();
            let state = inner.catalog.state();
            let gone = unneeded(state, &names(state, |_| true, |_| true));
            let joins = joinable(state, &gone);
            (gone, joins)
        };
        let mut changes = jobs_into(self.inner().catalog.state(), &gone);
        changes.extend(gone.iter().map(|id| Change::RemoveLayer(*id)));
        let mut nth = 0;
        for join in joins {
            match self.cheaper_way(join.lower, join.upper) {
                Ok(way) => {
                    changes.push(self.job_change(
                        nth,
                        JobKind::Merge,
                        join.subject,
                        join.lower,
                        join.upper,
                        way,
                    ));
                    nth += 1;
                }
                // It stays as it is, and the next time is another chance.
                Err(error) => self.maintenance.note(format!(
                    "layer {} is not joined with the one above now: {error}",
                    join.lower
                )),
            }
        }
        if changes.is_empty() {
            return Ok(());
        }
        self.commit_idle(&[], &changes, &gone)
    }

    /// As `collect_unnamed`, at the end of a command that has done what it had to: a failure is for the log.
    pub(crate) fn collect_after(&self) {
        if let Err(error) = self.collect_unnamed() {
            self.maintenance.note(format!(
                "layers that nobody needs stay for now; the next command or start removes them: {error}"
            ));
        }
    }
}

impl Store {
    /// The way in which joining two layers moves less.
    fn cheaper_way(&self, lower: LayerId, upper: LayerId) -> Result<Way> {
        let costs = self.way_costs(lower, upper)?;
        let chosen = costs.iter().find(|cost| cost.chosen);
        Ok(chosen.map_or(Way::Up, |cost| cost.way))
    }
}

/// A layer to be joined with its only child.
#[derive(Debug)]
struct Join {
    /// The layer that goes.
    lower: LayerId,
    /// The child.
    upper: LayerId,
    /// What people know it by.
    subject: String,
}

/// The layers that are needed for their own sake: the active ones of these volumes, those of these snapshots, and those
/// that are being moved into a user's base, which is half changed until then.
pub(crate) fn names(
    state: &CatalogState,
    volumes: impl Fn(&VolumeRow) -> bool,
    snapshots: impl Fn(&SnapshotRow) -> bool,
) -> HashSet<LayerId> {
    let into_base = state
        .jobs
        .values()
        .filter(|job| job.kind == JobKind::IntoBase);
    let actives = state.volumes.values().filter(|row| volumes(row));
    let named = state.snapshots.iter().filter(|row| snapshots(row));
    (actives.map(|row| row.active))
        .chain(named.map(|row| row.layer))
        .chain(into_base.map(|job| job.target))
        .collect()
}

/// The layers that none of these names needs, children before parents.
pub(crate) fn unneeded(state: &CatalogState, names: &HashSet<LayerId>) -> Vec<LayerId> {
    let mut children_gone: HashMap<LayerId, usize> = HashMap::new();
    let mut gone: Vec<LayerId> = state
        .layers
        .keys()
        .filter(|id| !names.contains(id) && state.child_count(**id) == 0)
        .copied()
        .collect();
    let mut looked_at = 0;
    while let Some(id) = gone.get(looked_at) {
        looked_at += 1;
        let parent = state.layers.get(id).and_then(|row| row.parent);
        if let Some(parent) = parent {
            let count = children_gone.entry(parent).or_default();
            *count += 1;
            if *count == state.child_count(parent) && !names.contains(&parent) {
                gone.push(parent);
            }
        }
    }
    gone
}

/// The layers that are only in the way: sealed, without a name, no content of a volume that starts from it again and again,
/// no base of the user's, with one child, both in no job and in no other pair. So pairs next to each other are joined in
/// turns, each of which halves their number, and nothing is moved more often than that.
fn joinable(state: &CatalogState, gone: &[LayerId]) -> Vec<Join> {
    let gone: HashSet<&LayerId> = gone.iter().collect();
    let mut held: HashSet<LayerId> = state.snapshots.iter().map(|row| row.layer).collect();
    held.extend(state.volumes.values().filter_map(|row| content(state, row)));
    let mut busy = HashSet::new();
    for job in state
        .jobs
        .values()
        .filter(|job| !gone.contains(&job.target))
    {
        busy.extend(span(state, job.source, job.target));
    }
    let mut joins = Vec::new();
    for row in state.layers.values() {
        let free = row.state == LayerState::Sealed
            && row.base.is_none()
            && !held.contains(&row.id)
            && !busy.contains(&row.id);
        if !free {
            continue;
        }
        let mut children = state
            .children(row.id)
            .filter(|child| !gone.contains(&child.id));
        let (Some(child), None) = (children.next(), children.next()) else {
            continue;
        };
        if child.state == LayerState::Sealing || busy.contains(&child.id) {
            continue;
        }
        busy.insert(row.id);
        busy.insert(child.id);
        joins.push(Join {
            lower: row.id,
            upper: child.id,
            subject: known_as(state, child.id),
        });
    }
    joins
}

/// The layer that a volume starts from again and again.
pub(crate) fn content(state: &CatalogState, row: &VolumeRow) -> Option<LayerId> {
    match row.kind {
        VolumeKind::Immutable | VolumeKind::Multiattach => {
            state.layers.get(&row.active).and_then(|row| row.parent)
        }
        VolumeKind::Normal | VolumeKind::Writethrough | VolumeKind::Readonly => None,
    }
}

/// The layers from `target` down to `source`, both among them; those that there are.
pub(crate) fn span(state: &CatalogState, source: LayerId, target: LayerId) -> Vec<LayerId> {
    let mut span = Vec::new();
    let mut next = Some(target);
    // Parents come to an end in a verified state.
    while let Some(row) = next.and_then(|id| state.layers.get(&id)) {
        span.push(row.id);
        next = row.parent.filter(|_| row.id != source);
    }
    span
}

/// What people know a layer by: the volume that writes to it, a snapshot that names it, or else its own name.
fn known_as(state: &CatalogState, layer: LayerId) -> String {
    let snapshot = || state.names_of(layer).next();
    match state.active_of(layer) {
        Some(volume) => volume.name.clone(),
        None => snapshot().map_or_else(
            || format!("layer {layer}"),
            |row| format!("{}@{}", row.volume, row.name),
        ),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]
mod tests;
