//! The types of the control API, as they travel over the socket: shared by the server and the command line.
//!
//! Requests refuse fields they do not know, so that a misspelt option never passes silently. Replies always carry all
//! their fields (`null` where there is nothing to say), and clients must accept fields they do not know.

mod jobs;
mod snapshots;
mod status;
mod tree;
mod volumes;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

pub use self::jobs::*;
pub use self::snapshots::*;
pub use self::status::*;
pub use self::tree::*;
pub use self::volumes::*;

/// Restricts a list to one volume.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct VolumeFilter {
    /// Only what belongs to this volume.
    pub volume: Option<String>,
}

/// What a deletion removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Deleted {
    /// The name that is free again.
    pub deleted: String,
}

/// What kind of thing went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// A field of the request cannot be as it is.
    Invalid,
    /// No such volume, snapshot, attachment or route.
    NotFound,
    /// The name is taken.
    Exists,
    /// Something else is in the way; the message says what to do.
    Busy,
    /// The daemon is overloaded or about to exit.
    Unavailable,
    /// The raw image under a volume is not the one it was created from.
    BaseChanged,
    /// The volume takes no more writes since an earlier failure.
    Failed,
    /// The host has no space left.
    NoSpace,
    /// The host refused to read or write.
    Io,
    /// A file of the store is damaged.
    Corrupt,
    /// A file of the store was written by a newer version.
    Unsupported,
    /// A fault of the daemon itself.
    Internal,
}

/// Why a request was refused or failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    /// What kind of thing went wrong.
    pub kind: ErrorKind,
    /// The field of the request that it is about, where there is one.
    pub field: Option<String>,
    /// What is wrong and what to do, in a sentence.
    pub message: String,
}

/// The body of every reply that is not a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorDetail,
}
