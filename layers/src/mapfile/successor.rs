//! A map that is written beside the one in force, which goes on taking groups meanwhile, and takes its name later.
//!
//! Of a disk that is written here and there the map is megabytes long. Who leads the flushes of a volume keeps all of them
//! waiting, so what takes that long is done before: while it leads, only the groups since are copied.
//!
//! DURABILITY: as [`MapFile::replace`]. What was appended since is a group of the new journal before that has its name.

use std::sync::Arc;

use super::{
    MapFile, ReplaceError, Result, io_error, map_path, new_map_path, open_header, read_contents,
    take_name, write_new,
};
use crate::canary::{self, Canary};
use crate::error::Error;
use crate::file::{Media, OpenMode};
use crate::format::journal::{self, JournalEnd};
use crate::map::record::MapRecord;
use crate::mapfile::MapHeader;
use crate::units::LayerId;

/// Up to where a map is copied before anybody has to wait.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    /// Of which layer.
    layer: LayerId,
    /// Which of its maps.
    incarnation: u64,
    /// Of its journal.
    end: JournalEnd,
}

impl MapFile {
    /// What the map says up to now; the caller leads the flushes, and all that was appended is written.
    pub fn mark(&self) -> Mark {
        Mark {
            layer: self.header.map.layer,
            incarnation: self.header.incarnation,
            end: self.next,
        }
    }
}

/// A map that has no name yet. One owner; dropped, it leaves nothing.
#[derive(Debug)]
pub struct Successor {
    /// The new map.
    map: MapFile,
    /// Where it is.
    file: Unnamed,
    /// What it says.
    mark: Mark,
}

/// The file of a map that has no name yet.
#[derive(Debug)]
struct Unnamed {
    /// Where it is.
    media: Arc<dyn Media>,
    /// Whose map it is.
    layer: LayerId,
    /// Whether it got its name, or may have got it.
    named: bool,
}

impl Drop for Unnamed {
    fn drop(&mut self) {
        if !self.named {
            // Best effort: a leftover is ignored, and removed when the map is next opened.
            drop(self.media.remove(&new_map_path(self.layer)));
        }
    }
}

impl Successor {
    /// Writes it, with all that the map in force said up to `mark`. Others may append to that one meanwhile.
    ///
    /// # Errors
    /// `Corrupt`, `Io`, `Invalid` (a header that cannot be written); the map in force stays as it is.
    pub fn write(media: &Arc<dyn Media>, header: &MapHeader, mark: Mark) -> Result<Self> {
        let (file, old) = open_header(media, mark.layer, OpenMode::ReadOnly)?;
        let (set, end) = read_contents(media, &file, &old, mark.end.end)?;
        let path = map_path(mark.layer);
        if old.incarnation != mark.incarnation || end != mark.end {
            return Err(Error::Corrupt {
                path: media.display_path(&path),
                what: format!(
                    "what was written to it is not what it says: commit {} of map {} is there, and {} of {} should be",
                    end.epoch.0, old.incarnation, mark.end.epoch.0, mark.incarnation
                ),
            });
        }
        let map = write_new(media, header, mark.incarnation.saturating_add(1), &set)?;
        let file = Unnamed {
            media: Arc::clone(media),
            layer: mark.layer,
            named: false,
        };
        Ok(Self { map, file, mark })
    }

    /// Puts it in force in place of `old`: with what was appended to that one since, and then `more`. The caller leads the
    /// flushes, and all that was appended is written.
    ///
    /// # Errors
    /// See [`ReplaceError`].
    pub fn take_over(
        mut self,
        old: &MapFile,
        more: impl Iterator<Item = MapRecord>,
    ) -> std::result::Result<MapFile, ReplaceError> {
        let mut records = self.since(old).map_err(ReplaceError::before)?;
        records.extend(more);
        if !records.is_empty() {
            self.append(&records).map_err(ReplaceError::before)?;
        }
        // Whatever comes now, it is not ours to remove any more.
        self.file.named = true;
        take_name(&self.file.media, self.mark.layer)?;
        Ok(self.map)
    }

    /// Adds a group to the new map, for good.
    fn append(&mut self, records: &[MapRecord]) -> Result<()> {
        let (media, path) = (&self.file.media, new_map_path(self.mark.layer));
        let (offset, bytes) = self.map.append(records);
        let file = self.map.file();
        file.write_at(&bytes, offset)
            .map_err(io_error(media, "write", &path))?;
        file.sync_data().map_err(io_error(media, "sync", &path))
    }

    /// What was appended to the map in force since it was copied.
    fn since(&self, old: &MapFile) -> Result<Vec<MapRecord>> {
        let (mark, path) = (self.mark, map_path(self.mark.layer));
        if canary::is_set(Canary::ForgetSince) {
            return Ok(Vec::new());
        }
        let damaged = |what: String| Error::Corrupt {
            path: self.file.media.display_path(&path),
            what,
        };
        let same = old.header.incarnation == mark.incarnation;
        let Some(bytes) = old.next.end.checked_sub(mark.end.end).filter(|_| same) else {
            return Err(damaged(
                "it was replaced while its successor was written".into(),
            ));
        };
        let bytes =
            usize::try_from(bytes).map_err(|_| damaged(format!("a journal of {bytes} bytes")))?;
        let mut read = vec![0; bytes];
        old.file.read_at(&mut read, mark.end.end).map_err(io_error(
            &self.file.media,
            "read",
            &path,
        ))?;
        journal::changes(old.seed, mark.end, old.next, &read)
            .map_err(|error| error.in_map(self.file.media.display_path(&path), mark.layer))
    }
}
