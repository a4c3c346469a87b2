//! Snapshots: of one volume or of a group, at one instant, stopping nobody.
//!
//! DURABILITY, in this order:
//! 1. the files of the new active layers are written and synced, with their directories;
//! 2. one catalog transaction names the new layers, makes them active, marks the old ones as sealing and adds the
//!    snapshots: from here on the snapshots exist, whole, whatever happens;
//! 3. the new chains are published and the clock is advanced: the instant;
//! 4. when no worker has a change of an older generation under way any more, each old layer is synced (by who leads the
//!    flushes of its volume meanwhile: a failed sync may be reported to one of two callers only, so no two may run at
//!    once), and then its map is written as one checkpoint (a new file that takes the old one's name);
//! 5. the catalog marks them sealed, and the command is acknowledged.
//!
//! A crash between 2 and 5 leaves layers in the state Sealing, which the next start completes from what is durable. That
//! is sound because a flush covers all unsealed layers of a chain, oldest first, so nothing newer is durable and
//! acknowledged without them.
//!
//! The same without a name seals what a volume holds for a clone of it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::catalog::{Change, LayerState, SnapshotRow, VolumeKind, VolumeRow};
use crate::error::{Error, Result};
use crate::layer::{Layer, LayerMap};
use crate::mapfile::{MapFile, ReplaceError};
use crate::store::{Selection, SnapshotReport, Store, now_ns};
use crate::units::{Generation, LayerId};
use crate::volume::Volume;

use super::create::Made;
use super::groups;
use super::names;

/// A snapshot after its instant, whose old layers may still be changed by requests under way.
#[derive(Debug)]
#[must_use = "a snapshot is acknowledged only by `Store::finish_snapshot`"]
pub struct PendingSnapshot {
    /// The first generation after the instant.
    generation: Generation,
    /// The volumes of the group.
    members: Vec<Member>,
    /// The new catalog rows.
    rows: Vec<SnapshotRow>,
    /// When the command began.
    began: Instant,
}

/// A volume of a group.
#[derive(Debug)]
struct Member {
    /// The volume.
    volume: Arc<Volume>,
    /// Its layers to seal, oldest first: the one that was active, and those that an earlier snapshot of a group could not
    /// seal.
    layers: Vec<Arc<Layer>>,
    /// Whether their data was synced (or the volume has failed).
    synced: bool,
    /// Why their data could not be written, where that harms nothing but the snapshot.
    full_disk: Option<Error>,
}

impl Store {
    /// Takes a snapshot of one or more volumes at one instant, while guests run. Whole and durable on return.
    ///
    /// # Errors
    /// `Invalid`, `NotFound`, `Exists`, `Failed`, `Io`. After an error the snapshot is on none of its volumes. (If the error
    /// is that the catalog cannot be written any more it may be there, whole.)
    pub fn snapshot(&self, name: &str, selection: &Selection) -> Result<SnapshotReport> {
        let _command = self.command();
        let pending = self.begin_snapshot_in_command(name, selection)?;
        // Layers that an earlier snapshot could not seal, and that nobody names, can be joined once they are sealed.
        let late: Vec<LayerId> = (pending.members.iter())
            .filter(|member| member.layers.len() > 1)
            .flat_map(|member| member.layers.iter().map(|layer| layer.id()))
            .collect();
        let report = self.end_snapshot(pending);
        self.collect_after(&late);
        report
    }

    /// Seals what a volume holds now, while guests run, without a name for it.
    pub(crate) fn seal_running(&self, row: &VolumeRow) -> Result<()> {
        let pending = self.begin_sealing(None, std::slice::from_ref(row))?;
        self.end_snapshot(pending).map(drop)
    }

    /// Waits until no request of before a generation can change a layer any more. Nobody waits for this but the caller of a
    /// command, who must not lead flushes.
    pub(crate) fn drain_changes(&self, generation: Generation) {
        let mut pause = Duration::from_micros(20);
        while !self.clock.quiescent(generation) {
            if !self.media.go_on() {
                std::thread::sleep(pause);
            }
            pause = (pause * 2).min(Duration::from_millis(2));
        }
    }

    /// The rest of a snapshot after its instant, by a caller whom nobody waits for but its own.
    fn end_snapshot(&self, mut pending: PendingSnapshot) -> Result<SnapshotReport> {
        self.drain_changes(pending.generation);
        for member in &mut pending.members {
            member.volume.lead_blocking();
            self.sync_member(member);
            member.volume.flushes().finish_blocking();
        }
        self.finish_snapshot(pending)
    }

    /// The first part of a snapshot, up to the instant, for callers that drive queue contexts on the same thread. They go on
    /// with `sync_snapshot` once `snapshot_drained` says so, then with `finish_snapshot`, and call no other command before.
    ///
    /// # Errors
    /// As `snapshot`.
    pub fn begin_snapshot(&self, name: &str, selection: &Selection) -> Result<PendingSnapshot> {
        let _command = self.command();
        self.begin_snapshot_in_command(name, selection)
    }

    /// Whether no request of before the instant can change the old layers any more.
    pub fn snapshot_drained(&self, pending: &PendingSnapshot) -> bool {
        self.clock.quiescent(pending.generation)
    }

    /// Syncs the old layers, as far as no flush of their volume is under way. Returns whether all are done; a failure is
    /// latched in its volume and reported by `finish_snapshot`.
    pub fn sync_snapshot(&self, pending: &mut PendingSnapshot) -> bool {
        for member in pending.members.iter_mut().filter(|member| !member.synced) {
            if member.volume.flushes().try_lead() {
                self.sync_member(member);
                member.volume.flushes().finish_blocking();
            }
        }
        pending.members.iter().all(|member| member.synced)
    }

    /// Syncs the old layers of a volume. The caller leads its flushes, and gives the lead back only after a failure is
    /// latched.
    fn sync_member(&self, member: &mut Member) {
        // Nobody writes to these layers any more: what is written back now is all there is. A fill may have changed a frame
        // meanwhile, which is then still dirty; the layer must not be sealed so, since nobody would clean it any more. Each
        // round takes another fill of the same cluster, so there are few.
        let mut written = member.volume.check_failure();
        loop {
            written = written.and_then(|()| {
                let works = crate::flush::look(member.layers.iter(), usize::MAX);
                member.volume.carry_out(&works, true)
            });
            if written.is_err() || !member.layers.iter().any(|layer| layer.has_marks()) {
                break;
            }
        }
        match written {
            Ok(()) => {}
            // Nothing is lost: the layers stay unsealed, and the snapshot is taken back.
            Err(error @ Error::Io { .. }) => member.full_disk = Some(error),
            // Latched in the volume.
            Err(_) => {}
        }
        member.synced = true;
    }

    /// Steps 1 to 3.
    fn begin_snapshot_in_command(
        &self,
        name: &str,
        selection: &Selection,
    ) -> Result<PendingSnapshot> {
        names::check("snapshot", name)?;
        let volumes = self.select(name, selection)?;
        self.begin_sealing(Some(name), &volumes)
    }

    /// Steps 1 to 3 for these volumes; without a name the layers are sealed and no snapshot is added.
    fn begin_sealing(&self, name: Option<&str>, volumes: &[VolumeRow]) -> Result<PendingSnapshot> {
        let began = Instant::now();
        let mut open = Vec::with_capacity(volumes.len());
        for row in volumes {
            let volume = self.open_volume_in_command(&row.name)?;
            volume.check_failure()?;
            // Before anything is made: once the catalog knows the new layers they must fit.
            volume.newest_chain().next_slot()?;
            volume.take_stall();
            open.push(volume);
        }
        let mut made = Made::default();
        let committed = self.commit_snapshot(name, volumes, &mut made);
        let (rows, actives) = match committed {
            Ok(done) => done,
            Err(error) => {
                self.unmake(&made);
                return Err(error);
            }
        };
        let generation = Generation(self.clock.now().0 + 1);
        let mut members = Vec::with_capacity(open.len());
        for (volume, active) in open.into_iter().zip(actives) {
            let chain = volume.newest_chain();
            let unsealed = chain.unsealed().filter(|layer| !layer.is_sealed());
            members.push(Member {
                volume: Arc::clone(&volume),
                layers: unsealed.cloned().collect(),
                synced: false,
                full_disk: None,
            });
            self.inner()
                .layers
                .insert(active.id(), Arc::downgrade(&active));
            volume.publish(chain.with_active(generation, active)?);
        }
        let reached = self.clock.advance();
        debug_assert_eq!(reached, generation);
        Ok(PendingSnapshot {
            generation,
            members,
            rows,
            began,
        })
    }

    /// As `sync_snapshot`, waiting for the flushes under way.
    pub(crate) fn sync_snapshot_blocking(&self, pending: &mut PendingSnapshot) {
        for member in pending.members.iter_mut().filter(|member| !member.synced) {
            member.volume.lead_blocking();
            self.sync_member(member);
            member.volume.flushes().finish_blocking();
        }
    }

    /// Step 3 of a snapshot without a name of one volume, whose new active layer the catalog knows already. The caller holds
    /// the command lock.
    pub(crate) fn begin_unnamed(&self, volume: &Volume, active: Arc<Layer>) -> Result<Generation> {
        let generation = Generation(self.clock.now().0 + 1);
        let chain = volume.newest_chain();
        self.inner()
            .layers
            .insert(active.id(), Arc::downgrade(&active));
        let next = chain.with_active(generation, active)?;
        volume.publish(next);
        let reached = self.clock.advance();
        debug_assert_eq!(reached, generation);
        Ok(generation)
    }

    /// The rest of a snapshot without a name, whose instant was `generation`: all layers of the volume up to `top`, which was
    /// active until then, are to be sealed.
    pub(crate) fn pending_unnamed(
        &self,
        volume: Arc<Volume>,
        generation: Generation,
        top: LayerId,
    ) -> PendingSnapshot {
        let chain = volume.newest_chain();
        // None if a snapshot has come in between and has sealed it: what is unsealed then is newer.
        let last = chain.unsealed().position(|layer| layer.id() == top);
        let older = chain.unsealed().take(last.map_or(0, |last| last + 1));
        let layers = older.filter(|layer| !layer.is_sealed()).cloned().collect();
        let member = Member {
            volume,
            layers,
            synced: false,
            full_disk: None,
        };
        PendingSnapshot {
            generation,
            members: vec![member],
            rows: Vec::new(),
            began: Instant::now(),
        }
    }

    /// Steps 4 and 5, and the report.
    ///
    /// # Errors
    /// `Failed` or `Io` if a layer could not be sealed: the snapshot is taken back.
    pub fn finish_snapshot(&self, mut pending: PendingSnapshot) -> Result<SnapshotReport> {
        debug_assert!(self.snapshot_drained(&pending));
        debug_assert!(pending.members.iter().all(|member| member.synced));
        let mut bytes_written = 0;
        let mut changes = Vec::new();
        let mut failure = None;
        for member in &mut pending.members {
            if let Some(error) = member.full_disk.take() {
                failure.get_or_insert(error);
                continue;
            }
            for layer in &member.layers {
                match self.seal(&member.volume, layer) {
                    Ok(bytes) => bytes_written += bytes,
                    Err(error) => {
                        // The other volumes of the group get as far as they can; this one's newer layers would be of
                        // no use without this.
                        failure.get_or_insert(error);
                        break;
                    }
                }
                // Another snapshot may have come in between, or the beginning of a merge.
                if self.is_sealing(layer.id()) {
                    changes.push(Change::SetLayerState {
                        layer: layer.id(),
                        state: LayerState::Sealed,
                    });
                }
            }
        }
        if failure.is_some() {
            // All or nothing: the names go. The layers stay where they are, unnamed.
            changes.extend(pending.rows.iter().map(|row| Change::RemoveSnapshot {
                volume: row.volume.clone(),
                name: row.name.clone(),
            }));
        }
        self.inner().catalog.commit(&changes)?;
        let sealed = changes.iter().filter_map(|change| match change {
            Change::SetLayerState { layer, .. } => Some(*layer),
            _ => None,
        });
        self.want_sums(sealed);
        for member in &pending.members {
            member.volume.settle();
        }
        // Workers look at the chain when the clock has changed: from here on they know the old layers as sealed.
        self.clock.advance();
        if let Some(error) = failure {
            return Err(error);
        }
        let stalls = pending
            .members
            .iter()
            .map(|member| member.volume.take_stall());
        Ok(SnapshotReport {
            stall_max: stalls.max().unwrap_or_default(),
            snapshots: pending
                .rows
                .iter()
                .map(|row| self.describe_snapshot(row))
                .collect(),
            elapsed: pending.began.elapsed(),
            bytes_written,
        })
    }

    /// Whether the catalog waits for a layer to be sealed.
    fn is_sealing(&self, layer: LayerId) -> bool {
        let inner = self.inner();
        let row = inner.catalog.state().layers.get(&layer);
        row.is_some_and(|row| row.state == LayerState::Sealing)
    }

    /// The volumes to take a snapshot of, each once.
    fn select(&self, name: &str, selection: &Selection) -> Result<Vec<VolumeRow>> {
        let inner = self.inner();
        let state = inner.catalog.state();
        let rows: Vec<VolumeRow> = match selection {
            Selection::All => state
                .volumes
                .values()
                .filter(|row| left_out(row.kind).is_none())
                .cloned()
                .collect(),
            Selection::Volumes(names) => {
                let names: BTreeSet<&String> = names.iter().collect();
                names
                    .into_iter()
                    .map(|volume| state.volume(volume).cloned())
                    .collect::<Result<_>>()?
            }
        };
        if rows.is_empty() {
            let what = if state.volumes.is_empty() {
                "there is no volume to take a snapshot of; name one or create one first"
            } else {
                "all volumes are of types that snapshots leave out (immutable, writethrough, readonly, multiattach); change \
                 the type of one first (stratablk volume set, with --type normal)"
            };
            return Err(Error::Invalid {
                field: "volumes",
                what: what.into(),
            });
        }
        if let Some((row, why)) = rows
            .iter()
            .find_map(|row| left_out(row.kind).map(|why| (row, why)))
        {
            let name = &row.name;
            return Err(Error::Invalid {
                field: "volumes",
                what: format!(
                    "{name} is of type {why}; there is no snapshot of it: leave it out, or make it normal first, which \
                     keeps what it holds (stratablk volume set {name} --type normal)"
                ),
            });
        }
        let taken = rows.iter().find_map(|row| state.snapshot(&row.name, name));
        match taken {
            Some(has) => Err(Error::Exists {
                kind: "snapshot",
                name: format!("{}@{}", has.volume, has.name),
            }),
            None => Ok(rows),
        }
    }

    /// Steps 1 and 2: returns the new rows and the new active layers, in the order of `volumes`.
    fn commit_snapshot(
        &self,
        name: Option<&str>,
        volumes: &[VolumeRow],
        made: &mut Made,
    ) -> Result<(Vec<SnapshotRow>, Vec<Arc<Layer>>)> {
        let group = groups::name_of(self.media.fresh_id(), volumes.len());
        let created_ns = now_ns();
        let mut changes = Vec::new();
        let mut rows = Vec::new();
        let mut actives = Vec::new();
        for volume in volumes {
            let (active, layer_row) = self.make_active_layer(
                &volume.name,
                volume.kind,
                Some(volume.active),
                volume.size,
                made,
            )?;
            changes.push(Change::AddLayer(layer_row));
            changes.push(Change::SetLayerState {
                layer: volume.active,
                state: LayerState::Sealing,
            });
            changes.push(Change::SetActive {
                volume: volume.name.clone(),
                layer: active.id(),
            });
            if let Some(name) = name {
                let row = volume.to_snapshot(name, group, created_ns);
                changes.push(Change::AddSnapshot(row.clone()));
                rows.push(row);
            }
            actives.push(active);
        }
        self.inner().catalog.commit(&changes)?;
        Ok((rows, actives))
    }

    /// The second half of step 4 for one layer: returns the bytes of the map written. The layer is drained and its data
    /// synced: nothing changes it any more. Flushes of guests may append to its old map file at the same time; both
    /// descriptions are right.
    fn seal(&self, volume: &Volume, layer: &Layer) -> Result<u64> {
        let set = match &**layer.map() {
            LayerMap::Active(map) => map.to_set(),
            LayerMap::Sealed(_) => return Ok(0),
        };
        let header = self.sealed_header((*layer.header()).clone());
        let sealed = (|| {
            volume.check_failure().map_err(|error| ReplaceError {
                error,
                old_in_force: true,
            })?;
            let incarnation = layer.journal().as_ref().map_or(0, MapFile::incarnation);
            MapFile::succeed(&self.media, &header, incarnation, &set)
        })();
        match sealed {
            Ok(file) => {
                let bytes = file.file().len().unwrap_or(0);
                layer.set_header(header);
                layer.seal(set);
                Ok(bytes)
            }
            Err(failure) => {
                // With the old map in force nothing is lost: the layer stays unsealed, flushes go on covering it, and the
                // next snapshot or start seals it.
                if !failure.old_in_force {
                    let (layer, error) = (layer.id(), &failure.error);
                    volume.fail(&format!("sealing layer {layer} failed: {error}"));
                }
                Err(failure.error)
            }
        }
    }
}

/// Why snapshots leave out volumes of a type, if they do.
fn left_out(kind: VolumeKind) -> Option<&'static str> {
    match kind {
        VolumeKind::Normal => None,
        VolumeKind::Immutable => Some(
            "immutable, which starts from the same content each time; what it holds now goes at the next start",
        ),
        VolumeKind::Writethrough => Some("writethrough, which snapshots leave alone"),
        VolumeKind::Readonly => Some("readonly, which never changes"),
        VolumeKind::Multiattach => {
            Some("multiattach, which never changes (its attachments can have snapshots)")
        }
    }
}
