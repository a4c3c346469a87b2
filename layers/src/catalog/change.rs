//! The effect of changes, in place, and the way back.

use std::collections::BTreeMap;

use super::index::order;
use super::{CatalogState, Change, JobId, JobRow, LayerRow, SnapshotRow, VolumeRow};
use crate::error::{Error, Result};
use crate::units::LayerId;

/// What a row was before a change: all there is to take the change back.
#[derive(Debug)]
pub(super) enum Was {
    /// A layer.
    Layer(LayerId, Option<LayerRow>),
    /// A volume.
    Volume(String, Option<VolumeRow>),
    /// A snapshot that was not there.
    NoSnapshot {
        /// When it was taken.
        created_ns: u64,
        /// Its volume.
        volume: String,
        /// Its name.
        name: String,
    },
    /// A snapshot.
    Snapshot(SnapshotRow),
    /// A job.
    Job(JobId, Option<JobRow>),
    /// The number of the next job.
    NextJob(u64),
    /// Whether a layer was doomed.
    Doomed(LayerId, bool),
}

/// What rows were before the changes of a commit, oldest first.
#[derive(Debug, Default)]
#[must_use = "the way back from changes that are not durable yet"]
pub(super) struct Undo {
    /// The steps.
    pub steps: Vec<Was>,
}

/// What the rows that a commit touched were before it, `None` where there was none.
#[derive(Debug, Default)]
pub(super) struct Touched<'a> {
    /// Layers.
    pub layers: BTreeMap<LayerId, Option<&'a LayerRow>>,
    /// Volumes.
    pub volumes: BTreeMap<&'a str, Option<&'a VolumeRow>>,
    /// Snapshots, by volume and name.
    pub snapshots: BTreeMap<(&'a str, &'a str), Option<&'a SnapshotRow>>,
    /// Jobs.
    pub jobs: BTreeMap<JobId, Option<&'a JobRow>>,
    /// Whether layers were doomed.
    pub doomed: BTreeMap<LayerId, bool>,
    /// The number of the next job, if it was touched.
    pub next_job: Option<u64>,
}

impl Undo {
    /// What was touched: of each row the first step says what it was.
    pub fn touched(&self) -> Touched<'_> {
        let mut touched = Touched::default();
        for step in &self.steps {
            match step {
                Was::Layer(id, row) => {
                    touched.layers.entry(*id).or_insert(row.as_ref());
                }
                Was::Volume(name, row) => {
                    touched.volumes.entry(name).or_insert(row.as_ref());
                }
                Was::NoSnapshot { volume, name, .. } => {
                    touched.snapshots.entry((volume, name)).or_insert(None);
                }
                Was::Snapshot(row) => {
                    let key = (row.volume.as_str(), row.name.as_str());
                    touched.snapshots.entry(key).or_insert(Some(row));
                }
                Was::Job(id, row) => {
                    touched.jobs.entry(*id).or_insert(row.as_ref());
                }
                Was::NextJob(next) => {
                    touched.next_job.get_or_insert(*next);
                }
                Was::Doomed(layer, was) => {
                    touched.doomed.entry(*layer).or_insert(*was);
                }
            }
        }
        touched
    }
}

impl CatalogState {
    /// Makes these changes, all or none.
    ///
    /// # Errors
    /// `Invalid`: a change contradicts the state, or the result breaks a rule. Nothing has changed.
    pub(super) fn change(&mut self, changes: &[Change]) -> Result<Undo> {
        let mut undo = Undo::default();
        let mut made = Ok(());
        for change in changes {
            made = made.and_then(|()| self.apply(change, &mut undo));
        }
        if made.is_ok() {
            made = self.verify_changed(&undo.touched());
            self.cross_check(&made);
        }
        match made {
            Ok(()) => Ok(undo),
            Err(what) => {
                self.undo(undo);
                Err(Error::Invalid {
                    field: "catalog change",
                    what,
                })
            }
        }
    }

    /// Takes changes back.
    pub(super) fn undo(&mut self, undo: Undo) {
        for step in undo.steps.into_iter().rev() {
            match step {
                Was::Layer(id, row) => drop(self.put_layer(id, row)),
                Was::Volume(name, row) => drop(self.put_volume(&name, row)),
                Was::NoSnapshot {
                    created_ns,
                    volume,
                    name,
                } => drop(self.take_snapshot((created_ns, &volume, &name))),
                Was::Snapshot(row) => self.add_snapshot(row),
                Was::Job(id, row) => drop(self.put_job(id, row)),
                Was::NextJob(next) => self.rows.next_job = next,
                Was::Doomed(layer, was) => drop(self.put_doomed(layer, was)),
            }
        }
    }

    /// In tests and debug builds: rules that were checked where something changed must hold, or not, everywhere.
    fn cross_check(&self, found: &std::result::Result<(), String>) {
        /// More rows than this would make every commit of a large test slow.
        const ROWS_MAX: usize = 128;
        if cfg!(debug_assertions)
            && self.layers.len() + self.snapshots.len() + self.jobs.len() <= ROWS_MAX
        {
            let all = self.verify();
            assert_eq!(
                found.is_ok(),
                all.is_ok(),
                "where it changed: {found:?}; everywhere: {all:?}"
            );
        }
    }

    /// Makes one change; the rules between rows are checked at the end only.
    fn apply(&mut self, change: &Change, undo: &mut Undo) -> Result<(), String> {
        let was = match change {
            Change::AddLayer(row) => match self.put_layer(row.id, Some(row.clone())) {
                None => Was::Layer(row.id, None),
                was => {
                    undo.steps.push(Was::Layer(row.id, was));
                    return Err(format!("layer {} exists already", row.id));
                }
            },
            Change::SetLayerState { layer, state } => self.with_layer(*layer, |row| {
                if *state <= row.state {
                    return Err(format!(
                        "layer {layer} cannot go from {:?} to {state:?}",
                        row.state
                    ));
                }
                row.state = *state;
                Ok(())
            })?,
            Change::SetParent { layer, parent } => self.with_layer(*layer, |row| {
                row.parent = *parent;
                Ok(())
            })?,
            Change::SetBase { layer, base } => self.with_layer(*layer, |row| {
                if row.base.is_none() {
                    return Err(format!("layer {layer} is no raw base"));
                }
                row.base = Some(base.clone());
                Ok(())
            })?,
            Change::RemoveLayer(layer) => {
                let was = self.put_layer(*layer, None);
                let was = was.ok_or_else(|| no_layer(*layer))?;
                undo.steps.push(Was::Layer(*layer, Some(was)));
                Was::Doomed(*layer, self.put_doomed(*layer, true))
            }
            Change::Removed(layer) => match self.put_doomed(*layer, false) {
                true => Was::Doomed(*layer, true),
                false => return Err(format!("layer {layer} is not doomed")),
            },
            Change::SetSize { volume, size } => {
                let active = self.volumes.get(volume).map(|row| row.active);
                let active = active.ok_or_else(|| no_volume(volume))?;
                let was = self.with_layer(active, |row| {
                    row.size = *size;
                    Ok(())
                })?;
                undo.steps.push(was);
                self.with_volume(volume, |row| row.size = *size)?
            }
            Change::SetKind { volume, kind } => self.with_volume(volume, |row| row.kind = *kind)?,
            Change::SetArmed { volume, armed } => {
                self.with_volume(volume, |row| row.armed = *armed)?
            }
            Change::SetAttachedFrom { volume, from } => {
                self.with_volume(volume, |row| row.attached_from.clone_from(from))?
            }
            Change::SetActive { volume, layer } => {
                self.with_volume(volume, |row| row.active = *layer)?
            }
            Change::SetAttachment { volume, attachment } => {
                self.with_volume(volume, |row| row.attachment.clone_from(attachment))?
            }
            Change::SetFailed { volume, cause } => {
                self.with_volume(volume, |row| row.failed.clone_from(cause))?
            }
            Change::AddVolume(row) => match self.put_volume(&row.name, Some(row.clone())) {
                None => Was::Volume(row.name.clone(), None),
                was => {
                    undo.steps.push(Was::Volume(row.name.clone(), was));
                    return Err(format!("volume {:?} exists already", row.name));
                }
            },
            Change::RemoveVolume(name) => match self.put_volume(name, None) {
                None => return Err(no_volume(name)),
                was => Was::Volume(name.clone(), was),
            },
            Change::AddSnapshot(row) => {
                if self.snapshot(&row.volume, &row.name).is_some() {
                    return Err(format!(
                        "snapshot {}@{} exists already",
                        row.volume, row.name
                    ));
                }
                self.add_snapshot(row.clone());
                Was::NoSnapshot {
                    created_ns: row.created_ns,
                    volume: row.volume.clone(),
                    name: row.name.clone(),
                }
            }
            Change::RemoveSnapshot { volume, name } => {
                let created_ns = self.snapshot(volume, name).map(|row| row.created_ns);
                let was = created_ns.and_then(|at| self.take_snapshot((at, volume, name)));
                Was::Snapshot(was.ok_or_else(|| format!("there is no snapshot {volume}@{name}"))?)
            }
            Change::AddJob(row) => {
                if row.id.0 != self.next_job {
                    return Err(format!("job {} is not the next one", row.id.0));
                }
                undo.steps.push(Was::NextJob(self.next_job));
                let next = self.next_job.checked_add(1);
                self.rows.next_job = next.ok_or("there are no more numbers for jobs")?;
                Was::Job(row.id, self.put_job(row.id, Some(row.clone())))
            }
            Change::TakeJobNumber => {
                let was = self.next_job;
                self.rows.next_job = was
                    .checked_add(1)
                    .ok_or("there are no more numbers for jobs")?;
                Was::NextJob(was)
            }
            Change::SetJob {
                id,
                state,
                error,
                rate,
            } => {
                let mut row = self.jobs.get(id).cloned().ok_or_else(|| no_job(*id))?;
                row.state = *state;
                row.error.clone_from(error);
                row.rate = *rate;
                Was::Job(*id, self.put_job(*id, Some(row)))
            }
            Change::MoveJob { id, source, target } => {
                let mut row = self.jobs.get(id).cloned().ok_or_else(|| no_job(*id))?;
                row.source = *source;
                row.target = *target;
                Was::Job(*id, self.put_job(*id, Some(row)))
            }
            Change::RemoveJob(id) => match self.put_job(*id, None) {
                None => return Err(no_job(*id)),
                was => Was::Job(*id, was),
            },
        };
        undo.steps.push(was);
        Ok(())
    }

    /// Changes a layer.
    fn with_layer(
        &mut self,
        id: LayerId,
        change: impl FnOnce(&mut LayerRow) -> Result<(), String>,
    ) -> Result<Was, String> {
        let mut row = self.layers.get(&id).cloned().ok_or_else(|| no_layer(id))?;
        change(&mut row)?;
        Ok(Was::Layer(id, self.put_layer(id, Some(row))))
    }

    /// Changes a volume.
    fn with_volume(
        &mut self,
        name: &str,
        change: impl FnOnce(&mut VolumeRow),
    ) -> Result<Was, String> {
        let row = self.volumes.get(name).cloned();
        let mut row = row.ok_or_else(|| no_volume(name))?;
        change(&mut row);
        Ok(Was::Volume(
            name.to_owned(),
            self.put_volume(name, Some(row)),
        ))
    }

    /// Puts a layer where another was, or none. Returns what was there.
    fn put_layer(&mut self, id: LayerId, row: Option<LayerRow>) -> Option<LayerRow> {
        let was = self.rows.layers.remove(&id);
        if let Some(was) = &was {
            self.index.remove_layer(was);
        }
        if let Some(row) = row {
            self.index.add_layer(&row);
            self.rows.layers.insert(id, row);
        }
        was
    }

    /// Puts a volume where another was, or none. Returns what was there.
    fn put_volume(&mut self, name: &str, row: Option<VolumeRow>) -> Option<VolumeRow> {
        let was = self.rows.volumes.remove(name);
        if let Some(was) = &was {
            self.index.remove_volume(was);
        }
        if let Some(row) = row {
            self.index.add_volume(&row);
            self.rows.volumes.insert(name.to_owned(), row);
        }
        was
    }

    /// Puts a job where another was, or none. Returns what was there.
    fn put_job(&mut self, id: JobId, row: Option<JobRow>) -> Option<JobRow> {
        let was = self.rows.jobs.remove(&id);
        if let Some(was) = &was {
            self.index.remove_job(was);
        }
        if let Some(row) = row {
            self.index.add_job(&row);
            self.rows.jobs.insert(id, row);
        }
        was
    }

    /// Dooms a layer, or no longer. Returns whether it was.
    fn put_doomed(&mut self, layer: LayerId, doomed: bool) -> bool {
        match doomed {
            true => !self.rows.doomed.insert(layer),
            false => self.rows.doomed.remove(&layer),
        }
    }

    /// Puts a snapshot in its place.
    fn add_snapshot(&mut self, row: SnapshotRow) {
        self.index.add_snapshot(&row);
        let key = order(&row);
        let at = self.snapshots.partition_point(|other| order(other) < key);
        self.rows.snapshots.insert(at, row);
    }

    /// Takes a snapshot out of its place.
    fn take_snapshot(&mut self, key: (u64, &str, &str)) -> Option<SnapshotRow> {
        let at = self.snapshots.binary_search_by(|row| order(row).cmp(&key));
        let row = self.rows.snapshots.remove(at.ok()?);
        self.index.remove_snapshot(&row);
        Some(row)
    }
}

/// There is no such layer.
fn no_layer(layer: LayerId) -> String {
    format!("there is no layer {layer}")
}

/// There is no such job.
fn no_job(id: JobId) -> String {
    format!("there is no job {}", id.0)
}

/// There is no such volume.
fn no_volume(name: &str) -> String {
    format!("there is no volume {name:?}")
}
