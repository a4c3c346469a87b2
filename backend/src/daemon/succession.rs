//! How one daemon comes after another, with everything that is served: see [`crate::takeover`]. Both sides of it, and the way
//! back, as far as they concern the daemon as a whole.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use stratablk_layers::store::{Store, StoreOptions};
use tokio::sync::oneshot;

use super::{COMMANDS_TIMEOUT, Commands, ControlSocket, Daemon, DaemonError, settle, workers_of};
use crate::config::{ServeConfig, Target};
use crate::control::commands::sole;
use crate::control::gate::Gate;
use crate::takeover::giver::{self, Candidate};
use crate::takeover::package::{HandedVolume, Package};
use crate::takeover::taker::{self, Relieved};
use crate::takeover::{READY_LIMIT, now_ns, socket_path};
use crate::vhost::session::adopt::{Adopted, Release};

/// How long what is dirty may take to be written before anything is handed over; commands wait meanwhile.
const FLUSH_PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait before the store is opened once more, when there is no other process to serve it.
const AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Processes that want to take over.
pub(super) type Candidates = tokio::sync::mpsc::Receiver<Candidate>;

/// How a daemon has come to serve.
#[derive(Debug)]
pub(super) enum Began {
    /// By itself.
    Alone,
    /// After another one, which ends when this is dropped.
    After(#[expect(dead_code, reason = "dropped in time")] Relieved),
    /// Again, after another one could not.
    Back,
}

/// How a daemon has ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// It was told to.
    Stopped,
    /// Another process goes on.
    Succeeded,
    /// Another process was to go on and could not. This is to be served.
    Back(Box<Package>),
}

/// What a daemon keeps of its configuration, for the case that it has to begin again.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    /// The store.
    dir: PathBuf,
    /// How it is opened.
    store_options: StoreOptions,
    /// Worker threads an attachment, at most.
    workers: usize,
    /// The group that the sockets of front-ends are opened to.
    socket_group: Option<u32>,
}

impl Kept {
    /// What is kept of this.
    pub(super) fn of(config: &ServeConfig, socket_group: Option<u32>) -> Self {
        Self {
            dir: config.target.store(),
            store_options: config.store_options.clone(),
            workers: workers_of(config.workers),
            socket_group,
        }
    }
}

/// A candidate that everything can be handed over to.
#[derive(Debug)]
pub(super) struct Leaving {
    /// The candidate.
    candidate: Candidate,
    /// The lock of the store.
    lock: OwnedFd,
}

/// Makes the socket where processes come that take over.
pub(super) fn successors_socket(dir: &Path) -> Result<(ControlSocket, UnixListener), DaemonError> {
    Ok(ControlSocket::bind(&socket_path(dir), None)?)
}

/// Ends the process at once if its thread panics meanwhile: in order nothing may end that may be another process's.
struct NoWayOut;

impl Drop for NoWayOut {
    fn drop(&mut self) {
        if thread::panicking() {
            std::process::abort();
        }
    }
}

/// Goes on where the daemon is that runs. Blocks.
///
/// # Errors
/// It hands nothing over. Once it has, an error ends the process at once.
pub(super) fn succeed(
    config: &ServeConfig,
    socket_group: Option<u32>,
) -> Result<(Daemon, UnixListener), DaemonError> {
    let kept = Kept::of(config, socket_group);
    if !matches!(config.target, Target::Store(_)) {
        let what = "only a daemon with --store can be taken over";
        return Err(DaemonError::Takeover(io::Error::other(what)));
    }
    let control = config.control.clone();
    let control = control.unwrap_or_else(|| kept.dir.join("control.sock"));
    let (package, predecessor) = taker::ask(&kept.dir).map_err(DaemonError::Takeover)?;
    let _no_way_out = NoWayOut;
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let set_up = || {
        if absolute(&control) != absolute(&package.control.path) {
            return Err(DaemonError::Takeover(io::Error::other(format!(
                "the running daemon's control socket is {}; give the same with --control",
                package.control.path.display()
            ))));
        }
        let places = |commands: &Commands| {
            let cache = config.store_options.cache.place.clone();
            let settings = config.confine.clone();
            settle(
                commands,
                kept.dir.clone(),
                cache,
                &control,
                settings,
                vec![],
            );
        };
        let deadline = Instant::now() + READY_LIMIT;
        let store = open(&kept, &package.lock)?;
        begin(
            &kept,
            package,
            store,
            Some(deadline),
            places,
            |lost, ready| {
                if lost > 0 && ready == 0 {
                    let what =
                        format!("none of {lost} front-ends with running disks could be served");
                    // Here, where the connection is open still: by its end the running daemon knows that nothing is in use.
                    give_up(&DaemonError::Takeover(io::Error::other(what)));
                }
                let relieved = predecessor.relieve().map_err(DaemonError::Takeover)?;
                Ok(Began::After(relieved))
            },
        )
    };
    set_up().map_err(|error| give_up(&error))
}

/// Ends the process as by a crash: of what it was handed nothing may be closed in order, since another process may go on with
/// it, and threads that wait to know whether they may serve wait still.
#[expect(
    clippy::exit,
    reason = "an orderly end would close what another process goes on with"
)]
fn give_up(error: &DaemonError) -> ! {
    eprintln!("stratablk: {error}");
    std::process::exit(1)
}

/// Goes on with what another process was handed and could not serve.
pub(super) async fn back(
    kept: Kept,
    package: Box<Package>,
) -> Result<(Daemon, UnixListener), DaemonError> {
    on_a_thread("set-up", move || {
        // Nobody else can serve the guests that wait, so until the host lets it be opened.
        let store = loop {
            match open(&kept, &package.lock) {
                Ok(store) => break store,
                Err(error) => tracing::error!("guests wait: {error}"),
            }
            thread::park_timeout(AGAIN_AFTER);
        };
        begin(&kept, *package, store, None, |_| {}, |_, _| Ok(Began::Back))
    })
    .await?
}

/// Opens a store that was handed over with its lock.
fn open(kept: &Kept, lock: &OwnedFd) -> Result<Store, DaemonError> {
    let lock = lock.try_clone().map_err(|source| DaemonError::Host {
        op: "copy the descriptor of the store's lock",
        source,
    })?;
    let store = Store::open_handed_over(&kept.dir, kept.store_options.clone(), lock);
    store.map_err(|error| DaemonError::Store {
        dir: kept.dir.clone(),
        source: error.into(),
    })
}

/// Does something that may block.
async fn on_a_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, DaemonError> {
    let host = |source| DaemonError::Host {
        op: "start a thread",
        source,
    };
    let (done, result) = oneshot::channel();
    thread::Builder::new()
        .name(name.into())
        .spawn(move || {
            // A receiver less: the daemon ends.
            let _ = done.send(work());
        })
        .map_err(host)?;
    result.await.map_err(|error| host(io::Error::other(error)))
}

/// Serves what was handed over of a store that was just opened. `places` says where files lie, before anything is confined to
/// them. `decide` is told how many front-ends with running rings are lost and how many are ready, and returns when all is ours.
/// All this has to be done by the deadline, if there is one.
fn begin(
    kept: &Kept,
    package: Package,
    store: Store,
    deadline: Option<Instant>,
    places: impl FnOnce(&Commands),
    decide: impl FnOnce(usize, usize) -> Result<Began, DaemonError>,
) -> Result<(Daemon, UnixListener), DaemonError> {
    let host = |op| move |source| DaemonError::Host { op, source };
    let began = Instant::now();
    let sessions = package.sessions();
    let commands =
        Commands::new(store, kept.dir.clone(), kept.workers).with_socket_group(kept.socket_group);
    commands.log_notes();
    places(&commands);
    commands.start_opener().map_err(host("start a thread"))?;

    let release = Arc::new(Release::default());
    let adopted = adopt(&commands, package.volumes, sessions, &release, deadline);
    let adopted = adopted.and_then(|(names, lost, ready)| {
        let prepared = began.elapsed();
        tracing::debug!(?prepared, "the parts of that in this process");
        Ok((names, lost, decide(lost, ready)?))
    });
    // While the threads are there that wait.
    let (names, lost, began) = adopted.unwrap_or_else(|error| give_up(&error));
    release.raise();
    let waited_ms = now_ns().saturating_sub(package.since_ns) / 1_000_000;
    tracing::info!(
        "took over {} volumes, {sessions} connections; guests waited {waited_ms} ms",
        names.len()
    );
    if lost > 0 {
        tracing::error!("{lost} front-ends could not be served any more, and have to connect anew");
    }
    // What the one before could not serve.
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    commands.attach_remembered(&names);
    let (control, listener) = ControlSocket::adopt(package.control);
    Ok((
        Daemon {
            commands: Arc::new(commands),
            control,
            what: format!("store {}", kept.dir.display()),
            one_session: false,
            takeover: Some(ControlSocket::adopt(package.takeover)),
            began,
        },
        listener,
    ))
}

/// Has volumes served that were handed over with so many sessions, whose rings run when `release` is up. Returns the names, how
/// many sessions cannot run their rings, and how many can.
fn adopt(
    commands: &Commands,
    volumes: Vec<HandedVolume>,
    sessions: usize,
    release: &Arc<Release>,
    deadline: Option<Instant>,
) -> Result<(Vec<String>, usize, usize), DaemonError> {
    let (told, fared) = mpsc::channel();
    let mut names = Vec::new();
    for volume in volumes {
        names.push(volume.name.clone());
        commands
            .adopt(volume, &told, release)
            .map_err(|source| DaemonError::Host {
                op: "serve a volume that was handed over",
                source,
            })?;
    }
    drop(told);
    let (lost, ready) = count(&fared, sessions, deadline)?;
    Ok((names, lost, ready))
}

/// Waits until so many sessions have been told what there was to tell. Returns how many cannot run their rings, and how many
/// can.
fn count(
    fared: &mpsc::Receiver<Adopted>,
    sessions: usize,
    deadline: Option<Instant>,
) -> Result<(usize, usize), DaemonError> {
    let late = |what: &str| DaemonError::Takeover(io::Error::other(what.to_owned()));
    let (mut lost, mut ready) = (0, 0);
    for _ in 0..sessions {
        let next = match deadline {
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                let next = fared.recv_timeout(left);
                next.map_err(|_| late("not all front-ends could be served in time"))?
            }
            None => fared
                .recv()
                .map_err(|_| late("a front-end is not served, and did not say so"))?,
        };
        match next {
            Adopted::Idle => {}
            Adopted::Ready => ready += 1,
            Adopted::Lost => lost += 1,
        }
    }
    Ok((lost, ready))
}

impl Daemon {
    /// Begins to wait for processes that take over.
    pub(super) fn successors(&self) -> io::Result<Candidates> {
        match &self.takeover {
            Some((_, listener)) => giver::listen(listener, self.commands.status().store_id),
            // Nobody comes.
            None => Ok(tokio::sync::mpsc::channel(1).1),
        }
    }

    /// Looks whether everything can be handed over now. If so, no command is at work, and none gets in until the gate is shut.
    pub(super) async fn consider(&self, candidate: Candidate, gate: &Gate) -> Option<Leaving> {
        let Some(held) = gate.hold(COMMANDS_TIMEOUT).await else {
            candidate.refuse("commands are at work; try again");
            return None;
        };
        let commands = Arc::clone(&self.commands);
        let flushed = on_a_thread("flush", move || commands.flush_before());
        let flushed = match tokio::time::timeout(FLUSH_PATIENCE, flushed).await {
            Ok(Ok(flushed)) => flushed,
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("what is dirty takes long to be written; try again".to_owned()),
        };
        match flushed.and_then(|()| self.commands.lock_to_hand_over()) {
            Ok(lock) => {
                held.forget();
                Some(Leaving { candidate, lock })
            }
            Err(why) => {
                candidate.refuse(&why);
                None
            }
        }
    }

    /// Hands everything over.
    pub(super) async fn leave(
        self,
        leaving: Leaving,
        listener: UnixListener,
        threads: [JoinHandle<()>; 2],
    ) -> Result<Ended, DaemonError> {
        on_a_thread("hand-over", move || {
            self.hand_over(leaving, listener, threads)
        })
        .await?
    }

    /// The same on a thread that may block.
    fn hand_over(
        self,
        leaving: Leaving,
        listener: UnixListener,
        threads: [JoinHandle<()>; 2],
    ) -> Result<Ended, DaemonError> {
        let Self {
            commands,
            control,
            takeover,
            ..
        } = self;
        commands.rest();
        for thread in threads {
            // A panic has said what it had to say.
            let _ = thread.join();
        }
        let Some((takeover, takeover_listener)) = takeover else {
            let what = "there is no socket to be taken over by";
            return Err(DaemonError::Takeover(io::Error::other(what)));
        };
        let commands = sole(commands, "the control side");
        // Little: it was done a moment ago.
        if let Err(why) = commands.flush_before() {
            tracing::warn!("{why}");
        }
        // If the other process has gone meanwhile, guests wait for a moment that nobody needed. There is no other way back.
        let since_ns = now_ns();
        let volumes = commands.hand_over();
        let package = Package {
            since_ns,
            control: control.hand_over(listener),
            takeover: takeover.hand_over(takeover_listener),
            lock: leaving.lock,
            volumes,
        };
        if leaving.candidate.hand_over(&package) {
            Ok(Ended::Succeeded)
        } else {
            Ok(Ended::Back(Box::new(package)))
        }
    }
}
