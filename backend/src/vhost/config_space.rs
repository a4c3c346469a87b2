//! The configuration space: `struct virtio_blk_config`, the 60 bytes that the guest sees of the device besides its rings.
//!
//! SPEC: virtio 1.2, 5.2.4. All fields are little-endian. Reads past the structure yield zeroes, since front-ends ask
//! for as many bytes as their own structure has. The guest may write one field, `writeback`.

use stratablk_layers::units::{CLUSTER_SECTORS, SECTOR_BYTES, Sector};

/// Bytes of the structure without the fields of features that are not offered.
pub const CONFIG_BYTES: usize = 60;
/// Where `writeback` lies.
pub const WRITEBACK_OFFSET: u32 = 32;

/// Segments of one request that the driver may use. With header and status 128 descriptors: the smallest ring in
/// common use then holds the longest request even without indirect descriptors.
pub const SEGMENTS_MAX: u32 = 126;
/// Sectors that one range of a discard or write-zeroes may cover: 1 GiB.
pub const ZERO_SECTORS_MAX: u32 = 1 << 21;
/// Ranges of one discard or write-zeroes.
pub const ZERO_RANGES_MAX: u32 = 32;
/// `physical_block_exp`: a physical sector of the device is one cluster.
const PHYSICAL_EXPONENT: u8 = 3;

const _: () = assert!(1 << PHYSICAL_EXPONENT == CLUSTER_SECTORS);

/// What the configuration space tells.
#[derive(Clone, Copy, Debug)]
pub struct ConfigSpace {
    /// The size of the disk.
    pub capacity: Sector,
    /// How many queues the device has.
    pub queues: u16,
    /// Whether ranges can be discarded and zeroed.
    pub writable: bool,
    /// Whether the device caches writes until a flush.
    pub writeback: bool,
}

impl ConfigSpace {
    /// The structure.
    fn bytes(&self) -> [u8; CONFIG_BYTES] {
        let mut bytes = [0; CONFIG_BYTES];
        let mut put = |offset: usize, value: &[u8]| {
            if let Some(field) = bytes.get_mut(offset..offset + value.len()) {
                field.copy_from_slice(value);
            }
        };
        put(0, &self.capacity.0.to_le_bytes());
        put(12, &SEGMENTS_MAX.to_le_bytes());
        put(
            20,
            &u32::try_from(SECTOR_BYTES).unwrap_or(512).to_le_bytes(),
        );
        put(24, &[PHYSICAL_EXPONENT]);
        // alignment_offset (25) is 0; min_io_size (26) is a cluster, in sectors; opt_io_size (28) is left open.
        put(26, &(1u16 << PHYSICAL_EXPONENT).to_le_bytes());
        put(WRITEBACK_OFFSET as usize, &[u8::from(self.writeback)]);
        put(34, &self.queues.to_le_bytes());
        if self.writable {
            put(36, &ZERO_SECTORS_MAX.to_le_bytes());
            put(40, &ZERO_RANGES_MAX.to_le_bytes());
            put(44, &(1u32 << PHYSICAL_EXPONENT).to_le_bytes());
            put(48, &ZERO_SECTORS_MAX.to_le_bytes());
            put(52, &ZERO_RANGES_MAX.to_le_bytes());
            put(56, &[1]);
        }
        bytes
    }

    /// `size` bytes from `offset`; zeroes past the structure. The caller bounds both.
    pub fn read(&self, offset: u32, size: u32) -> Vec<u8> {
        let bytes = self.bytes();
        let field = |place: usize| bytes.get(place).copied().unwrap_or(0);
        (offset..offset.saturating_add(size))
            .map(|place| field(place as usize))
            .collect()
    }
}

/// What a write to the configuration space asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigWrite {
    /// To switch write-back on or off.
    Writeback(bool),
    /// Nothing that the device would do.
    Nothing,
    /// Something that must not be.
    Refused,
}

/// Judges a write of `bytes` at `offset`. `from_guest`: the message says that the guest wrote (and not that a device moves
/// here); then nothing but `writeback` may be touched. Otherwise the other fields are left as they are, because the disk
/// here says what they must be.
pub fn judge_write(offset: u32, bytes: &[u8], from_guest: bool) -> ConfigWrite {
    let inside = WRITEBACK_OFFSET
        .checked_sub(offset)
        .and_then(|place| bytes.get(place as usize));
    let alone = offset == WRITEBACK_OFFSET && bytes.len() == 1;
    match inside {
        _ if from_guest && !alone => ConfigWrite::Refused,
        None => ConfigWrite::Nothing,
        Some(0) => ConfigWrite::Writeback(false),
        Some(1) => ConfigWrite::Writeback(true),
        Some(_) => ConfigWrite::Refused,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPACE: ConfigSpace = ConfigSpace {
        capacity: Sector(0x1122_3344_5566),
        queues: 0x102,
        writable: true,
        writeback: true,
    };

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let bytes = SPACE.read(0, 60);
        assert_eq!(bytes[0..8], [0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0, 0]);
        assert_eq!(bytes[8..12], [0; 4], "size_max");
        assert_eq!(bytes[12..16], [126, 0, 0, 0]);
        assert_eq!(bytes[16..20], [0; 4], "geometry");
        assert_eq!(bytes[20..24], [0, 2, 0, 0]);
        assert_eq!(bytes[24..32], [3, 0, 8, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[32..36], [1, 0, 2, 1]);
        assert_eq!(bytes[36..48], [0, 0, 0x20, 0, 32, 0, 0, 0, 8, 0, 0, 0]);
        assert_eq!(bytes[48..60], [0, 0, 0x20, 0, 32, 0, 0, 0, 1, 0, 0, 0]);
    }

    #[test]
    fn any_window_can_be_read_and_the_rest_is_zero() {
        let whole = SPACE.read(0, 256);
        assert_eq!(whole.len(), 256);
        assert!(whole[60..].iter().all(|byte| *byte == 0));
        for offset in 0..100u32 {
            for size in [1u32, 2, 4, 60, 72, 96] {
                let window = SPACE.read(offset, size);
                let start = offset as usize;
                assert_eq!(window, whole[start..start + size as usize]);
            }
        }
    }

    #[test]
    fn a_guest_writes_writeback_and_nothing_else() {
        assert_eq!(judge_write(32, &[0], true), ConfigWrite::Writeback(false));
        assert_eq!(judge_write(32, &[1], true), ConfigWrite::Writeback(true));
        assert_eq!(judge_write(32, &[2], true), ConfigWrite::Refused);
        assert_eq!(judge_write(0, &[0; 60], true), ConfigWrite::Refused);
        assert_eq!(judge_write(32, &[0, 0], true), ConfigWrite::Refused);
        assert_eq!(judge_write(33, &[0], true), ConfigWrite::Refused);
        assert_eq!(
            judge_write(0, &[0; 60], false),
            ConfigWrite::Writeback(false)
        );
        assert_eq!(judge_write(0, &[0; 8], false), ConfigWrite::Nothing);
        assert_eq!(judge_write(40, &[9; 8], false), ConfigWrite::Nothing);
    }
}
