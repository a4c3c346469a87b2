//! Carries out the requests of one worker thread: guest memory <-> sector cache <-> engine <-> layer files.
//!
//! What lies in the cache is done when `submit` returns, and polled later: reads of frames (`read`), writes into frames
//! (`write`). Everything else is a request under way: it goes through the engine, or waits until a frame is free. A write is
//! published in the maps under the lock of its frames, and acknowledged only after that; a flush is led by the
//! context itself (`group`).
//!
//! INVARIANT: a layer is changed (frame, file or map) only in a batch whose generation is announced, or by an operation
//! counted in the `changes` of an era whose generation has been announced; and the announcement is not newer than the oldest
//! era with changes. Tables and what they lead to are looked at under the same terms, for the announcement of requests.

mod era;
mod group;
mod held;
mod read;
mod request;
mod write;
mod zero;

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use crate::cache::access::Tally;
use crate::cache::set::FrameKey;
use crate::cache::staging::Pages;
use crate::cache::{Cache, Counters};
use crate::error::{Error, Result};
use crate::file::{Engine, IoDone, IoOp, Segment};
use crate::layer::LayerMap;
use crate::limits;
use crate::mailbox::{Mail, Mailbox, Waiter};
use crate::resolve::Part;
use crate::segments::Slicer;
use crate::units::{SECTOR_BYTES, Sector, SectorRange};
use crate::volume::{Completion, Durability, Operation, RequestError, Volume};

use era::Eras;
use group::{Group, SyncTime};
use request::{Backlog, Deferred, Fill, Parked, Request, Slab, Step};
use write::Stop;

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
    /// Where the data is that was used last.
    cache: Arc<Cache>,
    /// What has been done.
    tally: Tally,
    /// Where that is told.
    counters: Arc<Counters>,
    /// Frames that became dirty since that was told.
    dirtied: u64,
    /// Whether clean frames may become dirty in this batch.
    may_dirty: bool,
    /// Clusters on their way into frames.
    fills: Slab<Fill>,
    /// The memory for that.
    pages: Pages,
    /// Parts of requests that were put aside.
    parked: Vec<Parked>,
    /// Requests that wait for space on the host.
    held: Vec<usize>,
    /// Whether nothing waits for space any more.
    closing: bool,
    /// Whether this context has asked itself to try them again.
    retry_asked: bool,
    /// What a flush by blocking calls took lately.
    sync_time: SyncTime,
    /// The chains of the generations with requests under way; the last is current.
    eras: Eras,
    /// Requests under way.
    requests: Slab<Request>,
    /// Operations under way: what to do when they end. Their numbers are the engine's `user`.
    steps: Slab<Step>,
    /// Operations that found no room in the engine.
    backlog: Backlog,
    /// Reads and writes of the batch that have not been carried out.
    batch: Vec<Deferred>,
    /// Their memory.
    batch_segments: Vec<Segment>,
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
    /// Empty lists, to be used again.
    spare: Vec<Vec<Segment>>,
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
        let cache = Arc::clone(volume.cache());
        Ok(Self {
            volume,
            read_only,
            sync_time: SyncTime::new(engine.wake_fd().is_some()),
            engine,
            counters: cache.register(),
            may_dirty: !cache.is_full_of_dirty(),
            cache,
            tally: Tally::default(),
            dirtied: 0,
            fills: Slab::default(),
            pages: Pages::default(),
            parked: Vec::new(),
            held: Vec::new(),
            closing: false,
            retry_asked: false,
            eras,
            requests: Slab::default(),
            steps: Slab::default(),
            backlog: Backlog::default(),
            batch: Vec::new(),
            batch_segments: Vec::new(),
            ended: Vec::new(),
            group: None,
            next_group: None,
            mailbox,
            parts: Vec::new(),
            pieces: Vec::new(),
            done: Vec::new(),
            spare: Vec::new(),
        })
    }

    /// Fixes the chain for the requests that follow. Must be called after the available index that announced
    /// them was read (with Acquire), so that a request which a guest issued after it saw another one complete can never
    /// run in an older generation than that one did.
    pub fn begin_batch(&mut self) {
        self.eras.enter(&self.volume);
        self.may_dirty = !self.cache.is_full_of_dirty();
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
        let range = match self.check(operation, segments) {
            Ok(range) => range,
            Err(error) => return self.end(token, Err(error)),
        };
        match operation {
            Operation::Read(_) | Operation::Write(_) => {
                let write = matches!(operation, Operation::Write(_));
                self.prefetch(range.start, write);
                self.batch.push(Deferred {
                    token,
                    durability,
                    write,
                    range,
                    first: self.batch_segments.len(),
                    count: segments.len(),
                });
                // One or two, nearly always: not worth the call of a copy.
                for segment in segments {
                    self.batch_segments.push(*segment);
                }
                return;
            }
            _ => self.carry_out_batch(),
        }
        match operation {
            Operation::Read(_) | Operation::Write(_) => {}
            Operation::WriteZeroes { unmap, .. } => {
                let request = self.requests.insert(Request::new(token, durability));
                self.zero(request, range, unmap);
            }
            Operation::Discard(_) => {
                let request = self.requests.insert(Request::new(token, durability));
                self.zero(request, range, true);
            }
            Operation::Flush => {
                let request = self.requests.insert(Request::new(token, durability));
                self.flush(request);
            }
        }
    }

    /// Asks the processor for what a request will look at first. The words of sets and tables are scattered over megabytes, and
    /// a copy keeps the processor from looking ahead; so a batch is looked at as a whole before anything is copied.
    #[inline]
    fn prefetch(&self, start: Sector, write: bool) {
        let cluster = start.cluster();
        let slot = self.volume.table().get(cluster).slot;
        let active = self.eras.active();
        if let Some(active) = active.filter(|active| write || active.slot == slot) {
            if let LayerMap::Active(map) = &*active.map {
                std::hint::black_box(map.get(cluster));
            }
            let key = FrameKey::new(active.number, cluster);
            self.cache.sets().prefetch(key);
        } else if let Some(number) = self.eras.chain().number(slot) {
            self.cache.sets().prefetch(FrameKey::new(number, cluster));
        }
    }

    /// Carries out the reads and writes of the batch, in their order.
    #[inline]
    fn carry_out_batch(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let (mut batch, mut segments) = (
            std::mem::take(&mut self.batch),
            std::mem::take(&mut self.batch_segments),
        );
        for deferred in batch.drain(..) {
            let end = deferred.first + deferred.count;
            let segments = segments.get(deferred.first..end).unwrap_or_default();
            let Deferred {
                token,
                durability,
                range,
                ..
            } = deferred;
            #[expect(unsafe_code, reason = "guest memory crosses this seam without a copy")]
            if deferred.write {
                // SAFETY: `submit` was promised that the segments are valid until the request ends.
                unsafe { self.write(token, durability, range, segments) }
            } else {
                // SAFETY: as above.
                unsafe { self.read(token, durability, range, segments) }
            }
        }
        segments.clear();
        (self.batch, self.batch_segments) = (batch, segments);
    }

    /// Reads; a request is made only of what is not in the cache.
    ///
    /// # Safety
    /// As for `submit`.
    #[inline]
    #[expect(unsafe_code, reason = "guest memory crosses this seam without a copy")]
    unsafe fn read(
        &mut self,
        token: u64,
        durability: Durability,
        range: SectorRange,
        segments: &[Segment],
    ) {
        self.eras.announce(&self.volume, false);
        let mut guest = Slicer::new(segments);
        // SAFETY: the caller promises the segments.
        let at = unsafe { self.read_hot(range, &mut guest) };
        let count = range.end().0 - at.0;
        if count == 0 {
            return self.end(token, Ok(()));
        }
        let request = self.requests.insert(Request::new(token, durability));
        self.begin(request, false);
        self.read_range(request, SectorRange { start: at, count }, guest);
        self.part_done(request, Ok(()));
    }

    /// Writes; a request is made only of what finds no frame, or has to be stable.
    ///
    /// # Safety
    /// As for `submit`.
    #[inline]
    #[expect(unsafe_code, reason = "guest memory crosses this seam without a copy")]
    unsafe fn write(
        &mut self,
        token: u64,
        durability: Durability,
        range: SectorRange,
        segments: &[Segment],
    ) {
        self.eras.announce(&self.volume, true);
        let mut guest = Slicer::new(segments);
        // SAFETY: the caller promises the segments.
        let (at, stop) = unsafe { self.write_hot(None, range, &mut guest) };
        if stop == Stop::Done && durability == Durability::AfterFlush {
            return self.end(token, Ok(()));
        }
        let request = self.requests.insert(Request::new(token, durability));
        self.begin(request, true);
        self.write_stopped(request, range, at, stop, guest);
        self.part_done(request, Ok(()));
    }

    /// Reports the end of a request that was never under way.
    #[inline]
    fn end(&mut self, token: u64, result: std::result::Result<(), RequestError>) {
        self.ended.push(Completion { token, result });
    }

    /// Hands what was queued to the kernel. Call once after a batch. Does not wait.
    pub fn kick(&mut self) {
        self.carry_out_batch();
        self.drive();
        self.eras.leave();
        self.tell();
    }

    /// Appends the requests that have ended to `done`. Does not wait.
    pub fn poll(&mut self, done: &mut Vec<Completion>) {
        self.carry_out_batch();
        // Once for all letters that ask for it: each retry may ask for another one.
        let mut retry = None;
        for letter in self.mailbox.take() {
            match letter {
                Mail::FlushDone { request, result } => self.flush_done(request, result),
                Mail::Lead(group) => self.next_group = Some(group),
                Mail::Room => self.try_held(),
                Mail::Retry { stuck } => retry = Some(stuck || retry == Some(true)),
            }
        }
        if let Some(stuck) = retry {
            self.retry_asked = false;
            self.retry(stuck);
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
        self.tell();
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
        self.requests.len() + self.ended.len() + self.batch.len()
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

    /// Tells the cache what this context has done.
    #[inline]
    fn tell(&mut self) {
        self.counters.store(&self.tally);
        let dirtied = std::mem::take(&mut self.dirtied);
        if dirtied > 0 {
            self.cache.dirtied(dirtied);
            if self.cache.wants_write_back() {
                self.cache.bell().ring();
            }
        }
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
    fn keep_alive(&mut self, request: usize, chain: &Arc<crate::chain::Chain>) {
        if !Arc::ptr_eq(chain, self.eras.chain())
            && let Some(request) = self.requests.get_mut(request)
        {
            request.chain = Some(Arc::clone(chain));
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
        //   is after this operation was reaped; or the static zero page; or bytes owned by the group until it ends; or a page
        //   of a fill, which stays where it is until that ends;
        // - files stay open: the request's era (or its own chain) or the group holds the layer until then.
        unsafe { self.engine.submit(op, user) };
    }

    /// Leads flushes, moves queued operations into the engine and hands all to the kernel.
    fn drive(&mut self) {
        loop {
            let led = self.lead_next();
            while self.engine.room() > 0 {
                let Some((op, user)) = self.backlog.pop() else {
                    break;
                };
                self.start(op.as_op(), user);
                self.backlog.recycle(op);
            }
            if !led || self.group.is_some() || self.next_group.is_none() {
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
            Step::Fill { request, fill } => self.fill_done(request, fill, io.result),
            Step::Group => self.group_step_done(io.result),
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
        if let (None, Some(zero)) = (request.error, request.zero.take()) {
            // One more part, which keeps the era open; it is as durable as asked for when it ends.
            request.parts = 1;
            request.durability = Durability::AfterFlush;
            return self.zero_and_flush(index, zero, stable);
        }
        let (era, changes, error) = (request.era.take(), request.changes, request.error);
        if let Some(era) = era {
            self.eras.end(era, changes);
        }
        match error {
            None if stable => self.flush(index),
            None => self.complete(index, Ok(())),
            Some(error) => self.complete(index, Err(error)),
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
        self.closing = true;
        self.end_held(&|_| true);
        self.carry_out_batch();
        self.abandon_parked();
        while self.under_way() > 0 || self.group.is_some() || self.next_group.is_some() {
            self.poll(&mut done);
            done.clear();
            if (!self.requests.is_empty() || self.group.is_some()) && self.wait(-1).is_err() {
                // Without a wait only the engine's own drop can wait for what is under way.
                break;
            }
        }
        self.eras.retire(&self.volume);
        self.tell();
        self.cache.unregister(&self.counters);
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
