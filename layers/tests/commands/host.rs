//! The same commands on real files and the real catalog, which are checked after each.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use stratablk_layers::catalog::VolumeKind;
use stratablk_layers::check::{CheckOptions, Severity, check, rebuild_catalog};
use stratablk_layers::file::Media;
use stratablk_layers::file::host::{HostMedia, HostOptions};
use stratablk_layers::lifecycle::{DeleteOptions, Fate, RestoreOptions};
use stratablk_layers::store::{Selection, Store, StoreOptions, VolumeSource};
use stratablk_layers::units::{SECTOR_BYTES, Sector};
use stratablk_layers::volume::Operation;

use crate::disk::Queue;
use crate::oracle::{Value, stamp};
use crate::world::SECTORS;
use crate::{over, stamps};

#[test]
fn immutable_volumes_start_anew_after_a_boot_of_the_host() {
    let mut host = Host::new();
    let size = VolumeSource::Size(SECTORS * SECTOR_BYTES);
    let store = host.store();
    store.create_volume("normal", &size).unwrap();
    store
        .create_volume_of("im", &size, VolumeKind::Immutable)
        .unwrap();
    let path = Host::path(host.dir.path()).join("boot");
    let this = std::fs::read(&path).unwrap();
    let others: [Option<&[u8]>; 4] = [
        None,
        Some(b""),
        Some(b"not a boot\n"),
        Some(b"0000abcd-0000-4000-8000-000000000001\n"),
    ];
    for other in others {
        host.store().machine_starts("im").unwrap();
        host.write("im", 0, 4, 2);
        host.restart();
        assert!(
            !host.store().volume_facts("im").unwrap().armed,
            "another daemon in the same boot"
        );
        host.store().finish().unwrap();
        host.store = None;
        match other {
            None => std::fs::remove_file(&path).unwrap(),
            Some(bytes) => std::fs::write(&path, bytes).unwrap(),
        }
        host.store = Some(Host::open(host.dir.path()));
        assert_eq!(host.store().notes().len(), 1);
        assert_eq!(std::fs::read(&path).unwrap(), this);
        assert!(host.store().volume_facts("im").unwrap().armed);
        assert!(!host.store().volume_facts("normal").unwrap().armed);
        assert!(host.store().machine_starts("im").unwrap());
        assert_eq!(host.values("im"), stamps(&[]));
    }
}

/// A store in a folder of its own.
struct Host {
    /// The folder; the store is in a part of it.
    dir: tempfile::TempDir,
    /// The store, open.
    store: Option<Store>,
}

impl Host {
    /// An empty one.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Some(Self::open(dir.path()));
        Self { dir, store }
    }

    /// Where the store is.
    fn path(dir: &Path) -> PathBuf {
        dir.join("store")
    }

    /// Opens it.
    fn open(dir: &Path) -> Store {
        Store::open(&Self::path(dir), StoreOptions::default()).unwrap()
    }

    /// The store.
    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    /// Ends the daemon, checks the store, and starts the daemon again.
    #[track_caller]
    fn restart(&mut self) {
        self.store().finish().unwrap();
        self.store = None;
        let path = Self::path(self.dir.path());
        let media = HostMedia::new(path.clone(), HostOptions { io_uring: false }).unwrap();
        let media: Arc<dyn Media> = Arc::new(media);
        let report = check(&path, &media, CheckOptions::default()).unwrap();
        let found: Vec<_> = report
            .findings
            .iter()
            .filter(|finding| finding.severity > Severity::Note)
            .collect();
        assert!(found.is_empty(), "{found:#?}");
        self.store = Some(Self::open(self.dir.path()));
        assert_eq!(self.store().notes(), Vec::<String>::new());
    }

    /// Writes the stamp of write `id` to a run of sectors.
    fn write(&self, volume: &str, start: u64, count: u64, id: u64) {
        let bytes = (start..start + count)
            .flat_map(|sector| stamp(7, sector, id))
            .collect();
        let volume = self.store().open_volume(volume).unwrap();
        let mut queue = Queue::new(volume.context(false).unwrap());
        queue.run(Operation::Write(Sector(start)), bytes).0.unwrap();
    }

    /// What a volume reads.
    fn values(&self, volume: &str) -> Vec<Value> {
        let volume = self.store().open_volume(volume).unwrap();
        let mut queue = Queue::new(volume.context(false).unwrap());
        queue.read_all(7, SECTORS).unwrap()
    }

    /// Directories of layers.
    fn directories(&self) -> usize {
        let layers = Self::path(self.dir.path()).join("layers");
        std::fs::read_dir(layers).unwrap().count()
    }
}

#[test]
fn a_life_on_real_files() {
    let mut host = Host::new();
    let image = host.dir.path().join("base.raw");
    let bytes: Vec<u8> = (0..SECTORS)
        .flat_map(|sector| stamp(7, sector, 1))
        .collect();
    std::fs::write(&image, &bytes).unwrap();
    let based = stamps(&[(0, 64, 1)]);
    let base = VolumeSource::Base(image.clone());
    host.store().create_volume("a", &base).unwrap();
    let size = VolumeSource::Size(SECTORS * SECTOR_BYTES);
    host.store().create_volume("b", &size).unwrap();
    host.write("a", 0, 8, 2);
    host.write("b", 0, 8, 3);
    host.store().snapshot("s", &Selection::All).unwrap();
    host.write("a", 4, 8, 4);
    host.write("b", 4, 8, 5);
    host.restart();
    let keep = RestoreOptions {
        keep: Some("later".into()),
        only: false,
    };
    let report = host.store().restore("a", "s", &keep).unwrap();
    assert_eq!(report.volumes, ["a", "b"]);
    host.restart();
    assert_eq!(host.values("a"), over(&based, &[(0, 8, 2)]));
    assert_eq!(host.values("b"), stamps(&[(0, 8, 3)]));
    let options = RestoreOptions::default();
    host.store().restore("b", "later", &options).unwrap();
    host.restart();
    let later = over(&based, &[(0, 8, 2), (4, 8, 4)]);
    assert_eq!(host.values("a"), later);
    assert_eq!(host.values("b"), stamps(&[(0, 8, 3), (4, 8, 5)]));
    let clone = VolumeSource::Volume("a".into());
    host.write("a", 20, 1, 6);
    host.store()
        .create_volume_of("gold", &clone, VolumeKind::Multiattach)
        .unwrap();
    host.store().give_attachment("gold", None).unwrap();
    host.write("gold-1", 30, 1, 7);
    host.restart();
    let cloned = over(&later, &[(20, 1, 6)]);
    assert_eq!(host.values("gold-1"), over(&cloned, &[(30, 1, 7)]));
    host.store()
        .take_attachment("gold-1", Some("mine"))
        .unwrap();
    host.store().set_kind("b", VolumeKind::Immutable).unwrap();
    host.write("b", 50, 4, 8);
    host.restart();
    assert!(host.store().machine_starts("b").unwrap());
    host.restart();
    assert_eq!(host.values("b"), stamps(&[(0, 8, 3), (4, 8, 5)]));
    assert_eq!(host.values("mine"), over(&cloned, &[(30, 1, 7)]));
    let options = DeleteOptions::default();
    let report = host.store().delete_snapshot("a", "s", options).unwrap();
    assert!(matches!(report.fate, Fate::Joined { .. }), "{report:?}");
    host.restart();
    for name in ["a", "gold", "b"] {
        host.store().delete_volume(name).unwrap();
        host.restart();
        assert_eq!(host.values("mine"), over(&cloned, &[(30, 1, 7)]));
    }
    assert_eq!(host.directories(), host.store().tree(None).unwrap().len());
    host.store().delete_volume("mine").unwrap();
    host.restart();
    assert_eq!(host.directories(), 0);
    assert_eq!(std::fs::read(&image).unwrap(), bytes);
}

/// Ends the daemon, makes the catalog anew, and starts the daemon again.
fn rebuild(host: &mut Host) -> Vec<String> {
    host.store().finish().unwrap();
    host.store = None;
    let path = Host::path(host.dir.path());
    let media = HostMedia::new(path.clone(), HostOptions { io_uring: false }).unwrap();
    let media: Arc<dyn Media> = Arc::new(media);
    let rebuilt = rebuild_catalog(&path, &media).unwrap();
    host.store = Some(Host::open(host.dir.path()));
    rebuilt.notes
}

#[test]
fn what_volumes_start_from_stays_through_a_rebuilt_catalog() {
    let mut host = Host::new();
    let size = VolumeSource::Size(SECTORS * SECTOR_BYTES);
    for name in ["im", "gold", "was", "plain"] {
        host.store().create_volume(name, &size).unwrap();
        host.write(name, 0, 8, 2);
    }
    let set = |host: &Host, name, kind| host.store().set_kind(name, kind).unwrap();
    set(&host, "im", VolumeKind::Immutable);
    set(&host, "gold", VolumeKind::Multiattach);
    set(&host, "was", VolumeKind::Immutable);
    host.write("im", 4, 8, 3);
    host.write("was", 4, 8, 3);
    set(&host, "was", VolumeKind::Readonly);
    let made = |host: &Host| {
        let store = host.store();
        store
            .create_volume_of("made", &size, VolumeKind::Writethrough)
            .unwrap();
        host.write("made", 0, 1, 9);
    };
    made(&host);
    rebuild(&mut host);
    let kind = |host: &Host, name| host.store().volume_facts(name).unwrap().kind;
    let kinds = |host: &Host| ["im", "gold", "was", "made", "plain"].map(|name| kind(host, name));
    let expected = [
        VolumeKind::Immutable,
        VolumeKind::Multiattach,
        VolumeKind::Readonly,
        VolumeKind::Writethrough,
        VolumeKind::Normal,
    ];
    assert_eq!(kinds(&host), expected);
    while host.store().job_step() {}
    // Nothing is thrown away before the operator has seen it.
    assert!(!host.store().machine_starts("im").unwrap());
    assert_eq!(host.values("im"), stamps(&[(0, 8, 2), (4, 8, 3)]));
    host.store().arm("im", true).unwrap();
    assert!(host.store().machine_starts("im").unwrap());
    assert_eq!(host.values("im"), stamps(&[(0, 8, 2)]));
    host.store().give_attachment("gold", None).unwrap();
    assert_eq!(host.values("gold-1"), stamps(&[(0, 8, 2)]));
    host.write("im", 4, 8, 4);
    // Also from maps that were written by a reset, and by a change of type where the layer stayed.
    set(&host, "im", VolumeKind::Normal);
    host.store().arm("im", true).unwrap();
    rebuild(&mut host);
    assert_eq!(kind(&host, "im"), VolumeKind::Normal);
    assert!(!host.store().machine_starts("im").unwrap());
    while host.store().job_step() {}
    assert_eq!(host.values("im"), stamps(&[(0, 8, 2), (4, 8, 4)]));
}

#[test]
fn the_name_of_a_deleted_snapshot_does_not_come_back() {
    let mut host = Host::new();
    let size = VolumeSource::Size(SECTORS * SECTOR_BYTES);
    host.store().create_volume("v", &size).unwrap();
    for (name, id) in [("kept", 1), ("forked", 2), ("waits", 3), ("last", 4)] {
        host.write("v", id, 2, id);
        let of = Selection::Volumes(vec!["v".into()]);
        host.store().snapshot(name, &of).unwrap();
    }
    host.write("v", 5, 2, 5);
    let forked = VolumeSource::Snapshot {
        volume: "v".into(),
        snapshot: "forked".into(),
    };
    host.store().create_volume("clone", &forked).unwrap();
    // One has two children, and the job of the other does not begin.
    let held = host.store().hold_new_jobs();
    for name in ["forked", "waits"] {
        let options = DeleteOptions::default();
        host.store().delete_snapshot("v", name, options).unwrap();
    }
    drop(held);
    assert_eq!(host.store().jobs().len(), 1);
    let expected = stamps(&[(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 1, 4), (5, 2, 5)]);
    rebuild(&mut host);
    let snapshots = host.store().snapshots(None).unwrap();
    let names: Vec<_> = snapshots.iter().map(|row| &*row.name).collect();
    assert_eq!(names, ["kept", "last"]);
    while host.store().job_step() {}
    assert_eq!(host.values("v"), expected);
    host.restart();
    assert_eq!(host.values("v"), expected);
    assert_eq!(host.values("clone"), stamps(&[(1, 1, 1), (2, 2, 2)]));
}

#[test]
fn job_numbers_go_on_in_a_rebuilt_catalog() {
    for lost in [false, true] {
        let mut host = Host::new();
        let image = host.dir.path().join("base.raw");
        std::fs::write(
            &image,
            vec![1; usize::try_from(SECTORS * SECTOR_BYTES).unwrap()],
        )
        .unwrap();
        let before = host.store().import("one", &image).unwrap().id;
        while host.store().job_step() {}
        if lost {
            host.store().finish().unwrap();
            host.store = None;
            std::fs::remove_file(Host::path(host.dir.path()).join("catalog.db")).unwrap();
            host.store = None;
            let path = Host::path(host.dir.path());
            let media = HostMedia::new(path.clone(), HostOptions { io_uring: false }).unwrap();
            let media: Arc<dyn Media> = Arc::new(media);
            rebuild_catalog(&path, &media).unwrap();
            host.store = Some(Host::open(host.dir.path()));
        } else {
            rebuild(&mut host);
        }
        let after = host.store().import("two", &image).unwrap().id;
        assert!(after > before, "{after:?} {before:?}");
    }
}

#[test]
fn a_kept_attachment_is_found_by_its_new_name() {
    let mut host = Host::new();
    let size = VolumeSource::Size(SECTORS * SECTOR_BYTES);
    host.store().create_volume("gold", &size).unwrap();
    host.write("gold", 0, 8, 2);
    host.store()
        .set_kind("gold", VolumeKind::Multiattach)
        .unwrap();
    host.store().give_attachment("gold", None).unwrap();
    host.write("gold-1", 8, 1, 3);
    let selection = Selection::Volumes(vec!["gold-1".into()]);
    host.store().snapshot("s", &selection).unwrap();
    host.write("gold-1", 9, 1, 4);
    host.store()
        .take_attachment("gold-1", Some("mine"))
        .unwrap();
    // The name is free again.
    host.store().give_attachment("gold", None).unwrap();
    host.write("gold-1", 10, 1, 5);
    host.restart();
    host.store().finish().unwrap();
    host.store = None;
    let path = Host::path(host.dir.path());
    let media = HostMedia::new(path.clone(), HostOptions { io_uring: false }).unwrap();
    let media: Arc<dyn Media> = Arc::new(media);
    rebuild_catalog(&path, &media).unwrap();
    host.store = Some(Host::open(host.dir.path()));
    let names: Vec<_> = host.store().snapshots(None).unwrap();
    let names: Vec<_> = names.iter().map(|row| (&*row.volume, &*row.name)).collect();
    assert_eq!(names, [("mine", "s")]);
    assert_eq!(
        host.values("mine"),
        stamps(&[(0, 8, 2), (8, 1, 3), (9, 1, 4)])
    );
    assert_eq!(host.values("gold-1"), stamps(&[(0, 8, 2), (10, 1, 5)]));
}
