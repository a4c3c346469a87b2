//! A layer's map as a file: opened with recovery, replaced as a whole, appended to.
//!
//! Two rules of `FORMAT.md` are enforced here. A map is only ever replaced by a rename of a complete, synced file. And
//! nothing is appended to a map that was not made clean first: [`MapFile::open`] replaces a map with a torn tail and
//! syncs one without.
//!
//! The caller owns the order of a flush: data synced, then the bytes of [`MapFile::append`] written, then the map
//! synced, and only then the next group's bytes written.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::file::{File, Media, OpenMode};
use crate::format::checkpoint;
use crate::format::header::{HEADER_BYTES, Header};
use crate::format::journal::{self, Entry, JournalEnd, RECORD_BYTES, Replay, Seed};
use crate::map::record::MapRecord;
use crate::map::set::SectorSet;
use crate::units::{Epoch, LayerId};

pub use crate::format::header::{LayerKind, MapHeader, MapState, RawBase};

/// The directory of all layers, relative to the store.
pub const LAYERS_DIR: &str = "layers";
/// The name of a map in its layer's directory.
const MAP_NAME: &str = "map";
/// The name of a map that is being written.
const NEW_NAME: &str = "map.new";
/// The name of the data file in its layer's directory.
const DATA_NAME: &str = "data";
/// Bytes of a journal that are read at once; whole records.
const READ_BYTES: usize = 1 << 20;

const _: () = assert!(READ_BYTES.is_multiple_of(RECORD_BYTES));

/// The directory of a layer, relative to the store.
pub fn layer_dir(layer: LayerId) -> PathBuf {
    Path::new(LAYERS_DIR).join(layer.to_string())
}

/// The data file of a layer, relative to the store.
pub fn data_path(layer: LayerId) -> PathBuf {
    layer_dir(layer).join(DATA_NAME)
}

/// The map of a layer, relative to the store.
pub fn map_path(layer: LayerId) -> PathBuf {
    layer_dir(layer).join(MAP_NAME)
}

/// The leftover of an interrupted replacement, relative to the store.
pub fn new_map_path(layer: LayerId) -> PathBuf {
    layer_dir(layer).join(NEW_NAME)
}

/// What opening a map found in its journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recovery {
    /// Records of the journal that were kept.
    pub records: u64,
    /// The last commit that was kept; 0 if the journal had none.
    pub epoch: Epoch,
    /// Bytes of a flush that power loss cut off, and that no one was told had succeeded.
    pub dropped_bytes: u64,
}

/// Why a map could not be replaced.
#[derive(Debug)]
pub struct ReplaceError {
    /// What went wrong.
    pub error: Error,
    /// Whether the old map is certainly still in force, so that one may go on with it (a full disk while the new one
    /// was written). Otherwise nobody knows which of the two a restart will find; nothing more may be appended to
    /// either.
    pub old_in_force: bool,
}

impl ReplaceError {
    /// Of what failed before the new map took its name.
    fn before(error: Error) -> Self {
        Self {
            error,
            old_in_force: true,
        }
    }
}

impl From<ReplaceError> for Error {
    fn from(error: ReplaceError) -> Self {
        error.error
    }
}

/// What a map holds, read without changing anything.
#[derive(Debug)]
pub struct MapContents {
    /// The header.
    pub header: MapHeader,
    /// Checkpoint and journal.
    pub set: SectorSet,
    /// What became of the journal.
    pub recovery: Recovery,
    /// Counts the files that were this layer's map; 1 for the first.
    pub incarnation: u64,
}

/// The map of one layer, open. One owner; not for concurrent use.
///
/// INVARIANT: all bytes before `next.end` were handed out by `append` or were found whole; all after it are zero.
#[derive(Debug)]
pub struct MapFile {
    /// The file itself.
    file: Arc<dyn File>,
    /// Its header.
    header: Header,
    /// Of the records' CRC.
    seed: Seed,
    /// Where and how the next group goes.
    next: JournalEnd,
    /// Whether the last group was written and not synced.
    end_unsynced: bool,
}

impl MapFile {
    /// Writes the first map of a layer whose directory exists, and syncs it and the directory. The caller syncs the
    /// directory above, which has the layer's name.
    ///
    /// # Errors
    /// `Io`, `Invalid` (a header that cannot be written). The layer's directory is of no more use.
    pub fn create(media: &Arc<dyn Media>, header: &MapHeader, set: &SectorSet) -> Result<Self> {
        Ok(write_map(media, header, 1, set)?)
    }

    /// Writes a new map in place of this one, with the next incarnation and an empty journal: to `map.new`, which
    /// is synced, renamed over `map`, and the directory synced. The commit point is the rename.
    ///
    /// DURABILITY: on return the new map is in force for good. A crash before leaves one or the other, whole.
    ///
    /// # Errors
    /// See [`ReplaceError`]. This map stays usable if the error says so.
    pub fn replace(
        &self,
        media: &Arc<dyn Media>,
        header: &MapHeader,
        set: &SectorSet,
    ) -> std::result::Result<Self, ReplaceError> {
        if header.layer != self.header.map.layer || header.store != self.header.map.store {
            return Err(ReplaceError {
                error: Error::Invalid {
                    field: "map header",
                    what: format!(
                        "layer {} cannot take the map of layer {}",
                        self.header.map.layer, header.layer
                    ),
                },
                old_in_force: true,
            });
        }
        Self::succeed(media, header, self.header.incarnation, set)
    }

    /// As [`MapFile::replace`], for a caller who must not hold the old map meanwhile: names its incarnation instead.
    ///
    /// # Errors
    /// See [`ReplaceError`].
    pub fn succeed(
        media: &Arc<dyn Media>,
        header: &MapHeader,
        incarnation: u64,
        set: &SectorSet,
    ) -> std::result::Result<Self, ReplaceError> {
        write_map(media, header, incarnation.saturating_add(1), set)
    }

    /// Opens a layer's map, recovers its journal and removes what an interrupted replacement left. An active map is
    /// open for writing and clean: a torn tail was replaced away, and everything kept is durable.
    ///
    /// # Errors
    /// `Corrupt` for a damaged checkpoint, or a journal that is damaged rather than torn; `Unsupported`; `Io`.
    pub fn open(
        media: &Arc<dyn Media>,
        layer: LayerId,
    ) -> Result<(Self, MapHeader, SectorSet, Recovery)> {
        remove_file(media, &new_map_path(layer))?;
        let path = map_path(layer);
        let (mut file, header) = open_header(media, layer, OpenMode::ReadOnly)?;
        let active = header.map.state == MapState::Active;
        if active {
            file = media
                .open(&path, OpenMode::ReadWrite, false)
                .map_err(io_error(media, "open", &path))?;
        }
        let (set, end) = read_contents(media, &file, &header, u64::MAX)?;
        let recovery = Recovery::of(&end);
        let mut map = Self {
            file,
            seed: Seed::of(&header),
            header,
            next: end,
            end_unsynced: false,
        };
        if end.dropped_bytes > 0 {
            // DURABILITY: what is appended next must not lie before stale records of the same incarnation.
            let header = map.header.map.clone();
            map = map.replace(media, &header, &set)?;
        } else if active {
            if end.epoch.0 > 0 {
                // DURABILITY: if only the daemon died, the last group may not be on the medium yet; the next one must not
                // get there first, or a tear would look like damage.
                map.file
                    .sync_data()
                    .map_err(io_error(media, "sync", &path))?;
            }
            // DURABILITY: nor may the name be: the map may have taken it a moment before the daemon died.
            sync_name(media, layer)?;
        }
        let header = map.header.map.clone();
        Ok((map, header, set, recovery))
    }

    /// Reads a whole map without changing anything.
    ///
    /// # Errors
    /// As for [`MapFile::open`].
    pub fn read(media: &Arc<dyn Media>, layer: LayerId) -> Result<MapContents> {
        let (file, header) = open_header(media, layer, OpenMode::ReadOnly)?;
        let (set, end) = read_contents(media, &file, &header, u64::MAX)?;
        Ok(MapContents {
            header: header.map,
            set,
            recovery: Recovery::of(&end),
            incarnation: header.incarnation,
        })
    }

    /// Which of the files that were this layer's map is there now: 1 for the first.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported`, `Io`.
    pub fn read_incarnation(media: &Arc<dyn Media>, layer: LayerId) -> Result<u64> {
        Ok(open_header(media, layer, OpenMode::ReadOnly)?.1.incarnation)
    }

    /// Reads a map's header only: one read of 4096 bytes.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported`, `Io`.
    pub fn read_header(media: &Arc<dyn Media>, layer: LayerId) -> Result<MapHeader> {
        Ok(open_header(media, layer, OpenMode::ReadOnly)?.1.map)
    }

    /// Encodes a group, the records and their commit record. The caller writes the bytes at the offset and syncs the
    /// file before it acknowledges anything and before it writes the bytes of the next group. If there is no space it
    /// may write the same bytes again later; after any other failure this map takes no more groups.
    ///
    /// The bytes go right behind the previous group's, so that a sector may be written that holds durable records
    /// already. They are repeated unchanged by the page cache or the engine, and a sector is atomic: they cannot be torn.
    ///
    /// # Panics
    /// If the map is sealed.
    pub fn append(&mut self, records: &[MapRecord]) -> (u64, Vec<u8>) {
        assert_eq!(
            self.header.map.state,
            MapState::Active,
            "a sealed map takes no records"
        );
        let offset = self.next.end;
        let epoch = Epoch(self.next.epoch.0 + 1);
        let count = records.len() as u64;
        let entries = records
            .iter()
            .copied()
            .map(Entry::Change)
            .chain([Entry::Commit {
                epoch,
                records: count,
            }]);
        let mut bytes = Vec::with_capacity(group_bytes(records.len()));
        for (sequence, entry) in (self.next.next_sequence..).zip(entries) {
            bytes.extend_from_slice(&journal::encode(self.seed, sequence, &entry));
        }
        self.next = JournalEnd {
            records: self.next.records + count,
            epoch,
            next_sequence: self.next.next_sequence + count + 1,
            end: offset + bytes.len() as u64,
            dropped_bytes: 0,
        };
        (offset, bytes)
    }

    /// Where and how the next group goes, to come back to if it finds no space.
    pub fn end(&self) -> JournalEnd {
        self.next
    }

    /// Takes back the groups since `end`, none of which anybody was told of, since the last of them found no space: the
    /// journal ends there again, and nothing is left behind its end that could be taken for a record.
    ///
    /// # Errors
    /// The host's answer; nothing may be appended then.
    pub fn take_back(&mut self, end: JournalEnd) -> io::Result<()> {
        self.file.set_len(end.end)?;
        self.next = end;
        Ok(())
    }

    /// Says that the last group was not synced: the next one must not be written before it is.
    pub fn leave_end_unsynced(&mut self) {
        self.end_unsynced = true;
    }

    /// Whether the last group was not synced; the caller syncs the file now, latches a failure or says so again.
    pub fn take_unsynced_end(&mut self) -> bool {
        std::mem::take(&mut self.end_unsynced)
    }

    /// Bytes of the journal.
    pub fn journal_bytes(&self) -> u64 {
        self.next.end - self.header.checkpoint.journal_offset()
    }

    /// The last group that was appended or recovered; 0 before the first.
    pub fn epoch(&self) -> Epoch {
        self.next.epoch
    }

    /// Counts the files that were this layer's map; 1 for the first.
    pub fn incarnation(&self) -> u64 {
        self.header.incarnation
    }

    /// What the map says of its layer.
    pub fn header(&self) -> &MapHeader {
        &self.header.map
    }

    /// The file that groups are written to.
    pub fn file(&self) -> &Arc<dyn File> {
        &self.file
    }
}

impl Recovery {
    /// What the end of a journal tells the caller.
    fn of(end: &JournalEnd) -> Self {
        Self {
            records: end.records,
            epoch: end.epoch,
            dropped_bytes: end.dropped_bytes,
        }
    }
}

/// Bytes of a group of so many records.
fn group_bytes(records: usize) -> usize {
    records.saturating_add(1).saturating_mul(RECORD_BYTES)
}

/// Removes a file, which need not be there. Returns whether it was.
///
/// # Errors
/// `Io`.
pub(crate) fn remove_file(media: &Arc<dyn Media>, path: &Path) -> Result<bool> {
    match media.remove(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(io_error(media, "remove", path)(error)),
    }
}

/// Adds the operation and the file to the host's answer.
pub(crate) fn io_error<'a>(
    media: &'a Arc<dyn Media>,
    op: &'static str,
    path: &'a Path,
) -> impl Fn(io::Error) -> Error + 'a {
    move |source| Error::Io {
        op,
        path: media.display_path(path),
        source,
    }
}

/// Opens a map and reads its header, which must be that of this layer.
fn open_header(
    media: &Arc<dyn Media>,
    layer: LayerId,
    mode: OpenMode,
) -> Result<(Arc<dyn File>, Header)> {
    let path = map_path(layer);
    let file = media
        .open(&path, mode, false)
        .map_err(io_error(media, "open", &path))?;
    let len = file.len().map_err(io_error(media, "stat", &path))?;
    let mut bytes = vec![0; HEADER_BYTES.min(usize::try_from(len).unwrap_or(HEADER_BYTES))];
    file.read_at(&mut bytes, 0)
        .map_err(io_error(media, "read", &path))?;
    let header =
        Header::decode(&bytes).map_err(|error| error.in_map(media.display_path(&path), layer))?;
    if header.map.layer != layer {
        return Err(Error::Corrupt {
            path: media.display_path(&path),
            what: format!(
                "it lies in the directory of layer {layer}, its header says layer {}",
                header.map.layer
            ),
        });
    }
    Ok((file, header))
}

/// Reads checkpoint and journal, up to a byte of the file.
fn read_contents(
    media: &Arc<dyn Media>,
    file: &Arc<dyn File>,
    header: &Header,
    until: u64,
) -> Result<(SectorSet, JournalEnd)> {
    let path = map_path(header.map.layer);
    let damaged = |error: crate::format::FormatError| {
        error.in_map(media.display_path(&path), header.map.layer)
    };
    let len = file.len().map_err(io_error(media, "stat", &path))?;
    let len = len.min(until);
    // The header's lengths are believed only as far as there is a file for them, before any memory is taken.
    let (start, end) = (header.checkpoint.offset(), header.checkpoint.end());
    if end > len {
        return Err(damaged(checkpoint::cut_off(header, len)));
    }
    let mut bytes = vec![
        0;
        usize::try_from(end - start)
            .map_err(|_| damaged(checkpoint::cut_off(header, len)))?
    ];
    file.read_at(&mut bytes, start)
        .map_err(io_error(media, "read", &path))?;
    let set = checkpoint::decode(header, &bytes).map_err(damaged)?;

    let mut replay = Replay::new(header, set);
    let mut offset = end;
    while offset < len {
        let count = usize::try_from(len - offset)
            .unwrap_or(READ_BYTES)
            .min(READ_BYTES);
        bytes.resize(count, 0);
        file.read_at(&mut bytes, offset)
            .map_err(io_error(media, "read", &path))?;
        replay.feed(&bytes);
        offset += count as u64;
    }
    replay.finish().map_err(damaged)
}

/// Makes sure that the map of a layer has its name for good: a daemon that died may have given it to it a moment before.
///
/// # Errors
/// `Io`.
pub fn sync_name(media: &Arc<dyn Media>, layer: LayerId) -> Result<()> {
    let dir = layer_dir(layer);
    media.sync_dir(&dir).map_err(io_error(media, "sync", &dir))
}

/// Writes a whole map and gives it its name.
fn write_map(
    media: &Arc<dyn Media>,
    map: &MapHeader,
    incarnation: u64,
    set: &SectorSet,
) -> std::result::Result<MapFile, ReplaceError> {
    let new = write_new(media, map, incarnation, set).map_err(ReplaceError::before)?;
    take_name(media, map.layer)?;
    Ok(new)
}

/// Writes a whole map beside the one in force, and syncs it.
fn write_new(
    media: &Arc<dyn Media>,
    map: &MapHeader,
    incarnation: u64,
    set: &SectorSet,
) -> Result<MapFile> {
    let new = new_map_path(map.layer);
    let (header, bytes) =
        checkpoint::encode(map, incarnation, set).map_err(|error| Error::Invalid {
            field: "map header",
            what: error.to_string(),
        })?;
    remove_file(media, &new)?;
    let write = || -> Result<Arc<dyn File>> {
        let file = media
            .open(&new, OpenMode::CreateNew, false)
            .map_err(io_error(media, "create", &new))?;
        file.write_at(&bytes, 0)
            .map_err(io_error(media, "write", &new))?;
        file.sync_data().map_err(io_error(media, "sync", &new))?;
        Ok(file)
    };
    // Best effort, to give the space back: a leftover is ignored, and removed when the map is next opened.
    let file = write().inspect_err(|_| drop(media.remove(&new)))?;
    Ok(MapFile {
        file,
        seed: Seed::of(&header),
        next: JournalEnd::empty(&header),
        header,
        end_unsynced: false,
    })
}

/// Gives the map that was written beside the one in force its name.
fn take_name(media: &Arc<dyn Media>, layer: LayerId) -> std::result::Result<(), ReplaceError> {
    let (new, path, dir) = (new_map_path(layer), map_path(layer), layer_dir(layer));
    // While nothing has changed: a process with a full table of descriptors cannot open what it has to sync.
    let directory = media.open_dir(&dir).map_err(|error| {
        // Best effort, as in `write_new`.
        drop(media.remove(&new));
        ReplaceError::before(io_error(media, "open", &dir)(error))
    })?;
    // DURABILITY: complete and synced before it gets the name; from here on a crash leaves either map.
    media
        .rename(&new, &path)
        .map_err(io_error(media, "rename", &new))
        .and_then(|()| directory.sync().map_err(io_error(media, "sync", &dir)))
        .map_err(|error| ReplaceError {
            error,
            old_in_force: false,
        })
}

mod successor;
pub use successor::{Mark, Successor};

#[cfg(test)]
mod tests;
