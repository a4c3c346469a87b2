//! What becomes of a file that is found: the table of `ARENA.md`, row by row.

use super::*;

#[test]
fn an_arena_that_can_be_adopted_is_not_replaced() {
    let home = Home::new();
    home.abandon(2);
    let error = Arena::create(&home.place(), 1).unwrap_err();
    assert!(error.to_string().contains("is to be taken over"), "{error}");
    assert_eq!(Arena::adopt(&home.place()).unwrap().unwrap().sets(), 2);
}

#[test]
fn what_holds_nothing_is_removed() {
    type Change = (&'static str, fn(&Home));
    let changes: [Change; 6] = [
        ("another boot", |home| home.forge(48, &[0xb0; 16])),
        ("another boot and version", |home| {
            home.forge(48, &[0xb0; 16]);
            home.forge(8, &[2]);
        }),
        ("no magic", |home| {
            home.file().write_all_at(&[0; 8], 0).unwrap()
        }),
        ("no header", |home| {
            home.file().write_all_at(&[0; HEADER_BYTES], 0).unwrap()
        }),
        ("half a header", |home| home.file().set_len(4095).unwrap()),
        ("nothing", |home| home.file().set_len(0).unwrap()),
    ];
    for (name, change) in changes {
        let home = Home::new();
        home.abandon(2);
        change(&home);
        assert!(Arena::adopt(&home.place()).unwrap().is_none(), "{name}");
        assert!(!home.path().exists(), "{name}");

        home.abandon(2);
        change(&home);
        assert_eq!(Arena::create(&home.place(), 1).unwrap().sets(), 1, "{name}");
        assert_eq!(
            Arena::adopt(&home.place()).unwrap().unwrap().sets(),
            1,
            "{name}"
        );
    }
}

#[test]
fn what_may_hold_something_is_refused_and_stays() {
    type Change = (&'static str, &'static str, fn(&Home));
    let changes: [Change; 21] = [
        ("magic", "is damaged", |home| home.forge(0, b"STRATARM")),
        ("checksum", "is damaged", |home| {
            home.file().write_all_at(&[9], 150).unwrap()
        }),
        ("older version", "newer stratablk", |home| {
            home.forge(8, &[0])
        }),
        ("newer version", "newer stratablk", |home| {
            home.forge(8, &[2])
        }),
        ("feature", "newer stratablk", |home| {
            home.forge(16, &[0, 0, 0, 0, 0, 0, 0, 0x80])
        }),
        ("no sets", "is damaged", |home| home.forge(80, &[0])),
        ("no end of sets", "is damaged", |home| {
            home.forge(80, &[0xff; 8])
        }),
        ("more sets", "is damaged", |home| home.forge(80, &[3])),
        ("ways", "is damaged", |home| home.forge(88, &[8])),
        ("frame bytes", "is damaged", |home| home.forge(96, &[1])),
        ("numbers", "is damaged", |home| home.forge(104, &[1])),
        ("number max", "is damaged", |home| home.forge(112, &[1])),
        ("sets at", "is damaged", |home| home.forge(120, &[1])),
        ("set bytes", "is damaged", |home| home.forge(128, &[1])),
        ("data at", "is damaged", |home| home.forge(136, &[1])),
        ("length", "is damaged", |home| home.forge(144, &[1])),
        (
            "consistent, but longer than the file",
            "is damaged",
            |home| {
                let bytes = Header::encode(&home.place(), &Geometry::of(3).unwrap());
                home.file().write_all_at(&bytes, 0).unwrap();
            },
        ),
        ("shorter", "is damaged", |home| {
            let file = home.file();
            file.set_len(file.metadata().unwrap().len() - 1).unwrap();
        }),
        ("longer", "is damaged", |home| {
            let file = home.file();
            file.set_len(file.metadata().unwrap().len() + 4096).unwrap();
        }),
        ("cut off after the header", "is damaged", |home| {
            home.file().set_len(4096).unwrap()
        }),
        ("two numbers", "has the numbers 1 and 2", |home| {
            let arena = Arena::adopt(&home.place()).unwrap().unwrap();
            arena.numbers().number(layer(1)).unwrap();
            let mut entry = [0; 32];
            home.file().read_exact_at(&mut entry, 4096).unwrap();
            let crc = crc32c::crc32c_append(crc32c::crc32c(&[2, 0, 0, 0]), &entry[..16]);
            entry[16..20].copy_from_slice(&crc.to_le_bytes());
            home.file().write_all_at(&entry, 4096 + 32).unwrap();
        }),
    ];
    for (name, words, change) in changes {
        let home = Home::new();
        home.abandon(2);
        // The file is good until it is changed.
        drop(Arena::adopt(&home.place()).unwrap().unwrap());
        change(&home);
        let inode = std::fs::metadata(home.path()).unwrap().ino();
        let error = Arena::adopt(&home.place()).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains(words) && text.contains("remove the file"),
            "{name}: {text}"
        );
        assert_eq!(
            std::fs::metadata(home.path()).unwrap().ino(),
            inode,
            "{name}"
        );
        if name == "two numbers" {
            continue;
        }
        // Whoever asks for a new one has decided.
        assert_eq!(Arena::create(&home.place(), 1).unwrap().sets(), 1, "{name}");
        assert_eq!(
            Arena::adopt(&home.place()).unwrap().unwrap().sets(),
            1,
            "{name}"
        );
    }
}

#[test]
fn compatible_features_are_no_matter() {
    let home = Home::new();
    home.abandon(2);
    home.forge(24, &[0xff; 8]);
    assert!(Arena::adopt(&home.place()).unwrap().is_some());
}

#[test]
fn another_stores_arena_is_left_alone() {
    for (at, name) in [(32, "store"), (64, "device"), (72, "directory")] {
        let home = Home::new();
        home.abandon(2);
        home.forge(at, &[0x77; 8]);
        let place = home.place();
        for error in [
            Arena::adopt(&place).unwrap_err(),
            Arena::create(&place, 1).unwrap_err(),
        ] {
            assert!(matches!(error, Error::Invalid { .. }), "{name}: {error}");
            assert!(error.to_string().contains("77777777"), "{name}: {error}");
        }
        assert!(home.path().exists(), "{name}");
    }
}

#[test]
fn what_is_not_to_be_trusted_is_neither_used_nor_removed() {
    type Change = (&'static str, fn(&Home) -> bool);
    let aside = |home: &Home| home.0.path().join("aside");
    let changes: [Change; 8] = [
        ("is no regular file", |home| {
            // A link to a good arena.
            std::fs::rename(home.path(), home.0.path().join("aside")).unwrap();
            symlink(home.0.path().join("aside"), home.path()).unwrap();
            true
        }),
        ("is no regular file", |home| {
            std::fs::remove_file(home.path()).unwrap();
            symlink("/nowhere/at/all", home.path()).unwrap();
            true
        }),
        ("is no regular file", |home| {
            std::fs::remove_file(home.path()).unwrap();
            std::fs::create_dir(home.path()).unwrap();
            true
        }),
        ("is no regular file", |home| {
            std::fs::remove_file(home.path()).unwrap();
            rustix::fs::mkfifoat(rustix::fs::CWD, home.path(), 0o600.into()).unwrap();
            true
        }),
        ("has 2 names", |home| {
            std::fs::hard_link(home.path(), home.0.path().join("aside")).unwrap();
            true
        }),
        ("has mode 0640", |home| {
            std::fs::set_permissions(home.path(), Permissions::from_mode(0o640)).unwrap();
            true
        }),
        ("has mode 4600", |home| {
            std::fs::set_permissions(home.path(), Permissions::from_mode(0o4600)).unwrap();
            true
        }),
        ("belongs to user 12345", |home| {
            // Only root can give a file away.
            rustix::process::geteuid().is_root()
                && std::os::unix::fs::chown(home.path(), Some(12345), None).is_ok()
        }),
    ];
    for (words, change) in changes {
        let home = Home::new();
        home.abandon(2);
        if !change(&home) {
            continue;
        }
        let before = std::fs::symlink_metadata(home.path()).unwrap();
        let place = home.place();
        for error in [
            Arena::adopt(&place).unwrap_err(),
            Arena::create(&place, 1).unwrap_err(),
        ] {
            assert!(matches!(error, Error::Invalid { .. }), "{words}: {error}");
            let text = error.to_string();
            assert!(
                text.contains(words) && text.contains("--cache-dir"),
                "{words}: {text}"
            );
        }
        let after = std::fs::symlink_metadata(home.path()).unwrap();
        assert_eq!(
            (before.ino(), before.nlink()),
            (after.ino(), after.nlink()),
            "{words}"
        );
        let target = std::fs::metadata(aside(&home)).map(|meta| meta.len());
        assert!(target.is_err() || target.is_ok_and(|len| len == Geometry::of(2).unwrap().len));
    }
}
