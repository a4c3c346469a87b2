//! How long a request waits while commands run, against how long without any.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::load::driver::{Done, Driver, DriverError, Options, Request};
use crate::load::random::Random;

/// Requests under way.
const DEPTH: usize = 32;
/// Bytes of a request.
const BLOCK: usize = 4096;

/// What was seen of the requests of a time.
#[derive(Clone, Copy, Debug)]
pub struct Gaps {
    /// The longest that one took.
    pub longest: Duration,
    /// When that one was submitted.
    pub since: Instant,
    /// How many there were.
    pub count: u64,
}

/// Random reads and writes of one disk.
#[derive(Debug)]
pub struct Load {
    /// The driver.
    driver: Driver,
    /// When the request in each slot was submitted.
    since: Vec<Instant>,
    /// Slots with nothing to do.
    idle: Vec<usize>,
    /// Picks requests.
    random: Random,
}

impl Load {
    /// A load at queue depth 32.
    ///
    /// # Errors
    /// No session could be had.
    pub fn new(socket: &Path, seed: u64) -> Result<Self, DriverError> {
        let driver = Driver::connect(Options {
            depth: DEPTH,
            buffer_bytes: BLOCK,
            ..Options::new(socket)
        })?;
        Ok(Self {
            driver,
            since: vec![Instant::now(); DEPTH],
            idle: (0..DEPTH).collect(),
            random: Random::new(seed),
        })
    }

    /// Keeps the disk busy until `stop`.
    ///
    /// # Errors
    /// A back-end that fails.
    pub fn run(&mut self, stop: &AtomicBool) -> Result<Gaps, DriverError> {
        let mut gaps = Gaps {
            longest: Duration::ZERO,
            since: Instant::now(),
            count: 0,
        };
        let mut done: Vec<Done> = Vec::new();
        loop {
            let stopping = stop.load(Ordering::Relaxed);
            while let Some(slot) = self.idle.pop_if(|_| !stopping) {
                self.submit(slot)?;
            }
            self.driver.kick(0)?;
            if self.driver.under_way() == 0 {
                return Ok(gaps);
            }
            self.driver.wait_for(0, &mut done)?;
            for ended in done.drain(..) {
                let since = self.since[ended.slot];
                let took = since.elapsed();
                if took > gaps.longest {
                    (gaps.longest, gaps.since) = (took, since);
                }
                gaps.count += 1;
                self.idle.push(ended.slot);
            }
        }
    }

    /// Submits a request.
    fn submit(&mut self, slot: usize) -> Result<(), DriverError> {
        let blocks = self.driver.capacity_bytes() / BLOCK as u64;
        let offset = self.random.below(blocks) * BLOCK as u64;
        let request = match self.random.below(100) {
            0..40 => Request::Read { offset, len: BLOCK },
            40..99 => Request::Write { offset, len: BLOCK },
            _ => Request::Flush,
        };
        if let Request::Write { .. } = request {
            self.random.fill(self.driver.buffer_mut(0, slot));
        }
        self.since[slot] = Instant::now();
        self.driver.submit(0, slot, request)
    }
}
