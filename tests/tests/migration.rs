//! A real QEMU hands its guest over to another one on this host, through the same socket of the same daemon, while the guest
//! writes and verifies. See "Migrating a machine" in docs/operations.md.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use serde_json::json;
use stratablk_tests::host::{DISK_BYTES, Host, VERIFY_IN_ROUNDS};
use stratablk_tests::machine::{GuestDisk, Machine};
use stratablk_tests::qmp::Qmp;

/// How often the guest moves: to another QEMU, to a third one, and so on.
const MOVES: usize = 3;

/// A QEMU with the guest's disk: the first one boots, the others wait for the guest.
fn start(host: &Host, number: usize, disk: &GuestDisk) -> (Machine, Qmp) {
    let qmp = host.path(&format!("qmp-{number}"));
    let incoming = format!("unix:{}", host.path(&format!("move-{number}")).display());
    let mut more = vec!["--memory", "384", "--qmp", qmp.to_str().unwrap()];
    if number > 0 {
        more.extend(["--qemu-arg", "-incoming", "--qemu-arg", &incoming]);
    }
    let disks = std::slice::from_ref(disk);
    let machine = host.boot_with(&format!("host-{number}"), disks, &more, VERIFY_IN_ROUNDS);
    (machine, Qmp::connect(&qmp))
}

#[test]
fn a_guest_moves_from_one_qemu_to_the_next_while_it_writes_and_verifies() {
    let mut host = Host::new();
    host.noise("base.img", DISK_BYTES);
    host.line("volume create data --base @/base.img").ok();
    let data = host.attach("data", 2);
    let (mut guest, mut here) = start(&host, 0, &data);
    guest.wait_for("round 1");
    for number in 1..=MOVES {
        let (mut next, mut there) = start(&host, number, &data);
        there.wait_for_status("inmigrate");
        let shown = host.line("volume show data --json").json();
        assert_eq!(shown["attachment"]["connections"], 2);
        assert_eq!(shown["attachment"]["rings_running"], 2);

        let events = json!({"capabilities": [{"capability": "events", "state": true}]});
        here.run("migrate-set-capabilities", &events);
        let limits = json!({"downtime-limit": 2000, "max-bandwidth": 0});
        here.run("migrate-set-parameters", &limits);
        let to = format!("unix:{}", host.path(&format!("move-{number}")).display());
        here.run("migrate", &json!({"uri": to}));
        here.wait_migrated();
        here.wait_for_status("postmigrate");
        // It goes on where it was, with what was under way.
        next.wait_for("round");
        there.wait_for_status("running");
        guest.kill();
        next.wait_for("round");
        (guest, here) = (next, there);
    }
    guest.say("enough");
    let printed = guest.finish();
    assert!(printed.iter().any(|line| line == "sound"), "{printed:?}");
    host.finish();
}
