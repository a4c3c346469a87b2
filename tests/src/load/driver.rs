//! A vhost-user-blk front-end on the crate `virtio-driver`: some queues, each with a fixed number of slots for requests.
//!
//! INVARIANT: a slot is idle (its buffer belongs to the caller) or under way (it belongs to the back-end).
//! One thread drives all queues, so that the order in which it sees completions and issues requests is total.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};

use super::memory::DmaMemory;

/// Descriptors of a request: header, data (or a range), status.
const REQUEST_DESCRIPTORS: usize = 3;
/// Entries of the smallest ring in use.
const RING_ENTRIES_MIN: usize = 128;
/// Entries of the largest ring that every back-end takes.
const RING_ENTRIES_MAX: usize = 1024;
/// Buffers start at multiples of this.
const BUFFER_ALIGNMENT: usize = 4096;
/// The most slots of a queue.
pub const DEPTH_MAX: usize = RING_ENTRIES_MAX / REQUEST_DESCRIPTORS;

/// How to connect.
#[derive(Clone, Debug)]
pub struct Options {
    /// The back-end's socket.
    pub socket: PathBuf,
    /// Virtqueues to set up.
    pub queues: usize,
    /// Slots of each queue.
    pub depth: usize,
    /// Bytes of each slot's buffer.
    pub buffer_bytes: usize,
    /// How completions are awaited.
    pub wait: Wait,
    /// No completion for this long means that the back-end hangs.
    pub patience: Duration,
}

impl Options {
    /// One queue, 32 slots of 4 KiB, asleep while waiting, 30 s of patience.
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_path_buf(),
            queues: 1,
            depth: 32,
            buffer_bytes: 4096,
            wait: Wait::Sleep,
            patience: Duration::from_secs(30),
        }
    }
}

/// How completions are awaited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Looks at the used ring all the time and asks for no call: a CPU is busy, no wake-up is measured.
    Spin,
    /// Sleeps until the back-end calls.
    Sleep,
}

/// A request of the guest, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Fills the first `len` bytes of the slot's buffer.
    Read {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: usize,
    },
    /// Writes the first `len` bytes of the slot's buffer.
    Write {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: usize,
    },
    /// Makes what completed before survive power loss.
    Flush,
    /// The range is no longer needed.
    Discard {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// The range reads as zeroes afterwards.
    WriteZeroes {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
        /// Whether its space may be given back.
        unmap: bool,
    },
}

/// What went wrong between this front-end and the back-end.
#[derive(Debug)]
pub enum DriverError {
    /// No session could be set up.
    Connect {
        /// The back-end's socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A request could not be put into the ring, or the ring could not be watched.
    Ring(io::Error),
    /// The caller asked for something that cannot be.
    Invalid(String),
    /// A request ended with an error.
    Failed {
        /// The request.
        request: Request,
        /// A negative errno by the status byte: EIO, ENOTSUP; EPROTO for an unknown status.
        errno: i32,
    },
    /// The back-end completed something that was not under way.
    Bogus {
        /// The queue.
        queue: usize,
    },
    /// Requests are under way, and none completed for as long as the patience lasts.
    Stuck {
        /// How many are under way.
        under_way: usize,
        /// How long nothing completed.
        patience: Duration,
    },
}

impl fmt::Display for DriverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect { socket, source } => {
                write!(f, "connect to {}: {source}", socket.display())
            }
            Self::Ring(source) => write!(f, "ring: {source}"),
            Self::Invalid(what) => write!(f, "{what}"),
            Self::Failed { request, errno } => {
                write!(
                    f,
                    "{request:?} failed: {}",
                    io::Error::from_raw_os_error(-errno)
                )
            }
            Self::Bogus { queue } => write!(
                f,
                "queue {queue}: the back-end completed a request that was not under way"
            ),
            Self::Stuck {
                under_way,
                patience,
            } => {
                write!(
                    f,
                    "{under_way} requests are under way and none completed for {patience:?}"
                )
            }
        }
    }
}

impl std::error::Error for DriverError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Connect { source, .. } | Self::Ring(source) => Some(source),
            _ => None,
        }
    }
}

/// The end of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Its slot, idle again.
    pub slot: usize,
    /// What it was.
    pub request: Request,
}

/// One virtqueue.
struct Queue {
    /// The ring; a request's context is its slot.
    ring: VirtioBlkQueue<'static, usize>,
    /// Kicks the back-end.
    notifier: Box<dyn QueueNotifier>,
    /// Readable after the back-end called.
    call: Arc<EventFd>,
    /// What each slot is doing; `None` if it is idle.
    slots: Vec<Option<Request>>,
    /// Whether requests were queued since the last kick.
    unannounced: bool,
}

/// A session with a back-end.
pub struct Driver {
    /// Dropped before the transport, whose memory holds the rings.
    queues: Vec<Queue>,
    /// Owns the connection and the rings' memory.
    transport: Box<VirtioBlkTransport>,
    /// The buffers of all slots.
    memory: DmaMemory,
    /// From one buffer to the next.
    buffer_stride: usize,
    /// As asked for.
    options: Options,
    /// Bytes of the disk.
    capacity_bytes: u64,
    /// Requests under way on all queues.
    under_way: usize,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver")
            .field("options", &self.options)
            .field("capacity_bytes", &self.capacity_bytes)
            .field("under_way", &self.under_way)
            .finish_non_exhaustive()
    }
}

impl Driver {
    /// Connects, negotiates and starts the queues.
    ///
    /// # Errors
    /// `Invalid` for impossible options; `Connect` for everything else.
    pub fn connect(options: Options) -> Result<Self, DriverError> {
        if options.depth == 0 || options.depth > DEPTH_MAX {
            return Err(DriverError::Invalid(format!(
                "a depth of {} is not within 1 to {DEPTH_MAX}",
                options.depth
            )));
        }
        if options.queues == 0 || options.buffer_bytes == 0 {
            return Err(DriverError::Invalid(
                "there must be at least one queue and one byte of buffer".into(),
            ));
        }
        let failed = |source| DriverError::Connect {
            socket: options.socket.clone(),
            source,
        };
        let socket = options
            .socket
            .to_str()
            .ok_or_else(|| DriverError::Invalid(format!("{:?} is not UTF-8", options.socket)))?;
        let buffer_stride = options.buffer_bytes.next_multiple_of(BUFFER_ALIGNMENT);
        let memory = buffer_stride
            .checked_mul(options.queues)
            .and_then(|bytes| bytes.checked_mul(options.depth))
            .ok_or_else(|| DriverError::Invalid("the buffers do not fit in memory".into()))
            .and_then(|bytes| DmaMemory::new(bytes).map_err(failed))?;

        let wanted = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | (VirtioBlkFeatureFlags::SEG_MAX
                | VirtioBlkFeatureFlags::RO
                | VirtioBlkFeatureFlags::BLK_SIZE
                | VirtioBlkFeatureFlags::TOPOLOGY
                | VirtioBlkFeatureFlags::FLUSH
                | VirtioBlkFeatureFlags::MQ
                | VirtioBlkFeatureFlags::DISCARD
                | VirtioBlkFeatureFlags::WRITE_ZEROES)
                .bits();
        let mut transport: Box<VirtioBlkTransport> =
            Box::new(VhostUser::new(socket, wanted).map_err(failed)?);
        // The buffers before the queues: from `setup_queues` on, the rings run.
        transport
            .map_mem_region(memory.address(), memory.len(), memory.fd(), 0)
            .map_err(failed)?;
        let entries = (options.depth * REQUEST_DESCRIPTORS)
            .next_power_of_two()
            .max(RING_ENTRIES_MIN);
        let entries = u16::try_from(entries).map_err(|error| failed(io::Error::other(error)))?;
        let rings = VirtioBlkQueue::setup_queues(&mut *transport, options.queues, entries)
            .map_err(failed)?;
        let event_idx = transport.get_features() & VirtioFeatureFlags::RING_EVENT_IDX.bits() != 0;
        let queues = rings
            .into_iter()
            .enumerate()
            .map(|(index, mut ring)| {
                match options.wait {
                    Wait::Sleep => ring.set_used_notif_enabled(true),
                    // With EVENT_IDX the event field is left where it is: a call once in 65,536 completions.
                    // "Disabling" would ask for a call at the very next one.
                    Wait::Spin if event_idx => {}
                    Wait::Spin => ring.set_used_notif_enabled(false),
                }
                Queue {
                    ring,
                    notifier: transport.get_submission_notifier(index),
                    call: transport.get_completion_fd(index),
                    slots: vec![None; options.depth],
                    unannounced: false,
                }
            })
            .collect();
        let capacity_sectors = u64::from(transport.get_config().map_err(failed)?.capacity);
        let capacity_bytes = capacity_sectors
            .checked_mul(512)
            .ok_or_else(|| failed(io::Error::other("the capacity does not fit in 64 bits")))?;
        Ok(Self {
            queues,
            transport,
            memory,
            buffer_stride,
            options,
            capacity_bytes,
            under_way: 0,
        })
    }

    /// Bytes of the disk.
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// The negotiated feature bits.
    pub fn features(&self) -> u64 {
        self.transport.get_features()
    }

    /// As connected.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Requests submitted and not yet polled, on all queues.
    pub fn under_way(&self) -> usize {
        self.under_way
    }

    /// The buffer of an idle slot.
    ///
    /// # Panics
    /// If there is no such slot or its request is under way.
    pub fn buffer(&self, queue: usize, slot: usize) -> &[u8] {
        let offset = self.idle_offset(queue, slot);
        self.memory.slice(offset, self.options.buffer_bytes)
    }

    /// The buffer of an idle slot, to fill.
    ///
    /// # Panics
    /// If there is no such slot or its request is under way.
    pub fn buffer_mut(&mut self, queue: usize, slot: usize) -> &mut [u8] {
        let offset = self.idle_offset(queue, slot);
        self.memory.slice_mut(offset, self.options.buffer_bytes)
    }

    /// Where the buffer of an idle slot lies.
    fn idle_offset(&self, queue: usize, slot: usize) -> usize {
        let state = self
            .queues
            .get(queue)
            .and_then(|queue| queue.slots.get(slot));
        assert!(state.is_some(), "there is no slot {slot} in queue {queue}");
        assert!(
            state == Some(&None),
            "the request in slot {slot} of queue {queue} is under way"
        );
        self.buffer_offset(queue, slot)
    }

    /// Where the buffer of a slot lies.
    fn buffer_offset(&self, queue: usize, slot: usize) -> usize {
        (queue * self.options.depth + slot) * self.buffer_stride
    }

    /// Puts a request into the ring. The back-end hears of it at the next `kick` at the latest.
    ///
    /// # Errors
    /// `Invalid` if it does not fit in the buffer or its address is not whole sectors; `Ring` if the ring is full.
    ///
    /// # Panics
    /// If there is no such slot or its request is under way.
    #[inline]
    pub fn submit(
        &mut self,
        queue: usize,
        slot: usize,
        request: Request,
    ) -> Result<(), DriverError> {
        let offset = self.idle_offset(queue, slot);
        let buffer_bytes = self.options.buffer_bytes;
        let buffer = |len: usize| {
            if len > buffer_bytes {
                return Err(DriverError::Invalid(format!(
                    "{len} bytes do not fit in a buffer of {buffer_bytes}"
                )));
            }
            Ok(self.memory.pointer(offset, len))
        };
        let Some(target) = self.queues.get_mut(queue) else {
            return Err(DriverError::Invalid(format!("there is no queue {queue}")));
        };
        match request {
            Request::Read { offset, len } => {
                let start = buffer(len)?;
                // SAFETY:
                // - the buffer lies inside the mapping, which outlives the ring;
                // - nobody looks at it until the slot is idle again.
                #[expect(unsafe_code, reason = "the back-end writes to the buffer")]
                unsafe {
                    target.ring.read_raw(offset, start, len, slot)
                }
            }
            Request::Write { offset, len } => {
                let start = buffer(len)?;
                // SAFETY:
                // - the buffer lies inside the mapping, which outlives the ring;
                // - nobody changes it until the slot is idle again.
                #[expect(unsafe_code, reason = "the back-end reads the buffer")]
                unsafe {
                    target.ring.write_raw(offset, start, len, slot)
                }
            }
            Request::Flush => target.ring.flush(slot),
            Request::Discard { offset, len } => target.ring.discard(offset, len, slot),
            Request::WriteZeroes { offset, len, unmap } => {
                target.ring.write_zeroes(offset, len, unmap, slot)
            }
        }
        .map_err(DriverError::Ring)?;
        if let Some(state) = target.slots.get_mut(slot) {
            *state = Some(request);
        }
        target.unannounced = true;
        self.under_way += 1;
        Ok(())
    }

    /// Tells the back-end of the requests submitted to `queue` since the last kick, if it wants to be told.
    ///
    /// # Errors
    /// `Ring` if the kick cannot be sent.
    #[inline]
    pub fn kick(&mut self, queue: usize) -> Result<(), DriverError> {
        let Some(queue) = self.queues.get_mut(queue).filter(|queue| queue.unannounced) else {
            return Ok(());
        };
        queue.unannounced = false;
        // ORDERING: SeqCst; without EVENT_IDX the crate has no fence between its store of the available index and
        // its load of the device's flags. Pairs with the back-end's fence between clearing that flag and looking again.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        if queue.ring.avail_notif_needed() {
            queue.notifier.notify().map_err(DriverError::Ring)?;
        }
        Ok(())
    }

    /// Appends the requests of `queue` that have ended to `done`; does not wait.
    ///
    /// # Errors
    /// `Failed` if one ended with an error; `Bogus` if the back-end completed what was not under way.
    #[inline]
    pub fn poll(&mut self, queue: usize, done: &mut Vec<Done>) -> Result<(), DriverError> {
        let Some(target) = self.queues.get_mut(queue) else {
            return Ok(());
        };
        let mut ended = target.ring.completions();
        while ended.has_next() {
            let completion = ended.next().ok_or(DriverError::Bogus { queue })?;
            let slot = completion.context;
            let request = target
                .slots
                .get_mut(slot)
                .and_then(Option::take)
                .ok_or(DriverError::Bogus { queue })?;
            self.under_way -= 1;
            if completion.ret != 0 {
                return Err(DriverError::Failed {
                    request,
                    errno: completion.ret,
                });
            }
            done.push(Done { slot, request });
        }
        Ok(())
    }

    /// Waits until the back-end calls on any queue, for a driver connected with [`Wait::Sleep`]; looks at the rings once
    /// more before it sleeps. May return early.
    ///
    /// # Errors
    /// `Stuck` if nothing happens for as long as the patience lasts; `Ring` if the host refuses to wait.
    pub fn wait(&mut self) -> Result<(), DriverError> {
        if self.options.wait == Wait::Spin || self.under_way == 0 || self.has_completions() {
            return Ok(());
        }
        if self.sleep(self.options.patience)? {
            return Ok(());
        }
        Err(DriverError::Stuck {
            under_way: self.under_way,
            patience: self.options.patience,
        })
    }

    /// As `wait`, but until `deadline` at the latest, whether or not anything is under way.
    ///
    /// # Errors
    /// `Ring` if the host refuses to wait.
    pub fn wait_until(&mut self, deadline: Instant) -> Result<(), DriverError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || self.has_completions() {
            return Ok(());
        }
        self.sleep(left).map(|_called| ())
    }

    /// Whether there is a completion that was not looked at.
    fn has_completions(&mut self) -> bool {
        let mut queues = self.queues.iter_mut();
        queues.any(|queue| queue.ring.completions().has_next())
    }

    /// Sleeps until the back-end calls. Returns `false` if `timeout` has passed before.
    fn sleep(&self, timeout: Duration) -> Result<bool, DriverError> {
        let timeout = Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        let calls: Vec<_> = self
            .queues
            .iter()
            .map(|queue| Arc::clone(&queue.call))
            .collect();
        let mut fds: Vec<PollFd<'_>> = calls
            .iter()
            .map(|call| {
                let fd: BorrowedFd<'_> = call.as_fd();
                PollFd::from_borrowed_fd(fd, PollFlags::IN)
            })
            .collect();
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(DriverError::Ring(errno.into())),
        }
        for (call, fd) in calls.iter().zip(&fds) {
            if fd.revents().contains(PollFlags::IN) {
                call.read().map_err(DriverError::Ring)?;
            }
        }
        Ok(true)
    }

    /// Waits until a request of `queue` ends; appends what ended there to `done`.
    ///
    /// # Errors
    /// As `poll` and `wait`.
    pub fn wait_for(&mut self, queue: usize, done: &mut Vec<Done>) -> Result<(), DriverError> {
        let start = Instant::now();
        let before = done.len();
        loop {
            self.poll(queue, done)?;
            if done.len() > before {
                return Ok(());
            }
            if start.elapsed() > self.options.patience {
                return Err(DriverError::Stuck {
                    under_way: self.under_way,
                    patience: self.options.patience,
                });
            }
            self.wait()?;
            std::hint::spin_loop();
        }
    }

    /// Carries out one request alone, in the first slot of `queue`.
    ///
    /// # Errors
    /// As `submit`, `poll` and `wait`.
    ///
    /// # Panics
    /// If other requests are under way on that queue.
    pub fn run(&mut self, queue: usize, request: Request) -> Result<(), DriverError> {
        assert!(
            self.queues
                .get(queue)
                .is_some_and(|queue| queue.slots.iter().all(Option::is_none)),
            "other requests of queue {queue} are under way"
        );
        self.submit(queue, 0, request)?;
        self.kick(queue)?;
        self.wait_for(queue, &mut Vec::new())
    }

    /// Reads `start .. start + len` through all slots of the first queue, and shows each piece to `look`, in any order.
    ///
    /// # Errors
    /// As `submit`, `poll` and `wait`.
    ///
    /// # Panics
    /// If other requests are under way on the first queue.
    pub fn scan(
        &mut self,
        start: u64,
        len: u64,
        mut look: impl FnMut(u64, &[u8]),
    ) -> Result<(), DriverError> {
        let end = start.checked_add(len).ok_or_else(|| {
            DriverError::Invalid(format!("{start}+{len} does not fit in 64 bits"))
        })?;
        let piece = self.options.buffer_bytes as u64;
        let mut next = start;
        let mut busy = 0;
        let mut done: Vec<Done> = Vec::new();
        let mut idle: Vec<usize> = (0..self.options.depth).collect();
        while next < end || busy > 0 {
            while let Some(slot) = idle.pop_if(|_| next < end) {
                let len = piece.min(end - next);
                let bytes = usize::try_from(len)
                    .map_err(|error| DriverError::Invalid(error.to_string()))?;
                self.submit(
                    0,
                    slot,
                    Request::Read {
                        offset: next,
                        len: bytes,
                    },
                )?;
                next += len;
                busy += 1;
            }
            self.kick(0)?;
            self.wait_for(0, &mut done)?;
            for ended in done.drain(..) {
                busy -= 1;
                if let Request::Read { offset, len } = ended.request {
                    look(
                        offset,
                        self.buffer(0, ended.slot).get(..len).unwrap_or_default(),
                    );
                }
                idle.push(ended.slot);
            }
        }
        Ok(())
    }
}
