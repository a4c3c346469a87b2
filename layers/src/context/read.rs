//! Reads: zeroes are filled in, frames are copied, the rest comes from layer files.
//!
//! A hit is over before `submit` returns and leaves nothing behind. Everything else becomes a request under way.

use std::sync::Arc;

use crate::cache::Span;
use crate::cache::access::{Claim, Read};
use crate::cache::set::FrameKey;
use crate::chain::Chain;
use crate::file::{FileToken, IoOp, Segment};
use crate::layer::LayerMap;
use crate::resolve::{Source, resolve, resolve_by_maps};
use crate::segments::Slicer;
use crate::units::{
    CLUSTER_SECTORS, Cluster, LayerSlot, SECTOR_BYTES, Sector, SectorMask, SectorRange,
};
use crate::volume::RequestError;

use super::QueueContext;
use super::request::{Fill, Parked, Step};

/// A read of so many sectors takes what is not in the cache straight from the files, and leaves the cache alone.
const STREAM_SECTORS: u64 = 256;
/// How often a part of a read is looked at anew because its cluster changes under it, before it is put aside.
const LOOKS: u32 = 4;

/// The part of a range that lies in the cluster of its first sector.
pub fn span(from: Sector, end: Sector) -> Span {
    let first = from.index_in_cluster();
    let left = end.0.saturating_sub(from.0);
    let room = CLUSTER_SECTORS - u64::from(first);
    Span {
        first,
        count: u32::try_from(left.min(room)).unwrap_or(0),
    }
}

/// The first sectors of a span of which a frame holds all or none.
fn alike(span: Span, valid: SectorMask) -> Span {
    let held = |sector: u32| valid.contains(SectorMask::span(sector, 1));
    let end = span.first + span.count;
    let change = (span.first..end).find(|sector| held(*sector) != held(span.first));
    Span {
        first: span.first,
        count: change.unwrap_or(end) - span.first,
    }
}

/// A read that is being carried out.
#[derive(Clone, Copy)]
struct Reading {
    /// The request.
    request: usize,
    /// Whether it leaves the cache alone.
    stream: bool,
    /// How often it may look again.
    looks: u32,
}

impl QueueContext {
    /// Reads as much as lies in frames or is zero, from the start of the range. Returns the first sector that is left.
    ///
    /// # Safety
    /// As for `QueueContext::submit`.
    #[inline]
    #[expect(unsafe_code, reason = "writes to guest memory")]
    pub(super) unsafe fn read_hot(&mut self, range: SectorRange, guest: &mut Slicer<'_>) -> Sector {
        let table = self.volume.table();
        let chain = self.eras.chain();
        let end = range.end();
        let mut at = range.start;
        while at < end {
            let cluster = at.cluster();
            let span = span(at, end);
            let wanted = span.mask();
            let word = table.get(cluster);
            let number = if word.slot == LayerSlot::NONE {
                None
            } else if chain.was_sealed(word.slot) {
                if word.mask == SectorMask::NONE {
                    None
                } else if word.mask.contains(wanted) {
                    // None: the layer has left the chain; the maps know where its data is.
                    let Some(number) = chain.number(word.slot) else {
                        return at;
                    };
                    Some(number)
                } else {
                    return at;
                }
            } else {
                let Some(active) = self.eras.active().filter(|active| active.slot == word.slot)
                else {
                    return at;
                };
                let LayerMap::Active(map) = &*active.map else {
                    return at;
                };
                let state = map.get(cluster);
                if state.data.contains(wanted) {
                    Some(active.number)
                } else if state.data == SectorMask::NONE && state.rest_zero {
                    None
                } else {
                    return at;
                }
            };
            match number {
                // SAFETY: the caller promises the segments.
                None => unsafe { guest.zero(span.bytes()) },
                Some(number) => {
                    let key = FrameKey::new(number, cluster);
                    // SAFETY: as above.
                    let read = unsafe { self.cache.read(key, span, guest, &mut self.tally) };
                    if read != Read::Hit {
                        return at;
                    }
                }
            }
            at = Sector(at.0 + u64::from(span.count));
        }
        end
    }

    /// Reads a range on behalf of a request under way, whatever it takes.
    pub(super) fn read_range(&mut self, request: usize, range: SectorRange, guest: Slicer<'_>) {
        let reading = Reading {
            request,
            stream: range.count >= STREAM_SECTORS,
            looks: LOOKS,
        };
        self.read_again(reading, range, guest);
    }

    /// The same, with the number of looks that are left.
    fn read_again(&mut self, reading: Reading, range: SectorRange, mut guest: Slicer<'_>) {
        let mut chain = Arc::clone(self.eras.chain());
        let mut parts = std::mem::take(&mut self.parts);
        while resolve(self.volume.table(), &chain, range, &mut parts).is_err() {
            // A worker ahead of this one published a newer layer; the newest chain knows it, and reads may use it.
            let newest = self.volume.newest_chain();
            if Arc::ptr_eq(&newest, &chain) {
                // A word names a layer that has left the chain, which is a defect: words are replaced before a chain without
                // the layer is published, and this chain was taken before the word was looked at, so a removal under way is
                // no excuse. The maps are right, whatever a word says.
                debug_assert!(false, "a word names a layer that is gone");
                resolve_by_maps(&chain, range, &mut parts);
                break;
            }
            chain = newest;
        }
        self.keep_alive(reading.request, &chain);
        for part in &parts {
            match part.source {
                Source::Zero => {
                    let bytes = usize::try_from(part.range.count * SECTOR_BYTES).unwrap_or(0);
                    #[expect(unsafe_code, reason = "writes to guest memory")]
                    // SAFETY: `submit` was promised that the segments are valid until the request ends.
                    unsafe {
                        guest.zero(bytes);
                    }
                }
                Source::Layer(slot) => {
                    self.read_part(reading, &chain, slot, part.range, &mut guest);
                }
            }
        }
        parts.clear();
        // A read inside this one may have left a list of its own.
        self.parts = parts;
    }

    /// A part was found in a layer that is in no chain. Whatever the guest's memory holds now is not what it asked for.
    #[cold]
    fn lost_layer(&mut self, request: usize) {
        debug_assert!(false, "a part lies in a layer that is gone");
        self.volume
            .fail("a part of a read lies in a layer that is gone: this is a defect of stratablk");
        self.note_error(request, RequestError::Io);
    }

    /// Reads sectors of one layer.
    fn read_part(
        &mut self,
        reading: Reading,
        chain: &Arc<Chain>,
        slot: LayerSlot,
        range: SectorRange,
        guest: &mut Slicer<'_>,
    ) {
        let (Some(number), Some(file)) = (chain.number(slot), chain.file(slot)) else {
            return self.lost_layer(reading.request);
        };
        let end = range.end();
        let mut at = range.start;
        // The start of a run of sectors to be read past the cache, and the guest's memory for it.
        let mut past: Option<(Sector, Slicer<'_>)> = None;
        while at < end {
            let mut span = span(at, end);
            let key = FrameKey::new(number, at.cluster());
            let before = *guest;
            #[expect(unsafe_code, reason = "writes to guest memory")]
            // SAFETY: `submit` was promised that the segments are valid until the request ends.
            let mut read = unsafe { self.cache.read(key, span, guest, &mut self.tally) };
            if read == Read::Miss && !chain.was_sealed(slot) {
                // Some of them may be in a dirty frame, and older in the file.
                let valid = self.cache.sets().valid(key);
                let alike = alike(span, valid);
                if alike.count < span.count {
                    span = alike;
                    #[expect(unsafe_code, reason = "writes to guest memory")]
                    // SAFETY: as above.
                    let again = unsafe { self.cache.read(key, span, guest, &mut self.tally) };
                    read = again;
                }
            }
            if read == Read::Miss
                && let Some(layer) = chain.layer(slot)
                && layer.is_bad(key.cluster(), span.mask())
            {
                self.refuse_bad(reading.request);
                guest.skip(span.bytes());
                self.read_past(reading.request, file, past.take(), at);
                at = Sector(at.0 + u64::from(span.count));
                continue;
            }
            let miss = match read {
                Read::Hit => false,
                Read::Busy => {
                    self.park_read(reading.request, at, span, before);
                    guest.skip(span.bytes());
                    false
                }
                Read::Miss => {
                    self.tally.misses += 1;
                    let filled =
                        !reading.stream && self.fill(reading, chain, slot, key, (at, span), before);
                    guest.skip(span.bytes());
                    !filled
                }
            };
            if miss {
                if chain.was_sealed(slot) || self.still_in_file(chain, slot, key, span) {
                    past.get_or_insert((at, before));
                } else {
                    self.look_again(reading, at, span, before);
                    self.read_past(reading.request, file, past.take(), at);
                }
            } else {
                self.read_past(reading.request, file, past.take(), at);
            }
            at = Sector(at.0 + u64::from(span.count));
        }
        self.read_past(reading.request, file, past.take(), end);
    }

    /// A part of a read is known to be damaged on the medium: the guest gets an error and not what is there.
    #[cold]
    fn refuse_bad(&mut self, request: usize) {
        self.note_error(request, RequestError::Io);
    }

    /// Whether a layer that takes writes still holds sectors none of which was found in the cache. If it does, its file has
    /// them: only a write-zeroes takes them from there, and only a write brings them back, in a frame. (A merge brings them
    /// too, to the file first.)
    fn still_in_file(
        &self,
        chain: &Arc<Chain>,
        slot: LayerSlot,
        key: FrameKey,
        span: Span,
    ) -> bool {
        let layer = chain.layer(slot);
        let held = layer.is_some_and(|layer| layer.cluster(key.cluster()).0.contains(span.mask()));
        held && self.cache.sets().lacks(key, span.mask())
    }

    /// Resolves a part anew because its cluster has changed.
    fn look_again(&mut self, reading: Reading, at: Sector, span: Span, guest: Slicer<'_>) {
        if reading.looks == 0 {
            self.park_read(reading.request, at, span, guest);
            return;
        }
        let reading = Reading {
            looks: reading.looks - 1,
            ..reading
        };
        let count = u64::from(span.count);
        self.read_again(reading, SectorRange { start: at, count }, guest);
    }

    /// Reads the sectors from the start of a run to `end` past the cache, straight into the guest's memory.
    fn read_past(
        &mut self,
        request: usize,
        file: FileToken,
        run: Option<(Sector, Slicer<'_>)>,
        end: Sector,
    ) {
        let Some((start, mut guest)) = run else {
            return;
        };
        let bytes = (end.0 - start.0) * SECTOR_BYTES;
        let clusters = (end.0 - 1) / CLUSTER_SECTORS - start.cluster().0 + 1;
        self.tally.bypasses += clusters;
        let mut pieces = std::mem::take(&mut self.pieces);
        guest.take(bytes, &mut pieces);
        let op = IoOp::Read {
            file,
            offset: start.0 * SECTOR_BYTES,
            segments: &pieces,
        };
        self.push(Step::Read { request }, op);
        self.pieces = pieces;
    }

    /// Begins to read a cluster into a frame. Returns `false` if it has to be read past the cache.
    fn fill(
        &mut self,
        reading: Reading,
        chain: &Arc<Chain>,
        slot: LayerSlot,
        key: FrameKey,
        (at, wanted): (Sector, Span),
        mut guest: Slicer<'_>,
    ) -> bool {
        let Some(file) = chain.file(slot) else {
            return false;
        };
        let read = if self.holds_all(chain, slot, key.cluster()) {
            Span {
                first: 0,
                count: u32::try_from(CLUSTER_SECTORS).unwrap_or(8),
            }
        } else {
            wanted
        };
        let Some(page) = self.pages.take() else {
            return false;
        };
        let ticket = match self.cache.claim(key, read, &mut self.tally) {
            Claim::Claimed(ticket) => ticket,
            Claim::Resident => {
                self.pages.give(page);
                self.look_again(reading, at, wanted, guest);
                return true;
            }
            Claim::Refused => {
                self.pages.give(page);
                return false;
            }
        };
        // The claim holds the key's only frame. If the layer still holds the sectors now, then nobody has them in another
        // frame, so the file has them; who zeroes or writes them from now on meets the claim.
        let held = chain
            .layer(slot)
            .is_some_and(|layer| layer.cluster(key.cluster()).0.contains(read.mask()));
        let address = self.pages.address(page);
        let (true, Some(address)) = (held, address) else {
            self.cache.abandon(ticket);
            self.pages.give(page);
            self.look_again(reading, at, wanted, guest);
            return true;
        };
        let mut pieces = self.spare.pop().unwrap_or_default();
        guest.take(wanted.bytes() as u64, &mut pieces);
        let request = reading.request;
        let fill = self.fills.insert(Fill {
            ticket,
            page,
            read,
            wanted,
            pieces,
        });
        let segment = Segment {
            base: address.wrapping_add(read.offset()),
            len: read.bytes(),
        };
        let op = IoOp::Read {
            file,
            offset: key.cluster().first_sector().0 * SECTOR_BYTES + read.offset() as u64,
            segments: &[segment],
        };
        self.push(Step::Fill { request, fill }, op);
        true
    }

    /// Whether a layer holds all sectors of a cluster.
    fn holds_all(&self, chain: &Arc<Chain>, slot: LayerSlot, cluster: Cluster) -> bool {
        let word = self.volume.table().get(cluster);
        if word.slot == slot && chain.was_sealed(slot) {
            return word.mask == SectorMask::ALL;
        }
        chain
            .layer(slot)
            .is_some_and(|layer| layer.cluster(cluster).0 == SectorMask::ALL)
    }

    /// A cluster was read for a frame and a guest.
    pub(super) fn fill_done(&mut self, request: usize, fill: usize, result: std::io::Result<()>) {
        let Some(mut fill) = self.fills.remove(fill) else {
            return;
        };
        let result = match (result, self.pages.get_mut(fill.page)) {
            (Ok(()), Some(page)) => {
                let first = fill.ticket.key().cluster().first_sector();
                let kept = self.cache.insert(fill.ticket, fill.read, page);
                if kept {
                    self.tally.fills += 1;
                    let from = page.0.as_ptr().wrapping_add(fill.wanted.offset());
                    #[expect(unsafe_code, reason = "writes to guest memory")]
                    // SAFETY: `submit` was promised that the segments are valid until the request ends; what the guest wants
                    // lies inside the page, which nobody writes to any more.
                    unsafe {
                        Slicer::new(&fill.pieces).put(from, fill.wanted.bytes());
                    }
                } else {
                    let range = SectorRange {
                        start: Sector(first.0 + u64::from(fill.wanted.first)),
                        count: u64::from(fill.wanted.count),
                    };
                    self.read_range(request, range, Slicer::new(&fill.pieces));
                }
                Ok(())
            }
            (Err(error), _) => {
                self.cache.abandon(fill.ticket);
                Err(self.volume.note_read_error(&error))
            }
            (Ok(()), None) => {
                self.cache.abandon(fill.ticket);
                Err(RequestError::Io)
            }
        };
        self.pages.give(fill.page);
        fill.pieces.clear();
        self.spare.push(fill.pieces);
        self.part_done(request, result);
    }

    /// Puts a part of a read aside.
    fn park_read(&mut self, request: usize, at: Sector, span: Span, mut guest: Slicer<'_>) {
        let mut segments = self.spare.pop().unwrap_or_default();
        guest.take(span.bytes() as u64, &mut segments);
        let count = u64::from(span.count);
        self.park(Parked {
            request,
            write: false,
            range: SectorRange { start: at, count },
            segments,
        });
        self.retry_soon();
    }
}
