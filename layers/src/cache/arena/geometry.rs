//! Where the parts of an arena lie: a function of the number of sets alone.

use crate::cache::numbers::{MARKS_BYTES, TABLE_BYTES};
use crate::cache::set::{Set, WAYS};
use crate::units::CLUSTER_BYTES;

/// Bytes of the header, which is the first page.
pub const HEADER_BYTES: usize = 4096;
/// A huge page: sets and frames start at a multiple of it, in the file and in memory.
pub const HUGE: usize = 2 << 20;
/// The same as a distance in a file.
pub const HUGE_BYTES: u64 = HUGE as u64;
/// The layer numbers' first byte in the file.
pub const NUMBERS_AT: u64 = HEADER_BYTES as u64;
/// The first set's first byte in the file.
pub const SETS_AT: u64 = (NUMBERS_AT + TABLE_BYTES + MARKS_BYTES).next_multiple_of(HUGE_BYTES);
/// Bytes of a set.
pub const SET_BYTES: u64 = size_of::<Set>() as u64;
/// Bytes of the frames of a set.
const SET_FRAMES_BYTES: u64 = WAYS as u64 * CLUSTER_BYTES;

// Offsets in memory are counted in `usize` and offsets in files in `u64`, one as good as the other.
const _: () = assert!(size_of::<usize>() == size_of::<u64>());

/// Where the parts of an arena of a certain size lie. Nothing in it overflows an `i64` or an `isize`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// How many sets there are; at least 1.
    pub sets: u64,
    /// Bytes of all sets.
    pub sets_bytes: u64,
    /// The first frame's first byte in the file.
    pub data_at: u64,
    /// Bytes of all frames.
    pub data_bytes: u64,
    /// Bytes of the file.
    pub len: u64,
}

impl Geometry {
    /// The geometry of an arena of `sets` sets, or `None` if there can be none.
    pub fn of(sets: u64) -> Option<Self> {
        if sets == 0 {
            return None;
        }
        let sets_bytes = sets.checked_mul(SET_BYTES)?;
        let data_at = SETS_AT
            .checked_add(sets_bytes)?
            .checked_next_multiple_of(HUGE_BYTES)?;
        let data_bytes = sets.checked_mul(SET_FRAMES_BYTES)?;
        let len = data_at.checked_add(data_bytes)?;
        // Room for an alignment of the mapping as well.
        i64::try_from(len.checked_add(HUGE_BYTES)?).ok()?;
        Some(Self {
            sets,
            sets_bytes,
            data_at,
            data_bytes,
            len,
        })
    }

    /// The frames' first byte in memory, counted from the first set's.
    pub fn data_offset(&self) -> u64 {
        self.data_at - SETS_AT
    }

    /// Bytes from the first set to the end of the last frame.
    pub fn mapped_bytes(&self) -> u64 {
        self.len - SETS_AT
    }

    /// The parts of the file that must never lack a page, as offset and length. The layer numbers are not among them:
    /// they are reached with reads and writes, which can fail, so they take up no more than is used.
    pub fn reserved(&self) -> [(u64, u64); 3] {
        [
            (0, HEADER_BYTES as u64),
            (SETS_AT, self.sets_bytes),
            (self.data_at, self.data_bytes),
        ]
    }

    /// Bytes of those parts.
    pub fn reserved_bytes(&self) -> u64 {
        self.reserved().iter().map(|(_, len)| len).sum()
    }
}
