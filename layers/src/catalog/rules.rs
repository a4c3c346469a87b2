//! The rules of a catalog, row by row. A row's rules are about it and what it refers to; each function here looks at both
//! ends, so that checking every row that was touched finds what checking every row would. How layers lie over one another
//! is the matter of `moves.rs`.

use std::collections::BTreeSet;

use super::change::Touched;
use super::index::{Index, order};
use super::{
    CatalogState, JobId, JobKind, JobRow, JobState, LayerRow, LayerState, SnapshotRow, VolumeKind,
    VolumeRow, Way,
};
use crate::limits::{
    BASE_PATH_BYTES_MAX, DISK_SECTORS_MAX, DISK_SECTORS_MIN, JOB_SUBJECT_BYTES_MAX, NAME_BYTES_MAX,
};
use crate::units::{LayerId, Sector};

impl CatalogState {
    /// Checks every rule of `FORMAT.md` in every row.
    ///
    /// # Errors
    /// The first that is broken, in words.
    pub(crate) fn verify(&self) -> Result<(), String> {
        if self.store.0.is_nil() {
            return Err("the store's uuid is nil".into());
        }
        for (id, row) in &self.layers {
            if *id != row.id {
                return Err(format!("layer {} is listed as {id}", row.id));
            }
            self.verify_layer(row)?;
        }
        self.verify_acyclic()?;
        for (name, row) in &self.volumes {
            if *name != row.name {
                return Err(format!("volume {:?} is listed as {name:?}", row.name));
            }
            self.verify_volume(row)?;
        }
        let mut names = BTreeSet::new();
        for row in &self.snapshots {
            if !names.insert((&row.volume, &row.name)) {
                return Err(format!("there are two of {}", snapshot_text(row)));
            }
            self.verify_snapshot(row)?;
        }
        if !self
            .snapshots
            .is_sorted_by(|one, other| order(one) <= order(other))
        {
            return Err("the snapshots are not in order".into());
        }
        for (id, row) in &self.jobs {
            if *id != row.id {
                return Err(format!("job {} is listed as {}", row.id.0, id.0));
            }
            self.verify_job(row)?;
            self.verify_job_path(row)?;
        }
        verify_number("the number of the next job", self.next_job)?;
        for layer in &self.doomed {
            self.verify_doomed(*layer)?;
        }
        debug_assert_eq!(self.index, Index::of(self), "the index follows the rows");
        Ok(())
    }

    /// As `verify`, for a state that kept the rules before these rows were touched.
    pub(super) fn verify_changed(&self, touched: &Touched<'_>) -> Result<(), String> {
        for (id, was) in &touched.layers {
            self.verify_touched_layer(*id, *was)?;
        }
        for layer in touched.doomed.keys() {
            if self.doomed.contains(layer) {
                self.verify_doomed(*layer)?;
            }
        }
        for name in touched.volumes.keys() {
            match self.volumes.get(*name) {
                Some(row) => self.verify_volume(row)?,
                None => self.verify_no_volume(name)?,
            }
        }
        for (volume, name) in touched.snapshots.keys() {
            if let Some(row) = self.snapshot(volume, name) {
                self.verify_snapshot(row)?;
            }
        }
        for (id, was) in &touched.jobs {
            let Some(row) = self.jobs.get(id) else {
                continue;
            };
            self.verify_job(row)?;
            if was.is_none_or(|was| (was.source, was.target) != (row.source, row.target)) {
                self.verify_job_path(row)?;
            }
        }
        verify_number("the number of the next job", self.next_job)?;
        self.verify_moves(&touched.layers)
    }

    /// The rules of a layer that was changed, and of the rows that refer to it.
    fn verify_touched_layer(&self, id: LayerId, was: Option<&LayerRow>) -> Result<(), String> {
        if self.doomed.contains(&id) {
            self.verify_doomed(id)?;
        }
        let Some(row) = self.layers.get(&id) else {
            return self.verify_no_layer(id);
        };
        self.verify_layer(row)?;
        for name in self.index.actives.of(&id) {
            self.volumes
                .get(name)
                .map_or(Ok(()), |row| self.verify_volume(row))?;
        }
        for row in self.names_of(id) {
            self.verify_snapshot(row)?;
        }
        for job in self.index.targets.of(&id) {
            self.verify_job_of(*job)?;
        }
        // What a job takes from matters to its rules only as a base or none.
        if was.is_some_and(|was| was.base.is_some() != row.base.is_some()) {
            for job in self.index.sources.of(&id) {
                self.verify_job_of(*job)?;
            }
        }
        Ok(())
    }

    /// Nothing refers to a layer that does not exist.
    fn verify_no_layer(&self, id: LayerId) -> Result<(), String> {
        let gone = |what: String| Err(format!("{what} refers to layer {id}, which does not exist"));
        if let Some(child) = self.index.children.of(&id).next() {
            return Err(format!(
                "layer {child} has parent {id}, which does not exist"
            ));
        }
        if let Some(volume) = self.index.actives.of(&id).next() {
            return gone(format!("volume {volume:?}"));
        }
        if let Some((_, volume, name)) = self.index.named.of(&id).next() {
            return gone(format!("snapshot {volume}@{name}"));
        }
        let mut jobs = self.index.sources.of(&id).chain(self.index.targets.of(&id));
        jobs.next()
            .map_or(Ok(()), |job| gone(format!("job {}", job.0)))
    }

    /// Nothing refers to a volume that does not exist.
    fn verify_no_volume(&self, name: &str) -> Result<(), String> {
        if let Some((snapshot, _)) = self
            .index
            .taken
            .get(name)
            .and_then(|taken| taken.iter().next())
        {
            return Err(format!(
                "snapshot {name}@{snapshot} is of a volume that does not exist"
            ));
        }
        match self.index.attached.of(name).next() {
            None => Ok(()),
            Some(other) => Err(format!(
                "volume {other:?} is an attachment of volume {name:?}, which does not exist"
            )),
        }
    }

    /// The rules of one layer.
    fn verify_layer(&self, row: &LayerRow) -> Result<(), String> {
        let what = format!("layer {}", row.id);
        if row.id.0.is_nil() {
            return Err("a layer's uuid is nil".into());
        }
        verify_size(&what, row.size)?;
        verify_number(&what, row.created_ns)?;
        if let Some(parent) = row.parent
            && !self.layers.contains_key(&parent)
        {
            return Err(format!("{what} has parent {parent}, which does not exist"));
        }
        if row.state == LayerState::Active
            && let Some(child) = self.index.children.of(&row.id).next()
        {
            return Err(format!(
                "layer {child} has parent {}, which is still active",
                row.id
            ));
        }
        // Also of the parent, since a layer that comes to lie over one that was not touched is all there is to see of it.
        if let Some(parent) = row.parent.and_then(|parent| self.layers.get(&parent))
            && parent.state == LayerState::Active
        {
            return Err(format!(
                "{what} has parent {}, which is still active",
                parent.id
            ));
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

    /// The rules of one volume.
    fn verify_volume(&self, row: &VolumeRow) -> Result<(), String> {
        let name = &row.name;
        verify_name("volume", name)?;
        verify_size(&format!("volume {name:?}"), row.size)?;
        verify_number(&format!("volume {name:?}"), row.created_ns)?;
        // A text that begins with a zero is empty to the database.
        if (row.failed.as_deref()).is_some_and(|why| why.is_empty() || why.starts_with('\0')) {
            return Err(format!("volume {name:?} has failed for no reason"));
        }
        let layer = self.layers.get(&row.active).ok_or_else(|| {
            format!(
                "volume {name:?} refers to layer {}, which does not exist",
                row.active
            )
        })?;
        if layer.state != LayerState::Active || self.child_count(row.active) > 0 {
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
        if self.index.actives.count(&row.active) > 1 {
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
        if row.armed && row.kind != VolumeKind::Immutable {
            return Err(format!(
                "volume {name:?} is to be thrown away at a start, and is {:?}",
                row.kind
            ));
        }
        if matches!(row.kind, VolumeKind::Immutable | VolumeKind::Multiattach)
            && layer.parent.is_none()
        {
            return Err(format!(
                "volume {name:?} is {:?}, and nothing lies below its active layer to start from",
                row.kind
            ));
        }
        if let Some(from) = &row.attached_from {
            let other = self.volumes.get(from).ok_or_else(|| {
                format!("volume {name:?} is an attachment of volume {from:?}, which does not exist")
            })?;
            if other.kind != VolumeKind::Multiattach || row.kind == VolumeKind::Multiattach {
                return Err(format!(
                    "volume {name:?}, which is {:?}, is an attachment of volume {from:?}, which is {:?}",
                    row.kind, other.kind
                ));
            }
        }
        match self.index.attached.of(name).next() {
            Some(other) if row.kind != VolumeKind::Multiattach => Err(format!(
                "volume {other:?} is an attachment of volume {name:?}, which is {:?}",
                row.kind
            )),
            _ => Ok(()),
        }
    }

    /// The rules of one snapshot.
    fn verify_snapshot(&self, row: &SnapshotRow) -> Result<(), String> {
        let what = snapshot_text(row);
        verify_name("snapshot", &row.name)?;
        verify_size(&what, row.size)?;
        verify_number(&what, row.created_ns)?;
        if !self.volumes.contains_key(&row.volume) {
            return Err(format!("{what} is of a volume that does not exist"));
        }
        match self.layers.get(&row.layer) {
            None => Err(format!(
                "{what} refers to layer {}, which does not exist",
                row.layer
            )),
            Some(layer) if layer.state == LayerState::Active => Err(format!(
                "{what} refers to layer {}, which is still active",
                row.layer
            )),
            Some(layer) if layer.size != row.size => Err(format!(
                "{what} has {} sectors, its layer {} has {}",
                row.size, row.layer, layer.size
            )),
            Some(_) => Ok(()),
        }
    }

    /// The rules of a job, if it exists.
    fn verify_job_of(&self, id: JobId) -> Result<(), String> {
        self.jobs
            .get(&id)
            .map_or(Ok(()), |row| self.verify_job(row))
    }

    /// The rules of one job, but for how its layers lie.
    fn verify_job(&self, row: &JobRow) -> Result<(), String> {
        let what = format!("job {}", row.id.0);
        if row.id.0 == 0 || row.id.0 >= self.next_job {
            return Err(format!("{what} has a number that was not given out yet"));
        }
        verify_number(&what, row.created_ns)?;
        let subject = &row.subject;
        if subject.is_empty() || subject.len() > JOB_SUBJECT_BYTES_MAX || subject.contains('\0') {
            return Err(format!(
                "{what} has a subject that is empty, has more than {JOB_SUBJECT_BYTES_MAX} bytes, or a zero byte"
            ));
        }
        if let Some(rate) = row.rate {
            verify_number(&format!("the limit of {what}"), rate)?;
            if rate == 0 {
                return Err(format!("{what} is limited to no bytes a second"));
            }
        }
        if row.error.is_some() && row.state != JobState::Stopped {
            return Err(format!("{what} has failed, and is {:?}", row.state));
        }
        let ways: &[Way] = match row.kind {
            JobKind::Merge => &[Way::Up, Way::Down, Way::InPlace],
            JobKind::IntoBase => &[Way::Down],
            JobKind::PushDown | JobKind::Flatten | JobKind::Import => &[Way::Copy],
            // Not of a catalog.
            JobKind::Scrub => &[],
        };
        if !ways.contains(&row.way) {
            return Err(format!(
                "{what} is a {:?} and cannot go {:?}",
                row.kind, row.way
            ));
        }
        let layer = |id| {
            let layer = self.layers.get(id);
            layer.ok_or_else(|| format!("{what} refers to layer {id}, which does not exist"))
        };
        let (source, target) = (layer(&row.source)?, layer(&row.target)?);
        let base_fits = match row.kind {
            JobKind::Merge => source.base.is_none(),
            JobKind::IntoBase => source.base.is_some(),
            JobKind::PushDown | JobKind::Flatten | JobKind::Import | JobKind::Scrub => true,
        };
        if !base_fits {
            return Err(format!(
                "{what} is a {:?}, and layer {} is, or is not, a raw base",
                row.kind, row.source
            ));
        }
        if row.way == Way::Down && target.state != LayerState::Sealed {
            return Err(format!(
                "{what} goes down from layer {}, which is {:?}",
                row.target, target.state
            ));
        }
        for id in [row.source, row.target] {
            let claims = self.index.claims.count(&id);
            if claims > 1 || (claims > 0 && self.index.pushes.count(&id) > 0) {
                return Err(format!("layer {id} is in the hands of {what} and another"));
            }
        }
        Ok(())
    }

    /// A layer is doomed or in the catalog, never both.
    fn verify_doomed(&self, layer: LayerId) -> Result<(), String> {
        match self.layers.contains_key(&layer) {
            true => Err(format!("layer {layer} is in the catalog, and doomed")),
            false => Ok(()),
        }
    }
}

/// What a snapshot is called.
fn snapshot_text(row: &SnapshotRow) -> String {
    format!("snapshot {}@{}", row.volume, row.name)
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

/// Numbers fit in the database's signed integers; of times, until the year 2262.
fn verify_number(what: &str, number: u64) -> Result<(), String> {
    match i64::try_from(number) {
        Ok(_) => Ok(()),
        Err(_) => Err(format!(
            "{what} has a number or time beyond 2^63 (the year 2262)"
        )),
    }
}
