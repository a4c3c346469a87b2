//! One change of a map.

use crate::units::SectorRange;

/// What a record says of its sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RecordKind {
    /// The layer's file holds them.
    Data,
    /// They read as zeroes.
    Zero,
}

/// The sectors of a range are of this kind from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MapRecord {
    /// Data or zeroes.
    pub kind: RecordKind,
    /// Which sectors.
    pub range: SectorRange,
}
