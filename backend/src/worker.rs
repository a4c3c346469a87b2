//! A worker: one thread that serves one or more rings of one front-end.
//!
//! ```text
//! loop: commands -> read available indices -> begin_batch -> take, judge, submit -> kick
//!       -> poll -> complete -> publish used indices, signal -> (look a while) -> ask for kicks -> sleep
//! ```
//!
//! The order matters: the chain of layers is fixed (`begin_batch`) after the available indices were read, so that a
//! request which a guest issued after it saw another one complete can never run in an older generation than that one did.
//!
//! A request costs no allocation, lock, system call or log line once the worker's lists have grown to their size. What a
//! guest does wrong ends its request or its ring; a panic ends the session that the worker serves, and nothing else.
//!
//! Memory that its front-end takes away holds zeroes ([`guard`]). So after anything was read from guest memory, and before a
//! request is carried out or reported as done, the worker looks whether memory was lost: then all of its rings break, and
//! what is under way fails.
//!
//! INVARIANT: every layout of a ring lies in `memory`; every slot under way holds the memory of its addresses; the context
//! is dropped (which waits for what it has under way) before either.

pub mod command;
pub mod counters;
pub mod disk;
pub mod poll;
pub mod provider;
mod queue;

#[cfg(test)]
pub(crate) mod test_disk;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use epoll::{ControlOptions, Events};
use stratablk_layers::file::Segment;
use stratablk_layers::volume::{Completion, Durability, Operation};

use self::command::{Command, Line, WorkerHandle};
use self::counters::Counters;
use self::disk::{DiskContext, DiskSource};
use self::poll::PollBudget;
use self::queue::{Phase, Queue};
use crate::confine::{self, Role};
use crate::signal::Signal;
use crate::vhost::dirty_log::DirtyLog;
use crate::vhost::event::Kick;
use crate::vhost::guard;
use crate::vhost::memory::GuestMemory;
use crate::virtio::chain::Chain;
use crate::virtio::complete::{WorkerMemory, end_at_once};
use crate::virtio::request::{Disk, Request, Status, Task, ZeroRange, id_of, parse};
use crate::virtio::ring::{Broken, RingLayout};

/// Chains taken from one ring in one batch.
const BATCH_MAX: usize = 32;
/// How often a ring without a kick is looked at.
const LOOK_PERIOD_MS: i32 = 1;
/// Mark of the worker's own wake-up in its epoll set; rings have the numbers from 0.
const EVENT_COMMAND: u64 = u64::MAX;
/// Mark of the disk's wake-ups.
const EVENT_DISK: u64 = u64::MAX - 1;

/// What a worker needs from its birth on.
pub struct WorkerSetup<D: DiskSource> {
    /// The disk.
    pub disk: Arc<D>,
    /// Whether it may not be changed.
    pub read_only: bool,
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// The dirty log, while there is one.
    pub log: Option<Arc<DirtyLog>>,
    /// What writes promise.
    pub durability: Durability,
    /// Where to count.
    pub counters: Arc<Counters>,
    /// Written if the worker ends by a panic.
    pub trouble: Arc<Signal>,
}

/// Starts a worker thread.
///
/// # Errors
/// The host's refusal of a thread, a descriptor or the disk's context.
pub fn start<D: DiskSource>(name: String, setup: WorkerSetup<D>) -> io::Result<WorkerHandle> {
    let wake = Signal::new()?;
    let waiting = Arc::new(AtomicBool::new(false));
    let (sender, commands) = mpsc::channel();
    let (born, birth) = mpsc::channel();
    let inbox = Inbox {
        commands,
        waiting: Arc::clone(&waiting),
        wake: wake.try_clone()?,
    };
    let thread = thread::Builder::new().name(name).spawn(move || {
        let alarm = Alarm(Arc::clone(&setup.trouble));
        match Worker::new(setup, inbox) {
            Ok(mut worker) => {
                confine::enter(Role::Worker);
                let _ = born.send(Ok(()));
                worker.run();
            }
            Err(error) => {
                let _ = born.send(Err(error));
            }
        }
        drop(alarm);
    })?;
    let line = Line {
        sender,
        waiting,
        wake,
    };
    let handle = WorkerHandle {
        line: Arc::new(line),
        thread: Some(thread),
    };
    birth
        .recv()
        .map_err(|_| io::Error::other("the worker thread ended while it started"))??;
    Ok(handle)
}

/// Rings if the worker ends by a panic.
struct Alarm(Arc<Signal>);

impl Drop for Alarm {
    fn drop(&mut self) {
        if thread::panicking() {
            tracing::error!("a worker thread panicked; its session ends");
            self.0.raise();
        }
    }
}

/// Where commands arrive.
struct Inbox {
    /// The commands.
    commands: mpsc::Receiver<Command>,
    /// Set after a command was sent.
    waiting: Arc<AtomicBool>,
    /// Readable after a command was sent.
    wake: Signal,
}

/// An epoll set.
struct WaitSet(RawFd);

impl WaitSet {
    /// An empty set.
    fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(true)?))
    }

    /// Watches a descriptor for input.
    fn add(&self, fd: RawFd, mark: u64, edge: bool) -> io::Result<()> {
        let mut events = Events::EPOLLIN;
        if edge {
            events |= Events::EPOLLET;
        }
        epoll::ctl(
            self.0,
            ControlOptions::EPOLL_CTL_ADD,
            fd,
            epoll::Event::new(events, mark),
        )
    }

    /// Watches a descriptor no longer. It may be closed already.
    fn remove(&self, fd: RawFd) {
        let nothing = epoll::Event::new(Events::empty(), 0);
        let _ = epoll::ctl(self.0, ControlOptions::EPOLL_CTL_DEL, fd, nothing);
    }
}

impl Drop for WaitSet {
    fn drop(&mut self) {
        let _ = epoll::close(self.0);
    }
}

/// The state of a worker thread. The order of the fields is the order in which they are dropped.
struct Worker<D: DiskSource> {
    /// Carries out the requests.
    context: D::Context,
    /// The rings; the place of a ring is part of its tokens and its mark in the wait set.
    queues: Vec<Option<Queue>>,
    /// Guest memory for what is taken now.
    memory: WorkerMemory,
    /// Memory from before a change, and whom to tell when its last request has ended.
    retired: Vec<(WorkerMemory, mpsc::Sender<()>)>,
    /// Dropped when all has completed that is awaited.
    awaiting: Vec<mpsc::Sender<()>>,
    /// The dirty log.
    log: Option<Arc<DirtyLog>>,
    /// How much memory was lost in the whole process when this worker looked last.
    losses: u32,
    /// Whether some of it was this front-end's.
    lost: bool,
    /// The disk.
    source: Arc<D>,
    /// What requests are judged by.
    disk: Disk,
    /// What writes promise.
    durability: Durability,
    /// Where commands arrive.
    inbox: Inbox,
    /// What to sleep on.
    waits: WaitSet,
    /// Where to count.
    counters: Arc<Counters>,
    /// How long to look before sleeping.
    budget: PollBudget,
    /// Whether the worker is to end when nothing is under way.
    stopping: bool,
    /// The chain being judged.
    chain: Chain,
    /// The ranges of the request being judged.
    ranges: Vec<ZeroRange>,
    /// Completions being handled.
    done: Vec<Completion>,
}

/// The token of a request: the place of its ring, and its head.
fn token(place: usize, head: u16) -> u64 {
    ((place as u64) << 16) | u64::from(head)
}

/// The place and the head of a token.
fn from_token(token: u64) -> (usize, u16) {
    #[expect(clippy::cast_possible_truncation, reason = "the lower half is wanted")]
    let head = token as u16;
    (usize::try_from(token >> 16).unwrap_or(usize::MAX), head)
}

impl<D: DiskSource> Worker<D> {
    /// Prepares a worker on its own thread.
    fn new(setup: WorkerSetup<D>, inbox: Inbox) -> io::Result<Self> {
        let context = setup
            .disk
            .context(setup.read_only)
            .map_err(io::Error::other)?;
        let waits = WaitSet::new()?;
        waits.add(inbox.wake.as_raw_fd(), EVENT_COMMAND, false)?;
        for fd in context.wake_fds() {
            waits.add(fd, EVENT_DISK, false)?;
        }
        Ok(Self {
            context,
            queues: Vec::new(),
            memory: Rc::new(setup.memory),
            retired: Vec::new(),
            awaiting: Vec::new(),
            log: setup.log,
            losses: guard::losses(),
            lost: false,
            disk: Disk {
                capacity: setup.disk.capacity(),
                read_only: setup.read_only,
                id: id_of(setup.disk.name()),
            },
            source: setup.disk,
            durability: setup.durability,
            inbox,
            waits,
            counters: setup.counters,
            budget: PollBudget::for_this_machine(),
            stopping: false,
            chain: Chain::default(),
            ranges: Vec::new(),
            done: Vec::new(),
        })
    }

    /// Serves until told to stop.
    fn run(&mut self) {
        loop {
            self.obey();
            let progress = self.turn();
            if self.stopping && self.is_idle() {
                return;
            }
            if !progress && !self.look_a_while() {
                self.sleep();
            }
        }
    }

    /// Whether nothing is under way.
    fn is_idle(&self) -> bool {
        self.context.under_way() == 0
            && self
                .queues
                .iter()
                .flatten()
                .all(|queue| queue.in_flight.count() == 0)
    }

    /// One round over everything. Returns whether there was anything to do.
    fn turn(&mut self) -> bool {
        let taken = self.take();
        self.done.clear();
        self.context.poll(&mut self.done);
        let ended = !self.done.is_empty();
        if ended {
            self.complete();
        }
        if taken || ended {
            for queue in self.queues.iter_mut().flatten() {
                if queue.publish() {
                    self.counters.called();
                }
            }
        }
        if ended && !self.retired.is_empty() {
            self.let_go();
        }
        if ended && !self.awaiting.is_empty() {
            self.tell_completed();
        }
        self.finish_drains();
        let refused = self.end_held();
        taken || ended || refused
    }

    /// Ends what waits for space on the host where somebody waits for its end: rings that are being stopped, memory that is to
    /// be let go, or the worker's own end. Returns whether there was anything.
    fn end_held(&mut self) -> bool {
        if self.stopping || !self.retired.is_empty() {
            return self.context.end_held(&|_| true);
        }
        let drains = |queue: &Queue| matches!(queue.phase, Phase::Draining(_));
        if !self.queues.iter().flatten().any(drains) {
            return false;
        }
        let queues = &self.queues;
        self.context.end_held(&|token| {
            let (place, _) = from_token(token);
            let queue = queues.get(place).and_then(Option::as_ref);
            queue.is_some_and(drains)
        })
    }

    /// Takes a batch from every ring that has entries. Returns whether there were any.
    fn take(&mut self) -> bool {
        if self.stopping {
            return false;
        }
        let mut waiting = false;
        for queue in self.queues.iter_mut().flatten() {
            waiting |= queue.is_replaying();
            if !queue.is_served() {
                continue;
            }
            match queue.ring.refresh() {
                Ok(entries) => waiting |= entries > 0,
                Err(why) => break_ring(queue, &self.counters, why),
            }
        }
        if self.notice_losses() || !waiting {
            return false;
        }
        self.context.begin_batch();
        self.disk.capacity = self.source.capacity();
        for place in 0..self.queues.len() {
            for _ in 0..BATCH_MAX {
                if !self.take_one(place) {
                    break;
                }
            }
        }
        self.context.kick();
        true
    }

    /// Takes one chain from the ring at `place`. Returns whether there may be more.
    fn take_one(&mut self, place: usize) -> bool {
        let Some(Some(queue)) = self.queues.get_mut(place) else {
            return false;
        };
        let head = match queue.next_head() {
            Ok(Some(head)) => head,
            Ok(None) => return false,
            Err(why) => {
                break_ring(queue, &self.counters, why);
                return false;
            }
        };
        queue.ring.suppress_kicks();
        let size = queue.ring.size();
        let walked = self
            .chain
            .walk(&self.memory, queue.ring.table(), size, head, queue.indirect);
        let request = match walked {
            Ok(()) => parse(&mut self.chain, &self.disk, &mut self.ranges),
            Err(why) => {
                tracing::trace!(ring = queue.index, head, %why, "malformed chain");
                None
            }
        };
        let Some(request) = request else {
            // There is no byte to say that it failed in; the guest gets its descriptors back.
            queue.ring.put_used(head, 0);
            self.counters.malformed();
            return true;
        };
        if self.notice_losses() {
            // What was read of the request may be zeroes that the guest never wrote.
            self.end_now(place, head, &request, Status::IoError);
            return false;
        }
        self.carry_out(place, head, &request);
        true
    }

    /// Sends a request to the disk, or ends it if there is nothing to do.
    fn carry_out(&mut self, place: usize, head: u16, request: &Request) {
        let Some(Some(queue)) = self.queues.get_mut(place) else {
            return;
        };
        let (operation, segments): (Operation, &[Segment]) = match request.task {
            Task::Read(sector) => (Operation::Read(sector), &self.chain.writable),
            Task::Write(sector) => (Operation::Write(sector), &self.chain.readable),
            Task::Flush => (Operation::Flush, &[]),
            Task::Zero { discard } => {
                self.ranges.retain(|zero| zero.range.count > 0);
                if self.ranges.is_empty() {
                    self.end_now(place, head, request, Status::Ok);
                    return;
                }
                let parts = self.ranges.len();
                queue
                    .in_flight
                    .begin(head, *request, parts, &self.chain, &self.memory);
                for zero in &self.ranges {
                    let operation = if discard {
                        Operation::Discard(zero.range)
                    } else {
                        Operation::WriteZeroes {
                            range: zero.range,
                            unmap: zero.unmap,
                        }
                    };
                    #[expect(unsafe_code, reason = "the seam to the disk takes guest memory")]
                    // SAFETY: there are no segments.
                    unsafe {
                        self.context
                            .submit(operation, self.durability, &[], token(place, head));
                    }
                }
                return;
            }
            Task::Finish(status) => {
                self.end_now(place, head, request, status);
                return;
            }
        };
        queue
            .in_flight
            .begin(head, *request, 1, &self.chain, &self.memory);
        #[expect(unsafe_code, reason = "the seam to the disk takes guest memory")]
        // SAFETY:
        // - The segments were translated in `memory`, which the slot of this head holds until the completion is polled;
        //   if the worker ends before, the context is dropped first and waits.
        // - Guest memory is never a Rust reference, only raw pointers and atomics.
        unsafe {
            self.context
                .submit(operation, self.durability, segments, token(place, head));
        }
    }

    /// Ends a request that needs nothing of the disk.
    fn end_now(&mut self, place: usize, head: u16, request: &Request, status: Status) {
        if let Some(Some(queue)) = self.queues.get_mut(place) {
            let ended = end_at_once(request, status, &self.chain, self.log.as_deref());
            queue.ring.put_used(head, ended.used_len);
            self.counters.ended(&ended);
        }
    }

    /// Returns the requests that have ended to their rings.
    fn complete(&mut self) {
        // ORDERING: SeqCst; keeps the look at the losses behind the stores of the reads that have ended. With that, a read into
        // memory that another thread's fault has replaced is not taken for done. Once a batch.
        fence(Ordering::SeqCst);
        let lost = self.notice_losses();
        for completion in &self.done {
            let (place, head) = from_token(completion.token);
            let Some(Some(queue)) = self.queues.get_mut(place) else {
                debug_assert!(false, "a completion for a ring that was drained");
                continue;
            };
            let ok = completion.result.is_ok() && !lost;
            let ended = queue.in_flight.part_ended(head, ok, self.log.as_deref());
            if let Some(ended) = ended {
                queue.ring.put_used(head, ended.used_len);
                self.counters.ended(&ended);
            }
        }
    }

    /// Looks whether memory was lost since it was looked at last. Returns whether some of this front-end's is.
    #[inline]
    fn notice_losses(&mut self) -> bool {
        let losses = guard::losses();
        if losses != self.losses {
            self.losses = losses;
            self.judge_memory();
        }
        self.lost
    }

    /// Finds out whether memory of this front-end was lost, and if so takes nothing more from its rings: nothing that is read
    /// of them need be what the guest has written.
    #[cold]
    fn judge_memory(&mut self) {
        self.lost = self.memory.is_lost()
            || self.retired.iter().any(|(memory, _)| memory.is_lost())
            || self.log.as_ref().is_some_and(|log| log.is_lost())
            || self
                .queues
                .iter()
                .flatten()
                .any(|queue| queue.ring.has_lost_tracker());
        if self.lost {
            for queue in self.queues.iter_mut().flatten() {
                queue.stop_replaying();
                if matches!(queue.phase, Phase::Held | Phase::Armed | Phase::Started) {
                    break_ring(queue, &self.counters, Broken::MemoryLost);
                }
            }
        }
    }

    /// Lets go of memory that no request uses any more.
    fn let_go(&mut self) {
        self.retired.retain(|(memory, done)| {
            let in_use = Rc::strong_count(memory) > 1;
            if !in_use {
                let _ = done.send(());
            }
            in_use
        });
    }

    /// Tells who waits for what was under way that it has completed, if it has.
    fn tell_completed(&mut self) {
        let mut queues = self.queues.iter().flatten();
        if queues.all(|queue| queue.in_flight.awaited() == 0) {
            self.awaiting.clear();
        }
    }

    /// Lets go of rings that are to be drained and have nothing under way.
    fn finish_drains(&mut self) {
        for place in &mut self.queues {
            let drained = place.as_ref().is_some_and(|queue| {
                matches!(queue.phase, Phase::Draining(_))
                    && queue.in_flight.count() == 0
                    && !queue.is_replaying()
            });
            if drained && let Some(mut queue) = place.take() {
                if let Kick::Event(event) = &*queue.kick {
                    self.waits.remove(event.as_raw_fd());
                    event.drain();
                }
                // Whoever goes on with the ring must be kicked again. A broken ring has nobody to go on with it.
                let _ = queue.ring.request_kick();
                if let Phase::Draining(done) = &queue.phase {
                    let _ = done.send(Some(queue.ring.next_avail()));
                }
            }
        }
    }

    /// Looks at everything for as long as that has paid lately. Returns whether something came.
    fn look_a_while(&mut self) -> bool {
        let length = self.budget.length();
        if length.is_zero() {
            return false;
        }
        let start = Instant::now();
        loop {
            if self.inbox.waiting.load(Ordering::Relaxed) || self.turn() {
                return true;
            }
            if start.elapsed() >= length {
                return false;
            }
            std::hint::spin_loop();
        }
    }

    /// Asks the guest for kicks and sleeps until there is something to do.
    fn sleep(&mut self) {
        let mut polled = false;
        if !self.stopping {
            let mut come = false;
            for queue in self.queues.iter_mut().flatten() {
                polled |= queue.is_polled();
                if queue.is_served() {
                    match queue.ring.request_kick() {
                        Ok(entries) => come |= entries,
                        Err(why) => break_ring(queue, &self.counters, why),
                    }
                }
            }
            if come {
                return;
            }
            self.notice_losses();
        }
        let timeout = if polled { LOOK_PERIOD_MS } else { -1 };
        let mut events = [epoll::Event::new(Events::empty(), 0); 16];
        let start = Instant::now();
        let count = match epoll::wait(self.waits.0, timeout, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return,
            Err(error) => panic!("epoll_wait on a set of our own failed: {error}"),
        };
        self.budget.slept(start.elapsed());
        for event in events.iter().take(count) {
            let mark = event.data;
            if mark == EVENT_COMMAND {
                self.inbox.wake.lower();
            } else if mark != EVENT_DISK {
                let place = usize::try_from(mark).unwrap_or(usize::MAX);
                if let Some(Some(queue)) = self.queues.get_mut(place) {
                    queue.kicked();
                }
            }
        }
    }

    /// Carries out the commands that have come.
    fn obey(&mut self) {
        // ORDERING: Acquire; pairs with the Release after a command was sent. A command sent later sets the flag again.
        if !self.inbox.waiting.swap(false, Ordering::Acquire) {
            return;
        }
        while let Ok(command) = self.inbox.commands.try_recv() {
            self.carry_out_command(command);
        }
    }

    /// Carries out one command. Whoever sent it may be gone; then nobody needs the answer.
    fn carry_out_command(&mut self, command: Command) {
        match command {
            Command::Attach { setup, held, done } => {
                let _ = done.send(self.attach(Queue::new(*setup, held)));
            }
            Command::Release => self.queues.iter_mut().flatten().for_each(Queue::release),
            Command::AwaitAll { done } => {
                self.queues.iter_mut().flatten().for_each(Queue::await_all);
                self.awaiting.push(done);
                self.tell_completed();
            }
            Command::Detach { index, done } => match self.queue_mut(index) {
                Some(queue) => queue.phase = Phase::Draining(done),
                None => {
                    let _ = done.send(None);
                }
            },
            Command::SetKick { index, kick, done } => {
                let _ = done.send(self.set_kick(index, kick));
            }
            Command::SetCall { index, call, done } => {
                if let Some(queue) = self.queue_mut(index) {
                    queue.set_call(call);
                }
                let _ = done.send(());
            }
            Command::SetErr { index, err, done } => {
                if let Some(queue) = self.queue_mut(index) {
                    queue.err = err;
                }
                let _ = done.send(());
            }
            Command::SetMemory {
                memory,
                layouts,
                done,
            } => self.set_memory(memory, &layouts, done),
            Command::SetLog { log, rings, done } => {
                self.log = log;
                for (index, used) in rings {
                    if let Some(queue) = self.queue_mut(index) {
                        queue.ring.set_log(used);
                    }
                }
                self.judge_memory();
                let _ = done.send(());
            }
            Command::SetDurability { durability, done } => {
                self.durability = durability;
                let _ = done.send(());
            }
            Command::Stop => self.stopping = true,
        }
    }

    /// The ring with this number.
    fn queue_mut(&mut self, index: u16) -> Option<&mut Queue> {
        self.queues
            .iter_mut()
            .flatten()
            .find(|queue| queue.index == index)
    }

    /// Watches the kick of the ring at `place`.
    ///
    /// Kicks are watched by edge and never read: each write to an event fd is an edge, and one that came before the watch
    /// counts as one too. That saves a system call a wake-up.
    fn watch(&self, kick: &Kick, place: usize) -> io::Result<()> {
        match kick {
            Kick::Event(event) => self.waits.add(event.as_raw_fd(), place as u64, true),
            Kick::Poll => Ok(()),
        }
    }

    /// Begins to serve a ring.
    fn attach(&mut self, queue: Queue) -> io::Result<()> {
        let free = self.queues.iter().position(Option::is_none);
        let place = free.unwrap_or_else(|| {
            self.queues.push(None);
            self.queues.len() - 1
        });
        self.watch(&queue.kick, place)?;
        if let Some(free) = self.queues.get_mut(place) {
            *free = Some(queue);
        }
        self.judge_memory();
        Ok(())
    }

    /// Watches another kick for a ring.
    fn set_kick(&mut self, index: u16, kick: Arc<Kick>) -> io::Result<()> {
        let place = self
            .queues
            .iter()
            .position(|queue| queue.as_ref().is_some_and(|queue| queue.index == index));
        let Some(place) = place else {
            return Ok(());
        };
        self.watch(&kick, place)?;
        if let Some(Some(queue)) = self.queues.get_mut(place) {
            if let Kick::Event(old) = &*queue.kick {
                self.waits.remove(old.as_raw_fd());
            }
            queue.kick = kick;
            if matches!(*queue.kick, Kick::Poll) {
                queue.kicked();
            }
        }
        Ok(())
    }

    /// Uses other memory from now on.
    fn set_memory(
        &mut self,
        memory: Arc<GuestMemory>,
        layouts: &[(u16, Option<RingLayout>)],
        done: mpsc::Sender<()>,
    ) {
        let before = std::mem::replace(&mut self.memory, Rc::new(memory));
        for queue in self.queues.iter_mut().flatten() {
            let layout = layouts
                .iter()
                .find(|(index, _)| *index == queue.index)
                .and_then(|(_, layout)| *layout);
            match layout {
                Some(layout) => queue.ring.set_layout(layout),
                None => {
                    // What is under way completes in the memory its slots hold; there is no ring to report it in.
                    queue.ring.lose_memory();
                    break_ring(queue, &self.counters, Broken::MemoryGone);
                }
            }
        }
        self.retired.push((before, done));
        self.let_go();
        self.judge_memory();
    }
}

/// Stops serving a ring because of what its driver did.
fn break_ring(queue: &mut Queue, counters: &Counters, why: Broken) {
    counters.ring_broke();
    queue.break_off(why);
}
