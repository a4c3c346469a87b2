//! The generations in which a context has requests under way.
//!
//! Requests of one batch belong to one era: a generation with its chain. An era stays until its last request has ended,
//! which keeps the layers' files open. Its changes hold up the end of its generation (`generation::Clock::quiescent`), all its
//! requests the end of what tables and chains said then (`quiescent_for_reads`).
//!
//! # What is announced, and when
//! Tables, maps and frames are looked at on behalf of guests in three places, each of them announced:
//! - a batch, from `begin_batch` to `kick`: it carries out hits without a request. A read or write outside of a batch
//!   announces itself first (`announce`);
//! - a request under way, from `begin` to `end`: its looks at the tables, its transfers, its fills, and the looks of fills that
//!   were not kept, since each of these is a part of the request;
//! - what was put aside: the same, since its request is counted until the last part has ended.
//!
//! # Nothing waits for ever
//! Snapshots wait for changes, merges for all requests. A transfer ends when its device answers. What was put aside may
//! wait for frames, or space, for as long as it likes; but when it is tried again, a request of which nothing else is left
//! moves on to the current era (`move_on`): it has no transfer under way, and will look at tables and chains anew, so that
//! nothing it may still do rests on what they said before. Reads that were put aside are tried again at once, writes whenever
//! frames may have become free, at the latest when the write-back thread says that there are none.
//! A write-zeroes waits for the lead of its volume's flushes, which ends unless its holder waits for requests to end.

#[cfg(all(test, not(loom)))]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use crate::chain::Chain;
use crate::generation::{Announcement, Oldest};
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
    /// What is announced.
    announced: Oldest,
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
            announced: Oldest::default(),
            chain,
        }
    }

    /// Announces a batch and takes over the current generation with its chain.
    pub fn enter(&mut self, volume: &Volume) {
        let oldest = self.oldest();
        let generation = self.announcement.enter(volume.clock(), oldest);
        self.announced = oldest.or(generation);
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
        let oldest = self.oldest();
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

    /// Makes sure that the current era is announced, for what begins and perhaps ends now. Outside of a batch it is a batch of
    /// its own.
    #[inline]
    pub fn announce(&mut self, volume: &Volume, changes: bool) {
        let missing =
            self.announced.requests.is_none() || (changes && self.announced.changes.is_none());
        if missing {
            self.enter(volume);
        }
    }

    /// Counts a request into the current era.
    pub fn begin(&mut self, volume: &Volume, changes: bool) -> EraId {
        self.announce(volume, changes);
        if let Some(era) = self.eras.back_mut() {
            era.requests += 1;
            era.changes += usize::from(changes);
        }
        let last = u64::try_from(self.eras.len())
            .unwrap_or(u64::MAX)
            .saturating_sub(1);
        EraId(self.first + last)
    }

    /// Counts a request out of its era and into that of the current generation; `None` if that is the same. Nothing that it
    /// looked at in its old era may be of use to it any more.
    pub fn move_on(&mut self, volume: &Volume, id: EraId, changes: bool) -> Option<EraId> {
        if self.is_current(id) && self.generation() == Some(volume.clock().now()) {
            return None;
        }
        self.enter(volume);
        if self.is_current(id) {
            return None;
        }
        let next = self.begin(volume, changes);
        self.end(id, changes);
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

    /// Tells the clock that this context does nothing any more.
    pub fn retire(&mut self, volume: &Volume) {
        self.announcement.leave(Oldest::default());
        volume.clock().unregister(&self.announcement);
    }

    /// The oldest generations with changes, and with any requests, under way.
    fn oldest(&self) -> Oldest {
        let oldest = |counts: fn(&Era) -> usize| {
            let era = self.eras.iter().find(|era| counts(era) > 0);
            era.map(|era| era.generation)
        };
        Oldest {
            changes: oldest(|era| era.changes),
            requests: oldest(|era| era.requests),
        }
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
