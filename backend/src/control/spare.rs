//! Descriptors that are kept so that commands can be given where the process has no other one left: without them nobody
//! could detach anything. Opened before anything else they have the lowest numbers, so that they are of use even to a
//! process whose limit is lowered while it runs.

use crate::signal::Signal;

/// How many are kept.
const SPARE: usize = 4;

/// What is kept: descriptors that are of no use but to be closed.
#[derive(Debug, Default)]
pub struct Spare(Vec<Signal>);

impl Spare {
    /// As many as the host allows.
    pub fn new() -> Self {
        let mut spare = Self::default();
        spare.refill();
        spare
    }

    /// Makes up for what was given away, as far as the host allows. Returns whether that is all of it.
    pub fn refill(&mut self) -> bool {
        while self.0.len() < SPARE
            && let Ok(signal) = Signal::new()
        {
            self.0.push(signal);
        }
        self.0.len() == SPARE
    }

    /// Gives one away, for whoever opens something next. Returns whether there was one.
    pub fn give(&mut self) -> bool {
        self.0.pop().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_away_is_made_up_for() {
        let mut spare = Spare::new();
        assert!((0..SPARE).all(|_| spare.give()));
        assert!(!spare.give());
        assert!(spare.refill());
        assert!(spare.give());
    }
}
