//! The split virtqueue, as the device sees it.
//!
//! The driver writes the descriptor table and the available ring, the device writes the used ring. A worker reads the
//! available index once a batch ([`SplitRing::refresh`]), takes heads ([`SplitRing::take`]), puts used elements
//! ([`SplitRing::put_used`]) and publishes them all at once ([`SplitRing::publish`]), which also says whether the driver
//! wants to be signalled.
//!
//! SPEC: virtio 1.2, 2.7.
//!
//! The ring keeps plain addresses of its three parts. Whoever owns it must keep the memory they were resolved in, and give
//! it a new layout before letting that memory go ([`SplitRing::set_layout`]).
//!
//! INVARIANT: at most `size` entries lie between `next_avail` and `avail_seen`; used elements between `published` and
//! `next_used` are written, and not yet announced.

use std::mem::offset_of;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use virtio_bindings::bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY, vring_avail, vring_used, vring_used_elem,
};
use virtio_queue::desc::split::{Descriptor, VirtqUsedElem};
use vm_memory::GuestAddress;
use vm_memory::volatile_memory::VolatileSlice;

use crate::vhost::dirty_log::DirtyLog;
use crate::vhost::memory::GuestMemory;
use crate::virtio::store::store;
use crate::virtio::tracker::InflightTracker;
#[cfg(test)]
use crate::virtio::tracker::fault;

/// The largest ring.
pub const RING_SIZE_MAX: u16 = 1024;
/// Bytes of a descriptor.
pub const DESCRIPTOR_BYTES: usize = size_of::<Descriptor>();

/// The flags of the available ring.
const AVAIL_FLAGS: usize = offset_of!(vring_avail, flags);
/// Its index.
const AVAIL_INDEX: usize = offset_of!(vring_avail, idx);
/// Its entries, which `used_event` follows.
const AVAIL_ENTRIES: usize = offset_of!(vring_avail, ring);
/// Bytes of an entry, and of the event fields at the end of both rings.
const ENTRY_BYTES: usize = size_of::<u16>();
/// The flags of the used ring.
const USED_FLAGS: usize = offset_of!(vring_used, flags);
/// Its index.
const USED_INDEX: usize = offset_of!(vring_used, idx);
/// Its elements, which `avail_event` follows.
const USED_ELEMENTS: usize = offset_of!(vring_used, ring);
/// Bytes of a used element.
const ELEMENT_BYTES: usize = size_of::<VirtqUsedElem>();
/// The head in a used element.
const ELEMENT_HEAD: usize = offset_of!(vring_used_elem, id);
/// The written bytes in a used element.
const ELEMENT_LEN: usize = offset_of!(vring_used_elem, len);

/// Where `used_event` lies, the last field of an available ring.
const fn used_event(entries: usize) -> usize {
    AVAIL_ENTRIES + ENTRY_BYTES * entries
}

/// Where `avail_event` lies, the last field of a used ring.
const fn avail_event(entries: usize) -> usize {
    USED_ELEMENTS + ELEMENT_BYTES * entries
}

/// The parts of a ring by the front-end's own addresses, as SET_VRING_ADDR gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
}

/// The parts of a ring by addresses in this process.
#[derive(Clone, Copy, Debug)]
pub struct RingLayout {
    /// Entries: a power of two, at most [`RING_SIZE_MAX`].
    size: u16,
    /// `size` descriptors, aligned to 8.
    descriptors: NonNull<u8>,
    /// The available ring, aligned to 2.
    available: NonNull<u8>,
    /// The used ring, aligned to 4.
    used: NonNull<u8>,
}

#[expect(
    unsafe_code,
    reason = "a layout is made on one thread and used on another"
)]
// SAFETY: plain addresses; the owner of the ring answers for the memory behind them on whichever thread it is.
unsafe impl Send for RingLayout {}

impl RingLayout {
    /// Whether a ring may have this many entries.
    pub fn size_is_valid(size: u32) -> bool {
        size.is_power_of_two() && size <= u32::from(RING_SIZE_MAX)
    }

    /// Finds the parts in guest memory. Each part must lie in one region. `None` if one does not, is badly aligned, or
    /// the size is wrong.
    pub fn resolve(memory: &GuestMemory, size: u16, addresses: &RingAddresses) -> Option<Self> {
        if !Self::size_is_valid(u32::from(size)) {
            return None;
        }
        let entries = usize::from(size);
        let part = |address, len, align| {
            let part = memory.ring_part(address, len, align)?;
            NonNull::new(part.ptr_guard_mut().as_ptr())
        };
        Some(Self {
            size,
            descriptors: part(addresses.descriptors, entries * DESCRIPTOR_BYTES, 8)?,
            available: part(addresses.available, used_event(entries) + ENTRY_BYTES, 2)?,
            used: part(addresses.used, avail_event(entries) + ENTRY_BYTES, 4)?,
        })
    }

    /// How many entries the ring has.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The used index as the device published it last.
    ///
    /// ORDERING: Acquire; what was published up to it, by whoever served the ring before, is seen.
    pub fn used_index(&self) -> u16 {
        u16::from_le(self.used_field(USED_INDEX).load(Ordering::Acquire))
    }

    /// Whether a device has ever put anything into the used ring, which the driver zeroes before it gives it to one.
    pub fn was_written(&self) -> bool {
        let elements =
            (0..usize::from(self.size)).map(|entry| USED_ELEMENTS + ELEMENT_BYTES * entry);
        let mut words = elements.flat_map(|at| [at + ELEMENT_HEAD, at + ELEMENT_LEN]);
        self.used_field(USED_INDEX).load(Ordering::Relaxed) != 0
            || words.any(|at| self.used_element(at).load(Ordering::Relaxed) != 0)
    }

    /// The descriptor table.
    #[inline]
    pub fn table(&self) -> VolatileSlice<'_> {
        let bytes = usize::from(self.size) * DESCRIPTOR_BYTES;
        #[expect(unsafe_code, reason = "the table is shared with the guest")]
        // SAFETY: `resolve` checked that `size` descriptors follow, and the owner of the ring keeps their memory.
        unsafe {
            VolatileSlice::new(self.descriptors.as_ptr(), bytes)
        }
    }

    /// The 16-bit field at `offset` of the available ring, which the driver writes.
    fn available_field(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset <= used_event(usize::from(self.size)));
        #[expect(unsafe_code, reason = "pointer arithmetic inside the available ring")]
        // SAFETY: `resolve` checked that all of the ring is mapped, and all callers stay inside.
        let field = unsafe { self.available.add(offset) };
        #[expect(unsafe_code, reason = "the ring is shared with the guest")]
        // SAFETY: the field is aligned to 2 (base and offset are), mapped, and only ever accessed atomically.
        unsafe {
            AtomicU16::from_ptr(field.as_ptr().cast())
        }
    }

    /// The 16-bit field at `offset` of the used ring, which the device writes.
    fn used_field(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset <= avail_event(usize::from(self.size)));
        #[expect(unsafe_code, reason = "pointer arithmetic inside the used ring")]
        // SAFETY: `resolve` checked that all of the ring is mapped, and all callers stay inside.
        let field = unsafe { self.used.add(offset) };
        #[expect(unsafe_code, reason = "the ring is shared with the guest")]
        // SAFETY: the field is aligned to 2 (base and offset are), mapped, and only ever accessed atomically.
        unsafe {
            AtomicU16::from_ptr(field.as_ptr().cast())
        }
    }

    /// The 32-bit half of a used element at `offset` of the used ring.
    fn used_element(&self, offset: usize) -> &AtomicU32 {
        debug_assert!(offset + 4 <= avail_event(usize::from(self.size)));
        #[expect(unsafe_code, reason = "pointer arithmetic inside the used ring")]
        // SAFETY: `resolve` checked that all of the ring is mapped, and all callers stay inside.
        let field = unsafe { self.used.add(offset) };
        #[expect(unsafe_code, reason = "the ring is shared with the guest")]
        // SAFETY: the field is aligned to 4 (base and offset are), mapped, and only ever accessed atomically.
        unsafe {
            AtomicU32::from_ptr(field.as_ptr().cast())
        }
    }
}

/// Why a ring can no longer be served. Only a new set-up helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// The available index ran further than the ring is long.
    #[error("the available index jumped by more than the ring holds")]
    IndexJump,
    /// A head outside the descriptor table: there is nothing to return.
    #[error("an available entry names a descriptor that does not exist")]
    NoSuchHead,
    /// A head that is still under way.
    #[error("an available entry names a chain that is still in flight")]
    HeadInFlight,
    /// The memory that held the ring is gone.
    #[error("the ring lies in memory that is no longer shared")]
    MemoryGone,
    /// The front-end cut the file behind its memory or its dirty log, this ring's part of it or another.
    #[error("the front-end took away memory while it was shared")]
    MemoryLost,
}

/// Where changes of the used ring are to be logged.
#[derive(Clone, Debug)]
pub struct UsedLog {
    /// The log.
    pub log: Arc<DirtyLog>,
    /// The guest address of the used ring.
    pub address: GuestAddress,
}

/// One split virtqueue.
#[derive(Debug)]
pub struct SplitRing {
    /// Where the parts lie.
    layout: RingLayout,
    /// Whether notifications are suppressed by index (`VIRTIO_RING_F_EVENT_IDX`).
    event_idx: bool,
    /// The next available entry to take.
    next_avail: u16,
    /// The available index as last read.
    avail_seen: u16,
    /// Where the next used element goes.
    next_used: u16,
    /// The used index as last published.
    published: u16,
    /// Whether a publish came before, so that the driver's `used_event` can be judged.
    published_before: bool,
    /// Whether the driver was last told not to kick (without EVENT_IDX).
    kicks_suppressed: bool,
    /// Where to log the used ring.
    log: Option<UsedLog>,
    /// Writes down which requests are under way, for whoever serves the ring next.
    tracker: Option<InflightTracker>,
    /// Whether the memory of the ring is gone, so that it may not be touched any more.
    lost: bool,
}

impl SplitRing {
    /// A ring that goes on at available entry `base`. The used index is taken from memory.
    pub fn new(layout: RingLayout, base: u16, event_idx: bool, log: Option<UsedLog>) -> Self {
        let used = layout.used_index();
        Self {
            layout,
            event_idx,
            next_avail: base,
            avail_seen: base,
            next_used: used,
            published: used,
            published_before: false,
            kicks_suppressed: false,
            log,
            tracker: None,
            lost: false,
        }
    }

    /// The ring, with its requests tracked from now on.
    pub fn tracked_by(self, tracker: Option<InflightTracker>) -> Self {
        Self { tracker, ..self }
    }

    /// Whether the front-end has taken away what the requests are tracked in.
    pub fn has_lost_tracker(&self) -> bool {
        self.tracker.as_ref().is_some_and(InflightTracker::is_lost)
    }

    /// The entry that will be taken next: what GET_VRING_BASE answers.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// How many entries the ring has.
    pub fn size(&self) -> u16 {
        self.layout.size
    }

    /// The descriptor table.
    #[inline]
    pub fn table(&self) -> VolatileSlice<'_> {
        self.layout.table()
    }

    /// Moves the ring to where its memory is mapped now. It must be as large as before.
    pub fn set_layout(&mut self, layout: RingLayout) {
        debug_assert_eq!(layout.size, self.layout.size);
        self.layout = layout;
    }

    /// The memory of the ring goes away: nothing of it is read or written from now on.
    pub fn lose_memory(&mut self) {
        self.lost = true;
    }

    /// Logs the used ring from now on, or no longer.
    pub fn set_log(&mut self, log: Option<UsedLog>) {
        self.log = log;
    }

    /// Reads the available index. Returns how many entries can be taken.
    ///
    /// ORDERING: Acquire; pairs with the driver's barrier between writing entries (and their descriptors) and writing the
    /// index, so that whatever is taken up to this index is seen whole.
    ///
    /// # Errors
    /// `IndexJump`, `MemoryGone`.
    #[inline]
    pub fn refresh(&mut self) -> Result<u16, Broken> {
        if self.lost {
            return Err(Broken::MemoryGone);
        }
        let seen = u16::from_le(
            self.layout
                .available_field(AVAIL_INDEX)
                .load(Ordering::Acquire),
        );
        let waiting = seen.wrapping_sub(self.next_avail);
        if waiting > self.layout.size {
            return Err(Broken::IndexJump);
        }
        self.avail_seen = seen;
        Ok(waiting)
    }

    /// Takes the next entry that the last [`Self::refresh`] has seen.
    ///
    /// # Errors
    /// `NoSuchHead`, `MemoryGone`; the entry is not taken.
    #[inline]
    pub fn take(&mut self) -> Result<Option<u16>, Broken> {
        if self.lost {
            return Err(Broken::MemoryGone);
        }
        if self.next_avail == self.avail_seen {
            return Ok(None);
        }
        let entry = usize::from(self.next_avail & (self.layout.size - 1));
        let head = self
            .layout
            .available_field(AVAIL_ENTRIES + ENTRY_BYTES * entry);
        let head = u16::from_le(head.load(Ordering::Relaxed));
        if head >= self.layout.size {
            return Err(Broken::NoSuchHead);
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(head))
    }

    /// Puts the entry taken last back, because it cannot be served.
    pub fn untake(&mut self) {
        self.next_avail = self.next_avail.wrapping_sub(1);
    }

    /// The request at this head, which was taken, is about to be carried out.
    #[inline]
    pub fn track(&mut self, head: u16) {
        if let Some(tracker) = &mut self.tracker {
            tracker.taken(head);
        }
    }

    /// Writes a used element. The driver sees it at the next [`Self::publish`]. Does nothing once the memory is gone.
    #[inline]
    pub fn put_used(&mut self, head: u16, len: u32) {
        if self.lost {
            return;
        }
        let entry = usize::from(self.next_used & (self.layout.size - 1));
        let offset = USED_ELEMENTS + ELEMENT_BYTES * entry;
        let id = self.layout.used_element(offset + ELEMENT_HEAD);
        store(id, u32::from(head).to_le(), Ordering::Relaxed);
        let written = self.layout.used_element(offset + ELEMENT_LEN);
        store(written, len.to_le(), Ordering::Relaxed);
        self.mark(offset, ELEMENT_BYTES);
        self.next_used = self.next_used.wrapping_add(1);
        if let Some(tracker) = &mut self.tracker {
            tracker.returned(head);
        }
    }

    /// Whether used elements wait to be published.
    #[inline]
    pub fn has_unpublished(&self) -> bool {
        self.next_used != self.published && !self.lost
    }

    /// Makes the used elements visible. Returns whether the driver wants to be signalled.
    ///
    /// ORDERING: the index is stored with Release, so that the driver that sees it sees the elements, and all guest
    /// memory written before. The fence stands between that store and the load of `used_event` or the flags; the driver has
    /// one between storing those and loading the index. Without both, each side could miss the other's store and the
    /// driver would sleep on a finished request.
    pub fn publish(&mut self) -> bool {
        if self.lost {
            return false;
        }
        let old = self.published;
        let new = self.next_used;
        self.mark(USED_INDEX, ENTRY_BYTES);
        #[cfg(test)]
        if let Some(tracker) = &mut self.tracker
            && fault::is_planted(fault::Fault::ClearedFirst)
        {
            tracker.published(new);
        }
        let index = self.layout.used_field(USED_INDEX);
        store(index, new.to_le(), Ordering::Release);
        if let Some(tracker) = &mut self.tracker {
            tracker.published(new);
        }
        // Again: the first mark may have been collected before the store.
        self.mark(USED_INDEX, ENTRY_BYTES);
        self.published = new;
        fence(Ordering::SeqCst);
        let first = !std::mem::replace(&mut self.published_before, true);
        if self.event_idx {
            let place = used_event(usize::from(self.layout.size));
            let event = u16::from_le(self.layout.available_field(place).load(Ordering::Relaxed));
            first || passed(event, new, old)
        } else {
            let flags = u16::from_le(
                self.layout
                    .available_field(AVAIL_FLAGS)
                    .load(Ordering::Relaxed),
            );
            u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Tells the driver that it need not kick, because the ring is being looked at. With EVENT_IDX nothing has to be
    /// said: the index that was asked for has passed.
    pub fn suppress_kicks(&mut self) {
        if !self.event_idx && !self.kicks_suppressed && !self.lost {
            self.kicks_suppressed = true;
            self.store_used_flags(VRING_USED_F_NO_NOTIFY);
        }
    }

    /// Asks the driver to kick for the next entry. Returns whether there is one already, in which case no kick may come.
    ///
    /// ORDERING: the fence stands between asking and looking; the driver has one between writing its index and reading
    /// what was asked. Without both, an entry could appear unseen and unannounced.
    ///
    /// # Errors
    /// `IndexJump`, `MemoryGone`.
    pub fn request_kick(&mut self) -> Result<bool, Broken> {
        if self.lost {
            return Err(Broken::MemoryGone);
        }
        if self.event_idx {
            let place = avail_event(usize::from(self.layout.size));
            self.layout
                .used_field(place)
                .store(self.next_avail.to_le(), Ordering::Relaxed);
            self.mark(place, ENTRY_BYTES);
        } else if self.kicks_suppressed {
            self.kicks_suppressed = false;
            self.store_used_flags(0);
        }
        fence(Ordering::SeqCst);
        Ok(self.refresh()? > 0)
    }

    /// Stores the flags of the used ring.
    fn store_used_flags(&self, flags: u32) {
        let flags = u16::try_from(flags).unwrap_or(0);
        self.layout
            .used_field(USED_FLAGS)
            .store(flags.to_le(), Ordering::Relaxed);
        self.mark(USED_FLAGS, ENTRY_BYTES);
    }

    /// Logs a change of the used ring.
    #[inline]
    fn mark(&self, offset: usize, len: usize) {
        if let Some(used) = &self.log {
            let place = GuestAddress(used.address.0.saturating_add(offset as u64));
            used.log.mark(place, len as u64);
        }
    }
}

/// Whether an index that moved from `old` to `new` went past `event`, all of them counting modulo 2^16.
fn passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]
    use super::super::test_guest::TestGuest;
    use super::*;

    #[test]
    fn an_event_is_passed_exactly_when_it_lies_in_between() {
        for old in [0u16, 1, 5, 0x7fff, 0x8000, 0xfff0, 0xffff] {
            for step in 0..40u16 {
                let new = old.wrapping_add(step);
                for offset in 0..64u16 {
                    let event = old.wrapping_sub(8).wrapping_add(offset);
                    let between = (0..step).any(|k| old.wrapping_add(k) == event);
                    assert_eq!(passed(event, new, old), between, "{event} {new} {old}");
                }
            }
        }
    }

    #[test]
    fn heads_come_in_order_and_only_up_to_what_was_seen() {
        let guest = TestGuest::new(8);
        let mut ring = SplitRing::new(guest.layout(), 0, false, None);
        assert_eq!(ring.refresh(), Ok(0));
        guest.offer(3);
        guest.offer(5);
        assert_eq!(ring.take(), Ok(None), "not refreshed");
        assert_eq!(ring.refresh(), Ok(2));
        guest.offer(7);
        assert_eq!(ring.take(), Ok(Some(3)));
        assert_eq!(ring.take(), Ok(Some(5)));
        assert_eq!(ring.take(), Ok(None));
        assert_eq!(ring.next_avail(), 2);
    }

    #[test]
    fn indices_wrap_around() {
        let guest = TestGuest::new(4);
        guest.set_indices(0xfffe);
        let mut ring = SplitRing::new(guest.layout(), 0xfffe, true, None);
        for round in 0..10u16 {
            guest.offer(round % 4);
            assert_eq!(ring.refresh(), Ok(1));
            assert_eq!(ring.take(), Ok(Some(round % 4)));
            guest.set_used_event(0xfffeu16.wrapping_add(round));
            ring.put_used(round % 4, u32::from(round));
            assert!(ring.publish(), "round {round}");
            assert_eq!(
                guest.next_used(),
                Some((u32::from(round % 4), u32::from(round)))
            );
        }
        assert_eq!(ring.next_avail(), 8);
    }

    #[test]
    fn a_batch_that_crosses_the_event_signals_once() {
        let guest = TestGuest::new(16);
        guest.set_indices(0xfffa);
        let mut ring = SplitRing::new(guest.layout(), 0xfffa, true, None);
        guest.set_used_event(0xfffa);
        ring.put_used(0, 0);
        assert!(ring.publish());
        guest.set_used_event(3);
        for _ in 0..8 {
            ring.put_used(0, 0);
        }
        assert!(!ring.publish(), "index 3 is 0xfffb + 8");
        ring.put_used(0, 0);
        assert!(ring.publish());
        ring.put_used(0, 0);
        assert!(!ring.publish());
    }

    #[test]
    fn without_event_idx_the_flag_decides() {
        let guest = TestGuest::new(4);
        let mut ring = SplitRing::new(guest.layout(), 0, false, None);
        guest.set_used_event(1000);
        ring.put_used(0, 0);
        assert!(ring.publish());
        guest.set_avail_flags(1);
        ring.put_used(0, 0);
        assert!(!ring.publish());
        guest.set_avail_flags(0);
        ring.put_used(0, 0);
        assert!(ring.publish());
    }

    #[test]
    fn kicks_are_suppressed_and_asked_for_again() {
        let guest = TestGuest::new(4);
        let mut ring = SplitRing::new(guest.layout(), 0, false, None);
        ring.suppress_kicks();
        assert_eq!(guest.used_flags(), 1);
        assert_eq!(ring.request_kick(), Ok(false));
        assert_eq!(guest.used_flags(), 0);
        guest.offer(0);
        assert_eq!(ring.request_kick(), Ok(true));

        let mut ring = SplitRing::new(guest.layout(), 0, true, None);
        ring.suppress_kicks();
        assert_eq!(guest.used_flags(), 0, "meaningless with EVENT_IDX");
        assert_eq!(ring.request_kick(), Ok(true));
        ring.refresh().unwrap();
        ring.take().unwrap();
        assert_eq!(ring.request_kick(), Ok(false));
        assert_eq!(guest.avail_event(), 1);
    }

    #[test]
    fn a_jump_and_a_wrong_head_are_noticed() {
        let guest = TestGuest::new(4);
        let mut ring = SplitRing::new(guest.layout(), 0, false, None);
        guest.set_avail_index(4);
        assert_eq!(ring.refresh(), Ok(4));
        guest.set_avail_index(5);
        assert_eq!(ring.refresh(), Err(Broken::IndexJump));
        guest.set_avail_index(0xffff);
        assert_eq!(ring.request_kick(), Err(Broken::IndexJump));
        guest.set_avail_index(0);
        guest.offer(4);
        assert_eq!(ring.refresh(), Ok(1));
        assert_eq!(ring.take(), Err(Broken::NoSuchHead));
        assert_eq!(ring.next_avail(), 0);
    }

    #[test]
    fn the_used_ring_is_logged_at_the_given_address() {
        let guest = TestGuest::new(4);
        let (log, bits) = guest.dirty_log();
        let used = UsedLog {
            log,
            address: GuestAddress(0x5ffc),
        };
        let mut ring = SplitRing::new(guest.layout(), 0, false, Some(used));
        ring.put_used(0, 0);
        assert_eq!(bits(), vec![6], "the first element lies in page 6");
        ring.publish();
        assert_eq!(bits(), vec![5, 6], "the index lies in page 5");
    }

    #[test]
    fn sizes_and_places_are_checked() {
        let guest = TestGuest::new(4);
        for size in [0u32, 3, 2048, 65535, u32::MAX] {
            assert!(!RingLayout::size_is_valid(size), "{size}");
        }
        assert!(RingLayout::size_is_valid(1));
        assert!(RingLayout::size_is_valid(1024));
        let good = guest.addresses();
        assert!(RingLayout::resolve(guest.memory(), 4, &good).is_some());
        let past = RingAddresses {
            used: guest.user_end() - 6,
            ..good
        };
        assert!(RingLayout::resolve(guest.memory(), 4, &past).is_none());
        let odd = RingAddresses {
            available: good.available + 1,
            ..good
        };
        assert!(RingLayout::resolve(guest.memory(), 4, &odd).is_none());
    }
}
