//! What happens to the writes of a volume: its type, and the reset of an immutable volume when its machine starts.
//!
//! DURABILITY: of a change of type and of a reset alike:
//! 1. what is to be sealed is flushed; the files of the new active layer are written and synced, with their directory;
//! 2. one catalog transaction makes it active, says the new type and whether the volume is armed, and dooms the old active
//!    layer (a reset) or marks it as sealing (a change of type);
//! 3. the old layer is sealed or removed, as after a restore.
//!
//! Where the active layer stays, its map gets the new type, for a catalog that is made anew from the maps: before 2 if the
//! volume will no longer start from the layer below, since a new catalog must not throw away what stays, else after it. A crash
//! in between leaves the old type or the new one in the map until the layer is next opened.
//!
//! A crash before 2 leaves an empty layer that the next start removes; after it the next start does 3. A volume is disarmed
//! in the transaction that throws its content away, so that a start that was interrupted is no second one.

use std::sync::Weak;

use crate::catalog::{CatalogState, Change, LayerState, VolumeKind, VolumeRow};
use crate::error::{Error, Result};
use crate::mapfile::{MapFile, MapHeader};
use crate::store::Store;
use crate::units::LayerId;

use super::collect::{content, jobs_on};
use super::create::Made;
use super::idle::{Replaced, with_parents};

impl Store {
    /// Gives a volume another type. What it holds now becomes what an immutable or multiattach volume starts from.
    ///
    /// # Errors
    /// `NotFound`; `Busy` while it is open; `Invalid` if it has attachments of its own.
    pub fn set_kind(&self, volume: &str, kind: VolumeKind) -> Result<()> {
        let _command = self.command();
        let row = self.volume_row(volume)?;
        if row.kind == kind {
            return Ok(());
        }
        self.check_new_kind(&row, kind)?;
        self.check_idle(volume)?;
        let touched = self.touched_by(&row);
        let mut made = Made::default();
        if let Err(error) = self.change_kind(&row, kind, &mut made) {
            self.unmake(&made);
            return Err(error);
        }
        self.seal_idle(&[row.active]);
        self.collect_after(&touched);
        Ok(())
    }

    /// Throws away what an immutable volume took since it was reset last, if it is armed, and disarms it: a machine starts.
    /// Does nothing to volumes of other types. Crash-safe: the old or the new content, whole. Returns whether it was reset.
    ///
    /// # Errors
    /// `NotFound`; `Busy` while it is open; `Io`.
    pub fn machine_starts(&self, volume: &str) -> Result<bool> {
        let _command = self.command();
        let row = self.volume_row(volume)?;
        if row.kind != VolumeKind::Immutable || !row.armed {
            return Ok(false);
        }
        self.check_idle(volume)?;
        let disarm = Change::SetArmed {
            volume: volume.to_owned(),
            armed: false,
        };
        if self.active_is_empty(&row)? {
            self.inner().catalog.commit(&[disarm])?;
            return Ok(false);
        }
        let parent = self.sealed_content(&row)?;
        self.check_base_of(parent)?;
        self.flush_below(&row)?;
        let touched = self.touched_by(&row);
        let mut made = Made::default();
        let mut changes = vec![disarm];
        let discarded = Replaced::Discarded;
        let reset = self
            .replace_active(&row, parent, row.size, discarded, &mut made, &mut changes)
            .and_then(|()| self.commit_idle(&[volume], &changes, &[row.active]));
        if let Err(error) = reset {
            self.unmake(&made);
            return Err(error);
        }
        self.collect_after(&touched);
        Ok(true)
    }

    /// Arms or disarms an immutable volume: whether the next start of a machine resets it. Durable on return. Does nothing to
    /// volumes of other types.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn arm(&self, volume: &str, armed: bool) -> Result<()> {
        let _command = self.command();
        let row = self.volume_row(volume)?;
        if row.kind != VolumeKind::Immutable || row.armed == armed {
            return Ok(());
        }
        let change = Change::SetArmed {
            volume: volume.to_owned(),
            armed,
        };
        self.inner().catalog.commit(&[change])
    }

    /// Refuses a change of type that would break what others rely on.
    fn check_new_kind(&self, row: &VolumeRow, kind: VolumeKind) -> Result<()> {
        let name = &row.name;
        if let Some(from) = &row.attached_from {
            return Err(Error::Invalid {
                field: "kind",
                what: format!(
                    "{name} is an attachment of {from}; keep it as a volume of its own first \
                     (stratablk volume detach {name} --keep-as NAME)"
                ),
            });
        }
        let inner = self.inner();
        let attachments = attachment_names(inner.catalog.state(), name);
        if !attachments.is_empty() {
            return Err(Error::Invalid {
                field: "kind",
                what: format!("{name} has attachments ({attachments}); detach them first"),
            });
        }
        if kind == VolumeKind::Multiattach && row.attachment.is_some() {
            return Err(Error::Busy {
                what: format!(
                    "volume {name:?} is attached, and a multiattach volume takes no requests itself; detach it first \
                     (stratablk volume detach {name})"
                ),
            });
        }
        Ok(())
    }

    /// What a command touches that puts another layer in the place of a volume's active one.
    fn touched_by(&self, row: &VolumeRow) -> Vec<LayerId> {
        let inner = self.inner();
        with_parents(inner.catalog.state(), std::iter::once(row.active))
    }

    /// Steps 1 and 2 of a change of type.
    fn change_kind(&self, row: &VolumeRow, kind: VolumeKind, made: &mut Made) -> Result<()> {
        let mut changes = Vec::new();
        let replaced = starts_anew(kind) && !self.is_content_already(row)?;
        if replaced {
            self.flush_idle(row)?;
            let sealed = Replaced::Sealed;
            let new = VolumeRow {
                kind,
                ..row.clone()
            };
            self.replace_active(&new, row.active, row.size, sealed, made, &mut changes)?;
        }
        // Only an immutable volume can be armed, at every step.
        let kind_change = Change::SetKind {
            volume: row.name.clone(),
            kind,
        };
        let armed = kind == VolumeKind::Immutable;
        let arm_change = (row.armed != armed).then(|| Change::SetArmed {
            volume: row.name.clone(),
            armed,
        });
        if armed {
            changes.push(kind_change);
            changes.extend(arm_change);
        } else {
            changes.extend(arm_change);
            changes.push(kind_change);
        }
        if !replaced && !starts_anew(kind) {
            self.flush_idle(row)?;
            self.close_volume(&row.name)?;
            self.write_kind(row.active, kind)?;
        }
        self.commit_idle_flushed(row, &changes)?;
        if !replaced
            && starts_anew(kind)
            && let Err(error) = self.write_kind(row.active, kind)
        {
            self.maintenance.note(format!(
                "volume {:?}: its map has the new type only when it is next opened: {error}",
                row.name
            ));
        }
        Ok(())
    }

    /// Lets the map of an active layer, whose volume is closed and flushed, say the type of its volume.
    fn write_kind(&self, layer: LayerId, kind: VolumeKind) -> Result<()> {
        let known = self.inner().layers.get(&layer).and_then(Weak::upgrade);
        if let Some(known) = known {
            // Somebody still has it open: its map says so when it is next replaced.
            let mut header = MapHeader::clone(&known.header());
            header.volume_kind = kind;
            known.set_header(header);
            return Ok(());
        }
        let (map, mut header, set, _) = MapFile::open(&self.media, layer)?;
        if header.volume_kind != kind {
            header.volume_kind = kind;
            map.replace(&self.media, &header, &set)?;
        }
        Ok(())
    }

    /// Commits changes after which the volume holds what it held: it is closed with all it took in its files.
    fn commit_idle_flushed(&self, row: &VolumeRow, changes: &[Change]) -> Result<()> {
        self.flush_idle(row)?;
        self.commit_idle(&[row.name.as_str()], changes, &[])
    }

    /// Whether all that a volume holds is in the layer below its active one: then it can start from that as it is.
    fn is_content_already(&self, row: &VolumeRow) -> Result<bool> {
        Ok(self.active_is_empty(row)? && self.sealed_below(row).is_some())
    }

    /// The layer below the active one of a volume, if it is sealed and of the same size, and no job is about to take it away.
    pub(crate) fn sealed_below(&self, row: &VolumeRow) -> Option<LayerId> {
        let inner = self.inner();
        let state = inner.catalog.state();
        let parent = state.layers.get(&row.active)?.parent?;
        let below = state.layers.get(&parent)?;
        let stays = below.state == LayerState::Sealed && jobs_on(state, parent).is_empty();
        (stays && below.size == row.size).then_some(parent)
    }

    /// The layer that an immutable or multiattach volume starts from.
    pub(crate) fn sealed_content(&self, row: &VolumeRow) -> Result<LayerId> {
        let inner = self.inner();
        let state = inner.catalog.state();
        let layer = content(state, row).and_then(|id| state.layers.get(&id));
        match layer {
            Some(layer) if layer.state == LayerState::Sealed => Ok(layer.id),
            _ => Err(Error::Busy {
                what: format!(
                    "what volume {:?} starts from was never completed, since writing it failed; \
                     restart the daemon, which completes it",
                    row.name
                ),
            }),
        }
    }
}

/// Whether a volume of this type starts from the layer below its active one again and again.
pub(crate) fn starts_anew(kind: VolumeKind) -> bool {
    matches!(kind, VolumeKind::Immutable | VolumeKind::Multiattach)
}

/// The attachments of a multiattach volume, for people; empty if there are none.
pub(crate) fn attachment_names(state: &CatalogState, volume: &str) -> String {
    let names: Vec<&str> = state
        .attachments_of(volume)
        .map(|row| row.name.as_str())
        .collect();
    names.join(", ")
}
