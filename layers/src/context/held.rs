//! Requests that wait until the host has space again: flushes and write-zeroes that found the disk full. Nothing is under way
//! for them meanwhile, and they keep nobody from leading.
//!
//! The write-back thread says when to try again. A write that waits for a frame of a volume whose data finds no room is
//! put aside as any other (`write`), and ended here with the rest if its ring is to be stopped.

use crate::cache::OnFull;
use crate::volume::RequestError;

use super::QueueContext;
use super::request::Asked;

impl QueueContext {
    /// Whether requests wait for space.
    pub(super) fn may_hold(&self) -> bool {
        !self.closing && self.cache.options().on_full == OnFull::Hold
    }

    /// Lets a request wait that asked for a flush or for zeroes.
    pub(super) fn hold(&mut self, request: usize) {
        self.held.push(request);
        self.cache.bell().want_room(&self.mailbox);
    }

    /// Asks once more for all that waits.
    pub(super) fn try_held(&mut self) {
        for number in std::mem::take(&mut self.held) {
            let Some(request) = self.requests.get_mut(number) else {
                continue;
            };
            let Asked { mut zero, flush } = request.asked.clone();
            // All that is left of one that zeroes has not begun: it goes on in the current generation, so that no snapshot
            // waits for space.
            if let (Some(zero), Some(era)) = (&mut zero, request.era)
                && let Some(next) = self.eras.move_on(&self.volume, era, request.changes)
            {
                request.era = Some(next);
                request.chain = None;
                if let Some(tail) = self.move_zero_on(zero, next) {
                    self.zero_after(number, zero.clone(), tail, flush);
                    continue;
                }
            }
            self.join(number, zero, flush);
        }
    }

    /// Ends the requests with these tokens that wait for space, with an error; what was acknowledged stays in the cache. For
    /// a ring that must stop. They complete in the next `poll`. Returns whether there were any. Requests that find the disk
    /// full later wait again, so that it has to be asked until all have ended.
    pub fn end_held(&mut self, chosen: &dyn Fn(u64) -> bool) -> bool {
        let requests = &self.requests;
        let is_chosen = |number: usize| requests.get(number).is_some_and(|r| chosen(r.token));
        let (ends, held): (Vec<usize>, Vec<usize>) =
            self.held.iter().partition(|number| is_chosen(**number));
        let mut parts = Vec::new();
        if !self.parked.is_empty() && self.volume.waits_for_space() {
            (parts, self.parked) = std::mem::take(&mut self.parked)
                .into_iter()
                .partition(|part| part.write && is_chosen(part.request));
        }
        self.held = held;
        let any = !ends.is_empty() || !parts.is_empty();
        for request in ends {
            self.end_flush(request, Err(RequestError::NoSpace));
        }
        for part in parts {
            self.part_done(part.request, Err(RequestError::NoSpace));
        }
        any
    }
}
