//! Which way of a set goes to another key: re-reference interval prediction with two bits a way, and fingerprints of what
//! went last.
//!
//! A fill comes in as the first to go, and a hit makes its way the last. Ways grow older only for the sake of a key that was
//! evicted lately and is wanted again. So a scan of any length passes through one way of each set. All of it is a hint: stores
//! of
//! others may be lost, and nothing but speed depends on them.

use crate::map::fault::{Fault, planted};
use crate::sync::Ordering;

use super::set::{FrameKey, Set, State, WAYS};

/// A way to be given to another key: empty ones first, then those that may go soonest. Ages the others for the sake of
/// a key that is wanted again.
pub fn victim(set: &Set, wanted_again: bool) -> Option<(usize, State)> {
    let mut best: Option<(usize, State, u8)> = None;
    for (way, ((word, state), reref)) in
        set.keys.iter().zip(&set.states).zip(&set.reref).enumerate()
    {
        // ORDERING: Acquire; the key is looked at after it, and what follows is a compare-and-swap of this very state.
        let state = State(state.load(Ordering::Acquire));
        let filling = planted(Fault::EvictFilling) && state.filled().is_idle();
        if !state.is_idle() && !filling {
            continue;
        }
        if word.load(Ordering::Relaxed) == FrameKey::NONE.word() {
            return Some((way, state));
        }
        let age = reref.load(Ordering::Relaxed).min(3);
        if best.is_none_or(|(_, _, oldest)| age > oldest) {
            best = Some((way, state, age));
        }
    }
    let (way, state, _) = best?;
    if wanted_again {
        for reref in &set.reref {
            let age = reref.load(Ordering::Relaxed);
            if age < 3 {
                reref.store(age + 1, Ordering::Relaxed);
            }
        }
    }
    Some((way, state))
}

/// Remembers that a way was of use. Stores only what is new, so that a hit does not take the line from other processors.
#[inline]
pub fn touch(set: &Set, way: usize) {
    if let Some(reref) = set.reref.get(way)
        && reref.load(Ordering::Relaxed) != 0
    {
        reref.store(0, Ordering::Relaxed);
    }
}

/// The same for a write: the first one only brings a frame in.
#[inline]
pub fn touch_written(set: &Set, way: usize) {
    if let Some(reref) = set.reref.get(way) {
        match reref.load(Ordering::Relaxed) {
            0 => {}
            // As it came in: one more use makes it hot.
            3 => reref.store(2, Ordering::Relaxed),
            _ => reref.store(0, Ordering::Relaxed),
        }
    }
}

/// Puts a key among the ghosts. Under the set's lock.
pub fn remember(set: &Set, key: FrameKey) {
    let at = set.cursor.load(Ordering::Relaxed);
    set.cursor.store(at.wrapping_add(1), Ordering::Relaxed);
    let at = usize::try_from(at).unwrap_or(0) % WAYS;
    if let Some(ghost) = set.ghosts.get(at) {
        ghost.store(fingerprint(key), Ordering::Relaxed);
    }
}

/// 16 bits of a key, never 0.
pub fn fingerprint(key: FrameKey) -> u16 {
    let [.., high, low] = mix(key.word().rotate_left(17)).to_le_bytes();
    u16::from_le_bytes([high, low]).max(1)
}

/// Spreads the bits of a number over all bits (the finaliser of SplitMix64).
pub const fn mix(mut bits: u64) -> u64 {
    bits ^= bits >> 30;
    bits = bits.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits ^= bits >> 27;
    bits = bits.wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ bits >> 31
}
