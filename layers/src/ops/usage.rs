//! What volumes take on the host, alone and together.
//!
//! Each layer is in the exclusive part of one volume at most, so those parts cost by the layers that there are. What is
//! shared is summed up from the bottom once for each layer, so that a chain below thousands of clones is walked once.

use std::collections::{BTreeSet, HashMap};

use crate::catalog::{CatalogState, VolumeRow};
use crate::error::Result;
use crate::lifecycle::Usage;
use crate::store::Store;
use crate::units::LayerId;

impl Store {
    /// What a volume, or each of them, takes.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn usage(&self, volume: Option<&str>) -> Result<Vec<Usage>> {
        // The host is asked about every file: with nobody waiting.
        let state = self.inner().catalog.share();
        let rows: Vec<&VolumeRow> = match volume {
            Some(name) => vec![state.volume(name)?],
            None => state.volumes.values().collect(),
        };
        let mut sums = Sums {
            store: self,
            state: &state,
            known: HashMap::new(),
        };
        Ok(rows.into_iter().map(|row| sums.usage(row)).collect())
    }
}

/// The bytes of a layer and all below it.
#[derive(Clone, Copy, Debug)]
struct Sum {
    /// Bytes of this layer. None of a base.
    own: u64,
    /// Bytes of this layer and those below.
    all: u64,
    /// The lowest layer.
    root: LayerId,
}

/// The sums of layers that were asked for.
struct Sums<'a> {
    /// Knows the files.
    store: &'a Store,
    /// The layers.
    state: &'a CatalogState,
    /// What was found.
    known: HashMap<LayerId, Sum>,
}

impl Sums<'_> {
    /// What a volume takes.
    fn usage(&mut self, row: &VolumeRow) -> Usage {
        let exclusive: BTreeSet<LayerId> =
            self.state.needed_only_by(&row.name).into_iter().collect();
        let snapshots = self.state.snapshots_of(&row.name).into_iter();
        let tops: BTreeSet<LayerId> = snapshots.map(|row| row.layer).chain([row.active]).collect();
        // Where what others need as well begins, from the top.
        let parents = exclusive
            .iter()
            .filter_map(|id| self.state.layers.get(id)?.parent);
        let shared_tops: BTreeSet<LayerId> = tops
            .iter()
            .copied()
            .chain(parents)
            .filter(|id| !exclusive.contains(id))
            .collect();
        let roots: BTreeSet<LayerId> = tops.iter().map(|id| self.of(*id).root).collect();
        let bases = roots.iter().filter_map(|id| self.state.layers.get(id));
        Usage {
            volume: row.name.clone(),
            exclusive: exclusive.iter().map(|id| self.of(*id).own).sum(),
            shared: self.together(&shared_tops),
            base: bases
                .filter(|row| row.base.is_some())
                .map(|row| self.store.taken_by(row))
                .sum(),
        }
    }

    /// The bytes of these layers and all below them, each counted once.
    fn together(&mut self, tops: &BTreeSet<LayerId>) -> u64 {
        let mut tops_left = tops.iter();
        let (Some(first), Some(second)) = (tops_left.next(), tops_left.next()) else {
            return tops.first().map_or(0, |only| self.of(*only).all);
        };
        let mut seen = BTreeSet::new();
        let mut bytes = 0;
        for top in [first, second].into_iter().chain(tops_left) {
            for row in self.state.walk(Some(*top)) {
                if !seen.insert(row.id) {
                    break;
                }
                bytes += self.of(row.id).own;
            }
        }
        bytes
    }

    /// The sums of a layer.
    fn of(&mut self, layer: LayerId) -> Sum {
        let mut path = Vec::new();
        let mut sum = Sum {
            own: 0,
            all: 0,
            root: layer,
        };
        for row in self.state.walk(Some(layer)) {
            if let Some(known) = self.known.get(&row.id) {
                sum = *known;
                break;
            }
            path.push(row);
            sum.root = row.id;
        }
        for row in path.into_iter().rev() {
            sum.own = match &row.base {
                Some(_) => 0,
                None => self.store.allocated(row.id),
            };
            sum.all += sum.own;
            self.known.insert(row.id, sum);
        }
        sum
    }
}
