//! What can go wrong, by kind, with the place where it did and its source.

use std::io;
use std::path::PathBuf;

use crate::units::LayerId;

/// The result of everything in this package that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. Each message names the thing, what is wrong with it and, where there is one, the way out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host refused an operation on a file.
    #[error("{op} {path}: {source}")]
    Io {
        /// What was tried: "open", "write", "sync".
        op: &'static str,
        /// The file.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// A file does not hold what its format says.
    #[error("{path} is damaged: {what}")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What does not fit, with offset and values.
        what: String,
    },
    /// A file was written by a newer or different version.
    #[error("{path} needs a newer stratablk: {what}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The unknown version or feature bits.
        what: String,
    },
    /// The catalog could not be read or written.
    #[error("catalog {path}: {source}")]
    Catalog {
        /// The catalog's file.
        path: PathBuf,
        /// The database's answer.
        source: rusqlite::Error,
    },
    /// A name, size or combination that cannot be.
    #[error("{field}: {what}")]
    Invalid {
        /// The field of the request.
        field: &'static str,
        /// What is wrong and what would be right.
        what: String,
    },
    /// No such volume, snapshot or layer.
    #[error("no {kind} named {name:?}")]
    NotFound {
        /// "volume", "snapshot", "layer".
        kind: &'static str,
        /// The name asked for.
        name: String,
    },
    /// The name is taken.
    #[error("a {kind} named {name:?} exists already; choose another name or delete it first")]
    Exists {
        /// "volume", "snapshot".
        kind: &'static str,
        /// The name.
        name: String,
    },
    /// Something else uses it; says what to do.
    #[error("{what}")]
    Busy {
        /// Who holds it and what to do.
        what: String,
    },
    /// The raw base is not the file that the store remembers.
    #[error(
        "base {path} of layer {layer} changed since it was attached ({what}); a base must never change: \
         restore the file, or create a new volume from it"
    )]
    BaseChanged {
        /// The base's file.
        path: PathBuf,
        /// The layer that stands for it.
        layer: LayerId,
        /// Which property changed, from what to what.
        what: String,
    },
    /// An earlier write or sync failed, so that nothing after it may claim to be safe.
    #[error("volume {volume:?} takes no more writes since an earlier failure: {cause}")]
    Failed {
        /// The volume.
        volume: String,
        /// The first failure, in words.
        cause: String,
    },
}
