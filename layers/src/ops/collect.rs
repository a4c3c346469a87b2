//! Layers that nobody names: removed when nothing lies over them, joined with the layer above when one does.
//!
//! DURABILITY: one catalog transaction dooms the layers that go, ends the jobs that gave to them, and adds the jobs that join
//! others with their child. Only then are files removed. A crash before it leaves all as it was, and the next start
//! decides the same; after it the next start removes the files that are left.
//!
//! Only layers that a command has to do with are looked at, with those below them, so that a store of many layers costs no
//! more than a small one; at the start it is all of them, once.

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::catalog::{
    CatalogState, Change, JobKind, JobRow, LayerRow, LayerState, SnapshotRow, VolumeKind,
    VolumeRow, Way,
};
use crate::error::Result;
use crate::store::Store;
use crate::units::LayerId;

use super::idle::jobs_into;
use super::jobs::with_rate;

impl Store {
    /// Removes and joins what no name, volume or job holds, wherever it is. Called at the start; whoever knows what was touched
    /// calls `collect_touched`. The caller holds the command lock.
    pub(crate) fn collect_unnamed(&self) -> Result<()> {
        let all: Vec<LayerId> = {
            let inner = self.inner();
            inner.catalog.state().layers.keys().copied().collect()
        };
        self.collect_touched(&all)
    }

    /// As `collect_unnamed`, where only these layers have lost a name, a child or a job since the last time. Those that are no
    /// longer there do no harm.
    pub(crate) fn collect_touched(&self, touched: &[LayerId]) -> Result<()> {
        let (gone, joins, mut changes) = {
            let inner = self.inner();
            let state = inner.catalog.state();
            let gone = unneeded(state, touched, Without::Nothing);
            let joins = joinable(state, touched, &gone);
            let changes = jobs_into(state, &gone);
            (gone, joins, changes)
        };
        changes.extend(gone.iter().map(|id| Change::RemoveLayer(*id)));
        let mut nth = 0;
        for join in joins {
            match self.cheaper_way(join.lower, join.upper) {
                Ok(way) => {
                    let (kind, subject) = (JobKind::Merge, join.subject);
                    let rate = self.jobs.board().rates.get(&join.lower).copied();
                    let change = self.job_change(nth, kind, subject, join.lower, join.upper, way);
                    changes.push(with_rate(change, rate));
                    nth += 1;
                }
                // It stays as it is, and the next start is another chance.
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

    /// As `collect_touched`, at the end of a command that has done what it had to: a failure is for the log.
    pub(crate) fn collect_after(&self, touched: &[LayerId]) {
        self.note_collected(self.collect_touched(touched));
    }

    /// As `collect_unnamed`; a failure is for the log.
    pub(crate) fn collect_everywhere(&self) {
        self.note_collected(self.collect_unnamed());
    }

    /// Notes a failure.
    fn note_collected(&self, result: Result<()>) {
        if let Err(error) = result {
            self.maintenance.note(format!(
                "layers that nobody needs stay until the next start, which removes them: {error}"
            ));
        }
    }

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

/// Names that are about to go.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Without<'a> {
    /// None.
    Nothing,
    /// A volume with its snapshots.
    Volume(&'a str),
    /// A snapshot.
    Snapshot(&'a SnapshotRow),
}

impl Without<'_> {
    /// Whether this volume stays.
    fn keeps_volume(self, row: &VolumeRow) -> bool {
        !matches!(self, Self::Volume(name) if row.name == *name)
    }

    /// Whether this snapshot stays.
    fn keeps_snapshot(self, row: &SnapshotRow) -> bool {
        match self {
            Self::Nothing => true,
            Self::Volume(name) => row.volume != *name,
            Self::Snapshot(gone) => row.volume != gone.volume || row.name != gone.name,
        }
    }
}

/// Whether a layer is needed for its own sake: a volume writes to it, a snapshot names it, or it is being moved into a user's
/// base, which is half changed until then.
fn is_named(state: &CatalogState, layer: LayerId, without: Without<'_>) -> bool {
    let active = state.active_of(layer);
    active.is_some_and(|row| without.keeps_volume(row))
        || state.names_of(layer).any(|row| without.keeps_snapshot(row))
        || state
            .jobs_of(layer)
            .any(|job| job.kind == JobKind::IntoBase && job.target == layer)
}

/// Those of these layers that nobody needs, and those below that only they needed: children before parents.
pub(crate) fn unneeded(
    state: &CatalogState,
    touched: &[LayerId],
    without: Without<'_>,
) -> Vec<LayerId> {
    let is_named = |id| is_named(state, id, without);
    let mut children_gone: HashMap<LayerId, usize> = HashMap::new();
    let once: BTreeSet<&LayerId> = touched.iter().collect();
    let mut gone: Vec<LayerId> = (once.into_iter().copied())
        .filter(|id| state.layers.contains_key(id))
        .filter(|id| state.child_count(*id) == 0 && !is_named(*id))
        .collect();
    let mut looked_at = 0;
    while let Some(id) = gone.get(looked_at) {
        looked_at += 1;
        let Some(parent) = state.layers.get(id).and_then(|row| row.parent) else {
            continue;
        };
        let count = children_gone.entry(parent).or_default();
        *count += 1;
        if *count == state.child_count(parent) && !is_named(parent) {
            gone.push(parent);
        }
    }
    gone
}

/// Of these layers, those below them and those that have lost a child: the ones that are only in the way. They are sealed,
/// without a name, no content of a volume that starts from it again and again, no base of the user's, with one child; and
/// both are in no job and in no other pair. So pairs next to each other are joined in turns, each of which halves their
/// number, and nothing is moved more often than that.
fn joinable(state: &CatalogState, touched: &[LayerId], gone: &[LayerId]) -> Vec<Join> {
    let going: HashSet<LayerId> = gone.iter().copied().collect();
    let long = Long::of(state, &going);
    let mut candidates: Vec<LayerId> = touched.to_vec();
    // What a job held that ends with its target.
    for job in gone.iter().flat_map(|id| state.jobs_of(*id)) {
        candidates.extend(span(state, job.source, job.target));
    }
    let parent = |id: &LayerId| state.layers.get(id).and_then(|row| row.parent);
    let below: Vec<LayerId> = candidates.iter().chain(gone).filter_map(parent).collect();
    candidates.extend(below);
    let mut paired = HashSet::new();
    let mut joins = Vec::new();
    let is_busy = |id: LayerId| {
        let mut jobs = state.jobs_of(id);
        long.holds(id) || jobs.any(|job| !going.contains(&job.target))
    };
    for id in candidates {
        let Some(row) = state.layers.get(&id).filter(|_| !going.contains(&id)) else {
            continue;
        };
        let sealed = row.state == LayerState::Sealed && row.base.is_none();
        if !sealed || paired.contains(&id) || state.names_of(id).next().is_some() || is_busy(id) {
            continue;
        }
        let Some(child) = only_child(state, id, &going) else {
            continue;
        };
        let starts = state
            .active_of(child.id)
            .and_then(|row| content(state, row));
        if starts == Some(id)
            || child.state == LayerState::Sealing
            || paired.contains(&child.id)
            || is_busy(child.id)
        {
            continue;
        }
        paired.insert(id);
        paired.insert(child.id);
        joins.push(Join {
            lower: id,
            upper: child.id,
            subject: known_as(state, child.id),
        });
    }
    joins
}

/// The one child that a layer has without those that go.
fn only_child<'a>(
    state: &'a CatalogState,
    layer: LayerId,
    going: &HashSet<LayerId>,
) -> Option<&'a LayerRow> {
    let mut children = state
        .children(layer)
        .filter(|child| !going.contains(&child.id));
    let first = children.next()?;
    children.next().is_none().then_some(first)
}

/// The layers that jobs hold which reach over more than a layer and its parent. There are few such jobs.
struct Long(HashSet<LayerId>);

impl Long {
    /// Those of all jobs whose target stays.
    fn of(state: &CatalogState, going: &HashSet<LayerId>) -> Self {
        let jobs = state.jobs.values();
        let jobs = jobs.filter(|job| is_long(state, job) && !going.contains(&job.target));
        Self(
            jobs.flat_map(|job| span(state, job.source, job.target))
                .collect(),
        )
    }

    /// Whether such a job works on a layer.
    fn holds(&self, layer: LayerId) -> bool {
        self.0.contains(&layer)
    }
}

/// Whether there are layers between those that a job takes from and gives to.
fn is_long(state: &CatalogState, job: &JobRow) -> bool {
    let target = state.layers.get(&job.target);
    target.and_then(|row| row.parent) != Some(job.source)
}

/// The jobs that work on a layer.
pub(crate) fn jobs_on(state: &CatalogState, layer: LayerId) -> Vec<&JobRow> {
    let between = state.jobs.values().filter(move |job| {
        is_long(state, job)
            && job.source != layer
            && job.target != layer
            && span(state, job.source, job.target).contains(&layer)
    });
    state.jobs_of(layer).chain(between).collect()
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

/// Whether a volume starts from a layer again and again.
pub(crate) fn is_content(state: &CatalogState, layer: LayerId) -> bool {
    let mut volumes = state
        .children(layer)
        .filter_map(|child| state.active_of(child.id));
    volumes.any(|row| content(state, row) == Some(layer))
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
