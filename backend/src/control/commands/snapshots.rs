//! Commands on snapshots: taking, listing, restoring, deleting, comparing; and the tree that they make.

use std::collections::BTreeSet;

use stratablk_layers as layers;
use stratablk_layers::lifecycle::{DeleteOptions, Fate, Point, RestoreOptions};
use stratablk_layers::store::Selection;
use stratablk_layers::units::LayerId;

use super::super::convert;
use super::super::error::{ApiError, Result};
use super::super::events::Happening;
use super::super::types::{
    DeleteQuery, DeleteReport, DiffLine, DiffQuery, ErrorKind, MergeWay, PointRef, RestoreReport,
    RestoreRequest, SnapshotList, SnapshotReport, SnapshotRequest, Tree,
};
use super::{Commands, check_reach};
use crate::confine::reach::Want;

impl Commands {
    /// Takes a snapshot.
    ///
    /// # Errors
    /// `Invalid`, `NotFound`, `Exists`, `Failed`, `NoSpace`, `Io`.
    pub fn snapshot(&self, request: SnapshotRequest) -> Result<SnapshotReport> {
        let selection = match (request.all, request.volumes.is_empty()) {
            (true, true) => Selection::All,
            (false, false) => Selection::Volumes(request.volumes),
            (true, false) => {
                return Err(ApiError::invalid(
                    "all",
                    "give either volumes or all, not both",
                ));
            }
            (false, true) => {
                return Err(ApiError::invalid(
                    "volumes",
                    "name at least one volume, or set all",
                ));
            }
        };
        let report =
            self.store
                .snapshot(&request.name, &selection)
                .map_err(|error| match error {
                    // The layers say "snapshot" as the command line does.
                    layers::Error::Invalid {
                        field: "snapshot", ..
                    } => ApiError::from(error).of("name"),
                    error => error.into(),
                })?;
        let report = convert::report(report);
        let volumes: Vec<_> = report.snapshots.iter().map(|s| s.volume.clone()).collect();
        tracing::info!(
            snapshot = %request.name, volumes = %volumes.join(","),
            elapsed_ns = report.elapsed_ns, stall_max_ns = report.stall_max_ns, "taken"
        );
        self.events.tell(Happening::SnapshotCreated {
            snapshot: request.name,
            volumes,
        });
        Ok(report)
    }

    /// The snapshots of one volume, or all, oldest first.
    ///
    /// # Errors
    /// `NotFound` for an unknown volume.
    pub fn snapshots(&self, volume: Option<&str>) -> Result<SnapshotList> {
        let snapshots = self.store.snapshots(volume)?.into_iter();
        Ok(SnapshotList {
            snapshots: snapshots.map(convert::snapshot).collect(),
        })
    }

    /// Makes a volume hold what a snapshot of it holds; with a snapshot of several volumes, all of them.
    ///
    /// # Errors
    /// `NotFound`, `Invalid`, `Exists`; `Busy` while a guest uses one of them.
    pub fn restore(&self, volume: &str, request: RestoreRequest) -> Result<RestoreReport> {
        self.store.volume_info(volume)?;
        for name in self.restored_with(volume, &request) {
            self.check_at_rest(&name)?;
        }
        let options = RestoreOptions {
            keep: request.keep,
            only: request.only,
        };
        let report = (self.store.restore(volume, &request.snapshot, &options)).map_err(
            |error| match error {
                layers::Error::Exists { .. } => ApiError::from(error).of("keep"),
                error => error.into(),
            },
        )?;
        let report = convert::restored(report, request.snapshot);
        // It may have had another size then.
        for name in &report.volumes {
            self.attachments.notify_resize(name);
        }
        tracing::info!(
            snapshot = %report.snapshot, volumes = %report.volumes.join(","), kept = options.keep,
            elapsed_ns = report.elapsed_ns, "restored"
        );
        self.events.tell(Happening::VolumesRestored {
            volumes: report.volumes.clone(),
            snapshot: report.snapshot.clone(),
            kept: options.keep,
        });
        Ok(report)
    }

    /// The volumes that a restore touches.
    fn restored_with(&self, volume: &str, request: &RestoreRequest) -> BTreeSet<String> {
        let mut names = BTreeSet::from([volume.to_owned()]);
        // A volume that is not there is for the store to refuse.
        let snapshots = self.store.snapshots(None).unwrap_or_default();
        let group = snapshots
            .iter()
            .find(|has| has.volume == volume && has.name == request.snapshot)
            .map(|has| has.group);
        if !request.only {
            let others = snapshots.iter().filter(|has| Some(has.group) == group);
            names.extend(others.map(|has| has.volume.clone()));
        }
        names
    }

    /// Deletes a snapshot, or says what that would do.
    ///
    /// # Errors
    /// `NotFound`, `Invalid`, `Busy`, `Io`.
    pub fn delete_snapshot(
        &self,
        volume: &str,
        snapshot: &str,
        query: DeleteQuery,
    ) -> Result<DeleteReport> {
        super::jobs::check_rate(query.rate_bytes_per_s)?;
        let options = DeleteOptions {
            push_down: query.push_down,
            into_base: query.into_base,
            way: query.way.map(|way| match way {
                MergeWay::Up => layers::catalog::Way::Up,
                MergeWay::Down => layers::catalog::Way::Down,
            }),
            rate: query.rate_bytes_per_s,
        };
        if query.into_base
            && let Some(base) = self.store.volume_info(volume)?.base
        {
            check_reach("into_base", &base, Want::Write)?;
        }
        let plan = if query.dry_run {
            self.store.plan_delete_snapshot(volume, snapshot, options)
        } else {
            self.store.delete_snapshot(volume, snapshot, options)
        }?;
        let jobs = plan.jobs.iter();
        let jobs = jobs
            .map(|id| self.job_begun(*id, None))
            // One that has ended long ago, as the list of those is short.
            .filter(|job| !matches!(job, Err(error) if error.detail.kind == ErrorKind::NotFound))
            .collect::<Result<Vec<_>>>()?;
        let child = match &plan.fate {
            Fate::Joined { child, .. } => self.name_of(*child, volume),
            _ => String::new(),
        };
        if !query.dry_run {
            tracing::info!(%volume, %snapshot, layer = %plan.layer, jobs = jobs.len(), "deleted");
            self.events.tell(Happening::SnapshotDeleted {
                volume: volume.to_owned(),
                snapshot: snapshot.to_owned(),
            });
        }
        Ok(convert::deleted(plan, child, jobs, query.dry_run))
    }

    /// What people know a layer by that lies in the tree of a volume.
    fn name_of(&self, layer: LayerId, volume: &str) -> String {
        let of_volume = |info: layers::store::VolumeInfo| {
            (info.active == layer).then(|| format!("current state of {}", info.name))
        };
        let own = self.store.volume_info(volume).ok().and_then(of_volume);
        let named = || {
            let snapshots = self.store.snapshots(None).unwrap_or_default();
            let has = snapshots.into_iter().find(|has| has.layer == layer)?;
            Some(format!("{}@{}", has.volume, has.name))
        };
        let other = || self.store.volumes().into_iter().find_map(of_volume);
        own.or_else(named)
            .or_else(other)
            .unwrap_or_else(|| format!("layer {}", convert::short(layer)))
    }

    /// The ranges that may differ between two points.
    ///
    /// # Errors
    /// `NotFound`, `Invalid`.
    pub fn diff(&self, query: &DiffQuery) -> Result<Vec<DiffLine>> {
        let point = |field: &str, text: &str| match text.parse::<PointRef>() {
            Ok(PointRef { volume, snapshot }) => Ok(Point { volume, snapshot }),
            Err(what) => Err(ApiError::invalid(field, what)),
        };
        let from = point("from", &query.from)?;
        let to = match &query.to {
            Some(to) => point("to", to)?,
            None => Point {
                volume: from.volume.clone(),
                snapshot: None,
            },
        };
        let ranges = self.store.diff(&from, &to)?.into_iter();
        Ok(ranges.map(convert::diff_line).collect())
    }

    /// The tree of layers of one volume, or all.
    ///
    /// # Errors
    /// `NotFound` for an unknown volume.
    pub fn tree(&self, volume: Option<&str>) -> Result<Tree> {
        let nodes = self.store.tree(volume)?;
        Ok(convert::tree(
            nodes,
            self.store.volumes(),
            self.store.jobs(),
        ))
    }
}
