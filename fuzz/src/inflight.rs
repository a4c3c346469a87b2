//! An inflight buffer that holds anything, handed over by a front-end whose rings start with it, before a real session with
//! workers and a disk in memory; and once more, as after an orderly end.
//!
//! Input: bits that say how the front-end behaves, the shape of the buffer and of the ring, the fields of the region, its
//! entries, the heads that the guest offers, and bytes anywhere in the file.
//!
//! What must hold: the session goes on or ends, and leaves nothing; nothing is written in the file but the regions, nor in
//! guest memory but the used ring and status bytes; each head is carried out again at most once, and as often as it is offered;
//! what was returned in one session is not carried out again in the next.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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

/// Bytes of guest memory, and the front-end's address of its begin.
const MEMORY: u64 = 0x10000;
/// See above.
const USER: u64 = 0x7f00_0000_0000;
/// Where things lie in it: the parts of the ring.
const TABLE: u64 = 0x1000;
/// The available ring.
const AVAILABLE: u64 = 0x2000;
/// The used ring.
const USED: u64 = 0x3000;
/// The headers of requests, one a head.
const HEADERS: u64 = 0x4000;
/// What all of them write.
const DATA: u64 = 0x5000;
/// Their status bytes, one a head.
const STATUS: u64 = 0x6000;
/// Their descriptors, three a head.
const CHAINS: u64 = 0x8000;
/// Bytes of those of one head.
const CHAIN_BYTES: u64 = 48;
/// Rings of the device.
const QUEUES: u16 = 2;
/// Bytes of the file that the buffer lies in.
const FILE: u64 = 0x4000;
/// What the file holds where nothing was put.
const UNTOUCHED: u8 = 0xa5;
/// How long an answer may take.
const DEADLINE: Duration = Duration::from_secs(10);

/// Sectors that were written, and how often.
type Writes = Arc<Mutex<BTreeMap<u64, u32>>>;

/// Locks what a panic elsewhere cannot have broken.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A disk that notes what is written and answers at once.
#[derive(Debug)]
struct Ram {
    /// What was written.
    writes: Writes,
}

/// Its context.
struct RamContext {
    /// What was written.
    writes: Writes,
    /// Answers.
    ready: Vec<Completion>,
}

impl DiskSource for Ram {
    type Context = RamContext;

    fn name(&self) -> &str {
        "ram"
    }

    fn capacity(&self) -> Sector {
        Sector(1000)
    }

    fn context(self: &Arc<Self>, _read_only: bool) -> stratablk_layers::Result<RamContext> {
        Ok(RamContext {
            writes: Arc::clone(&self.writes),
            ready: Vec::new(),
        })
    }
}

impl DiskContext for RamContext {
    fn begin_batch(&mut self) {}

    #[expect(unsafe_code, reason = "the seam of a disk")]
    unsafe fn submit(&mut self, operation: Operation, _: Durability, _: &[Segment], token: u64) {
        if let Operation::Write(sector) = operation {
            *lock(&self.writes).entry(sector.0).or_default() += 1;
        }
        self.ready.push(Completion {
            token,
            result: Ok(()),
        });
    }

    fn kick(&mut self) {}

    fn poll(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.ready);
    }

    fn wake_fds(&self) -> Vec<RawFd> {
        Vec::new()
    }

    fn under_way(&self) -> usize {
        self.ready.len()
    }

    fn end_held(&mut self, _chosen: &dyn Fn(u64) -> bool) -> bool {
        // Nothing of this disk waits for space.
        false
    }
}

/// A file in memory.
fn memfd(len: u64, fill: u8) -> File {
    let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    let file = File::from(fd);
    put(&file, 0, &vec![fill; usize::try_from(len).expect("small")]);
    file
}

/// Writes into a file.
fn put(file: &File, place: u64, bytes: &[u8]) {
    file.write_all_at(bytes, place).expect("a memfd");
}

/// All of a file.
fn contents(file: &File) -> Vec<u8> {
    let len = file.metadata().expect("a memfd").len();
    let mut bytes = vec![0; usize::try_from(len).expect("small")];
    file.read_exact_at(&mut bytes, 0).expect("a memfd");
    bytes
}

/// A descriptor as it stands in a table.
fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Vec<u8> {
    let mut bytes = address.to_le_bytes().to_vec();
    bytes.extend(len.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    bytes
}

/// A number that is more often plausible than not.
fn near(input: &mut Input<'_>, usual: u64) -> u64 {
    match input.u8() % 16 {
        15 => input.u64(),
        14 => usual.wrapping_sub(1),
        13 => usual.wrapping_add(1),
        12 => usual.wrapping_add(u64::from(input.u8())),
        _ => usual,
    }
}

/// Half of a number, or less.
fn cut(number: u64) -> [u8; 2] {
    let [low, high, ..] = number.to_le_bytes();
    [low, high]
}

/// A guest and its front-end.
struct Machine {
    /// The file behind guest memory.
    memory: File,
    /// The file with the inflight buffer.
    buffer: File,
    /// The body of SET_INFLIGHT_FD.
    given: Vec<u8>,
    /// Which ring is started.
    index: u16,
    /// Its entries.
    size: u16,
    /// How often each head stands in the available ring.
    offered: Vec<u32>,
    /// Whether the buffer may be what it was not, at any time.
    wild: bool,
}

impl Machine {
    /// Made of an input. Also returns where its front-end says that the ring goes on.
    fn new(input: &mut Input<'_>) -> (Self, u16) {
        let behaviour = input.u8();
        let size = 1 << (input.u8() % 6);
        let entries = near(input, u64::from(size)) & 0x7f;
        let queues = near(input, u64::from(QUEUES)) & 3;
        // As all known back-ends round it.
        let region = (16 + 16 * entries).next_multiple_of(64);
        let bytes = region * queues;
        let offset = 8 * u64::from(input.u8());
        let used = if behaviour & 1 == 0 { 0 } else { input.u16() };
        let buffer = memfd(FILE, UNTOUCHED);
        put(
            &buffer,
            offset,
            &vec![0; usize::try_from(bytes).expect("small")],
        );
        for queue in 0..queues {
            let start = offset + queue * region;
            if behaviour & 2 == 0 {
                put(&buffer, start + 8, &cut(near(input, 1)));
                put(&buffer, start + 10, &cut(near(input, entries)));
                let last = u64::from(input.u8()) % entries.max(1);
                put(&buffer, start + 12, &cut(near(input, last)));
                let behind = u64::from(input.u8() & 0x1f);
                put(
                    &buffer,
                    start + 14,
                    &cut(near(input, u64::from(used).wrapping_sub(behind))),
                );
            }
            // A few of the heads: whether under way, what comes next, and when it was taken.
            for _ in 0..input.u8() & 0x3f {
                let head = u64::from(input.u8()) % entries.max(1);
                let entry = start + 16 + 16 * head;
                put(&buffer, entry, &[input.u8() & 1]);
                let (next, counter) = (u64::from(input.u8()), u64::from(input.u8()));
                put(&buffer, entry + 6, &cut(near(input, next % entries.max(1))));
                put(&buffer, entry + 8, &near(input, counter).to_le_bytes());
            }
        }
        let mut given = near(input, bytes).to_le_bytes().to_vec();
        given.extend(near(input, offset).to_le_bytes());
        given.extend(cut(near(input, queues)));
        given.extend(cut(near(input, entries)));
        // Bytes anywhere.
        for _ in 0..input.u8() & 7 {
            let place = u64::from(input.u16()) % FILE;
            put(&buffer, place, &[input.u8()]);
        }
        let mut machine = Self {
            memory: memfd(MEMORY, 0),
            buffer,
            given,
            index: u16::from(behaviour >> 2 & 1),
            size,
            offered: vec![0; usize::from(size)],
            wild: behaviour & 0x18 != 0,
        };
        machine.offer(input, used);
        let base = u16::from_le_bytes(cut(near(input, u64::from(used))));
        (machine, base)
    }

    /// Puts requests into the tables, and some of them into the ring.
    fn offer(&mut self, input: &mut Input<'_>, used: u16) {
        for head in 0..u64::from(self.size) {
            let chain = CHAINS + CHAIN_BYTES * head;
            put(
                &self.memory,
                TABLE + 16 * head,
                &descriptor(chain, 48, 4, 0),
            );
            let mut bytes = descriptor(HEADERS + 16 * head, 16, 1, 1);
            bytes.extend(descriptor(DATA, 512, 1, 2));
            bytes.extend(descriptor(STATUS + head, 1, 2, 0));
            put(&self.memory, chain, &bytes);
            // A write of the sector with the number of the head.
            put(&self.memory, HEADERS + 16 * head, &[1]);
            put(&self.memory, HEADERS + 16 * head + 8, &head.to_le_bytes());
        }
        for entry in 0..u64::from(self.size) {
            let head = u16::from(input.u8()) % self.size;
            put(&self.memory, AVAILABLE + 4 + 2 * entry, &head.to_le_bytes());
            if let Some(count) = self.offered.get_mut(usize::from(head)) {
                *count += 1;
            }
        }
        let ahead = u64::from(input.u8()) % (2 * u64::from(self.size));
        put(
            &self.memory,
            AVAILABLE + 2,
            &cut(near(input, u64::from(used) + ahead)),
        );
        put(&self.memory, USED + 2, &used.to_le_bytes());
    }

    /// Serves it once: its front-end says that the ring goes on at `base`. Returns what it says in the end, if it gets so far.
    fn live(&self, base: u16, writes: &Writes, meddle: &[(u64, u8)]) -> Option<u16> {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        ours.set_read_timeout(Some(DEADLINE)).expect("a socket");
        let stop = Signal::new().expect("an event fd");
        let trouble = Arc::new(Signal::new().expect("an event fd"));
        let setup = HandlerSetup {
            provider: Arc::new(AlwaysOpen(Arc::new(Ram {
                writes: Arc::clone(writes),
            }))),
            read_only: false,
            queues: QUEUES,
            counters: vec![Arc::new(Counters::default())],
            state: Arc::new(SessionState::default()),
            trouble: Arc::clone(&trouble),
            turns: Arc::new(Turns::new(Duration::from_millis(5))),
        };
        let patience = Patience {
            message: Duration::from_millis(500),
            rival: Duration::from_millis(5),
        };
        std::thread::scope(|scope| {
            let (stop, trouble) = (&stop, &trouble);
            let served = scope.spawn(move || {
                let outside = Outside::new(stop, &**trouble, None);
                serve(theirs, Handler::new(setup), outside, patience)
            });
            let mut front_end = FrontEnd(ours);
            let end = self.play(&mut front_end, base, meddle);
            let _ = front_end.0.shutdown(Shutdown::Both);
            let how = served.join().expect("the session ends by itself");
            assert!(!matches!(how, End::WorkerFailed | End::Stopped), "{how:?}");
            end
        })
    }

    /// What the front-end says, from its first message to the end of the ring.
    fn play(&self, front_end: &mut FrontEnd, base: u16, meddle: &[(u64, u8)]) -> Option<u16> {
        let kick: OwnedFd =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an event fd");
        let ring = u32::from(self.index).to_le_bytes();
        let with_number = |number: u32| [ring, number.to_le_bytes()].concat();
        front_end.ask(1)?;
        front_end.ask(15)?;
        front_end.tell(16, &features::protocol().bits().to_le_bytes(), &[]);
        front_end.tell(3, &[], &[]);
        let offered = features::offered(false) & !features::LOG_ALL;
        front_end.tell(2, &offered.to_le_bytes(), &[]);
        let mut table = 1u64.to_le_bytes().to_vec();
        for number in [0, MEMORY, USER, 0] {
            table.extend(number.to_le_bytes());
        }
        front_end.tell(5, &table, &[self.memory.as_fd()]);
        front_end.tell(32, &self.given, &[self.buffer.as_fd()]);
        front_end.tell(8, &with_number(u32::from(self.size)), &[]);
        front_end.tell(10, &with_number(u32::from(base)), &[]);
        let mut addresses = with_number(0);
        for place in [TABLE, USED, AVAILABLE, 0] {
            addresses.extend((if place == 0 { 0 } else { USER + place }).to_le_bytes());
        }
        front_end.tell(9, &addresses, &[]);
        front_end.tell(12, &u64::from(self.index).to_le_bytes(), &[kick.as_fd()]);
        front_end.tell(18, &with_number(1), &[]);
        let _ = rustix::io::write(&kick, &1u64.to_ne_bytes());
        for (place, byte) in meddle {
            // Where it was cut it grows again, to no effect.
            let _ = self.buffer.write_all_at(&[*byte], *place);
        }
        if self.wild && meddle.len() % 2 == 1 {
            let _ = self.buffer.set_len(0);
        }
        front_end.tell(11, &with_number(0), &[]);
        let body = front_end.answer()?;
        let bytes = body.get(4..6)?;
        bytes.try_into().ok().map(u16::from_le_bytes)
    }

    /// Checks what guest memory and the file hold after a session, against what they held before.
    fn judge(&self, memory: &[u8], file: &[u8]) {
        let used = usize::try_from(USED).expect("small");
        let status = usize::try_from(STATUS).expect("small");
        let size = usize::from(self.size);
        let may_change = [used..used + 6 + 8 * size, status..status + size];
        let inside = |place: usize| may_change.iter().any(|range| range.contains(&place));
        for (place, (now, before)) in contents(&self.memory).iter().zip(memory).enumerate() {
            assert!(
                now == before || inside(place),
                "guest memory at {place:#x} has changed"
            );
        }
        self.judge_returned(memory);
        // The message decides where the regions are.
        let Some(regions) = self.told() else { return };
        if self.wild {
            return;
        }
        for (place, (now, before)) in contents(&self.buffer).iter().zip(file).enumerate() {
            assert!(
                now == before || regions.contains(&place),
                "the file at {place:#x} has changed"
            );
        }
    }

    /// Checks what was returned to the guest since its memory held that.
    fn judge_returned(&self, before: &[u8]) {
        let now = contents(&self.memory);
        let used = usize::try_from(USED).expect("small");
        let size = usize::from(self.size);
        let index = |memory: &[u8]| {
            let bytes = memory
                .get(used + 2..used + 4)
                .and_then(|bytes| bytes.try_into().ok());
            u16::from_le_bytes(bytes.expect("the used ring"))
        };
        let (first, end) = (index(before), index(&now));
        let mut returned = vec![0; size];
        // Older ones are written over.
        let count = end.wrapping_sub(first).min(self.size);
        for back in 1..=count {
            let entry = usize::from(end.wrapping_sub(back)) % size;
            let element = now
                .get(used + 4 + 8 * entry..)
                .and_then(|bytes| bytes.first_chunk());
            let head = u32::from_le_bytes(*element.expect("the used ring"));
            let place = usize::try_from(head)
                .ok()
                .and_then(|head| returned.get_mut(head));
            *place.unwrap_or_else(|| panic!("head {head} of {size} was returned")) += 1;
        }
        for (head, (returned, offered)) in returned.iter().zip(&self.offered).enumerate() {
            assert!(
                *returned <= 1 + offered,
                "head {head}: returned {returned} times"
            );
        }
    }

    /// Where the regions lie as the message says.
    fn told(&self) -> Option<std::ops::Range<usize>> {
        let number = |place, len| {
            let mut bytes = [0; 8];
            let given: &[u8] = self.given.get(place..place + len)?;
            bytes.get_mut(..len)?.copy_from_slice(given);
            usize::try_from(u64::from_le_bytes(bytes)).ok()
        };
        let (offset, queues, entries) = (number(8, 8)?, number(16, 2)?, number(18, 2)?);
        let end = (16 + 16 * entries)
            .next_multiple_of(64)
            .checked_mul(queues)?;
        Some(offset..offset.checked_add(end)?)
    }
}

/// The front-end's side of a connection.
struct FrontEnd(UnixStream);

impl FrontEnd {
    /// Sends a message. The other side may have gone.
    fn tell(&mut self, code: u32, body: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let size = u32::try_from(body.len()).expect("small");
        let mut bytes = Vec::with_capacity(12 + body.len());
        for number in [code, 1, size] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(body);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(
                control.push(SendAncillaryMessage::ScmRights(descriptors)),
                "there is room"
            );
        }
        let _ = rustix::net::sendmsg(
            &self.0,
            &[IoSlice::new(&bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        );
    }

    /// Reads an answer; `None` if the other side has gone.
    fn answer(&mut self) -> Option<Vec<u8>> {
        let mut head = [0; 12];
        if let Err(error) = self.0.read_exact(&mut head) {
            assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "no answer");
            return None;
        }
        let [.., s0, s1, s2, s3] = head;
        let mut body = vec![0; usize::try_from(u32::from_le_bytes([s0, s1, s2, s3])).ok()?];
        self.0.read_exact(&mut body).ok().map(|()| body)
    }

    /// Asks for something.
    fn ask(&mut self, code: u32) -> Option<Vec<u8>> {
        self.tell(code, &[], &[]);
        self.answer()
    }
}

/// One input.
///
/// # Panics
/// If something does not hold that must.
pub fn run(bytes: &[u8]) {
    leaves_nothing(|| play(bytes));
}

/// Plays a machine through two sessions.
fn play(bytes: &[u8]) {
    let mut input = Input(bytes);
    let (machine, base) = Machine::new(&mut input);
    let mut meddle = Vec::new();
    while machine.wild && !input.is_empty() && meddle.len() < 64 {
        meddle.push((u64::from(input.u16()) % FILE, input.u8()));
    }
    let (memory, file) = (contents(&machine.memory), contents(&machine.buffer));
    let writes = Writes::default();
    let end = machine.live(base, &writes, &meddle);
    machine.judge(&memory, &file);
    for (sector, count) in std::mem::take(&mut *lock(&writes)) {
        let offered = usize::try_from(sector)
            .ok()
            .and_then(|head| machine.offered.get(head));
        let offered = offered.unwrap_or_else(|| panic!("head {sector} does not exist"));
        assert!(
            count <= 1 + offered,
            "head {sector}: {count} times, offered {offered} times"
        );
    }
    let Some(end) = end.filter(|_| !machine.wild) else {
        return;
    };
    // Nothing new is offered, and nothing was left.
    put(&machine.memory, AVAILABLE + 2, &end.to_le_bytes());
    let (memory, file) = (contents(&machine.memory), contents(&machine.buffer));
    machine.live(end, &writes, &[]);
    machine.judge(&memory, &file);
    let again = lock(&writes);
    assert!(
        again.is_empty(),
        "carried out again in the next session: {again:?}"
    );
}
