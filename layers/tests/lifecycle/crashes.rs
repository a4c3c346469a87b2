//! Every command, interrupted at every step.

use stratablk_layers::catalog::VolumeKind;
use stratablk_layers::lifecycle::{DeleteOptions, RestoreOptions};
use stratablk_layers::store::VolumeSource;

use crate::world::{World, crash_everywhere};

/// Two volumes of a group, a clone, and something written since.
fn group(world: &World) {
    for (name, id) in [("a", 2), ("b", 3)] {
        world.create(name);
        world.write(name, 0, 20, id);
    }
    world.snapshot("s", &["a", "b"]);
    world.clone_of("c", "a", "s");
    for (name, id) in [("a", 4), ("b", 5), ("c", 6)] {
        world.write(name, 10, 20, id);
    }
}

/// An immutable volume that a machine has used.
fn immutable(world: &World) {
    let base = VolumeSource::Base("/base.raw".into());
    world.store().create_volume("a", &base).unwrap();
    world.write("a", 0, 10, 2);
    world.store().set_kind("a", VolumeKind::Immutable).unwrap();
    world.write("a", 5, 10, 3);
}

/// A multiattach volume with an attachment that has a snapshot.
fn multiattach(world: &World) {
    world.create("gold");
    world.write("gold", 0, 10, 2);
    world
        .store()
        .set_kind("gold", VolumeKind::Multiattach)
        .unwrap();
    world.store().give_attachment("gold", Some("vm")).unwrap();
    world.write("vm", 5, 10, 3);
    world.snapshot("s", &["vm"]);
    world.write("vm", 8, 10, 4);
}

#[test]
fn a_restore() {
    crash_everywhere("restore", group, |store| {
        store.restore("a", "s", &RestoreOptions::default()).unwrap();
    });
}

#[test]
fn a_restore_that_keeps() {
    let options = RestoreOptions {
        keep: Some("kept".into()),
        only: false,
    };
    let (_, after) = crash_everywhere("restore --keep", group, |store| {
        store.restore("a", "s", &options).unwrap();
    });
    assert_eq!(after.snapshots.len(), 4);
}

#[test]
fn a_deleted_volume() {
    crash_everywhere("volume delete", group, |store| {
        store.delete_volume("a").unwrap();
    });
}

#[test]
fn a_deleted_snapshot() {
    crash_everywhere("snapshot delete", group, |store| {
        let options = DeleteOptions::default();
        store.delete_snapshot("b", "s", options).unwrap();
    });
    let leaf = |world: &World| {
        group(world);
        world.snapshot("t", &["b"]);
        world
            .store()
            .restore("b", "s", &RestoreOptions::default())
            .unwrap();
    };
    crash_everywhere("snapshot delete of a leaf", leaf, |store| {
        let options = DeleteOptions::default();
        store.delete_snapshot("b", "t", options).unwrap();
    });
}

#[test]
fn a_clone_of_a_running_volume() {
    crash_everywhere("volume create --from", group, |store| {
        let source = VolumeSource::Volume("a".into());
        store.create_volume("d", &source).unwrap();
    });
}

#[test]
fn a_change_of_type() {
    for kind in [
        VolumeKind::Immutable,
        VolumeKind::Multiattach,
        VolumeKind::Readonly,
    ] {
        crash_everywhere("volume set --type", group, |store| {
            store.set_kind("b", kind).unwrap();
        });
    }
    crash_everywhere("volume set --type normal", immutable, |store| {
        store.set_kind("a", VolumeKind::Normal).unwrap();
    });
}

#[test]
fn a_start_of_a_machine() {
    let (before, after) = crash_everywhere("machine start", immutable, |store| {
        assert!(store.machine_starts("a").unwrap());
    });
    assert!(before.volumes["a"].armed);
    assert!(!after.volumes["a"].armed);
}

#[test]
fn attachments() {
    crash_everywhere("attachment given", multiattach, |store| {
        store.give_attachment("gold", None).unwrap();
    });
    crash_everywhere("attachment taken", multiattach, |store| {
        store.take_attachment("vm", None).unwrap();
    });
    crash_everywhere("attachment kept", multiattach, |store| {
        store.take_attachment("vm", Some("mine")).unwrap();
    });
}

#[test]
fn a_volume_of_a_type() {
    let nothing = |world: &World| world.create("x");
    crash_everywhere("volume create --type", nothing, |store| {
        let size = VolumeSource::Size(1 << 20);
        store
            .create_volume_of("a", &size, VolumeKind::Immutable)
            .unwrap();
    });
}

#[test]
#[should_panic(expected = "neither old nor new")]
fn canary_a_command_in_two_halves_is_noticed() {
    crash_everywhere("two halves", group, |store| {
        let only = RestoreOptions {
            keep: None,
            only: true,
        };
        store.restore("a", "s", &only).unwrap();
        store.restore("b", "s", &only).unwrap();
    });
}

#[test]
fn canary_files_that_do_not_belong_there_are_noticed() {
    use stratablk_layers::file::Media;
    let world = World::new();
    world.create("a");
    let active = world.store().volume_info("a").unwrap().active;
    let dir = stratablk_layers::mapfile::layer_dir(active);
    world.media.create_dir(&dir.join("more")).unwrap();
    assert_eq!(world.misplaced().len(), 1);
    world.media.remove_dir_all(&dir).unwrap();
    world
        .media
        .create_dir(&dir.with_file_name("other"))
        .unwrap();
    world.media.create_dir(&dir).unwrap();
    assert_eq!(world.misplaced().len(), 2);
}
