//! What a context remembers of requests and operations under way.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::cache::Span;
use crate::cache::access::Ticket;
use crate::chain::Chain;
use crate::file::{FileToken, IoOp, Segment};
use crate::flush::zeroes::ZeroRange;
use crate::units::SectorRange;
use crate::volume::{Durability, RequestError};

use super::era::EraId;

/// A request under way.
#[derive(Debug)]
pub struct Request {
    /// The caller's number.
    pub token: u64,
    /// What its completion promises.
    pub durability: Durability,
    /// The era it runs in, until its last part has ended; none for a flush.
    pub era: Option<EraId>,
    /// Whether it changes the disk.
    pub changes: bool,
    /// Operations under way, and one more until all are submitted.
    pub parts: usize,
    /// The first failure.
    pub error: Option<RequestError>,
    /// The chain it reads from, where that is not its era's.
    pub chain: Option<Arc<Chain>>,
    /// Clusters that it zeroes, once the rest of it is done.
    pub zero: Option<ZeroRange>,
    /// What it has asked who leads the flushes for, to ask again once there is room.
    pub asked: Asked,
}

/// What a request asks who leads the flushes for.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// Clusters to zero.
    pub zero: Option<ZeroRange>,
    /// Whether a flush is asked for, and not only that.
    pub flush: bool,
}

impl Request {
    /// A request of which nothing has begun.
    pub fn new(token: u64, durability: Durability) -> Self {
        Self {
            token,
            durability,
            era: None,
            changes: false,
            parts: 0,
            error: None,
            chain: None,
            zero: None,
            asked: Asked::default(),
        }
    }
}

/// What to do when an operation has ended.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// A part of a read is there.
    Read {
        /// For this request.
        request: usize,
    },
    /// Sectors of a cluster are there, to be kept in the cache and given to the guest.
    Fill {
        /// For this request.
        request: usize,
        /// Its number among the fills.
        fill: usize,
    },
    /// A step of the flush group.
    Group,
}

impl Step {
    /// The request that waits for it.
    pub fn request(&self) -> Option<usize> {
        match *self {
            Self::Read { request } | Self::Fill { request, .. } => Some(request),
            Self::Group => None,
        }
    }
}

/// A read or write of a batch whose turn has not come: see `QueueContext::carry_out_batch`.
#[derive(Clone, Copy, Debug)]
pub struct Deferred {
    /// The caller's number.
    pub token: u64,
    /// What its completion promises.
    pub durability: Durability,
    /// Whether it writes.
    pub write: bool,
    /// Which sectors.
    pub range: SectorRange,
    /// Its first segment in the batch's list.
    pub first: usize,
    /// How many there are.
    pub count: usize,
}

/// A cluster on its way from a file into a frame and to the guest.
#[derive(Debug)]
pub struct Fill {
    /// The claim on the frame.
    pub ticket: Ticket,
    /// The page it is read into.
    pub page: usize,
    /// What is read.
    pub read: Span,
    /// What the guest wants of it.
    pub wanted: Span,
    /// Where the guest wants it.
    pub pieces: Vec<Segment>,
}

/// A part of a request that was put aside, because somebody changes a frame that it needs or because no frame is free.
#[derive(Debug)]
pub struct Parked {
    /// For this request, which counts it as a part.
    pub request: usize,
    /// Whether it writes.
    pub write: bool,
    /// Which sectors.
    pub range: SectorRange,
    /// The guest's memory for them.
    pub segments: Vec<Segment>,
}

/// Things with small numbers that are used again.
#[derive(Debug)]
pub struct Slab<T> {
    /// By number.
    entries: Vec<Option<T>>,
    /// Numbers without a thing.
    free: Vec<usize>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> Slab<T> {
    /// Puts a thing in and returns its number.
    pub fn insert(&mut self, entry: T) -> usize {
        if let Some(number) = self.free.pop()
            && let Some(place) = self.entries.get_mut(number)
        {
            *place = Some(entry);
            return number;
        }
        self.entries.push(Some(entry));
        self.entries.len() - 1
    }

    /// The thing with this number.
    pub fn get(&self, number: usize) -> Option<&T> {
        self.entries.get(number)?.as_ref()
    }

    /// The thing with this number, to change.
    pub fn get_mut(&mut self, number: usize) -> Option<&mut T> {
        self.entries.get_mut(number)?.as_mut()
    }

    /// Takes the thing with this number out.
    pub fn remove(&mut self, number: usize) -> Option<T> {
        let entry = self.entries.get_mut(number)?.take();
        if entry.is_some() {
            self.free.push(number);
        }
        entry
    }

    /// How many things there are.
    pub fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// An operation with its own list of segments.
#[derive(Debug)]
pub struct OwnedOp {
    /// What to do.
    kind: OwnedKind,
    /// Which file.
    file: FileToken,
    /// First byte.
    offset: u64,
    /// Memory.
    segments: Vec<Segment>,
}

/// What an owned operation does.
#[derive(Clone, Copy, Debug)]
enum OwnedKind {
    /// `IoOp::Read`.
    Read,
    /// `IoOp::Write`.
    Write,
    /// `IoOp::SyncData`.
    SyncData,
    /// `IoOp::Punch` of so many bytes.
    Punch(u64),
}

impl OwnedOp {
    /// The operation, borrowed.
    pub fn as_op(&self) -> IoOp<'_> {
        let (file, offset, segments) = (self.file, self.offset, self.segments.as_slice());
        match self.kind {
            OwnedKind::Read => IoOp::Read {
                file,
                offset,
                segments,
            },
            OwnedKind::Write => IoOp::Write {
                file,
                offset,
                segments,
            },
            OwnedKind::SyncData => IoOp::SyncData { file },
            OwnedKind::Punch(len) => IoOp::Punch { file, offset, len },
        }
    }
}

/// Operations that wait for room in the engine, in order.
#[derive(Debug, Default)]
pub struct Backlog {
    /// Oldest first.
    queue: VecDeque<(OwnedOp, usize)>,
    /// Empty lists, to be used again.
    spare: Vec<Vec<Segment>>,
}

impl Backlog {
    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Appends a copy of an operation.
    pub fn push(&mut self, op: IoOp<'_>, user: usize) {
        let mut segments = self.spare.pop().unwrap_or_default();
        let (kind, file, offset) = match op {
            IoOp::Read {
                file,
                offset,
                segments: list,
            } => {
                segments.extend_from_slice(list);
                (OwnedKind::Read, file, offset)
            }
            IoOp::Write {
                file,
                offset,
                segments: list,
            } => {
                segments.extend_from_slice(list);
                (OwnedKind::Write, file, offset)
            }
            IoOp::SyncData { file } => (OwnedKind::SyncData, file, 0),
            IoOp::Punch { file, offset, len } => (OwnedKind::Punch(len), file, offset),
        };
        self.queue.push_back((
            OwnedOp {
                kind,
                file,
                offset,
                segments,
            },
            user,
        ));
    }

    /// Takes the oldest.
    pub fn pop(&mut self) -> Option<(OwnedOp, usize)> {
        self.queue.pop_front()
    }

    /// Keeps the list of an operation that was submitted.
    pub fn recycle(&mut self, mut op: OwnedOp) {
        op.segments.clear();
        self.spare.push(op.segments);
    }
}
