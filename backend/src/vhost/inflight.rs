//! The inflight buffer: which requests are under way, in memory that outlives this process.
//!
//! The front-end keeps the file. It asks for one (GET_INFLIGHT_FD), hands it back before its rings start
//! (SET_INFLIGHT_FD), and hands it to whoever serves the rings after us. What is written into it, and in which order, is
//! [`crate::virtio::tracker`]'s business; here is where it lies and who may believe it.
//!
//! # Layout
//! SPEC: vhost-user, "Inflight I/O tracking", split virtqueues. One region a queue, one after the other, each of them rounded
//! up to 64 bytes as all known back-ends do. The numbers are in the byte order of the host.
//! ```text
//! 0   u64 features           0: nothing more is known than what follows
//! 8   u16 version            1; 0: nothing was ever written, all else is to be zeroed
//! 10  u16 desc_num           entries of the queue
//! 12  u16 last_batch_head    the list of the heads that were returned last
//! 14  u16 used_idx           the used index as of the last time that all flags were right
//! 16  desc_num entries, one a head:
//!     0  u8  inflight        whether it is under way
//!     6  u16 next            the list goes on there
//!     8  u64 counter         orders the heads as they were taken
//! ```
//!
//! # Whom to believe
//! Nobody: the front-end, or an older back-end, can have written anything. Numbers of a message are bounded before they are
//! multiplied, not more is mapped than they need, every field is read at most once a use, heads are compared with the
//! number of entries, and a file that is cut later costs its front-end the disk (see [`super::guard`]).

use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use vhost::vhost_user::message::{DescStateSplit, QueueRegionSplit, VhostUserInflight};
use vm_memory::AtomicInteger;
use vm_memory::volatile_memory::VolatileMemory;

use super::guard;
use super::mapping::Mapping;
use crate::virtio::ring::RING_SIZE_MAX;
use crate::virtio::store::store;

/// The version of a region that is known.
const VERSION: u16 = 1;
/// The number that is given to no request: at head 0 it says that a ring was started.
pub const STARTED: u64 = 1;
/// What the size of a region is a multiple of.
const REGION_ALIGNMENT: u64 = 64;
/// What the offset of the buffer must be a multiple of, for its numbers to be read whole.
const FIELD_ALIGNMENT: u64 = 8;

/// Where the fields of a region lie.
const FEATURES: usize = offset_of!(QueueRegionSplit, features);
const REGION_VERSION: usize = offset_of!(QueueRegionSplit, version);
const ENTRY_COUNT: usize = offset_of!(QueueRegionSplit, desc_num);
const LAST_BATCH_HEAD: usize = offset_of!(QueueRegionSplit, last_batch_head);
const USED_INDEX: usize = offset_of!(QueueRegionSplit, used_idx);
const ENTRIES: usize = offset_of!(QueueRegionSplit, desc);
/// Bytes of an entry, and where its fields lie.
const ENTRY_BYTES: usize = size_of::<DescStateSplit>();
const IN_FLIGHT: usize = offset_of!(DescStateSplit, inflight);
const NEXT: usize = offset_of!(DescStateSplit, next);
const COUNTER: usize = offset_of!(DescStateSplit, counter);

/// An error of our own making.
fn refused(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what.into())
}

/// Bytes of the region of a queue with so many entries.
fn region_bytes(entries: u16) -> u64 {
    let bytes = ENTRIES + ENTRY_BYTES * usize::from(entries);
    (bytes as u64).next_multiple_of(REGION_ALIGNMENT)
}

/// Bytes of a buffer of this shape, if it can be one of a device with `queues_max` queues.
fn buffer_bytes(shape: &VhostUserInflight, queues_max: u16) -> io::Result<u64> {
    // The fields of the message are packed.
    let (queues, entries) = (shape.num_queues, shape.queue_size);
    if !(1..=queues_max).contains(&queues) || !(1..=RING_SIZE_MAX).contains(&entries) {
        return Err(refused(format!(
            "an inflight buffer for {queues} queues of {entries} entries; \
             the device has {queues_max} queues of at most {RING_SIZE_MAX}"
        )));
    }
    Ok(region_bytes(entries) * u64::from(queues))
}

/// Whether the front-end has taken a buffer away.
fn is_lost(mapping: &Mapping) -> bool {
    let _exact = guard::losses();
    mapping.is_lost()
}

/// A mapped inflight buffer.
#[derive(Debug)]
pub struct InflightBuffer {
    /// All regions, and nothing behind them.
    mapping: Arc<Mapping>,
    /// How many regions there are.
    queues: u16,
    /// Entries of each of them.
    entries: u16,
    /// Whether somebody had taken requests with it before it was handed to us.
    has_history: bool,
}

/// The region of one queue.
#[derive(Clone, Debug)]
pub struct QueueRegion {
    /// What it lies in.
    mapping: Arc<Mapping>,
    /// Where it begins.
    start: usize,
    /// How many heads it has a place for.
    entries: u16,
}

impl InflightBuffer {
    /// Makes a buffer of the shape that is asked for. Returns what to answer. Nothing of it is kept.
    ///
    /// The file can neither shrink nor grow, so that nobody faults on it.
    ///
    /// # Errors
    /// `InvalidInput` for a shape that the device cannot have; the host's answer.
    pub fn create(
        asked: &VhostUserInflight,
        queues_max: u16,
    ) -> io::Result<(VhostUserInflight, File)> {
        let bytes = buffer_bytes(asked, queues_max)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("stratablk-inflight", flags)?);
        file.set_len(bytes)?;
        let (queues, entries) = (asked.num_queues, asked.queue_size);
        let buffer = Self {
            mapping: Arc::new(Mapping::shared(&file, 0, bytes)?),
            queues,
            entries,
            has_history: false,
        };
        for region in (0..queues).filter_map(|queue| buffer.region(queue)) {
            // All else is zero already, and takes no memory until it is written.
            region.store::<AtomicU16>(ENTRY_COUNT, entries);
            region.store::<AtomicU16>(REGION_VERSION, VERSION);
        }
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok((VhostUserInflight::new(bytes, 0, queues, entries), file))
    }

    /// Maps a buffer as a front-end hands it over. The caller closes the file.
    ///
    /// # Errors
    /// `InvalidInput` for a shape that the device cannot have, a place in the file that does not hold it, or a region of a
    /// kind that is not known; otherwise the host's answer.
    pub fn map(file: &File, given: &VhostUserInflight, queues_max: u16) -> io::Result<Self> {
        let bytes = buffer_bytes(given, queues_max)?;
        let (size, offset) = (given.mmap_size, given.mmap_offset);
        if size < bytes || offset.checked_add(size).is_none() {
            return Err(refused(format!(
                "{size} bytes at {offset} do not hold the inflight buffer of {bytes}"
            )));
        }
        if !offset.is_multiple_of(FIELD_ALIGNMENT) {
            return Err(refused(format!(
                "the inflight buffer begins at {offset}, which is no multiple of {FIELD_ALIGNMENT}"
            )));
        }
        let mut buffer = Self {
            mapping: Arc::new(Mapping::shared(file, offset, bytes)?),
            queues: given.num_queues,
            entries: given.queue_size,
            has_history: false,
        };
        let mut has_history = false;
        for region in (0..buffer.queues).filter_map(|queue| buffer.region(queue)) {
            region.check()?;
            has_history |= region.has_history();
        }
        if is_lost(&buffer.mapping) {
            return Err(refused("the inflight buffer was cut while it was read"));
        }
        buffer.has_history = has_history;
        Ok(buffer)
    }

    /// Its file, and its shape and place in it as a front-end hands it over.
    pub fn source(&self) -> (&Arc<OwnedFd>, VhostUserInflight) {
        let (file, offset) = self.mapping.source();
        let bytes = self.mapping.len() as u64;
        let shape = VhostUserInflight::new(bytes, offset, self.queues, self.entries);
        (file, shape)
    }

    /// Whether somebody had taken requests with it before it was handed to us: then the machine goes on.
    pub fn has_history(&self) -> bool {
        self.has_history
    }

    /// The region of this queue, if it has one.
    pub fn region(&self, queue: u16) -> Option<QueueRegion> {
        let bytes = usize::try_from(region_bytes(self.entries)).ok()?;
        (queue < self.queues).then(|| QueueRegion {
            mapping: Arc::clone(&self.mapping),
            start: usize::from(queue) * bytes,
            entries: self.entries,
        })
    }
}

impl QueueRegion {
    /// How many heads it has a place for.
    pub fn entries(&self) -> u16 {
        self.entries
    }

    /// Whether the front-end has taken the buffer away, so that it holds zeroes.
    pub fn is_lost(&self) -> bool {
        is_lost(&self.mapping)
    }

    /// Whether the region is of a kind that is known, or was never written.
    ///
    /// # Errors
    /// It is neither.
    pub fn check(&self) -> io::Result<()> {
        let version = self.version();
        let features = self.load::<AtomicU64>(FEATURES);
        let entries = self.load::<AtomicU16>(ENTRY_COUNT);
        if version == 0 || (version, features, entries) == (VERSION, 0, self.entries()) {
            return Ok(());
        }
        Err(refused(format!(
            "an inflight region of version {version} with features {features:#x} and {entries} entries; \
             known is version {VERSION} without features, of {} entries",
            self.entries()
        )))
    }

    /// Its version; 0 if it was never written.
    pub fn version(&self) -> u16 {
        self.load::<AtomicU16>(REGION_VERSION)
    }

    /// Makes it one that nobody has used. The version comes last, so that it is there only if all else is.
    pub fn initialize(&self) {
        self.store::<AtomicU16>(REGION_VERSION, 0);
        self.store::<AtomicU64>(FEATURES, 0);
        self.store::<AtomicU16>(ENTRY_COUNT, self.entries());
        self.set_last_batch_head(0);
        self.set_used_index(0);
        for head in 0..self.entries() {
            self.set_in_flight(head, false);
            self.set_next(head, 0);
            self.set_counter(head, 0);
        }
        self.store::<AtomicU16>(REGION_VERSION, VERSION);
    }

    /// Whether a ring was started with it, by us or by another back-end that took a request from it.
    pub fn was_started(&self) -> bool {
        self.has_number_above(0)
    }

    /// Notes that a ring is started with it. It begins where the front-end says, this time only.
    pub fn start(&self) {
        self.set_counter(0, STARTED);
    }

    /// Whether requests were taken with it.
    ///
    /// A head that was taken leaves its number, which is more than [`STARTED`] if it is ours. Others may count from 0; then
    /// the used index tells it, unless it has just come around, when the other numbers do.
    pub fn has_history(&self) -> bool {
        self.has_number_above(STARTED)
    }

    /// Whether anything but the numbers up to `bound` says that the region was used, or a number above does.
    fn has_number_above(&self, bound: u64) -> bool {
        let tells = |head| self.in_flight(head) || self.counter(head) > bound;
        self.version() != 0
            && (self.used_index() != 0
                || self.last_batch_head() != 0
                || (0..self.entries()).any(tells))
    }

    /// The used index as of the last time that all flags were right.
    pub fn used_index(&self) -> u16 {
        self.load::<AtomicU16>(USED_INDEX)
    }

    /// Says that all flags are right as of this used index.
    pub fn set_used_index(&self, index: u16) {
        self.store::<AtomicU16>(USED_INDEX, index);
    }

    /// Where the list of heads that were returned last begins.
    pub fn last_batch_head(&self) -> u16 {
        self.load::<AtomicU16>(LAST_BATCH_HEAD)
    }

    /// Lets the list of heads that were returned last begin there.
    pub fn set_last_batch_head(&self, head: u16) {
        self.store::<AtomicU16>(LAST_BATCH_HEAD, head);
    }

    /// Whether a head is under way. One that does not exist is not.
    pub fn in_flight(&self, head: u16) -> bool {
        self.load_of::<AtomicU8>(head, IN_FLIGHT) != 0
    }

    /// Says whether a head is under way.
    pub fn set_in_flight(&self, head: u16, is: bool) {
        self.store_of::<AtomicU8>(head, IN_FLIGHT, u8::from(is));
    }

    /// The head behind this one in the list of those that were returned last.
    pub fn next(&self, head: u16) -> u16 {
        self.load_of::<AtomicU16>(head, NEXT)
    }

    /// Puts a head behind this one.
    pub fn set_next(&self, head: u16, next: u16) {
        self.store_of::<AtomicU16>(head, NEXT, next);
    }

    /// The number under which a head was taken.
    pub fn counter(&self, head: u16) -> u64 {
        self.load_of::<AtomicU64>(head, COUNTER)
    }

    /// Says under which number a head was taken.
    pub fn set_counter(&self, head: u16, counter: u64) {
        self.store_of::<AtomicU64>(head, COUNTER, counter);
    }

    /// A field of the region. `None` cannot be: all callers stay inside, and the buffer is aligned.
    #[inline]
    fn field<T: AtomicInteger>(&self, offset: usize) -> Option<&T> {
        let field = self.mapping.get_atomic_ref(self.start + offset);
        debug_assert!(field.is_ok(), "{offset} of a region");
        field.ok()
    }

    /// Where a field of an entry lies, if there is such an entry.
    #[inline]
    fn place(&self, head: u16, field: usize) -> Option<usize> {
        let exists = head < self.entries() || crate::canary::is_on();
        exists.then(|| ENTRIES + ENTRY_BYTES * usize::from(head) + field)
    }

    /// Reads a field.
    ///
    /// ORDERING: Acquire. The stores were made by a process that is dead, or by this thread; the front-end may make others at
    /// any time, with which there is nothing to agree upon.
    #[inline]
    fn load<T: AtomicInteger<V: Default>>(&self, offset: usize) -> T::V {
        let field = self.field::<T>(offset);
        field.map_or_else(T::V::default, |field| field.load(Ordering::Acquire))
    }

    /// Writes a field.
    ///
    /// ORDERING: Release, every one of them: no store then comes before one that stands before it in the program, to a
    /// region or to the used ring, neither in what the compiler makes of it nor in memory. So what a process leaves that is
    /// killed at any instant is what it had stored up to some point of its program. Who reads it next does so after the
    /// kernel has ended this process and handed it the file, which is as good as any fence.
    #[inline]
    fn store<T: AtomicInteger>(&self, offset: usize, value: T::V) {
        if let Some(field) = self.field::<T>(offset) {
            store(field, value, Ordering::Release);
        }
    }

    /// Reads a field of an entry; 0 if there is no such entry.
    #[inline]
    fn load_of<T: AtomicInteger<V: Default>>(&self, head: u16, field: usize) -> T::V {
        let place = self.place(head, field);
        place.map_or_else(T::V::default, |place| self.load::<T>(place))
    }

    /// Writes a field of an entry, if there is such an entry.
    #[inline]
    fn store_of<T: AtomicInteger>(&self, head: u16, field: usize, value: T::V) {
        if let Some(place) = self.place(head, field) {
            self.store::<T>(place, value);
        }
    }
}
