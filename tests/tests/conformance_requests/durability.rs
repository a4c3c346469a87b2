//! Flushes, and the modes of the write cache (lines 10 to 12).

use stratablk_tests::disk::Disk;
use stratablk_tests::guest::{GuestOptions, USUAL_FEATURES};
use stratablk_tests::launch::Server;
use stratablk_tests::memory::POISON;
use stratablk_tests::pattern::{self, SECTOR};
use stratablk_tests::request::feature::{BLK_CONFIG_WCE, BLK_FLUSH};
use stratablk_tests::request::{S_IOERR, S_OK, T_FLUSH};

use crate::field;

/// Line 10: a flush with a sector or with data is a driver's error and harms nobody.
#[test]
fn c10_odd_flushes_do_no_harm() {
    let mut server = Server::start();
    let mut guest = server.guest();
    let status = guest.request(T_FLUSH, 77, None);
    assert!([S_OK, S_IOERR].contains(&status), "status {status}");
    let out = guest.memory.readable(&[0x55; 512]);
    let status = guest.request(T_FLUSH, 0, Some(out));
    assert!([S_OK, S_IOERR].contains(&status), "status {status}");
    let into = guest.memory.writable(512);
    let (status, used) = guest.request_used(T_FLUSH, u64::MAX, Some(into));
    assert!([S_OK, S_IOERR].contains(&status), "status {status}");
    assert!(
        used.len <= 1 || !guest.memory.bytes(into).contains(&POISON),
        "an honest used length"
    );
    assert_eq!(guest.request(T_FLUSH, 0, None), S_OK);
    drop(guest);
    server.assert_serves();
}

/// What a session writes before its back-end is killed, and what must be there afterwards.
fn write_of_all_kinds(disk: &mut Disk) {
    disk.write(5, &pattern::stamped(1, 5, 30));
    disk.write_zeroes(100, 9, false);
    disk.write_zeroes(120, 9, true);
    disk.discard(140, 9);
    disk.write(142, &pattern::stamped(2, 142, 2));
}

/// Checks what [`write_of_all_kinds`] wrote.
fn check_all_kinds(disk: &mut Disk) {
    let mut model = pattern::base(0, 200);
    let put = |model: &mut Vec<u8>, at: usize, data: &[u8]| {
        model[at * SECTOR..][..data.len()].copy_from_slice(data);
    };
    put(&mut model, 5, &pattern::stamped(1, 5, 30));
    for at in [100, 120, 140] {
        put(&mut model, at, &[0; 9 * SECTOR]);
    }
    put(&mut model, 142, &pattern::stamped(2, 142, 2));
    pattern::assert_same(&disk.read(0, 200), &model, "what was stable is there");
}

/// Line 10: what completed before a flush was submitted is there after the back-end was killed.
#[test]
fn c10_flushed_writes_outlive_the_process() {
    let mut server = Server::start();
    let mut disk = server.disk();
    write_of_all_kinds(&mut disk);
    disk.flush();
    server.process.kill();
    drop(disk);
    server.restart();
    check_all_kinds(&mut server.disk());
}

/// Line 11 (a): with neither FLUSH nor CONFIG_WCE taken, a write is stable once it completed.
#[test]
fn c11_without_flush_writes_are_stable_at_completion() {
    let mut server = Server::start();
    let features = USUAL_FEATURES & !BLK_FLUSH & !BLK_CONFIG_WCE;
    let guest = server.guest_with(GuestOptions {
        features,
        ..GuestOptions::default()
    });
    let mut disk = Disk::new(guest);
    write_of_all_kinds(&mut disk);
    server.process.kill();
    drop(disk);
    server.restart();
    check_all_kinds(&mut server.disk());
}

/// Line 11 (b): with `writeback` set to 0 by the guest, a write is stable once it completed.
#[test]
fn c11_with_writeback_off_writes_are_stable_at_completion() {
    let mut server = Server::start();
    let mut disk = server.disk();
    assert!(
        !disk
            .guest
            .front_end
            .set_config(field::WRITEBACK, &[0])
            .is_no()
    );
    write_of_all_kinds(&mut disk);
    server.process.kill();
    drop(disk);
    server.restart();
    check_all_kinds(&mut server.disk());
}

/// Line 12: CONFIG_WCE is never offered without FLUSH.
#[test]
fn c12_config_wce_comes_with_flush() {
    let server = Server::start();
    let offered = server.guest().front_end.features();
    assert!(
        offered & BLK_FLUSH != 0 || offered & BLK_CONFIG_WCE == 0,
        "{offered:#x}"
    );
    assert_eq!(offered & BLK_CONFIG_WCE, BLK_CONFIG_WCE, "{offered:#x}");
}

/// Line 12: with CONFIG_WCE but without FLUSH the cache mode begins as write-through.
#[test]
fn c12_config_wce_without_flush_begins_write_through() {
    let server = Server::start();
    let features = USUAL_FEATURES & !BLK_FLUSH;
    let guest = server.guest_with(GuestOptions {
        features,
        ..GuestOptions::default()
    });
    assert_eq!(guest.front_end.config(field::WRITEBACK, 1), [0]);
    drop(guest);
    let guest = server.guest();
    assert_eq!(
        guest.front_end.config(field::WRITEBACK, 1),
        [1],
        "with both it is write-back"
    );
}

/// Line 12: the guest's choice is read back, does not outlive its session, and only 0 and 1 are choices.
#[test]
fn c12_writeback_is_the_guests_choice() {
    let mut server = Server::start();
    let mut disk = server.disk();
    for value in [0, 1, 0] {
        assert!(
            !disk
                .guest
                .front_end
                .set_config(field::WRITEBACK, &[value])
                .is_no()
        );
        assert_eq!(disk.guest.front_end.config(field::WRITEBACK, 1), [value]);
        disk.write(9, &pattern::stamped(u64::from(value), 9, 3));
    }
    let answer = disk.guest.front_end.set_config(field::WRITEBACK, &[2]);
    drop(disk);
    let guest = server.guest();
    assert_eq!(
        guest.front_end.config(field::WRITEBACK, 1),
        [1],
        "after an answer of {answer:?}"
    );
    drop(guest);
    server.assert_serves();
}

/// Line 12: the unused bytes of the configuration space are zero.
#[test]
fn c12_unused_bytes_are_zero() {
    let server = Server::start();
    let guest = server.guest();
    let config = guest.front_end.config(0, 60);
    assert_eq!(config[33], 0, "unused0");
    assert_eq!(config[57..60], [0; 3], "unused1");
}
