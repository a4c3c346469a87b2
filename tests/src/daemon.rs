//! The real daemon on a store of its own: starts it, waits until it is ready, runs the command line against it, stops or
//! kills it.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process, pidfd_open, waitid,
};
use serde_json::Value;
use tempfile::TempDir;

use crate::wait::until;

/// How long anything may take before a test gives up on it.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// The binary under test: `STRATABLK_BIN`, or the one next to the directory of the running test.
///
/// # Panics
/// There is none.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("STRATABLK_BIN") {
        return path.into();
    }
    let me = std::env::current_exe().expect("a test knows its own path");
    let found = me
        .ancestors()
        .map(|dir| dir.join("stratablk"))
        .find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!(
            "no stratablk beside {}; run `cargo build -p stratablk` first",
            me.display()
        )
    })
}

/// A command of the binary, in an environment that says nothing about daemons.
pub fn stratablk<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(binary());
    command
        .args(args)
        .env_remove("STRATABLK_CONTROL")
        .env_remove("STRATABLK_LOG");
    command
}

/// What a command printed and how it ended.
#[derive(Debug)]
pub struct Ran {
    /// Its exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Ran {
    /// Its standard output, after it ended well.
    ///
    /// # Panics
    /// It did not.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(
            self.code,
            Some(0),
            "stdout: {}\nstderr: {}",
            self.stdout,
            self.stderr
        );
        self.stdout
    }

    /// Its standard error, after it was refused (exit code 1).
    ///
    /// # Panics
    /// It was not, or it printed a result as well.
    #[track_caller]
    pub fn refused(self) -> String {
        assert_eq!(
            self.code,
            Some(1),
            "stdout: {}\nstderr: {}",
            self.stdout,
            self.stderr
        );
        assert_eq!(self.stdout, "", "a refusal has no result");
        self.stderr
    }

    /// The one JSON document it printed, after it ended well.
    ///
    /// # Panics
    /// It did not, or printed something else.
    #[track_caller]
    pub fn json(self) -> Value {
        let text = self.ok();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text}"))
    }
}

/// Runs a command of the binary to its end.
///
/// # Panics
/// It could not be started.
pub fn run<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Ran {
    stratablk(args).output().expect("the binary starts").into()
}

/// A daemon that runs. Killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    /// The process.
    child: Child,
    /// Its control socket.
    control: PathBuf,
    /// What it wrote to stderr so far.
    log: Arc<Mutex<String>>,
    /// Each line of stderr as it comes.
    lines: Receiver<String>,
}

impl Daemon {
    /// Starts `serve` with these arguments and waits until it is ready.
    ///
    /// # Panics
    /// It ended before, or did not become ready in time.
    pub fn start<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>, control: &Path) -> Self {
        Self::try_start(args, control).unwrap_or_else(|ran| panic!("not ready: {ran:?}"))
    }

    /// Starts `serve --store DIR` and waits until it is ready.
    ///
    /// # Panics
    /// As `start`.
    pub fn on_store(dir: &Path) -> Self {
        Self::start(
            [OsStr::new("--store"), dir.as_os_str()],
            &dir.join("control.sock"),
        )
    }

    /// Starts `serve` with these arguments and waits until it is ready, or returns how it ended before that.
    ///
    /// # Errors
    /// How it ended.
    ///
    /// # Panics
    /// It could not be started, or neither ended nor became ready in time.
    pub fn try_start<S: AsRef<OsStr>>(
        args: impl IntoIterator<Item = S>,
        control: &Path,
    ) -> Result<Self, Ran> {
        let serve = [OsString::from("serve")].into_iter();
        let args = serve.chain(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        Self::spawn(&mut stratablk(args), control)
    }

    /// Starts any command that becomes the daemon (by `exec`, so that its process is the daemon's).
    ///
    /// # Errors
    /// How it ended before it was ready.
    ///
    /// # Panics
    /// As `try_start`.
    pub fn spawn(command: &mut Command, control: &Path) -> Result<Self, Ran> {
        let mut daemon = Self::launch(command, control);
        if daemon.await_ready() {
            return Ok(daemon);
        }
        let code = daemon.wait().code();
        Err(Ran {
            code,
            stdout: String::new(),
            stderr: daemon.log(),
        })
    }

    /// As `spawn`, without waiting for anything.
    ///
    /// # Panics
    /// It could not be started.
    pub fn launch(command: &mut Command, control: &Path) -> Self {
        // Gone with the test, however the daemon ends.
        let beside = control.parent().filter(|dir| dir.is_dir());
        command.env("STRATABLK_CACHE_SIZE", "16M").env(
            "STRATABLK_CACHE_DIR",
            beside.unwrap_or(&std::env::temp_dir()),
        );
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let stderr = child.stderr.take().expect("it is a pipe");
        let log = Arc::new(Mutex::new(String::new()));
        let (sender, lines) = channel();
        let copy = Arc::clone(&log);
        thread::spawn(move || follow(BufReader::new(stderr), &copy, &sender));
        Self {
            child,
            control: control.to_owned(),
            log,
            lines,
        }
    }

    /// Waits until a daemon that was launched is ready. `false` if it ended first.
    ///
    /// # Panics
    /// Neither came in time.
    pub fn await_ready(&self) -> bool {
        self.wait_for("stratablk: ready:")
    }

    /// Waits until a line of stderr contains `what`. `false` if it ended first. Each line is looked at once.
    ///
    /// # Panics
    /// Neither came in time.
    pub fn wait_for(&self, what: &str) -> bool {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match self
                .lines
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(line) if line.contains(what) => return true,
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => return false,
                Err(RecvTimeoutError::Timeout) => {
                    let (log, threads) = (self.log(), self.threads());
                    panic!("no {what:?} in time; log:\n{log}\nthreads:\n{threads}")
                }
            }
        }
    }

    /// Whether it wrote this to stderr, or does soon: what it writes is here a moment after it did what it tells of.
    pub fn has_logged(&self, what: &str) -> bool {
        until(|| self.log().contains(what))
    }

    /// What it wrote to stderr so far.
    pub fn log(&self) -> String {
        self.log
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// What each of its threads waits for in the kernel, as far as the host tells: for the message of a failed test.
    pub fn threads(&self) -> String {
        let tasks = format!("/proc/{}/task", self.pid());
        let tasks = std::fs::read_dir(tasks).into_iter().flatten().flatten();
        let describe = |task: std::fs::DirEntry| {
            let read = |name| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
            let [name, wait, call] = ["comm", "wchan", "syscall"].map(read);
            format!("  {}: {wait}, system call {}\n", name.trim(), call.trim())
        };
        tasks.map(describe).collect()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its control socket.
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// Runs a command of the command line against it.
    pub fn cli<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Ran {
        let control = [
            OsString::from("--control"),
            self.control.clone().into_os_string(),
        ];
        run(control
            .into_iter()
            .chain(args.into_iter().map(|arg| arg.as_ref().to_owned())))
    }

    /// Runs a line of words against it, split at white space.
    pub fn line(&self, line: &str) -> Ran {
        self.cli(line.split_whitespace())
    }

    /// Sends a signal.
    ///
    /// # Panics
    /// The process has ended and was waited for.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("the daemon runs");
    }

    /// Asks it to stop (SIGTERM) and waits for that. Returns how it ended, how long that took, and its log.
    pub fn stop(mut self) -> (ExitStatus, Duration, String) {
        let start = Instant::now();
        self.signal(Signal::TERM);
        let status = self.wait();
        (status, start.elapsed(), self.log())
    }

    /// Whether it has ended.
    ///
    /// # Panics
    /// The host does not say.
    pub fn has_ended(&self) -> bool {
        let process = WaitId::Pid(Pid::from_child(&self.child));
        // It stays to be waited for.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        waitid(process, options).expect("a child of ours").is_some()
    }

    /// Waits until it ends by itself. Returns how it ended and its log.
    pub fn ended(mut self) -> (ExitStatus, String) {
        (self.wait(), self.log())
    }

    /// Ends it as a crash would (SIGKILL).
    ///
    /// # Panics
    /// It ended in another way.
    pub fn kill(mut self) {
        self.signal(Signal::KILL);
        assert_eq!(self.wait().signal(), Some(Signal::KILL.as_raw()));
    }

    /// Waits for its end and for the rest of its log.
    fn wait(&mut self) -> ExitStatus {
        let pidfd = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty());
        let pidfd = pidfd.expect("the daemon was not waited for");
        let timeout = Timespec::try_from(DEADLINE).expect("some seconds");
        let ready = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout));
        assert_eq!(
            ready,
            Ok(1),
            "the daemon did not end in time; log:\n{}",
            self.log()
        );
        // The reader ends with the pipe, and by that disconnects.
        while self.lines.recv_timeout(DEADLINE).is_ok() {}
        self.child.wait().expect("the daemon has ended")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        crate::process::end(&mut self.child);
    }
}

/// Copies each line into the log, and to whoever waits for it.
fn follow(stderr: impl BufRead, log: &Mutex<String>, lines: &Sender<String>) {
    for line in stderr.split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).into_owned();
        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
        log.push_str(&line);
        log.push('\n');
        // Nobody may be waiting any more.
        let _ = lines.send(line);
    }
}

/// An empty directory with a path short enough for sockets in it.
///
/// # Panics
/// The host has no room for one.
pub fn temp_dir() -> TempDir {
    tempfile::Builder::new()
        .prefix("stratablk-")
        .tempdir()
        .expect("room for a directory")
}
