//! Waiting for jobs: a bar on a terminal, a line now and then elsewhere. Ctrl-C ends the wait and leaves the job alone.

use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use hyper::Method;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::signal::unix::{SignalKind, signal};

use super::client::{Client, ClientError};
use super::{Failure, jobs, read};
use crate::control::types::{ErrorKind, Job, JobKind, JobState};

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
    /// As lines: what was printed last, and when that was.
    Lines(Option<(Shown, Instant)>),
}

/// What a line says that is not printed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shown {
    /// How many tenths of the job, or of all jobs, are done.
    tenth: u64,
    /// Whether the job rests.
    rests: bool,
}

/// A job among those that are waited for.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// How many have ended.
    ended: usize,
    /// How many there are.
    of: usize,
}

impl Place {
    /// What of a line is news: of several jobs how far they all are.
    fn news(self, job: &Job) -> Shown {
        let percent = match self.of {
            0 | 1 => job.percent(),
            of => percent(self.ended, of),
        };
        Shown {
            tenth: percent / 10,
            rests: job.state == JobState::Paused,
        }
    }

    /// The line.
    fn line(self, job: &Job) -> String {
        let progress = jobs::progress(job);
        let own = format!("job {}: {} %, {progress}", job.id, job.percent());
        match self.of {
            0 | 1 => own,
            of => format!("{} of {of} jobs have ended; {own}", self.ended),
        }
    }
}

/// A part in percent.
fn percent(part: usize, of: usize) -> u64 {
    let percent = part.saturating_mul(100).checked_div(of);
    percent
        .and_then(|part| u64::try_from(part).ok())
        .unwrap_or(0)
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
    fn update(&mut self, job: &Job, place: Place) {
        match self {
            Self::Nothing => {}
            Self::Bar(bar) => {
                bar.set_prefix(format!("job {}", job.id));
                bar.set_length(job.bytes_total);
                bar.set_position(job.bytes_done);
                bar.set_message(jobs::progress(job));
            }
            Self::Lines(last) => {
                let news = place.news(job);
                let due = last
                    .is_none_or(|(before, when)| before != news || when.elapsed() >= LINE_INTERVAL);
                if due {
                    *last = Some((news, Instant::now()));
                    eprintln!("{}", place.line(job));
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
    let ended = wait_whatever(client, begun, quiet)?;
    match ended.iter().find(|job| job.state != JobState::Done) {
        None => Ok(ended),
        Some(job) => Err(Failure::of(ErrorKind::Failed, not_done(job))),
    }
}

/// The same, however they end.
///
/// # Errors
/// The wait was interrupted; what the daemon answered.
pub(super) fn wait_whatever(
    client: &Client,
    begun: Vec<Job>,
    quiet: bool,
) -> Result<Vec<Job>, Failure> {
    let interrupted = interrupts();
    let of = begun.len();
    let mut ended = Vec::new();
    let mut show = Show::new(quiet);
    for mut job in begun {
        let place = Place {
            ended: ended.len(),
            of,
        };
        while !job.state.has_ended() {
            show.update(&job, place);
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
            job = look(client, job)?;
        }
        ended.push(job);
    }
    show.end();
    Ok(ended)
}

/// A job as it is now. The daemon has named it, so one that it does not know any more has ended, and is forgotten;
/// those that fail, or are cancelled and can go on, are not.
fn look(client: &Client, mut job: Job) -> Result<Job, Failure> {
    match client.call(Method::GET, &jobs::target(job.id), None) {
        Err(ClientError::Refused(detail)) if detail.kind == ErrorKind::NotFound => {
            job.state = JobState::Done;
            job.bytes_done = job.bytes_total;
            Ok(job)
        }
        reply => read(&reply?),
    }
}

/// Why a job has not done what it was for.
fn not_done(job: &Job) -> String {
    let (id, subject) = (job.id, &job.subject);
    match &job.error {
        Some(error) if job.kind == JobKind::Scrub => {
            format!("job {id} ({subject}) failed: {error}; see `stratablk job show {id}`")
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::jobs::tests::job;

    #[test]
    fn of_several_jobs_only_the_whole_is_news() {
        let mut seen: Vec<Shown> = Vec::new();
        for ended in 0..130 {
            for state in [JobState::Queued, JobState::Running] {
                let news = Place { ended, of: 130 }.news(&job(state));
                if seen.last() != Some(&news) {
                    seen.push(news);
                }
            }
        }
        assert_eq!(seen.len(), 10, "{seen:?}");
        let one = Place { ended: 0, of: 1 };
        assert_eq!(one.news(&job(JobState::Running)).tenth, 4);
        assert!(one.news(&job(JobState::Paused)).rests);
        let several = Place { ended: 3, of: 130 };
        let line = several.line(&job(JobState::Running));
        assert!(
            line.starts_with("3 of 130 jobs have ended; job 3: 43 %"),
            "{line}"
        );
        assert!(one.line(&job(JobState::Running)).starts_with("job 3: 43 %"));
    }
}
