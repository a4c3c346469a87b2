//! The sector cache of a store: recently used clusters in frames of 4 KiB, shared by all volumes.
//!
//! `set` has the words of a set, `access` the protocol, `replace` says who goes, `recover` what is left after a crash. `arena`
//! is the memory, `numbers` has the names of the layers, `writeback` the thread that writes dirty frames to their files. Guest
//! data is copied here and nowhere else.
//!
//! No hit takes a lock, makes a system call or allocates. See `CONCURRENCY.md` for the protocol and `ARENA.md` for the bytes.

pub mod access;
pub mod arena;
pub mod copy;
pub mod numbers;
mod recover;
mod replace;
#[cfg(test)]
mod scenarios;
pub mod set;
pub mod staging;
pub mod writeback;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::error::Result;
use crate::file::Segment;
use crate::segments::Slicer;
use crate::sync::{AtomicU64, Ordering};
use crate::units::{Cluster, LayerId, LayerNumber, SectorMask, StoreId};

use self::access::{Claim, Clean, Copied, FrameIndex, Read, Sets, Tally, Ticket, Write};
use self::arena::Arena;
use self::set::{FrameKey, WAYS};
use self::staging::Page;
use self::writeback::Bell;

/// Bytes of a frame.
pub const FRAME_BYTES: u64 = crate::units::CLUSTER_BYTES;
/// Bytes of a sector, as a length in memory.
const SECTOR: usize = 512;
/// The smallest cache: one set.
pub const CACHE_BYTES_MIN: u64 = FRAME_BYTES * WAYS as u64;

const _: () = assert!(SECTOR as u64 == crate::units::SECTOR_BYTES);

/// How the cache of a store is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheOptions {
    /// Bytes of frames; rounded down to whole sets, at least one set.
    pub bytes: u64,
    /// Bytes that may be dirty at once; `None` for half of the cache.
    pub dirty_bytes: Option<u64>,
    /// How long data may be dirty before it is written back.
    pub dirty_age: Duration,
    /// A directory in shared memory for the arena, so that it outlives the process; `None` for memory of this process.
    pub place: Option<PathBuf>,
    /// Keep the arena when the store is closed in order, so that the next start finds it warm.
    pub keep: bool,
    /// Put the arena into huge pages where the host can.
    pub huge_pages: bool,
    /// What becomes of requests that need space while the host has none.
    pub on_full: OnFull,
}

/// What becomes of requests that need space while the host has none. No data that was acknowledged is lost by either.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFull {
    /// They end with an error.
    #[default]
    Report,
    /// They wait until there is room again.
    Hold,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self {
            bytes: 256 << 20,
            dirty_bytes: None,
            dirty_age: Duration::from_secs(5),
            place: None,
            keep: false,
            huge_pages: true,
            on_full: OnFull::default(),
        }
    }
}

impl CacheOptions {
    /// How many sets it has.
    pub fn sets(&self) -> usize {
        usize::try_from(self.bytes / CACHE_BYTES_MIN)
            .unwrap_or(usize::MAX)
            .max(1)
    }
}

/// Figures of a cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Bytes of all frames.
    pub bytes: u64,
    /// Frames that hold something.
    pub frames_used: u64,
    /// Frames that hold what a file lacks.
    pub frames_dirty: u64,
    /// What the data plane did.
    pub tally: Tally,
    /// Clusters written back to files.
    pub write_backs: u64,
}

/// The cache of one store.
#[derive(Debug)]
pub struct Cache {
    /// The memory.
    arena: Arena,
    /// Of the hash.
    seed: u64,
    /// How it was set up.
    options: CacheOptions,
    /// Frames that may be dirty at once.
    dirty_max: u64,
    /// Frames that are dirty, as far as the contexts have told.
    dirty: AtomicU64,
    /// Dirty frames that can be written nowhere now, and keep nobody else from writing.
    pinned: AtomicU64,
    /// Clusters written back.
    write_backs: AtomicU64,
    /// What each context has done.
    counters: Mutex<Counted>,
    /// Wakes the thread that writes back, and those who wait for it.
    bell: Bell,
}

/// The figures of all contexts.
#[derive(Debug, Default)]
struct Counted {
    /// Of contexts that are there.
    live: Vec<Arc<Counters>>,
    /// Of contexts that are gone.
    gone: Tally,
}

/// What one context has done. Written by it alone, read by whoever asks.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Counters {
    /// The fields of [`Tally`], in their order.
    words: [AtomicU64; 8],
}

impl Counters {
    /// Tells what has been done up to now.
    pub fn store(&self, tally: &Tally) {
        for (word, value) in self.words.iter().zip(tally.words()) {
            // ORDERING: Relaxed; figures for people.
            word.store(value, Ordering::Relaxed);
        }
    }

    /// What was told last.
    fn load(&self) -> Tally {
        let mut words = [0; 8];
        for (value, word) in words.iter_mut().zip(&self.words) {
            *value = word.load(Ordering::Relaxed);
        }
        Tally::from_words(words)
    }
}

impl Tally {
    /// The fields, in order.
    const fn words(&self) -> [u64; 8] {
        [
            self.hits,
            self.misses,
            self.fills,
            self.bypasses,
            self.evictions,
            self.retries,
            self.parks,
            self.writes,
        ]
    }

    /// The fields, from their order.
    const fn from_words(words: [u64; 8]) -> Self {
        let [
            hits,
            misses,
            fills,
            bypasses,
            evictions,
            retries,
            parks,
            writes,
        ] = words;
        Self {
            hits,
            misses,
            fills,
            bypasses,
            evictions,
            retries,
            parks,
            writes,
        }
    }

    /// The sum of two.
    fn plus(&self, other: &Self) -> Self {
        let mut words = self.words();
        for (sum, more) in words.iter_mut().zip(other.words()) {
            *sum += more;
        }
        Self::from_words(words)
    }
}

/// Sectors of one cluster: `first .. first + count`, at most 8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The first sector in the cluster.
    pub first: u32,
    /// How many.
    pub count: u32,
}

impl Span {
    /// As a mask.
    pub const fn mask(self) -> SectorMask {
        SectorMask::span(self.first, self.count)
    }

    /// Bytes before it in the cluster.
    pub const fn offset(self) -> usize {
        self.first as usize * SECTOR
    }

    /// Its bytes.
    pub const fn bytes(self) -> usize {
        self.count as usize * SECTOR
    }
}

impl Cache {
    /// A cache over an arena that nobody else uses. `store` seeds the hash: a guest does not know it.
    pub fn new(arena: Arena, store: StoreId, options: CacheOptions) -> Self {
        let (high, low) = store.0.as_u64_pair();
        let frames = (arena.all().len() * WAYS) as u64;
        let dirty_max = options
            .dirty_bytes
            .map_or(frames / 2, |bytes| bytes / FRAME_BYTES)
            .clamp(1, frames);
        Self {
            arena,
            seed: high.rotate_left(32) ^ low,
            options,
            dirty_max,
            dirty: AtomicU64::new(0),
            pinned: AtomicU64::new(0),
            write_backs: AtomicU64::new(0),
            counters: Mutex::new(Counted::default()),
            bell: Bell::default(),
        }
    }

    /// How it was set up.
    pub fn options(&self) -> &CacheOptions {
        &self.options
    }

    /// The memory.
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// Wakes the thread that writes back, and those who wait for it.
    pub fn bell(&self) -> &Bell {
        &self.bell
    }

    /// The protocol over this arena.
    #[inline]
    pub fn sets(&self) -> Sets<'_> {
        Sets::new(self.arena.all(), self.seed)
    }

    /// The number of a layer, given to it now if it has none.
    ///
    /// # Errors
    /// `Limit` if the table is full.
    pub fn number(&self, layer: LayerId) -> Result<LayerNumber> {
        self.arena.numbers().number(layer)
    }

    /// Which layer has a number.
    pub fn layer(&self, number: LayerNumber) -> Option<LayerId> {
        self.arena.numbers().layer(number)
    }

    /// Marks a layer as one whose files may lack what was written to them, or no longer. Outlives the process.
    ///
    /// # Errors
    /// `Io`: it does not outlive the process.
    pub fn set_failed(&self, number: LayerNumber, failed: bool) -> Result<()> {
        self.arena.numbers().set_failed(number, failed)
    }

    /// Marks a layer as one whose file is being written to past the cache, or no longer. Outlives the process.
    ///
    /// # Errors
    /// `Io`: it does not outlive the process.
    pub fn set_past(&self, number: LayerNumber, past: bool) -> Result<()> {
        self.arena.numbers().set_past(number, past)
    }

    /// The layers that are marked so.
    pub fn past(&self) -> Vec<LayerNumber> {
        self.arena.numbers().past()
    }

    /// The layers that are marked as failed.
    pub fn failed(&self) -> Vec<LayerId> {
        self.arena.numbers().failed()
    }

    /// Drops everything of a layer that is being deleted and that nobody uses any more.
    pub fn forget(&self, layer: LayerId) {
        let numbers = self.arena.numbers();
        if let Some(number) = numbers.find(layer) {
            let dirty = self.sets().drop_layer(number);
            self.cleaned(dirty);
            // One that cannot be freed now is no more than a number that is never given again.
            drop(numbers.forget(layer));
        }
    }

    /// Whether so much is dirty that nothing more may become so.
    #[inline]
    pub fn is_full_of_dirty(&self) -> bool {
        self.dirty() >= self.dirty_max
    }

    /// Whether enough is dirty that writing back should begin.
    #[inline]
    pub fn wants_write_back(&self) -> bool {
        self.dirty() >= self.dirty_max.div_ceil(2)
    }

    /// Frames that are dirty and can be written, as far as is known.
    #[inline]
    pub fn dirty(&self) -> u64 {
        // ORDERING: Relaxed; a bound that may be late by what is under way.
        let dirty = self.dirty.load(Ordering::Relaxed);
        // Cleaning may be told of before dirtying is.
        let dirty = if dirty > u64::MAX / 2 { 0 } else { dirty };
        dirty.saturating_sub(self.pinned.load(Ordering::Relaxed))
    }

    /// Whether some dirty frames could be written nowhere, as far as is known.
    pub fn has_pinned(&self) -> bool {
        self.pinned.load(Ordering::Relaxed) > 0
    }

    /// So many dirty frames can be written nowhere now.
    pub fn set_pinned(&self, frames: u64) {
        // ORDERING: Relaxed; as for `dirty`.
        self.pinned.store(frames, Ordering::Relaxed);
    }

    /// So many frames have become dirty.
    pub fn dirtied(&self, frames: u64) {
        self.dirty.fetch_add(frames, Ordering::Relaxed);
    }

    /// So many frames have become clean.
    pub fn cleaned(&self, frames: u64) {
        self.dirty.fetch_sub(frames, Ordering::Relaxed);
    }

    /// Counters for a context.
    pub fn register(&self) -> Arc<Counters> {
        let counters = Arc::new(Counters::default());
        self.counted().live.push(Arc::clone(&counters));
        counters
    }

    /// The context with these counters is gone.
    pub fn unregister(&self, counters: &Arc<Counters>) {
        let mut counted = self.counted();
        counted.gone = counted.gone.plus(&counters.load());
        counted.live.retain(|live| !Arc::ptr_eq(live, counters));
    }

    /// Figures for people. Visits all sets.
    pub fn stats(&self) -> CacheStats {
        let tally = {
            let counted = self.counted();
            let live = counted.live.iter().map(|counters| counters.load());
            live.fold(counted.gone, |sum, one| sum.plus(&one))
        };
        let (frames_used, frames_dirty) = self.sets().count();
        CacheStats {
            bytes: (self.arena.all().len() * WAYS) as u64 * FRAME_BYTES,
            frames_used,
            frames_dirty,
            tally,
            write_backs: self.write_backs.load(Ordering::Relaxed),
        }
    }

    /// The figures, whatever happened to an earlier holder of the lock.
    fn counted(&self) -> MutexGuard<'_, Counted> {
        self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies sectors from the frame of a key to guest memory, which is passed by only on `Hit`.
    ///
    /// # Safety
    /// The segments are valid for writes, and no Rust reference to their bytes is used meanwhile.
    #[inline]
    #[expect(unsafe_code, reason = "writes to guest memory")]
    pub unsafe fn read(
        &self,
        key: FrameKey,
        span: Span,
        guest: &mut Slicer<'_>,
        tally: &mut Tally,
    ) -> Read {
        let start = *guest;
        let mut end = start;
        let read = self.sets().read(key, span.mask(), tally, |index| {
            end = start;
            let frame = self
                .arena
                .frame(index.set, index.way)
                .wrapping_add(span.offset());
            // SAFETY: the caller promises the segments; the span lies inside the frame.
            unsafe { end.put(frame, span.bytes()) };
        });
        if read == Read::Hit {
            tally.hits += 1;
            *guest = end;
        }
        read
    }

    /// Copies sectors from guest memory into the frame of a key; `publish` runs under its lock. The guest's memory is passed
    /// by only on `Done`.
    ///
    /// # Safety
    /// The segments are valid for reads, and no Rust reference to their bytes is used for changes meanwhile.
    #[inline]
    #[expect(unsafe_code, reason = "reads guest memory")]
    pub unsafe fn write(
        &self,
        key: FrameKey,
        span: Span,
        may_dirty: bool,
        guest: &mut Slicer<'_>,
        tally: &mut Tally,
        publish: impl FnMut(bool),
    ) -> Write {
        let mut end = *guest;
        let copy = |index: FrameIndex| {
            let frame = self
                .arena
                .frame(index.set, index.way)
                .wrapping_add(span.offset());
            // SAFETY: the caller promises the segments; the span lies inside the frame, which is locked by this thread.
            unsafe { end.get(frame, span.bytes()) };
        };
        let write = self
            .sets()
            .write(key, span.mask(), may_dirty, tally, copy, publish);
        if let Write::Done { .. } = write {
            tally.writes += 1;
            *guest = end;
        }
        write
    }

    /// Reserves the frame of a key for sectors that are about to be read from the file.
    pub fn claim(&self, key: FrameKey, span: Span, tally: &mut Tally) -> Claim {
        self.sets().claim(key, span.mask(), tally)
    }

    /// Ends a fill with what was read. If it was kept, the page has then what the frame has: what was read may be older than
    /// what the frame had. If not, the page is out of date.
    pub fn insert(&self, ticket: Ticket, span: Span, page: &mut Page) -> bool {
        self.sets().insert(ticket, span.mask(), |index, missing| {
            let frame = self.arena.frame(index.set, index.way);
            for run in runs(missing) {
                #[expect(unsafe_code, reason = "writes to a frame")]
                // SAFETY: the frame is locked by this thread; the run lies inside both; pages and frames are apart.
                unsafe {
                    copy::copy(
                        frame.wrapping_add(run.offset()),
                        page.0.as_ptr().wrapping_add(run.offset()),
                        run.bytes(),
                    );
                }
            }
            for run in runs(SectorMask(span.mask().0 & !missing.0)) {
                #[expect(unsafe_code, reason = "reads a frame")]
                // SAFETY: as above.
                unsafe {
                    copy::copy(
                        page.0.as_mut_ptr().wrapping_add(run.offset()),
                        frame.wrapping_add(run.offset()),
                        run.bytes(),
                    );
                }
            }
        })
    }

    /// Ends a fill that brought nothing.
    pub fn abandon(&self, ticket: Ticket) {
        self.sets().abandon(ticket);
    }

    /// Copies the dirty sectors of a cluster to their places in a page.
    pub fn copy_dirty(&self, key: FrameKey, page: &mut Page) -> Option<Copied> {
        self.sets().copy_dirty(key, |index, dirty| {
            let frame = self.arena.frame(index.set, index.way);
            for run in runs(dirty) {
                #[expect(unsafe_code, reason = "reads a frame")]
                // SAFETY: the run lies inside both; pages and frames are apart. Others may change the frame meanwhile: then
                // the copy is made again.
                unsafe {
                    copy::copy(
                        page.0.as_mut_ptr().wrapping_add(run.offset()),
                        frame.wrapping_add(run.offset()),
                        run.bytes(),
                    );
                }
            }
        })
    }

    /// Copies what a frame has of a cluster to its place in a page. Returns which sectors those are.
    pub fn copy_frame(&self, key: FrameKey, page: &mut Page) -> SectorMask {
        let valid = self.sets().valid(key);
        let mut tally = Tally::default();
        let mut copied = SectorMask::NONE;
        for run in runs(valid) {
            let segments = [Segment {
                base: page.0.as_mut_ptr().wrapping_add(run.offset()),
                len: run.bytes(),
            }];
            #[expect(unsafe_code, reason = "reads a frame into a page")]
            // SAFETY: the segment lies inside the page, which is borrowed exclusively and not looked at meanwhile.
            let read = unsafe { self.read(key, run, &mut Slicer::new(&segments), &mut tally) };
            if read == Read::Hit {
                copied.0 |= run.mask().0;
            }
        }
        copied
    }

    /// Makes a frame clean whose copy is safe, unless it was changed since.
    pub fn clean(&self, copied: &Copied) -> Clean {
        let clean = self.sets().clean(copied);
        if clean == Clean::Cleaned {
            self.cleaned(1);
            self.write_backs.fetch_add(1, Ordering::Relaxed);
        }
        clean
    }

    /// Takes clusters of a layer out of the cache, but for the sectors that `keep` names under each frame's lock.
    pub fn trim(
        &self,
        layer: LayerNumber,
        first: Cluster,
        count: u64,
        keep: impl Fn(Cluster) -> SectorMask,
    ) {
        let sets = self.sets();
        let mut cleaned = 0;
        for cluster in (first.0..first.0.saturating_add(count)).map(Cluster) {
            let key = FrameKey::new(layer, cluster);
            cleaned += u64::from(sets.trim(key, || keep(cluster)));
        }
        if cleaned > 0 {
            self.cleaned(cleaned);
        }
    }
}

/// The runs of sectors in a mask.
pub fn runs(mask: SectorMask) -> impl Iterator<Item = Span> {
    let mut left = u32::from(mask.0);
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let first = left.trailing_zeros();
        let count = (left >> first).trailing_ones();
        left &= !(((1u32 << count) - 1) << first);
        Some(Span { first, count })
    })
}
