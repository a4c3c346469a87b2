//! Guest memory: the regions that a front-end shares, and the way from its addresses to ours.
//!
//! A [`GuestMemory`] never changes. A new memory table, an added or a removed region makes a new one, which shares
//! the mappings that stay; workers swap to it between two batches, and requests that are under way keep the one that their
//! addresses came from. So an address that was translated once stays valid as long as its holder keeps the `Arc`.
//!
//! INVARIANT: regions are sorted by guest address; neither guest nor front-end addresses of two regions overlap; no
//! range wraps around.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use vm_memory::volatile_memory::{VolatileMemory, VolatileSlice};
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    GuestMemoryRegionBytes, GuestUsize, MemoryRegionAddress,
};

use super::mapping::Mapping;
use super::message::DESCRIPTORS_MAX;

/// How many regions may be shared at once.
pub const MEMORY_SLOTS_MAX: usize = 509;

/// Of how many files a front-end's memory may be, which each cost a descriptor. Unset: of as many as there are regions.
static FILES_MAX: OnceLock<usize> = OnceLock::new();

/// Bounds the files that a front-end's memory may be of. Only the first call counts. What one message can bring may always be.
pub fn bound_files(files_max: usize) {
    // Set already.
    let _ = FILES_MAX.set(files_max.max(DESCRIPTORS_MAX));
}

/// How many regions a front-end may count on: as many as there may be files of, should each be of its own.
pub fn slots_max() -> usize {
    let files_max = FILES_MAX.get().copied().unwrap_or(MEMORY_SLOTS_MAX);
    files_max.min(MEMORY_SLOTS_MAX)
}

/// A region as a message describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// Its first guest-physical address.
    pub guest: GuestAddress,
    /// Its first address in the front-end's own address space, which ring addresses are given in.
    pub user: u64,
    /// Its bytes.
    pub len: u64,
    /// Where it starts in its file.
    pub offset: u64,
}

/// Why a memory table was refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Ranges wrap around or are empty.
    #[error("region at guest address {:#x} with {len:#x} bytes is empty or wraps around", guest.0)]
    Range {
        /// First guest address.
        guest: GuestAddress,
        /// Bytes.
        len: u64,
    },
    /// Two regions share addresses.
    #[error("region at guest address {:#x} overlaps another one", guest.0)]
    Overlap {
        /// First guest address of the later one.
        guest: GuestAddress,
    },
    /// More regions than slots.
    #[error("more than {MEMORY_SLOTS_MAX} memory regions")]
    TooMany,
    /// More files than one front-end may keep open here.
    #[error(
        "memory of more than {0} files; raise the limit of open files (`ulimit -Hn`) of the daemon"
    )]
    TooManyFiles(usize),
    /// A table with another number of descriptors than regions.
    #[error("{regions} regions came with {files} descriptors")]
    Descriptors {
        /// Regions of the message.
        regions: usize,
        /// Descriptors that came with it.
        files: usize,
    },
    /// No such region to remove.
    #[error("no region at guest address {:#x} with that size and user address", guest.0)]
    Unknown {
        /// Its guest address.
        guest: GuestAddress,
    },
    /// The file could not be mapped.
    #[error("cannot map the region at guest address {:#x}: {source}", guest.0)]
    Map {
        /// Its guest address.
        guest: GuestAddress,
        /// Why.
        source: io::Error,
    },
}

/// One region, mapped.
#[derive(Clone, Debug)]
pub struct Region {
    /// What the front-end said of it.
    spec: RegionSpec,
    /// Its bytes.
    mapping: Arc<Mapping>,
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.spec.len
    }

    fn start_addr(&self) -> GuestAddress {
        self.spec.guest
    }

    /// What is written is logged by the workers, see `dirty_log`.
    fn bitmap(&self) {}

    #[inline]
    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_>, GuestMemoryError> {
        let offset =
            usize::try_from(offset.0).map_err(|_| GuestMemoryError::InvalidBackendAddress)?;
        Ok(self.mapping.get_slice(offset, count)?)
    }
}

impl GuestMemoryRegionBytes for Region {}

/// All the memory of a guest that its front-end shares with us, at one moment.
#[derive(Clone, Debug, Default)]
pub struct GuestMemory {
    /// Sorted by guest address.
    regions: Vec<Region>,
}

impl GuestMemory {
    /// Maps a whole table. The files are closed on return.
    ///
    /// # Errors
    /// Any [`MemoryError`]; nothing stays mapped then.
    pub fn from_table(specs: &[RegionSpec], files: Vec<File>) -> Result<Self, MemoryError> {
        if specs.len() != files.len() {
            return Err(MemoryError::Descriptors {
                regions: specs.len(),
                files: files.len(),
            });
        }
        let mut memory = Self::default();
        for (spec, file) in specs.iter().zip(files) {
            memory = memory.with_region(*spec, &file)?;
        }
        Ok(memory)
    }

    /// The same memory with one region more. The caller closes the file.
    ///
    /// # Errors
    /// Any [`MemoryError`].
    pub fn with_region(&self, spec: RegionSpec, file: &File) -> Result<Self, MemoryError> {
        self.with_region_of(spec, file, slots_max())
    }

    /// The same for memory of so many files.
    fn with_region_of(
        &self,
        spec: RegionSpec,
        file: &File,
        files_max: usize,
    ) -> Result<Self, MemoryError> {
        let ends = (
            spec.guest.0.checked_add(spec.len),
            spec.user.checked_add(spec.len),
        );
        let (Some(_), Some(_), true) = (ends.0, ends.1, spec.len > 0) else {
            return Err(MemoryError::Range {
                guest: spec.guest,
                len: spec.len,
            });
        };
        if self.regions.len() >= MEMORY_SLOTS_MAX {
            return Err(MemoryError::TooMany);
        }
        let clash = |region: &Region| {
            overlap(region.spec.guest.0, region.spec.len, spec.guest.0, spec.len)
                || overlap(region.spec.user, region.spec.len, spec.user, spec.len)
        };
        if self.regions.iter().any(clash) {
            return Err(MemoryError::Overlap { guest: spec.guest });
        }
        let others: Vec<&Mapping> = self.regions.iter().map(|region| &*region.mapping).collect();
        let mapping = Mapping::beside(file, spec.offset, spec.len, &others);
        let mapping = mapping.map_err(|source| MemoryError::Map {
            guest: spec.guest,
            source,
        })?;
        let mut files: BTreeSet<_> = others.iter().map(|other| other.inode()).collect();
        files.insert(mapping.inode());
        if files.len() > files_max {
            return Err(MemoryError::TooManyFiles(files_max));
        }
        let mut regions = self.regions.clone();
        let place = regions.partition_point(|region| region.spec.guest < spec.guest);
        regions.insert(
            place,
            Region {
                spec,
                mapping: Arc::new(mapping),
            },
        );
        Ok(Self { regions })
    }

    /// The same memory without one region, which is named by its addresses and its size (its offset does not matter).
    ///
    /// # Errors
    /// `Unknown`.
    pub fn without_region(&self, spec: RegionSpec) -> Result<Self, MemoryError> {
        let same = |region: &Region| {
            region.spec.guest == spec.guest
                && region.spec.user == spec.user
                && region.spec.len == spec.len
        };
        let place = self
            .regions
            .iter()
            .position(same)
            .ok_or(MemoryError::Unknown { guest: spec.guest })?;
        let mut regions = self.regions.clone();
        regions.remove(place);
        Ok(Self { regions })
    }

    /// The memory at guest address `guest`: as many of `len` bytes from there as are contiguous in this process. `None` if
    /// the address lies nowhere or `len` is 0.
    #[inline]
    pub fn translate(&self, guest: GuestAddress, len: u64) -> Option<VolatileSlice<'_>> {
        let region = self.find_region(guest)?;
        let offset = guest.0 - region.spec.guest.0;
        let run = usize::try_from(len.min(region.spec.len - offset)).ok()?;
        if run == 0 {
            return None;
        }
        region.get_slice(MemoryRegionAddress(offset), run).ok()
    }

    /// The region that holds an address of the front-end's own, and the place of the address in it.
    fn find_user(&self, user: u64) -> Option<(&Region, u64)> {
        self.regions.iter().find_map(|region| {
            let offset = user.checked_sub(region.spec.user)?;
            (offset < region.spec.len).then_some((region, offset))
        })
    }

    /// The guest address of an address of the front-end's own.
    pub fn guest_address(&self, user: u64) -> Option<GuestAddress> {
        let (region, offset) = self.find_user(user)?;
        region.spec.guest.checked_add(offset)
    }

    /// A part of a ring that the front-end names by an address of its own. The whole part must lie in one region
    /// and be aligned in this process.
    pub fn ring_part(&self, user: u64, len: usize, align: usize) -> Option<VolatileSlice<'_>> {
        let (region, offset) = self.find_user(user)?;
        let part = region.get_slice(MemoryRegionAddress(offset), len).ok()?;
        let start = part.ptr_guard().as_ptr().addr();
        start.is_multiple_of(align).then_some(part)
    }

    /// All regions, as messages describe them, with their files.
    pub fn sources(&self) -> impl ExactSizeIterator<Item = (RegionSpec, &Arc<OwnedFd>)> {
        self.regions
            .iter()
            .map(|region| (region.spec, region.mapping.source().0))
    }

    /// The highest guest address, or `None` without memory.
    pub fn last_address(&self) -> Option<GuestAddress> {
        self.regions.last().map(Region::last_addr)
    }

    /// Whether the front-end has taken away a part of it. Exact once [`super::guard::losses`] was looked at.
    pub fn is_lost(&self) -> bool {
        self.regions.iter().any(|region| region.mapping.is_lost())
    }

    /// Whether there is no memory at all.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }
}

/// The consumer side of `vm-memory`, by which its users find their way, such as the checks of `virtio-queue`.
impl GuestMemoryBackend for GuestMemory {
    type R = Region;

    fn iter(&self) -> impl Iterator<Item = &Region> {
        self.regions.iter()
    }

    #[inline]
    fn find_region(&self, guest: GuestAddress) -> Option<&Region> {
        let after = self
            .regions
            .partition_point(|region| region.spec.guest <= guest);
        let region = self.regions.get(after.checked_sub(1)?)?;
        (guest.0 - region.spec.guest.0 < region.spec.len).then_some(region)
    }
}

/// Whether two ranges, neither empty nor wrapping around, share a byte.
fn overlap(a: u64, a_len: u64, b: u64, b_len: u64) -> bool {
    a < b + b_len && b < a + a_len
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]
    use super::*;

    fn memfd(len: u64) -> File {
        let fd = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(len).unwrap();
        file
    }

    fn spec(guest: u64, user: u64, len: u64) -> RegionSpec {
        RegionSpec {
            guest: GuestAddress(guest),
            user,
            len,
            offset: 0,
        }
    }

    #[test]
    fn translation_stops_at_the_end_of_a_region() {
        let memory = GuestMemory::from_table(
            &[
                spec(0x20000, 0x7000_0000, 0x1000),
                spec(0x10000, 0x6000_0000, 0x2000),
            ],
            vec![memfd(0x1000), memfd(0x2000)],
        )
        .unwrap();
        assert!(memory.translate(GuestAddress(0xffff), 1).is_none());
        assert_eq!(
            memory
                .translate(GuestAddress(0x10000), 0x9000)
                .unwrap()
                .len(),
            0x2000
        );
        assert_eq!(memory.translate(GuestAddress(0x11fff), 2).unwrap().len(), 1);
        assert!(memory.translate(GuestAddress(0x12000), 1).is_none());
        assert!(memory.translate(GuestAddress(0x10000), 0).is_none());
        assert!(memory.translate(GuestAddress(u64::MAX), u64::MAX).is_none());
        assert_eq!(memory.last_address(), Some(GuestAddress(0x20fff)));
        assert!(memory.ring_part(0x6000_0000, 0x2000, 16).is_some());
        assert!(memory.ring_part(0x6000_0000, 0x2001, 16).is_none());
        assert!(memory.ring_part(0x6000_0004, 16, 16).is_none());
        assert!(memory.ring_part(0x5fff_ffff, 1, 1).is_none());
    }

    #[test]
    fn overlaps_wrap_arounds_and_short_files_are_refused() {
        let memory =
            GuestMemory::from_table(&[spec(0x1000, 0x9000, 0x1000)], vec![memfd(0x1000)]).unwrap();
        let refuse = |spec: RegionSpec, file: File| memory.with_region(spec, &file).unwrap_err();
        assert!(matches!(
            refuse(spec(0x1fff, 0x20000, 0x1000), memfd(0x1000)),
            MemoryError::Overlap { .. }
        ));
        assert!(matches!(
            refuse(spec(0x5000, 0x9fff, 0x1000), memfd(0x1000)),
            MemoryError::Overlap { .. }
        ));
        assert!(matches!(
            refuse(spec(u64::MAX, 0x20000, 0x1000), memfd(0x1000)),
            MemoryError::Range { .. }
        ));
        assert!(matches!(
            refuse(spec(0x5000, u64::MAX, 0x1000), memfd(0x1000)),
            MemoryError::Range { .. }
        ));
        assert!(matches!(
            refuse(spec(0x5000, 0x20000, 0), memfd(0x1000)),
            MemoryError::Range { .. }
        ));
        assert!(matches!(
            refuse(spec(0x5000, 0x20000, 0x1001), memfd(0x1000)),
            MemoryError::Map { .. }
        ));
        assert!(matches!(
            GuestMemory::from_table(&[spec(0, 0, 0x1000)], vec![]).unwrap_err(),
            MemoryError::Descriptors { .. }
        ));
    }

    #[test]
    fn removal_matches_addresses_and_size_but_not_the_offset() {
        let memory =
            GuestMemory::from_table(&[spec(0x1000, 0x9000, 0x1000)], vec![memfd(0x1000)]).unwrap();
        assert!(memory.without_region(spec(0x1000, 0x9000, 0x800)).is_err());
        assert!(memory.without_region(spec(0x1000, 0x8000, 0x1000)).is_err());
        let other_offset = RegionSpec {
            offset: 77,
            ..spec(0x1000, 0x9000, 0x1000)
        };
        assert!(memory.without_region(other_offset).unwrap().is_empty());
    }

    #[test]
    fn slots_are_bounded() {
        let file = memfd(0x1000);
        let mut memory = GuestMemory::default();
        for slot in 0..MEMORY_SLOTS_MAX as u64 {
            memory = memory
                .with_region(spec(slot * 0x1000, slot * 0x1000, 0x1000), &file)
                .unwrap();
        }
        let one_more = spec(0x1000_0000, 0x1000_0000, 0x1000);
        assert!(matches!(
            memory.with_region(one_more, &file).unwrap_err(),
            MemoryError::TooMany
        ));
    }

    #[test]
    fn files_are_bounded_and_kept_once_each() {
        let (first, second, third) = (memfd(0x4000), memfd(0x1000), memfd(0x1000));
        let place = |slot: u64| spec(slot * 0x1000, slot * 0x1000, 0x1000);
        let mut memory = GuestMemory::default();
        for (slot, file) in [(0, &first), (1, &second), (2, &first), (3, &first)] {
            memory = memory.with_region_of(place(slot), file, 2).unwrap();
        }
        let refused = memory.with_region_of(place(4), &third, 2).unwrap_err();
        assert!(matches!(refused, MemoryError::TooManyFiles(2)), "{refused}");
        let kept: BTreeSet<_> = memory
            .sources()
            .map(|(_, file)| Arc::as_ptr(file))
            .collect();
        assert_eq!(kept.len(), 2);
        // One that goes leaves its place to another.
        let fewer = memory.without_region(place(1)).unwrap();
        assert!(fewer.with_region_of(place(4), &third, 2).is_ok());
    }
}
