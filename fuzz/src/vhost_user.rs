//! Messages of a front-end, with descriptors of all kinds, to a real session with workers and a disk in memory.
//!
//! Input: bits that say how the front-end behaves, then steps: plausible messages, of which any byte, the length and the
//! descriptors may be changed; bytes that are no message; requests on a ring; memory that is cut.
//!
//! What must hold: the session goes on or ends; afterwards there are as many descriptors, threads and mappings as before.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use stratablk::signal::Signal;
use stratablk::vhost::features;
use stratablk::vhost::handler::{Handler, HandlerSetup};
use stratablk::vhost::session::{End, Outside, Patience, serve};
use stratablk::vhost::state::SessionState;
use stratablk::vhost::turn::Turns;
use stratablk::worker::counters::Counters;
use stratablk::worker::disk::{DiskContext, DiskSource};
use stratablk::worker::provider::AlwaysOpen;
use stratablk_layers::file::Segment;
use stratablk_layers::units::Sector;
use stratablk_layers::volume::{Completion, Durability, Operation};

use crate::host::leaves_nothing;
use crate::input::Input;

/// Bytes of the file behind guest memory.
const MEMORY: u64 = 0x10000;
/// The front-end's address of guest address 0.
const USER: u64 = 0x7f00_0000_0000;
/// Rings of the device.
const QUEUES: u16 = 4;
/// Steps of an input, at most.
const STEPS_MAX: usize = 64;
/// Descriptors that a message may bring.
const DESCRIPTORS_MAX: usize = 12;

/// A disk that answers everything at once.
#[derive(Debug)]
struct Ram {
    /// Answers.
    ready: Mutex<Vec<Completion>>,
}

/// Its context.
struct RamContext(Arc<Ram>);

impl DiskSource for Ram {
    type Context = RamContext;

    fn name(&self) -> &str {
        "ram"
    }

    fn capacity(&self) -> Sector {
        Sector(1000)
    }

    fn context(self: &Arc<Self>, _read_only: bool) -> stratablk_layers::Result<RamContext> {
        // Each worker has answers of its own.
        Ok(RamContext(Arc::new(Self {
            ready: Mutex::default(),
        })))
    }
}

impl DiskContext for RamContext {
    fn begin_batch(&mut self) {}

    #[expect(unsafe_code, reason = "the seam of a disk")]
    unsafe fn submit(
        &mut self,
        operation: Operation,
        _: Durability,
        segments: &[Segment],
        token: u64,
    ) {
        for segment in segments {
            for offset in 0..segment.len {
                let byte = segment.base.wrapping_add(offset);
                if matches!(operation, Operation::Read(_)) {
                    // SAFETY: the worker promised the memory until the completion is polled.
                    unsafe { byte.write_volatile(0x5a) };
                } else {
                    // SAFETY: as above.
                    unsafe { byte.read_volatile() };
                }
            }
        }
        let mut ready = self.0.ready.lock().unwrap_or_else(PoisonError::into_inner);
        ready.push(Completion {
            token,
            result: Ok(()),
        });
    }

    fn kick(&mut self) {}

    fn poll(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.0.ready.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn wake_fds(&self) -> Vec<RawFd> {
        Vec::new()
    }

    fn under_way(&self) -> usize {
        self.0
            .ready
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    fn end_held(&mut self, _chosen: &dyn Fn(u64) -> bool) -> bool {
        // Nothing of this disk waits for space.
        false
    }
}

/// What a front-end has.
struct FrontEnd {
    /// The connection.
    socket: UnixStream,
    /// The file behind guest memory.
    memory: File,
    /// The kick of all its rings.
    kick: File,
}

/// A message.
#[derive(Debug, Default)]
struct Message {
    /// Its number.
    code: u32,
    /// Its flags.
    flags: u32,
    /// Its body.
    body: Vec<u8>,
    /// The length that its header claims.
    size: u32,
    /// Kinds of descriptors.
    descriptors: Vec<u8>,
}

/// A file in memory.
fn memfd(len: u64) -> File {
    let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    let file = File::from(fd);
    file.set_len(len).expect("a memfd");
    file
}

/// An event fd.
fn event(flags: EventfdFlags) -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | flags).expect("an event fd")
}

impl FrontEnd {
    /// A descriptor of a kind.
    fn descriptor(&self, kind: u8) -> OwnedFd {
        match kind % 12 {
            0..3 => OwnedFd::from(self.memory.try_clone().expect("a descriptor")),
            3 => OwnedFd::from(memfd(MEMORY)),
            4 => OwnedFd::from(memfd(u64::from(kind))),
            5 | 6 => OwnedFd::from(self.kick.try_clone().expect("a descriptor")),
            7 => event(EventfdFlags::empty()),
            8 => event(EventfdFlags::NONBLOCK),
            9 => std::io::pipe().expect("a pipe").1.into(),
            10 => OwnedFd::from(File::open("/dev/null").expect("it is there")),
            _ => UnixStream::pair().expect("a pair").0.into(),
        }
    }

    /// Sends bytes. The other side may have gone.
    fn send(&mut self, bytes: &[u8], kinds: &[u8]) {
        if kinds.is_empty() {
            let _ = self.socket.write(bytes);
            return;
        }
        let descriptors: Vec<OwnedFd> = kinds.iter().map(|kind| self.descriptor(*kind)).collect();
        let lent: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(
            control.push(SendAncillaryMessage::ScmRights(&lent)),
            "there is room"
        );
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let _ = rustix::net::sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, flags);
    }

    /// Takes the answers that have come, so that their buffer does not fill up.
    fn drain(&mut self) {
        let mut buffer = [0; 4096];
        while self.socket.read(&mut buffer).is_ok_and(|count| count > 0) {}
    }

    /// Puts a request on the first ring, or on what might be one.
    fn request(&self, input: &mut Input<'_>) {
        let head = u16::from(input.u8() % 8);
        let mut table = Vec::new();
        let (len, flags) = (u32::from(input.u8()) * 16, input.u16());
        for (address, len, flags, next) in [
            (0x4000u64, 16u32, 1u16, head + 1),
            (0x5000, len, flags & 7, head + 2),
            (0x6000, 1, 2, 0),
        ] {
            table.extend(address.to_le_bytes());
            table.extend(len.to_le_bytes());
            table.extend(flags.to_le_bytes());
            table.extend(next.to_le_bytes());
        }
        let _ = self
            .memory
            .write_all_at(&table, 0x1000 + 16 * u64::from(head));
        let _ = self
            .memory
            .write_all_at(&[input.u8() % 16, 0, 0, 0, 0, 0, 0, 0, input.u8()], 0x4000);
        let mut index = [0; 2];
        let _ = self.memory.read_exact_at(&mut index, 0x2002);
        let index = u16::from_le_bytes(index);
        let _ = self
            .memory
            .write_all_at(&head.to_le_bytes(), 0x2004 + 2 * u64::from(index % 16));
        let _ = self
            .memory
            .write_all_at(&index.wrapping_add(1).to_le_bytes(), 0x2002);
        let _ = rustix::io::write(&self.kick, &1u64.to_ne_bytes());
    }
}

/// A number that is more often plausible than not.
fn near(input: &mut Input<'_>, usual: u64) -> u64 {
    match input.u8() {
        0 => usual,
        1 => input.u64(),
        2 => usual.wrapping_sub(1),
        3 => usual.wrapping_add(1),
        more => usual.wrapping_add(u64::from(more & 0xfc) << 6),
    }
}

/// A region of memory.
fn region(input: &mut Input<'_>) -> Vec<u8> {
    let place = u64::from(input.u8() % 4) * 0x4000;
    let mut body = Vec::new();
    let len = if place == 0 { MEMORY } else { 0x4000 };
    body.extend(near(input, place).to_le_bytes());
    body.extend(near(input, len).to_le_bytes());
    body.extend(near(input, USER + place).to_le_bytes());
    body.extend(near(input, if place == 0 { 0 } else { place }).to_le_bytes());
    body
}

/// A message that could be one.
fn message(input: &mut Input<'_>) -> Message {
    let code = u32::from(input.u8() % 46);
    let mut body = Vec::new();
    let mut descriptors = Vec::new();
    let ring = u32::from(input.u8() % 8) % (u32::from(QUEUES) + 1);
    match code {
        // Features: what is offered, less some.
        2 | 16 => {
            let offered = if code == 2 {
                features::offered(false) & !features::LOG_ALL
            } else {
                features::protocol().bits()
            };
            body.extend((offered & !near(input, 0)).to_le_bytes());
        }
        // A table of memory.
        5 => {
            let count = input.u8() % 5;
            body.extend(u32::from(count).to_le_bytes());
            body.extend([0; 4]);
            for _ in 0..count {
                body.extend(region(input));
            }
            descriptors.resize(usize::from(count), 0);
        }
        // A dirty log.
        6 => {
            body.extend(near(input, 0x1000).to_le_bytes());
            body.extend(near(input, 0).to_le_bytes());
            descriptors.push(3);
        }
        // Size, base, base again, enable.
        8 | 10 | 11 | 18 => {
            let usual = if code == 8 { 16 } else { u64::from(code == 18) };
            body.extend(ring.to_le_bytes());
            body.extend_from_slice(&near(input, usual).to_le_bytes()[..4]);
        }
        // Addresses.
        9 => {
            body.extend(ring.to_le_bytes());
            body.extend(u32::from(input.u8() & 1).to_le_bytes());
            for usual in [USER + 0x1000, USER + 0x3000, USER + 0x2000, 0x3000] {
                body.extend(near(input, usual).to_le_bytes());
            }
        }
        // Kick, call, error.
        12..=14 => {
            let poll = u64::from(input.u8() & 0x11) << 4;
            body.extend((u64::from(ring) | poll).to_le_bytes());
            if poll & 0x100 == 0 {
                descriptors.push(if code == 12 { 5 } else { 8 });
            }
        }
        // The way back.
        21 => descriptors.push(11),
        // The configuration space.
        24 | 25 => {
            let (offset, len) = (u32::from(input.u8()), u32::from(input.u8() % 64));
            body.extend(offset.to_le_bytes());
            body.extend(len.to_le_bytes());
            body.extend((u32::from(input.u8()) & 3).to_le_bytes());
            body.extend(input.bytes(usize::try_from(len).expect("small")));
            body.resize(12 + usize::try_from(len).expect("small"), 0);
        }
        // Inflight buffers.
        31 | 32 => {
            body.extend(near(input, 0x1000).to_le_bytes());
            body.extend(near(input, 0).to_le_bytes());
            body.extend_from_slice(&near(input, u64::from(QUEUES)).to_le_bytes()[..2]);
            body.extend_from_slice(&near(input, 16).to_le_bytes()[..2]);
            // As a structure in C ends.
            body.extend([0; 4]);
            if code == 32 {
                descriptors.push(3);
            }
        }
        // A region more, a region less.
        37 | 38 => {
            body.extend([0; 8]);
            body.extend(region(input));
            if code == 37 {
                descriptors.push(0);
            }
        }
        _ => {
            let len = usize::from(input.u8() % 32);
            body.extend(input.bytes(len));
        }
    }
    let size = u32::try_from(body.len()).expect("small");
    Message {
        code,
        flags: 1,
        body,
        size,
        descriptors,
    }
}

/// Changes a message.
fn spoil(message: &mut Message, input: &mut Input<'_>) {
    match input.u8() % 8 {
        0 => message.flags = input.u32(),
        1 => message.flags |= 8,
        2 => message.size = input.u32(),
        3 => {
            let place = usize::from(input.u16()) % message.body.len().max(1);
            let byte = input.u8();
            if let Some(place) = message.body.get_mut(place) {
                *place ^= byte;
            }
        }
        4 => message.body.truncate(usize::from(input.u8())),
        5 => {
            let count = usize::from(input.u8()) % (DESCRIPTORS_MAX + 1);
            message.descriptors = input.bytes(count).to_vec();
        }
        6 => {
            if let Some(kind) = message.descriptors.first_mut() {
                *kind = input.u8();
            }
        }
        _ => message.code = input.u32(),
    }
}

/// One input.
///
/// # Panics
/// If something is left over.
pub fn run(bytes: &[u8]) {
    leaves_nothing(|| session(bytes));
}

/// Plays one session.
fn session(bytes: &[u8]) {
    let mut input = Input(bytes);
    let behaviour = input.u8();
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    ours.set_nonblocking(true).expect("a socket");
    let stop = Signal::new().expect("an event fd");
    let trouble = Arc::new(Signal::new().expect("an event fd"));
    let setup = HandlerSetup {
        provider: Arc::new(AlwaysOpen(Arc::new(Ram {
            ready: Mutex::default(),
        }))),
        read_only: behaviour & 1 != 0,
        queues: QUEUES,
        counters: (0..2).map(|_| Arc::new(Counters::default())).collect(),
        state: Arc::new(SessionState::default()),
        trouble: Arc::clone(&trouble),
        turns: Arc::new(Turns::new(Duration::from_millis(5))),
    };
    let patience = Patience {
        message: Duration::from_millis(500),
        rival: Duration::from_millis(5),
    };
    let mut front_end = FrontEnd {
        socket: ours,
        memory: memfd(MEMORY),
        kick: File::from(event(EventfdFlags::NONBLOCK)),
    };
    let end = std::thread::scope(|scope| {
        let (stop, trouble) = (&stop, &trouble);
        let served = scope.spawn(move || {
            serve(
                theirs,
                Handler::new(setup),
                Outside::new(stop, &**trouble, None),
                patience,
            )
        });
        if behaviour & 2 == 0 {
            greet(&mut front_end);
        }
        for _ in 0..STEPS_MAX {
            if input.is_empty() {
                break;
            }
            step(&mut front_end, &mut input);
            if behaviour & 8 == 0 {
                front_end.drain();
            }
        }
        if behaviour & 0x10 == 0 {
            let _ = front_end.socket.shutdown(Shutdown::Write);
        } else {
            let _ = front_end.socket.shutdown(Shutdown::Both);
        }
        served.join().expect("the session ends by itself")
    });
    assert!(!matches!(end, End::WorkerFailed | End::Stopped), "{end:?}");
}

/// Sends what every front-end begins with, up to a ring that runs.
fn greet(front_end: &mut FrontEnd) {
    let steps: [&[u8]; 9] = [
        // The number of a message, then what `message` reads. Features, protocol features.
        &[1, 0],
        &[15, 0],
        &[16, 0, 0],
        &[3, 0],
        &[2, 0, 0],
        &[5, 0, 1],
        &[8, 0, 0],
        &[9, 0, 0],
        &[12, 0, 0],
    ];
    for bytes in steps {
        deliver(front_end, &message(&mut Input(bytes)));
        front_end.drain();
    }
    deliver(front_end, &message(&mut Input(&[18, 0, 0])));
}

/// Sends a message.
fn deliver(front_end: &mut FrontEnd, message: &Message) {
    let mut bytes = Vec::with_capacity(12 + message.body.len());
    bytes.extend(message.code.to_le_bytes());
    bytes.extend(message.flags.to_le_bytes());
    bytes.extend(message.size.to_le_bytes());
    bytes.extend(&message.body);
    front_end.send(&bytes, &message.descriptors);
}

/// Does one thing.
fn step(front_end: &mut FrontEnd, input: &mut Input<'_>) {
    let kind = input.u8();
    match kind % 16 {
        0..10 => {
            let mut message = message(input);
            for _ in 0..kind >> 6 {
                spoil(&mut message, input);
            }
            deliver(front_end, &message);
        }
        10..13 => front_end.request(input),
        13 => {
            let len = usize::from(input.u8());
            let bytes = input.bytes(len);
            let kinds = if kind & 0x80 == 0 {
                &[][..]
            } else {
                &[0, 5][..]
            };
            if !bytes.is_empty() {
                front_end.send(bytes, kinds);
            }
        }
        14 => {
            let place = u64::from(input.u16());
            let bytes = input.string();
            let _ = front_end.memory.write_all_at(
                bytes.get(..bytes.len().min(64)).unwrap_or_default(),
                place % MEMORY,
            );
        }
        _ => {
            let _ = front_end.memory.set_len(near(input, 0) % (2 * MEMORY));
        }
    }
}
