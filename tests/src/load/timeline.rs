//! How many operations completed in each slice of a run's time: a stall shows here that an average hides.

use std::time::Duration;

/// Slices that are kept; what comes later counts in the last one.
const SLICES_MAX: usize = 1 << 20;

/// Completions by time.
#[derive(Clone, Debug)]
pub struct Timeline {
    /// The length of a slice.
    slice: Duration,
    /// Completions in each.
    counts: Vec<u64>,
}

impl Timeline {
    /// A timeline in slices of this length, or `None` if that is nothing.
    pub fn new(slice: Duration) -> Option<Self> {
        (!slice.is_zero()).then(|| Self {
            slice,
            counts: Vec::new(),
        })
    }

    /// Counts completions at a time since the beginning.
    #[inline]
    pub fn count(&mut self, at: Duration, completions: u64) {
        let slice = (at.as_nanos() / self.slice.as_nanos()).try_into();
        let index = slice.unwrap_or(SLICES_MAX).min(SLICES_MAX - 1);
        if index >= self.counts.len() {
            self.counts.resize(index + 1, 0);
        }
        if let Some(count) = self.counts.get_mut(index) {
            *count += completions;
        }
    }

    /// The length of a slice.
    pub fn slice(&self) -> Duration {
        self.slice
    }

    /// Completions in each slice, up to the last with any.
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completions_count_in_the_slice_of_their_time() {
        let ms = Duration::from_millis;
        assert!(Timeline::new(Duration::ZERO).is_none());
        let mut timeline = Timeline::new(ms(10)).into_iter().next();
        if let Some(timeline) = &mut timeline {
            timeline.count(ms(0), 1);
            timeline.count(ms(9), 2);
            timeline.count(ms(30), 4);
        }
        let counts = timeline.map(|timeline| timeline.counts().to_vec());
        assert_eq!(counts, Some(vec![3, 0, 0, 4]));
    }
}
