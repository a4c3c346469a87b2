//! The frame protocol: reading, writing, filling, trimming and cleaning frames, lock-free where it matters.
//!
//! Who copies bytes is the caller's closure, which gets the place of the frame. So the protocol has no memory access of its
//! own, and models run it with frames of two words (`scenarios`). `CONCURRENCY.md` has the proof.
//!
//! INVARIANT: of all ways of a set at most one has a given key. A new key is put in only by who holds the set's lock and has
//! looked for the key under it.
//! INVARIANT: key, masks and version of a locked way change only by the hand of who locked it: every other change of a state
//! is a compare-and-swap from an unlocked one.
//! INVARIANT: a way that is filling keeps its key until who claimed it has ended the fill; so a claim is never mistaken for
//! another one of the same key.

use crate::map::fault::{Fault, planted};
use crate::sync::{AtomicU64, Ordering, fence, hint};
use crate::units::{LayerNumber, SectorMask};

use super::copy::prefetch;
use super::replace::{fingerprint, mix, remember, touch, touch_written, victim};
use super::set::{FrameKey, Set, State, WAYS};

/// How often something is tried again when its frame changes under it, before the request is put aside.
const TRIES: u32 = if cfg!(loom) { 3 } else { 16 };
/// Looks at a locked frame before the request is put aside: about the time of a copy.
const LOOKS: u32 = if cfg!(loom) { 2 } else { 200 };

/// The place of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameIndex {
    /// Its set.
    pub set: usize,
    /// Its way.
    pub way: usize,
}

/// How a read of a frame ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// The sectors were copied, all of one version.
    Hit,
    /// They are not here.
    Miss,
    /// Somebody changes the frame: try again later.
    Busy,
}

/// How a write of a frame ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// The sectors are in the frame, and published.
    Done {
        /// Whether the frame was clean before.
        dirtied: bool,
    },
    /// Somebody changes the frame or its set: try again later.
    Busy,
    /// No way is free, or no more may become dirty: try again after a write-back.
    Full,
}

/// How a claim ended.
#[derive(Debug)]
pub enum Claim {
    /// The caller reads the file and ends the fill with `insert` or `abandon`.
    Claimed(Ticket),
    /// The frame has the sectors by now: read it.
    Resident,
    /// Another fill is under way, or no way is free: read past the cache.
    Refused,
}

/// The right and the duty to end a fill.
#[derive(Debug)]
#[must_use = "a way that is filling for ever is lost"]
pub struct Ticket {
    /// Which frame.
    index: FrameIndex,
    /// What it is to hold.
    key: FrameKey,
}

impl Ticket {
    /// What is being filled.
    pub fn key(&self) -> FrameKey {
        self.key
    }
}

/// A copy that was taken of a frame's dirty sectors.
#[derive(Clone, Copy, Debug)]
pub struct Copied {
    /// Which frame.
    index: FrameIndex,
    /// What it held.
    pub key: FrameKey,
    /// Which version of it.
    version: u64,
    /// The sectors that were dirty.
    pub dirty: SectorMask,
}

/// How cleaning ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clean {
    /// The frame is clean.
    Cleaned,
    /// It was changed since it was copied: it must be written back again.
    Changed,
}

/// What happened, for the counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Clusters read from frames.
    pub hits: u64,
    /// Clusters that had to be read from files.
    pub misses: u64,
    /// Clusters kept in a frame after that.
    pub fills: u64,
    /// Clusters read past the cache.
    pub bypasses: u64,
    /// Frames given to another cluster.
    pub evictions: u64,
    /// Copies that were made again because the frame changed meanwhile.
    pub retries: u64,
    /// Requests put aside until a frame is free.
    pub parks: u64,
    /// Clusters written to frames.
    pub writes: u64,
}

/// The sets of an arena, with the way to find a set.
#[derive(Clone, Copy, Debug)]
pub struct Sets<'a> {
    /// All of them.
    pub(super) sets: &'a [Set],
    /// Unknown to guests, so that none can aim at a set.
    seed: u64,
}

impl<'a> Sets<'a> {
    /// The sets of an arena.
    pub fn new(sets: &'a [Set], seed: u64) -> Self {
        Self { sets, seed }
    }

    /// Where a key belongs; `None` only if there is no set at all. Clusters next to each other lie in sets next to each
    /// other, 32 at a time.
    #[inline]
    pub(super) fn place(&self, key: FrameKey) -> Option<(usize, &'a Set)> {
        let group = mix(key.word() >> 5 ^ self.seed);
        let count = self.sets.len() as u64;
        // The upper half of the product is uniform over the sets.
        let start = (u128::from(group) * u128::from(count)) >> 64;
        let mut at = u64::try_from(start).unwrap_or(0) + (key.word() & 31);
        if at >= count {
            at = at.checked_rem(count)?;
        }
        let at = usize::try_from(at).unwrap_or(0);
        self.sets.get(at).map(|set| (at, set))
    }

    /// Asks the processor for the words of the set of a key that will be used soon.
    #[inline]
    pub fn prefetch(&self, key: FrameKey) {
        if let Some((_, set)) = self.place(key) {
            let start = std::ptr::from_ref(set).cast::<u8>();
            for line in (0..size_of::<Set>()).step_by(64) {
                prefetch(start.wrapping_add(line));
            }
        }
    }

    /// The way that holds a key, as far as can be seen without an order.
    #[inline]
    fn find(set: &Set, key: FrameKey) -> Option<usize> {
        // ORDERING: Relaxed; a hint. Whoever finds a way looks at the key again after the state, see `look`. A key that was
        // put in before this search began (by way of an acknowledgement) is seen.
        set.keys
            .iter()
            .position(|word| word.load(Ordering::Relaxed) == key.word())
    }

    /// The state of a way, if it holds this key.
    #[inline]
    fn look(set: &Set, way: usize, key: FrameKey) -> Option<State> {
        // ORDERING: Acquire; pairs with the Release of whoever unlocked the way: key and content are at least as new as
        // the state. The key after the state: it was changed under the lock, so a key of a later version shows in the
        // state that the caller checks or swaps.
        let (keys, states) = (set.keys.get(way)?, set.states.get(way)?);
        if planted(Fault::KeyBeforeState) {
            let same = keys.load(Ordering::Relaxed) == key.word();
            return same.then(|| State(states.load(Ordering::Acquire)));
        }
        let state = State(states.load(Ordering::Acquire));
        (keys.load(Ordering::Relaxed) == key.word()).then_some(state)
    }

    /// Replaces an unlocked state by another one, if it is still the same.
    #[inline]
    fn swap(set: &Set, way: usize, old: State, new: State) -> bool {
        // ORDERING: Acquire on success: what the last owner of the way wrote is visible to this one. Release: a state that
        // is set without a lock (claim, clean) carries on what was seen with the old one.
        set.states.get(way).is_some_and(|word| {
            word.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        })
    }

    /// Locks a way whose state was looked at.
    #[inline]
    fn lock(set: &Set, way: usize, old: State, new: State) -> bool {
        let locked = Self::swap(set, way, old, new);
        // ORDERING: Release fence between the locked state and what the owner changes; pairs with the Acquire fence in
        // `read`: who has seen a changed byte or key sees the version of the lock.
        if locked && !planted(Fault::LockWithoutFence) {
            fence(Ordering::Release);
        }
        locked
    }

    /// Gives a locked way back.
    #[inline]
    fn unlock(set: &Set, way: usize, state: State) {
        if let Some(word) = set.states.get(way) {
            // ORDERING: Release; pairs with the Acquire in `look`.
            word.store(state.0, Ordering::Release);
        }
    }

    /// The answer to a read of what is in no frame.
    #[cold]
    fn miss() -> Read {
        if !planted(Fault::MissWithoutFence) {
            // ORDERING: Acquire fence; pairs with the one in `lock`. Who took the key away did so under the lock, and what he
            // had done before that (a zeroed map, a written file) is seen by who asks for it after this answer.
            fence(Ordering::Acquire);
        }
        Read::Miss
    }

    /// Looks at a locked way until it is not, for about the time of a copy. Returns whether it is worth another try.
    #[inline]
    fn wait(set: &Set, way: usize, key: FrameKey, looks: &mut u32) -> bool {
        *looks += 1;
        while *looks < LOOKS && Self::look(set, way, key).is_some_and(State::is_locked) {
            hint::spin_loop();
            *looks += 1;
        }
        *looks < LOOKS
    }

    /// Copies sectors out of the frame of a key. `copy` may run several times; only its last run counts, and only after
    /// `Hit`. After `Miss` the map says what it said when the sectors left the frame, or something newer.
    #[inline]
    pub fn read(
        &self,
        key: FrameKey,
        wanted: SectorMask,
        tally: &mut Tally,
        mut copy: impl FnMut(FrameIndex),
    ) -> Read {
        let Some((at, set)) = self.place(key) else {
            return Read::Miss;
        };
        let mut looks = 0;
        for _ in 0..TRIES {
            let Some(way) = Self::find(set, key) else {
                return Self::miss();
            };
            let Some(state) = Self::look(set, way, key) else {
                tally.retries += 1;
                continue;
            };
            if state.is_locked() {
                if !Self::wait(set, way, key, &mut looks) {
                    return Read::Busy;
                }
                continue;
            }
            if !state.valid().contains(wanted) {
                return Self::miss();
            }
            copy(FrameIndex { set: at, way });
            if !planted(Fault::ReadWithoutFence) {
                // ORDERING: Acquire fence between the bytes and the state; pairs with the fence in `lock`.
                fence(Ordering::Acquire);
            }
            let again = set
                .states
                .get(way)
                .map(|word| State(word.load(Ordering::Relaxed)));
            let same = again.is_some_and(|again| again.version() == state.version());
            if same || planted(Fault::ReadOnce) {
                touch(set, way);
                return Read::Hit;
            }
            tally.retries += 1;
        }
        Read::Busy
    }

    /// The state of the frame of a key, locked or not.
    fn state(&self, key: FrameKey) -> Option<State> {
        let (_, set) = self.place(key)?;
        let way = Self::find(set, key)?;
        Self::look(set, way, key)
    }

    /// Which sectors the frame of a key has now. A hint: it may be locked by somebody who puts more in.
    pub fn valid(&self, key: FrameKey) -> SectorMask {
        self.state(key).map_or(SectorMask::NONE, State::valid)
    }

    /// Whether no frame has any of these sectors, and nobody is about to put one in.
    ///
    /// A frame that is locked counts as having them: a write says in the map what it does before the frame says so.
    pub fn lacks(&self, key: FrameKey, mask: SectorMask) -> bool {
        self.state(key).is_none_or(|state| {
            let locked = state.is_locked() && !planted(Fault::LockedIsLacking);
            !locked && state.valid().0 & mask.0 == 0
        })
    }

    /// Copies sectors into the frame of a key, which is made if need be. `publish` runs under the frame's lock, before
    /// `copy`; it is told whether the frame was clean before. With `may_dirty` off only a dirty frame is written.
    #[inline]
    pub fn write(
        &self,
        key: FrameKey,
        mask: SectorMask,
        may_dirty: bool,
        tally: &mut Tally,
        mut copy: impl FnMut(FrameIndex),
        mut publish: impl FnMut(bool),
    ) -> Write {
        let Some((at, set)) = self.place(key) else {
            return Write::Full;
        };
        let Some((way, locked)) = self.lock_for_write(at, key, may_dirty, tally) else {
            return Write::Busy;
        };
        let Some(locked) = locked else {
            return Write::Full;
        };
        // Published before the bytes are there: nobody sees them before the way is unlocked. The other way round each atomic
        // step of `publish` would wait until the processor has got rid of the copy.
        let dirtied = locked.dirty() == SectorMask::NONE;
        if planted(Fault::MasksBeforeBytes) {
            let early = locked.0 | u64::from(mask.0) | u64::from(mask.0) << 8;
            Self::unlock(set, way, State(early));
        }
        if planted(Fault::PublishAfterUnlock) {
            copy(FrameIndex { set: at, way });
        } else {
            publish(dirtied);
            copy(FrameIndex { set: at, way });
        }
        let (valid, dirty) = (locked.valid().0 | mask.0, locked.dirty().0 | mask.0);
        Self::unlock(
            set,
            way,
            locked.unlock(SectorMask(valid), SectorMask(dirty)),
        );
        if planted(Fault::PublishAfterUnlock) {
            publish(dirtied);
        }
        touch_written(set, way);
        Write::Done { dirtied }
    }

    /// Locks the way of a key, or a new one for it. `None`: busy; `Some((_, None))`: full.
    #[inline]
    fn lock_for_write(
        &self,
        at: usize,
        key: FrameKey,
        may_dirty: bool,
        tally: &mut Tally,
    ) -> Option<(usize, Option<State>)> {
        let set = self.sets.get(at)?;
        let mut looks = 0;
        for _ in 0..TRIES {
            let Some(way) = Self::find(set, key) else {
                if !may_dirty {
                    return Some((0, None));
                }
                return match self.take_way(set, key, tally) {
                    Taken::Locked(way, state) => Some((way, Some(state))),
                    Taken::Full => Some((0, None)),
                    Taken::Busy => None,
                };
            };
            let Some(state) = Self::look(set, way, key) else {
                continue;
            };
            if state.is_locked() {
                if !Self::wait(set, way, key, &mut looks) {
                    return None;
                }
                continue;
            }
            if !may_dirty && state.dirty() == SectorMask::NONE {
                return Some((way, None));
            }
            if Self::lock(set, way, state, state.lock()) {
                return Some((way, Some(state.lock())));
            }
        }
        None
    }

    /// Takes a way for a key that has none: locked, with the key, empty.
    #[cold]
    fn take_way(&self, set: &Set, key: FrameKey, tally: &mut Tally) -> Taken {
        // ORDERING: Acquire with the Release below: the keys that others put in under the lock are seen under it.
        let free = set
            .lock
            .compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed);
        if free.is_err() && !planted(Fault::NoSetLock) {
            return Taken::Busy;
        }
        let taken = if Self::find(set, key).is_some() && !planted(Fault::NoSetLock) {
            Taken::Busy
        } else {
            self.take_victim(set, key, tally)
        };
        set.lock.store(0, Ordering::Release);
        taken
    }

    /// The same under the set's lock, after the key was looked for.
    fn take_victim(&self, set: &Set, key: FrameKey, tally: &mut Tally) -> Taken {
        let fingerprint = fingerprint(key);
        let wanted_again = set
            .ghosts
            .iter()
            .any(|ghost| ghost.load(Ordering::Relaxed) == fingerprint);
        for _ in 0..WAYS {
            let Some((way, state)) = victim(set, wanted_again) else {
                // What is clean and locked or being filled will be free in a moment, without a write-back.
                let clean = |word: &AtomicU64| {
                    State(word.load(Ordering::Relaxed)).dirty() == SectorMask::NONE
                };
                return if set.states.iter().any(clean) {
                    Taken::Busy
                } else {
                    Taken::Full
                };
            };
            let (Some(word), Some(reref)) = (set.keys.get(way), set.reref.get(way)) else {
                return Taken::Full;
            };
            let locked = state.lock_empty();
            if !Self::lock(set, way, state, locked) {
                // A writer or a fill was quicker.
                continue;
            }
            let before = FrameKey::from_word(word.load(Ordering::Relaxed));
            if before != FrameKey::NONE {
                tally.evictions += 1;
                remember(set, before);
            }
            // ORDERING: Relaxed; under the lock. Who finds this key looks at the state first, see `look`.
            word.store(key.word(), Ordering::Relaxed);
            reref.store(if wanted_again { 1 } else { 3 }, Ordering::Relaxed);
            return Taken::Locked(way, locked);
        }
        Taken::Busy
    }

    /// Reserves the frame of a key for sectors that are about to be read from the file.
    pub fn claim(&self, key: FrameKey, wanted: SectorMask, tally: &mut Tally) -> Claim {
        let Some((at, set)) = self.place(key) else {
            return Claim::Refused;
        };
        for _ in 0..TRIES {
            let Some(way) = Self::find(set, key) else {
                return match self.take_way(set, key, tally) {
                    Taken::Locked(way, state) => {
                        let empty = state.unlock(SectorMask::NONE, SectorMask::NONE);
                        Self::unlock(set, way, empty.filling());
                        Self::claimed(FrameIndex { set: at, way }, key)
                    }
                    Taken::Full | Taken::Busy => Claim::Refused,
                };
            };
            let Some(state) = Self::look(set, way, key) else {
                continue;
            };
            if state.valid().contains(wanted) {
                return Claim::Resident;
            }
            if state.is_locked() || state.is_filling() {
                return Claim::Refused;
            }
            if Self::swap(set, way, state, state.filling()) {
                return Self::claimed(FrameIndex { set: at, way }, key);
            }
        }
        Claim::Refused
    }

    /// The claim of a way that says so by now.
    fn claimed(index: FrameIndex, key: FrameKey) -> Claim {
        if !planted(Fault::ClaimWithoutFence) {
            // ORDERING: SeqCst fence between the claim and what its owner is about to read, map and file; pairs with the one in
            // `trim`, which comes between a change of those and the look for a frame. One of the two sees the other. It is also
            // an Acquire fence, as in `miss`: the map is not older than the end of the key's last frame.
            fence(Ordering::SeqCst);
        }
        Claim::Claimed(Ticket { index, key })
    }

    /// Ends a fill: `copy` runs under the frame's lock, puts those of the sectors into it that it does not have, which are
    /// named, and may take the others from there, which are newer than the file. Returns whether they were kept.
    pub fn insert(
        &self,
        ticket: Ticket,
        mask: SectorMask,
        copy: impl FnOnce(FrameIndex, SectorMask),
    ) -> bool {
        let FrameIndex { set: at, way } = ticket.index;
        let Some(set) = self.sets.get(at) else {
            return false;
        };
        loop {
            let Some(state) = self.unlocked(set, way, ticket.key) else {
                debug_assert!(false, "a way that is filling lost its key");
                return false;
            };
            debug_assert!(state.is_filling(), "a fill ended twice");
            if state.is_spoiled() && !planted(Fault::KeepSpoiled) {
                if Self::swap(set, way, state, state.filled()) {
                    return false;
                }
                continue;
            }
            let locked = state.lock();
            if !Self::lock(set, way, state, locked) {
                continue;
            }
            let missing = if planted(Fault::FillOverWrites) {
                mask
            } else {
                SectorMask(mask.0 & !state.valid().0)
            };
            copy(ticket.index, missing);
            let valid = SectorMask(state.valid().0 | missing.0);
            Self::unlock(set, way, locked.unlock(valid, state.dirty()).filled());
            return true;
        }
    }

    /// Ends a fill that brought nothing.
    pub fn abandon(&self, ticket: Ticket) {
        let FrameIndex { set: at, way } = ticket.index;
        let Some(set) = self.sets.get(at) else {
            return;
        };
        while let Some(state) = self.unlocked(set, way, ticket.key) {
            if Self::swap(set, way, state, state.filled()) {
                return;
            }
        }
    }

    /// Takes sectors out of the frame of a key, if it has one: all but those that `keep` names, which is asked under the
    /// frame's lock. Returns whether a dirty frame became clean by it. Waits for who has the frame locked.
    pub fn trim(&self, key: FrameKey, keep: impl Fn() -> SectorMask) -> bool {
        let Some((_, set)) = self.place(key) else {
            return false;
        };
        // ORDERING: SeqCst fence; pairs with the one in `claimed`.
        fence(Ordering::SeqCst);
        let early = planted(Fault::KeepBeforeLock).then(&keep);
        loop {
            let Some(way) = Self::find(set, key) else {
                return false;
            };
            let Some(state) = self.unlocked(set, way, key) else {
                continue;
            };
            let locked = state.lock();
            if !Self::lock(set, way, state, locked) {
                continue;
            }
            let keep = early.unwrap_or_else(&keep);
            let valid = SectorMask(state.valid().0 & keep.0);
            let dirty = SectorMask(state.dirty().0 & keep.0);
            if valid == SectorMask::NONE
                && !state.is_filling()
                && let Some(word) = set.keys.get(way)
            {
                word.store(FrameKey::NONE.word(), Ordering::Relaxed);
            }
            let after = if planted(Fault::TrimWithoutSpoiling) {
                locked.unlock(valid, dirty)
            } else {
                locked.unlock(valid, dirty).spoil()
            };
            Self::unlock(set, way, after);
            return state.dirty() != SectorMask::NONE && dirty == SectorMask::NONE;
        }
    }

    /// Copies the dirty sectors of the frame of a key; `None` if there are none. `copy` may run several times; its last
    /// run counts. Waits for who has the frame locked; if the frame keeps changing under the copy it is locked for one, so
    /// that no guest can hold up the thread that writes back for all of them.
    pub fn copy_dirty(
        &self,
        key: FrameKey,
        mut copy: impl FnMut(FrameIndex, SectorMask),
    ) -> Option<Copied> {
        let (at, set) = self.place(key)?;
        let mut tries = 0;
        loop {
            let way = Self::find(set, key)?;
            let Some(state) = self.unlocked(set, way, key) else {
                continue;
            };
            let dirty = state.dirty();
            if dirty == SectorMask::NONE {
                return None;
            }
            let index = FrameIndex { set: at, way };
            let copied = |state: State| Copied {
                index,
                key,
                version: state.version(),
                dirty,
            };
            if tries >= TRIES {
                let locked = state.lock();
                if Self::lock(set, way, state, locked) {
                    copy(index, dirty);
                    let after = locked.unlock(state.valid(), dirty);
                    Self::unlock(set, way, after);
                    return Some(copied(after));
                }
                continue;
            }
            tries += 1;
            copy(index, dirty);
            // ORDERING: as in `read`.
            fence(Ordering::Acquire);
            let again = State(set.states.get(way)?.load(Ordering::Relaxed));
            if again.version() == state.version() {
                return Some(copied(state));
            }
        }
    }

    /// Makes a frame clean whose copy is in the file (and, if its sectors were new to the layer, committed), unless it was
    /// changed since.
    pub fn clean(&self, copied: &Copied) -> Clean {
        let FrameIndex { set: at, way } = copied.index;
        let Some(set) = self.sets.get(at) else {
            return Clean::Changed;
        };
        loop {
            let Some(state) = Self::look(set, way, copied.key) else {
                return Clean::Changed;
            };
            let same = state.version() == copied.version || planted(Fault::CleanWithoutVersion);
            if state.is_locked() || !same {
                return Clean::Changed;
            }
            if Self::swap(set, way, state, state.clean(copied.dirty)) {
                return Clean::Cleaned;
            }
        }
    }

    /// The state of a way once nobody has it locked; `None` if it does not hold the key.
    fn unlocked(&self, set: &Set, way: usize, key: FrameKey) -> Option<State> {
        let mut looks = 0u32;
        loop {
            let state = Self::look(set, way, key)?;
            if !state.is_locked() {
                return Some(state);
            }
            looks = looks.saturating_add(1);
            if looks.is_multiple_of(LOOKS) {
                // Its owner has lost its processor: a lock is held for one copy and never over a wait.
                crate::sync::thread::yield_now();
            } else {
                hint::spin_loop();
            }
        }
    }

    /// Drops all frames of a layer that nobody uses any more. Returns how many were dirty.
    pub fn drop_layer(&self, layer: LayerNumber) -> u64 {
        let mut dirty = 0;
        for set in self.sets {
            for (way, word) in set.keys.iter().enumerate() {
                let key = FrameKey::from_word(word.load(Ordering::Relaxed));
                if key.layer() != layer {
                    continue;
                }
                // Others may take the way for themselves meanwhile.
                while let Some(state) = self.unlocked(set, way, key) {
                    let locked = state.lock_empty();
                    if Self::lock(set, way, state, locked) {
                        dirty += u64::from(state.dirty() != SectorMask::NONE);
                        word.store(FrameKey::NONE.word(), Ordering::Relaxed);
                        let empty = locked.unlock(SectorMask::NONE, SectorMask::NONE);
                        Self::unlock(set, way, empty.filled());
                        break;
                    }
                }
            }
        }
        dirty
    }

    /// How many frames of some layers are dirty. Visits all sets.
    pub fn count_dirty(&self, of: impl Fn(LayerNumber) -> bool) -> u64 {
        let mut dirty = 0;
        for set in self.sets {
            for (word, state) in set.keys.iter().zip(&set.states) {
                let state = State(state.load(Ordering::Relaxed));
                if state.dirty() != SectorMask::NONE {
                    let key = FrameKey::from_word(word.load(Ordering::Relaxed));
                    dirty += u64::from(of(key.layer()));
                }
            }
        }
        dirty
    }

    /// How many frames hold something, and how many are dirty. Visits all sets: for figures.
    pub fn count(&self) -> (u64, u64) {
        let (mut used, mut dirty) = (0, 0);
        for set in self.sets {
            for (word, state) in set.keys.iter().zip(&set.states) {
                used += u64::from(word.load(Ordering::Relaxed) != 0);
                let state = State(state.load(Ordering::Relaxed));
                dirty += u64::from(state.dirty() != SectorMask::NONE);
            }
        }
        (used, dirty)
    }
}

/// How a search for a way ended.
enum Taken {
    /// This one, locked and empty, with the key.
    Locked(usize, State),
    /// All ways are dirty or busy.
    Full,
    /// Somebody else is at it.
    Busy,
}
