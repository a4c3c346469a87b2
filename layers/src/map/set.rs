//! What a sealed layer holds: its sectors of data and its sectors of zeroes.

mod merge;
#[cfg(all(test, not(loom)))]
mod tests;

pub use merge::Exposed;

use crate::limits::DISK_SECTORS_MAX;
use crate::map::record::{MapRecord, RecordKind, cluster_parts};
use crate::map::sectors::Sectors;
use crate::units::{CLUSTER_SECTORS, Cluster, Sector, SectorMask, SectorRange};

/// The sectors that a layer holds. What is in neither kind is the parent's.
///
/// INVARIANT: data and zeroes are disjoint, and a cluster's zeroes are either none or all sectors that are not data.
/// The records of an `ActiveMap` keep it so once a collection was applied as a whole, and `from_portable` checks it.
/// Sectors beyond the disk's end in its last cluster may be there and mean nothing.
#[derive(Clone, Debug)]
pub struct SectorSet {
    /// The sectors.
    held: Held,
}

/// The two ways to hold sectors.
#[derive(Clone, Debug)]
enum Held {
    /// Data from the first sector up to this one: a raw base.
    Everything(Sector),
    /// Some.
    Some {
        /// Sectors whose data the layer's file holds.
        data: Sectors,
        /// Sectors that are zeroes.
        zero: Sectors,
    },
}

impl SectorSet {
    /// The set of a layer that holds nothing.
    pub fn empty() -> Self {
        Self::of(Sectors::default(), Sectors::default())
    }

    /// The set of a raw base of this size.
    pub const fn everything(size: Sector) -> Self {
        Self {
            held: Held::Everything(size),
        }
    }

    /// The set of these sectors.
    const fn of(data: Sectors, zero: Sectors) -> Self {
        Self {
            held: Held::Some { data, zero },
        }
    }

    /// Lets a record take effect. Costs by its runs, not by its sectors.
    pub fn apply(&mut self, record: &MapRecord) {
        let (data, zero) = self.sectors_mut();
        let (more, less) = match record.kind {
            RecordKind::Data => (data, zero),
            RecordKind::Zero => (zero, data),
        };
        more.insert(record.range);
        less.remove(record.range);
    }

    /// The two sets, written out if this was everything.
    fn sectors_mut(&mut self) -> (&mut Sectors, &mut Sectors) {
        if let Held::Everything(size) = self.held {
            let mut data = Sectors::default();
            data.insert(SectorRange {
                start: Sector(0),
                count: size.0,
            });
            *self = Self::of(data, Sectors::default());
        }
        match &mut self.held {
            Held::Some { data, zero } => (data, zero),
            Held::Everything(_) => unreachable!("written out above"),
        }
    }

    /// Which sectors of a cluster are data, and which are zeroes.
    pub fn cluster(&self, cluster: Cluster) -> (SectorMask, SectorMask) {
        match &self.held {
            Held::Everything(size) => {
                let held = size
                    .0
                    .saturating_sub(cluster.first_sector().0)
                    .min(CLUSTER_SECTORS);
                let held = u32::try_from(held).unwrap_or(0);
                (SectorMask::span(0, held), SectorMask::NONE)
            }
            Held::Some { data, zero } => (data.cluster(cluster), zero.cluster(cluster)),
        }
    }

    /// The runs of data, each as long as possible, in order.
    pub fn data_runs(&self) -> impl Iterator<Item = SectorRange> {
        let (all, some) = match &self.held {
            Held::Everything(Sector(0)) => (None, None),
            Held::Everything(size) => {
                let all = SectorRange {
                    start: Sector(0),
                    count: size.0,
                };
                (Some(all), None)
            }
            Held::Some { data, .. } => (None, Some(data.runs())),
        };
        all.into_iter().chain(some.into_iter().flatten())
    }

    /// The runs of zeroes, each as long as possible, in order.
    pub fn zero_runs(&self) -> impl Iterator<Item = SectorRange> {
        let some = match &self.held {
            Held::Everything(_) => None,
            Held::Some { zero, .. } => Some(zero.runs()),
        };
        some.into_iter().flatten()
    }

    /// The first sector behind all data.
    pub fn data_end(&self) -> Sector {
        match &self.held {
            Held::Everything(size) => *size,
            Held::Some { data, .. } => data
                .max()
                .map_or(Sector(0), |last| Sector(last.0.saturating_add(1))),
        }
    }

    /// How many sectors are data.
    pub fn data_sectors(&self) -> u64 {
        match &self.held {
            Held::Everything(size) => size.0,
            Held::Some { data, .. } => data.len(),
        }
    }

    /// How many sectors are zeroes.
    pub fn zero_sectors(&self) -> u64 {
        match &self.held {
            Held::Everything(_) => 0,
            Held::Some { zero, .. } => zero.len(),
        }
    }

    /// Packs the set as tightly as it goes; for one that will not change any more.
    pub fn optimize(&mut self) {
        if let Held::Some { data, zero } = &mut self.held {
            data.optimize();
            zero.optimize();
        }
    }

    /// Data and zeroes in the portable form of 64-bit roaring bitmaps.
    pub fn to_portable(&self) -> (Vec<u8>, Vec<u8>) {
        let mut whole = self.clone();
        let (data, zero) = whole.sectors_mut();
        (data.to_portable(), zero.to_portable())
    }

    /// Reads what `to_portable` wrote. The bytes may be anyone's: what is not a valid set is refused in words.
    ///
    /// # Errors
    /// Says what is wrong: malformed, too long, sectors beyond every disk, or a breach of the invariant.
    pub fn from_portable(data: &[u8], zero: &[u8]) -> Result<Self, String> {
        let data = Sectors::from_portable(data).map_err(|what| format!("data: {what}"))?;
        let zero = Sectors::from_portable(zero).map_err(|what| format!("zeroes: {what}"))?;
        for (kind, sectors) in [("data", &data), ("zeroes", &zero)] {
            if let Some(max) = sectors.max()
                && max.0 >= DISK_SECTORS_MAX + CLUSTER_SECTORS
            {
                return Err(format!("{kind}: sector {max} lies beyond the largest disk"));
            }
        }
        if !data.is_disjoint(&zero) {
            return Err("some sectors are both data and zeroes".to_owned());
        }
        for part in zero.runs().flat_map(cluster_parts) {
            if part.mask != SectorMask::ALL
                && zero.cluster(part.first).0 != !data.cluster(part.first).0
            {
                return Err(format!(
                    "cluster {}: neither all nor none of its sectors without data are zeroes",
                    part.first.0
                ));
            }
        }
        Ok(Self::of(data, zero))
    }
}

impl PartialEq for SectorSet {
    /// Whether both hold the same sectors, however they hold them.
    fn eq(&self, other: &Self) -> bool {
        self.data_runs().eq(other.data_runs()) && self.zero_runs().eq(other.zero_runs())
    }
}

impl Eq for SectorSet {}
