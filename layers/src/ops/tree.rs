//! The tree of layers, for people.

use std::collections::{BTreeMap, BTreeSet};

use crate::catalog::{CatalogState, LayerRow};
use crate::error::Result;
use crate::store::{Store, TreeNode};
use crate::units::{LayerId, SECTOR_BYTES};

impl Store {
    /// The tree of layers, parents before children; of one volume (its chain, and what branches off it) or all.
    ///
    /// # Errors
    /// `NotFound` for an unknown volume.
    pub fn tree(&self, volume: Option<&str>) -> Result<Vec<TreeNode>> {
        let inner = self.inner();
        let state = inner.catalog.state();
        let root = match volume {
            None => None,
            Some(name) => {
                let active = state.volume(name)?.active;
                state.chain_of(active).first().map(|layer| layer.id)
            }
        };
        Ok(in_order(state, root)
            .into_iter()
            .map(|row| self.node(state, row))
            .collect())
    }

    /// One layer of the tree.
    fn node(&self, state: &CatalogState, row: &LayerRow) -> TreeNode {
        let snapshots = state.snapshots.iter().filter(|has| has.layer == row.id);
        TreeNode {
            layer: row.id,
            parent: row.parent,
            base: row.base.as_ref().map(|base| base.path.clone()),
            snapshots: snapshots
                .map(|has| (has.volume.clone(), has.name.clone()))
                .collect(),
            active_of: state
                .volumes
                .values()
                .find(|volume| volume.active == row.id)
                .map(|volume| volume.name.clone()),
            job: state
                .jobs
                .values()
                .find(|job| job.source == row.id || job.target == row.id)
                .map(|job| job.id),
            size_bytes: row.size.0 * SECTOR_BYTES,
            allocated_bytes: match &row.base {
                Some(base) => self.media.stat(&base.path).map_or(0, |stat| stat.allocated),
                None => self.allocated(row.id),
            },
            created_ns: row.created_ns,
        }
    }
}

/// Layers from a root (or all roots), depth first, siblings by age.
fn in_order(state: &CatalogState, root: Option<LayerId>) -> Vec<&LayerRow> {
    let mut children: BTreeMap<Option<LayerId>, Vec<&LayerRow>> = BTreeMap::new();
    for row in state.layers.values() {
        children.entry(row.parent).or_default().push(row);
    }
    for siblings in children.values_mut() {
        siblings.sort_by_key(|row| (row.created_ns, row.id));
    }
    let roots = match root {
        Some(id) => state.layers.get(&id).into_iter().collect(),
        None => children.get(&None).cloned().unwrap_or_default(),
    };
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    let mut stack: Vec<&LayerRow> = roots.into_iter().rev().collect();
    while let Some(row) = stack.pop() {
        if seen.insert(row.id) {
            order.push(row);
            stack.extend(children.get(&Some(row.id)).into_iter().flatten().rev());
        }
    }
    order
}
