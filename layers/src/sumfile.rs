//! The checksums of a sealed layer as a file: written once, read in order, removed before the layer's data changes.
//!
//! DURABILITY: the file is written as `sums.new` and synced, then renamed to `sums`, and the directory is synced. Before
//! anything moves data into a sealed layer or out of it, `sums` is removed and the directory synced, so that checksums that are
//! there always belong to the data. Where a map says the same under another number they are told before (`foresee`).

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::file::{File, Media, OpenMode};
use crate::format::FormatError;
use crate::format::sums::{self, BLOCK_BYTES, SUMS_PER_BLOCK, SumsHeader};
use crate::mapfile::{io_error, layer_dir, remove_file};
use crate::units::{LayerId, SECTOR_BYTES};

/// The name of the checksums in their layer's directory.
pub const SUMS_NAME: &str = "sums";
/// Their name while they are taken.
pub const NEW_NAME: &str = "sums.new";

/// The checksums of a layer, relative to the store.
pub fn sums_path(layer: LayerId) -> PathBuf {
    layer_dir(layer).join(SUMS_NAME)
}

/// The same while they are taken.
pub fn new_sums_path(layer: LayerId) -> PathBuf {
    layer_dir(layer).join(NEW_NAME)
}

/// Removes a layer's checksums for good, finished or not.
///
/// # Errors
/// `Io`.
pub fn remove(media: &Arc<dyn Media>, layer: LayerId) -> Result<()> {
    let there = remove_file(media, &sums_path(layer))?;
    let begun = remove_file(media, &new_sums_path(layer))?;
    if there || begun {
        let dir = layer_dir(layer);
        media
            .sync_dir(&dir)
            .map_err(io_error(media, "sync", &dir))?;
    }
    Ok(())
}

/// Gives the space of unfinished checksums back, as far as that goes: what is left is removed when they are begun anew.
pub fn discard(media: &Arc<dyn Media>, layer: LayerId) {
    drop(media.remove(&new_sums_path(layer)));
}

/// Whether a layer has checksums, whatever they are worth.
pub fn exists(media: &Arc<dyn Media>, layer: LayerId) -> bool {
    media.stat(&sums_path(layer)).is_ok()
}

/// Lets checksums belong to the map that is about to take the place of the one with this number and says the same, and still to
/// that one: the file is rewritten where it says so, one sector. Those of other maps are left alone.
///
/// DURABILITY: before the map takes its place, so that a crash between the two leaves them good.
///
/// # Errors
/// `Io`.
pub fn foresee(media: &Arc<dyn Media>, layer: LayerId, before: u64) -> Result<()> {
    let Found::Sums(sums) = open(media, layer)? else {
        return Ok(());
    };
    if !sums.header.is_of(before) {
        return Ok(());
    }
    let header = SumsHeader {
        incarnation: before,
        successor: before.saturating_add(1),
        ..sums.header
    };
    let path = sums_path(layer);
    let bytes = header.encode();
    // All fields lie in the first sector, which is old or new after a crash.
    let first = usize::try_from(SECTOR_BYTES).unwrap_or(BLOCK_BYTES);
    media
        .open(&path, OpenMode::ReadWrite, false)
        .and_then(|file| {
            file.write_at(bytes.get(..first).unwrap_or_default(), 0)?;
            file.sync_data()
        })
        .map_err(io_error(media, "write", &path))
}

/// Checksums that are being taken.
#[derive(Debug)]
pub struct SumsWriter {
    /// Where they go.
    file: Arc<dyn File>,
    /// What they will say of themselves.
    header: SumsHeader,
    /// Those that are not written yet: less than a block.
    rest: Vec<u32>,
    /// Blocks written.
    blocks: u64,
}

impl SumsWriter {
    /// Begins. What an interrupted attempt left is removed.
    ///
    /// # Errors
    /// `Io`.
    pub fn create(media: &Arc<dyn Media>, header: SumsHeader) -> Result<Self> {
        let path = new_sums_path(header.layer);
        remove_file(media, &path)?;
        let file = media
            .open(&path, OpenMode::CreateNew, false)
            .map_err(io_error(media, "create", &path))?;
        Ok(Self {
            file,
            header,
            rest: Vec::new(),
            blocks: 0,
        })
    }

    /// Adds the next checksums.
    ///
    /// # Errors
    /// `Io`.
    pub fn push(&mut self, media: &Arc<dyn Media>, sums: &[u32]) -> Result<()> {
        self.rest.extend(sums);
        let whole = self.rest.len() / SUMS_PER_BLOCK * SUMS_PER_BLOCK;
        let rest = self.rest.split_off(whole);
        let full = std::mem::replace(&mut self.rest, rest);
        self.write(media, &full)
    }

    /// Writes blocks.
    fn write(&mut self, media: &Arc<dyn Media>, all: &[u32]) -> Result<()> {
        let mut bytes = Vec::new();
        let mut number = self.blocks;
        for block in all.chunks(SUMS_PER_BLOCK) {
            bytes.extend(sums::encode_block(self.header.layer, number, block));
            number += 1;
        }
        if bytes.is_empty() {
            return Ok(());
        }
        let path = new_sums_path(self.header.layer);
        self.file
            .write_at(&bytes, (self.blocks + 1) * BLOCK_BYTES as u64)
            .map_err(io_error(media, "write", &path))?;
        self.blocks = number;
        Ok(())
    }

    /// Writes what is left, and makes all of it durable under the name of unfinished ones.
    ///
    /// # Errors
    /// `Io`; `Invalid` if there are more or fewer than the layer has clusters, which is a defect.
    pub fn complete(&mut self, media: &Arc<dyn Media>) -> Result<()> {
        let whole = self.blocks.saturating_mul(SUMS_PER_BLOCK as u64);
        let count = whole.saturating_add(self.rest.len() as u64);
        if count != self.header.extent.clusters {
            return Err(Error::Invalid {
                field: "checksums",
                what: format!(
                    "{count} were taken of layer {}, which has {} clusters: this is a defect of stratablk",
                    self.header.layer, self.header.extent.clusters
                ),
            });
        }
        let rest = std::mem::take(&mut self.rest);
        self.write(media, &rest)?;
        let path = new_sums_path(self.header.layer);
        self.file
            .write_at(&self.header.encode(), 0)
            .map_err(io_error(media, "write", &path))?;
        self.file
            .sync_data()
            .map_err(io_error(media, "sync", &path))
    }

    /// Gives them their name. The commit point is the rename.
    ///
    /// # Errors
    /// `Io`.
    pub fn name(self, media: &Arc<dyn Media>) -> Result<()> {
        let layer = self.header.layer;
        let (new, dir) = (new_sums_path(layer), layer_dir(layer));
        // DURABILITY: complete and synced before they get the name.
        media
            .rename(&new, &sums_path(layer))
            .map_err(io_error(media, "rename", &new))?;
        media.sync_dir(&dir).map_err(io_error(media, "sync", &dir))
    }
}

/// What there is of checksums.
#[derive(Debug)]
pub enum Found {
    /// None.
    None,
    /// A file that cannot be used, and why.
    Damaged(String),
    /// A newer version's.
    Newer(String),
    /// Some.
    Sums(SumsReader),
}

/// Checksums that are read in order.
#[derive(Debug)]
pub struct SumsReader {
    /// The file.
    file: Arc<dyn File>,
    /// What it says of itself.
    pub header: SumsHeader,
    /// The block that was read last; `None` if that is damaged.
    block: Option<Vec<u32>>,
    /// Checksums handed out.
    at: u64,
    /// Blocks that were damaged.
    pub damaged_blocks: u64,
}

/// Opens the checksums of a layer.
///
/// # Errors
/// `Io`, but not if the file cannot be read.
pub fn open(media: &Arc<dyn Media>, layer: LayerId) -> Result<Found> {
    let path = sums_path(layer);
    let file = match media.open(&path, OpenMode::ReadOnly, false) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::None),
        Err(error) => return Err(io_error(media, "open", &path)(error)),
    };
    let len = file.len().map_err(io_error(media, "stat", &path))?;
    let mut bytes = vec![0; BLOCK_BYTES];
    if let Err(error) = file.read_at(&mut bytes, 0) {
        return Ok(Found::Damaged(error.to_string()));
    }
    let header = match SumsHeader::decode(&bytes) {
        Ok(header) => header,
        Err(error @ FormatError::Unsupported { .. }) => return Ok(Found::Newer(error.to_string())),
        Err(error) => return Ok(Found::Damaged(error.to_string())),
    };
    if header.layer != layer {
        return Ok(Found::Damaged(format!(
            "they are those of layer {}",
            header.layer
        )));
    }
    if header.extent.file_bytes() != Some(len) {
        return Ok(Found::Damaged(format!(
            "the file has {len} bytes, {} checksums need {}",
            header.extent.clusters,
            header.extent.file_bytes().unwrap_or(u64::MAX)
        )));
    }
    Ok(Found::Sums(SumsReader {
        file,
        header,
        block: None,
        at: 0,
        damaged_blocks: 0,
    }))
}

impl SumsReader {
    /// The checksum of the next cluster; `None` if its block is damaged, or if there are no more.
    pub fn next_sum(&mut self) -> Option<u32> {
        if self.at >= self.header.extent.clusters {
            return None;
        }
        let per_block = SUMS_PER_BLOCK as u64;
        let (number, index) = (self.at / per_block, self.at % per_block);
        if index == 0 {
            let mut bytes = vec![0; BLOCK_BYTES];
            let read = self
                .file
                .read_at(&mut bytes, (number + 1) * BLOCK_BYTES as u64);
            let layer = self.header.layer;
            self.block = (read.ok()).and_then(|()| sums::decode_block(layer, number, &bytes));
            self.damaged_blocks += u64::from(self.block.is_none());
        }
        self.at += 1;
        let index = usize::try_from(index).ok()?;
        self.block.as_ref()?.get(index).copied()
    }

    /// How many were handed out, damaged ones among them.
    pub fn handed_out(&self) -> u64 {
        self.at
    }
}
