//! The files of an active layer, brought to the size that the catalog says its disk has, and its map to the type of the volume.
//!
//! A layer's map says how large its disk is, and so does the catalog. Where they differ, a change of size was interrupted and
//! the catalog is right. The difference is made up for when the layer is next opened, before anything is appended to its map.
//!
//! What a disk gains must read as zeroes, also where a layer below is larger than the disk was: the active layer then says so.
//! The last cluster of the disk may be cut short. Nobody can zero a part of a cluster in a map, so the rest of it is data:
//! the file holds zeroes there, which is true of every active layer from its birth on and made true again when a disk shrinks.

use crate::catalog::LayerRow;
use crate::error::Result;
use crate::file::OpenMode;
use crate::map::{MapRecord, RecordKind, SectorSet};
use crate::mapfile::{MapFile, MapHeader, MapState, data_path};
use crate::store::Store;
use crate::units::{
    CLUSTER_BYTES, CLUSTER_SECTORS, Cluster, LayerId, SECTOR_BYTES, Sector, SectorMask, SectorRange,
};

use super::open::clusters;

/// What an active layer has to say about the sectors that its disk gains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Gained {
    /// The rest of the cluster that was cut short: data, which are zeroes.
    pub tail: Option<SectorRange>,
    /// Clusters that are zeroed, as far as a layer below is larger.
    pub zeroed: Option<SectorRange>,
}

impl Gained {
    /// What there is to say when a disk of `old` sectors gets `new`, and the largest layer below has `below`.
    pub fn of(old: Sector, new: Sector, below: Sector) -> Self {
        if below <= old {
            return Self::default();
        }
        let first = padded(old);
        Self {
            tail: run(old.0, first),
            zeroed: run(first, padded(new.min(below))),
        }
    }

    /// The same as records for a map.
    pub fn records(&self) -> impl Iterator<Item = MapRecord> {
        let record = |kind| move |range| MapRecord { kind, range };
        let tail = self.tail.map(record(RecordKind::Data));
        tail.into_iter()
            .chain(self.zeroed.map(record(RecordKind::Zero)))
    }
}

/// The end of the cluster that a disk of this size ends in.
fn padded(size: Sector) -> u64 {
    size.0.next_multiple_of(CLUSTER_SECTORS)
}

/// The sectors from `start` up to `end`, if there are any.
fn run(start: u64, end: u64) -> Option<SectorRange> {
    let count = end.checked_sub(start).filter(|count| *count > 0)?;
    SectorRange::new(Sector(start), count)
}

/// What is left of a set on a disk of this size. Of data nothing stays behind the end: it would be looked for there, although
/// no merge moves it. Zeroes go on to the end of the last cluster, which has them in all sectors without data or in none.
pub(crate) fn cut(set: &SectorSet, size: Sector) -> SectorSet {
    let (last, tail) = (size.cluster(), size.index_in_cluster());
    let has_zeroes = tail > 0 && set.cluster(last).1 != SectorMask::NONE;
    let mut left = SectorSet::empty();
    let kinds = [
        (
            RecordKind::Data,
            set.data_runs().collect::<Vec<_>>(),
            size.0,
        ),
        (RecordKind::Zero, set.zero_runs().collect(), padded(size)),
    ];
    for (kind, runs, end) in kinds {
        let inside = runs
            .into_iter()
            .filter_map(|range| run(range.start.0, range.end().0.min(end)));
        inside.for_each(|range| left.apply(&MapRecord { kind, range }));
    }
    if let Some(range) = run(size.0, padded(size)).filter(|_| has_zeroes) {
        let kind = RecordKind::Zero;
        left.apply(&MapRecord { kind, range });
    }
    left
}

impl Store {
    /// Brings the map and the data of an active layer that was just opened to the size of its row, and the map to the type of
    /// its volume.
    ///
    /// DURABILITY: the data file is long enough and its tail is zeroes before the map says so; the map is replaced whole. A
    /// crash at any point leaves what this function makes up for when it is called again.
    ///
    /// # Errors
    /// `Io`.
    pub(crate) fn fit(
        &self,
        row: &LayerRow,
        map: MapFile,
        mut header: MapHeader,
        mut set: SectorSet,
    ) -> Result<(MapFile, MapHeader, SectorSet)> {
        if header.state != MapState::Active {
            return Ok((map, header, set));
        }
        let kind = {
            let inner = self.inner();
            let volume = inner.catalog.state().active_of(row.id);
            volume.map(|volume| volume.kind)
        };
        let kind = kind.unwrap_or(header.volume_kind);
        if header.size == row.size && header.volume_kind == kind {
            return Ok((map, header, set));
        }
        header.volume_kind = kind;
        if header.size == row.size {
            let map = map.replace(&self.media, &header, &set)?;
            return Ok((map, header, set));
        }
        if header.size > row.size {
            self.clear_tail(row.id, row.size)?;
            set = cut(&set, row.size);
        } else {
            let gained = Gained::of(header.size, row.size, self.largest_below(row.id));
            self.lengthen(row.id, header.size, row.size)?;
            gained.records().for_each(|record| set.apply(&record));
        }
        self.maintenance.note(format!(
            "layer {} of volume {}: its disk has {} sectors now and had {}; finished what was interrupted",
            row.id, header.volume, row.size, header.size
        ));
        header.size = row.size;
        let map = map.replace(&self.media, &header, &set)?;
        Ok((map, header, set))
    }

    /// The size of the largest layer below one.
    pub(crate) fn largest_below(&self, layer: LayerId) -> Sector {
        let inner = self.inner();
        let chain = inner.catalog.state().chain_of(layer);
        let below = chain.iter().filter(|row| row.id != layer);
        below.map(|row| row.size).max().unwrap_or_default()
    }

    /// Makes the data file of an active layer long enough for a larger disk, with zeroes in the rest of the cluster that the
    /// smaller one ended in. Durable on return.
    ///
    /// # Errors
    /// `Io`; what the smaller disk holds is unharmed.
    pub(crate) fn lengthen(&self, layer: LayerId, old: Sector, new: Sector) -> Result<()> {
        let path = data_path(layer);
        // Buffered, whatever the guests' transfers are: what is written here is no whole block.
        let file = self
            .media
            .open(&path, OpenMode::ReadWrite, false)
            .map_err(self.io("open", &path))?;
        let wanted = clusters(new) * CLUSTER_BYTES;
        if file.len().map_err(self.io("stat", &path))? < wanted {
            file.set_len(wanted)
                .map_err(self.io("set the length of", &path))?;
        }
        drop(file);
        self.clear_tail(layer, old)
    }

    /// Puts zeroes behind the end of a disk in its last cluster, in the file of its active layer and in the cache. Durable on
    /// return.
    ///
    /// # Errors
    /// `Io`.
    pub(crate) fn clear_tail(&self, layer: LayerId, size: Sector) -> Result<()> {
        let path = data_path(layer);
        let file = self
            .media
            .open(&path, OpenMode::ReadWrite, false)
            .map_err(self.io("open", &path))?;
        if let Some(tail) = run(size.0, padded(size)) {
            let zeroes = vec![0; usize::try_from(tail.count * SECTOR_BYTES).unwrap_or(0)];
            file.write_at(&zeroes, tail.start.0 * SECTOR_BYTES)
                .map_err(self.io("write", &path))?;
            let number = self.cache.number(layer)?;
            let inside = SectorMask::span(0, size.index_in_cluster());
            self.cache
                .trim(number, Cluster(size.0 / CLUSTER_SECTORS), 1, |_| inside);
        }
        file.sync_data().map_err(self.io("sync", &path))
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]
    use super::*;

    fn range(start: u64, end: u64) -> SectorRange {
        run(start, end).unwrap()
    }

    #[test]
    fn what_is_gained_is_hidden_as_far_as_a_layer_below_is_larger() {
        let gained = |old, new, below| Gained::of(Sector(old), Sector(new), Sector(below));
        assert_eq!(gained(80, 160, 80), Gained::default());
        assert_eq!(gained(80, 160, 40), Gained::default());
        let all = gained(80, 160, 800);
        assert_eq!((all.tail, all.zeroed), (None, Some(range(80, 160))));
        let part = gained(80, 160, 97);
        assert_eq!((part.tail, part.zeroed), (None, Some(range(80, 104))));
        let cut = gained(83, 161, 800);
        assert_eq!(
            (cut.tail, cut.zeroed),
            (Some(range(83, 88)), Some(range(88, 168)))
        );
        let inside = gained(83, 85, 84);
        assert_eq!((inside.tail, inside.zeroed), (Some(range(83, 88)), None));
    }

    #[test]
    fn a_set_is_cut_behind_the_last_cluster() {
        let mut set = SectorSet::empty();
        let mut expected = SectorSet::empty();
        for (kind, (start, end), left) in [
            (RecordKind::Data, (0, 3), Some((0, 3))),
            (RecordKind::Zero, (16, 800), Some((16, 88))),
            (RecordKind::Data, (80, 86), Some((80, 83))),
            (RecordKind::Data, (100, 200), None),
        ] {
            set.apply(&MapRecord {
                kind,
                range: range(start, end),
            });
            if let Some((start, end)) = left {
                expected.apply(&MapRecord {
                    kind,
                    range: range(start, end),
                });
            }
        }
        // The rest of the cluster that has zeroes.
        expected.apply(&MapRecord {
            kind: RecordKind::Zero,
            range: range(83, 88),
        });
        assert_eq!(cut(&set, Sector(83)), expected);
        let mut behind = SectorSet::empty();
        behind.apply(&MapRecord {
            kind: RecordKind::Data,
            range: range(85, 87),
        });
        assert_eq!(cut(&behind, Sector(83)), SectorSet::empty());
        assert_eq!(cut(&set, Sector(800)), set);
    }
}
