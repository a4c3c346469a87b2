//! How one daemon comes after another, with everything that is served: see [`crate::takeover`]. Both sides of it, and the way
//! back, as far as they concern the daemon as a whole.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use stratablk_layers::store::{Store, StoreOptions};
use tokio::sync::oneshot;

use super::means::Means;
use super::{
    COMMANDS_TIMEOUT, Commands, ControlSocket, Daemon, DaemonError, STOP_TIMEOUT, Signals, Stop,
    settle, workers_of,
};
use crate::config::{ServeConfig, Target};
use crate::control::commands::sole;
use crate::control::gate::Gate;
use crate::notify::notify;
use crate::takeover::giver::{self, Candidate, Outcome};
use crate::takeover::package::{HandedVolume, Package};
use crate::takeover::taker::{self, Relieved};
use crate::takeover::{READY_LIMIT, now_ns, socket_path};
use crate::vhost::message::DESCRIPTORS_MAX;
use crate::vhost::session::adopt::{self, Adopted, Fared, Release};

/// How long what is dirty may take to be written before anything is handed over; commands wait meanwhile.
const FLUSH_PATIENCE: Duration = Duration::from_secs(10);
/// How long on the way back sessions that are ready wait for those that are not.
const STRAGGLERS_LIMIT: Duration = Duration::from_secs(5);
/// How long to wait before something is tried once more that nobody else can do.
pub(super) const AGAIN_AFTER: Duration = Duration::from_secs(1);

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
    /// Another process was to go on and could not.
    Back(WayBack),
}

/// What is to be served again.
#[derive(Debug)]
pub(super) struct WayBack {
    /// All of it.
    package: Box<Package>,
    /// Who does it.
    hand: Hand,
    /// The daemon was told to stop meanwhile.
    stop: Option<Stop>,
}

/// A thread that there is before it is needed, since there is no way without it then.
#[derive(Debug)]
struct Hand(mpsc::Sender<Task>);

/// What it is to do.
type Task = Box<dyn FnOnce() + Send>;

impl Hand {
    /// Starts it. It ends when this is dropped and all is done.
    fn start() -> io::Result<Self> {
        let (sender, tasks) = mpsc::channel::<Task>();
        let work = || tasks.into_iter().for_each(|task| task());
        thread::Builder::new()
            .name("hand-over".into())
            .spawn(work)?;
        Ok(Self(sender))
    }

    /// Does something that may block.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, DaemonError> {
        let (done, result) = oneshot::channel();
        let task = Box::new(move || {
            // A receiver less: the daemon ends.
            let _ = done.send(work());
        });
        let failed = |_| DaemonError::Takeover(io::Error::other("the thread for it has panicked"));
        self.0.send(task).map_err(|_| failed(()))?;
        result.await.map_err(|_| failed(()))
    }
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
    /// Who does it, and the way back if there has to be one.
    hand: Hand,
    /// Descriptors that the way back would need.
    reserve: Vec<OwnedFd>,
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

/// Goes on where the daemon is that runs; `serves` is true as soon as guests may be served by that. Blocks.
///
/// # Errors
/// It hands nothing over. Once it has, an error ends the process at once.
pub(super) fn succeed(
    config: &ServeConfig,
    socket_group: Option<u32>,
    serves: &AtomicBool,
) -> Result<(Daemon, UnixListener), DaemonError> {
    let kept = Kept::of(config, socket_group);
    if !matches!(config.target, Target::Store(_)) {
        let what = "only a daemon with --store can be taken over";
        return Err(DaemonError::Takeover(io::Error::other(what)));
    }
    let control = config.control.clone();
    let control = control.unwrap_or_else(|| kept.dir.join("control.sock"));
    let (package, predecessor) = taker::ask(&kept.dir).map_err(DaemonError::Takeover)?;
    // Here, so that nothing but the end of the process closes the connection before everything is ours: by that end the running
    // daemon knows that nothing is in use.
    let mut predecessor = Some(predecessor);
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
                    return Err(DaemonError::Takeover(io::Error::other(what)));
                }
                let waits = || DaemonError::Takeover(io::Error::other("nobody hands over"));
                let theirs = predecessor.as_ref().ok_or_else(waits)?;
                // From `Ready` on guests may be ours, so a signal waits until that is known.
                // ORDERING: Relaxed; a signal that comes at the same time may be taken for an earlier one.
                serves.store(true, Ordering::Relaxed);
                theirs.relieve().map_err(DaemonError::Takeover)?;
                let relieved = predecessor.take().ok_or_else(waits)?.relieved();
                Ok(Began::After(relieved))
            },
        )
    };
    set_up().map_err(|error| give_up(&error))
}

/// Ends the process as by a crash: of what it was handed nothing may be closed in order, since another process may go on with
/// it, and threads that wait to know whether they may serve wait still. Called while the connection to that process is open.
#[expect(
    clippy::exit,
    reason = "an orderly end would close what another process goes on with"
)]
fn give_up(error: &DaemonError) -> ! {
    taker::last_words(error.to_string());
    std::process::exit(1)
}

impl WayBack {
    /// Goes on with what another process was handed and could not serve. Returns also whether the daemon was told to stop.
    pub(super) async fn go(
        self,
        kept: Kept,
        signals: &mut Signals,
    ) -> Result<(Daemon, UnixListener, Option<Stop>), DaemonError> {
        let Self {
            package,
            hand,
            mut stop,
        } = self;
        let mut work = pin!(hand.run(move || {
            // Nobody else can serve the guests that wait, so until the host lets it be opened.
            let store = insist(|| open(&kept, &package.lock));
            begin(&kept, *package, store, None, |_| {}, |_, _| Ok(Began::Back))
        }));
        loop {
            let deadline = stop.map_or_else(tokio::time::Instant::now, |stop| stop.deadline);
            tokio::select! {
                back = &mut work => {
                    let (daemon, listener) = back??;
                    return Ok((daemon, listener, stop));
                }
                name = signals.next(), if stop.is_none() => stop = Some(Stop::now(name)),
                () = tokio::time::sleep_until(deadline), if stop.is_some() => {
                    return Err(DaemonError::Amid(STOP_TIMEOUT));
                }
            }
        }
    }
}

/// Does something until it is done, which nobody else can do for the guests that wait.
fn insist<T, E: std::fmt::Display>(mut work: impl FnMut() -> Result<T, E>) -> T {
    loop {
        match work() {
            Ok(done) => return done,
            Err(error) => tracing::error!("guests wait: {error}"),
        }
        thread::park_timeout(AGAIN_AFTER);
    }
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
    match deadline {
        Some(_) => {
            let started = commands.start_opener().map_err(host("start a thread"));
            started.unwrap_or_else(|error| give_up(&error));
        }
        None => insist(|| commands.start_opener()),
    }

    let release = Arc::new(Release::default());
    let adopted = adopt(&commands, package.volumes, &release, deadline);
    let adopted = adopted.and_then(|(names, lost, ready)| {
        let prepared = began.elapsed();
        tracing::debug!(?prepared, "the parts of that in this process");
        Ok((names, lost, decide(lost, ready)?))
    });
    // While the threads are there that wait.
    let (names, lost, began) = adopted.unwrap_or_else(|error| give_up(&error));
    release.raise();
    if let Began::After(_) = began {
        // Before the one before ends, whose end would otherwise be that of the service.
        notify(&format!("MAINPID={}", std::process::id()));
    }
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

/// Has volumes served that were handed over, and the rings of their sessions run when `release` is up. Returns the names, how
/// many sessions cannot run their rings, and how many can. Without a deadline a volume that cannot be served is left out.
fn adopt(
    commands: &Commands,
    volumes: Vec<HandedVolume>,
    release: &Arc<Release>,
    deadline: Option<Instant>,
) -> Result<(Vec<String>, usize, usize), DaemonError> {
    let (told, fared) = mpsc::channel();
    let mut names = Vec::new();
    let mut waiting = BTreeMap::new();
    for volume in volumes {
        let name = volume.name.clone();
        waiting.insert(name.clone(), volume.attachment.sessions.len());
        match (commands.adopt(volume, &told, release), deadline) {
            (Ok(()), _) => names.push(name),
            (Err(source), Some(_)) => {
                return Err(DaemonError::Host {
                    op: "serve a volume that was handed over",
                    source,
                });
            }
            (Err(error), None) => {
                tracing::error!(volume = %name, %error, "its front-ends are lost");
            }
        }
    }
    drop(told);
    let until = deadline.unwrap_or_else(|| Instant::now() + STRAGGLERS_LIMIT);
    let (lost, ready) = count(&fared, waiting, until, deadline.is_some())?;
    Ok((names, lost, ready))
}

/// Waits until all sessions have been told what there was to tell, which each of them tells once: so many of each volume.
/// Returns how many cannot run their rings, and how many can. Those that are not told of by then go on by themselves when they
/// are ready.
///
/// # Errors
/// If somebody else can serve them `instead`: one of them cannot be served in this process, or they are not told in time.
fn count(
    fared: &mpsc::Receiver<Fared>,
    mut waiting: BTreeMap<String, usize>,
    until: Instant,
    instead: bool,
) -> Result<(usize, usize), DaemonError> {
    let failed = |what: String| DaemonError::Takeover(io::Error::other(what));
    let (mut lost, mut ready) = (0, 0);
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let Fared { volume, how } = match fared.recv_timeout(left) {
            Ok(fared) => fared,
            Err(RecvTimeoutError::Disconnected) => return Ok((lost, ready)),
            Err(RecvTimeoutError::Timeout) => {
                waiting.retain(|_, count| *count > 0);
                let late: Vec<&str> = waiting.keys().map(String::as_str).collect();
                let late = late.join(", ");
                if instead {
                    let what = "not all front-ends could be served in time";
                    return Err(failed(format!("{what}; missing: those of {late}")));
                }
                tracing::error!(
                    "front-ends of these volumes are not ready and wait; the others go on: {late}"
                );
                return Ok((lost, ready));
            }
        };
        if let Some(count) = waiting.get_mut(&volume) {
            *count = count.saturating_sub(1);
        }
        match how {
            Adopted::Idle => {}
            Adopted::Ready => ready += 1,
            Adopted::Lost => lost += 1,
            // The one before may do better.
            Adopted::Failed(why) if instead => {
                return Err(failed(format!(
                    "a front-end of volume {volume} cannot be served here: {why}"
                )));
            }
            Adopted::Failed(_) => lost += 1,
        }
    }
}

/// What has become of a daemon that was to be handed over.
enum Gone {
    /// It was stopped before.
    Stopped,
    /// Another process goes on.
    Theirs,
    /// It could not.
    Ours(Box<Package>),
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
        let flushed = match flushed {
            Ok(()) => {
                let commands = Arc::clone(&self.commands);
                let ended = on_a_thread("under-way", move || commands.await_under_way()).await;
                ended.unwrap_or_else(|error| Err(error.to_string()))
            }
            failed => failed,
        };
        let provided = flushed
            .and_then(|()| self.commands.lock_to_hand_over())
            .and_then(|lock| Ok((self.reserve(&lock, candidate.descriptors_max)?, lock)))
            .and_then(|(reserve, lock)| match Hand::start() {
                Ok(hand) => Ok((hand, reserve, lock)),
                Err(error) => Err(format!("there is no thread for it: {error}")),
            });
        match provided {
            Ok((hand, reserve, lock)) => {
                held.forget();
                Some(Leaving {
                    candidate,
                    lock,
                    hand,
                    reserve,
                })
            }
            Err(why) => {
                candidate.refuse(&why);
                None
            }
        }
    }

    /// Takes the descriptors that it would take to serve all sessions again, besides what they have, and looks whether the
    /// new process may have as many as there are by then.
    fn reserve(&self, lock: &OwnedFd, theirs: u64) -> Result<Vec<OwnedFd>, String> {
        let sessions = self.commands.attachments().connections();
        let count = sessions * adopt::DESCRIPTORS + DESCRIPTORS_MAX;
        let reserve = (0..count).map(|_| lock.try_clone());
        let reserve = reserve.collect::<io::Result<Vec<_>>>().map_err(|error| {
            format!(
                "{sessions} connections could not be taken back if need be, since there are not {count} descriptors \
                 left ({error}); have the daemon open more files (`ulimit -Hn`), or end some of them"
            )
        })?;
        // The lowest that are free were taken.
        let highest = reserve.iter().map(AsRawFd::as_raw_fd).max().unwrap_or(0);
        let needed = u64::try_from(highest).unwrap_or(0) + 1;
        if theirs < needed {
            return Err(format!(
                "the new process may open {theirs} files, and will need up to {needed}; raise its limit (`ulimit -Hn`)"
            ));
        }
        Ok(reserve)
    }

    /// Hands everything over. If the daemon is told to stop meanwhile it does so as soon as it can, or when it is clear who
    /// serves.
    pub(super) async fn leave(
        self,
        leaving: Leaving,
        listener: UnixListener,
        means: Means,
        signals: &mut Signals,
    ) -> Result<Ended, DaemonError> {
        let Leaving {
            candidate,
            lock,
            hand,
            reserve,
        } = leaving;
        let told = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&told);
        let work = hand.run(move || {
            let threads = means.threads();
            self.hand_over(candidate, lock, reserve, listener, threads, &stopped)
        });
        let (gone, stop) = {
            let mut work = pin!(work);
            tokio::select! {
                gone = &mut work => (gone, None),
                name = signals.next() => {
                    let stop = Stop::now(name);
                    // ORDERING: Relaxed; who looks before this goes on as if it had come later.
                    told.store(true, Ordering::Relaxed);
                    let gone = tokio::time::timeout_at(stop.deadline, work).await;
                    (gone.map_err(|_| DaemonError::Amid(STOP_TIMEOUT))?, Some(stop))
                }
            }
        };
        Ok(match gone?? {
            Gone::Stopped => Ended::Stopped,
            Gone::Theirs => Ended::Succeeded,
            Gone::Ours(package) => Ended::Back(WayBack {
                package,
                hand,
                stop,
            }),
        })
    }

    /// The same on a thread that may block, unless it was `stopped` before anything has changed for guests.
    fn hand_over(
        self,
        candidate: Candidate,
        lock: OwnedFd,
        reserve: Vec<OwnedFd>,
        listener: UnixListener,
        threads: impl Iterator<Item = JoinHandle<()>>,
        stopped: &AtomicBool,
    ) -> Result<Gone, DaemonError> {
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
        // ORDERING: Relaxed; see `leave`.
        if stopped.load(Ordering::Relaxed) {
            candidate.refuse("the running daemon is being stopped");
            let closed = commands.close().map_err(DaemonError::Flush);
            return closed.map(|()| Gone::Stopped);
        }
        drop(reserve);
        // If the other process has gone meanwhile, guests wait for a moment that nobody needed. There is no other way back.
        let since_ns = now_ns();
        let volumes = commands.hand_over();
        let package = Package {
            since_ns,
            control: control.hand_over(listener),
            takeover: takeover.hand_over(takeover_listener),
            lock,
            volumes,
        };
        Ok(match candidate.hand_over(&package, stopped) {
            Outcome::Theirs => Gone::Theirs,
            Outcome::Ours => Gone::Ours(Box::new(package)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_ready_does_not_wait_for_ever_for_who_is_not() {
        let (told, fared) = mpsc::channel();
        let of = |volume: &str, how| {
            let volume = volume.to_owned();
            told.send(Fared { volume, how }).expect("it is counted");
        };
        of("a", Adopted::Ready);
        of("b", Adopted::Ready);
        of("a", Adopted::Failed("no disk".into()));
        let waiting = || BTreeMap::from([("a".to_owned(), 2), ("b".to_owned(), 2)]);
        let counted =
            count(&fared, waiting(), Instant::now(), false).expect("the way back has no errors");
        assert_eq!(counted, (1, 2));
        of("a", Adopted::Lost);
        let late = count(&fared, waiting(), Instant::now(), true).expect_err("too late");
        assert!(late.to_string().contains("a, b"), "{late}");
        of("b", Adopted::Failed("no disk".into()));
        let failed = count(&fared, waiting(), Instant::now(), true).expect_err("not served here");
        assert!(failed.to_string().contains("volume b"), "{failed}");
    }
}
