//! Data goes up: what one or more sealed layers hold, as one, is handed over to the layer above them.
//!
//! DURABILITY, of each step:
//! 1. what the target lacks is written to its file, at places that its map does not speak of;
//! 2. the file is synced, and the target's map, now larger, is committed: of a sealed target as a new map that takes the old
//!    one's name, of an active one by a flush of its volume;
//! 3. tables follow, the clock is advanced, and when nobody uses what was there before, the places are given back.
//!
//! A crash anywhere leaves both layers with the same data, or with data in places that no map speaks of.
//!
//! A target that takes writes is written to by who leads the flushes of its volume, a piece at a time. Guests' writes go to
//! frames meanwhile, which are newer than the file; what the map says at the moment counts, under the lead, for each cluster.
//!
//! With a source in place (the target's file is another name of its file) the data of that source is not copied: where the
//! target gains it, it is there.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Weak};

use crate::canary::{self, Canary};
use crate::catalog::{JobRow, LayerState};
use crate::error::{Error, Result};
use crate::file::File;
use crate::layer::{Layer, LayerMap};
use crate::map::{ClusterState, MapRecord, SectorSet, Table};
use crate::mapfile::{MapFile, MapHeader, data_path};
use crate::store::Store;
use crate::units::{
    CLUSTER_BYTES, Cluster, Generation, LayerId, SECTOR_BYTES, Sector, SectorMask, SectorRange,
};
use crate::volume::Volume;

use super::piece::{Copy, Most, Piece};
use super::walk::{Held, Sources};
use super::{Patience, Step};

/// Bytes that are copied while flushes of a volume wait.
const LED_BYTES: u64 = 64 << 10;
/// Runs of clusters that are handed over while flushes of a volume wait.
const LED_RUNS: usize = 1 << 6;
/// Runs that may be handed over before they are committed: the next flush of the volume does that with all of them.
const LED_RUNS_UNCOMMITTED: usize = 1 << 8;
/// Bytes that are copied at once between sealed layers.
const SEALED_BYTES: u64 = 4 << 20;
/// Bytes that are copied at once however low the rate.
const LIMITED_BYTES_MIN: u64 = 64 << 10;
/// Bytes from which on the host is asked to copy, which it can perhaps do without copying.
const SHARED_BYTES: u64 = 64 << 10;
/// Records that a step may gather before it is committed.
const RECORDS_MAX: usize = 1 << 18;

/// A job that moves data up.
#[derive(Debug)]
pub(super) struct Gather {
    /// The layers from the target down to the lowest source.
    pub chain: Vec<LayerId>,
    /// What is moved.
    pub sources: Sources,
    /// The source whose file the target has.
    pub in_place: Option<usize>,
    /// The layer that gains it.
    pub target: Arc<Layer>,
    /// How it is written to.
    pub into: Into,
    /// Files in which what was moved is given back.
    pub punched: Vec<Arc<dyn File>>,
    /// Whether data that is all zeroes becomes zeroes, which take no space.
    skips_zeroes: bool,
    /// The first cluster that was not moved.
    at: u64,
    /// The first cluster that was not given back.
    given_back: u64,
    /// Bytes of clusters moved since the last commit.
    uncommitted: u64,
    /// Runs that were handed over since the last commit.
    uncommitted_runs: usize,
    /// What comes next.
    pub phase: Stage,
}

/// How the target is written to.
#[derive(Debug)]
pub(super) enum Into {
    /// It takes writes of this volume.
    Active(Weak<Volume>),
    /// It is sealed.
    Sealed(Box<SealedTarget>),
}

/// A sealed layer that is written to.
#[derive(Debug)]
pub(super) struct SealedTarget {
    /// Its data.
    pub file: Arc<dyn File>,
    /// What its map says of it.
    pub header: MapHeader,
    /// The number of its map file.
    pub incarnation: u64,
    /// Leads to what it held when the job was taken up: right for all that was not moved since.
    pub table: Table,
    /// What was written and not committed.
    pub records: Vec<MapRecord>,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// What was moved before is committed, if it is not.
    Commit,
    /// When nobody uses what was before this generation, places are given back.
    Settle(Generation),
    /// A piece is moved.
    Move,
    /// The target's chains know the sources no more; when nobody uses what was before this generation, the catalog follows.
    Leave(Generation),
}

impl Gather {
    /// A job that was just taken up. Places before the first cluster that is to be moved may not have been given back yet.
    pub(super) fn new(
        chain: Vec<LayerId>,
        sources: Sources,
        in_place: Option<usize>,
        target: Arc<Layer>,
        into: Into,
        punched: Vec<Arc<dyn File>>,
        skips_zeroes: bool,
    ) -> Self {
        let mut gather = Self {
            chain,
            sources,
            in_place,
            target,
            into,
            punched,
            skips_zeroes,
            at: 0,
            given_back: 0,
            uncommitted: 0,
            uncommitted_runs: 0,
            phase: Stage::Commit,
        };
        gather.at = gather.first_lacking();
        gather
    }

    /// The first cluster of which the target lacks something.
    fn first_lacking(&self) -> u64 {
        Piece::first_gain(&self.sources, |at| self.look(at, Most::of_space(1)))
    }

    /// Bytes that are still to be copied.
    pub(super) fn bytes_left(&self) -> u64 {
        let mut at = self.at;
        let mut bytes = 0;
        while at < self.sources.clusters() {
            let piece = self.look(at, Most::ANY);
            bytes += piece.sectors * SECTOR_BYTES;
            at = piece.end;
        }
        bytes
    }

    /// Looks for the next piece.
    fn look(&self, at: u64, most: Most) -> Piece {
        let map = self.target.map();
        let held = match (&**map, &self.into) {
            (LayerMap::Active(_), _) if canary::is_set(Canary::LoseGuestWrite) => Held::Nothing,
            (LayerMap::Active(map), _) => Held::Active(map),
            (LayerMap::Sealed(set), Into::Sealed(sealed)) => Held::Sealed(set, &sealed.table),
            // Sealed since: found out before anything is written.
            (LayerMap::Sealed(_), Into::Active(_)) => return self.nothing(),
        };
        Piece::next(&self.sources, &held, at, most, self.in_place)
    }

    /// The piece at the end.
    fn nothing(&self) -> Piece {
        Piece {
            end: self.sources.clusters(),
            ..Piece::default()
        }
    }

    /// The state in which the catalog must have the target.
    fn target_state(&self) -> LayerState {
        match self.into {
            Into::Active(_) => LayerState::Active,
            Into::Sealed(_) => LayerState::Sealed,
        }
    }

    /// Reads what is copied. Sealed files do not change where anybody looks.
    fn read(&self, copy: Copy, bytes: &mut Vec<u8>) -> Result<()> {
        let len = usize::try_from(copy.range.count * SECTOR_BYTES).unwrap_or(0);
        bytes.clear();
        bytes.resize(len, 0);
        let Some(source) = self.sources.layers().get(copy.source) else {
            return Ok(());
        };
        source
            .data()
            .read_at(bytes, copy.range.start.0 * SECTOR_BYTES)
            .map_err(|error| failed("read", source.id(), error))
    }

    /// The volume whose writes the target takes, if it still does. The caller holds the command lock.
    fn volume(&self) -> Option<Arc<Volume>> {
        let Into::Active(volume) = &self.into else {
            return None;
        };
        let volume = volume.upgrade()?;
        let chain = volume.newest_chain();
        let same = chain
            .active()
            .is_some_and(|active| Arc::ptr_eq(active, &self.target));
        (same && !self.target.is_sealed()).then_some(volume)
    }
}

/// How much is copied at once with a rate: a quarter of a second's worth.
pub(super) fn of_rate(most: u64, rate: Option<u64>) -> u64 {
    match rate {
        Some(rate) => most.min((rate / 4).max(LIMITED_BYTES_MIN)),
        None => most,
    }
}

/// An error about the data of a layer.
pub(super) fn failed(op: &'static str, layer: LayerId, source: io::Error) -> Error {
    Error::Io {
        op,
        path: data_path(layer),
        source,
    }
}

impl Store {
    /// One turn of a job that moves data up.
    pub(super) fn gather_turn(
        &self,
        row: &JobRow,
        gather: &mut Gather,
        patience: Patience,
    ) -> Result<Step> {
        match gather.phase {
            Stage::Commit => self.gather_commit(row, gather, patience),
            Stage::Settle(generation) => self.gather_settle(row, gather, generation),
            Stage::Move if gather.at >= gather.sources.clusters() => Ok(Step::Finish),
            Stage::Move => self.gather_move(row, gather, patience),
            Stage::Leave(generation) => Ok(match self.clock.quiescent_for_reads(generation) {
                true => Step::Finish,
                false => Step::Waits,
            }),
        }
    }

    /// Moves a piece.
    fn gather_move(&self, row: &JobRow, gather: &mut Gather, patience: Patience) -> Result<Step> {
        if !self.damage.is_none() {
            // A scrub may have found it since the job was taken up.
            for layer in &gather.chain {
                self.check_still_undamaged(*layer)?;
            }
        }
        let active = matches!(gather.into, Into::Active(_));
        let bytes = of_rate(if active { LED_BYTES } else { SEALED_BYTES }, row.rate);
        let step_bytes = self.jobs.board().step_bytes;
        let mut most = Most::of_space(bytes.min(step_bytes));
        if active {
            most.gains = LED_RUNS;
        }
        let piece = gather.look(gather.at, most);
        if active {
            let Some(step) = self.hand_over(row, gather, &piece, patience)? else {
                return Ok(Step::Again);
            };
            if step == Step::Waits {
                return Ok(step);
            }
        } else {
            copy_sealed(self, gather, &piece)?;
        }
        let bytes = piece.sectors * SECTOR_BYTES;
        gather.at = piece.end;
        gather.uncommitted += piece.space;
        gather.uncommitted_runs += piece.gains.len();
        let many = match &gather.into {
            Into::Active(_) => gather.uncommitted_runs >= LED_RUNS_UNCOMMITTED,
            Into::Sealed(sealed) => sealed.records.len() >= RECORDS_MAX,
        };
        let full = gather.uncommitted >= step_bytes || many;
        if full || gather.at >= gather.sources.clusters() {
            gather.phase = Stage::Commit;
        }
        Ok(Step::Moved(bytes))
    }

    /// Hands a piece over to a layer that takes writes. `None` if it does no longer.
    fn hand_over(
        &self,
        row: &JobRow,
        gather: &Gather,
        piece: &Piece,
        patience: Patience,
    ) -> Result<Option<Step>> {
        // Before the lead is taken: nobody waits for the device that this is read from.
        let mut read = Vec::with_capacity(piece.copies.len());
        for copy in &piece.copies {
            let mut bytes = Vec::new();
            gather.read(*copy, &mut bytes)?;
            read.push((copy.range, bytes));
        }
        let mut piece = piece.clone();
        let zeroes = match gather.skips_zeroes {
            true => piece.turn_zero(&gather.sources, &read),
            false => BTreeSet::new(),
        };
        let _command = self.command();
        if !self.is_as_it_was(row, &gather.chain, LayerState::Active) {
            return Ok(None);
        }
        let Some(volume) = gather.volume() else {
            return Ok(None);
        };
        let led = !canary::is_set(Canary::LoseGuestWrite);
        if led && !patience.lead(&volume) {
            return Ok(Some(Step::Waits));
        }
        let result = volume
            .check_failure()
            .and_then(|()| put(&volume, gather, &piece, &read, &zeroes));
        if led {
            volume.flushes().finish_blocking();
        }
        result.map(|()| Some(Step::Moved(0)))
    }

    /// Copies sectors from one layer's file to the same place of another one's.
    pub(super) fn copy_range(
        &self,
        (from, from_id): (&Arc<dyn File>, LayerId),
        (to, to_id): (&Arc<dyn File>, LayerId),
        range: SectorRange,
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        let offset = range.start.0 * SECTOR_BYTES;
        let len = range.count * SECTOR_BYTES;
        if len >= SHARED_BYTES {
            let copied = self.media.copy(from, to, offset, len);
            return copied.map_err(|error| failed("copy into", to_id, error));
        }
        bytes.clear();
        bytes.resize(usize::try_from(len).unwrap_or(0), 0);
        let read = from.read_at(bytes, offset);
        read.map_err(|error| failed("read", from_id, error))?;
        let written = to.write_at(bytes, offset);
        written.map_err(|error| failed("write", to_id, error))
    }

    /// Commits what was moved, so that it may be given back.
    fn gather_commit(&self, row: &JobRow, gather: &mut Gather, patience: Patience) -> Result<Step> {
        if let Into::Sealed(sealed) = &gather.into
            && !canary::is_set(Canary::SkipSync)
            && gather.uncommitted > 0
        {
            // Nobody waits for it.
            let synced = sealed.file.sync_data();
            synced.map_err(|error| failed("sync", gather.target.id(), error))?;
        }
        let _command = self.command();
        if !self.is_as_it_was(row, &gather.chain, gather.target_state()) {
            return Ok(Step::Again);
        }
        if canary::is_set(Canary::PunchBeforeCommit) {
            give_back(gather)?;
        }
        let target = Arc::clone(&gather.target);
        match &mut gather.into {
            Into::Active(_) => {
                let Some(volume) = gather.volume() else {
                    return Ok(Step::Again);
                };
                if patience.led(&volume, || Ok(()))?.is_none() {
                    return Ok(Step::Waits);
                }
            }
            Into::Sealed(sealed) if sealed.records.is_empty() => {}
            Into::Sealed(sealed) => {
                let set = with_records(&target, &sealed.records);
                let map = MapFile::succeed(&self.media, &sealed.header, sealed.incarnation, &set)?;
                sealed.incarnation = map.incarnation();
                sealed.records.clear();
                target.replace_set(set);
                let (first, count) = (gather.given_back, gather.at - gather.given_back);
                self.lead_to(&target, &gather.chain, Cluster(first), count);
            }
        }
        gather.uncommitted = 0;
        gather.uncommitted_runs = 0;
        gather.phase = Stage::Settle(self.clock.advance());
        Ok(Step::Moved(0))
    }

    /// Gives the places back that nobody uses any more.
    fn gather_settle(
        &self,
        row: &JobRow,
        gather: &mut Gather,
        generation: Generation,
    ) -> Result<Step> {
        if !self.clock.quiescent_for_reads(generation) {
            return Ok(Step::Waits);
        }
        let _command = self.command();
        if !self.is_as_it_was(row, &gather.chain, gather.target_state()) {
            return Ok(Step::Again);
        }
        give_back(gather)?;
        gather.given_back = gather.at;
        gather.phase = Stage::Move;
        Ok(Step::Moved(0))
    }

    /// Lets the words of all tables that lead to layers of this job, for some clusters, lead to this one instead, which holds
    /// all that they hold there. It is sealed, and so are they.
    pub(super) fn lead_to(&self, layer: &Layer, chain: &[LayerId], first: Cluster, count: u64) {
        for volume in self.volumes_over(layer.id()) {
            let newest = volume.newest_chain();
            let Some(to) = newest.slot_of(layer.id()) else {
                continue;
            };
            let map = layer.map();
            let LayerMap::Sealed(set) = &**map else {
                continue;
            };
            let others = chain.iter().filter(|id| **id != layer.id());
            for from in others.filter_map(|id| newest.slot_of(*id)) {
                volume.table().replace(first, count, from, to, set);
            }
        }
    }
}

/// The set of a sealed layer, with more.
fn with_records(layer: &Layer, records: &[MapRecord]) -> SectorSet {
    let mut set = match &**layer.map() {
        LayerMap::Sealed(set) => set.clone(),
        LayerMap::Active(map) => map.to_set(),
    };
    for record in records {
        set.apply(record);
    }
    set.optimize();
    set
}

/// Copies a piece into a sealed layer's file, where nobody looks.
fn copy_sealed(store: &Store, gather: &mut Gather, piece: &Piece) -> Result<()> {
    let mut bytes = Vec::new();
    for copy in &piece.copies {
        let (Into::Sealed(sealed), Some(source)) =
            (&gather.into, gather.sources.layers().get(copy.source))
        else {
            continue;
        };
        store.copy_range(
            (source.data(), source.id()),
            (&sealed.file, gather.target.id()),
            copy.range,
            &mut bytes,
        )?;
    }
    let dead = dead_in_place(gather, piece);
    if let Into::Sealed(sealed) = &mut gather.into {
        for (first, count) in dead {
            let punched = sealed
                .file
                .punch(first.0 * CLUSTER_BYTES, count * CLUSTER_BYTES);
            punched.map_err(|error| failed("punch", gather.target.id(), error))?;
        }
        for gain in &piece.gains {
            gain.records(&mut sealed.records);
        }
    }
    Ok(())
}

/// Clusters that become zero, of which the source in place has data: nobody will ever look at it.
fn dead_in_place(gather: &Gather, piece: &Piece) -> Vec<(Cluster, u64)> {
    let Some(source) = gather
        .in_place
        .and_then(|source| gather.sources.layers().get(source))
    else {
        return Vec::new();
    };
    let map = source.map();
    let LayerMap::Sealed(_) = &**map else {
        return Vec::new();
    };
    let zero = piece
        .gains
        .iter()
        .filter(|gain| gain.sources == ClusterState::ZERO && gain.target.data == SectorMask::NONE);
    zero.map(|gain| (gain.first, gain.count)).collect()
}

/// Writes a piece, but for clusters that become zero, to the file of a layer that takes writes, and hands its clusters over. By
/// who leads the flushes of the volume, so that nobody else changes the file.
fn put(
    volume: &Volume,
    gather: &Gather,
    piece: &Piece,
    read: &[(SectorRange, Vec<u8>)],
    zeroes: &BTreeSet<Cluster>,
) -> Result<()> {
    let layer = &gather.target;
    let map = layer.map();
    let LayerMap::Active(map) = &**map else {
        return Ok(());
    };
    let slot = volume.newest_chain().active_slot();
    for (range, bytes) in read {
        write_missing(layer, map, *range, bytes, zeroes)
            .map_err(|error| failed("write", layer.id(), error))?;
    }
    for gain in &piece.gains {
        let changed = map.merge_below(gain.first, gain.count, gain.sources);
        volume
            .table()
            .refresh(slot, map, gain.first, gain.count, changed);
    }
    for (first, count) in dead_in_place(gather, piece) {
        for (first, count, state) in map.runs(first, count) {
            if state == ClusterState::ZERO {
                let (offset, len) = (first.0 * CLUSTER_BYTES, count * CLUSTER_BYTES);
                if let Err(error) = layer.data().punch(offset, len) {
                    volume.note_not_given_back(&error);
                }
            }
        }
    }
    Ok(())
}

/// Writes those sectors of a run that a map says nothing about, but for clusters that become zero.
fn write_missing(
    layer: &Layer,
    map: &crate::map::ActiveMap,
    range: SectorRange,
    bytes: &[u8],
    zeroes: &BTreeSet<Cluster>,
) -> io::Result<()> {
    // A run that is missing, and where it began.
    let mut missing: Option<(u64, u64)> = None;
    let write = |from: u64, to: u64| -> io::Result<()> {
        let narrow = |sector: u64| {
            usize::try_from((sector - range.start.0) * SECTOR_BYTES).unwrap_or(usize::MAX)
        };
        let part = bytes.get(narrow(from)..narrow(to)).unwrap_or_default();
        layer.mark_unsynced();
        layer.data().write_at(part, from * SECTOR_BYTES)
    };
    for sector in range.start.0..range.end().0 {
        let at = Sector(sector);
        let state = map.get(at.cluster());
        let bit = SectorMask::span(at.index_in_cluster(), 1);
        let held = state.data.contains(bit) || state.rest_zero;
        let held = held && !canary::is_set(Canary::LoseGuestWrite);
        match (held || zeroes.contains(&at.cluster()), &mut missing) {
            (false, Some((_, to))) => *to = sector + 1,
            (false, none @ None) => *none = Some((sector, sector + 1)),
            (true, some) => {
                if let Some((from, to)) = some.take() {
                    write(from, to)?;
                }
            }
        }
    }
    match missing {
        Some((from, to)) => write(from, to),
        None => Ok(()),
    }
}

/// Gives back the places of what was moved.
fn give_back(gather: &Gather) -> Result<()> {
    let count = gather.at.saturating_sub(gather.given_back);
    if count == 0 {
        return Ok(());
    }
    for (file, layer) in gather
        .punched
        .iter()
        .zip(gather.sources.layers().iter().rev())
    {
        file.punch(gather.given_back * CLUSTER_BYTES, count * CLUSTER_BYTES)
            .map_err(|error| failed("punch", layer.id(), error))?;
    }
    Ok(())
}
