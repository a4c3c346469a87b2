//! Descriptor chains: a guest whose ring, tables and buffers hold anything, and change while they are read, before a real
//! worker with a disk in memory.
//!
//! Input: bits that say how the guest behaves, how many entries the ring has, where the ring begins, and then things that the
//! guest does ([`Act`]) before the worker looks, while it serves requests, and once more after that.
//!
//! What must hold: nothing is written outside of guest memory, nor by the disk beyond what it was given; requests lie on the
//! disk; each head that was offered is returned at most once; the used length is at most what was writable, and that many
//! bytes were written; in the end nothing is under way.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use stratablk::signal::Signal;
use stratablk::vhost::event::{Event, Kick};
use stratablk::vhost::memory::{GuestMemory, RegionSpec};
use stratablk::virtio::ring::{RingAddresses, RingLayout};
use stratablk::worker::command::{QueueSetup, WorkerHandle};
use stratablk::worker::counters::Counters;
use stratablk::worker::disk::{DiskContext, DiskSource};
use stratablk::worker::{WorkerSetup, start};
use stratablk_layers::file::Segment;
use stratablk_layers::units::{SECTOR_BYTES, Sector};
use stratablk_layers::volume::{Completion, Durability, Operation, RequestError};
use vm_memory::GuestAddress;
use vm_memory::volatile_memory::VolatileMemory;

use crate::host::leaves_nothing;
use crate::input::Input;

/// Bytes of the file before, between and behind what is shared of it.
const GAP: u64 = 0x1000;
/// The guest addresses of the two regions, and the bytes of both. They touch each other for the guest and for nobody else.
const REGIONS: [(u64, u64); 2] = [(0, 0xc000), (0xc000, 0x4000)];
/// The front-end's address of guest address 0 of the first region, and of the second.
const USER: [u64; 2] = [0x7f00_0000_0000, 0x7e00_0000_0000];
/// Where the parts of the ring lie.
const TABLE: u64 = 0x1000;
/// The available ring.
const AVAILABLE: u64 = 0x2000;
/// The used ring.
const USED: u64 = 0x3000;
/// The end of the ring's parts.
const RING_END: u64 = 0x4000;
/// What memory holds at first, and what lies around it.
const UNTOUCHED: u8 = 0xa5;
/// Sectors of the disk.
const SECTORS: u64 = 1000;
/// Things done by a guest at once.
const ACTS_MAX: usize = 96;

/// A guest address and a number of bytes.
type Range = (u64, u64);

/// Whether two ranges share a byte.
fn overlap(a: &Range, b: &Range) -> bool {
    a.0 < b.0.saturating_add(b.1) && b.0 < a.0.saturating_add(a.1)
}

/// What a guest does.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// Writes a descriptor at a guest address.
    Descriptor(u64, [u8; 16]),
    /// Writes bytes at a guest address.
    Bytes(u64, [u8; 16], usize),
    /// Offers a head.
    Offer(u16),
    /// Sets the available index.
    Index(u16),
    /// Cuts the file behind its memory.
    Cut(u64),
}

/// What guest and disk share.
#[derive(Debug)]
struct State {
    /// The file behind the memory.
    file: File,
    /// Where the regions are mapped: first address and bytes.
    mapped: Vec<(usize, usize)>,
    /// The next place in the available ring.
    available: u16,
    /// Entries of the ring.
    size: u16,
    /// What the guest does while it is served, one at each look of the worker at the disk.
    meanwhile: Vec<Act>,
    /// The writable buffers of each head that was offered and not returned, oldest first.
    offered: Vec<VecDeque<Vec<Range>>>,
    /// Every writable buffer, and every table of descriptors, of what was offered.
    written: Vec<Range>,
    /// See `written`.
    tables: Vec<Range>,
    /// Whether nothing changes under the worker but what the guest wrote before it was told, so that what the worker must do
    /// can be told.
    tame: bool,
    /// Whether the file was cut.
    cut: bool,
    /// Whether the disk answers at once, or when nothing more comes.
    at_once: bool,
    /// Whether it answers with errors.
    fails: bool,
    /// Requests that wait.
    held: Vec<u64>,
    /// Answers.
    ready: Vec<Completion>,
}

/// The disk.
#[derive(Debug)]
struct Ram {
    state: Mutex<State>,
    wake: Signal,
}

/// Its context.
struct RamContext(Arc<Ram>);

impl Ram {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers what waits.
    fn release(&self) {
        let mut state = self.state();
        let result = if state.fails {
            Err(RequestError::Io)
        } else {
            Ok(())
        };
        let held = std::mem::take(&mut state.held);
        state
            .ready
            .extend(held.into_iter().map(|token| Completion { token, result }));
        drop(state);
        self.wake.raise();
    }
}

impl State {
    /// The place in the file of a guest address.
    fn place(guest: u64) -> Option<u64> {
        let gap = if guest >= REGIONS[1].0 { 2 * GAP } else { GAP };
        (guest < REGIONS[1].0 + REGIONS[1].1).then_some(guest + gap)
    }

    /// The parts of a range that lie in one region each: where in the file, and which of the bytes.
    fn parts(guest: u64, len: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
        REGIONS.into_iter().filter_map(move |(start, room)| {
            let first = guest.max(start);
            let end = guest.saturating_add(len as u64).min(start + room);
            let part = usize::try_from(first - guest).ok()?
                ..usize::try_from(end.checked_sub(guest)?).ok()?;
            (first < end).then_some((Self::place(first)?, part))
        })
    }

    fn write(&self, guest: u64, bytes: &[u8]) {
        let bytes: Vec<u8> = bytes
            .iter()
            .map(|byte| if *byte == UNTOUCHED { 0 } else { *byte })
            .collect();
        for (place, part) in Self::parts(guest, bytes.len()) {
            // Behind a cut the file would grow again, to no effect: the region is lost.
            let _ = self
                .file
                .write_all_at(bytes.get(part).unwrap_or_default(), place);
        }
    }

    fn read(&self, guest: u64, bytes: &mut [u8]) {
        for (place, part) in Self::parts(guest, bytes.len()) {
            let _ = self
                .file
                .read_at(bytes.get_mut(part).unwrap_or_default(), place);
        }
    }

    fn read_u16(&self, guest: u64) -> u16 {
        let mut bytes = [0; 2];
        self.read(guest, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Descriptor(place, bytes) => self.write(place, &bytes),
            Act::Bytes(place, bytes, len) => self.write(place, bytes.get(..len).unwrap_or(&bytes)),
            Act::Offer(head) => {
                let entry = u64::from(self.available % self.size);
                self.write(AVAILABLE + 4 + 2 * entry, &head.to_le_bytes());
                self.available = self.available.wrapping_add(1);
                self.write(AVAILABLE + 2, &self.available.to_le_bytes());
                // A guest that offers more than its ring holds writes over entries before they are read.
                let waiting: usize = self.offered.iter().map(VecDeque::len).sum();
                self.tame &= waiting < usize::from(self.size);
                // Otherwise nothing is asked of it, and a guest that races offers without end.
                if self.tame {
                    let (writable, tables) = writable(self, head);
                    self.written.extend(&writable);
                    self.tables.extend(&tables);
                    self.tame &= !self
                        .tables
                        .iter()
                        .any(|table| self.written.iter().any(|buffer| overlap(table, buffer)));
                    if let Some(offered) = self.offered.get_mut(usize::from(head)) {
                        offered.push_back(writable);
                    }
                }
            }
            Act::Index(index) => {
                self.available = index;
                self.write(AVAILABLE + 2, &index.to_le_bytes());
            }
            Act::Cut(len) => {
                self.cut = true;
                let _ = self.file.set_len(len);
            }
        }
    }

    /// Does one thing that is left to do while the guest is served.
    fn meddle(&mut self) {
        if let Some(act) = self.meanwhile.pop() {
            self.act(act);
        }
    }

    fn holds(&self, segment: &Segment) -> bool {
        let start = segment.base.addr();
        self.mapped.iter().any(|(first, len)| {
            start >= *first && segment.len <= *len && start - first <= len - segment.len
        })
    }
}

impl DiskSource for Ram {
    type Context = RamContext;

    fn name(&self) -> &str {
        "ram"
    }

    fn capacity(&self) -> Sector {
        Sector(SECTORS)
    }

    fn context(self: &Arc<Self>, _read_only: bool) -> stratablk_layers::Result<RamContext> {
        Ok(RamContext(Arc::clone(self)))
    }
}

impl DiskContext for RamContext {
    fn begin_batch(&mut self) {
        self.0.state().meddle();
    }

    #[expect(unsafe_code, reason = "the seam of a disk")]
    unsafe fn submit(
        &mut self,
        operation: Operation,
        _: Durability,
        segments: &[Segment],
        token: u64,
    ) {
        let mut state = self.0.state();
        let bytes: u64 = segments.iter().map(|segment| segment.len as u64).sum();
        assert!(
            segments.iter().all(|segment| state.holds(segment)),
            "a segment outside of guest memory"
        );
        let (start, count) = match operation {
            Operation::Read(sector) | Operation::Write(sector) => (sector.0, bytes / SECTOR_BYTES),
            Operation::Flush => (0, 0),
            Operation::Discard(range) | Operation::WriteZeroes { range, .. } => {
                (range.start.0, range.count)
            }
        };
        assert!(bytes.is_multiple_of(SECTOR_BYTES), "{bytes} bytes");
        assert!(
            start.checked_add(count).is_some_and(|end| end <= SECTORS),
            "{operation:?}, {count} sectors"
        );
        assert!(
            !state.held.contains(&token)
                || matches!(
                    operation,
                    Operation::Discard(_) | Operation::WriteZeroes { .. }
                )
        );
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
        state.meddle();
        state.held.push(token);
        let at_once = state.at_once;
        drop(state);
        if at_once {
            self.0.release();
        }
    }

    fn kick(&mut self) {
        self.0.state().meddle();
    }

    fn poll(&mut self, done: &mut Vec<Completion>) {
        self.0.wake.lower();
        done.append(&mut self.0.state().ready);
    }

    fn wake_fds(&self) -> Vec<RawFd> {
        vec![self.0.wake.as_raw_fd()]
    }

    fn under_way(&self) -> usize {
        let state = self.0.state();
        state.held.len() + state.ready.len()
    }

    fn end_held(&mut self, _chosen: &dyn Fn(u64) -> bool) -> bool {
        // Nothing of this disk waits for space.
        false
    }
}

/// Reads what a guest does next.
fn act(input: &mut Input<'_>, size: u16) -> Act {
    let kind = input.u8();
    let head = u16::from(input.u8()) % size;
    // Addresses that are more often plausible than not.
    let address = |input: &mut Input<'_>| match input.u8() {
        0xff => input.u64(),
        0xfe => 0xbff0 + u64::from(input.u8()),
        page => RING_END + u64::from(page % 0xc4) * 0x100,
    };
    let descriptor = |input: &mut Input<'_>| {
        let place = address(input);
        let len = match input.u8() {
            0xff => input.u32(),
            0xfe => 1,
            0xfd => 16 * u32::from(input.u8()),
            len @ 0..0x20 => 512 * u32::from(len),
            len => u32::from(len),
        };
        let flags = match input.u8() {
            0xff => input.u16(),
            flags => u16::from(flags & 7),
        };
        let next = match input.u8() {
            0xff => input.u16(),
            next => u16::from(next) % size,
        };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&place.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        bytes
    };
    match kind % 12 {
        0..4 => Act::Descriptor(TABLE + 16 * u64::from(head), descriptor(input)),
        4 | 5 => Act::Descriptor(
            address(input).wrapping_add(16 * u64::from(head)),
            descriptor(input),
        ),
        6 | 7 => Act::Offer(head),
        8 => {
            let place = address(input);
            let (kind, sector) = (u32::from(input.u8() % 16), u64::from(input.u16()));
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&kind.to_le_bytes());
            bytes[8..].copy_from_slice(&sector.to_le_bytes());
            Act::Bytes(place, bytes, 16)
        }
        9 => {
            let place = if kind & 0x80 == 0 {
                address(input)
            } else {
                u64::from(input.u16())
            };
            let mut bytes = [0; 16];
            let given = input.bytes(usize::from(head) % 17);
            bytes[..given.len()].copy_from_slice(given);
            Act::Bytes(place, bytes, given.len())
        }
        10 => Act::Index(input.u16()),
        _ => Act::Cut(u64::from(input.u16())),
    }
}

/// An event fd and its copy.
fn event() -> (File, File) {
    let ours: OwnedFd =
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an event fd");
    let ours = File::from(ours);
    let theirs = ours.try_clone().expect("a descriptor");
    (ours, theirs)
}

/// The file behind guest memory.
fn memfd() -> File {
    let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    let file = File::from(fd);
    let all = usize::try_from(REGIONS[1].0 + REGIONS[1].1 + 3 * GAP).expect("small");
    file.write_all_at(&vec![UNTOUCHED; all], 0)
        .expect("a memfd");
    // The ring begins empty, the tables with nothing.
    file.write_all_at(
        &vec![0; usize::try_from(RING_END - TABLE).expect("small")],
        TABLE + GAP,
    )
    .expect("a memfd");
    file
}

/// One input.
///
/// # Panics
/// If something does not hold that must.
pub fn run(bytes: &[u8]) {
    leaves_nothing(|| serve(bytes));
}

/// The memory as it is shared, and where it is mapped.
fn share(file: &File) -> (Arc<GuestMemory>, Vec<(usize, usize)>) {
    let specs: Vec<RegionSpec> = REGIONS
        .iter()
        .zip(USER)
        .map(|((guest, len), user)| RegionSpec {
            guest: GuestAddress(*guest),
            user,
            len: *len,
            offset: State::place(*guest).expect("a region"),
        })
        .collect();
    let files = specs
        .iter()
        .map(|_| file.try_clone().expect("a descriptor"))
        .collect();
    let memory = GuestMemory::from_table(&specs, files).expect("two regions");
    let mapped = specs
        .iter()
        .map(|spec| {
            let run = memory.translate(spec.guest, spec.len).expect("a region");
            (run.ptr_guard().as_ptr().addr(), VolatileMemory::len(&run))
        })
        .collect();
    (Arc::new(memory), mapped)
}

/// Serves the guest of an input.
fn serve(bytes: &[u8]) {
    let mut input = Input(bytes);
    let behaviour = input.u8();
    let size = 1u16 << (input.u8() % 8);
    let base = if behaviour & 1 == 0 { 0 } else { input.u16() };
    let during = usize::from(input.u8()) % 16;
    let meanwhile: Vec<Act> = (0..during).map(|_| act(&mut input, size)).collect();
    let racing = meanwhile.clone();
    let file = memfd();
    let (memory, mapped) = share(&file);
    let disk = Arc::new(Ram {
        state: Mutex::new(State {
            file,
            mapped,
            available: base,
            size,
            tame: meanwhile.is_empty(),
            meanwhile,
            offered: vec![VecDeque::new(); usize::from(size)],
            written: vec![(USED, 6 + 8 * u64::from(size))],
            tables: vec![(AVAILABLE, 6 + 2 * u64::from(size))],
            cut: false,
            at_once: behaviour & 2 == 0,
            fails: behaviour & 4 != 0,
            held: Vec::new(),
            ready: Vec::new(),
        }),
        wake: Signal::new().expect("an event fd"),
    });
    disk.state().write(AVAILABLE + 2, &base.to_le_bytes());
    disk.state().write(USED + 2, &base.to_le_bytes());
    let worker = start(
        "worker".into(),
        WorkerSetup {
            disk: Arc::clone(&disk),
            read_only: behaviour & 8 != 0,
            memory: Arc::clone(&memory),
            log: None,
            durability: Durability::AfterFlush,
            counters: Arc::new(Counters::default()),
            trouble: Arc::new(Signal::new().expect("an event fd")),
        },
    )
    .expect("a thread");
    let (kick, theirs) = event();
    let addresses = RingAddresses {
        descriptors: USER[0] + TABLE,
        available: USER[0] + AVAILABLE,
        used: USER[0] + USED,
    };
    let layout = RingLayout::resolve(&memory, size, &addresses).expect("the ring lies in memory");
    let setup = QueueSetup {
        index: 0,
        layout,
        base,
        event_idx: behaviour & 0x10 != 0,
        indirect: behaviour & 0x20 == 0,
        log: None,
        kick: Arc::new(Kick::Event(Event::new(theirs).expect("an event fd"))),
        call: None,
        err: None,
        look: behaviour & 0x40 == 0,
        resumed: None,
    };
    worker.attach(setup).expect("a worker");
    let mut used = base;
    while !input.is_empty() {
        let mut offers = Vec::new();
        for _ in 0..ACTS_MAX {
            let next = act(&mut input, size);
            match next {
                Act::Offer(_) => offers.push(next),
                Act::Index(_) | Act::Cut(_) => disk.state().tame = false,
                Act::Bytes(place, ..) | Act::Descriptor(place, _) => {
                    // What is changed while it is under way may be seen or not.
                    let mut state = disk.state();
                    let changed = (place, 16);
                    let busy = state.tables.iter().any(|table| overlap(table, &changed));
                    state.tame &= !(busy || overlap(&changed, &(USED, RING_END - USED)));
                }
            }
            if !matches!(next, Act::Offer(_)) {
                disk.state().act(next);
            }
            if input.is_empty()
                || (!offers.is_empty() && input.0.first().is_some_and(|byte| byte & 0x80 != 0))
            {
                break;
            }
        }
        for offer in offers {
            disk.state().act(offer);
        }
        rustix::io::write(&kick, &1u64.to_ne_bytes()).expect("an event fd");
        if behaviour & 0x80 == 0 {
            rounds(&worker, size);
        } else {
            race(&disk, &worker, size, &racing);
        }
        judge(&mut disk.state(), &mut used);
        let mut state = disk.state();
        if state.offered.iter().all(VecDeque::is_empty) {
            // Nothing is under way, so all may change.
            state.tables.truncate(1);
            state.written.truncate(1);
        }
    }
    disk.release();
    rounds(&worker, size);
    // What waits for the ring's end is answered by then.
    let end = std::thread::scope(|scope| {
        let detached = scope.spawn(|| worker.detach(0).expect("a worker"));
        while !detached.is_finished() {
            disk.release();
            std::thread::yield_now();
        }
        detached.join().expect("the worker lives")
    });
    let taken = end.expect("the ring was attached").wrapping_sub(base);
    let mut state = disk.state();
    assert_eq!(
        state.held.len() + state.ready.len(),
        0,
        "something is under way"
    );
    judge(&mut state, &mut used);
    if state.tame {
        assert_eq!(used.wrapping_sub(base), taken, "taken and returned");
    }
    // Around the regions nothing has changed.
    let mut around = [UNTOUCHED; 64];
    for place in [
        GAP - 64,
        GAP + REGIONS[1].0,
        2 * GAP + REGIONS[1].0 - 64,
        2 * GAP + REGIONS[1].0 + REGIONS[1].1,
    ] {
        if state.file.read_exact_at(&mut around, place).is_ok() && !state.cut {
            assert_eq!(
                around, [UNTOUCHED; 64],
                "written outside of guest memory, at {place:#x}"
            );
        }
    }
    drop(state);
    drop(worker);
}

/// Lets the worker take all that a ring can hold: it obeys commands once a round, and takes a batch of 32 in each.
fn rounds(worker: &WorkerHandle, size: u16) {
    for _ in 0..3 + size / 32 {
        worker
            .set_durability(Durability::AfterFlush)
            .expect("a worker");
    }
}

/// The same, while the guest changes its memory all the time.
fn race(disk: &Ram, worker: &WorkerHandle, size: u16, acts: &[Act]) {
    let done = AtomicBool::new(false);
    disk.state().tame = false;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for act in acts {
                    disk.state().act(*act);
                }
            }
        });
        rounds(worker, size);
        done.store(true, Ordering::Relaxed);
    });
}

/// Checks what was returned since.
fn judge(state: &mut State, used: &mut u16) {
    if !state.tame {
        return;
    }
    let end = state.read_u16(USED + 2);
    while *used != end {
        let entry = u64::from(*used % state.size);
        let mut element = [0; 8];
        state.read(USED + 4 + 8 * entry, &mut element);
        let [i0, i1, i2, i3, l0, l1, l2, l3] = element;
        let (head, len) = (
            u32::from_le_bytes([i0, i1, i2, i3]),
            u32::from_le_bytes([l0, l1, l2, l3]),
        );
        let head = usize::try_from(head).expect("small");
        let offered = state.offered.get_mut(head).and_then(VecDeque::pop_front);
        let writable =
            offered.unwrap_or_else(|| panic!("head {head} was returned more often than offered"));
        let room: u64 = writable.iter().map(|(_, len)| len).sum();
        let mut left = u64::from(len);
        assert!(left <= room, "head {head}: {left} bytes written of {room}");
        for (address, room) in writable {
            let count = room.min(left);
            left -= count;
            let mut bytes = vec![0; usize::try_from(count).expect("a buffer")];
            state.read(address, &mut bytes);
            assert!(
                !bytes.contains(&UNTOUCHED),
                "head {head}: {len} bytes reported, not all of them written"
            );
        }
        *used = used.wrapping_add(1);
    }
}

/// The writable buffers of a chain, and the tables of its descriptors, by a walk of our own.
fn writable(state: &State, head: u16) -> (Vec<Range>, Vec<Range>) {
    let mut found = Vec::new();
    let (mut table, mut entries, mut index) = (TABLE, u64::from(state.size), u64::from(head));
    let mut tables = vec![(table, 16 * entries)];
    let mut nested = false;
    for _ in 0..2048 {
        let mut bytes = [0; 16];
        if index >= entries {
            break;
        }
        state.read(table.saturating_add(16 * index), &mut bytes);
        let (low, high) = bytes.split_at(8);
        let address = u64::from_le_bytes(low.try_into().expect("8 bytes"));
        let rest = u64::from_le_bytes(high.try_into().expect("8 bytes"));
        let (len, flags, next) = (rest & 0xffff_ffff, (rest >> 32) & 0xffff, rest >> 48);
        if flags & 4 != 0 {
            if std::mem::replace(&mut nested, true) {
                break;
            }
            (table, entries, index) = (address, len / 16, 0);
            tables.push((address, len));
            continue;
        }
        if len > 0 {
            if flags & 2 != 0 {
                found.push((address, len));
            } else {
                // The header of a request is read from here.
                tables.push((address, len));
            }
        }
        if flags & 1 == 0 {
            break;
        }
        index = next;
    }
    (found, tables)
}
