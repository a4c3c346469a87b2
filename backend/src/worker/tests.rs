//! Tests of a worker over a disk that answers when the test says so.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::fs::File;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd};
use stratablk_layers::units::Sector;
use stratablk_layers::volume::RequestError;

use super::command::QueueSetup;
use super::test_disk::{Asked, FakeDisk};
use super::*;
use crate::vhost::event::Event;
use crate::virtio::test_guest::{NEXT, TestGuest, WRITE};

mod replay;

/// How long anything may take.
const DEADLINE: Duration = Duration::from_secs(10);

/// The guest's end of an event fd, and ours.
fn event_pair() -> (File, Arc<Event>) {
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let theirs = File::from(fd);
    let ours = Event::new(theirs.try_clone().unwrap()).unwrap();
    (theirs, Arc::new(ours))
}

fn signal(file: &File) {
    rustix::io::write(file, &[1, 0, 0, 0, 0, 0, 0, 0]).unwrap();
}

/// Waits for an event and takes it.
fn wait_for(file: &File) {
    let mut fds = [PollFd::new(file, PollFlags::IN)];
    let timeout = Timespec::try_from(DEADLINE).unwrap();
    assert_eq!(
        rustix::event::poll(&mut fds, Some(&timeout)).unwrap(),
        1,
        "no event"
    );
    rustix::io::read(file, &mut [0u8; 8]).unwrap();
}

/// A worker with one ring of 16 entries.
struct Bench {
    guest: TestGuest,
    disk: Arc<FakeDisk>,
    worker: Option<WorkerHandle>,
    counters: Arc<Counters>,
    trouble: Arc<Signal>,
    kick: File,
    kick_event: Arc<Kick>,
    call: File,
    call_event: Arc<Event>,
    err: File,
    err_event: Arc<Event>,
}

impl Bench {
    /// A worker without its ring.
    fn without_ring(at_once: bool) -> Self {
        let guest = TestGuest::new(16);
        let disk = FakeDisk::new(at_once);
        let counters = Arc::new(Counters::default());
        let trouble = Arc::new(Signal::new().unwrap());
        let setup = WorkerSetup {
            disk: Arc::clone(&disk),
            read_only: false,
            memory: Arc::clone(guest.memory()),
            log: None,
            durability: Durability::AfterFlush,
            counters: Arc::clone(&counters),
            trouble: Arc::clone(&trouble),
        };
        let worker = start("worker-test".into(), setup).unwrap();
        let (kick, ours) = event_pair();
        let (call, call_event) = event_pair();
        let (err, err_event) = event_pair();
        Self {
            guest,
            disk,
            worker: Some(worker),
            counters,
            trouble,
            kick,
            kick_event: Arc::new(Kick::Event(Arc::into_inner(ours).unwrap())),
            call,
            call_event,
            err,
            err_event,
        }
    }

    fn new(at_once: bool) -> Self {
        let bench = Self::without_ring(at_once);
        bench.attach(0, false);
        bench
    }

    fn worker(&self) -> &WorkerHandle {
        self.worker.as_ref().unwrap()
    }

    fn setup(&self, base: u16, look: bool) -> QueueSetup {
        QueueSetup {
            index: 0,
            layout: self.guest.layout(),
            base,
            event_idx: false,
            indirect: true,
            log: None,
            kick: Arc::clone(&self.kick_event),
            call: Some(Arc::clone(&self.call_event)),
            err: Some(Arc::clone(&self.err_event)),
            look,
            resumed: None,
        }
    }

    /// Lets the worker go round at least once: it obeys commands once a round.
    fn round(&self) {
        for _ in 0..2 {
            let command = self.worker().set_durability(Durability::AfterFlush);
            command.unwrap();
        }
    }

    fn attach(&self, base: u16, look: bool) {
        self.worker().attach(self.setup(base, look)).unwrap();
    }

    /// Writes a read of one sector at this head and the two descriptors after it.
    fn read_request(&self, head: u16, sector: u64) {
        let base = 0x1000 + 0x1000 * u64::from(head);
        let mut header = [0; 16];
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.guest.write(base, &header);
        self.guest.write(base + 0x400, &[0xee; 513]);
        self.guest.descriptor(head, base, 16, NEXT, head + 1);
        self.guest
            .descriptor(head + 1, base + 0x400, 512, NEXT | WRITE, head + 2);
        self.guest.descriptor(head + 2, base + 0x600, 1, WRITE, 0);
    }

    fn submit_read(&self, head: u16, sector: u64) {
        self.read_request(head, sector);
        self.guest.offer(head);
        signal(&self.kick);
    }

    /// The first data byte and the status byte of the read at this head.
    fn answer(&self, head: u16) -> (u8, u8) {
        let base = 0x1000 + 0x1000 * u64::from(head);
        (
            self.guest.read(base + 0x400, 1)[0],
            self.guest.read(base + 0x600, 1)[0],
        )
    }

    /// Waits for the next used element.
    fn used(&self) -> (u32, u32) {
        loop {
            if let Some(used) = self.guest.next_used() {
                return used;
            }
            wait_for(&self.call);
        }
    }
}

#[test]
fn a_read_is_carried_out_and_reported() {
    let bench = Bench::new(true);
    bench.submit_read(3, 7);
    assert_eq!(bench.used(), (3, 513));
    assert_eq!(bench.answer(3), (0x5a, 0));
    let asked = bench.disk.state().asked.clone();
    let read = Asked::Submit(Operation::Read(Sector(7)), Durability::AfterFlush);
    assert_eq!(asked, vec![Asked::BeginBatch, read, Asked::Kick]);
    let mut totals = counters::Totals::default();
    bench.counters.add_to(&mut totals);
    assert_eq!(
        (totals.reads, totals.read_bytes, totals.errors),
        (1, 512, 0)
    );
}

#[test]
fn a_failed_read_reports_no_data() {
    let bench = Bench::new(false);
    bench.submit_read(0, 7);
    bench.disk.wait_held(1);
    bench.disk.release(Err(RequestError::Io));
    assert_eq!(bench.used(), (0, 0));
    assert_eq!(bench.answer(0).1, 1);
}

#[test]
fn a_kick_before_the_attachment_is_not_lost() {
    let bench = Bench::without_ring(true);
    bench.submit_read(0, 1);
    bench.attach(0, false);
    assert_eq!(bench.used(), (0, 513));
}

#[test]
fn an_armed_ring_waits_for_its_kick_and_a_resumed_one_does_not() {
    let bench = Bench::without_ring(true);
    bench.read_request(0, 1);
    bench.guest.offer(0);
    bench.attach(0, false);
    bench.round();
    assert_eq!(bench.guest.next_used(), None, "taken before the first kick");
    assert_eq!(bench.worker().detach(0).unwrap(), Some(0));
    bench.attach(0, true);
    assert_eq!(bench.used(), (0, 513));
}

#[test]
fn a_ring_without_a_kick_is_looked_at() {
    let bench = Bench::without_ring(true);
    let mut setup = bench.setup(0, false);
    setup.kick = Arc::new(Kick::Poll);
    bench.worker().attach(setup).unwrap();
    for head in [0, 3, 6] {
        bench.read_request(head, 1);
        bench.guest.offer(head);
        assert_eq!(bench.used(), (u32::from(head), 513));
    }
}

#[test]
fn who_awaits_what_is_under_way_waits_for_nothing_else() {
    let bench = Bench::new(false);
    let completed = || {
        let (done, completed) = mpsc::channel();
        let line = bench.worker().line().upgrade().unwrap();
        line.await_all(done).unwrap();
        completed
    };
    let disconnected = Err(mpsc::TryRecvError::Disconnected);
    let idle = completed();
    bench.round();
    assert_eq!(idle.try_recv(), disconnected);
    bench.submit_read(0, 1);
    bench.disk.wait_held(1);
    let first = completed();
    bench.round();
    bench.submit_read(3, 2);
    bench.disk.wait_held(2);
    assert_eq!(first.try_recv(), Err(mpsc::TryRecvError::Empty));
    let later = bench.disk.state().held.pop().unwrap();
    bench.disk.release(Ok(()));
    assert_eq!(bench.used(), (0, 513));
    bench.round();
    assert_eq!(first.try_recv(), disconnected);
    bench.disk.state().held.push(later);
    let second = completed();
    bench.round();
    assert_eq!(second.try_recv(), Err(mpsc::TryRecvError::Empty));
    bench.disk.release(Ok(()));
    assert_eq!(bench.used(), (3, 513));
    bench.round();
    assert_eq!(second.try_recv(), disconnected);
}

#[test]
fn leaving_a_ring_waits_for_what_is_under_way() {
    let bench = Bench::new(false);
    bench.submit_read(0, 1);
    bench.submit_read(3, 2);
    bench.disk.wait_held(2);
    std::thread::scope(|scope| {
        let worker = bench.worker();
        let detached = scope.spawn(move || worker.detach(0).unwrap());
        bench.round();
        assert!(!detached.is_finished());
        bench.disk.release(Ok(()));
        assert_eq!(detached.join().unwrap(), Some(2));
    });
    // Everything was reported before the detachment returned; what comes now is not taken.
    assert_eq!(bench.guest.next_used(), Some((0, 513)));
    assert_eq!(bench.guest.next_used(), Some((3, 513)));
    assert_eq!(bench.answer(3), (0x5a, 0));
    bench.submit_read(6, 3);
    bench.round();
    assert_eq!(bench.disk.state().held.len(), 0);
    assert_eq!(bench.worker().detach(0).unwrap(), None);
}

#[test]
fn a_head_that_is_in_flight_breaks_the_ring_and_nothing_else() {
    let bench = Bench::new(false);
    bench.submit_read(0, 1);
    bench.disk.wait_held(1);
    bench.submit_read(0, 1);
    wait_for(&bench.err);
    bench.disk.release(Ok(()));
    assert_eq!(bench.used(), (0, 513));
    assert_eq!(bench.guest.next_used(), None, "completed once");
    assert_eq!(bench.worker().detach(0).unwrap(), Some(1));
    assert_eq!(bench.disk.state().held.len(), 0);
    // The worker serves a ring again.
    bench.guest.set_indices(0);
    bench.attach(0, false);
    bench.submit_read(3, 1);
    bench.disk.wait_held(1);
    bench.disk.release(Ok(()));
    assert_eq!(bench.used(), (3, 513));
}

#[test]
fn an_index_that_jumps_breaks_the_ring() {
    let bench = Bench::new(true);
    bench.guest.set_avail_index(17);
    signal(&bench.kick);
    wait_for(&bench.err);
    assert_eq!(bench.worker().detach(0).unwrap(), Some(0));
}

#[test]
fn malformed_chains_are_returned_and_the_ring_goes_on() {
    let bench = Bench::new(true);
    bench.guest.descriptor(0, 0x1000, 16, NEXT, 1);
    bench.guest.descriptor(1, 0x1000, 16, NEXT, 0);
    bench.guest.offer(0);
    bench.submit_read(3, 1);
    assert_eq!(bench.used(), (0, 0));
    assert_eq!(bench.used(), (3, 513));
}

#[test]
fn other_memory_waits_for_requests_of_the_old_one() {
    let bench = Bench::new(false);
    bench.submit_read(0, 1);
    bench.disk.wait_held(1);
    std::thread::scope(|scope| {
        let worker = bench.worker();
        let moved = scope.spawn(move || {
            let none = Arc::new(GuestMemory::default());
            worker.set_memory(none, Vec::new()).unwrap();
        });
        // The ring lies in memory that is gone.
        wait_for(&bench.err);
        bench.round();
        assert!(!moved.is_finished());
        bench.disk.release(Ok(()));
        moved.join().unwrap();
    });
    assert_eq!(
        bench.answer(0),
        (0x5a, 0),
        "completed in the memory it came from"
    );
    assert_eq!(
        bench.guest.next_used(),
        None,
        "there is no ring to report it in"
    );
    assert_eq!(bench.worker().detach(0).unwrap(), Some(1));
}

#[test]
fn a_ring_follows_its_memory() {
    let bench = Bench::new(true);
    bench.submit_read(0, 1);
    assert_eq!(bench.used(), (0, 513));
    let again = bench.guest.map_again();
    let layout = RingLayout::resolve(&again, 16, &bench.guest.addresses());
    bench.worker().set_memory(again, vec![(0, layout)]).unwrap();
    bench.submit_read(3, 1);
    assert_eq!(bench.used(), (3, 513));
}

#[test]
fn a_signal_that_was_owed_comes_with_the_call() {
    let bench = Bench::new(false);
    bench.worker().set_call(0, None).unwrap();
    bench.submit_read(0, 1);
    bench.disk.wait_held(1);
    bench.disk.release(Ok(()));
    let start = Instant::now();
    while bench.guest.next_used().is_none() {
        assert!(start.elapsed() < DEADLINE);
        std::thread::yield_now();
    }
    let call = Some(Arc::clone(&bench.call_event));
    bench.worker().set_call(0, call).unwrap();
    wait_for(&bench.call);
}

#[test]
fn a_full_ring_is_one_batch_with_few_signals() {
    let bench = Bench::new(true);
    for head in [0, 3, 6, 9, 12] {
        bench.read_request(head, 1);
        bench.guest.offer(head);
    }
    signal(&bench.kick);
    for head in [0, 3, 6, 9, 12] {
        assert_eq!(bench.used(), (head, 513));
    }
    let asked = bench.disk.state().asked.clone();
    let batches = asked
        .iter()
        .filter(|ask| **ask == Asked::BeginBatch)
        .count();
    assert_eq!(batches, 1);
    bench.round();
    let mut totals = counters::Totals::default();
    bench.counters.add_to(&mut totals);
    assert_eq!((totals.reads, totals.calls), (5, 1));
}

#[test]
fn the_end_of_a_worker_completes_what_is_under_way() {
    let mut bench = Bench::new(false);
    bench.submit_read(0, 1);
    bench.disk.wait_held(1);
    let worker = bench.worker.take();
    std::thread::scope(|scope| {
        let ended = scope.spawn(move || drop(worker));
        bench.disk.release(Ok(()));
        ended.join().unwrap();
    });
    assert_eq!(bench.used(), (0, 513));
}

#[test]
fn a_panic_is_reported_and_contained() {
    let bench = Bench::new(false);
    bench.disk.state().panic = true;
    bench.submit_read(0, 1);
    let mut fds = [PollFd::new(&*bench.trouble, PollFlags::IN)];
    let timeout = Timespec::try_from(DEADLINE).unwrap();
    assert_eq!(rustix::event::poll(&mut fds, Some(&timeout)).unwrap(), 1);
    assert!(bench.worker().detach(0).is_err());
}

#[test]
fn written_pages_are_logged_while_there_is_a_log() {
    let bench = Bench::new(true);
    let (log, pages) = bench.guest.dirty_log();
    bench.worker().set_log(Some(log), Vec::new()).unwrap();
    bench.submit_read(3, 1);
    bench.used();
    assert_eq!(pages(), vec![4]);
    bench.worker().set_log(None, Vec::new()).unwrap();
    bench.submit_read(6, 1);
    bench.used();
    assert_eq!(pages(), vec![4]);
}

#[test]
fn what_is_under_way_in_lost_memory_fails_and_its_rings_break() {
    let bench = Bench::new(false);
    bench.submit_read(0, 1);
    bench.disk.wait_held(1);
    // Only what lies behind the data and the ring, which a write of ours comes upon.
    bench.guest.cut(bench.guest.second_region());
    let lost = bench
        .guest
        .memory()
        .translate(vm_memory::GuestAddress(bench.guest.second_region()), 512);
    lost.unwrap().copy_from(&[1u8; 512]);
    bench.disk.release(Ok(()));
    assert_eq!(bench.used(), (0, 0));
    assert_eq!(bench.answer(0).1, 1, "it may have been read into the void");
    wait_for(&bench.err);
    bench.submit_read(3, 1);
    bench.round();
    assert_eq!(bench.disk.state().held.len(), 0, "nothing more is taken");
    assert_eq!(bench.worker().detach(0).unwrap(), Some(1));
    // Not even from a ring that is set up anew, until the memory is replaced.
    bench.attach(1, true);
    wait_for(&bench.err);
    assert_eq!(bench.worker().detach(0).unwrap(), Some(1));
    bench.guest.cut(bench.guest.guest_end());
    let mut setup = bench.setup(1, true);
    let again = bench.guest.map_again();
    setup.layout = RingLayout::resolve(&again, 16, &bench.guest.addresses()).unwrap();
    bench.worker().set_memory(again, Vec::new()).unwrap();
    bench.worker().attach(setup).unwrap();
    bench.disk.wait_held(1);
    bench.disk.release(Ok(()));
    assert_eq!(bench.used(), (3, 513));
}

#[test]
fn a_request_read_from_lost_memory_is_not_carried_out() {
    let bench = Bench::new(true);
    bench.read_request(0, 1);
    bench
        .guest
        .descriptor(0, bench.guest.second_region(), 16, NEXT, 1);
    bench.guest.offer(0);
    bench.guest.cut(bench.guest.second_region());
    signal(&bench.kick);
    assert_eq!(bench.used(), (0, 0));
    assert_eq!(
        bench.answer(0),
        (0xee, 1),
        "zeroes look like a read of sector 0"
    );
    wait_for(&bench.err);
    let asked = bench.disk.state().asked.clone();
    assert!(!asked.iter().any(|ask| matches!(ask, Asked::Submit(..))));
}

#[test]
fn a_ring_in_lost_memory_breaks() {
    let bench = Bench::new(true);
    bench.guest.cut(0);
    signal(&bench.kick);
    wait_for(&bench.err);
    assert_eq!(bench.disk.state().held.len(), 0);
    assert_eq!(bench.worker().detach(0).unwrap(), Some(0));
}

#[test]
fn a_dirty_log_that_is_lost_breaks_the_rings() {
    let bench = Bench::new(true);
    let file = crate::virtio::test_guest::memfd(4096);
    let log = Arc::new(DirtyLog::map(&file, 0, 4096).unwrap());
    bench.worker().set_log(Some(log), Vec::new()).unwrap();
    file.set_len(0).unwrap();
    bench.submit_read(0, 1);
    assert_eq!(bench.used(), (0, 513));
    wait_for(&bench.err);
}
