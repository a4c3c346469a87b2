//! What differs, from the sets of layers.

use crate::lifecycle::DiffRange;
use crate::map::SectorSet;
use crate::map::sectors::Sectors;
use crate::units::{Sector, SectorRange};

/// The sectors that may differ, and those of them that are certainly zeroes at the second point. Shown first the layers that
/// only the second point has and those that only the first has, then the sizes, then the layers that both have; each
/// from the top down. Costs by the runs that it is shown.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    /// What differs.
    changed: Sectors,
    /// What layers of the second point were seen to hold.
    held: Sectors,
    /// What is zeroes at the second point.
    zero: Sectors,
    /// What differs, and no layer of the second point was seen to hold yet.
    open: Sectors,
}

impl Ranges {
    /// A layer that only the second point has.
    pub fn above_to(&mut self, set: &SectorSet) {
        let mut zero = Sectors::default();
        set.zero_runs().for_each(|run| zero.insert(run));
        // What newer layers hold hides it.
        for run in zero.minus(&self.held).runs() {
            self.zero.insert(run);
        }
        for run in held(set) {
            self.held.insert(run);
            self.changed.insert(run);
        }
    }

    /// A layer that only the first point has.
    pub fn above_from(&mut self, set: &SectorSet) {
        for run in held(set) {
            self.changed.insert(run);
        }
    }

    /// The sizes of the disks.
    pub fn sized(&mut self, from: Sector, to: Sector) {
        let (smaller, larger) = (from.min(to), from.max(to));
        self.changed.insert(run(smaller, larger));
        self.changed.remove(run(larger, Sector(u64::MAX)));
        // Sectors that the disk does not have.
        self.zero.insert(run(to, larger.max(to)));
        self.held.insert(run(to, larger.max(to)));
        self.open = self.changed.minus(&self.held);
    }

    /// A layer that both have.
    pub fn below_both(&mut self, set: &SectorSet) {
        let mut zero = Sectors::default();
        set.zero_runs().for_each(|run| zero.insert(run));
        let elsewhere = zero.minus(&self.open);
        for run in zero.minus(&elsewhere).runs() {
            self.zero.insert(run);
        }
        for run in held(set) {
            self.open.remove(run);
        }
    }

    /// Whether more layers would say nothing more.
    pub fn is_resolved(&self) -> bool {
        self.open.len() == 0
    }

    /// What differs, in order.
    pub fn into_ranges(mut self) -> Vec<DiffRange> {
        // What nobody holds.
        for run in self.open.runs() {
            self.zero.insert(run);
        }
        let other = self.changed.minus(&self.zero);
        let zero = self.changed.minus(&other);
        let kind = |zero| move |range| DiffRange { range, zero };
        let mut ranges = Vec::new();
        let mut other = other.runs().map(kind(false)).peekable();
        for next in zero.runs().map(kind(true)) {
            while let Some(before) = other.next_if(|it| it.range.start < next.range.start) {
                ranges.push(before);
            }
            ranges.push(next);
        }
        ranges.extend(other);
        ranges
    }
}

/// All runs that a layer holds.
fn held(set: &SectorSet) -> impl Iterator<Item = SectorRange> {
    set.data_runs().chain(set.zero_runs())
}

/// The run from one sector to another.
fn run(from: Sector, to: Sector) -> SectorRange {
    SectorRange {
        start: from,
        count: to.0.saturating_sub(from.0),
    }
}
