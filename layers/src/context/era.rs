//! The generations in which a context has requests under way.
//!
//! Requests of one batch belong to one era: a generation with its chain. An era stays until its last request has ended,
//! which keeps the layers' files open; its changes hold up the end of its generation (`generation::Clock::quiescent`).

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use crate::chain::Chain;
use crate::generation::Announcement;
use crate::layer::{Layer, LayerMap};
use crate::units::{Generation, LayerNumber, LayerSlot};
use crate::volume::Volume;

/// Names an era of a context; grows with time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EraId(u64);

/// The layer that takes the writes of an era, with what a request needs of it at hand.
#[derive(Clone, Debug)]
pub struct Active {
    /// Its slot in the era's chain.
    pub slot: LayerSlot,
    /// Its number in the cache.
    pub number: LayerNumber,
    /// The layer.
    pub layer: Arc<Layer>,
    /// Its map, which is an active one as long as the era has changes.
    pub map: Arc<LayerMap>,
}

impl Active {
    /// The active layer of a chain; a chain has one.
    fn of(chain: &Chain) -> Option<Self> {
        let layer = chain.active()?;
        Some(Self {
            slot: chain.active_slot(),
            number: layer.number(),
            layer: Arc::clone(layer),
            map: layer.map_full(),
        })
    }
}

/// A generation with its chain and its requests.
#[derive(Debug)]
struct Era {
    /// The generation.
    generation: Generation,
    /// The chain in force, held so that its files stay open.
    _chain: Arc<Chain>,
    /// Its active layer.
    active: Option<Active>,
    /// Requests under way, changes counted.
    requests: usize,
    /// Writes, discards and write-zeroes under way.
    changes: usize,
}

/// The eras of one context; the last is current.
#[derive(Debug)]
pub struct Eras {
    /// Oldest first; never empty.
    eras: VecDeque<Era>,
    /// The name of the first one in the list.
    first: u64,
    /// What this context says to the clock.
    announcement: Arc<Announcement>,
    /// Whether something is announced.
    announced: Option<Generation>,
    /// The chain of the current era, at hand.
    chain: Arc<Chain>,
}

impl Eras {
    /// The current generation of the volume's store, with nothing under way.
    pub fn new(volume: &Volume) -> Self {
        let announcement = volume.clock().register();
        let generation = volume.clock().now();
        let chain = volume.chain_at(generation);
        let era = Era {
            generation,
            active: Active::of(&chain),
            _chain: Arc::clone(&chain),
            requests: 0,
            changes: 0,
        };
        Self {
            eras: VecDeque::from([era]),
            first: 0,
            announcement,
            announced: None,
            chain,
        }
    }

    /// Announces a batch and takes over the current generation with its chain.
    pub fn enter(&mut self, volume: &Volume) {
        let generation = self
            .announcement
            .enter(volume.clock(), self.oldest_change());
        self.announced = Some(self.oldest_change().unwrap_or(generation));
        if self
            .eras
            .back()
            .is_none_or(|era| era.generation != generation)
        {
            self.switch(volume, generation);
        }
    }

    /// A new generation: takes its chain. The time that this takes is the stall of a snapshot.
    #[cold]
    fn switch(&mut self, volume: &Volume, generation: Generation) {
        let began = Instant::now();
        let chain = volume.chain_at(generation);
        self.chain = Arc::clone(&chain);
        self.eras.push_back(Era {
            generation,
            active: Active::of(&chain),
            _chain: chain,
            requests: 0,
            changes: 0,
        });
        self.forget_ended();
        volume.note_stall(began.elapsed());
    }

    /// Withdraws the announcement as far as what is under way allows. Called at the end of a batch or a poll.
    pub fn leave(&mut self) {
        let oldest = self.oldest_change();
        if oldest != self.announced {
            self.announcement.leave(oldest);
            self.announced = oldest;
        }
    }

    /// The current chain.
    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    /// The layer that takes the writes of the current era.
    #[inline]
    pub fn active(&self) -> Option<&Active> {
        self.eras.back()?.active.as_ref()
    }

    /// The layer that takes the writes of an era with requests under way.
    pub fn active_of(&self, id: EraId) -> Option<&Active> {
        self.eras.get(self.index(id)?)?.active.as_ref()
    }

    /// Makes sure that the current generation is announced, for a change that begins and ends now.
    #[inline]
    pub fn announce(&mut self, volume: &Volume) {
        if self.announced.is_none() {
            self.enter(volume);
        }
    }

    /// Counts a request into the current era. A change outside a batch is a batch of its own.
    pub fn begin(&mut self, volume: &Volume, changes: bool) -> EraId {
        if changes && self.announced.is_none() {
            self.enter(volume);
        }
        if let Some(era) = self.eras.back_mut() {
            era.requests += 1;
            era.changes += usize::from(changes);
        }
        let last = u64::try_from(self.eras.len())
            .unwrap_or(u64::MAX)
            .saturating_sub(1);
        EraId(self.first + last)
    }

    /// Counts a change out of its era and into that of the current generation; `None` if that is the same.
    pub fn move_on(&mut self, volume: &Volume, id: EraId) -> Option<EraId> {
        if self.is_current(id) && self.generation() == Some(volume.clock().now()) {
            return None;
        }
        self.enter(volume);
        if self.is_current(id) {
            return None;
        }
        let next = self.begin(volume, true);
        self.end(id, true);
        Some(next)
    }

    /// Whether an era is that of the last batch.
    fn is_current(&self, id: EraId) -> bool {
        self.index(id)
            .is_some_and(|index| index + 1 == self.eras.len())
    }

    /// The generation of the last batch.
    fn generation(&self) -> Option<Generation> {
        self.eras.back().map(|era| era.generation)
    }

    /// Counts a request out.
    pub fn end(&mut self, id: EraId, changes: bool) {
        if let Some(era) = self.index(id).and_then(|index| self.eras.get_mut(index)) {
            era.requests -= 1;
            era.changes -= usize::from(changes);
        }
        self.forget_ended();
    }

    /// Tells the clock that this context changes nothing any more.
    pub fn retire(&mut self, volume: &Volume) {
        self.announcement.leave(None);
        volume.clock().unregister(&self.announcement);
    }

    /// The oldest generation with changes under way.
    fn oldest_change(&self) -> Option<Generation> {
        self.eras
            .iter()
            .find(|era| era.changes > 0)
            .map(|era| era.generation)
    }

    /// Drops eras at the front that have ended; the current one stays.
    fn forget_ended(&mut self) {
        while self.eras.len() > 1 && self.eras.front().is_some_and(|era| era.requests == 0) {
            self.eras.pop_front();
            self.first += 1;
        }
    }

    /// Where an era is in the list.
    fn index(&self, id: EraId) -> Option<usize> {
        usize::try_from(id.0.checked_sub(self.first)?).ok()
    }
}
