//! What each block of one disk may hold, as the one who writes it knows: the check of reads under load.
//!
//! INVARIANT: at most one write of a block is under way, so the writes of a block are ordered by their numbers.

use std::fmt;
use std::ops::Range;

use super::stamp::{Content, Damage, STAMP_BYTES, Stamp, read_block};

/// The state of a block.
#[derive(Clone, Copy, Debug, Default)]
struct Block {
    /// The last write that completed; 0 for none of this run.
    completed: u64,
    /// The last write that was issued; greater than `completed` while it is under way.
    issued: u64,
}

/// The blocks of a working set.
#[derive(Debug)]
pub struct Ledger {
    /// The number of the disk, in every stamp.
    disk: u32,
    /// The seed of the run, in every stamp.
    seed: u64,
    /// The first block of the working set.
    first: u64,
    /// The state of each block from there.
    blocks: Vec<Block>,
    /// The number of the last write.
    sequence: u64,
    /// Whether a block that was not written in this run must hold some stamp.
    filled: bool,
}

/// A block that does not hold what it must.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The block.
    pub block: u64,
    /// What is wrong.
    pub kind: MismatchKind,
}

/// What is wrong with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MismatchKind {
    /// It is not a stamped block of this place.
    Damage(Damage),
    /// It holds zeroes though something was written.
    Missing,
    /// It holds another write than one of those that it may.
    Wrong {
        /// What it holds.
        found: Stamp,
        /// The oldest write that it may hold.
        oldest: u64,
        /// The newest write that it may hold.
        newest: u64,
    },
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {}: ", self.block)?;
        match self.kind {
            MismatchKind::Damage(damage) => damage.fmt(f),
            MismatchKind::Missing => f.write_str("holds zeroes though it was written"),
            MismatchKind::Wrong {
                found,
                oldest,
                newest,
            } => {
                write!(
                    f,
                    "holds {found:?}, but must hold a write from {oldest} to {newest} of this run"
                )
            }
        }
    }
}

impl Ledger {
    /// Of the whole blocks in `start .. start + len` bytes. `filled`: blocks not written in this run hold stamps of an earlier
    /// one, not zeroes.
    ///
    /// # Errors
    /// If `start` is not a multiple of 4096 or the working set does not fit in memory.
    pub fn new(disk: u32, seed: u64, start: u64, len: u64, filled: bool) -> Result<Self, String> {
        let block_bytes = STAMP_BYTES as u64;
        if !start.is_multiple_of(block_bytes) {
            return Err(format!(
                "stamped blocks start at multiples of {STAMP_BYTES}, not at {start}"
            ));
        }
        let blocks = usize::try_from(len / block_bytes).map_err(|error| error.to_string())?;
        Ok(Self {
            disk,
            seed,
            first: start / block_bytes,
            blocks: vec![Block::default(); blocks],
            sequence: 0,
            filled,
        })
    }

    /// Where the states of the blocks of a request lie; empty outside the working set.
    fn range(&self, offset: u64, bytes: usize) -> Range<usize> {
        let first = (offset / STAMP_BYTES as u64).checked_sub(self.first);
        first
            .and_then(|first| usize::try_from(first).ok())
            .and_then(|first| Some(first..first.checked_add(bytes / STAMP_BYTES)?))
            .filter(|range| range.end <= self.blocks.len())
            .unwrap_or_default()
    }

    /// The states of the blocks of a request.
    fn states(&self, offset: u64, bytes: usize) -> &[Block] {
        self.blocks
            .get(self.range(offset, bytes))
            .unwrap_or_default()
    }

    /// The same, to change.
    fn states_mut(&mut self, offset: u64, bytes: usize) -> &mut [Block] {
        let range = self.range(offset, bytes);
        self.blocks.get_mut(range).unwrap_or_default()
    }

    /// Whether a write of any of these blocks is under way.
    pub fn is_busy(&self, offset: u64, bytes: usize) -> bool {
        self.states(offset, bytes)
            .iter()
            .any(|block| block.issued > block.completed)
    }

    /// Notes a write of `buffer` at `offset` by `queue`, and stamps the buffer. No block of it may be busy.
    pub fn issue(&mut self, queue: u16, offset: u64, buffer: &mut [u8]) {
        self.sequence += 1;
        let sequence = self.sequence;
        for block in self.states_mut(offset, buffer.len()) {
            debug_assert!(
                block.issued == block.completed,
                "two writes of a block are under way"
            );
            block.issued = sequence;
        }
        for (number, bytes) in
            (offset / STAMP_BYTES as u64..).zip(buffer.chunks_exact_mut(STAMP_BYTES))
        {
            Stamp {
                disk: self.disk,
                queue,
                block: number,
                sequence,
                seed: self.seed,
            }
            .write_to(bytes);
        }
    }

    /// Notes that the write at `offset` completed.
    pub fn complete(&mut self, offset: u64, bytes: usize) {
        for block in self.states_mut(offset, bytes) {
            block.completed = block.issued;
        }
    }

    /// The oldest write that a read issued now may return for each of its blocks.
    pub fn oldest(&self, offset: u64, bytes: usize, oldest: &mut Vec<u64>) {
        oldest.clear();
        oldest.extend(
            self.states(offset, bytes)
                .iter()
                .map(|block| block.completed),
        );
    }

    /// Checks what a read returned; `oldest` was taken when it was issued. Counts the blocks looked at.
    ///
    /// # Errors
    /// The first block that does not hold what it must.
    pub fn check(&self, offset: u64, buffer: &[u8], oldest: &[u64]) -> Result<u64, Mismatch> {
        let (disk, seed, filled) = (self.disk, self.seed, self.filled);
        let mut checked = 0;
        let newest = self.states(offset, buffer.len());
        let numbers = offset / STAMP_BYTES as u64..;
        let blocks = numbers
            .zip(buffer.chunks_exact(STAMP_BYTES))
            .zip(oldest.iter().zip(newest));
        for ((number, bytes), (&oldest, newest)) in blocks {
            let newest = newest.issued;
            let mismatch = |kind| {
                Err(Mismatch {
                    block: number,
                    kind,
                })
            };
            match read_block(bytes, disk, number) {
                Err(damage) => return mismatch(MismatchKind::Damage(damage)),
                Ok(Content::Zeroes) if oldest > 0 || filled => {
                    return mismatch(MismatchKind::Missing);
                }
                Ok(Content::Zeroes) => {}
                Ok(Content::Stamped(found)) => {
                    let ours = found.seed == seed && (oldest..=newest).contains(&found.sequence);
                    if !ours && oldest > 0 {
                        return mismatch(MismatchKind::Wrong {
                            found,
                            oldest,
                            newest,
                        });
                    }
                }
            }
            checked += 1;
        }
        Ok(checked)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failure here is the test's failure")]

    use super::*;

    fn written(ledger: &mut Ledger, offset: u64) -> Vec<u8> {
        let mut buffer = vec![0; STAMP_BYTES];
        ledger.issue(0, offset, &mut buffer);
        ledger.complete(offset, STAMP_BYTES);
        buffer
    }

    #[test]
    fn a_block_must_hold_its_last_completed_write() {
        let mut ledger = Ledger::new(0, 1, 4096, 1 << 20, false).unwrap();
        let old = written(&mut ledger, 8192);
        let new = written(&mut ledger, 8192);
        let mut oldest = Vec::new();
        ledger.oldest(8192, STAMP_BYTES, &mut oldest);
        assert_eq!(ledger.check(8192, &new, &oldest), Ok(1));
        let stale = ledger.check(8192, &old, &oldest).unwrap_err();
        assert!(
            matches!(
                stale.kind,
                MismatchKind::Wrong {
                    oldest: 2,
                    newest: 2,
                    ..
                }
            ),
            "{stale}"
        );
        let zeroes = ledger.check(8192, &[0; STAMP_BYTES], &oldest).unwrap_err();
        assert_eq!(zeroes.kind, MismatchKind::Missing);
    }

    #[test]
    fn a_read_beside_a_write_may_hold_either() {
        let mut ledger = Ledger::new(0, 1, 0, 1 << 20, false).unwrap();
        let old = written(&mut ledger, 0);
        let mut oldest = Vec::new();
        ledger.oldest(0, STAMP_BYTES, &mut oldest);
        let mut new = vec![0; STAMP_BYTES];
        ledger.issue(1, 0, &mut new);
        assert!(ledger.is_busy(0, STAMP_BYTES));
        assert_eq!(ledger.check(0, &old, &oldest), Ok(1));
        assert_eq!(ledger.check(0, &new, &oldest), Ok(1));
    }

    #[test]
    fn a_block_that_nobody_wrote_is_zeroes_or_of_an_earlier_run() {
        let ledger = Ledger::new(0, 1, 0, 1 << 20, false).unwrap();
        let filled = Ledger::new(0, 1, 0, 1 << 20, true).unwrap();
        let earlier = written(&mut Ledger::new(0, 99, 0, 1 << 20, false).unwrap(), 0);
        assert_eq!(ledger.check(0, &[0; STAMP_BYTES], &[0]), Ok(1));
        assert_eq!(ledger.check(0, &earlier, &[0]), Ok(1));
        assert_eq!(filled.check(0, &earlier, &[0]), Ok(1));
        assert_eq!(
            filled.check(0, &[0; STAMP_BYTES], &[0]).unwrap_err().kind,
            MismatchKind::Missing
        );
    }
}
