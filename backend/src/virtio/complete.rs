//! Requests under way on one ring, each returned to its guest exactly once.
//!
//! The head of a chain names its request: a ring can have a chain only once under way, so each head has one slot, and a
//! head whose slot is taken is a fault of the driver. A slot keeps the memory that its addresses lie in.
//!
//! INVARIANT: `count` is the number of slots with parts left, `awaited` of those that are awaited.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vm_memory::GuestAddress;

use super::chain::Chain;
use super::request::{Kind, Request, Status, StatusPlace};
use crate::vhost::dirty_log::DirtyLog;
use crate::vhost::memory::GuestMemory;

/// The guest memory that a worker uses now. Counted by the worker alone, so that a request costs no shared atomic.
pub type WorkerMemory = Rc<Arc<GuestMemory>>;

/// A request that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// What it was.
    pub kind: Kind,
    /// How it ended.
    pub status: Status,
    /// Bytes of data.
    pub bytes: u64,
    /// The used length to report.
    pub used_len: u32,
}

/// What is kept of a request until it ends.
#[derive(Debug, Default)]
struct Slot {
    /// The request, and the memory its addresses lie in.
    request: Option<(Request, WorkerMemory)>,
    /// Operations of the disk that have not ended.
    parts: usize,
    /// Whether one of them failed.
    failed: bool,
    /// Whether somebody waits for its end.
    awaited: bool,
    /// Guest memory that the request writes: address and bytes.
    written: Vec<(GuestAddress, u64)>,
}

/// The requests under way on one ring.
#[derive(Debug)]
pub struct InFlight {
    /// One a head.
    slots: Vec<Slot>,
    /// How many are taken.
    count: usize,
    /// How many of them somebody waits for.
    awaited: usize,
}

impl InFlight {
    /// For a ring with `size` entries.
    pub fn new(size: u16) -> Self {
        Self {
            slots: (0..size).map(|_| Slot::default()).collect(),
            count: 0,
            awaited: 0,
        }
    }

    /// Somebody waits for the end of all that are under way now.
    pub fn await_all(&mut self) {
        for slot in &mut self.slots {
            slot.awaited = slot.request.is_some();
        }
        self.awaited = self.count;
    }

    /// How many of those are under way still.
    pub fn awaited(&self) -> usize {
        self.awaited
    }

    /// How many requests are under way.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Whether this head is under way.
    pub fn holds(&self, head: u16) -> bool {
        self.slots
            .get(usize::from(head))
            .is_some_and(|slot| slot.request.is_some())
    }

    /// Notes a request that `parts` operations of the disk make up. `chain` holds its data. The slot is free.
    pub fn begin(
        &mut self,
        head: u16,
        request: Request,
        parts: usize,
        chain: &Chain,
        memory: &WorkerMemory,
    ) {
        debug_assert!(!self.holds(head) && parts > 0);
        let Some(slot) = self.slots.get_mut(usize::from(head)) else {
            return;
        };
        slot.parts = parts;
        slot.failed = false;
        slot.written.clear();
        if request.kind == Kind::Read {
            slot.written.extend(writes_of(chain));
        }
        slot.request = Some((request, Rc::clone(memory)));
        self.count += 1;
    }

    /// Notes the end of one operation of the request at `head`. Returns the request once all have ended: its status byte is
    /// written then, and its pages are marked in the log.
    pub fn part_ended(&mut self, head: u16, ok: bool, log: Option<&DirtyLog>) -> Option<Ended> {
        let slot = self.slots.get_mut(usize::from(head))?;
        slot.failed |= !ok;
        slot.parts = slot.parts.checked_sub(1)?;
        if slot.parts > 0 {
            return None;
        }
        let (request, _memory) = slot.request.take()?;
        self.count -= 1;
        self.awaited -= usize::from(std::mem::take(&mut slot.awaited));
        let status = if slot.failed {
            Status::IoError
        } else {
            Status::Ok
        };
        Some(end(&request, status, slot.written.iter().copied(), log))
    }
}

/// The guest memory that a chain's data area covers.
fn writes_of(chain: &Chain) -> impl Iterator<Item = (GuestAddress, u64)> {
    let lens = chain.writable.iter().map(|segment| segment.len as u64);
    chain.writable_guest.iter().copied().zip(lens)
}

/// Ends a request that needed nothing of the disk. `chain` holds its data.
pub fn end_at_once(
    request: &Request,
    status: Status,
    chain: &Chain,
    log: Option<&DirtyLog>,
) -> Ended {
    end(request, status, writes_of(chain), log)
}

/// Marks what a request wrote and writes its status byte.
fn end(
    request: &Request,
    status: Status,
    written: impl Iterator<Item = (GuestAddress, u64)>,
    log: Option<&DirtyLog>,
) -> Ended {
    let StatusPlace { host, guest } = request.status;
    #[expect(unsafe_code, reason = "the status byte lies in guest memory")]
    // SAFETY: the request's memory is still held by its slot or, for one that ends at once, by the worker.
    let place = unsafe { AtomicU8::from_ptr(host.as_ptr()) };
    place.store(status.byte(), Ordering::Relaxed);
    if let Some(log) = log {
        for (address, len) in written {
            log.mark(address, len);
        }
        log.mark(guest, 1);
    }
    let used_len = match status {
        Status::Ok => request.used_on_success,
        Status::IoError | Status::Unsupported => request.used_on_failure,
    };
    Ended {
        kind: request.kind,
        status,
        bytes: request.bytes,
        used_len,
    }
}

#[cfg(test)]
mod tests {
    use std::ptr::NonNull;

    use stratablk_layers::units::Sector;

    use super::super::request::Task;
    use super::super::test_guest::{TestGuest, WRITE};
    use super::*;

    fn request(guest: &TestGuest, kind: Kind) -> Request {
        let place = GuestAddress(0x3000);
        let byte = guest.memory().translate(place, 1).expect("mapped");
        let host = NonNull::new(byte.ptr_guard_mut().as_ptr()).expect("mapped");
        Request {
            task: Task::Read(Sector(0)),
            kind,
            status: StatusPlace { host, guest: place },
            bytes: 512,
            used_on_success: 513,
            used_on_failure: 0,
        }
    }

    #[test]
    fn a_request_ends_with_its_last_part_and_only_once() {
        let guest = TestGuest::new(4);
        let memory = Rc::new(Arc::new(GuestMemory::default()));
        let mut in_flight = InFlight::new(4);
        let chain = Chain::default();
        guest.write(0x3000, &[0xff]);
        in_flight.begin(2, request(&guest, Kind::Zero), 3, &chain, &memory);
        assert!(in_flight.holds(2) && !in_flight.holds(1) && !in_flight.holds(9));
        assert_eq!(in_flight.part_ended(2, true, None), None);
        assert_eq!(in_flight.part_ended(2, false, None), None);
        assert_eq!(guest.read(0x3000, 1), [0xff]);
        let ended = in_flight.part_ended(2, true, None).expect("the last part");
        assert_eq!((ended.status, ended.used_len), (Status::IoError, 0));
        assert_eq!(guest.read(0x3000, 1), [1]);
        assert_eq!(in_flight.count(), 0);
        assert_eq!(Rc::strong_count(&memory), 1, "the memory is let go");
        assert_eq!(in_flight.part_ended(2, true, None), None);
        assert_eq!(in_flight.part_ended(9, true, None), None);
    }

    #[test]
    fn who_waits_does_so_for_what_was_under_way_and_for_nothing_later() {
        let guest = TestGuest::new(4);
        let memory = Rc::new(Arc::new(GuestMemory::default()));
        let mut in_flight = InFlight::new(4);
        let chain = Chain::default();
        let request = request(&guest, Kind::Zero);
        in_flight.await_all();
        assert_eq!(in_flight.awaited(), 0);
        in_flight.begin(0, request, 1, &chain, &memory);
        in_flight.begin(1, request, 1, &chain, &memory);
        in_flight.await_all();
        in_flight.begin(2, request, 1, &chain, &memory);
        assert_eq!(in_flight.awaited(), 2);
        in_flight.part_ended(2, true, None).expect("it ends");
        in_flight.part_ended(0, true, None).expect("it ends");
        in_flight.begin(0, request, 1, &chain, &memory);
        assert_eq!(in_flight.awaited(), 1);
        in_flight.part_ended(1, true, None).expect("it ends");
        assert_eq!((in_flight.awaited(), in_flight.count()), (0, 1));
        // A second one who waits: those of the first count too.
        in_flight.await_all();
        in_flight.await_all();
        assert_eq!(in_flight.awaited(), 1);
        in_flight.part_ended(0, true, None).expect("it ends");
        assert_eq!(in_flight.awaited(), 0);
    }

    #[test]
    fn data_and_status_of_a_read_are_logged() {
        let guest = TestGuest::new(4);
        let memory = Rc::new(Arc::new(GuestMemory::default()));
        guest.descriptor(0, 0x5ff0, 0x20, WRITE, 0);
        let chain = guest.walk(0, true).expect("a good chain");
        let (log, bits) = guest.dirty_log();
        let mut in_flight = InFlight::new(4);
        in_flight.begin(0, request(&guest, Kind::Read), 1, &chain, &memory);
        in_flight.part_ended(0, true, Some(&log));
        assert_eq!(bits(), vec![3, 5, 6]);
        in_flight.begin(
            0,
            request(&guest, Kind::Write),
            1,
            &Chain::default(),
            &memory,
        );
        let (log, bits) = guest.dirty_log();
        in_flight.part_ended(0, true, Some(&log));
        assert_eq!(bits(), vec![3]);
    }
}
