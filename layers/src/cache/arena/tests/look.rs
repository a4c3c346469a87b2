//! What can be told of an arena without taking it over.

use super::*;
use crate::cache::arena::look::{Left, look};
use crate::cache::set::FrameKey;
use crate::units::Cluster;

/// Puts a key and a state into a way.
fn put(arena: &Arena, (set, way): (usize, usize), key: FrameKey, state: u64) {
    let set = arena.all().get(set).unwrap();
    set.keys[way].store(key.word(), Ordering::Relaxed);
    set.states[way].store(state, Ordering::Relaxed);
}

#[test]
fn dirty_clusters_are_counted_by_layer_and_nothing_changes() {
    let home = Home::new();
    assert_eq!(look(&home.place()).unwrap(), None);
    let arena = Arena::create(&home.place(), 5000).unwrap();
    let (one, two) = (layer(1), layer(2));
    let key = |number, cluster| FrameKey::new(number, Cluster(cluster));
    let number = arena.numbers().number(one).unwrap();
    let other = arena.numbers().number(two).unwrap();
    let dirty = 0x0303;
    put(&arena, (0, 0), key(number, 7), dirty);
    // The last way of the last set, in the last of several reads; and locked, as the death of its writer left it.
    put(&arena, (4999, 15), key(number, 8), dirty | 1 << 16);
    put(&arena, (17, 3), key(other, 7), dirty);
    // Clean; dirty without being valid; of no layer; no frame at all.
    put(&arena, (1, 0), key(number, 9), 0x00ff);
    put(&arena, (1, 1), key(number, 10), 0x0300);
    put(&arena, (1, 2), key(LayerNumber(99), 11), dirty);
    put(&arena, (1, 3), FrameKey::NONE, dirty);
    assert!(
        matches!(look(&home.place()), Err(Error::Busy { .. })),
        "while it is in use"
    );
    let bytes = arena.geometry.len;
    drop(arena);

    let before = std::fs::metadata(home.path()).unwrap();
    let left = look(&home.place()).unwrap();
    let expected = Left {
        path: home.path(),
        bytes,
        dirty: [(one, 2), (two, 1)].into(),
    };
    assert_eq!(left, Some(expected));
    let after = std::fs::metadata(home.path()).unwrap();
    assert_eq!(
        (before.modified().unwrap(), before.blocks()),
        (after.modified().unwrap(), after.blocks())
    );
    assert_eq!(Arena::adopt(&home.place()).unwrap().unwrap().sets(), 5000);
}

#[test]
fn an_arena_that_cannot_be_used_is_an_error_and_a_stale_one_is_none() {
    let home = Home::new();
    home.abandon(2);
    home.forge(8, &99_u32.to_le_bytes());
    assert!(matches!(
        look(&home.place()),
        Err(Error::Unsupported { .. })
    ));
    home.forge(48, &[1; 16]);
    assert_eq!(look(&home.place()).unwrap(), None, "of another boot");
    assert!(home.path().exists(), "nothing is removed");
}
