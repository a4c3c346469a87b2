//! A map file: header, checkpoint, journal. Read in both ways that there are, opened with recovery on a simulated disk, and
//! gone on with.
//!
//! Input: a byte of bits that say which checksums and lengths are made right ([`Seal`]), two bytes of records of the journal
//! whose checksums stay as they are, two bytes for a tail of zeroes, and the file, whole or without its padding ([`spread`]).

use std::path::Path;
use std::sync::Arc;

use stratablk_layers::file::sim::SimMedia;
use stratablk_layers::file::{Media, OpenMode};
use stratablk_layers::format::journal::RECORD_BYTES;
use stratablk_layers::format::{checkpoint, decode_map};
use stratablk_layers::map::record::{MapRecord, RecordKind};
use stratablk_layers::mapfile::{LAYERS_DIR, MapFile, MapState, layer_dir, map_path};
use stratablk_layers::units::{LayerId, Sector, SectorRange};
use uuid::Uuid;

use crate::checkpoint::judge;
use crate::input::Input;
use crate::memory::peak;

/// Where the fields lie that are made right, as in `FORMAT.md`.
mod at {
    /// Bytes of the header that hold something, but for the path of a base.
    pub const USED: usize = 320;
    /// Bytes of the header.
    pub const HEADER: usize = 4096;
    /// Checksum of the header.
    pub const CRC: usize = 12;
    /// Name of the layer.
    pub const LAYER: usize = 48;
    /// Counts the files that were the map.
    pub const INCARNATION: usize = 120;
    /// Length of the data bitmap, then that of the zeroes.
    pub const DATA_LEN: usize = 160;
    /// Checksum of the data bitmap, then that of the zeroes.
    pub const DATA_CRC: usize = 176;
    /// Where the journal begins.
    pub const JOURNAL: usize = 184;
}

/// The layer whose map it is.
const LAYER: LayerId = LayerId(Uuid::from_u128(0x3333_3333_3333_4333_8333_3333_3333_3333));
/// Memory that any input may take, and how many times its length it may take beyond.
const MEMORY: (usize, usize) = (8 << 20, 8192);

/// What is made right.
#[derive(Clone, Copy, Debug)]
struct Seal {
    /// The checksum of the header.
    header: bool,
    /// The checksums of the checkpoint.
    checkpoint: bool,
    /// The name of the layer.
    layer: bool,
    /// Where the journal begins.
    place: bool,
    /// The checksums of records, but for those with their bits set here.
    records: Option<u16>,
}

/// The bytes at a place as a number.
fn number(file: &[u8], place: usize) -> Option<usize> {
    let bytes: &[u8; 8] = file.get(place..)?.first_chunk()?;
    usize::try_from(u64::from_le_bytes(*bytes)).ok()
}

/// Puts bytes in place, if there is such a place.
fn put(file: &mut [u8], place: usize, bytes: &[u8]) {
    if let Some(target) = file.get_mut(place..place + bytes.len()) {
        target.copy_from_slice(bytes);
    }
}

/// Makes checksums right.
fn seal(file: &mut [u8], seal: Seal) {
    if seal.layer {
        put(file, at::LAYER, LAYER.0.as_bytes());
    }
    let lens = number(file, at::DATA_LEN).zip(number(file, at::DATA_LEN + 8));
    let ends = lens.and_then(|(data, zero)| {
        let data_end = at::HEADER.checked_add(data)?;
        let zero_end = data_end.checked_add(zero)?;
        Some((data_end, zero_end, zero_end.checked_next_multiple_of(512)?))
    });
    let Some((data_end, zero_end, journal)) = ends.filter(|(_, end, _)| *end <= file.len()) else {
        return;
    };
    if seal.place {
        put(file, at::JOURNAL, &(journal as u64).to_le_bytes());
    }
    if seal.checkpoint {
        let data = file.get(at::HEADER..data_end).map_or(0, crc32c::crc32c);
        let zero = file.get(data_end..zero_end).map_or(0, crc32c::crc32c);
        put(file, at::DATA_CRC, &data.to_le_bytes());
        put(file, at::DATA_CRC + 4, &zero.to_le_bytes());
    }
    if let Some(spared) = seal.records {
        let of_layer = file
            .get(at::LAYER..at::LAYER + 16)
            .map_or(0, crc32c::crc32c);
        let of_both = file
            .get(at::INCARNATION..at::INCARNATION + 8)
            .map_or(0, |bytes| crc32c::crc32c_append(of_layer, bytes));
        let records = file.get_mut(journal..).unwrap_or_default();
        for (slot, record) in records.chunks_exact_mut(RECORD_BYTES).enumerate() {
            let used = record.iter().any(|byte| *byte != 0);
            if used && spared & (1 << (slot % 16)) == 0 {
                let (crc, rest) = record.split_at_mut(4);
                crc.copy_from_slice(&crc32c::crc32c_append(of_both, rest).to_le_bytes());
            }
        }
    }
    if seal.header && file.len() >= at::HEADER {
        put(file, at::CRC, &[0; 4]);
        let crc = file.get(..at::HEADER).map_or(0, crc32c::crc32c);
        put(file, at::CRC, &crc.to_le_bytes());
    }
}

/// The file that these bytes stand for: the header's first bytes, the bitmaps, the journal. Most of a file is padding, in which
/// mutations are lost.
fn spread(bytes: &[u8]) -> Vec<u8> {
    let (header, rest) = bytes.split_at(at::USED.min(bytes.len()));
    let mut file = header.to_vec();
    file.resize(at::HEADER, 0);
    let lens = number(&file, at::DATA_LEN).zip(number(&file, at::DATA_LEN + 8));
    let bitmaps = lens.and_then(|(data, zero)| data.checked_add(zero));
    let (bitmaps, journal) = rest.split_at(bitmaps.unwrap_or(0).min(rest.len()));
    file.extend_from_slice(bitmaps);
    file.resize(file.len().next_multiple_of(512), 0);
    file.extend_from_slice(journal);
    file
}

/// A disk that holds this file as the map of the layer.
fn disk(file: &[u8]) -> Arc<dyn Media> {
    let media = SimMedia::new(1);
    media
        .create_dir(Path::new(LAYERS_DIR))
        .expect("an empty disk");
    media.create_dir(&layer_dir(LAYER)).expect("an empty disk");
    let map = media.open(&map_path(LAYER), OpenMode::CreateNew, false);
    map.and_then(|map| map.write_at(file, 0))
        .expect("an empty disk");
    Arc::new(media)
}

/// One input.
///
/// # Panics
/// If something is accepted that must not be, or read in two ways.
pub fn run(bytes: &[u8]) {
    #[cfg(feature = "canary")]
    if stratablk::canary::is_on() {
        stratablk_layers::canary::set(Some(stratablk_layers::canary::Canary::BelieveCheckpoint));
    }
    let mut input = Input(bytes);
    let bits = input.u8();
    let spared = input.u16();
    let tail = usize::from(input.u16());
    let mut file = if bits & 0x40 == 0 {
        input.0.to_vec()
    } else {
        spread(input.0)
    };
    if bits & 0x20 != 0 {
        file.resize(file.len() + tail, 0);
    }
    // The bits say what stays wrong, so that most inputs get far.
    seal(
        &mut file,
        Seal {
            header: bits & 1 == 0,
            checkpoint: bits & 2 == 0,
            layer: bits & 4 == 0,
            place: bits & 8 == 0,
            records: (bits & 0x10 == 0).then_some(spared),
        },
    );
    let (read, taken) = peak(|| decode_map(&file));
    assert!(
        taken <= MEMORY.0 + MEMORY.1 * file.len(),
        "{} bytes take {taken}",
        file.len()
    );
    let media = disk(&file);
    let same = MapFile::read(&media, LAYER);
    let read = match (read, same) {
        (Err(_), Err(_)) => {
            assert!(MapFile::open(&media, LAYER).is_err());
            return;
        }
        (Ok(read), Err(error)) => {
            assert!(
                read.header.map.layer != LAYER,
                "only one way of reading refuses: {error}"
            );
            return;
        }
        (Err(error), Ok(_)) => panic!("only one way of reading refuses: {error}"),
        (Ok(read), Ok(same)) => {
            assert_eq!((&read.header.map, &read.set), (&same.header, &same.set));
            assert_eq!(read.journal.epoch, same.recovery.epoch);
            read
        }
    };
    judge(&read.set, read.header.map.sectors_end());
    let encoded = checkpoint::encode(&read.header.map, read.header.incarnation, &read.set);
    let (_, bytes) = encoded.expect("what was read can be written");
    let again = decode_map(&bytes).expect("what was written can be read");
    assert_eq!(
        (&again.header.map, &again.set),
        (&read.header.map, &read.set)
    );
    go_on(&media, &read);
}

/// Opens the map, which may repair it, writes one more group to it and opens it again.
fn go_on(media: &Arc<dyn Media>, read: &stratablk_layers::format::Map) {
    let (mut map, header, set, recovery) =
        MapFile::open(media, LAYER).expect("what is read is opened");
    assert_eq!((&header, &set), (&read.header.map, &read.set));
    assert_eq!(recovery.dropped_bytes, read.journal.dropped_bytes);
    let mut expected = set;
    let next = map.end();
    let can_go_on = next.next_sequence < u64::MAX - 8 && next.epoch.0 < u64::MAX - 8;
    if header.state == MapState::Active && can_go_on {
        let count = header.size.0.min(8);
        let range = SectorRange::new(Sector(0), count).expect("a disk has sectors");
        let record = MapRecord {
            kind: RecordKind::Data,
            range,
        };
        let (offset, group) = map.append(&[record]);
        map.file()
            .write_at(&group, offset)
            .expect("a simulated disk has room");
        expected.apply(&record);
    }
    drop(map);
    let (_, _, set, recovery) = MapFile::open(media, LAYER).expect("what was written is opened");
    assert_eq!(recovery.dropped_bytes, 0, "a torn tail is repaired once");
    assert_eq!(set, expected);
}
