//! Crash enumeration: a random workload runs on a simulated disk, and at every step of it the disk's power is cut, many times
//! over with other choices of what survived. Each image is opened as the daemon would, read whole, and held against an
//! oracle. What is checked:
//!
//! - P1: every sector holds its last flushed value or a later one; never a mix, never another place's or disk's bytes;
//! - P2: what completed before a completed flush was submitted is there;
//! - P3: an acknowledged snapshot is there, whole, on all its disks; another one whole or not at all;
//! - P4: after a failed write or sync no flush claims success for that data;
//!
//! and that a store found after a crash works: it is written to, flushed, cut again and read again.
//!
//! `STRATABLK_CRASH_IMAGES` sets how many images are examined (12,000 by default); `STRATABLK_CRASH_SEED` the first seed. A
//! violation names the seed and the crash point that show it again.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests: small numbers, and a panic is the verdict"
)]

mod disk;
mod oracle;
mod recovered;
mod workload;

use std::time::Instant;

use stratablk_layers::file::sim::{Fault, FaultEffect, FaultPoint};
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
    let mut examined = 0;
    let mut points = 0;
    let mut violations = Vec::new();
    for seed in first_seed.. {
        if examined >= images || !violations.is_empty() {
            break;
        }
        let outcome = Workload::new(seed, plan(seed)).run();
        examined += outcome.images;
        points += outcome.crash_points;
        violations.extend(outcome.violations);
    }
    println!(
        "{what}: {examined} crash images at {points} crash points, {} violations, {:.1} s",
        violations.len(),
        began.elapsed().as_secs_f64()
    );
    violations
}

/// How many images a test examines: its share of the budget.
fn budget(percent: u64) -> u64 {
    setting("STRATABLK_CRASH_IMAGES", 12_000) * percent / 100
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

#[test]
fn power_cuts_at_every_step_lose_nothing_that_was_promised() {
    let violations = enumerate("power cuts", budget(75), |_| Plan::default());
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

#[test]
fn failed_writes_and_syncs_are_never_followed_by_a_false_promise() {
    let violations = enumerate("failures and power cuts", budget(25), |seed| {
        let after = seed % 23;
        let faults = match seed % 8 {
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
            3 => fault(FaultPoint::Write, "data", after, 1, FaultEffect::Error),
            4 => fault(FaultPoint::Write, "data", after, 3, FaultEffect::NoSpace),
            5 => fault(FaultPoint::Write, "map", after % 5, 1, FaultEffect::Error),
            6 => fault(
                FaultPoint::SyncData,
                "map.new",
                after % 5,
                1,
                FaultEffect::Error,
            ),
            _ => fault(FaultPoint::Rename, "map", after % 5, 1, FaultEffect::Error),
        };
        Plan {
            faults: vec![faults],
            ..Plan::default()
        }
    });
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

#[test]
fn canary_a_data_sync_that_does_nothing_is_noticed() {
    let violations = enumerate("canary: no data sync", 4000, |_| Plan {
        faults: vec![fault(
            FaultPoint::SyncData,
            "data",
            0,
            u64::MAX,
            FaultEffect::ClaimSuccess,
        )],
        ..Plan::default()
    });
    assert!(
        !violations.is_empty(),
        "data syncs did nothing and nobody noticed"
    );
}

#[test]
fn canary_a_map_sync_that_does_nothing_is_noticed() {
    let violations = enumerate("canary: no map sync", 4000, |_| Plan {
        faults: vec![fault(
            FaultPoint::SyncData,
            "map",
            0,
            u64::MAX,
            FaultEffect::ClaimSuccess,
        )],
        ..Plan::default()
    });
    assert!(
        !violations.is_empty(),
        "map syncs did nothing and nobody noticed"
    );
}

#[cfg(feature = "canary")]
#[test]
fn canary_a_map_written_before_its_data_is_noticed() {
    let violations = enumerate("canary: map before data", 20_000, |_| Plan {
        map_before_data: true,
        ..Plan::default()
    });
    assert!(
        !violations.is_empty(),
        "the map was written before the data and nobody noticed"
    );
}
