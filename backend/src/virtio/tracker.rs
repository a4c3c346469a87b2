//! Tracks the requests of a ring in its inflight region, and finds out from one what an earlier process left under way.
//!
//! SPEC: vhost-user, "Inflight I/O tracking", split virtqueues. The order of the stores is all that matters:
//! ```text
//! take a head:     counter, then inflight = 1
//! return a batch:  for each head: next, last_batch_head
//!                  used index of the ring                  <- the guest sees the batch from here on
//!                  for each head: inflight = 0
//!                  used_idx of the region
//! ```
//! Killed before the used index of the ring: every head of the batch is under way still, and is carried out once more, which
//! the guest cannot tell. Killed behind it: `used_idx` and the used index differ by the length of the batch, whose heads
//! are the first of the list, so their flags can be cleared. Killed behind `used_idx`: nothing is left to do.
//!
//! The ring goes on behind its used index and the heads under way: as many entries as these were taken. What the front-end says
//! (SET_VRING_BASE) counts only for the first start with a region. Some say later that it goes on where the guest is, so a ring
//! that was started and took nothing must be told from a new one: the start leaves a number ([`STARTED`]).
//!
//! INVARIANT: between two batches a head's flag is set exactly if it was taken and not returned.

use crate::vhost::inflight::{QueueRegion, STARTED};

/// Why a ring cannot go on with an inflight region.
#[derive(Debug, thiserror::Error)]
pub enum Mismatch {
    /// Of a kind that is not known.
    #[error(transparent)]
    Kind(#[from] std::io::Error),
    /// The ring has heads that the region has no place for.
    #[error("the ring has {ring} entries, its inflight region only {region}")]
    RingTooLarge {
        /// Entries of the ring.
        ring: u16,
        /// Entries of the region.
        region: u16,
    },
    /// The region and the ring cannot be those of one machine at one time.
    #[error("the used index is {lag} ahead of the inflight region, which has requests under way")]
    OtherRing {
        /// How far.
        lag: u16,
    },
    /// A head that does not exist.
    #[error("the inflight region names head {0}, which the ring does not have")]
    NoSuchHead(u16),
    /// The front-end cut the file.
    #[error("the inflight buffer was taken away")]
    Lost,
}

/// How a ring goes on with its inflight region.
#[derive(Debug)]
pub struct Resumed {
    /// Tracks its requests from now on.
    pub tracker: InflightTracker,
    /// The heads to carry out again, before anything new, in this order.
    pub replay: Vec<u16>,
    /// The available entry to go on with.
    pub next_avail: u16,
    /// Whether somebody served the ring before. Its guest may not have been told of what was returned to it last.
    pub goes_on: bool,
}

/// Writes down which requests of a ring are under way.
#[derive(Debug)]
pub struct InflightTracker {
    /// Where.
    region: QueueRegion,
    /// The number of the next head that is taken, above [`STARTED`].
    counter: u64,
    /// `last_batch_head` as last stored; what the region says may have been changed by others.
    last_batch_head: u16,
    /// Heads that were returned and not yet published.
    batch: Vec<u16>,
}

impl InflightTracker {
    /// A ring's tracker, on a region that holds `counter` as its highest number.
    fn new(region: QueueRegion, counter: u64) -> Self {
        Self {
            last_batch_head: region.last_batch_head(),
            batch: Vec::with_capacity(usize::from(region.entries())),
            counter: counter.wrapping_add(1),
            region,
        }
    }

    /// Whether the front-end has taken the region away.
    pub fn is_lost(&self) -> bool {
        self.region.is_lost()
    }

    /// A head was taken and is about to be carried out.
    #[inline]
    pub fn taken(&mut self, head: u16) {
        self.region.set_counter(head, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.region.set_in_flight(head, true);
    }

    /// A head goes into the used ring, whose index comes later.
    #[inline]
    pub fn returned(&mut self, head: u16) {
        self.region.set_next(head, self.last_batch_head);
        self.region.set_last_batch_head(head);
        self.last_batch_head = head;
        self.batch.push(head);
    }

    /// The used index was stored: the guest sees what was returned.
    #[inline]
    pub fn published(&mut self, used_index: u16) {
        #[cfg(test)]
        if fault::is_planted(fault::Fault::UsedIndexFirst) {
            self.region.set_used_index(used_index);
        }
        for head in self.batch.drain(..) {
            self.region.set_in_flight(head, false);
        }
        self.region.set_used_index(used_index);
    }
}

/// Finds out how a ring goes on: one with `size` entries whose used index is `used_index`, and of which the front-end says
/// that it goes on at the entry `base`. Brings the region in order; doing so again, after a kill in the midst of it too,
/// changes nothing.
///
/// # Errors
/// The region is of no use for this ring.
pub fn resume(
    region: QueueRegion,
    size: u16,
    used_index: u16,
    base: u16,
) -> Result<Resumed, Mismatch> {
    region.check()?;
    if size > region.entries() {
        return Err(Mismatch::RingTooLarge {
            ring: size,
            region: region.entries(),
        });
    }
    if region.version() == 0 {
        region.initialize();
    }
    let goes_on = region.was_started();
    let belongs = repair(&region, size, used_index)?;
    let mut under_way = Vec::new();
    for head in (0..region.entries()).filter(|head| region.in_flight(*head)) {
        if head >= size {
            return Err(Mismatch::NoSuchHead(head));
        }
        under_way.push((region.counter(head), head));
    }
    under_way.sort_unstable();
    let highest = under_way.last().map_or(0, |(counter, _)| *counter);
    let highest = highest.max(STARTED);
    let replay: Vec<u16> = under_way.into_iter().map(|(_, head)| head).collect();
    // At most as many as the ring has entries.
    let taken = u16::try_from(replay.len()).unwrap_or(size);
    if !goes_on {
        region.start();
    }
    if region.is_lost() {
        return Err(Mismatch::Lost);
    }
    Ok(Resumed {
        tracker: InflightTracker::new(region, highest),
        replay,
        next_avail: if goes_on && belongs {
            used_index.wrapping_add(taken)
        } else {
            base
        },
        goes_on,
    })
}

/// Clears the flags of the last batch if the process was killed before it had, and says so. Returns whether the region was
/// last used with this life of the ring: one that was reset meanwhile, with nothing under way, begins where the front-end says.
fn repair(region: &QueueRegion, size: u16, used_index: u16) -> Result<bool, Mismatch> {
    let lag = used_index.wrapping_sub(region.used_index());
    if lag == 0 {
        return Ok(true);
    }
    let belongs = lag <= size;
    #[cfg(test)]
    let lag = fault::lag(lag);
    if belongs {
        let mut head = region.last_batch_head();
        for _ in 0..lag {
            // The canary: it is believed to exist, here and in the region, which the fuzzer has to find.
            if head >= region.entries() && !crate::canary::is_on() {
                return Err(Mismatch::NoSuchHead(head));
            }
            region.set_in_flight(head, false);
            head = region.next(head);
        }
    } else if (0..region.entries()).any(|head| region.in_flight(head)) {
        return Err(Mismatch::OtherRing { lag });
    }
    region.set_used_index(used_index);
    Ok(belongs)
}

/// Faults that the tests must notice.
#[cfg(test)]
pub mod fault {
    use std::cell::Cell;

    /// What is done wrong.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Fault {
        /// Flags are cleared before the guest can see the batch.
        ClearedFirst,
        /// The region's used index is stored before the flags are cleared.
        UsedIndexFirst,
        /// The last batch is not repaired.
        NoRepair,
        /// Only the head of its list is.
        RepairOfOne,
        /// A head is noted once it has been carried out.
        TakenLate,
    }

    thread_local! {
        static PLANTED: Cell<Option<Fault>> = const { Cell::new(None) };
    }

    /// From now on this is done wrong by this thread, or nothing.
    pub fn plant(fault: Option<Fault>) {
        PLANTED.set(fault);
    }

    /// Whether this is to be done wrong.
    pub fn is_planted(fault: Fault) -> bool {
        PLANTED.get() == Some(fault)
    }

    /// How many heads of the last batch are repaired.
    pub fn lag(lag: u16) -> u16 {
        match PLANTED.get() {
            Some(Fault::NoRepair) => 0,
            Some(Fault::RepairOfOne) => lag.min(1),
            _ => lag,
        }
    }
}

#[cfg(test)]
mod tests;
