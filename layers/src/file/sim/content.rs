//! The bytes of a simulated file. A copy shares everything with its original until one of them is changed.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Bytes of a sector: what is written whole or not at all.
pub(super) const SECTOR: usize = 512;
/// Bytes of a chunk, the unit of sharing and of space.
const CHUNK: usize = 4096;
/// Sectors of a chunk.
const CHUNK_SECTORS: u64 = (CHUNK / SECTOR) as u64;

/// See the module's text.
///
/// INVARIANT: outside of a crash image in the making, no byte at or after `len` is other than zero.
#[derive(Clone, Debug, Default)]
pub(super) struct Content {
    /// Chunks by number; one that is absent is zero.
    chunks: Arc<BTreeMap<u64, Arc<[u8; CHUNK]>>>,
    /// Length of the file.
    pub len: u64,
}

/// The place of a sector: its chunk, and its bytes there.
fn place(sector: u64) -> (u64, std::ops::Range<usize>) {
    let start = usize::try_from(sector % CHUNK_SECTORS).unwrap_or(0) * SECTOR;
    (sector / CHUNK_SECTORS, start..start + SECTOR)
}

impl Content {
    /// A file that holds these bytes, with holes where they are zero.
    pub(super) fn of(bytes: &[u8]) -> Self {
        let mut content = Self {
            len: bytes.len() as u64,
            ..Self::default()
        };
        for (sector, bytes) in (0..).zip(bytes.chunks(SECTOR)) {
            if bytes.iter().all(|byte| *byte == 0) {
                continue;
            }
            let mut whole = [0; SECTOR];
            for (to, from) in whole.iter_mut().zip(bytes) {
                *to = *from;
            }
            content.put(sector, &whole);
        }
        content
    }

    /// A sector; zeroes where nothing was written.
    pub(super) fn sector(&self, sector: u64) -> [u8; SECTOR] {
        let (chunk, range) = place(sector);
        let bytes = self.chunks.get(&chunk).and_then(|chunk| chunk.get(range));
        bytes
            .and_then(|bytes| bytes.try_into().ok())
            .unwrap_or([0; SECTOR])
    }

    /// Puts a sector. Does not change the length.
    pub(super) fn put(&mut self, sector: u64, bytes: &[u8]) {
        let (chunk, range) = place(sector);
        let chunks = Arc::make_mut(&mut self.chunks);
        let chunk = chunks.entry(chunk).or_insert_with(|| Arc::new([0; CHUNK]));
        if let Some(place) = Arc::make_mut(chunk).get_mut(range)
            && place.len() == bytes.len()
        {
            place.copy_from_slice(bytes);
        }
    }

    /// Zeroes whole sectors; chunks that are zeroed whole take no space any more.
    pub(super) fn clear(&mut self, first: u64, count: u64) {
        self.clear_some(first, count, || true);
    }

    /// Zeroes those sectors that `chosen` picks. Asks only for sectors in chunks that are there.
    pub(super) fn clear_some(&mut self, first: u64, count: u64, mut chosen: impl FnMut() -> bool) {
        let end = first.saturating_add(count);
        let there = first / CHUNK_SECTORS..end.div_ceil(CHUNK_SECTORS);
        let touched: Vec<u64> = self.chunks.range(there).map(|(chunk, _)| *chunk).collect();
        for chunk in touched {
            let (start, stop) = (chunk * CHUNK_SECTORS, (chunk + 1) * CHUNK_SECTORS);
            let mut cleared = 0;
            for sector in first.max(start)..end.min(stop) {
                if chosen() {
                    self.put(sector, &[0; SECTOR]);
                    cleared += 1;
                }
            }
            if cleared == CHUNK_SECTORS {
                Arc::make_mut(&mut self.chunks).remove(&chunk);
            }
        }
    }

    /// Fills `buf` from byte `offset`.
    pub(super) fn read(&self, mut buf: &mut [u8], offset: u64) {
        let mut sector = offset / SECTOR as u64;
        let mut skip = usize::try_from(offset % SECTOR as u64).unwrap_or(0);
        while !buf.is_empty() {
            let bytes = self.sector(sector);
            let bytes = bytes.get(skip..).unwrap_or_default();
            let count = bytes.len().min(buf.len());
            let (head, tail) = buf.split_at_mut(count);
            for (to, from) in head.iter_mut().zip(bytes) {
                *to = *from;
            }
            buf = tail;
            sector += 1;
            skip = 0;
        }
    }

    /// The whole sectors that a write of `data` at byte `offset` leaves behind: the first one's number, and their bytes.
    pub(super) fn with_written(&self, offset: u64, data: &[u8]) -> (u64, Vec<u8>) {
        let first = offset / SECTOR as u64;
        let skip = usize::try_from(offset % SECTOR as u64).unwrap_or(0);
        let mut bytes = vec![0; (skip + data.len()).next_multiple_of(SECTOR)];
        if skip != 0 || !data.len().is_multiple_of(SECTOR) {
            self.read(&mut bytes, first * SECTOR as u64);
        }
        if let Some(place) = bytes.get_mut(skip..skip + data.len()) {
            place.copy_from_slice(data);
        }
        (first, bytes)
    }

    /// Sets the length; what lies after it is gone.
    pub(super) fn set_len(&mut self, len: u64) {
        self.len = len;
        let sector = len / SECTOR as u64;
        let keep = usize::try_from(len % SECTOR as u64).unwrap_or(0);
        if keep == 0 {
            self.clear(sector, u64::MAX);
            return;
        }
        let mut last = self.sector(sector);
        if last.iter().skip(keep).any(|byte| *byte != 0) {
            last.iter_mut().skip(keep).for_each(|byte| *byte = 0);
            self.put(sector, &last);
        }
        self.clear(sector + 1, u64::MAX);
    }

    /// The runs of bytes in chunks that are there.
    pub(super) fn data_ranges(&self, from: u64, to: u64) -> Vec<Range<u64>> {
        let (to, chunk) = (to.min(self.len), CHUNK as u64);
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for number in self.chunks.keys() {
            let (start, end) = ((number * chunk).max(from), ((number + 1) * chunk).min(to));
            match ranges.last_mut() {
                _ if start >= end => {}
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
        }
        ranges
    }

    /// Bytes that the file takes.
    pub(super) fn allocated(&self) -> u64 {
        self.chunks.len() as u64 * CHUNK as u64
    }
}
