//! Waiting for jobs: a bar on a terminal, a line now and then elsewhere. Ctrl-C ends the wait and leaves the job alone.

use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use hyper::Method;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::signal::unix::{SignalKind, signal};

use super::client::Client;
use super::{Failure, jobs, read};
use crate::control::types::{ErrorKind, Job, JobState};

/// How often the daemon is asked.
const INTERVAL: Duration = Duration::from_millis(200);
/// How often a line is printed at most where there is no terminal, unless a tenth more is done.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// How progress is shown.
#[derive(Debug)]
enum Show {
    /// Not at all, for programs.
    Nothing,
    /// As a bar on a terminal.
    Bar(ProgressBar),
    /// As lines: the tenth that was printed last, whether it rested, and when that was.
    Lines(Option<(u64, bool, Instant)>),
}

impl Show {
    /// For the stderr that there is.
    fn new(quiet: bool) -> Self {
        if quiet {
            Self::Nothing
        } else if io::stderr().is_terminal() {
            let bar = ProgressBar::new(0);
            if let Ok(style) =
                ProgressStyle::with_template("{prefix} [{bar:30}] {percent:>3} % {msg}")
            {
                bar.set_style(style.progress_chars("=> "));
            }
            Self::Bar(bar)
        } else {
            Self::Lines(None)
        }
    }

    /// Shows how a job stands.
    fn update(&mut self, job: &Job) {
        let rests = job.state == JobState::Paused;
        match self {
            Self::Nothing => {}
            Self::Bar(bar) => {
                bar.set_prefix(format!("job {}", job.id));
                bar.set_length(job.bytes_total);
                bar.set_position(job.bytes_done);
                bar.set_message(jobs::progress(job));
            }
            Self::Lines(last) => {
                let tenth = job.percent() / 10;
                let due = last.is_none_or(|(before, rested, when)| {
                    before != tenth || rested != rests || when.elapsed() >= LINE_INTERVAL
                });
                if due {
                    *last = Some((tenth, rests, Instant::now()));
                    let progress = jobs::progress(job);
                    eprintln!("job {}: {} %, {progress}", job.id, job.percent());
                }
            }
        }
    }

    /// Leaves the screen clean for the result.
    fn end(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

/// Waits until jobs have ended, and returns them as they are then.
///
/// # Errors
/// One of them has failed or was cancelled; the wait was interrupted; what the daemon answered.
pub(super) fn wait(client: &Client, begun: Vec<Job>, quiet: bool) -> Result<Vec<Job>, Failure> {
    let interrupted = interrupts();
    let mut ended = Vec::new();
    for mut job in begun {
        let mut show = Show::new(quiet);
        while !job.state.has_ended() {
            show.update(&job);
            thread::park_timeout(INTERVAL);
            // ORDERING: Relaxed; a flag by itself, looked at again and again.
            if interrupted.load(Ordering::Relaxed) {
                show.end();
                return Err(Failure::Interrupted(format!(
                    "no longer waiting; job {0} goes on. See it with `stratablk job show {0}`, end it with \
                     `stratablk job cancel {0}`",
                    job.id
                )));
            }
            job = read(&client.call(Method::GET, &jobs::target(job.id), None)?)?;
        }
        show.end();
        ended.push(job);
    }
    match ended.iter().find(|job| job.state != JobState::Done) {
        None => Ok(ended),
        Some(job) => Err(Failure::of(ErrorKind::Failed, not_done(job))),
    }
}

/// Why a job has not done what it was for.
fn not_done(job: &Job) -> String {
    let (id, subject) = (job.id, &job.subject);
    match &job.error {
        Some(error) => {
            format!("job {id} ({subject}) failed: {error}; `stratablk job resume {id}` tries again")
        }
        None => format!(
            "job {id} ({subject}) was cancelled; `stratablk job resume {id}` goes on with it"
        ),
    }
}

/// Becomes true on Ctrl-C, and wakes this thread; listens on return. If that cannot be had, Ctrl-C ends the process as ever.
fn interrupts() -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let (raised, waiting) = (Arc::clone(&flag), thread::current());
    let (listens, ready) = mpsc::channel();
    let listen = move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let Ok(runtime) = runtime else {
            return;
        };
        runtime.block_on(async {
            let Ok(mut interrupt) = signal(SignalKind::interrupt()) else {
                return;
            };
            // A receiver less means that nobody waits any more.
            let _ = listens.send(());
            interrupt.recv().await;
            // ORDERING: Relaxed; see `wait`.
            raised.store(true, Ordering::Relaxed);
            waiting.unpark();
        });
    };
    if thread::Builder::new().spawn(listen).is_ok() {
        // An error says that it does not listen.
        let _ = ready.recv();
    }
    flag
}
