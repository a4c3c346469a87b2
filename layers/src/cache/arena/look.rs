//! What a process that is gone has left in the arena of a store: read through the file, nothing mapped, nothing changed.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::file::{ArenaFile, Verdict};
use super::geometry::{Geometry, SET_BYTES, SETS_AT};
use super::place::Place;
use crate::cache::numbers::Numbers;
use crate::cache::set::{FrameKey, Set, State, WAYS};
use crate::error::{Error, Result};
use crate::units::{LayerId, SectorMask};

/// Sets that are read at once.
const CHUNK_SETS: u64 = 4096;

/// An arena that waits to be taken over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    /// Its file.
    pub path: PathBuf,
    /// Bytes of the file, all of them memory.
    pub bytes: u64,
    /// Clusters that were written and are not in their layer's file, as far as the arena knows: how many of which layer.
    pub dirty: BTreeMap<LayerId, u64>,
}

/// Looks at the arena of a store that nobody serves. `None` if there is none to take over.
///
/// # Errors
/// As [`super::Arena::adopt`].
pub fn look(place: &Place) -> Result<Option<Left>> {
    let Some(file) = ArenaFile::open(place)? else {
        return Ok(None);
    };
    let geometry = match file.judge(place)? {
        Verdict::Adoptable(geometry) => geometry,
        Verdict::Stale => return Ok(None),
        Verdict::Unusable(error) | Verdict::Foreign(error) => return Err(error),
    };
    let numbers = Numbers::open(file.file.clone(), &file.path)?;
    let mut dirty = BTreeMap::new();
    each_dirty(&file, &geometry, |key| {
        // A number without a layer is of one that was deleted.
        if let Some(layer) = numbers.layer(key.layer()) {
            *dirty.entry(layer).or_insert(0) += 1;
        }
    })?;
    Ok(Some(Left {
        path: file.path.clone(),
        bytes: geometry.len,
        dirty,
    }))
}

/// Calls `found` with the key of each dirty frame.
fn each_dirty(
    file: &ArenaFile,
    geometry: &Geometry,
    mut found: impl FnMut(FrameKey),
) -> Result<()> {
    let set_bytes = size_of::<Set>();
    let mut chunk = Vec::new();
    let mut at = 0;
    while at < geometry.sets {
        let count = CHUNK_SETS.min(geometry.sets - at);
        // At most `CHUNK_SETS` sets, hence no overflow.
        chunk.resize(usize::try_from(count).unwrap_or(0) * set_bytes, 0);
        file.file
            .read_exact_at(&mut chunk, SETS_AT + at * SET_BYTES)
            .map_err(|source| Error::Io {
                op: "read",
                path: file.path.clone(),
                source,
            })?;
        for set in chunk.chunks_exact(set_bytes) {
            let keys = words(set, offset_of!(Set, keys)).map(FrameKey::from_word);
            let states = words(set, offset_of!(Set, states)).map(|word| State(word).after_crash());
            keys.zip(states)
                .filter(|(key, state)| *key != FrameKey::NONE && state.dirty() != SectorMask::NONE)
                .for_each(|(key, _)| found(key));
        }
        at += count;
    }
    Ok(())
}

/// The words of all ways at a place of a set.
fn words(set: &[u8], at: usize) -> impl Iterator<Item = u64> {
    let (words, _) = set.get(at..).unwrap_or_default().as_chunks();
    words
        .iter()
        .take(WAYS)
        .map(|word| u64::from_le_bytes(*word))
}
