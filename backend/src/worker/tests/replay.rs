//! What an earlier process left under way is carried out again.

use vhost::vhost_user::message::VhostUserInflight;

use super::*;
use crate::vhost::inflight::{InflightBuffer, QueueRegion};
use crate::virtio::tracker::resume;

/// The region of the bench's ring, with these heads under way in this order.
fn region(heads: &[u16]) -> (File, QueueRegion) {
    let shape = VhostUserInflight::new(0, 0, 1, 16);
    let (given, file) = InflightBuffer::create(&shape, 1).unwrap();
    let buffer = InflightBuffer::map(&file, &given, 1).unwrap();
    let region = buffer.region(0).unwrap();
    for (head, counter) in heads.iter().zip(7..) {
        region.set_counter(*head, counter);
        region.set_in_flight(*head, true);
    }
    (file, region)
}

/// A bench whose ring has offered reads at these heads, of the sectors of the same numbers.
fn bench(at_once: bool, heads: &[u16]) -> Bench {
    let bench = Bench::without_ring(at_once);
    for head in heads {
        bench.read_request(*head, u64::from(*head));
        bench.guest.offer(*head);
    }
    bench
}

/// The set-up of the ring with that region.
fn setup(bench: &Bench, region: &QueueRegion) -> QueueSetup {
    let resumed = resume(region.clone(), 16, 0, 0).unwrap();
    QueueSetup {
        base: resumed.next_avail,
        look: resumed.goes_on,
        resumed: Some(resumed),
        ..bench.setup(0, false)
    }
}

/// The sectors that the disk was asked for, in order.
fn sectors(bench: &Bench) -> Vec<u64> {
    let state = bench.disk.state();
    let read = |asked: &Asked| match asked {
        Asked::Submit(Operation::Read(sector), _) => Some(sector.0),
        _ => None,
    };
    state.asked.iter().filter_map(read).collect()
}

#[test]
fn it_comes_first_and_in_the_order_in_which_it_was_taken() {
    // Heads 0, 3 and 6 were taken, in another order than they were offered; 9 and 12 were not.
    let bench = bench(false, &[0, 3, 6, 9, 12]);
    let (_file, region) = region(&[6, 0, 3]);
    let attached = bench.worker().attach(setup(&bench, &region));
    attached.unwrap();
    // Without a kick, and the guest is told that it may have been left untold.
    wait_for(&bench.call);
    bench.disk.wait_held(5);
    assert_eq!(sectors(&bench), [6, 0, 3, 9, 12]);
    assert!([0, 3, 6, 9, 12].iter().all(|head| region.in_flight(*head)));
    bench.disk.release(Ok(()));
    for head in [6, 0, 3, 9, 12] {
        assert_eq!(bench.used(), (head, 513));
    }
    let base = bench.worker().detach(0).unwrap();
    assert_eq!(base, Some(5));
    assert!((0..16).all(|head| !region.in_flight(head)));
    assert_eq!(region.used_index(), 5);
}

/// Nothing is carried out before it is certain that the ring is ours: neither what was under way nor what the guest kicks for.
#[test]
fn a_ring_that_is_held_does_nothing() {
    let bench = bench(true, &[0, 3, 6]);
    let (_file, region) = region(&[0, 3]);
    let attached = bench.worker().attach_as(setup(&bench, &region), true);
    attached.unwrap();
    signal(&bench.kick);
    bench.round();
    assert_eq!(sectors(&bench), [] as [u64; 0]);
    bench.worker().release().unwrap();
    for head in [0, 3, 6] {
        assert_eq!(bench.used(), (head, 513));
    }
    assert_eq!(sectors(&bench), [0, 3, 6]);
}

#[test]
fn a_ring_that_is_stopped_at_once_completes_it_before() {
    let bench = bench(true, &[0, 3, 6, 9]);
    let (_file, region) = region(&[0, 3, 6]);
    let (done, attached) = mpsc::channel();
    let attach = Command::Attach {
        setup: Box::new(setup(&bench, &region)),
        held: false,
        done,
    };
    let (done, detached) = mpsc::channel();
    let detach = Command::Detach { index: 0, done };
    // Both lie there before the worker looks.
    bench.worker().line.sender.send(attach).unwrap();
    bench.worker().line.sender.send(detach).unwrap();
    bench.worker().line.waiting.store(true, Ordering::Release);
    bench.worker().line.wake.raise();
    attached.recv().unwrap().unwrap();
    assert_eq!(detached.recv().unwrap(), Some(3), "nothing new is taken");
    for head in [0, 3, 6] {
        assert_eq!(bench.used(), (head, 513));
        assert!(!region.in_flight(u16::try_from(head).unwrap()));
    }
    assert_eq!(sectors(&bench), [0, 3, 6]);
}

#[test]
fn a_worker_that_ends_before_leaves_it_under_way() {
    let mut bench = bench(true, &[0, 3]);
    let (_file, region) = region(&[0, 3]);
    let (done, attached) = mpsc::channel();
    let attach = Command::Attach {
        setup: Box::new(setup(&bench, &region)),
        held: false,
        done,
    };
    bench.worker().line.sender.send(attach).unwrap();
    // Dropping the handle sends the command to stop, which is obeyed before anything is taken.
    drop(bench.worker.take());
    attached.recv().unwrap().unwrap();
    assert_eq!(bench.guest.next_used(), None);
    assert!(region.in_flight(0) && region.in_flight(3));
}

#[test]
fn a_buffer_that_is_taken_away_ends_its_ring_and_not_its_drain() {
    let bench = bench(false, &[0]);
    let (_sealed, _) = region(&[]);
    // One that can be cut.
    let file =
        File::from(rustix::fs::memfd_create("inflight", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(4096).unwrap();
    let given = VhostUserInflight::new(4096, 0, 1, 16);
    let buffer = InflightBuffer::map(&file, &given, 1).unwrap();
    let region = buffer.region(0).unwrap();
    bench.worker().attach(setup(&bench, &region)).unwrap();
    signal(&bench.kick);
    bench.disk.wait_held(1);
    file.set_len(0).unwrap();
    bench.disk.release(Ok(()));
    // The store behind the used index falls into the void; at the next look that is noticed.
    bench.submit_read(3, 3);
    wait_for(&bench.err);
    assert!(bench.worker().detach(0).unwrap().is_some());
}
