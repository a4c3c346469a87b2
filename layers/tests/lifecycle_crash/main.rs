//! The life of trees of disks: from a seed, thousands of commands of all kinds (snapshots, restores, deletions, clones,
//! types, attachments, sizes, jobs and what interferes with them) while guests write and read stamped sectors; and at any
//! instant of it the power is cut or the daemon is killed. Each image is opened as the daemon would, read, and held against
//! flat copies of all disks and snapshots; then its jobs are carried out, and it must read the same. What is checked:
//!
//! - every disk holds what was flushed (acknowledged, after a kill) or something newer; every snapshot, clone and restored
//!   disk exactly what it held when it was first looked at, before, during and after merges of all kinds;
//! - names that were acknowledged are there, those deleted are gone, and a command under way has happened whole or not at
//!   all, on all volumes of a group;
//! - the offline check finds nothing, no file and no layer is left that nobody needs, and after everything was deleted nothing
//!   at all; the user's images are not written unless that was asked for;
//! - nothing hangs and no job fails, however often it is interrupted; some runs go on from the images of crashes in the
//!   midst of commands and jobs, again and again.
//!
//! The oracle is in `tree`, and is itself tested. `STRATABLK_LIFECYCLE_IMAGES` sets how many images are examined,
//! `STRATABLK_LIFECYCLE_SEED` the first seed, `STRATABLK_CRASH_TRACE` tells all that happens. A violation names the seed and
//! the crash point that show it again.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests: small numbers, and a panic is the verdict"
)]

mod commands;
#[path = "../crash/disk.rs"]
#[expect(
    dead_code,
    reason = "shares the guest of the crash tests and uses a part of it"
)]
mod disk;
mod found;
mod guests;
#[path = "../crash/oracle.rs"]
#[expect(dead_code, reason = "shares the stamps of the crash tests")]
mod oracle;
#[path = "../crash/pick.rs"]
mod pick;
mod run;
mod tidy;
mod tree;
mod tree_tests;
mod watch;

use std::time::Instant;

use run::{Outcome, Plan, Run};

/// Images that are examined by default.
const IMAGES: u64 = 10_000;

/// A number from the environment.
fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

/// Tells what happens, if `STRATABLK_CRASH_TRACE` is set.
fn trace(what: impl FnOnce() -> String) {
    use std::sync::LazyLock;
    static WANTED: LazyLock<bool> =
        LazyLock::new(|| std::env::var_os("STRATABLK_CRASH_TRACE").is_some());
    if *WANTED {
        eprintln!("  {}", what());
    }
}

/// Lives from consecutive seeds until `images` were examined, or something was wrong.
fn live(
    what: &str,
    images: u64,
    plan: impl Fn(u64) -> Plan + std::panic::RefUnwindSafe,
) -> Outcome {
    let first = setting("STRATABLK_LIFECYCLE_SEED", 1);
    let began = Instant::now();
    let mut all = Outcome::default();
    let mut runs = 0;
    for seed in first.. {
        if all.images.all() >= images || !all.violations.is_empty() {
            break;
        }
        runs += 1;
        let run = || Run::new(seed, plan(seed)).run();
        let outcome = std::panic::catch_unwind(run).unwrap_or_else(|_| Outcome {
            violations: vec![format!("seed {seed}: a panic, see above")],
            ..Outcome::default()
        });
        trace(|| format!("seed {seed}: {:?}", outcome.images));
        all.add(outcome);
    }
    println!(
        "{what}: {runs} runs, {} requests, {} steps of jobs, went on after {} crashes ({} in the midst of something); {:?}; \
         {} violations, {:.1} s",
        all.requests,
        all.job_steps,
        all.crashes.0,
        all.crashes.1,
        all.images,
        all.violations.len(),
        began.elapsed().as_secs_f64()
    );
    for (what, (done, refused)) in &all.commands {
        println!("  {what}: {done} done, {refused} refused");
    }
    all
}

/// The alarm rings when something is broken on purpose.
#[cfg(feature = "canary")]
fn rings(what: &str, canary: stratablk_layers::canary::Canary) {
    let plan = |seed| Plan {
        canary: Some(canary),
        ..Plan::of(seed)
    };
    let all = live(&format!("canary: {what}"), IMAGES, plan);
    stratablk_layers::canary::set(None);
    let first = all.violations.first();
    println!(
        "  {}",
        first.unwrap_or_else(|| panic!("{what}, and nobody noticed"))
    );
}

#[cfg(feature = "canary")]
#[test]
fn canary_merges_that_lose_data_are_noticed() {
    use stratablk_layers::canary::Canary;
    rings(
        "data was punched before it was elsewhere",
        Canary::PunchBeforeCommit,
    );
    rings("merged data was not synced", Canary::SkipSync);
    rings("a merge wrote over a guest's data", Canary::LoseGuestWrite);
}

#[cfg(feature = "canary")]
#[test]
fn canary_commands_in_the_wrong_order_are_noticed() {
    use stratablk_layers::canary::Canary;
    rings(
        "files were removed before the commit",
        Canary::RemoveBeforeCommit,
    );
    rings("a group was restored in parts", Canary::RestoreInParts);
}

#[test]
fn every_disk_and_snapshot_survives_the_life_of_its_tree() {
    let images = setting("STRATABLK_LIFECYCLE_IMAGES", IMAGES);
    let all = live("lifecycle", images, Plan::of);
    assert!(all.violations.is_empty(), "{}", all.violations.join("\n"));
    if images >= IMAGES {
        for (what, (done, _)) in &all.commands {
            assert!(*done > 0, "{what} was always refused");
        }
    }
}
