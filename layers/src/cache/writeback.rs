//! The thread that writes dirty frames back in time: because they are old, because too many are dirty, or because a
//! request waits for a frame. Flushes do not need it.

use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::mailbox::{Mail, Mailbox};
use crate::sync::{AtomicBool, Ordering};
use crate::volume::Volume;

use super::Cache;

/// Clusters that are written back at once. While they are written the volume's flushes wait.
const BATCH_CLUSTERS: usize = 2048;
/// How long a volume is left alone after its disk was full, and requests that wait for space.
const FULL_DISK_PAUSE: Duration = Duration::from_millis(250);

/// How long those who wait for a frame are left waiting when others write already, each time.
const LATER_PAUSE: Duration = Duration::from_millis(1);
/// The same when nothing can be written.
const STUCK_PAUSE: Duration = Duration::from_millis(10);

/// Wakes the thread that writes back, and those who wait for it.
#[derive(Debug, Default)]
pub struct Bell {
    /// Whether it was rung: spares the lock.
    rung: AtomicBool,
    /// What else there is to know.
    state: Mutex<BellState>,
    /// Wakes the thread.
    ring: Condvar,
}

/// Who waits, and for what.
#[derive(Debug, Default)]
struct BellState {
    /// Rung since the last look.
    rung: bool,
    /// Contexts with requests that wait for a frame.
    waiting: Vec<Arc<Mailbox>>,
    /// Contexts with requests that wait for space on the host.
    room: Vec<Arc<Mailbox>>,
    /// No more writing back.
    closed: bool,
}

/// Why a wait has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Woken {
    /// Somebody rang: frames are wanted.
    Rung,
    /// Time has passed.
    Tick,
    /// There is nothing more to do.
    Closed,
}

/// What came of an attempt to make frames free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Relief {
    /// Everybody was told who waits.
    Done,
    /// Others are at it.
    Later,
    /// Frames hold what can be written nowhere.
    Stuck,
}

impl Bell {
    /// Asks for writing back. Cheap if that was done already.
    pub fn ring(&self) {
        // ORDERING: Relaxed; the flag only spares the lock. It is cleared under the lock, before the work begins, and what
        // is dirty then is seen by the marks' own ordering.
        if !self.rung.swap(true, Ordering::Relaxed) {
            self.lock().rung = true;
            self.ring.notify_one();
        }
    }

    /// Asks for a letter once frames may have become free, and for writing back.
    pub fn want(&self, mailbox: &Arc<Mailbox>) {
        {
            let mut state = self.lock();
            if !state
                .waiting
                .iter()
                .any(|waiting| Arc::ptr_eq(waiting, mailbox))
            {
                state.waiting.push(Arc::clone(mailbox));
            }
            state.rung = true;
        }
        self.ring.notify_one();
    }

    /// Asks for a letter when it is time to look for space on the host again.
    pub fn want_room(&self, mailbox: &Arc<Mailbox>) {
        {
            let mut state = self.lock();
            if !state
                .room
                .iter()
                .any(|waiting| Arc::ptr_eq(waiting, mailbox))
            {
                state.room.push(Arc::clone(mailbox));
            }
            // So that the thread waits no longer than it should.
            state.rung = true;
        }
        self.ring.notify_one();
    }

    /// Whether somebody waits for space.
    fn wants_room(&self) -> bool {
        !self.lock().room.is_empty()
    }

    /// Lets those who wait for space try again.
    fn answer_room(&self) {
        let waiting = std::mem::take(&mut self.lock().room);
        for mailbox in waiting {
            mailbox.send(Mail::Room);
        }
    }

    /// Tells those who wait that frames may have become free, or that they are stuck.
    pub fn answer(&self, stuck: bool) {
        let waiting = std::mem::take(&mut self.lock().waiting);
        for mailbox in waiting {
            mailbox.send(Mail::Retry { stuck });
        }
    }

    /// Whether somebody waits for a frame.
    pub fn has_waiting(&self) -> bool {
        !self.lock().waiting.is_empty()
    }

    /// Ends the thread's wait for good.
    pub fn close(&self) {
        self.lock().closed = true;
        self.ring.notify_all();
    }

    /// Waits for so long, whoever rings.
    fn pause(&self, time: Duration) {
        let state = self.lock();
        let waited = self
            .ring
            .wait_timeout_while(state, time, |state| !state.closed);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Waits for the bell, at most this long.
    fn wait(&self, longest: Duration) -> Woken {
        let state = self.lock();
        let quiet = |state: &mut BellState| !state.rung && !state.closed;
        let (mut state, _) = self
            .ring
            .wait_timeout_while(state, longest, quiet)
            .unwrap_or_else(PoisonError::into_inner);
        self.rung.store(false, Ordering::Relaxed);
        if state.closed {
            Woken::Closed
        } else if std::mem::take(&mut state.rung) {
            Woken::Rung
        } else {
            Woken::Tick
        }
    }

    /// The state, whatever happened to an earlier holder of the lock.
    fn lock(&self) -> MutexGuard<'_, BellState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watched {
    /// Whether nothing of the volume can be written now.
    fn waits(&self, volume: &Volume, now: Instant) -> bool {
        volume.has_failed() || self.not_before.is_some_and(|time| now < time)
    }
}

/// What is written back, and when.
#[derive(Debug)]
pub struct WriteBack {
    /// Whose frames.
    cache: Arc<Cache>,
    /// Open volumes.
    volumes: Mutex<Vec<Watched>>,
    /// Held as long as a volume is held, so that who closes one can wait for that.
    working: Mutex<()>,
}

/// A volume that may have dirty frames.
#[derive(Debug)]
struct Watched {
    /// The volume, as long as it is open.
    volume: Weak<Volume>,
    /// When it was first seen dirty.
    dirty_since: Option<Instant>,
    /// Not before this: its disk was full.
    not_before: Option<Instant>,
}

impl WriteBack {
    /// No volume yet.
    pub fn new(cache: Arc<Cache>) -> Self {
        Self {
            cache,
            volumes: Mutex::new(Vec::new()),
            working: Mutex::new(()),
        }
    }

    /// Sees to a volume from now on, until it is closed.
    pub fn add(&self, volume: &Arc<Volume>) {
        let mut volumes = self.lock();
        volumes.retain(|watched| watched.volume.strong_count() > 0);
        volumes.push(Watched {
            volume: Arc::downgrade(volume),
            dirty_since: None,
            not_before: None,
        });
    }

    /// Writes back what is due until the bell is closed. For a thread of its own.
    pub fn run(&self) {
        let age = self.cache.options().dirty_age;
        let tick = (age / 4).clamp(Duration::from_millis(20), Duration::from_secs(5));
        let mut room = Instant::now();
        loop {
            let mut longest = tick;
            if self.cache.bell().wants_room() {
                if room.elapsed() >= FULL_DISK_PAUSE {
                    room = Instant::now();
                    self.cache.bell().answer_room();
                } else {
                    longest = longest.min(FULL_DISK_PAUSE);
                }
            }
            match self.cache.bell().wait(longest) {
                Woken::Closed => return,
                Woken::Rung => {
                    // Who is answered tries at once, and asks again if that was of no use.
                    let (pause, stuck) = match self.relieve() {
                        Relief::Done => continue,
                        Relief::Later => (LATER_PAUSE, false),
                        Relief::Stuck => (STUCK_PAUSE, true),
                    };
                    self.cache.bell().pause(pause);
                    self.cache.bell().answer(stuck);
                }
                Woken::Tick => self.write_old(),
            }
        }
    }

    /// Writes back until enough is clean and nobody waits for a frame.
    fn relieve(&self) -> Relief {
        loop {
            let due = self.due(|_| true);
            if due.is_empty() {
                return self.nothing_due();
            }
            let mut more = false;
            for volume in due {
                more |= self.write_some(&volume, BATCH_CLUSTERS);
                self.cache.bell().answer(false);
            }
            let wanted = self.cache.wants_write_back() || self.cache.bell().has_waiting();
            if !more || !wanted {
                break;
            }
        }
        self.cache.bell().answer(false);
        Relief::Done
    }

    /// What is to be said to those who wait for a frame although nothing is left to be written. If that is because nothing
    /// can be written, what is dirty no longer counts.
    fn nothing_due(&self) -> Relief {
        if !self.cache.bell().has_waiting() {
            return Relief::Done;
        }
        let frames = self.count_pinned(&self.lock());
        if frames > 0 {
            Relief::Stuck
        } else {
            // A flush has them.
            Relief::Later
        }
    }

    /// Counts the dirty frames that can be written nowhere now: of volumes that have failed or wait for space, and what an
    /// earlier process left of layers that could not be written yet.
    fn count_pinned(&self, volumes: &[Watched]) -> u64 {
        let now = Instant::now();
        let mut writable = BTreeSet::new();
        for watched in volumes {
            if let Some(volume) = watched.volume.upgrade()
                && !watched.waits(&volume, now)
            {
                let chain = volume.newest_chain();
                writable.extend(chain.unsealed().map(|layer| layer.number()));
            }
        }
        let pinned = |layer| !writable.contains(&layer);
        let frames = self.cache.sets().count_dirty(pinned);
        self.cache.set_pinned(frames);
        frames
    }

    /// Writes back the volumes that have been dirty for longer than they may.
    fn write_old(&self) {
        let age = self.cache.options().dirty_age;
        let now = Instant::now();
        let old = self.due(|watched| match watched.dirty_since {
            Some(since) => now.duration_since(since) >= age,
            None => {
                watched.dirty_since = Some(now);
                age.is_zero()
            }
        });
        for volume in old {
            // Everything that was dirty at this time; what is written meanwhile is young.
            let mut left = self.cache.dirty().max(BATCH_CLUSTERS as u64);
            while left > 0 && self.write_some(&volume, BATCH_CLUSTERS) {
                left = left.saturating_sub(BATCH_CLUSTERS as u64);
            }
            self.with(&volume, |watched| watched.dirty_since = None);
        }
        self.cache.bell().answer(false);
    }

    /// One batch of a volume. Returns whether there is more.
    fn write_some(&self, weak: &Weak<Volume>, clusters: usize) -> bool {
        let _working = self.hold();
        let Some(volume) = weak.upgrade() else {
            return false;
        };
        volume.lead_blocking();
        let result = volume.lead_write_back(clusters);
        volume.flushes().finish_blocking();
        match result {
            Ok(more) => more,
            Err(Error::Io { .. }) => {
                let pause = Some(Instant::now() + FULL_DISK_PAUSE);
                self.with(weak, |watched| watched.not_before = pause);
                false
            }
            // Latched in the volume, which says so.
            Err(_) => false,
        }
    }

    /// For simulations: one batch of every volume that is dirty and whose flushes nobody leads.
    pub fn step(&self, clusters: usize) {
        self.cache.bell().answer_room();
        let due = self.due(|_| true);
        if due.is_empty() && self.nothing_due() == Relief::Stuck {
            return self.cache.bell().answer(true);
        }
        let mut stuck = !due.is_empty();
        for volume in due {
            let led = volume
                .upgrade()
                .filter(|volume| volume.flushes().try_lead());
            if let Some(volume) = led {
                // Latched in the volume, or marked again.
                stuck &= matches!(volume.lead_write_back(clusters), Err(Error::Io { .. }));
                volume.flushes().finish_blocking();
            } else {
                stuck = false;
            }
        }
        self.cache.bell().answer(stuck);
    }

    /// The volumes that have something dirty and are chosen.
    fn due(&self, mut choose: impl FnMut(&mut Watched) -> bool) -> Vec<Weak<Volume>> {
        let now = Instant::now();
        let _working = self.hold();
        let mut volumes = self.lock();
        let mut due = Vec::new();
        for watched in volumes.iter_mut() {
            let Some(volume) = watched.volume.upgrade() else {
                continue;
            };
            if watched.waits(&volume, now) {
                continue;
            }
            if !volume.is_dirty() {
                watched.dirty_since = None;
            } else if choose(watched) {
                due.push(Weak::clone(&watched.volume));
            }
        }
        if self.cache.has_pinned() {
            // Perhaps they can be written by now.
            self.count_pinned(&volumes);
        }
        due
    }

    /// Keeps the thread from holding any volume as long as the guard lives; waits for the batch under way.
    pub fn hold(&self) -> MutexGuard<'_, ()> {
        self.working.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes something about a volume.
    fn with(&self, volume: &Weak<Volume>, note: impl FnOnce(&mut Watched)) {
        let mut volumes = self.lock();
        let found = volumes
            .iter_mut()
            .find(|watched| watched.volume.ptr_eq(volume));
        if let Some(watched) = found {
            note(watched);
        }
    }

    /// The volumes, whatever happened to an earlier holder of the lock.
    fn lock(&self) -> MutexGuard<'_, Vec<Watched>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
