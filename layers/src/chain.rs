//! The layers of one volume at one time, immutable, published by pointer.
//!
//! A chain is sparse: a layer that goes leaves a gap, since words of the resolve table name slots. Slots are never given out
//! again while the volume is open.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::file::FileToken;
use crate::layer::Layer;
use crate::limits::SLOT_MAX;
use crate::units::{Generation, LayerId, LayerNumber, LayerSlot};

/// The layers of a volume from the base to the active one, each in a slot of its own.
#[derive(Debug)]
pub struct Chain {
    /// The first generation in which writes go to this chain's active layer.
    generation: Generation,
    /// Oldest first, without gaps.
    layers: Vec<Arc<Layer>>,
    /// Their slots, which rise.
    slots: Vec<LayerSlot>,
    /// The newest slot that was ever given out.
    last: LayerSlot,
    /// What a read needs of the layer in slot n, at n - 1, without a look at the layer itself, so that reads that hop between
    /// a thousand layers stay in the processor's cache.
    places: Vec<Option<Place>>,
    /// The lowest slot whose layer was not sealed when the chain was made: a flush covers it and all above.
    first_unsealed: LayerSlot,
}

/// Where the data of a layer is.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Its data file.
    file: FileToken,
    /// Its number in the sector cache.
    number: LayerNumber,
}

/// Where a slot is in a list without gaps; `None` for slot 0.
fn index(slot: LayerSlot) -> Option<usize> {
    usize::try_from(slot.0).ok()?.checked_sub(1)
}

impl Chain {
    /// A chain of these layers, oldest first, in slots from 1; there is at least one, and the last is active. There are
    /// never more than fit: each has a number in the sector cache.
    pub fn new(generation: Generation, layers: Vec<Arc<Layer>>) -> Self {
        let slots = (1..).map(LayerSlot).take(layers.len()).collect();
        Self::of(generation, layers, slots, LayerSlot::NONE)
    }

    /// A chain of these layers in these slots.
    fn of(
        generation: Generation,
        layers: Vec<Arc<Layer>>,
        slots: Vec<LayerSlot>,
        last: LayerSlot,
    ) -> Self {
        debug_assert!(!layers.is_empty() && layers.len() == slots.len());
        debug_assert!(slots.iter().zip(slots.iter().skip(1)).all(|(a, b)| a < b));
        let top = slots.last().copied().unwrap_or(LayerSlot::NONE);
        let mut places = vec![None; usize::try_from(top.0).unwrap_or(0)];
        for (slot, layer) in slots.iter().zip(&layers) {
            if let Some(place) = index(*slot).and_then(|index| places.get_mut(index)) {
                *place = Some(Place {
                    file: layer.data().token(),
                    number: layer.number(),
                });
            }
        }
        let mut unsealed = slots.iter().zip(&layers);
        let first_unsealed = unsealed
            .find(|(_, layer)| !layer.is_sealed())
            .map_or(LayerSlot(top.0.saturating_add(1)), |(slot, _)| *slot);
        Self {
            generation,
            layers,
            slots,
            last: last.max(top),
            places,
            first_unsealed,
        }
    }

    /// The first generation in which writes go to this chain's active layer.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The layer in a slot; `None` for gaps, slot 0 and slots newer than this chain.
    pub fn layer(&self, slot: LayerSlot) -> Option<&Arc<Layer>> {
        self.layers.get(self.slots.binary_search(&slot).ok()?)
    }

    /// The data file of the layer in a slot; `None` as for `layer`.
    pub fn file(&self, slot: LayerSlot) -> Option<FileToken> {
        Some(self.place(slot)?.file)
    }

    /// The cache's number of the layer in a slot; `None` as for `layer`.
    #[inline]
    pub fn number(&self, slot: LayerSlot) -> Option<LayerNumber> {
        Some(self.place(slot)?.number)
    }

    /// Whether a slot has a layer.
    #[inline]
    pub fn has(&self, slot: LayerSlot) -> bool {
        self.place(slot).is_some()
    }

    /// Where the data of a slot's layer is.
    #[inline]
    fn place(&self, slot: LayerSlot) -> Option<Place> {
        *self.places.get(index(slot)?)?
    }

    /// The slot of a layer.
    pub fn slot_of(&self, layer: LayerId) -> Option<LayerSlot> {
        let mut slots = self.slots();
        slots
            .find(|(_, has)| has.id() == layer)
            .map(|(slot, _)| slot)
    }

    /// The slot of the active layer.
    pub fn active_slot(&self) -> LayerSlot {
        self.slots.last().copied().unwrap_or(LayerSlot::NONE)
    }

    /// The active layer.
    pub fn active(&self) -> Option<&Arc<Layer>> {
        self.layers.last()
    }

    /// Whether the layer in a slot was sealed when the chain was made, so that its words in the resolve table are final: only
    /// a merge changes them, which keeps everything that they lead to until nobody can have seen them any more.
    #[inline]
    pub fn was_sealed(&self, slot: LayerSlot) -> bool {
        slot < self.first_unsealed
    }

    /// The layers that a flush has to look at, oldest first; those sealed since are among them and have nothing to do.
    pub fn unsealed(&self) -> impl Iterator<Item = &Arc<Layer>> {
        let skip = self
            .slots
            .partition_point(|slot| *slot < self.first_unsealed);
        self.layers.iter().skip(skip)
    }

    /// All layers, oldest first.
    pub fn layers(&self) -> &[Arc<Layer>] {
        &self.layers
    }

    /// All layers with their slots, oldest first.
    pub fn slots(&self) -> impl DoubleEndedIterator<Item = (LayerSlot, &Arc<Layer>)> {
        self.slots.iter().copied().zip(&self.layers)
    }

    /// The layers from a slot downwards, that one's own first.
    pub fn downwards(&self, slot: LayerSlot) -> impl Iterator<Item = (LayerSlot, &Arc<Layer>)> {
        let count = self.slots.partition_point(|below| *below <= slot);
        self.slots().rev().skip(self.layers.len() - count)
    }

    /// The slot of the next layer.
    ///
    /// # Errors
    /// `Busy` if all have been given out since the volume was opened.
    pub fn next_slot(&self) -> Result<LayerSlot> {
        if self.last.0 >= SLOT_MAX {
            return Err(Error::Busy {
                what: format!(
                    "the volume has had {SLOT_MAX} layers since it was opened, and no more fit: detach it from its \
                     VM and attach it again"
                ),
            });
        }
        Ok(LayerSlot(self.last.0 + 1))
    }

    /// This chain with one more layer on top, to be written to from `generation` on.
    ///
    /// # Errors
    /// As `next_slot`.
    pub fn with_active(&self, generation: Generation, active: Arc<Layer>) -> Result<Self> {
        let slot = self.next_slot()?;
        let (mut layers, mut slots) = (self.layers.clone(), self.slots.clone());
        layers.push(active);
        slots.push(slot);
        Ok(Self::of(generation, layers, slots, slot))
    }

    /// This chain, as its layers are now: those sealed since count as sealed.
    #[must_use]
    pub fn again(&self) -> Self {
        let (layers, slots) = (self.layers.clone(), self.slots.clone());
        Self::of(self.generation, layers, slots, self.last)
    }

    /// This chain without some layers, whose slots become gaps. No word of the resolve table names them any more, and the
    /// active layer is none of them.
    #[must_use]
    pub fn without(&self, gone: &[LayerId]) -> Self {
        let stays = |layer: &Arc<Layer>| !gone.contains(&layer.id());
        debug_assert!(self.active().is_some_and(stays));
        let (slots, layers) = self
            .slots()
            .filter(|(_, layer)| stays(layer))
            .map(|(slot, layer)| (slot, Arc::clone(layer)))
            .unzip();
        Self::of(self.generation, layers, slots, self.last)
    }

    /// This chain with another layer in a slot that has one. What the words of the resolve table say about the slot holds for
    /// it as well.
    #[must_use]
    pub fn with_replaced(&self, slot: LayerSlot, layer: &Arc<Layer>) -> Self {
        debug_assert!(self.has(slot));
        let layers = self
            .slots()
            .map(|(at, old)| Arc::clone(if at == slot { layer } else { old }))
            .collect();
        Self::of(self.generation, layers, self.slots.clone(), self.last)
    }
}

/// The chain in force and the one that the clock will bring into force. Both are the same most of the time.
#[derive(Debug)]
pub struct ChainPair {
    /// In force before `next.generation()`.
    previous: Arc<Chain>,
    /// In force from its generation on.
    next: Arc<Chain>,
}

impl ChainPair {
    /// One chain, for all generations.
    pub fn settled(chain: Arc<Chain>) -> Self {
        Self {
            previous: Arc::clone(&chain),
            next: chain,
        }
    }

    /// `next` takes over from the chain in force as soon as the clock reaches its generation.
    pub fn pending(&self, next: Arc<Chain>) -> Self {
        Self {
            previous: Arc::clone(&self.next),
            next,
        }
    }

    /// The chain in force in `generation`.
    pub fn at(&self, generation: Generation) -> &Arc<Chain> {
        if generation >= self.next.generation() {
            &self.next
        } else {
            &self.previous
        }
    }

    /// The newest chain, whether in force or not: it knows every slot that a resolve table can hold.
    pub fn newest(&self) -> &Arc<Chain> {
        &self.next
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::catalog::VolumeKind;
    use crate::file::sim::SimMedia;
    use crate::file::{Media, OpenMode};
    use crate::map::{MapRecord, RecordKind, SectorSet, Table};
    use crate::mapfile::{LayerKind, MapHeader, MapState};
    use crate::resolve::{Part, Source, UnknownLayer, resolve, resolve_by_maps};
    use crate::units::{Cluster, Sector, SectorRange, StoreId};
    use std::path::Path;

    /// Clusters of the disks of these tests.
    const CLUSTERS: u64 = 8;

    /// A sealed layer that holds these sectors as data.
    fn sealed(media: &SimMedia, number: u32, data: &[(u64, u64)]) -> Arc<Layer> {
        let id = LayerId(uuid::Uuid::from_u128(number.into()));
        let file = media.open(Path::new(&format!("{number}")), OpenMode::CreateNew, false);
        let mut set = SectorSet::empty();
        for (start, count) in data {
            set.apply(&MapRecord {
                kind: RecordKind::Data,
                range: SectorRange::new(Sector(*start), *count).unwrap(),
            });
        }
        let header = MapHeader {
            store: StoreId(uuid::Uuid::from_u128(5)),
            layer: id,
            parent: None,
            size: Sector(CLUSTERS * 8),
            kind: LayerKind::Differencing,
            state: MapState::Sealed,
            volume: "disk".into(),
            volume_kind: VolumeKind::Normal,
            snapshot: String::new(),
            group: uuid::Uuid::nil(),
            created_ns: 1,
            snapshot_ns: 0,
        };
        Arc::new(Layer::sealed(
            header,
            LayerNumber(number),
            file.unwrap(),
            set,
        ))
    }

    /// The sources of the whole disk, by slot (0: zeroes), sector by sector.
    fn sources(chain: &Chain, table: &Table) -> Vec<u32> {
        let mut parts: Vec<Part> = Vec::new();
        let range = SectorRange::new(Sector(0), CLUSTERS * 8).unwrap();
        resolve(table, chain, range, &mut parts).unwrap();
        let slot = |source| match source {
            Source::Zero => 0,
            Source::Layer(LayerSlot(slot)) => slot,
        };
        let runs = parts
            .iter()
            .map(|part| (slot(part.source), part.range.count));
        runs.flat_map(|(slot, count)| (0..count).map(move |_| slot))
            .collect()
    }

    #[test]
    fn gaps_are_passed_over_and_never_filled() {
        let media = SimMedia::new(1);
        let layers: Vec<_> = [&[(0, 64)][..], &[(0, 16)], &[(3, 2), (17, 1)], &[(20, 1)]]
            .iter()
            .zip(1..)
            .map(|(data, number)| sealed(&media, number, data))
            .collect();
        let table = Table::new(CLUSTERS);
        for (slot, layer) in (1..).map(LayerSlot).zip(&layers) {
            if let crate::layer::LayerMap::Sealed(set) = &**layer.map() {
                // The second one has been merged away.
                if slot != LayerSlot(2) {
                    table.load_layer(slot, set);
                }
            }
        }
        let whole = Chain::new(Generation(1), layers.clone());
        let chain = whole.without(&[layers[1].id()]);
        assert_eq!((whole.layers().len(), chain.layers().len()), (4, 3));
        let slots: Vec<_> = chain.slots().map(|(slot, _)| slot.0).collect();
        assert_eq!(slots, [1, 3, 4]);
        assert!(chain.layer(LayerSlot(2)).is_none() && chain.number(LayerSlot(2)).is_none());
        assert!(chain.file(LayerSlot(2)).is_none() && !chain.has(LayerSlot(0)));
        assert_eq!(chain.number(LayerSlot(3)), Some(LayerNumber(3)));
        assert_eq!(chain.layer(LayerSlot(4)).unwrap().id(), layers[3].id());
        assert_eq!(chain.slot_of(layers[2].id()), Some(LayerSlot(3)));
        assert_eq!(chain.slot_of(layers[1].id()), None);
        let down = |slot| chain.downwards(LayerSlot(slot)).map(|(slot, _)| slot.0);
        assert_eq!(down(3).collect::<Vec<_>>(), [3, 1]);
        assert_eq!(down(2).collect::<Vec<_>>(), [1]);
        assert_eq!(down(0).count(), 0);
        assert!(chain.was_sealed(LayerSlot(4)) && chain.unsealed().count() == 0);
        let found = sources(&chain, &table);
        let expected = |sector| match sector {
            3 | 4 | 17 => 3,
            20 => 4,
            _ => 1,
        };
        assert!(found.iter().copied().eq((0..CLUSTERS * 8).map(expected)));
        // A word that names what the chain does not know is no answer.
        table.load_layer(LayerSlot(2), &SectorSet::everything(Sector(8)));
        let one = SectorRange::new(Sector(0), 1).unwrap();
        assert_eq!(
            resolve(&table, &chain, one, &mut Vec::new()),
            Err(UnknownLayer)
        );
        assert_eq!(resolve(&table, &whole, one, &mut Vec::new()), Ok(()));
        // The maps know, whatever a word says.
        let mut parts = Vec::new();
        resolve_by_maps(
            &chain,
            SectorRange::new(Sector(0), CLUSTERS * 8).unwrap(),
            &mut parts,
        );
        for part in &parts {
            for sector in part.range.start.0..part.range.end().0 {
                assert_eq!(part.source, Source::Layer(LayerSlot(expected(sector))));
            }
        }
        assert_eq!(
            parts.iter().map(|part| part.range.count).sum::<u64>(),
            CLUSTERS * 8
        );
        // The newest slot is not given out again, even if its layer goes.
        let fifth = sealed(&media, 5, &[]);
        let more = chain
            .with_active(Generation(2), Arc::clone(&fifth))
            .unwrap();
        assert_eq!((more.active_slot(), more.layers().len()), (LayerSlot(5), 4));
        let more = more
            .with_active(Generation(3), sealed(&media, 6, &[]))
            .unwrap();
        let less = more.without(&[fifth.id()]);
        assert_eq!(less.next_slot().unwrap(), LayerSlot(7));
        assert_eq!(less.again().next_slot().unwrap(), LayerSlot(7));
        let other = sealed(&media, 9, &[]);
        let replaced = less.with_replaced(LayerSlot(3), &other);
        assert_eq!(replaced.number(LayerSlot(3)), Some(LayerNumber(9)));
        assert_eq!(
            (replaced.layers().len(), replaced.generation()),
            (4, Generation(3))
        );
        assert_eq!(replaced.slot_of(layers[2].id()), None);
        assert!(table.get(Cluster(0)).slot == LayerSlot(2));
    }

    #[test]
    fn when_no_slot_is_left_it_says_what_to_do() {
        let media = SimMedia::new(1);
        let (first, second) = (sealed(&media, 1, &[]), sealed(&media, 2, &[]));
        let layers = vec![first];
        let full = Chain::of(
            Generation(1),
            layers,
            vec![LayerSlot(1)],
            LayerSlot(SLOT_MAX),
        );
        let error = full.with_active(Generation(2), second).unwrap_err();
        assert!(error.to_string().contains("attach it again"), "{error}");
    }
}
