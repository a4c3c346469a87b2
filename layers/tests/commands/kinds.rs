//! Types of volumes, attachments, and which volumes snapshots are of.

use stratablk_layers::Error;
use stratablk_layers::catalog::VolumeKind;
use stratablk_layers::lifecycle::{DeleteOptions, Fate, Phase, RestoreOptions};
use stratablk_layers::store::{Attachment, Selection, VolumeSource};
use stratablk_layers::units::SECTOR_BYTES;

use crate::oracle::Value;
use crate::world::{SECTORS, World};
use crate::{over, says, stamps};

/// Creates a volume of a type, empty.
fn create(world: &World, name: &str, kind: VolumeKind) {
    let size = VolumeSource::Size(SECTORS * SECTOR_BYTES);
    world.store().create_volume_of(name, &size, kind).unwrap();
}

/// Whether a volume is armed.
fn armed(world: &World, name: &str) -> bool {
    world.catalog.state().volumes[name].armed
}

#[test]
fn an_immutable_volume_starts_anew_when_it_is_armed() {
    let mut world = World::new();
    world.create("web");
    world.write("web", 0, 4, 2);
    world
        .store()
        .set_kind("web", VolumeKind::Immutable)
        .unwrap();
    let content = stamps(&[(0, 4, 2)]);
    assert!(armed(&world, "web"));
    assert_eq!(world.values("web"), content);
    assert!(
        !world.store().machine_starts("web").unwrap(),
        "there is nothing to throw away"
    );
    assert!(!armed(&world, "web"));
    world.write("web", 2, 4, 3);
    assert!(
        !world.store().machine_starts("web").unwrap(),
        "it goes on: a reboot, or a new daemon"
    );
    world.reopen();
    assert_eq!(world.values("web"), over(&content, &[(2, 4, 3)]));
    world.store().arm("web", true).unwrap();
    world.reopen();
    let queue = world.queue("web");
    says(world.store().machine_starts("web"), &["web", "in use"]);
    drop(queue);
    assert!(world.store().machine_starts("web").unwrap());
    assert!(!armed(&world, "web"));
    assert_eq!(world.values("web"), content);
    assert_eq!(world.catalog.state().layers.len(), 2);
    world.assert_tidy();
    // Back to normal: what it holds stays, and the two layers become one.
    world.write("web", 2, 4, 4);
    world.store().set_kind("web", VolumeKind::Normal).unwrap();
    assert_eq!(world.jobs().len(), 1);
    world.store().arm("web", true).unwrap();
    assert!(!armed(&world, "web"), "a normal volume is never armed");
    assert!(!world.store().machine_starts("web").unwrap());
    assert_eq!(world.values("web"), over(&content, &[(2, 4, 4)]));
    says(world.store().machine_starts("none"), &["none"]);
    says(world.store().arm("none", true), &["none"]);
    says(
        world.store().set_kind("none", VolumeKind::Normal),
        &["none"],
    );
}

#[test]
fn an_immutable_volume_starts_from_what_its_snapshot_names() {
    let world = World::new();
    world.create("web");
    world.write("web", 0, 2, 2);
    world.snapshot("s", &["web"]);
    world
        .store()
        .set_kind("web", VolumeKind::Immutable)
        .unwrap();
    world.write("web", 4, 2, 3);
    // A snapshot would become what it starts from.
    let named = Selection::Volumes(vec!["web".into()]);
    says(
        world.store().snapshot("t", &named),
        &["web", "immutable", "next start", "--type normal"],
    );
    says(world.store().snapshot("t", &Selection::All), &["immutable"]);
    world.store().arm("web", true).unwrap();
    assert!(world.store().machine_starts("web").unwrap());
    assert_eq!(world.values("web"), stamps(&[(0, 2, 2)]));
    let report = world
        .store()
        .delete_snapshot("web", "s", DeleteOptions::default())
        .unwrap();
    assert_eq!(report.fate, Fate::Named, "the volume starts from it");
    world.write("web", 4, 2, 4);
    world.store().arm("web", true).unwrap();
    assert!(world.store().machine_starts("web").unwrap());
    assert_eq!(world.values("web"), stamps(&[(0, 2, 2)]));
    world.assert_tidy();
}

#[test]
fn flattening_keeps_what_a_volume_starts_from() {
    for kind in [VolumeKind::Immutable, VolumeKind::Multiattach] {
        let mut world = World::new();
        let base = VolumeSource::Base("/base.raw".into());
        world.store().create_volume("web", &base).unwrap();
        world.write("web", 0, 4, 2);
        let content = world.values("web");
        world.store().set_kind("web", kind).unwrap();
        let disk = match kind {
            VolumeKind::Multiattach => {
                let given = world.store().give_attachment("web", None).unwrap();
                given.volume.name
            }
            _ => "web".to_owned(),
        };
        world.write(&disk, 2, 4, 3);
        let job = world.store().flatten("web").unwrap();
        says(world.store().flatten(&disk), &["job 1 works"]);
        world.work_all();
        assert_eq!(world.store().job(job.id).unwrap().phase, Phase::Done);
        assert_eq!(world.values(&disk), over(&content, &[(2, 4, 3)]));
        assert_eq!(world.store().volume_info("web").unwrap().base, None);
        says(world.store().flatten("web"), &["independent already"]);
        world.reopen();
        assert_eq!(world.values(&disk), over(&content, &[(2, 4, 3)]));
        if kind == VolumeKind::Multiattach {
            let other = world.store().give_attachment("web", None).unwrap();
            assert_eq!(world.values(&other.volume.name), content);
        } else {
            world.store().arm("web", true).unwrap();
            assert!(world.store().machine_starts("web").unwrap());
            assert_eq!(world.values("web"), content);
        }
        world.assert_tidy();
    }
}

#[test]
fn every_type_becomes_every_other_one() {
    let kinds = [
        VolumeKind::Normal,
        VolumeKind::Immutable,
        VolumeKind::Writethrough,
        VolumeKind::Multiattach,
        VolumeKind::Readonly,
    ];
    let base = VolumeSource::Base("/base.raw".into());
    for from in kinds {
        for to in kinds {
            let mut world = World::new();
            world.store().create_volume_of("web", &base, from).unwrap();
            world.store().set_kind("web", VolumeKind::Normal).unwrap();
            world.write("web", 0, 4, 2);
            let expected = world.values("web");
            world.store().set_kind("web", from).unwrap();
            world.store().set_kind("web", to).unwrap();
            assert_eq!(world.values("web"), expected, "{from:?} to {to:?}");
            assert_eq!(armed(&world, "web"), to == VolumeKind::Immutable);
            assert_eq!(world.store().volume_info("web").unwrap().kind, to);
            world.reopen();
            assert_eq!(world.values("web"), expected, "{from:?} to {to:?}");
            world.store().machine_starts("web").unwrap();
            assert_eq!(world.values("web"), expected, "{from:?} to {to:?}");
            world.assert_tidy();
            world.store().delete_volume("web").unwrap();
            assert!(world.catalog.state().layers.is_empty());
            world.assert_tidy();
        }
    }
}

#[test]
fn a_type_is_not_changed_under_a_machine() {
    let world = World::new();
    world.create("web");
    world.write("web", 0, 1, 2);
    let queue = world.queue("web");
    let before = world.catalog.state();
    for kind in [
        VolumeKind::Immutable,
        VolumeKind::Readonly,
        VolumeKind::Writethrough,
    ] {
        says(world.store().set_kind("web", kind), &["web", "in use"]);
    }
    drop(queue);
    assert_eq!(world.catalog.state(), before);
    world.assert_tidy();
    let attachment = Attachment {
        socket: "/run/web.sock".into(),
        queues: 1,
        read_only: false,
    };
    world
        .store()
        .set_attachment("web", Some(attachment))
        .unwrap();
    says(
        world.store().set_kind("web", VolumeKind::Multiattach),
        &["web", "attached", "detach"],
    );
    world
        .store()
        .set_kind("web", VolumeKind::Immutable)
        .unwrap();
    // What fails changes nothing.
    world.write("web", 0, 1, 3);
    world.store().arm("web", true).unwrap();
    world.catalog.fail_next_commit();
    assert!(world.store().machine_starts("web").is_err());
    assert_eq!(world.values("web"), stamps(&[(0, 1, 3)]));
    world.catalog.fail_next_commit();
    assert!(world.store().set_kind("web", VolumeKind::Normal).is_err());
    assert_eq!(world.values("web"), stamps(&[(0, 1, 3)]));
    assert!(world.store().machine_starts("web").unwrap());
    assert_eq!(world.values("web"), stamps(&[(0, 1, 2)]));
    world.assert_tidy();
}

#[test]
fn attachments_share_what_a_multiattach_volume_holds() {
    let mut world = World::new();
    world.create("gold");
    world.write("gold", 0, 4, 2);
    says(
        world.store().give_attachment("gold", None),
        &["gold", "not of type multiattach"],
    );
    world
        .store()
        .set_kind("gold", VolumeKind::Multiattach)
        .unwrap();
    let one = world.store().give_attachment("gold", None).unwrap();
    assert_eq!((one.volume.name.as_str(), one.new), ("gold-1", true));
    assert_eq!(one.volume.attached_from.as_deref(), Some("gold"));
    let two = world.store().give_attachment("gold", None).unwrap();
    assert_eq!(two.volume.name, "gold-2");
    let vm = world.store().give_attachment("gold", Some("vm")).unwrap();
    assert!(vm.new);
    let again = world.store().give_attachment("gold", Some("vm")).unwrap();
    assert!(!again.new);
    world.create("else");
    let taken = world.store().give_attachment("gold", Some("else"));
    assert!(matches!(taken, Err(Error::Exists { .. })));
    world.write("gold-1", 2, 4, 3);
    world.write("vm", 2, 4, 4);
    world.snapshot("s", &["vm"]);
    world.write("vm", 8, 1, 5);
    let content = stamps(&[(0, 4, 2)]);
    world.reopen();
    assert_eq!(world.values("gold-1"), over(&content, &[(2, 4, 3)]));
    assert_eq!(world.values("gold-2"), content);
    says(
        world.store().delete_volume("gold"),
        &["gold", "gold-1, gold-2, vm", "detach"],
    );
    says(
        world.store().set_kind("gold", VolumeKind::Normal),
        &["kind", "gold-1"],
    );
    says(
        world.store().set_kind("vm", VolumeKind::Readonly),
        &["kind", "attachment of gold", "--keep-as"],
    );
    says(
        world.store().take_attachment("else", None),
        &["else", "not an attachment"],
    );
    world.store().take_attachment("gold-1", None).unwrap();
    assert!(world.store().volume_info("gold-1").is_err());
    world.assert_tidy();
    says(
        world.store().take_attachment("vm", None),
        &["vm@s", "snapshot delete vm", "--keep-as"],
    );
    // Kept, with its snapshot.
    let exists = world.store().take_attachment("vm", Some("else"));
    assert!(matches!(exists, Err(Error::Exists { .. })));
    says(world.store().take_attachment("vm", Some("-")), &["keep_as"]);
    let queue = world.queue("vm");
    says(
        world.store().take_attachment("vm", Some("mine")),
        &["vm", "in use"],
    );
    drop(queue);
    let expected = world.values("vm");
    world.store().take_attachment("vm", Some("mine")).unwrap();
    world
        .store()
        .take_attachment("gold-2", Some("gold-2"))
        .unwrap();
    assert!(world.store().volume_info("vm").is_err());
    let info = world.store().volume_info("mine").unwrap();
    assert_eq!((info.attached_from, info.snapshots), (None, 1));
    world.reopen();
    assert_eq!(world.values("mine"), expected);
    world.write("mine", 20, 1, 6);
    world
        .store()
        .restore("mine", "s", &RestoreOptions::default())
        .unwrap();
    assert_eq!(world.values("mine"), over(&content, &[(2, 4, 4)]));
    world.store().delete_volume("gold").unwrap();
    assert_eq!(world.values("gold-2"), content);
    assert_eq!(world.values("mine"), over(&content, &[(2, 4, 4)]));
    world.assert_tidy();
}

#[test]
fn snapshots_leave_some_types_out() {
    let world = World::new();
    for (name, kind) in [
        ("frozen", VolumeKind::Immutable),
        ("through", VolumeKind::Writethrough),
        ("ro", VolumeKind::Readonly),
        ("multi", VolumeKind::Multiattach),
    ] {
        create(&world, name, kind);
        let named = Selection::Volumes(vec![name.into()]);
        says(
            world.store().snapshot("s", &named),
            &["volumes", name, "--type normal"],
        );
    }
    says(
        world.store().snapshot("s", &Selection::All),
        &["volumes", "writethrough"],
    );
    world.create("web");
    let report = world.store().snapshot("s", &Selection::All).unwrap();
    let volumes: Vec<_> = (report.snapshots.iter())
        .map(|info| info.volume.as_str())
        .collect();
    assert_eq!(volumes, ["web"]);
}

#[test]
fn volumes_of_each_type_start_from_each_source() {
    let world = World::new();
    let base = VolumeSource::Base("/base.raw".into());
    world.create("web");
    world.write("web", 0, 4, 2);
    world.snapshot("s", &["web"]);
    world.write("web", 4, 4, 3);
    let sources = [
        (VolumeSource::Size(SECTORS * SECTOR_BYTES), stamps(&[])),
        (base, stamps(&[(0, 64, 1)])),
        (
            VolumeSource::Snapshot {
                volume: "web".into(),
                snapshot: "s".into(),
            },
            stamps(&[(0, 4, 2)]),
        ),
        (
            VolumeSource::Volume("web".into()),
            stamps(&[(0, 4, 2), (4, 4, 3)]),
        ),
    ];
    let mut names = Vec::new();
    for kind in [
        VolumeKind::Immutable,
        VolumeKind::Multiattach,
        VolumeKind::Readonly,
        VolumeKind::Writethrough,
    ] {
        for (number, (source, expected)) in sources.iter().enumerate() {
            let name = format!("{kind:?}-{number}");
            world.store().create_volume_of(&name, source, kind).unwrap();
            let content: Vec<Value> = match kind {
                VolumeKind::Multiattach => {
                    let given = world.store().give_attachment(&name, None).unwrap();
                    names.insert(0, given.volume.name.clone());
                    world.values(&given.volume.name)
                }
                VolumeKind::Immutable => {
                    world.write(&name, 30, 1, 9);
                    assert!(world.store().machine_starts(&name).unwrap());
                    world.values(&name)
                }
                _ => world.values(&name),
            };
            assert_eq!(content, *expected, "{name}");
            names.push(name);
        }
    }
    for (name, word) in [
        ("Immutable-0", "immutable"),
        ("Writethrough-0", "writethrough"),
    ] {
        let source = VolumeSource::Volume(name.into());
        says(world.store().create_volume("x", &source), &["from", word]);
    }
    for name in ["Multiattach-3", "Readonly-3"] {
        let source = VolumeSource::Volume(name.into());
        world.store().create_volume("x", &source).unwrap();
        assert_eq!(world.values("x"), sources[3].1);
        world.store().delete_volume("x").unwrap();
    }
    for name in names {
        world.store().delete_volume(&name).unwrap();
    }
    world.store().delete_volume("web").unwrap();
    assert!(world.catalog.state().layers.is_empty());
    world.assert_tidy();
}
