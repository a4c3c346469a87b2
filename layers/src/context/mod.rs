//! Carries out the requests of one worker thread: guest memory <-> engine <-> layer files.
//!
//! A request goes through `submit` (checked, resolved, turned into operations), the engine, and `poll` (published in the
//! maps, completed). A write becomes visible in the maps only after its data is in the file, and is acknowledged only after
//! that; a flush is led by the context itself (`group`).
//!
//! INVARIANT: a layer is changed (file or map) only by an operation counted in the `changes` of an era whose generation
//! has been announced, and the announcement is not newer than the oldest era with changes.

mod era;
mod group;
mod request;
mod zero;

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::file::{Engine, FileToken, IoDone, IoOp, Segment};
use crate::layer::LayerMap;
use crate::limits;
use crate::mailbox::{Mail, Mailbox, Waiter};
use crate::map::{ActiveMap, Change};
use crate::resolve::{Part, Source, resolve};
use crate::units::{
    CLUSTER_SECTORS, Cluster, LayerSlot, SECTOR_BYTES, Sector, SectorMask, SectorRange,
};
use crate::volume::{Completion, Durability, Operation, RequestError, Volume};

use era::Eras;
use group::Group;
use request::{Backlog, Request, Slab, Slicer, Step};

/// Carries out the requests of one worker thread (of one or more of its queues). Not shared between threads.
///
/// The caller's loop: read the available index; `begin_batch`; `submit` each request; `kick`; later `poll`.
/// Dropping a context waits for everything that is under way.
pub struct QueueContext {
    /// The disk.
    volume: Arc<Volume>,
    /// Refuses everything that would change the disk.
    read_only: bool,
    /// Carries out file operations.
    engine: Box<dyn Engine>,
    /// The chains of the generations with requests under way; the last is current.
    eras: Eras,
    /// Requests under way.
    requests: Slab<Request>,
    /// Operations under way: what to do when they end. Their numbers are the engine's `user`.
    steps: Slab<Step>,
    /// Operations that found no room in the engine.
    backlog: Backlog,
    /// Requests that have ended and were not yet polled.
    ended: Vec<Completion>,
    /// The flush group that this context leads.
    group: Option<Group>,
    /// The group to lead next.
    next_group: Option<Vec<Waiter>>,
    /// Letters from other contexts.
    mailbox: Arc<Mailbox>,
    /// Reused between calls.
    parts: Vec<Part>,
    /// Reused between calls.
    pieces: Vec<Segment>,
    /// Reused between calls.
    done: Vec<IoDone>,
}

impl QueueContext {
    /// A context of `volume`; see `Volume::context`.
    pub(crate) fn new(volume: Arc<Volume>, read_only: bool) -> Result<Self> {
        let host = |source: io::Error| Error::Io {
            op: "set up a queue of",
            path: volume.name().into(),
            source,
        };
        let engine = volume.media().engine(limits::ENGINE_DEPTH).map_err(host)?;
        let mailbox = Arc::new(Mailbox::new().map_err(host)?);
        let eras = Eras::new(&volume);
        Ok(Self {
            volume,
            read_only,
            engine,
            eras,
            requests: Slab::default(),
            steps: Slab::default(),
            backlog: Backlog::default(),
            ended: Vec::new(),
            group: None,
            next_group: None,
            mailbox,
            parts: Vec::new(),
            pieces: Vec::new(),
            done: Vec::new(),
        })
    }

    /// Fixes the chain for the requests that follow. Must be called after the available index that announced
    /// them was read (with Acquire), so that a request which a guest issued after it saw another one complete can never
    /// run in an older generation than that one did.
    pub fn begin_batch(&mut self) {
        self.eras.enter(&self.volume);
    }

    /// Starts a request. It completes in a later `poll`, exactly once, with this `token`, even if it failed at once.
    /// Never blocks. `segments` are the guest's data in order (none for the operations without data); the list is copied.
    ///
    /// # Safety
    /// Until the completion with this token was polled (or the context was dropped) all segments are valid for reads
    /// (`Write`) or writes (`Read`) of their length, and no Rust reference to their bytes is used meanwhile.
    #[expect(unsafe_code, reason = "guest memory crosses this seam without a copy")]
    pub unsafe fn submit(
        &mut self,
        operation: Operation,
        durability: Durability,
        segments: &[Segment],
        token: u64,
    ) {
        match self.check(operation, segments) {
            Err(error) => self.ended.push(Completion {
                token,
                result: Err(error),
            }),
            Ok(range) => {
                let request = self.requests.insert(Request::new(token, durability));
                match operation {
                    Operation::Read(_) => self.read(request, range, segments),
                    Operation::Write(_) => self.write(request, range, segments),
                    Operation::WriteZeroes { unmap, .. } => self.zero(request, range, unmap),
                    Operation::Discard(_) => self.zero(request, range, true),
                    Operation::Flush => self.flush(request),
                }
            }
        }
    }

    /// Hands what was queued to the kernel. Call once after a batch. Does not wait.
    pub fn kick(&mut self) {
        self.drive();
        self.eras.leave();
    }

    /// Appends the requests that have ended to `done`. Does not wait.
    pub fn poll(&mut self, done: &mut Vec<Completion>) {
        for letter in self.mailbox.take() {
            match letter {
                Mail::FlushDone { request, result } => self.flush_done(request, result),
                Mail::Lead(group) => self.next_group = Some(group),
            }
        }
        let mut finished = std::mem::take(&mut self.done);
        if let Err(error) = self.engine.reap(&mut finished) {
            self.volume
                .fail(&format!("the host's I/O engine failed: {error}"));
        }
        for io in finished.drain(..) {
            self.step_done(io);
        }
        self.done = finished;
        self.drive();
        self.eras.leave();
        done.append(&mut self.ended);
    }

    /// Waits until `poll` may have something new, at most `timeout_ms` (-1: for ever). For drains and tests; a worker
    /// puts `wake_fds` into its own wait instead.
    ///
    /// # Errors
    /// The host's answer to `poll(2)`.
    pub fn wait(&mut self, timeout_ms: i32) -> io::Result<()> {
        if !self.ended.is_empty() {
            return Ok(());
        }
        if self.engine.wake_fd().is_none() && self.engine.under_way() > 0 {
            return self.engine.wait();
        }
        wait_readable(&self.wake_fds(), timeout_ms)
    }

    /// File descriptors that become readable when `poll` may have something new. They stay the same for the life of
    /// the context; level-triggered waits are right.
    pub fn wake_fds(&self) -> Vec<RawFd> {
        self.engine
            .wake_fd()
            .into_iter()
            .chain([self.mailbox.wake_fd()])
            .collect()
    }

    /// Requests submitted and not yet polled.
    pub fn under_way(&self) -> usize {
        self.requests.len() + self.ended.len()
    }

    /// What the request may do, and to which sectors.
    fn check(
        &self,
        operation: Operation,
        segments: &[Segment],
    ) -> std::result::Result<SectorRange, RequestError> {
        let mut bytes = 0u64;
        for segment in segments {
            let len = u64::try_from(segment.len).map_err(|_| RequestError::OutOfRange)?;
            bytes = bytes.checked_add(len).ok_or(RequestError::OutOfRange)?;
        }
        if !bytes.is_multiple_of(SECTOR_BYTES) || bytes > limits::REQUEST_BYTES_MAX {
            return Err(RequestError::OutOfRange);
        }
        let sectors = bytes / SECTOR_BYTES;
        let (range, changes) = match operation {
            Operation::Read(start) => (SectorRange::new(start, sectors), false),
            Operation::Write(start) => (SectorRange::new(start, sectors), true),
            Operation::WriteZeroes { range, .. } | Operation::Discard(range) => {
                (SectorRange::new(range.start, range.count), true)
            }
            Operation::Flush => (SectorRange::new(Sector(0), 0), false),
        };
        let range = range.ok_or(RequestError::OutOfRange)?;
        if !range.fits(self.volume.capacity()) {
            return Err(RequestError::OutOfRange);
        }
        if changes && self.read_only {
            return Err(RequestError::ReadOnly);
        }
        if changes && self.volume.has_failed() {
            return Err(RequestError::Failed);
        }
        Ok(range)
    }

    /// Reads: zeroes are filled in at once, everything else comes from layer files straight into guest memory.
    fn read(&mut self, request: usize, range: SectorRange, segments: &[Segment]) {
        let mut chain = Arc::clone(self.eras.chain());
        let mut parts = std::mem::take(&mut self.parts);
        while resolve(self.volume.table(), &chain, range, &mut parts).is_err() {
            // A worker ahead of this one published a newer layer; the newest chain knows it, and reads may use it.
            chain = self.volume.newest_chain();
        }
        self.begin(request, false);
        let mut slicer = Slicer::new(segments);
        let mut pieces = std::mem::take(&mut self.pieces);
        for part in &parts {
            slicer.take(part.range.count * SECTOR_BYTES, &mut pieces);
            let file = match part.source {
                Source::Zero => None,
                Source::Layer(slot) => chain.file(slot),
            };
            match file {
                None => zero::fill(&pieces),
                Some(file) => {
                    let offset = part.range.start.0 * SECTOR_BYTES;
                    self.push(
                        Step::Read { request },
                        IoOp::Read {
                            file,
                            offset,
                            segments: &pieces,
                        },
                    );
                }
            }
        }
        self.pieces = pieces;
        self.parts = parts;
        self.keep_alive(request, chain);
        self.part_done(request, Ok(()));
    }

    /// Writes: one operation, since every sector has its place in the active layer's file.
    fn write(&mut self, request: usize, range: SectorRange, segments: &[Segment]) {
        self.begin(request, true);
        self.write_part(request, range, segments);
        self.part_done(request, Ok(()));
    }

    /// Writes a run of sectors to the active layer on behalf of a request.
    fn write_part(&mut self, request: usize, range: SectorRange, segments: &[Segment]) {
        if range.count == 0 {
            return;
        }
        if let Some(file) = self.era_file(request) {
            let offset = range.start.0 * SECTOR_BYTES;
            self.push(
                Step::Write { request, range },
                IoOp::Write {
                    file,
                    offset,
                    segments,
                },
            );
        }
    }

    /// The active layer's data file in the era of a request.
    fn era_file(&self, request: usize) -> Option<FileToken> {
        let era = self.requests.get(request)?.era?;
        Some(self.eras.chain_of(era)?.active()?.data().token())
    }

    /// Counts a request into the current era; it holds one part until its operations are all submitted.
    fn begin(&mut self, request: usize, changes: bool) {
        let era = self.eras.begin(&self.volume, changes);
        if let Some(request) = self.requests.get_mut(request) {
            request.era = Some(era);
            request.changes = changes;
            request.parts = 1;
        }
    }

    /// Keeps the files of a chain that is not the era's own open until the request ends.
    fn keep_alive(&mut self, request: usize, chain: Arc<crate::chain::Chain>) {
        if !Arc::ptr_eq(&chain, self.eras.chain())
            && let Some(request) = self.requests.get_mut(request)
        {
            request.chain = Some(chain);
        }
    }

    /// Submits an operation, or queues it where the engine is full.
    fn push(&mut self, step: Step, op: IoOp<'_>) {
        if let Some(request) = step
            .request()
            .and_then(|request| self.requests.get_mut(request))
        {
            request.parts += 1;
        }
        let user = self.steps.insert(step);
        if self.backlog.is_empty() && self.engine.room() > 0 {
            self.start(op, user);
        } else {
            self.backlog.push(op, user);
        }
    }

    /// Gives an operation to the engine, which has room.
    #[expect(unsafe_code, reason = "the engine's contract, kept as described")]
    fn start(&mut self, op: IoOp<'_>, user: usize) {
        let user = u64::try_from(user).unwrap_or(u64::MAX);
        // SAFETY:
        // - the segments are those of a request whose caller promised them valid until its completion is polled, which
        //   is after this operation was reaped; or the static zero page; or bytes owned by the group until it ends;
        // - files stay open: the request's era (or its own chain) or the group holds the layer until then.
        unsafe { self.engine.submit(op, user) };
    }

    /// Leads flushes, moves queued operations into the engine and hands all to the kernel.
    fn drive(&mut self) {
        loop {
            self.lead_next();
            while self.engine.room() > 0 {
                let Some((op, user)) = self.backlog.pop() else {
                    break;
                };
                self.start(op.as_op(), user);
                self.backlog.recycle(op);
            }
            if self.group.is_some() || self.next_group.is_none() {
                break;
            }
        }
        if let Err(error) = self.engine.kick() {
            self.volume
                .fail(&format!("the host's I/O engine failed: {error}"));
        }
    }

    /// Goes on after an operation has ended.
    fn step_done(&mut self, io: IoDone) {
        let Some(step) = usize::try_from(io.user)
            .ok()
            .and_then(|user| self.steps.remove(user))
        else {
            return;
        };
        match step {
            Step::Read { request } => {
                let result = io
                    .result
                    .map_err(|error| self.volume.note_read_error(&error));
                self.part_done(request, result);
            }
            Step::Write { request, range } => {
                let result = match io.result {
                    Ok(()) => self.publish_data(request, range),
                    Err(error) => Err(self.volume.note_write_error("write", &error)),
                };
                self.part_done(request, result);
            }
            Step::Punch {
                request,
                first,
                count,
            } => {
                let result = match io.result {
                    Ok(()) => self.publish_zero(request, first, count),
                    Err(error) => Err(self.volume.note_write_error("punch", &error)),
                };
                self.part_done(request, result);
            }
            Step::Group => self.group_step_done(io.result),
        }
    }

    /// Makes written sectors visible: in the layer's map first, then in the resolve table.
    fn publish_data(
        &mut self,
        request: usize,
        range: SectorRange,
    ) -> std::result::Result<(), RequestError> {
        let first = range.start.cluster();
        let count = (range.end().0 - 1) / CLUSTER_SECTORS - first.0 + 1;
        self.publish(request, first, count, |map| map.write(range))
    }

    /// Makes whole clusters zero, but for those that no layer says anything about or that a sealed layer says are zero. The
    /// masks of unsealed layers are not believed here: see `resolve`.
    fn publish_zero(
        &mut self,
        request: usize,
        first: Cluster,
        count: u64,
    ) -> std::result::Result<(), RequestError> {
        let volume = Arc::clone(&self.volume);
        let chain = Arc::clone(self.eras.chain());
        for run in volume.table().runs(first, count) {
            let word = run.resolve;
            let reads_zero = word.slot == LayerSlot::NONE
                || (chain.was_sealed(word.slot) && word.mask == SectorMask::NONE);
            if !reads_zero {
                self.publish(request, run.first, run.count, |map| {
                    map.zero(run.first, run.count)
                })?;
            }
        }
        Ok(())
    }

    /// Changes the map of the active layer of the request's era and derives the resolve table from it.
    fn publish(
        &self,
        request: usize,
        first: Cluster,
        count: u64,
        change: impl FnOnce(&ActiveMap) -> Change,
    ) -> std::result::Result<(), RequestError> {
        let chain = self
            .requests
            .get(request)
            .and_then(|request| request.era)
            .and_then(|era| self.eras.chain_of(era))
            .ok_or(RequestError::Failed)?;
        let layer = chain.active().ok_or(RequestError::Failed)?;
        // Unsynced before the map word: see `flush::look`.
        layer.mark_unsynced();
        match &**layer.map() {
            LayerMap::Active(map) => {
                let changed = change(map);
                self.volume
                    .table()
                    .refresh(chain.active_slot(), map, first, count, changed);
                Ok(())
            }
            LayerMap::Sealed(_) => {
                debug_assert!(false, "a change reached a sealed layer");
                self.volume
                    .fail("a change reached a sealed layer: this is a defect of stratablk");
                Err(RequestError::Failed)
            }
        }
    }

    /// Ends one part of a request, and the request with its last part.
    fn part_done(&mut self, index: usize, result: std::result::Result<(), RequestError>) {
        let Some(request) = self.requests.get_mut(index) else {
            return;
        };
        if let Err(error) = result {
            request.error.get_or_insert(error);
        }
        request.parts -= 1;
        if request.parts > 0 {
            return;
        }
        let stable = request.changes && request.durability == Durability::OnCompletion;
        let (era, changes, error) = (request.era.take(), request.changes, request.error);
        if let Some(era) = era {
            self.eras.end(era, changes);
        }
        if stable && error.is_none() {
            self.flush(index);
        } else {
            self.complete(index, error.map_or(Ok(()), Err));
        }
    }

    /// Reports the end of a request.
    fn complete(&mut self, index: usize, result: std::result::Result<(), RequestError>) {
        if let Some(request) = self.requests.remove(index) {
            self.ended.push(Completion {
                token: request.token,
                result,
            });
        }
    }
}

impl fmt::Debug for QueueContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueContext")
            .field("volume", &self.volume.name())
            .field("read_only", &self.read_only)
            .field("requests", &self.requests)
            .field("group", &self.group)
            .finish_non_exhaustive()
    }
}

impl Drop for QueueContext {
    fn drop(&mut self) {
        let mut done = Vec::new();
        while !self.requests.is_empty() || self.group.is_some() || self.next_group.is_some() {
            self.poll(&mut done);
            done.clear();
            if (!self.requests.is_empty() || self.group.is_some()) && self.wait(-1).is_err() {
                // Without a wait only the engine's own drop can wait for what is under way.
                break;
            }
        }
        self.eras.retire(&self.volume);
    }
}

/// A context is made on one thread and used on another.
const _: () = {
    const fn sendable<T: Send>() {}
    sendable::<QueueContext>();
};

/// Waits until one of the descriptors is readable.
#[expect(unsafe_code, reason = "borrows descriptors that the context owns")]
fn wait_readable(fds: &[RawFd], timeout_ms: i32) -> io::Result<()> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut polled: Vec<PollFd<'_>> = fds
        .iter()
        .map(|fd| {
            // SAFETY: the engine and the mailbox of the calling context own these and outlive this call.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(*fd) };
            PollFd::from_borrowed_fd(fd, PollFlags::IN)
        })
        .collect();
    let timeout = (timeout_ms >= 0).then(|| Timespec {
        tv_sec: i64::from(timeout_ms / 1000),
        tv_nsec: i64::from(timeout_ms % 1000) * 1_000_000,
    });
    match poll(&mut polled, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
