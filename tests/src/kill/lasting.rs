//! A driver whose memory, rings and inflight buffer outlive the daemon, as those of a virtual machine do.
//!
//! It submits each request once. Whether the daemon that took it also returns it, or another one after a kill, is their
//! business: each must come back, once, with the right data. Nothing is submitted again.
//!
//! Used elements are counted: one that names a request which is not under way is an error, and so is one too many, because the
//! request that it seems to answer comes back a second time later. When nothing is under way, as many were returned as were
//! offered.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::rig::QUEUES;
use crate::frontend::{VringAddresses, memory_table, vring_state};
use crate::inflight::{Inflight, Shape};
use crate::load::driver::{Done, DriverError, Request};
use crate::memory::{Buffer, GuestMemory, POISON, Region};
use crate::request::feature::{PROTOCOL_FEATURES, RING_EVENT_IDX};
use crate::request::{
    HEADER_BYTES, S_OK, T_DISCARD, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES, UNMAP, header, protocol,
    segment,
};
use crate::ring::{Descriptor, Ring};
use crate::wait::{readable, take_signals};
use crate::wire::{Message, NEED_REPLY, VERSION, Wire, code};

/// Descriptors of a request: header, data, status.
const REQUEST_DESCRIPTORS: u16 = 3;
/// Bytes of a segment of a discard.
const SEGMENT_BYTES: u32 = 16;

/// Which entry the front-end says that a ring goes on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// The used index, as QEMU does.
    Used,
    /// The available index, as cloud-hypervisor does.
    Available,
}

/// A place for a request.
#[derive(Debug)]
struct Slot {
    /// Its parts in guest memory.
    header: Buffer,
    segment: Buffer,
    status: Buffer,
    /// Where its data lies.
    data: Buffer,
    /// The data, as the caller sees it.
    copy: Vec<u8>,
    /// What is under way.
    request: Option<Request>,
}

/// A ring and its slots.
#[derive(Debug)]
struct Queue {
    ring: Ring,
    slots: Vec<Slot>,
    /// The available index as of the last kick.
    announced: u16,
}

/// The driver.
#[derive(Debug)]
pub struct LastingDriver {
    /// The connection, while there is one.
    wire: Option<Wire>,
    /// Memory of the machine.
    memory: Arc<GuestMemory>,
    /// The rings, once the features are known.
    queues: Vec<Queue>,
    /// The buffer that goes from daemon to daemon.
    inflight: Option<Inflight>,
    /// The features that were negotiated first, and ever since.
    features: u64,
    /// Slots of a queue.
    depth: usize,
    /// Bytes of a slot's buffer.
    buffer_bytes: usize,
    /// Requests under way.
    under_way: usize,
    /// The size of the disk.
    capacity_bytes: u64,
}

impl LastingDriver {
    /// A machine that has not started yet.
    pub fn new(depth: usize, buffer_bytes: usize) -> Self {
        Self {
            wire: None,
            memory: Arc::new(GuestMemory::two_regions()),
            queues: Vec::new(),
            inflight: None,
            features: 0,
            depth,
            buffer_bytes,
            under_way: 0,
            capacity_bytes: 0,
        }
    }

    /// Connects, for the first time or again. On failure everything stays as it is, to be tried again.
    ///
    /// # Errors
    /// The daemon is gone, or refuses.
    pub fn connect(&mut self, socket: &Path, base: Base) -> Result<(), DriverError> {
        self.wire = None;
        let failed = |source| DriverError::Connect {
            socket: socket.to_path_buf(),
            source,
        };
        let wire = Wire::connect(socket).map_err(failed)?;
        self.set_up(&wire, base).map_err(failed)?;
        self.wire = Some(wire);
        Ok(())
    }

    /// Lets the connection go.
    pub fn disconnect(&mut self) {
        self.wire = None;
    }

    /// The whole of a set-up.
    fn set_up(&mut self, wire: &Wire, base: Base) -> io::Result<()> {
        let offered = ask(wire, code::GET_FEATURES, &[])?.as_u64();
        let wanted = protocol::MQ
            | protocol::REPLY_ACK
            | protocol::CONFIG
            | protocol::CONFIGURE_MEM_SLOTS
            | protocol::INFLIGHT_SHMFD;
        let agreed = ask(wire, code::GET_PROTOCOL_FEATURES, &[])?.as_u64() & wanted;
        if agreed != wanted {
            let what = format!("protocol features {agreed:#x} instead of {wanted:#x}");
            return Err(io::Error::other(what));
        }
        let features = offered & crate::guest::USUAL_FEATURES;
        if self.queues.is_empty() {
            self.features = features;
            self.lay_out();
        } else if features != self.features {
            return Err(io::Error::other("other features than before"));
        }
        let plain = |request, payload: &[u8]| wire.send(request, VERSION, payload, &[]);
        plain(code::SET_PROTOCOL_FEATURES, &agreed.to_le_bytes())?;
        plain(code::SET_OWNER, &[])?;
        tell(wire, code::SET_FEATURES, &features.to_le_bytes(), &[])?;
        let inflight = match &self.inflight {
            Some(inflight) => inflight,
            None => {
                let queues = u16::try_from(QUEUES).expect("few");
                let shape = Shape::of(queues, self.queues[0].ring.size);
                let reply = ask(wire, code::GET_INFLIGHT_FD, &shape.encode())?;
                self.inflight.insert(Inflight::of_reply(reply))
            }
        };
        let shape = inflight.shape.encode();
        tell(wire, code::SET_INFLIGHT_FD, &shape, &[inflight.as_fd()])?;
        let regions = self.memory.regions();
        let infos: Vec<_> = regions.iter().map(|region| region.info).collect();
        let files: Vec<_> = regions.iter().map(Region::as_fd).collect();
        tell(wire, code::SET_MEM_TABLE, &memory_table(&infos), &files)?;
        for queue in &self.queues {
            self.start(wire, &queue.ring, base)?;
        }
        let payload = crate::frontend::config(0, 8, 0, &[0; 8]);
        let config = ask(wire, code::GET_CONFIG, &payload)?.payload;
        let sectors: [u8; 8] = config[12..].try_into().map_err(io::Error::other)?;
        self.capacity_bytes = u64::from_le_bytes(sectors) * 512;
        Ok(())
    }

    /// Starts a ring.
    fn start(&self, wire: &Wire, ring: &Ring, base: Base) -> io::Result<()> {
        let number = ring.index;
        let state = |value| vring_state(number, value);
        let base = match base {
            Base::Used => ring.used_index(),
            Base::Available => ring.available_index(),
        };
        let num = state(u32::from(ring.size));
        tell(wire, code::SET_VRING_NUM, &num, &[])?;
        let base = state(u32::from(base));
        tell(wire, code::SET_VRING_BASE, &base, &[])?;
        let addresses = VringAddresses {
            index: number,
            flags: 0,
            descriptors: self.memory.uva(ring.addresses.descriptors),
            used: self.memory.uva(ring.addresses.used),
            available: self.memory.uva(ring.addresses.available),
            log: 0,
        };
        tell(wire, code::SET_VRING_ADDR, &addresses.encode(), &[])?;
        let events = [
            (code::SET_VRING_CALL, ring.call_fd()),
            (code::SET_VRING_ERR, ring.error_fd()),
            (code::SET_VRING_KICK, ring.kick_fd()),
        ];
        for (request, fd) in events {
            tell(wire, request, &u64::from(number).to_le_bytes(), &[fd])?;
        }
        tell(wire, code::SET_VRING_ENABLE, &state(1), &[])
    }

    /// Lays rings and buffers out in memory.
    fn lay_out(&mut self) {
        let event_idx = self.features & RING_EVENT_IDX != 0;
        assert_ne!(self.features & PROTOCOL_FEATURES, 0);
        let entries = self.depth * usize::from(REQUEST_DESCRIPTORS);
        let size = u16::try_from(entries.next_power_of_two()).expect("a small ring");
        let data = u32::try_from(self.buffer_bytes).expect("small buffers");
        let memory = &self.memory;
        let readable = |bytes: u32| Buffer {
            gpa: memory.allocate(u64::from(bytes), 16),
            len: bytes,
            writable: false,
        };
        let slot = || Slot {
            header: readable(HEADER_BYTES),
            segment: readable(SEGMENT_BYTES),
            status: memory.writable(1),
            data: readable(data),
            copy: vec![0; self.buffer_bytes],
            request: None,
        };
        let queue = |index| Queue {
            ring: Ring::new(memory, index, size, event_idx, 0),
            slots: (0..self.depth).map(|_| slot()).collect(),
            announced: 0,
        };
        let count = u32::try_from(QUEUES).expect("few");
        self.queues = (0..count).map(queue).collect();
    }

    /// Bytes of the disk.
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// Requests that were submitted and have not come back, on all queues.
    pub fn under_way(&self) -> usize {
        self.under_way
    }

    /// The buffer of an idle slot.
    ///
    /// # Panics
    /// If there is no such slot or its request is under way.
    pub fn buffer(&self, queue: usize, slot: usize) -> &[u8] {
        let slot = &self.queues[queue].slots[slot];
        assert!(slot.request.is_none(), "it is under way");
        &slot.copy
    }

    /// The same, to fill.
    ///
    /// # Panics
    /// If there is no such slot or its request is under way.
    pub fn buffer_mut(&mut self, queue: usize, slot: usize) -> &mut [u8] {
        let slot = &mut self.queues[queue].slots[slot];
        assert!(slot.request.is_none(), "it is under way");
        &mut slot.copy
    }

    /// Offers a request to the device, which may be dead.
    ///
    /// # Panics
    /// If there is no such slot or its request is under way.
    pub fn submit(&mut self, queue: usize, slot: usize, request: Request) {
        let memory = &self.memory;
        let queue = &mut self.queues[queue];
        let head = REQUEST_DESCRIPTORS * u16::try_from(slot).expect("few slots");
        let slot = &mut queue.slots[slot];
        assert!(slot.request.is_none(), "it is under way");
        let sectors = |len: u64| u32::try_from(len / 512).expect("a short range");
        let (kind, sector, data) = match request {
            Request::Read { offset, len } => (T_IN, offset / 512, Some((len, true))),
            Request::Write { offset, len } => (T_OUT, offset / 512, Some((len, false))),
            Request::Flush => (T_FLUSH, 0, None),
            Request::Discard { offset, len } => {
                let bytes = segment(offset / 512, sectors(len), 0);
                memory.write(slot.segment.gpa, &bytes);
                (T_DISCARD, 0, None)
            }
            Request::WriteZeroes { offset, len, unmap } => {
                let flags = if unmap { UNMAP } else { 0 };
                let bytes = segment(offset / 512, sectors(len), flags);
                memory.write(slot.segment.gpa, &bytes);
                (T_WRITE_ZEROES, 0, None)
            }
        };
        memory.write(slot.header.gpa, &header(kind, sector));
        memory.write(slot.status.gpa, &[POISON]);
        let data = match data {
            Some((len, writable)) => {
                if writable {
                    memory.write(slot.data.gpa, &vec![POISON; len]);
                } else {
                    memory.write(slot.data.gpa, &slot.copy[..len]);
                }
                let len = u32::try_from(len).expect("a short transfer");
                Some(Buffer {
                    len,
                    writable,
                    ..slot.data
                })
            }
            None if request == Request::Flush => None,
            None => Some(slot.segment),
        };
        let parts = [Some(slot.header), data, Some(slot.status)];
        let parts: Vec<Buffer> = parts.into_iter().flatten().collect();
        for (place, part) in (head..).zip(&parts) {
            let last = usize::from(place - head) + 1 == parts.len();
            let descriptor = Descriptor::of(*part);
            let descriptor = if last {
                descriptor
            } else {
                descriptor.then(place + 1)
            };
            queue.ring.write_descriptor(place, descriptor);
        }
        slot.request = Some(request);
        queue.ring.stage(head);
        self.under_way += 1;
    }

    /// Shows what was submitted to a queue, and tells the device if it wants to be told.
    pub fn kick(&mut self, queue: usize) {
        let queue = &mut self.queues[queue];
        let available = queue.ring.available_index();
        if available != queue.announced {
            queue.ring.expose();
            queue.ring.kick_if_wanted(queue.announced);
            queue.announced = available;
        }
    }

    /// Appends the requests of `queue` that came back to `done`.
    ///
    /// # Errors
    /// `Failed` if one ended with an error; `Bogus` if one came back that was not under way.
    pub fn poll(&mut self, queue: usize, done: &mut Vec<Done>) -> Result<(), DriverError> {
        let bogus = DriverError::Bogus { queue };
        let target = &mut self.queues[queue];
        target.ring.arm();
        // More than there is under way cannot have come back.
        let offered = target.ring.available_index();
        if target.ring.pending() > target.ring.size
            || offered.wrapping_sub(target.ring.used_index()) > target.ring.size
        {
            return Err(bogus);
        }
        while let Some(used) = target.ring.take() {
            let place = usize::try_from(used.head).expect("64-bit host");
            let step = usize::from(REQUEST_DESCRIPTORS);
            let slot = target.slots.get_mut(place / step);
            let slot = slot.filter(|_| place.is_multiple_of(step));
            let Some(slot) = slot else {
                return Err(bogus);
            };
            let Some(request) = slot.request.take() else {
                return Err(bogus);
            };
            self.under_way -= 1;
            let [status] = self.memory.bytes(slot.status)[..] else {
                return Err(bogus);
            };
            if status != S_OK {
                let errno = -i32::from(status);
                return Err(DriverError::Failed { request, errno });
            }
            if let Request::Read { len, .. } = request {
                slot.copy[..len].copy_from_slice(&self.memory.read(slot.data.gpa, len));
            }
            let slot = place / step;
            done.push(Done { slot, request });
        }
        if self.under_way == 0 {
            return self.assert_even();
        }
        Ok(())
    }

    /// With nothing under way, as much has come back as was offered.
    fn assert_even(&self) -> Result<(), DriverError> {
        for (queue, target) in self.queues.iter().enumerate() {
            if target.ring.available_index() != target.ring.used_index() {
                return Err(DriverError::Bogus { queue });
            }
        }
        Ok(())
    }

    /// Waits until the device calls on any queue, at most for that long.
    pub fn wait(&mut self, at_most: Duration) {
        let ready = readable(
            std::array::from_fn::<_, QUEUES, _>(|queue| self.queues[queue].ring.call_fd()),
            at_most,
        );
        for (queue, ready) in self.queues.iter().zip(ready) {
            if ready {
                take_signals(queue.ring.call_fd());
            }
        }
    }
}

/// The daemon is gone.
pub(super) fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "the daemon hung up")
}

/// Asks for something.
pub(super) fn ask(wire: &Wire, request: u32, payload: &[u8]) -> io::Result<Message> {
    wire.send(request, VERSION, payload, &[])?;
    wire.receive()?.ok_or_else(gone)
}

/// Tells something, and waits until it was taken.
pub(super) fn tell(
    wire: &Wire,
    request: u32,
    payload: &[u8],
    fds: &[std::os::fd::BorrowedFd<'_>],
) -> io::Result<()> {
    wire.send(request, VERSION | NEED_REPLY, payload, fds)?;
    match wire.receive()?.ok_or_else(gone)?.as_u64() {
        0 => Ok(()),
        number => Err(io::Error::other(format!("{request} was refused: {number}"))),
    }
}
