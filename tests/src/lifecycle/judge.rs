//! Whether commands make requests wait, judged by many short times with a command and as many without.
//!
//! The host does other things too, and now and then keeps a request waiting for longer than any command does. So not the
//! longest wait of all counts, but what the longest waits of a quarter, of half and of three quarters of the times do not
//! exceed: with a command these may be longer than without by no more than is allowed. Nothing that was measured is ever
//! thrown away, so measuring on cannot hide what was seen. And a judgement counts only if a wait that the test itself makes,
//! in the same way and as often, is noticed by the same measure.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// What a command may add to the longest wait of a request.
pub const ALLOWED: Duration = Duration::from_millis(2);
/// Times of each kind, before anything is said.
const TIMES_MIN: usize = 8;

/// The longest wait of a request in each of many short times.
#[derive(Clone, Debug, Default)]
pub struct Waits {
    /// Without any command.
    pub quiet: Vec<Duration>,
    /// With a command, by its name.
    pub busy: BTreeMap<&'static str, Vec<Duration>>,
    /// With a wait that the test has made.
    pub planted: Vec<Duration>,
}

/// What there is to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No command makes requests wait, and if one did, it would have been noticed.
    Fine,
    /// There are not enough times yet.
    TooFew,
    /// The host makes requests wait for so long that a command could not be told from it.
    TooNoisy,
    /// This command does.
    Waits(&'static str),
}

/// The times that a quarter, a half, and three quarters of these do not exceed.
fn quarters(times: &[Duration]) -> [Duration; 3] {
    let mut times = times.to_vec();
    times.sort_unstable();
    [1, 2, 3].map(|quarter| {
        let at = times.len() * quarter / 4;
        times.get(at).copied().unwrap_or_default()
    })
}

impl Waits {
    /// By how much these times are longer than those without a command, where that is most.
    fn excess(&self, times: &[Duration]) -> Duration {
        let pairs = quarters(times).into_iter().zip(quarters(&self.quiet));
        let excess = pairs.map(|(with, without)| with.saturating_sub(without));
        excess.max().unwrap_or_default()
    }

    /// Judges.
    pub fn verdict(&self) -> Verdict {
        let mut all = self.busy.values().chain([&self.quiet, &self.planted]);
        if self.busy.is_empty() || all.any(|times| times.len() < TIMES_MIN) {
            return Verdict::TooFew;
        }
        let excesses = (self.busy.iter()).map(|(name, times)| (self.excess(times), *name));
        if let Some((excess, name)) = excesses.max()
            && excess > ALLOWED
        {
            return Verdict::Waits(name);
        }
        // In each quarter, so that also what a command does only now and then is noticed.
        let pairs = quarters(&self.planted)
            .into_iter()
            .zip(quarters(&self.quiet));
        let mut hidden = pairs.filter(|(with, without)| with.saturating_sub(*without) <= ALLOWED);
        match hidden.next() {
            None => Verdict::Fine,
            Some(_) => Verdict::TooNoisy,
        }
    }
}

impl fmt::Display for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "longest wait of a request, in ms: a quarter, a half, three quarters of the times, and the longest"
        )?;
        let mut line = |name: &str, times: &Vec<Duration>| {
            let longest = times.iter().max().copied().unwrap_or_default();
            let [quarter, half, three, longest] = {
                let [quarter, half, three] = quarters(times);
                [quarter, half, three, longest].map(|time| time.as_secs_f64() * 1e3)
            };
            let count = times.len();
            writeln!(
                f,
                "{name:<30} {quarter:7.2} {half:7.2} {three:7.2} {longest:7.2}   {count} times"
            )
        };
        line("(no command)", &self.quiet)?;
        for (name, times) in &self.busy {
            line(name, times)?;
        }
        line("(the daemon stopped for 5 ms)", &self.planted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::random::Random;

    /// Times of a host that makes requests wait for 0.2 ms, and in so many of a hundred times for up to 8 ms, plus a wait of
    /// so many microseconds, in so many of a hundred.
    fn times(random: &mut Random, noisy: u64, micros: u64, percent: u64) -> Vec<Duration> {
        let mut time = || {
            let noise = if random.below(100) < noisy {
                random.below(8000)
            } else {
                random.below(200)
            };
            let wait = if random.below(100) < percent {
                micros
            } else {
                0
            };
            Duration::from_micros(200 + noise.max(wait))
        };
        (0..24).map(|_| time()).collect()
    }

    /// What a host that is so noisy shows, of a command that makes requests wait like that.
    fn waits(seed: u64, noisy: u64, micros: u64, percent: u64) -> Waits {
        let mut random = Random::new(seed);
        let mut times = |micros, percent| times(&mut random, noisy, micros, percent);
        Waits {
            quiet: (0..10).flat_map(|_| times(0, 0)).collect(),
            busy: BTreeMap::from([
                ("harmless", times(300, 100)),
                ("tested", times(micros, percent)),
            ]),
            planted: times(5000, 100),
        }
    }

    #[test]
    fn a_command_that_makes_requests_wait_is_named() {
        for seed in 0..200 {
            for noisy in [0, 5, 10] {
                let verdict = waits(seed, noisy, 3000, 100).verdict();
                assert_eq!(verdict, Verdict::Waits("tested"), "{seed} {noisy}");
            }
            let verdict = waits(seed, 5, 3000, 60).verdict();
            assert_eq!(verdict, Verdict::Waits("tested"), "{seed}: now and then");
        }
    }

    #[test]
    fn what_is_allowed_is_no_wait() {
        for seed in 0..200 {
            for noisy in [0, 3] {
                let verdict = waits(seed, noisy, 1500, 100).verdict();
                assert_eq!(verdict, Verdict::Fine, "{seed} {noisy}");
            }
        }
    }

    #[test]
    fn nothing_is_said_where_nothing_can_be_told() {
        let mut none = Waits::default();
        assert_eq!(none.verdict(), Verdict::TooFew);
        none = waits(1, 0, 0, 0);
        none.planted.truncate(TIMES_MIN - 1);
        assert_eq!(none.verdict(), Verdict::TooFew);
        for seed in 0..200 {
            let verdict = waits(seed, 100, 0, 0).verdict();
            assert_ne!(verdict, Verdict::Fine, "{seed}");
        }
        // The daemon was not stopped, or nobody was served meanwhile: the measure sees nothing.
        let mut blind = waits(1, 0, 0, 0);
        blind.planted.clone_from(&blind.quiet);
        assert_eq!(blind.verdict(), Verdict::TooNoisy);
    }
}
