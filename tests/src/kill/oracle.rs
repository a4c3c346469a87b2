//! What each sector of one disk may hold while its daemon is killed again and again.
//!
//! A sector goes through *values*: what the base holds, zeroes, or the number of a write. Every value determines all 512
//! bytes, different ones for each sector and each run, so that a wrong sector also tells what it holds instead.
//!
//! A read beside a change of the same sector, or after a kill that cut the change off, may see words of both values: nobody
//! promises a guest otherwise before the change was acknowledged. After a reboot sectors are whole.
//!
//! INVARIANT: at most one change of a sector is under way, so its values are in order; `settled` is never empty.

use std::fmt;
use std::ops::Range;

use crate::load::random::mix;

/// Bytes of a sector.
pub const SECTOR_BYTES: usize = 512;
/// Words of a sector.
const WORDS: usize = SECTOR_BYTES / 8;
/// The first word of each sector that is not zeroes.
const MAGIC: u64 = u64::from_le_bytes(*b"SURVIVOR");

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// Zeroes.
    Zeroes,
    /// What the base has there.
    Base,
    /// What this write put there.
    Write(u64),
}

impl Value {
    /// The number in the bytes of a sector.
    fn number(self) -> u64 {
        match self {
            Self::Zeroes | Self::Base => 0,
            Self::Write(number) => number,
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zeroes => f.write_str("zeroes"),
            Self::Base => f.write_str("the base"),
            Self::Write(number) => write!(f, "write {number}"),
        }
    }
}

/// A value that was acknowledged.
#[derive(Clone, Copy, Debug)]
struct Settled {
    /// The value.
    value: Value,
    /// When that was seen.
    at: u64,
}

/// The state of a sector.
#[derive(Clone, Debug)]
struct Sector {
    /// The acknowledged values that may still be of interest, the last one last.
    settled: Vec<Settled>,
    /// The value that a change gives it which is under way, or was cut off.
    next: Option<Value>,
}

/// What a sector may hold.
#[derive(Clone, Debug)]
struct Allowed {
    /// Any of these, in order.
    values: Vec<Value>,
    /// Whether words of two neighbours will do.
    mixed: bool,
}

/// A sector that does not hold what it must.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// Which one.
    pub sector: u64,
    /// What it may hold.
    pub allowed: String,
    /// What it holds.
    pub found: String,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            sector,
            allowed,
            found,
        } = self;
        write!(f, "sector {sector} may hold {allowed}, and holds {found}")
    }
}

/// What became of a sector over a kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It holds what was acknowledged last, or what was under way.
    Kept,
    /// It holds something older, that was acknowledged after the last flush or was what that flush had made safe.
    LostUnflushed,
    /// It holds something older than what was flushed.
    LostFlushed,
    /// It holds what was never written there, or parts of several values that are not old and new.
    Torn,
}

/// The sectors of a disk.
#[derive(Debug)]
pub struct Oracle {
    /// Tells this run's data from any other.
    seed: u64,
    /// The sectors.
    sectors: Vec<Sector>,
    /// Counts what is acknowledged; the time of this history.
    now: u64,
    /// What was acknowledged up to this time survives a reboot.
    flushed: u64,
    /// The number of the last write.
    writes: u64,
    /// Sectors that were found half old and half new, where that may be.
    pub mixed: u64,
}

impl Oracle {
    /// A disk of so many sectors that holds its base.
    pub fn new(seed: u64, sectors: usize) -> Self {
        let sector = Sector {
            settled: vec![Settled {
                value: Value::Base,
                at: 0,
            }],
            next: None,
        };
        Self {
            seed,
            sectors: vec![sector; sectors],
            now: 0,
            flushed: 0,
            writes: 0,
            mixed: 0,
        }
    }

    /// How many sectors there are.
    pub fn len(&self) -> usize {
        self.sectors.len()
    }

    /// Never: a disk has sectors.
    pub fn is_empty(&self) -> bool {
        self.sectors.is_empty()
    }

    /// The time of what was acknowledged last.
    pub fn now(&self) -> u64 {
        self.now
    }

    /// The words of a sector with that value.
    fn words(&self, sector: u64, value: Value) -> [u64; WORDS] {
        if value == Value::Zeroes {
            return [0; WORDS];
        }
        let start = mix(self.seed ^ mix(sector ^ mix(value.number())));
        let mut words = [0; WORDS];
        for (word, step) in words.iter_mut().zip(0_u64..) {
            *word = start.wrapping_add(step.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        }
        for (word, head) in words
            .iter_mut()
            .zip([MAGIC, sector, value.number(), self.seed])
        {
            *word = head;
        }
        words
    }

    /// Fills `bytes`, whole sectors from `sector` on, with a value.
    pub fn fill(&self, sector: u64, value: Value, bytes: &mut [u8]) {
        for (number, place) in (sector..).zip(bytes.chunks_exact_mut(SECTOR_BYTES)) {
            for (word, bytes) in self
                .words(number, value)
                .iter()
                .zip(place.chunks_exact_mut(8))
            {
                bytes.copy_from_slice(&word.to_le_bytes());
            }
        }
    }

    /// The value that is in the bytes of a sector, if they are one of this run's for it, whole.
    pub fn decode(&self, sector: u64, bytes: &[u8]) -> Option<Value> {
        let mut found = [0; WORDS];
        for (word, bytes) in found.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
        }
        let [_, _, number, ..] = found;
        let value = match number {
            _ if found == [0; WORDS] => Value::Zeroes,
            0 => Value::Base,
            number if number <= self.writes => Value::Write(number),
            _ => return None,
        };
        (self.words(sector, value) == found).then_some(value)
    }

    /// What the disk holds, if no change is under way.
    pub fn values(&self) -> Option<Vec<Value>> {
        let value = |sector: &Sector| match sector.next {
            None => sector.settled.last().map(|settled| settled.value),
            Some(_) => None,
        };
        self.sectors.iter().map(value).collect()
    }

    /// The disk holds this from now on, durably, and is as large: it was restored, or has another size. Nothing is under way.
    pub fn assume(&mut self, values: &[Value]) {
        self.now += 1;
        let at = self.now;
        let sector = |value: &Value| Sector {
            settled: vec![Settled { value: *value, at }],
            next: None,
        };
        self.sectors = values.iter().map(sector).collect();
    }

    /// The disk has become larger, perhaps while it was used: what was gained is zeroes.
    pub fn grow(&mut self, sectors: usize) {
        let zeroes = Sector {
            settled: vec![Settled {
                value: Value::Zeroes,
                at: 0,
            }],
            next: None,
        };
        if sectors > self.sectors.len() {
            self.sectors.resize(sectors, zeroes);
        }
    }

    /// Whether no change of any of these sectors is under way.
    pub fn is_free(&self, range: Range<usize>) -> bool {
        self.sectors[range]
            .iter()
            .all(|sector| sector.next.is_none())
    }

    /// The number of a new write.
    pub fn new_write(&mut self) -> Value {
        self.writes += 1;
        Value::Write(self.writes)
    }

    /// Notes that a change of these sectors is under way. They are free, or this very change was cut off before.
    pub fn begin(&mut self, range: Range<usize>, value: Value) {
        for sector in &mut self.sectors[range] {
            assert!(sector.next.is_none() || sector.next == Some(value));
            sector.next = Some(value);
        }
    }

    /// Notes that the change of these sectors was acknowledged.
    pub fn complete(&mut self, range: Range<usize>) {
        self.now += 1;
        for sector in &mut self.sectors[range] {
            let value = sector.next.take().expect("a change was under way");
            let at = self.now;
            sector.settled.push(Settled { value, at });
        }
    }

    /// Notes that a flush was acknowledged which was issued at time `issued`.
    pub fn flushed(&mut self, issued: u64) {
        self.flushed = self.flushed.max(issued);
    }

    /// No request is under way, and no crash is to come: what was acknowledged last is all that may be there.
    pub fn settle(&mut self) {
        for sector in &mut self.sectors {
            let last = sector.settled.len().saturating_sub(1);
            sector.settled.drain(..last);
        }
    }

    /// The daemon was killed: no request is under way at the moment.
    pub fn killed(&mut self) {
        let flushed = self.flushed;
        for sector in &mut self.sectors {
            let first = sector.last_until(flushed);
            sector.settled.drain(..first);
        }
    }

    /// Checks what a read at `sector` returned which was issued at time `issued`: each sector holds what was acknowledged last
    /// by then, or something later.
    ///
    /// # Errors
    /// The first sector that does not.
    pub fn check(&mut self, sector: u64, bytes: &[u8], issued: u64) -> Result<(), Wrong> {
        for (number, bytes) in (sector..).zip(bytes.chunks_exact(SECTOR_BYTES)) {
            let state = self.state(number);
            let first = state.last_until(issued);
            let allowed = state.allowed(first, true);
            self.judge(number, bytes, &allowed)?;
        }
        Ok(())
    }

    /// Checks what the disk holds at `sector` after the host was rebooted: each sector holds what was flushed last or
    /// something later, whole. From now on the disk holds what was found.
    ///
    /// # Errors
    /// The first sector that does not.
    pub fn adopt(&mut self, sector: u64, bytes: &[u8]) -> Result<(), Wrong> {
        for (number, bytes) in (sector..).zip(bytes.chunks_exact(SECTOR_BYTES)) {
            let flushed = self.flushed;
            let state = self.state(number);
            let allowed = state.allowed(state.last_until(flushed), false);
            let found = self.judge(number, bytes, &allowed)?;
            let now = self.now;
            let state = self.state_mut(number);
            // The last one of that value: nothing older is ruled out by a second reboot.
            if let Some(place) = state
                .settled
                .iter()
                .rposition(|old| Some(old.value) == found)
            {
                state.settled.truncate(place + 1);
            } else if let Some(value) = found {
                state.settled.push(Settled { value, at: now });
            }
            state.next = None;
        }
        Ok(())
    }

    /// What became of a sector at the end of a back-end that had all requests completed that it was going to complete.
    pub fn fate(&mut self, sector: u64, bytes: &[u8]) -> Fate {
        let state = self.state(sector);
        let flushed = state.last_until(self.flushed);
        let last = state.settled.len().saturating_sub(1);
        let (kept, safe) = (state.allowed(last, true), state.allowed(flushed, false));
        if self.judge(sector, bytes, &kept).is_ok() {
            Fate::Kept
        } else if self.judge(sector, bytes, &safe).is_ok() {
            Fate::LostUnflushed
        } else if self.decode(sector, bytes).is_some() {
            Fate::LostFlushed
        } else {
            Fate::Torn
        }
    }

    /// The state of a sector.
    fn state(&self, sector: u64) -> &Sector {
        &self.sectors[usize::try_from(sector).expect("64-bit host")]
    }

    /// The same, to change.
    fn state_mut(&mut self, sector: u64) -> &mut Sector {
        &mut self.sectors[usize::try_from(sector).expect("64-bit host")]
    }

    /// Which of the allowed values a sector holds; `None` for a mixture.
    fn judge(
        &mut self,
        sector: u64,
        bytes: &[u8],
        allowed: &Allowed,
    ) -> Result<Option<Value>, Wrong> {
        let mut found = [0; WORDS];
        for (word, bytes) in found.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
        }
        // The newest first: it is found most often.
        let values = allowed.values.iter().rev();
        for value in values {
            if self.words(sector, *value) == found {
                return Ok(Some(*value));
            }
        }
        for pair in allowed.values.windows(2).filter(|_| allowed.mixed) {
            let &[old, new] = pair else { continue };
            let both = self
                .words(sector, old)
                .into_iter()
                .zip(self.words(sector, new));
            let is_mixture = |(word, (old, new))| word == old || word == new;
            if found.into_iter().zip(both).all(is_mixture) {
                self.mixed += 1;
                return Ok(None);
            }
        }
        let mut names: Vec<String> = allowed.values.iter().map(Value::to_string).collect();
        names.dedup();
        Err(Wrong {
            sector,
            allowed: names.join(" or "),
            found: self.describe(sector, &found),
        })
    }

    /// What a sector holds, in words.
    fn describe(&self, sector: u64, found: &[u64; WORDS]) -> String {
        let [magic, place, number, seed, ..] = *found;
        if found.iter().all(|word| *word == 0) {
            return Value::Zeroes.to_string();
        }
        if magic != MAGIC {
            return format!("foreign bytes, beginning with {magic:#018x}");
        }
        let value = match number {
            0 => Value::Base,
            number => Value::Write(number),
        };
        let expected = self.words(place, value);
        let differing = found
            .iter()
            .zip(expected)
            .filter(|(a, b)| **a != *b)
            .count();
        let whole = match differing {
            _ if seed != self.seed => " of another run".into(),
            0 => String::new(),
            words => format!(", but {words} of its {WORDS} words are not of it"),
        };
        if place == sector {
            format!("{value}{whole}")
        } else {
            format!("{value} of sector {place}{whole}")
        }
    }
}

impl Sector {
    /// The place of the last value that was acknowledged until then, or of the oldest one known.
    fn last_until(&self, time: u64) -> usize {
        self.settled
            .partition_point(|settled| settled.at <= time)
            .saturating_sub(1)
    }

    /// What it may hold if it holds the value at place `first`, a later one, or the next one.
    fn allowed(&self, first: usize, mixed: bool) -> Allowed {
        let settled = self.settled[first..].iter().map(|settled| settled.value);
        Allowed {
            values: settled.chain(self.next).collect(),
            mixed,
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failure here is the test's failure")]

    use super::*;

    fn bytes(oracle: &Oracle, value: Value) -> Vec<u8> {
        let mut bytes = vec![0; SECTOR_BYTES];
        oracle.fill(3, value, &mut bytes);
        bytes
    }

    fn write(oracle: &mut Oracle) -> Value {
        let value = oracle.new_write();
        oracle.begin(3..4, value);
        oracle.complete(3..4);
        value
    }

    #[test]
    fn what_was_acknowledged_last_must_be_there() {
        let mut oracle = Oracle::new(7, 8);
        let old = write(&mut oracle);
        let issued = oracle.now();
        let new = write(&mut oracle);
        oracle.killed();
        let (old, new) = (bytes(&oracle, old), bytes(&oracle, new));
        assert_eq!(oracle.check(3, &new, oracle.now()), Ok(()));
        assert_eq!(oracle.check(3, &old, issued), Ok(()), "a read from before");
        let wrong = oracle.check(3, &old, oracle.now()).unwrap_err();
        assert_eq!(
            (wrong.allowed.as_str(), wrong.found.as_str()),
            ("write 2", "write 1")
        );
        for (foreign, what) in [
            (vec![0; SECTOR_BYTES], "zeroes"),
            (
                vec![1; SECTOR_BYTES],
                "foreign bytes, beginning with 0x0101010101010101",
            ),
            (bytes(&oracle, Value::Base), "the base"),
            (
                bytes(&Oracle::new(8, 8), Value::Write(2)),
                "write 2 of another run",
            ),
            (
                [&new[..256], &old[256..]].concat(),
                "write 2, but 32 of its 64 words are not of it",
            ),
        ] {
            let wrong = oracle.check(3, &foreign, oracle.now()).unwrap_err();
            assert_eq!(wrong.found, what);
        }
        let mut elsewhere = vec![0; SECTOR_BYTES];
        oracle.fill(4, Value::Write(2), &mut elsewhere);
        let wrong = oracle.check(3, &elsewhere, oracle.now()).unwrap_err();
        assert_eq!(wrong.found, "write 2 of sector 4");
    }

    #[test]
    fn what_is_lost_is_told_apart() {
        let mut oracle = Oracle::new(7, 8);
        let first = write(&mut oracle);
        let flushed = write(&mut oracle);
        oracle.flushed(oracle.now());
        let later = write(&mut oracle);
        let last = write(&mut oracle);
        let next = oracle.new_write();
        oracle.begin(3..4, next);
        let of = |oracle: &mut Oracle, bytes: &[u8]| oracle.fate(3, bytes);
        for (value, fate) in [
            (Value::Base, Fate::LostFlushed),
            (first, Fate::LostFlushed),
            (flushed, Fate::LostUnflushed),
            (later, Fate::LostUnflushed),
            (last, Fate::Kept),
            (next, Fate::Kept),
        ] {
            let bytes = bytes(&oracle, value);
            assert_eq!(of(&mut oracle, &bytes), fate, "{value}");
        }
        let [old, new] = [later, last].map(|value| bytes(&oracle, value));
        let newer = bytes(&oracle, next);
        let cut_off = [&new[..256], &newer[256..]].concat();
        assert_eq!(of(&mut oracle, &cut_off), Fate::Kept);
        let torn = [&old[..256], &newer[256..]].concat();
        assert_eq!(of(&mut oracle, &torn), Fate::Torn);
        assert_eq!(of(&mut oracle, &[1; SECTOR_BYTES]), Fate::Torn);
    }

    #[test]
    fn what_is_copied_comes_back() {
        let mut oracle = Oracle::new(7, 8);
        let old = write(&mut oracle);
        let copy = oracle.values().unwrap();
        assert_eq!((copy[2], copy[3]), (Value::Base, old));
        let new = write(&mut oracle);
        let (old_bytes, new_bytes) = (bytes(&oracle, old), bytes(&oracle, new));
        assert_eq!(oracle.decode(3, &old_bytes), Some(old));
        assert_eq!(oracle.decode(4, &old_bytes), None, "another place's");
        let mixed = [&old_bytes[..256], &new_bytes[256..]].concat();
        assert_eq!(oracle.decode(3, &mixed), None);
        oracle.assume(&copy);
        assert_eq!(oracle.check(3, &old_bytes, oracle.now()), Ok(()));
        assert!(oracle.check(3, &new_bytes, oracle.now()).is_err());
        oracle.begin(2..3, Value::Zeroes);
        assert_eq!(oracle.values(), None, "a change is under way");
    }

    #[test]
    fn what_was_cut_off_may_be_old_new_or_mixed_until_it_is_repeated() {
        let mut oracle = Oracle::new(7, 8);
        let new = oracle.new_write();
        oracle.begin(3..4, new);
        let (old, new) = (bytes(&oracle, Value::Base), bytes(&oracle, new));
        let mixed = [&old[..64], &new[64..128], &old[128..]].concat();
        for kill in [false, true] {
            if kill {
                oracle.killed();
            }
            for bytes in [&old, &new, &mixed] {
                assert_eq!(oracle.check(3, bytes, 0), Ok(()));
            }
        }
        assert_eq!(oracle.mixed, 2);
        let torn_word = [&old[..63], &new[63..]].concat();
        assert!(oracle.check(3, &torn_word, 0).is_err());
        oracle.begin(3..4, Value::Write(1));
        oracle.complete(3..4);
        assert_eq!(oracle.check(3, &new, 1), Ok(()));
        for bytes in [&old, &mixed] {
            assert!(oracle.check(3, bytes, 1).is_err());
        }
    }

    #[test]
    fn after_a_reboot_nothing_older_than_the_last_flush_is_there() {
        let mut oracle = Oracle::new(7, 8);
        let first = write(&mut oracle);
        let flushed = write(&mut oracle);
        oracle.flushed(oracle.now());
        let later = write(&mut oracle);
        let next = oracle.new_write();
        oracle.begin(3..4, next);
        oracle.killed();
        for old in [Value::Base, first, Value::Zeroes] {
            let bytes = bytes(&oracle, old);
            oracle.adopt(3, &bytes).unwrap_err();
        }
        let found = bytes(&oracle, later);
        assert_eq!(oracle.adopt(3, &found), Ok(()));
        assert!(oracle.is_free(3..4), "the guest is gone");
        let mixed = [&found[..64], &bytes(&oracle, next)[64..]].concat();
        oracle.adopt(3, &mixed).unwrap_err();
        assert_eq!(oracle.check(3, &found, oracle.now()), Ok(()));
        // It was not flushed, so the next reboot may take it back, but not bring anything newer.
        oracle.killed();
        for (value, good) in [(next, false), (flushed, true), (later, false)] {
            let bytes = bytes(&oracle, value);
            assert_eq!(oracle.adopt(3, &bytes).is_ok(), good, "{value}");
        }
    }
}
