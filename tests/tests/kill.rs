//! Killing the daemon loses nothing that was acknowledged, flushed or not, while the host stays up; losing the host loses
//! nothing that was flushed. See `stratablk_tests::kill`.
//!
//! `STRATABLK_KILLS` says how often to kill (200), `STRATABLK_KILL_SEED` repeats a run, as far as the instants of the kills
//! allow.

use stratablk_tests::kill::client::{Fault, Life, Mix};
use stratablk_tests::kill::home::Cache;
use stratablk_tests::kill::rival::{self, BackEnd, Tally};
use stratablk_tests::kill::run::{After, Failure, Plan, Summary, run};

/// Kills of one store, after which the next one gets another seed and cache.
const KILLS_A_STORE: u64 = 25;
/// Kills after which a loss must have been noticed.
const KILLS_TO_NOTICE: u64 = 40;

/// A number from the environment.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

/// How often to kill in all tests that must lose nothing together.
fn kills() -> u64 {
    number("STRATABLK_KILLS").unwrap_or(200)
}

/// Carries out a plan with as many stores as it takes, and other seeds and caches each time.
fn run_all(plan: Plan) -> Result<(), Box<Failure>> {
    let seed = number("STRATABLK_KILL_SEED");
    let mut left = plan.kills;
    let mut stores = 0;
    while left > 0 {
        let kills = left.min(KILLS_A_STORE);
        let summary = run(Plan {
            seed: seed.unwrap_or(plan.seed + stores),
            kills,
            cache: [Cache::LARGE, Cache::SMALL][usize::from(stores % 2 == 1)],
            ..plan
        })?;
        check_weight(kills, &summary);
        println!("{summary:?}");
        left -= kills;
        stores += 1;
    }
    Ok(())
}

/// A run means something only if there was a load worth killing.
fn check_weight(kills: u64, summary: &Summary) {
    let counts = summary.counts;
    assert!(
        counts.completed > 100 * kills && summary.verified > kills / 4,
        "{summary:?}"
    );
    assert!(counts.repeated > kills && counts.flushes > 0, "{summary:?}");
}

/// Kills of a store, in memory or not: what the daemon can promise so far.
fn kills_lose_nothing(in_memory: bool) {
    let cached = Cache::is_there();
    let plan = Plan {
        seed: 1000 + 1_000_000 * u64::from(in_memory),
        kills: kills().div_ceil(2),
        after: After::Kill,
        in_memory,
        cache: Cache::LARGE,
        // Without a cache that outlives the daemon, what a map does not hold yet is lost with it.
        mix: if cached {
            Mix::Everything
        } else {
            Mix::Transfers
        },
        overwrites_only: !cached,
        life: Life::Anew,
    };
    run_all(plan).unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn kills_lose_nothing_of_a_store_on_disk() {
    kills_lose_nothing(false);
}

#[test]
fn kills_lose_nothing_of_a_store_in_memory() {
    kills_lose_nothing(true);
}

/// A machine with an inflight buffer goes from daemon to daemon with 32 requests under way on each queue: each of them comes
/// back once, from one daemon or the next, and nothing is submitted again.
fn each_comes_back_once(life: Life, seed: u64) {
    for in_memory in [false, true] {
        let plan = Plan {
            seed: seed + 1_000_000 * u64::from(in_memory),
            kills: kills().div_ceil(4),
            after: After::Kill,
            in_memory,
            cache: Cache::LARGE,
            mix: Mix::Everything,
            overwrites_only: false,
            life,
        };
        run_all(plan).unwrap_or_else(|failure| panic!("{failure}"));
    }
}

#[test]
fn a_tracked_machine_gets_each_request_back_once() {
    each_comes_back_once(Life::Lasting, 5_001_000);
}

#[test]
fn the_independent_driver_gets_each_request_back_once() {
    each_comes_back_once(Life::Relayed, 7_001_000);
}

#[test]
fn a_reboot_loses_only_what_was_not_flushed() {
    let plan = Plan {
        seed: 3_001_000,
        kills: kills().div_ceil(4),
        after: After::Reboot,
        in_memory: false,
        cache: Cache::LARGE,
        mix: Mix::Everything,
        overwrites_only: false,
        life: Life::Anew,
    };
    run_all(plan).unwrap_or_else(|failure| panic!("{failure}"));
}

/// The alarm rings: without the cache, a guest that goes on misses first writes.
#[test]
fn canary_a_lost_cache_is_noticed() {
    let plan = Plan {
        seed: number("STRATABLK_KILL_SEED").unwrap_or(4_001_000),
        kills: KILLS_TO_NOTICE,
        after: After::LostCache,
        in_memory: true,
        cache: Cache::LARGE,
        mix: Mix::Unflushed,
        overwrites_only: false,
        life: Life::Anew,
    };
    match run(plan) {
        Err(failure) if matches!(failure.fault, Fault::Wrong(..)) => println!("noticed: {failure}"),
        Err(failure) => panic!("something else: {failure}"),
        Ok(summary) => panic!("not noticed: {summary:?}"),
    }
}

/// The control group: what `qemu-storage-daemon` loses by the same kills under the same load, by the same oracle. A raw file is
/// as safe as the host's memory, so there the oracle has to find nothing; qcow2 keeps the places of new clusters to
/// itself until a flush, so there it has to find losses. `STRATABLK_CONTROL_KILLS`: how often to kill each.
#[test]
fn kills_of_a_rival_are_counted_beside_ours() {
    let kills = number("STRATABLK_CONTROL_KILLS").unwrap_or(12);
    let seed = number("STRATABLK_KILL_SEED").unwrap_or(6_001_000);
    let of = |back_end| {
        rival::count(back_end, seed, kills).unwrap_or_else(|fault| panic!("{back_end}: {fault}"))
    };
    let back_ends = [BackEnd::Stratablk, BackEnd::Qcow2, BackEnd::Raw];
    let tallies = back_ends.map(of);
    println!("{}", Tally::head());
    for (back_end, tally) in back_ends.iter().zip(&tallies) {
        println!("{}", tally.line(*back_end));
        assert!(
            tally.completed > 100 * kills && tally.cut_off > 0,
            "{back_end}: {tally:?}"
        );
    }
    let [ours, qcow2, raw] = tallies;
    for (back_end, tally) in [(BackEnd::Stratablk, ours), (BackEnd::Raw, raw)] {
        assert_eq!(tally.losses, 0, "{back_end}: {tally:?}");
    }
    assert!(qcow2.unflushed > 0, "the oracle sees no loss: {qcow2:?}");
}
