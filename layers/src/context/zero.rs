//! Write-zeroes and discard. Parts of clusters are written as zeroes; whole clusters are zeroed by who leads the flushes, see
//! `flush::zeroes`.
//!
//! A discarded range reads as zeroes afterwards, so that no older layer's data ever shows through.

use std::sync::Arc;

use crate::canary::{self, Canary};
use crate::file::Segment;
use crate::flush::zeroes::ZeroRange;
use crate::resolve::{Source, resolve};
use crate::segments::Slicer;
use crate::units::{CLUSTER_BYTES, CLUSTER_SECTORS, Cluster, Sector, SectorMask, SectorRange};
use crate::volume::{Durability, RequestError};

use super::QueueContext;
use super::era::EraId;

/// A cluster of zeroes to write from.
static ZEROES: [u8; 4096] = [0; 4096];

const _: () = assert!(ZEROES.len() as u64 == CLUSTER_BYTES);

impl QueueContext {
    /// Makes a range read as zeroes; with `unmap` its space is given back.
    pub(super) fn zero(&mut self, request: usize, range: SectorRange, unmap: bool) {
        self.begin(request, true);
        let capacity = self.volume.capacity();
        let first = range.start.0.div_ceil(CLUSTER_SECTORS);
        // The last cluster of the disk may be cut short; covering what exists of it covers it whole.
        let last = if range.end() == capacity {
            range.end().0.div_ceil(CLUSTER_SECTORS)
        } else {
            range.end().0 / CLUSTER_SECTORS
        };
        if first < last {
            self.zero_part(
                request,
                range.start.0,
                (first * CLUSTER_SECTORS).min(range.end().0),
            );
            self.zero_part(request, last * CLUSTER_SECTORS, range.end().0);
            self.zero_clusters(request, Cluster(first), last - first, range.end(), unmap);
        } else {
            self.zero_part(request, range.start.0, range.end().0);
        }
        self.part_done(request, Ok(()));
    }

    /// Takes what a request has left to zero over to another era. The disk may have grown since, and others may write to what
    /// it has gained: returns what is to be zeroed of a cluster that its end does not cut short any more.
    pub(super) fn move_zero_on(&self, zero: &mut ZeroRange, era: EraId) -> Option<SectorRange> {
        let active = self.eras.active_of(era)?;
        zero.layer = Arc::clone(&active.layer);
        zero.slot = active.slot;
        zero.cut_to(self.volume.capacity())
    }

    /// Zeroes what is left of such a cluster, and then whole ones, for a request of which nothing else is left.
    pub(super) fn zero_after(
        &mut self,
        number: usize,
        zero: ZeroRange,
        tail: SectorRange,
        flush: bool,
    ) {
        if let Some(request) = self.requests.get_mut(number) {
            request.zero = Some(zero);
            request.durability = match flush {
                true => Durability::OnCompletion,
                false => Durability::AfterFlush,
            };
        }
        self.zero_part(number, tail.start.0, tail.end().0);
        self.part_done(number, Ok(()));
    }

    /// Writes zeroes to the sectors `from .. to`, fewer than two clusters, unless they read as zeroes already.
    pub(super) fn zero_part(&mut self, request: usize, from: u64, to: u64) {
        if from >= to {
            return;
        }
        let range = SectorRange {
            start: Sector(from),
            count: to - from,
        };
        let chain = Arc::clone(self.eras.chain());
        let mut parts = std::mem::take(&mut self.parts);
        let known = resolve(self.volume.table(), &chain, range, &mut parts).is_ok();
        let reads_zero = known && parts.iter().all(|part| part.source == Source::Zero);
        self.parts = parts;
        // Zeroes of an unsealed layer do not count: the request that made them may not have marked them for the next
        // flush yet, and this one is acknowledged without waiting for it.
        let last = Sector(range.end().0 - 1).cluster();
        let first = range.start.cluster();
        let zero_already = reads_zero
            && self
                .volume
                .table()
                .runs(first, last.0 - first.0 + 1)
                .all(|run| chain.was_sealed(run.resolve.slot));
        if zero_already {
            return;
        }
        // Fewer than two clusters lie in a part, and they may begin anywhere.
        let page = Segment {
            base: ZEROES.as_ptr().cast_mut(),
            len: ZEROES.len(),
        };
        self.write_range(request, range, Slicer::new(&[page, page]));
    }

    /// Has whole clusters zeroed once the parts are written.
    fn zero_clusters(
        &mut self,
        request: usize,
        first: Cluster,
        count: u64,
        end: Sector,
        unmap: bool,
    ) {
        let Some(active) = self.eras.active() else {
            return self.note_error(request, RequestError::Failed);
        };
        if canary::is_set(Canary::TrimBeforeRecord) {
            let none = |_| SectorMask::NONE;
            self.cache.trim(active.number, first, count, none);
        }
        let zero = ZeroRange {
            layer: Arc::clone(&active.layer),
            slot: active.slot,
            first,
            count,
            end,
            unmap,
        };
        if let Some(request) = self.requests.get_mut(request) {
            request.zero = Some(zero);
        }
    }

    /// Remembers the first failure of a request.
    pub(super) fn note_error(&mut self, request: usize, error: RequestError) {
        if let Some(request) = self.requests.get_mut(request) {
            request.error.get_or_insert(error);
        }
    }
}
