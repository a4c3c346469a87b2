//! Other sizes.

use stratablk_layers::catalog::{VolumeKind, Way};
use stratablk_layers::lifecycle::{DeleteOptions, ResizeOptions, RestoreOptions};
use stratablk_layers::store::{Store, VolumeSource};
use stratablk_layers::units::{SECTOR_BYTES, Sector, SectorRange};
use stratablk_layers::volume::{Operation, RequestError};

use crate::oracle::{Value, stamp};
use crate::says;
use crate::world::{SECTORS, World, crash_everywhere};

/// Allows less.
const SHRINK: ResizeOptions = ResizeOptions {
    shrink: true,
    force: false,
};
/// Allows anything.
const FORCE: ResizeOptions = ResizeOptions {
    shrink: true,
    force: true,
};

/// Gives a volume so many sectors.
#[track_caller]
fn resize(store: &Store, volume: &str, sectors: u64, options: ResizeOptions) {
    let info = store
        .resize(volume, sectors * SECTOR_BYTES, options)
        .unwrap();
    assert_eq!(info.size_bytes, sectors * SECTOR_BYTES);
}

/// Runs of stamps over zeroes, on a disk of this size.
fn disk(sectors: u64, runs: &[(u64, u64, u64)]) -> Vec<Value> {
    crate::over(&vec![Value::Zero; sectors as usize], runs)
}

/// A volume over the base, which is full.
fn over_base(world: &World) {
    let base = VolumeSource::Base("/base.raw".into());
    world.store().create_volume("a", &base).unwrap();
}

#[test]
fn a_larger_disk_gains_zeroes() {
    let mut world = World::new();
    world.create("a");
    world.write("a", 50, 14, 2);
    for (size, id) in [(65, 3), (71, 4), (72, 5), (4096, 6), (4100, 7)] {
        let before = world.values("a");
        resize(world.store(), "a", size, ResizeOptions::default());
        let mut expected = disk(size, &[]);
        expected[..before.len()].copy_from_slice(&before);
        assert_eq!(world.values("a"), expected, "{size}");
        world.write("a", size - 1, 1, id);
        expected[size as usize - 1] = Value::Stamp(id);
        assert_eq!(world.values("a"), expected);
        world.reopen();
        assert_eq!(world.values("a"), expected, "{size}, opened again");
    }
    world.assert_tidy();
}

#[test]
fn what_was_cut_off_does_not_come_back() {
    for (small, large) in [(40, 64), (37, 64), (37, 39), (37, 100), (40, 41), (1, 4096)] {
        for reopened in [false, true] {
            let mut world = World::new();
            over_base(&world);
            world.write("a", 0, 64, 2);
            world.snapshot("s", &["a"]);
            world.write("a", 30, 30, 3);
            let restored = world.values("a");
            resize(world.store(), "a", small, FORCE);
            assert_eq!(world.values("a"), restored[..small as usize]);
            if reopened {
                world.reopen();
            }
            resize(world.store(), "a", large, ResizeOptions::default());
            let mut expected = disk(large, &[]);
            expected[..small as usize].copy_from_slice(&restored[..small as usize]);
            assert_eq!(world.values("a"), expected, "{small} to {large}");
            world.write("a", large - 1, 1, 4);
            expected[large as usize - 1] = Value::Stamp(4);
            assert_eq!(world.values("a"), expected, "{small} to {large}");
            world.reopen();
            assert_eq!(world.values("a"), expected, "{small} to {large}");
            // A snapshot keeps its size.
            world
                .store()
                .restore("a", "s", &RestoreOptions::default())
                .unwrap();
            assert_eq!(world.values("a"), disk(SECTORS, &[(0, 64, 2)]));
            world.assert_tidy();
        }
    }
}

#[test]
fn a_disk_grows_while_it_is_used() {
    let world = World::new();
    over_base(&world);
    resize(world.store(), "a", 37, FORCE);
    let mut queue = world.queue("a");
    let write = |start: u64, count: u64, id| {
        let bytes = (start..start + count)
            .flat_map(|sector| stamp(7, sector, id))
            .collect();
        (Operation::Write(Sector(start)), bytes)
    };
    let run = |queue: &mut crate::disk::Queue, (operation, bytes)| queue.run(operation, bytes).0;
    let refused = Err(RequestError::OutOfRange);
    assert_eq!(run(&mut queue, write(33, 6, 2)), refused);
    run(&mut queue, write(33, 4, 2)).unwrap();
    resize(world.store(), "a", 61, ResizeOptions::default());
    let mut expected = disk(61, &[(0, 33, 1), (33, 4, 2)]);
    assert_eq!(queue.read_all(7, 61).unwrap(), expected);
    run(&mut queue, write(35, 4, 3)).unwrap();
    run(&mut queue, write(60, 1, 3)).unwrap();
    expected[35..39].fill(Value::Stamp(3));
    expected[60] = Value::Stamp(3);
    assert_eq!(queue.read_all(7, 61).unwrap(), expected);
    assert_eq!(run(&mut queue, write(60, 2, 4)), refused);
    run(&mut queue, (Operation::Flush, Vec::new())).unwrap();
    resize(world.store(), "a", 5000, ResizeOptions::default());
    expected.resize(5000, Value::Zero);
    assert_eq!(queue.read_all(7, 5000).unwrap(), expected);
    let range = SectorRange::new(Sector(32), 4968).unwrap();
    let zero = Operation::WriteZeroes { range, unmap: true };
    run(&mut queue, (zero, Vec::new())).unwrap();
    expected[32..].fill(Value::Zero);
    assert_eq!(queue.read_all(7, 5000).unwrap(), expected);
    says(
        world.store().resize("a", 512, FORCE),
        &["in use by a machine", "volume detach a"],
    );
    drop(queue);
    assert_eq!(world.values("a"), expected);
}

#[test]
fn a_snapshot_of_before_stays_as_small_as_it_was() {
    let world = World::new();
    world.create("a");
    world.write("a", 60, 4, 2);
    world.snapshot("small", &["a"]);
    resize(world.store(), "a", 128, ResizeOptions::default());
    world.write("a", 60, 68, 3);
    world.snapshot("large", &["a"]);
    world.write("a", 0, 128, 4);
    world.clone_of("b", "a", "small");
    world.clone_of("c", "a", "large");
    assert_eq!(world.values("b"), disk(64, &[(60, 4, 2)]));
    assert_eq!(world.values("c"), disk(128, &[(60, 68, 3)]));
    world.assert_tidy();
}

#[test]
fn what_is_asked_for_must_make_sense() {
    let world = World::new();
    over_base(&world);
    let store = world.store();
    let any = ResizeOptions::default();
    says(store.resize("b", 512, any), &["b"]);
    says(store.resize("a", 1000, any), &["1000", "multiple of 512"]);
    says(store.resize("a", 0, any), &["multiple of 512"]);
    says(store.resize("a", 1 << 60, any), &["largest disk"]);
    says(store.resize("a", 512, any), &["--shrink"]);
    says(store.resize("a", 512, SHRINK), &["--force", "32768"]);
    resize(store, "a", SECTORS, any);
    for (kind, why) in [
        (VolumeKind::Readonly, "is readonly"),
        (VolumeKind::Immutable, "starts from"),
        (VolumeKind::Multiattach, "starts from"),
    ] {
        store.set_kind("a", kind).unwrap();
        says(store.resize("a", 1 << 20, any), &[why, "--type normal"]);
    }
}

#[test]
fn written_sectors_are_not_cut_off_unasked() {
    let world = World::new();
    world.create("a");
    let store = world.store();
    world.write("a", 35, 1, 2);
    resize(store, "a", 63, SHRINK);
    resize(store, "a", 37, SHRINK);
    resize(store, "a", 36, SHRINK);
    says(store.resize("a", 35 * 512, SHRINK), &["--force"]);
    world.snapshot("s", &["a"]);
    says(store.resize("a", 35 * 512, SHRINK), &["--force"]);
    // Zeroes over it will do.
    let range = SectorRange::new(Sector(32), 4).unwrap();
    let mut queue = world.queue("a");
    queue.run(Operation::Discard(range), Vec::new()).0.unwrap();
    drop(queue);
    resize(store, "a", 32, SHRINK);
    resize(store, "a", 64, SHRINK);
    assert_eq!(world.values("a"), disk(64, &[]));
    world.write("a", 63, 1, 3);
    resize(store, "a", 7, FORCE);
    resize(store, "a", 64, SHRINK);
    assert_eq!(world.values("a"), disk(64, &[]));
}

#[test]
fn crashes_while_a_disk_grows() {
    for (from, to) in [(64, 128), (37, 61), (40, 64), (37, 38)] {
        let setup = |world: &World| {
            over_base(world);
            resize(world.store(), "a", from, FORCE);
            world.write("a", 0, 9, 2);
            world.write("a", from - 2, 2, 3);
        };
        let what = format!("grow {from} to {to}");
        crash_everywhere(&what, setup, |store| {
            resize(store, "a", to, ResizeOptions::default());
        });
    }
}

#[test]
fn crashes_while_a_disk_shrinks() {
    for to in [63, 40, 37, 1] {
        let setup = |world: &World| {
            over_base(world);
            world.write("a", 30, 34, 2);
        };
        crash_everywhere(&format!("shrink to {to}"), setup, |store| {
            resize(store, "a", to, FORCE);
        });
    }
}

/// Deletes a snapshot of an open volume, and looks at the disk when its layer is gone.
#[track_caller]
fn delete_under(world: &World, volume: &str, snapshot: &str) {
    let open = world.queue(volume);
    let before = world.values(volume);
    let options = DeleteOptions {
        way: Some(Way::Up),
        ..DeleteOptions::default()
    };
    world
        .store()
        .delete_snapshot(volume, snapshot, options)
        .unwrap();
    world.work_all();
    assert!(world.values(volume) == before);
    drop(open);
    world.assert_tidy();
}

#[test]
fn data_behind_the_end_of_a_disk_is_nobodys_answer() {
    // In the last cluster of the smaller disk, and of nothing else there: 96 is its last sector.
    let world = World::new();
    world.create("a");
    resize(world.store(), "a", 100, ResizeOptions::default());
    world.write("a", 98, 2, 2);
    world.snapshot("s1", &["a"]);
    resize(world.store(), "a", 97, FORCE);
    world.snapshot("s2", &["a"]);
    let mut world = world;
    world.restart();
    delete_under(&world, "a", "s1");
    // In the layer that was made smaller itself; it is below a smaller disk's layer when the disk is large again.
    let mut world = World::new();
    world.create("a");
    resize(world.store(), "a", 100, ResizeOptions::default());
    world.write("a", 98, 2, 2);
    resize(world.store(), "a", 97, FORCE);
    world.snapshot("s1", &["a"]);
    world.snapshot("s2", &["a"]);
    resize(world.store(), "a", 200, SHRINK);
    world.restart();
    delete_under(&world, "a", "s1");
    assert!(world.values("a") == disk(200, &[]));
}
