//! The arena of a model: sets on the heap, since loom's atomics cannot lie in mapped memory. It has no frames; a
//! scenario keeps what stands for them itself.

use std::io;

use crate::cache::numbers::Numbers;
use crate::cache::set::Set;

/// The sets of a model.
#[derive(Debug)]
pub struct Arena {
    /// All of them.
    sets: Vec<Set>,
    /// Which layer has which number.
    numbers: Numbers,
}

impl Arena {
    /// `sets` empty sets.
    ///
    /// # Errors
    /// None: the signature is that of the real one.
    pub fn private(sets: usize) -> io::Result<Self> {
        Ok(Self {
            sets: std::iter::repeat_with(Set::default).take(sets).collect(),
            numbers: Numbers::private(),
        })
    }

    /// How many sets there are.
    pub fn sets(&self) -> usize {
        self.sets.len()
    }

    /// One set.
    pub fn set(&self, index: usize) -> Option<&Set> {
        self.sets.get(index)
    }

    /// Which layer has which number.
    pub fn numbers(&self) -> &Numbers {
        &self.numbers
    }
}
