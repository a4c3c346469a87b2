//! The files `sums` and `bad` of a sealed layer: decoded, read in order from a simulated disk, written and read again.
//!
//! Input: a byte of bits that say which file it is and what is made right, a byte with a bit for each block of checksums whose
//! own checksum stays as it is, and the file without its padding: of `sums` 112 bytes of the header and 64 of each block.

use std::path::Path;
use std::sync::Arc;

use stratablk_layers::badfile::{self, bad_path};
use stratablk_layers::file::sim::SimMedia;
use stratablk_layers::file::{Media, OpenMode};
use stratablk_layers::format::FormatError;
use stratablk_layers::format::sums::{
    BLOCK_BYTES, SUMS_PER_BLOCK, SumsHeader, decode_bad, encode_bad,
};
use stratablk_layers::limits::DISK_SECTORS_MAX;
use stratablk_layers::mapfile::{LAYERS_DIR, layer_dir};
use stratablk_layers::sumfile::{self, Found, SumsReader, SumsWriter, sums_path};
use stratablk_layers::units::{CLUSTER_SECTORS, LayerId, StoreId};
use uuid::Uuid;

use crate::checkpoint::judge;
use crate::input::Input;
use crate::memory::peak;

/// Where the fields lie that are made right, as in `FORMAT.md`.
mod at {
    /// Checksum of the header, or of the whole file of damage.
    pub const CRC: usize = 12;
    /// Name of the layer.
    pub const LAYER: usize = 48;
    /// Bytes of the bitmap of damage.
    pub const BITMAP_LEN: usize = 64;
    /// How many checksums there are, then how many sectors.
    pub const CLUSTERS: usize = 72;
    /// Bytes of the header of checksums that hold something.
    pub const SUMS_USED: usize = 112;
    /// Bytes of the header of damage.
    pub const BAD_HEADER: usize = 128;
}

/// The layer whose files they are.
const LAYER: LayerId = LayerId(Uuid::from_u128(0x2222_2222_2222_4222_8222_2222_2222_2222));
/// Bytes of the input for a block of checksums.
const CHUNK: usize = 64;
/// Memory that any input may take, and how many times its length it may take beyond.
const MEMORY: (usize, usize) = (1 << 20, 4096);

/// Puts bytes in place, if there is such a place.
fn put(file: &mut [u8], place: usize, bytes: &[u8]) {
    if let Some(target) = file.get_mut(place..place + bytes.len()) {
        target.copy_from_slice(bytes);
    }
}

/// A number of a file; 0 if it is too short for it.
fn number(file: &[u8], place: usize) -> u64 {
    let bytes = file.get(place..).and_then(|bytes| bytes.first_chunk());
    bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// Makes the checksum of the first bytes of a file right.
fn seal(file: &mut [u8], len: usize) {
    put(file, at::CRC, &[0; 4]);
    let crc = file.get(..len).map_or(0, crc32c::crc32c);
    put(file, at::CRC, &crc.to_le_bytes());
}

/// The checksum that a block is to have.
fn block_crc(number: u64, block: &[u8]) -> u32 {
    let crc = crc32c::crc32c(LAYER.0.as_bytes());
    let crc = crc32c::crc32c_append(crc, &number.to_le_bytes());
    crc32c::crc32c_append(crc, block.get(4..).unwrap_or_default())
}

/// A disk that holds this file.
fn disk(path: &Path, bytes: &[u8]) -> Arc<dyn Media> {
    let media = SimMedia::new(1);
    media
        .create_dir(Path::new(LAYERS_DIR))
        .expect("an empty disk");
    media.create_dir(&layer_dir(LAYER)).expect("an empty disk");
    let file = media.open(path, OpenMode::CreateNew, false);
    file.and_then(|file| file.write_at(bytes, 0))
        .expect("an empty disk");
    Arc::new(media)
}

/// One input.
///
/// # Panics
/// If something is believed that must not be, or does not come out as it went in.
pub fn run(bytes: &[u8]) {
    #[cfg(feature = "canary")]
    if stratablk::canary::is_on() {
        stratablk_layers::canary::set(Some(stratablk_layers::canary::Canary::BelieveBlock));
    }
    let mut input = Input(bytes);
    let bits = input.u8();
    let spared = input.u8();
    if bits & 1 == 0 {
        checksums(input, bits, spared);
    } else {
        damage(input, bits);
    }
}

/// The file of checksums that an input stands for. The bits say what stays wrong, so that most inputs get far.
fn spread(mut input: Input<'_>, bits: u8, spared: u8) -> Vec<u8> {
    let mut file = input.bytes(at::SUMS_USED).to_vec();
    file.resize(BLOCK_BYTES, 0);
    let chunks: Vec<&[u8]> = input.0.chunks(CHUNK).collect();
    for (place, chunk) in (0..).zip(&chunks) {
        let mut block = chunk.to_vec();
        block.resize(BLOCK_BYTES, 0);
        if spared & (1 << (place % 8)) == 0 {
            let crc = block_crc(place, &block);
            put(&mut block, 0, &crc.to_le_bytes());
        }
        file.extend(block);
    }
    if bits & 4 == 0 {
        put(&mut file, at::LAYER, LAYER.0.as_bytes());
    }
    if bits & 8 == 0 {
        // As many as are in the last block, or fewer.
        let per_block = SUMS_PER_BLOCK as u64;
        let last = number(&file, at::CLUSTERS) % per_block;
        let clusters = (chunks.len() as u64)
            .checked_sub(1)
            .map_or(0, |whole| whole * per_block + last + 1);
        let sectors = number(&file, at::CLUSTERS + 8).max(clusters);
        put(&mut file, at::CLUSTERS, &clusters.to_le_bytes());
        put(&mut file, at::CLUSTERS + 8, &sectors.to_le_bytes());
    }
    if bits & 2 == 0 {
        seal(&mut file, BLOCK_BYTES);
    }
    file
}

/// A file of checksums.
fn checksums(input: Input<'_>, bits: u8, spared: u8) {
    let file = spread(input, bits, spared);
    let media = disk(&sums_path(LAYER), &file);
    let found = sumfile::open(&media, LAYER).expect("a simulated disk can be read");
    let mut reader = match (SumsHeader::decode(&file), found) {
        (Err(FormatError::Unsupported { .. }), Found::Newer(_))
        | (Err(FormatError::Corrupt { .. }), Found::Damaged(_)) => return,
        (Ok(header), Found::Damaged(what)) => {
            let len = header.extent.file_bytes();
            assert!(
                header.layer != LAYER || len != Some(file.len() as u64),
                "{what}"
            );
            return;
        }
        (Ok(header), Found::Sums(reader)) => {
            assert_eq!((reader.header.clone(), header.layer), (header, LAYER));
            reader
        }
        (decoded, found) => panic!("{decoded:?}, but {found:?}"),
    };
    let header = reader.header.clone();
    assert_eq!(SumsHeader::decode(&header.encode()), Ok(header.clone()));
    assert!(header.belongs_to(header.incarnation, &header.extent));
    let next = header.incarnation.checked_add(1);
    let foreseen = next.is_some_and(|next| header.is_of(next));
    assert_eq!(foreseen, header.successor != 0);
    let (sums, damaged) = read_all(&mut reader, &file);
    if damaged == 0 {
        let mut writer = SumsWriter::create(&media, header.clone()).expect("there is space");
        for part in sums.chunks(700) {
            writer.push(&media, part).expect("there is space");
        }
        writer.complete(&media).expect("as many as the header says");
        writer.name(&media).expect("there is space");
        let Ok(Found::Sums(mut again)) = sumfile::open(&media, LAYER) else {
            panic!("what was written cannot be read");
        };
        assert_eq!(again.header, header);
        let read = std::iter::from_fn(|| again.next_sum());
        assert!(read.eq(sums), "what was written is not what is read");
        assert_eq!(again.damaged_blocks, 0);
    }
}

/// Reads all checksums, which must be those of the file where their block is whole, and none where it is not. Returns those,
/// and how many blocks are damaged.
fn read_all(reader: &mut SumsReader, file: &[u8]) -> (Vec<u32>, u64) {
    let blocks: Vec<&[u8]> = file.chunks_exact(BLOCK_BYTES).skip(1).collect();
    let mut sums = Vec::new();
    let mut damaged = 0;
    let mut left = usize::try_from(reader.header.extent.clusters).expect("the file is as long");
    for (place, block) in (0..).zip(blocks) {
        let (stored, held) = block.split_first_chunk::<4>().expect("a whole block");
        let whole = u32::from_le_bytes(*stored) == block_crc(place, block);
        damaged += u64::from(!whole);
        let (held, _) = held.as_chunks::<4>();
        for sum in held.iter().take(left) {
            let expected = whole.then_some(u32::from_le_bytes(*sum));
            assert_eq!(reader.next_sum(), expected, "in block {place}");
            sums.extend(expected);
        }
        left = left.saturating_sub(SUMS_PER_BLOCK);
    }
    assert_eq!((reader.next_sum(), left), (None, 0));
    assert_eq!(reader.handed_out(), reader.header.extent.clusters);
    assert_eq!(reader.damaged_blocks, damaged);
    (sums, damaged)
}

/// A file that says what is damaged.
fn damage(mut input: Input<'_>, bits: u8) {
    let mut file = input.bytes(at::BAD_HEADER).to_vec();
    file.extend(input.0);
    if bits & 4 == 0 {
        put(&mut file, at::LAYER, LAYER.0.as_bytes());
    }
    if bits & 8 == 0 {
        let len = file.len().saturating_sub(at::BAD_HEADER) as u64;
        put(&mut file, at::BITMAP_LEN, &len.to_le_bytes());
    }
    if bits & 2 == 0 {
        let len = file.len();
        seal(&mut file, len);
    }
    let (read, taken) = peak(|| decode_bad(&file));
    assert!(
        taken <= MEMORY.0 + MEMORY.1 * file.len(),
        "{} bytes take {taken}",
        file.len()
    );
    let media = disk(&bad_path(LAYER), &file);
    let (store, layer, set) = match read {
        Ok(read) => read,
        Err(error) => {
            let none = StoreId(Uuid::nil());
            let same = badfile::read(&media, none, LAYER);
            assert!(same.is_err(), "only one way of reading refuses: {error}");
            return;
        }
    };
    judge(&set, DISK_SECTORS_MAX + CLUSTER_SECTORS);
    assert_eq!(set.zero_sectors(), 0);
    let again = decode_bad(&encode_bad(store, layer, &set, 1));
    assert_eq!(again, Ok((store, layer, set.clone())));
    let other = StoreId(Uuid::from_u128(!store.0.as_u128()));
    assert!(
        badfile::read(&media, other, LAYER).is_err(),
        "another store's"
    );
    let same = badfile::read(&media, store, LAYER);
    if layer != LAYER {
        assert!(same.is_err(), "another layer's");
        return;
    }
    let expected = (set.data_sectors() > 0).then_some(set.clone());
    assert_eq!(same.expect("both ways of reading accept"), expected);
    badfile::write(&media, store, LAYER, &set, 1).expect("there is space");
    let same = badfile::read(&media, store, LAYER);
    assert_eq!(same.expect("what was written can be read"), expected);
    let is_there = media.stat(&bad_path(LAYER)).is_ok();
    assert_eq!(is_there, expected.is_some());
}
