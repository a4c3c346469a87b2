//! What does not end is not handed over, and keeps nobody but its own guest waiting.

use std::fs::File;
use std::thread;

use stratablk_tests::far::{Far, opcode};
use stratablk_tests::frontend::single_region;
use stratablk_tests::pattern;

use super::*;

/// Sectors of the far image.
const SECTORS: u64 = 2048;

/// A host with a disk in use that holds `stamped(9, 0, 1)`, and an image far away. `None`: that cannot be had here.
fn host_with_far() -> Option<(Host, Disk, Far)> {
    let far = Far::mount(pattern::base(0, SECTORS))?;
    let (host, socket) = host();
    let mut disk = Disk::connect(&socket);
    disk.write(0, &stamped(9, 0, 1));
    Some((host, disk, far))
}

/// Nothing is handed over because of that volume, and nothing has changed for the guest.
#[track_caller]
fn assert_refused(host: &mut Host, volume: &str, disk: &mut Disk) {
    let refused = host.try_succeed().unwrap_err();
    assert!(refused.contains(&format!("volume {volume:?}")), "{refused}");
    assert!(refused.contains("has not ended"), "{refused}");
    assert_eq!(disk.read(0, 1), stamped(9, 0, 1));
    assert!(disk.guest.front_end.is_quiet());
}

#[test]
fn a_request_that_does_not_end() {
    let Some((mut host, mut disk, far)) = host_with_far() else {
        return;
    };
    host.line(&format!(
        "volume create far --base {}",
        far.image().display()
    ))
    .ok();
    host.attach("far", 1);
    let mut reader = Disk::connect(&host.path("far.sock"));
    assert_eq!(reader.read(0, 1), pattern::base(0, 1));
    far.hold(opcode::READ);
    let buffers = reader.guest.read_of(999);
    let head = reader.guest.rings[0].submit(&buffers);
    far.wait_held(1);
    assert_refused(&mut host, "far", &mut disk);
    far.release();
    assert_eq!(reader.guest.rings[0].wait().head, u32::from(head));
    reader.guest.assert_read(&buffers, 999);
    host.succeed();
    assert_eq!(disk.read(0, 1), stamped(9, 0, 1));
    assert_eq!(reader.read(500, 1), pattern::base(500, 1));
    drop((disk, reader));
    host.finish();
}

#[test]
fn a_message_about_memory_that_does_not_answer() {
    let Some((mut host, mut disk, far)) = host_with_far() else {
        return;
    };
    host.line("volume create other --size 1M").ok();
    host.attach("other", 1);
    let guest = Guest::start(&host.path("other.sock"), GuestOptions::default());
    let file = File::open(far.image()).unwrap();
    far.hold(opcode::GETATTR);
    let message = thread::spawn(move || {
        let region = single_region(&RegionInfo {
            gpa: 1 << 40,
            bytes: 1 << 16,
            uva: 1 << 40,
            mmap_offset: 0,
        });
        let answer = guest
            .front_end
            .attempt(code::ADD_MEM_REG, &region, &[file.as_fd()]);
        (guest, answer)
    });
    far.wait_held(1);
    assert_refused(&mut host, "other", &mut disk);
    far.release();
    let (guest, answer) = message.join().unwrap();
    assert!(answer.is_no(), "it cannot be written to");
    host.succeed();
    assert_eq!(disk.read(0, 1), stamped(9, 0, 1));
    assert!(guest.front_end.is_quiet());
    drop((disk, guest));
    host.finish();
}
