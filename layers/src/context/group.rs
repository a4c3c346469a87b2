//! The flush group that a context leads: the steps of `flush`, one after the other.
//!
//! On its own engine, so that requests go on meanwhile; or by blocking calls, where nothing else is under way and syncs have
//! been quick lately: a sync through io_uring wakes two threads, which costs more than a quick sync itself.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::cache::staging::Staging;
use crate::canary::{self, Canary};
use crate::file::{Engine, IoDone, IoOp, Segment};
use crate::flush::zeroes::{self, Freed, ZeroRange};
use crate::flush::{self, FlushError, JournalWrite, LayerWork, StagedWrite, Walk};
use crate::mailbox::{Mail, Waiter};
use crate::volume::RequestError;

use super::QueueContext;
use super::request::{Asked, Step};

/// A flush by blocking calls keeps its worker from everything else; longer than this it may not take.
const BLOCKING_MAX: Duration = Duration::from_micros(500);
/// A flush of more clusters than this takes its time in any case, and does not block.
const BLOCKING_CLUSTERS_MAX: u64 = 256;
/// One in so many flushes is tried by blocking calls although they have been slow.
const TRY_AGAIN: u32 = 64;

/// The longest that a flush waits for others that will probably ask as well: a small part of what a sync takes.
const GATHER_MAX: Duration = Duration::from_micros(20);

/// What flushes by blocking calls took lately, and how many asked for them.
#[derive(Debug)]
pub struct SyncTime {
    /// Whether blocking calls are to be used at all.
    allowed: bool,
    /// A moving mean.
    mean: Duration,
    /// Flushes since the last one by blocking calls.
    since: u32,
    /// How many asked for the last two.
    asked: [usize; 2],
    /// When the first of those asked who wait now.
    gathering: Option<Instant>,
}

impl SyncTime {
    /// Nothing known yet.
    pub fn new(allowed: bool) -> Self {
        Self {
            allowed,
            mean: Duration::ZERO,
            since: 0,
            asked: [1; 2],
            gathering: None,
        }
    }

    /// Whether the next flush may block.
    fn may_block(&mut self) -> bool {
        self.since = self.since.saturating_add(1);
        self.allowed && (self.mean < BLOCKING_MAX || self.since >= TRY_AGAIN)
    }

    /// Whether a flush that so many have asked for should wait a moment, since more have asked lately. Each sync that
    /// begins without them keeps them waiting for all of it.
    fn is_worth_waiting(&mut self, asked: usize) -> bool {
        let [last, before] = self.asked;
        if !self.allowed || asked >= last.max(before) {
            return false;
        }
        let since = *self.gathering.get_or_insert_with(Instant::now);
        since.elapsed() < GATHER_MAX
    }

    /// A flush that so many have asked for begins.
    fn begins(&mut self, asked: usize) {
        self.gathering = None;
        let [last, _] = self.asked;
        self.asked = [asked, last];
    }

    /// One took this long.
    fn took(&mut self, time: Duration) {
        self.since = 0;
        // A single slow one is no reason to believe that the next will be.
        self.mean = (self.mean * 7 + time.min(BLOCKING_MAX * 2)) / 8;
    }
}

/// A flush under way.
#[derive(Debug)]
pub struct Group {
    /// Who waits for it.
    waiters: Vec<Waiter>,
    /// What it covers.
    work: Vec<LayerWork>,
    /// Where it is among the dirty clusters.
    walk: Walk,
    /// The dirty clusters being written; the operations under way read from it.
    staging: Staging,
    /// The parts of it, reused.
    writes: Vec<StagedWrite>,
    /// The journal writes of it; owns their bytes until they are written.
    journals: Vec<JournalWrite>,
    /// Clusters that were zeroed, whose space is given back.
    freed: Vec<Freed>,
    /// What is done next, once `outstanding` is 0.
    next: Phase,
    /// Operations under way.
    outstanding: usize,
    /// The first failure.
    error: Option<String>,
    /// Whether that is only a full disk.
    full_disk: bool,
}

/// The steps of a group, in the order in which they make it durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Write the next dirty clusters; again, until there are no more.
    WriteData,
    /// Sync the data files.
    SyncData,
    /// Write the journal records.
    WriteJournal,
    /// Sync the map files.
    SyncMap,
    /// Give back the space of zeroed clusters.
    Punch,
    /// Make frames clean and answer.
    Answer,
}

impl Group {
    /// A group that begins with this step.
    fn new(waiters: Vec<Waiter>, work: Vec<LayerWork>, freed: Vec<Freed>, first: Phase) -> Self {
        let clusters = work.iter().flat_map(|work| &work.marks.dirty);
        let clusters = clusters.map(|(_, count)| *count).sum();
        Self {
            waiters,
            work,
            walk: Walk::default(),
            staging: Staging::for_clusters(clusters),
            writes: Vec::new(),
            journals: Vec::new(),
            freed,
            next: first,
            outstanding: 0,
            error: None,
            full_disk: false,
        }
    }
}

impl QueueContext {
    /// Asks for a flush on behalf of a request.
    pub(super) fn flush(&mut self, request: usize) {
        self.join(request, None, true);
    }

    /// Asks for clusters to be zeroed on behalf of a request, and for a flush of that if it has to be stable.
    pub(super) fn zero_and_flush(&mut self, request: usize, zero: ZeroRange, flush: bool) {
        self.join(request, Some(zero), flush);
    }

    /// Asks for either.
    pub(super) fn join(&mut self, request: usize, zero: Option<ZeroRange>, flush: bool) {
        if let Some(request) = self.requests.get_mut(request) {
            let zero = zero.clone();
            request.asked = Asked { zero, flush };
        }
        let waiter = Waiter {
            mailbox: Arc::clone(&self.mailbox),
            request,
            zero,
            flush,
        };
        if let Some(group) = self.volume.flushes().join(waiter) {
            self.next_group = Some(group);
        }
    }

    /// What a request waited for has ended: a flush, or its last part.
    pub(super) fn flush_done(&mut self, request: usize, result: Result<(), RequestError>) {
        if result == Err(RequestError::NoSpace) && self.may_hold() {
            return self.hold(request);
        }
        self.end_flush(request, result);
    }

    /// The same, and nothing waits for space any more.
    pub(super) fn end_flush(&mut self, request: usize, result: Result<(), RequestError>) {
        let zeroed = self
            .requests
            .get(request)
            .is_some_and(|request| request.parts > 0);
        if zeroed {
            self.part_done(request, result);
        } else {
            self.complete(request, result);
        }
    }

    /// Begins the next group, if one waits and none is under way. Returns `false` if it has to wait a moment for others.
    pub(super) fn lead_next(&mut self) -> bool {
        if self.group.is_some() {
            return true;
        }
        let Some(mut waiters) = self.next_group.take() else {
            return true;
        };
        // Whoever has asked since the group was formed: the rest of a batch, most of the time.
        self.volume.flushes().absorb(&mut waiters);
        let flushes = waiters.iter().any(|waiter| waiter.flush);
        if flushes && self.sync_time.is_worth_waiting(waiters.len()) {
            self.next_group = Some(waiters);
            self.retry_soon();
            return false;
        }
        self.sync_time.begins(waiters.len());
        self.lead(waiters);
        true
    }

    /// Begins a group.
    fn lead(&mut self, waiters: Vec<Waiter>) {
        if self.volume.has_failed() {
            self.answer(waiters, Err(RequestError::Failed));
            return;
        }
        let ranges: Vec<ZeroRange> = waiters
            .iter()
            .filter_map(|waiter| waiter.zero.clone())
            .collect();
        let mut freed = Vec::new();
        if !ranges.is_empty() {
            let (table, chain) = (self.volume.table(), self.eras.chain());
            match zeroes::carry_out(&self.cache, table, chain, &ranges) {
                Ok(done) => {
                    freed = done;
                    self.volume.note_zeroes(&ranges);
                }
                // Nothing was recorded, and nothing is zeroed or lost.
                Err(error) if flush::is_full_disk(&error) => {
                    self.volume.note_full(&error);
                    return self.answer(waiters, Err(RequestError::NoSpace));
                }
                Err(error) => {
                    self.volume
                        .fail(&format!("recording zeroes failed: {error}"));
                    return self.answer(waiters, Err(RequestError::Failed));
                }
            }
            if !waiters.iter().any(|waiter| waiter.flush) {
                return self.begin_group(Group::new(waiters, Vec::new(), freed, Phase::Punch));
            }
        }
        let idle = self.engine.under_way() == 0 && self.parked.is_empty();
        let work = flush::look(self.volume.newest_chain().unsealed(), usize::MAX);
        let clusters = work.iter().flat_map(|work| &work.marks.dirty);
        let small = clusters.map(|(_, count)| *count).sum::<u64>() <= BLOCKING_CLUSTERS_MAX;
        if idle && small && self.sync_time.may_block() {
            let began = Instant::now();
            let (engine, done) = (&mut self.engine, &mut self.done);
            let result =
                flush::carry_out_with(&self.cache, &work, true, |works, staging, writes| {
                    write_at_once(&mut **engine, done, works, staging, writes)
                });
            self.sync_time.took(began.elapsed());
            self.volume.note_journal(&work);
            let mut group = Group::new(waiters, Vec::new(), freed, Phase::Punch);
            match result {
                Ok(()) => {}
                Err(FlushError::Full(error)) => {
                    group.error = Some(error.to_string());
                    group.full_disk = true;
                }
                Err(FlushError::Fatal(error)) => {
                    self.volume.fail(&format!("a flush failed: {error}"));
                    return self.answer(group.waiters, Err(RequestError::Failed));
                }
            }
            return self.begin_group(group);
        }
        self.begin_group(Group::new(waiters, work, freed, first_phase()));
    }

    /// Takes the steps of a group from its first on.
    fn begin_group(&mut self, group: Group) {
        self.group = Some(group);
        self.advance_group();
    }

    /// One operation of the group has ended.
    pub(super) fn group_step_done(&mut self, result: io::Result<()>) {
        if let Some(group) = &mut self.group {
            group.outstanding -= 1;
            if let (Phase::Answer, Err(error)) = (group.next, &result) {
                // Only space was to be given back.
                self.volume.note_not_given_back(error);
            } else if let Err(error) = result {
                // Only a write of data that finds no space harms nothing.
                let writes = [Phase::WriteData, Phase::SyncMap].contains(&group.next);
                let full = writes && flush::is_full_disk(&error);
                if group.error.is_none() || !full {
                    group.full_disk = full;
                }
                group
                    .error
                    .get_or_insert_with(|| format!("a flush failed: {error}"));
            }
            if group.outstanding == 0 {
                self.advance_group();
            }
        }
    }

    /// Starts the next step that has something to do; answers after the last.
    fn advance_group(&mut self) {
        while let Some(mut group) = self.group.take() {
            let phase = if group.error.is_some() && group.full_disk && !group.freed.is_empty() {
                // Their zeroes are recorded, whatever became of the flush, and space is what is wanted.
                Phase::Punch
            } else if group.error.is_some() {
                Phase::Answer
            } else {
                group.next
            };
            match phase {
                Phase::WriteData => {
                    let Group {
                        walk,
                        work,
                        staging,
                        writes,
                        ..
                    } = &mut group;
                    if walk.next(&self.cache, work, staging, writes) {
                        self.write_staged(&mut group);
                    } else {
                        group.next = next_phase(phase);
                        if canary::is_set(Canary::CleanBeforeCommit) {
                            group.walk.clean(&self.cache, &group.work);
                        }
                    }
                }
                Phase::SyncData => {
                    group.next = next_phase(phase);
                    self.sync_data(&mut group);
                }
                Phase::WriteJournal => {
                    group.next = next_phase(phase);
                    group.journals = group.work.iter().filter_map(flush::encode).collect();
                    for journal in &group.journals {
                        group.outstanding += 1;
                        let segment = Segment {
                            base: journal.bytes.as_ptr().cast_mut(),
                            len: journal.bytes.len(),
                        };
                        self.push(
                            Step::Group,
                            IoOp::Write {
                                file: journal.file.token(),
                                offset: journal.offset,
                                segments: &[segment],
                            },
                        );
                    }
                }
                Phase::SyncMap => {
                    group.next = next_phase(phase);
                    for journal in &group.journals {
                        group.outstanding += 1;
                        self.push(
                            Step::Group,
                            IoOp::SyncData {
                                file: journal.file.token(),
                            },
                        );
                    }
                }
                Phase::Punch => {
                    group.next = next_phase(phase);
                    for freed in std::mem::take(&mut group.freed) {
                        let (file, runs) = freed.dead_bytes();
                        for (offset, len) in runs {
                            group.outstanding += 1;
                            self.push(Step::Group, IoOp::Punch { file, offset, len });
                        }
                    }
                }
                Phase::Answer => {
                    self.end_group(group);
                    return;
                }
            }
            let waits = group.outstanding > 0;
            self.group = Some(group);
            if waits {
                return;
            }
        }
    }

    /// Writes what is in the staging buffer.
    fn write_staged(&mut self, group: &mut Group) {
        for write in &group.writes {
            let (Some(work), Some(bytes)) = (
                group.work.get(write.work),
                group.staging.bytes(write.start, write.len),
            ) else {
                continue;
            };
            let segment = Segment {
                base: bytes.as_ptr().cast_mut(),
                len: bytes.len(),
            };
            // Before the write: a crash of this process in between only costs a sync.
            work.layer.mark_unsynced();
            group.outstanding += 1;
            self.push(
                Step::Group,
                IoOp::Write {
                    file: work.layer.data().token(),
                    offset: write.offset,
                    segments: &[segment],
                },
            );
        }
    }

    /// Syncs what is written and not synced, of data files and of maps.
    fn sync_data(&mut self, group: &mut Group) {
        for work in &group.work {
            if work.layer.take_unsynced() {
                group.outstanding += 1;
                let file = work.layer.data().token();
                self.push(Step::Group, IoOp::SyncData { file });
            }
            if work.sync_map_end
                && let Some(map) = flush::map_file(work)
            {
                group.outstanding += 1;
                let file = map.token();
                self.push(Step::Group, IoOp::SyncData { file });
            }
        }
    }

    /// Latches a failure, makes frames clean, and answers.
    fn end_group(&mut self, mut group: Group) {
        let result = match &group.error {
            None => {
                group.walk.clean(&self.cache, &group.work);
                if group.waiters.iter().any(|waiter| waiter.flush) {
                    self.volume.note_room(true);
                }
                Ok(())
            }
            Some(_) if group.full_disk => {
                let mut journals = group.journals.iter();
                if let Err(error) = journals.try_for_each(flush::JournalWrite::take_back) {
                    self.volume
                        .fail(&format!("taking a journal back failed: {error}"));
                }
                flush::put_back(&group.work);
                self.volume
                    .note_full(&io::Error::from(rustix::io::Errno::NOSPC));
                Err(RequestError::NoSpace)
            }
            Some(cause) => {
                self.volume.fail(cause);
                Err(RequestError::Failed)
            }
        };
        self.volume.note_journal(&group.work);
        self.answer(group.waiters, result);
    }

    /// Lets the next group begin and answers those who waited for this one.
    fn answer(&mut self, waiters: Vec<Waiter>, result: Result<(), RequestError>) {
        // Whatever failed meanwhile, on whichever queue or in a command: nothing is promised any more.
        let result = if result.is_ok() && self.volume.has_failed() {
            Err(RequestError::Failed)
        } else {
            result
        };
        if let Some(next) = self.volume.flushes().finish() {
            if flush::has_own(&next, &self.mailbox) {
                self.next_group = Some(next);
            } else {
                flush::hand_over(next);
            }
        }
        for waiter in waiters {
            if Arc::ptr_eq(&waiter.mailbox, &self.mailbox) {
                self.flush_done(waiter.request, result);
            } else {
                waiter.mailbox.send(Mail::FlushDone {
                    request: waiter.request,
                    result,
                });
            }
        }
        if self.cache.bell().has_waiting() {
            self.cache.bell().answer(false);
        }
    }
}

/// Writes what is in the staging buffer by an engine that has nothing else to do, all at once, and waits for it.
fn write_at_once(
    engine: &mut dyn Engine,
    done: &mut Vec<IoDone>,
    works: &[LayerWork],
    staging: &Staging,
    writes: &[StagedWrite],
) -> io::Result<()> {
    let mut result = Ok(());
    let mut left = writes.iter();
    loop {
        while engine.room() > 0
            && let Some(write) = left.next()
        {
            let (Some(work), Some(bytes)) =
                (works.get(write.work), staging.bytes(write.start, write.len))
            else {
                continue;
            };
            let segment = Segment {
                base: bytes.as_ptr().cast_mut(),
                len: bytes.len(),
            };
            let op = IoOp::Write {
                file: work.layer.data().token(),
                offset: write.offset,
                segments: &[segment],
            };
            #[expect(unsafe_code, reason = "the engine's contract, kept as described")]
            // SAFETY: the buffer and the layers are borrowed until this returns, which is after all of it was reaped.
            unsafe {
                engine.submit(op, 0);
            }
        }
        if engine.under_way() == 0 {
            return result;
        }
        // Not left before everything is reaped, whatever fails: the engine reads from the buffer until then.
        result = result.and(engine.wait()).and(engine.reap(done));
        for io in done.drain(..) {
            result = result.and(io.result);
        }
    }
}

/// The first step of a group.
fn first_phase() -> Phase {
    if canary::is_set(Canary::MapBeforeData) {
        Phase::WriteJournal
    } else {
        Phase::WriteData
    }
}

/// The step after this one.
fn next_phase(phase: Phase) -> Phase {
    if canary::is_set(Canary::MapBeforeData) {
        return match phase {
            Phase::WriteJournal => Phase::SyncMap,
            Phase::SyncMap => Phase::WriteData,
            Phase::WriteData => Phase::SyncData,
            Phase::SyncData => Phase::Punch,
            Phase::Punch | Phase::Answer => Phase::Answer,
        };
    }
    match phase {
        Phase::WriteData => Phase::SyncData,
        Phase::SyncData => Phase::WriteJournal,
        Phase::WriteJournal => Phase::SyncMap,
        Phase::SyncMap => Phase::Punch,
        Phase::Punch | Phase::Answer => Phase::Answer,
    }
}
