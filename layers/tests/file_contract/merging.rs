//! Files with two names, and copies from file to file.

use std::io;
use std::path::Path;
use std::sync::Arc;

use stratablk_layers::file::sim::Random;
use stratablk_layers::file::{File, OpenMode};

use super::{Bed, check, pattern};

/// A file has two names, loses one and then the other.
pub fn links(bed: &Bed) {
    let media = &bed.media;
    let path = Path::new;
    let open = |name: &str, mode| media.open(path(name), mode, bed.direct);
    media.create_dir(path("a")).unwrap();
    media.create_dir(path("b")).unwrap();
    let first = open("a/data", OpenMode::CreateNew).unwrap();
    first.write_at(&[1; 4096], 0).unwrap();
    let missing = media.link(path("a/none"), path("b/none")).unwrap_err();
    assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    media.link(path("a/data"), path("b/data")).unwrap();
    let taken = media.link(path("a/data"), path("b/data")).unwrap_err();
    assert_eq!(taken.kind(), io::ErrorKind::AlreadyExists);
    media.link(path("a"), path("b/directory")).unwrap_err();
    for outside in ["../x", "/a/../../x"] {
        media.link(path("a/data"), path(outside)).unwrap_err();
    }
    media.sync_dir(path("b")).unwrap();
    // One file: written by either name, read by either.
    let second = open("b/data", OpenMode::ReadWrite).unwrap();
    second.write_at(&[2; 4096], 4096).unwrap();
    let both = [vec![1; 4096], vec![2; 4096]].concat();
    check(first.as_ref(), &both);
    check(second.as_ref(), &both);
    assert_eq!(
        media.stat(path("a/data")).unwrap(),
        media.stat(path("b/data")).unwrap()
    );
    // Over another file's name: that file goes, this one has the name.
    open("b/old", OpenMode::CreateNew)
        .unwrap()
        .write_at(&[9; 512], 0)
        .unwrap();
    media.link(path("a/data"), path("b/new")).unwrap();
    media.rename(path("b/new"), path("b/old")).unwrap();
    assert_eq!(media.list(path("b")).unwrap(), ["data", "old"]);
    check(open("b/old", OpenMode::ReadOnly).unwrap().as_ref(), &both);
    // Over one of its own names: nothing happens, as the standard has it.
    media.link(path("a/data"), path("b/new")).unwrap();
    media.rename(path("b/new"), path("b/old")).unwrap();
    assert_eq!(media.list(path("b")).unwrap(), ["data", "new", "old"]);
    for name in ["a/data", "b/new", "b/old"] {
        media.remove(path(name)).unwrap();
    }
    drop((first, second));
    let left = open("b/data", OpenMode::ReadWrite).unwrap();
    check(left.as_ref(), &both);
    media.remove_dir_all(path("b")).unwrap();
    check(left.as_ref(), &both);
    assert_eq!(media.list(path("")).unwrap(), ["a"]);
}

/// Parts of one file are copied into another at their places, and nothing else.
pub fn copies(bed: &Bed) {
    let random = &mut Random::new(11);
    let from = bed.create("from");
    let mut theirs = pattern(3 << 20, random);
    from.write_at(&theirs, 0).unwrap();
    from.punch(8192, 4096).unwrap();
    theirs[8192..12_288].fill(0);
    from.sync_data().unwrap();
    let to = bed.create("to");
    let mut ours = pattern(2 << 20, random);
    to.write_at(&ours, 0).unwrap();
    let copy =
        |from: &Arc<dyn File>, offset: usize, len: usize, ours: &mut Vec<u8>, theirs: &[u8]| {
            bed.media
                .copy(from, &to, offset as u64, len as u64)
                .unwrap();
            if len > 0 {
                ours.resize(ours.len().max(offset + len), 0);
            }
            for (at, byte) in ours.iter_mut().enumerate().skip(offset).take(len) {
                *byte = theirs.get(at).copied().unwrap_or(0);
            }
            check(to.as_ref(), ours);
        };
    let ranges = [
        (4096, 4096),
        (0, 0),
        (512, 512),
        (8192 - 1024, 8192),
        (100_000 / 512 * 512, 70_000 / 512 * 512),
        (1 << 20, 1 << 20),
        // Into what was not there, out of what is there in part.
        ((3 << 20) - 4096, 8192),
        (4 << 20, 4096),
    ];
    for (offset, len) in ranges {
        copy(&from, offset, len, &mut ours, &theirs);
    }
    // A file that is open for reading only, as those of sealed layers.
    drop(from);
    let from = bed
        .media
        .open(Path::new("from"), OpenMode::ReadOnly, bed.direct)
        .unwrap();
    for _ in 0..20 {
        let offset = random.index(6000) * 512;
        let len = random.index(400) * 512;
        copy(&from, offset, len, &mut ours, &theirs);
    }
    copy(&from, 0, 3 << 20, &mut ours, &theirs);
    // Nobody else's bytes: the source is what it was, and a write to either is not seen in the other.
    check(from.as_ref(), &theirs);
    to.write_at(&[7; 4096], 0).unwrap();
    ours[..4096].fill(7);
    check(to.as_ref(), &ours);
    check(from.as_ref(), &theirs);
    bed.media.copy(&to, &from, 0, 4096).unwrap_err();
    bed.media.copy(&from, &to, u64::MAX, 4096).unwrap_err();
    bed.media.copy(&from, &to, 1 << 63, 4096).unwrap_err();
}
