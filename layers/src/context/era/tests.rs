//! What holds up whom: requests of real contexts, on a simulated disk.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::sync::Arc;

use crate::cache::CacheOptions;
use crate::catalog::CatalogState;
use crate::catalog::memory::{MemoryCatalog, MemoryDisk};
use crate::file::sim::SimMedia;
use crate::file::{Media, Segment};
use crate::generation::Clock;
use crate::store::{Store, StoreOptions, VolumeSource};
use crate::units::{Generation, Sector, StoreId};
use crate::volume::{Completion, Durability, Operation, QueueContext, Volume};

/// Frames of the cache: one set.
const FRAMES: usize = 16;

/// A volume over a raw image of a MiB, in a store whose cache is tiny.
fn volume() -> (Store, Arc<Volume>) {
    let media = SimMedia::new(1);
    media
        .install(Path::new("/base.raw"), &[7; 1 << 20])
        .unwrap();
    let media: Arc<dyn Media> = Arc::new(media);
    let id = StoreId(uuid::Uuid::from_u128(1));
    let catalog = MemoryCatalog::open(&MemoryDisk::new(CatalogState::empty(id))).unwrap();
    let bytes = FRAMES as u64 * 4096;
    let options = StoreOptions {
        cache: CacheOptions {
            bytes,
            dirty_bytes: Some(bytes),
            ..CacheOptions::default()
        },
        ..StoreOptions::default()
    };
    let store = Store::simulated(media, Box::new(catalog), options).unwrap();
    let base = VolumeSource::Base("/base.raw".into());
    store.create_volume("disk", &base).unwrap();
    let volume = store.open_volume("disk").unwrap();
    (store, volume)
}

/// Submits a request of a cluster whose memory outlives the context.
fn submit(context: &mut QueueContext, operation: Operation, memory: &mut [u8], token: u64) {
    let segment = Segment {
        base: memory.as_mut_ptr(),
        len: memory.len(),
    };
    #[expect(unsafe_code, reason = "plays the part of the guest")]
    // SAFETY: all tests drop the context before the memory, and do not look at it meanwhile.
    unsafe {
        context.submit(operation, Durability::AfterFlush, &[segment], token);
    }
}

/// Polls until so many requests have ended.
fn finish(context: &mut QueueContext, count: usize) {
    let mut done: Vec<Completion> = Vec::new();
    while done.len() < count {
        context.poll(&mut done);
        context.kick();
    }
    assert!(done.iter().all(|done| done.result.is_ok()));
}

/// Whether snapshots, and whether merges, can go on that have reached this generation.
fn held_up(clock: &Clock, generation: Generation) -> (bool, bool) {
    (
        !clock.quiescent(generation),
        !clock.quiescent_for_reads(generation),
    )
}

#[test]
fn a_read_under_way_holds_up_merges_only() {
    let (_store, volume) = volume();
    let mut memory = vec![0; 4096];
    let mut context = volume.context(false).unwrap();
    let clock = volume.clock();
    for batch in [true, false] {
        if batch {
            context.begin_batch();
        }
        // Not read before: on its way from the file.
        let at = Operation::Read(Sector(if batch { 0 } else { 64 }));
        submit(&mut context, at, &mut memory, 1);
        let before = clock.advance();
        assert_eq!(
            held_up(clock, before),
            (batch, batch),
            "a batch may change layers; what is submitted has not begun"
        );
        context.kick();
        let generation = clock.advance();
        assert_eq!(held_up(clock, generation), (false, true));
        finish(&mut context, 1);
        assert_eq!(held_up(clock, generation), (false, false));
    }
    drop(context);
    assert!(memory.iter().all(|byte| *byte == 7));
}

#[test]
fn writes_that_wait_for_frames_move_on() {
    let (_store, volume) = volume();
    let count = FRAMES + 4;
    let mut memory = vec![9; 4096 * count];
    let mut context = volume.context(false).unwrap();
    let clock = volume.clock();
    context.begin_batch();
    for (token, bytes) in (0..).zip(memory.chunks_mut(4096)) {
        submit(
            &mut context,
            Operation::Write(Sector(token * 8)),
            bytes,
            token,
        );
    }
    context.kick();
    let mut done = Vec::new();
    context.poll(&mut done);
    let waiting = context.under_way();
    assert!(waiting > 0, "there are more clusters than frames");
    let generation = clock.advance();
    assert_eq!(held_up(clock, generation), (true, true));
    // They are tried again, in vain: they wait on, and nobody waits for them.
    volume.cache().bell().answer(false);
    context.poll(&mut done);
    assert_eq!(context.under_way(), waiting);
    assert_eq!(held_up(clock, generation), (false, false));
    let next = clock.advance();
    assert_eq!(held_up(clock, next), (true, true));
    volume.flush_blocking().unwrap();
    volume.cache().bell().answer(false);
    finish(&mut context, waiting);
    assert_eq!(held_up(clock, next), (false, false));
    drop(context);
}
