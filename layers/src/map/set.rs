//! What a sealed layer holds. A stand-in of the real one: correct, slow on large ranges.

use roaring::RoaringTreemap;

use super::record::{MapRecord, RecordKind};
use crate::limits::DISK_SECTORS_MAX;
use crate::units::{CLUSTER_SECTORS, Cluster, Sector, SectorMask, SectorRange};

/// The sectors of a layer, in two kinds.
#[derive(Clone, Debug, PartialEq)]
pub enum SectorSet {
    /// All sectors of a disk of this size are data (a raw base).
    Everything(Sector),
    /// Two disjoint sets of sector numbers.
    Bitmaps {
        /// Sectors with data.
        data: RoaringTreemap,
        /// Sectors that read as zeroes.
        zero: RoaringTreemap,
    },
}

impl SectorSet {
    /// Holds nothing.
    pub fn empty() -> Self {
        Self::Bitmaps {
            data: RoaringTreemap::new(),
            zero: RoaringTreemap::new(),
        }
    }

    /// Holds all sectors of a disk.
    pub fn everything(size: Sector) -> Self {
        Self::Everything(size)
    }

    /// Applies a change.
    pub fn apply(&mut self, record: &MapRecord) {
        if let Self::Bitmaps { data, zero } = self {
            let range = record.range.start.0..record.range.end().0;
            let (to, from) = match record.kind {
                RecordKind::Data => (data, zero),
                RecordKind::Zero => (zero, data),
            };
            to.insert_range(range.clone());
            from.remove_range(range);
        }
    }

    /// The data sectors and the zero sectors of a cluster.
    pub fn cluster(&self, cluster: Cluster) -> (SectorMask, SectorMask) {
        let first = cluster.first_sector().0;
        let mask = |set: &RoaringTreemap| {
            SectorMask(
                (0..CLUSTER_SECTORS).fold(0, |m, i| m | (u8::from(set.contains(first + i)) << i)),
            )
        };
        match self {
            Self::Everything(_) => (SectorMask::ALL, SectorMask::NONE),
            Self::Bitmaps { data, zero } => (mask(data), mask(zero)),
        }
    }

    /// The runs of data sectors, ascending.
    pub fn data_runs(&self) -> Box<dyn Iterator<Item = SectorRange> + '_> {
        match self {
            Self::Everything(size) => Box::new(std::iter::once(SectorRange {
                start: Sector(0),
                count: size.0,
            })),
            Self::Bitmaps { data, .. } => Box::new(runs(data)),
        }
    }

    /// The runs of zero sectors, ascending.
    pub fn zero_runs(&self) -> Box<dyn Iterator<Item = SectorRange> + '_> {
        match self {
            Self::Everything(_) => Box::new(std::iter::empty()),
            Self::Bitmaps { zero, .. } => Box::new(runs(zero)),
        }
    }

    /// Both sets in Roaring's portable format: data, zero.
    pub fn to_portable(&self) -> (Vec<u8>, Vec<u8>) {
        let bytes = |set: &RoaringTreemap| {
            let mut set = set.clone();
            set.optimize();
            let mut bytes = Vec::new();
            #[expect(clippy::unwrap_used, reason = "a Vec takes all bytes")]
            set.serialize_into(&mut bytes).unwrap();
            bytes
        };
        match self {
            Self::Everything(_) => (bytes(&RoaringTreemap::new()), bytes(&RoaringTreemap::new())),
            Self::Bitmaps { data, zero } => (bytes(data), bytes(zero)),
        }
    }

    /// The reverse of `to_portable`, from bytes that may be anything.
    pub fn from_portable(data: &[u8], zero: &[u8]) -> Result<Self, String> {
        let set = |mut bytes: &[u8]| {
            let set = RoaringTreemap::deserialize_from(&mut bytes).map_err(|e| e.to_string())?;
            if !bytes.is_empty() {
                return Err(format!("{} bytes too many", bytes.len()));
            }
            match set.max() {
                Some(max) if max >= DISK_SECTORS_MAX + CLUSTER_SECTORS => {
                    Err(format!("sector {max}"))
                }
                _ => Ok(set),
            }
        };
        let (data, zero) = (set(data)?, set(zero)?);
        if !data.is_disjoint(&zero) {
            return Err("a sector is data and zero".into());
        }
        Ok(Self::Bitmaps { data, zero })
    }
}

/// The maximal runs of a set.
fn runs(set: &RoaringTreemap) -> impl Iterator<Item = SectorRange> + '_ {
    let mut sectors = set.iter().peekable();
    std::iter::from_fn(move || {
        let start = sectors.next()?;
        let mut count = 1;
        while sectors.next_if_eq(&(start + count)).is_some() {
            count += 1;
        }
        Some(SectorRange {
            start: Sector(start),
            count,
        })
    })
}
