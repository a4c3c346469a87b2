//! What a running guest sees of the life of its snapshots: nothing. Real Linux guests write and verify while layers below
//! them are joined, in both directions.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use stratablk_tests::host::{DISK_BYTES, Host};
use stratablk_tests::machine::Machine;

/// fio writes and verifies files again and again, one job on each processor and hence on each queue, until told to stop.
const VERIFY: &str = r#"
mkfs.ext4 -q -F /dev/vda
mount /dev/vda /mnt/d
cat >/tmp/job <<'JOB'
[verify]
directory=/mnt/d
size=12m
numjobs=2
cpus_allowed=0-1
cpus_allowed_policy=split
ioengine=libaio
direct=1
iodepth=16
rw=randwrite
bssplit=1k/10:4k/60:16k/20:64k/10
verify=crc32c
verify_fatal=1
fsync=64
group_reporting=1
JOB
echo "mounted"
round=0
while [ $round -lt 200 ] && ! read -t 0; do
    round=$((round + 1))
    fio /tmp/job >/tmp/fio 2>&1 || { cat /tmp/fio; exit 1; }
    echo "verified $round"
done
read -r _
fio --verify_only /tmp/job >/tmp/fio 2>&1 || { cat /tmp/fio; exit 1; }
umount /mnt/d
e2fsck -fn /dev/vda
echo 3 >/proc/sys/vm/drop_caches
mount /dev/vda /mnt/d
fio --verify_only /tmp/job >/tmp/fio 2>&1 || { cat /tmp/fio; exit 1; }
umount /mnt/d
echo "rounds $round"
"#;

/// Waits until the guest has verified once more.
fn one_more_round(guest: &mut Machine, round: &mut u32) {
    *round += 1;
    guest.wait_for(&format!("verified {round}"));
}

/// How deep the chain of the volume is.
fn depth(host: &Host) -> u64 {
    let shown = host.line("volume show data --json").json();
    shown["depth"].as_u64().unwrap()
}

#[test]
fn a_guest_verifies_what_it_writes_while_its_snapshots_are_deleted_both_ways() {
    let mut host = Host::new();
    host.noise("base.img", DISK_BYTES);
    host.line("volume create data --base @/base.img").ok();
    let data = host.attach("data", 2);
    let mut guest = host.boot("merging", &[data], VERIFY);
    guest.wait_for("mounted");
    let mut round = 0;
    one_more_round(&mut guest, &mut round);
    // The layer right below the active one, joined with it up and down.
    for way in ["up", "down"] {
        host.line("snapshot create one data").ok();
        // Some new writes on top, and a merge that meets more of them.
        let _ = guest.wait_briefly_for("nothing", Duration::from_millis(300));
        host.line(&format!("snapshot delete data one --way {way} --wait"))
            .ok();
        assert_eq!(depth(&host), 2, "{way}");
    }
    one_more_round(&mut guest, &mut round);
    // A layer between two others, and then the last one.
    for way in ["up", "down"] {
        host.line("snapshot create lower data").ok();
        let _ = guest.wait_briefly_for("nothing", Duration::from_millis(300));
        host.line("snapshot create upper data").ok();
        host.line(&format!("snapshot delete data lower --way {way} --wait"))
            .ok();
        assert_eq!(depth(&host), 3, "{way}");
        host.line("snapshot delete data upper --wait").ok();
        assert_eq!(depth(&host), 2, "{way}");
    }
    one_more_round(&mut guest, &mut round);
    // A merge in the background, slowed down so that it lasts while the guest verifies.
    host.line("snapshot create slow data").ok();
    host.line("snapshot delete data slow --way up --rate 4M")
        .ok();
    one_more_round(&mut guest, &mut round);
    guest.say("enough");
    let printed = guest.finish();
    let rounds = printed.iter().find(|line| line.starts_with("rounds "));
    println!("{}", rounds.unwrap());
    host.finish();
}

#[test]
fn a_guest_goes_on_while_its_disk_becomes_independent_of_its_base() {
    let mut host = Host::new();
    host.noise("base.img", DISK_BYTES);
    host.line("volume create data --base @/base.img").ok();
    let data = host.attach("data", 2);
    let mut guest = host.boot("flattening", &[data], VERIFY);
    guest.wait_for("mounted");
    host.line("snapshot create before data").ok();
    let mut round = 0;
    one_more_round(&mut guest, &mut round);
    host.line("volume flatten data --wait").ok();
    assert_eq!(depth(&host), 1);
    one_more_round(&mut guest, &mut round);
    guest.say("enough");
    guest.finish();
    // The snapshot is what it was: of a disk that was just formatted.
    host.line("clone data@before old").ok();
    let old = host.attach("old", 1);
    host.boot(
        "old",
        &[old],
        "e2fsck -fy /dev/vda || [ $? -le 1 ]; e2fsck -fn /dev/vda\n",
    )
    .finish();
    host.finish();
}
