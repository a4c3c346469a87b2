//! The instants of a run at which a crash is worth looking at.

use std::sync::Arc;

use super::SimMedia;

/// What has just happened. A crash between two of these differs from one at them only in what chance picks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// A file or directory has a name.
    Created,
    /// A write has completed.
    Written,
    /// A punch has completed.
    Punched,
    /// A length has changed.
    LengthSet,
    /// A sync of a file begins; nothing of it is durable yet.
    SyncBegun,
    /// A sync of a file has ended, well or not.
    SyncEnded,
    /// A name was moved.
    Renamed,
    /// A name was removed.
    Removed,
    /// A sync of a directory begins.
    SyncDirBegun,
    /// A sync of a directory has ended, well or not.
    SyncDirEnded,
    /// Somebody waits for requests under way, which nobody but the observer can let go on.
    Waiting,
    /// Something outside of the media, told by [`SimMedia::mark`]: a commit of the catalog.
    Marked(&'static str),
}

/// An instant of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CrashPoint {
    /// Counts the instants of this media from 1.
    pub number: u64,
    /// What has just happened.
    pub event: Event,
    /// To which file or directory (of a rename: the new name); empty if none.
    pub path: Arc<str>,
}

/// Called at every crash point, with the media, from which it may take crash images. What it does to the media itself is
/// not observed.
pub type Observer = Box<dyn FnMut(&SimMedia, &CrashPoint) + Send>;
