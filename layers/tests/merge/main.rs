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

mod bad;
mod crash;
#[path = "../crash/disk.rs"]
mod disk;
mod host;
#[path = "../crash/oracle.rs"]
mod oracle;
mod scrub;
mod world;

use std::path::Path;

use oracle::{Value, stamp};
use stratablk_layers::catalog::Way;
use stratablk_layers::file::sim::{Fault, FaultEffect, FaultPoint};
use stratablk_layers::file::{Media, OpenMode};
use stratablk_layers::lifecycle::{DeleteOptions, Phase};
use stratablk_layers::store::VolumeSource;
use stratablk_layers::units::SECTOR_BYTES;

use world::{NUMBER, SECTORS, World};

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

/// Carries out the jobs that join two layers: there were so many, and all reads the same after that and after a restart.
fn run_join(world: &mut World, layers: usize, what: &str) {
    world.run_jobs();
    world.check();
    assert_eq!(world.layers(), layers - 1, "{what}");
    world.restart();
    world.check();
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
            run_join(&mut world, layers, &format!("seed {seed}, {way:?}"));
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
            run_join(&mut world, layers, &format!("seed {seed}, {way:?}"));
        }
    }
}

#[test]
fn layers_are_copied_into_their_children() {
    for seed in 0..40 {
        let mut world = tree(seed);
        world.create("clone", &clone_of("b"));
        world.create("other", &clone_of("b"));
        world.attach("v");
        world.attach("clone");
        let options = DeleteOptions {
            push_down: true,
            ..DeleteOptions::default()
        };
        world.delete_with("v", "b", options);
        world.run_jobs();
        world.check();
        let job = world.store().flatten("v").unwrap();
        world.run_jobs();
        assert_eq!(world.store().job(job.id).unwrap().phase, Phase::Done);
        world.check();
        world.detach("v");
        world.restart();
        assert_eq!(world.store().volume_info("v").unwrap().depth, 1);
        world.check();
    }
}

#[test]
fn an_image_is_imported_while_it_is_used() {
    for seed in 0..20 {
        let mut world = World::new(seed);
        let VolumeSource::Base(image) = world.install_base() else {
            unreachable!("a base");
        };
        let job = world.store().import("v", &image).unwrap();
        world.know("v", vec![Value::Stamp(1); SECTORS as usize]);
        world.attach("v");
        world.run_jobs();
        assert_eq!(world.store().job(job.id).unwrap().phase, Phase::Done);
        world.check();
        assert_eq!(world.layers(), 1, "the base is needed no more");
        world.media.remove(&image).unwrap();
        world.detach("v");
        world.restart();
        world.check();
    }
}

#[test]
fn the_holes_and_zeroes_of_an_image_take_no_space() {
    for seed in 0..20 {
        let mut world = World::new(seed);
        let image = Path::new("/images/sparse.raw");
        let mut bytes = vec![0; (SECTORS * SECTOR_BYTES) as usize];
        let mut values = vec![Value::Zero; SECTORS as usize];
        // Within two clusters.
        for sector in 83..93 {
            let at = (sector * SECTOR_BYTES) as usize;
            bytes[at..at + SECTOR_BYTES as usize].copy_from_slice(&stamp(NUMBER, sector, 1));
            values[sector as usize] = Value::Stamp(1);
        }
        world.media.install(image, &bytes).unwrap();
        // Zeroes that take space.
        let file = world.media.open(image, OpenMode::ReadWrite, false).unwrap();
        file.write_at(&[0; 10 * 4096], 20 * 4096).unwrap();
        // The end of the disk, which is not a whole cluster.
        let tail = SECTORS / 8 * 4096;
        if seed % 4 < 2 {
            // Else it is a hole.
            file.write_at(&[0; 1536], tail).unwrap();
        }
        assert_eq!(SECTORS * SECTOR_BYTES - tail, 1536);
        drop(file);
        let job = world.store().import("v", image).unwrap();
        world.know("v", values);
        if seed % 2 == 0 {
            world.attach("v");
        }
        world.run_jobs();
        let job = world.store().job(job.id).unwrap();
        assert_eq!(job.phase, Phase::Done);
        assert_eq!(job.bytes_total, job.bytes_done);
        assert!(job.bytes_total <= 2 * 4096 + 10 * 4096 + 1536, "{job:?}");
        if seed % 2 == 1 {
            assert_eq!(world.allocated(), 2 * 4096);
        }
        world.check();
        world.media.remove(image).unwrap();
        world.detach("v");
        world.restart();
        world.check();
    }
}

#[test]
fn a_layer_is_moved_into_the_users_base() {
    for seed in 0..30 {
        let mut world = tree(seed * 2);
        world.attach("v");
        for snapshot in ["a", "b"] {
            let options = DeleteOptions {
                into_base: true,
                ..DeleteOptions::default()
            };
            world.delete_with("v", snapshot, options);
            world.run_jobs();
            world.check();
        }
        world.detach("v");
        world.restart();
        world.check();
    }
}

#[test]
fn a_snapshot_in_the_middle_of_a_job_changes_nothing() {
    for seed in 0..60 {
        for way in [Way::Up, Way::InPlace] {
            let mut world = tree(seed);
            world.set_step(4096);
            world.attach("v");
            world.delete("v", "c", Some(way));
            for _ in 0..1 + world.random.below(12) {
                world.step();
            }
            world.snapshot("v", "later");
            world.run_jobs();
            world.check();
            world.delete("v", "later", None);
            world.run_jobs();
            world.check();
        }
    }
}

#[test]
fn the_store_is_closed_between_any_two_steps() {
    for seed in 0..40 {
        for (snapshot, way) in WAYS {
            let mut world = tree(seed);
            world.set_step(4096);
            let layers = world.layers();
            world.delete("v", snapshot, Some(way));
            while !world.durable.state().jobs.is_empty() {
                world.attach("v");
                for _ in 0..1 + world.random.below(4) {
                    world.step();
                }
                world.restart();
            }
            world.run_jobs();
            world.check();
            assert_eq!(world.layers(), layers - 1);
        }
    }
}

/// Every way that joins two layers, with a snapshot that it can be taken for.
const WAYS: [(&str, Way); 5] = [
    ("a", Way::Up),
    ("a", Way::Down),
    ("b", Way::Down),
    ("c", Way::Up),
    ("c", Way::InPlace),
];

/// Cuts the power, or kills the daemon, in the middle of jobs. Returns what was wrong.
fn crashes(seeds: std::ops::Range<u64>, share: u64, ways: &[(&str, Way)]) -> Vec<String> {
    let mut images = 0;
    for seed in seeds {
        for (snapshot, way) in ways {
            let mut world = tree(seed);
            world.set_step(8192);
            world.attach("v");
            world.attach("v");
            let seen = crash::watch(&world, seed, share);
            world.delete("v", snapshot, Some(*way));
            world.run_jobs();
            world.media.clear_observer();
            let mut seen = seen.lock().unwrap();
            images += seen.images;
            if !seen.violations.is_empty() {
                // Its guests may wait for what nobody does any more.
                std::mem::forget(world);
                return std::mem::take(&mut seen.violations);
            }
            drop(seen);
            world.check();
        }
    }
    println!("{images} images");
    Vec::new()
}

#[test]
fn crashes_at_every_step_lose_nothing_and_the_job_ends_afterwards() {
    let violations = crashes(0..24, 40, &WAYS);
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

#[test]
fn crashes_while_layers_are_copied_lose_nothing() {
    for seed in 0..8 {
        let mut world = tree(seed);
        world.set_step(8192);
        world.attach("v");
        let seen = crash::watch(&world, seed, 40);
        world.store().flatten("v").unwrap();
        world.run_jobs();
        world.media.clear_observer();
        let seen = seen.lock().unwrap();
        assert!(seen.violations.is_empty(), "{}", seen.violations.join("\n"));
    }
}

#[test]
fn crashes_while_the_base_is_written_lose_nothing() {
    for seed in 0..8 {
        let mut world = tree(seed * 2);
        world.set_step(8192);
        world.attach("v");
        let seen = crash::watch(&world, seed, 40);
        let options = DeleteOptions {
            into_base: true,
            ..DeleteOptions::default()
        };
        world.delete_with("v", "a", options);
        world.run_jobs();
        world.media.clear_observer();
        let seen = seen.lock().unwrap();
        assert!(seen.violations.is_empty(), "{}", seen.violations.join("\n"));
    }
}

#[test]
fn the_extra_space_of_a_job_is_a_step() {
    for seed in 0..30 {
        for (snapshot, way) in WAYS {
            if way == Way::InPlace {
                // Two names of one file would be counted twice.
                continue;
            }
            let mut world = tree(seed);
            let step = 8192;
            world.set_step(step);
            world.store().flush_all().unwrap();
            world.delete("v", snapshot, Some(way));
            let before = world.allocated();
            let mut most = before;
            while world.store().job_step() {
                most = most.max(world.allocated());
            }
            assert!(
                most <= before + step + 4096,
                "seed {seed}, {way:?}: {before} bytes before, {most} at most"
            );
            assert!(world.allocated() <= before);
            world.check();
        }
    }
}

#[test]
fn jobs_rest_go_on_and_stop() {
    let mut world = tree(5);
    world.set_step(4096);
    let jobs = world.delete("v", "a", Some(Way::Up));
    let job = world.store().jobs().last().unwrap().id;
    assert!(jobs.is_empty() || jobs == [job]);
    let store = std::sync::Arc::clone(world.store());
    store.job_step();
    assert_eq!(store.pause_job(job).unwrap().phase, Phase::Paused);
    let moved = store.job(job).unwrap().bytes_done;
    // Of what is left checksums are taken.
    while store.job_step() {}
    assert_eq!(store.job(job).unwrap().bytes_done, moved);
    assert_eq!(store.limit_job(job, Some(1000)).unwrap().rate, Some(1000));
    assert_eq!(store.limit_job(job, None).unwrap().rate, None);
    store.resume_job(job).unwrap();
    for _ in 0..3 {
        store.job_step();
    }
    assert_eq!(store.job(job).unwrap().phase, Phase::Running);
    assert_eq!(store.cancel_job(job).unwrap().phase, Phase::Cancelled);
    while store.job_step() {}
    assert_eq!(store.job(job).unwrap().phase, Phase::Cancelled);
    drop(store);
    world.check();
    world.restart();
    let store = std::sync::Arc::clone(world.store());
    while store.job_step() {}
    let phase = store.job(job).unwrap().phase;
    assert_eq!(phase, Phase::Cancelled, "it is not begun anew");
    store.resume_job(job).unwrap();
    drop(store);
    world.run_jobs();
    let done = world.store().job(job).unwrap();
    assert_eq!(done.phase, Phase::Done);
    assert_eq!(done.bytes_done, done.bytes_total);
    assert!(done.ended_ns.is_some());
    assert!(world.store().pause_job(job).is_err());
    assert!(
        world
            .store()
            .job(stratablk_layers::catalog::JobId(99))
            .is_err()
    );
    world.check();
}

#[test]
fn a_merge_in_place_is_not_cancelled_but_paused() {
    let mut world = tree(3);
    world.set_step(4096);
    world.attach("v");
    world.delete("v", "c", Some(Way::InPlace));
    let job = world.store().jobs().last().unwrap().id;
    for _ in 0..3 {
        world.step();
    }
    world.settle_guests();
    let refused = world.store().cancel_job(job).unwrap_err().to_string();
    assert!(refused.contains("pause"), "{refused}");
    world.store().pause_job(job).unwrap();
    world.check();
    world.store().resume_job(job).unwrap();
    world.run_jobs();
    world.check();
}

#[test]
fn a_full_disk_or_a_failing_one_stops_a_job_and_harms_no_disk() {
    let failures = [
        (FaultPoint::Write, Some("data"), FaultEffect::NoSpace),
        (FaultPoint::Write, Some("data"), FaultEffect::Error),
        (FaultPoint::Write, Some("map.new"), FaultEffect::NoSpace),
        (FaultPoint::SyncData, Some("data"), FaultEffect::Error),
        (FaultPoint::SyncData, Some("map.new"), FaultEffect::Error),
        (FaultPoint::Rename, Some("map"), FaultEffect::Error),
        (FaultPoint::Read, Some("data"), FaultEffect::Error),
        (FaultPoint::Punch, Some("data"), FaultEffect::Error),
        // After a map has taken its name.
        (FaultPoint::SyncDir, None, FaultEffect::Error),
    ];
    let mut stopped = 0;
    for seed in 0..12 {
        for (point, name, effect) in failures {
            for (snapshot, way) in [("a", Way::Up), ("a", Way::Down)] {
                let mut world = tree(seed);
                world.set_step(4096);
                world.attach("v");
                world.delete("v", snapshot, Some(way));
                world.media.inject(Fault {
                    point,
                    name: name.map(str::to_owned),
                    after: seed % 5,
                    times: 1,
                    effect,
                });
                for _ in 0..10_000 {
                    if !world.store().job_step() {
                        break;
                    }
                }
                world.media.clear_faults();
                for job in world.store().jobs() {
                    if job.phase == Phase::Failed {
                        stopped += 1;
                        assert!(job.error.is_some());
                        world.store().resume_job(job.id).unwrap();
                    }
                }
                world.check();
                world.run_jobs();
                world.check();
            }
        }
    }
    assert!(stopped > 50, "{stopped}");
}

#[test]
fn a_base_is_the_same_file_by_any_name() {
    let mut world = tree(2);
    // Another name of it.
    let other = Path::new("/images/other.raw");
    world
        .media
        .link(Path::new("/images/base.raw"), other)
        .unwrap();
    let store = std::sync::Arc::clone(world.store());
    store
        .create_volume("by", &VolumeSource::Base(other.into()))
        .unwrap();
    let options = DeleteOptions {
        into_base: true,
        ..DeleteOptions::default()
    };
    let refused = store.delete_snapshot("v", "a", options).unwrap_err();
    assert!(refused.to_string().contains("other volumes"), "{refused}");
    store.delete_volume("by").unwrap();
    drop(store);
    let jobs = world.delete_with("v", "a", options);
    let store = std::sync::Arc::clone(world.store());
    let refused = store.import("by", other).unwrap_err().to_string();
    assert!(refused.contains("job"), "{refused}");
    let refused = store.delete_volume("v").unwrap_err().to_string();
    assert!(refused.contains("into its image"), "{refused}");
    // It has not begun.
    assert_eq!(store.cancel_job(jobs[0]).unwrap().phase, Phase::Cancelled);
    assert!(world.durable.state().jobs.is_empty());
    drop(store);
    world.run_jobs();
    world.check();
}

#[test]
fn a_job_that_writes_to_an_image_is_not_left_half_done() {
    let mut world = tree(4);
    let options = DeleteOptions {
        into_base: true,
        ..DeleteOptions::default()
    };
    let jobs = world.delete_with("v", "a", options);
    let store = std::sync::Arc::clone(world.store());
    store.set_job_step_bytes(512);
    while store.job(jobs[0]).unwrap().bytes_done == 0 {
        assert!(store.job_step());
    }
    let refused = store.cancel_job(jobs[0]).unwrap_err().to_string();
    assert!(refused.contains("half changed"), "{refused}");
    drop(store);
    world.run_jobs();
    world.check();
}

#[test]
fn a_flatten_ends_jobs_that_were_cancelled() {
    for seed in 0..20 {
        for way in [Way::Up, Way::InPlace] {
            let mut world = tree(seed);
            world.set_step(512);
            world.delete("v", "c", Some(way));
            let store = std::sync::Arc::clone(world.store());
            let job = store.jobs().last().unwrap().id;
            if way == Way::Up {
                for _ in 0..seed {
                    store.job_step();
                }
            }
            let ended = store.cancel_job(job).is_err();
            let flatten = store.flatten("v").unwrap().id;
            drop(store);
            world.attach("v");
            world.run_jobs();
            assert_eq!(world.store().job(flatten).unwrap().phase, Phase::Done);
            if !ended {
                assert_eq!(world.store().job(job).unwrap().phase, Phase::Cancelled);
            }
            world.check();
            world.detach("v");
            world.restart();
            world.check();
        }
    }
}

/// A flatten that was cancelled when its map had its end already, and a longer one over it that is as far: whichever comes
/// first, neither leaves a map that says another parent than the catalog.
#[test]
fn a_longer_flatten_goes_on_when_a_shorter_one_ends() {
    let mut both = 0;
    for (first, second) in (0..10).flat_map(|first| (0..10).map(move |second| (first, second))) {
        let mut world = World::new(3);
        let base = world.install_base();
        world.create("v", &base);
        world.scribble("v", 20);
        world.set_step(1 << 20);
        let store = std::sync::Arc::clone(world.store());
        let short = store.flatten("v").unwrap().id;
        for _ in 0..first {
            store.job_step();
        }
        let _ = store.cancel_job(short);
        world.snapshot("v", "a");
        world.scribble("v", 20);
        let long = store.flatten("v").map(|job| job.id);
        for _ in 0..second {
            store.job_step();
        }
        drop(store);
        world.restart();
        let store = std::sync::Arc::clone(world.store());
        let resumed = store.resume_job(short).is_ok();
        let waits = long.is_ok_and(|id| store.job(id).is_ok_and(|job| job.phase == Phase::Queued));
        both += usize::from(resumed && waits);
        drop(store);
        world.run_jobs();
        world.check();
        world.restart();
        world.check();
    }
    assert!(both > 0, "never were there both");
}

#[test]
fn what_is_moved_at_once_follows_the_rate() {
    for way in [Way::Up, Way::Down] {
        let mut world = World::new(3);
        world.create("v", &VolumeSource::Size(SECTORS * SECTOR_BYTES));
        for snapshot in ["a", "b"] {
            for _ in 0..20 {
                world.scribble("v", 1);
            }
            world.snapshot("v", snapshot);
        }
        world.set_step(1 << 20);
        world.delete("v", "a", Some(way));
        let store = std::sync::Arc::clone(world.store());
        let job = store.jobs().last().unwrap().id;
        store.limit_job(job, Some(1000)).unwrap();
        let mut before = 0;
        while store.job_step() {
            let done = store.job(job).unwrap().bytes_done;
            assert!(done - before <= 64 << 10, "{way:?}: {before} to {done}");
            before = done;
        }
        assert_eq!(store.job(job).unwrap().phase, Phase::Done);
    }
}

#[cfg(feature = "canary")]
mod canaries {
    use super::*;
    use stratablk_layers::canary::{Canary, set};

    /// Whether crashes show that something is broken.
    fn rings(canary: Canary) {
        let run = || {
            set(Some(canary));
            crashes(0..24, 60, &WAYS)
        };
        // A guest may see it before a crash does.
        let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        set(None);
        let violations = run.unwrap_or_else(|_| vec!["a guest saw it".into()]);
        println!("{canary:?}: {violations:?}");
        assert!(!violations.is_empty(), "{canary:?}, and nobody noticed");
    }

    #[test]
    fn canary_places_given_back_too_early_are_noticed() {
        rings(Canary::PunchBeforeCommit);
    }

    #[test]
    fn canary_a_missing_sync_is_noticed() {
        rings(Canary::SkipSync);
    }

    #[test]
    fn canary_a_write_to_the_file_without_the_lead_is_noticed() {
        let run = || {
            set(Some(Canary::LoseGuestWrite));
            for seed in 0..40 {
                let mut world = tree(seed);
                world.attach("v");
                world.attach("v");
                world.delete("v", "c", Some(Way::Up));
                world.run_jobs();
                world.check();
            }
        };
        let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        set(None);
        assert!(run.is_err(), "a guest's write was lost, and nobody noticed");
    }
}
