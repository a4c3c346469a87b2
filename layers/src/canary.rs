//! Switches that break the order of a flush, or a check, on purpose, so that a test can see the alarm for it ring. Constant and
//! off unless the package is built with the feature `canary`.

#[cfg(feature = "canary")]
use std::cell::Cell;

/// A step that is taken at the wrong time, or not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Canary {
    /// A flush writes and syncs the map before the data that it speaks of.
    MapBeforeData,
    /// A frame becomes clean before the records of its sectors are committed.
    CleanBeforeCommit,
    /// A write-zeroes is acknowledged without its record.
    ZeroesWithoutRecord,
    /// A write-zeroes drops frames before it is recorded.
    TrimBeforeRecord,
    /// A merge gives places back before it is committed that their data lies elsewhere.
    PunchBeforeCommit,
    /// A merge commits a map before the data is synced that it speaks of.
    SkipSync,
    /// A merge writes to the file of a layer that takes writes without the lead of its flushes, whatever the map says.
    LoseGuestWrite,
    /// A command removes the files of layers before the commit by which they go.
    RemoveBeforeCommit,
    /// A restore of a group is committed one volume after the other.
    RestoreInParts,
    /// A map takes the place of another one without what was appended to that one meanwhile.
    ForgetSince,
    /// A checkpoint is believed that reaches beyond its disk.
    BelieveCheckpoint,
    /// A scrub does not look at the last cluster that it has read at once.
    SkipLastOfPiece,
    /// A clean frame is taken over although its file was being written to past the cache.
    TrustPast,
    /// A block of checksums is believed whatever its own checksum says.
    BelieveBlock,
}

#[cfg(feature = "canary")]
thread_local! {
    /// What is broken on this thread.
    static BROKEN: Cell<Option<Canary>> = const { Cell::new(None) };
}

/// Breaks something on this thread, or nothing any more.
#[cfg(feature = "canary")]
pub fn set(canary: Option<Canary>) {
    BROKEN.set(canary);
}

/// Whether it is broken on this thread.
#[cfg(feature = "canary")]
pub(crate) fn is_set(canary: Canary) -> bool {
    BROKEN.get() == Some(canary)
}

/// Whether it is broken: never.
#[cfg(not(feature = "canary"))]
pub(crate) const fn is_set(_canary: Canary) -> bool {
    false
}
