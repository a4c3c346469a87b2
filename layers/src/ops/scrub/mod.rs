//! Scrubbing: the data of sealed layers is held against checksums that were taken when they were sealed.
//!
//! DURABILITY: nothing in the catalog but the number of the job. Checksums are taken once a layer is sealed, from its file,
//! and get their name when they are complete (`sumfile`); a crash before leaves none, and they are taken after the next start.
//! What is found damaged is remembered (`badfile`) before anybody is told.
//!
//! A scrub is a job like others, but one that ends with its daemon. It and the taking of checksums have their turns when no
//! other job can go on (`turn`).

mod bad;
mod layer;
mod turn;

use std::collections::{BTreeMap, VecDeque};

use crate::catalog::{
    CatalogState, Change, JobId, JobKind, JobRow, JobState, LayerRow, LayerState, Way,
};
use crate::error::Result;
use crate::lifecycle::{BadLayer, JobInfo, Phase, ScrubReport};
use crate::ops::jobs::info::Board;
use crate::store::{Store, now_ns};
use crate::units::{LayerId, SECTOR_BYTES};

pub(crate) use bad::Damage;
pub(crate) use turn::Scrubber;

/// What a scrub of the whole store is known by.
const ALL: &str = "all";
/// A layer in the place of those that a scrub has none of.
const NO_LAYER: LayerId = LayerId(uuid::Uuid::nil());
/// Layers that a report names at most, of each kind.
const NAMED_MAX: usize = 1000;

/// Scrubs that have not ended, and layers that need checksums.
#[derive(Debug, Default)]
pub(crate) struct Scrubs {
    /// By number.
    rows: BTreeMap<JobId, Scrub>,
    /// Layers that were sealed, or are left by a job, since somebody looked.
    pub(crate) sealed: Vec<LayerId>,
    /// Layers whose checksums are to be taken still, as far as is known.
    pub(crate) waiting: usize,
}

/// A scrub that has not ended.
#[derive(Debug)]
pub(crate) struct Scrub {
    /// How it stands, as for other jobs.
    row: JobRow,
    /// Layers that were not looked at yet.
    layers: VecDeque<LayerId>,
    /// What it has found.
    report: ScrubReport,
}

impl Scrubs {
    /// The oldest that is not paused.
    fn next(&self) -> Option<&Scrub> {
        let mut rows = self.rows.values();
        rows.find(|scrub| scrub.row.state == JobState::Queued)
    }

    /// Whether there is such a scrub.
    pub(crate) fn has(&self, id: JobId) -> bool {
        self.rows.contains_key(&id)
    }

    /// What there is to say about each.
    pub(crate) fn infos(&self, board: &Board) -> Vec<JobInfo> {
        let info = |scrub: &Scrub| JobInfo {
            scrub: Some(scrub.report.clone()),
            ..board.describe(&scrub.row)
        };
        self.rows.values().map(info).collect()
    }
}

impl Store {
    /// Holds the sealed layers of a volume, or of all, against their checksums, as a job. Those that have none get some.
    ///
    /// # Errors
    /// `NotFound`; as for a commit of the catalog, which gives the job its number.
    pub fn scrub(&self, volume: Option<&str>, rate: Option<u64>) -> Result<JobInfo> {
        let _command = self.command();
        let mut inner = self.inner();
        let state = inner.catalog.state();
        let in_scope = |row: &&LayerRow| row.state == LayerState::Sealed && row.base.is_none();
        let layers: VecDeque<LayerId> = match volume {
            None => {
                let rows = state.layers.values().filter(in_scope);
                rows.map(|row| row.id).collect()
            }
            Some(name) => {
                let mut tops = vec![state.volume(name)?.active];
                tops.extend(state.snapshots_of(name).iter().map(|row| row.layer));
                let mut found = Vec::new();
                let mut seen = std::collections::BTreeSet::new();
                for top in tops {
                    for row in state.walk(Some(top)) {
                        if !seen.insert(row.id) {
                            break;
                        }
                        found.extend(in_scope(&row).then_some(row.id));
                    }
                }
                found.into()
            }
        };
        let id = JobId(state.next_job);
        let row = JobRow {
            id,
            kind: JobKind::Scrub,
            subject: volume.unwrap_or(ALL).to_owned(),
            source: NO_LAYER,
            target: NO_LAYER,
            way: Way::Copy,
            state: JobState::Queued,
            error: None,
            rate: rate.filter(|rate| *rate > 0),
            created_ns: now_ns(),
        };
        inner.catalog.commit(&[Change::TakeJobNumber])?;
        let report = ScrubReport {
            layers_total: layers.len() as u64,
            ..ScrubReport::default()
        };
        let scrub = Scrub {
            row,
            layers,
            report,
        };
        self.jobs.board().scrubs.rows.insert(id, scrub);
        drop(inner);
        self.jobs.wake();
        self.job(id)
    }

    /// Changes how a scrub stands. `None` if there is none of this number.
    pub(crate) fn set_scrub(
        &self,
        id: JobId,
        change: impl FnOnce(&mut JobRow) -> Result<()>,
    ) -> Option<Result<()>> {
        let mut board = self.jobs.board();
        let scrub = board.scrubs.rows.get_mut(&id)?;
        let changed = change(&mut scrub.row);
        drop(board);
        self.jobs.wake();
        Some(changed)
    }

    /// Ends a scrub before its end. Returns whether there was one.
    pub(crate) fn cancel_scrub(&self, id: JobId) -> bool {
        let mut board = self.jobs.board();
        let there = board.end_scrub(id, Phase::Cancelled, None);
        drop(board);
        if there {
            self.jobs.wake();
        }
        there
    }

    /// These layers were sealed, or changed by a job that has ended: they need checksums.
    pub(crate) fn want_sums(&self, layers: impl IntoIterator<Item = LayerId>) {
        self.jobs.board().scrubs.sealed.extend(layers);
        self.jobs.wake();
    }

    /// The volumes and snapshots that read through a layer.
    fn volumes_through(&self, layer: LayerId) -> Vec<String> {
        let state = self.inner().catalog.share();
        let through = |top: LayerId| state.walk(Some(top)).any(|row| row.id == layer);
        let volumes = (state.volumes.values())
            .filter(|row| through(row.active))
            .map(|row| row.name.clone());
        let snapshots = (state.snapshots.iter())
            .filter(|row| through(row.layer))
            .map(|row| format!("{}@{}", row.volume, row.name));
        volumes.chain(snapshots).take(NAMED_MAX).collect()
    }

    /// Bytes of all layers' data that are known to be damaged now.
    pub fn bad_bytes(&self) -> u64 {
        let known = self.damage.all();
        let sectors = known.iter().map(|(_, bad)| bad.data_sectors());
        sectors.sum::<u64>() * SECTOR_BYTES
    }

    /// What is known to be damaged now, of all layers.
    pub fn bad_layers(&self) -> Vec<BadLayer> {
        let known = self.damage.all();
        let layers = known.into_iter().map(|(layer, bad)| {
            let sectors = bad.data_sectors();
            BadLayer {
                layer,
                volumes: self.volumes_through(layer),
                bytes: sectors * SECTOR_BYTES,
                ranges: bad.data_runs().take(NAMED_MAX).collect(),
            }
        });
        layers.collect()
    }

    /// Bytes of the data of the layers from this one down that are known to be damaged.
    pub(crate) fn bad_bytes_below(&self, state: &CatalogState, top: LayerId) -> u64 {
        if self.damage.is_none() {
            return 0;
        }
        let layers = state.walk(Some(top));
        layers.map(|row| self.damage.bytes(row.id)).sum()
    }

    /// Layers whose checksums are to be taken still, as far as is known.
    pub fn layers_without_sums(&self) -> usize {
        self.jobs.board().scrubs.waiting
    }
}

impl Board {
    /// Ends a scrub. Returns whether there was one.
    fn end_scrub(&mut self, id: JobId, phase: Phase, error: Option<String>) -> bool {
        let Some(scrub) = self.scrubs.rows.remove(&id) else {
            return false;
        };
        self.ended_row(&scrub.row, phase);
        if let Some(info) = self.last_ended() {
            info.error = error;
            info.scrub = Some(scrub.report);
        }
        true
    }
}
