//! The first page of an arena, encoded and decoded: pure functions, no panic on any bytes. `ARENA.md` is the
//! specification.

use uuid::Uuid;

use super::geometry::{Geometry, HEADER_BYTES, NUMBERS_AT, SET_BYTES, SETS_AT};
use super::place::{DirId, Place};
use crate::cache::set::WAYS;
use crate::limits::LAYER_NUMBER_MAX;
use crate::units::{CLUSTER_BYTES, StoreId};

/// The first bytes of every arena that was finished.
pub const MAGIC: [u8; 8] = *b"STRATARN";
/// The version that this code writes and reads.
pub const VERSION: u32 = 1;

/// Incompatible features that this code knows: none yet.
const INCOMPATIBLE_KNOWN: u64 = 0;

// Where the fields lie, as in ARENA.md.
const AT_VERSION: usize = 8;
const AT_CRC: usize = 12;
const AT_INCOMPATIBLE: usize = 16;
const AT_STORE: usize = 32;
const AT_BOOT: usize = 48;
const AT_DIR_DEV: usize = 64;
const AT_DIR_INO: usize = 72;
const AT_SETS: usize = 80;
const AT_WAYS: usize = 88;
const AT_FRAME_BYTES: usize = 96;
const AT_NUMBERS: usize = 104;
const AT_NUMBER_MAX: usize = 112;
const AT_SETS_START: usize = 120;
const AT_SET_BYTES: usize = 128;
const AT_DATA_START: usize = 136;
const AT_LEN: usize = 144;

/// A header that was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The store whose sectors these are.
    pub store: StoreId,
    /// The directory of that store.
    pub store_dir: DirId,
    /// Where the parts lie.
    pub geometry: Geometry,
}

/// Why a header is not to be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Whoever created the file did not finish. Nothing is in it.
    Unfinished,
    /// It is of another boot: what it held is in the layers' files or lost.
    OtherBoot,
    /// It is not what `ARENA.md` says.
    Corrupt(String),
    /// It is whole, and of a format that this version does not know.
    Unsupported(String),
}

/// The bytes of `N` bytes at a place.
fn field<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    // The places are constants within the page.
    bytes
        .get(at..)
        .and_then(<[u8]>::first_chunk)
        .copied()
        .unwrap_or([0; N])
}

/// The CRC of a header, its own field taken as zeroes.
fn header_crc(bytes: &[u8; HEADER_BYTES]) -> u32 {
    let (before, rest) = bytes.split_at(AT_CRC);
    let after = rest.get(size_of::<u32>()..).unwrap_or_default();
    let crc = crc32c::crc32c_append(crc32c::crc32c(before), &[0; size_of::<u32>()]);
    crc32c::crc32c_append(crc, after)
}

/// Puts the checksum of a header into it.
pub(super) fn seal(bytes: &mut [u8; HEADER_BYTES]) {
    let crc = header_crc(bytes);
    put(bytes, AT_CRC, &crc.to_le_bytes());
}

/// Puts a field at its place.
fn put(bytes: &mut [u8; HEADER_BYTES], at: usize, value: &[u8]) {
    let place = bytes
        .get_mut(at..)
        .and_then(|rest| rest.get_mut(..value.len()));
    if let Some(place) = place {
        place.copy_from_slice(value);
    }
}

/// The fields that follow from the number of sets, so that the file says by itself where everything is: place and value.
fn layout(geometry: &Geometry) -> [(usize, u64); 8] {
    [
        (AT_WAYS, WAYS as u64),
        (AT_FRAME_BYTES, CLUSTER_BYTES),
        (AT_NUMBERS, NUMBERS_AT),
        (AT_NUMBER_MAX, LAYER_NUMBER_MAX.into()),
        (AT_SETS_START, SETS_AT),
        (AT_SET_BYTES, SET_BYTES),
        (AT_DATA_START, geometry.data_at),
        (AT_LEN, geometry.len),
    ]
}

impl Header {
    /// The header of a new arena of a store, as this boot writes it.
    pub fn encode(place: &Place, geometry: &Geometry) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        put(&mut bytes, 0, &MAGIC);
        put(&mut bytes, AT_VERSION, &VERSION.to_le_bytes());
        put(&mut bytes, AT_STORE, place.store.0.as_bytes());
        put(&mut bytes, AT_BOOT, place.boot.as_bytes());
        put(&mut bytes, AT_DIR_DEV, &place.store_dir.dev.to_le_bytes());
        put(&mut bytes, AT_DIR_INO, &place.store_dir.ino.to_le_bytes());
        put(&mut bytes, AT_SETS, &geometry.sets.to_le_bytes());
        for (at, value) in layout(geometry) {
            put(&mut bytes, at, &value.to_le_bytes());
        }
        seal(&mut bytes);
        bytes
    }

    /// Decodes and verifies a header found in this boot.
    ///
    /// # Errors
    /// Why it is not to be used.
    pub fn decode(bytes: &[u8; HEADER_BYTES], boot: Uuid) -> Result<Self, Refusal> {
        let magic: [u8; 8] = field(bytes, 0);
        if magic == [0; 8] {
            return Err(Refusal::Unfinished);
        }
        if magic != MAGIC {
            return Err(Refusal::Corrupt(format!(
                "its magic is {:?}",
                magic.escape_ascii().to_string()
            )));
        }
        let stored = u32::from_le_bytes(field(bytes, AT_CRC));
        let computed = header_crc(bytes);
        if stored != computed {
            return Err(Refusal::Corrupt(format!(
                "the header's checksum is {stored:#010x}, its bytes have {computed:#010x}"
            )));
        }
        // Before the version: an arena of another boot is of no use in any version.
        if Uuid::from_bytes(field(bytes, AT_BOOT)) != boot {
            return Err(Refusal::OtherBoot);
        }
        let version = u32::from_le_bytes(field(bytes, AT_VERSION));
        if version != VERSION {
            return Err(Refusal::Unsupported(format!(
                "version {version}; this one knows version {VERSION}"
            )));
        }
        let unknown = u64::from_le_bytes(field(bytes, AT_INCOMPATIBLE)) & !INCOMPATIBLE_KNOWN;
        if unknown != 0 {
            return Err(Refusal::Unsupported(format!(
                "unknown incompatible features {unknown:#x}"
            )));
        }
        let sets = u64::from_le_bytes(field(bytes, AT_SETS));
        let geometry = Geometry::of(sets)
            .ok_or_else(|| Refusal::Corrupt(format!("there can be no arena of {sets} sets")))?;
        for (at, expected) in layout(&geometry) {
            expect(at, u64::from_le_bytes(field(bytes, at)), expected)?;
        }
        Ok(Self {
            store: StoreId(Uuid::from_bytes(field(bytes, AT_STORE))),
            store_dir: DirId {
                dev: u64::from_le_bytes(field(bytes, AT_DIR_DEV)),
                ino: u64::from_le_bytes(field(bytes, AT_DIR_INO)),
            },
            geometry,
        })
    }
}

/// Refuses a field that is not as it has to be.
fn expect(at: usize, found: u64, expected: u64) -> Result<(), Refusal> {
    if found == expected {
        return Ok(());
    }
    Err(Refusal::Corrupt(format!(
        "{found} instead of {expected} at byte {at} of the header"
    )))
}
