//! Commands while a job is under way, at each of its steps: what they do is the same as without it, and the job goes on or is
//! no longer needed.

use stratablk_layers::Error;
use stratablk_layers::catalog::{VolumeKind, Way};
use stratablk_layers::lifecycle::{DeleteOptions, RestoreOptions};
use stratablk_layers::store::VolumeSource;

use crate::world::World;

/// A volume with three snapshots, a clone of the first, and a job that joins what was the second with the third, or the third
/// with the active layer.
fn setup(snapshot: &str, way: Way) -> World {
    let world = World::new();
    world.store().set_job_step_bytes(4096);
    world.create("a");
    for (number, (start, count)) in (2u64..).zip([(0, 40), (20, 20), (30, 30)]) {
        world.write("a", start, count, number);
        world.snapshot(&format!("s{}", number - 1), &["a"]);
    }
    world.write("a", 35, 5, 5);
    world.clone_of("c", "a", "s1");
    world.write("c", 1, 1, 6);
    world.store().flush_all().unwrap();
    let options = DeleteOptions {
        way: Some(way),
        ..DeleteOptions::default()
    };
    world
        .store()
        .delete_snapshot("a", snapshot, options)
        .unwrap();
    world
}

/// Runs a command after every number of steps of each job.
///
/// A job may hold a volume for a moment, which is then said to be in use: after another step it is not.
fn at_every_step(what: &str, command: impl Fn(&World) -> Result<(), Error>) {
    let command = |world: &World| {
        for _ in 0..10 {
            match command(world) {
                Err(Error::Busy { .. }) => world.work(1),
                result => return result.unwrap(),
            }
        }
        panic!("{what}: a job holds the volume for good");
    };
    for (snapshot, way) in [
        ("s2", Way::Up),
        ("s2", Way::Down),
        ("s3", Way::Up),
        ("s3", Way::InPlace),
    ] {
        let expected = {
            let world = setup(snapshot, way);
            command(&world);
            world.seen()
        };
        let steps = {
            let world = setup(snapshot, way);
            let mut steps = 0;
            while world.store().job_step() {
                steps += 1;
                assert!(steps < 1000);
            }
            steps
        };
        println!("{what}: {snapshot} {way:?} has {steps} steps");
        for step in 0..=steps {
            let when = format!("{what}, {snapshot} {way:?} after {step} of {steps} steps");
            let mut world = setup(snapshot, way);
            world.work(step);
            command(&world);
            assert_eq!(world.seen(), expected, "{when}");
            world.work(1);
            assert_eq!(world.seen(), expected, "{when} and one more");
            if step % 2 == 0 {
                world.reopen();
                assert_eq!(world.seen(), expected, "{when}, started again");
            }
            world.work_all();
            assert_eq!(world.seen(), expected, "{when}, at the end of all jobs");
            world.reopen();
            assert_eq!(world.seen(), expected, "{when}, at the end, started again");
            world.assert_tidy();
        }
    }
}

#[test]
fn nothing_else() {
    at_every_step("nothing", |_| Ok(()));
}

#[test]
fn a_restore() {
    at_every_step("restore", |world| {
        let options = RestoreOptions::default();
        world.store().restore("a", "s1", &options)?;
        world.write("a", 50, 4, 7);
        Ok(())
    });
    at_every_step("restore --keep", |world| {
        let options = RestoreOptions {
            keep: Some("kept".into()),
            only: false,
        };
        world.store().restore("a", "s1", &options).map(drop)
    });
}

#[test]
fn a_snapshot_and_a_clone() {
    at_every_step("snapshot", |world| {
        world.write("a", 0, 4, 8);
        world.snapshot("s4", &["a"]);
        world.write("a", 2, 4, 9);
        Ok(())
    });
    at_every_step("clone", |world| {
        let source = VolumeSource::Volume("a".into());
        world.store().create_volume("d", &source)?;
        world.write("d", 2, 4, 9);
        Ok(())
    });
}

#[test]
fn a_volume_that_goes() {
    at_every_step("volume delete", |world| world.store().delete_volume("a"));
}

#[test]
fn a_snapshot_that_goes() {
    at_every_step("snapshot delete", |world| {
        let options = DeleteOptions::default();
        let deleted = world.store().delete_snapshot("a", "s1", options);
        deleted.map(drop)
    });
}

#[test]
fn another_type() {
    at_every_step("set --type immutable", |world| {
        world.store().set_kind("a", VolumeKind::Immutable)?;
        world.write("a", 3, 3, 7);
        assert!(world.store().machine_starts("a")?);
        Ok(())
    });
}
