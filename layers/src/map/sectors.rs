//! A set of sector numbers that stays small and quick whatever is put into it: roaring bitmaps in chunks.
//!
//! One roaring bitmap for a whole disk would take seconds to insert or remove a terabyte, since it shifts its list of
//! containers for each of them, and would keep a container for every 32 MiB of a full disk. So the set is cut into
//! chunks of 2 GiB (64 containers), and a full chunk has no bitmap at all. Copies share chunks until one of them changes, so
//! that a merge can make a new set at each of its steps. The portable form is the usual one of a 64-bit roaring bitmap, as
//! other programs read it.

mod algebra;

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use roaring::RoaringBitmap;

use crate::units::{Cluster, Sector, SectorMask, SectorRange};

/// A chunk has two to this power sectors.
const CHUNK_BITS: u32 = 22;
/// Sectors of a chunk.
const CHUNK_SECTORS: u64 = 1 << CHUNK_BITS;
/// Changes of a chunk after which its containers are packed again: each change may cost some bytes until then.
const CHANGES_MAX: u32 = 4096;

/// Some sectors of a chunk: neither none nor all.
#[derive(Clone, Debug)]
struct Part {
    /// The lower 32 bits of their numbers.
    bitmap: RoaringBitmap,
    /// How many there are.
    count: u64,
    /// Changes since the containers were last packed.
    changes: u32,
}

impl Part {
    /// No sector.
    fn empty() -> Self {
        Self {
            bitmap: RoaringBitmap::new(),
            count: 0,
            changes: 0,
        }
    }

    /// Counts a change; packs the containers when it is time.
    fn changed(&mut self) {
        self.changes += 1;
        if self.changes >= CHANGES_MAX {
            self.changes = 0;
            self.bitmap.optimize();
        }
    }
}

/// The sectors of a chunk that has any.
#[derive(Clone, Debug)]
enum Chunk {
    /// All of them.
    Full,
    /// Some of them.
    Part(Arc<Part>),
}

impl Chunk {
    /// The chunk with these sectors; `None` if that is none.
    fn of(bitmap: RoaringBitmap) -> Option<Self> {
        match bitmap.len() {
            0 => None,
            CHUNK_SECTORS => Some(Self::Full),
            count => Some(Self::Part(Arc::new(Part {
                bitmap,
                count,
                changes: 0,
            }))),
        }
    }
}

/// A part of a run that lies in one chunk.
struct Piece {
    /// The chunk.
    key: u64,
    /// The sectors, by the lower 32 bits of their numbers.
    low: RangeInclusive<u32>,
    /// How many.
    count: u64,
}

/// Cuts a run where chunks begin.
fn pieces(range: SectorRange) -> impl Iterator<Item = Piece> {
    let end = range.start.0.saturating_add(range.count);
    let mut at = range.start.0;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let key = at >> CHUNK_BITS;
        let stop = end.min((key + 1) << CHUNK_BITS);
        let low = low(at)..=low(stop - 1);
        let count = stop - at;
        at = stop;
        Some(Piece { key, low, count })
    })
}

/// The lower 32 bits of a sector's number.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the upper bits are the key of the bitmap"
)]
const fn low(sector: u64) -> u32 {
    sector as u32
}

/// All sectors of a chunk, by the lower 32 bits of their numbers.
fn whole(key: u64) -> RangeInclusive<u32> {
    low(key << CHUNK_BITS)..=low((key << CHUNK_BITS) + (CHUNK_SECTORS - 1))
}

/// The bitmap of a full chunk.
fn all_of(key: u64) -> RoaringBitmap {
    let mut bitmap = RoaringBitmap::new();
    bitmap.insert_range(whole(key));
    bitmap
}

/// A set of sector numbers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sectors {
    /// The chunks that have any.
    chunks: BTreeMap<u64, Chunk>,
}

impl Sectors {
    /// Adds a run.
    pub(crate) fn insert(&mut self, range: SectorRange) {
        for Piece { key, low, count } in pieces(range) {
            if count == CHUNK_SECTORS {
                self.chunks.insert(key, Chunk::Full);
                continue;
            }
            let empty = || Chunk::Part(Arc::new(Part::empty()));
            let chunk = self.chunks.entry(key).or_insert_with(empty);
            if let Chunk::Part(part) = chunk {
                let part = Arc::make_mut(part);
                part.count += part.bitmap.insert_range(low);
                part.changed();
                if part.count == CHUNK_SECTORS {
                    *chunk = Chunk::Full;
                }
            }
        }
    }

    /// Removes a run.
    pub(crate) fn remove(&mut self, range: SectorRange) {
        let Some((last, _)) = self.chunks.last_key_value() else {
            return;
        };
        // Not beyond the last chunk: the range may be anyone's idea of everything.
        let left = ((last + 1) << CHUNK_BITS).saturating_sub(range.start.0);
        let range = SectorRange {
            count: range.count.min(left),
            ..range
        };
        for Piece { key, low, count } in pieces(range) {
            if count == CHUNK_SECTORS {
                self.chunks.remove(&key);
                continue;
            }
            let Some(chunk) = self.chunks.get_mut(&key) else {
                continue;
            };
            if matches!(chunk, Chunk::Full) {
                *chunk = Chunk::Part(Arc::new(Part {
                    bitmap: all_of(key),
                    count: CHUNK_SECTORS,
                    changes: 0,
                }));
            }
            if let Chunk::Part(part) = chunk {
                let part = Arc::make_mut(part);
                part.count -= part.bitmap.remove_range(low);
                part.changed();
                if part.count == 0 {
                    self.chunks.remove(&key);
                }
            }
        }
    }

    /// Which sectors of a cluster are in the set.
    pub(crate) fn cluster(&self, cluster: Cluster) -> SectorMask {
        let first = cluster.first_sector().0;
        match self.chunks.get(&(first >> CHUNK_BITS)) {
            None => SectorMask::NONE,
            Some(Chunk::Full) => SectorMask::ALL,
            Some(Chunk::Part(part)) => {
                let from = low(first);
                let found = part.bitmap.range(from..=from + 7);
                SectorMask(found.fold(0, |mask, sector| mask | 1 << (sector - from)))
            }
        }
    }

    /// How many sectors there are.
    pub(crate) fn len(&self) -> u64 {
        let count = |chunk: &Chunk| match chunk {
            Chunk::Full => CHUNK_SECTORS,
            Chunk::Part(part) => part.count,
        };
        self.chunks.values().map(count).sum()
    }

    /// Whether no sector is in both sets.
    pub(crate) fn is_disjoint(&self, other: &Self) -> bool {
        self.chunks
            .iter()
            .all(|(key, chunk)| match (chunk, other.chunks.get(key)) {
                (_, None) => true,
                (Chunk::Part(here), Some(Chunk::Part(there))) => {
                    here.bitmap.is_disjoint(&there.bitmap)
                }
                _ => false,
            })
    }

    /// The greatest sector.
    pub(crate) fn max(&self) -> Option<Sector> {
        let (key, chunk) = self.chunks.last_key_value()?;
        let low = match chunk {
            Chunk::Full => *whole(*key).end(),
            Chunk::Part(part) => part.bitmap.max()?,
        };
        Some(Sector((key >> (32 - CHUNK_BITS)) << 32 | u64::from(low)))
    }

    /// Packs every container as tightly as it goes.
    pub(crate) fn optimize(&mut self) {
        for chunk in self.chunks.values_mut() {
            if let Chunk::Part(part) = chunk {
                let part = Arc::make_mut(part);
                part.bitmap.optimize();
                part.changes = 0;
            }
        }
    }

    /// The set in the portable form of a 64-bit roaring bitmap.
    pub(crate) fn to_portable(&self) -> Vec<u8> {
        let mut groups: BTreeMap<u64, RoaringBitmap> = BTreeMap::new();
        for (key, chunk) in &self.chunks {
            let group = groups.entry(key >> (32 - CHUNK_BITS)).or_default();
            match chunk {
                Chunk::Full => drop(group.insert_range(whole(*key))),
                Chunk::Part(part) => *group |= &part.bitmap,
            }
        }
        let mut bytes = (groups.len() as u64).to_le_bytes().to_vec();
        for (key, mut bitmap) in groups {
            bitmap.optimize();
            bytes.extend(low(key).to_le_bytes());
            bitmap
                .serialize_into(&mut bytes)
                .expect("writing to memory cannot fail");
        }
        bytes
    }

    /// Reads the portable form. Anything but a well-formed set that ends where the bytes do is refused.
    pub(crate) fn from_portable(mut bytes: &[u8]) -> Result<Self, String> {
        let short = || "the set of sectors ends too early".to_owned();
        let (groups, rest) = bytes.split_first_chunk().ok_or_else(short)?;
        let groups = u64::from_le_bytes(*groups);
        bytes = rest;
        let mut set = Self::default();
        let mut last = None;
        for _ in 0..groups {
            let (key, rest) = bytes.split_first_chunk().ok_or_else(short)?;
            let key = u32::from_le_bytes(*key);
            bytes = rest;
            if last.replace(key).is_some_and(|last| last >= key) {
                return Err(format!(
                    "the keys of the set of sectors do not rise at {key}"
                ));
            }
            let bitmap = RoaringBitmap::deserialize_from(&mut bytes)
                .map_err(|error| format!("the bitmap of key {key} is malformed: {error}"))?;
            if bitmap.is_empty() {
                return Err(format!("the bitmap of key {key} is empty"));
            }
            set.add_group(key, &bitmap);
        }
        if bytes.is_empty() {
            Ok(set)
        } else {
            Err(format!("{} bytes follow the set of sectors", bytes.len()))
        }
    }

    /// Cuts the bitmap of one upper half into chunks, none of which is in the set yet.
    fn add_group(&mut self, high: u32, bitmap: &RoaringBitmap) {
        let mut values = bitmap.iter();
        while let Some(value) = values.next() {
            let key = u64::from(high) << (32 - CHUNK_BITS) | u64::from(value >> CHUNK_BITS);
            let range = whole(key);
            if let Some(chunk) = Chunk::of(bitmap & all_of(key)) {
                self.chunks.insert(key, chunk);
            }
            match range.end().checked_add(1) {
                Some(next) => values.advance_to(next),
                None => break,
            }
        }
    }
}
