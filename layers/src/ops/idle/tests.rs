//! Who waits for a command, and who is refused.

use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::catalog::memory::{MemoryCatalog, MemoryDisk};
use crate::file::Media;
use crate::file::sim::SimMedia;
use crate::lifecycle::RestoreOptions;
use crate::store::{Selection, StoreOptions, VolumeSource};
use crate::units::StoreId;

/// How long what must come may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A store with an empty disk, which has a snapshot, was open and is used by nobody.
fn store() -> Store {
    let media: Arc<dyn Media> = Arc::new(SimMedia::new(1));
    let id = StoreId(uuid::Uuid::from_u128(1));
    let catalog = MemoryCatalog::open(&MemoryDisk::new(CatalogState::empty(id))).unwrap();
    let store = Store::simulated(media, Box::new(catalog), StoreOptions::default()).unwrap();
    store
        .create_volume("disk", &VolumeSource::Size(1 << 20))
        .unwrap();
    let volumes = Selection::Volumes(vec!["disk".into()]);
    store.snapshot("before", &volumes).unwrap();
    drop(store.open_volume("disk").unwrap());
    store
}

/// Waits until somebody waits for a turn, beside those who did.
fn await_drawn(store: &Store, before: u64) {
    let began = Instant::now();
    while store.commands.drawn() == before {
        assert!(began.elapsed() < PATIENCE, "nobody waits");
        thread::yield_now();
    }
}

#[test]
fn an_open_volume_is_given_while_a_command_is_under_way() {
    let store = store();
    thread::scope(|scope| {
        let command = store.command();
        let (sender, opened) = channel();
        let store = &store;
        scope.spawn(move || sender.send(store.open_volume("disk").is_ok()));
        let opened = opened.recv_timeout(PATIENCE);
        // Or a thread that waits for it would never end.
        drop(command);
        assert_eq!(opened, Ok(true));
    });
}

#[test]
fn a_volume_that_a_command_needs_for_itself_is_given_at_its_end() {
    let store = store();
    thread::scope(|scope| {
        let command = store.command();
        store.check_idle("disk").unwrap();
        let before = store.commands.drawn();
        let (sender, opened) = channel();
        let store = &store;
        scope.spawn(move || sender.send(store.open_volume("disk").is_ok()));
        await_drawn(store, before);
        assert!(opened.try_recv().is_err());
        drop(command);
        assert_eq!(opened.recv_timeout(PATIENCE), Ok(true));
    });
    assert!(store.inner().reserved.is_empty());
}

#[test]
fn a_volume_that_was_given_meanwhile_stays_open_and_as_it_is() {
    let store = store();
    let command = store.command();
    let before = store.volume_row("disk").unwrap().active;
    let volume = store.open_volume("disk").unwrap();
    assert!(store.check_idle("disk").is_err());
    store.close_volume("disk").unwrap();
    drop(command);
    let again = store.open_volume("disk").unwrap();
    assert!(Arc::ptr_eq(&volume, &again));
    let restored = store.restore("disk", "before", &RestoreOptions::default());
    assert!(matches!(restored, Err(Error::Busy { .. })), "{restored:?}");
    assert_eq!(store.volume_row("disk").unwrap().active, before);
}

#[test]
fn openers_and_restores_never_share_a_volume() {
    let store = store();
    thread::scope(|scope| {
        let openers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let volume = store.open_volume("disk").unwrap();
                        let active = volume.newest_chain().active().map(|layer| layer.id());
                        // As long as somebody has it, no command may put another layer in its place.
                        let row = store.volume_row("disk").unwrap();
                        assert_eq!(active, Some(row.active));
                    }
                })
            })
            .collect();
        let mut restored = 0;
        while restored < 50 || openers.iter().any(|opener| !opener.is_finished()) {
            match store.restore("disk", "before", &RestoreOptions::default()) {
                Ok(_) => restored += 1,
                Err(Error::Busy { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        openers
            .into_iter()
            .for_each(|opener| opener.join().unwrap());
    });
}
