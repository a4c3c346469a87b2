//! The memory of the sector cache of one store: sets and frames in a file in shared memory, so that they outlive the
//! process. `ARENA.md` says byte for byte what is in it.
//!
//! ```text
//! header page | layer numbers | sets (320 bytes each) | frames, way by way: frame of (set, way) = way * sets + set
//! ```
//!
//! The protocol of sets and frames is not known here. What is: which file is the arena of which store, that only one
//! process has it, and that every byte handed out has memory behind it, as long as the arena lives.

pub mod file;
pub mod geometry;
pub mod header;
pub mod last;
pub mod look;
pub mod memory;
pub mod place;

use std::io;
use std::path::Path;
use std::slice;

use crate::cache::numbers::Numbers;
use crate::cache::set::{Set, WAYS};
use crate::error::{Error, Result};
use crate::sync::{AtomicBool, Ordering};
use crate::units::CLUSTER_BYTES;

use file::{ArenaFile, Verdict};
use geometry::{Geometry, HUGE_BYTES, SETS_AT};
use memory::Memory;
pub use place::{DirId, Place};

/// Bytes of a frame.
pub const FRAME_BYTES: usize = 4096;
/// Huge pages that the host refuses in a row before it is left alone: looking for them costs it time.
const HUGE_REFUSALS_MAX: u32 = 16;

const _: () = assert!(FRAME_BYTES as u64 == CLUSTER_BYTES);
// All zeroes are a set, so fresh memory is an arena of empty sets; and sets follow one another without a gap.
const _: () = assert!(align_of::<Set>() <= 4096);

/// The sets and frames of a store's cache.
///
/// INVARIANT: `memory` has `sets` sets at its start and `WAYS * sets` frames at `data_offset`, all of them writable.
#[derive(Debug)]
pub struct Arena {
    /// The pages.
    memory: Memory,
    /// How many sets there are.
    sets: usize,
    /// The first frame, counted from the start of `memory`.
    data_offset: usize,
    /// Where everything lies.
    geometry: Geometry,
    /// Which layer has which number.
    numbers: Numbers,
    /// The file; none for memory that dies with the process. Its lock is held as long as this.
    file: Option<ArenaFile>,
}

impl Arena {
    /// Puts an arena together.
    fn new(
        memory: Memory,
        geometry: Geometry,
        numbers: Numbers,
        file: Option<ArenaFile>,
    ) -> Result<Self> {
        let size = |bytes| usize::try_from(bytes).map_err(|_| impossible(geometry.sets));
        Ok(Self {
            memory,
            sets: size(geometry.sets)?,
            data_offset: size(geometry.data_offset())?,
            geometry,
            numbers,
            file,
        })
    }

    /// An arena that dies with the process: for tests and simulations. Takes memory only as it is touched.
    ///
    /// # Errors
    /// `InvalidInput` for a size that cannot be; the host's answer.
    pub fn private(sets: usize) -> io::Result<Self> {
        let invalid = |error: Error| io::Error::new(io::ErrorKind::InvalidInput, error);
        let geometry = geometry_of(sets).map_err(invalid)?;
        let memory = Memory::anonymous(geometry.mapped_bytes())?;
        Self::new(memory, geometry, Numbers::private(), None).map_err(invalid)
    }

    /// A private arena that holds what this one holds now: what is found after the process was killed at this instant. For
    /// simulations, where nobody changes the arena meanwhile.
    ///
    /// # Errors
    /// The host has no room.
    pub fn copy(&self) -> io::Result<Self> {
        let mut copy = Self::private(self.sets)?;
        copy.numbers = self.numbers.copy();
        for (at, (from, to)) in self.all().iter().zip(copy.all()).enumerate() {
            to.copy_from(from);
            for (way, key) in from.keys.iter().enumerate() {
                if key.load(Ordering::Relaxed) != 0 {
                    #[expect(unsafe_code, reason = "copies frames")]
                    // SAFETY: both arenas have this set and way, so both frames are valid for all their bytes; the two
                    // mappings are apart.
                    unsafe {
                        super::copy::copy(copy.frame(at, way), self.frame(at, way), FRAME_BYTES);
                    }
                }
            }
        }
        Ok(copy)
    }

    /// Makes a new arena of empty sets. A file of this store that is in the way and cannot be adopted is removed: to call
    /// this after an error of `adopt` is to decide to do without what it held.
    ///
    /// # Errors
    /// `Busy` if another process has it; `Invalid` if what is there can be adopted, and must be, since it may
    /// hold writes that are nowhere else; or if there is no room, or something in the way that is not this user's or
    /// not this store's; `Io`.
    pub fn create(place: &Place, sets: usize) -> Result<Self> {
        let geometry = geometry_of(sets)?;
        if let Some(found) = ArenaFile::open(place)? {
            match found.judge(place)? {
                Verdict::Adoptable(_) => {
                    return Err(Error::Invalid {
                        field: "cache file",
                        what: format!(
                            "{} is to be taken over, not replaced: it may hold writes that are nowhere else",
                            found.path.display()
                        ),
                    });
                }
                Verdict::Foreign(error) => return Err(error),
                Verdict::Stale | Verdict::Unusable(_) => found.remove()?,
            }
        }
        let file = ArenaFile::create(place)?;
        match Self::furnish(&file, place, geometry) {
            Ok((memory, numbers)) => Self::new(memory, geometry, numbers, Some(file)),
            Err(error) => {
                // What cannot be removed now has no header, and goes when the next one comes.
                drop(file.remove());
                Err(error)
            }
        }
    }

    /// Makes an arena of an empty file. The header comes last.
    fn furnish(file: &ArenaFile, place: &Place, geometry: Geometry) -> Result<(Memory, Numbers)> {
        file.reserve(&geometry)?;
        let memory = map(file, &geometry)?;
        let numbers = Numbers::open(file.file.clone(), &file.path)?;
        file.write_header(place, &geometry)?;
        Ok((memory, numbers))
    }

    /// Takes over the arena that a process of this boot left behind, with the size that it has. `None` if there is none;
    /// a file that holds nothing for anybody (never finished, or of another boot) is removed.
    ///
    /// # Errors
    /// `Busy` if another process has it; `Invalid` if it is not ours or another store's; `Corrupt`; `Unsupported`; `Io`.
    /// Nothing is removed then.
    pub fn adopt(place: &Place) -> Result<Option<Self>> {
        let Some(file) = ArenaFile::open(place)? else {
            return Ok(None);
        };
        let geometry = match file.judge(place)? {
            Verdict::Adoptable(geometry) => geometry,
            Verdict::Stale => {
                file.remove()?;
                return Ok(None);
            }
            Verdict::Unusable(error) | Verdict::Foreign(error) => return Err(error),
        };
        file.complete(&geometry)?;
        let memory = map(&file, &geometry)?;
        let numbers = Numbers::open(file.file.clone(), &file.path)?;
        Self::new(memory, geometry, numbers, Some(file)).map(Some)
    }

    /// Removes the arena's file: after an orderly end there is nothing to take over. The arena stays usable.
    ///
    /// # Errors
    /// `Io`.
    pub fn remove(&self) -> Result<()> {
        self.file.as_ref().map_or(Ok(()), ArenaFile::remove)
    }

    /// The arena's file, if it has one.
    pub fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(|file| file.path.as_path())
    }

    /// How many sets there are.
    #[inline]
    pub fn sets(&self) -> usize {
        self.sets
    }

    /// All sets.
    #[inline]
    pub fn all(&self) -> &[Set] {
        let first = self.memory.start().cast::<Set>();
        #[expect(unsafe_code, reason = "the sets lie in mapped memory")]
        // SAFETY:
        // - By the invariant `sets` sets lie there, readable and writable; they start at a page, so they are aligned.
        // - A set consists of atomics alone, for which any bytes are values, and which others may change.
        // - The pages are unmapped when `self` goes, which the slice borrows.
        unsafe {
            slice::from_raw_parts(first.as_ptr(), self.sets)
        }
    }

    /// The first byte of the frame of a way of a set. Valid for 4096 bytes, as long as the arena lives, if there are
    /// such a set and way; who may touch them when is for the protocol of frames to say.
    #[inline]
    pub fn frame(&self, set: usize, way: usize) -> *mut u8 {
        debug_assert!(set < self.sets && way < WAYS, "no way {way} of set {set}");
        let frame = way.wrapping_mul(self.sets).wrapping_add(set);
        let offset = frame
            .wrapping_mul(FRAME_BYTES)
            .wrapping_add(self.data_offset);
        self.memory.start().as_ptr().wrapping_add(offset)
    }

    /// Which layer has which number.
    pub fn numbers(&self) -> &Numbers {
        &self.numbers
    }

    /// Replaces the small pages of a shared arena by huge ones, one by one, and returns how many bytes have them. Takes
    /// milliseconds a page, hence for a thread in the background; ends early if told to. What the host does not grant
    /// stays as it is: the arena works the same, only slower.
    pub fn huge_pages(&self, stop: &AtomicBool) -> u64 {
        if self.file.is_none() {
            // The host was asked once and for all when the memory was mapped.
            return 0;
        }
        let whole =
            |start: u64, bytes: u64| (0..bytes / HUGE_BYTES).map(move |n| start + n * HUGE_BYTES);
        let geometry = &self.geometry;
        let sets = whole(0, geometry.sets_bytes);
        let frames = whole(geometry.data_offset(), geometry.data_bytes);
        let (mut done, mut refused) = (0, 0);
        for chunk in sets.chain(frames) {
            // ORDERING: Relaxed. The flag carries no data; one chunk more does no harm.
            if stop.load(Ordering::Relaxed) || refused == HUGE_REFUSALS_MAX {
                break;
            }
            match self.memory.collapse(chunk) {
                Ok(()) => (done, refused) = (done + HUGE_BYTES, 0),
                Err(_) => refused += 1,
            }
        }
        done
    }
}

/// The error of a number of sets that cannot be.
fn impossible(sets: u64) -> Error {
    Error::Invalid {
        field: "cache size",
        what: format!("there can be no cache of {sets} sets of {WAYS} frames"),
    }
}

/// The geometry for a number of sets.
fn geometry_of(sets: usize) -> Result<Geometry> {
    let sets = sets as u64;
    Geometry::of(sets).ok_or_else(|| impossible(sets))
}

/// Maps sets and frames of a file that has pages for all of them.
fn map(file: &ArenaFile, geometry: &Geometry) -> Result<Memory> {
    Memory::shared(&file.file, SETS_AT, geometry.mapped_bytes()).map_err(|source| Error::Io {
        op: "map",
        path: file.path.clone(),
        source,
    })
}

#[cfg(all(test, not(loom)))]
mod tests;
