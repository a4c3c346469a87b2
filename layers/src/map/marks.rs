//! The changed regions of a disk that can grow: one set of bits for what it had at first, and one more each time that this is
//! too short. Each is at least as large as those before together, so that there are few.

use crate::map::appended::Appended;
use crate::map::changed::ChangedRegions;
use crate::sync::{Ordering, QuietU64};

/// The marks of a disk.
#[derive(Debug)]
pub(crate) struct Marks {
    /// Those of the clusters that the disk had at first.
    first: ChangedRegions,
    /// Those of what came later.
    more: Appended<Piece>,
    /// With which piece the next limited collection begins, so that all of them have their turn.
    turn: QuietU64,
}

/// The marks of some clusters.
#[derive(Debug)]
struct Piece {
    /// The first of them.
    start: u64,
    /// Their marks.
    marks: ChangedRegions,
}

impl Marks {
    /// No mark, for this many clusters.
    pub(crate) fn new(clusters: u64) -> Self {
        Self {
            first: ChangedRegions::new(clusters),
            more: Appended::new(),
            turn: QuietU64::new(0),
        }
    }

    /// The pieces with their first clusters, in order.
    fn pieces(&self) -> impl Iterator<Item = (u64, &ChangedRegions)> {
        let more = self.more.iter().map(|piece| (piece.start, &piece.marks));
        [(0, &self.first)].into_iter().chain(more)
    }

    /// There are that many clusters from now on. One thread at a time.
    pub(crate) fn grow(&self, clusters: u64) {
        let end = self
            .pieces()
            .last()
            .map_or(0, |(start, marks)| start + marks.clusters());
        if clusters > end {
            let marks = ChangedRegions::new((clusters - end).max(end));
            self.more.push(Piece { start: end, marks });
        }
    }

    /// See [`ChangedRegions::mark`].
    pub(crate) fn mark(&self, first: u64, last: u64) {
        if last < self.first.clusters() {
            self.first.mark(first, last);
            return;
        }
        for (start, marks) in self.pieces() {
            let end = start + marks.clusters();
            if first < end && last >= start {
                marks.mark(first.max(start) - start, last.min(end - 1) - start);
            }
        }
    }

    /// See [`ChangedRegions::any`].
    pub(crate) fn any(&self) -> bool {
        self.pieces().any(|(_, marks)| marks.any())
    }

    /// See [`ChangedRegions::take`]. With a limit it begins with another piece each time.
    pub(crate) fn take(&self, limit: u64, mut each: impl FnMut(u64, u64) -> u64) -> bool {
        let count = self.pieces().count();
        if count == 1 {
            return self.first.take(limit, each);
        }
        let begin = if limit == u64::MAX {
            0
        } else {
            // ORDERING: Relaxed; one thread collects at a time, and a wrong value would be unfair and no more.
            let turn = self.turn.fetch_add(1, Ordering::Relaxed);
            usize::try_from(turn).unwrap_or(0) % count
        };
        let mut left = limit;
        let mut more = false;
        for place in (begin..count).chain(0..begin) {
            let Some((start, marks)) = self.pieces().nth(place) else {
                continue;
            };
            if left == 0 {
                more |= marks.any();
                continue;
            }
            more |= marks.take(left, |first, count| {
                let taken = each(start + first, count);
                left = left.saturating_sub(taken);
                taken
            });
        }
        more
    }

    /// Bytes of memory that the bits take.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.pieces().map(|(_, marks)| marks.memory_bytes()).sum()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::map::radix::REGION_CLUSTERS;

    /// What an unlimited collection takes.
    fn taken(marks: &Marks) -> Vec<(u64, u64)> {
        let mut taken = Vec::new();
        marks.take(u64::MAX, |first, count| {
            taken.push((first / REGION_CLUSTERS, count / REGION_CLUSTERS));
            count
        });
        taken
    }

    #[test]
    fn what_came_later_is_marked_like_the_rest() {
        let marks = Marks::new(10 * REGION_CLUSTERS);
        marks.grow(20 * REGION_CLUSTERS);
        assert_eq!(marks.pieces().count(), 1, "there is room in the first word");
        marks.grow(300 * REGION_CLUSTERS);
        marks.grow(310 * REGION_CLUSTERS);
        assert_eq!(marks.pieces().count(), 2);
        marks.mark(3 * REGION_CLUSTERS, 3 * REGION_CLUSTERS);
        marks.mark(62 * REGION_CLUSTERS, 65 * REGION_CLUSTERS);
        marks.mark(309 * REGION_CLUSTERS, 309 * REGION_CLUSTERS);
        assert!(marks.any());
        assert_eq!(taken(&marks), [(3, 1), (62, 2), (64, 2), (309, 1)]);
        assert!(!marks.any() && taken(&marks).is_empty());
    }

    #[test]
    fn every_piece_has_its_turn() {
        let marks = Marks::new(64 * REGION_CLUSTERS);
        marks.grow(128 * REGION_CLUSTERS);
        let mut seen = [0; 2];
        for _ in 0..10 {
            marks.mark(5 * REGION_CLUSTERS, 5 * REGION_CLUSTERS);
            marks.mark(100 * REGION_CLUSTERS, 100 * REGION_CLUSTERS);
            let more = marks.take(1, |first, count| {
                seen[usize::from(first / REGION_CLUSTERS > 63)] += 1;
                count
            });
            assert!(more);
        }
        assert_eq!(seen, [5, 5]);
    }
}
