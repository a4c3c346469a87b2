//! A volume of the type readonly: whatever a front-end negotiates, nothing changes.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use stratablk_layers::catalog::VolumeKind;
use stratablk_layers::store::{Store, StoreOptions, VolumeSource};
use stratablk_tests::daemon::{Daemon, temp_dir};
use stratablk_tests::disk::Disk;
use stratablk_tests::guest::{Guest, GuestOptions, USUAL_FEATURES};
use stratablk_tests::pattern::{base, stamped};
use stratablk_tests::request::feature::BLK_RO;
use stratablk_tests::request::{
    S_IOERR, S_OK, S_UNSUPP, T_DISCARD, T_WRITE_ZEROES, UNMAP, segment,
};

/// The size of the disk.
const SECTORS: u64 = 2048;

#[test]
fn a_readonly_volume_never_changes() {
    let dir = temp_dir();
    let image = dir.path().join("image");
    fs::write(&image, base(0, SECTORS)).unwrap();
    let place = dir.path().join("store");
    let store = Store::open(&place, StoreOptions::default()).unwrap();
    store
        .create_volume_of("disk", &VolumeSource::Base(image), VolumeKind::Readonly)
        .unwrap();
    drop(store);
    let daemon = Daemon::on_store(&place);
    let socket = dir.path().join("disk.sock");
    let attach = format!("volume attach disk --socket {}", socket.display());
    daemon.line(&attach).ok();
    for features in [USUAL_FEATURES, USUAL_FEATURES & !BLK_RO] {
        let options = GuestOptions {
            features,
            ..GuestOptions::default()
        };
        let guest = Guest::start(&socket, options);
        assert_ne!(guest.front_end.features() & BLK_RO, 0, "offered");
        let mut disk = Disk::new(guest);
        assert_eq!(disk.try_write(8, &stamped(1, 8, 3)), S_IOERR);
        for flags in [0, UNMAP] {
            let zero = [segment(16, 8, flags)];
            assert_eq!(disk.try_segments(T_WRITE_ZEROES, &zero), S_IOERR);
        }
        let discard = disk.try_segments(T_DISCARD, &[segment(24, 8, 0)]);
        assert!(matches!(discard, S_IOERR | S_UNSUPP), "{discard}");
        assert_eq!(disk.try_flush(), S_OK);
        assert_eq!(disk.read(0, 64), base(0, 64));
    }
    // The type counts from the next start of the rings on.
    let mut disk = Disk::connect(&socket);
    disk.guest.front_end.stop_vring(0);
    daemon.line("volume set disk --type normal").ok();
    disk.guest.rings[0].restart(0);
    disk.guest.start_ring(0);
    assert_eq!(
        disk.try_write(8, &stamped(1, 8, 3)),
        S_IOERR,
        "the session began with less"
    );
    drop(disk);
    let mut disk = Disk::connect(&socket);
    assert!(!disk.guest.is_read_only());
    assert_eq!(disk.try_write(8, &stamped(1, 8, 3)), S_OK);
    disk.guest.front_end.stop_vring(0);
    daemon.line("volume set disk --type readonly").ok();
    disk.guest.rings[0].restart(0);
    disk.guest.start_ring(0);
    assert_eq!(
        disk.try_write(8, &stamped(2, 8, 3)),
        S_IOERR,
        "whatever was negotiated"
    );
    assert_eq!(disk.read(8, 3), stamped(1, 8, 3));
}
