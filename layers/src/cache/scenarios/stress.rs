//! Real threads on a real arena: writers, each with clusters of its own, readers of all of them, fills, zeroes and
//! write-back, in a cache that is much too small. For about a second, or for `STRATABLK_STRESS_SECONDS`.
//!
//! Bytes are copied by the instruction that ships (`cache::copy`), so this is what says that it does what the models take
//! words for.

use std::sync::atomic::{AtomicBool, AtomicU32 as Figure};
use std::time::{Duration, Instant};

use super::*;

use crate::cache::arena::Arena;
use crate::cache::staging::Page as Bytes;
use crate::cache::{Cache, CacheOptions, Span, runs};
use crate::file::Segment;
use crate::map::{ActiveMap, MapRecord, SectorSet};
use crate::segments::Slicer;
use crate::units::StoreId;

/// Sets of the cache.
const SETS: usize = 3;
/// Clusters: four times what the cache has.
const CLUSTERS: u64 = (SETS * WAYS * 4) as u64;
/// Writers, each of every so-manieth cluster.
const WRITERS: u64 = 3;
/// Readers of everything.
const READERS: u64 = 2;
/// The layer.
const LAYER: LayerNumber = LayerNumber(1);

/// A layer in a cache.
struct Bed {
    /// The frames.
    cache: Cache,
    /// What the layer holds.
    map: ActiveMap,
    /// The version of each sector in the file.
    file: Vec<[Figure; SECTORS]>,
    /// The journal; who has it leads the flushes.
    journal: std::sync::Mutex<SectorSet>,
}

/// A cheap source of numbers.
struct Random(u64);

impl Random {
    /// A number below a limit.
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % limit
    }

    /// Sectors of a cluster.
    fn span(&mut self) -> Span {
        let first = self.below(8);
        Span {
            first: u32::try_from(first).unwrap(),
            count: u32::try_from(1 + self.below(8 - first)).unwrap(),
        }
    }
}

/// The sectors of a span, as places in an array.
fn places(span: Span) -> std::ops::Range<usize> {
    let first = usize::try_from(span.first).unwrap();
    first..first + usize::try_from(span.count).unwrap()
}

/// Puts versions into bytes.
fn put(cluster: Cluster, span: Span, page: &mut Bytes, mut version: impl FnMut(usize) -> u32) {
    for sector in places(span) {
        let word = stamp(FrameKey::new(LAYER, cluster), sector, version(sector));
        for bytes in page.0[sector * 512..(sector + 1) * 512].chunks_exact_mut(8) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }
}

/// Takes versions out of bytes; fails if they are mixed or others'.
fn take(cluster: Cluster, span: Span, page: &Bytes) -> Versions {
    let mut versions = [None; SECTORS];
    for sector in places(span) {
        let bytes = page.0[sector * 512..(sector + 1) * 512].chunks_exact(8);
        let words: Vec<u64> = bytes
            .map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap()))
            .collect();
        versions[sector] = Some(version(FrameKey::new(LAYER, cluster), sector, &words));
    }
    versions
}

/// Bytes of a page, as a guest's memory.
fn guest(page: &mut Bytes, span: Span) -> [Segment; 1] {
    let bytes = &mut page.0[span.offset()..span.offset() + span.bytes()];
    [Segment {
        base: bytes.as_mut_ptr(),
        len: bytes.len(),
    }]
}

impl Bed {
    /// An empty layer.
    fn new() -> Self {
        let options = CacheOptions::default();
        let store = StoreId(uuid::Uuid::from_u128(0x5eed));
        Self {
            cache: Cache::new(Arena::private(SETS).unwrap(), store, options),
            map: ActiveMap::new(CLUSTERS),
            file: (0..CLUSTERS)
                .map(|_| std::array::from_fn(|_| Figure::new(0)))
                .collect(),
            journal: std::sync::Mutex::new(SectorSet::empty()),
        }
    }

    /// A sector of the file.
    fn file(&self, cluster: Cluster, sector: usize) -> &Figure {
        &self.file[usize::try_from(cluster.0).unwrap()][sector]
    }

    /// Writes a version; acknowledged on return.
    fn write(&self, cluster: Cluster, span: Span, version: u32) {
        let key = FrameKey::new(LAYER, cluster);
        let mut page = Bytes::zeroed();
        put(cluster, span, &mut page, |_| version);
        let segments = guest(&mut page, span);
        let publish = |dirtied| {
            let _ = self.map.write_cluster(cluster, span.mask(), dirtied);
        };
        loop {
            let (mut slicer, mut tally) = (Slicer::new(&segments), Tally::default());
            #[expect(unsafe_code, reason = "plays the guest")]
            // SAFETY: the page is there until this returns, and nobody else has it.
            let written = unsafe {
                self.cache
                    .write(key, span, true, &mut slicer, &mut tally, publish)
            };
            match written {
                Write::Done { .. } => return,
                Write::Busy => thread::yield_now(),
                Write::Full => self.flush(64),
            }
        }
    }

    /// Zeroes a cluster; acknowledged on return.
    fn zero(&self, cluster: Cluster) {
        let _ = self.map.zero(cluster, 1);
        {
            let mut journal = self.journal.lock().unwrap();
            match self.map.zero_records(cluster, 1) {
                Some(records) => records.iter().for_each(|record| journal.apply(record)),
                None => self.flush_into(&mut journal, usize::MAX),
            }
        }
        let keep = |cluster| self.map.get(cluster).data;
        self.cache.trim(LAYER, cluster, 1, keep);
    }

    /// Reads from the frame, or by a fill. `None`: elsewhere, or the map has changed; it would look again.
    fn read(&self, cluster: Cluster, span: Span) -> Option<Versions> {
        let key = FrameKey::new(LAYER, cluster);
        let mut page = Bytes::zeroed();
        let mut tally = Tally::default();
        let says = |span: Span| self.map.get(cluster).data.contains(span.mask());
        if !says(span) {
            return None;
        }
        let read = {
            let segments = guest(&mut page, span);
            let mut slicer = Slicer::new(&segments);
            #[expect(unsafe_code, reason = "plays the guest")]
            // SAFETY: as above.
            let read = unsafe { self.cache.read(key, span, &mut slicer, &mut tally) };
            read
        };
        match read {
            Read::Hit => return Some(take(cluster, span, &page)),
            Read::Busy => return None,
            Read::Miss => {}
        }
        let Claim::Claimed(ticket) = self.cache.claim(key, span, &mut tally) else {
            return None;
        };
        if !says(span) {
            self.cache.abandon(ticket);
            return None;
        }
        put(cluster, span, &mut page, |sector| {
            self.file(cluster, sector).load(Ordering::Acquire)
        });
        let kept = self.cache.insert(ticket, span, &mut page);
        kept.then(|| take(cluster, span, &page))
    }

    /// Writes back.
    fn flush(&self, limit: usize) {
        self.flush_into(&mut self.journal.lock().unwrap(), limit);
    }

    /// The same, for who has the journal.
    fn flush_into(&self, journal: &mut SectorSet, limit: usize) {
        let collected = self.map.collect(limit);
        let mut copies = Vec::new();
        for (first, count) in &collected.dirty {
            for cluster in (first.0..first.0 + count).map(Cluster) {
                let mut page = Bytes::zeroed();
                let key = FrameKey::new(LAYER, cluster);
                if let Some(copied) = self.cache.copy_dirty(key, &mut page) {
                    for run in runs(copied.dirty) {
                        let found = take(cluster, run, &page);
                        for sector in places(run) {
                            let version = found[sector].unwrap();
                            self.file(cluster, sector).store(version, Ordering::Release);
                        }
                    }
                    copies.push(copied);
                }
            }
        }
        let records: &[MapRecord] = &collected.records;
        records.iter().for_each(|record| journal.apply(record));
        for copied in copies {
            let cluster = copied.key.cluster();
            if !self.map.is_journaled(cluster) || self.cache.clean(&copied) == Clean::Changed {
                self.map.mark_dirty(cluster);
            }
        }
    }

    /// One writer: what it reads back of its own clusters is exactly what it wrote.
    fn run_writer(&self, writer: u64, stop: &AtomicBool) -> u64 {
        let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ writer);
        let mut own = vec![[None; SECTORS]; usize::try_from(CLUSTERS).unwrap()];
        let mut rounds = 0;
        while !stop.load(Ordering::Relaxed) {
            rounds += 1;
            // Mostly a few that are hot.
            let choices = if random.below(4) == 0 {
                CLUSTERS / WRITERS
            } else {
                3
            };
            let cluster = Cluster(random.below(choices) * WRITERS + writer);
            let known = &mut own[usize::try_from(cluster.0).unwrap()];
            let span = random.span();
            match random.below(64) {
                0 => {
                    self.zero(cluster);
                    *known = [None; SECTORS];
                }
                1..30 => {
                    let version = u32::try_from(rounds).unwrap();
                    self.write(cluster, span, version);
                    known[places(span)].fill(Some(version));
                }
                30 => self.flush(32),
                _ => {
                    let expected = &known[places(span)];
                    let held = self.map.get(cluster).data.contains(span.mask());
                    assert_eq!(held, expected.iter().all(Option::is_some), "the map");
                    if let Some(found) = self.read(cluster, span) {
                        assert_eq!(&found[places(span)], expected, "not what was acknowledged");
                    }
                }
            }
        }
        self.flush(usize::MAX);
        for cluster in (0..CLUSTERS / WRITERS).map(|at| Cluster(at * WRITERS + writer)) {
            let known = own[usize::try_from(cluster.0).unwrap()];
            for (sector, version) in known.into_iter().enumerate() {
                if let Some(version) = version {
                    let found = self.file(cluster, sector).load(Ordering::Acquire);
                    assert_eq!(found, version, "a flush has lost a write");
                }
            }
        }
        rounds
    }

    /// One reader of everything: no version is older than one that it has seen.
    fn run_reader(&self, reader: u64, stop: &AtomicBool) -> u64 {
        let mut random = Random(0x2545_f491_4f6c_dd1d ^ reader);
        let mut seen = vec![[None; SECTORS]; usize::try_from(CLUSTERS).unwrap()];
        let mut hits = 0;
        while !stop.load(Ordering::Relaxed) {
            let choices = if random.below(4) == 0 {
                CLUSTERS
            } else {
                3 * WRITERS
            };
            let cluster = Cluster(random.below(choices));
            let span = random.span();
            let Some(found) = self.read(cluster, span) else {
                continue;
            };
            hits += 1;
            let seen = &mut seen[usize::try_from(cluster.0).unwrap()];
            for sector in places(span) {
                assert!(
                    found[sector] >= seen[sector],
                    "older than what was read before"
                );
                seen[sector] = found[sector];
            }
        }
        hits
    }
}

/// How long to go on.
fn span_of_time() -> Duration {
    let seconds = std::env::var("STRATABLK_STRESS_SECONDS");
    Duration::from_secs(seconds.map_or(1, |text| text.parse().unwrap()))
}

#[test]
fn threads_on_an_arena_that_is_too_small() {
    let bed = Bed::new();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers = (0..WRITERS).map(|writer| {
            let (bed, stop) = (&bed, &stop);
            scope.spawn(move || bed.run_writer(writer, stop))
        });
        let writers: Vec<_> = writers.collect();
        let readers = (0..READERS).map(|reader| {
            let (bed, stop) = (&bed, &stop);
            scope.spawn(move || bed.run_reader(reader, stop))
        });
        let readers: Vec<_> = readers.collect();
        let end = Instant::now() + span_of_time();
        let failed = || {
            writers
                .iter()
                .chain(&readers)
                .any(|thread| thread.is_finished())
        };
        while Instant::now() < end && !failed() {
            bed.flush(16);
            thread::yield_now();
        }
        stop.store(true, Ordering::Relaxed);
        for thread in writers.into_iter().chain(readers) {
            assert!(thread.join().unwrap() > 0);
        }
    });
    bed.flush(usize::MAX);
    let (_, dirty) = bed.cache.sets().count();
    assert_eq!(dirty, 0, "no frame stays dirty");
    let journal = bed.journal.lock().unwrap();
    assert_eq!(*journal, bed.map.to_set(), "the journal has everything");
    for set in bed.cache.arena().all() {
        assert_eq!(set.lock.load(Ordering::Relaxed), 0, "a lock is left");
        for state in &set.states {
            let state = State(state.load(Ordering::Relaxed));
            assert!(
                !state.is_locked() && !state.is_filling(),
                "a lock or fill is left"
            );
        }
    }
}
