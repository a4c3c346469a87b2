//! Which layer has which number in an arena. Keys of frames hold the number, since a uuid would not fit.
//!
//! The table in the arena is what a process finds that takes the arena over; this process looks into its index only. The
//! table is written with plain writes instead of through a mapping: a write into a full file system is an error, where a
//! store would be a SIGBUS, and so the table takes up no more than is used.
//!
//! CRASH: an entry counts if its checksum is right, so at any instant there is a whole entry or none. `number` returns
//! after the entry is written, hence no frame has a number that is not in the table. `forget` comes after the last frame
//! is gone.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use crate::error::{Error, Result};
use crate::limits::LAYER_NUMBER_MAX;
use crate::units::{LayerId, LayerNumber};

/// What to do about an arena that cannot be used and is not removed by itself.
pub(crate) const WAY_OUT: &str =
    "remove the file to go on without the writes in it that no flush covered";

/// Bytes of an entry.
const ENTRY_BYTES: usize = 32;
/// Bytes of the table.
pub const TABLE_BYTES: u64 = LAYER_NUMBER_MAX as u64 * ENTRY_BYTES as u64;
/// The table's first byte in the file.
const TABLE_AT: u64 = 4096;
/// The marks of the first layer in the file: a byte each, in the order of the numbers.
const MARKS_AT: u64 = TABLE_AT + TABLE_BYTES;
/// Bytes of the marks.
pub const MARKS_BYTES: u64 = LAYER_NUMBER_MAX as u64;
/// The mark of a layer whose files may lack what was written to them.
const FAILED: u8 = 1;
/// The mark of a layer to whose file something is being written past the cache.
const PAST: u8 = 2;
/// Entries that are read at once.
const READ_ENTRIES: usize = 2048;

const _: () = assert!((LAYER_NUMBER_MAX as usize).is_multiple_of(READ_ENTRIES));

/// Where the table lies.
#[derive(Debug)]
struct Table {
    /// The arena's file.
    file: Arc<File>,
    /// Its path, for messages.
    path: PathBuf,
}

/// What the table says, in a form that can be searched.
#[derive(Clone, Debug)]
struct Index {
    /// The number of each layer.
    numbers: HashMap<LayerId, LayerNumber>,
    /// The layer of each number.
    layers: HashMap<LayerNumber, LayerId>,
    /// Numbers below `next` that no layer has.
    free: BTreeSet<LayerNumber>,
    /// The lowest number that no layer ever had.
    next: LayerNumber,
    /// Marks, of the layers that have some.
    marks: BTreeMap<LayerNumber, u8>,
}

impl Index {
    /// The layers that have any of these marks.
    fn marked(&self, marks: u8) -> impl Iterator<Item = LayerNumber> {
        let found = self.marks.iter();
        found
            .filter(move |(_, found)| **found & marks != 0)
            .map(|(number, _)| *number)
    }
}

/// The layers that have a number in an arena.
#[derive(Debug)]
pub struct Numbers {
    /// What outlives the process; none for a private arena.
    table: Option<Table>,
    /// The greatest number there is.
    max: LayerNumber,
    /// Never held over anything but one write of an entry.
    index: Mutex<Index>,
}

/// The bytes of an entry.
fn encode(number: LayerNumber, layer: LayerId) -> [u8; ENTRY_BYTES] {
    let mut entry = [0; ENTRY_BYTES];
    let (uuid, rest) = entry.split_at_mut(16);
    uuid.copy_from_slice(layer.0.as_bytes());
    let (crc, _) = rest.split_at_mut(4);
    crc.copy_from_slice(&checksum(number, layer).to_le_bytes());
    entry
}

/// The checksum of an entry. The number is part of it, so that an entry in the wrong place is none.
fn checksum(number: LayerNumber, layer: LayerId) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&number.0.to_le_bytes()), layer.0.as_bytes())
}

/// The layer of an entry, if it is one.
fn decode(number: LayerNumber, entry: &[u8]) -> Option<LayerId> {
    let uuid: &[u8; 16] = entry.first_chunk()?;
    let layer = LayerId(Uuid::from_bytes(*uuid));
    (!layer.0.is_nil() && entry == encode(number, layer)).then_some(layer)
}

/// The marks of a layer in the file.
fn mark_position(number: LayerNumber) -> u64 {
    MARKS_AT + u64::from(number.0).saturating_sub(1)
}

/// The first byte of an entry in the file.
fn position(number: LayerNumber) -> u64 {
    TABLE_AT + u64::from(number.0).saturating_sub(1) * ENTRY_BYTES as u64
}

impl Table {
    /// Writes an entry.
    fn write(&self, number: LayerNumber, entry: &[u8; ENTRY_BYTES]) -> Result<()> {
        self.file
            .write_all_at(entry, position(number))
            .map_err(|source| Error::Io {
                op: "write",
                path: self.path.clone(),
                source,
            })
    }

    /// Writes the marks of a layer.
    fn mark(&self, number: LayerNumber, marks: u8) -> Result<()> {
        self.file
            .write_all_at(&[marks], mark_position(number))
            .map_err(|source| Error::Io {
                op: "write",
                path: self.path.clone(),
                source,
            })
    }

    /// The marks of all numbers that have some.
    fn read_marks(&self) -> io::Result<BTreeMap<LayerNumber, u8>> {
        let mut found = BTreeMap::new();
        let mut chunk = vec![0; READ_ENTRIES * ENTRY_BYTES];
        for first in (1..=LAYER_NUMBER_MAX).step_by(chunk.len()) {
            self.file
                .read_exact_at(&mut chunk, mark_position(LayerNumber(first)))?;
            // Nearly always a hole.
            if chunk.iter().any(|byte| *byte != 0) {
                let marks = (first..).map(LayerNumber).zip(chunk.iter().copied());
                found.extend(marks.filter(|(_, marks)| *marks != 0));
            }
        }
        Ok(found)
    }

    /// All entries, in the order of their numbers.
    fn read(&self) -> io::Result<Vec<(LayerNumber, LayerId)>> {
        let mut found = Vec::new();
        let mut chunk = vec![0; READ_ENTRIES * ENTRY_BYTES];
        for first in (1..=LAYER_NUMBER_MAX).step_by(READ_ENTRIES) {
            let at = position(LayerNumber(first));
            // Nearly all of it are holes.
            self.file.read_exact_at(&mut chunk, at)?;
            if chunk.iter().any(|byte| *byte != 0) {
                let entries = (first..)
                    .map(LayerNumber)
                    .zip(chunk.chunks_exact(ENTRY_BYTES));
                found.extend(
                    entries.filter_map(|(number, entry)| Some((number, decode(number, entry)?))),
                );
            }
        }
        Ok(found)
    }
}

impl Numbers {
    /// The numbers of an arena that dies with the process.
    pub fn private() -> Self {
        Self::new(None, LayerNumber(LAYER_NUMBER_MAX))
    }

    /// No layer has a number.
    fn new(table: Option<Table>, max: LayerNumber) -> Self {
        Self {
            table,
            max,
            index: Mutex::new(Index {
                numbers: HashMap::new(),
                layers: HashMap::new(),
                free: BTreeSet::new(),
                next: LayerNumber(1),
                marks: BTreeMap::new(),
            }),
        }
    }

    /// The same numbers, to die with the process.
    pub fn copy(&self) -> Self {
        let index = self.index().clone();
        Self {
            table: None,
            max: self.max,
            index: Mutex::new(index),
        }
    }

    /// The numbers in an arena's file.
    ///
    /// # Errors
    /// `Io`; `Corrupt` if a layer has two numbers.
    pub fn open(file: Arc<File>, path: &Path) -> Result<Self> {
        let table = Table {
            file,
            path: path.to_owned(),
        };
        let io = |source| Error::Io {
            op: "read",
            path: path.to_owned(),
            source,
        };
        let entries = table.read().map_err(io)?;
        let marks = table.read_marks().map_err(io)?;
        let numbers = Self::new(Some(table), LayerNumber(LAYER_NUMBER_MAX));
        let mut index = numbers.index();
        for (number, layer) in entries {
            if let Some(other) = index.numbers.insert(layer, number) {
                return Err(Error::Corrupt {
                    path: path.to_owned(),
                    what: format!(
                        "layer {layer} has the numbers {other} and {number}; {}",
                        WAY_OUT
                    ),
                });
            }
            index.layers.insert(number, layer);
            let skipped = (index.next.0..number.0).map(LayerNumber);
            index.free.extend(skipped);
            index.next = LayerNumber(number.0.saturating_add(1));
        }
        index.marks = marks;
        drop(index);
        Ok(numbers)
    }

    /// The index. Its holders change it only in ways that leave it whole.
    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of a layer, which gets one if it has none.
    ///
    /// # Errors
    /// `Invalid` if all numbers are taken or the uuid is nil; `Io` if the table takes no entry.
    pub fn number(&self, layer: LayerId) -> Result<LayerNumber> {
        if layer.0.is_nil() {
            return Err(Error::Invalid {
                field: "layer",
                what: "the nil uuid names no layer".into(),
            });
        }
        let mut index = self.index();
        if let Some(number) = index.numbers.get(&layer) {
            return Ok(*number);
        }
        let number = index.free.first().copied().unwrap_or(index.next);
        if number > self.max {
            return Err(Error::Invalid {
                field: "cache",
                what: format!(
                    "all {} layer numbers are taken, none is left for layer {layer}; delete or merge snapshots, or stop the \
                     daemon in an orderly way and start it again",
                    self.max
                ),
            });
        }
        if let Some(table) = &self.table {
            if index.marks.contains_key(&number) {
                // Nobody but a crash leaves the marks of a layer that is gone. Before the entry, which makes them count.
                table.mark(number, 0)?;
            }
            table.write(number, &encode(number, layer))?;
        }
        index.marks.remove(&number);
        if !index.free.remove(&number) {
            index.next = LayerNumber(number.0.saturating_add(1));
        }
        index.numbers.insert(layer, number);
        index.layers.insert(number, layer);
        Ok(number)
    }

    /// The number of a layer, if it has one.
    pub fn find(&self, layer: LayerId) -> Option<LayerNumber> {
        self.index().numbers.get(&layer).copied()
    }

    /// The layer that has a number.
    pub fn layer(&self, number: LayerNumber) -> Option<LayerId> {
        self.index().layers.get(&number).copied()
    }

    /// All layers that have a number, in the order of the numbers.
    pub fn layers(&self) -> Vec<(LayerNumber, LayerId)> {
        let mut all: Vec<_> = self
            .index()
            .layers
            .iter()
            .map(|(number, layer)| (*number, *layer))
            .collect();
        all.sort_unstable();
        all
    }

    /// Marks a layer as one whose files may lack what was written to them, or no longer. The mark outlives the process.
    ///
    /// # Errors
    /// `Io`: it does not outlive the process.
    pub fn set_failed(&self, number: LayerNumber, failed: bool) -> Result<()> {
        self.change_marks(number, |marks| match failed {
            true => marks | FAILED,
            false => marks & PAST,
        })
    }

    /// Marks a layer as one whose file is being written to past the cache, or no longer: a clean frame of it need not have what
    /// the file has. The mark outlives the process.
    ///
    /// # Errors
    /// `Io`: it does not outlive the process.
    pub fn set_past(&self, number: LayerNumber, past: bool) -> Result<()> {
        self.change_marks(number, |marks| match past {
            true => marks | PAST,
            false => marks & !PAST,
        })
    }

    /// Changes the marks of a layer.
    fn change_marks(&self, number: LayerNumber, change: impl FnOnce(u8) -> u8) -> Result<()> {
        let mut index = self.index();
        let before = index.marks.get(&number).copied().unwrap_or(0);
        let marks = change(before);
        // New ones in this process at least, and old ones until they are gone from the table.
        index.marks.insert(number, before | marks);
        if let Some(table) = &self.table {
            table.mark(number, marks)?;
        }
        match marks {
            0 => index.marks.remove(&number),
            _ => index.marks.insert(number, marks),
        };
        Ok(())
    }

    /// The layers that are marked as failed. So is one with a mark that is not known here.
    pub fn failed(&self) -> Vec<LayerId> {
        let index = self.index();
        let layers = index.marked(!PAST);
        layers
            .filter_map(|number| index.layers.get(&number).copied())
            .collect()
    }

    /// The layers whose file is being written to past the cache, or was when the process ended.
    pub fn past(&self) -> Vec<LayerNumber> {
        self.index().marked(PAST).collect()
    }

    /// Takes a layer's number away, for the next layer to have. The caller has dropped all frames with this number, and
    /// nothing is under way that could bring a new one: it would be taken for the next layer's.
    ///
    /// # Errors
    /// `Io`. The layer keeps its number then.
    pub fn forget(&self, layer: LayerId) -> Result<()> {
        let mut index = self.index();
        let Some(number) = index.numbers.get(&layer).copied() else {
            return Ok(());
        };
        if let Some(table) = &self.table {
            if index.marks.contains_key(&number) {
                table.mark(number, 0)?;
            }
            table.write(number, &[0; ENTRY_BYTES])?;
        }
        index.marks.remove(&number);
        index.numbers.remove(&layer);
        index.layers.remove(&number);
        index.free.insert(number);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
