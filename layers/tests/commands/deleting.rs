//! Deleting snapshots and volumes, clones of volumes, and what becomes of layers without a name.

use stratablk_layers::Error;
use stratablk_layers::catalog::{JobKind, Way};
use stratablk_layers::lifecycle::{DeleteOptions, Fate, RestoreOptions};
use stratablk_layers::store::VolumeSource;
use stratablk_layers::units::Sector;
use stratablk_layers::volume::Operation;

use crate::world::World;
use crate::{says, stamps};

/// Deletes with default options, and says what became of the layer.
fn delete(world: &World, volume: &str, snapshot: &str) -> Fate {
    let options = DeleteOptions::default();
    let plan = world
        .store()
        .plan_delete_snapshot(volume, snapshot, options)
        .unwrap();
    let mut report = world
        .store()
        .delete_snapshot(volume, snapshot, options)
        .unwrap();
    report.jobs.clear();
    assert_eq!(plan, report, "a dry run says what is done");
    report.fate
}

/// A volume with so many snapshots, s1 and so on, each of a sector of its own.
fn chain(snapshots: u64) -> World {
    let world = World::new();
    world.create("web");
    for number in 1..=snapshots {
        world.write("web", number, 1, number + 1);
        world.snapshot(&format!("s{number}"), &["web"]);
    }
    world
}

#[test]
fn a_join_that_waits_for_a_flatten_begins_when_that_is_cancelled() {
    let world = chain(3);
    let flatten = world.store().flatten("web").unwrap();
    delete(&world, "web", "s2");
    let waits = world.jobs().len() == 1;
    world.store().cancel_job(flatten.id).unwrap();
    assert_eq!(world.jobs().len(), 1, "the join, which waited: {waits}");
    assert!(world.jobs().iter().all(|job| job.kind == JobKind::Merge));
}

#[test]
fn a_leaf_goes_at_once_with_all_that_only_it_needed() {
    let mut world = chain(3);
    world
        .store()
        .restore("web", "s1", &RestoreOptions::default())
        .unwrap();
    // s2 has one child, s3, which has none.
    let fate = delete(&world, "web", "s2");
    assert!(matches!(fate, Fate::Joined { .. }), "{fate:?}");
    assert_eq!(world.jobs().len(), 1);
    let fate = delete(&world, "web", "s3");
    assert!(matches!(fate, Fate::Removed { .. }), "{fate:?}");
    assert_eq!(world.jobs(), [], "the job had nothing left to do");
    assert_eq!(world.catalog.state().layers.len(), 2);
    world.assert_tidy();
    world.reopen();
    assert_eq!(world.values("web"), stamps(&[(1, 1, 2)]));
    let gone = DeleteOptions::default();
    says(
        world.store().delete_snapshot("web", "s3", gone),
        &["snapshot", "web@s3"],
    );
    says(
        world.store().plan_delete_snapshot("none", "s3", gone),
        &["volume", "none"],
    );
}

#[test]
fn one_in_the_middle_gets_a_job_and_its_name_is_free_again() {
    let mut world = chain(3);
    let layer = world.layer_of("web", "s2");
    let child = world.layer_of("web", "s3");
    let way = DeleteOptions {
        way: Some(Way::Down),
        ..DeleteOptions::default()
    };
    let report = world.store().delete_snapshot("web", "s2", way).unwrap();
    let jobs = world.jobs();
    assert_eq!(jobs.len(), 1);
    assert_eq!(report.jobs, [jobs[0].id]);
    assert_eq!((jobs[0].source, jobs[0].target), (layer, child));
    assert_eq!((jobs[0].kind, jobs[0].way), (JobKind::Merge, Way::Down));
    assert_eq!(jobs[0].subject, "web@s2");
    let Fate::Joined { child: named, ways } = report.fate else {
        panic!("{:?}", report.fate);
    };
    assert_eq!(named, child);
    let chosen: Vec<Way> = (ways.iter().filter(|cost| cost.chosen))
        .map(|cost| cost.way)
        .collect();
    assert_eq!(chosen, [Way::Down]);
    // Its neighbours wait for that job.
    let fate = delete(&world, "web", "s3");
    assert!(matches!(fate, Fate::Joined { .. }), "{fate:?}");
    assert_eq!(world.jobs().len(), 1);
    world.snapshot("s2", &["web"]);
    world.reopen();
    assert_eq!(world.jobs().len(), 1);
    assert_eq!(
        world.values("web"),
        stamps(&[(1, 1, 2), (2, 1, 3), (3, 1, 4)])
    );
}

#[test]
fn a_job_that_is_made_later_keeps_to_the_rate() {
    let world = chain(3);
    let layers = ["s1", "s2", "s3"].map(|name| world.layer_of("web", name));
    delete(&world, "web", "s2");
    let slow = DeleteOptions {
        rate: Some(100_000),
        ..DeleteOptions::default()
    };
    let report = world.store().delete_snapshot("web", "s3", slow).unwrap();
    assert_eq!(report.jobs, []);
    // The one at work is not touched, and others that wait are not either.
    assert_eq!(world.jobs()[0].rate, None);
    delete(&world, "web", "s1");
    let mut rates = Vec::new();
    loop {
        for job in world.jobs() {
            let seen = (job.source, job.rate);
            if !rates.contains(&seen) {
                rates.push(seen);
            }
        }
        if !world.store().job_step() {
            break;
        }
    }
    let rate = |layer| rates.iter().find(|(source, _)| *source == layer);
    assert_eq!(rate(layers[2]), Some(&(layers[2], Some(100_000))));
    assert_eq!(rate(layers[1]), Some(&(layers[1], None)));
    assert_eq!(rate(layers[0]), Some(&(layers[0], None)));
    assert_eq!(world.jobs(), []);
}

#[test]
fn a_push_down_keeps_to_its_rate_to_the_end() {
    let world = chain(1);
    let forked = VolumeSource::Snapshot {
        volume: "web".into(),
        snapshot: "s1".into(),
    };
    world.store().create_volume("clone", &forked).unwrap();
    let slow = DeleteOptions {
        push_down: true,
        rate: Some(100_000),
        ..DeleteOptions::default()
    };
    let report = world.store().delete_snapshot("web", "s1", slow).unwrap();
    assert_eq!(report.jobs.len(), 1);
    let mut kinds = Vec::new();
    loop {
        for job in world.jobs() {
            assert_eq!(job.rate, Some(100_000));
            if !kinds.contains(&job.kind) {
                kinds.push(job.kind);
            }
        }
        if !world.store().job_step() {
            break;
        }
    }
    assert_eq!(kinds, [JobKind::PushDown, JobKind::Merge]);
}

#[test]
fn the_way_can_be_chosen_where_it_is_possible() {
    let world = chain(2);
    let with = |way| DeleteOptions {
        way: Some(way),
        ..DeleteOptions::default()
    };
    let plan = |snapshot, way| {
        world
            .store()
            .plan_delete_snapshot("web", snapshot, with(way))
    };
    says(plan("s1", Way::InPlace), &["way", "sealed"]);
    says(plan("s1", Way::Copy), &["way", "one child"]);
    says(plan("s2", Way::Copy), &["way", "one child"]);
    for (snapshot, asked, taken) in [
        ("s1", Way::Up, Way::Up),
        ("s1", Way::Down, Way::Down),
        ("s2", Way::Down, Way::InPlace),
        ("s2", Way::InPlace, Way::InPlace),
    ] {
        let Fate::Joined { ways, .. } = plan(snapshot, asked).unwrap().fate else {
            panic!("{snapshot} has a child");
        };
        let chosen = ways.iter().filter(|cost| cost.chosen);
        assert_eq!(chosen.map(|cost| cost.way).collect::<Vec<_>>(), [taken]);
    }
    assert_eq!(world.jobs(), [], "a dry run changes nothing");
    assert_eq!(world.store().snapshots(None).unwrap().len(), 2);
}

#[test]
fn one_with_several_children_stays_until_one_is_left() {
    let world = chain(1);
    world.clone_of("a", "web", "s1");
    world.clone_of("b", "web", "s1");
    world.write("a", 9, 1, 8);
    let layer = world.layer_of("web", "s1");
    let forced = DeleteOptions {
        way: Some(Way::Up),
        ..DeleteOptions::default()
    };
    says(
        world.store().delete_snapshot("web", "s1", forced),
        &["way", "3 children", "--push-down"],
    );
    assert_eq!(delete(&world, "web", "s1"), Fate::Kept { children: 3 });
    assert_eq!(world.jobs(), []);
    assert!(world.catalog.state().layers.contains_key(&layer));
    world.store().delete_volume("b").unwrap();
    assert_eq!(world.jobs(), []);
    world.store().delete_volume("web").unwrap();
    let jobs = world.jobs();
    assert_eq!(jobs.len(), 1);
    assert_eq!((jobs[0].kind, jobs[0].source), (JobKind::Merge, layer));
    assert_eq!(jobs[0].subject, "a");
    assert_eq!(world.values("a"), stamps(&[(1, 1, 2), (9, 1, 8)]));
    world.store().delete_volume("a").unwrap();
    assert!(world.catalog.state().layers.is_empty());
    assert_eq!(world.jobs(), []);
    world.assert_tidy();
}

#[test]
fn it_can_be_copied_into_each_child() {
    let world = chain(1);
    world.clone_of("a", "web", "s1");
    world.clone_of("b", "web", "s1");
    let push = DeleteOptions {
        push_down: true,
        ..DeleteOptions::default()
    };
    let down = DeleteOptions {
        way: Some(Way::Down),
        ..push
    };
    says(
        world.store().delete_snapshot("web", "s1", down),
        &["way", "copied"],
    );
    let report = world.store().delete_snapshot("web", "s1", push).unwrap();
    let jobs = world.jobs();
    assert_eq!(report.jobs.len(), 2);
    assert_eq!(jobs.len(), 2);
    let pushes = |job: &stratablk_layers::catalog::JobRow| {
        (job.kind, job.way) == (JobKind::PushDown, Way::Copy)
    };
    assert!(jobs.iter().all(pushes));
    assert_ne!(jobs[0].target, jobs[1].target);
    // A child that goes ends its job.
    for name in ["web", "a", "b"] {
        world.store().delete_volume(name).unwrap();
    }
    assert_eq!(world.jobs(), []);
    world.assert_tidy();
}

#[test]
fn a_base_is_written_only_if_nobody_else_needs_it() {
    let world = World::new();
    let base = VolumeSource::Base("/base.raw".into());
    let into = DeleteOptions {
        into_base: true,
        ..DeleteOptions::default()
    };
    world.store().create_volume("web", &base).unwrap();
    world.store().create_volume("other", &base).unwrap();
    world.write("web", 0, 8, 2);
    world.snapshot("s1", &["web"]);
    world.write("web", 4, 8, 3);
    world.snapshot("s2", &["web"]);
    let delete = |name| world.store().delete_snapshot("web", name, into);
    says(delete("s2"), &["into_base", "directly over a base"]);
    says(delete("s1"), &["into_base", "/base.raw", "other volumes"]);
    world.store().delete_volume("other").unwrap();
    let layer = world.layer_of("web", "s1");
    let report = delete("s1").unwrap();
    let jobs = world.jobs();
    assert_eq!(report.jobs.len(), 1);
    assert_eq!((jobs[0].kind, jobs[0].way), (JobKind::IntoBase, Way::Down));
    assert_eq!(jobs[0].target, layer);
    // Nobody leaves a base half changed.
    says(world.store().delete_volume("web"), &["web", "job"]);
    assert_eq!(world.jobs().len(), 1);
    world.assert_tidy();
}

#[test]
fn a_volume_that_is_deleted_frees_what_nobody_else_needs() {
    let mut world = World::new();
    let base = VolumeSource::Base("/base.raw".into());
    world.store().create_volume("web", &base).unwrap();
    world.write("web", 0, 4, 2);
    world.snapshot("s1", &["web"]);
    world.write("web", 4, 4, 3);
    world.snapshot("s2", &["web"]);
    world.write("web", 8, 4, 4);
    world.clone_of("old", "web", "s1");
    world.store().delete_volume("web").unwrap();
    let expected = stamps(&[(0, 64, 1), (0, 4, 2)]);
    assert_eq!(world.values("old"), expected);
    // The base, what was s1, and the active one.
    assert_eq!(world.catalog.state().layers.len(), 3);
    assert_eq!(world.jobs().len(), 1);
    world.assert_tidy();
    world.reopen();
    assert_eq!(world.values("old"), expected);
    let queue = world.queue("old");
    says(world.store().delete_volume("old"), &["old", "in use"]);
    drop(queue);
    world.store().delete_volume("old").unwrap();
    assert!(world.catalog.state().layers.is_empty());
    assert_eq!(world.jobs(), []);
    world.assert_tidy();
    // The user's file is still there.
    world.store().create_volume("new", &base).unwrap();
    assert_eq!(world.values("new"), stamps(&[(0, 64, 1)]));
}

#[test]
fn one_name_of_a_group_goes_alone() {
    let world = World::new();
    for name in ["a", "b"] {
        world.create(name);
        world.write(name, 0, 1, 2);
    }
    world.snapshot("s", &["a", "b"]);
    delete(&world, "a", "s");
    let left = world.store().snapshots(None).unwrap();
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].volume, "b");
}

#[test]
fn a_running_volume_is_cloned_as_it_is() {
    let mut world = World::new();
    world.create("web");
    let mut queue = world.queue("web");
    let bytes = |id| {
        (0..4)
            .flat_map(|sector| crate::oracle::stamp(7, sector, id))
            .collect::<Vec<u8>>()
    };
    queue.run(Operation::Write(Sector(0)), bytes(2)).0.unwrap();
    let clone = |name: &str, of: &str| {
        let source = VolumeSource::Volume(of.into());
        world.store().create_volume(name, &source)
    };
    clone("one", "web").unwrap();
    queue.run(Operation::Write(Sector(0)), bytes(3)).0.unwrap();
    assert_eq!(world.values("one"), stamps(&[(0, 4, 2)]));
    let layers = world.catalog.state().layers.len();
    clone("two", "one").unwrap();
    clone("three", "one").unwrap();
    assert_eq!(
        world.catalog.state().layers.len(),
        layers + 2,
        "nothing was written since: nothing is sealed"
    );
    assert!(world.store().snapshots(None).unwrap().is_empty());
    assert!(matches!(
        clone("two", "web").unwrap_err(),
        Error::Exists { .. }
    ));
    says(clone("four", "none"), &["volume", "none"]);
    world.write("three", 9, 1, 9);
    drop(queue);
    world.reopen();
    assert_eq!(world.values("web"), stamps(&[(0, 4, 3)]));
    assert_eq!(world.values("two"), stamps(&[(0, 4, 2)]));
    assert_eq!(world.values("three"), stamps(&[(0, 4, 2), (9, 1, 9)]));
    // Without a commit nothing but a layer in the way is left of a clone, and that gets a job.
    world.catalog.fail_next_commit();
    let source = VolumeSource::Volume("web".into());
    assert!(world.store().create_volume("five", &source).is_err());
    for name in ["one", "two", "three"] {
        world.store().delete_volume(name).unwrap();
    }
    assert_eq!(world.jobs().len(), 1, "what was shared is joined");
    world.assert_tidy();
}

#[test]
fn layers_without_names_are_joined_in_pairs() {
    let world = chain(6);
    for number in 1..=6 {
        delete(&world, "web", &format!("s{number}"));
    }
    // Six without a name and the active one: each is in one job at most.
    let jobs = world.jobs();
    assert_eq!(jobs.len(), 3);
    let mut all: Vec<_> = jobs
        .iter()
        .flat_map(|job| [job.source, job.target])
        .collect();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 6);
}
