//! The bytes of a layer's files `sums` and `bad`: checksums of a sealed layer's data, and which of its data is known to be
//! damaged. Pure functions; `FORMAT.md` is the specification.

use uuid::Uuid;

use super::{Encoder, FormatError, field, field_u32, field_u64};
use crate::canary::{self, Canary};
use crate::map::set::SectorSet;
use crate::units::{LayerId, StoreId};

/// Bytes of the header of `sums`, and of each of its blocks.
pub const BLOCK_BYTES: usize = 4096;
/// Checksums in a block.
pub const SUMS_PER_BLOCK: usize = BLOCK_BYTES / 4 - 1;
/// Bytes of the header of `bad`.
const BAD_HEADER_BYTES: usize = 128;
/// The only version of both.
pub const VERSION: u32 = 1;
/// What `sums` begins with.
const SUMS_MAGIC: [u8; 8] = *b"STRATSUM";
/// What `bad` begins with.
const BAD_MAGIC: [u8; 8] = *b"STRATBAD";

/// Offsets that both files share.
const AT_VERSION: usize = 8;
/// The checksum.
const AT_CRC: usize = 12;
/// Features that a reader must know.
const AT_INCOMPATIBLE: usize = 16;
/// Features that it need not know.
const AT_COMPATIBLE: usize = 24;
/// The store.
const AT_STORE: usize = 32;
/// The layer.
const AT_LAYER: usize = 48;
/// `sums`: the number of the map file.
const AT_INCARNATION: usize = 64;
/// `sums`: how many clusters have data.
const AT_CLUSTERS: usize = 72;
/// `sums`: how many sectors are data.
const AT_SECTORS: usize = 80;
/// `sums`: when they were taken.
const AT_TAKEN: usize = 88;
/// `sums`: checksum of the runs of data.
const AT_RUNS: usize = 96;
/// `sums`: the number of the map file that takes that one's place and says the same.
const AT_SUCCESSOR: usize = 104;
/// `bad`: bytes of the bitmap.
const AT_BITMAP_LEN: usize = 64;
/// `bad`: when the last of it was found.
const AT_FOUND: usize = 72;

/// What a file of checksums says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SumsHeader {
    /// The store.
    pub store: StoreId,
    /// The layer.
    pub layer: LayerId,
    /// The number of the map file that says which sectors are data.
    pub incarnation: u64,
    /// The number of the map file that says the same and takes that one's place, or was to; 0: there is none.
    pub successor: u64,
    /// Which sectors these are.
    pub extent: Extent,
    /// When they were taken: nanoseconds since 1970.
    pub taken_ns: u64,
}

/// Which sectors of a layer are data, in short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Clusters that have any.
    pub clusters: u64,
    /// Sectors.
    pub sectors: u64,
    /// Checksum of the runs.
    pub runs_crc: u32,
}

impl Extent {
    /// Of a layer that holds this.
    pub fn of(set: &SectorSet) -> Self {
        let mut extent = Self {
            clusters: 0,
            sectors: 0,
            runs_crc: 0,
        };
        // The last cluster that was counted.
        let mut last = None;
        for run in set.data_runs() {
            let mut bytes = [0; 16];
            let (start, count) = bytes.split_at_mut(8);
            start.copy_from_slice(&run.start.0.to_le_bytes());
            count.copy_from_slice(&run.count.to_le_bytes());
            extent.runs_crc = crc32c::crc32c_append(extent.runs_crc, &bytes);
            extent.sectors = extent.sectors.saturating_add(run.count);
            let first = run.start.cluster().0;
            let end = run.end().0.saturating_sub(1);
            let end = crate::units::Sector(end).cluster().0;
            let again = u64::from(last == Some(first));
            extent.clusters += end.saturating_sub(first) + 1 - again;
            last = Some(end);
        }
        extent
    }

    /// Blocks of checksums.
    pub fn blocks(&self) -> u64 {
        self.clusters.div_ceil(SUMS_PER_BLOCK as u64)
    }

    /// Bytes of the whole file; `None` if there is no such file.
    pub fn file_bytes(&self) -> Option<u64> {
        self.blocks()
            .checked_add(1)?
            .checked_mul(BLOCK_BYTES as u64)
    }
}

/// The checksum of a file's head, with its own place taken as zeroes.
fn crc_without_itself(bytes: &[u8]) -> u32 {
    let (before, rest) = bytes.split_at_checked(AT_CRC).unwrap_or((bytes, &[]));
    let after = rest.get(4..).unwrap_or_default();
    let crc = crc32c::crc32c_append(crc32c::crc32c(before), &[0; 4]);
    crc32c::crc32c_append(crc, after)
}

/// Puts the checksum in its place.
fn sign(mut bytes: Vec<u8>) -> Vec<u8> {
    let crc = crc_without_itself(&bytes);
    if let Some(place) = bytes.get_mut(AT_CRC..AT_INCOMPATIBLE) {
        place.copy_from_slice(&crc.to_le_bytes());
    }
    bytes
}

/// The first fields of either file.
fn begin(magic: &[u8; 8], store: StoreId, layer: LayerId, len: usize) -> Encoder {
    let mut out = Encoder(Vec::with_capacity(len));
    out.put(0, magic);
    out.put(AT_VERSION, &VERSION.to_le_bytes());
    out.put(AT_INCOMPATIBLE, &0u64.to_le_bytes());
    out.put(AT_COMPATIBLE, &0u64.to_le_bytes());
    out.put(AT_STORE, store.0.as_bytes());
    out.put(AT_LAYER, layer.0.as_bytes());
    out
}

/// Verifies the first fields of either file, and the checksum of `bytes`.
fn verify(magic: &[u8; 8], what: &str, bytes: &[u8]) -> Result<(StoreId, LayerId), FormatError> {
    let found: [u8; 8] = field(bytes, 0)?;
    if found != *magic {
        return Err(FormatError::corrupt(
            0,
            format!("not {what}: magic {:?}", found.escape_ascii().to_string()),
        ));
    }
    let (stored, computed) = (field_u32(bytes, AT_CRC)?, crc_without_itself(bytes));
    if stored != computed {
        return Err(FormatError::corrupt(
            AT_CRC as u64,
            format!("the checksum is {stored:#010x}, the bytes have {computed:#010x}"),
        ));
    }
    let version = field_u32(bytes, AT_VERSION)?;
    if version != VERSION {
        return Err(FormatError::Unsupported {
            offset: AT_VERSION as u64,
            what: format!("version {version}; this one knows version {VERSION}"),
        });
    }
    let unknown = field_u64(bytes, AT_INCOMPATIBLE)?;
    if unknown != 0 {
        return Err(FormatError::Unsupported {
            offset: AT_INCOMPATIBLE as u64,
            what: format!("unknown incompatible features {unknown:#x}"),
        });
    }
    let uuid = |at| field(bytes, at).map(Uuid::from_bytes);
    Ok((StoreId(uuid(AT_STORE)?), LayerId(uuid(AT_LAYER)?)))
}

impl SumsHeader {
    /// Whether the checksums belong to the data of a layer whose map has this number and says that it holds this.
    pub fn belongs_to(&self, incarnation: u64, extent: &Extent) -> bool {
        self.is_of(incarnation) && self.extent == *extent
    }

    /// Whether they belong to the map of this number.
    pub fn is_of(&self, incarnation: u64) -> bool {
        self.incarnation == incarnation || self.successor != 0 && self.successor == incarnation
    }

    /// The header's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = begin(&SUMS_MAGIC, self.store, self.layer, BLOCK_BYTES);
        out.put(AT_INCARNATION, &self.incarnation.to_le_bytes());
        out.put(AT_CLUSTERS, &self.extent.clusters.to_le_bytes());
        out.put(AT_SECTORS, &self.extent.sectors.to_le_bytes());
        out.put(AT_TAKEN, &self.taken_ns.to_le_bytes());
        out.put(AT_RUNS, &self.extent.runs_crc.to_le_bytes());
        out.put(AT_SUCCESSOR, &self.successor.to_le_bytes());
        sign(out.finish(BLOCK_BYTES))
    }

    /// Decodes and verifies a header.
    ///
    /// # Errors
    /// `Unsupported` for another version or unknown features; `Corrupt` for everything else.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let bytes: &[u8; BLOCK_BYTES] = bytes.first_chunk().ok_or_else(|| {
            FormatError::corrupt(bytes.len() as u64, "the file ends inside of its header")
        })?;
        let (store, layer) = verify(&SUMS_MAGIC, "a file of checksums", bytes)?;
        let header = Self {
            store,
            layer,
            incarnation: field_u64(bytes, AT_INCARNATION)?,
            successor: field_u64(bytes, AT_SUCCESSOR)?,
            extent: Extent {
                clusters: field_u64(bytes, AT_CLUSTERS)?,
                sectors: field_u64(bytes, AT_SECTORS)?,
                runs_crc: field_u32(bytes, AT_RUNS)?,
            },
            taken_ns: field_u64(bytes, AT_TAKEN)?,
        };
        if header.successor != 0 && Some(header.successor) != header.incarnation.checked_add(1) {
            return Err(FormatError::corrupt(
                AT_SUCCESSOR as u64,
                "the map that was to come is not the next one",
            ));
        }
        if header.extent.file_bytes().is_none() || header.extent.clusters > header.extent.sectors {
            return Err(FormatError::corrupt(
                AT_CLUSTERS as u64,
                "more clusters than any layer has",
            ));
        }
        Ok(header)
    }
}

/// The checksum of a block: of the layer, the number of the block from 0, and what the block holds.
fn block_crc(layer: LayerId, number: u64, sums: &[u8]) -> u32 {
    let crc = crc32c::crc32c(layer.0.as_bytes());
    let crc = crc32c::crc32c_append(crc, &number.to_le_bytes());
    crc32c::crc32c_append(crc, sums)
}

/// The bytes of a block of checksums; `sums` are at most [`SUMS_PER_BLOCK`].
pub fn encode_block(layer: LayerId, number: u64, sums: &[u32]) -> Vec<u8> {
    debug_assert!(sums.len() <= SUMS_PER_BLOCK);
    let mut held: Vec<u8> = sums.iter().flat_map(|sum| sum.to_le_bytes()).collect();
    held.resize(BLOCK_BYTES - 4, 0);
    let mut bytes = block_crc(layer, number, &held).to_le_bytes().to_vec();
    bytes.append(&mut held);
    bytes
}

/// The checksums of a block, those of none at its end among them; `None` if it is damaged, or another one.
pub fn decode_block(layer: LayerId, number: u64, bytes: &[u8]) -> Option<Vec<u32>> {
    let (crc, held) = bytes
        .get(..BLOCK_BYTES)?
        .split_first_chunk::<4>()
        .map(|(crc, held)| (u32::from_le_bytes(*crc), held))?;
    let believed = canary::is_set(Canary::BelieveBlock);
    if crc != block_crc(layer, number, held) && !believed {
        return None;
    }
    let (sums, _) = held.as_chunks::<4>();
    Some(sums.iter().map(|sum| u32::from_le_bytes(*sum)).collect())
}

/// The bytes of the file that says which sectors of a layer are damaged: the data of `bad`.
pub fn encode_bad(store: StoreId, layer: LayerId, bad: &SectorSet, found_ns: u64) -> Vec<u8> {
    let (bitmap, _) = bad.to_portable();
    let len = BAD_HEADER_BYTES + bitmap.len();
    let mut out = begin(&BAD_MAGIC, store, layer, len);
    out.put(AT_BITMAP_LEN, &(bitmap.len() as u64).to_le_bytes());
    out.put(AT_FOUND, &found_ns.to_le_bytes());
    out.put(BAD_HEADER_BYTES, &bitmap);
    sign(out.finish(len))
}

/// Decodes and verifies such a file.
///
/// # Errors
/// As [`SumsHeader::decode`].
pub fn decode_bad(bytes: &[u8]) -> Result<(StoreId, LayerId, SectorSet), FormatError> {
    let (store, layer) = verify(&BAD_MAGIC, "a list of damaged sectors", bytes)?;
    let bitmap = bytes.get(BAD_HEADER_BYTES..).unwrap_or_default();
    if field_u64(bytes, AT_BITMAP_LEN)? != bitmap.len() as u64 {
        return Err(FormatError::corrupt(
            AT_BITMAP_LEN as u64,
            "the file is not as long as it says",
        ));
    }
    let (_, none) = SectorSet::empty().to_portable();
    let bad = SectorSet::from_portable(bitmap, &none)
        .map_err(|what| FormatError::corrupt(BAD_HEADER_BYTES as u64, what))?;
    Ok((store, layer, bad))
}
