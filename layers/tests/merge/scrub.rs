//! Checksums of sealed layers: they are taken, they are right after every crash, and damage of every kind is found, told apart
//! and never served.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use stratablk_layers::catalog::{JobId, JobKind, LayerState, Way};
use stratablk_layers::check::{CheckOptions, Severity, check_against};
use stratablk_layers::file::{Media, OpenMode};
use stratablk_layers::lifecycle::{DeleteOptions, JobInfo, Phase, ScrubReport};
use stratablk_layers::mapfile::{MapFile, data_path, map_path};
use stratablk_layers::store::Store;
use stratablk_layers::units::{
    CLUSTER_BYTES, CLUSTER_SECTORS, Cluster, LayerId, SECTOR_BYTES, Sector, SectorMask,
};
use stratablk_layers::volume::Operation;

use crate::disk::Queue;
use crate::world::{SECTORS, World};
use crate::{WAYS, clone_of, crash, tree};

/// A file of a layer.
pub fn file_of(layer: LayerId, name: &str) -> PathBuf {
    data_path(layer).with_file_name(name)
}

/// Carries out everything that is to be done.
pub fn run_all(store: &Store) {
    for _ in 0..50_000 {
        if !store.job_step() {
            return;
        }
    }
    panic!("jobs hang: {:?}", store.jobs());
}

/// Scrubs, and returns how that ended.
pub fn scrub(world: &World) -> JobInfo {
    let job = world.store().scrub(None, None).unwrap();
    assert_eq!(job.kind, JobKind::Scrub);
    run_all(world.store());
    world.store().job(job.id).unwrap()
}

/// What a scrub found.
pub fn report(job: &JobInfo) -> &ScrubReport {
    job.scrub.as_ref().unwrap()
}

/// Scrubs a store in which all is well.
#[track_caller]
pub fn scrub_clean(world: &World) -> JobInfo {
    let job = scrub(world);
    assert_eq!(
        job.phase,
        Phase::Done,
        "{job:?}; {:?}",
        world.store().notes()
    );
    job
}

/// The sealed layers that have data of their own.
pub fn sealed(world: &World) -> Vec<LayerId> {
    let state = world.durable.state();
    let rows = state.layers.values();
    rows.filter(|row| row.state == LayerState::Sealed && row.base.is_none())
        .map(|row| row.id)
        .collect()
}

/// The media, as the store knows them.
pub fn files(world: &World) -> Arc<dyn Media> {
    Arc::new(world.media.clone())
}

/// The clusters that a layer has data of, with which sectors.
pub fn held(world: &World, layer: LayerId) -> Vec<(Cluster, SectorMask)> {
    let set = MapFile::read(&files(world), layer).unwrap().set;
    (0..SECTORS.div_ceil(CLUSTER_SECTORS))
        .map(Cluster)
        .map(|cluster| (cluster, set.cluster(cluster).0))
        .filter(|(_, mask)| *mask != SectorMask::NONE)
        .collect()
}

/// Flips a bit of a file, on the medium.
pub fn flip(world: &World, path: &Path, offset: u64) {
    let file = world.media.open(path, OpenMode::ReadOnly, false).unwrap();
    let mut byte = [0];
    file.read_at(&mut byte, offset).unwrap();
    world.media.rot(path, offset, &[byte[0] ^ 4]).unwrap();
}

/// All bytes of a file.
pub fn bytes_of(world: &World, path: &Path) -> Vec<u8> {
    let file = world.media.open(path, OpenMode::ReadOnly, false).unwrap();
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Replaces a file.
pub fn put(world: &World, path: &Path, bytes: &[u8]) {
    let _ = world.media.remove(path);
    let file = world.media.open(path, OpenMode::CreateNew, false).unwrap();
    file.write_at(bytes, 0).unwrap();
}

/// Whether a volume reads this cluster of this layer.
pub fn reads(world: &World, volume: &str, layer: LayerId, cluster: Cluster) -> bool {
    let state = world.durable.state();
    let chain = state.chain(state.volumes[volume].active);
    (0..8).any(|sector| {
        let one = SectorMask::span(sector, 1);
        let on_disk = cluster.first_sector().0 + u64::from(sector) < SECTORS;
        let owner = chain.iter().find_map(|row| {
            let contents = MapFile::read(&files(world), row.id).unwrap();
            let (data, zero) = contents.set.cluster(cluster);
            SectorMask(data.0 | zero.0)
                .contains(one)
                .then_some((row.id, data.contains(one)))
        });
        on_disk && owner == Some((layer, true))
    })
}

/// Reads a volume cluster by cluster. Returns the clusters that fail.
pub fn failing(world: &World, volume: &str) -> Vec<Cluster> {
    let volume = world.store().open_volume(volume).unwrap();
    let mut queue = Queue::new(volume.context(true).unwrap());
    let clusters = 0..SECTORS.div_ceil(CLUSTER_SECTORS);
    clusters
        .map(Cluster)
        .filter(|cluster| {
            let first = cluster.first_sector();
            let count = CLUSTER_SECTORS.min(SECTORS - first.0);
            let memory = vec![0; (count * SECTOR_BYTES) as usize];
            queue.run(Operation::Read(first), memory).0.is_err()
        })
        .collect()
}

/// What the check of the files alone says about checksums. `None`: nothing bad.
pub fn look_at_sums(
    state: &stratablk_layers::catalog::CatalogState,
    media: &Arc<dyn Media>,
    all: bool,
) -> Option<String> {
    let options = CheckOptions {
        scrub: true,
        ..CheckOptions::default()
    };
    let report = check_against(state, media, options).unwrap();
    let bad = |what: &str| {
        what.contains("of its data are not what")
            || what.contains("checksums are damaged")
            || what.contains("were looked at")
            || all && what.contains("cannot be verified")
    };
    let mut findings = report.findings.into_iter();
    findings
        .find(|finding| bad(&finding.what))
        .map(|finding| format!("{finding:?}"))
}

#[test]
fn checksums_are_taken_after_sealing_and_again_after_merging() {
    for seed in 0..40 {
        let mut world = tree(seed);
        assert!(sealed(&world).iter().all(|layer| {
            !world
                .media
                .list(data_path(*layer).parent().unwrap())
                .unwrap()
                .contains(&"sums".to_owned())
        }));
        world.run_jobs_alone();
        assert_eq!(world.store().layers_without_sums(), 0);
        assert_eq!(
            look_at_sums(&world.durable.state(), &files(&world), true),
            None
        );
        let job = scrub_clean(&world);
        let layers = sealed(&world);
        assert_eq!(
            (report(&job).layers, report(&job).taken),
            (layers.len() as u64, 0)
        );
        let sectors: u64 = layers
            .iter()
            .map(|layer| {
                let set = MapFile::read(&files(&world), *layer).unwrap().set;
                set.data_sectors()
            })
            .sum();
        assert_eq!(
            (report(&job).bytes, job.bytes_done),
            (sectors * SECTOR_BYTES, sectors * SECTOR_BYTES)
        );
        let (snapshot, way) = WAYS[(seed % 5) as usize];
        world.attach("v");
        world.delete("v", snapshot, Some(way));
        world.run_jobs();
        world.check();
        world.run_jobs();
        assert_eq!(
            look_at_sums(&world.durable.state(), &files(&world), true),
            None
        );
        let job = scrub_clean(&world);
        assert_eq!(report(&job).taken, 0, "{job:?}");
        world.detach("v");
        world.restart();
        assert_eq!(report(&scrub_clean(&world)).taken, 0);
        world.check();
    }
}

#[test]
fn a_flipped_bit_of_the_data_is_found_and_never_served() {
    let mut seen = 0;
    for seed in 0..12 {
        let mut world = tree(seed);
        world.run_jobs_alone();
        world.restart();
        for layer in sealed(&world) {
            let clusters = held(&world, layer);
            for (at, (cluster, mask)) in clusters.iter().enumerate() {
                // The first and last of each run, and some between.
                let edge = at == 0
                    || at + 1 == clusters.len()
                    || clusters[at + 1].0.0 != cluster.0 + 1
                    || clusters[at - 1].0.0 + 1 != cluster.0;
                if !edge && !world.random.chance(20) {
                    continue;
                }
                // Nothing of it is in the cache.
                world.restart();
                let sectors: Vec<u64> = (0..8).filter(|n| mask.0 >> n & 1 == 1).collect();
                let sector = sectors[world.random.index(sectors.len())];
                let offset =
                    cluster.0 * CLUSTER_BYTES + sector * SECTOR_BYTES + world.random.below(512);
                flip(&world, &data_path(layer), offset);
                let checked = look_at_sums(&world.durable.state(), &files(&world), false);
                assert!(checked.is_some_and(|what| what.contains(&layer.to_string())));
                let job = scrub(&world);
                assert_eq!(job.phase, Phase::Failed, "{layer} {cluster:?}");
                let found = &report(&job).bad;
                assert_eq!(found.len(), 1);
                assert_eq!(found[0].layer, layer);
                assert_eq!(found[0].bytes, sectors.len() as u64 * SECTOR_BYTES);
                assert!(found[0].volumes.contains(&"v".to_owned()));
                let first = Sector(cluster.first_sector().0 + sectors[0]);
                assert_eq!(found[0].ranges[0].start, first);
                let expected: Vec<Cluster> = reads(&world, "v", layer, *cluster)
                    .then_some(*cluster)
                    .into_iter()
                    .collect();
                assert_eq!(failing(&world, "v"), expected);
                seen += expected.len();
                assert!(world.store().volume_info("v").unwrap().bad_bytes > 0);
                // A restart does not forget it.
                world.restart();
                assert_eq!(failing(&world, "v"), expected);
                // Nor do other volumes see anything of it.
                world
                    .store()
                    .create_volume(
                        "other",
                        &stratablk_layers::store::VolumeSource::Size(SECTORS * SECTOR_BYTES),
                    )
                    .unwrap();
                assert_eq!(failing(&world, "other"), []);
                world.store().delete_volume("other").unwrap();
                flip(&world, &data_path(layer), offset);
                scrub_clean_or(&world, layer);
            }
        }
        world.check();
    }
    assert!(seen > 100, "{seen}");
}

/// The layer's data was put right, with the same bit: it is clean again, and served.
fn scrub_clean_or(world: &World, layer: LayerId) {
    scrub_clean(world);
    assert_eq!(failing(world, "v"), []);
    assert_eq!(world.store().bad_layers(), []);
    let bad = file_of(layer, "bad");
    assert!(world.media.stat(&bad).is_err(), "{bad:?}");
}

#[test]
fn what_is_good_in_the_cache_mends_the_medium() {
    // A cache that fits all.
    for seed in [3, 7, 11] {
        let mut world = tree(seed);
        world.run_jobs_alone();
        world.restart();
        world.check();
        let layer = *sealed(&world)
            .iter()
            .max_by_key(|layer| held(&world, **layer).len())
            .unwrap();
        let seen: Vec<Cluster> = held(&world, layer)
            .into_iter()
            .filter(|(cluster, mask)| {
                *mask == SectorMask::ALL && reads(&world, "v", layer, *cluster)
            })
            .map(|(cluster, _)| cluster)
            .collect();
        for cluster in &seen {
            flip(&world, &data_path(layer), cluster.0 * CLUSTER_BYTES + 1000);
        }
        let job = scrub_clean(&world);
        assert_eq!(report(&job).mended, seen.len() as u64);
        assert_eq!(report(&scrub_clean(&world)).mended, 0);
        world.restart();
        world.check();
    }
}

#[test]
fn damaged_checksums_are_told_from_damaged_data() {
    for seed in 0..6 {
        let mut world = tree(seed);
        world.run_jobs_alone();
        let layers: Vec<LayerId> = sealed(&world)
            .into_iter()
            .filter(|layer| !held(&world, *layer).is_empty())
            .collect();
        let layer = layers[0];
        let path = file_of(layer, "sums");
        let good = bytes_of(&world, &path);
        // Every field of the header, the checksum of the block, checksums in use, and some at its end that stand for nothing.
        let places = [
            0, 8, 12, 16, 33, 50, 64, 72, 80, 88, 96, 4000, 4096, 4100, 4104, 8191,
        ];
        for place in places {
            flip(&world, &path, place);
            let checked = look_at_sums(&world.durable.state(), &files(&world), true).unwrap();
            assert!(checked.contains("checksums"), "{checked}");
            let job = scrub(&world);
            assert_eq!(job.phase, Phase::Failed, "{place}");
            assert_eq!(report(&job).damaged_sums, [layer], "{place}");
            assert_eq!(report(&job).bad, [], "{place}");
            // They were taken anew.
            assert_eq!(report(&scrub_clean(&world)).taken, 0);
            world.check();
        }
        for cut in [0, 100, 4096, good.len() - 1] {
            put(&world, &path, &good[..cut]);
            let job = scrub(&world);
            assert_eq!(report(&job).damaged_sums, [layer], "cut to {cut}");
            scrub_clean(&world);
        }
        if let Some(other) = layers.get(1) {
            let others = file_of(*other, "sums");
            let (one, two) = (bytes_of(&world, &path), bytes_of(&world, &others));
            put(&world, &path, &two);
            put(&world, &others, &one);
            let job = scrub(&world);
            assert_eq!(report(&job).damaged_sums.len(), 2);
            assert_eq!(report(&job).bad, []);
            scrub_clean(&world);
            // Only the blocks.
            let mut mixed = bytes_of(&world, &path);
            let theirs = bytes_of(&world, &others);
            mixed.truncate(4096);
            mixed.extend(&theirs[4096..]);
            put(&world, &path, &mixed);
            let job = scrub(&world);
            assert_eq!(report(&job).damaged_sums, [layer]);
            assert_eq!(report(&job).bad, []);
        }
        world.media.remove(&path).unwrap();
        let job = scrub_clean(&world);
        assert_eq!(report(&job).taken, 1, "that of an older version");
        // Of an earlier map: taken anew, and not believed.
        let old = bytes_of(&world, &path);
        world.restart();
        world.delete("v", "a", Some(Way::Up));
        world.run_jobs();
        if world.media.stat(&map_path(layer)).is_ok() {
            put(&world, &path, &old);
            scrub_clean(&world);
        }
        world.check();
    }
}

#[test]
fn a_damaged_layer_is_not_merged_before_it_is_put_right() {
    for seed in 0..10 {
        for (snapshot, way) in WAYS {
            let mut world = tree(seed);
            world.run_jobs_alone();
            world.restart();
            let state = world.durable.state().clone();
            let layer = state.snapshot("v", snapshot).unwrap().layer;
            let Some((cluster, mask)) = held(&world, layer).pop() else {
                continue;
            };
            let offset =
                cluster.0 * CLUSTER_BYTES + u64::from(mask.0.trailing_zeros()) * SECTOR_BYTES;
            flip(&world, &data_path(layer), offset);
            assert_eq!(scrub(&world).phase, Phase::Failed);
            let jobs = world.delete("v", snapshot, Some(way));
            run_all(world.store());
            let job = world.store().job(jobs[0]).unwrap();
            assert_eq!(job.phase, Phase::Failed);
            assert!(job.error.unwrap().contains("scrub"), "says what to do");
            flip(&world, &data_path(layer), offset);
            scrub_clean(&world);
            world.store().resume_job(jobs[0]).unwrap();
            run_all(world.store());
            assert_eq!(world.store().job(jobs[0]).unwrap().phase, Phase::Done);
            world.check();
        }
    }
}

#[test]
fn layers_of_a_copy_that_was_cancelled_get_checksums_too() {
    let mut cancelled = 0;
    for seed in 0..10 {
        for steps in 1..6 {
            let mut world = tree(seed);
            world.create("c", &clone_of("b"));
            world.scribble("c", 4);
            world.snapshot("c", "x");
            run_all(world.store());
            let options = DeleteOptions {
                push_down: true,
                ..DeleteOptions::default()
            };
            let jobs = world.delete_with("v", "b", options);
            for _ in 0..steps {
                world.store().job_step();
            }
            let gone = jobs
                .into_iter()
                .filter(|job| world.store().cancel_job(*job).is_ok())
                .count();
            run_all(world.store());
            // One that is only stopped may go on at any moment.
            if gone == 0 || !world.durable.state().jobs.is_empty() {
                continue;
            }
            cancelled += gone;
            for layer in sealed(&world) {
                let dir = data_path(layer);
                let names = world.media.list(dir.parent().unwrap()).unwrap();
                assert!(
                    names.iter().any(|name| name == "sums"),
                    "{layer}: {names:?}"
                );
            }
            world.check();
        }
    }
    assert!(cancelled > 0);
}

#[test]
fn a_scrub_is_paused_cancelled_and_limited_like_other_jobs() {
    let mut world = tree(1);
    let store = Arc::clone(world.store());
    let first = store.scrub(None, Some(1000)).unwrap();
    let second = store.scrub(Some("v"), None).unwrap();
    assert_eq!(second.id, JobId(first.id.0 + 1));
    assert_eq!((first.rate, first.phase), (Some(1000), Phase::Queued));
    assert_eq!(store.pause_job(first.id).unwrap().phase, Phase::Paused);
    assert_eq!(store.limit_job(first.id, None).unwrap().rate, None);
    run_all(&store);
    assert_eq!(store.job(second.id).unwrap().phase, Phase::Done);
    assert_eq!(store.resume_job(first.id).unwrap().phase, Phase::Queued);
    store.job_step();
    assert_eq!(store.job(first.id).unwrap().phase, Phase::Running);
    assert_eq!(store.cancel_job(first.id).unwrap().phase, Phase::Cancelled);
    run_all(&store);
    assert!(store.cancel_job(first.id).is_err(), "it has ended");
    assert!(store.scrub(Some("nobody"), None).is_err());
    let ids: Vec<JobId> = store.jobs().iter().map(|job| job.id).collect();
    assert_eq!(ids, [first.id, second.id]);
    drop(store);
    // The number is not given out again.
    world.restart();
    let third = world.store().scrub(None, None).unwrap();
    assert_eq!(third.id, JobId(second.id.0 + 1));
}

#[test]
fn checksums_are_right_after_a_crash_at_any_point_of_taking_them() {
    for seed in 0..24 {
        let mut world = tree(seed);
        world.attach("v");
        let seen = crash::watch(&world, seed, 200);
        world.snapshot("v", "d");
        run_all(world.store());
        let _ = scrub_clean(&world);
        world.snapshot("v", "e");
        world.restart();
        run_all(world.store());
        world.media.clear_observer();
        let seen = seen.lock().unwrap();
        assert!(seen.violations.is_empty(), "{}", seen.violations.join("\n"));
        assert!(seen.images > 10);
    }
}

#[test]
fn a_failure_while_checksums_are_taken_harms_nothing() {
    use stratablk_layers::file::sim::{Fault, FaultEffect, FaultPoint};
    for seed in 0..30 {
        let mut world = tree(seed);
        let (point, name) = [
            (FaultPoint::Write, "sums.new"),
            (FaultPoint::SyncData, "sums.new"),
            (FaultPoint::Create, "sums.new"),
            (FaultPoint::Rename, "sums"),
            (FaultPoint::Read, "data"),
        ][(seed % 5) as usize];
        world.media.inject(Fault {
            point,
            name: Some(name.into()),
            after: seed / 5,
            times: 1,
            effect: if seed % 2 == 0 {
                FaultEffect::NoSpace
            } else {
                FaultEffect::Error
            },
        });
        run_all(world.store());
        world.media.clear_faults();
        world.check();
        scrub_clean(&world);
        assert_eq!(
            look_at_sums(&world.durable.state(), &files(&world), true),
            None
        );
    }
}

#[test]
fn the_check_reports_without_changing_anything() {
    let world = tree(5);
    let state = world.durable.state().clone();
    let options = CheckOptions {
        scrub: true,
        ..CheckOptions::default()
    };
    let found = check_against(&state, &files(&world), options).unwrap();
    assert!(found.is_sound());
    assert!(
        found
            .findings
            .iter()
            .all(|finding| finding.severity == Severity::Note)
    );
    assert_eq!(found.scrubbed_layers, 0);
    world.run_jobs_alone();
    let found = check_against(&state, &files(&world), options).unwrap();
    assert_eq!(found.scrubbed_layers, sealed(&world).len());
    assert_eq!(found.findings, []);
}

#[cfg(feature = "canary")]
#[test]
fn canary_a_scrub_that_skips_the_last_cluster_of_a_piece_is_noticed() {
    use stratablk_layers::canary::{Canary, set};
    set(Some(Canary::SkipLastOfPiece));
    let run = std::panic::catch_unwind(a_flipped_bit_of_the_data_is_found_and_never_served);
    set(None);
    assert!(run.is_err(), "a cluster was skipped, and nobody noticed");
}
