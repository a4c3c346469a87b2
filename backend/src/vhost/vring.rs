//! A ring as its front-end has set it up.
//!
//! The record is a vring of `vhost-user-backend`: size, addresses in guest memory, next entry, EVENT_IDX, whether the ring
//! is enabled, and whether it is in use ("ready"). Its checks are made in addition to ours. What a worker needs is
//! derived from it when the ring is attached ([`Vring::setup`]); the worker then has the ring to itself, and the next
//! entry comes back when it lets go.
//!
//! Beside the record stand the front-end's own addresses, from which those in guest memory are found again whenever memory
//! changes, and the event fds: the record cannot tell a ring without a kick from one whose kick is still to come, gives the
//! error event to nobody, and would wait on event fds that block.

use std::sync::Arc;

use vhost_user_backend::{VringMutex, VringT};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryAtomic};

use super::event::{Event, Kick};
use super::features;
use super::memory::GuestMemory;
use crate::virtio::ring::{RING_SIZE_MAX, RingAddresses, RingLayout, UsedLog};
use crate::virtio::tracker::Resumed;
use crate::worker::command::QueueSetup;

/// The guest memory of a session, which all its rings see change.
pub type SessionMemory = GuestMemoryAtomic<GuestMemory>;

const _: () = assert!(RING_SIZE_MAX.is_power_of_two());

/// What the front-end has said of a ring.
pub struct Vring {
    /// What fits the record of the crate.
    record: VringMutex<SessionMemory>,
    /// Whether the front-end has said a size. The record begins with the largest.
    sized: bool,
    /// Where its parts lie, by addresses of the front-end's own.
    pub addresses: Option<RingAddresses>,
    /// The guest address at which changes of the used ring are logged.
    pub log_address: Option<GuestAddress>,
    /// How the guest says that there is work.
    pub kick: Option<Arc<Kick>>,
    /// How to tell the guest that work is done.
    pub call: Option<Arc<Event>>,
    /// How to tell the front-end that the ring broke.
    pub err: Option<Arc<Event>>,
    /// Whether a worker has it.
    pub attached: bool,
}

impl Vring {
    /// A ring of which nothing was said yet.
    pub fn new(memory: &SessionMemory) -> Self {
        let record = VringMutex::new(memory.clone(), RING_SIZE_MAX);
        Self {
            record: record.expect("the largest size is a power of two"),
            sized: false,
            addresses: None,
            log_address: None,
            kick: None,
            call: None,
            err: None,
            attached: false,
        }
    }

    /// Forgets what was said, except how to tell the guest and the front-end.
    pub fn reset(&mut self, memory: &SessionMemory) {
        *self = Self {
            call: self.call.take(),
            err: self.err.take(),
            ..Self::new(memory)
        };
    }

    /// Its entries, once the front-end has said how many.
    pub fn size(&self) -> Option<u16> {
        let size = self.record.get_ref().get_queue().size();
        self.sized.then_some(size)
    }

    /// Takes a size.
    ///
    /// # Errors
    /// It is no power of two, or too large.
    pub fn set_size(&mut self, size: u16) -> Result<(), virtio_queue::Error> {
        self.record.get_mut().get_queue_mut().try_set_size(size)?;
        self.sized = true;
        Ok(())
    }

    /// The next available entry, as of the last time that no worker had the ring.
    pub fn base(&self) -> u16 {
        self.record.queue_next_avail()
    }

    /// Goes on at another available entry.
    pub fn set_base(&mut self, base: u16) {
        self.record.set_queue_next_avail(base);
    }

    /// Whether the front-end enabled it.
    pub fn is_enabled(&self) -> bool {
        self.record.get_ref().is_enabled()
    }

    /// Takes whether it is enabled.
    pub fn set_enabled(&mut self, enabled: bool) {
        self.record.set_enabled(enabled);
    }

    /// Whether it was attached since it was last stopped. Its set-up is frozen then.
    pub fn is_started(&self) -> bool {
        self.record.get_ref().get_queue().ready()
    }

    /// Notes that it was attached or stopped.
    pub fn set_started(&mut self, started: bool) {
        self.record.set_queue_ready(started);
    }

    /// Finds the ring in this memory, and notes its guest addresses. `None` if not everything is known of it, or
    /// if it does not lie in the memory as it must, to us or to the guest.
    pub fn locate(&self, memory: &GuestMemory) -> Option<RingLayout> {
        let addresses = self.addresses.as_ref()?;
        let layout = RingLayout::resolve(memory, self.size()?, addresses)?;
        let guest = |user| memory.guest_address(user).map(|address| address.0);
        let descriptors = guest(addresses.descriptors)?;
        let available = guest(addresses.available)?;
        let used = guest(addresses.used)?;
        let mut record = self.record.get_mut();
        record.set_queue_info(descriptors, available, used).ok()?;
        // The check is one of rings in use, and this is asked before as well.
        let queue = record.get_queue_mut();
        let started = queue.ready();
        queue.set_ready(true);
        let valid = queue.is_valid(memory);
        queue.set_ready(started);
        valid.then_some(layout)
    }

    /// What a worker needs to know of the ring, which lies there and has that kick. `acked`: the virtio features that the
    /// front-end took. `resumed`: how it goes on with its inflight region.
    pub fn setup(
        &self,
        index: u16,
        layout: RingLayout,
        kick: Arc<Kick>,
        acked: u64,
        log: Option<UsedLog>,
        resumed: Option<Resumed>,
    ) -> QueueSetup {
        let event_idx = acked & features::EVENT_IDX != 0;
        self.record.set_queue_event_idx(event_idx);
        let record = self.record.get_ref();
        let queue = record.get_queue();
        QueueSetup {
            index,
            layout,
            base: resumed
                .as_ref()
                .map_or(queue.next_avail(), |resumed| resumed.next_avail),
            event_idx: queue.event_idx_enabled(),
            indirect: acked & features::INDIRECT != 0,
            log,
            kick,
            call: self.call.clone(),
            err: self.err.clone(),
            // A ring that somebody served before may hold entries whose kick was taken then.
            look: queue.next_avail() != 0
                || queue.ready()
                || resumed.as_ref().is_some_and(|resumed| resumed.goes_on),
            resumed,
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]
    use super::*;
    use crate::virtio::test_guest::TestGuest;

    /// A ring of 4 entries of that guest.
    fn ring(guest: &TestGuest) -> Vring {
        let mut ring = Vring::new(&SessionMemory::new(GuestMemory::default()));
        ring.set_size(4).unwrap();
        ring.addresses = Some(guest.addresses());
        ring
    }

    #[test]
    fn nothing_is_known_of_a_new_ring() {
        let guest = TestGuest::new(4);
        let mut ring = Vring::new(&SessionMemory::new(GuestMemory::default()));
        assert_eq!((ring.size(), ring.base()), (None, 0));
        assert!(!ring.is_enabled() && !ring.is_started());
        ring.addresses = Some(guest.addresses());
        assert!(ring.locate(guest.memory()).is_none(), "no size");
        for size in [0, 3, 2048] {
            ring.set_size(size).unwrap_err();
        }
        assert_eq!(ring.size(), None);
        ring.set_size(4).unwrap();
        assert!(ring.locate(guest.memory()).is_some());
        assert!(!ring.is_started(), "a question starts nothing");
    }

    #[test]
    fn a_ring_must_lie_right_for_the_guest_too() {
        let guest = TestGuest::new(4);
        let mut ring = ring(&guest);
        let good = guest.addresses();
        for (descriptors, lies) in [(0, true), (16, true), (8, false)] {
            let descriptors = good.descriptors + descriptors;
            ring.addresses = Some(RingAddresses {
                descriptors,
                ..good
            });
            let found = ring.locate(guest.memory()).is_some();
            assert_eq!(found, lies, "{descriptors:#x}");
        }
        ring.addresses = Some(good);
        assert!(ring.locate(&GuestMemory::default()).is_none());
    }

    #[test]
    fn a_reset_keeps_no_more_than_call_and_err() {
        let guest = TestGuest::new(4);
        let mut ring = ring(&guest);
        ring.kick = Some(Arc::new(Kick::Poll));
        ring.set_base(7);
        ring.set_enabled(true);
        ring.set_started(true);
        ring.reset(&SessionMemory::new(GuestMemory::default()));
        assert_eq!((ring.size(), ring.base()), (None, 0));
        assert!(!ring.is_enabled() && !ring.is_started());
        assert!(ring.addresses.is_none() && ring.kick.is_none());
    }

    #[test]
    fn a_set_up_is_what_the_record_says() {
        let guest = TestGuest::new(4);
        let mut ring = ring(&guest);
        let layout = ring.locate(guest.memory()).unwrap();
        let kick = || Arc::new(Kick::Poll);
        let setup = ring.setup(1, layout, kick(), features::EVENT_IDX, None, None);
        assert_eq!((setup.index, setup.base, setup.layout.size()), (1, 0, 4));
        assert!(setup.event_idx && !setup.indirect && !setup.look);
        ring.set_started(true);
        let setup = ring.setup(1, layout, kick(), features::INDIRECT, None, None);
        assert!(!setup.event_idx && setup.indirect && setup.look);
        ring.set_started(false);
        ring.set_base(9);
        let setup = ring.setup(1, layout, kick(), features::INDIRECT, None, None);
        assert!(setup.look && setup.base == 9);
    }
}
