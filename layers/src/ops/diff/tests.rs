//! The ranges against a look at each sector.

use proptest::prelude::*;

use super::*;
use crate::map::{MapRecord, RecordKind};
use crate::units::SectorRange;

/// Sectors of the disks here.
const SECTORS: u64 = 200;

/// The records of a layer: a kind, a start, a length.
type Records = Vec<(bool, u64, u64)>;

fn set(records: &Records) -> SectorSet {
    let mut set = SectorSet::empty();
    for (zero, start, count) in records {
        let kind = if *zero {
            RecordKind::Zero
        } else {
            RecordKind::Data
        };
        let range = SectorRange::new(Sector(*start), *count).unwrap();
        set.apply(&MapRecord { kind, range });
    }
    set
}

/// What a layer holds, sector by sector: whether it is zeroes.
fn flat(records: &Records) -> Vec<Option<bool>> {
    let mut flat = vec![None; 512];
    for (zero, start, count) in records {
        let (start, count) = (
            usize::try_from(*start).unwrap(),
            usize::try_from(*count).unwrap(),
        );
        flat[start..start + count].fill(Some(*zero));
    }
    flat
}

fn layers() -> impl Strategy<Value = Vec<Records>> {
    let record = (any::<bool>(), 0..SECTORS, 1..40u64);
    prop::collection::vec(prop::collection::vec(record, 0..6), 0..4)
}

proptest! {
    #[test]
    fn ranges_are_what_a_look_at_each_sector_finds(
        to_side in layers(),
        from_side in layers(),
        common in layers(),
        from in 1..SECTORS,
        to in 1..SECTORS,
    ) {
        let mut ranges = Ranges::default();
        to_side.iter().for_each(|records| ranges.above_to(&set(records)));
        from_side.iter().for_each(|records| ranges.above_from(&set(records)));
        ranges.sized(Sector(from), Sector(to));
        for records in &common {
            if ranges.is_resolved() {
                break;
            }
            ranges.below_both(&set(records));
        }
        let found = ranges.into_ranges();

        let flats = |layers: &[Records]| layers.iter().map(flat).collect::<Vec<_>>();
        let (above_to, above_from, below) = (flats(&to_side), flats(&from_side), flats(&common));
        let mut expected = Vec::<DiffRange>::new();
        for at in 0..from.max(to) {
            let index = usize::try_from(at).unwrap();
            let touched = above_to.iter().chain(&above_from).any(|flat| flat[index].is_some());
            if !touched && at < from.min(to) {
                continue;
            }
            let held = above_to.iter().chain(&below).find_map(|flat| flat[index]);
            let zero = at >= to || held.unwrap_or(true);
            match expected.last_mut() {
                Some(last) if last.range.end() == Sector(at) && last.zero == zero => last.range.count += 1,
                _ => expected.push(DiffRange {
                    range: SectorRange::new(Sector(at), 1).unwrap(),
                    zero,
                }),
            }
        }
        prop_assert_eq!(found, expected);
    }
}
