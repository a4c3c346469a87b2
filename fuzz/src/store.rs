//! A small store of everything that a store can hold, made once a process and copied for each input.

use std::fs::{self, File, FileTimes};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use stratablk_layers::cache::CacheOptions;
use stratablk_layers::catalog::VolumeKind;
use stratablk_layers::file::Segment;
use stratablk_layers::store::{Attachment, Selection, Store, StoreOptions, VolumeSource};
use stratablk_layers::units::Sector;
use stratablk_layers::volume::{Durability, Operation};

use crate::scratch::{Scratch, copy};

/// Bytes of the volumes.
const BYTES: u64 = 64 << 10;

/// A store, its raw base, and what both looked like at first.
#[derive(Debug)]
pub struct Template {
    /// Where all of it lies.
    scratch: Scratch,
}

/// A store with a small cache of its own.
pub fn options() -> StoreOptions {
    StoreOptions {
        no_io_uring: true,
        cache: CacheOptions {
            bytes: 1 << 20,
            huge_pages: false,
            ..CacheOptions::default()
        },
        ..StoreOptions::default()
    }
}

impl Template {
    /// Makes it. With `jobs` some wait to be carried out.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn new(name: &str, jobs: bool) -> Self {
        let template = Self {
            scratch: Scratch::new(name),
        };
        template.restore_base();
        fill(&template.store(), &template.base(), jobs);
        copy(&template.store(), &template.scratch.path().join("template"));
        template
    }

    /// Where all of it lies.
    pub fn path(&self) -> &Path {
        self.scratch.path()
    }

    /// The directory of the store.
    pub fn store(&self) -> PathBuf {
        self.path().join("store")
    }

    /// The raw image.
    pub fn base(&self) -> PathBuf {
        self.path().join("base.raw")
    }

    /// The image as it was, also to whoever looks at its time.
    fn restore_base(&self) {
        let bytes: Vec<u8> = (0..BYTES).map(|at| (at / 512).to_le_bytes()[0]).collect();
        fs::write(self.base(), bytes).expect("room for an image");
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let file = File::options()
            .write(true)
            .open(self.base())
            .expect("the image");
        file.set_times(FileTimes::new().set_modified(time))
            .expect("the image");
    }

    /// Puts everything back.
    ///
    /// # Panics
    /// If the host will not.
    pub fn restore(&self) {
        self.restore_base();
        for entry in fs::read_dir(self.path()).expect("a folder") {
            let path = entry.expect("an entry").path();
            if !path.ends_with("template") && path != self.base() {
                let removed = if path.is_dir() {
                    fs::remove_dir_all(&path)
                } else {
                    fs::remove_file(&path)
                };
                removed.expect("a folder of ours");
            }
        }
        copy(&self.path().join("template"), &self.store());
    }
}

/// Writes a few sectors of a volume.
#[expect(unsafe_code, reason = "plays a guest")]
fn write(store: &Store, volume: &str, sector: u64) {
    let volume = store.open_volume(volume).expect("a volume");
    let mut queue = volume.context(false).expect("a context");
    let mut bytes = vec![7u8; 1024];
    let segment = Segment {
        base: bytes.as_mut_ptr(),
        len: bytes.len(),
    };
    queue.begin_batch();
    // SAFETY: the bytes outlive the context, which is dropped first, and nobody else looks at them.
    unsafe {
        queue.submit(
            Operation::Write(Sector(sector)),
            Durability::OnCompletion,
            &[segment],
            0,
        );
    }
    queue.kick();
    let mut done = Vec::new();
    while done.is_empty() {
        queue.poll(&mut done);
    }
    assert!(
        done.iter().all(|completion| completion.result.is_ok()),
        "{done:?}"
    );
    drop(queue);
}

/// Makes the store.
fn fill(dir: &Path, base: &Path, jobs: bool) {
    let store = Store::open(dir, options()).expect("a store");
    let of = |volume: &str| Selection::Volumes(vec![volume.to_owned()]);
    let snapshot = |volume: &str, name: &str| {
        store
            .snapshot(name, &of(volume))
            .map(drop)
            .expect("a snapshot")
    };
    let from = |volume: &str, snapshot: &str| VolumeSource::Snapshot {
        volume: volume.into(),
        snapshot: snapshot.into(),
    };
    let create = |name, source, kind| {
        store
            .create_volume_of(name, &source, kind)
            .map(drop)
            .expect("a volume")
    };
    create("a", VolumeSource::Size(BYTES), VolumeKind::Normal);
    write(&store, "a", 3);
    snapshot("a", "s1");
    write(&store, "a", 17);
    snapshot("a", "s2");
    create("b", from("a", "s1"), VolumeKind::Normal);
    create("c", VolumeSource::Base(base.to_owned()), VolumeKind::Normal);
    write(&store, "c", 5);
    snapshot("c", "s1");
    create("d", from("c", "s1"), VolumeKind::Immutable);
    create("e", VolumeSource::Size(BYTES), VolumeKind::Writethrough);
    create("f", from("a", "s2"), VolumeKind::Multiattach);
    store
        .give_attachment("f", Some("g"))
        .map(drop)
        .expect("an attachment");
    let attachment = Attachment {
        socket: dir.with_file_name("e.sock"),
        queues: 1,
        read_only: false,
    };
    store
        .set_attachment("e", Some(attachment))
        .expect("an attachment");
    if jobs {
        store.flatten("b").map(drop).expect("a job");
        store.import("h", base).map(drop).expect("a job");
    }
    store.flush_all().expect("a flush");
}
