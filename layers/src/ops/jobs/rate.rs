//! Keeping a job to so many bytes a second: a token bucket that may be overdrawn by one piece.

use std::time::{Duration, Instant};

/// How much of its rate a job may have saved up.
const BURST: Duration = Duration::from_millis(250);

/// What a job may still copy now.
#[derive(Debug, Default)]
pub(crate) struct Bucket {
    /// Since when, and to what rate; `None` without one.
    filling: Option<(Instant, u64)>,
    /// Bytes, below 0 if it was overdrawn.
    tokens: i128,
}

impl Bucket {
    /// So much was copied, at this time. Returns how long to wait before the next piece.
    pub(crate) fn took(&mut self, bytes: u64, rate: Option<u64>, now: Instant) -> Duration {
        let Some(rate) = rate.filter(|rate| *rate > 0) else {
            *self = Self::default();
            return Duration::ZERO;
        };
        match self.filling {
            Some((since, of)) if of == rate => {
                let filled = now.saturating_duration_since(since).as_nanos() * u128::from(rate)
                    / 1_000_000_000;
                let most = i128::from(rate) * i128::try_from(BURST.as_millis()).unwrap_or(0) / 1000;
                let filled = i128::try_from(filled).unwrap_or(i128::MAX);
                self.tokens = self.tokens.saturating_add(filled).min(most);
            }
            _ => self.tokens = 0,
        }
        self.filling = Some((now, rate));
        self.tokens = self.tokens.saturating_sub(i128::from(bytes));
        if self.tokens >= 0 {
            return Duration::ZERO;
        }
        let missing = self.tokens.unsigned_abs();
        let nanoseconds = missing.saturating_mul(1_000_000_000) / u128::from(rate);
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_kept_and_no_rate_is_no_wait() {
        let start = Instant::now();
        let mut bucket = Bucket::default();
        assert_eq!(bucket.took(1 << 30, None, start), Duration::ZERO);
        assert_eq!(bucket.took(1 << 30, Some(0), start), Duration::ZERO);
        let mut now = start;
        let mut bytes = 0;
        while bytes < 10_000_000 {
            bytes += 100_000;
            now += bucket.took(100_000, Some(1_000_000), now);
        }
        let took = now - start;
        assert!(
            took >= Duration::from_millis(9_900) && took <= Duration::from_millis(10_100),
            "{took:?}"
        );
    }

    #[test]
    fn what_was_saved_up_is_bounded() {
        let start = Instant::now();
        let mut bucket = Bucket::default();
        bucket.took(1, Some(1000), start);
        let later = start + Duration::from_secs(3600);
        assert_eq!(bucket.took(250, Some(1000), later), Duration::ZERO);
        assert_eq!(bucket.took(1000, Some(1000), later), Duration::from_secs(1));
    }
}
