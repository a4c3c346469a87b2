//! Commands to a worker, and the handle that sends them.
//!
//! Every command that changes what a worker may touch is answered once the change has taken effect: when
//! [`WorkerHandle::detach`] returns, the worker touches nothing of that ring any more; when [`WorkerHandle::set_memory`]
//! returns, no request uses the memory before.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use stratablk_layers::volume::Durability;

use crate::signal::Signal;
use crate::vhost::dirty_log::DirtyLog;
use crate::vhost::event::{Event, Kick};
use crate::vhost::memory::GuestMemory;
use crate::virtio::ring::{RingLayout, UsedLog};
use crate::virtio::tracker::Resumed;

/// All that a worker needs to know of a ring.
#[derive(Debug)]
pub struct QueueSetup {
    /// Which of the device's rings it is.
    pub index: u16,
    /// Where its parts lie, in the memory that the worker was given last.
    pub layout: RingLayout,
    /// The available entry to go on with.
    pub base: u16,
    /// Whether EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// Whether indirect descriptors were negotiated.
    pub indirect: bool,
    /// Where to log the used ring.
    pub log: Option<UsedLog>,
    /// How the guest says that there is work.
    pub kick: Arc<Kick>,
    /// How to tell the guest that work is done.
    pub call: Option<Arc<Event>>,
    /// How to tell the front-end that the ring broke.
    pub err: Option<Arc<Event>>,
    /// Whether entries may lie there whose kick somebody else has taken already, so that the ring must be looked at
    /// before the first kick.
    pub look: bool,
    /// How it goes on with its inflight region, if it has one. `base` and `look` are as that says.
    pub resumed: Option<Resumed>,
}

/// A command. `done` is answered when it has taken effect.
#[derive(Debug)]
pub enum Command {
    /// Serve a ring from its first kick on.
    Attach {
        /// The ring.
        setup: Box<QueueSetup>,
        /// Whether nothing is taken from it, nor carried out again, before [`Command::Release`].
        held: bool,
        /// Answered with the host's refusal, if there is one.
        done: mpsc::Sender<io::Result<()>>,
    },
    /// Take nothing more from a ring, complete what is under way, forget it.
    Detach {
        /// Which ring.
        index: u16,
        /// Answered with the next available entry; `None` if the worker does not have the ring.
        done: mpsc::Sender<Option<u16>>,
    },
    /// Watch another kick.
    SetKick {
        /// Which ring.
        index: u16,
        /// The kick.
        kick: Arc<Kick>,
        /// Answered with the host's refusal, if there is one.
        done: mpsc::Sender<io::Result<()>>,
    },
    /// Signal another call.
    SetCall {
        /// Which ring.
        index: u16,
        /// The call; `None`: the guest looks for itself.
        call: Option<Arc<Event>>,
        /// Answered when set.
        done: mpsc::Sender<()>,
    },
    /// Signal another error event.
    SetErr {
        /// Which ring.
        index: u16,
        /// The event.
        err: Option<Arc<Event>>,
        /// Answered when set.
        done: mpsc::Sender<()>,
    },
    /// Use this memory for everything that is taken from now on.
    SetMemory {
        /// The memory.
        memory: Arc<GuestMemory>,
        /// Where each ring lies in it; `None`: nowhere.
        layouts: Vec<(u16, Option<RingLayout>)>,
        /// Answered when no request uses the memory before.
        done: mpsc::Sender<()>,
    },
    /// Log what is written, or no longer.
    SetLog {
        /// The log.
        log: Option<Arc<DirtyLog>>,
        /// Where each ring's used ring is logged.
        rings: Vec<(u16, Option<UsedLog>)>,
        /// Answered when set.
        done: mpsc::Sender<()>,
    },
    /// What writes promise that are taken from now on.
    SetDurability {
        /// The promise.
        durability: Durability,
        /// Answered when set.
        done: mpsc::Sender<()>,
    },
    /// Serve all rings that were held, without waiting for a kick.
    Release,
    /// Find out when everything that is under way now has completed; what is taken later does not count.
    AwaitAll {
        /// Dropped then.
        done: mpsc::Sender<()>,
    },
    /// Complete what is under way and end.
    Stop,
}

/// The way to a worker, which others may use besides who started it.
#[derive(Debug)]
pub struct Line {
    /// Where commands go.
    pub(super) sender: mpsc::Sender<Command>,
    /// Tells a busy worker that there are commands.
    pub(super) waiting: Arc<AtomicBool>,
    /// Wakes a sleeping worker.
    pub(super) wake: Signal,
}

/// A worker. Dropping it stops the worker, and waits until it has completed everything.
#[derive(Debug)]
pub struct WorkerHandle {
    /// The way to it.
    pub(super) line: Arc<Line>,
    /// The thread.
    pub(super) thread: Option<JoinHandle<()>>,
}

/// The worker's thread has ended before its time.
fn gone() -> io::Error {
    io::Error::other("the worker thread has ended")
}

impl Line {
    /// Sends a command.
    fn send(&self, command: Command) -> io::Result<()> {
        self.sender.send(command).map_err(|_| gone())?;
        // ORDERING: Release; pairs with the worker's swap, which comes before it receives.
        self.waiting.store(true, Ordering::Release);
        self.wake.raise();
        Ok(())
    }

    /// See [`Command::AwaitAll`]. Does not wait.
    ///
    /// # Errors
    /// The worker is gone.
    pub fn await_all(&self, done: mpsc::Sender<()>) -> io::Result<()> {
        self.send(Command::AwaitAll { done })
    }
}

impl WorkerHandle {
    /// The way to it, which does not keep it alive.
    pub fn line(&self) -> Weak<Line> {
        Arc::downgrade(&self.line)
    }

    /// Sends a command.
    fn send(&self, command: Command) -> io::Result<()> {
        self.line.send(command)
    }

    /// Sends a command and waits for its answer.
    fn call<T>(&self, command: impl FnOnce(mpsc::Sender<T>) -> Command) -> io::Result<T> {
        let (done, answer) = mpsc::channel();
        self.send(command(done))?;
        answer.recv().map_err(|_| gone())
    }

    /// See [`Command::Attach`].
    ///
    /// # Errors
    /// The host's refusal of the kick, or that the worker is gone. So for all of these.
    pub fn attach(&self, setup: QueueSetup) -> io::Result<()> {
        self.attach_as(setup, false)
    }

    /// The same; if `held`, until [`WorkerHandle::release`] nothing is taken from the ring.
    ///
    /// # Errors
    /// As `attach`.
    pub fn attach_as(&self, setup: QueueSetup, held: bool) -> io::Result<()> {
        let setup = Box::new(setup);
        self.call(|done| Command::Attach { setup, held, done })?
    }

    /// See [`Command::Release`]. Does not wait.
    ///
    /// # Errors
    /// The worker is gone.
    pub fn release(&self) -> io::Result<()> {
        self.send(Command::Release)
    }

    /// See [`Command::Detach`].
    ///
    /// # Errors
    /// The worker is gone.
    pub fn detach(&self, index: u16) -> io::Result<Option<u16>> {
        self.call(|done| Command::Detach { index, done })
    }

    /// The same without the wait: the answer comes there.
    ///
    /// # Errors
    /// The worker is gone.
    pub fn begin_detach(&self, index: u16) -> io::Result<mpsc::Receiver<Option<u16>>> {
        let (done, answer) = mpsc::channel();
        self.send(Command::Detach { index, done })?;
        Ok(answer)
    }

    /// See [`Command::SetKick`].
    ///
    /// # Errors
    /// The host's refusal of the kick, or that the worker is gone.
    pub fn set_kick(&self, index: u16, kick: Arc<Kick>) -> io::Result<()> {
        self.call(|done| Command::SetKick { index, kick, done })?
    }

    /// See [`Command::SetCall`].
    ///
    /// # Errors
    /// The worker is gone.
    pub fn set_call(&self, index: u16, call: Option<Arc<Event>>) -> io::Result<()> {
        self.call(|done| Command::SetCall { index, call, done })
    }

    /// See [`Command::SetErr`].
    ///
    /// # Errors
    /// The worker is gone.
    pub fn set_err(&self, index: u16, err: Option<Arc<Event>>) -> io::Result<()> {
        self.call(|done| Command::SetErr { index, err, done })
    }

    /// See [`Command::SetMemory`].
    ///
    /// # Errors
    /// The worker is gone.
    pub fn set_memory(
        &self,
        memory: Arc<GuestMemory>,
        layouts: Vec<(u16, Option<RingLayout>)>,
    ) -> io::Result<()> {
        self.call(|done| Command::SetMemory {
            memory,
            layouts,
            done,
        })
    }

    /// See [`Command::SetLog`].
    ///
    /// # Errors
    /// The worker is gone.
    pub fn set_log(
        &self,
        log: Option<Arc<DirtyLog>>,
        rings: Vec<(u16, Option<UsedLog>)>,
    ) -> io::Result<()> {
        self.call(|done| Command::SetLog { log, rings, done })
    }

    /// See [`Command::SetDurability`].
    ///
    /// # Errors
    /// The worker is gone.
    pub fn set_durability(&self, durability: Durability) -> io::Result<()> {
        self.call(|done| Command::SetDurability { durability, done })
    }
}

impl Drop for WorkerHandle {
    fn drop(&mut self) {
        // A worker that is gone needs no telling.
        let _ = self.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the thread itself.
            let _ = thread.join();
        }
    }
}
