//! What a worker counts. Each worker has its own, so that counting costs no shared cache line; a reader sums them.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::virtio::complete::Ended;
use crate::virtio::request::{Kind, Status};

/// The counters of one worker. Written by it alone, read by anybody.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Counters {
    /// Reads that ended.
    reads: AtomicU64,
    /// Writes that ended.
    writes: AtomicU64,
    /// Flushes that ended.
    flushes: AtomicU64,
    /// Discards and write-zeroes that ended.
    zeroes: AtomicU64,
    /// Other requests, and chains that were none.
    others: AtomicU64,
    /// Bytes read.
    read_bytes: AtomicU64,
    /// Bytes written.
    written_bytes: AtomicU64,
    /// Bytes zeroed or discarded.
    zeroed_bytes: AtomicU64,
    /// Requests that failed, unknown ones and malformed chains included.
    errors: AtomicU64,
    /// Signals sent to the guest.
    calls: AtomicU64,
    /// Rings that broke.
    broken_rings: AtomicU64,
}

/// Counts at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Reads that ended.
    pub reads: u64,
    /// Writes that ended.
    pub writes: u64,
    /// Flushes that ended.
    pub flushes: u64,
    /// Discards and write-zeroes that ended.
    pub zeroes: u64,
    /// Other requests, and chains that were none.
    pub others: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Bytes zeroed or discarded.
    pub zeroed_bytes: u64,
    /// Requests that failed, unknown ones and malformed chains included.
    pub errors: u64,
    /// Signals sent to the guest.
    pub calls: u64,
    /// Rings that broke.
    pub broken_rings: u64,
}

/// Adds to a counter of one's own.
///
/// ORDERING: a load and a store, since nobody else writes it; Relaxed, since nobody concludes anything from one counter
/// about other memory.
fn add(counter: &AtomicU64, more: u64) {
    counter.store(
        counter.load(Ordering::Relaxed).wrapping_add(more),
        Ordering::Relaxed,
    );
}

impl Counters {
    /// Counts a request that ended. For the worker only.
    pub fn ended(&self, ended: &Ended) {
        let ok = ended.status == Status::Ok;
        let bytes = if ok { ended.bytes } else { 0 };
        let (requests, moved) = match ended.kind {
            Kind::Read => (&self.reads, Some(&self.read_bytes)),
            Kind::Write => (&self.writes, Some(&self.written_bytes)),
            Kind::Flush => (&self.flushes, None),
            Kind::Zero => (&self.zeroes, Some(&self.zeroed_bytes)),
            Kind::Other => (&self.others, None),
        };
        add(requests, 1);
        if let Some(moved) = moved {
            add(moved, bytes);
        }
        if !ok {
            add(&self.errors, 1);
        }
    }

    /// Counts a chain that was no request. For the worker only.
    pub fn malformed(&self) {
        add(&self.others, 1);
        add(&self.errors, 1);
    }

    /// Counts a signal to the guest. For the worker only.
    pub fn called(&self) {
        add(&self.calls, 1);
    }

    /// Counts a ring that broke. For the worker only.
    pub fn ring_broke(&self) {
        add(&self.broken_rings, 1);
    }

    /// Adds what this worker has counted to a sum.
    pub fn add_to(&self, totals: &mut Totals) {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        totals.reads += get(&self.reads);
        totals.writes += get(&self.writes);
        totals.flushes += get(&self.flushes);
        totals.zeroes += get(&self.zeroes);
        totals.others += get(&self.others);
        totals.read_bytes += get(&self.read_bytes);
        totals.written_bytes += get(&self.written_bytes);
        totals.zeroed_bytes += get(&self.zeroed_bytes);
        totals.errors += get(&self.errors);
        totals.calls += get(&self.calls);
        totals.broken_rings += get(&self.broken_rings);
    }
}
