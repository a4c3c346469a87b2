//! Which regions hold words that the journal lacks: one bit a region, and a summary of one bit for 64 regions.
//!
//! INVARIANT: whoever leaves a word unjournaled behind, whether it made it so or found it so, sets the bit of its region
//! and then the bit of the summary, each by a read-modify-write, before its request is acknowledged. Whoever collects
//! takes the summary's bits first, then the regions' bits, then looks at the words. `CONCURRENCY.md` has the proof.

use crate::map::fault::{Fault, planted};
use crate::map::radix::REGION_CLUSTERS;
use crate::sync::{AtomicU64, Ordering};

/// Bits of a word of either level.
const BITS: u64 = 64;

/// The two levels of bits.
#[derive(Debug)]
pub(crate) struct ChangedRegions {
    /// Bit n of word w: region w * 64 + n has changed.
    regions: Box<[AtomicU64]>,
    /// Bit n of word w: word w * 64 + n of `regions` is not 0.
    summary: Box<[AtomicU64]>,
}

impl ChangedRegions {
    /// No bit set, for this many clusters.
    pub(crate) fn new(clusters: u64) -> Self {
        let words = clusters.div_ceil(REGION_CLUSTERS).div_ceil(BITS);
        let zeroes = |count: u64| (0..count).map(|_| AtomicU64::new(0)).collect();
        Self {
            regions: zeroes(words),
            summary: zeroes(words.div_ceil(BITS)),
        }
    }

    /// Marks the regions that hold the clusters `first ..= last`.
    pub(crate) fn mark(&self, first: u64, last: u64) {
        let (first, last) = (first / REGION_CLUSTERS, last / REGION_CLUSTERS);
        set_bits(&self.regions, first, last);
        set_bits(&self.summary, first / BITS, last / BITS);
    }

    /// Takes all bits and hands on the clusters of each run of marked regions, as first and count, in order.
    pub(crate) fn take(&self, mut each: impl FnMut(u64, u64)) {
        let mut run: Option<(u64, u64)> = None;
        for_bits(&self.summary, 0, self.summary.len(), &mut |word| {
            // The summary has no bit for a word that is not there.
            let at = usize::try_from(word).unwrap_or(usize::MAX);
            for_bits(
                &self.regions,
                at,
                at.saturating_add(1),
                &mut |region| match &mut run {
                    Some((_, end)) if *end == region => *end += 1,
                    _ => {
                        if let Some((first, end)) = run.replace((region, region + 1)) {
                            each(first * REGION_CLUSTERS, (end - first) * REGION_CLUSTERS);
                        }
                    }
                },
            );
        });
        if let Some((first, end)) = run {
            each(first * REGION_CLUSTERS, (end - first) * REGION_CLUSTERS);
        }
    }

    /// Bytes of memory that the bits take.
    pub(crate) fn memory_bytes(&self) -> u64 {
        (size_of_val(&*self.regions) + size_of_val(&*self.summary)) as u64
    }
}

/// Sets the bits `first ..= last`, whole words at a time.
fn set_bits(words: &[AtomicU64], first: u64, last: u64) {
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
        // ORDERING: Release; pairs with the Acquire of the swap in `for_bits`, so that who takes the bit sees the word
        // (or, of the summary, the region's bit) that was changed before. A read-modify-write even if the bit is set
        // already: a mere load may return a bit that a collector has taken meanwhile, and that collector may have
        // passed the word before it was changed.
        cell.fetch_or(mask, Ordering::Release);
    }
}

/// Takes the bits of the words `from .. to` and hands on their numbers, in order.
fn for_bits(words: &[AtomicU64], from: usize, to: usize, each: &mut impl FnMut(u64)) {
    let Some(words) = words.get(from..to) else {
        return;
    };
    for (word, cell) in (from as u64..).zip(words) {
        // ORDERING: Relaxed; a bit that was set before this collection began (it happened before, by way of the
        // request's acknowledgement) is seen by any load, and a later one is the next collection's.
        if cell.load(Ordering::Relaxed) == 0 {
            continue;
        }
        // ORDERING: Acquire; pairs with the Release of `fetch_or` in `set_bits`, also with those whose bits later
        // read-modify-writes have carried on.
        let mut bits = cell.swap(0, Ordering::Acquire);
        while bits != 0 {
            each(word * BITS + u64::from(bits.trailing_zeros()));
            bits &= bits - 1;
        }
    }
}
