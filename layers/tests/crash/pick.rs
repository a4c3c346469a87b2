//! What a random request of a guest is, which sectors it is about, and where its memory is cut into segments.

use std::collections::{BTreeMap, BTreeSet};

use stratablk_layers::file::sim::Random;
use stratablk_layers::units::{SECTOR_BYTES, Sector, SectorRange};

use crate::oracle::{Value, unstamp};

/// Requests by kind.
pub enum Kind {
    Write,
    WriteZeroes,
    Discard,
    Read,
    Flush,
}

/// The kind of the next request.
pub fn kind(random: &mut Random) -> Kind {
    match random.below(100) {
        0..50 => Kind::Write,
        50..60 => Kind::WriteZeroes,
        60..69 => Kind::Discard,
        69..88 => Kind::Read,
        _ => Kind::Flush,
    }
}

/// A run of the sectors of a disk.
pub fn range(random: &mut Random, sectors: u64, longest: u64) -> SectorRange {
    let start = random.below(sectors);
    let (start, count) = match random.below(8) {
        // To the end of the disk, which need not be that of a cluster.
        0 => (start, sectors - start),
        // Whole clusters.
        1 | 2 => {
            let start = start / 8 * 8;
            let count = (1 + random.below(longest.div_ceil(8))) * 8;
            (start, count.min(sectors - start))
        }
        _ => (start, 1 + random.below(longest.min(sectors - start))),
    };
    SectorRange {
        start: Sector(start),
        count,
    }
}

/// Where to cut a request's memory into segments: anywhere.
pub fn cuts(random: &mut Random, len: usize) -> Vec<usize> {
    let cuts: BTreeSet<usize> = (0..random.below(5)).map(|_| random.index(len)).collect();
    cuts.into_iter().collect()
}

/// What a read has found, by the stamps of a family of disks.
///
/// # Errors
/// In words: bytes that were never written there.
pub fn found(family: u64, range: SectorRange, memory: &[u8]) -> Result<Vec<Value>, String> {
    let sectors = memory.chunks_exact(SECTOR_BYTES as usize);
    (range.start.0..)
        .zip(sectors)
        .map(|(sector, bytes)| unstamp(family, sector, bytes))
        .collect()
}

/// Sectors with a request under way, and how many.
pub struct Busy {
    /// Whether requests may overlap.
    overlap: bool,
    sectors: BTreeMap<(String, u64), u64>,
}

impl Busy {
    /// None yet.
    pub fn new(overlap: bool) -> Self {
        Self {
            overlap,
            sectors: BTreeMap::new(),
        }
    }

    /// Whether a new request may be about these.
    pub fn allows(&self, disk: &str, range: SectorRange) -> bool {
        let is_free = |sector| !self.sectors.contains_key(&(disk.to_owned(), sector));
        self.overlap || (range.start.0..range.end().0).all(is_free)
    }

    /// A request begins.
    pub fn begin(&mut self, disk: &str, range: SectorRange) {
        for sector in range.start.0..range.end().0 {
            *self.sectors.entry((disk.to_owned(), sector)).or_default() += 1;
        }
    }

    /// It has ended.
    pub fn end(&mut self, disk: &str, range: SectorRange) {
        for sector in range.start.0..range.end().0 {
            let key = (disk.to_owned(), sector);
            match self.sectors.get_mut(&key) {
                Some(count) if *count > 1 => *count -= 1,
                _ => drop(self.sectors.remove(&key)),
            }
        }
    }
}
