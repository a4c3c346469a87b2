//! The countable things of this package, each with a type of its own, so that they cannot be mistaken for one another.
//!
//! Conversions are explicit and checked. A sector is always 512 bytes, a cluster always 4 KiB (8 sectors).

use std::fmt;

/// Bytes of a sector, the unit of requests and of on-disk maps.
pub const SECTOR_BYTES: u64 = 512;
/// Bytes of a cluster, the unit of mapping in memory.
pub const CLUSTER_BYTES: u64 = 4096;
/// Sectors of a cluster.
pub const CLUSTER_SECTORS: u64 = CLUSTER_BYTES / SECTOR_BYTES;

/// A position or a length on a disk, in sectors of 512 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sector(pub u64);

impl Sector {
    /// The byte at which this sector starts, or `None` where that does not fit in 64 bits.
    pub const fn bytes(self) -> Option<u64> {
        self.0.checked_mul(SECTOR_BYTES)
    }

    /// The cluster that holds this sector.
    pub const fn cluster(self) -> Cluster {
        Cluster(self.0 / CLUSTER_SECTORS)
    }

    /// Which sector of its cluster this is: 0 to 7.
    pub const fn index_in_cluster(self) -> u32 {
        (self.0 % CLUSTER_SECTORS) as u32
    }
}

impl fmt::Display for Sector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A position on a disk in clusters of 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cluster(pub u64);

impl Cluster {
    /// The first sector of this cluster. Never overflows for a cluster of a disk within `limits::DISK_SECTORS_MAX`.
    pub const fn first_sector(self) -> Sector {
        Sector(self.0.wrapping_mul(CLUSTER_SECTORS))
    }
}

/// A half-open run of sectors: `start .. start + count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SectorRange {
    /// The first sector.
    pub start: Sector,
    /// How many sectors; may be 0.
    pub count: u64,
}

impl SectorRange {
    /// The run of `count` sectors from `start`, or `None` where its end does not fit in 64 bits.
    pub const fn new(start: Sector, count: u64) -> Option<Self> {
        match start.0.checked_add(count) {
            Some(_) => Some(Self { start, count }),
            None => None,
        }
    }

    /// The first sector after the run.
    pub const fn end(self) -> Sector {
        Sector(self.start.0 + self.count)
    }

    /// Whether the run lies inside a disk of `capacity` sectors.
    pub const fn fits(self, capacity: Sector) -> bool {
        self.end().0 <= capacity.0
    }
}

/// Which of the eight sectors of a cluster: bit n is sector n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SectorMask(pub u8);

impl SectorMask {
    /// No sector.
    pub const NONE: Self = Self(0);
    /// All eight sectors.
    pub const ALL: Self = Self(0xff);

    /// The sectors `first .. first + count` of a cluster; `first + count` must be at most 8.
    pub const fn span(first: u32, count: u32) -> Self {
        debug_assert!(first + count <= 8);
        Self((((1u32 << count) - 1) << first).to_le_bytes()[0])
    }

    /// Whether every sector of `other` is in this mask.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// The place of a layer in one volume's chain, counted from 1 at the base; a newer layer has a greater slot.
/// 0 means "no layer". At most 24 bits (`limits::SLOT_MAX`). Slots live in memory only and differ between volumes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerSlot(pub u32);

impl LayerSlot {
    /// No layer says anything: the sector reads as zeroes.
    pub const NONE: Self = Self(0);
}

/// The number of a layer in the sector cache of its store: from 1, at most 2^20. 0 means "no layer".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerNumber(pub u32);

impl fmt::Display for LayerNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Counts the changes of the chains of a store; the one atomic store of a new generation is the instant of a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u64);

/// Counts the commit records in the journal of one layer's map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

/// The name of a layer on disk: a random UUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerId(pub uuid::Uuid);

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

/// The name of a store on disk: a random UUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StoreId(pub uuid::Uuid);

impl fmt::Display for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}
