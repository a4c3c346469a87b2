//! What is left of the sets of a process that is gone.
//!
//! CRASH: may end at any store itself, and is then done again. Why it loses nothing is in `CONCURRENCY.md`, and every
//! store of the protocol before which a process may end is tried in `scenarios::crash`.

use crate::map::fault::{Fault, planted};
use crate::sync::Ordering;
use crate::units::{LayerNumber, SectorMask};

use super::access::Sets;
use super::set::{FrameKey, Set, State};

impl Sets<'_> {
    /// Puts the sets in order before anybody uses them: locks and fills end, what `known` does not know is dropped, and so is
    /// what is clean of layers that are in `past`, whose files need not have it. Hands on what is dirty. Returns how many
    /// frames with dirty sectors were dropped because their keys cannot be where they are: that is damage, which no end of a
    /// process leaves.
    pub fn recover(
        &self,
        known: impl Fn(LayerNumber) -> bool,
        past: &[LayerNumber],
        mut dirty: impl FnMut(FrameKey, SectorMask),
    ) -> u64 {
        let mut damaged = 0;
        for (at, set) in self.sets.iter().enumerate() {
            // ORDERING: Relaxed, here and below; one thread has all of it.
            set.lock.store(0, Ordering::Relaxed);
            for (way, (word, state)) in set.keys.iter().zip(&set.states).enumerate() {
                let key = FrameKey::from_word(word.load(Ordering::Relaxed));
                let mut left = left_of(State(state.load(Ordering::Relaxed)));
                if past.contains(&key.layer()) {
                    left = left.without_clean();
                }
                let none = key == FrameKey::NONE || left.valid() == SectorMask::NONE;
                let misplaced = || {
                    let here = self.place(key).is_some_and(|(place, _)| place == at);
                    !here || is_in_earlier(set, way, key)
                };
                if none || !known(key.layer()) || misplaced() {
                    let lost = !none && known(key.layer()) && left.dirty() != SectorMask::NONE;
                    damaged += u64::from(lost);
                    word.store(FrameKey::NONE.word(), Ordering::Relaxed);
                    let empty = left.lock_empty().unlock(SectorMask::NONE, SectorMask::NONE);
                    state.store(empty.0, Ordering::Relaxed);
                    continue;
                }
                state.store(left.0, Ordering::Relaxed);
                if left.dirty() != SectorMask::NONE {
                    dirty(key, left.dirty());
                }
            }
        }
        damaged
    }
}

/// What is left of a state.
fn left_of(found: State) -> State {
    let mut left = found.after_crash();
    if planted(Fault::KeepTorn) {
        left = State(left.0 | u64::from(found.valid().0));
    }
    if planted(Fault::KeepFilling) && found.is_filling() {
        left = left.filling();
    }
    left
}

/// Whether a way before this one has the key.
fn is_in_earlier(set: &Set, way: usize, key: FrameKey) -> bool {
    let earlier = set.keys.iter().take(way);
    earlier
        .map(|word| word.load(Ordering::Relaxed))
        .any(|word| word == key.word())
}
