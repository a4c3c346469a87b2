//! The driver's side of a split ring, with nothing kept from writing nonsense into it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use crate::memory::{Buffer, GuestMemory, PAGE};
use crate::wait::{PATIENCE, event, readable, signal, take_signals};

/// The chain goes on at `next`.
pub const F_NEXT: u16 = 1;
/// The device may write the buffer.
pub const F_WRITE: u16 = 2;
/// The buffer holds a table of descriptors.
pub const F_INDIRECT: u16 = 4;
/// In the available ring: the driver wants no notification.
pub const NO_INTERRUPT: u16 = 1;
/// In the used ring: the device wants no notification.
pub const NO_NOTIFY: u16 = 1;
/// Bytes of a descriptor.
pub const DESCRIPTOR_BYTES: u64 = 16;

/// A descriptor as it stands in the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest physical address of the buffer.
    pub addr: u64,
    /// Its length.
    pub len: u32,
    /// `F_NEXT`, `F_WRITE`, `F_INDIRECT`.
    pub flags: u16,
    /// Where the chain goes on.
    pub next: u16,
}

impl Descriptor {
    /// The last descriptor of a chain.
    pub fn of(buffer: Buffer) -> Self {
        let flags = if buffer.writable { F_WRITE } else { 0 };
        Self {
            addr: buffer.gpa,
            len: buffer.len,
            flags,
            next: 0,
        }
    }

    /// A descriptor in the midst of a chain.
    pub fn then(self, next: u16) -> Self {
        Self {
            flags: self.flags | F_NEXT,
            next,
            ..self
        }
    }

    /// A descriptor of a table of descriptors.
    pub fn table(addr: u64, bytes: u32) -> Self {
        Self {
            addr,
            len: bytes,
            flags: F_INDIRECT,
            next: 0,
        }
    }

    /// Its bytes.
    pub fn encode(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// Writes the descriptors of these buffers as one chain in a table of its own and returns the descriptor of that table.
pub fn indirect(memory: &GuestMemory, buffers: &[Buffer]) -> Descriptor {
    let mut bytes = Vec::new();
    for (index, &buffer) in buffers.iter().enumerate() {
        let next = u16::try_from(index + 1).expect("a short table");
        let last = index + 1 == buffers.len();
        let descriptor = Descriptor::of(buffer);
        bytes.extend(
            if last {
                descriptor
            } else {
                descriptor.then(next)
            }
            .encode(),
        );
    }
    let table = memory.readable(&bytes);
    Descriptor::table(table.gpa, table.len)
}

/// A request that the device gave back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The head of its chain.
    pub head: u32,
    /// Bytes that the device says it wrote.
    pub len: u32,
}

/// Where the parts of a ring lie for the guest.
#[derive(Clone, Copy, Debug)]
pub struct RingAddresses {
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
}

/// A ring.
#[derive(Debug)]
pub struct Ring {
    /// The memory that it lies in.
    memory: Arc<GuestMemory>,
    /// Its number.
    pub index: u32,
    /// Descriptors that it holds.
    pub size: u16,
    /// Where it lies.
    pub addresses: RingAddresses,
    /// Tells the device that there are requests.
    kick: OwnedFd,
    /// Told by the device that there are used entries.
    call: OwnedFd,
    /// Told by the device that the ring is broken.
    error: OwnedFd,
    /// Whether `EVENT_IDX` is negotiated.
    event_idx: bool,
    /// The next index of the available ring, free running.
    available: u16,
    /// Used entries taken so far, free running.
    used: u16,
    /// The next slot of the descriptor table that a chain takes.
    slot: u16,
}

impl Ring {
    /// Lays a ring out in fresh memory. `base` is the index that both sides begin at.
    pub fn new(
        memory: &Arc<GuestMemory>,
        index: u32,
        size: u16,
        event_idx: bool,
        base: u16,
    ) -> Self {
        // Each part has pages of its own, so that the marks of a dirty log tell them apart.
        let count = u64::from(size);
        let pages = |bytes: u64| memory.allocate(bytes.next_multiple_of(PAGE), PAGE);
        let addresses = RingAddresses {
            descriptors: pages(DESCRIPTOR_BYTES * count),
            available: pages(6 + 2 * count),
            used: pages(6 + 8 * count),
        };
        let ring = Self {
            memory: Arc::clone(memory),
            index,
            size,
            addresses,
            kick: event(),
            call: event(),
            error: event(),
            event_idx,
            available: base,
            used: base,
            slot: 0,
        };
        ring.store(addresses.available + 2, base);
        ring.store(addresses.used + 2, base);
        ring.arm();
        ring
    }

    /// The event by which the device is told of requests.
    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// The event by which the device tells of used entries.
    pub fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// The event by which the device tells that the ring is broken.
    pub fn error_fd(&self) -> BorrowedFd<'_> {
        self.error.as_fd()
    }

    /// Takes fresh events; the device must be told of them.
    pub fn replace_events(&mut self) {
        (self.kick, self.call, self.error) = (event(), event(), event());
    }

    /// Takes a fresh event for used entries; the device must be told of it.
    pub fn replace_call(&mut self) -> OwnedFd {
        std::mem::replace(&mut self.call, event())
    }

    /// Writes one descriptor of the table.
    pub fn write_descriptor(&self, slot: u16, descriptor: Descriptor) {
        let at = self.addresses.descriptors + DESCRIPTOR_BYTES * u64::from(slot % self.size);
        self.memory.write(at, &descriptor.encode());
    }

    /// Takes fresh slots for these descriptors, links them in order and returns the head. Flags and addresses stay as given.
    pub fn link(&mut self, descriptors: &[Descriptor]) -> u16 {
        let head = self.slot % self.size;
        for (index, descriptor) in descriptors.iter().enumerate() {
            let slot = self.slot % self.size;
            self.slot = (slot + 1) % self.size;
            let last = index + 1 == descriptors.len();
            let descriptor = if last {
                *descriptor
            } else {
                descriptor.then(self.slot)
            };
            self.write_descriptor(slot, descriptor);
        }
        head
    }

    /// Writes a chain of these buffers and returns its head.
    pub fn chain(&mut self, buffers: &[Buffer]) -> u16 {
        let descriptors: Vec<_> = buffers.iter().copied().map(Descriptor::of).collect();
        self.link(&descriptors)
    }

    /// Puts a head into the available ring without showing it yet.
    pub fn stage(&mut self, head: u16) {
        let at = self.addresses.available + 4 + 2 * u64::from(self.available % self.size);
        self.store(at, head);
        self.available = self.available.wrapping_add(1);
    }

    /// Shows all staged heads to the device.
    pub fn expose(&self) {
        // ORDERING: Release, so that a device which sees the index sees the entries and descriptors before it.
        self.memory.store(
            self.addresses.available + 2,
            self.available.to_le(),
            Ordering::Release,
        );
    }

    /// Writes any index into the available ring, whatever was staged.
    pub fn set_available_index(&mut self, index: u16) {
        self.available = index;
        self.expose();
    }

    /// The next index of the available ring.
    pub fn available_index(&self) -> u16 {
        self.available
    }

    /// Stages and shows one head.
    pub fn publish(&mut self, head: u16) {
        self.stage(head);
        self.expose();
    }

    /// Tells the device, wanted or not.
    pub fn kick(&self) {
        signal(&self.kick);
    }

    /// Tells the device if it wants to be told of what was shown since `from`. Whether it did.
    pub fn kick_if_wanted(&self, from: u16) -> bool {
        // ORDERING: the index must be visible before we look whether the device sleeps; it does the reverse.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            needs_event(self.avail_event(), self.available, from)
        } else {
            self.load(self.addresses.used) & NO_NOTIFY == 0
        };
        if wanted {
            self.kick();
        }
        wanted
    }

    /// Writes a chain, shows it and tells the device.
    pub fn submit(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.chain(buffers);
        self.publish(head);
        self.kick();
        head
    }

    /// The flags by which the driver asks for no notification.
    pub fn set_flags(&self, flags: u16) {
        self.store(self.addresses.available, flags);
    }

    /// The used index at which the driver wants to be told next.
    pub fn set_used_event(&self, index: u16) {
        self.store(
            self.addresses.available + 4 + 2 * u64::from(self.size),
            index,
        );
        fence(Ordering::SeqCst);
    }

    /// Asks for a notification with the next used entry.
    pub fn arm(&self) {
        if self.event_idx {
            self.set_used_event(self.used);
        }
    }

    /// The available index at which the device wants to be told next.
    pub fn avail_event(&self) -> u16 {
        self.load(self.addresses.used + 4 + 8 * u64::from(self.size))
    }

    /// The used index as the device has published it.
    pub fn used_index(&self) -> u16 {
        // ORDERING: Acquire, pairs with the device's Release: the entries before the index are there.
        u16::from_le(self.memory.load(self.addresses.used + 2, Ordering::Acquire))
    }

    /// Used entries that were published and not taken.
    pub fn pending(&self) -> u16 {
        self.used_index().wrapping_sub(self.used)
    }

    /// Takes a used entry if there is one; waits for nothing.
    pub fn take(&mut self) -> Option<Used> {
        let pending = self.pending();
        assert!(pending <= self.size, "the used index ran {pending} ahead");
        if pending == 0 {
            return None;
        }
        let at = self.addresses.used + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        let word = |at| u32::from_le(self.memory.load(at, Ordering::Relaxed));
        Some(Used {
            head: word(at),
            len: word(at + 4),
        })
    }

    /// Takes a used entry, waiting for the device's notification and for nothing else.
    pub fn wait_for(&mut self, timeout: Duration) -> Option<Used> {
        let deadline = Instant::now() + timeout;
        loop {
            self.arm();
            if let Some(used) = self.take() {
                return Some(used);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if readable([self.call.as_fd()], left) == [false] {
                assert_eq!(
                    self.pending(),
                    0,
                    "ring {}: used without a notification",
                    self.index
                );
                return None;
            }
            take_signals(&self.call);
        }
    }

    /// Takes a used entry that must come with a notification.
    ///
    /// # Panics
    /// When none comes.
    #[track_caller]
    pub fn wait(&mut self) -> Used {
        match self.wait_for(PATIENCE) {
            Some(used) => used,
            None => panic!("ring {}: no used entry in {PATIENCE:?}", self.index),
        }
    }

    /// Takes a used entry by looking at the index alone, for drivers that want no notifications.
    ///
    /// # Panics
    /// When none comes.
    #[track_caller]
    pub fn spin(&mut self) -> Used {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(used) = self.take() {
                return used;
            }
            assert!(
                Instant::now() < deadline,
                "ring {}: no used entry",
                self.index
            );
            std::thread::yield_now();
        }
    }

    /// Forgets what was under way and begins again at `base`, as after a reset.
    pub fn restart(&mut self, base: u16) {
        (self.available, self.used) = (base, base);
        self.store(self.addresses.available + 2, base);
        self.store(self.addresses.used + 2, base);
        self.arm();
    }

    /// Loads a 16-bit field.
    fn load(&self, gpa: u64) -> u16 {
        u16::from_le(self.memory.load(gpa, Ordering::Acquire))
    }

    /// Stores a 16-bit field.
    fn store(&self, gpa: u64, value: u16) {
        self.memory.store(gpa, value.to_le(), Ordering::Release);
    }
}

/// Whether a step of an index from `old` to `new` passes `event` (the rule of the specification).
pub fn needs_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
