//! The tree of layers, for people.

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
        // The host is asked about every file: with nobody waiting.
        let state = self.inner().catalog.share();
        let roots = match volume {
            None => state
                .layers
                .values()
                .filter(|row| row.parent.is_none())
                .collect(),
            Some(name) => {
                let active = state.volume(name)?.active;
                state.chain(active).pop().into_iter().collect()
            }
        };
        let rows = in_order(&state, roots);
        Ok(rows.into_iter().map(|row| self.node(&state, row)).collect())
    }

    /// One layer of the tree.
    fn node(&self, state: &CatalogState, row: &LayerRow) -> TreeNode {
        TreeNode {
            layer: row.id,
            parent: row.parent,
            base: row.base.as_ref().map(|base| base.path.clone()),
            snapshots: state
                .names_of(row.id)
                .map(|has| (has.volume.clone(), has.name.clone()))
                .collect(),
            active_of: state.active_of(row.id).map(|volume| volume.name.clone()),
            job: state.jobs_of(row.id).next().map(|job| job.id),
            size_bytes: row.size.0.saturating_mul(SECTOR_BYTES),
            allocated_bytes: self.taken_by(row),
            created_ns: row.created_ns,
            bad_bytes: self.damage.bytes(row.id),
        }
    }

    /// Bytes that a layer, or the base that it stands for, takes on the host; 0 where that cannot be told.
    pub(super) fn taken_by(&self, row: &LayerRow) -> u64 {
        match &row.base {
            Some(base) => self.media.stat(&base.path).map_or(0, |stat| stat.allocated),
            None => self.allocated(row.id),
        }
    }
}

/// The layers over these roots, depth first, siblings by age.
fn in_order<'a>(state: &'a CatalogState, mut roots: Vec<&'a LayerRow>) -> Vec<&'a LayerRow> {
    let age = |row: &&LayerRow| -> (u64, LayerId) { (row.created_ns, row.id) };
    roots.sort_by_key(age);
    let mut order = Vec::new();
    roots.reverse();
    let mut stack = roots;
    // Each layer has one parent, so it comes up once.
    while let Some(row) = stack.pop() {
        order.push(row);
        let mut children: Vec<&LayerRow> = state.children(row.id).collect();
        children.sort_by_key(age);
        stack.extend(children.into_iter().rev());
    }
    order
}
