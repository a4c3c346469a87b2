//! Checksums of a sealed layer's data: computed from its file, and held against those that were taken before. Used by the
//! daemon, a piece at a time between other work, and by the check of a store that is not in use.

use std::io;
use std::sync::Arc;

use crate::cache::runs;
use crate::canary::{self, Canary};
use crate::file::{File, Media, OpenMode};
use crate::map::SectorSet;
use crate::map::record::{MapRecord, RecordKind};
use crate::mapfile::data_path;
use crate::sumfile::SumsReader;
use crate::units::{
    CLUSTER_BYTES, CLUSTER_SECTORS, Cluster, LayerId, SECTOR_BYTES, Sector, SectorMask, SectorRange,
};

/// The data of a layer, opened so that the medium is read and not the host's page cache, as far as the host can: direct
/// transfers, or else what is cached is dropped first. Returns also whether it is direct.
///
/// # Errors
/// The host's answer.
pub fn open_uncached(media: &Arc<dyn Media>, layer: LayerId) -> io::Result<(Arc<dyn File>, bool)> {
    let file = media.open(&data_path(layer), OpenMode::ReadOnly, true)?;
    let direct = file.alignment() > 1;
    if !direct {
        file.drop_cached()?;
    }
    Ok((file, direct))
}

/// A cluster that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summed {
    /// The cluster.
    pub cluster: Cluster,
    /// The sectors that the layer holds as data.
    pub held: SectorMask,
    /// The checksum of these, in order; `None` if they could not be read.
    pub sum: Option<u32>,
}

/// The checksum of the held sectors of a cluster, which is in memory as a whole.
pub fn sum_of(cluster: &[u8], held: SectorMask) -> u32 {
    runs(held).fold(0, |crc, run| {
        let part = cluster.get(run.offset()..run.offset() + run.bytes());
        crc32c::crc32c_append(crc, part.unwrap_or_default())
    })
}

/// Reads one layer's data in order.
#[derive(Debug)]
pub struct Scan {
    /// The data.
    file: Arc<dyn File>,
    /// What the layer holds.
    set: Arc<SectorSet>,
    /// The first cluster that was not read.
    at: u64,
}

impl Scan {
    /// Begins.
    pub fn new(file: Arc<dyn File>, set: Arc<SectorSet>) -> Self {
        Self { file, set, at: 0 }
    }

    /// The checksums of the next clusters that lie together and have data, at most so many bytes of them, one cluster at
    /// least. None: that was all.
    pub fn next_piece(&mut self, bytes_max: u64) -> Vec<Summed> {
        let most = (bytes_max / CLUSTER_BYTES).max(1);
        let left = u64::MAX / CLUSTER_SECTORS - self.at;
        let run = self.set.data_runs_in(Cluster(self.at), left).next();
        let Some(first) = run.map(|run| run.start.cluster()) else {
            return Vec::new();
        };
        let mut clusters = Vec::new();
        while (clusters.len() as u64) < most {
            let cluster = Cluster(first.0 + clusters.len() as u64);
            let held = self.set.cluster(cluster).0;
            if held == SectorMask::NONE {
                break;
            }
            clusters.push((cluster, held));
        }
        self.at = first.0 + clusters.len() as u64;
        let bytes = clusters.len() * usize::try_from(CLUSTER_BYTES).unwrap_or(4096);
        let mut memory = vec![0; bytes];
        let whole = self.file.read_at(&mut memory, first.0 * CLUSTER_BYTES);
        let pages = memory.chunks_exact(usize::try_from(CLUSTER_BYTES).unwrap_or(4096));
        let summed = clusters
            .into_iter()
            .zip(pages)
            .map(|((cluster, held), page)| Summed {
                cluster,
                held,
                sum: match &whole {
                    Ok(()) => Some(sum_of(page, held)),
                    // Which of them is it?
                    Err(_) => self.sum(cluster, held),
                },
            });
        summed.collect()
    }

    /// Reads one cluster, and of that only what is held.
    pub fn sum(&self, cluster: Cluster, held: SectorMask) -> Option<u32> {
        let mut crc = 0;
        for run in runs(held) {
            let mut bytes = vec![0; run.bytes()];
            let offset = cluster.0 * CLUSTER_BYTES + run.offset() as u64;
            self.file.read_at(&mut bytes, offset).ok()?;
            crc = crc32c::crc32c_append(crc, &bytes);
        }
        Some(crc)
    }
}

/// A cluster whose data is not what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The cluster.
    pub cluster: Cluster,
    /// The sectors that the layer holds as data.
    pub held: SectorMask,
    /// The checksum that they had.
    pub expected: u32,
}

/// What came of a piece.
#[derive(Debug, Default)]
pub struct Piece {
    /// Bytes of data that were read.
    pub bytes: u64,
    /// Clusters whose data is not what it was.
    pub mismatches: Vec<Mismatch>,
    /// Clusters of which nobody knows: their checksum is damaged.
    pub unknown: Vec<(Cluster, SectorMask)>,
    /// Whether that was the last one.
    pub is_last: bool,
}

/// One layer's data held against its checksums.
#[derive(Debug)]
pub struct Verification {
    /// Reads the data.
    scan: Scan,
    /// What it is to be.
    pub sums: SumsReader,
}

impl Verification {
    /// Begins. The caller has made sure that the checksums are those of this set.
    pub fn new(file: Arc<dyn File>, set: Arc<SectorSet>, sums: SumsReader) -> Self {
        Self {
            scan: Scan::new(file, set),
            sums,
        }
    }

    /// The next piece.
    pub fn next_piece(&mut self, bytes_max: u64) -> Piece {
        let summed = self.scan.next_piece(bytes_max);
        let mut piece = Piece {
            is_last: summed.is_empty(),
            ..Piece::default()
        };
        let last = summed.last().map(|one| one.cluster);
        for one in summed {
            piece.bytes += u64::from(one.held.0.count_ones()) * SECTOR_BYTES;
            let skipped = canary::is_set(Canary::SkipLastOfPiece) && last == Some(one.cluster);
            match self.sums.next_sum() {
                _ if skipped => {}
                None => piece.unknown.push((one.cluster, one.held)),
                Some(expected) if one.sum != Some(expected) => piece.mismatches.push(Mismatch {
                    cluster: one.cluster,
                    held: one.held,
                    expected,
                }),
                Some(_) => {}
            }
        }
        piece
    }

    /// Reads a cluster again.
    pub fn sum(&self, cluster: Cluster, held: SectorMask) -> Option<u32> {
        self.scan.sum(cluster, held)
    }

    /// After the last piece: whether there was data for every checksum. If not, something was left out.
    pub fn is_complete(&self) -> bool {
        self.sums.handed_out() == self.sums.header.extent.clusters
    }
}

/// Adds sectors of a cluster to a set.
pub fn add(set: &mut SectorSet, cluster: Cluster, mask: SectorMask) {
    for run in runs(mask) {
        let start = Sector(cluster.first_sector().0 + u64::from(run.first));
        if let Some(range) = SectorRange::new(start, u64::from(run.count)) {
            let kind = RecordKind::Data;
            set.apply(&MapRecord { kind, range });
        }
    }
}
