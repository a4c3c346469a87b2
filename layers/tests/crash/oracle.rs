//! What may be found after a crash: per sector, every value ever written, and the oldest that is still allowed.

use std::collections::BTreeMap;

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// Zeroes.
    Zero,
    /// The stamp of this write (see [`stamp`]).
    Stamp(u64),
}

/// A value that was written, or is being written.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// What.
    value: Value,
    /// Whether its request was acknowledged.
    completed: bool,
}

/// One disk.
#[derive(Clone, Debug)]
pub struct Disk {
    /// Goes into the stamps, so that another disk's data is seen as foreign.
    pub number: u64,
    /// Every value of every sector, in the order of issue. At most one per sector is under way at a time.
    history: Vec<Vec<Entry>>,
    /// The oldest allowed entry of each sector.
    floor: Vec<usize>,
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
    /// The oldest entry of each sector that may be in it.
    floor: Vec<usize>,
    /// The same once it is acknowledged: the last completed one at its instant.
    completed: Vec<usize>,
    /// The first entry of each sector that may not be in it.
    end: Vec<usize>,
}

/// The oldest allowed entries once a flush is acknowledged.
#[derive(Clone, Debug)]
pub struct FlushMark(Vec<usize>);

impl Disk {
    /// A disk whose sectors hold these values, durably.
    pub fn new(number: u64, values: Vec<Value>) -> Self {
        let floor = vec![0; values.len()];
        let first = |value| {
            vec![Entry {
                value,
                completed: true,
            }]
        };
        Self {
            number,
            history: values.into_iter().map(first).collect(),
            floor,
            snapshots: BTreeMap::new(),
        }
    }

    /// Sectors of the disk.
    pub fn sectors(&self) -> u64 {
        self.history.len() as u64
    }

    /// A write is about to be issued.
    pub fn issue(&mut self, sector: u64, value: Value) {
        self.entries(sector).push(Entry {
            value,
            completed: false,
        });
    }

    /// The write of this sector was acknowledged; `stable`: as durable.
    pub fn complete(&mut self, sector: u64, stable: bool) {
        let entries = self.entries(sector);
        let last = entries.len() - 1;
        entries[last].completed = true;
        if stable {
            self.floor[sector as usize] = last;
        }
    }

    /// A flush is about to be issued: what it covers.
    pub fn flush_mark(&self) -> FlushMark {
        FlushMark(self.last_completed())
    }

    /// That flush was acknowledged.
    pub fn flushed(&mut self, mark: &FlushMark) {
        for (floor, covered) in self.floor.iter_mut().zip(&mark.0) {
            *floor = (*floor).max(*covered);
        }
    }

    /// The value that a read must return now, if nothing is under way for this sector.
    pub fn current(&self, sector: u64) -> Value {
        let entries = &self.history[sector as usize];
        entries
            .iter()
            .rev()
            .find(|entry| entry.completed)
            .expect("the first is completed")
            .value
    }

    /// A snapshot is about to be taken.
    pub fn begin_snapshot(&mut self, name: &str, group: u64) {
        let snapshot = Snapshot {
            acknowledged: false,
            group,
            floor: self.floor.clone(),
            completed: self.last_completed(),
            end: self.history.iter().map(Vec::len).collect(),
        };
        self.snapshots.insert(name.to_owned(), snapshot);
    }

    /// What is wrong with the disk as it was found, if anything.
    pub fn check(&self, found: &[Value]) -> Option<String> {
        (0..).zip(found).find_map(|(sector, value)| {
            let floor = self.floor[sector as usize];
            let end = self.history[sector as usize].len();
            self.check_sector("the disk", sector, *value, floor, end)
        })
    }

    /// What is wrong with a snapshot as it was found, if anything.
    pub fn check_snapshot(&self, name: &str, found: &[Value]) -> Option<String> {
        let Some(snapshot) = self.snapshots.get(name) else {
            return Some(format!("snapshot {name} was never begun"));
        };
        let floors = if snapshot.acknowledged {
            &snapshot.completed
        } else {
            &snapshot.floor
        };
        (0..).zip(found).find_map(|(sector, value)| {
            let (floor, end) = (floors[sector as usize], snapshot.end[sector as usize]);
            self.check_sector(name, sector, *value, floor, end)
        })
    }

    /// One sector: the value must be that of an entry in `floor .. end`.
    fn check_sector(
        &self,
        what: &str,
        sector: u64,
        value: Value,
        floor: usize,
        end: usize,
    ) -> Option<String> {
        let allowed = &self.history[sector as usize][floor..end];
        if allowed.iter().any(|entry| entry.value == value) {
            return None;
        }
        let allowed: Vec<Value> = allowed.iter().map(|entry| entry.value).collect();
        let older = self.history[sector as usize][..floor]
            .iter()
            .any(|entry| entry.value == value);
        let hint = if older {
            "an older value came back"
        } else {
            "it was never written there"
        };
        Some(format!(
            "disk {} ({what}): sector {sector} holds {value:?}, {hint}; allowed: {allowed:?}",
            self.number
        ))
    }

    /// The last completed entry of each sector.
    fn last_completed(&self) -> Vec<usize> {
        let last = |entries: &Vec<Entry>| entries.iter().rposition(|entry| entry.completed);
        self.history
            .iter()
            .map(|entries| last(entries).expect("the first is completed"))
            .collect()
    }

    /// The entries of a sector.
    fn entries(&mut self, sector: u64) -> &mut Vec<Entry> {
        &mut self.history[sector as usize]
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
    let mut disk = Disk::new(1, vec![Value::Zero; 2]);
    disk.issue(0, Value::Stamp(7));
    assert!(disk.check(&[Value::Zero, Value::Zero]).is_none());
    assert!(
        disk.check(&[Value::Stamp(7), Value::Zero]).is_none(),
        "a write under way may be there"
    );
    assert!(disk.check(&[Value::Stamp(8), Value::Zero]).is_some());
    disk.complete(0, false);
    let mark = disk.flush_mark();
    assert!(
        disk.check(&[Value::Zero, Value::Zero]).is_none(),
        "not flushed yet"
    );
    disk.flushed(&mark);
    assert!(
        disk.check(&[Value::Zero, Value::Zero]).is_some(),
        "flushed data was lost"
    );
    disk.begin_snapshot("s", 1);
    disk.issue(0, Value::Stamp(9));
    assert!(
        disk.check_snapshot("s", &[Value::Stamp(9), Value::Zero])
            .is_some(),
        "it came later"
    );
    let mut torn = stamp(1, 0, 7);
    torn[256..].copy_from_slice(&stamp(1, 0, 9)[256..]);
    assert!(unstamp(1, 0, &torn).is_err());
    assert!(unstamp(1, 1, &stamp(1, 0, 7)).is_err());
    assert!(unstamp(2, 0, &stamp(1, 0, 7)).is_err());
}
