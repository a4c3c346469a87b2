//! Deleting a volume with its snapshots.
//!
//! DURABILITY: one catalog transaction forgets the volume and its snapshots, dooms every layer that nothing else needs, and
//! ends the jobs that give to those; only then are the files removed. A crash before it leaves the volume as it was; after
//! it the next start removes the files that are left. What is needed by one other layer only is then joined with that.

use crate::catalog::{CatalogState, Change, JobKind, JobRow};
use crate::error::{Error, Result};
use crate::store::Store;
use crate::units::LayerId;

use super::collect::{Without, unneeded};
use super::idle::{jobs_into, with_parents};
use super::kind::attachment_names;

impl Store {
    /// Deletes a volume with its snapshots. Layers that clones need stay, unnamed.
    ///
    /// # Errors
    /// `NotFound`; `Busy` while it is attached or open, or has attachments of its own.
    pub fn delete_volume(&self, name: &str) -> Result<()> {
        let _command = self.command();
        self.delete_volume_in_command(name)
    }

    /// As `delete_volume`, for a caller who holds the command lock.
    pub(crate) fn delete_volume_in_command(&self, name: &str) -> Result<()> {
        let row = self.volume_row(name)?;
        if row.attachment.is_some() {
            return Err(Error::Busy {
                what: format!(
                    "volume {name:?} is attached; detach it first (stratablk volume detach {name})"
                ),
            });
        }
        let (changes, gone, touched) = {
            let inner = self.inner();
            let state = inner.catalog.state();
            let attachments = attachment_names(state, name);
            if !attachments.is_empty() {
                return Err(Error::Busy {
                    what: format!(
                        "volume {name:?} has attachments ({attachments}); detach them first"
                    ),
                });
            }
            let chain = state.chain_of(row.active);
            let into_base = state.jobs.values().find(|job| {
                job.kind == JobKind::IntoBase && chain.iter().any(|layer| layer.id == job.target)
            });
            if let Some(job) = into_base.filter(|job| !is_of_others(state, name, job)) {
                let id = job.id.0;
                return Err(Error::Busy {
                    what: format!(
                        "job {id} moves data of volume {name:?} into its image; wait for it (stratablk job wait {id}), or \
                         cancel it if it has not begun"
                    ),
                });
            }
            let mut changes: Vec<Change> = state
                .snapshots_of(name)
                .into_iter()
                .map(|row| Change::RemoveSnapshot {
                    volume: name.to_owned(),
                    name: row.name.clone(),
                })
                .collect();
            changes.push(Change::RemoveVolume(name.to_owned()));
            let snapshots = state.snapshots_of(name).into_iter().map(|row| row.layer);
            let mine: Vec<LayerId> = snapshots.chain([row.active]).collect();
            let gone = unneeded(state, &mine, Without::Volume(name));
            changes.extend(jobs_into(state, &gone));
            changes.extend(gone.iter().map(|id| Change::RemoveLayer(*id)));
            let touched = with_parents(state, mine.into_iter().chain(gone.iter().copied()));
            (changes, gone, touched)
        };
        self.commit_idle(&[name], &changes, &gone)?;
        self.collect_after(&touched);
        Ok(())
    }
}

/// Whether another volume lies over the target of a job as well, so that it goes on without this one.
fn is_of_others(state: &CatalogState, volume: &str, job: &JobRow) -> bool {
    let others = state.volumes.values().filter(|row| row.name != volume);
    let mut chains = others.map(|row| state.chain_of(row.active));
    chains.any(|chain| chain.iter().any(|layer| layer.id == job.target))
}
