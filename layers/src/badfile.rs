//! Which data of a sealed layer is known to be damaged, as a file, so that a restart does not forget it.
//!
//! DURABILITY: replaced as a whole, as `bad.new` that is synced and takes the name `bad`; removed, and the directory synced,
//! when nothing is damaged any more.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::file::{Media, OpenMode};
use crate::format::FormatError;
use crate::format::sums::{decode_bad, encode_bad};
use crate::map::SectorSet;
use crate::mapfile::{io_error, layer_dir, remove_file};
use crate::units::{LayerId, StoreId};

/// The name of the file in its layer's directory.
pub const BAD_NAME: &str = "bad";
/// Its name while it is written.
pub const NEW_NAME: &str = "bad.new";
/// A longer file is none: more than the bitmap of any layer.
const BYTES_MAX: u64 = 1 << 30;

/// The file of a layer, relative to the store.
pub fn bad_path(layer: LayerId) -> PathBuf {
    layer_dir(layer).join(BAD_NAME)
}

/// What is known to be damaged of a layer; `None`: nothing.
///
/// # Errors
/// `Corrupt`, also if the host cannot read it, and `Unsupported`: what it said is lost. `Io`: it cannot be opened now.
pub fn read(media: &Arc<dyn Media>, store: StoreId, layer: LayerId) -> Result<Option<SectorSet>> {
    let path = bad_path(layer);
    let file = match media.open(&path, OpenMode::ReadOnly, false) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error(media, "open", &path)(error)),
    };
    let corrupt = |what: String| Error::Corrupt {
        path: media.display_path(&path),
        what,
    };
    let len = file.len().map_err(io_error(media, "stat", &path))?;
    let len = usize::try_from(len).ok().filter(|_| len <= BYTES_MAX);
    let mut bytes = vec![0; len.ok_or_else(|| corrupt("it is too long".into()))?];
    file.read_at(&mut bytes, 0)
        .map_err(|error| corrupt(format!("it cannot be read: {error}")))?;
    let (of_store, of_layer, bad) = decode_bad(&bytes).map_err(|error| match error {
        FormatError::Corrupt { .. } => corrupt(error.to_string()),
        FormatError::Unsupported { .. } => Error::Unsupported {
            path: media.display_path(&path),
            what: error.to_string(),
        },
    })?;
    if (of_store, of_layer) != (store, layer) {
        return Err(corrupt(format!(
            "it is that of layer {of_layer} of store {of_store}"
        )));
    }
    Ok((bad.data_sectors() > 0).then_some(bad))
}

/// Remembers what is damaged of a layer, in place of what was remembered before. Nothing: the file is removed.
///
/// # Errors
/// `Io`.
pub fn write(
    media: &Arc<dyn Media>,
    store: StoreId,
    layer: LayerId,
    bad: &SectorSet,
    found_ns: u64,
) -> Result<()> {
    let (path, dir) = (bad_path(layer), layer_dir(layer));
    let new = dir.join(NEW_NAME);
    remove_file(media, &new)?;
    if bad.data_sectors() == 0 {
        remove_file(media, &path)?;
    } else {
        let bytes = encode_bad(store, layer, bad, found_ns);
        media
            .open(&new, OpenMode::CreateNew, false)
            .and_then(|file| {
                file.write_at(&bytes, 0)?;
                file.sync_data()
            })
            .map_err(io_error(media, "write", &new))?;
        media
            .rename(&new, &path)
            .map_err(io_error(media, "rename", &new))?;
    }
    media.sync_dir(&dir).map_err(io_error(media, "sync", &dir))
}
