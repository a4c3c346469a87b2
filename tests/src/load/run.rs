//! Keeps all slots of a driver busy with a workload, and measures.
//!
//! One thread looks after all queues. It reads the clock once for all completions found in one look, so a latency is
//! measured from just before its request was put into the ring to just after its completion was seen.

use std::fmt;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::driver::{Done, Driver, DriverError, Request};
use super::ledger::{Ledger, Mismatch};
use super::process::{CpuTime, cpu_time};
use super::random::Random;
use super::stamp::STAMP_BYTES;
use super::timeline::Timeline;
use super::workload::{Mix, Step, Steps};

/// The longest latency that is told apart from longer ones.
const LATENCY_NS_MAX: u64 = 1_000_000_000_000;
/// Looks at the rings without any completion between two looks at the clock.
const IDLE_LOOKS: u32 = 4096;
/// Addresses drawn before a slot gives up finding one whose blocks no other write touches.
const DRAWS_MAX: u32 = 1000;

/// When a run ends.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Not counted, before the measurement.
    pub warmup: Duration,
    /// The measurement ends after this time.
    pub time: Option<Duration>,
    /// The measurement ends after this many operations.
    pub count: Option<u64>,
    /// The process of the back-end, whose CPU time is of interest.
    pub server_pid: Option<u32>,
    /// Completions are counted by slices of time of this length; zero: they are not.
    pub slice: Duration,
}

/// What a run showed.
#[derive(Clone, Debug)]
pub struct Measurement {
    /// Reads that completed.
    pub reads: u64,
    /// Writes that completed; with flushes, a write and its flush.
    pub writes: u64,
    /// From the end of the warm-up to the last completion that counts.
    pub elapsed: Duration,
    /// In nanoseconds.
    pub latency: Histogram<u64>,
    /// The longest time without any completion.
    pub gap_max: Duration,
    /// CPU time of the back-end meanwhile.
    pub server: Option<CpuTime>,
    /// Stamped blocks that were checked.
    pub verified_blocks: u64,
    /// Completions by time, if that was asked for.
    pub timeline: Option<Timeline>,
}

impl Measurement {
    /// Nothing yet.
    ///
    /// # Errors
    /// The bounds of the histogram are refused.
    pub fn new(limits: &Limits) -> Result<Self, RunError> {
        let latency = Histogram::new_with_bounds(1, LATENCY_NS_MAX, 3)
            .map_err(|error| RunError::Histogram(error.to_string()))?;
        Ok(Self {
            reads: 0,
            writes: 0,
            elapsed: Duration::ZERO,
            latency,
            gap_max: Duration::ZERO,
            server: None,
            verified_blocks: 0,
            timeline: Timeline::new(limits.slice),
        })
    }

    /// Counts an operation that took `latency`.
    #[inline]
    pub fn count(&mut self, is_read: bool, latency: Duration) {
        self.reads += u64::from(is_read);
        self.writes += u64::from(!is_read);
        let latency = u64::try_from(latency.as_nanos()).unwrap_or(LATENCY_NS_MAX);
        self.latency.saturating_record(latency.max(1));
    }

    /// Notes that operations completed at a time since the beginning, and how long before that others had.
    #[inline]
    pub fn reached(&mut self, at: Duration, gap: Duration, completions: u64) {
        self.gap_max = self.gap_max.max(gap);
        self.elapsed = at;
        if let Some(timeline) = &mut self.timeline {
            timeline.count(at, completions);
        }
    }
}

/// Why a run was given up.
#[derive(Debug)]
pub enum RunError {
    /// The session failed.
    Driver(DriverError),
    /// A block does not hold what it must.
    Mismatch(Mismatch),
    /// No address is free of other writes: the working set is too small for the depth.
    Crowded,
    /// The file that stands for a disk failed.
    File(std::io::Error),
    /// The back-end's CPU time cannot be read.
    Server(std::io::Error),
    /// The workload was over before anything counted.
    Nothing,
    /// A number of the measurement does not fit.
    Histogram(String),
}

impl fmt::Display for RunError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Driver(error) => error.fmt(f),
            Self::Mismatch(mismatch) => write!(f, "wrong data: {mismatch}"),
            Self::Crowded => {
                f.write_str("the working set is too small: each block may have one write under way")
            }
            Self::File(error) => write!(f, "the file: {error}"),
            Self::Server(error) => write!(f, "CPU time of the back-end: {error}"),
            Self::Nothing => {
                f.write_str("the workload was over before anything counted; shorten the warm-up")
            }
            Self::Histogram(error) => write!(f, "histogram: {error}"),
        }
    }
}

impl std::error::Error for RunError {}

impl From<DriverError> for RunError {
    fn from(error: DriverError) -> Self {
        Self::Driver(error)
    }
}

/// What a slot is doing.
#[derive(Clone, Debug)]
struct Slot {
    /// When its operation began.
    issued: Instant,
    /// What the blocks of a read must hold at least.
    oldest: Vec<u64>,
}

/// A run under way.
struct Run<'a> {
    /// The session.
    driver: &'a mut Driver,
    /// Where the requests come from.
    steps: Steps,
    /// What is done.
    mix: Mix,
    /// Bytes of a request.
    block_bytes: usize,
    /// The contents to check, if they are to be checked.
    ledger: Option<&'a mut Ledger>,
    /// By queue, then by slot.
    slots: Vec<Vec<Slot>>,
    /// How far the run is.
    phase: Phase,
    /// Whether anything more is issued.
    issuing: bool,
    /// Operations issued since the measurement began.
    issued: u64,
    /// Operations that may be issued.
    count_max: u64,
    /// The result so far.
    result: Measurement,
}

/// Runs `steps` (of `mix`, in requests of `block_bytes`) until a limit is reached, then waits for what is under way. With a
/// `ledger` every write is stamped and every read checked.
///
/// # Errors
/// The first request that fails, the first wrong block, or a hanging back-end.
pub fn run(
    driver: &mut Driver,
    steps: Steps,
    mix: Mix,
    limits: &Limits,
    ledger: Option<&mut Ledger>,
    seed: u64,
) -> Result<Measurement, RunError> {
    let options = driver.options().clone();
    let now = Instant::now();
    let slot = Slot {
        issued: now,
        oldest: Vec::new(),
    };
    let mut random = Random::new(seed ^ 0x6461_7461);
    for queue in 0..options.queues {
        for index in 0..options.depth {
            random.fill(driver.buffer_mut(queue, index));
        }
    }
    let run = Run {
        driver,
        steps,
        mix,
        block_bytes: options.buffer_bytes,
        ledger,
        slots: vec![vec![slot; options.depth]; options.queues],
        phase: Phase::Warmup,
        issuing: true,
        issued: 0,
        count_max: u64::MAX,
        result: Measurement::new(limits)?,
    };
    run.go(limits)
}

/// How far a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing counts yet.
    Warmup,
    /// Every completion counts.
    Measuring,
    /// The time is over; what is under way is awaited and does not count.
    Draining,
}

impl Run<'_> {
    /// Warm-up, measurement, drain.
    fn go(mut self, limits: &Limits) -> Result<Measurement, RunError> {
        let server_cpu = || {
            limits
                .server_pid
                .map(cpu_time)
                .transpose()
                .map_err(RunError::Server)
        };
        let (queues, depth, patience) = {
            let options = self.driver.options();
            (options.queues, options.depth, options.patience)
        };
        let mut cpu_before = server_cpu()?;
        if limits.warmup.is_zero() {
            self.begin(limits);
        }
        let mut start = Instant::now();
        let mut last = start;
        for queue in 0..queues {
            for slot in 0..depth {
                self.issue(queue, slot, Instant::now())?;
            }
            self.driver.kick(queue)?;
        }
        let mut done: Vec<Done> = Vec::with_capacity(depth);
        let mut idle_looks = 0;
        while self.driver.under_way() > 0 {
            let mut any = false;
            for queue in 0..queues {
                self.driver.poll(queue, &mut done)?;
                if done.is_empty() {
                    continue;
                }
                any = true;
                let now = Instant::now();
                let ended_before = self.result.reads + self.result.writes;
                for ended in done.drain(..) {
                    self.end(queue, ended, now)?;
                }
                self.driver.kick(queue)?;
                if self.phase == Phase::Measuring {
                    let ended = self.result.reads + self.result.writes - ended_before;
                    self.result.reached(now - start, now - last, ended);
                    if limits.time.is_some_and(|time| now - start >= time) {
                        self.result.server = server_cpu()?
                            .zip(cpu_before)
                            .map(|(after, before)| after.since(&before));
                        self.issuing = false;
                        self.phase = Phase::Draining;
                    }
                } else if self.phase == Phase::Warmup && now - start >= limits.warmup {
                    cpu_before = server_cpu()?;
                    self.begin(limits);
                    start = now;
                }
                last = now;
            }
            if any {
                idle_looks = 0;
                continue;
            }
            self.driver.wait()?;
            std::hint::spin_loop();
            idle_looks += 1;
            if idle_looks == IDLE_LOOKS {
                idle_looks = 0;
                if last.elapsed() > patience {
                    return Err(DriverError::Stuck {
                        under_way: self.driver.under_way(),
                        patience,
                    }
                    .into());
                }
            }
        }
        if self.phase == Phase::Measuring {
            self.result.server = server_cpu()?
                .zip(cpu_before)
                .map(|(after, before)| after.since(&before));
        }
        if self.result.latency.is_empty() {
            return Err(RunError::Nothing);
        }
        Ok(self.result)
    }

    /// From now on completions count; what is under way ends in the measurement and counts too.
    fn begin(&mut self, limits: &Limits) {
        self.phase = Phase::Measuring;
        self.issued = self.driver.under_way() as u64;
        self.count_max = limits.count.unwrap_or(u64::MAX);
    }

    /// Starts the next operation in an idle slot, if there is one.
    #[inline]
    fn issue(&mut self, queue: usize, slot: usize, now: Instant) -> Result<(), RunError> {
        if !self.issuing || self.issued >= self.count_max {
            self.issuing = false;
            return Ok(());
        }
        let Some(step) = self.next_step()? else {
            self.issuing = false;
            return Ok(());
        };
        let len = self.block_bytes;
        let offset = step.offset;
        if let Some(ledger) = &mut self.ledger
            && !step.is_read
        {
            let writer = u16::try_from(queue).unwrap_or(u16::MAX);
            ledger.issue(writer, offset, self.driver.buffer_mut(queue, slot));
        }
        if let Some(state) = self
            .slots
            .get_mut(queue)
            .and_then(|slots| slots.get_mut(slot))
        {
            state.issued = now;
            if let Some(ledger) = &mut self.ledger
                && step.is_read
            {
                ledger.oldest(offset, len, &mut state.oldest);
            }
        }
        let request = if step.is_read {
            Request::Read { offset, len }
        } else {
            Request::Write { offset, len }
        };
        self.driver.submit(queue, slot, request)?;
        self.issued += 1;
        Ok(())
    }

    /// The next step; with a ledger, one that writes to no block which another write is changing.
    #[inline]
    fn next_step(&mut self) -> Result<Option<Step>, RunError> {
        for _ in 0..DRAWS_MAX {
            let Some(step) = self.steps.next_step() else {
                return Ok(None);
            };
            match &mut self.ledger {
                Some(ledger) if !step.is_read && ledger.is_busy(step.offset, self.block_bytes) => {}
                _ => return Ok(Some(step)),
            }
        }
        Err(RunError::Crowded)
    }

    /// A request ended: goes on with its operation, or counts it and starts the next one.
    #[inline]
    fn end(&mut self, queue: usize, ended: Done, now: Instant) -> Result<(), RunError> {
        let mut is_read = false;
        match ended.request {
            Request::Read { offset, .. } => {
                self.check(queue, ended.slot, offset)?;
                is_read = true;
            }
            Request::Write { offset, len } => {
                if let Some(ledger) = &mut self.ledger {
                    ledger.complete(offset, len);
                }
                if self.mix == Mix::WriteFlush {
                    return Ok(self.driver.submit(queue, ended.slot, Request::Flush)?);
                }
            }
            Request::Flush | Request::Discard { .. } | Request::WriteZeroes { .. } => {}
        }
        if self.phase == Phase::Measuring
            && let Some(state) = self
                .slots
                .get(queue)
                .and_then(|slots| slots.get(ended.slot))
        {
            self.result.count(is_read, now - state.issued);
        }
        self.issue(queue, ended.slot, now)
    }

    /// Checks what a read returned.
    #[inline]
    fn check(&mut self, queue: usize, slot: usize, offset: u64) -> Result<(), RunError> {
        let Some(ledger) = &mut self.ledger else {
            return Ok(());
        };
        let Some(state) = self.slots.get(queue).and_then(|slots| slots.get(slot)) else {
            return Ok(());
        };
        let buffer = self.driver.buffer(queue, slot);
        let checked = ledger
            .check(offset, buffer, &state.oldest)
            .map_err(RunError::Mismatch)?;
        self.result.verified_blocks += checked;
        Ok(())
    }
}

/// Reads `start .. start + len` once and checks every stamped block of it. Returns how many there were.
///
/// # Errors
/// A failing request or the first wrong block.
pub fn sweep(
    driver: &mut Driver,
    ledger: &mut Ledger,
    start: u64,
    len: u64,
) -> Result<u64, RunError> {
    let mut checked = 0;
    let mut wrong = None;
    let mut oldest = Vec::new();
    driver.scan(start, len, |offset, bytes| {
        if wrong.is_none() {
            ledger.oldest(offset, bytes.len(), &mut oldest);
            match ledger.check(offset, bytes, &oldest) {
                Ok(blocks) => checked += blocks,
                Err(mismatch) => wrong = Some(mismatch),
            }
        }
    })?;
    debug_assert!(wrong.is_some() || checked == len / STAMP_BYTES as u64);
    wrong.map_or(Ok(checked), |mismatch| Err(RunError::Mismatch(mismatch)))
}
