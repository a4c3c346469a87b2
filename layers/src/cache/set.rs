//! The words of a set: what its ways hold, and in which state.
//!
//! All of it lies in memory that outlives the process, so its bytes are part of the arena's format (`ARENA.md`), and all
//! zeroes are an empty set.

use crate::sync::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use crate::units::{Cluster, LayerNumber, SectorMask};

/// Frames of a set. Two in models: enough for every conflict, and few enough for every interleaving.
#[cfg(not(loom))]
pub const WAYS: usize = 16;
/// Frames of a set. Two in models: enough for every conflict, and few enough for every interleaving.
#[cfg(loom)]
pub const WAYS: usize = 2;

/// Bits of a key that name the cluster: disks of up to 64 TiB.
const CLUSTER_BITS: u32 = 34;

const _: () =
    assert!(crate::limits::DISK_SECTORS_MAX / crate::units::CLUSTER_SECTORS <= 1 << CLUSTER_BITS);

/// The words of one set: 320 bytes, 20 a frame.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Set {
    /// What each way holds; 0: nothing. Changes only while its way is locked.
    pub keys: [AtomicU64; WAYS],
    /// See [`State`].
    pub states: [AtomicU64; WAYS],
    /// How soon each way may go: 3 first, 0 last. A hint: stores may get lost.
    pub reref: [AtomicU8; WAYS],
    /// Fingerprints of what was evicted last; 0: none. A hint.
    pub ghosts: [AtomicU16; WAYS],
    /// 1 while somebody looks for a way for a new key. Nobody waits for it.
    pub lock: AtomicU32,
    /// Where the next ghost goes. Changes under `lock`.
    pub cursor: AtomicU32,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Set>() == 320);

/// A cluster of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameKey(u64);

impl FrameKey {
    /// Of no cluster.
    pub const NONE: Self = Self(0);

    /// The key of a cluster of a layer.
    pub const fn new(layer: LayerNumber, cluster: Cluster) -> Self {
        Self((layer.0 as u64) << CLUSTER_BITS | cluster.0 & ((1 << CLUSTER_BITS) - 1))
    }

    /// A key as its word has it.
    pub const fn from_word(word: u64) -> Self {
        Self(word)
    }

    /// The word of the key.
    pub const fn word(self) -> u64 {
        self.0
    }

    /// Whose cluster it is; 0 for `NONE`.
    pub fn layer(self) -> LayerNumber {
        LayerNumber(u32::try_from(self.0 >> CLUSTER_BITS).unwrap_or(u32::MAX))
    }

    /// Which cluster it is.
    pub const fn cluster(self) -> Cluster {
        Cluster(self.0 & ((1 << CLUSTER_BITS) - 1))
    }
}

/// The state of a way.
///
/// ```text
/// bits 0..8    valid: the frame holds these sectors of the key's cluster
/// bits 8..16   dirty: these, valid too, are not in the layer's file
/// bit  16      locked: one thread changes the frame; nobody else touches key, state or frame
/// bit  17      filling: a read of the file is under way for this key; the way is no victim
/// bit  18      spoiled: that read may be out of date; never set without `filling`
/// bits 32..64  version: grows by one when the lock is taken and when it is given back
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State(pub u64);

impl State {
    const LOCKED: u64 = 1 << 16;
    const FILLING: u64 = 1 << 17;
    const SPOILED: u64 = 1 << 18;
    const VERSION_ONE: u64 = 1 << 32;
    const MASKS: u64 = 0xffff;

    /// The sectors that the frame holds.
    pub const fn valid(self) -> SectorMask {
        SectorMask(self.0.to_le_bytes()[0])
    }

    /// The sectors that the file lacks.
    pub const fn dirty(self) -> SectorMask {
        SectorMask(self.0.to_le_bytes()[1])
    }

    /// Whether a thread changes the frame.
    pub const fn is_locked(self) -> bool {
        self.0 & Self::LOCKED != 0
    }

    /// Whether a read of the file is under way for it.
    pub const fn is_filling(self) -> bool {
        self.0 & Self::FILLING != 0
    }

    /// Whether what that read brings must not be kept.
    pub const fn is_spoiled(self) -> bool {
        self.0 & Self::SPOILED != 0
    }

    /// Whether the way may be given to another key.
    pub const fn is_idle(self) -> bool {
        self.0 & (0xff00 | Self::LOCKED | Self::FILLING) == 0
    }

    /// Counts changes of key and content.
    pub const fn version(self) -> u64 {
        self.0 >> 32
    }

    /// Locked, for a change of the content.
    pub const fn lock(self) -> Self {
        Self((self.0 | Self::LOCKED).wrapping_add(Self::VERSION_ONE))
    }

    /// Locked, for another key: what it held is gone.
    pub const fn lock_empty(self) -> Self {
        Self((self.0 & !Self::MASKS | Self::LOCKED).wrapping_add(Self::VERSION_ONE))
    }

    /// Unlocked, with these sectors.
    pub const fn unlock(self, valid: SectorMask, dirty: SectorMask) -> Self {
        let rest = self.0 & !(Self::MASKS | Self::LOCKED);
        Self((rest | valid.0 as u64 | (dirty.0 as u64) << 8).wrapping_add(Self::VERSION_ONE))
    }

    /// With a read of the file under way.
    pub const fn filling(self) -> Self {
        Self(self.0 | Self::FILLING)
    }

    /// With no read of the file under way.
    pub const fn filled(self) -> Self {
        Self(self.0 & !(Self::FILLING | Self::SPOILED))
    }

    /// With the read under way, if there is one, out of date.
    pub const fn spoil(self) -> Self {
        if self.is_filling() {
            Self(self.0 | Self::SPOILED)
        } else {
            self
        }
    }

    /// Without these sectors among the dirty ones.
    pub const fn clean(self, written: SectorMask) -> Self {
        Self(self.0 & !((written.0 as u64) << 8))
    }

    /// Without the sectors that are clean.
    pub const fn without_clean(self) -> Self {
        Self(self.0 & !0xff | (self.valid().0 & self.dirty().0) as u64)
    }

    /// What is left of it when the process that owned it is gone.
    ///
    /// A frame that was locked may be half changed: of its sectors only those stay that are nowhere else. The others are read
    /// from the file again, which has what they were.
    pub const fn after_crash(self) -> Self {
        let dirty = self.dirty().0 & self.valid().0;
        let valid = if self.is_locked() {
            dirty
        } else {
            self.valid().0
        };
        let version = self.0 & !(Self::VERSION_ONE - 1);
        Self(version | valid as u64 | (dirty as u64) << 8)
    }
}

impl Default for Set {
    fn default() -> Self {
        Self {
            keys: std::array::from_fn(|_| AtomicU64::new(0)),
            states: std::array::from_fn(|_| AtomicU64::new(0)),
            reref: std::array::from_fn(|_| AtomicU8::new(0)),
            ghosts: std::array::from_fn(|_| AtomicU16::new(0)),
            lock: AtomicU32::new(0),
            cursor: AtomicU32::new(0),
        }
    }
}

impl Set {
    /// Takes over all words of another set. For copies of a whole arena that nobody uses meanwhile.
    pub fn copy_from(&self, other: &Self) {
        // ORDERING: Relaxed; one thread has both.
        for (to, from) in self.keys.iter().zip(&other.keys) {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        for (to, from) in self.states.iter().zip(&other.states) {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        for (to, from) in self.reref.iter().zip(&other.reref) {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        for (to, from) in self.ghosts.iter().zip(&other.ghosts) {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        self.lock
            .store(other.lock.load(Ordering::Relaxed), Ordering::Relaxed);
        self.cursor
            .store(other.cursor.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}
