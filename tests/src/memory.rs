//! Guest memory: regions of shared memory at guest addresses, as a front-end hands them to a back-end.
//!
//! The addresses that the front-end itself would see (UVA) are made up and differ from the guest's (GPA) and from region to
//! region, so that a back-end which mixes them up fails.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::volatile_memory::VolatileMemory;
use vm_memory::{AtomicAccess, Bytes, FileOffset, MmapRegion};

/// Bytes of a page, the unit of mappings and of the dirty log.
pub const PAGE: u64 = 4096;

/// Creates an anonymous shared file of this many bytes.
pub fn memfd(bytes: u64) -> File {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&fd, bytes).expect("a memfd takes a size");
    File::from(fd)
}

/// A place in the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Its guest physical address.
    pub gpa: u64,
    /// Its length in bytes.
    pub len: u32,
    /// Whether the device may write it.
    pub writable: bool,
}

impl Buffer {
    /// The two halves of this buffer, the first of `at` bytes.
    pub fn split(self, at: u32) -> [Self; 2] {
        let first = Self { len: at, ..self };
        [
            first,
            Self {
                gpa: self.gpa + u64::from(at),
                len: self.len - at,
                ..self
            },
        ]
    }

    /// This buffer cut into pieces of at most `bytes`.
    pub fn pieces(self, bytes: u32) -> Vec<Self> {
        let mut rest = self;
        let mut pieces = Vec::new();
        while rest.len > bytes {
            let [piece, tail] = rest.split(bytes);
            pieces.push(piece);
            rest = tail;
        }
        pieces.push(rest);
        pieces
    }
}

/// What a message says about a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// Where it lies for the guest.
    pub gpa: u64,
    /// Its length.
    pub bytes: u64,
    /// Where it lies for the front-end.
    pub uva: u64,
    /// Where it begins in its file.
    pub mmap_offset: u64,
}

impl RegionInfo {
    /// The region as it stands in a message.
    pub fn encode(&self) -> Vec<u8> {
        [self.gpa, self.bytes, self.uva, self.mmap_offset]
            .map(u64::to_le_bytes)
            .concat()
    }
}

/// A region with its file and our own mapping of it.
#[derive(Debug)]
pub struct Region {
    /// What the back-end is told.
    pub info: RegionInfo,
    /// The shared file behind it.
    file: File,
    /// Our view of it.
    mapping: MmapRegion,
}

impl Region {
    /// Creates a region of zeroes; its file holds exactly what the region needs.
    pub fn new(info: RegionInfo) -> Self {
        Self::of_file(info, &memfd(info.mmap_offset + info.bytes))
    }

    /// Creates a region of a file that holds it.
    pub fn of_file(info: RegionInfo, file: &File) -> Self {
        let [file, shared] = [(); 2].map(|()| file.try_clone().expect("another descriptor"));
        let mapping = MmapRegion::from_file(
            FileOffset::new(shared, info.mmap_offset),
            usize::try_from(info.bytes).expect("64-bit host"),
        )
        .expect("a mapping of a memfd");
        Self {
            info,
            file,
            mapping,
        }
    }

    /// Its file, to be sent along.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Cuts its file to nothing under everybody who has mapped it. Nobody here may touch it afterwards.
    pub fn shrink(&self) {
        ftruncate(&self.file, 0).expect("a memfd can be cut");
    }

    /// Whether the whole range lies inside.
    fn holds(&self, gpa: u64, bytes: u64) -> bool {
        let end = self.info.gpa + self.info.bytes;
        gpa >= self.info.gpa && gpa.checked_add(bytes).is_some_and(|last| last <= end)
    }
}

/// Memory in regions, with a bump allocator.
#[derive(Debug)]
pub struct GuestMemory {
    /// In ascending order of guest addresses.
    regions: Vec<Region>,
    /// The next free guest address; memory is never given back.
    next: AtomicU64,
}

impl GuestMemory {
    /// The usual layout: two regions of 4 MiB, neighbours for the guest but not for the host, the first not at the start of
    /// its file.
    pub fn two_regions() -> Self {
        const BYTES: u64 = 4 << 20;
        Self::new(&[
            RegionInfo {
                gpa: 1 << 20,
                bytes: BYTES,
                uva: 0x7f32_0000_0000,
                mmap_offset: 2 * PAGE,
            },
            RegionInfo {
                gpa: (1 << 20) + BYTES,
                bytes: BYTES,
                uva: 0x7f11_0000_0000,
                mmap_offset: 0,
            },
        ])
    }

    /// Memory of these regions, which must be in ascending order.
    pub fn new(regions: &[RegionInfo]) -> Self {
        let next = AtomicU64::new(regions.first().expect("a region").gpa);
        Self {
            regions: regions.iter().copied().map(Region::new).collect(),
            next,
        }
    }

    /// The regions.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The first address behind all regions.
    pub fn end(&self) -> u64 {
        self.regions
            .last()
            .map_or(0, |region| region.info.gpa + region.info.bytes)
    }

    /// Takes memory that lies in one region, all of it zero.
    ///
    /// # Panics
    /// When there is none left.
    pub fn allocate(&self, bytes: u64, align: u64) -> u64 {
        let mut start = self.next.load(Ordering::Relaxed).next_multiple_of(align);
        if !self.regions.iter().any(|region| region.holds(start, bytes)) {
            start = self
                .regions
                .iter()
                .map(|region| region.info.gpa)
                .find(|&gpa| gpa > start && self.region(gpa, bytes).is_some())
                .expect("enough guest memory for the test");
        }
        self.next.store(start + bytes, Ordering::Relaxed);
        start
    }

    /// A buffer that the device reads, with this content.
    pub fn readable(&self, bytes: &[u8]) -> Buffer {
        let len = u32::try_from(bytes.len()).expect("a short buffer");
        let gpa = self.allocate(u64::from(len), 16);
        self.write(gpa, bytes);
        Buffer {
            gpa,
            len,
            writable: false,
        }
    }

    /// A buffer that the device writes, filled with [`POISON`].
    pub fn writable(&self, len: u32) -> Buffer {
        let gpa = self.allocate(u64::from(len), 16);
        self.write(
            gpa,
            &vec![POISON; usize::try_from(len).expect("64-bit host")],
        );
        Buffer {
            gpa,
            len,
            writable: true,
        }
    }

    /// Where the front-end would see this address.
    pub fn uva(&self, gpa: u64) -> u64 {
        let region = self.region(gpa, 1).expect("an address of the guest");
        gpa - region.info.gpa + region.info.uva
    }

    /// Copies bytes into the memory.
    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        let (region, offset) = self.find(gpa, bytes.len());
        let slice = region
            .mapping
            .get_slice(offset, bytes.len())
            .expect("checked");
        slice.write_slice(bytes, 0).expect("inside the slice");
    }

    /// Copies bytes out of the memory.
    pub fn read(&self, gpa: u64, count: usize) -> Vec<u8> {
        let (region, offset) = self.find(gpa, count);
        let mut bytes = vec![0; count];
        let slice = region.mapping.get_slice(offset, count).expect("checked");
        slice.read_slice(&mut bytes, 0).expect("inside the slice");
        bytes
    }

    /// The content of a buffer.
    pub fn bytes(&self, buffer: Buffer) -> Vec<u8> {
        self.read(
            buffer.gpa,
            usize::try_from(buffer.len).expect("64-bit host"),
        )
    }

    /// Loads one atomic value (little-endian as on the host).
    pub fn load<T: AtomicAccess>(&self, gpa: u64, order: Ordering) -> T {
        let (region, offset) = self.find(gpa, size_of::<T>());
        let slice = region
            .mapping
            .get_slice(offset, size_of::<T>())
            .expect("checked");
        slice.load(0, order).expect("an aligned place")
    }

    /// Stores one atomic value (little-endian as on the host).
    pub fn store<T: AtomicAccess>(&self, gpa: u64, value: T, order: Ordering) {
        let (region, offset) = self.find(gpa, size_of::<T>());
        let slice = region
            .mapping
            .get_slice(offset, size_of::<T>())
            .expect("checked");
        slice.store(value, 0, order).expect("an aligned place");
    }

    /// All bytes of all regions.
    pub fn snapshot(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for region in &self.regions {
            let bytes = usize::try_from(region.info.bytes).expect("64-bit host");
            all.extend(self.read(region.info.gpa, bytes));
        }
        all
    }

    /// The region that holds the whole range.
    fn region(&self, gpa: u64, bytes: u64) -> Option<&Region> {
        self.regions.iter().find(|region| region.holds(gpa, bytes))
    }

    /// The region that holds the whole range, and where in it.
    fn find(&self, gpa: u64, count: usize) -> (&Region, usize) {
        let bytes = u64::try_from(count).expect("64-bit host");
        let region = self
            .region(gpa, bytes)
            .unwrap_or_else(|| panic!("{count} bytes at {gpa:#x} lie in no region"));
        (
            region,
            usize::try_from(gpa - region.info.gpa).expect("64-bit host"),
        )
    }
}

/// What a buffer holds before the device writes it.
pub const POISON: u8 = 0xee;
