//! Deleting a snapshot: its name goes at once, its data when it is not needed any more.
//!
//! DURABILITY: one catalog transaction takes the name, and with it dooms the layers that nobody needs without it, or adds
//! the jobs that move its data. A crash before it leaves the snapshot, whole; after it the name is gone, the next start removes
//! what is doomed, and the jobs go on. No disk reads differently at any time. The map of a layer that stays is written anew
//! without the name after that; until then the name is in the map, from which only `check --rebuild-catalog` reads it.

use std::path::Path;
use std::sync::Weak;

use crate::catalog::{
    CatalogState, Change, JobId, JobKind, LayerRow, LayerState, SnapshotRow, Way,
};
use crate::error::{Error, Result};
use crate::file::OpenMode;
use crate::lifecycle::{DeleteOptions, DeleteReport, Fate, WayCost};
use crate::store::Store;
use crate::units::LayerId;

use super::collect::{Without, is_content, jobs_on, unneeded};
use super::idle::{jobs_into, with_parents};
use super::jobs::with_rate;

/// What a deletion does.
#[derive(Debug)]
struct Plan {
    /// The report, without the jobs.
    report: DeleteReport,
    /// Layers that go with the name.
    gone: Vec<LayerId>,
    /// Jobs to be added: kind, source, target, way.
    jobs: Vec<(JobKind, LayerId, LayerId, Way)>,
}

impl Store {
    /// Says what deleting a snapshot would do and cost, and changes nothing.
    ///
    /// # Errors
    /// `NotFound`, `Invalid`, `Busy`.
    pub fn plan_delete_snapshot(
        &self,
        volume: &str,
        snapshot: &str,
        options: DeleteOptions,
    ) -> Result<DeleteReport> {
        let _command = self.command();
        Ok(self.plan(volume, snapshot, options)?.report)
    }

    /// Deletes a snapshot. Its name is gone on return, durably; what is to be copied is copied by jobs.
    ///
    /// # Errors
    /// `NotFound`, `Invalid`, `Busy`.
    pub fn delete_snapshot(
        &self,
        volume: &str,
        snapshot: &str,
        options: DeleteOptions,
    ) -> Result<DeleteReport> {
        let _command = self.command();
        let Plan {
            mut report,
            gone,
            jobs,
        } = self.plan(volume, snapshot, options)?;
        let mut changes = vec![Change::RemoveSnapshot {
            volume: volume.to_owned(),
            name: snapshot.to_owned(),
        }];
        changes.extend(gone.iter().map(|id| Change::RemoveLayer(*id)));
        let (touched, first) = {
            let inner = self.inner();
            let state = inner.catalog.state();
            changes.splice(1..1, jobs_into(state, &gone));
            let layers = gone.iter().copied().chain([report.layer]);
            (with_parents(state, layers), state.next_job)
        };
        for (nth, (kind, source, target, way)) in (0..).zip(jobs) {
            let subject = format!("{volume}@{snapshot}");
            let change = self.job_change(nth, kind, subject, source, target, way);
            changes.push(with_rate(change, options.rate));
            report.jobs.push(JobId(first.saturating_add(nth)));
        }
        self.commit_idle(&[], &changes, &gone)?;
        self.keep_rate(report.layer, options.rate);
        self.forget_name(report.layer, &report.jobs);
        self.collect_after(&touched);
        Ok(report)
    }

    /// What a deletion would do.
    fn plan(&self, volume: &str, snapshot: &str, options: DeleteOptions) -> Result<Plan> {
        let inner = self.inner();
        let state = inner.catalog.state();
        let row = state.snapshot_of(volume, snapshot)?;
        let mut plan = Plan {
            report: DeleteReport {
                volume: volume.to_owned(),
                snapshot: snapshot.to_owned(),
                layer: row.layer,
                fate: Fate::Named,
                jobs: Vec::new(),
            },
            gone: Vec::new(),
            jobs: Vec::new(),
        };
        let mut children: Vec<LayerRow> = state.children(row.layer).cloned().collect();
        children.sort_by_key(|child| (child.created_ns, child.id));
        let base = match options.into_base {
            true => Some(base_to_change(state, row)?),
            false => None,
        };
        let held = held_by_others(state, row);
        let working = !jobs_on(state, row.layer).is_empty();
        let sealed =
            (state.layers.get(&row.layer)).is_some_and(|layer| layer.state == LayerState::Sealed);
        let unneeded = unneeded(state, &[row.layer], Without::Snapshot(row));
        drop(inner);

        if let Some(base) = base {
            self.check_only_base(base)?;
            if working || !sealed {
                return Err(Error::Busy {
                    what: format!(
                        "a job works on {volume}@{snapshot}; wait for it first (stratablk job list)"
                    ),
                });
            }
            let bytes = self.within_base(row_layer(&plan), base)?;
            plan.jobs
                .push((JobKind::IntoBase, base, row_layer(&plan), Way::Down));
            plan.report.fate = Fate::Joined {
                child: row_layer(&plan),
                ways: vec![only_way(Way::Down, bytes)],
            };
            return Ok(plan);
        }
        if held {
            return Ok(plan);
        }
        match children.as_slice() {
            [] => {
                let frees = unneeded.iter().map(|id| self.allocated(*id)).sum();
                plan.report.fate = Fate::Removed { frees };
                plan.gone = unneeded;
            }
            [child] => {
                let ways = self.ways(row_layer(&plan), child, options.way)?;
                let chosen = ways.iter().find(|cost| cost.chosen);
                let way = chosen.map_or(Way::Up, |cost| cost.way);
                // What another job has its hands on, or is not sealed yet, is joined when that is over.
                let busy = working || self.works_on(child.id);
                if sealed && !busy && child.state != LayerState::Sealing {
                    plan.jobs
                        .push((JobKind::Merge, row_layer(&plan), child.id, way));
                } else if options.way.is_some() {
                    return Err(Error::Busy {
                        what: format!(
                            "a job works on {volume}@{snapshot} or the layer above it, so the way cannot be chosen now; \
                             wait for it (stratablk job list), or do not ask for a way"
                        ),
                    });
                }
                plan.report.fate = Fate::Joined {
                    child: child.id,
                    ways,
                };
            }
            several => self.plan_several(&mut plan, several, options, working || !sealed)?,
        }
        Ok(plan)
    }

    /// Refuses to write to a base whose file is another layer's base as well, by whichever name.
    fn check_only_base(&self, layer: LayerId) -> Result<()> {
        let (own, others): (Vec<_>, Vec<_>) = {
            let inner = self.inner();
            let layers = inner.catalog.state().layers.values();
            let base = |row: &LayerRow| Some((row.id, row.base.clone()?.path));
            layers.filter_map(base).partition(|(id, _)| *id == layer)
        };
        for (_, path) in own {
            self.check_unused_elsewhere(layer, &path)?;
            let stat = self.media.stat(&path).map_err(self.io("stat", &path))?;
            for (_, other) in &others {
                if self.is_file(other, stat.identity)? {
                    return Err(Error::Invalid {
                        field: "into_base",
                        what: format!(
                            "{} is the base of other volumes as well, as {}; they would read differently; delete or \
                             flatten them first",
                            path.display(),
                            other.display()
                        ),
                    });
                }
            }
        }
        Ok(())
    }

    /// Refuses to write to a base that another daemon uses.
    fn check_unused_elsewhere(&self, layer: LayerId, path: &Path) -> Result<()> {
        let known = self.inner().layers.get(&layer).and_then(Weak::upgrade);
        match known {
            // Its own lock must not be in its way.
            Some(known) => {
                self.lock_base(known.data(), path, true)?;
                self.lock_base(known.data(), path, false)
            }
            None => {
                let file = self.media.open(path, OpenMode::ReadOnly, false);
                self.lock_base(&file.map_err(self.io("open base", path))?, path, true)
            }
        }
    }

    /// A layer with several children: it stays, or is copied into all but the last of them, with which it is then joined.
    fn plan_several(
        &self,
        plan: &mut Plan,
        children: &[LayerRow],
        options: DeleteOptions,
        busy: bool,
    ) -> Result<()> {
        let count = children.len();
        if !options.push_down {
            if options.way.is_some() {
                return Err(Error::Invalid {
                    field: "way",
                    what: format!(
                        "the snapshot has {count} children, so it stays without a name until one is left; do not ask for a \
                         way, or copy it into each (--push-down)"
                    ),
                });
            }
            plan.report.fate = Fate::Kept { children: count };
            return Ok(());
        }
        if options.way.is_some_and(|way| way != Way::Copy) {
            return Err(Error::Invalid {
                field: "way",
                what: format!(
                    "the snapshot has {count} children and is copied into them; do not ask for a way"
                ),
            });
        }
        let layer = row_layer(plan);
        if busy || children.iter().any(|child| self.works_on(child.id)) {
            return Err(Error::Busy {
                what: format!(
                    "a job works on {}@{} or a layer above it; wait for it first (stratablk job list)",
                    plan.report.volume, plan.report.snapshot
                ),
            });
        }
        let into = children.get(..count.saturating_sub(1)).unwrap_or_default();
        let mut bytes: u64 = 0;
        for child in into {
            let costs = self.way_costs(layer, child.id)?;
            let up = costs.iter().find(|cost| cost.way == Way::Up);
            bytes = bytes.saturating_add(up.map_or(0, |cost| cost.bytes));
            plan.jobs
                .push((JobKind::PushDown, layer, child.id, Way::Copy));
        }
        if let Some(first) = children.first() {
            let mut cost = only_way(Way::Copy, bytes);
            // Nothing is taken out of the source: the copies stay.
            cost.space = bytes;
            plan.report.fate = Fate::Joined {
                child: first.id,
                ways: vec![cost],
            };
        }
        Ok(())
    }

    /// The ways to join a layer with its child, one of them chosen: the one that was asked for, or the cheaper.
    fn ways(&self, layer: LayerId, child: &LayerRow, asked: Option<Way>) -> Result<Vec<WayCost>> {
        let mut ways = self.way_costs(layer, child.id)?;
        let active = child.state == LayerState::Active;
        let wanted = match asked {
            None => return Ok(ways),
            Some(Way::Down) if active => Way::InPlace,
            Some(way) => way,
        };
        let invalid = |what: &str| Error::Invalid {
            field: "way",
            what: what.to_owned(),
        };
        match wanted {
            Way::InPlace if !active => {
                return Err(invalid(
                    "the layer above is sealed; take \"up\" or \"down\"",
                ));
            }
            Way::Copy => {
                return Err(invalid(
                    "the snapshot has one child and is joined with it; take \"up\" or \"down\"",
                ));
            }
            Way::Up | Way::Down | Way::InPlace => {}
        }
        if !ways.iter().any(|cost| cost.way == wanted) {
            return Err(invalid(
                "the layers cannot be joined in that way, since the disk had another size below, or a base lies there; take \
                 \"up\"",
            ));
        }
        for cost in &mut ways {
            cost.chosen = cost.way == wanted;
        }
        Ok(ways)
    }

    /// Whether a job works on a layer.
    fn works_on(&self, layer: LayerId) -> bool {
        let inner = self.inner();
        let state = inner.catalog.state();
        !jobs_on(state, layer).is_empty()
    }
}

/// The layer whose name goes.
fn row_layer(plan: &Plan) -> LayerId {
    plan.report.layer
}

/// The cost of the only way that there is.
fn only_way(way: Way, bytes: u64) -> WayCost {
    WayCost {
        way,
        bytes,
        space: bytes.min(STEP_BYTES),
        estimate: std::time::Duration::ZERO,
        chosen: true,
    }
}

/// A job moves so much at once, at most.
const STEP_BYTES: u64 = 64 << 20;

/// Whether something other than this name holds the layer: another name, a volume that starts from it again and again, or
/// a job that copies from it.
fn held_by_others(state: &CatalogState, row: &SnapshotRow) -> bool {
    let mut snapshots = state.names_of(row.layer);
    let named = snapshots.any(|has| has.volume != row.volume || has.name != row.name);
    let jobs = jobs_on(state, row.layer);
    let needed = jobs.iter().any(|job| job.kind != JobKind::Merge);
    named || needed || is_content(state, row.layer)
}

/// The user's base that a snapshot's data may be moved into.
fn base_to_change(state: &CatalogState, row: &SnapshotRow) -> Result<LayerId> {
    let invalid = |what: String| Error::Invalid {
        field: "into_base",
        what,
    };
    let name = format!("{}@{}", row.volume, row.name);
    let parent = (state.layers.get(&row.layer))
        .and_then(|layer| layer.parent)
        .and_then(|parent| state.layers.get(&parent));
    let Some((parent, base)) = parent.and_then(|row| Some((row, row.base.as_ref()?))) else {
        return Err(invalid(format!(
            "{name} does not lie directly over a base; delete the snapshots below it first"
        )));
    };
    let path = base.path.display();
    if state.children(parent.id).count() > 1 {
        return Err(invalid(format!(
            "{path} is used by other volumes as well, which would read differently; delete or flatten them first"
        )));
    }
    let mut layers = state.layers.values();
    if layers.any(|layer| {
        layer.id != parent.id && (layer.base.as_ref()).is_some_and(|has| has.path == base.path)
    }) {
        return Err(invalid(format!(
            "{path} was taken as a base before, by volumes that still need it as it was; delete those first"
        )));
    }
    if is_content(state, parent.id) {
        return Err(invalid(format!(
            "{path} is what a volume starts from again and again"
        )));
    }
    if state
        .snapshots
        .iter()
        .any(|has| has.layer == row.layer && (has.volume != row.volume || has.name != row.name))
    {
        return Err(invalid(format!(
            "{name} has another name as well; delete that first"
        )));
    }
    Ok(parent.id)
}
