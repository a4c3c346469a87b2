//! Jobs on layers: every disk reads the same at every instant, whatever is merged, interrupted, cut off or broken.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests: small numbers, and a panic is the verdict"
)]
#![expect(
    dead_code,
    reason = "shares the guest and the oracle of the crash tests and uses a part of them"
)]

#[path = "../crash/disk.rs"]
mod disk;
#[path = "../crash/oracle.rs"]
mod oracle;
mod world;

use stratablk_layers::catalog::Way;
use stratablk_layers::store::VolumeSource;
use stratablk_layers::units::SECTOR_BYTES;

use world::{SECTORS, World};

/// A volume over nothing, or over a raw base, with three snapshots.
fn tree(seed: u64) -> World {
    let mut world = World::new(seed);
    let source = if seed.is_multiple_of(2) {
        world.install_base()
    } else {
        VolumeSource::Size(SECTORS * SECTOR_BYTES)
    };
    world.create("v", &source);
    for snapshot in ["a", "b", "c"] {
        let count = 1 + world.random.index(12);
        world.scribble("v", count);
        world.snapshot("v", snapshot);
    }
    let count = world.random.index(8);
    world.scribble("v", count);
    world
}

/// The source of a clone.
fn clone_of(snapshot: &str) -> VolumeSource {
    VolumeSource::Snapshot {
        volume: "v".into(),
        snapshot: snapshot.into(),
    }
}

#[test]
fn sealed_layers_are_joined_in_both_directions_among_requests() {
    for seed in 0..60 {
        for way in [Way::Up, Way::Down] {
            let mut world = tree(seed);
            world.create("clone", &clone_of("b"));
            world.attach("v");
            world.attach("v");
            world.attach("clone");
            let layers = world.layers();
            world.delete("v", "a", Some(way));
            world.run_jobs();
            world.check();
            assert_eq!(world.layers(), layers - 1, "seed {seed}, {way:?}");
            world.restart();
            world.check();
        }
    }
}

#[test]
fn a_layer_joins_one_that_takes_writes_in_both_directions() {
    for seed in 0..60 {
        for way in [Way::Up, Way::InPlace] {
            let mut world = tree(seed);
            world.attach("v");
            world.attach("v");
            let layers = world.layers();
            world.delete("v", "c", Some(way));
            world.run_jobs();
            world.check();
            assert_eq!(world.layers(), layers - 1, "seed {seed}, {way:?}");
            world.restart();
            world.check();
        }
    }
}
