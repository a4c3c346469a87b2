//! Does a snapshot taken under load show one instant? The history of stamped writes, and the check against it.
//!
//! One thread issues all writes, on any number of queues and disks, and sees all completions; a counter (the *clock*) orders
//! these events. A write may *depend* on every write that had completed before it was issued. A snapshot is a
//! **consistent cut** if with each write it also holds everything that write may depend on:
//!
//! > if the snapshot holds a write issued at t, then every write that had completed before t is in it:
//! > its block holds that write or a newer one.
//!
//! Writes under way at the instant may be in it or not. Beside that, what completed before the command was given must
//! be in it, and what was issued after the command had returned must not.
//!
//! INVARIANT: at most one write of a block is under way, so the writes of a block are ordered by their numbers.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Violations that a report keeps; the others are counted.
const VIOLATIONS_MAX: usize = 10;

/// One write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write {
    /// The disk, counted from 0.
    pub disk: u32,
    /// The block on that disk.
    pub block: u64,
    /// When it was issued.
    pub issued: u64,
    /// When its completion was seen; `None` while it is under way.
    pub completed: Option<u64>,
}

/// Tells the time of a history; may be read by any thread.
#[derive(Clone, Debug, Default)]
pub struct Clock(Arc<AtomicU64>);

impl Clock {
    /// The last event so far.
    ///
    /// ORDERING: SeqCst, as in `tick`: a completion seen before this call has a time not above the answer, and a write
    /// issued after this call has one above it.
    pub fn now(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    /// The time of a new event. ORDERING: SeqCst; see `now`.
    fn tick(&self) -> u64 {
        self.0.fetch_add(1, Ordering::SeqCst) + 1
    }
}

/// All writes of a run; a write's number is its place, counted from 1.
#[derive(Debug, Default)]
pub struct History {
    /// In the order in which they were issued.
    writes: Vec<Write>,
    /// Counts the events.
    clock: Clock,
}

impl History {
    /// The clock of its events.
    pub fn clock(&self) -> Clock {
        self.clock.clone()
    }

    /// Notes a write that is about to be issued; returns its number.
    pub fn issue(&mut self, disk: u32, block: u64) -> u64 {
        let issued = self.clock.tick();
        self.writes.push(Write {
            disk,
            block,
            issued,
            completed: None,
        });
        self.writes.len() as u64
    }

    /// Notes that the completion of write `number` was seen.
    pub fn complete(&mut self, number: u64) {
        let completed = self.clock.tick();
        if let Some(index) = index(number)
            && let Some(write) = self.writes.get_mut(index)
        {
            debug_assert!(write.completed.is_none(), "write {number} completed twice");
            write.completed = Some(completed);
        }
    }

    /// Write `number`.
    pub fn write(&self, number: u64) -> Option<&Write> {
        self.writes.get(index(number)?)
    }

    /// How many writes were issued.
    pub fn len(&self) -> usize {
        self.writes.len()
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }
}

/// The place of write `number` in the history.
fn index(number: u64) -> Option<usize> {
    usize::try_from(number).ok()?.checked_sub(1)
}

/// What a snapshot holds: for each disk and block the number of a write, 0 for none.
#[derive(Clone, Debug, Default)]
pub struct Cut {
    /// By disk, then by block.
    disks: Vec<Vec<u64>>,
}

impl Cut {
    /// Of `disks` disks with `blocks` blocks each, nothing written.
    pub fn new(disks: usize, blocks: usize) -> Self {
        Self {
            disks: vec![vec![0; blocks]; disks],
        }
    }

    /// Sets what a block holds.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn set(&mut self, disk: u32, block: u64, number: u64) {
        let place = self.place(disk, block);
        assert!(place.is_some(), "there is no block {block} on disk {disk}");
        if let Some(place) = place {
            *place = number;
        }
    }

    /// The cell of a block.
    fn place(&mut self, disk: u32, block: u64) -> Option<&mut u64> {
        self.disks
            .get_mut(usize::try_from(disk).ok()?)?
            .get_mut(usize::try_from(block).ok()?)
    }

    /// What a block holds.
    fn get(&self, disk: u32, block: u64) -> Option<u64> {
        self.disks
            .get(usize::try_from(disk).ok()?)?
            .get(usize::try_from(block).ok()?)
            .copied()
    }
}

/// The times of the clock around the command that took the snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// Read before it was given.
    pub given: u64,
    /// Read after it had returned.
    pub returned: u64,
}

/// Why a snapshot is not a consistent cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A block holds a write that was never issued to it.
    Foreign {
        /// The disk.
        disk: u32,
        /// The block.
        block: u64,
        /// The number it holds.
        number: u64,
    },
    /// A write is in the snapshot that was issued after the command had returned.
    Future {
        /// Its number.
        number: u64,
        /// The write.
        write: Write,
    },
    /// A write is missing that had completed before the command was given.
    Lost {
        /// Its number.
        number: u64,
        /// The write.
        write: Write,
        /// What its block holds instead.
        found: u64,
    },
    /// A write is missing that had completed before one was issued that is there.
    Hole {
        /// Its number.
        number: u64,
        /// The write.
        write: Write,
        /// What its block holds instead.
        found: u64,
        /// The number of a write that is there and may depend on it.
        dependent: u64,
    },
}

/// What is to be said about a consistent cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Blocks that hold a write.
    pub written_blocks: usize,
    /// Writes that had to be there.
    pub required: usize,
    /// The number of the last write issued that is there; 0 if there is none.
    pub newest: u64,
}

/// A snapshot that is not a consistent cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inconsistent {
    /// The first violations.
    pub violations: Vec<Violation>,
    /// How many there are in all.
    pub count: usize,
}

impl fmt::Display for Inconsistent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} violations of a consistent cut, the first:",
            self.count
        )?;
        for violation in &self.violations {
            write!(f, "\n  {violation:?}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Inconsistent {}

impl Inconsistent {
    /// Nothing found yet.
    const fn none() -> Self {
        Self {
            violations: Vec::new(),
            count: 0,
        }
    }

    /// Takes one more.
    fn add(&mut self, violation: Violation) {
        self.count += 1;
        if self.violations.len() < VIOLATIONS_MAX {
            self.violations.push(violation);
        }
    }
}

/// Checks that `cut` is one instant of `history`, between the times of `command`. O(writes + blocks).
///
/// # Errors
/// What contradicts that.
pub fn check(history: &History, command: Command, cut: &Cut) -> Result<Summary, Inconsistent> {
    let mut wrong = Inconsistent::none();
    // Only the latest write in the cut matters: what completed before any write in it was issued also completed before
    // the latest was.
    let mut latest: Option<(u64, u64)> = None;
    let mut written_blocks = 0;
    for (disk, blocks) in (0..).zip(&cut.disks) {
        for (block, &number) in (0..).zip(blocks) {
            if number == 0 {
                continue;
            }
            written_blocks += 1;
            match history.write(number) {
                Some(write) if write.disk == disk && write.block == block => {
                    if write.issued > command.returned {
                        wrong.add(Violation::Future {
                            number,
                            write: *write,
                        });
                    }
                    if latest.is_none_or(|(issued, _)| write.issued > issued) {
                        latest = Some((write.issued, number));
                    }
                }
                _ => wrong.add(Violation::Foreign {
                    disk,
                    block,
                    number,
                }),
            }
        }
    }
    let mut required = 0;
    for (number, write) in (1..).zip(&history.writes) {
        let Some(completed) = write.completed else {
            continue;
        };
        let before_command = completed <= command.given;
        let before_latest = latest.filter(|(issued, _)| completed < *issued);
        if !before_command && before_latest.is_none() {
            continue;
        }
        required += 1;
        let found = cut.get(write.disk, write.block).unwrap_or_default();
        if found >= number {
            continue;
        }
        wrong.add(match before_latest {
            Some((_, dependent)) if !before_command => Violation::Hole {
                number,
                write: *write,
                found,
                dependent,
            },
            _ => Violation::Lost {
                number,
                write: *write,
                found,
            },
        });
    }
    if wrong.count == 0 {
        Ok(Summary {
            written_blocks,
            required,
            newest: latest.map_or(0, |(_, number)| number),
        })
    } else {
        Err(wrong)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failure here is the test's failure")]

    use super::super::random::Random;
    use super::*;

    /// A cut at any time.
    const ANY: Command = Command {
        given: 0,
        returned: u64::MAX,
    };

    /// Two writes one after the other, the second issued after the first completed, on two disks.
    fn dependent() -> History {
        let mut history = History::default();
        let first = history.issue(0, 5);
        history.complete(first);
        let second = history.issue(1, 7);
        history.complete(second);
        history
    }

    #[test]
    fn every_prefix_of_dependent_writes_is_a_cut() {
        let history = dependent();
        let mut cut = Cut::new(2, 10);
        assert!(check(&history, ANY, &cut).is_ok());
        cut.set(0, 5, 1);
        assert!(check(&history, ANY, &cut).is_ok());
        cut.set(1, 7, 2);
        let summary = check(&history, ANY, &cut).unwrap();
        assert_eq!(
            summary,
            Summary {
                written_blocks: 2,
                required: 1,
                newest: 2
            }
        );
    }

    #[test]
    fn canary_a_write_without_what_it_depends_on_is_caught() {
        let history = dependent();
        let mut cut = Cut::new(2, 10);
        cut.set(1, 7, 2);
        let wrong = check(&history, ANY, &cut).unwrap_err();
        let missing = *history.write(1).unwrap();
        assert_eq!(
            wrong.violations,
            [Violation::Hole {
                number: 1,
                write: missing,
                found: 0,
                dependent: 2
            }]
        );
    }

    #[test]
    fn canary_a_stale_block_is_caught() {
        let mut history = History::default();
        for _ in 0..2 {
            let number = history.issue(0, 5);
            history.complete(number);
        }
        let last = history.issue(0, 6);
        history.complete(last);
        let mut cut = Cut::new(1, 10);
        cut.set(0, 5, 1);
        cut.set(0, 6, 3);
        let wrong = check(&history, ANY, &cut).unwrap_err();
        assert!(matches!(
            wrong.violations.as_slice(),
            [Violation::Hole {
                number: 2,
                found: 1,
                dependent: 3,
                ..
            }]
        ));
    }

    #[test]
    fn writes_under_way_at_the_instant_may_be_there_or_not() {
        let mut history = History::default();
        let first = history.issue(0, 1);
        let second = history.issue(0, 2);
        history.complete(second);
        history.complete(first);
        for (one, two) in [(0, 0), (1, 0), (0, 2), (1, 2)] {
            let mut cut = Cut::new(1, 10);
            cut.set(0, 1, one);
            cut.set(0, 2, two);
            assert!(check(&history, ANY, &cut).is_ok(), "{one} {two}");
        }
    }

    #[test]
    fn canary_what_completed_before_the_command_must_be_there() {
        let mut history = History::default();
        let number = history.issue(0, 1);
        history.complete(number);
        let command = Command {
            given: history.clock().now(),
            returned: u64::MAX,
        };
        let wrong = check(&history, command, &Cut::new(1, 10)).unwrap_err();
        assert!(matches!(
            wrong.violations.as_slice(),
            [Violation::Lost {
                number: 1,
                found: 0,
                ..
            }]
        ));
    }

    #[test]
    fn canary_what_was_issued_after_the_command_returned_must_not_be_there() {
        let mut history = History::default();
        let command = Command {
            given: 0,
            returned: history.clock().now(),
        };
        history.issue(0, 1);
        let mut cut = Cut::new(1, 10);
        cut.set(0, 1, 1);
        let wrong = check(&history, command, &cut).unwrap_err();
        assert!(matches!(
            wrong.violations.as_slice(),
            [Violation::Future { number: 1, .. }]
        ));
    }

    #[test]
    fn canary_a_stamp_of_no_write_is_caught() {
        let history = dependent();
        for (block, number) in [(5, 3), (6, 1)] {
            let mut cut = Cut::new(2, 10);
            cut.set(0, block, number);
            let wrong = check(&history, ANY, &cut).unwrap_err();
            assert_eq!(
                wrong.violations,
                [Violation::Foreign {
                    disk: 0,
                    block,
                    number
                }]
            );
        }
    }

    /// A run of random writes on two disks with a window of 32 under way; the state of the disks (all completed writes,
    /// and some of those under way) is taken at the given times, a time for each disk.
    fn simulate(seed: u64, instants: [u64; 2]) -> (History, Cut) {
        let mut random = Random::new(seed);
        let mut history = History::default();
        let mut under_way: Vec<u64> = Vec::new();
        let mut live = Cut::new(2, 64);
        let mut taken = Cut::new(2, 64);
        let mut done = [false; 2];
        while done != [true; 2] || history.len() < 2000 {
            for (disk, instant) in instants.into_iter().enumerate() {
                if history.clock().now() >= instant
                    && !std::mem::replace(done.get_mut(disk).unwrap(), true)
                {
                    taken.disks[disk] = live.disks[disk].clone();
                    for number in &under_way {
                        let write = history.write(*number).unwrap();
                        if write.disk as usize == disk && random.below(2) == 0 {
                            taken.set(write.disk, write.block, *number);
                        }
                    }
                }
            }
            if under_way.len() == 32 || (!under_way.is_empty() && random.below(2) == 0) {
                let place = usize::try_from(random.below(under_way.len() as u64)).unwrap();
                let number = under_way.swap_remove(place);
                let write = *history.write(number).unwrap();
                history.complete(number);
                live.set(write.disk, write.block, number);
            } else {
                let disk = u32::try_from(random.below(2)).unwrap();
                let block = random.below(64);
                let busy = under_way.iter().any(|number| {
                    let write = history.write(*number).unwrap();
                    (write.disk, write.block) == (disk, block)
                });
                if !busy {
                    under_way.push(history.issue(disk, block));
                }
            }
        }
        (history, taken)
    }

    #[test]
    fn one_instant_for_all_disks_is_always_a_cut() {
        for seed in 0..200 {
            let (history, cut) = simulate(seed, [1000 + seed; 2]);
            let command = Command {
                given: 1000 + seed,
                returned: 1000 + seed,
            };
            let checked = check(&history, command, &cut);
            assert!(checked.is_ok(), "seed {seed}: {checked:?}");
        }
    }

    #[test]
    fn canary_two_disks_at_two_instants_are_caught() {
        let caught = (0..200)
            .filter(|seed| {
                let (history, cut) = simulate(*seed, [1000, 1200]);
                check(
                    &history,
                    Command {
                        given: 1000,
                        returned: 1200,
                    },
                    &cut,
                )
                .is_err()
            })
            .count();
        assert!(caught >= 195, "only {caught} of 200 were caught");
    }
}
