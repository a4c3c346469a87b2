//! What merging two layers makes of their sets.
//!
//! Of an upper and a lower layer, a sector is what the upper one says if it says anything, else what the lower one says. Both
//! keep the invariant of [`SectorSet`] cluster by cluster: an upper one with zeroes says something about all sectors; one
//! without leaves the zeroes to the lower one, whose are all that is not its data.

use std::borrow::Cow;

use super::{Held, SectorSet};
use crate::map::active::ClusterState;
use crate::map::record::cluster_parts;
use crate::map::sectors::Sectors;
use crate::units::{CLUSTER_SECTORS, Cluster, Sector, SectorMask, SectorRange};

/// What of a lower layer is seen through the one above it. Not a set of a layer: of a cluster whose upper part is hidden, some
/// sectors may be zeroes and others neither.
#[derive(Clone, Debug)]
pub struct Exposed {
    /// The data.
    data: Sectors,
    /// The zeroes.
    zero: Sectors,
}

impl Exposed {
    /// How many sectors are data.
    pub fn data_sectors(&self) -> u64 {
        self.data.len()
    }

    /// How many sectors are zeroes.
    pub fn zero_sectors(&self) -> u64 {
        self.zero.len()
    }

    /// Whether nothing is seen.
    pub fn is_empty(&self) -> bool {
        self.data_sectors() == 0 && self.zero_sectors() == 0
    }

    /// The runs of data in `count` clusters from `first`, in order.
    pub fn data_runs(&self, first: Cluster, count: u64) -> impl Iterator<Item = SectorRange> {
        self.data.runs_in(sectors(first, count))
    }

    /// The runs of zeroes in `count` clusters from `first`, in order.
    pub fn zero_runs(&self, first: Cluster, count: u64) -> impl Iterator<Item = SectorRange> {
        self.zero.runs_in(sectors(first, count))
    }

    /// The first cluster from `from` on of which anything is seen.
    pub fn next(&self, from: Cluster) -> Option<Cluster> {
        let rest = sectors(from, u64::MAX);
        first_of(self.data.runs_in(rest), self.zero.runs_in(rest))
    }
}

/// The sectors of some clusters.
fn sectors(first: Cluster, count: u64) -> SectorRange {
    SectorRange {
        start: Sector(first.0.saturating_mul(CLUSTER_SECTORS)),
        count: count.saturating_mul(CLUSTER_SECTORS),
    }
}

/// The cluster of the first sector of either kind.
fn first_of(
    mut data: impl Iterator<Item = SectorRange>,
    mut zero: impl Iterator<Item = SectorRange>,
) -> Option<Cluster> {
    let starts = [data.next(), zero.next()].into_iter().flatten();
    starts.map(|run| run.start.cluster()).min()
}

impl SectorSet {
    /// Data and zeroes, written out.
    fn kinds(&self) -> (Cow<'_, Sectors>, Cow<'_, Sectors>) {
        match &self.held {
            Held::Some { data, zero } => (Cow::Borrowed(data), Cow::Borrowed(zero)),
            Held::Everything(size) => {
                let mut data = Sectors::default();
                data.insert(SectorRange {
                    start: Sector(0),
                    count: size.0,
                });
                (Cow::Owned(data), Cow::Owned(Sectors::default()))
            }
        }
    }

    /// What this set and a lower one hold together.
    #[must_use]
    pub fn over(&self, lower: &Self) -> Self {
        let ((data, zero), (lower_data, lower_zero)) = (self.kinds(), lower.kinds());
        Self::of(
            data.union(&lower_data.minus(&zero)),
            zero.union(&lower_zero.minus(&data)),
        )
    }

    /// What of this set an upper one does not hide.
    pub fn under(&self, upper: &Self) -> Exposed {
        let ((data, zero), (upper_data, upper_zero)) = (self.kinds(), upper.kinds());
        Exposed {
            data: data.minus(&upper_data).minus(&upper_zero),
            zero: zero.minus(&upper_data).minus(&upper_zero),
        }
    }

    /// What lies in `count` clusters from `first`.
    #[must_use]
    pub fn within(&self, first: Cluster, count: u64) -> Self {
        let (range, (data, zero)) = (sectors(first, count), self.kinds());
        Self::of(data.within(range), zero.within(range))
    }

    /// What lies outside of `count` clusters from `first`.
    #[must_use]
    pub fn without(&self, first: Cluster, count: u64) -> Self {
        let (range, (data, zero)) = (sectors(first, count), self.kinds());
        let (mut data, mut zero) = (data.into_owned(), zero.into_owned());
        data.remove(range);
        zero.remove(range);
        Self::of(data, zero)
    }

    /// This set, but what `other` holds in `count` clusters from `first`.
    #[must_use]
    pub fn with(&self, first: Cluster, count: u64, other: &Self) -> Self {
        let (rest, other) = (self.without(first, count), other.within(first, count));
        let ((data, zero), (other_data, other_zero)) = (rest.kinds(), other.kinds());
        Self::of(data.union(&other_data), zero.union(&other_zero))
    }

    /// The runs of data in a range.
    fn data_in(&self, range: SectorRange) -> impl Iterator<Item = SectorRange> {
        let (all, some) = match &self.held {
            Held::Everything(size) => {
                let end = range.start.0.saturating_add(range.count).min(size.0);
                let count = end.saturating_sub(range.start.0);
                let start = range.start;
                (
                    Some(SectorRange { start, count }).filter(|all| all.count > 0),
                    None,
                )
            }
            Held::Some { data, .. } => (None, Some(data.runs_in(range))),
        };
        all.into_iter().chain(some.into_iter().flatten())
    }

    /// The runs of zeroes in a range.
    fn zero_in(&self, range: SectorRange) -> impl Iterator<Item = SectorRange> {
        let some = match &self.held {
            Held::Everything(_) => None,
            Held::Some { zero, .. } => Some(zero.runs_in(range)),
        };
        some.into_iter().flatten()
    }

    /// The runs of data in `count` clusters from `first`, in order.
    pub fn data_runs_in(&self, first: Cluster, count: u64) -> impl Iterator<Item = SectorRange> {
        self.data_in(sectors(first, count))
    }

    /// The first cluster from `from` on of which it says anything.
    pub fn next(&self, from: Cluster) -> Option<Cluster> {
        let rest = sectors(from, u64::MAX);
        first_of(self.data_in(rest), self.zero_in(rest))
    }

    /// The clusters among `count` from `first` of which it says anything, in runs of one state, in order: the first, how many,
    /// the state.
    pub fn states(
        &self,
        first: Cluster,
        count: u64,
    ) -> impl Iterator<Item = (Cluster, u64, ClusterState)> {
        let range = sectors(first, count);
        let mut data = self.data_in(range).flat_map(cluster_parts).peekable();
        let mut zero = self.zero_in(range).flat_map(cluster_parts).peekable();
        std::iter::from_fn(move || {
            let next = [data.peek(), zero.peek()].into_iter().flatten();
            let part = *next.min_by_key(|part| part.first)?;
            let (data_mask, zero_mask) = if part.mask != SectorMask::ALL {
                while data.next_if(|next| next.first == part.first).is_some() {}
                while zero.next_if(|next| next.first == part.first).is_some() {}
                self.cluster(part.first)
            } else if data.next_if_eq(&part).is_some() {
                (SectorMask::ALL, SectorMask::NONE)
            } else {
                zero.next();
                (SectorMask::NONE, SectorMask::ALL)
            };
            let state = ClusterState {
                data: data_mask,
                rest_zero: zero_mask != SectorMask::NONE,
            };
            Some((part.first, part.count, state))
        })
    }
}
