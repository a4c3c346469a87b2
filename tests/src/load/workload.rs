//! Which request comes next.

use super::random::Random;

/// The order of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Any aligned address of the working set.
    Random,
    /// One after the other, from the start again at the end.
    Sequential,
    /// One address in each unit of `stride_bytes`, units in random order, each once: what a first write after a
    /// snapshot sees. The order depends on the seed alone; the first `skip` units of it are left out.
    Once {
        /// Bytes of a unit.
        stride_bytes: u64,
        /// Units to leave out.
        skip: u64,
    },
}

/// What is done at each address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mix {
    /// Reads only.
    Read,
    /// Writes only.
    Write,
    /// Reads and writes at random.
    Mixed {
        /// How many in a hundred are reads.
        read_percent: u8,
    },
    /// A write and, once it completed, a flush: counted as one operation.
    WriteFlush,
}

/// What is asked of the disk.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// The order of addresses.
    pub pattern: Pattern,
    /// What is done there.
    pub mix: Mix,
    /// Bytes of a request.
    pub block_bytes: u64,
    /// Where the working set starts on the disk.
    pub start: u64,
    /// Bytes of the working set.
    pub len: u64,
    /// Everything random follows from it.
    pub seed: u64,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Whether to read; else to write.
    pub is_read: bool,
    /// Where on the disk.
    pub offset: u64,
}

/// Hands out the steps of a workload.
#[derive(Debug)]
pub struct Steps {
    /// As asked for.
    workload: Workload,
    /// Requests that fit in the working set.
    blocks: u64,
    /// The next block of a sequential workload.
    next_block: u64,
    /// The units still to come, the next one last.
    units: Vec<u32>,
    /// Addresses.
    addresses: Random,
    /// Reads or writes; apart, so that a mixed workload visits the addresses of a pure one.
    kinds: Random,
}

impl Steps {
    /// Checks the workload against a disk of `capacity_bytes` and prepares it.
    ///
    /// # Errors
    /// What does not fit, in words.
    pub fn new(workload: &Workload, capacity_bytes: u64) -> Result<Self, String> {
        let Workload {
            block_bytes,
            start,
            len,
            seed,
            ..
        } = *workload;
        if block_bytes == 0 || !block_bytes.is_multiple_of(512) {
            return Err(format!(
                "a block of {block_bytes} bytes is not whole sectors of 512"
            ));
        }
        if !start.is_multiple_of(block_bytes) {
            return Err(format!(
                "a working set at {start} is not aligned to blocks of {block_bytes} bytes"
            ));
        }
        if start
            .checked_add(len)
            .is_none_or(|end| end > capacity_bytes)
        {
            return Err(format!(
                "a working set of {len} bytes at {start} exceeds the disk of {capacity_bytes}"
            ));
        }
        let blocks = len / block_bytes;
        if blocks == 0 {
            return Err(format!(
                "a working set of {len} bytes holds no block of {block_bytes}"
            ));
        }
        let mut units = Vec::new();
        if let Pattern::Once { stride_bytes, skip } = workload.pattern {
            if stride_bytes == 0 || !stride_bytes.is_multiple_of(block_bytes) {
                return Err(format!(
                    "a stride of {stride_bytes} is not whole blocks of {block_bytes} bytes"
                ));
            }
            let count = u32::try_from(len / stride_bytes)
                .map_err(|_| "the stride is too small for the working set")?;
            units = (0..count).collect();
            Random::new(seed ^ 0x756e_6974).shuffle(&mut units);
            let skip = usize::try_from(skip).unwrap_or(usize::MAX).min(units.len());
            units.drain(..skip);
            units.reverse();
        }
        Ok(Self {
            workload: *workload,
            blocks,
            next_block: 0,
            units,
            addresses: Random::new(seed),
            kinds: Random::new(seed ^ 0x6b69_6e64),
        })
    }

    /// The next step, or `None` when every unit was visited.
    #[inline]
    pub fn next_step(&mut self) -> Option<Step> {
        let Workload {
            block_bytes, start, ..
        } = self.workload;
        let offset = match self.workload.pattern {
            Pattern::Random => start + self.addresses.below(self.blocks) * block_bytes,
            Pattern::Sequential => {
                let block = self.next_block;
                self.next_block = if block + 1 == self.blocks {
                    0
                } else {
                    block + 1
                };
                start + block * block_bytes
            }
            Pattern::Once { stride_bytes, .. } => {
                let unit = u64::from(self.units.pop()?);
                let within = self.addresses.below(stride_bytes / block_bytes);
                start + unit * stride_bytes + within * block_bytes
            }
        };
        let is_read = match self.workload.mix {
            Mix::Read => true,
            Mix::Write | Mix::WriteFlush => false,
            Mix::Mixed { read_percent } => self.kinds.below(100) < u64::from(read_percent),
        };
        Some(Step { is_read, offset })
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failure here is the test's failure")]

    use std::collections::BTreeSet;

    use super::*;

    const WORKLOAD: Workload = Workload {
        pattern: Pattern::Random,
        mix: Mix::Read,
        block_bytes: 4096,
        start: 8192,
        len: 1 << 20,
        seed: 5,
    };

    #[test]
    fn random_addresses_stay_in_the_working_set_and_reach_all_of_it() {
        let mut steps = Steps::new(&WORKLOAD, 2 << 20).unwrap();
        let seen: BTreeSet<u64> = (0..10_000)
            .map(|_| steps.next_step().unwrap().offset)
            .collect();
        let all: BTreeSet<u64> = (0..256).map(|block| 8192 + block * 4096).collect();
        assert_eq!(seen, all);
    }

    #[test]
    fn sequential_addresses_start_again_at_the_end() {
        let workload = Workload {
            pattern: Pattern::Sequential,
            len: 3 * 4096,
            ..WORKLOAD
        };
        let mut steps = Steps::new(&workload, 2 << 20).unwrap();
        let seen: Vec<u64> = (0..4).map(|_| steps.next_step().unwrap().offset).collect();
        assert_eq!(seen, [8192, 12288, 16384, 8192]);
    }

    #[test]
    fn once_visits_each_unit_once() {
        let pattern = Pattern::Once {
            stride_bytes: 65536,
            skip: 0,
        };
        let mut steps = Steps::new(
            &Workload {
                pattern,
                ..WORKLOAD
            },
            2 << 20,
        )
        .unwrap();
        let mut seen: Vec<u64> = Vec::new();
        while let Some(step) = steps.next_step() {
            seen.push((step.offset - 8192) / 65536);
        }
        assert_ne!(seen, (0..16).collect::<Vec<_>>());
        seen.sort_unstable();
        assert_eq!(seen, (0..16).collect::<Vec<_>>());
    }

    #[test]
    fn skipped_units_are_those_that_come_first_without_skipping() {
        let units = |skip, count| {
            let pattern = Pattern::Once {
                stride_bytes: 4096,
                skip,
            };
            let mut steps = Steps::new(
                &Workload {
                    pattern,
                    ..WORKLOAD
                },
                2 << 20,
            )
            .unwrap();
            (0..count)
                .map(|_| steps.next_step().unwrap().offset)
                .collect::<Vec<_>>()
        };
        let all = units(0, 20);
        assert_eq!(units(5, 15), all.get(5..).unwrap());
    }

    #[test]
    fn a_mix_keeps_its_proportion() {
        let workload = Workload {
            mix: Mix::Mixed { read_percent: 70 },
            ..WORKLOAD
        };
        let mut steps = Steps::new(&workload, 2 << 20).unwrap();
        let reads = (0..10_000)
            .filter(|_| steps.next_step().unwrap().is_read)
            .count();
        assert!((6_700..7_300).contains(&reads), "{reads}");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let refused = |workload: Workload| Steps::new(&workload, 2 << 20).is_err();
        assert!(refused(Workload {
            block_bytes: 0,
            ..WORKLOAD
        }));
        assert!(refused(Workload {
            block_bytes: 1000,
            ..WORKLOAD
        }));
        assert!(refused(Workload {
            start: 512,
            ..WORKLOAD
        }));
        assert!(refused(Workload {
            len: 2 << 20,
            ..WORKLOAD
        }));
        assert!(refused(Workload {
            len: 4095,
            ..WORKLOAD
        }));
        assert!(refused(Workload {
            len: u64::MAX - 100,
            ..WORKLOAD
        }));
        let pattern = Pattern::Once {
            stride_bytes: 6000,
            skip: 0,
        };
        assert!(refused(Workload {
            pattern,
            ..WORKLOAD
        }));
    }
}
