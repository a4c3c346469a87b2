//! The text of `GET /metrics`, in the exposition format of Prometheus (version 0.0.4), written by hand since it is a
//! dozen lines: families with help and type, samples with escaped labels.

use std::fmt::Write;

use super::types::{AttachmentState, CacheFigures, Job, JobState, RequestCounts, Status, Volume};

/// The content type of the format.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What a family's values do over time.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Goes up and down.
    Gauge,
    /// Only goes up, from 0 at each start of the daemon or each attachment.
    Counter,
}

/// How a sample is read from its source.
type Value<T> = fn(&T) -> u64;
/// A family: its name, its help, its value.
type Family<T> = (&'static str, &'static str, Value<T>);

/// Writes families into a text.
#[derive(Debug, Default)]
struct Encoder {
    /// What was written so far.
    text: String,
}

impl Encoder {
    /// Writes a family: its head, then a sample for each list of labels.
    fn family<'a>(
        &mut self,
        name: &str,
        kind: Kind,
        help: &str,
        samples: impl IntoIterator<Item = (Vec<(&'a str, &'a str)>, u64)>,
    ) {
        let kind = match kind {
            Kind::Gauge => "gauge",
            Kind::Counter => "counter",
        };
        // Writing into a String cannot fail.
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        for (labels, value) in samples {
            self.text.push_str(name);
            let mut separator = '{';
            for (label, text) in &labels {
                let _ = write!(self.text, "{separator}{label}=\"{}\"", escaped(text));
                separator = ',';
            }
            if !labels.is_empty() {
                self.text.push('}');
            }
            let _ = writeln!(self.text, " {value}");
        }
    }
}

/// The value of a label, with the three characters escaped that the format gives a meaning.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

/// The metrics of the daemon and its volumes.
pub fn text(status: &Status, cache: &CacheFigures, volumes: &[Volume], jobs: &[Job]) -> String {
    let mut out = Encoder::default();
    let build = vec![
        ("version", status.version.as_str()),
        ("store", status.store_id.as_str()),
    ];
    out.family(
        "stratablk_info",
        Kind::Gauge,
        "The daemon and its store.",
        [(build, 1)],
    );
    let plain: [(&str, &str, u64); 5] = [
        (
            "stratablk_uptime_seconds",
            "Seconds since the daemon started.",
            status.uptime_s,
        ),
        ("stratablk_volumes", "Volumes of the store.", status.volumes),
        (
            "stratablk_volumes_connected",
            "Volumes with a front-end.",
            status.connected,
        ),
        (
            "stratablk_scrub_errors",
            "Sectors of sealed layers that scrubs found damaged; reads of them fail.",
            status.bad_bytes / 512,
        ),
        (
            "stratablk_layers_without_checksums",
            "Sealed layers whose checksums are to be taken still.",
            status.layers_without_checksums,
        ),
    ];
    for (name, help, value) in plain {
        out.family(name, Kind::Gauge, help, [(Vec::new(), value)]);
    }

    out.family(
        "stratablk_refused_calls_total",
        Kind::Counter,
        "System calls that threads made and may not make; the log has their numbers.",
        [(Vec::new(), crate::confine::refused_calls())],
    );
    cache_families(&mut out, cache);
    job_families(&mut out, jobs);

    let gauges: [Family<Volume>; 9] = [
        ("stratablk_volume_size_bytes", "Size of the disk.", |v| {
            v.size_bytes
        }),
        (
            "stratablk_volume_allocated_bytes",
            "Bytes the active layer takes.",
            |v| v.allocated_bytes,
        ),
        (
            "stratablk_volume_depth_layers",
            "Layers from base to active.",
            |v| v.depth,
        ),
        (
            "stratablk_volume_snapshots",
            "Snapshots of the volume.",
            |v| v.snapshots,
        ),
        (
            "stratablk_volume_failed",
            "1 if the volume takes no more writes.",
            |v| u64::from(v.failure.is_some()),
        ),
        (
            "stratablk_volume_no_space",
            "1 if what the volume has to write waits for space on the host.",
            |v| u64::from(v.no_space),
        ),
        (
            "stratablk_volume_bad_bytes",
            "Bytes of its layers' data that scrubs found damaged.",
            |v| v.bad_bytes,
        ),
        (
            "stratablk_volume_connected",
            "1 if a front-end is connected.",
            |v| {
                u64::from(
                    v.attachment
                        .as_ref()
                        .is_some_and(|a| a.state == AttachmentState::Connected),
                )
            },
        ),
        (
            "stratablk_volume_rings_running",
            "Virtqueues the guest has started.",
            |v| v.attachment.as_ref().map_or(0, |a| a.rings_running),
        ),
    ];
    for (name, help, value) in gauges {
        let samples = volumes
            .iter()
            .map(|v| (vec![("volume", v.name.as_str())], value(v)));
        out.family(name, Kind::Gauge, help, samples);
    }

    let attached: Vec<(&str, &RequestCounts)> = volumes
        .iter()
        .filter_map(|v| Some((v.name.as_str(), &v.attachment.as_ref()?.requests)))
        .collect();
    let types: [(&str, Value<RequestCounts>); 4] = [
        ("read", |r| r.reads),
        ("write", |r| r.writes),
        ("flush", |r| r.flushes),
        ("discard", |r| r.discards),
    ];
    let samples = attached.iter().flat_map(|(volume, requests)| {
        types
            .iter()
            .map(|(kind, value)| (vec![("volume", *volume), ("type", *kind)], value(requests)))
    });
    out.family(
        "stratablk_requests_total",
        Kind::Counter,
        "Requests of the guest.",
        samples,
    );
    let counters: [Family<RequestCounts>; 3] = [
        (
            "stratablk_read_bytes_total",
            "Bytes read by the guest.",
            |r| r.read_bytes,
        ),
        (
            "stratablk_written_bytes_total",
            "Bytes written by the guest.",
            |r| r.written_bytes,
        ),
        (
            "stratablk_request_errors_total",
            "Requests that ended with an error.",
            |r| r.errors,
        ),
    ];
    for (name, help, value) in counters {
        let samples = attached
            .iter()
            .map(|(volume, requests)| (vec![("volume", *volume)], value(requests)));
        out.family(name, Kind::Counter, help, samples);
    }
    out.text
}

/// Writes how jobs stand.
fn job_families(out: &mut Encoder, jobs: &[Job]) {
    let samples = JobState::ALL.into_iter().map(|state| {
        let count = jobs.iter().filter(|job| job.state == state).count();
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        (vec![("state", state.name())], count)
    });
    out.family(
        "stratablk_jobs",
        Kind::Gauge,
        "Jobs by state; of those that have ended, the last ones.",
        samples,
    );
    let families: [Family<Job>; 2] = [
        (
            "stratablk_job_done_bytes",
            "Bytes that the job has copied.",
            |job| job.bytes_done,
        ),
        (
            "stratablk_job_total_bytes",
            "Bytes that the job has to copy.",
            |job| job.bytes_total,
        ),
    ];
    let under_way: Vec<(String, &Job)> = jobs
        .iter()
        .filter(|job| !job.state.has_ended())
        .map(|job| (job.id.to_string(), job))
        .collect();
    for (name, help, value) in families {
        let samples = under_way.iter().map(|(id, job)| {
            let labels = vec![("job", id.as_str()), ("subject", job.subject.as_str())];
            (labels, value(job))
        });
        out.family(name, Kind::Gauge, help, samples);
    }
}

/// Writes what the cache has and has done.
fn cache_families(out: &mut Encoder, cache: &CacheFigures) {
    let gauges: [Family<CacheFigures>; 3] = [
        (
            "stratablk_cache_bytes",
            "Bytes that the cache can hold.",
            |c| c.size_bytes,
        ),
        (
            "stratablk_cache_used_bytes",
            "Bytes of clusters in the cache.",
            |c| c.used_bytes,
        ),
        (
            "stratablk_cache_dirty_bytes",
            "Bytes of clusters written and not safely in the files yet.",
            |c| c.dirty_bytes,
        ),
    ];
    let counters: [Family<CacheFigures>; 9] = [
        (
            "stratablk_cache_hits_total",
            "Clusters read from the cache.",
            |c| c.hits,
        ),
        (
            "stratablk_cache_misses_total",
            "Clusters that had to be read from files.",
            |c| c.misses,
        ),
        (
            "stratablk_cache_fills_total",
            "Clusters kept in the cache after a miss.",
            |c| c.fills,
        ),
        (
            "stratablk_cache_bypasses_total",
            "Clusters read from files and not kept.",
            |c| c.bypasses,
        ),
        (
            "stratablk_cache_evictions_total",
            "Clusters that had to make room for others.",
            |c| c.evictions,
        ),
        (
            "stratablk_cache_retries_total",
            "Copies made again since the cluster was written to meanwhile.",
            |c| c.retries,
        ),
        (
            "stratablk_cache_parks_total",
            "Requests put aside until there was room.",
            |c| c.parks,
        ),
        (
            "stratablk_cache_writes_total",
            "Clusters written to the cache.",
            |c| c.writes,
        ),
        (
            "stratablk_cache_write_backs_total",
            "Clusters written from the cache to the files.",
            |c| c.write_backs,
        ),
    ];
    let families = gauges.map(|family| (Kind::Gauge, family)).into_iter();
    for (kind, (name, help, value)) in
        families.chain(counters.map(|family| (Kind::Counter, family)))
    {
        out.family(name, kind, help, [(Vec::new(), value(cache))]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::timestamp::Timestamp;
    use crate::control::types::{Attachment, VolumeType};

    /// A volume that is attached.
    fn volume(name: &str) -> Volume {
        Volume {
            name: name.into(),
            kind: VolumeType::Normal,
            attached_from: None,
            size_bytes: 4096,
            depth: 2,
            base: None,
            active_layer: String::new(),
            allocated_bytes: 512,
            snapshots: 1,
            created: Timestamp(0),
            failure: Some("broken".into()),
            no_space: false,
            bad_bytes: 4096,
            attachment: Some(Attachment {
                socket: "/s".into(),
                queues: 1,
                read_only: false,
                state: AttachmentState::Connected,
                connections: 1,
                rings_running: 1,
                error: None,
                requests: RequestCounts {
                    reads: 7,
                    read_bytes: 3584,
                    ..Default::default()
                },
            }),
        }
    }

    /// A job that has copied a part.
    fn job(id: u64, state: JobState) -> Job {
        Job {
            id,
            state,
            bytes_done: 41,
            bytes_total: 42,
            ..Job::sample()
        }
    }

    #[test]
    fn every_line_is_a_comment_or_a_sample() {
        let status = Status {
            version: "1.2.3".into(),
            pid: 1,
            store_id: "id".into(),
            store: "/store".into(),
            uptime_s: 9,
            volumes: 1,
            connected: 1,
            bad_bytes: 1536,
            layers_without_checksums: 5,
        };
        let cache = CacheFigures {
            size_bytes: 101,
            used_bytes: 102,
            dirty_bytes: 103,
            hits: 104,
            misses: 105,
            fills: 106,
            bypasses: 107,
            writes: 108,
            write_backs: 109,
            evictions: 110,
            retries: 111,
            parks: 112,
        };
        let text = text(
            &status,
            &cache,
            &[volume("web"), volume("a\"b\\c\nd")],
            &[job(3, JobState::Running), job(2, JobState::Done)],
        );
        for line in [
            "# TYPE stratablk_requests_total counter",
            "stratablk_info{version=\"1.2.3\",store=\"id\"} 1",
            "stratablk_uptime_seconds 9",
            "# TYPE stratablk_cache_bytes gauge",
            "stratablk_cache_bytes 101",
            "stratablk_cache_used_bytes 102",
            "stratablk_cache_dirty_bytes 103",
            "# TYPE stratablk_cache_hits_total counter",
            "stratablk_cache_hits_total 104",
            "stratablk_cache_misses_total 105",
            "stratablk_cache_fills_total 106",
            "stratablk_cache_bypasses_total 107",
            "stratablk_cache_writes_total 108",
            "stratablk_cache_write_backs_total 109",
            "stratablk_cache_evictions_total 110",
            "stratablk_cache_retries_total 111",
            "stratablk_cache_parks_total 112",
            "stratablk_jobs{state=\"running\"} 1",
            "stratablk_jobs{state=\"failed\"} 0",
            "stratablk_job_done_bytes{job=\"3\",subject=\"web@s1\"} 41",
            "stratablk_job_total_bytes{job=\"3\",subject=\"web@s1\"} 42",
            "stratablk_volume_failed{volume=\"web\"} 1",
            "stratablk_volume_connected{volume=\"web\"} 1",
            "stratablk_volume_bad_bytes{volume=\"web\"} 4096",
            "stratablk_scrub_errors 3",
            "stratablk_layers_without_checksums 5",
            "stratablk_requests_total{volume=\"web\",type=\"read\"} 7",
            "stratablk_read_bytes_total{volume=\"a\\\"b\\\\c\\nd\"} 3584",
        ] {
            assert!(
                text.lines().any(|l| l == line),
                "{line} is missing from\n{text}"
            );
        }
        for line in text.lines().filter(|l| !l.starts_with("# ")) {
            let (name, value) = line.rsplit_once(' ').unwrap_or_default();
            assert!(name.starts_with("stratablk_"), "{line}");
            assert!(value.parse::<u64>().is_ok(), "{line}");
        }
        assert!(text.ends_with('\n'));
    }
}
