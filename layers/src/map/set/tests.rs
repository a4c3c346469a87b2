//! What merging makes of sets, against a naive model: what each of two sets says about some clusters, most of them where
//! chunks of the set meet.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;

use super::SectorSet;
use crate::map::active::ClusterState;
use crate::map::record::{MapRecord, RecordKind};
use crate::units::{CLUSTER_SECTORS, Cluster, Sector, SectorMask, SectorRange};

/// Clusters of a chunk of the set.
const CHUNK: u64 = 1 << 19;
/// The first cluster that nothing is said about.
const END: u64 = 4 * CHUNK + 20;

/// The clusters that the model knows, in order.
fn known() -> impl Iterator<Item = u64> {
    (0..5).flat_map(|chunk| {
        let border = chunk * CHUNK;
        (border.saturating_sub(6)..border + 6).chain([border + CHUNK / 2])
    })
}

/// A cluster, mostly one that the model knows.
fn cluster() -> impl Strategy<Value = u64> {
    let known: Vec<u64> = known().filter(|cluster| *cluster < END).collect();
    prop_oneof![5 => prop::sample::select(known), 1 => 0..END]
}

/// Data of some sectors, or zeroes of some clusters.
fn record() -> impl Strategy<Value = MapRecord> {
    let ends = (
        cluster(),
        cluster(),
        0..9u64,
        0..9u64,
        any::<bool>(),
        0..4u8,
    );
    ends.prop_map(|(one, other, low, high, zero, near)| {
        // Near each other most of the time.
        let other = if near > 0 {
            (one + other % 4).min(END)
        } else {
            other
        };
        let (first, last) = (one.min(other), one.max(other));
        let (start, end) = if zero {
            (first * 8, (last + 1) * 8)
        } else {
            let start = first * 8 + low.min(7);
            (start, (last * 8 + high).max(start + 1))
        };
        MapRecord {
            kind: if zero {
                RecordKind::Zero
            } else {
                RecordKind::Data
            },
            range: SectorRange::new(Sector(start), end - start).unwrap(),
        }
    })
}

/// What a layer says about each known cluster: masks of data and of zeroes.
type Model = Vec<(u8, u8)>;

/// A set and its model; at times everything, as of a base.
fn set() -> impl Strategy<Value = (SectorSet, Model)> {
    let some = prop::collection::vec(record(), 0..14).prop_map(|records| {
        let (mut set, mut model) = (SectorSet::empty(), vec![(0, 0); known().count()]);
        for record in &records {
            set.apply(record);
            apply(&mut model, record);
        }
        (set, model)
    });
    let everything = (cluster(), 0..8u64).prop_map(|(cluster, sectors)| {
        let size = cluster * 8 + sectors;
        let mut model = vec![(0, 0); known().count()];
        let range = SectorRange::new(Sector(0), size).unwrap();
        apply(
            &mut model,
            &MapRecord {
                kind: RecordKind::Data,
                range,
            },
        );
        (SectorSet::everything(Sector(size)), model)
    });
    prop_oneof![5 => some, 1 => everything]
}

/// Lets a record take effect.
fn apply(model: &mut Model, record: &MapRecord) {
    for (cluster, (data, zero)) in known().zip(model) {
        for bit in 0..8 {
            let sector = cluster * 8 + bit;
            if (record.range.start.0..record.range.end().0).contains(&sector) {
                let (on, off) = match record.kind {
                    RecordKind::Data => (&mut *data, &mut *zero),
                    RecordKind::Zero => (&mut *zero, &mut *data),
                };
                *on |= 1 << bit;
                *off &= !(1 << bit);
            }
        }
    }
}

/// A set must say what the model says, asked in every way.
fn assert_says(set: &SectorSet, model: &Model) {
    let states: Vec<_> = set.states(Cluster(0), u64::MAX).collect();
    assert!(
        states
            .windows(2)
            .all(|pair| pair[0].0.0 + pair[0].1 <= pair[1].0.0)
    );
    assert!(
        states
            .iter()
            .all(|(_, count, state)| *count > 0 && !state.is_absent())
    );
    for (cluster, (data, zero)) in known().zip(model) {
        let said = set.cluster(Cluster(cluster));
        assert_eq!(
            said,
            (SectorMask(*data), SectorMask(*zero)),
            "cluster {cluster}"
        );
        assert!(*zero == 0 || *zero == !*data, "the invariant of sets");
        let state = states
            .iter()
            .find(|(first, count, _)| (first.0..first.0 + count).contains(&cluster));
        let state = state.map_or(ClusterState::ABSENT, |(.., state)| *state);
        assert_eq!(
            (state.data.0, state.zero().0),
            (*data, *zero),
            "cluster {cluster}"
        );
        let next = set.next(Cluster(cluster));
        assert_eq!(next == Some(Cluster(cluster)), (*data, *zero) != (0, 0));
        if let Some(next) = next {
            assert!(
                known()
                    .zip(model)
                    .all(|(at, said)| *said == (0, 0) || at < cluster || at >= next.0)
            );
        }
    }
    let sum = |runs: &mut dyn Iterator<Item = SectorRange>| runs.map(|run| run.count).sum::<u64>();
    assert_eq!(set.data_sectors(), sum(&mut set.data_runs()));
    assert_eq!(set.zero_sectors(), sum(&mut set.zero_runs()));
    let (data, zero) = set.to_portable();
    assert_eq!(&SectorSet::from_portable(&data, &zero).unwrap(), set);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn two_sets_together_say_what_the_upper_one_says_and_then_the_lower_one(
        (upper, upper_model) in set(),
        (lower, lower_model) in set(),
    ) {
        let both: Model = upper_model.iter().zip(&lower_model).map(|((data, zero), (below, rest))| {
            let free = !(data | zero);
            (data | below & free, zero | rest & free)
        }).collect();
        assert_says(&upper, &upper_model);
        let over = upper.over(&lower);
        assert_says(&over, &both);
        let under = lower.under(&upper);
        prop_assert_eq!(upper.data_sectors() + under.data_sectors(), over.data_sectors());
        prop_assert_eq!(upper.zero_sectors() + under.zero_sectors(), over.zero_sectors());
        prop_assert_eq!(under.is_empty(), over == upper);
        for ((cluster, (data, zero)), (below, rest)) in known().zip(&upper_model).zip(&lower_model) {
            let mask = |runs: &mut dyn Iterator<Item = SectorRange>| {
                runs.flat_map(|run| run.start.0..run.end().0).fold(0u8, |mask, sector| mask | 1 << (sector % 8))
            };
            let free = !(data | zero);
            let here = Cluster(cluster);
            prop_assert_eq!(mask(&mut under.data_runs(here, 1)), below & free);
            prop_assert_eq!(mask(&mut under.zero_runs(here, 1)), rest & free);
            prop_assert_eq!(under.next(here) == Some(here), (below | rest) & free != 0);
        }
        // Moved step by step: what is gained above is lost below, and together they say the same all the time.
        let (mut above, mut left) = (upper.clone(), lower.clone());
        for (first, count) in [(0, CHUNK - 3), (CHUNK - 3, 4), (CHUNK + 1, 2 * CHUNK), (3 * CHUNK + 1, u64::MAX)] {
            let first = Cluster(first);
            let gained = above.within(first, count).over(&left.within(first, count));
            above = above.with(first, count, &gained);
            prop_assert_eq!(&above.over(&left), &over);
            left = left.without(first, count);
            prop_assert_eq!(&above.over(&left), &over);
        }
        prop_assert_eq!(above, over);
        prop_assert_eq!(left, SectorSet::empty());
    }

    #[test]
    fn parts_of_a_set_are_cut_at_clusters(
        (set, model) in set(),
        (other, other_model) in set(),
        one in cluster(),
        two in cluster(),
        count in prop_oneof![4 => 0..9u64, 1 => 0..END, 1 => Just(u64::MAX)],
    ) {
        let first = one.min(two);
        let inside = |cluster: u64| cluster >= first && cluster - first < count;
        let part = |keep: &dyn Fn(u64) -> bool, model: &Model| -> Model {
            known().zip(model).map(|(cluster, said)| if keep(cluster) { *said } else { (0, 0) }).collect()
        };
        let within = set.within(Cluster(first), count);
        assert_says(&within, &part(&inside, &model));
        let without = set.without(Cluster(first), count);
        assert_says(&without, &part(&|cluster| !inside(cluster), &model));
        prop_assert_eq!(within.data_sectors() + without.data_sectors(), set.data_sectors());
        let with = without.with(Cluster(first), count, &set);
        prop_assert_eq!(with, set.clone());
        let mixed: Model = known().zip(&model).zip(&other_model)
            .map(|((cluster, mine), theirs)| if inside(cluster) { *theirs } else { *mine })
            .collect();
        assert_says(&set.with(Cluster(first), count, &other), &mixed);
        prop_assert!(within.data_runs().eq(set.data_runs_in(Cluster(first), count)));
        prop_assert!(within.states(Cluster(0), u64::MAX).eq(set.states(Cluster(first), count)));
    }
}

#[test]
fn a_step_of_a_large_set_copies_only_what_it_touches() {
    // A cluster in two of 64 TiB would take minutes, if each step copied all of it.
    let mut set = SectorSet::empty();
    for chunk in 0..64u64 {
        for cluster in (0..CHUNK / 16).step_by(2) {
            set.apply(&MapRecord {
                kind: RecordKind::Data,
                range: SectorRange::new(Sector((chunk * CHUNK + cluster) * CLUSTER_SECTORS), 8)
                    .unwrap(),
            });
        }
    }
    let began = std::time::Instant::now();
    let mut left = set.clone();
    for step in 0..1000 {
        left = left.without(Cluster(step * 1000), 1000);
    }
    assert!(
        began.elapsed() < std::time::Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
    assert!(left.data_sectors() < set.data_sectors());
}
