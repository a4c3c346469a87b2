//! The data plane's facade: one disk, open for requests.

use std::io;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use crate::cache::Cache;
use crate::chain::{Chain, ChainPair};
use crate::error::{Error, Result};
use crate::file::Media;
use crate::flush::zeroes::ZeroRange;
use crate::flush::{self, Coordinator, FlushError, LayerWork};
use crate::generation::Clock;
use crate::layer::LayerMap;
use crate::limits;
use crate::maintenance::Maintenance;
use crate::map::Table;
use crate::sync::{AtomicU64, Ordering, Size};
use crate::units::{CLUSTER_SECTORS, Generation, Sector, SectorRange};

pub use crate::context::QueueContext;

/// What a request wants. Ranges are already known to lie inside the capacity; they are checked again all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fills the segments from the disk, starting at this sector.
    Read(Sector),
    /// Writes the segments to the disk, starting at this sector.
    Write(Sector),
    /// Makes the range read as zeroes. With `unmap` its space is given back as well.
    WriteZeroes {
        /// Which sectors.
        range: SectorRange,
        /// Whether the space may be given back.
        unmap: bool,
    },
    /// The guest no longer needs the range. It reads as zeroes afterwards; its space is given back.
    Discard(SectorRange),
    /// Makes everything that completed before this was submitted survive power loss.
    Flush,
}

/// What a completion promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Survives power loss after the next completed flush.
    AfterFlush,
    /// Survives power loss once completed (write-through).
    OnCompletion,
}

/// Why a request failed. The guest sees an I/O error whatever the reason; the words go to the log and the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestError {
    /// The range lies outside the disk, the length is not whole sectors, or the memory does not match.
    OutOfRange,
    /// A write, discard or write-zeroes on a read-only volume.
    ReadOnly,
    /// The host failed to read or write.
    Io,
    /// The host has no space left. Nothing was lost, and a later request may succeed.
    NoSpace,
    /// An earlier write or sync failed; the volume takes no more writes and flushes.
    Failed,
}

/// The end of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The number that the caller gave.
    pub token: u64,
    /// How it ended. On success of a read all segments are filled.
    pub result: std::result::Result<(), RequestError>,
}

/// For how long no write may have found the disk full before a volume is said to have room again, while it is written to
/// without an end.
const ROOM_AFTER_MS: u64 = 1000;

/// One disk, open for requests. Shared by all its queue contexts and the control plane.
///
/// Reads and writes of its contexts go on whatever the control plane does; the two meet in the chain, which is replaced by
/// pointer, and in the clock of the store.
#[derive(Debug)]
pub struct Volume {
    /// Never changes.
    name: String,
    /// The size of the disk, in sectors.
    capacity: Size,
    /// Which layer answers for which cluster.
    table: Table,
    /// The layers, now and next.
    chains: ArcSwap<ChainPair>,
    /// The generations of the store.
    clock: Arc<Clock>,
    /// Where the files are.
    media: Arc<dyn Media>,
    /// Who flushes.
    flushes: Coordinator,
    /// The first failure of a write or sync: sticky.
    failure: OnceLock<String>,
    /// When it was opened, which `full_at` counts from.
    opened: Instant,
    /// When the host had no space for it last, in milliseconds, not 0; 0 while there is room.
    full_at: AtomicU64,
    /// The longest that a worker needed to take over a new chain since the last look, in nanoseconds.
    stall_ns: AtomicU64,
    /// Whom to tell when a journal has grown long.
    maintenance: Arc<Maintenance>,
    /// Where the data is that was used last.
    cache: Arc<Cache>,
}

/// What the volumes of a store share.
pub(crate) struct Shared {
    /// The generations of the store.
    pub clock: Arc<Clock>,
    /// Where the files are.
    pub media: Arc<dyn Media>,
    /// Whom to tell what.
    pub maintenance: Arc<Maintenance>,
    /// Where the data is that was used last.
    pub cache: Arc<Cache>,
}

impl Volume {
    /// A volume over this chain, whose maps `table` was built from.
    pub(crate) fn new(
        name: &str,
        capacity: Sector,
        table: Table,
        chain: Chain,
        shared: Shared,
    ) -> Self {
        let Shared {
            clock,
            media,
            maintenance,
            cache,
        } = shared;
        Self {
            name: name.to_owned(),
            capacity: Size::new(capacity.0),
            table,
            chains: ArcSwap::from_pointee(ChainPair::settled(Arc::new(chain))),
            clock,
            media,
            flushes: Coordinator::default(),
            failure: OnceLock::new(),
            opened: Instant::now(),
            full_at: AtomicU64::new(0),
            stall_ns: AtomicU64::new(0),
            maintenance,
            cache,
        }
    }

    /// The volume's name; never changes.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The size of the disk.
    pub fn capacity(&self) -> Sector {
        Sector(self.capacity.get())
    }

    /// Makes the disk larger, while it is used; a smaller capacity changes nothing. The new sectors read as zeroes, but those
    /// that share a cluster with the old end: of these any layer may say something, which the caller has seen to. One
    /// caller at a time (the store's command lock), and layers are only added by who has it.
    ///
    /// A guest is told only when no change of before is under way any more (advance the clock, wait for `Clock::quiescent`):
    /// one that zeroes the last cluster may count the new sectors in it as its own.
    pub(crate) fn grow(&self, capacity: Sector) {
        let clusters = capacity.0.div_ceil(CLUSTER_SECTORS);
        for layer in self.newest_chain().unsealed() {
            if let LayerMap::Active(map) = &**layer.map() {
                map.grow(clusters);
            }
        }
        self.table.grow(clusters);
        // Requests are checked against it: whoever passes finds the rest grown.
        self.capacity.grow(capacity.0);
    }

    /// Why the volume takes no more writes, or `None` while all is well.
    pub fn failure(&self) -> Option<String> {
        self.failure.get().cloned()
    }

    /// Bytes of memory that the resolve table takes.
    pub fn table_bytes(&self) -> u64 {
        self.table.memory_bytes()
    }

    /// A context for one worker thread. `read_only` refuses everything that would change the disk.
    ///
    /// # Errors
    /// `Io` if the host has no resources for it.
    pub fn context(self: &Arc<Self>, read_only: bool) -> Result<QueueContext> {
        QueueContext::new(Arc::clone(self), read_only)
    }

    /// Makes everything that completed before this call durable. Blocks for as long as the syncs take. For the control
    /// plane; queue contexts submit `Operation::Flush`.
    ///
    /// # Errors
    /// `Failed` if this or an earlier flush or write failed.
    pub fn flush_blocking(&self) -> Result<()> {
        self.lead_blocking();
        self.end_lead(|| Ok(()))
    }

    /// Flushes, does something while nobody else writes to the files of the active layer or appends to its map, and gives
    /// the lead back. By a caller who has it.
    pub(crate) fn end_lead<T>(&self, act: impl FnOnce() -> Result<T>) -> Result<T> {
        let done = self.lead_flush().and_then(|()| act());
        self.flushes.finish_blocking();
        done
    }

    /// Waits for the lead of the flushes, for the control plane.
    pub(crate) fn lead_blocking(&self) {
        self.flushes.lead_blocking(|| self.media.go_on());
    }

    /// The steps of a flush (see `flush`), one after the other, by a caller who has the lead.
    pub(crate) fn lead_flush(&self) -> Result<()> {
        self.check_failure()?;
        let chain = self.newest_chain();
        let works = flush::look(chain.unsealed(), usize::MAX);
        self.carry_out(&works, true)
    }

    /// Writes back about `limit` clusters, and commits them if they are new to their layers. By a caller who has the lead.
    /// Returns whether there is more to do.
    pub(crate) fn lead_write_back(&self, limit: usize) -> Result<bool> {
        self.check_failure()?;
        let chain = self.newest_chain();
        let works = flush::look(chain.unsealed(), limit);
        self.carry_out(&works, false)?;
        Ok(works.iter().any(|work| work.marks.more))
    }

    /// The steps for what was looked up.
    pub(crate) fn carry_out(&self, works: &[LayerWork], everything: bool) -> Result<()> {
        let done = flush::carry_out(&self.cache, works, everything);
        self.note_journal(works);
        if done.is_ok() {
            self.note_room(everything || !works.iter().any(|work| work.marks.more));
        }
        done.map_err(|error| match error {
            FlushError::Full(source) => {
                self.note_full(&source);
                Error::Io {
                    op: "write back",
                    path: self.name.clone().into(),
                    source,
                }
            }
            FlushError::Fatal(error) => {
                self.fail(&format!("a flush failed: {error}"));
                self.failed_error()
            }
        })
    }

    /// Whether anything waits to be written back.
    pub(crate) fn is_dirty(&self) -> bool {
        self.newest_chain()
            .unsealed()
            .any(|layer| match &**layer.map() {
                LayerMap::Active(map) => map.has_marks(),
                LayerMap::Sealed(_) => false,
            })
    }

    /// Where the data is that was used last.
    pub(crate) fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// `Err` if the volume has failed.
    pub(crate) fn check_failure(&self) -> Result<()> {
        if self.has_failed() {
            Err(self.failed_error())
        } else {
            Ok(())
        }
    }

    /// The sticky failure as an error.
    fn failed_error(&self) -> Error {
        Error::Failed {
            volume: self.name.clone(),
            cause: self.failure().unwrap_or_else(|| "unknown".into()),
        }
    }

    /// Whether the volume takes no more writes.
    pub(crate) fn has_failed(&self) -> bool {
        self.failure.get().is_some()
    }

    /// Latches the first failure. Before anybody can be told of it, it is where the next process looks: who is told may
    /// end this one.
    pub(crate) fn fail(&self, cause: &str) {
        if self.has_failed() {
            return;
        }
        for layer in self.newest_chain().unsealed() {
            if let Err(error) = self.cache.set_failed(layer.number(), true) {
                self.maintenance.note(format!(
                    "volume {}: that it failed may be forgotten if this daemon is killed: {error}",
                    self.name
                ));
            }
        }
        if self.failure.set(cause.to_owned()).is_ok() {
            self.maintenance.failed(&self.name, cause);
        }
    }

    /// The volume had failed before it was opened.
    pub(crate) fn had_failed(&self, cause: String) {
        // Nobody else has it yet.
        let set = self.failure.set(cause);
        debug_assert!(set.is_ok(), "it has failed already");
    }

    /// A read failed: the guest gets an error, nothing is latched.
    pub(crate) fn note_read_error(&self, error: &io::Error) -> RequestError {
        self.maintenance
            .note(format!("volume {}: a read failed: {error}", self.name));
        RequestError::Io
    }

    /// Space of zeroed clusters could not be given back. Their data is of no use to anybody, so nothing is lost.
    pub(crate) fn note_not_given_back(&self, error: &io::Error) {
        self.maintenance.note(format!(
            "volume {}: discarded space was not given back to the host: {error}",
            self.name
        ));
    }

    /// The host had no space for something: nothing that was acknowledged is lost by that. Said once, until there is room.
    pub(crate) fn note_full(&self, error: &io::Error) {
        // ORDERING: Relaxed, here and below; a mark for people that leads to no data. Who changes it from or to 0 says so.
        if self.full_at.swap(self.now_ms(), Ordering::Relaxed) == 0 {
            self.maintenance.note(format!(
                "volume {}: no space left on the host ({error}); what it was to write waits in the cache",
                self.name
            ));
        }
    }

    /// Something found room: with `everything`, all that waited.
    pub(crate) fn note_room(&self, everything: bool) {
        let last = self.full_at.load(Ordering::Relaxed);
        if last == 0 || !everything && self.now_ms().saturating_sub(last) < ROOM_AFTER_MS {
            return;
        }
        // Unless it was full once more just now.
        let room = self
            .full_at
            .compare_exchange(last, 0, Ordering::Relaxed, Ordering::Relaxed);
        if room.is_ok() {
            self.maintenance
                .note(format!("volume {}: there is room again", self.name));
        }
    }

    /// Whether what it has to write waits for space on the host.
    pub fn waits_for_space(&self) -> bool {
        self.full_at.load(Ordering::Relaxed) != 0
    }

    /// The time as `full_at` has it.
    fn now_ms(&self) -> u64 {
        u64::try_from(self.opened.elapsed().as_millis()).map_or(u64::MAX, |ms| ms.saturating_add(1))
    }

    /// A worker has taken over a new chain in this time.
    pub(crate) fn note_stall(&self, stall: Duration) {
        let nanoseconds = u64::try_from(stall.as_nanos()).unwrap_or(u64::MAX);
        // ORDERING: Relaxed; a figure for people.
        self.stall_ns.fetch_max(nanoseconds, Ordering::Relaxed);
    }

    /// The longest such time since the last call.
    pub(crate) fn take_stall(&self) -> Duration {
        Duration::from_nanos(self.stall_ns.swap(0, Ordering::Relaxed))
    }

    /// A group has appended to journals: asks for a checkpoint where one has grown long.
    pub(crate) fn note_journal(&self, work: &[LayerWork]) {
        let long = work.iter().filter(|work| work.has_records()).any(|work| {
            work.layer
                .journal()
                .as_ref()
                .is_some_and(|journal| journal.journal_bytes() > limits::JOURNAL_BYTES_MAX)
        });
        if long {
            self.maintenance.want_checkpoint(&self.name);
        }
    }

    /// Zeroes were recorded in a layer's journal: as `note_journal`. A guest that never flushes lengthens it too.
    pub(crate) fn note_zeroes(&self, ranges: &[ZeroRange]) {
        let long = ranges.iter().any(|range| {
            let journal = range.layer.journal();
            let bytes = journal.as_ref().map(crate::mapfile::MapFile::journal_bytes);
            bytes.is_some_and(|bytes| bytes > limits::JOURNAL_BYTES_MAX)
        });
        if long {
            self.maintenance.want_checkpoint(&self.name);
        }
    }

    /// Where the files are.
    pub(crate) fn media(&self) -> &Arc<dyn Media> {
        &self.media
    }

    /// The generations of the store.
    pub(crate) fn clock(&self) -> &Arc<Clock> {
        &self.clock
    }

    /// Which layer answers for which cluster.
    pub(crate) fn table(&self) -> &Table {
        &self.table
    }

    /// Who flushes.
    pub(crate) fn flushes(&self) -> &Coordinator {
        &self.flushes
    }

    /// The chain in force in a generation.
    pub(crate) fn chain_at(&self, generation: Generation) -> Arc<Chain> {
        Arc::clone(self.chains.load().at(generation))
    }

    /// The newest chain, in force or about to be.
    pub(crate) fn newest_chain(&self) -> Arc<Chain> {
        Arc::clone(self.chains.load().newest())
    }

    /// Publishes a chain that the clock will bring into force. One caller at a time (the store's command lock).
    pub(crate) fn publish(&self, next: Chain) {
        let pair = self.chains.load().pending(Arc::new(next));
        self.chains.store(Arc::new(pair));
    }

    /// Replaces the chain at once, for all generations, by one with the same active layer: without layers that are gone, or
    /// with others in their places. No snapshot is between its chain and its instant. One caller at a time (the store's
    /// command lock).
    pub(crate) fn exchange(&self, chain: Chain) {
        debug_assert_eq!(chain.active_slot(), self.newest_chain().active_slot());
        self.chains
            .store(Arc::new(ChainPair::settled(Arc::new(chain))));
    }

    /// Replaces the chain by an equal one, so that layers that were sealed since are no longer looked at by flushes.
    pub(crate) fn settle(&self) {
        self.exchange(self.newest_chain().again());
    }
}
