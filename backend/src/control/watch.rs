//! What is told of jobs: when one begins, how it gets on, how it ends. Looks at the list of jobs and remembers what it told.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::events::{Events, Happening};
use super::types::{Job, JobState};

/// How often progress of a job is told at most.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// What was told of a job.
#[derive(Clone, Debug)]
struct Told {
    /// Where it stood.
    state: JobState,
    /// How far it was.
    bytes_done: u64,
    /// When that was.
    at: Instant,
}

/// What was told of all jobs.
#[derive(Debug, Default)]
pub struct JobWatch {
    /// By number. Jobs that the store no longer lists are forgotten.
    told: Mutex<BTreeMap<u64, Told>>,
}

impl JobWatch {
    /// Takes jobs that are there at the start for told: they began in another life.
    pub fn begin(&self, jobs: &[Job], now: Instant) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        for job in jobs {
            told.insert(job.id, seen(job, now));
        }
    }

    /// Tells what has changed since the last look.
    pub fn look(&self, jobs: Vec<Job>, now: Instant, events: &Events) {
        // Held while telling, so that the events of a job come in order; telling never waits.
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.retain(|id, _| jobs.iter().any(|job| job.id == *id));
        for job in jobs {
            let last = told.get(&job.id);
            let Some(what) = change(&job, last, now) else {
                continue;
            };
            told.insert(job.id, seen(&job, now));
            for what in what {
                events.tell(what);
            }
        }
    }
}

/// A job as it was told.
const fn seen(job: &Job, now: Instant) -> Told {
    Told {
        state: job.state,
        bytes_done: job.bytes_done,
        at: now,
    }
}

/// What is to be told of a job, if anything is.
fn change(job: &Job, last: Option<&Told>, now: Instant) -> Option<Vec<Happening>> {
    let mut what = Vec::new();
    let state = last.map(|told| told.state);
    let ended_before = state.is_some_and(JobState::has_ended);
    if last.is_none() || (ended_before && !job.state.has_ended()) {
        what.push(Happening::JobBegan { job: job.clone() });
    }
    if job.state.has_ended() {
        if state != Some(job.state) {
            what.push(Happening::JobEnded { job: job.clone() });
        }
    } else if let Some(told) = last.filter(|_| what.is_empty()) {
        let moved = told.bytes_done != job.bytes_done
            && now.saturating_duration_since(told.at) >= PROGRESS_INTERVAL;
        let rests = (told.state == JobState::Paused) != (job.state == JobState::Paused);
        if moved || rests {
            what.push(Happening::JobProgress { job: job.clone() });
        }
    }
    (!what.is_empty()).then_some(what)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    /// A job that has copied so much.
    fn job(state: JobState, bytes_done: u64) -> Job {
        Job {
            state,
            bytes_done,
            ..Job::sample()
        }
    }

    #[test]
    fn a_job_is_told_from_its_begin_to_its_end() {
        let (watch, events) = (JobWatch::default(), Events::default());
        let mut listener = events.listen().unwrap();
        let start = Instant::now();
        let mut look = |ms: u64, jobs: Vec<Job>| {
            watch.look(jobs, start + Duration::from_millis(ms), &events);
            let heard = std::iter::from_fn(|| listener.try_recv().ok());
            heard.map(|event| event.what.name()).collect::<Vec<_>>()
        };
        assert_eq!(look(0, vec![job(JobState::Queued, 0)]), ["job-began"]);
        assert!(look(10, vec![job(JobState::Running, 0)]).is_empty());
        assert!(
            look(500, vec![job(JobState::Running, 10)]).is_empty(),
            "at most once a second"
        );
        let later = look(1000, vec![job(JobState::Running, 20)]);
        assert_eq!(later, ["job-progress"]);
        assert!(look(1500, vec![job(JobState::Running, 30)]).is_empty());
        let paused = look(1600, vec![job(JobState::Paused, 30)]);
        assert_eq!(paused, ["job-progress"]);
        assert_eq!(look(1700, vec![job(JobState::Failed, 30)]), ["job-ended"]);
        assert!(look(9000, vec![job(JobState::Failed, 30)]).is_empty());
        assert_eq!(look(9100, vec![job(JobState::Queued, 30)]), ["job-began"]);
        assert_eq!(look(9200, vec![job(JobState::Done, 100)]), ["job-ended"]);
        assert!(look(9300, Vec::new()).is_empty());
    }

    #[test]
    fn a_quick_job_begins_and_ends_at_one_look() {
        let (watch, events) = (JobWatch::default(), Events::default());
        let mut listener = events.listen().unwrap();
        watch.look(vec![job(JobState::Done, 100)], Instant::now(), &events);
        assert_eq!(listener.try_recv().unwrap().what.name(), "job-began");
        assert_eq!(listener.try_recv().unwrap().what.name(), "job-ended");
    }

    #[test]
    fn a_job_of_an_earlier_life_does_not_begin_again() {
        let (watch, events) = (JobWatch::default(), Events::default());
        let mut listener = events.listen().unwrap();
        watch.begin(&[job(JobState::Queued, 0)], Instant::now());
        watch.look(vec![job(JobState::Done, 100)], Instant::now(), &events);
        assert_eq!(listener.try_recv().unwrap().what.name(), "job-ended");
    }
}
