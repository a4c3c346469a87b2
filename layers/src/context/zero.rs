//! Write-zeroes and discard. Whole clusters become zero in the map, and their space is given back if the guest allows;
//! parts of clusters are written as zeroes.
//!
//! A discarded range reads as zeroes afterwards, so that no older layer's data ever shows through. Giving space back before
//! the map says so is safe at any crash: the sectors then hold zeroes, the value of the request under way.

use std::sync::Arc;

use crate::canary::{self, Canary};
use crate::file::{IoOp, Segment};
use crate::flush::ZeroedRange;
use crate::layer::LayerMap;
use crate::resolve::{Source, resolve};
use crate::segments::Slicer;
use crate::units::{
    CLUSTER_BYTES, CLUSTER_SECTORS, Cluster, LayerSlot, Sector, SectorMask, SectorRange,
};
use crate::volume::RequestError;

use super::QueueContext;
use super::request::Step;

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
            self.zero_clusters(request, Cluster(first), last - first, unmap);
        } else {
            self.zero_part(request, range.start.0, range.end().0);
        }
        self.part_done(request, Ok(()));
    }

    /// Writes zeroes to the sectors `from .. to`, fewer than two clusters, unless they read as zeroes already.
    fn zero_part(&mut self, request: usize, from: u64, to: u64) {
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

    /// Makes whole clusters zero.
    fn zero_clusters(&mut self, request: usize, first: Cluster, count: u64, unmap: bool) {
        if unmap
            && self.active_holds_data(first, count)
            && let Some(file) = self.era_file(request)
        {
            let (offset, len) = (first.0 * CLUSTER_BYTES, count * CLUSTER_BYTES);
            self.push(
                Step::Punch {
                    request,
                    first,
                    count,
                },
                IoOp::Punch { file, offset, len },
            );
        } else if let Err(error) = self.publish_zero(request, first, count) {
            self.note_error(request, error);
        }
    }

    /// Makes whole clusters zero in the map, but for those that no layer says anything about or that a sealed layer says are
    /// zero. The masks of unsealed layers are not believed here: see `resolve`.
    pub(super) fn publish_zero(
        &mut self,
        request: usize,
        first: Cluster,
        count: u64,
    ) -> Result<(), RequestError> {
        let era = self.requests.get(request).and_then(|request| request.era);
        let active = era
            .and_then(|era| self.eras.active_of(era))
            .ok_or(RequestError::Failed)?;
        let LayerMap::Active(map) = &*active.map else {
            debug_assert!(false, "a change reached a sealed layer");
            self.volume
                .fail("a change reached a sealed layer: this is a defect of stratablk");
            return Err(RequestError::Failed);
        };
        let chain = self.eras.chain();
        let table = self.volume.table();
        let mut zeroed = false;
        for run in table.runs(first, count) {
            let word = run.resolve;
            let reads_zero = word.slot == LayerSlot::NONE
                || (chain.was_sealed(word.slot) && word.mask == SectorMask::NONE);
            if reads_zero {
                continue;
            }
            zeroed = true;
            // Nothing reads from a frame what the map does not say is there. Frames are trimmed once this is recorded: see
            // `flush::trim_zeroed`.
            let changed = map.zero_and(run.first, run.count, |first, count| {
                if canary::is_set(Canary::TrimBeforeRecord) {
                    self.cache
                        .trim(active.number, first, count, |cluster| map.get(cluster).data);
                }
            });
            table.refresh(active.slot, map, run.first, run.count, changed);
        }
        let layer = Arc::clone(&active.layer);
        if zeroed && let Some(request) = self.requests.get_mut(request) {
            request.zeroed = Some(ZeroedRange {
                layer,
                first,
                count,
            });
        }
        Ok(())
    }

    /// Whether the active layer's file holds data of any of these clusters. Its own map is asked: the masks in the resolve
    /// table may be late.
    fn active_holds_data(&self, first: Cluster, count: u64) -> bool {
        let layer = self.eras.chain().active();
        layer.is_some_and(|layer| match &**layer.map() {
            LayerMap::Active(map) => map
                .runs(first, count)
                .any(|(_, _, state)| state.data.0 != 0),
            LayerMap::Sealed(_) => false,
        })
    }

    /// Remembers the first failure of a request.
    pub(super) fn note_error(&mut self, request: usize, error: RequestError) {
        if let Some(request) = self.requests.get_mut(request) {
            request.error.get_or_insert(error);
        }
    }
}
