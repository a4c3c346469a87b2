//! A guest that survives its daemon: random requests, what became of each, and what is to be submitted again.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::lasting::{Base, LastingDriver};
use super::oracle::{Oracle, SECTOR_BYTES, Value, Wrong};
use super::relay::Relay;
use super::rig::QUEUES;
use crate::daemon::DEADLINE;
use crate::load::driver::{Done, Driver, DriverError, Options, Request, Wait};
use crate::load::random::Random;

/// The most sectors of a read or write: 64 KiB.
const TRANSFER_SECTORS_MAX: u64 = 128;
/// The most sectors of a discard or write-zeroes.
const ZERO_SECTORS_MAX: u64 = 256;
/// The most requests under way on a queue.
pub const DEPTH_MAX: usize = 32;
/// How long to wait for the daemon's call before looking whether it was killed.
const LOOK: Duration = Duration::from_millis(2);
/// Places drawn for a change before a read is made instead, since changes do not overlap.
const DRAWS_MAX: u32 = 8;
/// Wrong sectors that are told in full.
const WRONG_TOLD_MAX: usize = 10;

/// What the load consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mix {
    /// Reads, writes, flushes, discards and write-zeroes.
    Everything,
    /// The same without flushes.
    Unflushed,
    /// Reads, writes and flushes.
    Transfers,
}

/// How the guest lives through the death of a daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It connects with rings and memory of its own making each time, and submits again what was cut off.
    Anew,
    /// As one machine with an inflight buffer, to which each request comes back once, over all kills.
    Lasting,
    /// The same, with rings and requests of the independent driver.
    Relayed,
}

/// What went wrong.
#[derive(Debug)]
pub enum Fault {
    /// Sectors hold what they must not: the first of them, and how many.
    Wrong(Vec<Wrong>, u64),
    /// The daemon failed a request, or refused or hung.
    Daemon(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Daemon(what) => f.write_str(what),
            Self::Wrong(wrong, count) => {
                write!(f, "{count} wrong sectors")?;
                wrong.iter().try_for_each(|wrong| write!(f, "\n  {wrong}"))
            }
        }
    }
}

impl From<DriverError> for Fault {
    fn from(error: DriverError) -> Self {
        Self::Daemon(error.to_string())
    }
}

/// A request of the guest's.
#[derive(Clone, Copy, Debug)]
struct Job {
    /// What it is.
    request: Request,
    /// What its sectors hold afterwards, if it changes them.
    value: Option<Value>,
    /// When it was issued, by the oracle's clock.
    issued: u64,
}

impl Job {
    /// Something new.
    fn new(request: Request, value: Option<Value>) -> Self {
        Self {
            request,
            value,
            issued: 0,
        }
    }

    /// Its sectors.
    fn range(&self) -> Range<usize> {
        let (offset, len) = match self.request {
            Request::Read { offset, len } | Request::Write { offset, len } => (offset, len as u64),
            Request::Discard { offset, len } | Request::WriteZeroes { offset, len, .. } => {
                (offset, len)
            }
            Request::Flush => (0, 0),
        };
        let sector = |byte: u64| usize::try_from(byte).expect("64-bit host") / SECTOR_BYTES;
        sector(offset)..sector(offset + len)
    }
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// Read every sector from there on, once. What was cut off stays as it is.
    Verify(u64),
    /// The same after a reboot: what is found is what the disk holds from now on.
    Adopt(u64),
    /// Submit again what was cut off, then new requests without end.
    Load,
    /// So many new requests.
    Part(u64),
    /// Submit again what was cut off.
    Settle,
}

/// A driver of either kind.
#[derive(Debug)]
enum AnyDriver {
    /// With memory and rings of one session only.
    Fresh(Box<Driver>),
    /// With memory and rings that go from daemon to daemon.
    Lasting(Box<LastingDriver>),
    /// The same of the first kind, by a relay.
    Relayed(Box<Driver>, Relay),
}

impl AnyDriver {
    /// Bytes of the disk.
    fn capacity_bytes(&self) -> u64 {
        match self {
            Self::Fresh(driver) | Self::Relayed(driver, _) => driver.capacity_bytes(),
            Self::Lasting(driver) => driver.capacity_bytes(),
        }
    }

    /// Requests under way.
    fn under_way(&self) -> usize {
        match self {
            Self::Fresh(driver) | Self::Relayed(driver, _) => driver.under_way(),
            Self::Lasting(driver) => driver.under_way(),
        }
    }

    /// The buffer of an idle slot.
    fn buffer(&self, queue: usize, slot: usize) -> &[u8] {
        match self {
            Self::Fresh(driver) | Self::Relayed(driver, _) => driver.buffer(queue, slot),
            Self::Lasting(driver) => driver.buffer(queue, slot),
        }
    }

    /// The same, to fill.
    fn buffer_mut(&mut self, queue: usize, slot: usize) -> &mut [u8] {
        match self {
            Self::Fresh(driver) | Self::Relayed(driver, _) => driver.buffer_mut(queue, slot),
            Self::Lasting(driver) => driver.buffer_mut(queue, slot),
        }
    }

    /// Submits a request.
    fn submit(&mut self, queue: usize, slot: usize, request: Request) -> Result<(), DriverError> {
        match self {
            Self::Fresh(driver) | Self::Relayed(driver, _) => driver.submit(queue, slot, request),
            Self::Lasting(driver) => {
                driver.submit(queue, slot, request);
                Ok(())
            }
        }
    }

    /// Tells the daemon of what was submitted.
    fn kick(&mut self, queue: usize) -> Result<(), DriverError> {
        match self {
            Self::Fresh(driver) | Self::Relayed(driver, _) => driver.kick(queue),
            Self::Lasting(driver) => {
                driver.kick(queue);
                Ok(())
            }
        }
    }

    /// Takes what has completed.
    fn poll(&mut self, queue: usize, done: &mut Vec<Done>) -> Result<(), DriverError> {
        match self {
            Self::Fresh(driver) => driver.poll(queue, done),
            Self::Relayed(driver, relay) => {
                driver.poll(queue, done)?;
                match driver.under_way() == 0 && !relay.is_even() {
                    true => Err(DriverError::Bogus { queue }),
                    false => Ok(()),
                }
            }
            Self::Lasting(driver) => driver.poll(queue, done),
        }
    }

    /// Waits for something to complete, for a short time.
    fn wait(&mut self) -> Result<(), DriverError> {
        match self {
            Self::Fresh(driver) | Self::Relayed(driver, _) => driver.wait(),
            Self::Lasting(driver) => {
                driver.wait(LOOK);
                Ok(())
            }
        }
    }

    /// Connects to another daemon what goes from one to the next.
    fn reconnect(&mut self, socket: &Path, base: Base) -> Result<(), DriverError> {
        match self {
            Self::Fresh(_) => Ok(()),
            Self::Lasting(driver) => driver.connect(socket, base),
            Self::Relayed(_, relay) => {
                relay
                    .reconnect(socket, base)
                    .map_err(|source| DriverError::Connect {
                        socket: socket.to_path_buf(),
                        source,
                    })
            }
        }
    }

    /// Lets a daemon go. Returns whether this can be connected to another one.
    fn disconnect(&mut self) -> bool {
        match self {
            Self::Fresh(_) => return false,
            Self::Lasting(driver) => driver.disconnect(),
            Self::Relayed(_, relay) => relay.disconnect(),
        }
        true
    }
}

/// The independent driver, connected.
fn fresh(socket: &Path, depth: usize, buffer_bytes: usize) -> Result<Driver, DriverError> {
    Driver::connect(Options {
        queues: QUEUES,
        depth,
        buffer_bytes,
        wait: Wait::Sleep,
        patience: LOOK,
        ..Options::new(socket)
    })
}

/// A session with a daemon.
#[derive(Debug)]
pub struct Link {
    /// The driver.
    driver: AnyDriver,
    /// By queue and slot: what is under way.
    jobs: Vec<Vec<Option<Job>>>,
    /// Queues and slots with nothing to do.
    idle: Vec<(usize, usize)>,
}

impl Link {
    /// A session with so many idle slots a queue.
    fn new(driver: AnyDriver, depth: usize) -> Self {
        Self {
            driver,
            jobs: vec![vec![None; depth]; QUEUES],
            idle: (0..depth)
                .flat_map(|slot| (0..QUEUES).map(move |queue| (queue, slot)))
                .collect(),
        }
    }
}

/// What a client has done so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Requests that completed.
    pub completed: u64,
    /// Requests that a kill cut off, and that were submitted again, or left to the next daemon.
    pub repeated: u64,
    /// Flushes among those that completed.
    pub flushes: u64,
    /// The longest time in which none completed although some were under way.
    pub longest_pause: Duration,
}

/// The guest.
#[derive(Debug)]
pub struct Client {
    /// What the disk may hold.
    pub oracle: Oracle,
    /// What it has done.
    pub counts: Counts,
    /// Picks requests.
    random: Random,
    /// Which requests.
    mix: Mix,
    /// How many in a hundred are flushes, in this session.
    flush_percent: u64,
    /// What was cut off.
    interrupted: VecDeque<Job>,
    /// How it lives through them.
    life: Life,
    /// That machine, while it has no daemon.
    machine: Option<Link>,
    /// Sectors that held what they must not.
    wrong: Vec<Wrong>,
    /// How many there were.
    wrong_count: u64,
}

impl Client {
    /// A guest of a fresh disk.
    pub fn new(seed: u64, sectors: usize, mix: Mix) -> Self {
        Self {
            oracle: Oracle::new(seed, sectors),
            counts: Counts::default(),
            random: Random::new(seed ^ 0x6c6f_6164),
            mix,
            flush_percent: 0,
            interrupted: VecDeque::new(),
            life: Life::Anew,
            machine: None,
            wrong: Vec::new(),
            wrong_count: 0,
        }
    }

    /// The guest, with another life.
    pub fn living(self, life: Life) -> Self {
        Self { life, ..self }
    }

    /// Starts a session of random depth and with more or fewer flushes, down to none. Everything about it is new but the
    /// socket.
    ///
    /// # Errors
    /// No session could be had.
    pub fn connect(&mut self, socket: &Path) -> Result<Link, Fault> {
        let depth = 1 + usize::try_from(self.random.below(DEPTH_MAX as u64)).expect("small");
        let flushes = usize::try_from(self.random.below(5)).expect("small");
        self.flush_percent = match self.mix {
            Mix::Unflushed => 0,
            Mix::Everything | Mix::Transfers => [0, 0, 1, 4, 25][flushes],
        };
        let transfer = usize::try_from(TRANSFER_SECTORS_MAX).expect("small") * SECTOR_BYTES;
        let link = match self.life {
            Life::Anew => {
                let driver = fresh(socket, depth, transfer)?;
                Link::new(AnyDriver::Fresh(Box::new(driver)), depth)
            }
            Life::Lasting | Life::Relayed => self.reconnect(socket, transfer)?,
        };
        let bytes = self.oracle.len() * SECTOR_BYTES;
        if link.driver.capacity_bytes() != bytes as u64 {
            let found = link.driver.capacity_bytes();
            return Err(Fault::Daemon(format!("{found} bytes instead of {bytes}")));
        }
        Ok(link)
    }

    /// Connects the machine, which is started if it was not.
    fn reconnect(&mut self, socket: &Path, buffer_bytes: usize) -> Result<Link, Fault> {
        let base = [Base::Used, Base::Available][usize::from(self.random.below(2) == 1)];
        let mut link = match (self.machine.take(), self.life) {
            (Some(link), _) => link,
            (None, Life::Relayed) => {
                let failed = |source| DriverError::Connect {
                    socket: socket.to_path_buf(),
                    source,
                };
                let relay = Relay::start(socket).map_err(failed)?;
                let driver = fresh(relay.socket(), DEPTH_MAX, buffer_bytes)?;
                let driver = AnyDriver::Relayed(Box::new(driver), relay);
                return Ok(Link::new(driver, DEPTH_MAX));
            }
            (None, _) => {
                let driver = LastingDriver::new(DEPTH_MAX, buffer_bytes);
                Link::new(AnyDriver::Lasting(Box::new(driver)), DEPTH_MAX)
            }
        };
        match link.driver.reconnect(socket, base) {
            Ok(()) => Ok(link),
            Err(error) => {
                self.machine = Some(link);
                Err(error.into())
            }
        }
    }

    /// Ends the session of a daemon that lives, with nothing under way.
    pub fn leave(&mut self, mut link: Link) {
        if link.driver.disconnect() {
            self.machine = Some(link);
        }
    }

    /// Reads and checks the whole disk. Returns whether that was done before `stop`.
    ///
    /// # Errors
    /// What the disk must not hold, or a daemon that fails.
    pub fn verify(&mut self, link: &mut Link, stop: &AtomicBool) -> Result<bool, Fault> {
        self.drive(link, Work::Verify(0), stop)
    }

    /// The same after the host was rebooted, and the guest with it.
    ///
    /// # Errors
    /// What the disk must not hold, or a daemon that fails.
    pub fn adopt(&mut self, link: &mut Link, stop: &AtomicBool) -> Result<bool, Fault> {
        self.interrupted.clear();
        self.drive(link, Work::Adopt(0), stop)
    }

    /// Submits again what was cut off, and new requests until `stop`.
    ///
    /// # Errors
    /// What the disk must not hold, or a daemon that fails.
    pub fn load(&mut self, link: &mut Link, stop: &AtomicBool) -> Result<(), Fault> {
        self.drive(link, Work::Load, stop).map(drop)
    }

    /// So many new requests, to their end, after which what was there before them is forgotten: nothing may be lost.
    ///
    /// # Errors
    /// What the disk must not hold, or a daemon that fails.
    pub fn load_part(&mut self, link: &mut Link, requests: u64) -> Result<(), Fault> {
        let never = AtomicBool::new(false);
        self.drive(link, Work::Part(requests), &never)?;
        self.oracle.settle();
        Ok(())
    }

    /// Submits again what was cut off and waits for it. Returns whether that was done before `stop`.
    ///
    /// # Errors
    /// What the disk must not hold, or a daemon that fails.
    pub fn settle(&mut self, link: &mut Link, stop: &AtomicBool) -> Result<bool, Fault> {
        self.drive(link, Work::Settle, stop)
    }

    /// Writes and flushes the whole disk once.
    ///
    /// # Errors
    /// A daemon that fails.
    pub fn overwrite_all(&mut self, link: &mut Link) -> Result<(), Fault> {
        let all = self.oracle.len() as u64;
        let step = usize::try_from(TRANSFER_SECTORS_MAX).expect("small");
        for sector in (0..all).step_by(step) {
            let value = self.oracle.new_write();
            let count = TRANSFER_SECTORS_MAX.min(all - sector);
            self.interrupted
                .push_back(Job::new(write_of(sector, count), Some(value)));
        }
        let never = AtomicBool::new(false);
        self.settle(link, &never)?;
        self.interrupted.push_back(Job::new(Request::Flush, None));
        self.settle(link, &never).map(drop)
    }

    /// Ends the session of a daemon that has died: what it completed before counts, all else was cut off.
    ///
    /// # Errors
    /// What a read that completed must not have returned.
    pub fn bury(&mut self, mut link: Link) -> Result<(), Fault> {
        self.collect(&mut link, false)?;
        if link.driver.disconnect() {
            self.counts.repeated += link.driver.under_way() as u64;
            self.machine = Some(link);
            return self.judge();
        }
        let mut cut_off: Vec<Job> = link.jobs.drain(..).flatten().flatten().collect();
        self.counts.repeated += cut_off.len() as u64;
        self.random.shuffle(&mut cut_off);
        self.interrupted.extend(cut_off);
        self.oracle.killed();
        self.judge()
    }

    /// The same of a back-end of which it is counted what it loses. Returns the requests that were cut off.
    ///
    /// # Errors
    /// What a read that completed must not have returned.
    pub fn bury_for_good(&mut self, mut link: Link) -> Result<u64, Fault> {
        self.collect(&mut link, false)?;
        self.judge()?;
        Ok(link.jobs.iter().flatten().flatten().count() as u64)
    }

    /// Keeps a session busy until `stop`, or until the work is done: true.
    fn drive(&mut self, link: &mut Link, mut work: Work, stop: &AtomicBool) -> Result<bool, Fault> {
        let adopting = matches!(work, Work::Adopt(_));
        let mut progress = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            while let Some(&place) = link.idle.last() {
                let Some(job) = self.next_job(&mut work) else {
                    break;
                };
                link.idle.pop();
                self.issue(link, place, job)?;
            }
            for queue in 0..QUEUES {
                link.driver.kick(queue)?;
            }
            if link.driver.under_way() == 0 {
                return self.judge().map(|()| true);
            }
            if self.collect(link, adopting)? {
                self.counts.longest_pause = self.counts.longest_pause.max(progress.elapsed());
                progress = Instant::now();
                if work == Work::Load {
                    self.judge()?;
                }
                continue;
            }
            match link.driver.wait() {
                Ok(()) | Err(DriverError::Stuck { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            if progress.elapsed() > DEADLINE {
                let jobs: Vec<_> = link.jobs.iter().flatten().flatten().take(4).collect();
                return Err(Fault::Daemon(format!("it hangs; under way: {jobs:?}, ...")));
            }
        }
        Ok(false)
    }

    /// Fails if wrong sectors were found.
    fn judge(&mut self) -> Result<(), Fault> {
        match self.wrong_count {
            0 => Ok(()),
            count => Err(Fault::Wrong(std::mem::take(&mut self.wrong), count)),
        }
    }

    /// The next request of some work.
    fn next_job(&mut self, work: &mut Work) -> Option<Job> {
        match work {
            Work::Verify(next) | Work::Adopt(next) => {
                let left = (self.oracle.len() as u64).checked_sub(*next)?;
                let count = TRANSFER_SECTORS_MAX.min(left);
                let job = Job::new(read_of(*next, count), None);
                *next += count;
                (count > 0).then_some(job)
            }
            Work::Settle => self.interrupted.pop_front(),
            Work::Part(left) => {
                *left = left.checked_sub(1)?;
                Some(self.new_job())
            }
            Work::Load => Some(match self.interrupted.pop_front() {
                Some(job) => job,
                None => self.new_job(),
            }),
        }
    }

    /// Something new.
    fn new_job(&mut self) -> Job {
        if self.random.below(100) < self.flush_percent {
            return Job::new(Request::Flush, None);
        }
        let kind = self.random.below(100);
        let zeroes = kind < 12 && self.mix != Mix::Transfers;
        if zeroes || kind < 60 {
            for _ in 0..DRAWS_MAX {
                let max = if zeroes {
                    ZERO_SECTORS_MAX
                } else {
                    TRANSFER_SECTORS_MAX
                };
                let (sector, count) = self.place(max);
                let (offset, len) = (bytes_of(sector), bytes_of(count));
                let request = match kind {
                    _ if !zeroes => write_of(sector, count),
                    ..6 => Request::Discard { offset, len },
                    _ => Request::WriteZeroes {
                        offset,
                        len,
                        unmap: kind.is_multiple_of(2),
                    },
                };
                let job = Job::new(request, None);
                if self.oracle.is_free(job.range()) {
                    let value = if zeroes {
                        Value::Zeroes
                    } else {
                        self.oracle.new_write()
                    };
                    return Job {
                        value: Some(value),
                        ..job
                    };
                }
            }
        }
        let (sector, count) = self.place(TRANSFER_SECTORS_MAX);
        Job::new(read_of(sector, count), None)
    }

    /// A first sector and a number of sectors: often few, often whole clusters, often in an eighth of the disk.
    fn place(&mut self, max: u64) -> (u64, u64) {
        let shape = self.random.below(6);
        let mut count = match shape {
            0 => 1,
            1 | 2 => 8,
            3 => 1 + self.random.below(16),
            _ => 1 + self.random.below(max),
        };
        let mut all = self.oracle.len() as u64;
        if self.random.below(2) == 0 {
            all = (all / 8).max(max);
        }
        let mut sector = self.random.below(all - count + 1);
        if shape == 2 || shape == 5 {
            sector -= sector % 8;
            count = count.next_multiple_of(8).min(max);
        }
        // The end of a disk need not be that of a cluster.
        count = count.min(self.oracle.len() as u64 - sector);
        (sector, count)
    }

    /// Puts a request into an idle slot.
    fn issue(
        &mut self,
        link: &mut Link,
        (queue, slot): (usize, usize),
        mut job: Job,
    ) -> Result<(), Fault> {
        job.issued = self.oracle.now();
        if let Some(value) = job.value {
            self.oracle.begin(job.range(), value);
        }
        if let (Request::Write { offset, len }, Some(value)) = (job.request, job.value) {
            let buffer = &mut link.driver.buffer_mut(queue, slot)[..len];
            self.oracle
                .fill(offset / SECTOR_BYTES as u64, value, buffer);
        }
        link.driver.submit(queue, slot, job.request)?;
        link.jobs[queue][slot] = Some(job);
        Ok(())
    }

    /// Takes what has completed. Returns whether there was anything.
    fn collect(&mut self, link: &mut Link, adopting: bool) -> Result<bool, Fault> {
        let mut any = false;
        for queue in 0..QUEUES {
            let mut done: Vec<Done> = Vec::new();
            link.driver.poll(queue, &mut done)?;
            for Done { slot, .. } in done {
                any = true;
                let job = link.jobs[queue][slot]
                    .take()
                    .expect("the driver knows its own");
                link.idle.push((queue, slot));
                self.ended(job, link.driver.buffer(queue, slot), adopting);
            }
        }
        Ok(any)
    }

    /// A request was acknowledged.
    fn ended(&mut self, job: Job, buffer: &[u8], adopting: bool) {
        self.counts.completed += 1;
        match job.request {
            Request::Flush => {
                self.counts.flushes += 1;
                self.oracle.flushed(job.issued);
            }
            Request::Read { offset, len } => {
                let sectors = offset / SECTOR_BYTES as u64..;
                // One by one, so that all wrong ones are counted.
                for (sector, bytes) in sectors.zip(buffer[..len].chunks_exact(SECTOR_BYTES)) {
                    let checked = if adopting {
                        self.oracle.adopt(sector, bytes)
                    } else {
                        self.oracle.check(sector, bytes, job.issued)
                    };
                    if let Err(wrong) = checked {
                        self.wrong_count += 1;
                        if self.wrong.len() < WRONG_TOLD_MAX {
                            self.wrong.push(wrong);
                        }
                    }
                }
            }
            _ => self.oracle.complete(job.range()),
        }
    }
}

/// Sectors in bytes.
fn bytes_of(sectors: u64) -> u64 {
    sectors * SECTOR_BYTES as u64
}

/// A read of whole sectors.
fn read_of(sector: u64, count: u64) -> Request {
    Request::Read {
        offset: bytes_of(sector),
        len: usize::try_from(bytes_of(count)).expect("64-bit host"),
    }
}

/// A write of whole sectors.
fn write_of(sector: u64, count: u64) -> Request {
    Request::Write {
        offset: bytes_of(sector),
        len: usize::try_from(bytes_of(count)).expect("64-bit host"),
    }
}
