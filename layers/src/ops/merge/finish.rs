//! The end of a job.
//!
//! DURABILITY, in this order:
//! 1. (down) the lower layer's file gets a second name, that of the upper one's, which is empty by then and says nothing;
//! 2. the target's map is committed with its new parent (down: with all that the lower one holds). As long as the job's row
//!    exists that parent is accepted beside the one that the catalog names;
//! 3. one catalog transaction: the new parent, the layers that go, the end of the job;
//! 4. chains follow, the clock is advanced, and when nobody uses the old ones, frames, numbers and files go.
//!
//! A crash before 3 lets the job end once more; after it the catalog knows which files are doomed.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};

use crate::catalog::{CatalogState, Change, JobRow, LayerState, Way};
use crate::chain::Chain;
use crate::error::Result;
use crate::file::OpenMode;
use crate::layer::Layer;
use crate::lifecycle::Phase;
use crate::mapfile::{
    LayerKind, MapFile, MapHeader, RawBase, Successor, data_path, layer_dir, remove_file,
};
use crate::store::Store;
use crate::units::{Cluster, LayerId, LayerSlot};
use crate::volume::Volume;

use crate::ops::checkpoint::mark;

use super::down::{Down, sealed_set};
use super::gather::{Gather, Into, Stage};
use super::{Kind, Patience, Retiring, Runner, Step};

/// The name under which a file waits to take a layer's data's place.
const NEW_DATA: &str = "data.new";

impl Store {
    /// Ends a job that has nothing left to move.
    pub(super) fn finish_job(
        &self,
        runner: &mut Runner,
        row: &JobRow,
        kind: &mut Kind,
        patience: Patience,
    ) -> Result<Step> {
        let command = self.command();
        let step = match kind {
            Kind::Begin(_) => Step::Again,
            Kind::Gather(gather) => self.finish_gather(runner, row, gather, patience)?,
            Kind::Down(down) if down.is_base() => self.finish_base(row, down)?,
            Kind::Down(down) => self.finish_down(runner, row, down)?,
        };
        if step == Step::Finish {
            self.jobs.board().ended(row.id, Phase::Done);
            self.want_sums([row.source, row.target]);
            if let Err(error) = self.collect_unnamed() {
                self.maintenance
                    .note(format!("layers that nobody needs stay for now: {error}"));
            }
        }
        drop(command);
        Ok(step)
    }

    /// The end of a job that moved data up. The caller holds the command lock.
    fn finish_gather(
        &self,
        runner: &mut Runner,
        row: &JobRow,
        gather: &mut Gather,
        patience: Patience,
    ) -> Result<Step> {
        let state = match gather.into {
            Into::Active(_) => LayerState::Active,
            Into::Sealed(_) => LayerState::Sealed,
        };
        if !self.is_as_it_was(row, &gather.chain, state) {
            return Ok(Step::Again);
        }
        let parent = self.inner().catalog.state().parent_after(row);
        let target = Arc::clone(&gather.target);
        let below: Vec<LayerId> = gather.chain.iter().skip(1).copied().collect();
        if let Stage::Leave(_) = gather.phase {
            self.commit_end(row, parent, &[])?;
            self.leave(target.id(), &below);
            self.close_unused(gather);
            return Ok(Step::Finish);
        }
        let mut header = MapHeader::clone(&target.header());
        header.parent = parent;
        match &mut gather.into {
            Into::Sealed(sealed) => {
                sealed.header.parent = parent;
                let set = sealed_set(&target);
                let map = MapFile::succeed(&self.media, &sealed.header, sealed.incarnation, &set)?;
                sealed.incarnation = map.incarnation();
                target.set_header(sealed.header.clone());
            }
            Into::Active(volume) => {
                let Some(volume) = volume.upgrade() else {
                    return Ok(Step::Again);
                };
                if !self.renew_map(&volume, &target, header, patience)? {
                    return Ok(Step::Waits);
                }
            }
        }
        if row.way == Way::Copy {
            // The sources stay as long as they are needed, and the first to look whether they are must find them unused.
            self.leave(target.id(), &below);
            gather.phase = Stage::Leave(self.clock.advance());
            return Ok(Step::Moved(0));
        }
        self.commit_end(row, parent, &below)?;
        self.leave(target.id(), &below);
        self.retire_later(runner, &below);
        self.close_unused(gather);
        Ok(Step::Finish)
    }

    /// Gives the active layer of a volume a map of all that it holds. Returns `false` if it could not lead the flushes.
    fn renew_map(
        &self,
        volume: &Volume,
        target: &Layer,
        header: MapHeader,
        patience: Patience,
    ) -> Result<bool> {
        let Some(mark) = patience.led(volume, || mark(target))? else {
            return Ok(false);
        };
        let next = Successor::write(&self.media, &header, mark)?;
        // By itself, so that flushes of guests come in between and little is left for the last one.
        if patience.led(volume, || Ok(()))?.is_none() {
            return Ok(false);
        }
        let renewed = patience.led(volume, || {
            let why = "the end of a merge failed";
            self.put_in_force(volume, target, next, std::iter::empty(), why)?;
            target.set_header(header);
            Ok(())
        })?;
        Ok(renewed.is_some())
    }

    /// Takes layers out of all chains of open volumes over a layer that holds what they hold.
    fn leave(&self, target: LayerId, gone: &[LayerId]) {
        for volume in self.volumes_over(target) {
            let next = volume.newest_chain().without(gone);
            debug_assert!(leads_to_all(&volume, &next), "a word names {gone:?}");
            volume.exchange(next);
        }
    }

    /// Closes the volume of a job's target if nobody else uses it.
    fn close_unused(&self, gather: &Gather) {
        let Into::Active(volume) = &gather.into else {
            return;
        };
        let Some(volume) = volume.upgrade() else {
            return;
        };
        let name = volume.name().to_owned();
        let unused = {
            let _write_back = self.write_back.hold();
            // The store's and this one.
            Arc::strong_count(&volume) <= 2
        };
        drop(volume);
        if unused && let Err(error) = self.close_volume(&name) {
            self.maintenance
                .note(format!("volume {name}: stays open: {error}"));
        }
    }

    /// The end of a job that moved data down. The caller holds the command lock.
    fn finish_down(&self, runner: &mut Runner, row: &JobRow, down: &mut Down) -> Result<Step> {
        let chain = down.chain();
        if !self.is_as_it_was(row, &chain, LayerState::Sealed) {
            return Ok(Step::Again);
        }
        let [upper, lower] = chain;
        let parent = self.inner().catalog.state().parent_after(row);
        if down.upper.header.parent == Some(lower) {
            self.exchange_names(upper, lower)?;
            down.upper.header.parent = parent;
            let set = sealed_set(&down.lower.layer);
            let map = MapFile::succeed(
                &self.media,
                &down.upper.header,
                down.upper.incarnation,
                &set,
            )
            .inspect_err(|_| down.upper.header.parent = Some(lower))?;
            down.upper.incarnation = map.incarnation();
        }
        // As it was loaded after a crash at this place, or as it was before: then it holds nothing.
        let known = sealed_set(&down.upper.layer);
        let as_it_is = known.data_sectors() > 0 || known.zero_sectors() > 0;
        let layer = if as_it_is {
            Arc::clone(&down.upper.layer)
        } else {
            self.taken_over(down)?
        };
        self.commit_end(row, parent, &[lower])?;
        self.inner().layers.insert(upper, Arc::downgrade(&layer));
        for volume in self.volumes_over(upper) {
            let newest = volume.newest_chain();
            let next = match newest.slot_of(lower) {
                Some(slot) if !as_it_is => {
                    // Words lead to the lower one's place, whose file it has.
                    newest.without(&[upper]).with_replaced(slot, &layer)
                }
                _ => newest.without(&[lower]),
            };
            debug_assert!(leads_to_all(&volume, &next), "a word names {chain:?}");
            volume.exchange(next);
        }
        self.retire_later(runner, &[lower]);
        Ok(Step::Finish)
    }

    /// The upper layer with the lower one's file, for all that open it from here on.
    fn taken_over(&self, down: &Down) -> Result<Arc<Layer>> {
        let path = data_path(down.upper.layer.id());
        let data = self
            .media
            .open(&path, OpenMode::ReadOnly, self.options.direct_io)
            .map_err(self.io("open", &path))?;
        let set = sealed_set(&down.lower.layer);
        let number = down.upper.layer.number();
        let header = down.upper.header.clone();
        Ok(Arc::new(Layer::sealed(header, number, data, set)))
    }

    /// Step 1 of the way down.
    fn exchange_names(&self, upper: LayerId, lower: LayerId) -> Result<()> {
        let new = layer_dir(upper).join(NEW_DATA);
        remove_file(&self.media, &new)?;
        self.media
            .link(&data_path(lower), &new)
            .map_err(self.io("link", &new))?;
        self.media
            .rename(&new, &data_path(upper))
            .map_err(self.io("rename", &new))?;
        // Two names of one file are not renamed over each other: if it was so already, one is left over.
        remove_file(&self.media, &new)?;
        let dir = layer_dir(upper);
        self.media.sync_dir(&dir).map_err(self.io("sync", &dir))
    }

    /// The end of a job that moved data into a user's file. The caller holds the command lock.
    fn finish_base(&self, row: &JobRow, down: &mut Down) -> Result<Step> {
        if !self.is_as_it_was(row, &down.chain(), LayerState::Sealed) {
            return Ok(Step::Again);
        }
        let LayerKind::RawBase(base) = &down.lower.header.kind else {
            return Ok(Step::Again);
        };
        let stat = self
            .media
            .stat(&base.path)
            .map_err(self.io("stat", &base.path))?;
        let base = RawBase {
            path: base.path.clone(),
            len: stat.len,
            mtime_ns: stat.mtime_ns,
        };
        down.lower.header.kind = LayerKind::RawBase(base.clone());
        let lower = &mut down.lower;
        let set = sealed_set(&lower.layer);
        let map = MapFile::succeed(&self.media, &lower.header, lower.incarnation, &set)?;
        lower.incarnation = map.incarnation();
        lower.layer.set_header(lower.header.clone());
        self.inner().catalog.commit(&[
            Change::SetBase {
                layer: row.source,
                base,
            },
            Change::RemoveJob(row.id),
        ])?;
        self.share_base_again(row.source);
        Ok(Step::Finish)
    }

    /// A job that wrote to a base, or was to, is over: others may use it again.
    pub(crate) fn share_base_again(&self, base: LayerId) {
        let known = self.inner().layers.get(&base).and_then(Weak::upgrade);
        if let Some(Err(error)) = known.map(|layer| layer.data().lock(false)) {
            self.maintenance
                .note(format!("base of layer {base}: it stays locked: {error}"));
        }
    }

    /// Step 3.
    fn commit_end(&self, row: &JobRow, parent: Option<LayerId>, gone: &[LayerId]) -> Result<()> {
        let mut inner = self.inner();
        let mut changes = vec![Change::SetParent {
            layer: row.target,
            parent,
        }];
        changes.extend(moved_jobs(inner.catalog.state(), row, parent, gone));
        let (cut_off, longer): (Vec<_>, Vec<_>) =
            (cut_off_jobs(inner.catalog.state(), row, parent, gone).into_iter())
                .partition(|job| job.target == row.target);
        changes.extend(cut_off.iter().map(|job| Change::RemoveJob(job.id)));
        changes.extend(longer.iter().map(|job| Change::MoveJob {
            id: job.id,
            source: row.target,
            target: job.target,
        }));
        changes.extend(gone.iter().map(|layer| Change::RemoveLayer(*layer)));
        changes.push(Change::RemoveJob(row.id));
        // Before anybody can find them doomed.
        self.jobs.board().retiring.extend(gone);
        inner.catalog.commit(&changes).inspect_err(|_| {
            let mut board = self.jobs.board();
            board.retiring.retain(|layer| !gone.contains(layer));
        })?;
        let mut board = self.jobs.board();
        for job in &cut_off {
            board.ended_row(job, Phase::Cancelled);
        }
        Ok(())
    }

    /// Lets layers go that left their chains, as soon as nobody uses them any more.
    fn retire_later(&self, runner: &mut Runner, layers: &[LayerId]) {
        let generation = self.clock.advance();
        if !layers.is_empty() {
            runner.retiring.push(Retiring {
                generation,
                layers: layers.to_vec(),
            });
        }
    }

    /// Removes what is left of layers that nobody uses any more. Returns whether there were any.
    pub(super) fn retire(&self, runner: &mut Runner) -> bool {
        let over = |retiring: &Retiring| self.clock.quiescent_for_reads(retiring.generation);
        let Some(at) = runner.retiring.iter().position(over) else {
            return false;
        };
        let _command = self.command();
        let retiring = runner.retiring.swap_remove(at);
        self.inner().forget_unused_layers();
        {
            let mut board = self.jobs.board();
            board
                .retiring
                .retain(|layer| !retiring.layers.contains(layer));
        }
        self.remove_doomed();
        true
    }
}

/// Whether every word of a volume's table names a layer of this chain, or none.
fn leads_to_all(volume: &Volume, chain: &Chain) -> bool {
    let table = volume.table();
    table
        .runs(Cluster(0), table.clusters())
        .map(|run| run.resolve.slot)
        .all(|slot| slot == LayerSlot::NONE || chain.has(slot))
}

/// Other jobs, stopped ones, that were to take from a layer that stays and that will not lie below theirs any more. The target
/// of this one holds all that they would have moved up to there: those with the same target have ended, however they stood,
/// and those that reach further up (copies of a whole chain) take from it what is left. They may not just end: the map of
/// their target may say already that nothing lies below.
fn cut_off_jobs(
    state: &CatalogState,
    row: &JobRow,
    parent: Option<LayerId>,
    gone: &[LayerId],
) -> Vec<JobRow> {
    let ids = |top: LayerId| state.chain(top).into_iter().map(|layer| layer.id);
    let before: BTreeSet<LayerId> = ids(row.target).skip(1).collect();
    let after: BTreeSet<LayerId> = parent.into_iter().flat_map(ids).collect();
    let left = |job: &&JobRow| {
        before.contains(&job.source)
            && !after.contains(&job.source)
            && !gone.contains(&job.source)
            && !gone.contains(&job.target)
            && ids(job.target).any(|id| id == row.target)
    };
    let others = state.jobs.values().filter(|job| job.id != row.id);
    others.filter(left).cloned().collect()
}

/// What becomes of other jobs that name layers that go: the target of this one has taken those up, so they go on with that; and
/// those that have nothing left below it have ended.
fn moved_jobs(
    state: &CatalogState,
    row: &JobRow,
    parent: Option<LayerId>,
    gone: &[LayerId],
) -> Vec<Change> {
    let others = state.jobs.values().filter(|job| job.id != row.id);
    others
        .filter(|job| gone.contains(&job.source) || gone.contains(&job.target))
        .map(|job| {
            let target = if gone.contains(&job.target) {
                row.target
            } else {
                job.target
            };
            let source = match (gone.contains(&job.source), target == row.target) {
                (false, _) => Some(job.source),
                (true, false) => Some(row.target),
                (true, true) => parent,
            };
            match source {
                Some(source) => Change::MoveJob {
                    id: job.id,
                    source,
                    target,
                },
                None => Change::RemoveJob(job.id),
            }
        })
        .collect()
}
