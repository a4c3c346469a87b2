//! Engines that are dropped or moved with operations under way.

use stratablk_layers::file::sim::Random;
use stratablk_layers::file::{Engine, IoOp, Segment};

use crate::{Bed, Buffers, one, pattern, submit};

pub fn dropped_under_way(bed: &Bed) {
    let random = &mut Random::new(4);
    let file = bed.create("dropped");
    file.write_at(&pattern(1 << 20, random), 0).unwrap();
    for round in 0..30 {
        let mut buffers: Vec<Buffers> = (0..8)
            .map(|_| Buffers::new(&[65536, 65536], round % 2 == 0, random))
            .collect();
        let mut engine = bed.media.engine(8).unwrap();
        for (user, buffers) in (0u64..).zip(&mut buffers) {
            let segments = buffers.segments();
            let (file, offset) = (file.token(), user * 131_072);
            let op = if user % 2 == 0 {
                IoOp::Read {
                    file,
                    offset,
                    segments: &segments,
                }
            } else {
                IoOp::Write {
                    file,
                    offset,
                    segments: &segments,
                }
            };
            submit(engine.as_mut(), op, user);
            if user == 5 {
                engine.kick().unwrap();
            }
        }
        drop(engine);
        // Nobody may write to them any more.
        let before: Vec<Vec<u8>> = buffers.iter().map(Buffers::bytes).collect();
        std::thread::yield_now();
        assert!(
            before
                .iter()
                .zip(&buffers)
                .all(|(before, now)| *before == now.bytes())
        );
    }
}

pub fn moved_to_a_thread(bed: &Bed) {
    let random = &mut Random::new(5);
    let file = bed.create("moved");
    let bytes = pattern(8192, random);
    file.write_at(&bytes, 0).unwrap();
    let token = file.token();
    let mut engine = bed.media.engine(4).unwrap();
    let wake = engine.wake_fd();
    let mut back = std::thread::scope(|scope| {
        let work = || {
            assert_eq!(engine.wake_fd(), wake);
            let mut buffers = Buffers::new(&[8192], false, &mut Random::new(0));
            let segments = buffers.segments();
            one(
                engine.as_mut(),
                IoOp::Read {
                    file: token,
                    offset: 0,
                    segments: &segments,
                },
            )
            .unwrap();
            assert!(buffers.bytes() == bytes);
            engine
        };
        let thread = scope.spawn(work);
        thread.join().unwrap()
    });
    // It stays with the thread that used it, but nothing hangs if that one is gone.
    let mut buffers = Buffers::new(&[512], false, random);
    let segments = buffers.segments();
    submit(
        back.as_mut(),
        IoOp::Read {
            file: token,
            offset: 0,
            segments: &segments,
        },
        1,
    );
    let _refused_or_done = back.kick();
    drop(back);
}

pub fn dropped_after_its_thread(bed: &Bed) {
    let random = &mut Random::new(6);
    let file = bed.create("orphan");
    file.write_at(&pattern(1 << 20, random), 0).unwrap();
    file.sync_data().unwrap();
    let token = file.token();
    let mut buffers: Vec<Buffers> = (0..8)
        .map(|_| Buffers::new(&[131_072], false, random))
        .collect();
    let segments: Vec<Vec<Segment>> = buffers.iter_mut().map(Buffers::segments).collect();
    let mut engine = bed.media.engine(8).unwrap();
    for (user, segments) in (0u64..).zip(&segments) {
        submit(
            engine.as_mut(),
            IoOp::Read {
                file: token,
                offset: user * 131_072,
                segments,
            },
            user,
        );
    }
    submit_elsewhere(engine);
    assert_eq!(buffers.len(), 8);
}

/// Kicks in a thread that ends before the engine is dropped here.
fn submit_elsewhere(mut engine: Box<dyn Engine>) {
    let kick = move || {
        engine.kick().unwrap();
        engine
    };
    drop(std::thread::spawn(kick).join().unwrap());
}
