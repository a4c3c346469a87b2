//! Random operations against a model.

use std::collections::BTreeMap;

use stratablk_layers::file::sim::Random;
use stratablk_layers::file::{Engine, IoDone, IoOp};

use crate::{Bed, Buffers, check, pattern, submit};

/// Bytes of the file that random operations work on.
const FILE_BYTES: usize = 192 * 1024;

/// Bytes of a page of the host's cache.
const PAGE: usize = 4096;

/// Lengths that sum up to `total`; multiples of 512 if `whole`.
fn cut(total: usize, whole: bool, random: &mut Random) -> Vec<usize> {
    let unit = if whole { 512 } else { 1 };
    let mut lengths = Vec::new();
    let mut left = total;
    while left > 0 && lengths.len() < 20 {
        let len = (random.index(left / unit + 1) * unit).min(left);
        lengths.push(len);
        left -= len;
        if random.chance(60) {
            break;
        }
    }
    lengths.push(left);
    lengths
}

/// An operation of the random test that is under way.
enum Pending {
    Read { buffers: Buffers, expected: Vec<u8> },
    Write { _buffers: Buffers },
    Other,
}

pub fn random_operations(bed: &Bed, seed: u64) {
    let random = &mut Random::new(seed);
    let file = bed.create(&format!("random-{seed}"));
    let token = file.token();
    let mut engine = bed.media.engine(8).unwrap();
    let mut model: Vec<u8> = Vec::new();
    let mut pending: BTreeMap<u64, (std::ops::Range<usize>, bool, Pending)> = BTreeMap::new();
    let mut done = Vec::new();
    for user in 0..1500u64 {
        // Whole sectors mostly, since that is what direct files are for.
        let unit = if random.chance(200) { 512 } else { 1 };
        let start = random.index(FILE_BYTES / unit) * unit;
        let room = if random.chance(200) {
            8192.min(FILE_BYTES - start)
        } else {
            FILE_BYTES - start
        };
        let len = random.index(room / unit + 1) * unit;
        let range = start..start + len;
        let kind = random.index(10);
        let changes = kind >= 4;
        // Operations that overlap have no order; those on one page neither if one of them goes through the host's cache.
        let pages = start / PAGE * PAGE
            ..(start + len)
                .next_multiple_of(PAGE)
                .max(start / PAGE * PAGE + PAGE);
        let clash =
            |other: &std::ops::Range<usize>| other.start < pages.end && pages.start < other.end;
        while engine.room() == 0
            || pending
                .values()
                .any(|(other, theirs, _)| clash(other) && (changes || *theirs))
        {
            engine.kick().unwrap();
            engine.wait().unwrap();
            engine.reap(&mut done).unwrap();
            finish(&mut done, &mut pending);
        }
        let offset = start as u64;
        let odd = random.chance(128);
        let lengths = cut(len, random.chance(128) && unit == 512, random);
        match kind {
            0..4 => {
                let mut buffers = Buffers::new(&lengths, odd, random);
                let mut expected = vec![0; len];
                let there = model.len().saturating_sub(start).min(len);
                if there > 0 {
                    expected[..there].copy_from_slice(&model[start..start + there]);
                }
                let segments = buffers.segments();
                submit(
                    engine.as_mut(),
                    IoOp::Read {
                        file: token,
                        offset,
                        segments: &segments,
                    },
                    user,
                );
                pending.insert(user, (pages, false, Pending::Read { buffers, expected }));
            }
            4..8 => {
                let mut buffers = Buffers::new(&lengths, odd, random);
                let bytes = pattern(len, random);
                buffers.fill(&bytes);
                let segments = buffers.segments();
                submit(
                    engine.as_mut(),
                    IoOp::Write {
                        file: token,
                        offset,
                        segments: &segments,
                    },
                    user,
                );
                if len > 0 {
                    model.resize(model.len().max(range.end), 0);
                    model[range].copy_from_slice(&bytes);
                }
                pending.insert(user, (pages, true, Pending::Write { _buffers: buffers }));
            }
            8 => {
                submit(
                    engine.as_mut(),
                    IoOp::Punch {
                        file: token,
                        offset,
                        len: len as u64,
                    },
                    user,
                );
                let end = range.end.min(model.len());
                if start < end {
                    model[start..end].fill(0);
                }
                pending.insert(user, (pages, true, Pending::Other));
            }
            _ => {
                submit(engine.as_mut(), IoOp::SyncData { file: token }, user);
                pending.insert(user, (0..0, false, Pending::Other));
            }
        }
        if random.chance(80) {
            engine.kick().unwrap();
        }
        if random.chance(60) {
            engine.reap(&mut done).unwrap();
            finish(&mut done, &mut pending);
        }
        if random.chance(8) {
            // The synchronous view of the same file.
            settle(engine.as_mut(), &mut pending);
            let start = random.index(FILE_BYTES);
            let len = random.index(10_000);
            if random.chance(128) {
                let bytes = pattern(len, random);
                file.write_at(&bytes, start as u64).unwrap();
                if len > 0 {
                    model.resize(model.len().max(start + len), 0);
                    model[start..start + len].copy_from_slice(&bytes);
                }
            }
            assert_eq!(file.len().unwrap(), model.len() as u64);
            check(file.as_ref(), &model);
        }
    }
    settle(engine.as_mut(), &mut pending);
    check(file.as_ref(), &model);
    file.set_len(1000).unwrap();
    model.truncate(1000);
    model.resize(5000, 0);
    file.set_len(5000).unwrap();
    check(file.as_ref(), &model);
}

/// Checks and forgets what has completed.
fn finish(
    done: &mut Vec<IoDone>,
    pending: &mut BTreeMap<u64, (std::ops::Range<usize>, bool, Pending)>,
) {
    for IoDone { user, result } in done.drain(..) {
        let (_, _, pending) = pending.remove(&user).unwrap();
        result.unwrap_or_else(|error| panic!("operation {user}: {error}"));
        if let Pending::Read { buffers, expected } = pending {
            assert!(
                buffers.bytes() == expected,
                "operation {user} read something else"
            );
        }
    }
}

fn settle(
    engine: &mut dyn Engine,
    pending: &mut BTreeMap<u64, (std::ops::Range<usize>, bool, Pending)>,
) {
    let mut done = Vec::new();
    engine.kick().unwrap();
    while engine.under_way() > 0 {
        engine.wait().unwrap();
        engine.reap(&mut done).unwrap();
        finish(&mut done, pending);
    }
    assert!(pending.is_empty());
}
