//! The maps against a naive model: one value a sector, in a plain vector.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod grow;
mod merge;

use std::collections::BTreeSet;

use proptest::prelude::*;
use roaring::RoaringTreemap;

use crate::limits::{DISK_SECTORS_MAX, SLOT_MAX};
use crate::map::active::{ActiveMap, Change, ClusterState, Collected};
use crate::map::radix::{REGION_CLUSTERS, SPAN_CLUSTERS};
use crate::map::record::{MapRecord, RecordKind, cluster_parts};
use crate::map::set::SectorSet;
use crate::map::table::{Resolve, Table};
use crate::units::{CLUSTER_SECTORS, Cluster, LayerSlot, Sector, SectorMask, SectorRange};

/// Clusters of the disks of these tests: some whole regions and a part of one.
const CLUSTERS: u64 = 3 * REGION_CLUSTERS + 100;
/// Clusters of 1 TiB.
const TEBIBYTE: u64 = 1 << 28;

/// What a layer says about a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    /// Nothing.
    Absent,
    /// Its file has it.
    Data,
    /// Zero.
    Zero,
}

/// What may happen to a map.
#[derive(Clone, Debug)]
enum Operation {
    /// A write.
    Write(SectorRange),
    /// Zeroing of whole clusters.
    Zero(u64, u64),
    /// A flush.
    Collect,
    /// A write into frames.
    Cached(SectorRange),
    /// A part of a flush: at least so many clusters, and whether it succeeds.
    CollectSome(usize, bool),
    /// Zeroing of whole clusters that is made durable by itself.
    ZeroNow(u64, u64),
}

/// A run of sectors of a test's disk.
fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::new(Sector(start), count).unwrap()
}

/// Some operation, often on the first clusters, so that operations meet.
fn operation() -> impl Strategy<Value = Operation> {
    let small = (0..200u64, 1..40u64);
    let large = (0..CLUSTERS * 8, 1..CLUSTERS * 8);
    let sectors = prop_oneof![4 => small, 1 => large];
    let sectors = sectors.prop_map(|(start, count)| range(start, count.min(CLUSTERS * 8 - start)));
    let sectors = sectors.boxed();
    let write = sectors.clone().prop_map(Operation::Write);
    let cached = sectors.prop_map(Operation::Cached);
    let small = (0..30u64, 1..8u64);
    let large = (0..CLUSTERS, 1..CLUSTERS);
    let clusters = prop_oneof![2 => small, 1 => large];
    let clusters = clusters
        .prop_map(|(first, count)| (first, count.min(CLUSTERS - first)))
        .boxed();
    let zero = clusters
        .clone()
        .prop_map(|(first, count)| Operation::Zero(first, count));
    let zero_now = clusters.prop_map(|(first, count)| Operation::ZeroNow(first, count));
    let some = (1..700usize, any::<bool>())
        .prop_map(|(limit, succeeds)| Operation::CollectSome(limit, succeeds));
    prop_oneof![
        4 => write,
        4 => cached,
        2 => zero,
        1 => zero_now,
        1 => Just(Operation::Collect),
        2 => some,
    ]
}

/// Says something about a run of sectors in a model.
fn say(model: &mut [Said], range: SectorRange, said: Said) {
    let first = usize::try_from(range.start.0).unwrap();
    let count = usize::try_from(range.count).unwrap();
    model[first..first + count].fill(said);
}

/// What a model says about a cluster, as masks of data and of zeroes.
fn masks(model: &[Said], cluster: u64) -> (SectorMask, SectorMask) {
    let first = usize::try_from(cluster * CLUSTER_SECTORS).unwrap();
    let mask = |said| {
        (0..8).fold(0, |mask, bit| {
            mask | u8::from(model[first + bit] == said) << bit
        })
    };
    (SectorMask(mask(Said::Data)), SectorMask(mask(Said::Zero)))
}

/// A set must say what the model says, sector by sector and in runs.
fn assert_set(set: &SectorSet, model: &[Said]) {
    for cluster in 0..CLUSTERS {
        assert_eq!(
            set.cluster(Cluster(cluster)),
            masks(model, cluster),
            "cluster {cluster}"
        );
    }
    let mut runs = vec![Said::Absent; model.len()];
    for (said, from) in [
        (Said::Data, set.data_runs().collect::<Vec<_>>()),
        (Said::Zero, set.zero_runs().collect()),
    ] {
        assert!(
            from.windows(2).all(|pair| pair[0].end() < pair[1].start),
            "runs are as long as possible"
        );
        from.iter().for_each(|range| say(&mut runs, *range, said));
    }
    assert!(runs == model, "runs");
    let count = |said| model.iter().filter(|sector| **sector == said).count() as u64;
    assert_eq!(set.data_sectors(), count(Said::Data));
    assert_eq!(set.zero_sectors(), count(Said::Zero));
}

/// What a collection gives is in order, apart and as long as possible.
fn assert_in_order(collected: &Collected) {
    let mut records = collected.records.windows(2);
    assert!(records.all(|pair| pair[0].range.end() <= pair[1].range.start));
    let mut dirty = collected.dirty.windows(2);
    assert!(dirty.all(|pair| pair[0].0.0 + pair[0].1 <= pair[1].0.0));
}

/// Makes the frames clean that a collection took.
fn clean(frames: &mut BTreeSet<u64>, collected: &Collected) {
    for (first, count) in &collected.dirty {
        frames.retain(|cluster| !(first.0..first.0 + count).contains(cluster));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn a_map_and_its_journal_say_what_was_done(operations in prop::collection::vec(operation(), 1..60)) {
        let map = ActiveMap::new(CLUSTERS);
        let table = Table::new(CLUSTERS);
        let mut model = vec![Said::Absent; usize::try_from(CLUSTERS * 8).unwrap()];
        let mut journal = SectorSet::empty();
        // The clusters whose frames are dirty.
        let mut frames = BTreeSet::new();
        for operation in &operations {
            match *operation {
                Operation::Write(range) => {
                    let change = map.write(range);
                    let first = range.start.cluster();
                    table.refresh(LayerSlot(1), &map, first, range.end().0.div_ceil(8) - first.0, change);
                    say(&mut model, range, Said::Data);
                }
                Operation::Cached(range) => {
                    for part in cluster_parts(range) {
                        for cluster in (part.first.0..part.first.0 + part.count).map(Cluster) {
                            let change = map.write_cluster(cluster, part.mask, frames.insert(cluster.0));
                            table.refresh(LayerSlot(1), &map, cluster, 1, change);
                            assert_eq!(map.write_cluster(cluster, part.mask, false), Change::Nothing);
                        }
                    }
                    say(&mut model, range, Said::Data);
                }
                Operation::Zero(first, count) | Operation::ZeroNow(first, count) => {
                    let change = map.zero(Cluster(first), count);
                    table.refresh(LayerSlot(1), &map, Cluster(first), count, change);
                    say(&mut model, range(first * 8, count * 8), Said::Zero);
                    if matches!(operation, Operation::ZeroNow(..)) {
                        // Nobody writes meanwhile.
                        let records = map.zero_records(Cluster(first), count).unwrap();
                        records.iter().for_each(|record| journal.apply(record));
                        for cluster in (first..first + count).map(Cluster) {
                            assert_eq!(journal.cluster(cluster), (SectorMask::NONE, SectorMask::ALL));
                            assert!(map.is_journaled(cluster));
                        }
                        assert_eq!(map.zero_records(Cluster(first), count), Some(Vec::new()));
                    }
                }
                Operation::Collect => {
                    let collected = map.collect(usize::MAX);
                    assert_in_order(&collected);
                    assert!(!collected.more);
                    collected.records.iter().for_each(|record| journal.apply(record));
                    assert_set(&journal, &model);
                    clean(&mut frames, &collected);
                    assert!(frames.is_empty(), "all that is dirty is found");
                    assert!(map.collect(usize::MAX).is_empty(), "nothing is left");
                    assert!(!map.has_marks());
                }
                Operation::CollectSome(limit, succeeds) => {
                    let collected = map.collect(limit);
                    assert_in_order(&collected);
                    assert_eq!(map.has_marks(), collected.more);
                    if succeeds {
                        collected.records.iter().for_each(|record| journal.apply(record));
                        clean(&mut frames, &collected);
                    } else {
                        map.put_back(&collected);
                        assert!(map.has_marks() || collected.is_empty());
                    }
                }
            }
        }
        let mut more = true;
        while more {
            let collected = map.collect(600);
            collected.records.iter().for_each(|record| journal.apply(record));
            clean(&mut frames, &collected);
            more = collected.more;
        }
        assert!(frames.is_empty(), "all that is dirty is found");
        assert_set(&journal, &model);
        assert_set(&map.to_set(), &model);
        for cluster in 0..CLUSTERS {
            let state = map.get(Cluster(cluster));
            assert_eq!((state.data, state.zero()), masks(&model, cluster));
            let slot = if state.is_absent() { LayerSlot::NONE } else { LayerSlot(1) };
            assert_eq!(table.get(Cluster(cluster)), Resolve { slot, mask: state.data });
        }
        // Opened again, everything is the same and journaled.
        let (data, zero) = journal.to_portable();
        let reopened = SectorSet::from_portable(&data, &zero).unwrap();
        assert_eq!(reopened, journal);
        assert_eq!(reopened.to_portable(), (data, zero), "written the same way");
        let again = ActiveMap::from_set(CLUSTERS, &reopened);
        assert!((0..CLUSTERS).all(|cluster| again.get(Cluster(cluster)) == map.get(Cluster(cluster))));
        assert!(again.collect(usize::MAX).is_empty());
        let loaded = Table::new(CLUSTERS);
        loaded.load_layer(LayerSlot(1), &reopened);
        assert!(loaded.runs(Cluster(0), CLUSTERS).eq(table.runs(Cluster(0), CLUSTERS)));
    }

    #[test]
    fn a_table_of_layers_answers_as_the_newest_that_speaks(
        layers in prop::collection::vec(prop::collection::vec(operation(), 1..8), 1..6)
    ) {
        let table = Table::new(CLUSTERS);
        let mut newest = vec![Resolve::default(); usize::try_from(CLUSTERS).unwrap()];
        for (slot, operations) in (1..).map(LayerSlot).zip(&layers) {
            let map = ActiveMap::new(CLUSTERS);
            for operation in operations {
                match *operation {
                    Operation::Write(range) => { let _ = map.write(range); }
                    Operation::Zero(first, count) => { let _ = map.zero(Cluster(first), count); }
                    _ => {}
                }
            }
            table.load_layer(slot, &map.to_set());
            for (cluster, newest) in (0..).zip(&mut newest) {
                let state = map.get(Cluster(cluster));
                if !state.is_absent() {
                    *newest = Resolve { slot, mask: state.data };
                }
            }
        }
        let found = (0..CLUSTERS).map(|cluster| table.get(Cluster(cluster)));
        assert!(found.eq(newest.iter().copied()));
        let mut at = 0;
        for run in table.runs(Cluster(0), CLUSTERS) {
            assert_eq!(run.first.0, at);
            let here = usize::try_from(at).unwrap();
            at += run.count;
            let there = usize::try_from(at).unwrap();
            assert!(newest[here..there].iter().all(|newest| *newest == run.resolve));
            assert!(newest.get(there) != Some(&run.resolve), "as long as possible");
        }
        assert_eq!(at, CLUSTERS);
    }

    #[test]
    fn portable_bytes_are_those_of_a_roaring_treemap(
        starts in prop::collection::vec((0..DISK_SECTORS_MAX, 1..1u64 << 23), 0..12)
    ) {
        let mut set = SectorSet::empty();
        let mut treemap = RoaringTreemap::new();
        for (start, count) in starts {
            let range = range(start, count.min(DISK_SECTORS_MAX - start));
            set.apply(&MapRecord { kind: RecordKind::Data, range });
            treemap.insert_range(range.start.0..range.end().0);
        }
        assert_eq!(set.data_sectors(), treemap.len());
        let (data, zero) = set.to_portable();
        assert_eq!(RoaringTreemap::deserialize_from(&data[..]).unwrap(), treemap);
        let mut theirs = Vec::new();
        treemap.serialize_into(&mut theirs).unwrap();
        assert_eq!(SectorSet::from_portable(&theirs, &zero).unwrap(), set);
    }

    #[test]
    fn foreign_bytes_are_refused_or_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(set) = SectorSet::from_portable(&bytes, &[0; 8]) {
            assert!(set.data_runs().all(|run| run.end().0 <= DISK_SECTORS_MAX + 8));
        }
    }

    #[test]
    fn damaged_bytes_are_refused_or_read_without_panic(
        operations in prop::collection::vec(operation(), 1..20),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let map = ActiveMap::new(CLUSTERS);
        for operation in &operations {
            match *operation {
                Operation::Write(range) => { let _ = map.write(range); }
                Operation::Zero(first, count) => { let _ = map.zero(Cluster(first), count); }
                _ => {}
            }
        }
        let (mut data, mut zero) = map.to_set().to_portable();
        assert!(SectorSet::from_portable(&data[..cut.index(data.len())], &zero).is_err(), "cut short");
        let long: Vec<u8> = zero.iter().copied().chain([0]).collect();
        assert!(SectorSet::from_portable(&data, &long).is_err(), "too long");
        for (index, byte) in damage {
            let all = data.len() + zero.len();
            let at = index.index(all);
            *data.iter_mut().chain(&mut zero).nth(at).unwrap() = byte;
        }
        if let Ok(set) = SectorSet::from_portable(&data, &zero) {
            let clusters = ActiveMap::from_set(CLUSTERS, &set);
            assert!((0..CLUSTERS).all(|cluster| {
                let state = clusters.get(Cluster(cluster));
                (state.data, state.zero()) == set.cluster(Cluster(cluster))
            }));
        }
    }
}

#[test]
fn a_uniform_tebibyte_costs_next_to_nothing() {
    let table = Table::new(TEBIBYTE);
    table.load_layer(LayerSlot(1), &SectorSet::everything(Sector(TEBIBYTE * 8)));
    assert_eq!(table.get(Cluster(TEBIBYTE - 1)).mask, SectorMask::ALL);
    assert!(table.memory_bytes() <= 1 << 20, "{}", table.memory_bytes());
    let map = ActiveMap::new(TEBIBYTE);
    assert_eq!(map.zero(Cluster(0), TEBIBYTE), Change::Words);
    table.refresh(LayerSlot(2), &map, Cluster(0), TEBIBYTE, Change::Words);
    assert_eq!(table.runs(Cluster(0), TEBIBYTE).count(), 1);
    assert_eq!(
        map.collect(usize::MAX).records,
        [MapRecord {
            kind: RecordKind::Zero,
            range: range(0, TEBIBYTE * 8)
        }]
    );
    assert!(table.memory_bytes() + map.memory_bytes() <= 1 << 20);
    assert_eq!(map.to_set().zero_sectors(), TEBIBYTE * 8);
}

#[test]
fn a_touched_span_costs_at_most_its_words() {
    let table = Table::new(TEBIBYTE);
    let map = ActiveMap::new(TEBIBYTE);
    let empty = (table.memory_bytes(), map.memory_bytes());
    // Every other cluster of one span: no region of it is uniform.
    for cluster in (0..SPAN_CLUSTERS).step_by(2) {
        let change = map.write(range(cluster * 8, 8));
        table.refresh(LayerSlot(1), &map, Cluster(cluster), 1, change);
    }
    let node = 512 * 8;
    assert_eq!(table.memory_bytes() - empty.0, SPAN_CLUSTERS * 4 + node);
    assert_eq!(map.memory_bytes() - empty.1, SPAN_CLUSTERS * 2 + node);
}

#[test]
fn the_worst_tebibyte_costs_its_words_and_half_a_percent() {
    /// Spans that are made as fragmented as can be.
    const SPANS: u64 = 3;
    let table = Table::new(TEBIBYTE);
    let map = ActiveMap::new(TEBIBYTE);
    let uniform = (table.memory_bytes(), map.memory_bytes());
    for region in 0..SPANS * SPAN_CLUSTERS / REGION_CLUSTERS {
        // One cluster that differs from its neighbours is as bad as all.
        let cluster = Cluster(region * REGION_CLUSTERS + region % REGION_CLUSTERS);
        let change = map.write_cluster(cluster, SectorMask(0x0f), true);
        table.refresh(LayerSlot(1), &map, cluster, 1, change);
    }
    let spans = TEBIBYTE / SPAN_CLUSTERS;
    let scaled = |now: u64, uniform: u64| uniform + (now - uniform) / SPANS * spans;
    let table_worst = scaled(table.memory_bytes(), uniform.0);
    let map_worst = scaled(map.memory_bytes(), uniform.1);
    assert_eq!(uniform, (8 << 10, (8 + 64 + 1) << 10));
    assert_eq!(table_worst, (1 << 30) + (4 << 20) + uniform.0);
    assert_eq!(map_worst, (512 << 20) + (4 << 20) + uniform.1);
    assert!(table_worst <= (1 << 30) / 200 * 201);
}

#[test]
fn only_a_state_that_is_new_concerns_the_table() {
    let map = ActiveMap::new(8);
    let part = SectorMask(0x0f);
    assert_eq!(map.write_cluster(Cluster(3), part, true), Change::Words);
    let collected = map.collect(usize::MAX);
    assert_eq!(collected.dirty, [(Cluster(3), 1)]);
    assert_eq!(collected.records.len(), 1);
    // Overwriting a dirty frame leaves no mark; making a clean one dirty does, but the journal has no business with it.
    assert_eq!(map.write_cluster(Cluster(3), part, false), Change::Nothing);
    assert!(!map.has_marks());
    assert_eq!(map.write_cluster(Cluster(3), part, true), Change::Nothing);
    assert!(map.has_marks() && map.is_journaled(Cluster(3)));
    assert_eq!(map.write_cluster(Cluster(4), part, true), Change::Words);
    let runs: Vec<_> = map.runs(Cluster(0), 8).map(|(_, count, _)| count).collect();
    assert_eq!(runs, [3, 2, 3], "flags are no part of a state");
    let collected = map.collect(usize::MAX);
    assert_eq!(collected.dirty, [(Cluster(3), 2)]);
    let fresh = MapRecord {
        kind: RecordKind::Data,
        range: range(32, 4),
    };
    assert_eq!(collected.records, [fresh]);
}

#[test]
fn zeroes_of_a_cluster_that_was_written_since_wait_for_its_data() {
    let map = ActiveMap::new(100);
    assert_eq!(map.zero(Cluster(0), 100), Change::Words);
    let _ = map.write_cluster(Cluster(50), SectorMask(1), true);
    assert_eq!(map.zero_records(Cluster(0), 100), None);
    let zero = |first: u64, count: u64| {
        Some(vec![MapRecord {
            kind: RecordKind::Zero,
            range: range(first * 8, count * 8),
        }])
    };
    assert_eq!(map.zero_records(Cluster(0), 50), zero(0, 50));
    assert_eq!(map.zero_records(Cluster(50), 50), None);
    assert_eq!(
        map.zero_records(Cluster(51), u64::MAX),
        zero(51, 49),
        "the refusal took nothing"
    );
    let collected = map.collect(usize::MAX);
    assert_eq!(collected.dirty, [(Cluster(50), 1)]);
    assert_eq!(collected.records.len(), 2, "data, and zeroes beside them");
}

#[test]
fn collections_with_a_limit_take_turns() {
    /// Regions, more than the marks of one word.
    const REGIONS: u64 = 200;
    let map = ActiveMap::new(REGIONS * REGION_CLUSTERS);
    let first = |region: u64| Cluster(region * REGION_CLUSTERS);
    let marked: BTreeSet<_> = (0..REGIONS).filter(|region| region % 3 != 2).collect();
    for region in &marked {
        let _ = map.write_cluster(first(*region), SectorMask::ALL, true);
        let _ = map.write_cluster(Cluster(first(*region).0 + 1), SectorMask::ALL, true);
    }
    let mut seen = BTreeSet::new();
    while seen.len() < marked.len() {
        // What was taken is dirty again each time; the others have their turn nevertheless.
        for region in &seen {
            map.mark_dirty(first(*region));
        }
        let collected = map.collect(3);
        let runs: Vec<_> = collected.dirty.iter().map(|(_, count)| *count).collect();
        assert_eq!(runs, [2, 2], "the third cluster brings its region");
        for (cluster, _) in &collected.dirty {
            assert!(
                seen.insert(cluster.0 / REGION_CLUSTERS),
                "none is taken twice"
            );
        }
    }
    assert_eq!(seen, marked);
    // Two thirds of the way, so that the next one goes around the end; in order for all that.
    for region in &marked {
        map.mark_dirty(first(*region));
    }
    let part = map.collect(90);
    assert!(part.more);
    for region in &marked {
        map.mark_dirty(first(*region));
    }
    let around = map.collect(100);
    assert_in_order(&around);
    assert_eq!((around.dirty.len(), around.more), (100, true));
    assert_eq!(around.dirty.first().map(|(first, _)| first.0), Some(0));
    assert!(!map.collect(usize::MAX).more && !map.has_marks());
}

#[test]
fn a_uniform_disk_is_collected_in_parts() {
    const REGIONS: u64 = 200;
    let map = ActiveMap::new(REGIONS * REGION_CLUSTERS);
    let all = Collected {
        dirty: vec![(Cluster(0), REGIONS * REGION_CLUSTERS)],
        ..Collected::default()
    };
    map.put_back(&all);
    let limit = usize::try_from(70 * REGION_CLUSTERS - 5).unwrap();
    for (at, count, more) in [(0, 70, true), (70, 70, true), (140, 60, false)] {
        let part = map.collect(limit);
        let run = (Cluster(at * REGION_CLUSTERS), count * REGION_CLUSTERS);
        assert_eq!((part.dirty, part.more), (vec![run], more));
    }
    map.put_back(&all);
    assert_eq!(map.collect(usize::MAX).dirty, all.dirty);
}

#[test]
fn overwriting_a_uniform_region_as_a_whole_needs_no_leaf() {
    let table = Table::new(4 * REGION_CLUSTERS);
    let map = ActiveMap::new(4 * REGION_CLUSTERS);
    let before = table.memory_bytes();
    let change = map.write(range(REGION_CLUSTERS * 8, REGION_CLUSTERS * 8));
    table.refresh(
        LayerSlot(3),
        &map,
        Cluster(REGION_CLUSTERS),
        REGION_CLUSTERS,
        change,
    );
    assert_eq!(table.memory_bytes() - before, 512 * 8, "a node, no leaf");
    assert_eq!(
        map.write(range(REGION_CLUSTERS * 8 + 3, 9)),
        Change::Nothing
    );
    assert_eq!(table.runs(Cluster(0), 4 * REGION_CLUSTERS).count(), 3);
}

#[test]
fn what_lies_beyond_the_end_is_left_alone() {
    let map = ActiveMap::new(SPAN_CLUSTERS + 5);
    let before = map.memory_bytes();
    assert_eq!(map.zero(Cluster(0), SPAN_CLUSTERS + 5), Change::Words);
    assert_eq!(
        map.memory_bytes() - before,
        512 * 8 + 512 * 2,
        "a node and a leaf for the last span, which is short"
    );
    assert_eq!(
        map.zero(Cluster(0), u64::MAX),
        Change::Nothing,
        "clipped at the end"
    );
    assert_eq!(
        map.collect(usize::MAX).records.first().unwrap().range.count,
        (SPAN_CLUSTERS + 5) * 8
    );
}

#[test]
fn overwriting_zeroed_sectors_of_a_full_cluster_forgets_the_zeroes() {
    let map = ActiveMap::new(1);
    assert_eq!(map.zero(Cluster(0), 1), Change::Words);
    assert_eq!(map.zero(Cluster(0), 1), Change::Nothing);
    assert_eq!(map.get(Cluster(0)), ClusterState::ZERO);
    assert_eq!(map.write(range(0, 7)), Change::Words);
    assert_eq!(map.get(Cluster(0)).zero(), SectorMask(0x80));
    assert_eq!(map.write(range(7, 1)), Change::Words);
    let full = ClusterState {
        data: SectorMask::ALL,
        rest_zero: false,
    };
    assert_eq!(map.get(Cluster(0)), full);
    assert_eq!(map.write(range(0, 8)), Change::Nothing);
}

#[test]
fn a_late_refresh_of_an_older_layer_changes_nothing() {
    let (older, newer) = (ActiveMap::new(8), ActiveMap::new(8));
    let table = Table::new(8);
    let first = older.write(range(0, 64));
    let second = newer.write(range(8, 8));
    table.refresh(LayerSlot(SLOT_MAX), &newer, Cluster(0), 8, second);
    table.refresh(LayerSlot(7), &older, Cluster(0), 8, first);
    let slots: Vec<_> = table
        .runs(Cluster(0), 8)
        .map(|run| (run.resolve.slot.0, run.count))
        .collect();
    assert_eq!(slots, [(7, 1), (SLOT_MAX, 1), (7, 6)]);
}

#[test]
#[should_panic(expected = "slot 0 is none of a layer's")]
fn slot_zero_is_refused() {
    Table::new(1).load_layer(LayerSlot::NONE, &SectorSet::empty());
}

#[test]
fn a_base_that_ends_in_a_cluster_holds_a_part_of_it() {
    let base = SectorSet::everything(Sector(19));
    assert_eq!(
        base.cluster(Cluster(2)),
        (SectorMask(0b111), SectorMask::NONE)
    );
    assert_eq!(
        base.cluster(Cluster(3)),
        (SectorMask::NONE, SectorMask::NONE)
    );
    let table = Table::new(4);
    table.load_layer(LayerSlot(1), &base);
    assert_eq!(table.get(Cluster(2)).mask, SectorMask(0b111));
    assert_eq!(table.get(Cluster(3)).slot, LayerSlot::NONE);
    let (data, zero) = base.to_portable();
    assert_eq!(SectorSet::from_portable(&data, &zero).unwrap(), base);
}

#[test]
fn terabytes_are_put_in_and_taken_out_by_runs() {
    let tebibyte = TEBIBYTE * 8;
    let mut set = SectorSet::empty();
    let mut apply = |kind, start, count| {
        set.apply(&MapRecord {
            kind,
            range: range(start, count),
        })
    };
    // In an order that would shift a list of containers most: the upper half first, then the lower one.
    apply(RecordKind::Data, tebibyte + 3, tebibyte);
    apply(RecordKind::Data, 5, tebibyte);
    apply(RecordKind::Zero, 1 << 20, 2 * tebibyte - (2 << 20));
    apply(RecordKind::Data, 0, 32 * tebibyte);
    apply(RecordKind::Zero, 0, tebibyte);
    assert_eq!(
        (set.data_sectors(), set.zero_sectors()),
        (31 * tebibyte, tebibyte)
    );
    assert_eq!(set.data_runs().count(), 1);
    let (data, zero) = set.to_portable();
    assert!(
        data.len() < 16 << 20 && zero.len() < 1 << 20,
        "{} {}",
        data.len(),
        zero.len()
    );
    assert_eq!(SectorSet::from_portable(&data, &zero).unwrap(), set);
}

#[test]
fn sets_that_cannot_be_are_refused() {
    let portable = |runs: &[(u64, u64)]| {
        let mut treemap = RoaringTreemap::new();
        for (start, count) in runs {
            treemap.insert_range(*start..*start + *count);
        }
        let mut bytes = Vec::new();
        treemap.serialize_into(&mut bytes).unwrap();
        bytes
    };
    let refused = |data: &[u8], zero: &[u8], why: &str| {
        let what = SectorSet::from_portable(data, zero).unwrap_err();
        assert!(what.contains(why), "{what}");
    };
    let empty = portable(&[]);
    refused(
        &portable(&[(0, 9)]),
        &portable(&[(8, 8)]),
        "both data and zeroes",
    );
    refused(
        &portable(&[(0, 2)]),
        &portable(&[(4, 4)]),
        "neither all nor none",
    );
    refused(
        &portable(&[(0, 4)]),
        &portable(&[(4, 4), (18, 6)]),
        "cluster 2",
    );
    assert!(SectorSet::from_portable(&portable(&[(0, 4), (14, 2)]), &portable(&[(4, 10)])).is_ok());
    refused(
        &portable(&[(DISK_SECTORS_MAX + 8, 1)]),
        &empty,
        "beyond the largest disk",
    );
    assert!(SectorSet::from_portable(&portable(&[(DISK_SECTORS_MAX + 7, 1)]), &empty).is_ok());
    refused(&empty, &[], "ends too early");
    refused(&u64::MAX.to_le_bytes(), &empty, "ends too early");
    let mut twice = portable(&[(0, 4)]);
    twice.extend_from_within(8..);
    twice[0] = 2;
    refused(&twice, &empty, "do not rise");
}
