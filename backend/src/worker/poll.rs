//! How long a worker looks at its rings before it sleeps.
//!
//! A short wait is cheaper looked at than slept through; a long one wastes a processor that a guest may need. The
//! length of the last sleep tells which it was: after a short one the budget grows, since looking would probably have
//! caught what came (most of a short sleep is the time that waking takes); after a long one it shrinks, down to nothing.

use std::time::Duration;

/// The longest that a worker looks.
pub const POLL_MAX: Duration = Duration::from_micros(50);
/// The longest sleep that counts as short: a wait of `POLL_MAX` and what waking a thread may cost on top.
const SLEEP_SHORT: Duration = Duration::from_micros(150);
/// Where looking starts, and below which it ends.
const POLL_MIN: Duration = Duration::from_micros(4);

/// How long to look before sleeping.
#[derive(Clone, Copy, Debug)]
pub struct PollBudget {
    /// The length, zero or between the bounds.
    now: Duration,
    /// Whether to look at all.
    enabled: bool,
}

impl PollBudget {
    /// A budget that starts with nothing. On one processor looking only keeps others from working.
    pub fn new(processors: usize) -> Self {
        Self {
            now: Duration::ZERO,
            enabled: processors > 1,
        }
    }

    /// A budget for this machine, whichever of its processors this process may use: a guest may run on the others.
    pub fn for_this_machine() -> Self {
        let online = std::fs::read_to_string("/sys/devices/system/cpu/online");
        // "0-3" or "0,2": anything but a single number is more than one. Where nobody says, one is assumed.
        let several = online.is_ok_and(|list| list.trim().parse::<u32>().is_err());
        Self::new(if several { 2 } else { 1 })
    }

    /// How long to look now.
    pub fn length(&self) -> Duration {
        self.now
    }

    /// Notes that the worker slept this long before something came.
    pub fn slept(&mut self, time: Duration) {
        if !self.enabled {
            return;
        }
        self.now = if time <= SLEEP_SHORT {
            (self.now * 2).clamp(POLL_MIN, POLL_MAX)
        } else {
            let half = self.now / 2;
            if half < POLL_MIN {
                Duration::ZERO
            } else {
                half
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_on_short_sleeps_and_ends_after_long_ones() {
        let mut budget = PollBudget::new(2);
        assert_eq!(budget.length(), Duration::ZERO);
        budget.slept(Duration::from_millis(5));
        assert_eq!(budget.length(), Duration::ZERO);
        for _ in 0..10 {
            budget.slept(Duration::from_micros(10));
        }
        assert_eq!(budget.length(), POLL_MAX);
        for _ in 0..4 {
            budget.slept(Duration::from_millis(1));
        }
        assert_eq!(budget.length(), Duration::ZERO);
        let mut single = PollBudget::new(1);
        single.slept(Duration::from_micros(1));
        assert_eq!(single.length(), Duration::ZERO);
    }
}
