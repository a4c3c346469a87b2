//! A chain of ten thousand layers, and ten thousand children of one: commits cost what they do with a hundred.

use std::time::{Duration, Instant};

use super::*;

/// A chain of so many sealed layers, named by snapshots, with the active layer of "vm" on top; and as many volumes over
/// its middle.
fn big(count: u128) -> CatalogState {
    let mut state = new_store();
    let mut all: Vec<Change> = (1..=count)
        .map(|n| {
            let parent = (n > 1).then(|| n - 1);
            Change::AddLayer(layer(n, parent, LayerState::Sealed))
        })
        .collect();
    let top = count + 1;
    all.push(Change::AddLayer(layer(
        top,
        Some(count),
        LayerState::Active,
    )));
    all.push(Change::AddVolume(volume("vm", top)));
    all.extend((1..=count).map(|n| {
        let at = u64::try_from(n).unwrap();
        Change::AddSnapshot(snapshot(&format!("s{n}"), n, at))
    }));
    for n in 1..=count {
        let child = 1_000_000 + n;
        all.push(Change::AddLayer(layer(
            child,
            Some(count / 2),
            LayerState::Active,
        )));
        all.push(Change::AddVolume(volume(&format!("c{n}"), child)));
    }
    drop(state.change(&all).unwrap());
    state
}

/// Commands that come in pairs, so that the state stays what it is: a snapshot and its undoing; a clone and its end; a
/// merge in the middle, with its job.
fn commands(count: u128, n: u128) -> Vec<Vec<Change>> {
    let top = count + 1 + n;
    let middle = count / 2 + 10 + n;
    let clone = 2_000_000 + n;
    let job = JobRow {
        id: JobId(u64::try_from(n + 1).unwrap()),
        kind: JobKind::Merge,
        subject: "vm@s".into(),
        source: id(middle),
        target: id(middle + 1),
        way: Way::Down,
        state: JobState::Queued,
        error: None,
        rate: None,
        created_ns: 1,
    };
    vec![
        take_snapshot(
            &format!("new{n}"),
            top,
            top + 1,
            u64::try_from(count + n).unwrap(),
        ),
        vec![
            Change::AddLayer(layer(clone, Some(count / 2), LayerState::Active)),
            Change::AddVolume(volume("clone", clone)),
        ],
        vec![
            Change::RemoveVolume("clone".into()),
            Change::RemoveLayer(id(clone)),
        ],
        vec![Change::Removed(id(clone))],
        vec![
            Change::RemoveSnapshot {
                volume: "vm".into(),
                name: format!("s{middle}"),
            },
            Change::AddJob(job.clone()),
        ],
        vec![
            Change::SetParent {
                layer: id(middle + 1),
                parent: Some(id(count / 2 + 9)),
            },
            Change::RemoveLayer(id(middle)),
            Change::RemoveJob(job.id),
        ],
    ]
}

/// The longest that one of the commands took, each the best of its time.
fn slowest(catalog: &mut dyn Catalog, count: u128) -> Duration {
    let mut best = vec![Duration::MAX; commands(count, 0).len()];
    for n in 0..30 {
        for (best, changes) in best.iter_mut().zip(commands(count, n)) {
            let began = Instant::now();
            catalog.commit(&changes).unwrap();
            *best = began.elapsed().min(*best);
        }
    }
    best.into_iter().max().unwrap()
}

#[test]
fn a_commit_costs_by_its_changes() {
    let took = |count| {
        let state = big(count);
        let dir = tempfile::tempdir().unwrap();
        let mut sqlite = SqliteCatalog::create(dir.path(), &state).unwrap();
        let mut memory = MemoryCatalog::open(&MemoryDisk::new(state)).unwrap();
        let took =
            [&mut memory as &mut dyn Catalog, &mut sqlite].map(|catalog| slowest(catalog, count));
        assert_eq!(memory.state(), sqlite.state());
        memory.state().verify().unwrap();
        took
    };
    // More rows than the cross check of debug builds looks at.
    let (few, many) = (took(200), took(10_000));
    println!("in memory and in the database: {few:?} with 200, {many:?} with 10,000");
    for (few, many) in few.into_iter().zip(many) {
        // A look at every row takes a hundred times as long, and then 10 ms and more.
        assert!(
            many < few * 8 + Duration::from_millis(2),
            "{few:?} became {many:?}"
        );
    }
}

#[test]
fn a_big_catalog_is_opened_and_walked_in_a_moment() {
    let count = 10_000;
    let state = big(count);
    let dir = tempfile::tempdir().unwrap();
    drop(SqliteCatalog::create(dir.path(), &state).unwrap());
    let began = Instant::now();
    let sqlite = SqliteCatalog::open(dir.path()).unwrap();
    let opened = began.elapsed();
    let state = sqlite.state();
    let began = Instant::now();
    let mut depths = Depths::default();
    let deepest = state
        .volumes
        .values()
        .map(|row| depths.of(state, row.active).0);
    assert_eq!(deepest.max(), Some(10_001));
    let named: usize = state
        .layers
        .keys()
        .map(|id| state.names_of(*id).count())
        .sum();
    assert_eq!(named, 10_000);
    let children: usize = state.layers.keys().map(|id| state.child_count(*id)).sum();
    assert_eq!(children, 20_000);
    assert_eq!(state.needed_only_by("vm").len(), 5_001);
    let walked = began.elapsed();
    println!("opened in {opened:?}, walked in {walked:?}");
    // What is quadratic takes minutes.
    assert!(opened < Duration::from_secs(10) && walked < Duration::from_secs(5));
}
