//! The commands on the tree of layers: what they do, what they refuse, and what a crash at any step of them leaves.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests: small numbers, and a panic is the verdict"
)]
#![expect(
    dead_code,
    reason = "shares the guest and the oracle of the crash tests and uses a part of them"
)]

mod crashes;
mod deleting;
#[path = "../crash/disk.rs"]
mod disk;
mod failures;
mod host;
mod kinds;
mod meanwhile;
#[path = "../crash/oracle.rs"]
mod oracle;
mod resizing;
mod restoring;
mod world;

use oracle::Value;
use stratablk_layers::Error;

/// A disk of stamps: runs of sectors (first, count, stamp) over zeroes.
fn stamps(runs: &[(u64, u64, u64)]) -> Vec<Value> {
    over(&vec![Value::Zero; world::SECTORS as usize], runs)
}

/// Runs of stamps over what was there.
fn over(below: &[Value], runs: &[(u64, u64, u64)]) -> Vec<Value> {
    let mut values = below.to_vec();
    for (start, count, id) in runs {
        values[*start as usize..(start + count) as usize].fill(Value::Stamp(*id));
    }
    values
}

/// A refusal says what it is about and what to do.
#[track_caller]
fn says<T: std::fmt::Debug>(result: Result<T, Error>, words: &[&str]) {
    let text = result.unwrap_err().to_string();
    for word in words {
        assert!(text.contains(word), "{text:?} does not say {word:?}");
    }
}
