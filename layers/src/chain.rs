//! The layers of one volume at one time, immutable, published by pointer.

use std::sync::Arc;

use crate::file::FileToken;
use crate::layer::Layer;
use crate::units::{Generation, LayerNumber, LayerSlot};

/// The layers of a volume from the base (slot 1) to the active one (the last slot).
#[derive(Debug)]
pub struct Chain {
    /// The first generation in which writes go to this chain's active layer.
    generation: Generation,
    /// Slot n is at index n - 1.
    layers: Vec<Arc<Layer>>,
    /// The data files of the layers, in the same places: what a read needs, without a look at each layer, so that reads
    /// that hop between a thousand layers stay in the processor's cache.
    files: Vec<FileToken>,
    /// Their numbers in the sector cache, for the same reason.
    numbers: Vec<LayerNumber>,
    /// The lowest slot whose layer was not sealed when the chain was made: a flush covers it and all above.
    first_unsealed: LayerSlot,
}

impl Chain {
    /// A chain of these layers, oldest first; there is at least one, and the last is active.
    pub fn new(generation: Generation, layers: Vec<Arc<Layer>>) -> Self {
        debug_assert!(!layers.is_empty());
        let sealed = layers.iter().take_while(|layer| layer.is_sealed()).count();
        let first_unsealed = LayerSlot(u32::try_from(sealed + 1).unwrap_or(u32::MAX));
        let files = layers.iter().map(|layer| layer.data().token()).collect();
        let numbers = layers.iter().map(|layer| layer.number()).collect();
        Self {
            generation,
            files,
            numbers,
            layers,
            first_unsealed,
        }
    }

    /// The first generation in which writes go to this chain's active layer.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// How many layers there are.
    pub fn depth(&self) -> usize {
        self.layers.len()
    }

    /// The layer in a slot; `None` for slot 0 and for slots newer than this chain.
    pub fn layer(&self, slot: LayerSlot) -> Option<&Arc<Layer>> {
        usize::try_from(slot.0)
            .ok()?
            .checked_sub(1)
            .and_then(|index| self.layers.get(index))
    }

    /// The data file of the layer in a slot; `None` for slot 0 and for slots newer than this chain.
    pub fn file(&self, slot: LayerSlot) -> Option<FileToken> {
        let index = usize::try_from(slot.0).ok()?.checked_sub(1)?;
        self.files.get(index).copied()
    }

    /// The cache's number of the layer in a slot; `None` for slot 0 and for slots newer than this chain.
    #[inline]
    pub fn number(&self, slot: LayerSlot) -> Option<LayerNumber> {
        let index = usize::try_from(slot.0).ok()?.checked_sub(1)?;
        self.numbers.get(index).copied()
    }

    /// The slot of the active layer.
    pub fn active_slot(&self) -> LayerSlot {
        LayerSlot(u32::try_from(self.layers.len()).unwrap_or(u32::MAX))
    }

    /// The active layer.
    pub fn active(&self) -> Option<&Arc<Layer>> {
        self.layers.last()
    }

    /// Whether the layer in a slot was sealed when the chain was made, so that its words in the resolve table are final.
    pub fn was_sealed(&self, slot: LayerSlot) -> bool {
        slot < self.first_unsealed
    }

    /// The layers that a flush has to look at, oldest first; those sealed since are among them and have nothing to do.
    pub fn unsealed(&self) -> impl Iterator<Item = &Arc<Layer>> {
        let skip = usize::try_from(self.first_unsealed.0.saturating_sub(1)).unwrap_or(usize::MAX);
        self.layers.iter().skip(skip)
    }

    /// All layers, oldest first.
    pub fn layers(&self) -> &[Arc<Layer>] {
        &self.layers
    }

    /// This chain with one more layer on top, to be written to from `generation` on.
    pub fn with_active(&self, generation: Generation, active: Arc<Layer>) -> Self {
        let mut layers = self.layers.clone();
        layers.push(active);
        Self::new(generation, layers)
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
