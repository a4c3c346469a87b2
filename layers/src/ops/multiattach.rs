//! Attachments of a multiattach volume: each has a volume of its own over what the multiattach volume holds.
//!
//! DURABILITY: giving one is creating a volume. Taking one is deleting a volume; or it is kept: flushed first, then
//! its maps get the new name, and it is renamed in one catalog transaction, with its snapshots. Its layers hold what they held.
//! A crash between leaves the new name in maps, that of the active layer first of all. From there only `check
//! --rebuild-catalog` would read it; but the name is still free, and once a volume has it two active layers would claim it. So
//! the next start gives the maps their old name back, that of the active layer last (`undo_half_kept`).

use crate::catalog::{Change, VolumeKind, VolumeRow};
use crate::error::{Error, Result};
use crate::lifecycle::Given;
use crate::mapfile::MapFile;
use crate::store::{Store, now_ns};

use super::create::Made;
use super::names;
use super::true_names::Order;

impl Store {
    /// Makes a volume for an attachment of a multiattach volume: `name`, or the first free of NAME-1, NAME-2 and so on. An
    /// attachment that has this name already is given again.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` if it is of another type; `Exists`.
    pub fn give_attachment(&self, volume: &str, name: Option<&str>) -> Result<Given> {
        let _command = self.command();
        let row = self.volume_row(volume)?;
        if row.kind != VolumeKind::Multiattach {
            return Err(Error::Invalid {
                field: "volume",
                what: format!(
                    "{volume} is not of type multiattach; attach it itself, or change its type first \
                     (stratablk volume set {volume} --type multiattach)"
                ),
            });
        }
        let name = match name {
            Some(name) => name.to_owned(),
            None => self.free_name(volume),
        };
        names::check("name", &name)?;
        let there = self.inner().catalog.state().volumes.get(&name).cloned();
        if let Some(there) = there {
            if there.attached_from.as_deref() != Some(volume) {
                return Err(exists(&name));
            }
            let volume = self.volume_info(&name)?;
            return Ok(Given { volume, new: false });
        }
        let content = self.sealed_content(&row)?;
        self.check_base_of(content)?;
        let mut made = Made::default();
        let given = self
            .make_active_layer(
                &name,
                VolumeKind::Normal,
                Some(content),
                row.size,
                &mut made,
            )
            .and_then(|(layer, layer_row)| {
                let changes = [
                    Change::AddLayer(layer_row),
                    Change::AddVolume(VolumeRow {
                        name: name.clone(),
                        active: layer.id(),
                        size: row.size,
                        created_ns: now_ns(),
                        attachment: None,
                        kind: VolumeKind::Normal,
                        armed: false,
                        attached_from: Some(volume.to_owned()),
                        failed: None,
                    }),
                ];
                self.inner().catalog.commit(&changes)
            });
        if let Err(error) = given {
            self.unmake(&made);
            return Err(error);
        }
        let volume = self.volume_info(&name)?;
        Ok(Given { volume, new: true })
    }

    /// Ends an attachment: its volume is deleted, or kept as a normal volume of the name `keep_as`.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` if it is no attachment; `Busy` while it is open, or if it would be deleted and has snapshots;
    /// `Exists`.
    pub fn take_attachment(&self, volume: &str, keep_as: Option<&str>) -> Result<()> {
        let _command = self.command();
        let row = self.volume_row(volume)?;
        if row.attached_from.is_none() {
            return Err(Error::Invalid {
                field: "volume",
                what: format!(
                    "{volume} is not an attachment of a multiattach volume; \
                     it stays when it is detached (stratablk volume delete removes it)"
                ),
            });
        }
        match keep_as {
            None => {
                self.check_no_snapshots(volume)?;
                self.delete_volume_in_command(volume)
            }
            Some(name) => self.keep_attachment(&row, name),
        }
    }

    /// Refuses an attachment that has snapshots, as `take_attachment` does that is not to keep it: who took them did not mean
    /// them to go with it.
    ///
    /// # Errors
    /// `Busy`.
    pub fn check_no_snapshots(&self, volume: &str) -> Result<()> {
        let inner = self.inner();
        let snapshots = inner.catalog.state().snapshots_of(volume);
        let names: Vec<String> = (snapshots.into_iter())
            .map(|row| format!("{volume}@{}", row.name))
            .collect();
        if names.is_empty() {
            return Ok(());
        }
        Err(Error::Busy {
            what: format!(
                "volume {volume:?} has snapshots, which would go with it ({}); delete them first \
                 (stratablk snapshot delete {volume} NAME), or keep it with them as a volume of its own \
                 (stratablk volume detach {volume} --keep-as NAME)",
                names.join(", ")
            ),
        })
    }

    /// Makes an attachment a volume of its own.
    fn keep_attachment(&self, row: &VolumeRow, name: &str) -> Result<()> {
        names::check("keep_as", name)?;
        if row.attachment.is_some() {
            return Err(Error::Busy {
                what: format!(
                    "volume {:?} is attached; detach it first (stratablk volume detach {})",
                    row.name, row.name
                ),
            });
        }
        self.check_idle(&row.name)?;
        self.flush_idle(row)?;
        let mut changes = Vec::new();
        if name == row.name {
            changes.push(Change::SetAttachedFrom {
                volume: name.to_owned(),
                from: None,
            });
        } else {
            let inner = self.inner();
            let state = inner.catalog.state();
            if state.volumes.contains_key(name) {
                return Err(exists(name));
            }
            let mut kept = Vec::new();
            for snapshot in state.snapshots_of(&row.name) {
                changes.push(Change::RemoveSnapshot {
                    volume: snapshot.volume.clone(),
                    name: snapshot.name.clone(),
                });
                let mut snapshot = snapshot.clone();
                name.clone_into(&mut snapshot.volume);
                kept.push(Change::AddSnapshot(snapshot));
            }
            changes.push(Change::RemoveVolume(row.name.clone()));
            changes.push(Change::AddVolume(VolumeRow {
                name: name.to_owned(),
                attached_from: None,
                ..row.clone()
            }));
            changes.extend(kept);
        }
        if name == row.name {
            return self.commit_idle(&[name], &changes, &[]);
        }
        // DURABILITY: the maps have the new name first. The old one may be given to another attachment from the commit on,
        // and no two layers may say that they are the same volume.
        self.close_volume(&row.name)?;
        if self.inner().open.contains_key(&row.name) {
            return Err(Error::Busy {
                what: format!("volume {:?} is in use", row.name),
            });
        }
        let kept = self
            .rename_in_maps(row.active, &row.name, name, Order::ActiveFirst)
            .and_then(|()| self.commit_idle(&[row.name.as_str()], &changes, &[]));
        if kept.is_err()
            && let Err(error) = self.rename_in_maps(row.active, name, &row.name, Order::ActiveLast)
        {
            self.maintenance.note(format!(
                "volume {:?}: its maps may have the name {name:?} from now on: {error}",
                row.name
            ));
        }
        kept
    }

    /// Gives the maps of attachments their name back that was to be another one when the daemon died. One header is read for
    /// each attachment there is.
    pub(crate) fn undo_half_kept(&self) {
        let attachments: Vec<VolumeRow> = {
            let inner = self.inner();
            let volumes = inner.catalog.state().volumes.values();
            let taken = volumes.filter(|row| row.attached_from.is_some());
            taken.cloned().collect()
        };
        for row in attachments {
            let undone = MapFile::read_header(&self.media, row.active).and_then(|header| {
                if header.volume == row.name {
                    return Ok(());
                }
                self.rename_in_maps(row.active, &header.volume, &row.name, Order::ActiveLast)
            });
            if let Err(error) = undone {
                self.maintenance.note(format!(
                    "volume {:?}: the maps of its layers may have another name: {error}",
                    row.name
                ));
            }
        }
    }

    /// The first name of the kind NAME-1 that no volume has.
    fn free_name(&self, volume: &str) -> String {
        let inner = self.inner();
        let volumes = &inner.catalog.state().volumes;
        let mut names = (1u64..).map(|number| format!("{volume}-{number}"));
        // There are fewer volumes than numbers.
        names
            .find(|name| !volumes.contains_key(name))
            .unwrap_or_default()
    }
}

/// The name of a volume is taken.
fn exists(name: &str) -> Error {
    Error::Exists {
        kind: "volume",
        name: name.to_owned(),
    }
}
