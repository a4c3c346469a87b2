//! A Linux guest under QEMU goes on while its daemon is killed again and again: its requests come back, each once, from one
//! daemon or the next. `STRATABLK_GUEST_KILLS` says how often (30). And it goes on, with its connection, while one daemon takes
//! over from the other.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use stratablk_tests::host::{DISK_BYTES, Host, VERIFY_IN_ROUNDS};
use stratablk_tests::load::random::Random;

/// The longest time between a start and a kill.
const LIFE_MAX_MS: u64 = 700;

/// Kills under one guest, after which another one is booted.
const KILLS_A_GUEST: u64 = 30;

#[test]
fn a_guest_does_not_notice_that_its_daemon_is_killed() {
    let kills = std::env::var("STRATABLK_GUEST_KILLS").map_or(30, |text| text.parse().unwrap());
    let mut left: u64 = kills;
    while left > 0 {
        let now = left.min(KILLS_A_GUEST);
        kill_under_a_guest(now, left);
        left -= now;
    }
}

/// Kills the daemon so often under one guest.
fn kill_under_a_guest(kills: u64, seed: u64) {
    let mut host = Host::new();
    host.noise("base.img", DISK_BYTES);
    host.line("volume create data --base @/base.img").ok();
    let data = host.attach("data", 2);
    let mut guest =
        host.boot_reconnecting("survivor", std::slice::from_ref(&data), VERIFY_IN_ROUNDS);
    guest.wait_for("round 1");
    let mut random = Random::new(seed);
    for kill in 1..=kills {
        // A line of the guest ends the wait early; the instant is random either way.
        let life = Duration::from_millis(random.below(LIFE_MAX_MS));
        guest.wait_briefly_for("round", life);
        host.kill();
        host.serve();
        if kill % 10 == 0 {
            // It makes progress, all the while.
            guest.wait_for("round");
        }
    }
    guest.wait_for("round");
    guest.say("enough");
    let printed = guest.finish();
    assert!(printed.iter().any(|line| line == "sound"), "{printed:?}");
    host.finish();
}

/// Takeovers under one guest.
const TAKEOVERS: usize = 5;

#[test]
fn a_guest_does_not_notice_that_another_daemon_takes_over() {
    let mut host = Host::new();
    host.noise("base.img", DISK_BYTES);
    host.line("volume create data --base @/base.img").ok();
    let data = host.attach("data", 2);
    // One that would not connect anew.
    let mut guest = host.boot("keeper", std::slice::from_ref(&data), VERIFY_IN_ROUNDS);
    guest.wait_for("round 1");
    let mut random = Random::new(1);
    for _ in 0..TAKEOVERS {
        let life = Duration::from_millis(random.below(LIFE_MAX_MS));
        guest.wait_briefly_for("round", life);
        let log = host.succeed();
        let line = log.lines().find(|line| line.contains("guests waited"));
        println!("{}", line.unwrap());
        guest.wait_for("round");
    }
    guest.say("enough");
    let printed = guest.finish();
    assert!(printed.iter().any(|line| line == "sound"), "{printed:?}");
    host.finish();
}
