//! How long each request of a guest waits while commands run and while none does.
//!
//! The guest sleeps between its requests, which come one at a time at fixed instants: so the machine is idle most of the time
//! even with two CPUs, and what a request waits for is the daemon and not its turn on a CPU.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::load::driver::{Done, Driver, DriverError, Options, Request};
use crate::load::random::Random;

/// Requests that may be under way: those that come while an earlier one waits.
const DEPTH: usize = 8;
/// From one request to the next.
const PERIOD: Duration = Duration::from_micros(500);
/// Bytes of a request.
const BLOCK: usize = 4096;
/// The part of the disk that is in use, so that a pass through the commands has little to move.
const WORKING_SET: u64 = 8 << 20;

/// A request that has ended.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// What it was.
    pub kind: &'static str,
    /// When it was submitted.
    pub since: Instant,
    /// When its end was seen.
    pub until: Instant,
}

/// A guest of one disk.
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
    /// A guest of the disk at this socket.
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

    /// Uses the disk until `stop`, and until all requests have ended.
    ///
    /// # Errors
    /// A back-end that fails.
    pub fn run(&mut self, stop: &AtomicBool) -> Result<Vec<Ended>, DriverError> {
        let mut ended = Vec::new();
        let mut done: Vec<Done> = Vec::new();
        let mut next = Instant::now();
        loop {
            let stopping = stop.load(Ordering::Relaxed);
            if stopping && self.driver.under_way() == 0 {
                return Ok(ended);
            }
            let now = Instant::now();
            if !stopping
                && now >= next
                && let Some(slot) = self.idle.pop()
            {
                self.submit(slot)?;
                self.driver.kick(0)?;
                // What could not be submitted in time is left out.
                next = (next + PERIOD).max(now);
            }
            // With all slots taken there is nothing to do before one of them ends.
            self.driver
                .wait_until(next.max(Instant::now() + PERIOD / 2))?;
            self.driver.poll(0, &mut done)?;
            let until = Instant::now();
            for Done { slot, request } in done.drain(..) {
                ended.push(Ended {
                    kind: match request {
                        Request::Read { .. } => "read",
                        Request::Write { .. } => "write",
                        _ => "flush",
                    },
                    since: self.since[slot],
                    until,
                });
                self.idle.push(slot);
            }
        }
    }

    /// Submits a request.
    fn submit(&mut self, slot: usize) -> Result<(), DriverError> {
        let blocks = self.driver.capacity_bytes().min(WORKING_SET) / BLOCK as u64;
        let offset = self.random.below(blocks) * BLOCK as u64;
        let request = match self.random.below(100) {
            0..40 => Request::Read { offset, len: BLOCK },
            40..80 => Request::Write { offset, len: BLOCK },
            _ => Request::Flush,
        };
        if let Request::Write { .. } = request {
            self.random.fill(self.driver.buffer_mut(0, slot));
        }
        self.since[slot] = Instant::now();
        self.driver.submit(0, slot, request)
    }
}
