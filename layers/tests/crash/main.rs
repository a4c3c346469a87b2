//! Crash enumeration: a random workload runs on a simulated disk, and at every step of it the disk's power is cut or the daemon
//! is killed, many times over with other choices of what survived. Each image is opened as the daemon would, read whole,
//! and held against an oracle. What is checked:
//!
//! - P1: every sector holds its last flushed value or a later one; never a mix, never another place's or disk's bytes;
//! - P2: what completed before a completed flush was submitted is there;
//! - P3: an acknowledged snapshot is there, whole, on all its disks; another one whole or not at all;
//! - P4: after a failed write or sync no flush claims success for that data;
//! - P5: after a kill everything acknowledged is there, flushed or not, if the cache's arena is; else what was flushed;
//!
//! that reads return what was written while all this goes on, that nothing hangs, and that a store found after a crash
//! works: it is written to, flushed, crashed again and read again. Some of the kills are followed by another crash while
//! the arena is taken over.
//!
//! The cache is one in which next to nothing fits, most of the time. Commands of the control plane are interrupted by
//! requests, as if they ran on another thread.
//!
//! `STRATABLK_CRASH_IMAGES` sets how many images are examined (90,000 by default); `STRATABLK_CRASH_SEED` the first seed. A
//! violation names the seed and the crash point that show it again.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests: small numbers, and a panic is the verdict"
)]

mod disk;
mod guests;
mod oracle;
mod pick;
mod recovered;
mod watch;
mod workload;

use std::time::Instant;

use stratablk_layers::file::sim::{Fault, FaultEffect, FaultPoint};
use watch::{Crashes, Images};
use workload::{Plan, Workload};

/// A number from the environment.
fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

/// Runs workloads from consecutive seeds until `images` were examined; returns the violations.
fn enumerate(what: &str, images: u64, plan: impl Fn(u64) -> Plan) -> Vec<String> {
    let first_seed = setting("STRATABLK_CRASH_SEED", 1);
    let began = Instant::now();
    let mut examined = Images::default();
    let mut points = 0;
    let mut violations = Vec::new();
    let (mut evictions, mut parks, mut fills) = (0, 0, 0);
    for seed in first_seed.. {
        if examined.all() >= images || !violations.is_empty() {
            break;
        }
        let outcome = Workload::new(seed, plan(seed)).run();
        examined.add(&outcome.images);
        points += outcome.crash_points;
        violations.extend(outcome.violations);
        evictions += outcome.cache.tally.evictions;
        parks += outcome.cache.tally.parks;
        fills += outcome.cache.tally.fills;
    }
    let Images {
        power,
        kill,
        gone,
        second,
    } = examined;
    println!(
        "{what}: images of power cuts {power}, kills {kill}, kills without arena {gone}, second crashes {second}; \
         {points} crash points, {} violations, {:.1} s; {evictions} evictions, {fills} fills, {parks} parked writes",
        violations.len(),
        began.elapsed().as_secs_f64()
    );
    violations
}

/// How many images a test examines: its share of the budget.
fn budget(percent: u64) -> u64 {
    setting("STRATABLK_CRASH_IMAGES", 90_000) * percent / 100
}

/// A fault on every matching operation from a random one on.
fn fault(point: FaultPoint, name: &str, after: u64, times: u64, effect: FaultEffect) -> Fault {
    Fault {
        point,
        name: Some(name.to_owned()),
        after,
        times,
        effect,
    }
}

/// A failure by the seed.
fn failure(seed: u64) -> Fault {
    let after = seed % 23;
    match seed % 11 {
        0 => fault(
            FaultPoint::SyncData,
            "data",
            after % 7,
            1,
            FaultEffect::Error,
        ),
        1 => fault(
            FaultPoint::SyncData,
            "data",
            after % 7,
            1,
            FaultEffect::LostPages,
        ),
        2 => fault(
            FaultPoint::SyncData,
            "map",
            after % 7,
            1,
            FaultEffect::LostPages,
        ),
        3 => fault(
            FaultPoint::SyncData,
            "map",
            after % 7,
            1,
            FaultEffect::Error,
        ),
        4 => fault(FaultPoint::Write, "data", after, 1, FaultEffect::Error),
        5 => fault(FaultPoint::Write, "data", after, 3, FaultEffect::NoSpace),
        6 => fault(FaultPoint::Write, "map", after % 5, 1, FaultEffect::Error),
        7 => fault(
            FaultPoint::SyncData,
            "map.new",
            after % 5,
            1,
            FaultEffect::Error,
        ),
        8 => fault(FaultPoint::Punch, "data", after % 5, 2, FaultEffect::Error),
        9 => fault(FaultPoint::Read, "base.raw", after, 5, FaultEffect::Error),
        _ => fault(FaultPoint::Rename, "map", after % 5, 1, FaultEffect::Error),
    }
}

#[test]
fn power_cuts_at_every_step_lose_nothing_that_was_promised() {
    let violations = enumerate("power cuts", budget(36), |seed| {
        Plan::tight(seed, Crashes::Power)
    });
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

#[test]
fn kills_at_every_step_lose_nothing_that_was_acknowledged() {
    let violations = enumerate("kills", budget(40), |seed| Plan::tight(seed, Crashes::Kill));
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

#[test]
fn failed_writes_and_syncs_are_never_followed_by_a_false_promise() {
    let violations = enumerate("failures and crashes", budget(24), |seed| Plan {
        faults: vec![failure(seed)],
        ..Plan::tight(seed / 11, Crashes::Both)
    });
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

/// Whether an alarm rings.
fn rings(what: &str, images: u64, plan: impl Fn(u64) -> Plan) {
    let violations = enumerate(&format!("canary: {what}"), images, plan);
    assert!(!violations.is_empty(), "{what}, and nobody noticed");
    println!("  {}", violations.first().unwrap());
}

#[test]
fn canary_a_data_sync_that_does_nothing_is_noticed() {
    let lie = |name: &str| {
        vec![fault(
            FaultPoint::SyncData,
            name,
            0,
            u64::MAX,
            FaultEffect::ClaimSuccess,
        )]
    };
    rings("data syncs did nothing", 4000, |seed| Plan {
        faults: lie("data"),
        ..Plan::tight(seed, Crashes::Power)
    });
    rings("map syncs did nothing", 4000, |seed| Plan {
        faults: lie("map"),
        ..Plan::tight(seed, Crashes::Power)
    });
}

#[test]
fn canary_an_arena_that_is_lost_is_noticed() {
    rings("the arena was lost", 2000, |seed| {
        Plan::tight(seed, Crashes::KillWithoutArena)
    });
}

#[cfg(feature = "canary")]
#[test]
fn canary_steps_in_the_wrong_order_are_noticed() {
    use stratablk_layers::canary::Canary;
    let cases = [
        (
            "the map was written before the data",
            Canary::MapBeforeData,
            Crashes::Power,
        ),
        (
            "frames were clean before their records",
            Canary::CleanBeforeCommit,
            Crashes::Kill,
        ),
        (
            "zeroes went without their record",
            Canary::ZeroesWithoutRecord,
            Crashes::Kill,
        ),
        (
            "frames were dropped before the zeroes' record",
            Canary::TrimBeforeRecord,
            Crashes::Kill,
        ),
    ];
    for (what, canary, crashes) in cases {
        rings(what, 20_000, |seed| Plan {
            canary: Some(canary),
            ..Plan::tight(seed, crashes)
        });
    }
}
