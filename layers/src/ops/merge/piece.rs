//! What is moved at once: which sectors of which source, and what the target says afterwards.

use std::collections::BTreeSet;

use crate::map::{ClusterState, MapRecord, RecordKind};
use crate::units::{CLUSTER_BYTES, CLUSTER_SECTORS, Cluster, Sector, SectorMask, SectorRange};

use super::walk::{Composed, Content, Held, Sources};

/// Runs that are looked at for one piece, and runs that it may have.
const RUNS_MAX: usize = 1 << 14;

/// How much a piece may be, if there is more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Most {
    /// Bytes of clusters that are copied; at least one is.
    pub space: u64,
    /// Runs that the target gains.
    pub gains: usize,
}

impl Most {
    /// No limit but what is looked at for one piece.
    pub(super) const ANY: Self = Self::of_space(u64::MAX);

    /// So many bytes.
    pub(super) const fn of_space(space: u64) -> Self {
        Self {
            space,
            gains: RUNS_MAX,
        }
    }
}

/// Bytes of a sector, as a length in memory.
const SECTOR_LEN: usize = 512;

/// Sectors of a source, to be copied to the same place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Copy {
    /// Which source.
    pub source: usize,
    /// The sectors.
    pub range: SectorRange,
}

/// A run of clusters of which the target gains the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gain {
    /// The first cluster.
    pub first: Cluster,
    /// How many.
    pub count: u64,
    /// What the sources say about each of them.
    pub sources: ClusterState,
    /// What the target says before.
    pub target: ClusterState,
}

impl Gain {
    /// The sectors that become data of the target.
    pub(super) fn data(&self) -> SectorMask {
        SectorMask(self.sources.data.0 & !(self.target.data.0 | self.target.zero().0))
    }

    /// Whether the rest becomes zero.
    fn zeroes(&self) -> bool {
        self.sources.rest_zero
            && !self.target.rest_zero
            && self.sources.data.0 | self.target.data.0 != SectorMask::ALL.0
    }

    /// Whether there is any.
    fn is_any(&self) -> bool {
        self.data() != SectorMask::NONE || self.zeroes()
    }

    /// The records that say it, in a map that says what the target said before.
    pub(super) fn records(&self, records: &mut Vec<MapRecord>) {
        let data = self.data();
        let rest = if self.zeroes() {
            SectorMask(!(self.sources.data.0 | self.target.data.0))
        } else {
            SectorMask::NONE
        };
        for (kind, mask) in [(RecordKind::Data, data), (RecordKind::Zero, rest)] {
            runs_of(self.first, self.count, mask, |range| {
                push(records, MapRecord { kind, range });
            });
        }
    }
}

/// Adds a record, joined with the last one if that goes on.
fn push(records: &mut Vec<MapRecord>, record: MapRecord) {
    match records.last_mut() {
        Some(last) if last.kind == record.kind && last.range.end() == record.range.start => {
            last.range.count += record.range.count;
        }
        _ => records.push(record),
    }
}

/// The runs of sectors of the same mask in each of some clusters.
pub(super) fn runs_of(
    first: Cluster,
    count: u64,
    mask: SectorMask,
    mut each: impl FnMut(SectorRange),
) {
    if mask == SectorMask::NONE {
        return;
    }
    if mask == SectorMask::ALL {
        return each(SectorRange {
            start: first.first_sector(),
            count: count * CLUSTER_SECTORS,
        });
    }
    for cluster in (first.0..first.0 + count).map(Cluster) {
        for run in crate::cache::runs(mask) {
            each(SectorRange {
                start: Sector(cluster.first_sector().0 + u64::from(run.first)),
                count: u64::from(run.count),
            });
        }
    }
}

/// Adds a cluster, joined with the last run if that is alike.
fn push_gain(gains: &mut Vec<Gain>, at: Cluster, sources: ClusterState, target: ClusterState) {
    match gains.last_mut() {
        Some(last)
            if last.first.0 + last.count == at.0
                && (last.sources, last.target) == (sources, target) =>
        {
            last.count += 1;
        }
        _ => gains.push(Gain {
            first: at,
            count: 1,
            sources,
            target,
        }),
    }
}

/// A part of a job that is carried out at once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Piece {
    /// What is copied.
    pub copies: Vec<Copy>,
    /// What the target gains.
    pub gains: Vec<Gain>,
    /// Sectors that are copied.
    pub sectors: u64,
    /// Bytes of clusters that are copied, if only in part: the space that it may take.
    pub space: u64,
    /// The first cluster behind it: all before it is done once this is.
    pub end: u64,
}

impl Piece {
    /// Looks for what the target lacks from cluster `at` on, up to so much. What lies in `in_place` need not be copied: the
    /// target's file is that source's.
    pub(super) fn next(
        sources: &Sources,
        held: &Held<'_>,
        at: u64,
        most: Most,
        in_place: Option<usize>,
    ) -> Self {
        let end = sources.clusters();
        let mut piece = Self {
            end: at,
            ..Self::default()
        };
        for _ in 0..RUNS_MAX {
            let full = piece.space >= most.space || piece.gains.len() >= most.gains;
            if piece.end >= end || full || piece.copies.len() >= RUNS_MAX {
                break;
            }
            let first = Cluster(piece.end);
            let (count, content) = sources.run(first, end);
            if content == Content::Absent {
                piece.end += count;
                continue;
            }
            let (alike, target) = held.run(first, first.0 + count);
            let mut count = count.min(alike);
            let composed = match content {
                Content::Whole(_) | Content::Mixed => sources.cluster(first),
                Content::Absent | Content::Zero => Composed::of(ClusterState::ZERO),
            };
            let mut gain = Gain {
                first,
                count,
                sources: composed.state,
                target,
            };
            if gain.is_any() {
                let stays = in_place.map_or(0, |source| composed.data_of(source).0);
                if gain.data().0 & !stays != 0 {
                    let room = most.space.saturating_sub(piece.space) / CLUSTER_BYTES;
                    count = count.min(room.max(1));
                    gain.count = count;
                    piece.space += count * CLUSTER_BYTES;
                }
                piece.add(gain, &composed, sources.layers().len(), in_place);
            }
            piece.end += count;
        }
        piece
    }

    /// The first cluster that is gained in what `look` finds from a cluster on, or the end of the sources.
    pub(super) fn first_gain(sources: &Sources, look: impl Fn(u64) -> Self) -> u64 {
        let mut at = 0;
        while at < sources.clusters() {
            let piece = look(at);
            if let Some(gain) = piece.gains.first() {
                return gain.first.0;
            }
            at = piece.end;
        }
        at
    }

    /// Lets clusters become zero of which all that is copied was read as zeroes, and that are copied as far as they lie on the
    /// disk: their zeroes take no space. Returns which.
    pub(super) fn turn_zero(
        &mut self,
        sources: &Sources,
        read: &[(SectorRange, Vec<u8>)],
    ) -> BTreeSet<Cluster> {
        let mut with_data = BTreeSet::new();
        for (range, bytes) in read {
            let sectors = bytes.chunks(SECTOR_LEN);
            for (sector, bytes) in (range.start.0..).map(Sector).zip(sectors) {
                if bytes.iter().any(|byte| *byte != 0) {
                    with_data.insert(sector.cluster());
                }
            }
        }
        let mut zeroes = BTreeSet::new();
        let mut gains = Vec::with_capacity(self.gains.len());
        for gain in self.gains.drain(..) {
            if gain.data() == SectorMask::NONE {
                gains.push(gain);
                continue;
            }
            for cluster in (gain.first.0..gain.first.0 + gain.count).map(Cluster) {
                let state = gain.sources;
                let whole = state.rest_zero || state.data.contains(sources.on_disk(cluster));
                let zero = whole && !with_data.contains(&cluster);
                if zero {
                    zeroes.insert(cluster);
                }
                let state = if zero { ClusterState::ZERO } else { state };
                push_gain(&mut gains, cluster, state, gain.target);
            }
        }
        self.gains = gains;
        zeroes
    }

    /// Adds what the target gains of a run.
    fn add(&mut self, gain: Gain, composed: &Composed, sources: usize, in_place: Option<usize>) {
        let wanted = gain.data();
        for source in (0..sources).filter(|source| Some(*source) != in_place) {
            let mask = SectorMask(composed.data_of(source).0 & wanted.0);
            runs_of(gain.first, gain.count, mask, |range| {
                self.sectors += range.count;
                match self.copies.last_mut() {
                    Some(last) if last.source == source && last.range.end() == range.start => {
                        last.range.count += range.count;
                    }
                    _ => self.copies.push(Copy { source, range }),
                }
            });
        }
        self.gains.push(gain);
    }
}
