//! Commands on jobs, and how jobs are shown.

use hyper::Method;
use serde_json::json;

use super::args::JobCommand;
use super::client::Client;
use super::table::{self, Align};
use super::{Done, Failure, output, progress, read, scrub, size};
use crate::control::timestamp::Timestamp;
use crate::control::types::{Direction, Job, JobChange, JobKind, JobList, JobState};

/// Nanoseconds of a second.
const SECOND_NS: u64 = 1_000_000_000;

/// Carries out a command on jobs.
pub(super) fn run(client: &Client, command: JobCommand, json: bool) -> Result<Done, Failure> {
    match command {
        JobCommand::List => {
            let json = client.call(Method::GET, "/v1/jobs", None)?;
            let text = list(&read::<JobList>(&json)?.jobs, Timestamp::now());
            Ok(Done::new(json, text))
        }
        JobCommand::Show { id } => {
            let json = client.call(Method::GET, &target(id), None)?;
            let text = show(&read(&json)?, Timestamp::now());
            Ok(Done::new(json, text))
        }
        JobCommand::Wait { id } => {
            let job = read(&client.call(Method::GET, &target(id), None)?)?;
            let ended = progress::wait(client, vec![job], json)?;
            let text = ended.iter().map(ended_line).collect();
            Ok(Done::new(json!(ended.first()), text))
        }
        JobCommand::Pause { id } => change(client, id, "pause"),
        JobCommand::Resume { id } => change(client, id, "resume"),
        JobCommand::Cancel { id } => change(client, id, "cancel"),
        JobCommand::Limit { id, rate } => {
            let request = json!(JobChange {
                rate_bytes_per_s: rate.0
            });
            let json = client.call(Method::PATCH, &target(id), Some(&request))?;
            Ok(Done::new(json.clone(), state_line(&read(&json)?)))
        }
    }
}

/// Changes how a job stands.
fn change(client: &Client, id: u64, how: &str) -> Result<Done, Failure> {
    let json = client.call(Method::POST, &format!("{}/{how}", target(id)), None)?;
    Ok(Done::new(json.clone(), state_line(&read(&json)?)))
}

/// The route of a job.
pub(super) fn target(id: u64) -> String {
    format!("/v1/jobs/{id}")
}

/// What a job does, in words.
pub(super) const fn what(job: &Job) -> &'static str {
    match (job.kind, job.way) {
        (JobKind::Merge, Direction::Down) => "merge down",
        (JobKind::Merge, Direction::InPlace) => "merge up in place",
        (JobKind::Merge, _) => "merge up",
        (JobKind::PushDown, _) => "push down",
        (JobKind::Flatten, _) => "flatten",
        (JobKind::Import, _) => "import",
        (JobKind::IntoBase, _) => "merge into base",
        (JobKind::Scrub, _) => "scrub",
    }
}

/// A number of seconds: `5 s`, `3 min 20 s`, `2 h 5 min`.
pub(super) fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3_600, seconds % 3_600 / 60),
    }
}

/// Whether nobody has counted yet what a job has to do.
fn is_uncounted(job: &Job) -> bool {
    job.state == JobState::Queued && job.bytes_total == 0
}

/// How far a job is: bytes, speed, what is left.
pub(super) fn progress(job: &Job) -> String {
    let mut text = if is_uncounted(job) {
        "nothing counted yet".to_owned()
    } else {
        format!(
            "{} of {}",
            size::show(job.bytes_done),
            size::show(job.bytes_total)
        )
    };
    match job.state {
        JobState::Running => {
            if job.bytes_per_s > 0 {
                text.push_str(&format!(", {}/s", size::show(job.bytes_per_s)));
            }
            if let Some(seconds) = job.remaining_s {
                text.push_str(&format!(", {} left", span(seconds)));
            }
        }
        JobState::Queued => text.push_str(", waiting for its turn"),
        JobState::Paused => text.push_str(&format!(
            ", paused; `stratablk job resume {}` lets it go on",
            job.id
        )),
        JobState::Done | JobState::Cancelled | JobState::Failed => {}
    }
    text
}

/// What a command says that has begun jobs and does not wait for them.
pub(super) fn begun(jobs: &[Job]) -> String {
    let line = |job: &Job| {
        if job.state.has_ended() {
            return ended_line(job);
        }
        let id = job.id;
        let bytes = match is_uncounted(job) {
            true => String::new(),
            false if job.kind == JobKind::Scrub => String::new(),
            false => format!(", {} to copy", size::show(job.bytes_total)),
        };
        let (what, subject) = (what(job), &job.subject);
        format!("job {id}: {what} of {subject}{bytes}; `stratablk job wait {id}` waits for it\n")
    };
    jobs.iter().map(line).collect()
}

/// What a job that has ended did, in a line.
pub(super) fn ended_line(job: &Job) -> String {
    let bytes = size::show(job.bytes_done);
    let (id, what, subject) = (job.id, what(job), &job.subject);
    let state = job.state.name();
    let done = if job.kind == JobKind::Scrub {
        "read"
    } else {
        "copied"
    };
    format!("job {id}: {what} of {subject} {state}, {bytes} {done}\n")
}

/// How a job stands, in a line.
fn state_line(job: &Job) -> String {
    let (id, what, subject) = (job.id, what(job), &job.subject);
    let limit = match job.rate_bytes_per_s {
        Some(rate) => format!(", at most {}/s", size::show(rate)),
        None => String::new(),
    };
    let (state, percent) = (job.state.name(), job.percent());
    let begun = job.kind == JobKind::IntoBase && job.bytes_done > 0;
    let half = match job.state {
        JobState::Paused | JobState::Failed if begun => {
            "; the image is half changed until the job has ended"
        }
        _ => "",
    };
    format!("job {id}: {what} of {subject} is {state} at {percent} %{limit}{half}\n")
}

/// All jobs.
fn list(jobs: &[Job], now: Timestamp) -> String {
    if jobs.is_empty() {
        return "no jobs; deleting a snapshot, flattening and importing make some\n".into();
    }
    let row = |job: &Job| {
        [
            job.id.to_string(),
            what(job).to_owned(),
            job.subject.clone(),
            job.state.name().to_owned(),
            format!("{} %", job.percent()),
            size::show(job.bytes_done),
            size::show(job.bytes_total),
            match job.state {
                JobState::Running => format!("{}/s", size::show(job.bytes_per_s)),
                _ => "-".into(),
            },
            match (job.remaining_s, job.ended) {
                (Some(seconds), _) => format!("{} left", span(seconds)),
                (None, Some(ended)) => output::ago(ended, now),
                (None, None) => "-".into(),
            },
        ]
    };
    let titles = [
        ("JOB", Align::Right),
        ("WHAT", Align::Left),
        ("OF", Align::Left),
        ("STATE", Align::Left),
        ("DONE", Align::Right),
        ("COPIED", Align::Right),
        ("TO COPY", Align::Right),
        ("SPEED", Align::Right),
        ("END", Align::Left),
    ];
    table::draw(titles, &jobs.iter().map(row).collect::<Vec<_>>())
}

/// One job with all that is known of it.
fn show(job: &Job, now: Timestamp) -> String {
    let mut lines = vec![
        ("job", job.id.to_string()),
        ("what", format!("{} of {}", what(job), job.subject)),
        (
            "state",
            format!("{}, {} %", job.state.name(), job.percent()),
        ),
        ("progress", progress(job)),
        (
            "limit",
            job.rate_bytes_per_s
                .map_or_else(|| "none".into(), |rate| format!("{}/s", size::show(rate))),
        ),
        (
            "created",
            format!("{} ({})", output::ago(job.created, now), job.created),
        ),
    ];
    if let Some(ended) = job.ended {
        let took = ended.0.saturating_sub(job.created.0) / SECOND_NS;
        let (ago, took) = (output::ago(ended, now), span(took));
        lines.push(("ended", format!("{ago} ({ended}), after {took}")));
    }
    if let Some(error) = &job.error {
        lines.push(("error", error.clone()));
    }
    let line = |(name, value): &(&str, String)| format!("{name:<10} {value}\n");
    let mut text: String = lines.iter().map(line).collect();
    if let Some(report) = &job.scrub {
        text.push_str(&scrub::found(report));
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A merge that has got so far.
    pub fn job(state: JobState) -> Job {
        Job {
            id: 3,
            kind: JobKind::Merge,
            subject: "web@s1".into(),
            way: Direction::Up,
            state,
            error: None,
            bytes_done: 43 << 20,
            bytes_total: 100 << 20,
            bytes_per_s: 10 << 20,
            rate_bytes_per_s: None,
            remaining_s: Some(5),
            created: Timestamp(0),
            ended: None,
            scrub: None,
        }
    }

    #[test]
    fn a_job_is_told_in_a_line() {
        let job = super::tests::job(JobState::Running);
        assert_eq!(progress(&job), "43 MiB of 100 MiB, 10 MiB/s, 5 s left");
        assert_eq!(
            begun(std::slice::from_ref(&job)),
            "job 3: merge up of web@s1, 100 MiB to copy; `stratablk job wait 3` waits for it\n"
        );
        let done = Job {
            state: JobState::Done,
            ..job
        };
        assert_eq!(
            begun(&[done]),
            "job 3: merge up of web@s1 done, 43 MiB copied\n"
        );
    }

    #[test]
    fn an_image_that_is_half_changed_is_told() {
        let half = |kind, state, bytes_done| {
            let job = Job {
                kind,
                bytes_done,
                ..job(state)
            };
            state_line(&job).contains("half changed")
        };
        assert!(half(JobKind::IntoBase, JobState::Paused, 1));
        assert!(half(JobKind::IntoBase, JobState::Failed, 1));
        assert!(!half(JobKind::IntoBase, JobState::Paused, 0));
        assert!(!half(JobKind::IntoBase, JobState::Queued, 1));
        assert!(!half(JobKind::Merge, JobState::Paused, 1));
    }

    #[test]
    fn spans_are_rounded_for_people() {
        for (seconds, text) in [
            (0, "0 s"),
            (119, "119 s"),
            (200, "3 min 20 s"),
            (7_500, "2 h 5 min"),
        ] {
            assert_eq!(span(seconds), text);
        }
    }

    #[test]
    fn only_what_is_done_is_at_100_percent() {
        let mut job = job(JobState::Running);
        job.bytes_done = job.bytes_total;
        assert_eq!(job.percent(), 99);
        job.state = JobState::Done;
        assert_eq!(job.percent(), 100);
        (job.state, job.bytes_done, job.bytes_total) = (JobState::Queued, 0, 0);
        assert_eq!(job.percent(), 0);
    }

    #[test]
    fn a_list_has_a_row_a_job() {
        let text = list(&[job(JobState::Running)], Timestamp(0));
        assert_eq!(
            text,
            "JOB  WHAT      OF      STATE    DONE  COPIED  TO COPY     SPEED  END\n  \
             3  merge up  web@s1  running  43 %  43 MiB  100 MiB  10 MiB/s  5 s left\n"
        );
    }
}
