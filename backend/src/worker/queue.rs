//! One ring as its worker has it: the ring, what is under way on it, and its event fds.

use std::sync::Arc;
use std::sync::mpsc;

use crate::vhost::event::{Event, Kick};
use crate::virtio::complete::InFlight;
use crate::virtio::ring::{Broken, SplitRing};

use super::command::QueueSetup;

/// Where a ring is in its life.
#[derive(Debug)]
pub enum Phase {
    /// Nothing is taken, since it is not certain yet that it is ours.
    Held,
    /// Waiting for the first kick.
    Armed,
    /// Served.
    Started,
    /// Nothing more is taken, because of the driver; what is under way completes.
    Broken,
    /// Nothing more is taken; when all is completed, the next available entry goes there.
    Draining(mpsc::Sender<Option<u16>>),
}

/// One ring.
#[derive(Debug)]
pub struct Queue {
    /// Which of the device's rings it is.
    pub index: u16,
    /// The ring.
    pub ring: SplitRing,
    /// What is under way.
    pub in_flight: InFlight,
    /// Where it is in its life.
    pub phase: Phase,
    /// Whether indirect descriptors were negotiated.
    pub indirect: bool,
    /// How the guest says that there is work.
    pub kick: Arc<Kick>,
    /// How to tell the guest that work is done.
    pub call: Option<Arc<Event>>,
    /// How to tell the front-end that the ring broke.
    pub err: Option<Arc<Event>>,
    /// Heads that were under way when the process before was killed, to be carried out before anything new.
    replay: std::vec::IntoIter<u16>,
    /// Whether the guest wanted a signal while there was no call to signal.
    signal_owed: bool,
}

impl Queue {
    /// A ring as a command describes it; nothing is taken from it yet if it is `held`.
    pub fn new(setup: QueueSetup, held: bool) -> Self {
        let size = setup.layout.size();
        let polled = matches!(*setup.kick, Kick::Poll);
        let ring = SplitRing::new(setup.layout, setup.base, setup.event_idx, setup.log);
        let (tracker, replay, goes_on) = match setup.resumed {
            Some(resumed) => (Some(resumed.tracker), resumed.replay, resumed.goes_on),
            None => (None, Vec::new(), false),
        };
        if !replay.is_empty() {
            let (ring, count) = (setup.index, replay.len());
            tracing::info!(ring, count, "carries out again what was under way");
        }
        let mut queue = Self {
            index: setup.index,
            ring: ring.tracked_by(tracker),
            in_flight: InFlight::new(size),
            phase: match (held, setup.look || polled) {
                (true, _) => Phase::Held,
                (false, true) => Phase::Started,
                (false, false) => Phase::Armed,
            },
            indirect: setup.indirect,
            kick: setup.kick,
            call: setup.call,
            err: setup.err,
            replay: replay.into_iter(),
            signal_owed: false,
        };
        if goes_on {
            // Whoever published what is in the used ring may have been killed before it said so.
            queue.signal();
        }
        queue
    }

    /// Whether requests are taken from it.
    pub fn is_served(&self) -> bool {
        matches!(self.phase, Phase::Started)
    }

    /// Whether requests are to be carried out again, which is done even if nothing more is to be taken.
    pub fn is_replaying(&self) -> bool {
        !matches!(self.phase, Phase::Held) && !self.replay.as_slice().is_empty()
    }

    /// Carries out nothing again: what is left of it stays under way in the inflight region, for another session.
    pub fn stop_replaying(&mut self) {
        self.replay = Vec::new().into_iter();
    }

    /// The head of the next request to carry out.
    ///
    /// # Errors
    /// As [`SplitRing::take`].
    pub fn next_head(&mut self) -> Result<Option<u16>, Broken> {
        if matches!(self.phase, Phase::Held) {
            return Ok(None);
        }
        let again = self.replay.next();
        if again.is_some() {
            return Ok(again);
        }
        if !self.is_served() {
            return Ok(None);
        }
        let Some(head) = self.ring.take()? else {
            return Ok(None);
        };
        if self.in_flight.holds(head) {
            self.ring.untake();
            return Err(Broken::HeadInFlight);
        }
        self.ring.track(head);
        Ok(Some(head))
    }

    /// Whether it must be looked at without being kicked.
    pub fn is_polled(&self) -> bool {
        self.is_served() && matches!(*self.kick, Kick::Poll)
    }

    /// The guest kicked.
    pub fn kicked(&mut self) {
        if matches!(self.phase, Phase::Armed) {
            self.phase = Phase::Started;
        }
    }

    /// Somebody waits for the end of all that is under way now. Memory that does not answer is met by that too, since whoever
    /// ends a ring does the same.
    pub fn await_all(&mut self) {
        self.in_flight.await_all();
        if !matches!(self.phase, Phase::Held) {
            // A ring that is broken says so when it is looked at next.
            let _ = self.ring.request_kick();
        }
    }

    /// It is certain that a ring is ours that was held. Kicks have come meanwhile, or before it came here.
    pub fn release(&mut self) {
        if matches!(self.phase, Phase::Held) {
            self.phase = Phase::Started;
        }
    }

    /// The driver broke the ring. Requests under way complete, nothing more is taken.
    pub fn break_off(&mut self, why: Broken) {
        tracing::warn!(ring = self.index, %why, "the guest broke a ring; it is no longer served");
        if !matches!(self.phase, Phase::Draining(_)) {
            self.phase = Phase::Broken;
        }
        self.stop_replaying();
        if let Some(err) = &self.err {
            err.signal();
        }
    }

    /// Makes used elements visible and tells the guest if it wants to know. Returns whether it was told.
    pub fn publish(&mut self) -> bool {
        if !self.ring.has_unpublished() || !self.ring.publish() {
            return false;
        }
        self.signal()
    }

    /// Tells the guest that work is done, now or when there is a way to.
    fn signal(&mut self) -> bool {
        match &self.call {
            Some(call) => {
                call.signal();
                true
            }
            None => {
                self.signal_owed = true;
                false
            }
        }
    }

    /// Signals another call from now on.
    pub fn set_call(&mut self, call: Option<Arc<Event>>) {
        self.call = call;
        if self.call.is_some() && std::mem::take(&mut self.signal_owed) {
            self.signal();
        }
    }
}
