//! The guests of a run: their queues, and the requests that they have under way.

use std::collections::BTreeMap;

use stratablk_layers::file::sim::Random;
use stratablk_layers::units::{SECTOR_BYTES, SectorRange};
use stratablk_layers::volume::{Durability, Operation};

use crate::disk::Queue;
use crate::oracle::{Marks, Value, stamp};
use crate::pick::{self, Busy};
use crate::watch::Shared;
use crate::workload::trace;

/// What a request under way is.
enum Kind {
    /// A change of these sectors, issued at this instant.
    Change {
        range: SectorRange,
        stable: bool,
        zero: bool,
        issued: u64,
    },
    /// A read of these sectors, which must not be older than this.
    Read { range: SectorRange, marks: Marks },
    /// A flush that covers this.
    Flush(Marks),
}

/// A request under way.
struct Request {
    /// Its disk.
    disk: String,
    /// What it is.
    kind: Kind,
}

/// One queue of a disk.
struct Guest {
    /// The disk.
    disk: String,
    /// Its number, for stamps.
    number: u64,
    /// Its size.
    sectors: u64,
    /// The queue.
    queue: Queue,
}

/// All guests.
pub struct Guests {
    seed: u64,
    random: Random,
    shared: Shared,
    guests: Vec<Guest>,
    requests: BTreeMap<u64, Request>,
    busy: Busy,
    next_id: u64,
    /// Whether requests may fail.
    faulty: bool,
    /// Whether the disk may lose pages under a reader's hands.
    lossy: bool,
}

impl Guests {
    /// None yet.
    pub fn new(seed: u64, shared: Shared, overlap: bool, faulty: bool, lossy: bool) -> Self {
        Self {
            seed,
            random: Random::new(seed ^ 0x90e5),
            shared,
            guests: Vec::new(),
            requests: BTreeMap::new(),
            busy: Busy::new(overlap),
            next_id: 2,
            faulty,
            lossy,
        }
    }

    /// Adds a queue of a disk that the oracle knows.
    pub fn add(&mut self, disk: &str, queue: Queue) {
        let (number, sectors) = {
            let shared = self.shared.lock().unwrap();
            let known = &shared.disks[disk];
            (known.number, known.sectors())
        };
        self.guests.push(Guest {
            disk: disk.to_owned(),
            number,
            sectors,
            queue,
        });
    }

    /// Requests under way.
    pub fn under_way(&self) -> usize {
        self.requests.len()
    }

    /// Whether a disk may have a flush under way, or wait for one: for a flush, a stable write, or zeroes.
    pub fn may_flush(&self, disk: &str) -> bool {
        self.requests.values().any(|request| {
            let flushes = match &request.kind {
                Kind::Change { stable, zero, .. } => *stable || *zero,
                Kind::Read { .. } => false,
                Kind::Flush(_) => true,
            };
            request.disk == disk && flushes
        })
    }

    /// Some requests on one queue.
    pub fn batch(&mut self, most: u64) {
        if self.guests.is_empty() {
            return;
        }
        let index = self.random.index(self.guests.len());
        self.guests[index].queue.context().begin_batch();
        for _ in 0..1 + self.random.below(most) {
            match pick::kind(&mut self.random) {
                pick::Kind::Write => self.write(index),
                pick::Kind::WriteZeroes => self.zero(index, false),
                pick::Kind::Discard => self.zero(index, true),
                pick::Kind::Read => self.read(index),
                pick::Kind::Flush => self.flush(index),
            }
        }
        self.guests[index].queue.context().kick();
    }

    /// Something that happens while the control plane is at work.
    pub fn interrupt(&mut self) {
        if self.random.chance(128) {
            self.batch(2);
        } else {
            self.poll_all();
        }
    }

    /// Looks at what has ended, on all queues.
    pub fn poll_all(&mut self) {
        for index in 0..self.guests.len() {
            for (id, result, memory) in self.guests[index].queue.poll() {
                self.ended(id, result.is_ok(), &memory);
            }
        }
    }

    /// Closes all queues.
    pub fn close(&mut self) {
        self.guests.clear();
    }

    /// A run of sectors of a disk; without a request under way, unless requests may overlap.
    fn range(&mut self, index: usize, longest: u64) -> Option<SectorRange> {
        let Guest { disk, sectors, .. } = &self.guests[index];
        let range = pick::range(&mut self.random, *sectors, longest);
        self.busy.allows(disk, range).then_some(range)
    }

    /// The next request's number.
    fn id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    /// Notes a request and its sectors.
    fn note(&mut self, id: u64, index: usize, kind: Kind) {
        let disk = self.guests[index].disk.clone();
        if let Kind::Change { range, .. } | Kind::Read { range, .. } = &kind {
            self.busy.begin(&disk, *range);
        }
        self.requests.insert(id, Request { disk, kind });
    }

    /// Tells the oracle that these sectors are about to change.
    fn issue(&self, index: usize, range: SectorRange, value: Value) -> u64 {
        let mut shared = self.shared.lock().unwrap();
        let disk = shared.disks.get_mut(&self.guests[index].disk).unwrap();
        disk.issue((range.start.0..range.end().0).map(|sector| (sector, value)))
    }

    /// What is acknowledged now.
    fn marks(&self, index: usize) -> Marks {
        let shared = self.shared.lock().unwrap();
        shared.disks[&self.guests[index].disk].marks()
    }

    fn write(&mut self, index: usize) {
        let Some(range) = self.range(index, 20) else {
            return;
        };
        let stable = self.random.chance(25);
        let id = self.id();
        let issued = self.issue(index, range, Value::Stamp(id));
        self.note(
            id,
            index,
            Kind::Change {
                range,
                stable,
                zero: false,
                issued,
            },
        );
        let number = self.guests[index].number;
        let memory: Vec<u8> = (range.start.0..range.end().0)
            .flat_map(|sector| stamp(number, sector, id))
            .collect();
        let cuts = pick::cuts(&mut self.random, memory.len());
        let durability = if stable {
            Durability::OnCompletion
        } else {
            Durability::AfterFlush
        };
        trace(|| format!("request {id}: write disk {number} {range:?}, stable: {stable}"));
        let operation = Operation::Write(range.start);
        let queue = &mut self.guests[index].queue;
        queue.submit(operation, durability, memory, &cuts, id);
    }

    fn zero(&mut self, index: usize, discard: bool) {
        let Some(range) = self.range(index, 40) else {
            return;
        };
        let id = self.id();
        let issued = self.issue(index, range, Value::Zero);
        let kind = Kind::Change {
            range,
            stable: false,
            zero: true,
            issued,
        };
        self.note(id, index, kind);
        let unmap = self.random.chance(128);
        let operation = if discard {
            Operation::Discard(range)
        } else {
            Operation::WriteZeroes { range, unmap }
        };
        trace(|| {
            format!(
                "request {id}: disk {} {operation:?}",
                self.guests[index].number
            )
        });
        let queue = &mut self.guests[index].queue;
        queue.submit(operation, Durability::AfterFlush, Vec::new(), &[], id);
    }

    fn read(&mut self, index: usize) {
        let Some(range) = self.range(index, 60) else {
            return;
        };
        let id = self.id();
        let marks = self.marks(index);
        self.note(id, index, Kind::Read { range, marks });
        let memory = vec![0x5a; (range.count * SECTOR_BYTES) as usize];
        let cuts = pick::cuts(&mut self.random, memory.len());
        trace(|| {
            format!(
                "request {id}: read disk {} {range:?}",
                self.guests[index].number
            )
        });
        let operation = Operation::Read(range.start);
        let queue = &mut self.guests[index].queue;
        queue.submit(operation, Durability::AfterFlush, memory, &cuts, id);
    }

    fn flush(&mut self, index: usize) {
        let marks = self.marks(index);
        let id = self.id();
        self.note(id, index, Kind::Flush(marks));
        trace(|| format!("request {id}: flush disk {}", self.guests[index].number));
        let queue = &mut self.guests[index].queue;
        queue.submit(
            Operation::Flush,
            Durability::AfterFlush,
            Vec::new(),
            &[],
            id,
        );
    }

    /// A request has ended: tells the oracle.
    fn ended(&mut self, id: u64, ok: bool, memory: &[u8]) {
        trace(|| format!("request {id} ended, ok: {ok}"));
        let request = self.requests.remove(&id).unwrap();
        if let Kind::Change { range, .. } | Kind::Read { range, .. } = &request.kind {
            self.busy.end(&request.disk, *range);
        }
        let shared = self.shared.clone();
        let mut shared = shared.lock().unwrap();
        let watch = &mut *shared;
        let disk = watch.disks.get_mut(&request.disk).unwrap();
        let mut problem = None;
        match request.kind {
            Kind::Change {
                range,
                stable,
                issued,
                ..
            } => disk.end(issued, range.start.0..range.end().0, ok, stable),
            Kind::Flush(marks) => {
                if ok {
                    disk.flushed(&marks);
                }
            }
            // A disk that lost pages has lost them for its readers too; the guest was told of the failure.
            Kind::Read { .. } if self.lossy || !ok => {}
            Kind::Read { range, marks } => {
                problem = match pick::found(disk.number, range, memory) {
                    Ok(found) => disk.check_read(range.start.0, &found, &marks),
                    Err(problem) => Some(problem),
                };
            }
        }
        if !ok && !self.faulty {
            problem = Some("it failed on a good disk".into());
        }
        if let Some(problem) = problem {
            watch.violation(format!("seed {}: request {id}: {problem}", self.seed));
        }
    }
}
