//! A walk over a list of memory segments: guest memory, piece by piece.

use crate::cache::copy::copy;
use crate::file::Segment;

/// A place in a list of segments. What lies before it has been dealt with.
#[derive(Clone, Copy, Debug)]
pub struct Slicer<'a> {
    /// What is left.
    rest: &'a [Segment],
    /// Bytes of the first one that are gone.
    gone: usize,
}

impl<'a> Slicer<'a> {
    /// Starts at the beginning.
    pub fn new(segments: &'a [Segment]) -> Self {
        Self {
            rest: segments,
            gone: 0,
        }
    }

    /// Goes on by `bytes` and hands on each piece that is passed: its address, its length, and how many bytes came before.
    #[inline]
    fn pass(&mut self, bytes: usize, mut each: impl FnMut(*mut u8, usize, usize)) {
        let mut done = 0;
        while done < bytes {
            let Some((first, rest)) = self.rest.split_first() else {
                return;
            };
            let left = first.len.saturating_sub(self.gone);
            let len = left.min(bytes - done);
            if len > 0 {
                each(first.base.wrapping_add(self.gone), len, done);
            }
            done += len;
            if len == left {
                self.rest = rest;
                self.gone = 0;
            } else {
                self.gone += len;
            }
        }
    }

    /// Goes on by `bytes`.
    pub fn skip(&mut self, bytes: usize) {
        self.pass(bytes, |_, _, _| {});
    }

    /// Replaces `pieces` by the next `bytes` bytes (fewer at the end of the list).
    pub fn take(&mut self, bytes: u64, pieces: &mut Vec<Segment>) {
        pieces.clear();
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        self.pass(bytes, |base, len, _| pieces.push(Segment { base, len }));
    }

    /// Copies `bytes` bytes from `from` into the segments.
    ///
    /// # Safety
    /// As for `copy`, for every segment.
    #[inline]
    #[expect(unsafe_code, reason = "writes to guest memory")]
    pub unsafe fn put(&mut self, from: *const u8, bytes: usize) {
        self.pass(bytes, |base, len, done| {
            // SAFETY: the caller promises the segments valid and `from` valid for `bytes` bytes; `done + len <= bytes`.
            unsafe { copy(base, from.wrapping_add(done), len) };
        });
    }

    /// Copies `bytes` bytes from the segments to `to`.
    ///
    /// # Safety
    /// As for `copy`, for every segment.
    #[inline]
    #[expect(unsafe_code, reason = "reads guest memory")]
    pub unsafe fn get(&mut self, to: *mut u8, bytes: usize) {
        self.pass(bytes, |base, len, done| {
            // SAFETY: the caller promises the segments valid and `to` valid for `bytes` bytes; `done + len <= bytes`.
            unsafe { copy(to.wrapping_add(done), base, len) };
        });
    }

    /// Fills the next `bytes` bytes with zeroes.
    ///
    /// # Safety
    /// The segments are valid for writes, and no Rust reference to their bytes is used meanwhile.
    #[expect(unsafe_code, reason = "writes to guest memory")]
    pub unsafe fn zero(&mut self, bytes: usize) {
        self.pass(bytes, |base, len, _| {
            // SAFETY: the caller promises it.
            unsafe { std::ptr::write_bytes(base, 0, len) };
        });
    }
}
