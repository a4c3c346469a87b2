//! The guests of a run: their queues, and the requests that they have under way.

use std::collections::{BTreeMap, BTreeSet};

use stratablk_layers::file::sim::Random;
use stratablk_layers::units::{SECTOR_BYTES, SectorRange};
use stratablk_layers::volume::{Durability, Operation, RequestError};

use crate::disk::Queue;
use crate::oracle::{Value, stamp};
use crate::pick::{self, Busy};
use crate::trace;
use crate::tree::{Instant, Marks};
use crate::watch::Shared;

/// What a request under way is.
enum Kind {
    /// A change of these sectors, issued at this instant.
    Change {
        range: SectorRange,
        stable: bool,
        issued: Instant,
    },
    /// A change of a disk that takes none.
    Forbidden,
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
    /// Its stamps.
    family: u64,
    /// Whether the disk takes no changes.
    read_only: bool,
    /// The queue.
    queue: Queue,
}

/// All guests.
pub struct Guests {
    random: Random,
    shared: Shared,
    guests: Vec<Guest>,
    requests: BTreeMap<u64, Request>,
    busy: Busy,
    next_id: u64,
    /// Requests that have ended.
    pub ended: u64,
}

impl Drop for Guests {
    fn drop(&mut self) {
        // Nobody would end what is under way, and the end of a queue waits for it.
        if std::thread::panicking() {
            self.abandon();
        }
    }
}

impl Guests {
    /// None yet.
    pub fn new(seed: u64, shared: Shared, overlap: bool) -> Self {
        Self {
            random: Random::new(seed ^ 0x90e5),
            shared,
            guests: Vec::new(),
            requests: BTreeMap::new(),
            busy: Busy::new(overlap),
            next_id: 2,
            ended: 0,
        }
    }

    /// Adds a queue of a disk that the oracle knows.
    pub fn add(&mut self, disk: &str, read_only: bool, queue: Queue) {
        let family = self.shared.lock().unwrap().oracle.world.disks[disk].family;
        self.guests.push(Guest {
            disk: disk.to_owned(),
            family,
            read_only,
            queue,
        });
    }

    /// Disks with a guest.
    pub fn disks(&self) -> BTreeSet<String> {
        self.guests.iter().map(|guest| guest.disk.clone()).collect()
    }

    /// Requests of a disk under way.
    pub fn under_way_of(&self, disk: &str) -> usize {
        let mine = self.requests.values();
        mine.filter(|request| request.disk == disk).count()
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
                self.ended(id, result, &memory);
            }
        }
    }

    /// Closes the queues of a disk, which has no requests under way.
    pub fn stop(&mut self, disk: &str) {
        assert_eq!(self.under_way_of(disk), 0, "requests are under way");
        self.guests.retain(|guest| guest.disk != disk);
        self.shared.lock().unwrap().oracle.forget(disk);
    }

    /// Leaves all queues as they are, with what is under way: the end of a run that has failed.
    pub fn abandon(&mut self) {
        std::mem::forget(std::mem::take(&mut self.guests));
    }

    /// A run of sectors of a disk; without a request under way, unless requests may overlap.
    fn range(&mut self, index: usize, longest: u64) -> Option<SectorRange> {
        let disk = &self.guests[index].disk;
        let sectors = self.shared.lock().unwrap().oracle.world.disks[disk].sectors;
        let range = pick::range(&mut self.random, sectors, longest);
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

    /// Tells the oracle that these sectors are about to change; or not, if the disk takes no changes.
    fn issue(&self, index: usize, range: SectorRange, stable: bool, value: Value) -> Kind {
        let guest = &self.guests[index];
        if guest.read_only {
            return Kind::Forbidden;
        }
        let mut shared = self.shared.lock().unwrap();
        let issued = shared
            .oracle
            .issue(&guest.disk, range.start.0..range.end().0, value);
        Kind::Change {
            range,
            stable,
            issued,
        }
    }

    /// What is acknowledged now.
    fn marks(&self, index: usize) -> Marks {
        let shared = self.shared.lock().unwrap();
        shared.oracle.marks(&self.guests[index].disk)
    }

    fn write(&mut self, index: usize) {
        let Some(range) = self.range(index, 20) else {
            return;
        };
        let stable = self.random.chance(25);
        let id = self.id();
        let kind = self.issue(index, range, stable, Value::Stamp(id));
        self.note(id, index, kind);
        let family = self.guests[index].family;
        let memory: Vec<u8> = (range.start.0..range.end().0)
            .flat_map(|sector| stamp(family, sector, id))
            .collect();
        let cuts = pick::cuts(&mut self.random, memory.len());
        let durability = if stable {
            Durability::OnCompletion
        } else {
            Durability::AfterFlush
        };
        self.submit(
            index,
            Operation::Write(range.start),
            durability,
            memory,
            &cuts,
            id,
        );
    }

    /// Hands a request over.
    fn submit(
        &mut self,
        index: usize,
        operation: Operation,
        durability: Durability,
        memory: Vec<u8>,
        cuts: &[usize],
        id: u64,
    ) {
        let guest = &mut self.guests[index];
        trace(|| {
            format!(
                "request {id}: {} {operation:?} {durability:?}, {} bytes",
                guest.disk,
                memory.len()
            )
        });
        guest.queue.submit(operation, durability, memory, cuts, id);
    }

    fn zero(&mut self, index: usize, discard: bool) {
        let Some(range) = self.range(index, 40) else {
            return;
        };
        let id = self.id();
        let kind = self.issue(index, range, false, Value::Zero);
        self.note(id, index, kind);
        let unmap = self.random.chance(128);
        let operation = if discard {
            Operation::Discard(range)
        } else {
            Operation::WriteZeroes { range, unmap }
        };
        self.submit(
            index,
            operation,
            Durability::AfterFlush,
            Vec::new(),
            &[],
            id,
        );
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
        let operation = Operation::Read(range.start);
        self.submit(index, operation, Durability::AfterFlush, memory, &cuts, id);
    }

    fn flush(&mut self, index: usize) {
        let marks = self.marks(index);
        let id = self.id();
        self.note(id, index, Kind::Flush(marks));
        let operation = Operation::Flush;
        self.submit(
            index,
            operation,
            Durability::AfterFlush,
            Vec::new(),
            &[],
            id,
        );
    }

    /// A request has ended: tells the oracle.
    fn ended(&mut self, id: u64, result: Result<(), RequestError>, memory: &[u8]) {
        trace(|| format!("request {id} ended: {result:?}"));
        self.ended += 1;
        let request = self.requests.remove(&id).unwrap();
        if let Kind::Change { range, .. } | Kind::Read { range, .. } = &request.kind {
            self.busy.end(&request.disk, *range);
        }
        let shared = self.shared.clone();
        let mut watch = shared.lock().unwrap();
        let disk = &request.disk;
        let ok = result.is_ok();
        let mut problem = None;
        let forbidden = matches!(request.kind, Kind::Forbidden);
        match request.kind {
            Kind::Change {
                range,
                stable,
                issued,
            } => {
                let sectors = range.start.0..range.end().0;
                watch.oracle.end(disk, issued, sectors, ok, stable);
            }
            Kind::Forbidden if result == Err(RequestError::ReadOnly) => {}
            Kind::Forbidden => {
                problem = Some(format!(
                    "a change of a read-only disk ended with {result:?}"
                ));
            }
            Kind::Flush(marks) if ok => watch.oracle.flushed(disk, &marks),
            Kind::Flush(_) => {}
            Kind::Read { range, marks } if ok => {
                let family = watch.oracle.world.disks[disk].family;
                problem = match pick::found(family, range, memory) {
                    Ok(found) => watch.oracle.wrong_read(disk, range.start.0, &found, &marks),
                    Err(problem) => Some(problem),
                };
            }
            Kind::Read { .. } => {}
        }
        if !ok && !forbidden {
            problem = Some(format!("it failed on a good disk: {result:?}"));
        }
        if let Some(problem) = problem {
            watch.violation(format!("request {id} of {disk}: {problem}"));
        }
    }
}
