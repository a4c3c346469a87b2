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
//! 1. look: take the changed map words of every unsealed layer, then whether it has unsynced data;
//! 2. sync the data files that have any;
//! 3. write journal records and their commit record, for the layers with changed words;
//! 4. sync those map files;
//! 5. answer.
//!
//! Every empty half is skipped. Any failure is latched in the volume before anybody is answered.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::chain::Chain;
use crate::file::File;
use crate::layer::{Layer, LayerMap};
use crate::mailbox::{Mail, Mailbox, Waiter};
use crate::map::MapRecord;

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
    pub fn lead_blocking(&self) {
        let mut state = self.lock();
        state.blocking += 1;
        while state.running {
            state = self
                .free
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
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
    /// Whether its data file must be synced.
    pub sync_data: bool,
    /// The map words that changed, as records.
    pub records: Vec<MapRecord>,
}

/// The bytes that make a layer's changes durable, and where they go.
#[derive(Debug)]
pub struct JournalWrite {
    /// The map file.
    pub file: Arc<dyn File>,
    /// Where in it.
    pub offset: u64,
    /// The records with their commit record.
    pub bytes: Vec<u8>,
}

/// Step 1. The map words are taken before the unsynced flag: a writer sets the flag first and the word second, so whoever
/// sees the word finds the flag set, or cleared by an earlier group that has synced since.
pub fn look(chain: &Chain) -> Vec<LayerWork> {
    chain
        .unsealed()
        .filter_map(|layer| {
            let records = match &**layer.map() {
                LayerMap::Active(map) => map.collect(usize::MAX).records,
                // Sealed since the chain was made: its data and map are durable.
                LayerMap::Sealed(_) => return None,
            };
            let sync_data = layer.take_unsynced();
            (sync_data || !records.is_empty()).then(|| LayerWork {
                layer: Arc::clone(layer),
                sync_data,
                records,
            })
        })
        .collect()
}

/// Step 3, first half: encodes the records of a layer. `None` if there are none, or if the layer was sealed since.
///
/// If it is sealed between this and the write, the bytes go to a file that has lost its name. That is right: sealing
/// writes and syncs a map that holds these records too, before it takes the name.
pub fn encode(work: &LayerWork) -> Option<JournalWrite> {
    if work.records.is_empty() {
        return None;
    }
    let mut journal = work.layer.journal();
    let journal = journal.as_mut()?;
    let (offset, bytes) = journal.append(&work.records);
    Some(JournalWrite {
        file: Arc::clone(journal.file()),
        offset,
        bytes,
    })
}
