//! Restoring: a volume goes on from one of its snapshots, or all volumes of a group from theirs.
//!
//! DURABILITY, in this order:
//! 1. what is to be kept is flushed; the files of the new active layers are written and synced, with their directories;
//! 2. one catalog transaction, for all volumes: the new layers become active; the old ones are doomed, with the jobs that
//!    give to them, or are marked as sealing and get the name to be kept. From here on the restore is whole;
//! 3. the layers that were kept are sealed as by a snapshot; what nobody needs any more is removed.
//!
//! A crash before 2 leaves empty layers that the next start removes; after it the next start does 3.

use std::collections::BTreeSet;
use std::time::Instant;

use crate::canary::{self, Canary};
use crate::catalog::{Change, JobState, SnapshotRow, VolumeKind, VolumeRow, Way};
use crate::error::{Error, Result};
use crate::lifecycle::{RestoreOptions, RestoreReport};
use crate::store::{Store, now_ns};
use crate::units::{LayerId, Sector};

use super::create::Made;
use super::groups;
use super::idle::{Replaced, with_parents};
use super::names;

/// A volume that is restored.
#[derive(Debug)]
struct Member {
    /// The volume as it is.
    row: VolumeRow,
    /// The layer of the snapshot.
    layer: LayerId,
    /// The size that the disk had.
    size: Sector,
}

impl Store {
    /// Lets a volume go on from one of its snapshots; if that was taken of a group, all volumes of the group that have it.
    ///
    /// # Errors
    /// `NotFound`, `Exists` (the name to keep), `Invalid`; `Busy` while a front-end uses one of the volumes. Nothing has
    /// changed then.
    pub fn restore(
        &self,
        volume: &str,
        snapshot: &str,
        options: &RestoreOptions,
    ) -> Result<RestoreReport> {
        let _command = self.command();
        let began = Instant::now();
        let members = self.members(volume, snapshot, options)?;
        let touched = {
            let inner = self.inner();
            let actives = members.iter().map(|member| member.row.active);
            with_parents(inner.catalog.state(), actives)
        };
        let mut made = Made::default();
        let kept = match self.restore_members(&members, options.keep.as_deref(), &mut made) {
            Ok(kept) => kept,
            Err(error) => {
                self.unmake(&made);
                return Err(error);
            }
        };
        self.seal_idle(&kept.iter().map(|row| row.layer).collect::<Vec<_>>());
        self.collect_after(&touched);
        Ok(RestoreReport {
            volumes: members.into_iter().map(|member| member.row.name).collect(),
            kept: kept.iter().map(|row| self.describe_snapshot(row)).collect(),
            elapsed: began.elapsed(),
        })
    }

    /// The volumes to restore, after every check that needs no file to be made.
    fn members(
        &self,
        volume: &str,
        snapshot: &str,
        options: &RestoreOptions,
    ) -> Result<Vec<Member>> {
        let chosen = {
            let inner = self.inner();
            let state = inner.catalog.state();
            let row = state.snapshot_of(volume, snapshot)?;
            let mut chosen = Vec::new();
            // A volume has at most one snapshot of an instant.
            for has in state.snapshots.iter().filter(|has| has.group == row.group) {
                if !options.only || has.volume == volume {
                    chosen.push((state.volume(&has.volume)?.clone(), has.name.clone()));
                }
            }
            if !options.only
                && let Some(whole) =
                    groups::members(row.group).filter(|whole| chosen.len() < *whole)
            {
                let left: Vec<String> = chosen
                    .iter()
                    .map(|(row, name)| format!("{}@{name}", row.name))
                    .collect();
                return Err(Error::Invalid {
                    field: "snapshot",
                    what: format!(
                        "it was taken of {whole} volumes at one instant, and of these only {} is left; to restore \
                         {volume:?} alone, say so (--only)",
                        left.join(", ")
                    ),
                });
            }
            chosen
        };
        let mut members = Vec::with_capacity(chosen.len());
        for (row, name) in chosen {
            check_kind(&row, volume)?;
            self.check_idle(&row.name)?;
            self.check_not_copied_into(&row)?;
            let (layer, size) = self.sealed_layer_of(&row.name, &name)?;
            self.check_base_of(layer)?;
            members.push(Member { row, layer, size });
        }
        if let Some(keep) = &options.keep {
            names::check("keep", keep)?;
            let names: BTreeSet<&str> = members.iter().map(|has| has.row.name.as_str()).collect();
            let inner = self.inner();
            let mut rows = inner.catalog.state().snapshots.iter();
            if let Some(has) =
                rows.find(|has| has.name == *keep && names.contains(has.volume.as_str()))
            {
                return Err(Error::Exists {
                    kind: "snapshot",
                    name: format!("{}@{}", has.volume, has.name),
                });
            }
        }
        Ok(members)
    }

    /// Refuses to put the layer aside that somebody waits for to become independent: the volume would not be.
    fn check_not_copied_into(&self, row: &VolumeRow) -> Result<()> {
        let inner = self.inner();
        let mut jobs = inner.catalog.state().jobs_of(row.active);
        let copy = jobs.find(|job| {
            job.way == Way::Copy && job.target == row.active && job.state != JobState::Stopped
        });
        match copy {
            None => Ok(()),
            Some(job) => Err(Error::Busy {
                what: format!(
                    "job {} copies into {:?}, and the disk as it is would be put aside with what was copied; wait for the job \
                     (stratablk job wait {}), or cancel it",
                    job.id.0, row.name, job.id.0
                ),
            }),
        }
    }

    /// Steps 1 and 2. Returns the snapshots that were kept.
    fn restore_members(
        &self,
        members: &[Member],
        keep: Option<&str>,
        made: &mut Made,
    ) -> Result<Vec<SnapshotRow>> {
        let group = groups::name_of(self.media.fresh_id(), members.len());
        let created_ns = now_ns();
        let old = match keep {
            Some(_) => Replaced::Sealed,
            None => Replaced::Discarded,
        };
        let mut changes = Vec::new();
        let mut kept = Vec::new();
        for Member { row, layer, size } in members {
            match old {
                Replaced::Sealed => self.flush_idle(row)?,
                Replaced::Discarded => self.flush_below(row)?,
            }
            self.replace_active(row, *layer, *size, old, made, &mut changes)?;
            if let Some(name) = keep {
                let row = row.to_snapshot(name, group, created_ns);
                changes.push(Change::AddSnapshot(row.clone()));
                kept.push(row);
            }
            if canary::is_set(Canary::RestoreInParts) {
                let part = std::mem::take(&mut changes);
                self.commit_idle(&[row.name.as_str()], &part, &[])?;
            }
        }
        let names: Vec<&str> = members.iter().map(|has| has.row.name.as_str()).collect();
        let gone: Vec<LayerId> = match old {
            Replaced::Discarded => members.iter().map(|has| has.row.active).collect(),
            Replaced::Sealed => Vec::new(),
        };
        self.commit_idle(&names, &changes, &gone)?;
        Ok(kept)
    }
}

/// Refuses volumes that snapshots leave alone. `asked` is the one that was named.
fn check_kind(row: &VolumeRow, asked: &str) -> Result<()> {
    let kind = match row.kind {
        VolumeKind::Normal | VolumeKind::Immutable => return Ok(()),
        VolumeKind::Writethrough => "writethrough, which snapshots leave alone",
        VolumeKind::Readonly => "readonly, which nothing changes",
        VolumeKind::Multiattach => "multiattach, whose content its attachments share",
    };
    let name = &row.name;
    let only = if name == asked {
        String::new()
    } else {
        format!(", or restore {asked} alone (--only)")
    };
    Err(Error::Invalid {
        field: "volume",
        what: format!(
            "{name} belongs to this snapshot and is of type {kind}; make it normal first \
             (stratablk volume set {name} --type normal){only}"
        ),
    })
}
