//! Every command, where the host refuses something at every step of it: an error changes nothing.

use stratablk_layers::Error;
use stratablk_layers::catalog::VolumeKind;
use stratablk_layers::file::sim::{Fault, FaultEffect, FaultPoint};
use stratablk_layers::lifecycle::{DeleteOptions, RestoreOptions};
use stratablk_layers::store::{Store, VolumeSource};

use crate::world::World;

/// Two volumes of a group, an immutable and a multiattach one.
fn setup() -> World {
    let world = World::new();
    for (name, id) in [("a", 2), ("b", 3), ("im", 4), ("gold", 5)] {
        world.create(name);
        world.write(name, 0, 20, id);
    }
    world.snapshot("s", &["a", "b"]);
    let store = world.store();
    store.set_kind("im", VolumeKind::Immutable).unwrap();
    store.set_kind("gold", VolumeKind::Multiattach).unwrap();
    store.give_attachment("gold", Some("vm")).unwrap();
    for (name, id) in [("a", 6), ("b", 7), ("im", 8), ("vm", 9)] {
        world.write(name, 10, 20, id);
    }
    store.flush_all().unwrap();
    world
}

/// Lets each operation of a kind fail in turn, until the command has no more of them.
fn fail_everywhere(what: &str, command: impl Fn(&Store) -> Result<(), Error>) {
    let done = {
        let world = setup();
        command(world.store()).unwrap();
        world.seen()
    };
    let mut failures = 0;
    let mut commits = 0;
    for point in [
        FaultPoint::Write,
        FaultPoint::SyncData,
        FaultPoint::SyncDir,
        FaultPoint::Create,
        FaultPoint::Rename,
    ] {
        for after in 0.. {
            let mut world = setup();
            let before = world.seen();
            world.media.inject(Fault {
                point,
                name: None,
                after,
                times: 1,
                effect: FaultEffect::Error,
            });
            let hits = world.media.faults_hit();
            let result = command(world.store());
            world.media.clear_faults();
            if world.media.faults_hit() == hits {
                break;
            }
            let expected = if result.is_ok() { &done } else { &before };
            let when = format!("{what}, {point:?} {after}, {result:?}");
            failures += u64::from(result.is_err());
            if result.is_err() {
                assert_eq!(world.seen(), *expected, "{when}");
            }
            // All was flushed before; and what has failed cannot be flushed.
            drop(world.store().flush_all());
            world.restart();
            assert_eq!(world.seen(), *expected, "{when}, started again");
            world.assert_tidy();
        }
    }
    // The catalog's medium is full.
    let world = setup();
    let before = world.seen();
    world.catalog.fail_next_commit();
    if command(world.store()).is_err() {
        assert_eq!(world.seen(), before, "{what}, no commit");
        commits += 1;
    }
    assert_eq!(commits, 1, "{what} commits something");
    world.assert_tidy();
    println!("{what}: {failures} failures");
}

#[test]
fn restores() {
    fail_everywhere("restore", |store| {
        let options = RestoreOptions::default();
        store.restore("a", "s", &options).map(drop)
    });
    fail_everywhere("restore --keep", |store| {
        let options = RestoreOptions {
            keep: Some("kept".into()),
            only: false,
        };
        store.restore("a", "s", &options).map(drop)
    });
}

#[test]
fn types() {
    fail_everywhere("set --type immutable", |store| {
        store.set_kind("b", VolumeKind::Immutable)
    });
    fail_everywhere("set --type normal", |store| {
        store.set_kind("im", VolumeKind::Normal)
    });
    fail_everywhere("machine start", |store| {
        store.machine_starts("im").map(drop)
    });
}

#[test]
fn attachments() {
    fail_everywhere("attachment given", |store| {
        store.give_attachment("gold", None).map(drop)
    });
    fail_everywhere("attachment kept", |store| {
        store.take_attachment("vm", Some("mine"))
    });
    fail_everywhere("attachment taken", |store| {
        store.take_attachment("vm", None)
    });
}

#[test]
fn deletions() {
    fail_everywhere("snapshot delete", |store| {
        let options = DeleteOptions::default();
        store.delete_snapshot("a", "s", options).map(drop)
    });
    fail_everywhere("volume delete", |store| store.delete_volume("b"));
}

#[test]
fn clones() {
    for kind in [VolumeKind::Normal, VolumeKind::Immutable] {
        fail_everywhere("create --from", |store| {
            let source = VolumeSource::Volume("a".into());
            store.create_volume_of("c", &source, kind).map(drop)
        });
        fail_everywhere("create", |store| {
            let source = VolumeSource::Size(1 << 16);
            store.create_volume_of("c", &source, kind).map(drop)
        });
    }
}
