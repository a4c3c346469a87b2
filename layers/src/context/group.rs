//! The flush group that a context leads: the steps of `flush`, one after the other, on its own engine.

use std::io;
use std::sync::Arc;

use crate::file::{IoOp, Segment};
use crate::flush::{self, JournalWrite, LayerWork};
use crate::mailbox::{Mail, Waiter};
use crate::volume::RequestError;

use super::QueueContext;
use super::request::Step;

/// A flush under way.
#[derive(Debug)]
pub struct Group {
    /// Who waits for it.
    waiters: Vec<Waiter>,
    /// What it covers.
    work: Vec<LayerWork>,
    /// The journal writes of it; owns their bytes until they are written.
    journals: Vec<JournalWrite>,
    /// What is done next, once `outstanding` is 0.
    next: Phase,
    /// Operations under way.
    outstanding: usize,
    /// The first failure.
    error: Option<String>,
}

/// The steps of a group, in the order in which they make it durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Sync the data files.
    SyncData,
    /// Write the journal records.
    WriteJournal,
    /// Sync the map files.
    SyncMap,
    /// Answer.
    Answer,
}

impl QueueContext {
    /// Asks for a flush on behalf of a request.
    pub(super) fn flush(&mut self, request: usize) {
        let waiter = Waiter {
            mailbox: Arc::clone(&self.mailbox),
            request,
        };
        if let Some(group) = self.volume.flushes().join(waiter) {
            self.next_group = Some(group);
        }
    }

    /// The flush that a request waited for has ended.
    pub(super) fn flush_done(&mut self, request: usize, result: Result<(), RequestError>) {
        self.complete(request, result);
    }

    /// Begins the next group, if one waits and none is under way.
    pub(super) fn lead_next(&mut self) {
        if self.group.is_some() {
            return;
        }
        let Some(waiters) = self.next_group.take() else {
            return;
        };
        let work = if self.volume.has_failed() {
            Vec::new()
        } else {
            flush::look(&self.volume.newest_chain())
        };
        self.group = Some(Group {
            waiters,
            work,
            journals: Vec::new(),
            next: first_phase(),
            outstanding: 0,
            error: self.volume.failure(),
        });
        self.advance_group();
    }

    /// One operation of the group has ended.
    pub(super) fn group_step_done(&mut self, result: io::Result<()>) {
        if let Some(group) = &mut self.group {
            group.outstanding -= 1;
            if let Err(error) = result {
                group
                    .error
                    .get_or_insert_with(|| format!("a flush failed: {error}"));
            }
            if group.outstanding == 0 {
                self.advance_group();
            }
        }
    }

    /// Starts the next step that has something to do; answers after the last.
    fn advance_group(&mut self) {
        while let Some(mut group) = self.group.take() {
            let phase = if group.error.is_some() {
                Phase::Answer
            } else {
                group.next
            };
            group.next = next_phase(phase);
            match phase {
                Phase::SyncData => {
                    for work in group.work.iter().filter(|work| work.sync_data) {
                        group.outstanding += 1;
                        self.push(
                            Step::Group,
                            IoOp::SyncData {
                                file: work.layer.data().token(),
                            },
                        );
                    }
                }
                Phase::WriteJournal => {
                    group.journals = group.work.iter().filter_map(flush::encode).collect();
                    for journal in &group.journals {
                        group.outstanding += 1;
                        let segment = Segment {
                            base: journal.bytes.as_ptr().cast_mut(),
                            len: journal.bytes.len(),
                        };
                        self.push(
                            Step::Group,
                            IoOp::Write {
                                file: journal.file.token(),
                                offset: journal.offset,
                                segments: &[segment],
                            },
                        );
                    }
                }
                Phase::SyncMap => {
                    for journal in &group.journals {
                        group.outstanding += 1;
                        self.push(
                            Step::Group,
                            IoOp::SyncData {
                                file: journal.file.token(),
                            },
                        );
                    }
                }
                Phase::Answer => {
                    self.answer(group);
                    return;
                }
            }
            let waits = group.outstanding > 0;
            self.group = Some(group);
            if waits {
                return;
            }
        }
    }

    /// Latches a failure, lets the next group begin and answers those who waited for this one.
    fn answer(&mut self, group: Group) {
        // Whatever failed meanwhile, on whichever queue or in a command: nothing is promised any more.
        let result = match group.error.or_else(|| self.volume.failure()) {
            None => Ok(()),
            Some(cause) => {
                self.volume.fail(&cause);
                Err(RequestError::Failed)
            }
        };
        self.volume.note_journal(&group.work);
        if let Some(next) = self.volume.flushes().finish() {
            if flush::has_own(&next, &self.mailbox) {
                self.next_group = Some(next);
            } else {
                flush::hand_over(next);
            }
        }
        for waiter in group.waiters {
            if Arc::ptr_eq(&waiter.mailbox, &self.mailbox) {
                self.flush_done(waiter.request, result);
            } else {
                waiter.mailbox.send(Mail::FlushDone {
                    request: waiter.request,
                    result,
                });
            }
        }
    }
}

/// The first step of a group.
fn first_phase() -> Phase {
    if crate::canary::map_before_data() {
        Phase::WriteJournal
    } else {
        Phase::SyncData
    }
}

/// The step after this one.
fn next_phase(phase: Phase) -> Phase {
    if crate::canary::map_before_data() {
        return match phase {
            Phase::WriteJournal => Phase::SyncMap,
            Phase::SyncMap => Phase::SyncData,
            Phase::SyncData | Phase::Answer => Phase::Answer,
        };
    }
    match phase {
        Phase::SyncData => Phase::WriteJournal,
        Phase::WriteJournal => Phase::SyncMap,
        Phase::SyncMap | Phase::Answer => Phase::Answer,
    }
}
