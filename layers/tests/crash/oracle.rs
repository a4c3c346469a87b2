//! What may be found after a crash: per sector, every value ever written, and which of them are over for good.
//!
//! Requests may overlap in time, and then nobody knows which of them was last. What is known is this: a value is over once
//! another one that counts was issued after it had ended. Which ones count depends on what happened: after a power cut those
//! that a flush has covered, after a kill and for a read those that were acknowledged.

use std::collections::BTreeMap;

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// Zeroes.
    Zero,
    /// The stamp of this write (see [`stamp`]).
    Stamp(u64),
}

/// What has to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promise {
    /// What a flush covered: after power loss.
    Flushed,
    /// What was acknowledged: after the daemon was killed, and as long as it lives.
    Acknowledged,
}

/// An instant of the oracle: every event has its own.
type Instant = u64;

/// A value that was written, or is being written.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// What.
    value: Value,
    /// When its request was issued.
    issued: Instant,
    /// When it ended; `Instant::MAX` while it is under way.
    ended: Instant,
}

/// When the newest values that count were issued, by sector.
#[derive(Clone, Debug)]
pub struct Marks(Vec<Instant>);

impl Marks {
    /// Raises those that are lower.
    fn raise(&mut self, other: &Self) {
        for (mark, other) in self.0.iter_mut().zip(&other.0) {
            *mark = (*mark).max(*other);
        }
    }
}

/// One disk.
#[derive(Clone, Debug)]
pub struct Disk {
    /// Goes into the stamps, so that another disk's data is seen as foreign.
    pub number: u64,
    /// The last event.
    now: Instant,
    /// Every value of every sector, in the order of issue.
    history: Vec<Vec<Entry>>,
    /// What a flush has covered.
    flushed: Marks,
    /// What was acknowledged.
    acknowledged: Marks,
    /// Snapshots that were begun.
    pub snapshots: BTreeMap<String, Snapshot>,
}

/// A snapshot that was begun.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Whether the command has returned success.
    pub acknowledged: bool,
    /// Names the group: the snapshots of one command.
    pub group: u64,
    /// What was flushed when it was begun.
    flushed: Marks,
    /// What was acknowledged when it was begun.
    completed: Marks,
    /// What was issued from here on is not in it.
    end: Instant,
}

impl Disk {
    /// A disk whose sectors hold these values, durably.
    pub fn new(number: u64, values: Vec<Value>) -> Self {
        let zeroes = Marks(vec![0; values.len()]);
        let first = |value| {
            vec![Entry {
                value,
                issued: 0,
                ended: 0,
            }]
        };
        Self {
            number,
            now: 0,
            history: values.into_iter().map(first).collect(),
            flushed: zeroes.clone(),
            acknowledged: zeroes,
            snapshots: BTreeMap::new(),
        }
    }

    /// Sectors of the disk.
    pub fn sectors(&self) -> u64 {
        self.history.len() as u64
    }

    /// The next instant.
    fn tick(&mut self) -> Instant {
        self.now += 1;
        self.now
    }

    /// These sectors are about to be written: sector and value. Returns what names the request.
    pub fn issue(&mut self, values: impl Iterator<Item = (u64, Value)>) -> Instant {
        let issued = self.tick();
        for (sector, value) in values {
            self.history[sector as usize].push(Entry {
                value,
                issued,
                ended: Instant::MAX,
            });
        }
        issued
    }

    /// The request that was issued then has ended, for these sectors: well or not, as durable or not.
    pub fn end(&mut self, issued: Instant, sectors: std::ops::Range<u64>, ok: bool, stable: bool) {
        let now = self.tick();
        for sector in sectors {
            let sector = sector as usize;
            let entry = self.history[sector]
                .iter_mut()
                .find(|entry| entry.issued == issued);
            entry.expect("it was issued").ended = now;
            if ok {
                let mark = &mut self.acknowledged.0[sector];
                *mark = (*mark).max(issued);
            }
            if ok && stable {
                let mark = &mut self.flushed.0[sector];
                *mark = (*mark).max(issued);
            }
        }
    }

    /// What is acknowledged now: what a flush that is about to be issued covers, and what a read that is about to be issued
    /// must not be older than.
    pub fn marks(&self) -> Marks {
        self.acknowledged.clone()
    }

    /// The flush that was issued with these marks was acknowledged.
    pub fn flushed(&mut self, marks: &Marks) {
        self.flushed.raise(marks);
    }

    /// A snapshot is about to be taken.
    pub fn begin_snapshot(&mut self, name: &str, group: u64) {
        let snapshot = Snapshot {
            acknowledged: false,
            group,
            flushed: self.flushed.clone(),
            completed: self.acknowledged.clone(),
            end: Instant::MAX,
        };
        self.snapshots.insert(name.to_owned(), snapshot);
    }

    /// Its instant has passed: what is issued from now on is not in it.
    pub fn instant_passed(&mut self, name: &str) {
        let now = self.tick();
        if let Some(snapshot) = self.snapshots.get_mut(name) {
            snapshot.end = now;
        }
    }

    /// What is wrong with the disk as it was found, if anything.
    pub fn check(&self, found: &[Value], promise: Promise) -> Option<String> {
        let marks = match promise {
            Promise::Flushed => &self.flushed,
            Promise::Acknowledged => &self.acknowledged,
        };
        self.check_values(
            "the disk",
            (0..).zip(found.iter().copied()),
            marks,
            Instant::MAX,
        )
    }

    /// What is wrong with sectors that were read by a request that was issued with these marks, if anything.
    pub fn check_read(&self, first: u64, found: &[Value], marks: &Marks) -> Option<String> {
        let found = (first..).zip(found.iter().copied());
        self.check_values("a read", found, marks, Instant::MAX)
    }

    /// What is wrong with a snapshot as it was found, if anything.
    pub fn check_snapshot(&self, name: &str, found: &[Value], promise: Promise) -> Option<String> {
        let Some(snapshot) = self.snapshots.get(name) else {
            return Some(format!("snapshot {name} was never begun"));
        };
        let marks = if snapshot.acknowledged || promise == Promise::Acknowledged {
            &snapshot.completed
        } else {
            &snapshot.flushed
        };
        self.check_values(name, (0..).zip(found.iter().copied()), marks, snapshot.end)
    }

    /// The first sector with a value that is over, or was issued at `end` or later, or never.
    fn check_values(
        &self,
        what: &str,
        found: impl Iterator<Item = (u64, Value)>,
        marks: &Marks,
        end: Instant,
    ) -> Option<String> {
        for (sector, value) in found {
            let (history, mark) = (&self.history[sector as usize], marks.0[sector as usize]);
            let may_be = |entry: &&Entry| entry.issued < end && entry.ended >= mark;
            if history
                .iter()
                .filter(may_be)
                .any(|entry| entry.value == value)
            {
                continue;
            }
            let allowed: Vec<Value> = history
                .iter()
                .filter(may_be)
                .map(|entry| entry.value)
                .collect();
            let hint = if history.iter().any(|entry| entry.value == value) {
                "it was written there, but before or after"
            } else {
                "it was never written there"
            };
            return Some(format!(
                "disk {} ({what}): sector {sector} holds {value:?}, {hint}; allowed: {allowed:?}",
                self.number
            ));
        }
        None
    }
}

/// The 512 bytes that write `id` puts into a sector of a disk: every word depends on all three, so that a mix of two
/// values, another address or another disk is seen.
pub fn stamp(disk: u64, sector: u64, id: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    for (index, word) in (0u64..).zip(bytes.chunks_exact_mut(8)) {
        let value = if index == 0 {
            id
        } else {
            mix(disk, sector, id, index)
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// Reads a sector back.
///
/// # Errors
/// Bytes that no write has ever put into a sector at this place.
pub fn unstamp(disk: u64, sector: u64, bytes: &[u8]) -> Result<Value, String> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Ok(Value::Zero);
    }
    let id = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    if stamp(disk, sector, id) == bytes {
        return Ok(Value::Stamp(id));
    }
    Err(format!(
        "disk {disk}: sector {sector} holds torn or foreign bytes (first word {id:#x})"
    ))
}

/// A word that depends on all four.
fn mix(disk: u64, sector: u64, id: u64, index: u64) -> u64 {
    let mut z =
        disk.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ sector.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^= id.wrapping_mul(0x94d0_49bb_1331_11eb) ^ index.rotate_left(32);
    z = (z ^ (z >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z ^ (z >> 29)
}

#[test]
fn the_oracle_tells_good_from_bad() {
    use Promise::{Acknowledged, Flushed};
    let mut disk = Disk::new(1, vec![Value::Zero; 2]);
    let seven = disk.issue([(0, Value::Stamp(7))].into_iter());
    let check = |disk: &Disk, value, promise| disk.check(&[value, Value::Zero], promise).is_none();
    assert!(check(&disk, Value::Zero, Acknowledged));
    assert!(
        check(&disk, Value::Stamp(7), Flushed),
        "a write under way may be there"
    );
    assert!(!check(&disk, Value::Stamp(8), Flushed));
    disk.end(seven, 0..1, true, false);
    let marks = disk.marks();
    assert!(check(&disk, Value::Zero, Flushed), "not flushed yet");
    assert!(
        !check(&disk, Value::Zero, Acknowledged),
        "an acknowledged write was lost by a kill"
    );
    disk.flushed(&marks);
    assert!(!check(&disk, Value::Zero, Flushed), "flushed data was lost");
    disk.begin_snapshot("s", 1);
    disk.instant_passed("s");
    let nine = disk.issue([(0, Value::Stamp(9))].into_iter());
    let found = [Value::Stamp(9), Value::Zero];
    assert!(
        disk.check_snapshot("s", &found, Flushed).is_some(),
        "it came later"
    );
    // Two that overlap may have come in either order, whichever is acknowledged first; a third one not.
    let ten = disk.issue([(0, Value::Stamp(10))].into_iter());
    disk.end(ten, 0..1, true, false);
    disk.end(nine, 0..1, true, false);
    let before = disk.marks();
    assert!(
        check(&disk, Value::Stamp(9), Acknowledged) && check(&disk, Value::Stamp(10), Acknowledged)
    );
    assert!(!check(&disk, Value::Stamp(7), Acknowledged));
    let eleven = disk.issue([(0, Value::Zero)].into_iter());
    disk.end(eleven, 0..1, true, true);
    assert!(!check(&disk, Value::Stamp(9), Flushed) && check(&disk, Value::Zero, Flushed));
    assert!(
        disk.check_read(0, &[Value::Stamp(9)], &before).is_none(),
        "it was issued earlier"
    );
    let mut torn = stamp(1, 0, 7);
    torn[256..].copy_from_slice(&stamp(1, 0, 9)[256..]);
    assert!(unstamp(1, 0, &torn).is_err());
    assert!(unstamp(1, 1, &stamp(1, 0, 7)).is_err());
    assert!(unstamp(2, 0, &stamp(1, 0, 7)).is_err());
}
