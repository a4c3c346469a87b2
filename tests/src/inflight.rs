//! The inflight buffer as a front-end keeps it: asked for, handed back, read and forged. Written from the protocol document,
//! for a host that is little-endian, as its numbers are the host's.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use crate::frontend::{Answer, FrontEnd};
use crate::wire::{Message, code};

/// Bytes in front of a region's entries, and of an entry.
const HEAD_BYTES: u64 = 16;
const ENTRY_BYTES: u64 = 16;
/// What the size of a region is a multiple of.
const ALIGNMENT: u64 = 64;

/// What the messages say of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Its bytes.
    pub bytes: u64,
    /// Where it begins in its file.
    pub offset: u64,
    /// Regions in it.
    pub queues: u16,
    /// Entries of each.
    pub size: u16,
}

impl Shape {
    /// Asks for so many queues of that size.
    pub fn of(queues: u16, size: u16) -> Self {
        Self {
            bytes: 0,
            offset: 0,
            queues,
            size,
        }
    }

    /// As it stands in a message: no padding behind it.
    pub fn encode(&self) -> Vec<u8> {
        let mut payload = [self.bytes, self.offset].map(u64::to_le_bytes).concat();
        payload.extend([self.queues, self.size].map(u16::to_le_bytes).concat());
        // As a C compiler lays the structure out.
        payload.extend([0; 4]);
        payload
    }

    /// The same from a reply.
    fn decode(payload: &[u8]) -> Self {
        let word = |at: usize| u64::from_le_bytes(payload[at..at + 8].try_into().expect("8 bytes"));
        let half = |at: usize| u16::from_le_bytes(payload[at..at + 2].try_into().expect("2 bytes"));
        Self {
            bytes: word(0),
            offset: word(8),
            queues: half(16),
            size: half(18),
        }
    }
}

/// An entry of a region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Whether it is under way.
    pub in_flight: u8,
    /// The list of what was returned last goes on there.
    pub next: u16,
    /// Orders what is under way.
    pub counter: u64,
}

/// A buffer that a front-end keeps.
#[derive(Debug)]
pub struct Inflight {
    /// What the back-end said of it.
    pub shape: Shape,
    /// Its file.
    pub file: File,
}

impl Inflight {
    /// Asks for a buffer. `None` if the back-end hangs up.
    ///
    /// # Panics
    /// The reply is none.
    #[track_caller]
    pub fn try_get(front_end: &FrontEnd, queues: u16, size: u16) -> Option<Self> {
        let payload = Shape::of(queues, size).encode();
        let reply = front_end.try_ask(code::GET_INFLIGHT_FD, &payload, &[])?;
        assert_eq!(reply.request, code::GET_INFLIGHT_FD, "{reply:?}");
        Some(Self::of_reply(reply))
    }

    /// The buffer that a reply brings.
    ///
    /// # Panics
    /// It brings none.
    #[track_caller]
    pub fn of_reply(reply: Message) -> Self {
        Self {
            shape: Shape::decode(&reply.payload),
            file: reply.file.expect("a descriptor comes with the reply"),
        }
    }

    /// Asks for a buffer, which must be given.
    #[track_caller]
    pub fn get(front_end: &FrontEnd, queues: u16, size: u16) -> Self {
        Self::try_get(front_end, queues, size).expect("an open connection")
    }

    /// Hands it over.
    #[track_caller]
    pub fn set(&self, front_end: &FrontEnd) -> Answer {
        front_end.attempt(
            code::SET_INFLIGHT_FD,
            &self.shape.encode(),
            &[self.file.as_fd()],
        )
    }

    /// Hands it over, which must be accepted.
    #[track_caller]
    pub fn hand_over(&self, front_end: &FrontEnd) {
        assert_eq!(self.set(front_end), Answer::Accepted);
    }

    /// Its file, to be sent along.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Where the region of a queue begins in the file.
    fn region(&self, queue: u16) -> u64 {
        let bytes = HEAD_BYTES + ENTRY_BYTES * u64::from(self.shape.size);
        self.shape.offset + bytes.next_multiple_of(ALIGNMENT) * u64::from(queue)
    }

    /// Reads bytes of a region.
    fn read<const N: usize>(&self, queue: u16, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let place = self.region(queue) + at;
        self.file
            .read_exact_at(&mut bytes, place)
            .expect("a whole buffer");
        bytes
    }

    /// Writes bytes of a region.
    fn write(&self, queue: u16, at: u64, bytes: &[u8]) {
        let place = self.region(queue) + at;
        self.file
            .write_all_at(bytes, place)
            .expect("a whole buffer");
    }

    /// The features of a region.
    pub fn features(&self, queue: u16) -> u64 {
        u64::from_le_bytes(self.read(queue, 0))
    }

    /// Sets them.
    pub fn set_features(&self, queue: u16, features: u64) {
        self.write(queue, 0, &features.to_le_bytes());
    }

    /// The version of a region, its entries, the head of its list and its used index.
    pub fn head(&self, queue: u16) -> [u16; 4] {
        [8, 10, 12, 14].map(|at| u16::from_le_bytes(self.read(queue, at)))
    }

    /// Sets them.
    pub fn set_head(&self, queue: u16, head: [u16; 4]) {
        self.write(queue, 8, &head.map(u16::to_le_bytes).concat());
    }

    /// An entry.
    pub fn entry(&self, queue: u16, head: u16) -> Entry {
        let at = HEAD_BYTES + ENTRY_BYTES * u64::from(head);
        let [in_flight] = self.read(queue, at);
        Entry {
            in_flight,
            next: u16::from_le_bytes(self.read(queue, at + 6)),
            counter: u64::from_le_bytes(self.read(queue, at + 8)),
        }
    }

    /// Sets an entry.
    pub fn set_entry(&self, queue: u16, head: u16, entry: Entry) {
        let at = HEAD_BYTES + ENTRY_BYTES * u64::from(head);
        self.write(queue, at, &[entry.in_flight]);
        self.write(queue, at + 6, &entry.next.to_le_bytes());
        self.write(queue, at + 8, &entry.counter.to_le_bytes());
    }

    /// The heads that are under way.
    pub fn under_way(&self, queue: u16) -> Vec<u16> {
        (0..self.shape.size)
            .filter(|head| self.entry(queue, *head).in_flight != 0)
            .collect()
    }
}
