//! Which volumes are served to front-ends now, and how they fare. The only file of the control plane that knows
//! [`crate::attach`].
//!
//! The table never holds its lock while a socket is set up or taken down: the entry says "changing" meanwhile, so that a
//! front-end which drains slowly holds up nobody but the next command for its own volume.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Slot;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use axum::http::StatusCode;

use crate::attach::{AttachOptions, Attachment, AttachmentHandle, HandedAttachment, SocketSource};
use crate::provider::StoredDisk;
use crate::vhost::session::adopt::{Fared, Release};
use crate::vhost::under_way::UnderWay;
use crate::worker::provider::DiskProvider;

use super::convert::path_text;
use super::error::{ApiError, Result};
use super::events::{Events, Happening};
use super::types::{self, AttachmentState, ErrorKind, RequestCounts};

/// Where a front-end is to connect.
#[derive(Debug)]
pub enum Source {
    /// A socket to listen on at this path.
    Path(PathBuf),
    /// A socket that the daemon was started with, listening or connected.
    Inherited(OwnedFd),
}

impl Source {
    /// The socket as it is shown to people.
    fn text(&self) -> String {
        use std::os::fd::AsRawFd;
        match self {
            Self::Path(path) => path_text(path),
            Self::Inherited(fd) => format!("fd {}", fd.as_raw_fd()),
        }
    }
}

/// How a volume is to be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terms {
    /// The socket as it is shown to people.
    pub socket: String,
    /// How many virtqueues are offered.
    pub queues: u16,
    /// Whether the guest may only read.
    pub read_only: bool,
}

/// Where an attachment stands.
#[derive(Debug)]
enum State {
    /// Being set up or taken down by a command.
    Changing,
    /// Served.
    Running(AttachmentHandle),
    /// Could not be set up.
    Failed(String),
}

/// One attachment, by the name of its volume.
#[derive(Debug)]
struct Entry {
    /// How it is served.
    terms: Terms,
    /// Where it stands.
    state: State,
    /// The volume while it is served, for its failure.
    disk: Option<Arc<StoredDisk>>,
    /// Whether a front-end was connected when [`Attachments::observe`] last looked.
    was_connected: bool,
    /// Whether the volume's failure was told already.
    failure_told: bool,
    /// Whether it was told that the volume waits for space.
    was_full: bool,
}

impl Entry {
    /// An entry of which nothing was told yet.
    const fn new(terms: Terms, state: State, disk: Option<Arc<StoredDisk>>) -> Self {
        Self {
            terms,
            state,
            disk,
            was_connected: false,
            failure_told: false,
            was_full: false,
        }
    }
}

/// All attachments of the daemon.
#[derive(Debug)]
pub struct Attachments {
    /// By volume.
    table: Mutex<BTreeMap<String, Entry>>,
    /// Worker threads an attachment, at most.
    workers_max: usize,
    /// The group that may use the sockets.
    group: Option<u32>,
    /// Where changes are told.
    events: Arc<Events>,
}

impl Attachments {
    /// An empty table; each attachment gets at most `workers_max` worker threads.
    pub fn new(workers_max: usize, events: Arc<Events>) -> Self {
        Self {
            table: Mutex::default(),
            workers_max,
            group: None,
            events,
        }
    }

    /// The same, with sockets that the members of a group may use.
    pub fn with_group(mut self, group: Option<u32>) -> Self {
        self.group = group;
        self
    }

    /// The table, also after a panic elsewhere: each change of it is one assignment.
    fn table(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves a volume. Replaces an entry that has failed. `commit` runs once the socket is there and before anybody else
    /// can change the attachment; if it fails, the socket goes away again.
    ///
    /// # Errors
    /// `Busy` if it is served already or the socket is in use; `Io`; those of `commit`.
    pub fn start(
        &self,
        disk: Arc<StoredDisk>,
        source: Source,
        queues: u16,
        read_only: bool,
        commit: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let name = disk.name().to_owned();
        let terms = Terms {
            socket: source.text(),
            queues,
            read_only,
        };
        self.reserve(&name, &terms)?;
        let options = self.options(&terms);
        let socket = match source {
            Source::Path(path) => SocketSource::Listen(path),
            Source::Inherited(fd) => SocketSource::Fd(fd),
        };
        let started = Attachment::start(Arc::clone(&disk), socket, options)
            .map_err(|error| refusal(&error))
            .and_then(|handle| match commit() {
                Ok(()) => Ok(handle),
                Err(error) => {
                    handle.stop();
                    Err(error)
                }
            });
        match started {
            Ok(handle) => {
                let socket = terms.socket.clone();
                let entry = Entry::new(terms, State::Running(handle), Some(disk));
                self.table().insert(name.clone(), entry);
                self.events.tell(Happening::VolumeAttached {
                    volume: name,
                    socket,
                });
                Ok(())
            }
            Err(error) => {
                self.table().remove(&name);
                Err(error)
            }
        }
    }

    /// How an attachment of these terms is served.
    fn options(&self, terms: &Terms) -> AttachOptions {
        AttachOptions {
            queues: terms.queues,
            workers: self.workers_max.min(usize::from(terms.queues)).max(1),
            read_only: terms.read_only,
            group: self.group,
            ..AttachOptions::default()
        }
    }

    /// Serves a volume that another process has served until now, with its front-ends; see [`Attachment::adopt`].
    ///
    /// # Errors
    /// The host's answer.
    pub fn adopt(
        &self,
        disk: Arc<StoredDisk>,
        terms: Terms,
        handed: HandedAttachment,
        told: &mpsc::Sender<Fared>,
        release: &Arc<Release>,
    ) -> std::io::Result<()> {
        let name = disk.name().to_owned();
        let was_connected = !handed.sessions.is_empty();
        let options = self.options(&terms);
        let handle = Attachment::adopt(Arc::clone(&disk), handed, options, told, release)?;
        let entry = Entry {
            was_connected,
            ..Entry::new(terms, State::Running(handle), Some(disk))
        };
        self.table().insert(name, entry);
        Ok(())
    }

    /// A volume of which a device's state is being transferred, which cannot go on in another process.
    pub fn transferring(&self) -> Option<String> {
        let table = self.table();
        let mut found = table.iter().filter(|(_, entry)| match &entry.state {
            State::Running(handle) => handle.is_transferring(),
            State::Changing | State::Failed(_) => false,
        });
        found.next().map(|(name, _)| name.clone())
    }

    /// Waits until everything has ended that front-ends have under way now. Returns a volume where it has not in that time.
    pub fn await_under_way(&self, limit: Duration) -> Option<String> {
        let deadline = Instant::now() + limit;
        let asked: Vec<(String, UnderWay)> = {
            let table = self.table();
            let running = table.iter().filter_map(|(name, entry)| match &entry.state {
                State::Running(handle) => Some((name.clone(), handle.under_way())),
                State::Changing | State::Failed(_) => None,
            });
            running.collect()
        };
        let mut late = asked
            .into_iter()
            .filter(|(_, under_way)| !under_way.has_ended_by(deadline));
        late.next().map(|(name, _)| name)
    }

    /// Ends all for another process to go on with them, side by side. No command is at work on them.
    pub fn hand_over(&self) -> Vec<(String, Terms, HandedAttachment)> {
        let table = std::mem::take(&mut *self.table());
        let running = table
            .into_iter()
            .filter_map(|(name, entry)| match entry.state {
                State::Running(handle) => Some((name, entry.terms, handle)),
                State::Changing | State::Failed(_) => None,
            });
        let running: Vec<_> = running.collect();
        for (_, _, handle) in &running {
            handle.begin_hand_over();
        }
        let handed = running.into_iter().filter_map(|(name, terms, handle)| {
            let handed = handle.hand_over();
            if handed.is_none() {
                tracing::error!(volume = %name, "its socket cannot be handed over");
            }
            Some((name, terms, handed?))
        });
        handed.collect()
    }

    /// Puts a "changing" entry into the table, unless the volume is served.
    fn reserve(&self, name: &str, terms: &Terms) -> Result<()> {
        let entry = Entry::new(terms.clone(), State::Changing, None);
        match self.table().entry(name.to_owned()) {
            Slot::Vacant(slot) => {
                slot.insert(entry);
                Ok(())
            }
            Slot::Occupied(mut slot) => match &slot.get().state {
                State::Failed(_) => {
                    slot.insert(entry);
                    Ok(())
                }
                State::Changing => Err(changing(name)),
                State::Running(_) => Err(ApiError::busy(format!(
                    "volume {name:?} is attached to {} already; detach it first",
                    slot.get().terms.socket
                ))),
            },
        }
    }

    /// Notes that a remembered attachment could not be set up, so that it can be seen.
    pub fn note_failure(&self, name: &str, terms: Terms, cause: String) {
        let happening = Happening::AttachFailed {
            volume: name.to_owned(),
            message: cause.clone(),
        };
        self.table().insert(
            name.to_owned(),
            Entry::new(terms, State::Failed(cause), None),
        );
        self.events.tell(happening);
    }

    /// Stops serving a volume: drains what is under way, closes the socket and removes its file. Then `commit` runs,
    /// while nobody else can change the attachment and nothing here holds the volume any more. If it fails, the
    /// attachment is shown as failed and can be stopped again.
    ///
    /// # Errors
    /// `NotFound` if it is not attached; `Busy` if another command is at it; those of `commit`.
    pub fn stop(&self, name: &str, commit: impl FnOnce() -> Result<()>) -> Result<()> {
        let state = {
            let mut table = self.table();
            let Some(entry) = table.get_mut(name) else {
                let message = format!("volume {name:?} is not attached");
                return Err(
                    ApiError::new(StatusCode::NOT_FOUND, ErrorKind::NotFound, message)
                        .of("attachment"),
                );
            };
            match std::mem::replace(&mut entry.state, State::Changing) {
                State::Changing => return Err(changing(name)),
                state => state,
            }
        };
        if let State::Running(handle) = state {
            handle.stop();
        }
        if let Err(error) = commit() {
            if let Some(entry) = self.table().get_mut(name) {
                entry.state =
                    State::Failed(format!("no longer served, but still remembered: {error}"));
            }
            return Err(error);
        }
        self.table().remove(name);
        self.events.tell(Happening::VolumeDetached {
            volume: name.to_owned(),
        });
        Ok(())
    }

    /// Stops all, side by side, since each may have to drain. For the end of the daemon.
    pub fn stop_all(&self) {
        let names: Vec<String> = self.table().keys().cloned().collect();
        thread::scope(|scope| {
            for name in &names {
                // "Not attached" and "changing" mean that a command was faster.
                scope.spawn(|| self.stop(name, || Ok(())).ok());
            }
        });
    }

    /// How a volume is served, if it is.
    pub fn view(&self, name: &str) -> Option<types::Attachment> {
        let table = self.table();
        let entry = table.get(name)?;
        let mut view = types::Attachment {
            socket: entry.terms.socket.clone(),
            queues: entry.terms.queues,
            read_only: entry.terms.read_only,
            state: AttachmentState::Changing,
            connections: 0,
            rings_running: 0,
            error: None,
            requests: RequestCounts::default(),
        };
        match &entry.state {
            State::Changing => {}
            State::Failed(cause) => {
                view.state = AttachmentState::Failed;
                view.error = Some(cause.clone());
            }
            State::Running(handle) => {
                let status = handle.status();
                view.state = match (status.connected, status.ended) {
                    (true, _) => AttachmentState::Connected,
                    (false, false) => AttachmentState::Listening,
                    (false, true) => AttachmentState::Failed,
                };
                view.error = status
                    .ended
                    .then(|| "no front-end can come any more".to_owned());
                view.connections = u64::try_from(status.connections).unwrap_or(u64::MAX);
                view.rings_running = u64::try_from(status.rings_running).unwrap_or(u64::MAX);
                view.requests = RequestCounts {
                    reads: status.reads,
                    writes: status.writes,
                    flushes: status.flushes,
                    discards: status.discards,
                    read_bytes: status.read_bytes,
                    written_bytes: status.written_bytes,
                    errors: status.errors,
                };
            }
        }
        Some(view)
    }

    /// Tells the front-end of a volume that the disk has another size, if there is one.
    pub fn notify_resize(&self, name: &str) {
        let table = self.table();
        if let Some(State::Running(handle)) = table.get(name).map(|entry| &entry.state)
            && let Err(error) = handle.notify_resize()
        {
            tracing::warn!(volume = %name, "the front-end was not told of the new size: {error}");
        }
    }

    /// Whether a volume was served and no front-end can come any more: its only connection has ended.
    pub fn has_ended(&self, name: &str) -> bool {
        let table = self.table();
        table.get(name).is_some_and(|entry| match &entry.state {
            State::Running(handle) => handle.status().ended,
            State::Changing | State::Failed(_) => false,
        })
    }

    /// How many front-ends are connected.
    pub fn connections(&self) -> usize {
        let table = self.table();
        let count = |entry: &Entry| match &entry.state {
            State::Running(handle) => handle.status().connections,
            State::Changing | State::Failed(_) => 0,
        };
        table.values().map(count).sum()
    }

    /// How many volumes have a front-end now.
    pub fn connected(&self) -> usize {
        let table = self.table();
        let connected = |entry: &&Entry| match &entry.state {
            State::Running(handle) => handle.status().connected,
            State::Changing | State::Failed(_) => false,
        };
        table.values().filter(connected).count()
    }

    /// Looks at every attachment and tells what has changed since the last look.
    pub fn observe(&self) {
        let mut happenings = Vec::new();
        for (name, entry) in self.table().iter_mut() {
            let State::Running(handle) = &entry.state else {
                continue;
            };
            let connected = handle.status().connected;
            if connected != entry.was_connected {
                entry.was_connected = connected;
                let volume = name.clone();
                happenings.push(if connected {
                    Happening::FrontendConnected { volume }
                } else {
                    Happening::FrontendDisconnected { volume }
                });
            }
            let full = entry
                .disk
                .as_ref()
                .is_some_and(|disk| disk.waits_for_space());
            if full != entry.was_full {
                entry.was_full = full;
                let volume = name.clone();
                happenings.push(if full {
                    Happening::VolumeNoSpace { volume }
                } else {
                    Happening::VolumeHasSpace { volume }
                });
            }
            let failure = entry.disk.as_ref().and_then(|disk| disk.failure());
            let told = std::mem::replace(&mut entry.failure_told, failure.is_some());
            if let Some(message) = failure.filter(|_| !told) {
                tracing::error!(volume = %name, "takes no more writes: {message}");
                happenings.push(Happening::VolumeFailed {
                    volume: name.clone(),
                    message,
                });
            }
        }
        for happening in happenings {
            self.events.tell(happening);
        }
    }
}

/// Another command is at work on the same attachment.
fn changing(name: &str) -> ApiError {
    ApiError::busy(format!(
        "volume {name:?} is being attached or detached by another command; try again"
    ))
}

/// Why a volume could not be served, as the client sees it.
fn refusal(error: &std::io::Error) -> ApiError {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => ApiError::busy(error.to_string()).of("socket"),
        // A path at which there can be no socket.
        std::io::ErrorKind::InvalidInput
        | std::io::ErrorKind::NotFound
        | std::io::ErrorKind::NotADirectory
        | std::io::ErrorKind::PermissionDenied
        | std::io::ErrorKind::ReadOnlyFilesystem => ApiError::invalid("socket", error.to_string()),
        _ => ApiError::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            ErrorKind::Io,
            error.to_string(),
        )
        .of("socket"),
    }
}
