//! The saved state of a machine's disk: a small record that names a sealed layer. What the disk holds stays in the store.
//!
//! All numbers are little-endian:
//!
//! | bytes | what |
//! |-------|------|
//! | 8     | [`MAGIC`] |
//! | 2     | version: 1 |
//! | 16    | the store |
//! | 16    | the sealed layer |
//! | 8     | size of the disk in sectors |
//! | 8     | the instant: nanoseconds since 1970 |
//! | 2 + n | length and UTF-8 of the volume's name |
//! | 2 + n | the same of the snapshot's |
//! | 4     | CRC-32C of all before |
//!
//! It comes from whoever gives it back, so nothing of it is believed before it was compared with the store.

use uuid::Uuid;

use crate::limits::NAME_BYTES_MAX;
use crate::units::{LayerId, Sector, StoreId};

/// What it begins with.
const MAGIC: &[u8; 8] = b"SBLKSTAT";
/// The version that is written and read.
pub(crate) const VERSION: u16 = 1;

/// A saved state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedState {
    /// The store that holds it.
    pub store: StoreId,
    /// The layer that was sealed for it.
    pub layer: LayerId,
    /// The size of the disk.
    pub size: Sector,
    /// The instant: nanoseconds since 1970.
    pub created_ns: u64,
    /// The volume that it was saved of.
    pub volume: String,
    /// The snapshot that keeps the layer.
    pub snapshot: String,
}

/// Takes bytes off the front.
fn take<'a, const N: usize>(rest: &mut &'a [u8]) -> Option<&'a [u8; N]> {
    let (first, after) = rest.split_first_chunk()?;
    *rest = after;
    Some(first)
}

/// Takes a name off the front.
fn take_name(rest: &mut &[u8]) -> Option<String> {
    let len = usize::from(u16::from_le_bytes(*take(rest)?));
    let (name, after) = rest.split_at_checked(len)?;
    *rest = after;
    (1..=NAME_BYTES_MAX).contains(&len).then_some(())?;
    Some(std::str::from_utf8(name).ok()?.to_owned())
}

impl SavedState {
    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.store.0.as_bytes());
        bytes.extend(self.layer.0.as_bytes());
        bytes.extend(self.size.0.to_le_bytes());
        bytes.extend(self.created_ns.to_le_bytes());
        for name in [&self.volume, &self.snapshot] {
            // Names are far shorter.
            let len = u16::try_from(name.len()).unwrap_or(u16::MAX);
            bytes.extend(len.to_le_bytes());
            bytes.extend(name.as_bytes());
        }
        bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
        bytes
    }

    /// From bytes.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        const SHORT: &str = "it is not whole";
        let (body, crc) = bytes.split_last_chunk().ok_or(SHORT)?;
        let mut rest = body;
        if take(&mut rest) != Some(MAGIC) {
            return Err("it is no saved state of this program");
        }
        let version = u16::from_le_bytes(*take(&mut rest).ok_or(SHORT)?);
        if version != VERSION {
            return Err("it is of another version of this program");
        }
        if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
            return Err("it is damaged");
        }
        let state = Self {
            store: StoreId(Uuid::from_bytes(*take(&mut rest).ok_or(SHORT)?)),
            layer: LayerId(Uuid::from_bytes(*take(&mut rest).ok_or(SHORT)?)),
            size: Sector(u64::from_le_bytes(*take(&mut rest).ok_or(SHORT)?)),
            created_ns: u64::from_le_bytes(*take(&mut rest).ok_or(SHORT)?),
            volume: take_name(&mut rest).ok_or(SHORT)?,
            snapshot: take_name(&mut rest).ok_or(SHORT)?,
        };
        match rest {
            [] => Ok(state),
            _ => Err("something follows it"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]
    use proptest::prelude::*;

    use super::*;

    fn state() -> SavedState {
        SavedState {
            store: StoreId(Uuid::from_u128(1)),
            layer: LayerId(Uuid::from_u128(2)),
            size: Sector(3),
            created_ns: 4,
            volume: "web".into(),
            snapshot: "state-5".into(),
        }
    }

    #[test]
    fn it_comes_back_as_it_was_and_only_whole() {
        let bytes = state().encode();
        assert_eq!(SavedState::decode(&bytes), Ok(state()));
        for len in 0..bytes.len() {
            SavedState::decode(&bytes[..len]).unwrap_err();
        }
        let mut longer = bytes.clone();
        longer.push(0);
        SavedState::decode(&longer).unwrap_err();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            SavedState::decode(&damaged).unwrap_err();
        }
    }

    #[test]
    fn what_follows_the_last_field_is_refused_even_under_a_good_checksum() {
        let mut bytes = state().encode();
        bytes.truncate(bytes.len() - 4);
        bytes.push(7);
        bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
        assert_eq!(SavedState::decode(&bytes), Err("something follows it"));
    }

    proptest! {
        #[test]
        fn no_bytes_do_harm(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), framed: bool) {
            if framed {
                let mut whole = MAGIC.to_vec();
                whole.extend(VERSION.to_le_bytes());
                whole.append(&mut bytes);
                whole.extend(crc32c::crc32c(&whole).to_le_bytes());
                bytes = whole;
            }
            if let Ok(state) = SavedState::decode(&bytes) {
                prop_assert_eq!(state.encode(), bytes);
            }
        }
    }
}
