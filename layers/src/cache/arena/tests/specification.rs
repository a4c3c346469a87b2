//! The bytes are those of `ARENA.md`.

use super::*;

#[test]
fn the_layout_is_that_of_the_specification() {
    assert_eq!(
        Geometry::of(1).unwrap(),
        Geometry {
            sets: 1,
            sets_bytes: 320,
            data_at: 36 << 20,
            data_bytes: 65536,
            len: (36 << 20) + 65536,
        }
    );
    // 6553 sets are the last that fit in 2 MiB, and 3 are no power of 2.
    assert_eq!(Geometry::of(3).unwrap().len, (36 << 20) + 3 * 65536);
    assert_eq!(Geometry::of(6553).unwrap().data_at, 36 << 20);
    assert_eq!(Geometry::of(6554).unwrap().data_at, 38 << 20);
    assert_eq!(
        Geometry::of(6554).unwrap().reserved(),
        [(0, 4096), (34 << 20, 6554 * 320), (38 << 20, 6554 * 65536)]
    );
    assert_eq!(Geometry::of(0), None);
    for sets in [
        u64::MAX,
        u64::MAX / 320,
        u64::MAX / 65536,
        i64::MAX as u64 / 65536,
    ] {
        assert_eq!(Geometry::of(sets), None);
    }
    let fields = [
        (offset_of!(Set, keys), 0),
        (offset_of!(Set, states), 128),
        (offset_of!(Set, reref), 256),
        (offset_of!(Set, ghosts), 272),
        (offset_of!(Set, lock), 304),
        (offset_of!(Set, cursor), 308),
        (size_of::<Set>(), 320),
        (align_of::<Set>(), 64),
        (WAYS, 16),
    ];
    for (found, specified) in fields {
        assert_eq!(found, specified);
    }
}

#[test]
fn the_header_is_that_of_the_specification() {
    let place = Place {
        dir: "/dev/shm".into(),
        store: StoreId(Uuid::from_bytes(*b"the store's uuid")),
        store_dir: DirId {
            dev: 0x0102_0304_0506_0708,
            ino: 0x1112_1314_1516_1718,
        },
        boot: Uuid::from_bytes(*b"the boot id, too"),
    };
    let geometry = Geometry::of(6554).unwrap();
    let bytes = Header::encode(&place, &geometry);
    let mut expected = Vec::new();
    expected.extend_from_slice(b"STRATARN\x01\0\0\0");
    expected.extend_from_slice(&bytes[12..16]);
    expected.extend_from_slice(&[0; 16]);
    expected.extend_from_slice(b"the store's uuidthe boot id, too");
    expected.extend_from_slice(&[
        8, 7, 6, 5, 4, 3, 2, 1, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11,
    ]);
    let (data, len) = (38 << 20, (38 << 20) + 6554 * 65536);
    for field in [6554u64, 16, 4096, 4096, 1 << 20, 34 << 20, 320, data, len] {
        expected.extend_from_slice(&field.to_le_bytes());
    }
    assert_eq!(expected.len(), 152);
    expected.resize(HEADER_BYTES, 0);
    assert_eq!(bytes[..], expected[..]);
    let mut unsealed = bytes;
    unsealed[12..16].fill(0);
    assert_eq!(bytes[12..16], crc32c::crc32c(&unsealed).to_le_bytes());

    let header = Header::decode(&bytes, place.boot).unwrap();
    assert_eq!(
        (header.store, header.store_dir),
        (place.store, place.store_dir)
    );
    assert_eq!(header.geometry, geometry);
}

#[test]
fn any_byte_of_the_header_matters() {
    let home = Home::new();
    let (place, geometry) = (home.place(), Geometry::of(5).unwrap());
    let good = Header::encode(&place, &geometry);
    assert!(Header::decode(&good, place.boot).is_ok());
    for at in 0..HEADER_BYTES {
        let mut bytes = good;
        bytes[at] ^= 1;
        let refusal = Header::decode(&bytes, place.boot).unwrap_err();
        assert!(
            matches!(refusal, Refusal::Corrupt(_)),
            "byte {at}: {refusal:?}"
        );
    }
}
