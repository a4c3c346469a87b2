//! Random commits, good and bad: looking where something changed finds what looking everywhere finds, a commit that is
//! refused or taken back leaves nothing behind, and the two catalogs stay the same.

use proptest::prelude::*;

use super::*;
use crate::catalog::index::Index;

/// What a change is made of; what it means depends on the state.
type Seed = (u8, u8, u8, u8);

/// One of these, if there is any.
fn pick<T: Copy>(all: &[T], by: u8) -> Option<T> {
    all.get(usize::from(by) % all.len().max(1)).copied()
}

/// A layer that is there, or now and then one that is not.
fn any_layer(state: &CatalogState, by: u8) -> LayerId {
    let all: Vec<LayerId> = state.layers.keys().copied().collect();
    match by {
        250.. => id(u128::from(by)),
        _ => pick(&all, by).unwrap_or(id(1)),
    }
}

/// A volume that is there, or now and then one that is not.
fn any_volume(state: &CatalogState, by: u8) -> String {
    let all: Vec<&String> = state.volumes.keys().collect();
    match by {
        250.. => "none".into(),
        _ => pick(&all, by).map_or("none".into(), Clone::clone),
    }
}

/// What a command could do, or a mistake of one.
fn changes(state: &CatalogState, fresh: &mut u128, (op, a, b, c): Seed) -> Vec<Change> {
    let mut new_layer = |parent: Option<LayerId>, state, size| {
        *fresh += 1;
        LayerRow {
            parent,
            size,
            ..layer(*fresh, None, state)
        }
    };
    let some_layer = any_layer(state, a);
    let other_layer = any_layer(state, b);
    let name = any_volume(state, a);
    let row = state.volumes.get(&name);
    let size = Sector(1000 + u64::from(b % 3));
    match op % 23 {
        0 => {
            let top = new_layer(None, LayerState::Active, size);
            let made = VolumeRow {
                active: top.id,
                size,
                ..volume(&format!("v{}", a % 6), 0)
            };
            vec![Change::AddLayer(top), Change::AddVolume(made)]
        }
        1 | 2 => {
            let Some(row) = row else {
                return Vec::new();
            };
            let top = new_layer(Some(row.active), LayerState::Active, row.size);
            let taken = SnapshotRow {
                volume: name.clone(),
                size: row.size,
                layer: row.active,
                ..snapshot(&format!("s{}", b % 5), 0, u64::from(c))
            };
            vec![
                Change::SetLayerState {
                    layer: row.active,
                    state: LayerState::Sealed,
                },
                Change::SetActive {
                    volume: name,
                    layer: top.id,
                },
                Change::AddLayer(top),
                Change::AddSnapshot(taken),
            ]
        }
        3 => {
            let top = new_layer(Some(some_layer), LayerState::Active, size);
            let made = VolumeRow {
                active: top.id,
                size,
                ..volume(&format!("v{}", b % 6), 0)
            };
            vec![Change::AddVolume(made), Change::AddLayer(top)]
        }
        4 => match state
            .snapshots
            .get(usize::from(a) % state.snapshots.len().max(1))
        {
            Some(row) => vec![Change::RemoveSnapshot {
                volume: row.volume.clone(),
                name: row.name.clone(),
            }],
            None => Vec::new(),
        },
        5 => vec![Change::SetParent {
            layer: some_layer,
            parent: Some(other_layer).filter(|_| c > 30),
        }],
        6 | 7 => {
            // The end of a job, or of what could have been one.
            let job = state
                .jobs
                .values()
                .nth(usize::from(a) % state.jobs.len().max(1));
            let (source, target) = match job {
                Some(job) => (job.source, job.target),
                None => (some_layer, other_layer),
            };
            let parent = state.layers.get(&source).and_then(|row| row.parent);
            let mut changes = vec![Change::SetParent {
                layer: target,
                parent,
            }];
            changes.extend(job.filter(|_| b > 20).map(|job| Change::RemoveJob(job.id)));
            if c > 60 {
                changes.push(Change::RemoveLayer(source));
            }
            changes
        }
        8..=10 => {
            let kinds = [
                (JobKind::Merge, Way::Up),
                (JobKind::Merge, Way::Down),
                (JobKind::PushDown, Way::Copy),
                (JobKind::Flatten, Way::Copy),
                (JobKind::IntoBase, Way::Down),
            ];
            let (kind, way) = kinds[usize::from(c) % kinds.len()];
            let chain = state.chain(some_layer);
            let below: Vec<LayerId> = chain.iter().skip(1).map(|row| row.id).collect();
            let source = pick(&below, b).filter(|_| b < 240).unwrap_or(other_layer);
            vec![Change::AddJob(JobRow {
                id: JobId(state.next_job),
                kind,
                subject: "job".into(),
                source,
                target: some_layer,
                way,
                state: JobState::Queued,
                error: None,
                rate: None,
                created_ns: u64::from(c),
            })]
        }
        11 => {
            let freed = state.needed_only_by(&name).into_iter();
            let named = state.snapshots_of(&name).into_iter();
            let named = named.map(|row| Change::RemoveSnapshot {
                volume: name.clone(),
                name: row.name.clone(),
            });
            let freed = freed.map(Change::RemoveLayer);
            let mut changes: Vec<Change> = named.chain(freed).collect();
            changes.truncate(if b < 30 { 1 } else { usize::MAX });
            changes.push(Change::RemoveVolume(name));
            changes
        }
        12 => {
            let kinds = [
                VolumeKind::Normal,
                VolumeKind::Immutable,
                VolumeKind::Multiattach,
            ];
            let kind = kinds[usize::from(b) % kinds.len()];
            vec![Change::SetKind { volume: name, kind }]
        }
        13 => vec![Change::SetArmed {
            volume: name,
            armed: b > 100,
        }],
        14 => vec![Change::SetAttachedFrom {
            volume: name,
            from: Some(any_volume(state, b)).filter(|_| c > 60),
        }],
        15 => vec![Change::SetSize { volume: name, size }],
        16 => vec![Change::RemoveLayer(some_layer)],
        17 => {
            let states = [LayerState::Sealing, LayerState::Sealed];
            vec![Change::SetLayerState {
                layer: some_layer,
                state: states[usize::from(b) % 2],
            }]
        }
        // A layer comes to lie between two; or among itself.
        18 => {
            let between = new_layer(Some(some_layer), LayerState::Sealed, size);
            vec![
                Change::SetParent {
                    layer: other_layer,
                    parent: Some(between.id),
                },
                Change::AddLayer(between),
            ]
        }
        19 => {
            let one = new_layer(None, LayerState::Sealed, size);
            let two = new_layer(Some(one.id), LayerState::Sealed, size);
            let parent = (c > 60).then_some(two.id);
            vec![
                Change::AddLayer(LayerRow { parent, ..one }),
                Change::AddLayer(two),
            ]
        }
        20 => vec![Change::SetParent {
            layer: some_layer,
            parent: Some(other_layer),
        }],
        21 => state
            .doomed
            .first()
            .map(|id| Change::Removed(*id))
            .into_iter()
            .collect(),
        _ => vec![match state
            .jobs
            .keys()
            .nth(usize::from(a) % state.jobs.len().max(1))
        {
            Some(id) if b > 100 => Change::RemoveJob(*id),
            Some(id) => Change::SetJob {
                id: *id,
                state: JobState::Stopped,
                error: Some("x".into()),
                rate: Some(u64::from(b)),
            },
            None => Change::RemoveJob(JobId(u64::from(b))),
        }],
    }
}

/// A store to begin with.
fn begun() -> CatalogState {
    let mut state = new_store();
    drop(state.change(&start()).unwrap());
    for n in 2..9 {
        let mut all = take_snapshot(&format!("s{}", n % 5 + 90 * (n / 7)), n, n + 1, 5);
        all.push(Change::SetLayerState {
            layer: id(n),
            state: LayerState::Sealed,
        });
        drop(state.change(&all).unwrap());
    }
    let over = [
        Change::AddLayer(layer(20, Some(4), LayerState::Sealed)),
        Change::AddLayer(layer(21, Some(20), LayerState::Sealed)),
    ];
    drop(state.change(&over).unwrap());
    state
}

/// Commits of some seeds each.
fn commits(count: usize) -> impl Strategy<Value = Vec<Vec<Seed>>> {
    prop::collection::vec(prop::collection::vec(any::<Seed>(), 1..4), 1..count)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn what_changed_is_all_there_is_to_look_at(commits in commits(60)) {
        // `change` itself compares its finding with that of a look at everything.
        const { assert!(cfg!(debug_assertions)) };
        let mut state = begun();
        let mut fresh = 100;
        for seeds in commits {
            let all: Vec<Change> = seeds.into_iter().flat_map(|seed| changes(&state, &mut fresh, seed)).collect();
            let before = state.clone();
            if let Ok(undo) = state.change(&all) {
                state.undo(undo);
                prop_assert_eq!(&state, &before);
                prop_assert_eq!(&state.index, &before.index);
                drop(state.change(&all).unwrap());
                prop_assert_eq!(&state.index, &Index::of(&state));
            } else {
                prop_assert_eq!(&state, &before);
                prop_assert_eq!(&state.index, &before.index);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn both_catalogs_do_the_same(commits in commits(24)) {
        let dir = tempfile::tempdir().unwrap();
        let disk = MemoryDisk::new(begun());
        let mut memory = MemoryCatalog::open(&disk).unwrap();
        let mut sqlite = SqliteCatalog::create(dir.path(), &begun()).unwrap();
        let mut fresh = 100;
        for seeds in commits {
            let state = memory.state();
            let all: Vec<Change> = seeds.into_iter().flat_map(|seed| changes(state, &mut fresh, seed)).collect();
            prop_assert_eq!(memory.commit(&all).is_ok(), sqlite.commit(&all).is_ok());
            prop_assert_eq!(memory.state(), sqlite.state());
        }
        drop(sqlite);
        let read = SqliteCatalog::look(dir.path()).unwrap();
        prop_assert_eq!(&read, memory.state());
        prop_assert_eq!(&read, &disk.state());
    }
}
