//! Stamped blocks: 4 KiB that say what they are, so that a lost, misplaced, stale or torn write is seen on read.
//!
//! Each of the eight sectors of a block carries the whole stamp and a checksum of its own, since a sector is the unit
//! that a disk promises not to tear. All words are little-endian:
//!
//! | byte | meaning |
//! |---|---|
//! | 0 | magic |
//! | 8 | number of the block on its disk |
//! | 16 | sequence number of the write |
//! | 24 | seed of the run |
//! | 32 | disk (32 bits), writer queue (16), sector within the block (16), from the top |
//! | 40 .. 504 | filler, a different one a sequence number |
//! | 504 | checksum of bytes 0 .. 504 |

use std::fmt;

use super::random::mix;

/// Bytes of a stamped block.
pub const STAMP_BYTES: usize = 4096;
/// Bytes of a sector.
const SECTOR_BYTES: usize = 512;
/// Words of a sector before its checksum.
const SECTOR_WORDS: usize = SECTOR_BYTES / 8 - 1;
/// The first word of every stamped sector: "STAMPED\0".
const MAGIC: u64 = u64::from_le_bytes(*b"STAMPED\0");

/// What a block says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stamp {
    /// Which disk it was written to.
    pub disk: u32,
    /// The queue that wrote it.
    pub queue: u16,
    /// Its number on the disk.
    pub block: u64,
    /// The number of the write, counted over all queues and disks of a run, from 1.
    pub sequence: u64,
    /// The seed of the run.
    pub seed: u64,
}

/// What a block turned out to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing but zeroes: never written, or zeroed.
    Zeroes,
    /// One whole stamp.
    Stamped(Stamp),
}

/// Why a block cannot be what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// A sector is neither zeroes nor a stamp with the right checksum.
    Garbage {
        /// Which sector of the block.
        sector: usize,
    },
    /// A sector holds a whole stamp of another sector's place.
    Misplaced {
        /// Which sector of the block.
        sector: usize,
        /// What it says.
        found: Stamp,
    },
    /// The sectors come from different writes.
    Torn {
        /// The first sector that differs from the one before.
        sector: usize,
        /// What it holds.
        found: Content,
        /// What the sectors before it hold.
        before: Content,
    },
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Garbage { sector } => {
                write!(f, "sector {sector} holds neither zeroes nor a whole stamp")
            }
            Self::Misplaced { sector, found } => write!(
                f,
                "sector {sector} holds a stamp of another place: {found:?}"
            ),
            Self::Torn {
                sector,
                found,
                before,
            } => {
                write!(
                    f,
                    "sector {sector} holds {found:?}, the sectors before it {before:?}"
                )
            }
        }
    }
}

impl Stamp {
    /// Fills a block of `STAMP_BYTES` with this stamp.
    ///
    /// # Panics
    /// If `block` has another length.
    pub fn write_to(&self, block: &mut [u8]) {
        assert_eq!(
            block.len(),
            STAMP_BYTES,
            "a stamped block has {STAMP_BYTES} bytes"
        );
        for (index, sector) in block.chunks_exact_mut(SECTOR_BYTES).enumerate() {
            let mut filler = mix(self.sequence ^ self.seed.rotate_left(32));
            let mut checksum = Checksum::new();
            let head = [
                MAGIC,
                self.block,
                self.sequence,
                self.seed,
                self.place(index),
            ];
            for (position, bytes) in sector.chunks_exact_mut(8).enumerate() {
                let word = if position == SECTOR_WORDS {
                    checksum.finish()
                } else if let Some(word) = head.get(position) {
                    *word
                } else {
                    filler = filler.wrapping_add(0x9e37_79b9_7f4a_7c15);
                    filler
                };
                checksum.add(word);
                bytes.copy_from_slice(&word.to_le_bytes());
            }
        }
    }

    /// The word that says where a sector belongs beside its block's number.
    fn place(&self, sector: usize) -> u64 {
        (u64::from(self.disk) << 32) | (u64::from(self.queue) << 16) | sector as u64
    }
}

/// Reads what `block` holds, which was read from block `number` of disk `disk`.
///
/// # Errors
/// What is wrong with it.
///
/// # Panics
/// If `block` has not `STAMP_BYTES` bytes.
pub fn read_block(block: &[u8], disk: u32, number: u64) -> Result<Content, Damage> {
    assert_eq!(
        block.len(),
        STAMP_BYTES,
        "a stamped block has {STAMP_BYTES} bytes"
    );
    let mut whole = None;
    for (index, sector) in block.chunks_exact(SECTOR_BYTES).enumerate() {
        let found = read_sector(sector, index, disk, number)?;
        match whole {
            None => whole = Some(found),
            Some(before) if before != found => {
                return Err(Damage::Torn {
                    sector: index,
                    found,
                    before,
                });
            }
            Some(_) => {}
        }
    }
    whole.ok_or(Damage::Garbage { sector: 0 })
}

/// Reads one sector of a block.
fn read_sector(bytes: &[u8], index: usize, disk: u32, number: u64) -> Result<Content, Damage> {
    let mut checksum = Checksum::new();
    let mut head = [0; 5];
    let mut any = 0;
    let mut last = (0, 0);
    for (position, chunk) in bytes.as_chunks::<8>().0.iter().enumerate() {
        let word = u64::from_le_bytes(*chunk);
        any |= word;
        if let Some(slot) = head.get_mut(position) {
            *slot = word;
        }
        last = (word, checksum.finish());
        checksum.add(word);
    }
    if any == 0 {
        return Ok(Content::Zeroes);
    }
    let [magic, block, sequence, seed, place] = head;
    if magic != MAGIC || last.0 != last.1 {
        return Err(Damage::Garbage { sector: index });
    }
    let [disk_high, disk_low, queue, sector] =
        [place >> 48, place >> 32, place >> 16, place].map(|word| (word & 0xffff) as u16);
    let found = Stamp {
        disk: (u32::from(disk_high) << 16) | u32::from(disk_low),
        queue,
        block,
        sequence,
        seed,
    };
    if found.disk != disk || found.block != number || usize::from(sector) != index {
        return Err(Damage::Misplaced {
            sector: index,
            found,
        });
    }
    Ok(Content::Stamped(found))
}

/// A checksum of words that notices changed, swapped and missing ones. Not for adversaries.
struct Checksum(u64);

impl Checksum {
    /// Of no words; not 0, so that zeroes are no stamp.
    const fn new() -> Self {
        Self(0x243f_6a88_85a3_08d3)
    }

    /// Takes a word in.
    const fn add(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    }

    /// The checksum of the words so far.
    const fn finish(&self) -> u64 {
        mix(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp {
        disk: 3,
        queue: 1,
        block: 77,
        sequence: 12345,
        seed: 9,
    };

    fn stamped(stamp: &Stamp) -> Vec<u8> {
        let mut block = vec![0; STAMP_BYTES];
        stamp.write_to(&mut block);
        block
    }

    #[test]
    fn a_block_reads_back_as_it_was_stamped() {
        assert_eq!(
            read_block(&stamped(&STAMP), 3, 77),
            Ok(Content::Stamped(STAMP))
        );
        assert_eq!(read_block(&[0; STAMP_BYTES], 3, 77), Ok(Content::Zeroes));
    }

    #[test]
    fn a_changed_bit_anywhere_is_seen() {
        let good = stamped(&STAMP);
        for byte in 0..STAMP_BYTES {
            let mut bad = good.clone();
            if let Some(byte) = bad.get_mut(byte) {
                *byte ^= 0x10;
            }
            assert!(read_block(&bad, 3, 77).is_err(), "byte {byte}");
        }
    }

    #[test]
    fn a_block_of_another_place_or_disk_is_seen() {
        let block = stamped(&STAMP);
        assert_eq!(
            read_block(&block, 3, 78),
            Err(Damage::Misplaced {
                sector: 0,
                found: STAMP
            })
        );
        assert_eq!(
            read_block(&block, 2, 77),
            Err(Damage::Misplaced {
                sector: 0,
                found: STAMP
            })
        );
    }

    #[test]
    fn swapped_sectors_are_seen() {
        let mut block = stamped(&STAMP);
        let (first, second) = block.split_at_mut(512);
        first.swap_with_slice(&mut second[..512]);
        assert_eq!(
            read_block(&block, 3, 77),
            Err(Damage::Misplaced {
                sector: 0,
                found: STAMP
            })
        );
    }

    #[test]
    fn a_torn_block_is_seen() {
        let newer = Stamp {
            sequence: 12346,
            ..STAMP
        };
        let mut block = stamped(&STAMP);
        block[2048..].copy_from_slice(&stamped(&newer)[2048..]);
        assert_eq!(
            read_block(&block, 3, 77),
            Err(Damage::Torn {
                sector: 4,
                found: Content::Stamped(newer),
                before: Content::Stamped(STAMP)
            })
        );
        block[512..].fill(0);
        assert_eq!(
            read_block(&block, 3, 77),
            Err(Damage::Torn {
                sector: 1,
                found: Content::Zeroes,
                before: Content::Stamped(STAMP)
            })
        );
    }
}
