//! A process that is killed after any store, and the one after it: each request is returned to the guest exactly once.
//!
//! The model plays a guest and, for the device, does with the real ring and the real tracker what a worker does. A life ends
//! after a given number of stores ([`death`]); then the next one goes on with what was stored.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::fs::File;

use proptest::prelude::*;
use vhost::vhost_user::message::VhostUserInflight;

use super::fault::{Fault, is_planted, plant};
use super::*;
use crate::vhost::inflight::InflightBuffer;
use crate::virtio::ring::SplitRing;
use crate::virtio::store::death;
use crate::virtio::test_guest::TestGuest;

/// Entries of the ring.
const SIZE: u16 = 8;

/// A guest that offers each head twice, and the file that outlives the device.
struct Machine {
    guest: TestGuest,
    file: File,
    given: VhostUserInflight,
    /// How often each head is still to be offered once it comes back.
    again: [u32; SIZE as usize],
    /// Whether each head is with the device.
    offered: [bool; SIZE as usize],
    /// Heads as a device took them, over all lives.
    order: Vec<u16>,
    /// A head that came back and was not with the device.
    wrong: Option<u16>,
}

/// A device in one life.
struct Device {
    ring: SplitRing,
    /// What is under way, in the order in which it was begun.
    under_way: Vec<u16>,
}

/// One run: so many heads, completed in this order, in batches of these lengths.
#[derive(Clone, Debug)]
struct Script {
    order: Vec<u16>,
    batches: Vec<usize>,
}

impl Machine {
    /// A guest whose rings begin at that index and offer these heads.
    fn new(begin: u16, heads: u16) -> Self {
        let guest = TestGuest::new(SIZE);
        guest.set_indices(begin);
        let shape = VhostUserInflight::new(0, 0, 1, SIZE);
        let (given, file) = InflightBuffer::create(&shape, 1).unwrap();
        let mut machine = Self {
            guest,
            file,
            given,
            again: [1; SIZE as usize],
            offered: [false; SIZE as usize],
            order: Vec::new(),
            wrong: None,
        };
        for head in 0..heads {
            machine.offer(head);
        }
        machine
    }

    fn offer(&mut self, head: u16) {
        self.offered[usize::from(head)] = true;
        self.guest.offer(head);
    }

    fn region(&self) -> QueueRegion {
        let buffer = InflightBuffer::map(&self.file, &self.given, 1).unwrap();
        buffer.region(0).unwrap()
    }

    /// A device begins a life. `base`: what its front-end says.
    fn live(&mut self, base: u16) -> Result<Device, String> {
        let layout = self.guest.layout();
        let used = layout.used_index();
        let resumed = resume(self.region(), SIZE, used, base).map_err(|why| why.to_string())?;
        // In the order in which they were taken.
        let last = |head: &u16| self.order.iter().rposition(|taken| taken == head);
        let places: Vec<_> = resumed.replay.iter().map(last).collect();
        if places.contains(&None) || !places.is_sorted() {
            return Err(format!("{:?} of {:?}", resumed.replay, self.order));
        }
        let ring = SplitRing::new(layout, resumed.next_avail, false, None);
        Ok(Device {
            ring: ring.tracked_by(Some(resumed.tracker)),
            under_way: resumed.replay,
        })
    }

    /// The guest takes what was returned to it, and offers some of it again.
    fn look(&mut self) {
        while let Some((head, _)) = self.guest.next_used() {
            let head = u16::try_from(head).unwrap();
            let place = usize::from(head);
            if !std::mem::take(&mut self.offered[place]) {
                self.wrong.get_or_insert(head);
                continue;
            }
            if self.again[place] > 0 {
                self.again[place] -= 1;
                self.offer(head);
            }
        }
    }

    /// The device takes all there is.
    fn take(&mut self, device: &mut Device) -> Result<(), String> {
        device.ring.refresh().map_err(|why| why.to_string())?;
        while let Some(head) = device.ring.take().map_err(|why| why.to_string())? {
            if device.under_way.contains(&head) {
                return Err(format!("head {head} was taken twice"));
            }
            if !is_planted(Fault::TakenLate) {
                device.ring.track(head);
            }
            self.order.push(head);
            device.under_way.push(head);
            if death::is_here() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// The device completes these heads as one batch.
    fn complete(&mut self, device: &mut Device, heads: &[u16]) {
        for head in heads {
            let place = device.under_way.iter().position(|taken| taken == head);
            device.under_way.remove(place.unwrap());
            if is_planted(Fault::TakenLate) {
                device.ring.track(*head);
            }
            device.ring.put_used(*head, 1);
        }
        device.ring.publish();
        self.look();
    }

    /// One life, until all is done or it ends.
    fn play(&mut self, script: &Script, base: u16) -> Result<(), String> {
        let mut device = self.live(base)?;
        self.take(&mut device)?;
        let mut order = script.order.iter().copied();
        for batch in &script.batches {
            let batch = order.by_ref().take(*batch);
            let here: Vec<u16> = batch.filter(|h| device.under_way.contains(h)).collect();
            if death::is_here() {
                break;
            }
            self.complete(&mut device, &here);
            self.take(&mut device)?;
        }
        // The rest backwards, two at a time.
        while !death::is_here() && !device.under_way.is_empty() {
            let rest = device.under_way.iter().rev().take(2);
            let batch: Vec<u16> = rest.copied().collect();
            self.complete(&mut device, &batch);
            self.take(&mut device)?;
        }
        Ok(())
    }

    /// All that was offered was returned, and the region says so.
    fn judge(&self) -> Result<(), String> {
        if let Some(head) = self.wrong {
            return Err(format!("head {head} came back twice"));
        }
        let region = self.region();
        let used = self.guest.layout().used_index();
        let left = (0..SIZE).filter(|head| region.in_flight(*head)).count();
        if self.offered.contains(&true) || left > 0 || region.used_index() != used {
            return Err(format!(
                "{:?} never returned, {left} noted; used index {used}, noted {}",
                self.offered,
                region.used_index()
            ));
        }
        Ok(())
    }
}

/// Plays a script in lives of so many stores, and one without an end. Returns how many stores each life made.
fn run(script: &Script, begin: u16, lives: &[usize]) -> Result<Vec<usize>, String> {
    let heads = u16::try_from(script.order.len()).unwrap();
    death::after(None);
    let mut machine = Machine::new(begin, heads);
    let mut made = Vec::new();
    for life in lives.iter().copied().map(Some).chain([None]) {
        // Some front-ends say that a ring that was started goes on where its guest is.
        let started = machine.region().was_started();
        let base = begin.wrapping_add(if started { heads } else { 0 });
        death::after(life);
        let played = machine.play(script, base);
        made.push(death::made());
        let dead = death::is_here();
        death::after(None);
        machine.look();
        // What a process finds once it is dead is nobody's business.
        if let (Err(why), false) = (played, dead) {
            return Err(format!(
                "{why}: {script:?} beginning at {begin}, lives of {lives:?} stores"
            ));
        }
    }
    machine.judge().map_err(|why| {
        format!("{why}: {script:?} beginning at {begin}, lives of {lives:?} stores")
    })?;
    Ok(made)
}

/// All orders of these.
fn orders(heads: &[u16]) -> Vec<Vec<u16>> {
    if heads.is_empty() {
        return vec![Vec::new()];
    }
    let mut all = Vec::new();
    for (place, head) in heads.iter().enumerate() {
        let mut rest = heads.to_vec();
        rest.remove(place);
        all.extend(orders(&rest).into_iter().map(|mut order| {
            order.insert(0, *head);
            order
        }));
    }
    all
}

/// All ways to cut so many into batches.
fn cuts(count: usize) -> Vec<Vec<usize>> {
    if count == 0 {
        return vec![Vec::new()];
    }
    let first = |first| {
        let rest = cuts(count - first);
        rest.into_iter().map(move |mut cut| {
            cut.insert(0, first);
            cut
        })
    };
    (1..=count).flat_map(first).collect()
}

/// All scripts for so many heads.
fn scripts(heads: u16) -> impl Iterator<Item = Script> {
    let heads: Vec<u16> = (0..heads).collect();
    orders(&heads).into_iter().flat_map(move |order| {
        let batches = cuts(heads.len()).into_iter();
        batches.map(move |batches| Script {
            order: order.clone(),
            batches,
        })
    })
}

/// Ends the first life of every script after every store. Returns how many runs that were, or the first that went wrong.
fn end_everywhere(heads: u16) -> Result<usize, String> {
    let mut runs = 0;
    for script in scripts(heads) {
        for begin in [0, 0xfffd] {
            let whole = run(&script, begin, &[])?;
            for stores in 0..=whole[0] {
                run(&script, begin, &[stores])?;
                runs += 1;
            }
        }
    }
    Ok(runs)
}

#[test]
fn each_request_is_returned_once_whichever_store_is_the_last() {
    for heads in 1..=4 {
        let runs = end_everywhere(heads).unwrap_or_else(|why| panic!("{why}"));
        println!("{heads} heads: {runs} runs");
        assert!(runs > 40);
    }
}

#[test]
fn and_whichever_store_is_the_last_of_the_life_after_that() {
    for heads in 1..=2 {
        for script in scripts(heads) {
            let whole = run(&script, 0xfffe, &[]).unwrap()[0];
            for first in 0..=whole {
                let second = run(&script, 0xfffe, &[first]).unwrap()[1];
                for stores in 0..=second {
                    let played = run(&script, 0xfffe, &[first, stores]);
                    played.unwrap_or_else(|why| panic!("{why}"));
                }
            }
        }
    }
}

#[test]
fn canary_each_fault_is_noticed() {
    for fault in [
        Fault::ClearedFirst,
        Fault::UsedIndexFirst,
        Fault::NoRepair,
        Fault::RepairOfOne,
        Fault::TakenLate,
    ] {
        plant(Some(fault));
        let noticed = end_everywhere(3);
        plant(None);
        println!("{fault:?}: {}", noticed.expect_err("not noticed"));
    }
}

/// A region that says what the test wants.
fn region(write: impl FnOnce(&QueueRegion)) -> QueueRegion {
    let shape = VhostUserInflight::new(0, 0, 1, SIZE);
    let (given, file) = InflightBuffer::create(&shape, 1).unwrap();
    let buffer = InflightBuffer::map(&file, &given, 1).unwrap();
    let region = buffer.region(0).unwrap();
    write(&region);
    region
}

#[test]
fn a_new_region_begins_where_the_front_end_says() {
    for (used, base) in [(0, 0), (4711, 4711), (65535, 65535), (10, 12)] {
        let resumed = resume(region(|_| ()), SIZE, used, base).unwrap();
        assert_eq!((resumed.next_avail, resumed.goes_on), (base, false));
        assert!(resumed.replay.is_empty());
    }
    // A ring that was started and took nothing is no new one, though nobody has used it.
    let region = region(|_| ());
    drop(resume(region.clone(), SIZE, 0, 0).unwrap());
    assert!(!region.has_history());
    let resumed = resume(region, SIZE, 0, 6).unwrap();
    assert_eq!((resumed.next_avail, resumed.goes_on), (0, true));
}

#[test]
fn a_used_region_begins_where_the_ring_was() {
    let used = region(|region| {
        region.set_used_index(9);
        for (head, counter) in [(5, 100), (2, 101), (7, 3)] {
            region.set_counter(head, counter);
            region.set_in_flight(head, true);
        }
    });
    let mut resumed = resume(used.clone(), SIZE, 9, 40).unwrap();
    assert_eq!((resumed.next_avail, resumed.goes_on), (12, true));
    assert_eq!(resumed.replay, [7, 5, 2]);
    // What is new comes behind what is carried out again.
    resumed.tracker.taken(0);
    assert!(used.counter(0) > 101);
    let resumed = resume(used, SIZE, 9, 40).unwrap();
    assert_eq!(resumed.replay, [7, 5, 2, 0]);
}

#[test]
fn a_ring_that_was_reset_begins_anew() {
    // Drained, then used by a driver that began at 0, with the buffer of before.
    let drained = |region: &QueueRegion| {
        region.set_used_index(500);
        region.set_counter(3, 77);
    };
    let resumed = resume(region(drained), SIZE, 0, 0).unwrap();
    assert_eq!((resumed.next_avail, resumed.replay.len()), (0, 0));
    // The same with a request under way cannot be one machine.
    let resumed = resume(
        region(|region| {
            drained(region);
            region.set_in_flight(3, true);
        }),
        SIZE,
        0,
        0,
    );
    assert!(matches!(resumed, Err(Mismatch::OtherRing { lag: 65036 })));
}

#[test]
fn a_region_that_was_never_written_is_made_a_new_one() {
    let blank = region(|region| {
        region.initialize();
        region.set_in_flight(3, true);
    });
    assert!(blank.has_history());
    blank.initialize();
    assert!(!blank.has_history() && blank.version() == 1);
}

#[test]
fn a_ring_may_be_smaller_than_its_region_and_not_larger() {
    assert!(resume(region(|_| ()), SIZE / 2, 0, 0).is_ok());
    let large = resume(region(|_| ()), SIZE * 2, 0, 0);
    assert!(matches!(large, Err(Mismatch::RingTooLarge { .. })));
    let beyond = region(|region| region.set_in_flight(SIZE - 1, true));
    let small = resume(beyond, SIZE / 2, 0, 0);
    assert!(matches!(small, Err(Mismatch::NoSuchHead(7))));
}

proptest! {
    /// Whatever a region says: it is refused, or each head is carried out again once and the ring goes on within its size.
    #[test]
    fn nothing_that_a_region_says_goes_further(
        used in any::<u16>(),
        noted in any::<u16>(),
        near in any::<bool>(),
        size in prop_oneof![Just(1u16), Just(4), Just(SIZE)],
        batch_head in prop_oneof![0..SIZE, any::<u16>()],
        entries in prop::collection::vec(
            (any::<bool>(), prop_oneof![0..SIZE, any::<u16>()], prop_oneof![Just(0u64), Just(u64::MAX), any::<u64>()]),
            usize::from(SIZE),
        ),
    ) {
        let used = if near { noted.wrapping_add(used % 10) } else { used };
        let region = region(|region| {
            region.set_used_index(noted);
            region.set_last_batch_head(batch_head);
            for (head, (in_flight, next, counter)) in (0..).zip(&entries) {
                region.set_in_flight(head, *in_flight);
                region.set_next(head, *next);
                region.set_counter(head, *counter);
            }
        });
        let Ok(mut resumed) = resume(region.clone(), size, used, 0) else {
            return Ok(());
        };
        prop_assert_eq!(region.used_index(), used);
        let mut heads = resumed.replay.clone();
        heads.sort_unstable();
        heads.dedup();
        prop_assert_eq!(heads.len(), resumed.replay.len());
        prop_assert!(heads.iter().all(|head| *head < size && region.in_flight(*head)));
        prop_assert!(resumed.replay.is_sorted_by_key(|head| region.counter(*head)));
        // And it can be used, by a guest that offers a head twice as well.
        for head in [0, 0, size - 1] {
            resumed.tracker.taken(head);
            resumed.tracker.returned(head);
        }
        resumed.tracker.published(used.wrapping_add(3));
        prop_assert!(!region.in_flight(0));
    }
}
