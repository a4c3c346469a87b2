//! A disk that grows while it is used: what a front-end is told and can do then, and what a real guest sees.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use stratablk_tests::disk::Disk;
use stratablk_tests::guest::{Guest, GuestOptions};
use stratablk_tests::host::{Host, MIB, sums};
use stratablk_tests::pattern::{SECTOR, stamped};
use stratablk_tests::request::{S_IOERR, S_OK};
use stratablk_tests::wait::QUIET;
use stratablk_tests::wire::{VERSION, Wire, code};

/// BACKEND_CONFIG_CHANGE_MSG.
const CONFIG_CHANGE: u32 = 2;

/// The size that the configuration space tells, in sectors.
#[track_caller]
fn capacity(guest: &Guest) -> u64 {
    let bytes = guest.front_end.config(0, 8);
    u64::from_le_bytes(bytes.try_into().unwrap())
}

/// A front-end with a way back: its disk, and the end of the way.
#[track_caller]
fn connect(host: &Host) -> (Disk, Wire) {
    let socket = host.path("disk.sock");
    let guest = Guest::start(&socket, GuestOptions::default());
    let (theirs, ours) = UnixStream::pair().unwrap();
    guest
        .front_end
        .tell(code::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
    drop(theirs);
    (Disk::new(guest), Wire::from_stream(ours).unwrap())
}

#[test]
fn a_front_end_is_told_of_a_larger_disk_and_may_use_it_at_once() {
    let mut host = Host::new();
    let base = host.noise("image", MIB);
    host.line("volume create disk --base @/image").ok();
    host.attach("disk", 1);
    let (mut disk, way_back) = connect(&host);
    let old = (MIB / SECTOR) as u64;
    assert_eq!(capacity(&disk.guest), old);
    let data = stamped(1, old, 4);
    assert_eq!(disk.try_write(old - 1, &data), S_IOERR);
    host.line("volume resize disk +1M").ok();
    let told = way_back.receive().unwrap().unwrap();
    assert_eq!((told.request, told.flags), (CONFIG_CHANGE, VERSION));
    assert!(told.payload.is_empty());
    assert_eq!(capacity(&disk.guest), 2 * old);
    assert_eq!(disk.try_write(old - 1, &data), S_OK);
    let mut expected = base[MIB - SECTOR..].to_vec();
    expected[..SECTOR].copy_from_slice(&data[..SECTOR]);
    expected.extend(&data[SECTOR..]);
    expected.resize(8 * SECTOR, 0);
    assert_eq!(disk.read(old - 1, 8), expected);
    assert_eq!(disk.read(2 * old - 8, 8), vec![0; 8 * SECTOR]);
    assert!(disk.try_read(2 * old - 1, 2).is_err());
    // Nobody may take it away while rings run, and nobody is told of what did not happen.
    let refused = host
        .line("volume resize disk 1M --shrink --force")
        .refused();
    assert!(refused.contains("detach it first"), "{refused}");
    assert!(way_back.is_silent(QUIET));
    // Nor while they are stopped: a paused machine goes on with the size that it knows.
    disk.guest.front_end.stop_vring(0);
    let refused = host
        .line("volume resize disk 1M --shrink --force")
        .refused();
    assert!(refused.contains("detach it first"), "{refused}");
    assert_eq!(capacity(&disk.guest), 2 * old);
    drop(disk);
    host.line("volume detach disk").ok();
    host.line("volume resize disk 1M --shrink --force").ok();
    host.line("volume resize disk 2M").ok();
    host.attach("disk", 1);
    let (mut disk, _way_back) = connect(&host);
    assert_eq!(capacity(&disk.guest), 2 * old);
    assert_eq!(
        disk.read(old, 8),
        vec![0; 8 * SECTOR],
        "what was cut off is gone"
    );
    drop(disk);
    host.finish();
}

#[test]
fn a_paused_machine_is_told_when_it_goes_on() {
    let mut host = Host::new();
    host.noise("watched", MIB);
    host.line("volume create disk --size 1M").ok();
    host.line("snapshot create small disk").ok();
    host.attach("disk", 1);
    let (mut disk, way_back) = connect(&host);
    let old = (MIB / SECTOR) as u64;
    assert_eq!(capacity(&disk.guest), old);
    let told = |disk: &Disk| {
        assert!(way_back.is_silent(QUIET), "suspended");
        disk.guest.start_ring(0);
        let told = way_back.receive().unwrap().unwrap();
        assert_eq!(told.request, CONFIG_CHANGE);
        assert!(way_back.is_silent(QUIET), "once");
    };
    disk.guest.front_end.stop_vring(0);
    host.line("volume resize disk 2M").ok();
    told(&disk);
    assert_eq!(capacity(&disk.guest), 2 * old);
    disk.write(old, &stamped(1, old, 1));
    // It knows: nothing is to be told.
    disk.guest.front_end.stop_vring(0);
    disk.guest.start_ring(0);
    assert!(way_back.is_silent(QUIET));
    // A snapshot remembers the size.
    disk.guest.front_end.stop_vring(0);
    host.line("snapshot restore disk small").ok();
    told(&disk);
    assert_eq!(capacity(&disk.guest), old);
    assert_eq!(disk.try_write(old, &stamped(1, old, 1)), S_IOERR);
    drop(disk);
    host.finish();
}

/// What the guest does: a file system on the disk, which grows under it, and then grows itself. The kernel tells of the new
/// size a moment before it has it.
const SCRIPT: &str = r#"
mkfs.ext4 -q -F /dev/vda
mount /dev/vda /mnt/d
random 5 >/mnt/d/before
sums files /mnt/d/before
echo "size $(cat /sys/block/vda/size)"
read -r wanted
grep -q -m 1 'vda] new size' /dev/kmsg
for _ in $(seq 1000); do
    [ "$(cat /sys/block/vda/size)" = "$wanted" ] && break
done
echo "size $(cat /sys/block/vda/size)"
head -c 1048576 /dev/urandom >/tmp/end
end=$((wanted / 2048 - 1))
dd if=/tmp/end of=/dev/vda bs=1M seek=$end oflag=direct conv=notrunc status=none
dd if=/dev/vda of=/tmp/found bs=1M skip=$end iflag=direct status=none
cmp /tmp/end /tmp/found
resize2fs /dev/vda >/tmp/resized 2>&1 || { cat /tmp/resized; exit 1; }
head -c 100000000 /dev/urandom >/mnt/d/after
sums files /mnt/d/after
umount /mnt/d
e2fsck -fn /dev/vda
echo 3 >/proc/sys/vm/drop_caches
mount /dev/vda /mnt/d
sums again /mnt/d/before /mnt/d/after
umount /mnt/d
"#;

#[test]
fn a_running_guest_sees_its_disk_grow() {
    let mut host = Host::new();
    host.noise("watched", MIB);
    host.line("volume create data --size 64M").ok();
    let disks = [host.attach("data", 2)];
    let mut guest = host.boot("resize", &disks, SCRIPT);
    guest.wait_for(&format!("size {}", 64 * MIB / SECTOR));
    host.line("volume resize data 256M").ok();
    let wanted = 256 * MIB / SECTOR;
    guest.say(&wanted.to_string());
    assert_eq!(guest.wait_for("size"), format!("size {wanted}"));
    let lines = guest.finish();
    let files = sums(&lines, "files");
    assert_eq!(files.len(), 2);
    assert_eq!(files, sums(&lines, "again"));
    host.finish();
}
