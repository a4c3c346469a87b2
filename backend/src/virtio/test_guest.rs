//! A guest for unit tests: two regions of memory and a split ring, written through the file behind them rather than
//! through the mapping that is tested.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::cell::Cell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use stratablk_layers::file::Segment;
use vm_memory::GuestAddress;

use super::chain::{Chain, Malformed};
use super::ring::{RingAddresses, RingLayout};
use crate::vhost::dirty_log::DirtyLog;
use crate::vhost::memory::{GuestMemory, RegionSpec};

/// `VRING_DESC_F_NEXT`.
pub const NEXT: u16 = 1;
/// `VRING_DESC_F_WRITE`.
pub const WRITE: u16 = 2;
/// `VRING_DESC_F_INDIRECT`.
pub const INDIRECT: u16 = 4;

/// Bytes of the first region, and the guest address of the second.
const FIRST: u64 = 0x20000;
/// Bytes of both.
const ALL: u64 = 0x28000;
/// The front-end's address of the first region.
const USER: u64 = 0x7f00_0000_0000;
/// Where the ring lies in the first region.
const DESCRIPTORS: u64 = 0x18000;
const AVAILABLE: u64 = 0x1c000;
const USED: u64 = 0x1d000;

/// What a walk yields.
pub type Outcome = Result<Chain, Malformed>;

/// A guest with one ring.
pub struct TestGuest {
    file: File,
    memory: Arc<GuestMemory>,
    size: u16,
    avail: Cell<u16>,
    used: Cell<u16>,
}

/// An empty file in memory.
pub fn memfd(len: u64) -> File {
    let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(len).unwrap();
    file
}

/// The two regions of a guest.
const REGIONS: [RegionSpec; 2] = [
    RegionSpec {
        guest: GuestAddress(0),
        user: USER,
        len: FIRST,
        offset: 0,
    },
    RegionSpec {
        guest: GuestAddress(FIRST),
        user: USER + 0x1000_0000,
        len: ALL - FIRST,
        offset: FIRST,
    },
];

/// Maps the two regions of a guest.
fn map(file: &File) -> Arc<GuestMemory> {
    let files = vec![file.try_clone().unwrap(), file.try_clone().unwrap()];
    Arc::new(GuestMemory::from_table(&REGIONS, files).unwrap())
}

impl TestGuest {
    /// A guest whose ring has `size` entries.
    pub fn new(size: u16) -> Self {
        let file = memfd(ALL);
        Self {
            memory: map(&file),
            file,
            size,
            avail: Cell::new(0),
            used: Cell::new(0),
        }
    }

    /// The same memory, mapped once more.
    pub fn map_again(&self) -> Arc<GuestMemory> {
        map(&self.file)
    }

    /// The regions as a front-end shares them.
    pub fn regions(&self) -> ([RegionSpec; 2], [File; 2]) {
        let file = || self.file.try_clone().unwrap();
        (REGIONS, [file(), file()])
    }

    /// Cuts the file behind all memory to that many bytes, under whoever has mapped it.
    pub fn cut(&self, len: u64) {
        self.file.set_len(len).unwrap();
    }

    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    pub fn second_region(&self) -> u64 {
        FIRST
    }

    pub fn guest_end(&self) -> u64 {
        ALL
    }

    /// The front-end's address after the first region.
    pub fn user_end(&self) -> u64 {
        USER + FIRST
    }

    pub fn addresses(&self) -> RingAddresses {
        RingAddresses {
            descriptors: USER + DESCRIPTORS,
            available: USER + AVAILABLE,
            used: USER + USED,
        }
    }

    pub fn layout(&self) -> RingLayout {
        RingLayout::resolve(&self.memory, self.size, &self.addresses()).unwrap()
    }

    pub fn write(&self, guest: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, guest).unwrap();
    }

    pub fn read(&self, guest: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, guest).unwrap();
        bytes
    }

    fn read_u16(&self, guest: u64) -> u16 {
        u16::from_le_bytes(self.read(guest, 2).try_into().unwrap())
    }

    /// Writes a descriptor of the ring's table.
    pub fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        self.descriptor_at(
            DESCRIPTORS + 16 * u64::from(index),
            address,
            len,
            flags,
            next,
        );
    }

    /// Writes a descriptor at a guest address.
    pub fn descriptor_at(&self, place: u64, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = Vec::with_capacity(16);
        bytes.extend(address.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(place, &bytes);
    }

    /// The same, unless it would hit the ring or lie outside memory.
    pub fn try_descriptor_at(&self, place: u64, address: u64, len: u32, flags: u16, next: u16) {
        let ring = DESCRIPTORS..USED + 0x1000;
        if !ring.contains(&(place + 16)) && !ring.contains(&place) && place + 16 <= ALL {
            self.descriptor_at(place, address, len, flags, next);
        }
    }

    /// Makes a head available.
    pub fn offer(&self, head: u16) {
        let index = self.avail.get();
        let entry = u64::from(index % self.size);
        self.write(AVAILABLE + 4 + 2 * entry, &head.to_le_bytes());
        self.set_avail_index(index.wrapping_add(1));
    }

    pub fn set_avail_index(&self, index: u16) {
        self.avail.set(index);
        self.write(AVAILABLE + 2, &index.to_le_bytes());
    }

    pub fn set_avail_flags(&self, flags: u16) {
        self.write(AVAILABLE, &flags.to_le_bytes());
    }

    pub fn set_used_event(&self, event: u16) {
        let place = AVAILABLE + 4 + 2 * u64::from(self.size);
        self.write(place, &event.to_le_bytes());
    }

    /// Starts both rings at this index.
    pub fn set_indices(&self, index: u16) {
        self.set_avail_index(index);
        self.used.set(index);
        self.write(USED + 2, &index.to_le_bytes());
    }

    pub fn used_flags(&self) -> u16 {
        self.read_u16(USED)
    }

    pub fn avail_event(&self) -> u16 {
        self.read_u16(USED + 4 + 8 * u64::from(self.size))
    }

    /// What an earlier device left in the used ring.
    pub fn leave_used(&self, place: u64, head: u32, len: u32) {
        let element = [head.to_le_bytes(), len.to_le_bytes()].concat();
        self.write(USED + 4 + place * 8, &element);
    }

    /// The next used element, if there is one.
    pub fn next_used(&self) -> Option<(u32, u32)> {
        let index = self.used.get();
        if self.read_u16(USED + 2) == index {
            return None;
        }
        self.used.set(index.wrapping_add(1));
        let place = USED + 4 + 8 * u64::from(index % self.size);
        let half = |at| u32::from_le_bytes(self.read(at, 4).try_into().unwrap());
        Some((half(place), half(place + 4)))
    }

    /// Walks the chain at `head`.
    pub fn walk(&self, head: u16, indirect_allowed: bool) -> Outcome {
        let mut chain = Chain::default();
        let layout = self.layout();
        chain.walk(
            &self.memory,
            layout.table(),
            self.size,
            head,
            indirect_allowed,
        )?;
        Ok(chain)
    }

    /// Whether a segment lies in one of the two mappings.
    pub fn holds(&self, segment: &Segment) -> bool {
        let within = |guest: u64, len: u64| {
            let start = self
                .memory
                .translate(GuestAddress(guest), len)
                .unwrap()
                .ptr_guard()
                .as_ptr()
                .addr();
            let end = start + usize::try_from(len).unwrap();
            segment.base.addr() >= start && segment.base.addr() + segment.len <= end
        };
        within(0, FIRST) || within(FIRST, ALL - FIRST)
    }

    /// A dirty log for all of memory, and a function that lists the pages marked in it.
    pub fn dirty_log(&self) -> (Arc<DirtyLog>, impl Fn() -> Vec<usize> + use<>) {
        let file = memfd(4096);
        let log = Arc::new(DirtyLog::map(&file, 0, 4096).unwrap());
        let pages = move || {
            let mut bits = [0u8; 64];
            file.read_exact_at(&mut bits, 0).unwrap();
            (0..512)
                .filter(|page| bits[page / 8] & (1 << (page % 8)) != 0)
                .collect()
        };
        (log, pages)
    }
}
