//! The front-ends that are connected to an attachment's socket: each has a place and a thread.
//!
//! The places are few, since all that holds one costs threads and descriptors. Who finds none waits in the queue of the socket,
//! and whoever holds a place and does nothing with it makes way then (`vhost::session`).

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::signal::Signal;
use crate::vhost::state::SessionState;
use crate::vhost::under_way::UnderWay;

/// Front-ends that are served at a time.
pub const SESSIONS_MAX: usize = 8;

/// The front-ends that are connected.
#[derive(Debug)]
pub struct Sessions {
    /// What is known of each, the latest last.
    live: Mutex<Vec<Arc<SessionState>>>,
    /// Front-ends that were served.
    served: AtomicU64,
    /// The size that a front-end was told last; see [`SessionState`].
    last_told: Arc<AtomicU64>,
    /// Up when a place was given up.
    pub freed: Signal,
    /// Up while somebody waits for a place.
    pub crowded: Signal,
}

/// The place of one front-end. It is free again when this is dropped.
#[derive(Debug)]
pub struct Place {
    /// All of them.
    sessions: Arc<Sessions>,
    /// What is known of this one.
    pub state: Arc<SessionState>,
}

impl Sessions {
    /// Nobody is connected.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            live: Mutex::default(),
            served: AtomicU64::new(0),
            last_told: Arc::default(),
            freed: Signal::new()?,
            crowded: Signal::new()?,
        })
    }

    /// Locks the list. It is whole even if a thread panicked with the lock.
    fn live(&self) -> MutexGuard<'_, Vec<Arc<SessionState>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a front-end a place, even if all are taken: who accepts it has looked.
    pub fn place(self: &Arc<Self>) -> Place {
        let state = Arc::new(SessionState::new(Arc::clone(&self.last_told)));
        self.live().push(Arc::clone(&state));
        self.served.fetch_add(1, Ordering::Relaxed);
        Place {
            sessions: Arc::clone(self),
            state,
        }
    }

    /// Whether all places are taken.
    pub fn is_full(&self) -> bool {
        self.live().len() >= SESSIONS_MAX
    }

    /// Front-ends that are connected.
    pub fn connected(&self) -> usize {
        self.live().len()
    }

    /// Front-ends that were served, the present ones included.
    pub fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }

    /// Rings that are being served.
    pub fn rings(&self) -> usize {
        let rings = self.live().iter().map(|state| state.rings()).sum::<u32>();
        usize::try_from(rings).unwrap_or(usize::MAX)
    }

    /// The virtio features that the front-end took whose rings run; if none do, those of the latest.
    pub fn features(&self) -> u64 {
        let live = self.live();
        let running = live.iter().find(|state| state.rings() > 0);
        running.or(live.last()).map_or(0, |state| state.features())
    }

    /// Whether a state of a device is being transferred by one of them.
    pub fn is_transferring(&self) -> bool {
        self.live().iter().any(|state| state.is_transferring())
    }

    /// What all of them have under way now.
    pub fn under_way(&self) -> UnderWay {
        UnderWay::of(self.live().iter())
    }

    /// Tells all front-ends that the configuration changed, if they want to know.
    ///
    /// # Errors
    /// One of them does not read its messages.
    pub fn config_changed(&self) -> io::Result<()> {
        let live = self.live();
        live.iter()
            .map(|state| state.config_changed())
            .fold(Ok(()), Result::and)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.sessions
            .live()
            .retain(|state| !Arc::ptr_eq(state, &self.state));
        self.sessions.freed.raise();
    }
}
