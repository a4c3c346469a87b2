//! The rules of a catalog, and the effect of changes on it. Pure.

use std::collections::{BTreeMap, BTreeSet};

use super::{CatalogState, Change, JobId, LayerRow, LayerState, SnapshotRow};
use crate::error::{Error, Result};
use crate::limits::{BASE_PATH_BYTES_MAX, DISK_SECTORS_MAX, DISK_SECTORS_MIN, NAME_BYTES_MAX};
use crate::units::{LayerId, Sector, StoreId};

impl CatalogState {
    /// The catalog of a store without layers.
    pub fn empty(store: StoreId) -> Self {
        Self {
            store,
            layers: BTreeMap::new(),
            volumes: BTreeMap::new(),
            snapshots: Vec::new(),
            jobs: BTreeMap::new(),
            next_job: 1,
            doomed: BTreeSet::new(),
        }
    }

    /// The snapshot of this name.
    pub fn snapshot(&self, volume: &str, name: &str) -> Option<&SnapshotRow> {
        self.snapshots
            .iter()
            .find(|snapshot| snapshot.volume == volume && snapshot.name == name)
    }

    /// The layers whose parent is this one.
    pub fn children(&self, layer: LayerId) -> impl Iterator<Item = &LayerRow> {
        self.layers
            .values()
            .filter(move |row| row.parent == Some(layer))
    }

    /// A layer and all those below it, from the top down. Ends early at a parent that does not exist or comes up again,
    /// neither of which a verified state has.
    pub fn chain(&self, top: LayerId) -> Vec<&LayerRow> {
        let mut chain = Vec::new();
        let mut seen = BTreeSet::new();
        let mut next = Some(top);
        while let Some(row) = next.and_then(|id| self.layers.get(&id)) {
            if !seen.insert(row.id) {
                break;
            }
            chain.push(row);
            next = row.parent;
        }
        chain
    }

    /// The state after these changes.
    ///
    /// # Errors
    /// `Invalid`: a change contradicts the state, or the result breaks a rule.
    pub(super) fn after(&self, changes: &[Change]) -> Result<Self> {
        let invalid = |what| Error::Invalid {
            field: "catalog change",
            what,
        };
        let mut next = self.clone();
        for change in changes {
            next.apply(change).map_err(invalid)?;
        }
        next.verify().map_err(invalid)?;
        Ok(next)
    }

    /// Makes one change; the rules between rows are checked at the end only.
    fn apply(&mut self, change: &Change) -> Result<(), String> {
        match change {
            Change::AddLayer(row) => match self.layers.insert(row.id, row.clone()) {
                None => Ok(()),
                Some(_) => Err(format!("layer {} exists already", row.id)),
            },
            Change::SetLayerState { layer, state } => {
                let row = self.layers.get_mut(layer).ok_or_else(|| no_layer(*layer))?;
                if *state <= row.state {
                    return Err(format!(
                        "layer {layer} cannot go from {:?} to {state:?}",
                        row.state
                    ));
                }
                row.state = *state;
                Ok(())
            }
            Change::SetParent { layer, parent } => {
                let row = self.layers.get_mut(layer).ok_or_else(|| no_layer(*layer))?;
                row.parent = *parent;
                Ok(())
            }
            Change::SetBase { layer, base } => {
                let row = self.layers.get_mut(layer).ok_or_else(|| no_layer(*layer))?;
                row.base = Some(base.clone());
                Ok(())
            }
            Change::RemoveLayer(layer) => {
                self.layers.remove(layer).ok_or_else(|| no_layer(*layer))?;
                self.doomed.insert(*layer);
                Ok(())
            }
            Change::Removed(layer) => match self.doomed.remove(layer) {
                true => Ok(()),
                false => Err(format!("layer {layer} is not doomed")),
            },
            Change::SetSize { volume, size } => {
                let row = self
                    .volumes
                    .get_mut(volume)
                    .ok_or_else(|| no_volume(volume))?;
                row.size = *size;
                let active = row.active;
                let layer = self
                    .layers
                    .get_mut(&active)
                    .ok_or_else(|| no_layer(active))?;
                layer.size = *size;
                Ok(())
            }
            Change::SetKind { volume, kind } => {
                let row = self
                    .volumes
                    .get_mut(volume)
                    .ok_or_else(|| no_volume(volume))?;
                row.kind = *kind;
                Ok(())
            }
            Change::SetArmed { volume, armed } => {
                let row = self
                    .volumes
                    .get_mut(volume)
                    .ok_or_else(|| no_volume(volume))?;
                row.armed = *armed;
                Ok(())
            }
            Change::SetAttachedFrom { volume, from } => {
                let row = self
                    .volumes
                    .get_mut(volume)
                    .ok_or_else(|| no_volume(volume))?;
                row.attached_from.clone_from(from);
                Ok(())
            }
            Change::AddJob(row) => {
                if row.id.0 != self.next_job {
                    return Err(format!("job {} is not the next one", row.id.0));
                }
                self.next_job += 1;
                self.jobs.insert(row.id, row.clone());
                Ok(())
            }
            Change::SetJob {
                id,
                state,
                error,
                rate,
            } => {
                let row = self.jobs.get_mut(id).ok_or_else(|| no_job(*id))?;
                row.state = *state;
                row.error.clone_from(error);
                row.rate = *rate;
                Ok(())
            }
            Change::MoveJob { id, source, target } => {
                let row = self.jobs.get_mut(id).ok_or_else(|| no_job(*id))?;
                row.source = *source;
                row.target = *target;
                Ok(())
            }
            Change::RemoveJob(id) => self.jobs.remove(id).map(drop).ok_or_else(|| no_job(*id)),
            Change::AddVolume(row) => match self.volumes.insert(row.name.clone(), row.clone()) {
                None => Ok(()),
                Some(_) => Err(format!("volume {:?} exists already", row.name)),
            },
            Change::SetActive { volume, layer } => {
                let row = self
                    .volumes
                    .get_mut(volume)
                    .ok_or_else(|| no_volume(volume))?;
                row.active = *layer;
                Ok(())
            }
            Change::SetAttachment { volume, attachment } => {
                let row = self
                    .volumes
                    .get_mut(volume)
                    .ok_or_else(|| no_volume(volume))?;
                row.attachment.clone_from(attachment);
                Ok(())
            }
            Change::RemoveVolume(name) => self
                .volumes
                .remove(name)
                .map(drop)
                .ok_or_else(|| no_volume(name)),
            Change::AddSnapshot(row) => {
                if self.snapshot(&row.volume, &row.name).is_some() {
                    return Err(format!(
                        "snapshot {}@{} exists already",
                        row.volume, row.name
                    ));
                }
                let key = order(row);
                let at = self.snapshots.partition_point(|other| order(other) < key);
                self.snapshots.insert(at, row.clone());
                Ok(())
            }
            Change::RemoveSnapshot { volume, name } => {
                let before = self.snapshots.len();
                self.snapshots
                    .retain(|row| row.volume != *volume || row.name != *name);
                if self.snapshots.len() == before {
                    return Err(format!("there is no snapshot {volume}@{name}"));
                }
                Ok(())
            }
        }
    }

    /// Checks every rule of `FORMAT.md`.
    ///
    /// # Errors
    /// The first that is broken, in words.
    pub(crate) fn verify(&self) -> Result<(), String> {
        if self.store.0.is_nil() {
            return Err("the store's uuid is nil".into());
        }
        let mut parents = BTreeSet::new();
        for (id, row) in &self.layers {
            if *id != row.id {
                return Err(format!("layer {} is listed as {id}", row.id));
            }
            self.verify_layer(row)?;
            parents.extend(row.parent);
        }
        self.verify_acyclic()?;
        let mut actives = BTreeSet::new();
        for (name, row) in &self.volumes {
            if *name != row.name {
                return Err(format!("volume {:?} is listed as {name:?}", row.name));
            }
            verify_name("volume", name)?;
            verify_size(&format!("volume {name:?}"), row.size)?;
            verify_time(&format!("volume {name:?}"), row.created_ns)?;
            let layer = self.layers.get(&row.active).ok_or_else(|| {
                format!(
                    "volume {name:?} refers to layer {}, which does not exist",
                    row.active
                )
            })?;
            if layer.state != LayerState::Active || parents.contains(&row.active) {
                return Err(format!(
                    "volume {name:?} has layer {} as its active one, which is {:?} or has children",
                    row.active, layer.state
                ));
            }
            if layer.size != row.size {
                return Err(format!(
                    "volume {name:?} has {} sectors, its active layer {} has {}",
                    row.size, row.active, layer.size
                ));
            }
            if !actives.insert(row.active) {
                return Err(format!(
                    "layer {} is the active one of two volumes",
                    row.active
                ));
            }
            if let Some(attachment) = &row.attachment
                && (attachment.queues == 0 || attachment.socket.as_os_str().is_empty())
            {
                return Err(format!(
                    "volume {name:?} is attached without queues or without a socket"
                ));
            }
        }
        let mut names = BTreeSet::new();
        for row in &self.snapshots {
            let what = format!("snapshot {}@{}", row.volume, row.name);
            verify_name("snapshot", &row.name)?;
            verify_size(&what, row.size)?;
            verify_time(&what, row.created_ns)?;
            if !names.insert((&row.volume, &row.name)) {
                return Err(format!("there are two of {what}"));
            }
            if !self.volumes.contains_key(&row.volume) {
                return Err(format!("{what} is of a volume that does not exist"));
            }
            match self.layers.get(&row.layer) {
                None => {
                    return Err(format!(
                        "{what} refers to layer {}, which does not exist",
                        row.layer
                    ));
                }
                Some(layer) if layer.state == LayerState::Active => {
                    return Err(format!(
                        "{what} refers to layer {}, which is still active",
                        row.layer
                    ));
                }
                Some(layer) if layer.size != row.size => {
                    return Err(format!(
                        "{what} has {} sectors, its layer {} has {}",
                        row.size, row.layer, layer.size
                    ));
                }
                Some(_) => {}
            }
        }
        if !self
            .snapshots
            .is_sorted_by(|one, other| order(one) <= order(other))
        {
            return Err("the snapshots are not in order".into());
        }
        Ok(())
    }

    /// The rules of one layer.
    fn verify_layer(&self, row: &LayerRow) -> Result<(), String> {
        let what = format!("layer {}", row.id);
        if row.id.0.is_nil() {
            return Err("a layer's uuid is nil".into());
        }
        verify_size(&what, row.size)?;
        verify_time(&what, row.created_ns)?;
        if let Some(parent) = row.parent {
            let parent = self
                .layers
                .get(&parent)
                .ok_or_else(|| format!("{what} has parent {parent}, which does not exist"))?;
            if parent.state == LayerState::Active {
                return Err(format!(
                    "{what} has parent {}, which is still active",
                    parent.id
                ));
            }
        }
        if let Some(base) = &row.base {
            if row.parent.is_some() || row.state != LayerState::Sealed {
                return Err(format!(
                    "{what} is a raw base and has a parent, or is not sealed"
                ));
            }
            if row.size.bytes() != Some(base.len) {
                return Err(format!(
                    "{what} has {} sectors, its base {} has {} bytes",
                    row.size,
                    base.path.display(),
                    base.len
                ));
            }
            if !base.path.is_absolute() || base.path.as_os_str().len() > BASE_PATH_BYTES_MAX {
                return Err(format!(
                    "{what} has base {}, which is not an absolute path of at most {BASE_PATH_BYTES_MAX} bytes",
                    base.path.display()
                ));
            }
        }
        Ok(())
    }

    /// Following the parents comes to an end from every layer. Each layer is visited once.
    fn verify_acyclic(&self) -> Result<(), String> {
        let mut grounded = BTreeSet::new();
        for id in self.layers.keys() {
            let mut path = BTreeSet::new();
            let mut next = Some(*id);
            while let Some(layer) = next {
                if grounded.contains(&layer) {
                    break;
                }
                if !path.insert(layer) {
                    return Err(format!("layer {layer} is its own ancestor"));
                }
                next = self.layers.get(&layer).and_then(|row| row.parent);
            }
            grounded.extend(path);
        }
        Ok(())
    }

    /// The changes that make this state from an empty one.
    pub(super) fn as_changes(&self) -> Vec<Change> {
        let layers = self.layers.values().cloned().map(Change::AddLayer);
        let volumes = self.volumes.values().cloned().map(Change::AddVolume);
        let snapshots = self.snapshots.iter().cloned().map(Change::AddSnapshot);
        layers.chain(volumes).chain(snapshots).collect()
    }
}

/// Snapshots are in this order: oldest first, and then so that it is always the same.
fn order(row: &SnapshotRow) -> (u64, &str, &str) {
    (row.created_ns, &row.volume, &row.name)
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

/// A name has 1 to 64 bytes, none of them zero.
fn verify_name(kind: &str, name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains('\0') {
        return Err(format!(
            "{kind} name {name:?} is empty, has more than {NAME_BYTES_MAX} bytes, or a zero byte"
        ));
    }
    Ok(())
}

/// A disk has 1 to 2^37 sectors.
fn verify_size(what: &str, size: Sector) -> Result<(), String> {
    if !(DISK_SECTORS_MIN..=DISK_SECTORS_MAX).contains(&size.0) {
        return Err(format!(
            "{what} has {size} sectors (possible: {DISK_SECTORS_MIN} to {DISK_SECTORS_MAX})"
        ));
    }
    Ok(())
}

/// Times fit in the database's signed integers: until the year 2262.
fn verify_time(what: &str, time_ns: u64) -> Result<(), String> {
    match i64::try_from(time_ns) {
        Ok(_) => Ok(()),
        Err(_) => Err(format!("{what} is from after the year 2262")),
    }
}
