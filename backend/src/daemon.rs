//! The life of the daemon: open, attach, serve until told to stop, drain, flush.
//!
//! Stopping takes at most [`STOP_TIMEOUT`]: no new commands, those under way end, attachments drain, everything is
//! flushed. What does not end in time is cut off and reported; nothing acknowledged is lost by that, since all of it is
//! in the files or in the cache, which the next daemon of this boot takes over.

mod means;
mod succession;

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use stratablk_layers as layers;
use stratablk_layers::store::{Store, VolumeSource};
use stratablk_layers::units::SECTOR_BYTES;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};

use self::means::Means;
use self::succession::{AGAIN_AFTER, Began, Candidates, Ended, Kept, successors_socket};
use crate::attach::share_descriptors;
use crate::config::{DiskSocket, OneDisk, ServeConfig, Target};
use crate::confine::{self, ConfineError, Places, Role, accounts};
use crate::control::attachments::Source;
use crate::control::commands::{Commands, check_socket_path};
use crate::control::error::ApiError;
use crate::control::gate::{COMMANDS_MAX, Gate};
use crate::control::socket::{ControlSocket, SocketError};
use crate::control::spare::Spare;
use crate::control::types::ErrorKind;
use crate::control::{routes, server};
use crate::notify::notify;
use crate::takeover::giver::Candidate;

/// The volume of one-disk mode.
pub const DISK_VOLUME: &str = "disk";
/// The time from the signal to the exit, at most; service managers and scripts rely on 5 s.
const STOP_TIMEOUT: Duration = Duration::from_millis(4_500);
/// The part of it that commands under way get.
const COMMANDS_TIMEOUT: Duration = Duration::from_millis(1_500);
/// How often attachments are looked at for changes that nobody commanded.
const OBSERVE_INTERVAL: Duration = Duration::from_secs(1);

/// Why the daemon did not start, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The store could not be opened.
    #[error("store {dir}: {source}")]
    Store {
        /// The store.
        dir: PathBuf,
        /// Why.
        source: ApiError,
    },
    /// The image of one-disk mode cannot be served.
    #[error("{file}: {what}")]
    Image {
        /// The image.
        file: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The disk of one-disk mode could not be set up.
    #[error("{file}: {source}")]
    Disk {
        /// The image.
        file: PathBuf,
        /// Why.
        source: ApiError,
    },
    /// The control socket could not be had.
    #[error(transparent)]
    Control(#[from] SocketError),
    /// The daemon cannot give up what it was told to.
    #[error(transparent)]
    Confine(#[from] ConfineError),
    /// There is no such group.
    #[error("--socket-group {0}: no such group in /etc/group; give a group's name or number")]
    NoSocketGroup(String),
    /// Nothing could be taken over from the daemon that runs.
    #[error("--takeover: {0}")]
    Takeover(io::Error),
    /// The host refused something that every process needs.
    #[error("{op}: {source}")]
    Host {
        /// What was tried.
        op: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// Told to stop while it was not clear who serves.
    #[error(
        "stopped while another process took over: after {0:?} it was not clear which of them goes on, and what was \
         written last may not be safe from power loss; where no daemon runs then, start one"
    )]
    Amid(Duration),
    /// The last flush failed.
    #[error("stopped, but not everything is safe from power loss: {0}")]
    Flush(ApiError),
    /// The last flush did not end.
    #[error(
        "stopped, but what was written last may not be safe from power loss: the flush took longer than {0:?}"
    )]
    Late(Duration),
}

impl DaemonError {
    /// What kind of thing went wrong, for `--json`.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Store { source, .. } | Self::Disk { source, .. } | Self::Flush(source) => {
                source.detail.kind
            }
            Self::Image { .. } => ErrorKind::Invalid,
            Self::Control(SocketError::InUse(_)) | Self::Takeover(_) => ErrorKind::Busy,
            Self::Control(SocketError::NotASocket(_) | SocketError::NoSuchGroup(_))
            | Self::NoSocketGroup(_)
            | Self::Confine(ConfineError::User(_)) => ErrorKind::Invalid,
            Self::Confine(ConfineError::Refused { .. }) => ErrorKind::Unsupported,
            Self::Control(SocketError::Io { .. })
            | Self::Host { .. }
            | Self::Amid(_)
            | Self::Late(_) => ErrorKind::Io,
        }
    }
}

/// Lets a file that may grow no further (`ulimit -f`) be an error of the write, as it is of any other host, and not the end of
/// the process and of all disks that it serves. Before there are other threads, which do as this one does.
fn outlive_file_limit() -> io::Result<()> {
    use vmm_sys_util::signal::{Error, block_signal};
    match block_signal(libc::SIGXFSZ) {
        Ok(()) | Err(Error::SignalAlreadyBlocked(_)) => Ok(()),
        Err(error) => Err(io::Error::other(error.to_string())),
    }
}

/// Takes as many file descriptors as the host allows: each layer of an open chain holds one, and the usual soft limit of
/// 1,024 would end a volume's snapshots there. Only `select(2)` needs the low limit, and nothing here uses it.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            tracing::warn!(%error, "the limit of open files stays low; deep chains may not open");
        }
    }
    share_descriptors(getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX));
}

/// Serves until SIGTERM, SIGINT or SIGHUP.
///
/// # Errors
/// Before the first guest is served: nothing was changed. Afterwards: only [`DaemonError::Flush`], `Late` and `Amid`.
pub fn run(config: ServeConfig) -> Result<(), DaemonError> {
    let host = |op| move |source| DaemonError::Host { op, source };
    raise_descriptor_limit();
    outlive_file_limit().map_err(host("block a signal"))?;
    let mut spare = Spare::new();
    let groups = Groups::find(&config)?;
    confine::begin(&config.confine, &config.target.store(), &groups.numbers())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(COMMANDS_MAX as usize)
        .build()
        .map_err(host("start the control thread"))?;
    let result = runtime.block_on(async {
        let mut signals = Signals::install().map_err(host("listen for signals"))?;
        let json = config.json;
        let kept = Kept::of(&config, groups.socket);
        // Opening a large store takes its time and can be given up at any moment, as by a crash.
        // On a thread of its own, which ends before this one is confined: it opens what nobody opens afterwards.
        let (done, mut setting_up) = oneshot::channel();
        let serves = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&serves);
        thread::Builder::new()
            .name("set-up".into())
            .spawn(move || {
                // A receiver less means that the daemon was told to stop.
                let _ = done.send(Daemon::set_up(config, groups.socket, &told));
            })
            .map_err(host("start a thread"))?;
        let mut stop = None;
        let set_up = tokio::select! {
            ended = &mut setting_up => ended,
            name = signals.next() => {
                // ORDERING: Relaxed; see `succession::succeed`.
                if !serves.load(Ordering::Relaxed) {
                    tracing::info!("{name} before anything was served");
                    return Ok(());
                }
                // Guests of the daemon before are served, so it ends in order.
                let told = stop.insert(Stop::now(name));
                let ended = tokio::time::timeout_at(told.deadline, setting_up).await;
                ended.map_err(|_| DaemonError::Amid(STOP_TIMEOUT))?
            }
        };
        let set_up = set_up.map_err(|error| host("set up")(io::Error::other(error)))?;
        let (mut daemon, mut listener) = set_up?;
        // What is started from here on is confined from its start.
        confine::enter(Role::Control);
        let mut candidates = None;
        loop {
            match daemon
                .serve(listener, spare, &mut signals, &mut candidates, json, stop)
                .await?
            {
                Ended::Stopped => return Ok(()),
                Ended::Succeeded => {
                    tracing::info!("another process goes on");
                    return Ok(());
                }
                Ended::Back(back) => {
                    spare = Spare::new();
                    (daemon, listener, stop) = back.go(kept.clone(), &mut signals).await?;
                }
            }
        }
    });
    // Threads that are stuck in a file system must not keep the process.
    runtime.shutdown_background();
    result
}

/// The groups that sockets are opened to.
#[derive(Clone, Copy, Debug)]
struct Groups {
    /// Of the control socket; one that is not found is told when the socket is made.
    control: Option<u32>,
    /// Of the sockets of front-ends.
    socket: Option<u32>,
}

impl Groups {
    /// Finds them.
    fn find(config: &ServeConfig) -> Result<Self, DaemonError> {
        let number = |name: &str| {
            accounts::group(name).map_err(|source| DaemonError::Host {
                op: "read /etc/group",
                source,
            })
        };
        let control = config.control_group.as_deref();
        let socket = match &config.socket_group {
            None => None,
            Some(name) => {
                let found = number(name)?;
                Some(found.ok_or_else(|| DaemonError::NoSocketGroup(name.clone()))?)
            }
        };
        Ok(Self {
            control: control.map(number).transpose()?.flatten(),
            socket,
        })
    }

    /// Those of which the daemon must be a member to open sockets to them.
    fn numbers(self) -> Vec<u32> {
        self.control.into_iter().chain(self.socket).collect()
    }
}

/// The signals that end the daemon in order.
#[derive(Debug)]
struct Signals {
    /// From service managers and `kill`.
    terminate: Signal,
    /// From Ctrl-C.
    interrupt: Signal,
    /// From a terminal that goes away.
    hangup: Signal,
}

impl Signals {
    /// Takes the signals over.
    fn install() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for the next one and returns its name.
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.hangup.recv() => "SIGHUP",
        }
    }
}

/// The end that the daemon was told to come to.
#[derive(Clone, Copy, Debug)]
struct Stop {
    /// When it has to be over.
    deadline: Instant,
}

impl Stop {
    /// Told just now, for that reason.
    fn now(why: &str) -> Self {
        tracing::info!("{why}: stopping");
        Self {
            deadline: Instant::now() + STOP_TIMEOUT,
        }
    }
}

/// The daemon, set up.
#[derive(Debug)]
struct Daemon {
    /// The store, the attachments and what can be done to them.
    commands: Arc<Commands>,
    /// The control socket's file.
    control: ControlSocket,
    /// What is served, for people.
    what: String,
    /// Whether the only front-end came with an inherited connection, so that its end is ours too.
    one_session: bool,
    /// Where processes come that take over; none in one-disk mode.
    takeover: Option<(ControlSocket, std::os::unix::net::UnixListener)>,
    /// Whom this one comes after, and how it has come to serve.
    began: Began,
}

impl Daemon {
    /// Opens the store, takes the control socket and attaches what is to be attached. Blocks. `serves` becomes true as soon as
    /// guests are served that another process has served until then.
    fn set_up(
        config: ServeConfig,
        socket_group: Option<u32>,
        serves: &AtomicBool,
    ) -> Result<(Self, std::os::unix::net::UnixListener), DaemonError> {
        if config.takeover {
            return succession::succeed(&config, socket_group, serves);
        }
        let dir = config.target.store();
        let disk = match config.target {
            Target::Store(_) => None,
            Target::Disk(disk) => Some(disk),
        };
        let what = match &disk {
            Some(disk) => format!("{} (changes in {})", disk.file.display(), dir.display()),
            None => format!("store {}", dir.display()),
        };
        let of_store = |error: layers::Error| DaemonError::Store {
            dir: dir.clone(),
            source: error.into(),
        };

        // A listening socket that was inherited serves one front-end after the other; only a connection ends.
        let one_session = disk
            .as_ref()
            .is_some_and(|disk| matches!(disk.socket, DiskSocket::Inherited(_)));
        let mut fresh = None;
        if let Some(disk) = &disk
            && !dir.exists()
        {
            check_image(&disk.file)?;
            fresh = FreshStore::create(&dir).map_err(|source| {
                of_store(layers::Error::Io {
                    op: "create",
                    path: dir.clone(),
                    source,
                })
            })?;
        }
        let cache_dir = config.store_options.cache.place.clone();
        let opened = Store::open(&dir, config.store_options);
        if let (Some(fresh), Err(layers::Error::Busy { .. })) = (&mut fresh, &opened) {
            // Somebody else was faster: it is theirs.
            fresh.keep();
        }
        let store = opened.map_err(of_store)?;

        let workers = workers_of(config.workers);
        let control = config.control.unwrap_or_else(|| dir.join("control.sock"));
        let commands = Commands::new(store, dir.clone(), workers).with_socket_group(socket_group);
        commands.log_notes();
        let disk_dirs = disk.as_ref().map_or_else(Vec::new, OneDisk::dirs);
        settle(
            &commands,
            dir.clone(),
            cache_dir,
            &control,
            config.confine,
            disk_dirs,
        );
        commands
            .start_opener()
            .map_err(|source| DaemonError::Host {
                op: "start a thread",
                source,
            })?;
        let in_store = disk.is_none();
        let begun =
            begin(&commands, &control, config.control_group.as_deref(), disk).and_then(|control| {
                Ok((
                    control,
                    in_store.then(|| successors_socket(&dir)).transpose()?,
                ))
            });
        if begun.is_err()
            && let Err(error) = commands.close()
        {
            // The cache's memory stays for the next daemon then.
            tracing::error!("{error}");
        }
        let ((control, listener), takeover) = begun?;
        if let Some(fresh) = &mut fresh {
            fresh.keep();
        }
        Ok((
            Self {
                commands: Arc::new(commands),
                control,
                what,
                one_session,
                takeover,
                began: Began::Alone,
            },
            listener,
        ))
    }

    /// Serves the control socket until a signal, then stops in order.
    async fn serve(
        mut self,
        listener: std::os::unix::net::UnixListener,
        spare: Spare,
        signals: &mut Signals,
        candidates: &mut Option<Candidates>,
        json: bool,
        mut told: Option<Stop>,
    ) -> Result<Ended, DaemonError> {
        let mut means = Means::default();
        while told.is_none() {
            match means.take(&self, &listener, candidates) {
                Ok(()) => break,
                Err(error) if matches!(self.began, Began::Alone) => return Err(error),
                // Nobody else can serve the guests any more.
                Err(error) => tracing::error!("guests are served, commands not yet: {error}"),
            }
            tokio::select! {
                name = signals.next() => told = Some(Stop::now(name)),
                () = tokio::time::sleep(AGAIN_AFTER) => {}
            }
        }
        let gate = Arc::new(Gate::new(Arc::clone(&self.commands)));
        let (stop, stopped) = watch::channel(false);
        let server = means.clients.take().map(|clients| {
            let router = routes::router(Arc::clone(&gate));
            tokio::spawn(server::serve(clients, spare, router, stopped))
        });
        if told.is_none() {
            self.tell_ready(json);
        }
        self.began = Began::Alone;

        let mut observe = tokio::time::interval(OBSERVE_INTERVAL);
        observe.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let told = loop {
            if let Some(told) = told {
                break told;
            }
            tokio::select! {
                name = signals.next() => told = Some(Stop::now(name)),
                Some(candidate) = next_candidate(candidates) => {
                    let leaving = tokio::select! {
                        name = signals.next() => {
                            // The other process sees the end of the connection.
                            told = Some(Stop::now(name));
                            continue;
                        }
                        leaving = self.consider(candidate, &gate) => leaving,
                    };
                    let Some(leaving) = leaving else {
                        continue;
                    };
                    // Clients come to the other process.
                    let _ = stop.send(true);
                    self.commands.events().close();
                    gate.shut();
                    if let Some(server) = server {
                        let _ = server.await;
                    }
                    drop(gate);
                    return self.leave(leaving, listener, means, signals).await;
                }
                _ = observe.tick() => {
                    self.commands.attachments().observe();
                    self.commands.observe_jobs();
                    if self.one_session && self.commands.attachments().has_ended(DISK_VOLUME) {
                        told = Some(Stop::now("the front-end has gone"));
                    }
                }
            }
        };

        notify("STOPPING=1");
        // A receiver less means that the server has ended by itself.
        let _ = stop.send(true);
        self.commands.events().close();
        if !gate.close(COMMANDS_TIMEOUT).await {
            tracing::warn!("control commands still run; not waiting for them");
        }
        let closed = self.close(told.deadline).await;
        if let Some(server) = server
            && tokio::time::timeout_at(told.deadline, server)
                .await
                .is_err()
        {
            tracing::debug!("the control server still runs");
        }
        closed.map(|()| Ended::Stopped)
    }

    /// Says that guests and clients can come: on stderr, to the service manager, and on stdout where JSON was asked for.
    fn tell_ready(&self, json: bool) {
        if matches!(self.began, Began::Back) {
            // Nobody was told otherwise.
            return;
        }
        let control = self.control.path().display();
        // Not a log line, since scripts wait for it whatever the log's filter.
        eprintln!(
            "stratablk: ready: serving {}, control socket {control}",
            self.what
        );
        if json {
            let mut status = serde_json::json!(self.commands.status());
            if let Some(status) = status.as_object_mut() {
                status.insert("control".into(), control.to_string().into());
            }
            // Nobody may be reading.
            let _ = writeln!(io::stdout(), "{status}");
        }
        notify("READY=1");
    }

    /// Drains the attachments and flushes everything, on a thread that may block.
    async fn close(&self, deadline: Instant) -> Result<(), DaemonError> {
        let (done, result) = oneshot::channel();
        let commands = Arc::clone(&self.commands);
        thread::spawn(move || {
            // A receiver less means that the time was up.
            let _ = done.send(commands.close());
        });
        match tokio::time::timeout_at(deadline, result).await {
            Ok(Ok(Ok(()))) => {
                tracing::info!("stopped, everything is flushed");
                Ok(())
            }
            Ok(Ok(Err(error))) => Err(DaemonError::Flush(error)),
            Ok(Err(_)) => Err(DaemonError::Flush(ApiError::internal(
                "the flush panicked; see the log",
            ))),
            Err(_) => Err(DaemonError::Late(STOP_TIMEOUT)),
        }
    }
}

/// The next process that wants to take over.
async fn next_candidate(candidates: &mut Option<Candidates>) -> Option<Candidate> {
    match candidates {
        Some(candidates) => candidates.recv().await,
        None => None,
    }
}

/// Worker threads an attachment, at most.
fn workers_of(given: Option<usize>) -> usize {
    given.unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from))
}

/// Says where the files lie, for all who are confined from now on.
fn settle(
    commands: &Commands,
    store: PathBuf,
    cache: Option<PathBuf>,
    control: &Path,
    settings: confine::Settings,
    disk_dirs: Vec<PathBuf>,
) {
    // Attachments are confined to these as they start.
    let (mut bases, mut sockets) = commands.remembered_places();
    bases.extend(disk_dirs.iter().cloned());
    sockets.extend(disk_dirs);
    confine::settle(Places {
        store,
        cache,
        control: std::path::absolute(control).unwrap_or_else(|_| control.to_owned()),
        allow: settings.allow,
        allow_read: settings.allow_read,
        bases,
        sockets,
    });
}

/// Takes the control socket and attaches what is to be attached.
fn begin(
    commands: &Commands,
    control: &Path,
    group: Option<&str>,
    disk: Option<OneDisk>,
) -> Result<(ControlSocket, std::os::unix::net::UnixListener), DaemonError> {
    if let Some(disk) = &disk {
        create_disk(commands, disk)?;
    }
    let control = ControlSocket::bind(control, group)?;
    let but: &[&str] = if disk.is_some() { &[DISK_VOLUME] } else { &[] };
    commands.attach_remembered(but);
    if let Some(disk) = disk {
        serve_disk(commands, disk)?;
    }
    Ok(control)
}

/// Checks an image before anything is created for it, so that the words are about the file and nothing is left behind.
fn check_image(file: &Path) -> Result<(), DaemonError> {
    let refuse = |what: String| {
        Err(DaemonError::Image {
            file: file.to_owned(),
            what,
        })
    };
    let meta = match fs::File::open(file).and_then(|opened| opened.metadata()) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return refuse("no such file".into());
        }
        Err(error) => return refuse(error.to_string()),
    };
    if meta.file_type().is_dir() || meta.file_type().is_socket() {
        return refuse("not an image file".into());
    }
    let bytes = meta.len();
    if meta.is_file() && (bytes == 0 || bytes % SECTOR_BYTES != 0) {
        return refuse(format!(
            "{bytes} bytes are not a whole number of sectors ({SECTOR_BYTES} bytes); a raw image is needed"
        ));
    }
    Ok(())
}

/// Creates the volume of one-disk mode over its image, unless the store has it already.
fn create_disk(commands: &Commands, disk: &OneDisk) -> Result<(), DaemonError> {
    if commands.volume(DISK_VOLUME).is_ok() {
        return Ok(());
    }
    check_image(&disk.file)?;
    // The target of a symbolic link, which may be pointed elsewhere one day: the base must stay the same.
    let base = fs::canonicalize(&disk.file).map_err(|error| DaemonError::Image {
        file: disk.file.clone(),
        what: error.to_string(),
    })?;
    commands
        .create(DISK_VOLUME, &VolumeSource::Base(base))
        .map(drop)
        .map_err(|source| DaemonError::Disk {
            file: disk.file.clone(),
            source,
        })
}

/// Serves the volume of one-disk mode where the command line says.
fn serve_disk(commands: &Commands, disk: OneDisk) -> Result<(), DaemonError> {
    let OneDisk {
        file,
        socket,
        queues,
        read_only,
    } = disk;
    let source = match socket {
        DiskSocket::Inherited(fd) => Ok(Source::Inherited(fd)),
        DiskSocket::Path(path) => {
            let path = std::path::absolute(&path).unwrap_or(path);
            check_socket_path(&path).map(|()| Source::Path(path))
        }
    };
    source
        .and_then(|source| commands.serve(DISK_VOLUME, source, queues, read_only))
        .map_err(|source| DaemonError::Disk { file, source })
}

/// A store's directory that was made just now, removed again unless all goes well.
#[derive(Debug)]
struct FreshStore {
    /// The directory; `None` once it is to stay.
    dir: Option<PathBuf>,
}

impl FreshStore {
    /// Makes the directory; `None` if somebody else did so in the meantime.
    fn create(dir: &Path) -> io::Result<Option<Self>> {
        match fs::create_dir(dir) {
            Ok(()) => Ok(Some(Self {
                dir: Some(dir.to_owned()),
            })),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Lets the directory stay.
    fn keep(&mut self) {
        self.dir = None;
    }
}

impl Drop for FreshStore {
    fn drop(&mut self) {
        if let Some(dir) = self.dir.take()
            && let Err(error) = fs::remove_dir_all(&dir)
        {
            tracing::warn!(dir = %dir.display(), "an unfinished store stays: {error}");
        }
    }
}
