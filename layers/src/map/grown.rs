//! A list that gets longer while others read it: what it has never moves.

use std::sync::OnceLock;

/// Some things, and perhaps more of them behind. One that never grew is read as a slice is.
#[derive(Debug)]
pub(crate) struct Grown<T> {
    /// The first of them.
    first: Box<[T]>,
    /// Those behind, at least as many as come before them; so there are few links, however often the list grows.
    more: OnceLock<Box<Self>>,
}

impl<T> Grown<T> {
    /// So many things.
    pub(crate) fn new(count: usize, thing: impl Fn() -> T) -> Self {
        Self {
            first: (0..count).map(|_| thing()).collect(),
            more: OnceLock::new(),
        }
    }

    /// The thing at an index.
    #[inline]
    pub(crate) fn get(&self, index: usize) -> Option<&T> {
        match self.first.get(index) {
            Some(thing) => Some(thing),
            None => self.behind(index),
        }
    }

    /// The thing at an index behind the first ones.
    #[cold]
    fn behind(&self, index: usize) -> Option<&T> {
        self.more.get()?.get(index - self.first.len())
    }

    /// Makes the list at least `count` long. Who gets to know of the new length by way of the caller finds all of it.
    pub(crate) fn grow(&self, count: usize, thing: impl Fn() -> T) {
        self.grow_by(self.first.len(), count, &thing);
    }

    /// The same, where so many come before the end of the first ones.
    fn grow_by(&self, before: usize, count: usize, thing: &impl Fn() -> T) {
        let missing = count.saturating_sub(self.first.len());
        if missing > 0 {
            let more = self
                .more
                .get_or_init(|| Box::new(Self::new(missing.max(before), thing)));
            more.grow_by(before + more.first.len(), missing, thing);
        }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.first.len() + self.more.get().map_or(0, |more| more.len())
    }

    /// Those from an index on.
    pub(crate) fn from(&self, index: usize) -> impl Iterator<Item = &T> {
        (index..self.len()).filter_map(|index| self.get(index))
    }

    /// Bytes of memory that the list itself takes.
    pub(crate) fn memory_bytes(&self) -> u64 {
        let more = self.more.get().map_or(0, |more| more.memory_bytes());
        size_of_val(&*self.first) as u64 + more
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn what_is_there_stays_where_it_is() {
        let made = Cell::new(0usize);
        let next = || made.replace(made.get() + 1);
        let list = Grown::new(3, next);
        let places: Vec<*const usize> = list.from(0).map(std::ptr::from_ref).collect();
        for count in [0, 3, 4, 5, 6, 7, 100, 7, 101] {
            list.grow(count, next);
            assert!(list.len() >= count);
            assert!((0..list.len()).all(|index| list.get(index) == Some(&index)));
            assert_eq!(list.get(list.len()), None);
            assert!(list.from(2).copied().eq(2..list.len()));
        }
        assert!(list.len() < 220, "{}", list.len());
        let after: Vec<*const usize> = list.from(0).take(3).map(std::ptr::from_ref).collect();
        assert_eq!(places, after);
        assert_eq!(
            list.memory_bytes(),
            (list.len() * size_of::<usize>()) as u64
        );
        let empty = Grown::new(0, next);
        empty.grow(1, next);
        assert_eq!(empty.len(), 1);
    }
}
