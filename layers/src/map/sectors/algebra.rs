//! Runs, and what can be made of two sets. Whatever a chunk of the result has in common with a chunk of one of them is shared.

use std::collections::BTreeMap;

use super::{CHUNK_BITS, CHUNK_SECTORS, Chunk, Sectors, all_of, low};
use crate::units::{Sector, SectorRange};

/// The run of all sectors.
pub(super) const ALL: SectorRange = SectorRange {
    start: Sector(0),
    count: u64::MAX,
};

impl Sectors {
    /// The runs of sectors, each as long as possible, in order.
    pub(crate) fn runs(&self) -> impl Iterator<Item = SectorRange> {
        self.runs_in(ALL)
    }

    /// The runs of the sectors that lie in a range, cut off at its ends.
    pub(crate) fn runs_in(&self, range: SectorRange) -> impl Iterator<Item = SectorRange> {
        let end = range.start.0.saturating_add(range.count);
        let mut pieces = self.chunks_in(range).flat_map(move |(key, chunk)| {
            let start = key << CHUNK_BITS;
            let first = start.max(range.start.0);
            // Not less than the first: the chunk lies in the range, at least in part.
            let last = (start + (CHUNK_SECTORS - 1)).min(end - 1);
            let (full, mut part) = match chunk {
                Chunk::Full => (Some(low(first)..=low(last)), None),
                Chunk::Part(part) => (None, Some(part.bitmap.range(low(first)..=low(last)))),
            };
            let ranges = full
                .into_iter()
                .chain(std::iter::from_fn(move || part.as_mut()?.next_range()));
            let high = start >> 32 << 32;
            ranges.map(move |range| SectorRange {
                start: Sector(high | u64::from(*range.start())),
                count: u64::from(range.end() - range.start()) + 1,
            })
        });
        let mut pending = pieces.next();
        std::iter::from_fn(move || {
            let mut run = pending.take()?;
            for next in pieces.by_ref() {
                if next.start != run.end() {
                    pending = Some(next);
                    break;
                }
                run.count += next.count;
            }
            Some(run)
        })
    }

    /// The chunks with sectors that may lie in a range.
    fn chunks_in(&self, range: SectorRange) -> impl Iterator<Item = (u64, &Chunk)> {
        let end = range.start.0.saturating_add(range.count);
        let keys = range.start.0 >> CHUNK_BITS..end.div_ceil(CHUNK_SECTORS);
        // Of an empty range also the chunk in whose midst it lies.
        let keys = if range.count == 0 { 0..0 } else { keys };
        self.chunks.range(keys).map(|(key, chunk)| (*key, chunk))
    }

    /// The sectors that lie in a range.
    pub(crate) fn within(&self, range: SectorRange) -> Self {
        let chunks = self.chunks_in(range);
        let mut within = Self {
            chunks: chunks.map(|(key, chunk)| (key, chunk.clone())).collect(),
        };
        let end = range.start.0.saturating_add(range.count);
        // What sticks out at the ends, which is less than a chunk.
        within.remove(run(
            range.start.0 >> CHUNK_BITS << CHUNK_BITS,
            range.start.0,
        ));
        within.remove(run(end, end.div_ceil(CHUNK_SECTORS) << CHUNK_BITS));
        within
    }

    /// The sectors of either set.
    pub(crate) fn union(&self, other: &Self) -> Self {
        let mut chunks = self.chunks.clone();
        for (key, there) in &other.chunks {
            let both = match (chunks.get(key), there) {
                (None, there) => there.clone(),
                (Some(Chunk::Full), _) => continue,
                (Some(Chunk::Part(here)), Chunk::Part(there)) => {
                    let Some(chunk) = Chunk::of(&here.bitmap | &there.bitmap) else {
                        continue;
                    };
                    chunk
                }
                (Some(Chunk::Part(_)), Chunk::Full) => Chunk::Full,
            };
            chunks.insert(*key, both);
        }
        Self { chunks }
    }

    /// The sectors of this set that are not in the other.
    pub(crate) fn minus(&self, other: &Self) -> Self {
        let left = |key: &u64, here: &Chunk| match (here, other.chunks.get(key)) {
            (here, None) => Some(here.clone()),
            (_, Some(Chunk::Full)) => None,
            (Chunk::Full, Some(Chunk::Part(there))) => Chunk::of(all_of(*key) - &there.bitmap),
            (Chunk::Part(here), Some(Chunk::Part(there))) => {
                Chunk::of(&here.bitmap - &there.bitmap)
            }
        };
        let chunks: BTreeMap<u64, Chunk> = self
            .chunks
            .iter()
            .filter_map(|(key, here)| Some((*key, left(key, here)?)))
            .collect();
        Self { chunks }
    }
}

/// The run from one sector to another.
fn run(from: u64, to: u64) -> SectorRange {
    SectorRange {
        start: Sector(from),
        count: to.saturating_sub(from),
    }
}
