//! A lock-free table of one small word a cluster, in three levels, whose memory follows fragmentation.
//!
//! ```text
//! root   one entry a span   (1 GiB)   uniform word, or -> node
//! node   one entry a region (2 MiB)   uniform word, or -> leaf
//! leaf   one word a cluster (4 KiB)
//! ```
//!
//! A uniform entry says "every cluster below has this word". It becomes a pointer when a part of what is below is to
//! differ: the new level is filled with the word it replaces and published by one compare-and-swap; who loses that race
//! frees its own and goes on with the winner's.
//!
//! INVARIANT: an entry changes from uniform to a pointer at most once and never back, and what a pointer leads to lives
//! until the whole table is dropped. So a reader needs no guard, and a cluster has exactly one place that can change:
//! the uniform entry above it, or its word in the leaf.
//!
//! Words beyond the last cluster (in the last region and span) are what all words were at first: an entry changes as a whole
//! only if all that is below it belongs to the disk. So a disk may grow at any time (`grow`).

#![expect(
    unsafe_code,
    reason = "entries are tagged pointers to levels that are published by compare-and-swap"
)]

use std::fmt;
use std::marker::PhantomData;
use std::ptr;

use crate::map::fault::{Fault, planted};
use crate::map::grown::Grown;
use crate::sync::{AtomicPtr, AtomicU16, AtomicU32, Ordering, Size, exclusive};

/// Words of a leaf: the clusters of a region. Tiny in a model, where every word costs states.
pub(crate) const LEAF_WORDS: usize = if cfg!(loom) { 2 } else { 512 };
/// Entries of a node: the regions of a span.
pub(crate) const NODE_ENTRIES: usize = if cfg!(loom) { 2 } else { 512 };
/// Clusters of a region.
pub(crate) const REGION_CLUSTERS: u64 = LEAF_WORDS as u64;
/// Clusters of a span.
pub(crate) const SPAN_CLUSTERS: u64 = REGION_CLUSTERS * NODE_ENTRIES as u64;

// A uniform word of 32 bits and its tag must fit in a pointer.
const _: () = assert!(size_of::<usize>() == 8);

/// What a table holds for a cluster.
pub(crate) trait Word: Copy + Eq + Default + fmt::Debug + 'static {
    /// The atomic that holds one.
    type Atomic: Send + Sync;
    /// An atomic with this word.
    fn atomic(self) -> Self::Atomic;
    /// Reads it.
    fn load(cell: &Self::Atomic, order: Ordering) -> Self;
    /// Replaces `current` by `new`, or says what it found.
    fn compare_exchange(
        cell: &Self::Atomic,
        current: Self,
        new: Self,
        success: Ordering,
        failure: Ordering,
    ) -> Result<Self, Self>;
    /// Its bits, in an entry.
    fn to_bits(self) -> u32;
    /// The word with these bits, which came from `to_bits`.
    fn from_bits(bits: u32) -> Self;
}

/// Implements `Word` by an integer and its atomic.
macro_rules! word {
    ($word:ty, $atomic:ty) => {
        impl Word for $word {
            type Atomic = $atomic;
            fn atomic(self) -> $atomic {
                <$atomic>::new(self)
            }
            fn load(cell: &$atomic, order: Ordering) -> Self {
                cell.load(order)
            }
            fn compare_exchange(
                cell: &$atomic,
                current: Self,
                new: Self,
                success: Ordering,
                failure: Ordering,
            ) -> Result<Self, Self> {
                cell.compare_exchange(current, new, success, failure)
            }
            fn to_bits(self) -> u32 {
                self.into()
            }
            fn from_bits(bits: u32) -> Self {
                Self::try_from(bits).unwrap_or_default()
            }
        }
    };
}
word!(u16, AtomicU16);
word!(u32, AtomicU32);

/// A run of clusters and what they have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run<K> {
    /// The first cluster.
    pub(crate) first: u64,
    /// How many; never 0.
    pub(crate) count: u64,
    /// What they have in common.
    pub(crate) value: K,
}

/// What an update did to a run of clusters.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Updated<W> {
    /// The first cluster.
    pub(crate) first: u64,
    /// How many; never 0.
    pub(crate) count: u64,
    /// The word before.
    pub(crate) old: W,
    /// The word that the update left behind, which is `old` where nothing changed.
    pub(crate) new: W,
}

/// The part of a request that lies below one entry.
#[derive(Clone, Copy)]
struct Window {
    /// The first cluster meant.
    at: u64,
    /// The first cluster no longer meant.
    stop: u64,
}

impl Window {
    /// The part of this window that lies in the `count` clusters from `start`.
    fn within(self, start: u64, count: u64) -> Self {
        Self {
            at: self.at.max(start),
            stop: self.stop.min(start + count),
        }
    }

    /// Whether all of the `count` clusters from `start` are meant.
    fn covers(self, start: u64, count: u64) -> bool {
        self.at == start && self.stop == start + count
    }
}

/// A level of the table below the root: a leaf or a node. `start` is always the first cluster below.
trait Level<W: Word>: Sized {
    /// Clusters below one of these.
    const CLUSTERS: u64;
    /// A new one, all of whose clusters have this word.
    fn filled(word: W) -> Box<Self>;
    /// The word of a cluster.
    fn get(&self, cluster: u64) -> W;
    /// The word at `at`, and the first cluster from there that may have another, at most `stop`.
    fn piece(&self, start: u64, at: u64, stop: u64) -> (W, u64);
    /// See [`Radix::update`].
    fn update(
        &self,
        start: u64,
        window: Window,
        step: &mut impl FnMut(W) -> Option<W>,
        left: &mut impl FnMut(Updated<W>),
    );
    /// Bytes of this and everything below.
    fn memory_bytes(&self) -> u64;
}

/// Where a cluster lies in an array of parts of `part` clusters each.
fn index(cluster: u64, part: u64, entries: usize) -> usize {
    // The remainder is less than `entries`, which is a usize.
    usize::try_from(cluster / part % entries as u64).unwrap_or(0)
}

/// One word a cluster of a region.
struct Leaf<W: Word> {
    /// The words.
    words: [W::Atomic; LEAF_WORDS],
}

impl<W: Word> Level<W> for Leaf<W> {
    const CLUSTERS: u64 = REGION_CLUSTERS;

    fn filled(word: W) -> Box<Self> {
        Box::new(Self {
            words: std::array::from_fn(|_| word.atomic()),
        })
    }

    #[inline]
    fn get(&self, cluster: u64) -> W {
        // ORDERING: Acquire; pairs with the Release of the compare-and-swap in `update`. Who sees a word sees what its
        // writer did before, such as the map that a table's word was made from.
        W::load(
            &self.words[index(cluster, 1, LEAF_WORDS)],
            Ordering::Acquire,
        )
    }

    fn piece(&self, start: u64, at: u64, stop: u64) -> (W, u64) {
        let word = self.get(at);
        let stop = stop.min(start + Self::CLUSTERS);
        let mut end = at + 1;
        while end < stop && self.get(end) == word {
            end += 1;
        }
        (word, end)
    }

    fn update(
        &self,
        start: u64,
        window: Window,
        step: &mut impl FnMut(W) -> Option<W>,
        left: &mut impl FnMut(Updated<W>),
    ) {
        let window = window.within(start, Self::CLUSTERS);
        for cluster in window.at..window.stop {
            let cell = &self.words[index(cluster, 1, LEAF_WORDS)];
            let mut old = self.get(cluster);
            let new = loop {
                let Some(new) = step(old) else { break old };
                // ORDERING: AcqRel; Release publishes what led to this word to who loads it; Acquire makes this thread
                // see what the writers of earlier words saw, on which the second look of a table's refresh rests.
                match W::compare_exchange(cell, old, new, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => break new,
                    Err(now) => old = now,
                }
            };
            left(Updated {
                first: cluster,
                count: 1,
                old,
                new,
            });
        }
    }

    fn memory_bytes(&self) -> u64 {
        size_of::<Self>() as u64
    }
}

/// One entry a region of a span.
struct Node<W: Word> {
    /// The regions.
    regions: [Entry<W, Leaf<W>>; NODE_ENTRIES],
}

impl<W: Word> Level<W> for Node<W> {
    const CLUSTERS: u64 = SPAN_CLUSTERS;

    fn filled(word: W) -> Box<Self> {
        Box::new(Self {
            regions: std::array::from_fn(|_| Entry::uniform(word)),
        })
    }

    #[inline]
    fn get(&self, cluster: u64) -> W {
        self.regions[index(cluster, REGION_CLUSTERS, NODE_ENTRIES)].get(cluster)
    }

    fn piece(&self, start: u64, at: u64, stop: u64) -> (W, u64) {
        let region = index(at, REGION_CLUSTERS, NODE_ENTRIES);
        self.regions[region].piece(start + region as u64 * REGION_CLUSTERS, at, stop)
    }

    fn update(
        &self,
        start: u64,
        window: Window,
        step: &mut impl FnMut(W) -> Option<W>,
        left: &mut impl FnMut(Updated<W>),
    ) {
        let window = window.within(start, Self::CLUSTERS);
        let first = index(window.at, REGION_CLUSTERS, NODE_ENTRIES);
        let last = index(window.stop - 1, REGION_CLUSTERS, NODE_ENTRIES);
        for region in first..=last {
            self.regions[region].update(
                start + region as u64 * REGION_CLUSTERS,
                window,
                step,
                left,
            );
        }
    }

    fn memory_bytes(&self) -> u64 {
        size_of::<Self>() as u64 + self.regions.iter().map(Entry::memory_bytes).sum::<u64>()
    }
}

/// Either a word for all clusters below (tagged in bit 0) or a pointer to the level below.
struct Entry<W: Word, C: Level<W>> {
    /// `word << 1 | 1`, or what `Box::into_raw` gave.
    tagged: AtomicPtr<C>,
    /// The words below.
    words: PhantomData<W>,
}

/// What an entry says.
enum Below<'a, W, C> {
    /// All clusters have this word.
    Uniform(W),
    /// Look there.
    Level(&'a C),
}

impl<W: Word, C: Level<W>> Entry<W, C> {
    /// Bit 0 of a pointer must be free for the tag.
    const ALIGNED: () = assert!(align_of::<C>() >= 2);

    /// An entry all of whose clusters have this word.
    fn uniform(word: W) -> Self {
        let () = Self::ALIGNED;
        Self {
            tagged: AtomicPtr::new(Self::tag(word)),
            words: PhantomData,
        }
    }

    /// A word as it lies in an entry.
    fn tag(word: W) -> *mut C {
        ptr::without_provenance_mut((word.to_bits() as usize) << 1 | 1)
    }

    /// The word of a tagged entry, or `None` if it is a pointer.
    fn untag(tagged: *mut C) -> Option<W> {
        let bits = tagged.addr();
        (bits & 1 == 1).then(|| W::from_bits(u32::try_from(bits >> 1).unwrap_or(0)))
    }

    /// What a value that was loaded from this entry says.
    #[inline]
    fn decode(&self, tagged: *mut C) -> Below<'_, W, C> {
        match Self::untag(tagged) {
            Some(word) => Below::Uniform(word),
            // SAFETY:
            // - an entry without the tag came from `Box::into_raw` in `update`, so that it is aligned and initialised;
            // - it was loaded with Acquire (or stored by this thread), so that its initialisation happened before;
            // - it is freed only by `drop`, which has the entry for itself, and the reference borrows the entry;
            // - only shared references to it are ever made before that.
            None => Below::Level(unsafe { &*tagged }),
        }
    }

    /// What the entry says now.
    #[inline]
    fn load(&self) -> Below<'_, W, C> {
        // ORDERING: Acquire; pairs with the Release of the compare-and-swaps in `update`, so that nobody sees the pointer
        // to a level before its words.
        self.decode(self.tagged.load(Ordering::Acquire))
    }

    /// See [`Level::get`].
    #[inline]
    fn get(&self, cluster: u64) -> W {
        match self.load() {
            Below::Uniform(word) => word,
            Below::Level(level) => level.get(cluster),
        }
    }

    /// See [`Level::piece`].
    fn piece(&self, start: u64, at: u64, stop: u64) -> (W, u64) {
        match self.load() {
            Below::Uniform(word) => (word, stop.min(start + C::CLUSTERS)),
            Below::Level(level) => level.piece(start, at, stop),
        }
    }

    /// See [`Radix::update`].
    fn update(
        &self,
        start: u64,
        window: Window,
        step: &mut impl FnMut(W) -> Option<W>,
        left: &mut impl FnMut(Updated<W>),
    ) {
        let window = window.within(start, C::CLUSTERS);
        // ORDERING: Acquire; as in `load`.
        let mut seen = self.tagged.load(Ordering::Acquire);
        loop {
            let old = match self.decode(seen) {
                Below::Level(level) => return level.update(start, window, step, left),
                Below::Uniform(old) => old,
            };
            let wanted = step(old);
            let new = wanted.unwrap_or(old);
            // A step that wants the very same word wants to take part in the modification order; the entry serves for
            // that, whatever part of it is meant.
            if new != old && !window.covers(start, C::CLUSTERS) {
                seen = self.expand(seen, old);
                continue;
            }
            if wanted.is_some() {
                // ORDERING: AcqRel; as in `Leaf::update`.
                if let Err(now) = self.tagged.compare_exchange(
                    seen,
                    Self::tag(new),
                    Ordering::AcqRel,
                    Ordering::Acquire,
                ) {
                    // It may have become a pointer meanwhile; look again.
                    seen = now;
                    continue;
                }
            }
            return left(Updated {
                first: window.at,
                count: window.stop - window.at,
                old,
                new,
            });
        }
    }

    /// Puts a level filled with `word` in the place of the uniform entry `seen`. Returns what the entry holds then, which
    /// is another thread's if that one was faster.
    #[cold]
    fn expand(&self, seen: *mut C, word: W) -> *mut C {
        let word = if planted(Fault::EmptyLeaf) {
            W::default()
        } else {
            word
        };
        let fresh = Box::into_raw(C::filled(word));
        // ORDERING: AcqRel; Release publishes the words of the new level, pairs with the Acquire in `load`. Acquire
        // makes the winner's level visible to the loser, and earlier uniform words' writers to the winner.
        match self
            .tagged
            .compare_exchange(seen, fresh, Ordering::AcqRel, Ordering::Acquire)
        {
            Ok(_) => fresh,
            Err(now) => {
                // SAFETY:
                // - `fresh` came from `Box::into_raw` above;
                // - it was not published, so that nobody else has it.
                drop(unsafe { Box::from_raw(fresh) });
                now
            }
        }
    }

    /// Bytes of everything below.
    fn memory_bytes(&self) -> u64 {
        match self.load() {
            Below::Uniform(_) => 0,
            Below::Level(level) => level.memory_bytes(),
        }
    }
}

impl<W: Word, C: Level<W>> Drop for Entry<W, C> {
    fn drop(&mut self) {
        // A model that fails unwinds through here while loom's own state is half gone.
        if cfg!(loom) && std::thread::panicking() {
            return;
        }
        let tagged = exclusive(&mut self.tagged);
        if Self::untag(tagged).is_none() {
            // SAFETY:
            // - an entry without the tag came from `Box::into_raw` in `expand`;
            // - `&mut self` proves that no reference borrowed from this entry is left, and no other entry holds it.
            drop(unsafe { Box::from_raw(tagged) });
        }
    }
}

/// The table. All operations may be called from any thread at any time.
pub(crate) struct Radix<W: Word> {
    /// How many clusters it has.
    clusters: Size,
    /// The word that every cluster had at first.
    first: W,
    /// One entry a span.
    spans: Grown<Entry<W, Node<W>>>,
}

impl<W: Word> fmt::Debug for Radix<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Radix")
            .field("clusters", &self.clusters)
            .finish_non_exhaustive()
    }
}

impl<W: Word> Radix<W> {
    /// A table in which every cluster has this word.
    pub(crate) fn new(clusters: u64, word: W) -> Self {
        Self {
            clusters: Size::new(clusters),
            first: word,
            spans: Grown::new(Self::spans(clusters), || Entry::uniform(word)),
        }
    }

    /// How many spans so many clusters have.
    fn spans(clusters: u64) -> usize {
        usize::try_from(clusters.div_ceil(SPAN_CLUSTERS)).unwrap_or(usize::MAX)
    }

    /// Adds clusters at the end, which have the word that all had at first, while others use the table. Who learns of the new
    /// size from the caller may use all of it.
    pub(crate) fn grow(&self, clusters: u64) {
        self.spans
            .grow(Self::spans(clusters), || Entry::uniform(self.first));
        self.clusters.grow(clusters);
    }

    /// How many clusters it has.
    pub(crate) fn clusters(&self) -> u64 {
        self.clusters.get()
    }

    /// The span of a cluster and where it starts.
    #[inline]
    fn span(&self, cluster: u64) -> Option<(&Entry<W, Node<W>>, u64)> {
        let span = cluster / SPAN_CLUSTERS;
        let entry = self.spans.get(usize::try_from(span).ok()?)?;
        Some((entry, span * SPAN_CLUSTERS))
    }

    /// The word of a cluster; the default word beyond the end. At most three loads.
    #[inline]
    pub(crate) fn get(&self, cluster: u64) -> W {
        debug_assert!(cluster < self.clusters());
        match self.span(cluster) {
            Some((span, _)) => span.get(cluster),
            None => W::default(),
        }
    }

    /// Changes the words of `count` clusters from `first`, each atomically, at the coarsest level that allows it: a
    /// range that covers a whole uniform region or span changes one entry.
    ///
    /// `step` says what a word becomes: `None` to leave it, without any store; `Some` to replace it by a
    /// compare-and-swap, also if it is the same. It is asked again when another thread was faster, so it must depend on
    /// nothing but the word. `left` is told once for every cluster, in order and in runs, what the update left behind.
    pub(crate) fn update(
        &self,
        first: u64,
        count: u64,
        mut step: impl FnMut(W) -> Option<W>,
        mut left: impl FnMut(Updated<W>),
    ) {
        let stop = first.saturating_add(count).min(self.clusters());
        let mut at = first;
        while at < stop {
            let Some((span, start)) = self.span(at) else {
                return;
            };
            let window = Window { at, stop };
            span.update(start, window, &mut step, &mut left);
            at = start + SPAN_CLUSTERS;
        }
    }

    /// The runs of `count` clusters from `first` whose words have the same `key`, each as long as possible. Every word is
    /// read once; words that change meanwhile are seen as they were before or after.
    pub(crate) fn runs<K: Copy + Eq, F: Fn(W) -> K>(
        &self,
        first: u64,
        count: u64,
        key: F,
    ) -> Runs<'_, W, K, F> {
        Runs {
            radix: self,
            at: first,
            stop: first.saturating_add(count).min(self.clusters()),
            pending: None,
            key,
        }
    }

    /// Bytes of memory that the table takes. Visits every node: for metrics, not for the hot path.
    pub(crate) fn memory_bytes(&self) -> u64 {
        let below = self.spans.from(0).map(Entry::memory_bytes).sum::<u64>();
        self.spans.memory_bytes() + below
    }
}

/// See [`Radix::runs`].
pub(crate) struct Runs<'a, W: Word, K, F> {
    /// The table.
    radix: &'a Radix<W>,
    /// The next cluster to read.
    at: u64,
    /// Where to stop.
    stop: u64,
    /// What was read past the end of the last run.
    pending: Option<Run<K>>,
    /// What runs have in common.
    key: F,
}

impl<W: Word, K: Copy + Eq, F: Fn(W) -> K> Runs<'_, W, K, F> {
    /// The next run of one leaf or uniform entry.
    fn piece(&mut self) -> Option<Run<K>> {
        if self.at >= self.stop {
            return None;
        }
        let first = self.at;
        let (span, start) = self.radix.span(first)?;
        let (word, end) = span.piece(start, first, self.stop);
        self.at = end;
        Some(Run {
            first,
            count: end - first,
            value: (self.key)(word),
        })
    }
}

impl<W: Word, K: Copy + Eq, F: Fn(W) -> K> Iterator for Runs<'_, W, K, F> {
    type Item = Run<K>;

    fn next(&mut self) -> Option<Run<K>> {
        let mut run = match self.pending.take() {
            Some(run) => run,
            None => self.piece()?,
        };
        while let Some(next) = self.piece() {
            if next.value != run.value {
                self.pending = Some(next);
                break;
            }
            run.count += next.count;
        }
        Some(run)
    }
}
