//! Kinds of volumes, jobs, doomed layers, new parents and sizes: what is kept, and what is refused.

use super::*;

fn job(number: u64, kind: JobKind, way: Way, source: u128, target: u128) -> JobRow {
    JobRow {
        id: JobId(number),
        kind,
        subject: "vm@s".into(),
        source: id(source),
        target: id(target),
        way,
        state: JobState::Queued,
        error: None,
        rate: None,
        created_ns: 9,
    }
}

fn set_kind(volume: &str, kind: VolumeKind) -> Change {
    Change::SetKind {
        volume: volume.into(),
        kind,
    }
}

fn set_armed(volume: &str, armed: bool) -> Change {
    Change::SetArmed {
        volume: volume.into(),
        armed,
    }
}

fn set_from(volume: &str, from: Option<&str>) -> Change {
    Change::SetAttachedFrom {
        volume: volume.into(),
        from: from.map(str::to_owned),
    }
}

fn set_parent(n: u128, parent: Option<u128>) -> Change {
    Change::SetParent {
        layer: id(n),
        parent: parent.map(id),
    }
}

fn set_job(number: u64, state: JobState, error: Option<&str>, rate: Option<u64>) -> Change {
    Change::SetJob {
        id: JobId(number),
        state,
        error: error.map(str::to_owned),
        rate,
    }
}

/// base 1 <- 2 <- 3 <- 4 <- 5 (sealed) <- 6 (active layer of vm) and 7 (of desk), and 8 over 2 (of other).
fn tree() -> Vec<Change> {
    let mut changes = vec![Change::AddLayer(base(1))];
    changes.extend((2..=5).map(|n| Change::AddLayer(layer(n, Some(n - 1), LayerState::Sealed))));
    for (n, parent, name) in [(6, 5, "vm"), (7, 5, "desk"), (8, 2, "other")] {
        changes.push(Change::AddLayer(layer(n, Some(parent), LayerState::Active)));
        changes.push(Change::AddVolume(volume(name, n)));
    }
    changes
}

/// All that is new in version 2, in commits.
fn lifecycle() -> Vec<Vec<Change>> {
    vec![
        tree(),
        vec![
            set_kind("desk", VolumeKind::Multiattach),
            set_from("other", Some("desk")),
            set_kind("vm", VolumeKind::Immutable),
            set_armed("vm", true),
        ],
        vec![
            Change::AddJob(job(1, JobKind::Merge, Way::Up, 3, 4)),
            Change::AddJob(job(2, JobKind::Flatten, Way::Copy, 1, 6)),
        ],
        vec![
            set_job(1, JobState::Paused, None, Some(1 << 20)),
            set_job(2, JobState::Stopped, Some("no space left on device"), None),
        ],
        // The end of a merge.
        vec![
            set_parent(4, Some(2)),
            Change::RemoveLayer(id(3)),
            Change::RemoveJob(JobId(1)),
        ],
        vec![
            Change::Removed(id(3)),
            Change::SetSize {
                volume: "vm".into(),
                size: Sector(2000),
            },
        ],
        // The end of a flatten.
        vec![
            set_armed("vm", false),
            set_kind("vm", VolumeKind::Readonly),
            set_parent(6, None),
            Change::RemoveJob(JobId(2)),
        ],
        vec![
            set_from("other", None),
            set_kind("desk", VolumeKind::Writethrough),
            Change::AddJob(job(3, JobKind::IntoBase, Way::Down, 1, 2)),
            Change::SetBase {
                layer: id(1),
                base: RawBase {
                    mtime_ns: 77,
                    ..base(1).base.unwrap()
                },
            },
        ],
        vec![
            Change::RemoveVolume("vm".into()),
            Change::RemoveLayer(id(6)),
        ],
    ]
}

#[test]
fn both_catalogs_keep_all_that_is_new() {
    let state = commit_to_both(lifecycle(), |state, disk| {
        assert_eq!(disk.state(), *state);
        // A copy made at once has it all too.
        let copy = tempfile::tempdir().unwrap();
        let made = SqliteCatalog::create(copy.path(), state).unwrap();
        assert_eq!(made.state(), state);
    });
    assert_eq!(state.volumes["desk"].kind, VolumeKind::Writethrough);
    assert_eq!(state.doomed, BTreeSet::from([id(6)]));
    assert_eq!(state.jobs.len(), 1);
    assert_eq!(state.next_job, 4);
    assert_eq!(state.layers[&id(1)].base.as_ref().unwrap().mtime_ns, 77);
    assert_eq!(state.layers[&id(4)].parent, Some(id(2)));
}

#[test]
fn the_number_of_a_job_is_never_given_out_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut sqlite = SqliteCatalog::create(dir.path(), &new_store()).unwrap();
    sqlite.commit(&tree()).unwrap();
    for number in 1..=3 {
        let row = job(number, JobKind::Merge, Way::Up, 3, 4);
        sqlite.commit(&[Change::AddJob(row)]).unwrap();
        sqlite.commit(&[Change::RemoveJob(JobId(number))]).unwrap();
        drop(sqlite);
        sqlite = SqliteCatalog::open(dir.path()).unwrap();
        assert_eq!(sqlite.state().next_job, number + 1);
        for again in [number, number + 2] {
            let row = job(again, JobKind::Merge, Way::Up, 3, 4);
            let error = sqlite.commit(&[Change::AddJob(row)]).unwrap_err();
            assert!(matches!(error, Error::Invalid { .. }), "{error}");
        }
    }
}

#[test]
fn what_is_new_has_rules_too() {
    let merge = |source, target| Change::AddJob(job(1, JobKind::Merge, Way::Up, source, target));
    let second = |kind, way, source, target| {
        vec![
            merge(3, 4),
            Change::AddJob(job(2, kind, way, source, target)),
        ]
    };
    let odd = |change: fn(&mut JobRow)| {
        let mut row = job(1, JobKind::Merge, Way::Up, 3, 4);
        change(&mut row);
        vec![Change::AddJob(row)]
    };
    let cases: Vec<(&str, Vec<Change>)> = vec![
        ("armed and normal", vec![set_armed("vm", true)]),
        (
            "no longer immutable, still armed",
            vec![
                set_kind("vm", VolumeKind::Immutable),
                set_armed("vm", true),
                set_kind("vm", VolumeKind::Normal),
            ],
        ),
        (
            "immutable over nothing",
            vec![set_kind("vm", VolumeKind::Immutable), set_parent(6, None)],
        ),
        (
            "attached from a normal volume",
            vec![set_from("other", Some("vm"))],
        ),
        (
            "attached from no volume",
            vec![set_from("other", Some("none"))],
        ),
        (
            "attached from itself",
            vec![
                set_kind("desk", VolumeKind::Multiattach),
                set_from("desk", Some("desk")),
            ],
        ),
        (
            "a multiattach volume goes",
            vec![
                set_kind("desk", VolumeKind::Multiattach),
                set_from("other", Some("desk")),
                Change::RemoveVolume("desk".into()),
            ],
        ),
        (
            "a multiattach volume with attachments becomes normal",
            vec![
                set_kind("desk", VolumeKind::Multiattach),
                set_from("other", Some("desk")),
                set_kind("desk", VolumeKind::Normal),
            ],
        ),
        ("its own parent", vec![set_parent(4, Some(4))]),
        ("a descendant as parent", vec![set_parent(3, Some(5))]),
        ("an active layer as parent", vec![set_parent(4, Some(8))]),
        ("no such parent", vec![set_parent(4, Some(99))]),
        ("a base with a parent", vec![set_parent(1, Some(5))]),
        (
            "a base where none was",
            vec![Change::SetBase {
                layer: id(2),
                base: base(1).base.unwrap(),
            }],
        ),
        (
            "size 0",
            vec![Change::SetSize {
                volume: "vm".into(),
                size: Sector(0),
            }],
        ),
        ("not doomed", vec![Change::Removed(id(3))]),
        (
            "doomed and there",
            vec![
                set_parent(8, Some(1)),
                set_parent(3, Some(1)),
                Change::RemoveLayer(id(2)),
                Change::AddLayer(layer(2, None, LayerState::Sealed)),
            ],
        ),
        ("upside down", vec![merge(4, 3)]),
        ("beside one another", vec![merge(3, 8)]),
        ("onto itself", vec![merge(3, 3)]),
        ("from no layer", vec![merge(99, 3)]),
        ("merge of a base", vec![merge(1, 2)]),
        (
            "into what is no base",
            odd(|row| (row.kind, row.way) = (JobKind::IntoBase, Way::Down)),
        ),
        (
            "a copy that is no copy",
            odd(|row| row.kind = JobKind::PushDown),
        ),
        ("a merge that is a copy", odd(|row| row.way = Way::Copy)),
        (
            "down from an active layer",
            odd(|row| (row.way, row.source, row.target) = (Way::Down, id(5), id(6))),
        ),
        ("without subject", odd(|row| row.subject.clear())),
        (
            "with a long subject",
            odd(|row| row.subject = "x".repeat(130)),
        ),
        ("at no speed", odd(|row| row.rate = Some(0))),
        ("at too much speed", odd(|row| row.rate = Some(1 << 63))),
        ("failed and queued", odd(|row| row.error = Some("x".into()))),
        ("not the next number", odd(|row| row.id = JobId(2))),
        ("no such job", vec![Change::RemoveJob(JobId(1))]),
        (
            "no such job to pause",
            vec![set_job(1, JobState::Paused, None, None)],
        ),
        (
            "failed and paused",
            vec![merge(3, 4), set_job(1, JobState::Paused, Some("x"), None)],
        ),
        ("twice the same", second(JobKind::Merge, Way::Up, 3, 4)),
        (
            "target of one, source of another",
            second(JobKind::Merge, Way::Up, 4, 5),
        ),
        (
            "source of one, target of another",
            second(JobKind::Merge, Way::Up, 2, 3),
        ),
        (
            "pushed down and merged",
            second(JobKind::PushDown, Way::Copy, 3, 6),
        ),
        (
            "pushed into what is merged",
            second(JobKind::PushDown, Way::Copy, 2, 3),
        ),
        (
            "the source goes",
            vec![
                merge(3, 4),
                set_parent(4, Some(2)),
                Change::RemoveLayer(id(3)),
            ],
        ),
        (
            "the source is jumped over",
            vec![merge(3, 4), set_parent(4, Some(2))],
        ),
        (
            "the source is jumped over further up",
            vec![
                Change::AddJob(job(1, JobKind::Flatten, Way::Copy, 3, 6)),
                set_parent(5, Some(2)),
            ],
        ),
        (
            "the chain is cut",
            vec![
                Change::AddJob(job(1, JobKind::Flatten, Way::Copy, 1, 6)),
                set_parent(4, None),
            ],
        ),
    ];
    let dir = tempfile::tempdir().unwrap();
    let mut sqlite = SqliteCatalog::create(dir.path(), &new_store()).unwrap();
    let mut memory = MemoryCatalog::open(&MemoryDisk::new(new_store())).unwrap();
    sqlite.commit(&tree()).unwrap();
    memory.commit(&tree()).unwrap();
    let before = sqlite.state().clone();
    for (what, changes) in cases {
        // Found at once, and found when what it needs was committed before.
        for split in 0..changes.len() {
            let (early, late) = changes.split_at(split);
            let mut state = before.clone();
            if state.change(early).is_err() {
                continue;
            }
            let middle = state.clone();
            assert!(
                state.change(late).is_err(),
                "{what}, in two parts at {split}"
            );
            assert_eq!(state, middle, "{what}");
            state.verify().unwrap();
        }
        for catalog in [&mut sqlite as &mut dyn Catalog, &mut memory] {
            let error = catalog.commit(&changes).unwrap_err();
            assert!(matches!(error, Error::Invalid { .. }), "{what}: {error}");
            assert_eq!(*catalog.state(), before, "{what}");
        }
    }
}

#[test]
fn several_children_may_be_given_the_same_layer_at_once() {
    let mut state = new_store();
    drop(state.change(&tree()).unwrap());
    let pushes = [
        Change::AddJob(job(1, JobKind::PushDown, Way::Copy, 5, 6)),
        Change::AddJob(job(2, JobKind::PushDown, Way::Copy, 5, 7)),
    ];
    drop(state.change(&pushes).unwrap());
    assert_eq!(state.jobs_of(id(5)).count(), 2);
    let end = |number, target| {
        [
            set_parent(target, Some(4)),
            Change::RemoveJob(JobId(number)),
        ]
    };
    drop(state.change(&end(1, 6)).unwrap());
    drop(state.change(&end(2, 7)).unwrap());
    drop(state.change(&[Change::RemoveLayer(id(5))]).unwrap());
}

#[test]
fn rows_are_found_by_what_they_refer_to() {
    let mut state = new_store();
    for changes in &lifecycle()[..4] {
        drop(state.change(changes).unwrap());
    }
    let mut taken = Vec::new();
    for (name, n, at) in [("b", 4, 5), ("a", 4, 9), ("c", 2, 7)] {
        taken.push(Change::AddSnapshot(snapshot(name, n, at)));
    }
    drop(state.change(&taken).unwrap());
    let names =
        |rows: Vec<&SnapshotRow>| rows.iter().map(|row| row.name.clone()).collect::<String>();
    assert_eq!(names(state.snapshots_of("vm")), "bca");
    assert_eq!(names(state.names_of(id(4)).collect()), "ba");
    assert_eq!(state.snapshot_count("vm"), 3);
    assert_eq!(state.snapshot_count("other"), 0);
    assert_eq!(state.snapshot("vm", "c").unwrap().layer, id(2));
    assert_eq!(state.snapshot("vm", "d"), None);
    assert_eq!(state.snapshot("other", "c"), None);
    let ids = |rows: Vec<&LayerRow>| rows.iter().map(|row| row.id).collect::<Vec<_>>();
    assert_eq!(ids(state.children(id(5)).collect()), [6, 7].map(id));
    assert_eq!(state.child_count(id(5)), 2);
    assert_eq!(ids(state.chain(id(8))), [8, 2, 1].map(id));
    assert_eq!(state.active_of(id(7)).unwrap().name, "desk");
    assert_eq!(state.active_of(id(5)), None);
    let attached: Vec<_> = state.attachments_of("desk").map(|row| &row.name).collect();
    assert_eq!(attached, ["other"]);
    let jobs = |n| state.jobs_of(id(n)).map(|row| row.id.0).collect::<Vec<_>>();
    assert_eq!(
        (jobs(1), jobs(3), jobs(4), jobs(5)),
        (vec![2], vec![1], vec![1], vec![])
    );
    assert!(state.may_have_parent(id(4), Some(id(3))));
    assert!(state.may_have_parent(id(4), Some(id(2))));
    assert!(state.may_have_parent(id(6), None));
    assert!(!state.may_have_parent(id(4), Some(id(1))));
    assert!(!state.may_have_parent(id(3), Some(id(1))));
    let mut depths = Depths::default();
    for (n, depth) in [(6, 6), (7, 6), (8, 3), (1, 1), (4, 4)] {
        assert_eq!(depths.of(&state, id(n)), (depth, id(1)));
        assert_eq!(state.depth(id(n)), (depth, id(1)));
    }
}

#[test]
fn what_only_one_volume_needs() {
    let mut state = new_store();
    drop(state.change(&tree()).unwrap());
    let taken = [Change::AddSnapshot(snapshot("s", 4, 5))];
    drop(state.change(&taken).unwrap());
    assert_eq!(state.needed_only_by("vm"), [id(6)]);
    assert_eq!(state.needed_only_by("desk"), [id(7)]);
    assert_eq!(state.needed_only_by("none"), []);
    drop(
        state
            .change(&[
                Change::RemoveVolume("desk".into()),
                Change::RemoveLayer(id(7)),
            ])
            .unwrap(),
    );
    assert_eq!(state.needed_only_by("vm"), [6, 5, 4, 3].map(id));
    let gone = [
        Change::RemoveVolume("other".into()),
        Change::RemoveLayer(id(8)),
    ];
    drop(state.change(&gone).unwrap());
    assert_eq!(state.needed_only_by("vm"), [6, 5, 4, 3, 2, 1].map(id));
}

#[test]
fn only_the_end_of_a_commit_has_to_keep_the_rules() {
    let dir = tempfile::tempdir().unwrap();
    let mut sqlite = SqliteCatalog::create(dir.path(), &new_store()).unwrap();
    sqlite.commit(&tree()).unwrap();
    let active = |volume: &str, n| Change::SetActive {
        volume: volume.into(),
        layer: id(n),
    };
    for changes in [
        vec![set_armed("vm", true), set_kind("vm", VolumeKind::Immutable)],
        vec![set_kind("vm", VolumeKind::Normal), set_armed("vm", false)],
        vec![set_parent(4, Some(4)), set_parent(4, Some(3))],
        vec![active("vm", 7), active("desk", 6)],
        vec![
            Change::AddSnapshot(snapshot("s", 4, 5)),
            Change::RemoveSnapshot {
                volume: "vm".into(),
                name: "s".into(),
            },
            Change::AddSnapshot(snapshot("s", 3, 6)),
        ],
        vec![
            Change::AddLayer(layer(9, Some(99), LayerState::Active)),
            Change::RemoveLayer(id(9)),
            Change::Removed(id(9)),
        ],
    ] {
        sqlite.commit(&changes).unwrap();
        let state = sqlite.state().clone();
        drop(sqlite);
        sqlite = SqliteCatalog::open(dir.path()).unwrap();
        assert_eq!(*sqlite.state(), state);
    }
}
