//! What was found damaged stays known: where the file that says so is damaged itself, while jobs copy, and when a map takes
//! another's place.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use stratablk_layers::catalog::{JobId, Way};
use stratablk_layers::check::{CheckOptions, Severity, check_against};
use stratablk_layers::file::Media;
use stratablk_layers::file::sim::{Fault, FaultEffect, FaultPoint, Random};
use stratablk_layers::lifecycle::{DeleteOptions, Phase};
use stratablk_layers::mapfile::data_path;
use stratablk_layers::units::{CLUSTER_BYTES, Cluster, LayerId, SECTOR_BYTES, Sector};
use stratablk_layers::volume::{Durability, Operation};

use crate::disk::Queue;
use crate::scrub::{
    bytes_of, failing, file_of, files, flip, held, look_at_sums, put, reads, report, run_all,
    scrub, scrub_clean, sealed,
};
use crate::world::World;
use crate::{WAYS, clone_of, crash, tree};

/// A store in which one bit of what `v` reads is damaged, and known to be.
struct Rotten {
    world: World,
    /// Where: the layer, the cluster, the byte of the layer's data.
    layer: LayerId,
    cluster: Cluster,
    offset: u64,
}

impl Rotten {
    /// `None` if `v` reads nothing of the layer of that snapshot.
    fn new(seed: u64, snapshot: &str) -> Option<Self> {
        let mut world = tree(seed);
        world.run_jobs_alone();
        // Nothing of it is in the cache.
        world.restart();
        let state = world.durable.state();
        let layer = state.snapshot("v", snapshot).unwrap().layer;
        let mut clusters = held(&world, layer).into_iter().rev();
        let (cluster, mask) = clusters.find(|(cluster, _)| reads(&world, "v", layer, *cluster))?;
        let offset = cluster.0 * CLUSTER_BYTES + u64::from(mask.0.trailing_zeros()) * SECTOR_BYTES;
        flip(&world, &data_path(layer), offset);
        let rotten = Self {
            world,
            layer,
            cluster,
            offset,
        };
        assert_eq!(scrub(&rotten.world).phase, Phase::Failed);
        assert_eq!(rotten.failing(), [cluster]);
        Some(rotten)
    }

    /// What remembers it.
    fn bad(&self) -> PathBuf {
        file_of(self.layer, "bad")
    }

    /// What of `v` cannot be read.
    fn failing(&self) -> Vec<Cluster> {
        failing(&self.world, "v")
    }

    /// The clusters of `v` that lie in the layer.
    fn all(&self) -> Vec<Cluster> {
        let clusters = held(&self.world, self.layer).into_iter();
        clusters
            .map(|(cluster, _)| cluster)
            .filter(|cluster| reads(&self.world, "v", self.layer, *cluster))
            .collect()
    }

    /// Puts the data right.
    fn put_right(&self) {
        flip(&self.world, &data_path(self.layer), self.offset);
    }
}

#[test]
fn where_it_is_not_known_what_is_damaged_nothing_is_served_until_a_scrub_knows() {
    let mut tried = 0;
    for seed in 0..6 {
        for (snapshot, way) in WAYS {
            let Some(mut rotten) = Rotten::new(seed, snapshot) else {
                continue;
            };
            let (bad, all) = (rotten.bad(), rotten.all());
            let len = bytes_of(&rotten.world, &bad).len() as u64;
            // Magic, version, checksum, features, store, layer, length, time, nothing, bitmap.
            let places = [0, 8, 12, 16, 24, 33, 50, 64, 72, 100, 128, len - 1];
            let place = places[rotten.world.random.index(places.len())];
            let (case, damaged) = match tried % 4 {
                0 => (
                    "cut",
                    bytes_of(&rotten.world, &bad)[..place as usize].to_vec(),
                ),
                1 => ("empty", Vec::new()),
                _ => {
                    flip(&rotten.world, &bad, place);
                    ("flipped", bytes_of(&rotten.world, &bad))
                }
            };
            put(&rotten.world, &bad, &damaged);
            let what = format!("seed {seed}, {snapshot}, {way:?}, {case} at {place}");
            tried += 1;
            assert_eq!(
                rotten.failing(),
                [rotten.cluster],
                "{what}: it is in memory still"
            );
            rotten.world.restart();
            // Before anybody has looked.
            assert_eq!(rotten.failing(), all, "{what}");
            let found = check_against(
                &rotten.world.durable.state(),
                &files(&rotten.world),
                CheckOptions::default(),
            );
            let found = found.unwrap().findings;
            assert!(
                found
                    .iter()
                    .any(|finding| finding.layer == Some(rotten.layer)
                        && finding.severity == Severity::Error
                        && finding.what.contains("is lost")),
                "{what}: {found:?}"
            );
            let jobs = rotten.world.delete("v", snapshot, Some(way));
            rotten.world.store().job_step();
            let job = rotten.world.store().job(jobs[0]).unwrap();
            assert_eq!(job.phase, Phase::Failed, "{what}");
            let error = job.error.unwrap();
            assert!(
                error.contains("scrub") && error.contains(&rotten.layer.to_string()),
                "{error}"
            );
            // A restart does not forget it.
            rotten.world.restart();
            assert_eq!(rotten.failing(), all, "{what}");
            let mended = seed % 2 == 0;
            if mended {
                rotten.put_right();
            }
            run_all(rotten.world.store());
            let notes = rotten.world.store().notes();
            let told = notes.iter().any(|note| {
                note.contains(&rotten.layer.to_string())
                    && note.contains("all reads of it fail until")
            });
            assert!(told, "{what}: {notes:?}");
            assert_eq!(rotten.world.store().layers_without_sums(), 0);
            if mended {
                assert_eq!(rotten.failing(), [], "{what}");
                assert!(
                    rotten.world.media.stat(&bad).is_err(),
                    "{what}: not looked at"
                );
            } else {
                assert_eq!(rotten.failing(), [rotten.cluster], "{what}");
                rotten.world.restart();
                assert_eq!(rotten.failing(), [rotten.cluster], "{what}: again");
                rotten.put_right();
                scrub_clean(&rotten.world);
            }
            rotten.world.store().resume_job(jobs[0]).unwrap();
            run_all(rotten.world.store());
            assert_eq!(
                rotten.world.store().job(jobs[0]).unwrap().phase,
                Phase::Done,
                "{what}"
            );
            rotten.world.check();
        }
    }
    assert!(tried > 10, "{tried}");
}

#[test]
fn a_file_that_says_what_is_damaged_and_cannot_be_read_counts_as_damaged() {
    let mut rotten = (0..).find_map(|seed| Rotten::new(seed, "b")).unwrap();
    let fault = |point| Fault {
        point,
        name: Some("bad".into()),
        after: 0,
        times: 1,
        effect: FaultEffect::Error,
    };
    rotten.world.restart();
    rotten.world.media.inject(fault(FaultPoint::Read));
    assert_eq!(rotten.failing(), rotten.all());
    run_all(rotten.world.store());
    assert_eq!(rotten.failing(), [rotten.cluster]);
    // One that cannot be opened now may be opened later.
    rotten.world.restart();
    rotten.world.media.inject(fault(FaultPoint::Open));
    assert!(rotten.world.store().open_volume("v").is_err());
    assert_eq!(rotten.failing(), [rotten.cluster]);
}

#[test]
fn a_layer_of_which_nothing_is_served_is_scrubbed_as_soon_as_the_host_lets_it_be() {
    let mut rotten = (0..).find_map(|seed| Rotten::new(seed, "b")).unwrap();
    flip(&rotten.world, &rotten.bad(), 64);
    rotten.world.restart();
    rotten.world.media.inject(Fault {
        point: FaultPoint::Open,
        name: Some("sums".into()),
        after: 0,
        times: 1,
        effect: FaultEffect::Error,
    });
    run_all(rotten.world.store());
    assert_eq!(rotten.failing(), rotten.all());
    let notes = rotten.world.store().notes();
    let told = |note: &String| note.contains("which was not possible");
    assert!(notes.iter().any(told), "{notes:?}");
    // By itself: nobody asks for it.
    run_all(rotten.world.store());
    assert_eq!(rotten.failing(), [rotten.cluster]);
}

#[test]
fn without_checksums_only_the_operator_can_say_that_data_is_good() {
    let mut rotten = (0..).find_map(|seed| Rotten::new(seed, "b")).unwrap();
    let bad = rotten.bad();
    flip(&rotten.world, &bad, 64);
    rotten
        .world
        .media
        .remove(&file_of(rotten.layer, "sums"))
        .unwrap();
    rotten.put_right();
    for _ in 0..2 {
        rotten.world.restart();
        run_all(rotten.world.store());
        assert_eq!(scrub(&rotten.world).phase, Phase::Failed);
        assert_eq!(rotten.failing(), rotten.all());
        let notes = rotten.world.store().notes();
        assert!(
            notes.iter().any(|note| note.contains("remove this file")),
            "{notes:?}"
        );
    }
    rotten.world.media.remove(&bad).unwrap();
    rotten.world.restart();
    assert_eq!(rotten.failing(), []);
    run_all(rotten.world.store());
    scrub_clean(&rotten.world);
    rotten.world.check();
}

/// Where a volume reads last what a job copies: the layer, the cluster, a byte of the layer's data.
fn last_source(world: &World, reader: &str, job: JobId) -> Option<(LayerId, Cluster, u64)> {
    let state = world.durable.state();
    let sealed = sealed(world);
    let chain = state.chain(state.volumes[reader].active);
    let chain: Vec<LayerId> = chain.iter().map(|row| row.id).collect();
    let at = |layer| chain.iter().position(|id| *id == layer).unwrap();
    // Unless it has ended.
    let job = state.jobs.get(&job)?;
    let (target, source) = (at(job.target), at(job.source));
    let below = chain[target + 1..=source].iter().copied();
    let places = below.filter(|id| sealed.contains(id)).flat_map(|layer| {
        let held = held(world, layer).into_iter();
        held.map(move |(cluster, mask)| (layer, cluster, mask))
    });
    let (layer, cluster, mask) = places
        .filter(|(layer, cluster, _)| reads(world, reader, *layer, *cluster))
        .max_by_key(|(_, cluster, _)| *cluster)?;
    let offset = cluster.0 * CLUSTER_BYTES + u64::from(mask.0.trailing_zeros()) * SECTOR_BYTES;
    Some((layer, cluster, offset))
}

#[test]
fn a_copy_goes_no_further_when_a_scrub_between_two_turns_finds_damage() {
    let mut found = [0, 0];
    for seed in 0..60 {
        // Copied into a layer that takes writes, or into a sealed one.
        let into_sealed = seed % 2 == 1;
        let mut world = tree(seed);
        world.create("c", &clone_of("b"));
        world.scribble("c", 4);
        world.snapshot("c", "x");
        world.run_jobs_alone();
        world.restart();
        world.set_step(4096);
        let job = if into_sealed {
            let options = DeleteOptions {
                push_down: true,
                ..DeleteOptions::default()
            };
            world.delete_with("v", "b", options)[0]
        } else {
            world.store().flatten("v").unwrap().id
        };
        let state = world.durable.state();
        let target = state.jobs[&job].target;
        let is_over = |name: &&str| {
            let chain = state.chain(state.volumes[*name].active);
            chain.iter().any(|row| row.id == target)
        };
        let reader = ["v", "c"].into_iter().find(is_over).unwrap();
        for _ in 0..100 {
            if world.store().job(job).unwrap().bytes_done > 0 {
                break;
            }
            world.store().job_step();
        }
        // A request under way: the job waits for its end, and whoever scrubs has the turn meanwhile.
        let volume = world.store().open_volume(reader).unwrap();
        let mut queue = Queue::new(volume.context(false).unwrap());
        queue.context().begin_batch();
        let memory = vec![0; SECTOR_BYTES as usize];
        queue.submit(
            Operation::Read(Sector(0)),
            Durability::AfterFlush,
            memory,
            &[],
            1,
        );
        for _ in 0..50 {
            world.store().job_step();
        }
        let last = last_source(&world, reader, job);
        if let Some((layer, _, offset)) = last {
            flip(&world, &data_path(layer), offset);
            world.store().scrub(None, None).unwrap();
            for _ in 0..200 {
                if !world.store().bad_layers().is_empty() {
                    break;
                }
                world.store().job_step();
            }
        }
        let meanwhile = !world.store().bad_layers().is_empty();
        let running = world.store().job(job).unwrap().ended_ns.is_none();
        queue.context().kick();
        while queue.poll().is_empty() {
            world.store().write_back_step(4);
        }
        drop((queue, volume));
        let Some((layer, cluster, offset)) = last.filter(|_| meanwhile && running) else {
            continue;
        };
        found[usize::from(into_sealed)] += 1;
        run_all(world.store());
        let ended = world.store().job(job).unwrap();
        assert_eq!(ended.phase, Phase::Failed, "seed {seed}");
        let error = ended.error.unwrap();
        assert!(error.contains(&layer.to_string()), "seed {seed}: {error}");
        for _ in 0..2 {
            assert_eq!(failing(&world, reader), [cluster], "seed {seed}");
            world.restart();
        }
        flip(&world, &data_path(layer), offset);
        scrub_clean(&world);
        world.store().resume_job(job).unwrap();
        run_all(world.store());
        assert_eq!(world.store().job(job).unwrap().phase, Phase::Done);
        world.check();
    }
    println!("{found:?} of 30 each");
    assert!(found.iter().all(|found| *found > 5), "{found:?}");
}

#[test]
fn a_crash_while_a_map_gets_another_name_makes_no_checksums_worthless() {
    let mut images = 0;
    for seed in 0..8 {
        let Some(rotten) = Rotten::new(seed, "b") else {
            continue;
        };
        let layer = rotten.layer;
        let mut world = rotten.world;
        // Its layer stays, without a name.
        world.create("c", &clone_of("b"));
        run_all(world.store());
        let (catalog, mut random) = (world.durable.clone(), Random::new(seed));
        let wrong = Arc::new(Mutex::new((0, Vec::new())));
        let results = Arc::clone(&wrong);
        world.media.set_observer(Box::new(move |media, point| {
            let media: Arc<dyn Media> = Arc::new(match random.chance(128) {
                true => media.kill_image(random.number()),
                false => media.crash_image(random.number()),
            });
            let mut results = results.lock().unwrap();
            results.0 += 1;
            let found = look_at_sums(&catalog.crash_image().state(), &media, true);
            let as_before = found.as_ref().is_some_and(|what| {
                what.contains(&layer.to_string()) && what.contains("of its data are not what")
            });
            if !as_before {
                results
                    .1
                    .push(format!("{:?} {}: {found:?}", point.event, point.path));
            }
        }));
        assert_eq!(world.delete("v", "b", None), []);
        world.media.clear_observer();
        let wrong = wrong.lock().unwrap();
        assert!(wrong.1.is_empty(), "seed {seed}: {:#?}", wrong.1);
        images += wrong.0;
        let job = scrub(&world);
        assert_eq!(report(&job).bad.len(), 1, "seed {seed}: {job:?}");
        assert_eq!(report(&job).taken, 0, "seed {seed}: {job:?}");
    }
    assert!(images > 20, "{images}");
}

/// Whether all sealed layers have checksums, and these are right.
#[track_caller]
fn assert_sums(world: &World, what: &str) {
    let found = look_at_sums(&world.durable.state(), &files(world), true);
    assert_eq!(found, None, "{what}");
    assert_eq!(world.store().layers_without_sums(), 0, "{what}");
}

#[test]
fn layers_of_a_job_that_has_stopped_get_checksums_until_it_goes_on() {
    let mut stopped = [0, 0];
    for seed in 0..16 {
        for (snapshot, way) in WAYS {
            let mut world = tree(seed);
            world.set_step(4096);
            world.run_jobs_alone();
            world.attach("v");
            let watched = crash::watch(&world, seed, 40);
            let job = world.delete("v", snapshot, Some(way))[0];
            for _ in 0..world.random.below(12) {
                world.step();
            }
            let what = format!("seed {seed}, {snapshot}, {way:?}");
            let by_error = seed % 2 == 0;
            if by_error {
                world.media.clear_observer();
                world.media.inject(Fault {
                    point: FaultPoint::Punch,
                    name: Some("data".into()),
                    after: 0,
                    times: 1,
                    effect: FaultEffect::Error,
                });
            } else if world.store().cancel_job(job).is_err() {
                // Ended, or not to be left half done.
                world.media.clear_observer();
                world.settle_guests();
                continue;
            }
            for _ in 0..200 {
                world.step();
            }
            world.media.clear_faults();
            world.settle_guests();
            run_all(world.store());
            let phase = world.store().job(job).unwrap().phase;
            let row = world.durable.state().jobs.get(&job).cloned();
            let state = world.durable.state();
            let in_place = row.as_ref().is_some_and(|row| {
                row.way == Way::InPlace && state.layers[&row.target].parent != Some(row.source)
            });
            if row.is_some() && !in_place {
                assert!(
                    matches!(phase, Phase::Failed | Phase::Cancelled),
                    "{what}: {phase:?}"
                );
                stopped[usize::from(by_error)] += 1;
                assert_sums(&world, &what);
                if phase == Phase::Failed {
                    // Also after a restart.
                    world.restart();
                    run_all(world.store());
                    assert_sums(&world, &what);
                    world.attach("v");
                }
                world.store().resume_job(job).unwrap();
                for _ in 0..20_000 {
                    if !world.step() {
                        break;
                    }
                }
                world.settle_guests();
                run_all(world.store());
                assert_eq!(world.store().job(job).unwrap().phase, Phase::Done, "{what}");
                assert_sums(&world, &what);
            }
            world.media.clear_observer();
            let seen = watched.lock().unwrap();
            assert!(
                seen.violations.is_empty(),
                "{what}: {}",
                seen.violations.join("\n")
            );
            drop(seen);
            world.check();
        }
    }
    println!("{stopped:?} stopped, by hand and by errors");
    assert!(stopped.iter().all(|stopped| *stopped > 5), "{stopped:?}");
}
