//! Who carries out jobs: a thread of the daemon, or a simulation that takes one step after the other.

use std::time::{Duration, Instant};

use crate::ops::merge::{Patience, Turn};
use crate::store::Store;

/// The first wait for requests under way; doubled until `PAUSE_MAX`.
const PAUSE_MIN: Duration = Duration::from_micros(50);
/// The longest such wait.
const PAUSE_MAX: Duration = Duration::from_millis(5);
/// How long nothing to do lasts without another look. A net: who adds a job wakes the thread.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

impl Store {
    /// Carries out jobs, the oldest first, until the store is closed: for a thread of its own. Returns `false` once it is
    /// closed, and `true` after each step or wait.
    pub fn run_jobs(&self) -> bool {
        let seen = {
            let board = self.jobs.board();
            if board.closed {
                return false;
            }
            board.changes
        };
        let (turn, rate) = self.take_turn(Patience::Wait);
        let pause = {
            let mut board = self.jobs.board();
            match turn {
                Turn::Idle => LOOK_AGAIN,
                Turn::Waits => {
                    board.pause = (board.pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
                    board.pause
                }
                Turn::Aside => {
                    board.pause = Duration::ZERO;
                    Duration::ZERO
                }
                Turn::Moved(bytes) => {
                    board.pause = Duration::ZERO;
                    board.bucket.took(bytes, rate, Instant::now())
                }
            }
        };
        if !pause.is_zero() {
            self.jobs.sleep(seen, Some(pause));
        }
        !self.jobs.board().closed
    }

    /// Takes one step of the oldest job that is not paused or stopped, without any wait: for simulations. Returns whether
    /// there was one; it may have been no more than a look at whether requests under way have ended.
    pub fn job_step(&self) -> bool {
        let (turn, _) = self.take_turn(Patience::Try);
        turn != Turn::Idle
    }

    /// Has what is moved committed after so many bytes: for tests, whose disks are smaller than a step.
    pub fn set_job_step_bytes(&self, bytes: u64) {
        self.jobs.board().step_bytes = bytes.max(1);
    }
}
