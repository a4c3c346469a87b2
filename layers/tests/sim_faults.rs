//! The simulated medium keeps to its own fault model: what was synced is there, what was not may be, and every allowed
//! outcome does occur.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use stratablk_layers::file::sim::{
    CrashPoint, Event, Fault, FaultEffect, FaultPoint, SimMedia, Survival,
};
use stratablk_layers::file::{Engine, File, IoOp, Media, OpenMode, Segment};

const SECTOR: usize = 512;

fn create(media: &SimMedia, path: &str) -> Arc<dyn File> {
    media
        .open(Path::new(path), OpenMode::CreateNew, false)
        .unwrap()
}

/// A file with a durable name and `sectors` durable sectors of ones.
fn durable(media: &SimMedia, path: &str, sectors: usize) -> Arc<dyn File> {
    media
        .install(Path::new(path), &vec![1; sectors * SECTOR])
        .unwrap();
    media
        .open(Path::new(path), OpenMode::ReadWrite, false)
        .unwrap()
}

/// The whole content, or `None` if there is no such file.
fn content(media: &SimMedia, path: &str) -> Option<Vec<u8>> {
    let file = media
        .open(Path::new(path), OpenMode::ReadOnly, false)
        .ok()?;
    let mut bytes = vec![0; usize::try_from(file.len().unwrap()).unwrap()];
    file.read_at(&mut bytes, 0).unwrap();
    Some(bytes)
}

/// One byte for each sector; fails on a mixed one.
fn sectors(bytes: &[u8]) -> Vec<u8> {
    let whole = |sector: &[u8]| {
        assert!(
            sector.iter().all(|byte| *byte == sector[0]),
            "a torn sector"
        );
        sector[0]
    };
    bytes.chunks(SECTOR).map(whole).collect()
}

fn fault(point: FaultPoint, name: &str, after: u64, times: u64, effect: FaultEffect) -> Fault {
    Fault {
        point,
        name: Some(name.to_owned()),
        after,
        times,
        effect,
    }
}

#[test]
fn synced_sectors_survive_and_others_are_old_or_new() {
    let media = SimMedia::new(1);
    let file = durable(&media, "data", 4);
    file.write_at(&[2; SECTOR], 0).unwrap();
    file.sync_data().unwrap();
    file.write_at(&[3; 2 * SECTOR], SECTOR as u64).unwrap();
    file.write_at(&[4; SECTOR], 2 * SECTOR as u64).unwrap();
    let mut seen = BTreeSet::new();
    for seed in 0..500 {
        let found = sectors(&content(&media.crash_image(seed), "data").unwrap());
        assert_eq!((found[0], found[3]), (2, 1));
        seen.insert((found[1], found[2]));
    }
    let all = BTreeSet::from([(1, 1), (1, 3), (1, 4), (3, 1), (3, 3), (3, 4)]);
    assert_eq!(seen, all);
    let only = |survival| sectors(&content(&media.crash_image_with(survival), "data").unwrap());
    assert_eq!(only(Survival::Nothing), [2, 1, 1, 1]);
    assert_eq!(only(Survival::Everything), [2, 3, 4, 1]);
    assert_eq!(
        sectors(&content(&media, "data").unwrap()),
        [2, 3, 4, 1],
        "an image changed the original"
    );
}

#[test]
fn growth_and_punches_need_a_sync() {
    let media = SimMedia::new(2);
    let file = durable(&media, "data", 2);
    file.write_at(&[5; SECTOR], 3 * SECTOR as u64).unwrap();
    file.punch(0, SECTOR as u64).unwrap();
    let mut seen = BTreeSet::new();
    for seed in 0..500 {
        seen.insert(sectors(&content(&media.crash_image(seed), "data").unwrap()));
    }
    for first in [0, 1] {
        assert!(seen.remove(&vec![first, 1]));
        assert!(seen.remove(&vec![first, 1, 0, 0]), "grown without its data");
        assert!(seen.remove(&vec![first, 1, 0, 5]));
    }
    assert!(seen.is_empty(), "{seen:?}");
    file.set_len(SECTOR as u64 / 2).unwrap();
    file.set_len(SECTOR as u64).unwrap();
    file.sync_data().unwrap();
    assert_eq!(content(&media.crash_image(0), "data").unwrap(), [0; SECTOR]);
}

#[test]
fn names_need_a_sync_of_their_directory() {
    let media = SimMedia::new(3);
    media.create_dir(Path::new("layers")).unwrap();
    media.sync_dir(Path::new("")).unwrap();
    let file = create(&media, "layers/a");
    file.write_at(&[7; SECTOR], 0).unwrap();
    file.sync_data().unwrap();
    create(&media, "layers/b").sync_data().unwrap();
    let mut seen = BTreeSet::new();
    for seed in 0..200 {
        let image = media.crash_image(seed);
        seen.insert(image.list(Path::new("layers")).unwrap());
        if let Some(bytes) = content(&image, "layers/a") {
            assert_eq!(bytes, [7; SECTOR]);
        }
    }
    let list = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(
        seen,
        BTreeSet::from([list(&[]), list(&["a"]), list(&["a", "b"])]),
        "not a prefix"
    );
    // The sync of another directory is no help.
    media.sync_dir(Path::new("")).unwrap();
    let nothing = media.crash_image_with(Survival::Nothing);
    assert!(nothing.list(Path::new("layers")).unwrap().is_empty());
    media.sync_dir(Path::new("layers")).unwrap();
    let nothing = media.crash_image_with(Survival::Nothing);
    assert_eq!(nothing.list(Path::new("layers")).unwrap(), ["a", "b"]);
    // A removal too.
    media.remove_dir_all(Path::new("layers")).unwrap();
    assert!(
        media
            .crash_image_with(Survival::Nothing)
            .stat(Path::new("layers/a"))
            .is_ok()
    );
    media.sync_dir(Path::new("")).unwrap();
    assert!(
        media
            .crash_image_with(Survival::Nothing)
            .stat(Path::new("layers"))
            .is_err()
    );
}

#[test]
fn a_rename_is_atomic() {
    let media = SimMedia::new(4);
    media.create_dir(Path::new("other")).unwrap();
    media.sync_dir(Path::new("")).unwrap();
    durable(&media, "map", 1);
    let new = create(&media, "map.new");
    new.write_at(&[2; SECTOR], 0).unwrap();
    new.sync_data().unwrap();
    media
        .rename(Path::new("map.new"), Path::new("map"))
        .unwrap();
    let mut seen = BTreeSet::new();
    for seed in 0..200 {
        let image = media.crash_image(seed);
        let map = sectors(&content(&image, "map").unwrap())[0];
        seen.insert((map, content(&image, "map.new").is_some()));
    }
    assert_eq!(seen, BTreeSet::from([(1, false), (1, true), (2, false)]));
    media.sync_dir(Path::new("")).unwrap();
    // From one directory to another: in both or in neither.
    media
        .rename(Path::new("map"), Path::new("other/map"))
        .unwrap();
    let mut seen = BTreeSet::new();
    for seed in 0..200 {
        let image = media.crash_image(seed);
        seen.insert((
            content(&image, "map").is_some(),
            content(&image, "other/map").is_some(),
        ));
    }
    assert_eq!(seen, BTreeSet::from([(true, false), (false, true)]));
    media.sync_dir(Path::new("other")).unwrap();
    let nothing = media.crash_image_with(Survival::Nothing);
    assert!(content(&nothing, "map").is_none() && content(&nothing, "other/map").is_some());
}

/// Submits a write of whole sectors whose memory is never freed.
#[test]
fn a_second_name_survives_with_its_directory_and_leads_to_the_same_file() {
    let path = Path::new;
    let media = SimMedia::new(4);
    let file = durable(&media, "a/data", 1);
    media.install(path("b/data"), &[9; SECTOR]).unwrap();
    file.write_at(&[2; SECTOR], 0).unwrap();
    // As at the end of a merge: the second name takes the place of another file's.
    media.link(path("a/data"), path("b/data.new")).unwrap();
    media.rename(path("b/data.new"), path("b/data")).unwrap();
    let of = |image: &SimMedia, name: &str| content(image, name).map(|bytes| bytes[0]);
    let mut seen = BTreeSet::new();
    for seed in 0..500 {
        let image = media.crash_image(seed);
        let found = ["a/data", "b/data.new", "b/data"].map(|name| of(&image, name));
        seen.insert(found);
    }
    let mut all = BTreeSet::new();
    for kept in [Some(1), Some(2)] {
        all.insert([kept, None, Some(9)]);
        all.insert([kept, kept, Some(9)]);
        all.insert([kept, None, kept]);
    }
    assert_eq!(seen, all, "prefixes, and one content whatever the name");
    media.sync_dir(path("b")).unwrap();
    // The first name goes; the second keeps the file.
    media.remove(path("a/data")).unwrap();
    media.sync_dir(path("a")).unwrap();
    file.sync_data().unwrap();
    for seed in 0..20 {
        let image = media.crash_image(seed);
        assert_eq!(
            (of(&image, "a/data"), of(&image, "b/data")),
            (None, Some(2))
        );
    }
    media.inject(fault(
        FaultPoint::Create,
        "again",
        0,
        1,
        FaultEffect::NoSpace,
    ));
    let full = media.link(path("b/data"), path("a/again")).unwrap_err();
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    media.link(path("b/data"), path("a/again")).unwrap();
}

#[test]
fn a_copy_is_as_durable_and_as_fragile_as_a_write() {
    let media = SimMedia::new(5);
    let (from, to) = (durable(&media, "from", 8), durable(&media, "to", 4));
    from.write_at(&[3; 8 * SECTOR], 0).unwrap();
    let (some, all) = (SECTOR as u64, 8 * SECTOR as u64);
    media.copy(&from, &to, 2 * some, 3 * some).unwrap();
    let mut seen = BTreeSet::new();
    for seed in 0..300 {
        let found = sectors(&content(&media.crash_image(seed), "to").unwrap());
        assert_eq!(found[..2], [1, 1]);
        seen.insert((found[2], found.get(4).copied()));
    }
    assert!(seen.contains(&(1, None)) && seen.contains(&(3, Some(3))));
    assert!(seen.contains(&(1, Some(3))) && seen.contains(&(3, None)));
    to.sync_data().unwrap();
    let durable = content(&media.crash_image(1), "to").unwrap();
    assert_eq!(sectors(&durable), [1, 1, 3, 3, 3]);
    media.inject(fault(FaultPoint::Read, "from", 0, 1, FaultEffect::Error));
    media.copy(&from, &to, 0, all).unwrap_err();
    assert_eq!(sectors(&content(&media, "to").unwrap()), [1, 1, 3, 3, 3]);
    media.inject(fault(FaultPoint::Write, "to", 0, 1, FaultEffect::NoSpace));
    let full = media.copy(&from, &to, 0, all).unwrap_err();
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    media.copy(&from, &to, 0, all).unwrap();
    assert_eq!(sectors(&content(&media, "to").unwrap()), [3; 8]);
}

fn submit_write(engine: &mut dyn Engine, file: &dyn File, sector: u64, byte: u8, count: usize) {
    let memory = vec![byte; count * SECTOR].leak();
    let segments = [Segment {
        base: memory.as_mut_ptr(),
        len: memory.len(),
    }];
    let op = IoOp::Write {
        file: file.token(),
        offset: sector * 512,
        segments: &segments,
    };
    // SAFETY: the memory is leaked and used by nobody else; the file stays open.
    #[expect(unsafe_code, reason = "the engine's contract")]
    unsafe {
        engine.submit(op, u64::from(byte));
    }
}

fn submit_sync(engine: &mut dyn Engine, file: &dyn File) {
    // SAFETY: the file stays open.
    #[expect(unsafe_code, reason = "the engine's contract")]
    unsafe {
        engine.submit(IoOp::SyncData { file: file.token() }, 0);
    }
}

fn drain(engine: &mut dyn Engine) -> Vec<u64> {
    let mut done = Vec::new();
    while engine.under_way() > 0 {
        engine.wait().unwrap();
        engine.reap(&mut done).unwrap();
    }
    done.into_iter()
        .map(|done| {
            done.result.unwrap();
            done.user
        })
        .collect()
}

#[test]
fn operations_under_way_may_be_partly_there() {
    let media = SimMedia::new(5);
    let file = durable(&media, "data", 2);
    let mut engine = media.engine(8).unwrap();
    submit_write(engine.as_mut(), file.as_ref(), 0, 9, 2);
    let found = |seed| sectors(&content(&media.crash_image(seed), "data").unwrap());
    assert!(
        (0..50).all(|seed| found(seed) == [1, 1]),
        "there before the kick"
    );
    engine.kick().unwrap();
    let seen: BTreeSet<Vec<u8>> = (0..200).map(found).collect();
    assert_eq!(seen.len(), 4, "{seen:?}");
    let everything = media.crash_image_with(Survival::Everything);
    assert_eq!(sectors(&content(&everything, "data").unwrap()), [9, 9]);
    drain(engine.as_mut());
}

#[test]
fn a_killed_process_loses_nothing_but_what_was_under_way() {
    let media = SimMedia::new(5);
    let file = durable(&media, "data", 4);
    file.write_at(&[2; SECTOR], 0).unwrap();
    let new = create(&media, "new");
    new.write_at(&[3; SECTOR], 0).unwrap();
    let mut engine = media.engine(8).unwrap();
    submit_write(engine.as_mut(), file.as_ref(), 2, 9, 2);
    engine.kick().unwrap();
    let mut seen = BTreeSet::new();
    for seed in 0..200 {
        let image = media.kill_image(seed);
        let found = sectors(&content(&image, "data").unwrap());
        assert_eq!(found[..2], [2, 1]);
        seen.insert(found[2..].to_vec());
        assert_eq!(content(&image, "new"), content(&media, "new"));
        // Unsynced is unsynced.
        let cut = image.crash_image_with(Survival::Nothing);
        assert_eq!(sectors(&content(&cut, "data").unwrap()), [1; 4]);
        assert_eq!(content(&cut, "new"), None);
    }
    assert_eq!(seen.len(), 4, "{seen:?}");
    drain(engine.as_mut());
}

#[test]
fn a_sync_covers_what_completed_before_it_began() {
    let mut orders = BTreeSet::new();
    for seed in 0..50 {
        let media = SimMedia::new(seed);
        let file = durable(&media, "data", 3);
        let mut engine = media.engine(8).unwrap();
        submit_write(engine.as_mut(), file.as_ref(), 0, 2, 1);
        engine.kick().unwrap();
        drain(engine.as_mut());
        submit_sync(engine.as_mut(), file.as_ref());
        submit_write(engine.as_mut(), file.as_ref(), 1, 3, 1);
        submit_write(engine.as_mut(), file.as_ref(), 2, 4, 1);
        engine.kick().unwrap();
        orders.insert(drain(engine.as_mut()));
        let nothing = media.crash_image_with(Survival::Nothing);
        assert_eq!(sectors(&content(&nothing, "data").unwrap()), [2, 1, 1]);
        file.sync_data().unwrap();
        let nothing = media.crash_image_with(Survival::Nothing);
        assert_eq!(sectors(&content(&nothing, "data").unwrap()), [2, 3, 4]);
    }
    assert_eq!(orders.len(), 6, "completions keep an order");
}

#[test]
fn the_planned_operation_fails() {
    let media = SimMedia::new(6);
    let file = durable(&media, "data", 8);
    let other = durable(&media, "map", 8);
    media.inject(fault(FaultPoint::Write, "data", 1, 2, FaultEffect::NoSpace));
    media.inject(fault(FaultPoint::Read, "map", 0, 1, FaultEffect::Error));
    file.write_at(&[2; SECTOR], 0).unwrap();
    other.write_at(&[2; SECTOR], 0).unwrap();
    for _ in 0..2 {
        let error = file.write_at(&[3; 8 * SECTOR], 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    }
    let found = sectors(&content(&media, "data").unwrap());
    let written = found.iter().take_while(|byte| **byte == 3).count();
    assert!(
        written < 8 && found[written.max(1)..].iter().all(|byte| *byte == 1),
        "{found:?}"
    );
    file.write_at(&[4; SECTOR], 0).unwrap();
    assert_eq!(
        other.read_at(&mut [0; 8], 0).unwrap_err().raw_os_error(),
        Some(libc::EIO)
    );
    other.read_at(&mut [0; 8], 0).unwrap();
    assert_eq!(media.faults_hit(), 3);
    media.inject(fault(
        FaultPoint::SyncData,
        "data",
        0,
        u64::MAX,
        FaultEffect::Error,
    ));
    file.sync_data().unwrap_err();
    file.sync_data().unwrap_err();
    media.clear_faults();
    file.sync_data().unwrap();
    let nothing = media.crash_image_with(Survival::Nothing);
    assert_eq!(content(&nothing, "data"), content(&media, "data"));
}

#[test]
fn a_failed_sync_may_lose_pages_for_good() {
    let mut lost = 0;
    let mut reverted = 0;
    for seed in 0..100 {
        let media = SimMedia::new(seed);
        let file = durable(&media, "data", 8);
        media.inject(fault(
            FaultPoint::SyncData,
            "data",
            0,
            1,
            FaultEffect::LostPages,
        ));
        file.write_at(&[2; 8 * SECTOR], 0).unwrap();
        file.sync_data().unwrap_err();
        file.sync_data().unwrap();
        let nothing = media.crash_image_with(Survival::Nothing);
        let found = sectors(&content(&nothing, "data").unwrap());
        lost += usize::from(found.contains(&1));
        reverted += usize::from(sectors(&content(&media, "data").unwrap()).contains(&1));
        // Writing anew helps.
        file.write_at(&[3; 8 * SECTOR], 0).unwrap();
        file.sync_data().unwrap();
        let nothing = media.crash_image_with(Survival::Nothing);
        assert_eq!(sectors(&content(&nothing, "data").unwrap()), [3; 8]);
    }
    assert!(
        lost > 30 && reverted > 20,
        "lost {lost}, reverted {reverted}"
    );
}

/// A workload with a rule: a record in `map` says how many sectors of `data` are there.
fn workload(media: &SimMedia) {
    let data = durable(media, "data", 0);
    let map = durable(media, "map", 1);
    for count in 1..=5u8 {
        data.write_at(&[count; SECTOR], u64::from(count - 1) * 512)
            .unwrap();
        data.sync_data().unwrap();
        map.write_at(&[count; SECTOR], 0).unwrap();
        map.sync_data().unwrap();
    }
}

/// Whether a crash at any point of the workload breaks its rule, and the points.
fn crash_everywhere(media: &SimMedia) -> (bool, Vec<CrashPoint>) {
    let log = Arc::new(Mutex::new((false, Vec::new())));
    let seen = Arc::clone(&log);
    media.set_observer(Box::new(move |media, point| {
        let mut seen = seen.lock().unwrap();
        for seed in 0..40 {
            let image = media.crash_image(point.number * 100 + seed);
            let Some(map) = content(&image, "map") else {
                continue;
            };
            let count = usize::from(sectors(&map)[0]);
            let data = sectors(&content(&image, "data").unwrap());
            // The map begins with a 1 that promises nothing.
            let promised = if count > 1 { count } else { 0 };
            seen.0 |=
                (0..promised).any(|at| data.get(at).copied().map(usize::from) != Some(at + 1));
        }
        seen.1.push(point.clone());
    }));
    workload(media);
    media.clear_observer();
    let seen = log.lock().unwrap();
    (seen.0, seen.1.clone())
}

#[test]
fn crashes_at_every_point_see_a_missing_sync() {
    let media = SimMedia::new(8);
    let (broken, points) = crash_everywhere(&media);
    assert!(!broken);
    let of = |event| points.iter().filter(|point| point.event == event).count();
    assert_eq!(
        (
            of(Event::Written),
            of(Event::SyncBegun),
            of(Event::SyncEnded)
        ),
        (10, 10, 10)
    );
    assert_eq!(points.len() as u64, media.crash_points());
    assert!(
        points
            .iter()
            .zip(1..)
            .all(|(point, number)| point.number == number)
    );
    assert_eq!(&*points[0].path, "data");
    // The same run once more is the same.
    assert_eq!(crash_everywhere(&SimMedia::new(8)).1, points);
    // One sync that lies is enough to ring the alarm; one of the map is not, since the order is kept.
    for (name, alarm) in [("data", true), ("map", false)] {
        for after in 1..5 {
            let media = SimMedia::new(8);
            media.inject(fault(
                FaultPoint::SyncData,
                name,
                after,
                1,
                FaultEffect::ClaimSuccess,
            ));
            assert_eq!(crash_everywhere(&media).0, alarm, "sync {after} of {name}");
            assert_eq!(media.faults_hit(), 1);
        }
    }
}

#[test]
fn marks_are_crash_points() {
    let media = SimMedia::new(9);
    let log = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&log);
    media.set_observer(Box::new(move |media, point| {
        seen.lock().unwrap().push(point.event);
        // Not observed, and no deadlock.
        media.mark("inner");
    }));
    media.mark("catalog commit");
    media.create_dir(Path::new("x")).unwrap();
    assert_eq!(
        *log.lock().unwrap(),
        [Event::Marked("catalog commit"), Event::Created]
    );
    assert_eq!(media.crash_points(), 4);
}

#[test]
fn rot_changes_bytes_behind_everybodys_back() {
    let media = SimMedia::new(10);
    durable(&media, "map", 2);
    let before = media.stat(Path::new("map")).unwrap();
    media.rot(Path::new("map"), 700, &[0xff]).unwrap();
    assert_eq!(media.stat(Path::new("map")).unwrap(), before);
    let nothing = content(&media.crash_image_with(Survival::Nothing), "map").unwrap();
    assert_eq!((nothing[699], nothing[700], nothing[701]), (1, 0xff, 1));
}

#[test]
fn images_are_cheap() {
    let media = SimMedia::new(11);
    for layer in 0..8 {
        let data = durable(&media, &format!("layers/{layer}/data"), 400);
        let map = durable(&media, &format!("layers/{layer}/map"), 20);
        if layer == 7 {
            for sector in 0..60 {
                data.write_at(&[2; SECTOR], sector * 3 * 512).unwrap();
            }
            map.write_at(&[3; 4 * SECTOR], 0).unwrap();
        }
    }
    let start = Instant::now();
    let images = 10_000;
    for seed in 0..images {
        std::hint::black_box(media.crash_image(seed));
    }
    let each = start.elapsed() / u32::try_from(images).unwrap();
    println!("an image takes {each:?}");
    // A million of them in minutes; ten times slower than measured is still no reason to fail on a busy machine.
    assert!(each.as_micros() < 1000, "an image takes {each:?}");
}
