//! Writes: into frames. What finds no frame is put aside until one is free; only if none can become free it goes past them.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::cache::access::Write;
use crate::cache::set::FrameKey;
use crate::cache::staging::Page;
use crate::flush::is_full_disk;
use crate::flush::through::Through;
use crate::layer::LayerMap;
use crate::mailbox::Mail;
use crate::segments::Slicer;
use crate::units::{SECTOR_BYTES, Sector, SectorRange};
use crate::volume::RequestError;

use super::QueueContext;
use super::era::Active;
use super::read::span;
use super::request::Parked;

/// Why a write stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It is done.
    Done,
    /// Somebody changes a frame that it needs.
    Busy,
    /// No frame is free.
    Full,
    /// Its layer takes no writes: a defect, latched by the caller.
    Sealed,
}

impl QueueContext {
    /// Writes as much as finds frames, from the start of the range, into the active layer of the current era or of a request
    /// under way. Returns the first sector that is left.
    ///
    /// # Safety
    /// As for `QueueContext::submit`.
    #[inline]
    #[expect(unsafe_code, reason = "reads guest memory")]
    pub(super) unsafe fn write_hot(
        &mut self,
        request: Option<usize>,
        range: SectorRange,
        guest: &mut Slicer<'_>,
    ) -> (Sector, Stop) {
        let end = range.end();
        let mut at = range.start;
        let mut stop = Stop::Done;
        let era = request
            .and_then(|request| self.requests.get(request))
            .and_then(|request| request.era);
        let active: Option<&Active> = match (request, era) {
            (None, _) => self.eras.active(),
            (Some(_), Some(era)) => self.eras.active_of(era),
            (Some(_), None) => None,
        };
        let Some(active) = active else {
            return (at, Stop::Sealed);
        };
        let LayerMap::Active(map) = &*active.map else {
            return (at, Stop::Sealed);
        };
        let table = self.volume.table();
        while at < end {
            let cluster = at.cluster();
            let span = span(at, end);
            let key = FrameKey::new(active.number, cluster);
            // Map and table are changed under the frame's lock, so that the two never disagree: see `cache::access`.
            let publish = |dirtied: bool| {
                let changed = map.write_cluster(cluster, span.mask(), dirtied);
                table.refresh(active.slot, map, cluster, 1, changed);
            };
            // SAFETY: the caller promises the segments.
            let write = unsafe {
                self.cache
                    .write(key, span, self.may_dirty, guest, &mut self.tally, publish)
            };
            match write {
                Write::Done { dirtied } => self.dirtied += u64::from(dirtied),
                Write::Busy => stop = Stop::Busy,
                Write::Full => stop = Stop::Full,
            }
            if stop != Stop::Done {
                break;
            }
            at = Sector(at.0 + u64::from(span.count));
        }
        (at, stop)
    }

    /// Writes a range on behalf of a request under way; what finds no frame is put aside.
    pub(super) fn write_range(
        &mut self,
        request: usize,
        range: SectorRange,
        mut guest: Slicer<'_>,
    ) {
        #[expect(unsafe_code, reason = "reads guest memory")]
        // SAFETY: `submit` was promised that the segments are valid until the request ends; or they are the page of zeroes.
        let (at, stop) = unsafe { self.write_hot(Some(request), range, &mut guest) };
        self.write_stopped(request, range, at, stop, guest);
    }

    /// Sees to what a write has left.
    pub(super) fn write_stopped(
        &mut self,
        request: usize,
        range: SectorRange,
        at: Sector,
        stop: Stop,
        mut guest: Slicer<'_>,
    ) {
        match stop {
            Stop::Done => return,
            Stop::Busy => self.retry_soon(),
            Stop::Full => {
                self.tally.parks += 1;
                self.cache.bell().want(&self.mailbox);
            }
            Stop::Sealed => {
                debug_assert!(false, "a change reached a sealed layer");
                self.volume
                    .fail("a change reached a sealed layer: this is a defect of stratablk");
                self.note_error(request, RequestError::Failed);
                return;
            }
        }
        let count = range.end().0 - at.0;
        let mut segments = self.spare.pop().unwrap_or_default();
        guest.take(count * SECTOR_BYTES, &mut segments);
        self.park(Parked {
            request,
            write: true,
            range: SectorRange { start: at, count },
            segments,
        });
    }

    /// Puts a part of a request aside.
    pub(super) fn park(&mut self, parked: Parked) {
        if let Some(request) = self.requests.get_mut(parked.request) {
            request.parts += 1;
        }
        self.parked.push(parked);
    }

    /// Tries the parts again that were put aside; `stuck` says that waiting for a frame is of no use.
    pub(super) fn retry(&mut self, stuck: bool) {
        if self.parked.is_empty() {
            return;
        }
        self.may_dirty = !self.cache.is_full_of_dirty();
        self.move_parked_on();
        let mut parked = std::mem::take(&mut self.parked);
        for mut part in parked.drain(..) {
            let guest = Slicer::new(&part.segments);
            if !part.write {
                self.read_range(part.request, part.range, guest);
            } else if self.volume.has_failed() {
                self.note_error(part.request, RequestError::Failed);
            } else if stuck {
                self.write_somehow(part.request, part.range, guest);
            } else {
                self.write_range(part.request, part.range, guest);
            }
            self.part_done(part.request, Ok(()));
            part.segments.clear();
            self.spare.push(part.segments);
        }
        if self.parked.is_empty() {
            self.parked = parked;
        }
    }

    /// Takes requests over to the current generation of which all that is left was put aside: a snapshot need not wait until
    /// there are frames, or space, and a merge neither. What they have written already is in the old layer, the rest will be in
    /// the new one; no such request was acknowledged before the snapshot's instant. Reads look at everything anew.
    fn move_parked_on(&mut self) {
        let mut left: BTreeMap<usize, usize> = BTreeMap::new();
        for part in &self.parked {
            *left.entry(part.request).or_default() += 1;
        }
        let mut tails = Vec::new();
        for (number, parked) in left {
            let Some(request) = self.requests.get_mut(number) else {
                continue;
            };
            let (true, Some(era)) = (request.parts == parked, request.era) else {
                continue;
            };
            let Some(next) = self.eras.move_on(&self.volume, era, request.changes) else {
                continue;
            };
            request.era = Some(next);
            request.chain = None;
            if let Some(mut zero) = request.zero.take() {
                let tail = self.move_zero_on(&mut zero, next);
                tails.extend(tail.map(|tail| (number, tail)));
                if let Some(request) = self.requests.get_mut(number) {
                    request.zero = Some(zero);
                }
            }
        }
        for (request, tail) in tails {
            self.zero_part(request, tail.start.0, tail.end().0);
        }
    }

    /// Ends all parts that were put aside, of requests whose end nobody will see.
    pub(super) fn abandon_parked(&mut self) {
        for part in std::mem::take(&mut self.parked) {
            self.part_done(part.request, Err(RequestError::Failed));
        }
    }

    /// As `write_range`, but what finds no frame is written past the cache if nobody leads a flush.
    fn write_somehow(&mut self, request: usize, range: SectorRange, mut guest: Slicer<'_>) {
        let end = range.end();
        let mut at = range.start;
        loop {
            let left = SectorRange {
                start: at,
                count: end.0 - at.0,
            };
            #[expect(unsafe_code, reason = "reads guest memory")]
            // SAFETY: as in `write_range`.
            let (stopped, stop) = unsafe { self.write_hot(Some(request), left, &mut guest) };
            at = stopped;
            let full_disk = if stop == Stop::Full && self.volume.flushes().try_lead() {
                let cluster = span(at, end);
                let part = SectorRange {
                    start: at,
                    count: u64::from(cluster.count),
                };
                let written = self.write_through(request, part, guest);
                self.volume.flushes().finish_blocking();
                match written {
                    Ok(()) => {
                        guest.skip(cluster.bytes());
                        at = part.end();
                        if at < end {
                            continue;
                        }
                        return;
                    }
                    Err(error) => !self.note_not_through(request, &error),
                }
            } else {
                true
            };
            if full_disk {
                let left = SectorRange {
                    start: at,
                    count: end.0 - at.0,
                };
                self.write_stopped(request, left, at, stop, guest);
            }
            return;
        }
    }

    /// Writes sectors of one cluster past the cache. By who leads.
    fn write_through(
        &mut self,
        request: usize,
        range: SectorRange,
        mut guest: Slicer<'_>,
    ) -> std::io::Result<()> {
        let era = self.requests.get(request).and_then(|request| request.era);
        let active = era
            .and_then(|era| self.eras.active_of(era))
            .ok_or_else(|| std::io::Error::other("a write without a layer"))?;
        let through = Through {
            layer: Arc::clone(&active.layer),
            slot: active.slot,
        };
        let mut page = Page::zeroed();
        let span = span(range.start, range.end());
        #[expect(unsafe_code, reason = "reads guest memory")]
        // SAFETY: as in `write_range`; a span of a cluster fits into a page.
        unsafe {
            guest.get(page.0.as_mut_ptr(), span.bytes());
        }
        let bytes = page.0.get(..span.bytes()).unwrap_or_default();
        through.write(&self.cache, self.volume.table(), range, bytes)
    }

    /// Latches the failure of a write past the cache, unless the disk is full: then the request waits on, or is refused.
    /// Returns whether the request ends.
    fn note_not_through(&mut self, request: usize, error: &std::io::Error) -> bool {
        if !is_full_disk(error) {
            self.volume
                .fail(&format!("a write past the cache failed: {error}"));
            self.note_error(request, RequestError::Failed);
            return true;
        }
        self.volume.note_full(error);
        let ends = !self.may_hold();
        if ends {
            self.note_error(request, RequestError::NoSpace);
        }
        ends
    }

    /// Makes sure that `poll` is called again soon, for the sake of what was put aside.
    pub(super) fn retry_soon(&mut self) {
        if !std::mem::replace(&mut self.retry_asked, true) {
            self.mailbox.send(Mail::Retry { stuck: false });
        }
    }
}
