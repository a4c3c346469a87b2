//! What is collected of large trees, by the rows alone.

use std::time::{Duration, Instant};

use uuid::Uuid;

use super::*;
use crate::catalog::{JobId, JobRow, JobState, LayerRow, Rows};
use crate::units::{Sector, StoreId};

/// Layers in each of the large trees.
const MANY: u64 = 10_000;

/// A layer of this number.
fn id(number: u64) -> LayerId {
    LayerId(Uuid::from_u64_pair(1, number))
}

/// A sealed layer.
fn layer(number: u64, parent: Option<u64>) -> LayerRow {
    LayerRow {
        id: id(number),
        parent: parent.map(id),
        size: Sector(8),
        state: LayerState::Sealed,
        base: None,
        created_ns: number,
    }
}

/// A volume with this active layer.
fn volume(name: &str, active: u64) -> VolumeRow {
    VolumeRow {
        name: name.into(),
        active: id(active),
        size: Sector(8),
        created_ns: 1,
        attachment: None,
        kind: VolumeKind::Normal,
        armed: false,
        attached_from: None,
        failed: None,
    }
}

/// A state of these layers, of which those that a volume writes to are active.
fn state(layers: Vec<LayerRow>, volumes: Vec<VolumeRow>, jobs: Vec<JobRow>) -> CatalogState {
    let mut rows = Rows::empty(StoreId(Uuid::from_u64_pair(1, 1)));
    rows.layers = layers.into_iter().map(|row| (row.id, row)).collect();
    for row in &volumes {
        rows.layers.get_mut(&row.active).unwrap().state = LayerState::Active;
    }
    rows.volumes = (volumes.into_iter().map(|row| (row.name.clone(), row))).collect();
    rows.next_job = 1 + jobs.len() as u64;
    rows.jobs = jobs.into_iter().map(|row| (row.id, row)).collect();
    CatalogState::new(rows).unwrap()
}

/// What is decided about a state, which must not take long: a step for each layer and each layer above or below it would.
fn decide(state: &CatalogState) -> (Vec<LayerId>, Vec<Join>) {
    let began = Instant::now();
    let all: Vec<LayerId> = state.layers.keys().copied().collect();
    let gone = unneeded(state, &all, Without::Nothing);
    let joins = joinable(state, &all, &gone);
    let took = began.elapsed();
    assert!(took < Duration::from_secs(2), "{took:?}");
    (gone, joins)
}

#[test]
fn a_long_chain_without_names_is_joined_in_pairs() {
    let layers =
        (1..=MANY).map(|number| layer(number, number.checked_sub(1).filter(|below| *below > 0)));
    let state = state(layers.collect(), vec![volume("v", MANY)], Vec::new());
    let (gone, joins) = decide(&state);
    assert_eq!(gone, []);
    let mut hands = HashSet::new();
    for join in &joins {
        assert!(hands.insert(join.lower) && hands.insert(join.upper));
        assert_eq!(state.layers[&join.upper].parent, Some(join.lower));
    }
    assert!(joins.len() as u64 > MANY / 4, "{}", joins.len());
}

#[test]
fn a_long_chain_that_nobody_needs_goes_whole_from_the_top() {
    let layers =
        (1..=MANY).map(|number| layer(number, number.checked_sub(1).filter(|below| *below > 0)));
    let state = state(layers.collect(), Vec::new(), Vec::new());
    let (gone, joins) = decide(&state);
    assert!(joins.is_empty());
    let expected: Vec<LayerId> = (1..=MANY).rev().map(id).collect();
    assert_eq!(gone, expected);
}

#[test]
fn a_layer_with_many_children_stays_until_one_is_left() {
    let layers = || {
        let children = (2..=MANY).map(|number| layer(number, Some(1)));
        std::iter::once(layer(1, None)).chain(children).collect()
    };
    let of = |volumes: u64| {
        let volumes = (2..2 + volumes).map(|number| volume(&format!("v{number}"), number));
        state(layers(), volumes.collect(), Vec::new())
    };
    let (gone, joins) = decide(&of(MANY - 1));
    assert!(gone.is_empty() && joins.is_empty());
    let (gone, joins) = decide(&of(1));
    assert_eq!(gone.len() as u64, MANY - 2);
    assert_eq!(joins.len(), 1);
}

#[test]
fn what_a_job_works_on_is_left_to_it_unless_nobody_needs_it() {
    let job = |source, target, kind, way| JobRow {
        id: JobId(1),
        kind,
        subject: "v".into(),
        source: id(source),
        target: id(target),
        way,
        state: JobState::Stopped,
        error: None,
        rate: None,
        created_ns: 1,
    };
    let chain = || (1..=4).map(|number| layer(number, (number > 1).then(|| number - 1)));
    let copy = job(1, 4, JobKind::Flatten, Way::Copy);
    let flattened = state(chain().collect(), vec![volume("v", 4)], vec![copy]);
    let (gone, joins) = decide(&flattened);
    assert!(gone.is_empty() && joins.is_empty());
    let merge = job(2, 3, JobKind::Merge, Way::Up);
    let merging = state(chain().collect(), vec![volume("v", 4)], vec![merge.clone()]);
    let (gone, joins) = decide(&merging);
    assert!(gone.is_empty() && joins.is_empty(), "{gone:?}, {joins:?}");
    let unused = state(chain().collect(), Vec::new(), vec![merge]);
    let (gone, _) = decide(&unused);
    assert_eq!(gone.len(), 4);
    assert_eq!(jobs_into(&unused, &gone), [Change::RemoveJob(JobId(1))]);
}

#[test]
fn a_base_goes_with_its_last_child_and_is_never_joined() {
    let mut base = layer(1, None);
    base.base = Some(crate::format::header::RawBase {
        path: "/base.raw".into(),
        len: 4096,
        mtime_ns: 0,
    });
    let of = |volumes| {
        let layers = vec![base.clone(), layer(2, Some(1))];
        state(layers, volumes, Vec::new())
    };
    let (gone, joins) = decide(&of(vec![volume("v", 2)]));
    assert!(gone.is_empty() && joins.is_empty());
    let (gone, _) = decide(&of(Vec::new()));
    assert_eq!(gone, [id(2), id(1)]);
}
