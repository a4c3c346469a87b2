//! Every command, interrupted at every step.

use stratablk_layers::catalog::{VolumeKind, Way};
use stratablk_layers::lifecycle::{DeleteOptions, ResizeOptions, RestoreOptions};
use stratablk_layers::store::VolumeSource;
use stratablk_layers::units::SECTOR_BYTES;

use std::path::Path;

use crate::world::{SECTORS, World, crash_everywhere};

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

/// A multiattach volume with an attachment.
fn attachment(world: &World) {
    world.create("gold");
    world.write("gold", 0, 10, 2);
    world
        .store()
        .set_kind("gold", VolumeKind::Multiattach)
        .unwrap();
    world.store().give_attachment("gold", Some("vm")).unwrap();
    world.write("vm", 5, 10, 3);
}

/// A multiattach volume with an attachment that has a snapshot.
fn multiattach(world: &World) {
    attachment(world);
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
fn a_restore_to_another_size() {
    let setup = |world: &World| {
        group(world);
        let size = 2 * SECTORS * SECTOR_BYTES;
        let options = ResizeOptions::default();
        world.store().resize("b", size, options).unwrap();
        world.write("b", SECTORS, 20, 7);
    };
    let (before, after) = crash_everywhere("restore to another size", setup, |store| {
        store.restore("b", "s", &RestoreOptions::default()).unwrap();
    });
    assert_eq!(before.volumes["b"].values.len() as u64, 2 * SECTORS);
    assert_eq!(after.volumes["b"].values.len() as u64, SECTORS);
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
fn an_import() {
    // There is the volume with the job that frees it from the image, or neither.
    let nothing = |world: &World| world.create("x");
    let (before, after) = crash_everywhere("volume import", nothing, |store| {
        store.import("a", Path::new("/base.raw")).unwrap();
    });
    assert!(!before.volumes.contains_key("a"));
    assert!(after.volumes["a"].imported);
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
    crash_everywhere("attachment taken", attachment, |store| {
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

/// A volume whose lower layers a job joins, in the middle of it.
fn merging(world: &World, snapshot: &str, way: Way, steps: usize) {
    world.store().set_job_step_bytes(4096);
    world.create("a");
    for (name, id) in [("s1", 2), ("s2", 3), ("s3", 4)] {
        world.write("a", 4 * id, 24, id);
        world.snapshot(name, &["a"]);
    }
    world.write("a", 30, 4, 5);
    world.store().flush_all().unwrap();
    let options = DeleteOptions {
        way: Some(way),
        ..DeleteOptions::default()
    };
    world
        .store()
        .delete_snapshot("a", snapshot, options)
        .unwrap();
    world.work(steps);
}

#[test]
fn commands_while_a_job_is_under_way() {
    for (snapshot, way) in [
        ("s2", Way::Up),
        ("s2", Way::Down),
        ("s3", Way::Up),
        ("s3", Way::InPlace),
    ] {
        for steps in [4, 7] {
            let setup = |world: &World| merging(world, snapshot, way, steps);
            let what = format!("{snapshot} {way:?} after {steps} steps");
            crash_everywhere(&format!("restore, {what}"), setup, |store| {
                let options = RestoreOptions::default();
                store.restore("a", "s1", &options).unwrap();
            });
            crash_everywhere(&format!("volume delete, {what}"), setup, |store| {
                store.delete_volume("a").unwrap();
            });
            crash_everywhere(&format!("set --type, {what}"), setup, |store| {
                store.set_kind("a", VolumeKind::Immutable).unwrap();
            });
            crash_everywhere(&format!("create --from, {what}"), setup, |store| {
                let source = VolumeSource::Volume("a".into());
                store.create_volume("b", &source).unwrap();
            });
        }
    }
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
    assert!(!world.misplaced().is_empty());
    world.media.remove_dir_all(&dir.join("more")).unwrap();
    world.assert_tidy();
    let other = dir.with_file_name("other");
    world.media.create_dir(&other).unwrap();
    assert!(!world.misplaced().is_empty());
    world.media.remove_dir_all(&other).unwrap();
    world.media.remove(&dir.join("data")).unwrap();
    assert!(!world.misplaced().is_empty());
}
