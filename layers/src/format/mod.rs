//! The bytes of a map file, encoded and decoded: pure functions, no I/O, no panic on any bytes. `FORMAT.md` is the
//! specification; this module only carries it out.
//!
//! What was read is untrusted until it has passed through one of three gates, each of which returns a type that cannot
//! be had otherwise: [`header::Header::decode`], [`checkpoint::decode`], [`journal::Replay`].

#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]

pub mod checkpoint;
pub mod header;
pub mod journal;
pub mod sums;

use std::path::PathBuf;

use crate::error::Error;
use crate::map::set::SectorSet;
use crate::units::LayerId;

use header::Header;
use journal::{JournalEnd, Replay};

/// What is wrong with bytes that should be a map.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// They are not what `FORMAT.md` says.
    #[error("at byte {offset}: {what}")]
    Corrupt {
        /// The byte of the file.
        offset: u64,
        /// What was found there and what was expected.
        what: String,
    },
    /// They are whole, and of a format that this version does not know.
    #[error("at byte {offset}: {what}")]
    Unsupported {
        /// The byte of the file.
        offset: u64,
        /// The version or the feature bits.
        what: String,
    },
}

impl FormatError {
    /// Damage at a byte.
    fn corrupt(offset: u64, what: impl Into<String>) -> Self {
        Self::Corrupt {
            offset,
            what: what.into(),
        }
    }

    /// The same with the file and the layer it was found in.
    pub fn in_map(self, path: PathBuf, layer: LayerId) -> Error {
        let what = format!("map of layer {layer}, {self}");
        match self {
            Self::Corrupt { .. } => Error::Corrupt { path, what },
            Self::Unsupported { .. } => Error::Unsupported { path, what },
        }
    }
}

/// A whole map file in memory, decoded and verified.
#[derive(Clone, Debug, PartialEq)]
pub struct Map {
    /// Its header.
    pub header: Header,
    /// The checkpoint with all committed groups applied; everything, for a raw base.
    pub set: SectorSet,
    /// How the journal ended.
    pub journal: JournalEnd,
}

/// Decodes a whole map file.
///
/// # Errors
/// `Unsupported` for another version or unknown features; `Corrupt` for everything else that is not as specified,
/// except a torn tail of the journal, which is reported in [`JournalEnd`].
pub fn decode_map(bytes: &[u8]) -> Result<Map, FormatError> {
    let header = Header::decode(bytes)?;
    let checkpoint = usize::try_from(header.checkpoint.offset())
        .ok()
        .zip(usize::try_from(header.checkpoint.end()).ok())
        .and_then(|(start, end)| bytes.get(start..end))
        .ok_or_else(|| checkpoint::cut_off(&header, bytes.len() as u64))?;
    let set = checkpoint::decode(&header, checkpoint)?;
    let journal = usize::try_from(header.checkpoint.journal_offset())
        .ok()
        .and_then(|start| bytes.get(start..))
        .unwrap_or_default();
    let mut replay = Replay::new(&header, set);
    replay.feed(journal);
    let (set, journal) = replay.finish()?;
    Ok(Map {
        header,
        set,
        journal,
    })
}

/// The bytes of `N` bytes at a place, or damage if the file is too short for them.
fn field<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], FormatError> {
    bytes
        .get(at..)
        .and_then(<[u8]>::first_chunk)
        .copied()
        .ok_or_else(|| FormatError::corrupt(at as u64, "the file ends here"))
}

/// A little-endian `u64` at a place.
fn field_u64(bytes: &[u8], at: usize) -> Result<u64, FormatError> {
    field(bytes, at).map(u64::from_le_bytes)
}

/// A little-endian `u32` at a place.
fn field_u32(bytes: &[u8], at: usize) -> Result<u32, FormatError> {
    field(bytes, at).map(u32::from_le_bytes)
}

/// Appends fields, each at the offset that the specification names; what lies between is zero.
struct Encoder(Vec<u8>);

impl Encoder {
    /// Puts `bytes` at `offset`.
    fn put(&mut self, offset: usize, bytes: &[u8]) {
        debug_assert!(
            offset >= self.0.len(),
            "fields are put in ascending order and do not overlap"
        );
        self.0.resize(offset, 0);
        self.0.extend_from_slice(bytes);
    }

    /// Zeroes up to `len` bytes in all.
    fn finish(mut self, len: usize) -> Vec<u8> {
        debug_assert!(len >= self.0.len());
        self.0.resize(len, 0);
        self.0
    }
}

#[cfg(test)]
mod tests;
