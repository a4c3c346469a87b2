//! The alarms of the oracle ring.

use std::collections::BTreeSet;
use std::sync::Arc;

use stratablk_layers::catalog::VolumeKind;

use crate::oracle::Promise::{Acknowledged, Flushed};
use crate::oracle::Value::{self, Stamp, Zero};
use crate::tree::{Content, Disk, Name, Oracle, Snapshot, World};

/// A disk of three sectors of zeroes.
fn oracle() -> Oracle {
    let mut world = World::default();
    let disk = Disk::new(0, 3, Content::pinned(vec![Zero; 3]));
    world.disks.insert("a".into(), Arc::new(disk));
    let mut oracle = Oracle::default();
    oracle.begin(world);
    oracle.settle();
    oracle
}

/// A write of the first sector, acknowledged.
fn write(oracle: &mut Oracle, id: u64) {
    let issued = oracle.issue("a", 0..1, Stamp(id));
    oracle.end("a", issued, 0..1, true, false);
}

/// A flush.
fn flush(oracle: &mut Oracle) {
    let marks = oracle.marks("a");
    oracle.flushed("a", &marks);
}

/// A volume's name.
fn volume(name: &str) -> Name {
    (name.into(), None)
}

/// A snapshot's name.
fn snapshot(name: &str) -> Name {
    ("a".into(), Some(name.into()))
}

/// The world with a snapshot more.
fn with_snapshot(oracle: &Oracle, name: &str) -> World {
    let mut next = oracle.world.clone();
    let disk = next.disk_mut("a").unwrap();
    let content = disk.content("a");
    disk.snapshots
        .insert(name.into(), Snapshot { group: 1, content });
    next
}

/// Whether the disk may hold this.
fn may(oracle: &Oracle, found: [Value; 3], promise: crate::oracle::Promise) -> bool {
    let world = &oracle.world;
    world.wrong(world, &volume("a"), &found, promise).is_none()
}

#[test]
fn what_was_flushed_or_acknowledged_is_there_and_nothing_older() {
    let mut oracle = oracle();
    write(&mut oracle, 7);
    assert!(may(&oracle, [Zero; 3], Flushed));
    assert!(!may(&oracle, [Zero; 3], Acknowledged), "lost by a kill");
    assert!(!may(&oracle, [Zero, Stamp(7), Zero], Flushed), "misplaced");
    flush(&mut oracle);
    write(&mut oracle, 8);
    assert!(may(&oracle, [Stamp(7), Zero, Zero], Flushed));
    assert!(may(&oracle, [Stamp(8), Zero, Zero], Flushed));
    assert!(!may(&oracle, [Zero; 3], Flushed), "lost by a power cut");
    oracle.forget("a");
    assert!(may(&oracle, [Stamp(7), Zero, Zero], Flushed));
    assert!(!may(&oracle, [Zero; 3], Flushed));
    let world = &oracle.world;
    let short = world.wrong(world, &volume("a"), &[Stamp(8), Zero], Acknowledged);
    assert!(short.is_some(), "a disk lost its end");
}

#[test]
fn a_read_is_no_older_than_what_was_acknowledged_when_it_was_issued() {
    let mut oracle = oracle();
    write(&mut oracle, 7);
    let before = oracle.marks("a");
    write(&mut oracle, 8);
    assert!(oracle.wrong_read("a", 0, &[Stamp(7)], &before).is_none());
    assert!(oracle.wrong_read("a", 0, &[Zero], &before).is_some());
    let after = oracle.marks("a");
    assert!(oracle.wrong_read("a", 0, &[Stamp(7)], &after).is_some());
}

#[test]
fn a_snapshot_is_one_of_what_was_possible_and_then_never_changes() {
    let mut oracle = oracle();
    write(&mut oracle, 7);
    let next = with_snapshot(&oracle, "s");
    oracle.begin(next);
    // Meanwhile a guest writes: before or after the instant.
    write(&mut oracle, 8);
    assert_eq!(oracle.done(), vec![snapshot("s")]);
    let mut lost = oracle.clone();
    assert!(
        lost.pin(&snapshot("s"), vec![Zero; 3]).is_some(),
        "what was acknowledged before it is not in it"
    );
    let mut foreign = oracle.clone();
    assert!(foreign.pin(&snapshot("s"), vec![Stamp(9); 3]).is_some());
    assert!(
        oracle
            .pin(&snapshot("s"), vec![Stamp(7), Zero, Zero])
            .is_none()
    );
    oracle.settle();
    let world = &oracle.world;
    let wrong = |found: [Value; 3]| world.wrong(world, &snapshot("s"), &found, Flushed);
    assert!(wrong([Stamp(7), Zero, Zero]).is_none());
    assert!(
        wrong([Stamp(8), Zero, Zero]).is_some(),
        "it changed, to what it once could have been"
    );
    assert!(wrong([Zero; 3]).is_some());
    assert!(world.wrong(world, &snapshot("t"), &[], Flushed).is_some());
}

#[test]
fn a_restore_brings_back_exactly_the_snapshot_and_keeps_what_was_there() {
    let mut oracle = oracle();
    write(&mut oracle, 7);
    oracle.begin(with_snapshot(&oracle, "s"));
    oracle.pin(&snapshot("s"), vec![Stamp(7), Zero, Zero]);
    oracle.settle();
    write(&mut oracle, 8);
    let mut next = with_snapshot(&oracle, "kept");
    let disk = next.disk_mut("a").unwrap();
    let content = disk.snapshots["s"].content.clone();
    disk.restore(content);
    oracle.begin(next);
    let next = oracle.next.as_ref().unwrap();
    let now = |found: [Value; 3]| next.wrong(&oracle.world, &volume("a"), &found, Acknowledged);
    assert!(now([Stamp(7), Zero, Zero]).is_none());
    assert!(now([Stamp(8), Zero, Zero]).is_some(), "not restored");
    assert!(may(&oracle, [Stamp(8), Zero, Zero], Acknowledged));
    assert!(
        !may(&oracle, [Stamp(7), Zero, Zero], Acknowledged),
        "restored before the command"
    );
    assert_eq!(oracle.done(), vec![snapshot("kept")]);
    let mut lost = oracle.clone();
    assert!(
        lost.pin(&snapshot("kept"), vec![Stamp(7), Zero, Zero])
            .is_some(),
        "what was there was not kept"
    );
    oracle.pin(&snapshot("kept"), vec![Stamp(8), Zero, Zero]);
    oracle.settle();
    assert!(may(&oracle, [Stamp(7), Zero, Zero], Flushed));
    assert!(!may(&oracle, [Stamp(8), Zero, Zero], Flushed));
    write(&mut oracle, 9);
    assert!(may(&oracle, [Stamp(9), Zero, Zero], Acknowledged));
}

#[test]
fn what_guests_do_during_a_command_is_in_both_worlds() {
    let mut oracle = oracle();
    let mut next = oracle.world.clone();
    next.disk_mut("a").unwrap().resize(4);
    oracle.begin(next);
    write(&mut oracle, 7);
    flush(&mut oracle);
    let (world, next) = (&oracle.world, oracle.next.as_ref().unwrap());
    let after = |found: &[Value]| next.wrong(world, &volume("a"), found, Flushed).is_none();
    assert!(after(&[Stamp(7), Zero, Zero, Zero]));
    assert!(!after(&[Zero; 4]), "a flush during the command is lost");
    assert!(!after(&[Stamp(7), Zero, Zero]), "it did not grow");
    assert!(!after(&[Stamp(7), Zero, Zero, Stamp(7)]), "not zeroes");
    assert!(may(&oracle, [Stamp(7), Zero, Zero], Flushed));
    oracle.refused();
    assert!(may(&oracle, [Stamp(7), Zero, Zero], Flushed));
    assert_eq!(oracle.world.disks["a"].sectors, 3);
}

#[test]
fn an_immutable_disk_starts_from_what_it_held_if_it_is_armed() {
    let mut oracle = oracle();
    write(&mut oracle, 7);
    let mut next = oracle.world.clone();
    let disk = next.disk_mut("a").unwrap();
    let content = disk.content("a");
    disk.turn_into(VolumeKind::Immutable, content);
    oracle.begin(next);
    oracle.pin(&volume("a"), vec![Stamp(7), Zero, Zero]);
    oracle.settle();
    assert!(!may(&oracle, [Zero; 3], Flushed), "it was sealed");
    for armed in [true, false] {
        write(&mut oracle, 8);
        let mut next = oracle.world.clone();
        let disk = next.disk_mut("a").unwrap();
        assert_eq!(disk.armed, armed);
        disk.machine_starts();
        oracle.begin(next);
        oracle.settle();
        assert_eq!(may(&oracle, [Stamp(7), Zero, Zero], Acknowledged), armed);
        assert_eq!(may(&oracle, [Stamp(8), Zero, Zero], Acknowledged), !armed);
    }
}

#[test]
fn names_are_those_of_one_of_the_worlds() {
    let oracle = oracle();
    let next = with_snapshot(&oracle, "s");
    let names = |world: &World| world.names().into_iter().collect::<BTreeSet<_>>();
    assert_eq!(names(&oracle.world), BTreeSet::from([volume("a")]));
    assert_eq!(names(&next), BTreeSet::from([volume("a"), snapshot("s")]));
}
