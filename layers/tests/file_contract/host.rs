//! What only the host has: pipes, direct files, paths outside of the store.

use std::io;
use std::path::{Path, PathBuf};

use stratablk_layers::file::OpenMode;

use crate::{Bed, DISK, MEMORY};

#[test]
fn a_pipe_is_refused_without_waiting_for_its_other_end() {
    let bed = Bed::host(DISK, true, false);
    let path = bed.directory.as_ref().unwrap().path().join("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    for mode in [OpenMode::ReadOnly, OpenMode::ReadWrite] {
        let error = bed.media.open(&path, mode, false).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
    let error = bed
        .media
        .open(Path::new(""), OpenMode::ReadOnly, true)
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    assert!(!bed.media.stat(&path).unwrap().is_file);
}

#[test]
fn fallbacks_are_noted_once() {
    let bed = Bed::host(MEMORY, true, true);
    let first = bed.create("a");
    let second = bed.create("b");
    assert_eq!(first.alignment(), second.alignment());
    if first.alignment() == 1 {
        let notes = bed.media.notes();
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert!(notes[0].contains("page cache"), "{notes:?}");
    }
    assert!(bed.media.notes().is_empty());
}

#[test]
fn direct_files_are_direct_where_the_disk_can() {
    let bed = Bed::host(DISK, true, true);
    let file = bed.create("direct");
    let notes = bed.media.notes();
    assert!(
        (file.alignment() == 512) == notes.is_empty(),
        "alignment {} with notes {notes:?}",
        file.alignment()
    );
    println!("alignment {} on {DISK}, notes {notes:?}", file.alignment());
}

#[test]
fn absolute_paths_lead_outside_the_store() {
    let bed = Bed::host(DISK, true, false);
    let other = tempfile::tempdir_in(DISK).unwrap();
    let base: PathBuf = other.path().join("base.raw");
    std::fs::write(&base, b"base").unwrap();
    let file = bed.media.open(&base, OpenMode::ReadOnly, false).unwrap();
    let mut bytes = [0; 6];
    file.read_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"base\0\0");
    assert_eq!(bed.media.stat(&base).unwrap().len, 4);
    assert_eq!(bed.media.display_path(&base), base);
}
