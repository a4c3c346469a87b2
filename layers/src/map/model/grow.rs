//! Disks that grow.

use proptest::prelude::*;

use super::range;
use crate::map::active::{ActiveMap, Change, ClusterState};
use crate::map::radix::{REGION_CLUSTERS, SPAN_CLUSTERS};
use crate::map::table::{Resolve, Table};
use crate::units::{Cluster, LayerSlot};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn a_disk_that_grew_says_what_one_that_was_as_large_says(
        sizes in prop::collection::btree_set(prop_oneof![
            1..40u64,
            REGION_CLUSTERS - 2..REGION_CLUSTERS + 2,
            SPAN_CLUSTERS - 2..SPAN_CLUSTERS + 2,
            SPAN_CLUSTERS..9 * SPAN_CLUSTERS,
        ], 2..6),
        writes in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<bool>()), 6),
    ) {
        let sizes: Vec<u64> = sizes.into_iter().collect();
        let last = *sizes.last().unwrap();
        let (grown, large) = (ActiveMap::new(sizes[0]), ActiveMap::new(last));
        let (table, large_table) = (Table::new(sizes[0]), Table::new(last));
        for (size, (first, count, zero)) in sizes.iter().zip(&writes) {
            grown.grow(*size);
            table.grow(*size);
            // To the very end at times, so that it would cover what comes later.
            let first = first.index(usize::try_from(*size).unwrap()) as u64;
            let count = (count.index(3 * usize::try_from(*size).unwrap()) as u64 + 1).min(size - first);
            for (map, table) in [(&grown, &table), (&large, &large_table)] {
                let change = if *zero { map.zero(Cluster(first), count) } else { map.write(range(first * 8, count * 8)) };
                table.refresh(LayerSlot(1), map, Cluster(first), count, change);
            }
        }
        prop_assert!(grown.runs(Cluster(0), last).eq(large.runs(Cluster(0), last)));
        prop_assert!(table.runs(Cluster(0), last).eq(large_table.runs(Cluster(0), last)));
        prop_assert_eq!(grown.collect(usize::MAX), large.collect(usize::MAX));
        prop_assert!(!grown.has_marks());
        prop_assert_eq!(grown.to_set(), large.to_set());
    }
}

#[test]
fn a_disk_grows_from_next_to_nothing_to_the_largest_under_way() {
    /// Clusters of the largest disk.
    const LARGEST: u64 = 1 << 34;
    let (map, table) = (ActiveMap::new(1), Table::new(1));
    let mut size = 1;
    while size < LARGEST {
        size = (size * 3 / 2 + 1).min(LARGEST);
        map.grow(size);
        table.grow(size);
        let end = Cluster(size - 1);
        assert_eq!(
            (map.get(end), table.get(end)),
            (ClusterState::ABSENT, Resolve::default())
        );
        let change = map.write(range(end.0 * 8, 8));
        assert_eq!(change, Change::Words);
        table.refresh(LayerSlot(1), &map, end, 1, change);
        assert_eq!(table.get(end).slot, LayerSlot(1));
        assert!(map.has_marks());
    }
    map.grow(5);
    assert_eq!((map.clusters(), table.clusters()), (LARGEST, LARGEST));
    let collected = map.collect(usize::MAX);
    assert!(collected.records.len() > 40);
    assert_eq!(collected.records.last().unwrap().range.end().0, LARGEST * 8);
}

#[test]
fn writers_and_a_collector_do_not_notice() {
    let (map, table) = (ActiveMap::new(1), Table::new(1));
    let size = std::sync::atomic::AtomicU64::new(1);
    let order = std::sync::atomic::Ordering::SeqCst;
    let mut journal = crate::map::set::SectorSet::empty();
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..2u64)
            .map(|writer| {
                let (map, table, size) = (&map, &table, &size);
                scope.spawn(move || {
                    for round in 0..200_000u64 {
                        let at = Cluster((round * 7919 + writer) % size.load(order));
                        let change = map.write(range(at.0 * 8 + writer, 1));
                        table.refresh(LayerSlot(1), map, at, 1, change);
                        assert_eq!(table.get(at).slot, LayerSlot(1));
                    }
                })
            })
            .collect();
        for step in 1..60 {
            let clusters = step * step * REGION_CLUSTERS + step;
            map.grow(clusters);
            table.grow(clusters);
            size.store(clusters, order);
            let collected = map.collect(if step % 2 == 0 { 100 } else { usize::MAX });
            collected
                .records
                .iter()
                .for_each(|record| journal.apply(record));
            std::thread::yield_now();
        }
        writers
            .into_iter()
            .for_each(|writer| writer.join().unwrap());
    });
    let collected = map.collect(usize::MAX);
    collected
        .records
        .iter()
        .for_each(|record| journal.apply(record));
    assert_eq!(journal, map.to_set());
}
