//! The words of a set: what its ways hold, and in which state. All zeroes are an empty set.

use std::array;

use crate::sync::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

/// Frames of a set.
pub const WAYS: usize = 16;

/// The words of one set: 320 bytes, 20 a frame.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Set {
    /// What each way holds; 0: nothing.
    pub keys: [AtomicU64; WAYS],
    /// In which state it is.
    pub states: [AtomicU64; WAYS],
    /// How soon each way may go.
    pub reref: [AtomicU8; WAYS],
    /// Fingerprints of what was evicted last.
    pub ghosts: [AtomicU16; WAYS],
    /// 1 while somebody looks for a way for a new key.
    pub lock: AtomicU32,
    /// Where the next ghost goes.
    pub cursor: AtomicU32,
}

impl Default for Set {
    fn default() -> Self {
        Self {
            keys: array::from_fn(|_| AtomicU64::new(0)),
            states: array::from_fn(|_| AtomicU64::new(0)),
            reref: array::from_fn(|_| AtomicU8::new(0)),
            ghosts: array::from_fn(|_| AtomicU16::new(0)),
            lock: AtomicU32::new(0),
            cursor: AtomicU32::new(0),
        }
    }
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Set>() == 320);
