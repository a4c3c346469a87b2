//! How layers lie over one another: trees, and jobs whose layers lie in one chain. After a commit that needs a look at the
//! layers that changed their parent only, by this argument.
//!
//! Before, the layers formed trees, so "lies below" was an order. Say that each layer that changed its parent got one from
//! further down its old chain, or has no children. Then every new step from a child to its parent goes down in the old
//! order (and nothing with no children is in a circle), so there is no circle. And a job's target still lies over its
//! source, unless a step on the way jumped over the source: then the source is one of those that were jumped over. Where
//! a layer got another parent than that (which no command does to one with children), everything is looked at.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::{CatalogState, JobId, JobRow, LayerRow};
use crate::units::LayerId;

/// How far down its old chain a new parent is looked for. Commands jump over one layer or two.
const JUMP_MAX: usize = 64;

impl CatalogState {
    /// Following the parents comes to an end from every layer.
    pub(super) fn verify_acyclic(&self) -> Result<(), String> {
        let roots = self.layers.values().filter(|row| row.parent.is_none());
        let mut next: Vec<LayerId> = roots.map(|row| row.id).collect();
        let mut reached = 0;
        while let Some(id) = next.pop() {
            reached += 1;
            next.extend(self.index.children.of(&id));
        }
        if reached == self.layers.len() {
            return Ok(());
        }
        // Each layer has one parent, so those that no root leads to hang on a circle.
        let ids: Vec<LayerId> = self.layers.keys().copied().collect();
        self.verify_grounded(&ids)
    }

    /// Following the parents comes to an end from these layers. Each layer is visited once.
    fn verify_grounded(&self, layers: &[LayerId]) -> Result<(), String> {
        let mut grounded = HashSet::new();
        for id in layers {
            let mut path = HashSet::new();
            let mut next = Some(*id);
            while let Some(layer) = next.filter(|layer| !grounded.contains(layer)) {
                if !path.insert(layer) {
                    return Err(format!("layer {layer} is its own ancestor"));
                }
                next = self.layers.get(&layer).and_then(|row| row.parent);
            }
            grounded.extend(path);
        }
        Ok(())
    }

    /// The source of a job lies below its target.
    pub(super) fn verify_job_path(&self, row: &JobRow) -> Result<(), String> {
        let parent = self.layers.get(&row.target).and_then(|row| row.parent);
        match self.walk(parent).any(|layer| layer.id == row.source) {
            true => Ok(()),
            false => Err(format!(
                "job {}: layer {} does not lie below layer {}",
                row.id.0, row.source, row.target
            )),
        }
    }

    /// The rules of this file after a commit that touched these layers; with what they were before.
    pub(super) fn verify_moves(
        &self,
        touched: &BTreeMap<LayerId, Option<&LayerRow>>,
    ) -> Result<(), String> {
        let mut doubtful = Vec::new();
        let mut jobs: BTreeSet<JobId> = BTreeSet::new();
        let mut all_jobs = false;
        for (id, was) in touched {
            let Some(row) = self.layers.get(id) else {
                continue;
            };
            let has_children = self.child_count(*id) > 0;
            match was {
                None if has_children => doubtful.push(*id),
                None => {}
                Some(was) if was.parent == row.parent => {}
                Some(was) => {
                    jobs.extend(self.index.targets.of(id));
                    if !has_children {
                        continue;
                    }
                    match self.jumped_over(touched, was.parent, row.parent) {
                        Some(layers) => {
                            jobs.extend(layers.iter().flat_map(|id| self.index.sources.of(id)));
                        }
                        None => {
                            doubtful.push(*id);
                            all_jobs = true;
                        }
                    }
                }
            }
        }
        self.verify_grounded(&doubtful)?;
        if all_jobs {
            jobs.extend(self.jobs.keys());
        }
        for job in jobs.iter().filter_map(|id| self.jobs.get(id)) {
            self.verify_job_path(job)?;
        }
        Ok(())
    }

    /// The layers between a layer and its new parent in the chain that it had, if the new parent is in that chain.
    fn jumped_over(
        &self,
        touched: &BTreeMap<LayerId, Option<&LayerRow>>,
        old_parent: Option<LayerId>,
        new_parent: Option<LayerId>,
    ) -> Option<Vec<LayerId>> {
        let mut jumped = Vec::new();
        let mut next = old_parent;
        while next != new_parent {
            let layer = next.filter(|_| jumped.len() < JUMP_MAX)?;
            jumped.push(layer);
            let was = match touched.get(&layer) {
                Some(was) => *was,
                None => self.layers.get(&layer),
            };
            next = was.and_then(|row| row.parent);
        }
        Some(jumped)
    }
}
