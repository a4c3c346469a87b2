//! The names of the files of a store, relative to it. `FORMAT.md` lists them.

use std::path::PathBuf;

use crate::units::LayerId;

/// The directory of all layers.
pub fn layers() -> PathBuf {
    PathBuf::from("layers")
}

/// The directory of one layer.
pub fn layer(id: LayerId) -> PathBuf {
    layers().join(id.to_string())
}

/// A layer's data.
pub fn data(id: LayerId) -> PathBuf {
    layer(id).join("data")
}

/// A layer's map.
pub fn map(id: LayerId) -> PathBuf {
    layer(id).join("map")
}
