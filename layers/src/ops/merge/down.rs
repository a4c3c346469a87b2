//! Data goes down: what a sealed layer holds is moved into the file of the one below it, over what it hides there.
//!
//! DURABILITY, of each step:
//! 1. the upper one's data is written into the lower one's file, where nobody reads that file, since the upper one hides it;
//!    where the upper one has zeroes the lower one's space is given back;
//! 2. the file is synced, and frames of the lower layer are trimmed there, which may hold what was hidden;
//! 3. the lower one's map, now larger, is committed, and then the upper one's, now smaller (of a user's base only the latter);
//! 4. tables follow, the clock is advanced, and when nobody uses what was there before, the upper one's places are given back.
//!
//! At the end the lower one's file becomes the upper one's, by which children and snapshots know what it holds (`finish`).

use std::sync::Arc;

use crate::canary::{self, Canary};
use crate::catalog::{JobKind, JobRow, LayerState};
use crate::error::Result;
use crate::file::File;
use crate::layer::{Layer, LayerMap};
use crate::map::{ClusterState, SectorSet};
use crate::mapfile::{LayerKind, MapFile, MapHeader};
use crate::store::Store;
use crate::units::{
    CLUSTER_BYTES, CLUSTER_SECTORS, Cluster, Generation, LayerId, SECTOR_BYTES, Sector, SectorMask,
};

use super::Step;
use super::cost::{data_before, end_within};
use super::gather::{failed, of_rate};
use super::piece::{Gain, Most, Piece, runs_of};
use super::walk::{Held, Sources};

/// Bytes that are copied at once.
const PIECE_BYTES: u64 = 4 << 20;

/// A layer of the pair.
#[derive(Debug)]
pub(super) struct Side {
    /// The layer.
    pub layer: Arc<Layer>,
    /// Its data, to be written to.
    pub file: Arc<dyn File>,
    /// What its map says of it.
    pub header: MapHeader,
    /// The number of its map file.
    pub incarnation: u64,
}

/// A job that moves data down.
#[derive(Debug)]
pub(super) struct Down {
    /// Takes from this one.
    pub upper: Side,
    /// Gives to this one.
    pub lower: Side,
    /// What the upper one holds.
    sources: Sources,
    /// The first cluster that was not moved.
    at: u64,
    /// The first cluster that was not given back.
    given_back: u64,
    /// Bytes of clusters moved since the last commit.
    uncommitted: u64,
    /// What comes next.
    phase: Stage,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// What was moved before is committed.
    Commit,
    /// When nobody uses what was before this generation, places are given back.
    Settle(Generation),
    /// A piece is moved.
    Move,
}

/// A file of a layer with what is known of its map: its number comes last.
type Opened = (Arc<dyn File>, MapHeader, u64);

impl Down {
    /// A job that was just taken up.
    pub(super) fn new(
        upper: Arc<Layer>,
        upper_file: Opened,
        lower: Arc<Layer>,
        lower_file: Opened,
        size: Sector,
    ) -> Self {
        let side = |layer, (file, header, incarnation): Opened| Side {
            layer,
            file,
            header,
            incarnation,
        };
        let (upper, lower) = (side(upper, upper_file), side(lower, lower_file));
        let size = match &lower.header.kind {
            LayerKind::RawBase(base) => end_within(base, size),
            LayerKind::Differencing => size,
        };
        let sources = Sources::of(size, &upper.layer);
        let mut down = Self {
            upper,
            lower,
            sources,
            at: 0,
            given_back: 0,
            uncommitted: 0,
            phase: Stage::Commit,
        };
        down.at = down.first_left();
        if down.at >= down.sources.clusters() {
            // All is moved and given back, or will be with the file. At the end of a job, after a crash, that file may be the
            // other's already: nothing of it is dead then.
            down.given_back = down.at;
        }
        down
    }

    /// The first cluster of which the upper layer says anything.
    fn first_left(&self) -> u64 {
        Piece::first_gain(&self.sources, |at| self.look(at, 1))
    }

    /// Bytes that are still to be copied.
    pub(super) fn bytes_left(&self) -> u64 {
        match &**self.upper.layer.map() {
            LayerMap::Sealed(set) => {
                let end = Sector(self.sources.clusters() * CLUSTER_SECTORS);
                data_before(set, end) * SECTOR_BYTES
            }
            LayerMap::Active(_) => 0,
        }
    }

    /// Looks for the next piece.
    fn look(&self, at: u64, space_max: u64) -> Piece {
        let most = Most::of_space(space_max);
        Piece::next(&self.sources, &Held::Nothing, at, most, None)
    }

    /// The layers, from the top down.
    pub(super) fn chain(&self) -> [LayerId; 2] {
        [self.upper.layer.id(), self.lower.layer.id()]
    }

    /// Whether the lower layer is a user's file.
    pub(super) fn is_base(&self) -> bool {
        matches!(self.lower.header.kind, LayerKind::RawBase(_))
    }

    /// Whether a crash or failure came between the end in the upper one's map and that in the catalog.
    fn is_finished_in_map(&self) -> bool {
        self.upper.header.parent != Some(self.lower.layer.id())
    }
}

/// What a sealed layer holds.
pub(super) fn sealed_set(layer: &Layer) -> SectorSet {
    match &**layer.map() {
        LayerMap::Sealed(set) => set.clone(),
        LayerMap::Active(map) => map.to_set(),
    }
}

impl Store {
    /// One turn of a job that moves data down.
    pub(super) fn down_turn(&self, row: &JobRow, down: &mut Down) -> Result<Step> {
        if down.is_finished_in_map() {
            return Ok(Step::Finish);
        }
        match down.phase {
            Stage::Commit => self.down_commit(row, down),
            Stage::Settle(generation) => self.down_settle(row, down, generation),
            Stage::Move if down.at >= down.sources.clusters() => Ok(Step::Finish),
            Stage::Move => self.down_move(row, down),
        }
    }

    /// Moves a piece. Nobody reads what it changes.
    fn down_move(&self, row: &JobRow, down: &mut Down) -> Result<Step> {
        let step_bytes = self.jobs.board().step_bytes;
        let piece = down.look(down.at, of_rate(PIECE_BYTES, row.rate).min(step_bytes));
        let mut bytes = Vec::new();
        for copy in &piece.copies {
            self.copy_range(
                (down.upper.layer.data(), down.upper.layer.id()),
                (&down.lower.file, down.lower.layer.id()),
                copy.range,
                &mut bytes,
            )?;
        }
        for gain in piece.gains.iter().filter(|gain| gain.sources.rest_zero) {
            zero(down, gain)?;
        }
        for gain in &piece.gains {
            self.trim_held(&down.lower.layer, gain);
        }
        let moved = piece.sectors * SECTOR_BYTES;
        down.at = piece.end;
        down.uncommitted += piece.space;
        if down.uncommitted >= step_bytes || down.at >= down.sources.clusters() {
            down.phase = Stage::Commit;
        }
        Ok(Step::Moved(moved))
    }

    /// Trims the frames of a sealed layer for some clusters, where it has any.
    fn trim_held(&self, layer: &Layer, gain: &Gain) {
        let map = layer.map();
        let LayerMap::Sealed(set) = &**map else {
            return;
        };
        for range in set.data_runs_in(gain.first, gain.count) {
            let first = range.start.cluster();
            let last = Sector(range.end().0.saturating_sub(1)).cluster();
            let count = last.0.saturating_sub(first.0) + 1;
            self.cache
                .trim(layer.number(), first, count, |_| SectorMask::NONE);
        }
    }

    /// Commits what was moved.
    fn down_commit(&self, row: &JobRow, down: &mut Down) -> Result<Step> {
        let (first, count) = (down.given_back, down.at.saturating_sub(down.given_back));
        let first = Cluster(first);
        let moved = sealed_set(&down.upper.layer).within(first, count);
        let is_empty = moved.data_sectors() == 0 && moved.zero_sectors() == 0;
        if !is_empty && !canary::is_set(Canary::SkipSync) {
            let synced = down.lower.file.sync_data();
            synced.map_err(|error| failed("sync", down.lower.layer.id(), error))?;
        }
        let _command = self.command();
        if !self.is_as_it_was(row, &down.chain(), LayerState::Sealed) {
            return Ok(Step::Again);
        }
        if canary::is_set(Canary::PunchBeforeCommit) {
            give_back(down)?;
        }
        if !is_empty {
            if !down.is_base() {
                let larger = moved.over(&sealed_set(&down.lower.layer));
                replace(self, &mut down.lower, larger)?;
            }
            let smaller = sealed_set(&down.upper.layer).without(first, count);
            let chain = down.chain();
            replace(self, &mut down.upper, smaller)?;
            // Volumes over the upper one have both.
            self.lead_to(&down.lower.layer, &chain, first, count);
        }
        down.uncommitted = 0;
        down.phase = Stage::Settle(self.clock.advance());
        Ok(Step::Moved(0))
    }

    /// Gives the upper one's places back.
    fn down_settle(&self, row: &JobRow, down: &mut Down, generation: Generation) -> Result<Step> {
        if !self.clock.quiescent_for_reads(generation) {
            return Ok(Step::Waits);
        }
        let _command = self.command();
        if !self.is_as_it_was(row, &down.chain(), LayerState::Sealed) {
            return Ok(Step::Again);
        }
        give_back(down)?;
        down.given_back = down.at;
        down.phase = Stage::Move;
        Ok(Step::Moved(0))
    }

    /// Whether a job's end is in the map of its target already.
    pub(crate) fn is_finished_in_map(&self, row: &JobRow) -> bool {
        if row.kind == JobKind::IntoBase {
            return false;
        }
        let known = {
            let inner = self.inner();
            let layers = &inner.catalog.state().layers;
            layers.get(&row.target).map(|row| row.parent)
        };
        let header = MapFile::read_header(&self.media, row.target);
        match (known, header) {
            (Some(parent), Ok(header)) => header.parent != parent,
            _ => false,
        }
    }
}

/// Commits another set of one of the two, and shows it to readers.
fn replace(store: &Store, side: &mut Side, set: SectorSet) -> Result<()> {
    let map = MapFile::succeed(&store.media, &side.header, side.incarnation, &set)?;
    side.incarnation = map.incarnation();
    side.layer.replace_set(set);
    Ok(())
}

/// Zeroes what the upper layer says is zero: in a layer of the store whole clusters, to give their space back; in a user's file
/// all of it, since that has no map.
fn zero(down: &Down, gain: &Gain) -> Result<()> {
    let failed = |error| failed("zero", down.lower.layer.id(), error);
    if gain.sources == ClusterState::ZERO {
        let (mut offset, mut len) = (gain.first.0 * CLUSTER_BYTES, gain.count * CLUSTER_BYTES);
        if down.is_base() {
            let end = down.lower.file.len().map_err(failed)?;
            offset = offset.min(end);
            len = len.min(end - offset);
        }
        return down.lower.file.punch(offset, len).map_err(failed);
    }
    if !down.is_base() {
        return Ok(());
    }
    let on_disk = down.sources.on_disk(gain.first);
    let rest = SectorMask(gain.sources.zero().0 & on_disk.0);
    let mut result = Ok(());
    runs_of(gain.first, gain.count, rest, |range| {
        let zeroes = vec![0; usize::try_from(range.count * SECTOR_BYTES).unwrap_or(0)];
        let offset = range.start.0 * SECTOR_BYTES;
        if result.is_ok() {
            result = down.lower.file.write_at(&zeroes, offset);
        }
    });
    result.map_err(failed)
}

/// Gives back the places of what was moved.
fn give_back(down: &Down) -> Result<()> {
    let count = down.at.saturating_sub(down.given_back);
    if count == 0 {
        return Ok(());
    }
    down.upper
        .file
        .punch(down.given_back * CLUSTER_BYTES, count * CLUSTER_BYTES)
        .map_err(|error| failed("punch", down.upper.layer.id(), error))
}
