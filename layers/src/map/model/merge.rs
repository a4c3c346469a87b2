//! Merges of layers, step by step, against tables and maps that were made of what is left.

use proptest::prelude::*;

use super::{CLUSTERS, Operation, TEBIBYTE, operation, range};
use crate::map::active::{ActiveMap, Change};
use crate::map::radix::{REGION_CLUSTERS, SPAN_CLUSTERS};
use crate::map::record::{MapRecord, RecordKind};
use crate::map::set::SectorSet;
use crate::map::table::Table;
use crate::units::{Cluster, LayerSlot, Sector};

/// The set that some operations leave behind.
fn set_of(operations: &[Operation]) -> SectorSet {
    let map = ActiveMap::new(CLUSTERS);
    for operation in operations {
        match *operation {
            Operation::Write(range) | Operation::Cached(range) => {
                let _ = map.write(range);
            }
            Operation::Zero(first, count) | Operation::ZeroNow(first, count) => {
                let _ = map.zero(Cluster(first), count);
            }
            Operation::Collect | Operation::CollectSome(..) => {}
        }
    }
    map.to_set()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn merged_step_by_step_a_table_is_that_of_the_layers_that_are_left(
        layers in prop::collection::vec(prop::collection::vec(operation(), 1..8), 4),
        up in any::<bool>(),
        cuts in prop::collection::btree_set(0..CLUSTERS, 0..5),
    ) {
        let sets: Vec<SectorSet> = layers.iter().map(|layer| set_of(layer)).collect();
        let load = |sets: &[(u32, &SectorSet)]| {
            let table = Table::new(CLUSTERS);
            sets.iter().for_each(|(slot, set)| table.load_layer(LayerSlot(*slot), set));
            table
        };
        let table = load(&[(1, &sets[0]), (2, &sets[1]), (3, &sets[2]), (4, &sets[3])]);
        let (mut lower, mut upper) = (sets[1].clone(), sets[2].clone());
        let ends: Vec<u64> = cuts.into_iter().chain([CLUSTERS]).collect();
        let mut first = 0;
        for end in ends {
            let (at, count) = (Cluster(first), end - first);
            let both = upper.within(at, count).over(&lower.within(at, count));
            let (from, to, target, source) = if up {
                (LayerSlot(2), LayerSlot(3), &mut upper, &mut lower)
            } else {
                (LayerSlot(3), LayerSlot(2), &mut lower, &mut upper)
            };
            *target = target.with(at, count, &both);
            table.replace(at, count, from, to, target);
            *source = source.without(at, count);
            let expected = load(&[(1, &sets[0]), (2, &lower), (3, &upper), (4, &sets[3])]);
            prop_assert!(table.runs(Cluster(0), CLUSTERS).eq(expected.runs(Cluster(0), CLUSTERS)));
            first = end;
        }
        prop_assert_eq!(if up { &lower } else { &upper }, &SectorSet::empty());
    }

    #[test]
    fn what_a_map_takes_over_from_below_is_what_it_did_not_say(
        below in prop::collection::vec(operation(), 1..8),
        above in prop::collection::vec(operation(), 1..20),
        split in any::<prop::sample::Index>(),
    ) {
        let lower = set_of(&below);
        let (before, after) = above.split_at(split.index(above.len()));
        let map = ActiveMap::from_set(CLUSTERS, &set_of(before));
        let table = Table::new(CLUSTERS);
        table.load_layer(LayerSlot(1), &lower);
        table.load_layer(LayerSlot(2), &map.to_set());
        let mut journal = map.to_set();
        let both = map.to_set().over(&lower);
        let mut changed = false;
        for (first, count, state) in lower.states(Cluster(0), CLUSTERS) {
            let change = map.merge_below(first, count, state);
            changed |= change == Change::Words;
            table.refresh(LayerSlot(2), &map, first, count, change);
            assert_eq!(map.merge_below(first, count, state), Change::Nothing);
        }
        prop_assert_eq!(&map.to_set(), &both);
        prop_assert_eq!(changed, both != journal);
        prop_assert_eq!(map.has_marks(), changed);
        let collected = map.collect(usize::MAX);
        prop_assert!(collected.dirty.is_empty());
        collected.records.iter().for_each(|record| journal.apply(record));
        prop_assert_eq!(&journal, &both, "the next flush records what was handed over");
        let alone = Table::new(CLUSTERS);
        alone.load_layer(LayerSlot(2), &both);
        prop_assert!(table.runs(Cluster(0), CLUSTERS).eq(alone.runs(Cluster(0), CLUSTERS)));
        // It goes on as any other.
        for operation in after {
            match *operation {
                Operation::Write(range) => { let _ = map.write(range); },
                Operation::Zero(first, count) => { let _ = map.zero(Cluster(first), count); }
                _ => {}
            }
        }
        map.collect(usize::MAX).records.iter().for_each(|record| journal.apply(record));
        prop_assert_eq!(journal, map.to_set());
    }
}

#[test]
fn a_merge_of_uniform_regions_needs_no_leaf() {
    let table = Table::new(TEBIBYTE);
    table.load_layer(LayerSlot(1), &SectorSet::everything(Sector(TEBIBYTE * 8)));
    let mut upper = SectorSet::empty();
    let part = range(SPAN_CLUSTERS * 8, REGION_CLUSTERS * 16);
    upper.apply(&MapRecord {
        kind: RecordKind::Data,
        range: part,
    });
    table.load_layer(LayerSlot(2), &upper);
    let before = table.memory_bytes();
    let lower = SectorSet::everything(Sector(TEBIBYTE * 8));
    let both = upper.over(&lower);
    table.replace(Cluster(0), TEBIBYTE, LayerSlot(1), LayerSlot(2), &both);
    assert_eq!(table.memory_bytes(), before);
    assert_eq!(table.runs(Cluster(0), TEBIBYTE).count(), 1);
    assert_eq!(table.get(Cluster(7)).slot, LayerSlot(2));
}
