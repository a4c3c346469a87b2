//! A list that only ever gets longer: read by anybody without waiting, lengthened by one thread at a time.

use std::sync::OnceLock;

/// The list.
#[derive(Debug)]
pub(crate) struct Appended<T> {
    /// The first item and the rest.
    head: OnceLock<Box<Node<T>>>,
}

/// An item, and those after it.
#[derive(Debug)]
struct Node<T> {
    /// The item.
    item: T,
    /// The rest.
    next: Appended<T>,
}

impl<T> Appended<T> {
    /// An empty list.
    pub(crate) const fn new() -> Self {
        Self {
            head: OnceLock::new(),
        }
    }

    /// The items, oldest first. Who was told of an item by the thread that added it finds it.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        let mut list = self;
        std::iter::from_fn(move || {
            let node = list.head.get()?;
            list = &node.next;
            Some(&node.item)
        })
    }

    /// Adds an item at the end.
    pub(crate) fn push(&self, item: T) {
        let mut list = self;
        while let Some(node) = list.head.get() {
            list = &node.next;
        }
        let next = Self::new();
        let added = list.head.set(Box::new(Node { item, next }));
        debug_assert!(added.is_ok(), "one thread at a time");
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn items_come_in_their_order() {
        let list = Appended::new();
        assert_eq!(list.iter().count(), 0);
        for item in 0..3 {
            list.push(item);
        }
        assert_eq!(list.iter().copied().collect::<Vec<_>>(), [0, 1, 2]);
    }
}
