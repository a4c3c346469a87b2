//! Restoring, of one volume and of groups.

use stratablk_layers::Error;
use stratablk_layers::catalog::{LayerState, VolumeKind};
use stratablk_layers::lifecycle::{DeleteOptions, ResizeOptions, RestoreOptions};
use stratablk_layers::store::VolumeSource;
use stratablk_layers::units::SECTOR_BYTES;
use stratablk_layers::volume::{Operation, RequestError};

use crate::oracle::Value;
use crate::world::{SECTORS, World};
use crate::{over, says, stamps};

/// Restores with default options.
fn restore(world: &World, volume: &str, snapshot: &str) {
    world
        .store()
        .restore(volume, snapshot, &RestoreOptions::default())
        .unwrap();
}

/// Restores and keeps.
fn keeping(name: &str) -> RestoreOptions {
    RestoreOptions {
        keep: Some(name.into()),
        only: false,
    }
}

#[test]
fn a_group_of_which_a_part_is_gone_is_not_restored_in_part() {
    let world = World::new();
    for name in ["a", "b", "c"] {
        world.create(name);
    }
    world.snapshot("all", &["a", "b", "c"]);
    let store = world.store();
    store
        .delete_snapshot("b", "all", DeleteOptions::default())
        .unwrap();
    let before = world.catalog.state();
    let refused = store.restore("a", "all", &RestoreOptions::default());
    says(refused, &["3 volumes", "a@all, c@all", "--only"]);
    assert_eq!(world.catalog.state(), before);
    let report = world.store().restore("a", "all", &only()).unwrap();
    assert_eq!(report.volumes, ["a"]);
}

/// Restores one volume of a group.
fn only() -> RestoreOptions {
    RestoreOptions {
        keep: None,
        only: true,
    }
}

/// A volume with two snapshots and something since.
fn grown() -> World {
    let world = World::new();
    world.create("web");
    world.write("web", 0, 4, 2);
    world.snapshot("one", &["web"]);
    world.write("web", 2, 4, 3);
    world.snapshot("two", &["web"]);
    world.write("web", 10, 2, 4);
    world
}

#[test]
fn a_disk_that_is_being_made_independent_is_not_put_aside() {
    let world = grown();
    let store = world.store();
    let job = store.flatten("web").unwrap().id;
    let before = world.catalog.state();
    says(
        store.restore("web", "one", &RestoreOptions::default()),
        &["job 1", "wait for the job", "cancel"],
    );
    assert_eq!(world.catalog.state(), before);
    store.cancel_job(job).unwrap();
    restore(&world, "web", "one");
}

#[test]
fn any_snapshot_can_be_restored_in_any_order_and_newer_ones_stay() {
    let mut world = grown();
    let one = stamps(&[(0, 4, 2)]);
    let two = stamps(&[(0, 2, 2), (2, 4, 3)]);
    restore(&world, "web", "one");
    assert_eq!(world.values("web"), one);
    world.assert_tidy();
    restore(&world, "web", "two");
    assert_eq!(world.values("web"), two);
    world.write("web", 20, 1, 5);
    restore(&world, "web", "one");
    world.reopen();
    assert_eq!(world.values("web"), one);
    // The tree branches.
    world.write("web", 30, 1, 6);
    world.snapshot("three", &["web"]);
    restore(&world, "web", "two");
    assert_eq!(world.values("web"), two);
    restore(&world, "web", "three");
    assert_eq!(world.values("web"), stamps(&[(0, 4, 2), (30, 1, 6)]));
    assert_eq!(world.store().snapshots(Some("web")).unwrap().len(), 3);
    assert_eq!(world.catalog.state().layers.len(), 4);
    world.reopen();
    world.assert_tidy();
    let seen = world.seen();
    assert_eq!(seen.snapshots[&("web".into(), "two".into())], two);
}

#[test]
fn what_was_written_since_can_be_kept() {
    let mut world = grown();
    let report = world
        .store()
        .restore("web", "one", &keeping("later"))
        .unwrap();
    assert_eq!(report.volumes, ["web"]);
    assert_eq!(report.kept.len(), 1);
    assert_eq!(world.values("web"), stamps(&[(0, 4, 2)]));
    let later = stamps(&[(0, 2, 2), (2, 4, 3), (10, 2, 4)]);
    assert_eq!(
        world.seen().snapshots[&("web".into(), "later".into())],
        later
    );
    let layer = world.layer_of("web", "later");
    assert_eq!(
        world.catalog.state().layers[&layer].state,
        LayerState::Sealed
    );
    world.reopen();
    restore(&world, "web", "later");
    assert_eq!(world.values("web"), later);
    let again = world.store().restore("web", "one", &keeping("two"));
    assert!(matches!(again, Err(Error::Exists { .. })), "{again:?}");
    says(
        world.store().restore("web", "one", &keeping("a b")),
        &["keep", "letters"],
    );
    assert_eq!(world.values("web"), later, "nothing has changed");
}

#[test]
fn a_volume_in_use_is_not_restored() {
    let world = grown();
    let queue = world.queue("web");
    let before = world.catalog.state();
    let refused = world
        .store()
        .restore("web", "one", &RestoreOptions::default());
    says(refused, &["web", "stop", "detach web"]);
    assert_eq!(world.catalog.state(), before);
    world.assert_tidy();
    drop(queue);
    restore(&world, "web", "one");
    says(
        world.store().restore("web", "nine", &only()),
        &["snapshot", "web@nine"],
    );
    says(
        world.store().restore("none", "one", &only()),
        &["volume", "none"],
    );
}

#[test]
fn a_group_is_restored_whole_or_not_at_all() {
    let mut world = World::new();
    for (name, id) in [("a", 2), ("b", 3), ("c", 4)] {
        world.create(name);
        world.write(name, 0, 4, id);
    }
    world.snapshot("all", &["a", "b", "c"]);
    for name in ["a", "b", "c"] {
        world.write(name, 8, 4, 9);
    }
    let queue = world.queue("b");
    let before = world.catalog.state();
    let refused = world
        .store()
        .restore("a", "all", &RestoreOptions::default());
    says(refused, &["\"b\"", "in use"]);
    assert_eq!(world.catalog.state(), before);
    // One alone can be.
    let report = world.store().restore("a", "all", &only()).unwrap();
    assert_eq!(report.volumes, ["a"]);
    assert_eq!(world.values("a"), stamps(&[(0, 4, 2)]));
    drop(queue);
    assert_eq!(world.values("b"), stamps(&[(0, 4, 3), (8, 4, 9)]));
    // A failed commit changes none.
    world.catalog.fail_next_commit();
    assert!(
        world
            .store()
            .restore("b", "all", &RestoreOptions::default())
            .is_err()
    );
    assert_eq!(world.values("b"), stamps(&[(0, 4, 3), (8, 4, 9)]));
    world.assert_tidy();
    let report = world.store().restore("b", "all", &keeping("then")).unwrap();
    assert_eq!(report.volumes, ["a", "b", "c"]);
    let groups: Vec<_> = report.kept.iter().map(|kept| kept.group).collect();
    assert!(groups.iter().all(|group| *group == groups[0]));
    world.reopen();
    assert_eq!(world.values("b"), stamps(&[(0, 4, 3)]));
    assert_eq!(world.values("c"), stamps(&[(0, 4, 4)]));
    restore(&world, "c", "then");
    assert_eq!(world.values("b"), stamps(&[(0, 4, 3), (8, 4, 9)]));
    // Without a volume that is gone the group is not whole.
    world.store().delete_volume("c").unwrap();
    let refused = world
        .store()
        .restore("a", "all", &RestoreOptions::default());
    says(refused, &["3 volumes", "a@all, b@all", "--only"]);
    world.assert_tidy();
}

#[test]
fn types_that_snapshots_leave_alone_are_not_restored() {
    let world = World::new();
    world.create("a");
    world.create("b");
    world.write("b", 0, 1, 2);
    world.snapshot("s", &["a", "b"]);
    for (kind, word) in [
        (VolumeKind::Writethrough, "writethrough"),
        (VolumeKind::Readonly, "readonly"),
        (VolumeKind::Multiattach, "multiattach"),
    ] {
        world.store().set_kind("b", kind).unwrap();
        says(
            world.store().restore("a", "s", &RestoreOptions::default()),
            &["b ", word, "--type normal", "--only"],
        );
        says(
            world.store().restore("b", "s", &only()),
            &["b ", word, "--type normal"],
        );
        world.store().restore("a", "s", &only()).unwrap();
        world.store().set_kind("b", VolumeKind::Normal).unwrap();
    }
    world.store().set_kind("b", VolumeKind::Immutable).unwrap();
    world.write("b", 5, 1, 3);
    restore(&world, "b", "s");
    assert_eq!(world.values("b"), stamps(&[(0, 1, 2)]));
}

#[test]
fn a_disk_gets_the_size_of_its_snapshot_back() {
    let mut world = World::new();
    world.create("web");
    world.write("web", 0, 4, 2);
    world.snapshot("small", &["web"]);
    let size = 2 * SECTORS * SECTOR_BYTES;
    let options = ResizeOptions::default();
    world.store().resize("web", size, options).unwrap();
    world.write("web", SECTORS, 4, 3);
    let mut large = stamps(&[(0, 4, 2)]);
    large.resize(2 * SECTORS as usize, Value::Zero);
    let large = over(&large, &[(SECTORS, 4, 3)]);
    let options = RestoreOptions {
        keep: Some("large".into()),
        only: false,
    };
    world.store().restore("web", "small", &options).unwrap();
    assert_eq!(world.values("web"), stamps(&[(0, 4, 2)]));
    world.reopen();
    world.assert_tidy();
    restore(&world, "web", "large");
    assert_eq!(world.values("web"), large);
    world.reopen();
    assert_eq!(world.values("web"), large);
    world.assert_tidy();
}

#[test]
fn a_volume_that_has_failed_works_again_once_it_is_restored() {
    use stratablk_layers::file::sim::{Fault, FaultEffect, FaultPoint};
    let mut world = grown();
    world.media.inject(Fault {
        point: FaultPoint::SyncData,
        name: Some("data".into()),
        after: 0,
        times: 1,
        effect: FaultEffect::Error,
    });
    {
        let mut queue = world.queue("web");
        let (result, _) = queue.run(Operation::Flush, Vec::new());
        assert!(
            matches!(result, Err(RequestError::Failed | RequestError::Io)),
            "{result:?}"
        );
    }
    let kept = world.store().restore("web", "one", &keeping("broken"));
    assert!(matches!(kept, Err(Error::Failed { .. })), "{kept:?}");
    world.assert_tidy();
    restore(&world, "web", "one");
    world.write("web", 40, 1, 7);
    world.reopen();
    assert_eq!(world.values("web"), stamps(&[(0, 4, 2), (40, 1, 7)]));
}

#[test]
fn an_immutable_or_cloned_volume_over_a_base_is_restored_to_it() {
    let world = World::new();
    world
        .store()
        .create_volume("based", &VolumeSource::Base("/base.raw".into()))
        .unwrap();
    world.snapshot("empty", &["based"]);
    world.write("based", 3, 3, 5);
    restore(&world, "based", "empty");
    assert_eq!(world.values("based"), stamps(&[(0, 64, 1)]));
    let options = DeleteOptions::default();
    world
        .store()
        .delete_snapshot("based", "empty", options)
        .unwrap();
    assert_eq!(world.values("based"), stamps(&[(0, 64, 1)]));
}
