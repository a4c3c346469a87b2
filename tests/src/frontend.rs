//! A front-end's connection: the messages of vhost-user with their payloads, and what a back-end answers.

use std::io::ErrorKind;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use crate::memory::{Region, RegionInfo};
use crate::request::feature::PROTOCOL_FEATURES;
use crate::request::protocol::REPLY_ACK;
use crate::wait::{PATIENCE, QUIET};
use crate::wire::{Message, NEED_REPLY, REPLY, VERSION, Wire, code};

/// What became of a message that may be refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The back-end said yes.
    Accepted,
    /// The back-end said no, by this number.
    Refused(u64),
    /// The back-end hung up.
    Closed,
}

impl Answer {
    /// Whether it was a no of either kind.
    pub fn is_no(self) -> bool {
        self != Self::Accepted
    }
}

/// The addresses of a ring as a message carries them (front-end addresses).
#[derive(Clone, Copy, Debug)]
pub struct VringAddresses {
    /// The ring.
    pub index: u32,
    /// Bit 0: writes to the used ring are logged at `log`.
    pub flags: u32,
    /// The descriptor table.
    pub descriptors: u64,
    /// The used ring.
    pub used: u64,
    /// The available ring.
    pub available: u64,
    /// Guest physical address of the used ring for the log.
    pub log: u64,
}

impl VringAddresses {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = [self.index, self.flags].map(u32::to_le_bytes).concat();
        bytes.extend(
            [self.descriptors, self.used, self.available, self.log]
                .map(u64::to_le_bytes)
                .concat(),
        );
        bytes
    }
}

/// The bit of a ring's number that says that no descriptor comes with the message.
pub const NO_FD: u64 = 1 << 8;

/// The payload of the messages about one ring's state.
pub fn vring_state(index: u32, number: u32) -> Vec<u8> {
    [index, number].map(u32::to_le_bytes).concat()
}

/// The payload of GET_CONFIG and SET_CONFIG.
pub fn config(offset: u32, size: u32, flags: u32, bytes: &[u8]) -> Vec<u8> {
    let mut payload = [offset, size, flags].map(u32::to_le_bytes).concat();
    payload.extend_from_slice(bytes);
    payload
}

/// The payload of SET_MEM_TABLE.
pub fn memory_table(regions: &[RegionInfo]) -> Vec<u8> {
    let count = u32::try_from(regions.len()).expect("a short table");
    let mut payload = [count, 0].map(u32::to_le_bytes).concat();
    payload.extend(regions.iter().flat_map(RegionInfo::encode));
    payload
}

/// The payload of ADD_MEM_REG and REM_MEM_REG.
pub fn single_region(region: &RegionInfo) -> Vec<u8> {
    [0_u64.to_le_bytes().to_vec(), region.encode()].concat()
}

/// A connection to a back-end.
#[derive(Debug)]
pub struct FrontEnd {
    /// The message layer, for messages that no method here would send.
    pub wire: Wire,
    /// Whether REPLY_ACK is negotiated.
    acks: bool,
}

impl FrontEnd {
    /// Connects.
    ///
    /// # Panics
    /// When the back-end does not listen.
    #[track_caller]
    pub fn connect(path: &Path) -> Self {
        Self::new(Wire::connect(path).expect("the back-end listens"))
    }

    /// Speaks over an open wire.
    pub fn new(wire: Wire) -> Self {
        Self { wire, acks: false }
    }

    /// Sends a message that has a reply of its own and waits for it.
    ///
    /// # Panics
    /// When another reply comes, or none.
    #[track_caller]
    pub fn ask(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Message {
        self.wire
            .send(request, VERSION, payload, fds)
            .expect("the back-end reads");
        self.reply_to(request)
    }

    /// Receives the reply to a request.
    ///
    /// # Panics
    /// When another reply comes, or none.
    #[track_caller]
    pub fn reply_to(&self, request: u32) -> Message {
        let reply = self
            .wire
            .receive()
            .expect("a whole reply in time")
            .expect("an open connection");
        assert_eq!(reply.request, request, "{reply:?}");
        assert_eq!(reply.flags, VERSION | REPLY, "{reply:?}");
        reply
    }

    /// Sends a message that the back-end must accept, and waits for its word if REPLY_ACK is negotiated.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn tell(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        if self.acks {
            assert_eq!(
                self.attempt(request, payload, fds),
                Answer::Accepted,
                "request {request}"
            );
        } else {
            self.wire
                .send(request, VERSION, payload, fds)
                .expect("the back-end reads");
        }
    }

    /// Sends a message that the back-end may refuse, and waits for its word. Without REPLY_ACK a connection that still
    /// answers afterwards counts as accepted.
    ///
    /// # Panics
    /// When the back-end neither answers nor hangs up.
    #[track_caller]
    pub fn attempt(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Answer {
        let flags = if self.acks {
            VERSION | NEED_REPLY
        } else {
            VERSION
        };
        let sent = self.wire.send(request, flags, payload, fds);
        let probe = if self.acks {
            request
        } else {
            code::GET_FEATURES
        };
        let sent = match sent {
            Ok(()) if !self.acks => self.wire.send(probe, VERSION, &[], &[]),
            other => other,
        };
        if let Err(error) = sent {
            assert!(is_hang_up(error.kind()), "request {request}: {error}");
            return Answer::Closed;
        }
        match self.wire.receive() {
            Ok(None) => Answer::Closed,
            Ok(Some(reply)) => {
                assert_eq!(
                    (reply.request, reply.flags),
                    (probe, VERSION | REPLY),
                    "{reply:?}"
                );
                match reply.as_u64() {
                    _ if !self.acks => Answer::Accepted,
                    0 => Answer::Accepted,
                    number => Answer::Refused(number),
                }
            }
            Err(error) if is_hang_up(error.kind()) => Answer::Closed,
            Err(error) => panic!("request {request}: no answer in {PATIENCE:?}: {error}"),
        }
    }

    /// Sends a message that has a reply of its own, or makes the back-end hang up: `None`.
    ///
    /// # Panics
    /// When the back-end neither answers nor hangs up.
    #[track_caller]
    pub fn try_ask(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Option<Message> {
        if let Err(error) = self.wire.send(request, VERSION, payload, fds) {
            assert!(is_hang_up(error.kind()), "request {request}: {error}");
            return None;
        }
        match self.wire.receive() {
            Ok(reply) => reply,
            Err(error) if is_hang_up(error.kind()) => None,
            Err(error) => panic!("request {request}: no answer in {PATIENCE:?}: {error}"),
        }
    }

    /// Whether the back-end has nothing to say and does not hang up.
    pub fn is_quiet(&self) -> bool {
        self.wire.is_silent(QUIET)
    }

    /// Sends a message with these flags and returns all replies until the back-end has been quiet for a while.
    #[track_caller]
    pub fn replies_to(
        &self,
        request: u32,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Vec<Message> {
        self.wire
            .send(request, flags, payload, fds)
            .expect("the back-end reads");
        // Whoever answers this has answered what came before.
        self.wire
            .send(code::GET_FEATURES, VERSION, &[], &[])
            .expect("the back-end reads");
        let mut replies = Vec::new();
        loop {
            let reply = self
                .wire
                .receive()
                .expect("a whole reply")
                .expect("an open connection");
            replies.push(reply);
            if self.wire.is_silent(Duration::from_millis(5)) && replies.last().is_some_and(is_probe)
            {
                replies.pop();
                return replies;
            }
        }
    }

    /// Whether the back-end hung up, waiting for it.
    pub fn is_closed(&self) -> bool {
        match self.wire.receive() {
            Ok(None) => true,
            Ok(Some(_)) => false,
            Err(error) => is_hang_up(error.kind()),
        }
    }

    /// The virtio features on offer.
    #[track_caller]
    pub fn features(&self) -> u64 {
        self.ask(code::GET_FEATURES, &[], &[]).as_u64()
    }

    /// Chooses virtio features.
    #[track_caller]
    pub fn set_features(&self, features: u64) {
        self.tell(code::SET_FEATURES, &features.to_le_bytes(), &[]);
    }

    /// The protocol features on offer.
    #[track_caller]
    pub fn protocol_features(&self) -> u64 {
        self.ask(code::GET_PROTOCOL_FEATURES, &[], &[]).as_u64()
    }

    /// Chooses protocol features. From here on every message waits for its acknowledgement, if that was chosen.
    #[track_caller]
    pub fn set_protocol_features(&mut self, features: u64) {
        self.tell(code::SET_PROTOCOL_FEATURES, &features.to_le_bytes(), &[]);
        self.acks = features & REPLY_ACK != 0;
    }

    /// Negotiates these protocol features, as far as they are offered, and returns what was agreed.
    #[track_caller]
    pub fn negotiate_protocol(&mut self, wanted: u64) -> u64 {
        assert_ne!(
            self.features() & PROTOCOL_FEATURES,
            0,
            "protocol features are offered"
        );
        let agreed = self.protocol_features() & wanted;
        self.set_protocol_features(agreed);
        agreed
    }

    /// Reads the configuration space.
    ///
    /// # Panics
    /// If the reply has another size than asked for.
    #[track_caller]
    pub fn config(&self, offset: u32, size: u32) -> Vec<u8> {
        let bytes = usize::try_from(size).expect("64-bit host");
        let reply = self.ask(
            code::GET_CONFIG,
            &config(offset, size, 0, &vec![0; bytes]),
            &[],
        );
        assert_eq!(
            reply.payload.len(),
            12 + bytes,
            "GET_CONFIG of {size} bytes at {offset}"
        );
        assert_eq!(reply.payload[..8], config(offset, size, 0, &[])[..8]);
        reply.payload[12..].to_vec()
    }

    /// Writes the configuration space as a guest does.
    #[track_caller]
    pub fn set_config(&self, offset: u32, bytes: &[u8]) -> Answer {
        let size = u32::try_from(bytes.len()).expect("a short write");
        self.attempt(code::SET_CONFIG, &config(offset, size, 0, bytes), &[])
    }

    /// Hands over all regions of a guest's memory.
    #[track_caller]
    pub fn set_mem_table(&self, regions: &[Region]) {
        let infos: Vec<_> = regions.iter().map(|region| region.info).collect();
        let fds: Vec<_> = regions.iter().map(Region::as_fd).collect();
        self.tell(code::SET_MEM_TABLE, &memory_table(&infos), &fds);
    }

    /// Adds one region.
    #[track_caller]
    pub fn add_region(&self, region: &Region) -> Answer {
        self.attempt(
            code::ADD_MEM_REG,
            &single_region(&region.info),
            &[region.as_fd()],
        )
    }

    /// Removes one region.
    #[track_caller]
    pub fn remove_region(&self, info: &RegionInfo) -> Answer {
        self.attempt(code::REM_MEM_REG, &single_region(info), &[])
    }

    /// Sets the size of a ring.
    #[track_caller]
    pub fn set_vring_num(&self, index: u32, size: u32) {
        self.tell(code::SET_VRING_NUM, &vring_state(index, size), &[]);
    }

    /// Sets the index at which a ring begins.
    #[track_caller]
    pub fn set_vring_base(&self, index: u32, base: u32) {
        self.tell(code::SET_VRING_BASE, &vring_state(index, base), &[]);
    }

    /// Sets the addresses of a ring.
    #[track_caller]
    pub fn set_vring_addr(&self, addresses: &VringAddresses) {
        self.tell(code::SET_VRING_ADDR, &addresses.encode(), &[]);
    }

    /// Stops a ring and returns the index at which it stopped.
    #[track_caller]
    pub fn stop_vring(&self, index: u32) -> u32 {
        let reply = self.ask(code::GET_VRING_BASE, &vring_state(index, 0), &[]);
        assert_eq!(reply.payload.len(), 8, "{reply:?}");
        assert_eq!(reply.payload[..4], index.to_le_bytes());
        u32::from_le_bytes([
            reply.payload[4],
            reply.payload[5],
            reply.payload[6],
            reply.payload[7],
        ])
    }

    /// Hands over one of a ring's events (`request` says which), or says that there is none.
    #[track_caller]
    pub fn set_vring_fd(&self, request: u32, index: u32, fd: Option<BorrowedFd<'_>>) {
        let number = u64::from(index) | if fd.is_none() { NO_FD } else { 0 };
        let fds: Vec<_> = fd.into_iter().collect();
        self.tell(request, &number.to_le_bytes(), &fds);
    }

    /// Enables or disables a ring.
    #[track_caller]
    pub fn enable_vring(&self, index: u32, enable: bool) {
        self.tell(
            code::SET_VRING_ENABLE,
            &vring_state(index, u32::from(enable)),
            &[],
        );
    }

    /// Hands over the file of the dirty log; it has a reply of its own, whatever was negotiated.
    #[track_caller]
    pub fn set_log_base(&self, bytes: u64, offset: u64, fd: BorrowedFd<'_>) -> Option<Message> {
        let payload = [bytes, offset].map(u64::to_le_bytes).concat();
        self.try_ask(code::SET_LOG_BASE, &payload, &[fd])
    }
}

/// Whether a reply answers the probe of [`FrontEnd::replies_to`].
fn is_probe(reply: &Message) -> bool {
    reply.request == code::GET_FEATURES
}

/// Whether an error means that the other side hung up.
fn is_hang_up(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof
    )
}
