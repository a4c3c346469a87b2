//! A guest's session with a back-end: negotiation, memory, rings, single requests.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use crate::frontend::{FrontEnd, VringAddresses};
use crate::inflight::Inflight;
use crate::memory::{Buffer, GuestMemory};
use crate::pattern;
use crate::request::feature::{
    BLK_RO, NOTIFY_ON_EMPTY, PROTOCOL_FEATURES, RING_EVENT_IDX, VHOST_LOG_ALL,
};
use crate::request::{S_OK, T_IN, header, protocol};
use crate::ring::{Ring, Used};
use crate::wait::{PATIENCE, readable, take_signals};
use crate::wire::code;

/// The features that a guest takes from what is offered, unless a test says otherwise: all that change no rules.
pub const USUAL_FEATURES: u64 = !(VHOST_LOG_ALL | NOTIFY_ON_EMPTY);
/// The protocol features that a front-end takes from what is offered, unless a test says otherwise.
pub const USUAL_PROTOCOL: u64 = protocol::MQ
    | protocol::LOG_SHMFD
    | protocol::REPLY_ACK
    | protocol::BACKEND_REQ
    | protocol::CONFIG
    | protocol::RESET_DEVICE
    | protocol::CONFIGURE_MEM_SLOTS;

/// How a session is set up.
#[derive(Debug)]
pub struct GuestOptions {
    /// Which features are taken, if offered.
    pub features: u64,
    /// Which protocol features are taken, if offered.
    pub protocol: u64,
    /// How many rings are set up.
    pub queues: u32,
    /// Descriptors of each ring.
    pub ring_size: u16,
    /// The index at which the rings begin.
    pub base: u16,
    /// The guest's memory.
    pub memory: GuestMemory,
}

impl Default for GuestOptions {
    fn default() -> Self {
        Self {
            features: USUAL_FEATURES,
            protocol: USUAL_PROTOCOL,
            queues: 1,
            ring_size: 128,
            base: 0,
            memory: GuestMemory::two_regions(),
        }
    }
}

/// What a back-end did with a chain that is not well formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The chain was given back.
    Returned(Used),
    /// The ring was declared broken.
    RingBroken,
    /// The connection was closed.
    Closed,
    /// Nothing that can be seen.
    Silent,
}

/// A session.
#[derive(Debug)]
pub struct Guest {
    /// The connection.
    pub front_end: FrontEnd,
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// The rings.
    pub rings: Vec<Ring>,
    /// The features that were agreed.
    pub features: u64,
    /// The protocol features that were agreed.
    pub protocol: u64,
}

impl Guest {
    /// Negotiates, hands over the memory and starts all rings.
    #[track_caller]
    pub fn start(path: &Path, options: GuestOptions) -> Self {
        let guest = Self::negotiate(path, options);
        for index in 0..guest.rings.len() {
            guest.start_ring(index);
        }
        guest
    }

    /// Negotiates and hands over the memory, but starts no ring.
    #[track_caller]
    pub fn negotiate(path: &Path, options: GuestOptions) -> Self {
        Self::negotiate_over(FrontEnd::connect(path), options)
    }

    /// As [`negotiate`](Self::negotiate), over a connection that is open.
    #[track_caller]
    pub fn negotiate_over(mut front_end: FrontEnd, options: GuestOptions) -> Self {
        let (features, protocol) = agree(
            &mut front_end,
            options.features,
            options.protocol,
            &options.memory,
        );
        let memory = Arc::new(options.memory);
        let event_idx = features & RING_EVENT_IDX != 0;
        let rings = (0..options.queues)
            .map(|index| Ring::new(&memory, index, options.ring_size, event_idx, options.base))
            .collect();
        Self {
            front_end,
            memory,
            rings,
            features,
            protocol,
        }
    }

    /// Negotiates, asks for an inflight buffer for all rings, hands it back and starts them.
    #[track_caller]
    pub fn start_tracked(path: &Path, options: GuestOptions) -> (Self, Inflight) {
        let queues = u16::try_from(options.queues).expect("few queues");
        let size = options.ring_size;
        let guest = Self::negotiate(
            path,
            GuestOptions {
                protocol: options.protocol | protocol::INFLIGHT_SHMFD,
                ..options
            },
        );
        let inflight = Inflight::get(&guest.front_end, queues, size);
        inflight.hand_over(&guest.front_end);
        for index in 0..guest.rings.len() {
            guest.start_ring(index);
        }
        (guest, inflight)
    }

    /// Drops the connection, as when the back-end or the network between went away, and goes on over a new one: with the
    /// same memory and features, and each ring where it is now.
    #[track_caller]
    pub fn reconnect(self, path: &Path) -> Self {
        self.reconnect_with(path, None, Ring::available_index)
    }

    /// As [`reconnect`](Self::reconnect), with an inflight buffer and with rings that begin where `base` says.
    #[track_caller]
    pub fn reconnect_with(
        self,
        path: &Path,
        inflight: Option<&Inflight>,
        base: fn(&Ring) -> u16,
    ) -> Self {
        let Self {
            front_end,
            memory,
            rings,
            features,
            protocol,
        } = self;
        drop(front_end);
        let mut front_end = FrontEnd::connect(path);
        let agreed = agree(&mut front_end, features, protocol, &memory);
        assert_eq!(agreed, (features, protocol), "as before");
        let guest = Self {
            front_end,
            memory,
            rings,
            features,
            protocol,
        };
        if let Some(inflight) = inflight {
            inflight.hand_over(&guest.front_end);
        }
        for index in 0..guest.rings.len() {
            guest.set_up_ring_at(index, base(&guest.rings[index]));
            guest.set_events(index);
            guest.enable_ring(index);
        }
        guest
    }

    /// Tells the back-end all about a ring and enables it. It starts with its first kick.
    #[track_caller]
    pub fn start_ring(&self, index: usize) {
        self.set_up_ring(index);
        self.set_events(index);
        self.enable_ring(index);
    }

    /// Enables a ring, if that has to be said.
    #[track_caller]
    pub fn enable_ring(&self, index: usize) {
        if self.features & PROTOCOL_FEATURES != 0 {
            self.front_end.enable_vring(self.rings[index].index, true);
        }
    }

    /// Tells the back-end size, place and start of a ring.
    #[track_caller]
    pub fn set_up_ring(&self, index: usize) {
        self.set_up_ring_at(index, self.rings[index].available_index());
    }

    /// The same with a ring that begins there.
    #[track_caller]
    pub fn set_up_ring_at(&self, index: usize, base: u16) {
        let ring = &self.rings[index];
        self.front_end
            .set_vring_num(ring.index, u32::from(ring.size));
        self.front_end.set_vring_base(ring.index, u32::from(base));
        self.front_end.set_vring_addr(&self.vring_addresses(index));
    }

    /// The addresses of a ring for its message.
    pub fn vring_addresses(&self, index: usize) -> VringAddresses {
        let ring = &self.rings[index];
        VringAddresses {
            index: ring.index,
            flags: 0,
            descriptors: self.memory.uva(ring.addresses.descriptors),
            used: self.memory.uva(ring.addresses.used),
            available: self.memory.uva(ring.addresses.available),
            log: 0,
        }
    }

    /// Hands over the events of a ring.
    #[track_caller]
    pub fn set_events(&self, index: usize) {
        let ring = &self.rings[index];
        self.front_end
            .set_vring_fd(code::SET_VRING_CALL, ring.index, Some(ring.call_fd()));
        self.front_end
            .set_vring_fd(code::SET_VRING_ERR, ring.index, Some(ring.error_fd()));
        self.front_end
            .set_vring_fd(code::SET_VRING_KICK, ring.index, Some(ring.kick_fd()));
    }

    /// The header of a request, in memory.
    pub fn header(&self, kind: u32, sector: u64) -> Buffer {
        self.memory.readable(&header(kind, sector))
    }

    /// A place for a status.
    pub fn status(&self) -> Buffer {
        self.memory.writable(1)
    }

    /// The byte at the end of a buffer, where a status stands.
    pub fn last_byte(&self, buffer: Buffer) -> u8 {
        self.memory.load(
            buffer.gpa + u64::from(buffer.len) - 1,
            std::sync::atomic::Ordering::Acquire,
        )
    }

    /// The buffers of a read of one sector.
    pub fn read_of(&self, sector: u64) -> [Buffer; 3] {
        [
            self.header(T_IN, sector),
            self.memory.writable(512),
            self.status(),
        ]
    }

    /// Checks that such a read, of a sector that nobody has written, has been carried out.
    ///
    /// # Panics
    /// When it has not.
    #[track_caller]
    pub fn assert_read(&self, buffers: &[Buffer; 3], sector: u64) {
        assert_eq!(self.last_byte(buffers[2]), S_OK, "sector {sector}");
        pattern::assert_same(
            &self.memory.bytes(buffers[1]),
            &pattern::base(sector, 1),
            "a read",
        );
    }

    /// Submits a chain on the first ring and waits until it is given back.
    ///
    /// # Panics
    /// When it is not, or another one is.
    #[track_caller]
    pub fn run(&mut self, buffers: &[Buffer]) -> Used {
        let head = self.rings[0].submit(buffers);
        let used = self.rings[0].wait();
        assert_eq!(used.head, u32::from(head), "the head that was submitted");
        used
    }

    /// Carries out a request with usual descriptors (header, data, status); its status, the data buffer is filled.
    #[track_caller]
    pub fn request(&mut self, kind: u32, sector: u64, data: Option<Buffer>) -> u8 {
        let (status, _) = self.request_used(kind, sector, data);
        status
    }

    /// As [`request`](Self::request), with the used entry.
    #[track_caller]
    pub fn request_used(&mut self, kind: u32, sector: u64, data: Option<Buffer>) -> (u8, Used) {
        let status = self.status();
        let mut chain = vec![self.header(kind, sector)];
        chain.extend(data);
        chain.push(status);
        let used = self.run(&chain);
        (self.last_byte(status), used)
    }

    /// Waits for what the back-end does with a chain on the first ring that is not well formed.
    #[track_caller]
    pub fn verdict(&mut self) -> Verdict {
        let ring = &mut self.rings[0];
        let deadline = Instant::now() + PATIENCE;
        loop {
            ring.arm();
            if let Some(used) = ring.take() {
                return Verdict::Returned(used);
            }
            let fds = [ring.call_fd(), ring.error_fd(), self.front_end.wire.as_fd()];
            match readable(fds, deadline.saturating_duration_since(Instant::now())) {
                [true, _, _] => {
                    take_signals(ring.call_fd());
                }
                [_, true, _] => return Verdict::RingBroken,
                [_, _, true] => return Verdict::Closed,
                _ => return Verdict::Silent,
            }
        }
    }

    /// Whether read-only is offered and agreed.
    pub fn is_read_only(&self) -> bool {
        self.features & BLK_RO != 0
    }
}

/// Negotiates, claims the device and hands over the memory: the features and protocol features that were agreed.
#[track_caller]
fn agree(
    front_end: &mut FrontEnd,
    features: u64,
    protocol: u64,
    memory: &GuestMemory,
) -> (u64, u64) {
    let offered = front_end.features();
    let features = offered & features;
    let mut agreed = 0;
    if features & PROTOCOL_FEATURES != 0 {
        agreed = front_end.protocol_features() & protocol;
        front_end.set_protocol_features(agreed);
    }
    front_end.tell(code::SET_OWNER, &[], &[]);
    front_end.set_features(features);
    front_end.set_mem_table(memory.regions());
    (features, agreed)
}
