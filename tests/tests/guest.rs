//! What a user of stratablk sees: real Linux guests and real firmware on disks that the real daemon serves.
//!
//! Each test runs the daemon on a store of its own and boots one or more guests (`scripts/guest`). What the guests find is
//! compared with what they printed before, or with a model of the disk; and the raw image at the bottom must still be what
//! it was, whatever was written above it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use stratablk_tests::host::{
    DISK_BYTES, Host, MIB, SLACK, Sums, assert_holds, noise, sum_of, sums,
};
use stratablk_tests::machine::Machine;

/// Makes files in rounds of twenty. A round is synced before its checksums and then `synced ROUND` are printed: from there
/// on its files must be found in every snapshot. Goes on until a line comes.
const WRITE_IN_ROUNDS: &str = r#"
mkfs.ext4 -q -F /dev/vda
mount /dev/vda /mnt/d
cd /mnt/d
round=0
while [ $round -lt 60 ] && ! read -t 0; do
    round=$((round + 1))
    for file in {1..20}; do random $((round * 31 + file)) >r$round-$file; done
    sync
    sums in-rounds r$round-*
    echo "synced $round"
done
read -r _
"#;

/// The files whose rounds had been synced when the guest printed this line.
fn synced_before(printed: &[String], line: &str) -> Sums {
    let end = printed.iter().position(|seen| seen == line).unwrap();
    sums(&printed[..end], "in-rounds")
}

#[test]
fn a_clone_has_the_files_of_its_snapshot_and_the_volume_has_the_later_ones_too() {
    let mut host = Host::new();
    host.noise("base.img", DISK_BYTES);
    host.line("volume create data --base @/base.img").ok();
    let data = host.attach("data", 2);

    // The guest never learns that a snapshot is taken while it writes. Afterwards it changes what was there: files are
    // written over in place, removed, and added.
    let writer = r#"
for file in r1-*; do random $RANDOM | dd of=$file conv=notrunc status=none; done
rm r2-*
for file in {1..40}; do random $file >late-$file; done
sync
sums at-end [rl]*-*
cd /
umount /mnt/d
e2fsck -fn /dev/vda
"#;
    let mut guest = host.boot(
        "writer",
        std::slice::from_ref(&data),
        &format!("{WRITE_IN_ROUNDS}{writer}"),
    );
    guest.wait_for("synced 6");
    host.line("snapshot create moment data").ok();
    guest.say("enough");
    let printed = guest.finish();
    let at_snapshot = synced_before(&printed, "synced 6");
    let at_end = sums(&printed, "at-end");
    assert_eq!(at_snapshot.len(), 6 * 20);
    assert!(at_end.len() >= 5 * 20 + 40, "{at_end:?}");

    host.line("volume create clone --from data@moment").ok();
    let clone = host.attach("clone", 2);
    let reader = r#"
echo "the snapshot was taken of a mounted file system:"
dumpe2fs -h /dev/vda 2>/dev/null | grep needs_recovery
look() {
    mount $1 /mnt/d
    (cd /mnt/d && sums $2 [rl]*-*)
    umount /mnt/d
    e2fsck -fn $1
}
look /dev/vda clone
look /dev/vdb volume
"#;
    let printed = host.boot("reader", &[clone, data], reader).finish();
    let in_clone = sums(&printed, "clone");
    assert_holds(&in_clone, &at_snapshot);
    let late = in_clone.keys().find(|name| name.starts_with("late-"));
    assert_eq!(late, None, "a file from after the snapshot is in the clone");
    assert_eq!(sums(&printed, "volume"), at_end);
    host.finish();
}

#[test]
fn fio_verifies_what_it_wrote_through_two_queues_under_snapshots_and_after_a_restart() {
    let mut host = Host::new();
    let base = host.noise("base.img", DISK_BYTES);
    host.line("volume create data --base @/base.img").ok();
    let data = host.attach("data", 2);

    // One job on each processor, hence one on each queue, each with an area of its own in the first 64 MiB.
    let job = r#"
cat >/tmp/job <<'JOB'
[verify]
filename=/dev/vda
size=24m
offset_increment=32m
numjobs=2
cpus_allowed=0-1
cpus_allowed_policy=split
ioengine=libaio
direct=1
iodepth=16
rw=randwrite
bssplit=512/20:1k/10:4k/40:16k/20:64k/10
verify=crc32c
verify_fatal=1
group_reporting=1
JOB
# The part of the disk that nobody writes is still the base.
rest() { dd if=/dev/vda bs=1M skip=64 iflag=direct status=none | sums "$1" -; }
"#;
    let write = r#"
fio /tmp/job >/tmp/fio 2>&1 &
half=$((24 * 2 * 1024))
written() { read -r _ _ _ _ _ _ sectors _ </sys/block/vda/stat; }
until written && [ $sectors -gt $((half / 3)) ]; do sleep 0.05; done
echo "writing"
until written && [ $sectors -ge $((half * 2)) ]; do kill -0 $! || break; sleep 0.05; done
echo "written"
wait $! || { cat /tmp/fio; exit 1; }
rest kept
"#;
    let mut guest = host.boot("fio", std::slice::from_ref(&data), &format!("{job}{write}"));
    guest.wait_for("writing");
    let running = host.line("volume show data --json").json();
    assert_eq!(
        running["attachment"]["rings_running"], 2,
        "both queues are in use"
    );
    let mut snapshots = 0;
    loop {
        host.line(&format!("snapshot create under-load-{snapshots} data"))
            .ok();
        if guest
            .wait_briefly_for("written", Duration::from_millis(200))
            .is_some()
        {
            break;
        }
        snapshots += 1;
    }
    assert!(snapshots > 0, "none was taken while fio was writing");
    let printed = guest.finish();
    let kept = Sums::from([("-".to_owned(), sum_of(&base[64 * MIB..]))]);
    assert_eq!(sums(&printed, "kept"), kept);

    host.stop();
    host.check();
    host.serve();
    let verify = "fio --verify_only /tmp/job\nrest kept\n";
    let printed = host
        .boot("verify", &[data], &format!("{job}{verify}"))
        .finish();
    assert_eq!(sums(&printed, "kept"), kept);
    host.finish();
}

#[test]
fn what_a_guest_deletes_or_discards_is_given_back_and_never_shows_the_base_again() {
    let mut host = Host::new();
    host.noise("files.img", DISK_BYTES);
    let mut model = host.noise("bare.img", 64 * MIB);
    host.line("volume create files --base @/files.img").ok();
    host.line("volume create bare --base @/bare.img").ok();
    let disks = [host.attach("files", 1), host.attach("bare", 1)];

    let script = r#"
mkfs.ext4 -q -F /dev/vda
mount /dev/vda /mnt/d
head -c $((32 << 20)) /dev/urandom >/mnt/d/large
sync
echo "written"; read -r _
rm /mnt/d/large
sync
fstrim -v /mnt/d
sync
echo "trimmed"; read -r _
umount /mnt/d
e2fsck -fn /dev/vda

# 16 MiB of the volume's own data at the start of the other disk; the rest is the base's.
dd if=/dev/vdb of=/dev/vdb bs=1M skip=16 count=16 iflag=direct oflag=direct conv=notrunc status=none
sync
echo "copied"; read -r _
blkdiscard -o 4M -l 4M /dev/vdb
blkdiscard -o 24M -l 4M /dev/vdb
# The rest of a cluster whose other sectors are zeroed stays as it is.
blkdiscard -z -o $((8 * 1024 * 1024 + 512 * 3)) -l $((512 * 9)) /dev/vdb
blkdiscard -z -o $((40 * 1024 * 1024 + 512 * 5)) -l $((512 * 12)) /dev/vdb
sync
echo "discarded"; read -r _
dd if=/dev/vdb bs=1M iflag=direct status=none | sums disk -
"#;
    let mut guest = host.boot("discard", &disks, script);
    guest.wait_for("written");
    let full = host.allocated("files");
    assert!(
        full >= 32 * MIB as u64,
        "{full} bytes hold a file of 32 MiB"
    );
    guest.say("go on");
    guest.wait_for("trimmed");
    let trimmed = host.allocated("files");
    assert!(
        trimmed + 32 * MIB as u64 <= full + SLACK,
        "{trimmed} of {full} bytes are left after the file of 32 MiB has gone"
    );
    guest.say("go on");
    guest.wait_for("copied");
    let copied = host.allocated("bare");
    guest.say("go on");
    guest.wait_for("discarded");
    let discarded = host.allocated("bare");
    assert!(
        discarded + 4 * MIB as u64 <= copied + SLACK / 2,
        "{discarded} of {copied} bytes are left after 4 MiB were discarded"
    );
    guest.say("go on");
    let printed = guest.finish();

    model.copy_within(16 * MIB..32 * MIB, 0);
    model[4 * MIB..8 * MIB].fill(0);
    model[24 * MIB..28 * MIB].fill(0);
    model[8 * MIB + 512 * 3..][..512 * 9].fill(0);
    model[40 * MIB + 512 * 5..][..512 * 12].fill(0);
    let expected = Sums::from([("-".to_owned(), sum_of(&model))]);
    assert_eq!(sums(&printed, "disk"), expected);
    host.finish();
}

#[test]
fn firmware_boots_from_a_volume_over_a_boot_image_and_from_one_that_was_partly_rewritten() {
    const BOOTED: &str = "stratablk boot ok";
    let mut host = Host::new();
    let image = host.path("boot.img");
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/make-boot-image");
    assert!(Command::new(tool).arg(&image).status().unwrap().success());
    host.watch(image);
    host.line("volume create boot --base @/boot.img").ok();
    let boot = host.attach("boot", 1);
    Machine::boot_firmware(host.dir.path(), "base-only", &boot, BOOTED);

    // The boot sector and scattered sectors of what it reads are now in the layers above, with what they had before. The
    // firmware's large reads must put them together with the base's. A wrong order of layers would show: the first of
    // the two layers has them inverted.
    host.line("snapshot create lower boot").ok();
    let rewrite = r#"
dd if=/dev/vda of=/tmp/area bs=512 skip=2048 count=128 iflag=direct status=none
dd if=/dev/vda of=/tmp/sector bs=512 count=1 iflag=direct status=none
put() { dd if=$1 of=/dev/vda bs=512 skip=$2 seek=$3 count=1 oflag=direct conv=notrunc status=none; }
for sector in {0..127..3}; do put /dev/urandom 0 $((2048 + sector)); done
sync
echo "spoilt"; read -r _
for sector in {0..127..3}; do put /tmp/area $sector $((2048 + sector)); done
put /tmp/sector 0 0
sync
"#;
    let mut guest = host.boot("rewrite", std::slice::from_ref(&boot), rewrite);
    guest.wait_for("spoilt");
    host.line("snapshot create spoilt boot").ok();
    guest.say("go on");
    guest.finish();
    Machine::boot_firmware(host.dir.path(), "layered", &boot, BOOTED);

    // The alarm works: what was spoilt does not boot.
    host.line("volume create bad --from boot@spoilt").ok();
    let bad = host.attach("bad", 1);
    Machine::boot_firmware(host.dir.path(), "spoilt", &bad, "stratablk boot FAILED");
    host.finish();
}

#[test]
fn synced_files_are_there_after_guest_and_daemon_were_killed() {
    let mut host = Host::new();
    host.noise("base.img", DISK_BYTES);
    host.line("volume create data --base @/base.img").ok();
    let data = host.attach("data", 2);

    let mut guest = host.boot("victim", std::slice::from_ref(&data), WRITE_IN_ROUNDS);
    guest.wait_for("synced 4");
    host.line("snapshot create before data").ok();
    guest.wait_for("synced 8");
    host.kill();
    let printed = guest.kill();
    let at_snapshot = synced_before(&printed, "synced 4");
    let last = printed.iter().rfind(|line| line.starts_with("synced "));
    let at_end = synced_before(&printed, last.unwrap());
    assert!(at_end.len() >= 8 * 20, "{last:?}");
    host.check();

    // The attachment is in the catalog: the socket is served again without a word.
    host.serve();
    host.line("volume create clone --from data@before").ok();
    let clone = host.attach("clone", 2);
    let reader = r#"
look() {
    mount $1 /mnt/d
    (cd /mnt/d && sums $2 r*-*)
    umount /mnt/d
    e2fsck -fn $1
}
look /dev/vda volume
look /dev/vdb clone
"#;
    let printed = host.boot("survivor", &[data, clone], reader).finish();
    assert_holds(&sums(&printed, "volume"), &at_end);
    assert_holds(&sums(&printed, "clone"), &at_snapshot);
    host.finish();
}

#[test]
fn two_guests_write_at_once_to_two_clones_of_one_image_and_never_meet() {
    let mut host = Host::new();
    let seed = host.path("seed");
    fs::create_dir(&seed).unwrap();
    for file in 0..20 {
        let content = &noise(20 * 4096)[file * 4096..];
        fs::write(seed.join(format!("seed-{file}")), content).unwrap();
    }
    let image = host.path("golden.img");
    let made = Command::new("mkfs.ext4")
        .env(
            "PATH",
            format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap()),
        )
        .args(["-q", "-F", "-d"])
        .args([&seed, &image])
        .arg("64M")
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    host.watch(image);
    host.line("volume create golden --base @/golden.img").ok();
    host.line("snapshot create released golden").ok();

    // Both do the same at the same time: read what the image has, write over one half of it, remove some, add more.
    let script = r#"
mount /dev/vda /mnt/d
cd /mnt/d
sums seed seed-*
echo "ready"; read -r me
for file in seed-1*; do echo "$me $file" >$file; done
rm seed-2
for file in {1..60}; do random $file >$me-$file; done
sync
sums written *-*
cd /
umount /mnt/d
e2fsck -fn /dev/vda
echo 3 >/proc/sys/vm/drop_caches
mount /dev/vda /mnt/d
(cd /mnt/d; sums found *-*)
"#;
    let mut guests = Vec::new();
    for name in ["left", "right"] {
        host.line(&format!("clone golden@released {name}")).ok();
        let disk = host.attach(name, 2);
        guests.push((name, host.boot(name, &[disk], script)));
    }
    for (_, guest) in &mut guests {
        guest.wait_for("ready");
    }
    for (name, guest) in &mut guests {
        guest.say(name);
    }
    let expected: Sums = (0..20)
        .map(|file| format!("seed-{file}"))
        .map(|name| (name.clone(), sum_of(&fs::read(seed.join(name)).unwrap())))
        .collect();
    for (name, guest) in guests {
        let printed = guest.finish();
        assert_eq!(sums(&printed, "seed"), expected, "{name}");
        let found = sums(&printed, "found");
        assert_eq!(found, sums(&printed, "written"), "{name}");
        assert_eq!(found.len(), 19 + 60, "{name}");
        let own = found
            .keys()
            .filter(|file| file.starts_with(&format!("{name}-")));
        assert_eq!(own.count(), 60, "{name}: only its own files");
    }
    host.finish();
}
