//! Names, and files that cannot be.

use std::io;
use std::path::Path;

use stratablk_layers::file::sim::Random;
use stratablk_layers::file::{FileToken, IoOp, OpenMode};

use crate::{Bed, Buffers, one};

pub fn bad_files(bed: &Bed) {
    let random = &mut Random::new(8);
    let mut engine = bed.media.engine(4).unwrap();
    let mut buffers = Buffers::new(&[512], false, random);
    let segments = buffers.segments();
    for token in [FileToken(-1), FileToken(900_000)] {
        one(
            engine.as_mut(),
            IoOp::Read {
                file: token,
                offset: 0,
                segments: &segments,
            },
        )
        .unwrap_err();
        one(
            engine.as_mut(),
            IoOp::Write {
                file: token,
                offset: 0,
                segments: &segments,
            },
        )
        .unwrap_err();
        one(engine.as_mut(), IoOp::SyncData { file: token }).unwrap_err();
        one(
            engine.as_mut(),
            IoOp::Punch {
                file: token,
                offset: 0,
                len: 512,
            },
        )
        .unwrap_err();
    }
    drop(bed.create("sealed"));
    let sealed = bed
        .media
        .open(Path::new("sealed"), OpenMode::ReadOnly, bed.direct)
        .unwrap();
    one(
        engine.as_mut(),
        IoOp::Write {
            file: sealed.token(),
            offset: 0,
            segments: &segments,
        },
    )
    .unwrap_err();
    sealed.write_at(&[1; 512], 0).unwrap_err();
    sealed.set_len(10).unwrap_err();
    assert!(sealed.is_empty().unwrap());
    // The engine is as good as new.
    one(
        engine.as_mut(),
        IoOp::Read {
            file: sealed.token(),
            offset: 0,
            segments: &segments,
        },
    )
    .unwrap();
    assert_eq!(buffers.bytes(), vec![0; 512]);
}

pub fn names(bed: &Bed) {
    let media = &bed.media;
    let path = Path::new;
    media.create_dir(path("layers")).unwrap();
    assert_eq!(
        media.create_dir(path("layers")).unwrap_err().kind(),
        io::ErrorKind::AlreadyExists
    );
    media.create_dir(path("layers/b")).unwrap();
    media.create_dir(path("layers/a")).unwrap();
    assert_eq!(media.list(path("layers")).unwrap(), ["a", "b"]);
    assert_eq!(media.list(path("")).unwrap(), ["layers"]);
    let open = |name: &str, mode| media.open(path(name), mode, false);
    assert_eq!(
        open("layers/a/map", OpenMode::ReadOnly).unwrap_err().kind(),
        io::ErrorKind::NotFound
    );
    open("layers/a/map", OpenMode::CreateNew)
        .unwrap()
        .write_at(b"old", 0)
        .unwrap();
    assert_eq!(
        open("layers/a/map", OpenMode::CreateNew)
            .unwrap_err()
            .kind(),
        io::ErrorKind::AlreadyExists
    );
    let old = open("layers/a/map", OpenMode::ReadWrite).unwrap();
    let new = open("layers/a/map.new", OpenMode::CreateNew).unwrap();
    new.write_at(b"newer", 0).unwrap();
    new.sync_data().unwrap();
    media
        .rename(path("layers/a/map.new"), path("layers/a/map"))
        .unwrap();
    media.sync_dir(path("layers/a")).unwrap();
    media.sync_dir(path("")).unwrap();
    assert_eq!(media.list(path("layers/a")).unwrap(), ["map"]);
    let stat = media.stat(path("layers/a/map")).unwrap();
    assert_eq!((stat.len, stat.is_file), (5, true));
    assert!(stat.mtime_ns > 0);
    assert!(!media.stat(path("layers/a")).unwrap().is_file);
    // A file that was replaced goes on to be what it was.
    let mut three = [0; 3];
    old.read_at(&mut three, 0).unwrap();
    assert_eq!(&three, b"old");
    media.remove(path("layers/a/map")).unwrap();
    assert_eq!(
        media.remove(path("layers/a/map")).unwrap_err().kind(),
        io::ErrorKind::NotFound
    );
    assert_eq!(
        media.stat(path("layers/a/map")).unwrap_err().kind(),
        io::ErrorKind::NotFound
    );
    open("layers/b/data", OpenMode::CreateNew).unwrap();
    media.create_dir(path("layers/b/inner")).unwrap();
    open("layers/b/inner/x", OpenMode::CreateNew).unwrap();
    media.remove_dir_all(path("layers")).unwrap();
    assert!(media.list(path("")).unwrap().is_empty());
    for outside in ["..", "../x", "a/../../x"] {
        media
            .open(path(outside), OpenMode::ReadOnly, false)
            .unwrap_err();
        media.create_dir(path(outside)).unwrap_err();
    }
    assert!(media.display_path(path("x")).is_absolute());
}
