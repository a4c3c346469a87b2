//! Which regions hold words that somebody has to look at (unjournaled or dirty ones): one bit a region, and a summary of
//! one bit for 64 regions.
//!
//! INVARIANT: whoever leaves such a word behind sets the bit of its region and then the bit of the summary, each by a
//! read-modify-write, before its request is acknowledged; `ActiveMap` says who may rely on another's mark. Whoever collects
//! clears the summary's bit first, then takes the regions' bits (and sets the summary's again if it leaves any), and then
//! looks at the words. `CONCURRENCY.md` has the proof.

use crate::map::fault::{Fault, planted};
use crate::map::grown::Grown;
use crate::map::radix::REGION_CLUSTERS;
use crate::sync::{AtomicU64, Ordering};

/// Bits of a word of either level.
const BITS: u64 = u64::BITS as u64;

/// The two levels of bits.
#[derive(Debug)]
pub(crate) struct ChangedRegions {
    /// Bit n of word w: region w * 64 + n has changed.
    regions: Grown<AtomicU64>,
    /// Bit n of word w: word w * 64 + n of `regions` is not 0.
    summary: Grown<AtomicU64>,
    /// The region with which the next limited collection begins, so that all of them have their turn.
    turn: AtomicU64,
}

/// Words of `regions` and of `summary` for so many clusters.
fn words(clusters: u64) -> (usize, usize) {
    let regions = clusters.div_ceil(REGION_CLUSTERS).div_ceil(BITS);
    let count = |words| usize::try_from(words).unwrap_or(usize::MAX);
    (count(regions), count(regions.div_ceil(BITS)))
}

impl ChangedRegions {
    /// No bit set, for this many clusters.
    pub(crate) fn new(clusters: u64) -> Self {
        let (regions, summary) = words(clusters);
        let zero = || AtomicU64::new(0);
        Self {
            regions: Grown::new(regions, zero),
            summary: Grown::new(summary, zero),
            turn: AtomicU64::new(0),
        }
    }

    /// Adds clusters at the end, while others mark and collect.
    pub(crate) fn grow(&self, clusters: u64) {
        let (regions, summary) = words(clusters);
        let zero = || AtomicU64::new(0);
        self.regions.grow(regions, zero);
        self.summary.grow(summary, zero);
    }

    /// Marks the regions that hold the clusters `first ..= last`.
    pub(crate) fn mark(&self, first: u64, last: u64) {
        let (first, last) = (first / REGION_CLUSTERS, last / REGION_CLUSTERS);
        set_bits(&self.regions, first, last);
        set_bits(&self.summary, first / BITS, last / BITS);
    }

    /// Whether any bit is set. A look without a promise: a mark that is being made may be missed, and one that a collector
    /// has just taken may be seen.
    pub(crate) fn any(&self) -> bool {
        // ORDERING: Relaxed; nothing follows from the answer but whether somebody begins to collect.
        self.summary
            .from(0)
            .any(|word| word.load(Ordering::Relaxed) != 0)
    }

    /// Takes marked regions and hands on the clusters of each run of neighbours, as first and count, to `each`, which says
    /// how many clusters it took. Ends after the region with which that makes `limit`; the marks of all other regions stay as
    /// they are. Returns whether it ended so and marks are left.
    ///
    /// Without limit (`u64::MAX`) it goes through the disk in order. With a limit it begins where the last one ended and goes
    /// around, so that a region that is marked is taken before any other is taken twice.
    pub(crate) fn take(&self, limit: u64, mut each: impl FnMut(u64, u64) -> u64) -> bool {
        let all = self.regions.len() as u64 * BITS;
        let start = if limit == u64::MAX {
            0
        } else {
            // ORDERING: Relaxed, here and below; only who collects touches it, which is one thread at a time, and what
            // hands that role on orders this too. A wrong value would be unfair and no more.
            self.turn.load(Ordering::Relaxed).min(all)
        };
        let mut left = limit.max(1);
        for (from, to) in [(start, all), (0, start)] {
            let mut at = from;
            // A run is at most as long as the limit allows if everything in it is taken.
            while let Some((first, end)) = self.take_run(at, to, left.div_ceil(REGION_CLUSTERS)) {
                let clusters = (end - first) * REGION_CLUSTERS;
                left = left.saturating_sub(each(first * REGION_CLUSTERS, clusters));
                at = end;
                if left == 0 {
                    self.turn.store(at, Ordering::Relaxed);
                    return self.any();
                }
            }
        }
        self.turn.store(0, Ordering::Relaxed);
        false
    }

    /// Takes the bits of the first run of marked regions within `from .. to`, at most `most` of them. Returns the first and
    /// the one after the last.
    fn take_run(&self, from: u64, to: u64, most: u64) -> Option<(u64, u64)> {
        let mut run: Option<(u64, u64)> = None;
        let mut at = from;
        while at < to {
            let word = at / BITS;
            // Without a next one the run is what was taken up to here.
            let Some(marked) = self.next_word(word) else {
                break;
            };
            if marked != word {
                if run.is_some() {
                    break;
                }
                at = marked * BITS;
                continue;
            }
            let part = Part {
                low: at % BITS,
                high: (to - word * BITS).min(BITS),
                most: most - run.map_or(0, |(first, end)| end - first),
                joins: run.is_some(),
            };
            let bits = self.take_bits(word, part);
            let next = (word + 1) * BITS;
            if bits == 0 {
                if run.is_some() {
                    break;
                }
                at = next;
                continue;
            }
            let first = word * BITS + u64::from(bits.trailing_zeros());
            let end = first + u64::from(bits.count_ones());
            let first = run.map_or(first, |(first, _)| first);
            run = Some((first, end));
            if end != next || end - first >= most {
                break;
            }
            at = end;
        }
        run
    }

    /// The first word of `regions`, from `word` on, whose bit in the summary is set.
    fn next_word(&self, word: u64) -> Option<u64> {
        let mut skip = u64::MAX << (word % BITS);
        let from = usize::try_from(word / BITS).ok()?;
        for (at, cell) in (word / BITS..).zip(self.summary.from(from)) {
            // ORDERING: Relaxed; a bit that was set before this collection began (it happened before, by way of the
            // request's acknowledgement) is seen by any load, and a later one is the next collection's.
            let bits = cell.load(Ordering::Relaxed) & skip;
            if bits != 0 {
                return Some(at * BITS + u64::from(bits.trailing_zeros()));
            }
            skip = u64::MAX;
        }
        None
    }

    /// Takes the run of bits that `part` asks for from a word of `regions`; 0 if there is none.
    fn take_bits(&self, word: u64, part: Part) -> u64 {
        let at = |word: u64| usize::try_from(word).ok();
        let regions = at(word).and_then(|at| self.regions.get(at));
        let summary = at(word / BITS).and_then(|at| self.summary.get(at));
        let (Some(regions), Some(summary)) = (regions, summary) else {
            return 0;
        };
        let bit = 1 << (word % BITS);
        // ORDERING: Acquire; pairs with the Release of `fetch_or` in `set_bits`: whose bit is lost here, of those the bit of
        // the region is seen below. Also with those whose bits later read-modify-writes have carried on.
        summary.fetch_and(!bit, Ordering::Acquire);
        // ORDERING: Relaxed; what must be seen happened before, by the line above. Who sets a bit that is missed here sets
        // the summary's after it was cleared.
        let seen = regions.load(Ordering::Relaxed);
        let wanted = part.pick(seen);
        let found = if wanted == 0 {
            seen
        } else {
            // ORDERING: Acquire; as above, for the words of the regions. Bits are cleared by nobody else, so that all that
            // were seen are found.
            regions.fetch_and(!wanted, Ordering::Acquire)
        };
        if found & !wanted != 0 && !planted(Fault::ForgetTheRest) {
            // ORDERING: Release; as in `set_bits`, on behalf of those whose bits stay.
            summary.fetch_or(bit, Ordering::Release);
        }
        found & wanted
    }

    /// Bytes of memory that the bits take.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.regions.memory_bytes() + self.summary.memory_bytes()
    }
}

/// Which bits of a word a collector would have.
#[derive(Clone, Copy)]
struct Part {
    /// From this bit on.
    low: u64,
    /// Below this bit.
    high: u64,
    /// At most so many.
    most: u64,
    /// Whether they must begin at `low`, since they go on with a run.
    joins: bool,
}

impl Part {
    /// The first run of bits that are set and meant; 0 if there is none.
    fn pick(self, marked: u64) -> u64 {
        if self.low >= self.high || self.most == 0 {
            return 0;
        }
        let meant = marked & (u64::MAX << self.low) & (u64::MAX >> (BITS - self.high));
        let first = u64::from(meant.trailing_zeros());
        if meant == 0 || (self.joins && first != self.low) {
            return 0;
        }
        let count = u64::from((meant >> first).trailing_ones()).min(self.most);
        (u64::MAX >> (BITS - count)) << first
    }
}

/// Sets the bits `first ..= last`, whole words at a time.
fn set_bits(words: &Grown<AtomicU64>, first: u64, last: u64) {
    for word in first / BITS..=last / BITS {
        let low = first.max(word * BITS) % BITS;
        let high = last.min(word * BITS + BITS - 1) % BITS;
        let mask = (u64::MAX >> (BITS - 1 - (high - low))) << low;
        let Some(cell) = usize::try_from(word).ok().and_then(|word| words.get(word)) else {
            debug_assert!(false, "bit {first}..={last} beyond the end");
            return;
        };
        // ORDERING: Acquire here would only serve the planted fault, to show that not even that would make it right.
        if planted(Fault::LookBeforeMarking) && cell.load(Ordering::Acquire) & mask == mask {
            continue;
        }
        // ORDERING: Release; pairs with the Acquire of `fetch_and` in `take_bits`, so that who takes the bit sees the word
        // (or, of the summary, the region's bit) that was changed before. A read-modify-write even if the bit is set
        // already: a mere load may return a bit that a collector has taken meanwhile, and that collector may have
        // passed the word before it was changed.
        cell.fetch_or(mask, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_ends_with_its_word_is_handed_on() {
        for limit in [1, u64::MAX] {
            let changed = ChangedRegions::new(130 * REGION_CLUSTERS);
            for (first, last) in [(63, 63), (62, 127), (0, 129)] {
                changed.mark(first * REGION_CLUSTERS, last * REGION_CLUSTERS);
                let mut regions = 0;
                while changed.any() {
                    changed.take(limit, |_, clusters| {
                        regions += clusters / REGION_CLUSTERS;
                        clusters
                    });
                }
                assert_eq!(regions, last - first + 1, "regions {first} to {last}");
            }
        }
    }
}
