//! Who flushes: one group at a time, and everybody who asks meanwhile waits for the next.
//!
//! A flush must cover what completed before it was submitted. A request that asks while a group is under way can therefore
//! not join it (its writes may have missed that group's look at the maps); it waits for the next one, together with all
//! others that do. One group at a time also keeps the journal simple: its bytes are synced before the next
//! group's are written, so that at most the last group of a journal can be torn.
//!
//! The context whose request comes first leads: it carries out the steps on its own engine, so that a lone flush needs no
//! other thread. The order of the steps is the durability of the whole store (see `FORMAT.md`):
//!
//! 1. look: take the dirty marks and the changed map words of every unsealed layer;
//! 2. write the dirty frames to the data files;
//! 3. sync the data files with unsynced data, and maps with an unsynced end;
//! 4. write journal records and their commit record, for the layers with changed words;
//! 5. sync those map files;
//! 6. make the frames clean that have not changed since, mark the others again;
//! 7. answer.
//!
//! Every empty half is skipped. Any failure is latched in the volume before anybody is answered, but for a full disk in steps
//! 2 and 4: then nothing is lost, everything is marked again, and the next flush tries again.
//!
//! Before that the leader zeroes what those who wait want zeroed (`zeroes`), and after it their space is given back. Nobody but
//! who leads changes a layer's files, not even to give back space.
//!
//! Writing back is the same with a part of the marks, and ends after step 2 where no map word has changed.

pub mod through;
pub mod zeroes;

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::cache::Cache;
use crate::cache::access::{Clean, Copied};
use crate::cache::set::FrameKey;
use crate::cache::staging::Staging;
use crate::canary::{self, Canary};
use crate::file::File;
use crate::format::journal::JournalEnd;
use crate::layer::{Layer, LayerMap};
use crate::mailbox::{Mail, Mailbox, Waiter};
use crate::map::{Collected, MapRecord};
use crate::units::{CLUSTER_BYTES, Cluster};

/// Decides who leads a flush of one volume.
#[derive(Debug, Default)]
pub struct Coordinator {
    /// Who is at it.
    state: Mutex<State>,
    /// Wakes control-plane threads that want to lead.
    free: Condvar,
}

/// Who is flushing and who waits.
#[derive(Debug, Default)]
struct State {
    /// Whether a group is under way.
    running: bool,
    /// Requests that wait for the next group.
    waiting: Vec<Waiter>,
    /// Control-plane threads that wait to lead; they go first.
    blocking: usize,
}

impl Coordinator {
    /// Asks for a flush. `Some(group)`: the caller leads it now. `None`: a letter will come.
    pub fn join(&self, waiter: Waiter) -> Option<Vec<Waiter>> {
        let mut state = self.lock();
        state.waiting.push(waiter);
        if state.running || state.blocking > 0 {
            return None;
        }
        state.running = true;
        Some(std::mem::take(&mut state.waiting))
    }

    /// Takes those who wait for the next group into the one that the caller is about to begin: all of them asked before it
    /// looks at anything.
    pub fn absorb(&self, group: &mut Vec<Waiter>) {
        group.append(&mut self.lock().waiting);
    }

    /// Ends the group under way. `Some(group)`: the caller sees to it that the next one is led, preferably by `me`.
    pub fn finish(&self) -> Option<Vec<Waiter>> {
        let mut state = self.lock();
        if state.blocking > 0 {
            state.running = false;
            self.free.notify_one();
            return None;
        }
        if state.waiting.is_empty() {
            state.running = false;
            return None;
        }
        Some(std::mem::take(&mut state.waiting))
    }

    /// Waits until no group is under way and takes the lead, for the control plane. May block for as long as a sync takes.
    /// `go_on` is [`crate::file::Media::go_on`].
    pub fn lead_blocking(&self, go_on: impl Fn() -> bool) {
        let mut state = self.lock();
        state.blocking += 1;
        while state.running {
            drop(state);
            let went_on = go_on();
            state = self.lock();
            if !went_on && state.running {
                state = self
                    .free
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
        state.blocking -= 1;
        state.running = true;
    }

    /// Takes the lead if nobody has it or waits for it, for the control plane. Does not block.
    pub fn try_lead(&self) -> bool {
        let mut state = self.lock();
        let free = !state.running && state.blocking == 0;
        state.running |= free;
        free
    }

    /// Ends what `lead_blocking` or `try_lead` began, and hands the next group to one of those who wait.
    pub fn finish_blocking(&self) {
        if let Some(group) = self.finish() {
            hand_over(group);
        }
    }

    /// The state, whatever happened to an earlier holder of the lock.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets the context of the first waiter lead the group.
pub fn hand_over(group: Vec<Waiter>) {
    if let Some(mailbox) = group.first().map(|waiter| Arc::clone(&waiter.mailbox)) {
        mailbox.send(Mail::Lead(group));
    }
}

/// Whether one of the group lives in this context.
pub fn has_own(group: &[Waiter], mailbox: &Arc<Mailbox>) -> bool {
    group
        .iter()
        .any(|waiter| Arc::ptr_eq(&waiter.mailbox, mailbox))
}

/// What a flush has to do for one layer.
#[derive(Debug)]
pub struct LayerWork {
    /// The layer.
    pub layer: Arc<Layer>,
    /// Clusters to write back, and map words that changed, as records.
    pub marks: Collected,
    /// Whether the end of the map must be synced: zeroes that were acknowledged with their record merely written.
    pub sync_map_end: bool,
}

/// The bytes that make a layer's changes durable, and where they go.
#[derive(Debug)]
pub struct JournalWrite {
    /// The layer.
    layer: Arc<Layer>,
    /// The journal's end before.
    before: JournalEnd,
    /// The map file.
    pub file: Arc<dyn File>,
    /// Where in it.
    pub offset: u64,
    /// The records with their commit record.
    pub bytes: Vec<u8>,
}

impl JournalWrite {
    /// Makes the journal what it was, after a full disk.
    ///
    /// # Errors
    /// The host's answer; to be latched.
    pub fn take_back(&self) -> io::Result<()> {
        match self.layer.journal().as_mut() {
            Some(journal) => journal.take_back(self.before),
            None => Ok(()),
        }
    }
}

/// Step 1, for the layers of a chain or others, oldest first; about `limit` clusters.
pub fn look<'a>(layers: impl Iterator<Item = &'a Arc<Layer>>, limit: usize) -> Vec<LayerWork> {
    let mut left = limit;
    layers
        .filter_map(|layer| {
            let marks = match &**layer.map() {
                LayerMap::Active(map) => map.collect(left),
                // Sealed since the chain was made: its data and map are durable.
                LayerMap::Sealed(_) => return None,
            };
            let taken = marks.dirty.iter().map(|(_, count)| *count).sum::<u64>();
            left = left.saturating_sub(usize::try_from(taken).unwrap_or(usize::MAX));
            let sync_map_end = layer
                .journal()
                .as_mut()
                .is_some_and(crate::mapfile::MapFile::take_unsynced_end);
            Some(LayerWork {
                layer: Arc::clone(layer),
                marks,
                sync_map_end,
            })
        })
        .collect()
}

impl LayerWork {
    /// Whether the work has to be committed: its data synced and its map written.
    pub fn has_records(&self) -> bool {
        !self.marks.records.is_empty()
    }

    /// Marks everything again: nothing of it was made durable, and nothing is lost.
    fn put_back(&self) {
        if let LayerMap::Active(map) = &**self.layer.map() {
            map.put_back(&self.marks);
        }
        if self.sync_map_end
            && let Some(journal) = self.layer.journal().as_mut()
        {
            journal.leave_end_unsynced();
        }
    }
}

/// Marks everything again after a full disk.
pub fn put_back(work: &[LayerWork]) {
    for work in work {
        work.put_back();
    }
}

/// Whether a write failed for want of space, which leaves all data that was acknowledged where it is.
pub fn is_full_disk(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errno = Errno::from_io_error(error);
    errno.is_some_and(|errno| [Errno::NOSPC, Errno::DQUOT].contains(&errno))
}

/// A part of a staging buffer that goes to a file in one write.
#[derive(Clone, Copy, Debug)]
pub struct StagedWrite {
    /// Whose data: the number of the work.
    pub work: usize,
    /// Where in the file.
    pub offset: u64,
    /// Where in the buffer.
    pub start: usize,
    /// Bytes.
    pub len: usize,
}

/// Walks through the dirty clusters of a flush, a buffer at a time.
#[derive(Debug, Default)]
pub struct Walk {
    /// The work that is next.
    work: usize,
    /// The run of it that is next.
    run: usize,
    /// Clusters of the run that are done.
    done: u64,
    /// The copies taken up to now.
    copied: Vec<(usize, Copied)>,
}

impl Walk {
    /// Copies the next dirty clusters into the buffer and says where they go; `false` at the end.
    pub fn next(
        &mut self,
        cache: &Cache,
        works: &[LayerWork],
        staging: &mut Staging,
        writes: &mut Vec<StagedWrite>,
    ) -> bool {
        writes.clear();
        let mut used = 0;
        while let Some(work) = works.get(self.work) {
            let Some(&(first, count)) = work.marks.dirty.get(self.run) else {
                self.work += 1;
                self.run = 0;
                continue;
            };
            if self.done >= count {
                self.run += 1;
                self.done = 0;
                continue;
            }
            let Some(page) = staging.page_mut(used) else {
                return true;
            };
            let cluster = Cluster(first.0 + self.done);
            self.done += 1;
            let key = FrameKey::new(work.layer.number(), cluster);
            let Some(copied) = cache.copy_dirty(key, page) else {
                // Trimmed by a write-zeroes since it was marked.
                continue;
            };
            for run in crate::cache::runs(copied.dirty) {
                let offset = cluster.0 * CLUSTER_BYTES + run.offset() as u64;
                let start = used * Staging::PAGE_BYTES + run.offset();
                match writes.last_mut() {
                    Some(last)
                        if last.work == self.work
                            && last.offset + last.len as u64 == offset
                            && last.start + last.len == start =>
                    {
                        last.len += run.bytes();
                    }
                    _ => writes.push(StagedWrite {
                        work: self.work,
                        offset,
                        start,
                        len: run.bytes(),
                    }),
                }
            }
            self.copied.push((self.work, copied));
            used += 1;
        }
        used > 0
    }

    /// Step 6: makes the frames clean that have not changed since they were copied, and marks the others again.
    pub fn clean(&mut self, cache: &Cache, works: &[LayerWork]) {
        for (work, copied) in self.copied.drain(..) {
            let Some(work) = works.get(work) else {
                continue;
            };
            let map = work.layer.map();
            let LayerMap::Active(map) = &**map else {
                // Sealed since: its frames are in its file.
                cache.clean(&copied);
                continue;
            };
            // Sectors that came into the frame after its marks were taken and before it was copied are in the file and in no
            // journal: such a frame must not be lost yet.
            let cluster = copied.key.cluster();
            if !map.is_journaled(cluster) || cache.clean(&copied) == Clean::Changed {
                map.mark_dirty(cluster);
            }
        }
    }
}

/// How a flush by blocking calls failed.
#[derive(Debug)]
pub enum FlushError {
    /// The disk is full; everything is marked again.
    Full(io::Error),
    /// Something that must be latched.
    Fatal(io::Error),
}

impl FlushError {
    /// The host's answer.
    pub fn into_inner(self) -> io::Error {
        match self {
            Self::Full(error) | Self::Fatal(error) => error,
        }
    }
}

/// Steps 2 to 6, one after the other, by blocking calls; for who leads. Without `everything` the steps from 3 on are taken
/// only if a map word has changed.
///
/// # Errors
/// See [`FlushError`].
pub fn carry_out(
    cache: &Cache,
    works: &[LayerWork],
    everything: bool,
) -> std::result::Result<(), FlushError> {
    carry_out_with(cache, works, everything, write_each)
}

/// The same, with a way to write what is in the staging buffer; it returns when all of it is written.
///
/// # Errors
/// See [`FlushError`].
pub fn carry_out_with(
    cache: &Cache,
    works: &[LayerWork],
    everything: bool,
    write: impl FnMut(&[LayerWork], &Staging, &[StagedWrite]) -> io::Result<()>,
) -> std::result::Result<(), FlushError> {
    let mut walk = Walk::default();
    match write_data(cache, works, &mut walk, write) {
        Ok(()) => {}
        Err(error) if is_full_disk(&error) => {
            put_back(works);
            return Err(FlushError::Full(error));
        }
        Err(error) => return Err(FlushError::Fatal(error)),
    }
    if canary::is_set(Canary::CleanBeforeCommit) {
        walk.clean(cache, works);
    }
    if everything || works.iter().any(LayerWork::has_records) {
        commit(works).inspect_err(|error| {
            // Taken back: the journal says what it said before.
            if let FlushError::Full(_) = error {
                put_back(works);
            }
        })?;
    } else {
        // Not synced now: the next flush does it.
        put_back_map_ends(works);
    }
    walk.clean(cache, works);
    Ok(())
}

/// Step 2.
fn write_data(
    cache: &Cache,
    works: &[LayerWork],
    walk: &mut Walk,
    mut write: impl FnMut(&[LayerWork], &Staging, &[StagedWrite]) -> io::Result<()>,
) -> io::Result<()> {
    if works.iter().all(|work| work.marks.dirty.is_empty()) {
        return Ok(());
    }
    let clusters = works.iter().flat_map(|work| &work.marks.dirty);
    let wanted = clusters.map(|(_, count)| *count).sum();
    let mut staging = Staging::for_clusters(wanted);
    let mut writes = Vec::new();
    while walk.next(cache, works, &mut staging, &mut writes) {
        for write in &writes {
            if let Some(work) = works.get(write.work) {
                // Before the write: a crash of this process in between only costs a sync.
                work.layer.mark_unsynced();
            }
        }
        write(works, &staging, &writes)?;
    }
    Ok(())
}

/// Writes what is in the staging buffer, one after the other.
fn write_each(works: &[LayerWork], staging: &Staging, writes: &[StagedWrite]) -> io::Result<()> {
    for write in writes {
        if let (Some(work), Some(bytes)) =
            (works.get(write.work), staging.bytes(write.start, write.len))
        {
            work.layer.data().write_at(bytes, write.offset)?;
        }
    }
    Ok(())
}

/// Steps 3 to 5. A sync that fails is fatal whatever the reason: nobody knows what the file holds.
fn commit(works: &[LayerWork]) -> std::result::Result<(), FlushError> {
    for work in works {
        if work.layer.take_unsynced() {
            work.layer.sync_data().map_err(FlushError::Fatal)?;
        }
        if work.sync_map_end
            && let Some(file) = map_file(work)
        {
            file.sync_data().map_err(FlushError::Fatal)?;
        }
    }
    for journal in works.iter().filter_map(encode) {
        match journal.file.write_at(&journal.bytes, journal.offset) {
            Ok(()) => journal.file.sync_data().map_err(FlushError::Fatal)?,
            Err(error) if is_full_disk(&error) => {
                journal.take_back().map_err(FlushError::Fatal)?;
                return Err(FlushError::Full(error));
            }
            Err(error) => return Err(FlushError::Fatal(error)),
        }
    }
    Ok(())
}

/// Leaves the unsynced ends of maps to the next flush.
fn put_back_map_ends(works: &[LayerWork]) {
    for work in works.iter().filter(|work| work.sync_map_end) {
        if let Some(journal) = work.layer.journal().as_mut() {
            journal.leave_end_unsynced();
        }
    }
}

/// The map file of a layer, if it is not sealed.
pub fn map_file(work: &LayerWork) -> Option<Arc<dyn File>> {
    let journal = work.layer.journal();
    journal.as_ref().map(|journal| Arc::clone(journal.file()))
}

/// Step 4, first half: encodes the records of a layer. `None` if there are none, or if the layer was sealed since.
///
/// If it is sealed between this and the write, the bytes go to a file that has lost its name. That is right: sealing
/// writes and syncs a map that holds these records too, before it takes the name.
pub fn encode(work: &LayerWork) -> Option<JournalWrite> {
    if work.marks.records.is_empty() {
        return None;
    }
    let mut journal = work.layer.journal();
    let journal = journal.as_mut()?;
    let before = journal.end();
    let (offset, bytes) = journal.append(&work.marks.records);
    Some(JournalWrite {
        layer: Arc::clone(&work.layer),
        before,
        file: Arc::clone(journal.file()),
        offset,
        bytes,
    })
}

/// Writes records of what happened already, without a sync: they survive the end of this process, and the next flush syncs
/// them, before it writes anything behind them. For who leads.
fn journal_unsynced(layer: &Layer, records: &[MapRecord]) -> io::Result<()> {
    if records.is_empty() {
        return Ok(());
    }
    let mut journal = layer.journal();
    let Some(journal) = journal.as_mut() else {
        return Err(io::Error::other("a sealed layer takes no records"));
    };
    if journal.take_unsynced_end() {
        // At most the last group of a journal may be torn.
        journal.file().sync_data().map_err(never_full)?;
    }
    let before = journal.end();
    let (offset, bytes) = journal.append(records);
    journal.leave_end_unsynced();
    match journal.file().write_at(&bytes, offset) {
        Err(error) if is_full_disk(&error) => journal
            .take_back(before)
            .map_err(never_full)
            .and(Err(error)),
        result => result,
    }
}

/// An error after which nobody knows what is durable, whatever it says.
fn never_full(error: io::Error) -> io::Error {
    io::Error::other(error)
}
