//! Faults that a test can plant, so that each alarm is seen to ring. In a shipped binary all of this is a constant `false`.

/// A line of the algorithm left out on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(test), expect(dead_code, reason = "only tests plant faults"))]
pub(crate) enum Fault {
    /// A region's bit is looked at first and not set again if it seems to be set.
    LookBeforeMarking,
    /// A writer that finds a word already unjournaled leaves the marking to the one who made it so.
    MarkOnlyOwnChanges,
    /// A cached write marks its region after it has let go of the frame.
    MarkAfterUnlock,
    /// A cached write that makes a clean frame dirty and finds the flag set takes no part in the word's modification order.
    LookBeforeDirtying,
    /// Zeroing a cluster takes its dirty flag away.
    ZeroForgetsDirty,
    /// A write-back makes a frame clean whatever became of it since it was copied.
    CleanWhatChanged,
    /// A write-back makes a frame clean though it holds sectors that no journal has.
    CleanUnjournaled,
    /// A collector that leaves regions' bits behind does not set the summary's again.
    ForgetTheRest,
    /// A write-zeroes that meets a write goes without the record of that cluster.
    ZeroWithoutRecord,
    /// A refresh does not look again at the map after it changed the table.
    RefreshOnce,
    /// A refresh that finds the right word takes no part in the modification order of the table.
    RefreshWithoutTouch,
    /// A refresh overwrites newer layers.
    OlderSlotWins,
    /// A merge of two sealed layers overwrites newer ones.
    ReplaceBeatsNewer,
    /// A merge gives back the place that data was moved from at once.
    PunchBeforeQuiescent,
    /// A merge into a layer that takes writes gives the lead back before it has marked what it handed over.
    HandOverWithoutMark,
    /// A merge lets readers see the new place before the data is there.
    TableBeforeData,
    /// A merge upwards takes from the lower layer before readers must know that the upper one has it.
    LoseTooEarly,
    /// A merge downwards takes from the upper layer only after it has waited for readers.
    LoseTooLate,
    /// A merge leaves frames of the target as they are.
    MergeWithoutTrim,
    /// A merge into a layer that takes writes does not lead its flushes.
    HandOverWithoutLead,
    /// A reader believes the mask of an unsealed layer instead of asking its map.
    TrustTheMask,
    /// A leaf is filled with nothing instead of the word it replaces.
    EmptyLeaf,
    /// A reader of a frame does not look at its state again after the copy.
    ReadOnce,
    /// A reader of a frame looks at its state again without an order between the copy and the look.
    ReadWithoutFence,
    /// A write publishes what it did after it gave the frame back.
    PublishAfterUnlock,
    /// A new key is put into a set without its lock.
    NoSetLock,
    /// A fill overwrites what was written meanwhile.
    FillOverWrites,
    /// A fill is kept although its cluster was zeroed meanwhile.
    KeepSpoiled,
    /// Zeroing a cluster does not tell a fill under way.
    TrimWithoutSpoiling,
    /// A frame becomes clean although it was written since it was copied.
    CleanWithoutVersion,
    /// A frame's bytes are changed without an order between the lock and the bytes.
    LockWithoutFence,
    /// Who looks at a way takes its key before its state.
    KeyBeforeState,
    /// A way that is filling may be given to another key.
    EvictFilling,
    /// Who did not find a frame may still see a map from before the frame went.
    MissWithoutFence,
    /// Who claims a frame, and who changes the file or the map and then looks for frames, may miss each other.
    ClaimWithoutFence,
    /// A frame that somebody is changing counts as one without the sectors in question.
    LockedIsLacking,
    /// A trim asks what to keep before it has the frame.
    KeepBeforeLock,
    /// A layer is written without a word to the clock.
    WriteUnannounced,
    /// A request is carried out without a word to the clock.
    ReadUnannounced,
    /// A write says what the frame has before it is there.
    MasksBeforeBytes,
    /// Clean sectors of a frame that was locked when its process ended are kept.
    KeepTorn,
    /// A fill whose process has ended stays under way.
    KeepFilling,
    /// Who leaves a letter wakes the owner before there is a sign of it.
    WakeBeforeFlag,
    /// Who leaves a letter makes its sign before it wakes the owner, and not again after.
    FlagOnlyBeforeWake,
}

#[cfg(test)]
thread_local! {
    /// The fault of this test. A model runs all its threads on the thread of its test, so that they all see it.
    static PLANTED: std::cell::Cell<Option<Fault>> = const { std::cell::Cell::new(None) };
}

/// Whether the code is to misbehave in this way.
#[cfg(test)]
pub(crate) fn planted(fault: Fault) -> bool {
    PLANTED.with(|planted| planted.get() == Some(fault))
}

/// Whether the code is to misbehave in this way: never.
#[cfg(not(test))]
#[inline(always)]
pub(crate) const fn planted(_fault: Fault) -> bool {
    false
}

/// Plants a fault for the rest of this test.
#[cfg(all(test, loom))]
pub(crate) fn plant(fault: Fault) {
    PLANTED.with(|planted| planted.set(Some(fault)));
}

/// Plants a fault until the guard goes, on this thread.
#[cfg(all(test, not(loom)))]
pub(crate) fn plant_here(fault: Fault) -> Planted {
    PLANTED.with(|planted| planted.set(Some(fault)));
    Planted
}

/// Takes the fault out again, since another test may run on the thread.
#[cfg(all(test, not(loom)))]
#[must_use = "the fault is there as long as this is"]
pub(crate) struct Planted;

#[cfg(all(test, not(loom)))]
impl Drop for Planted {
    fn drop(&mut self) {
        PLANTED.with(|planted| planted.set(None));
    }
}
