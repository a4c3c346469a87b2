//! `stratablk scrub`: begins a scrub, waits for it, and says what it found.

use hyper::Method;
use serde_json::json;

use super::args::WaitArgs;
use super::client::Client;
use super::{Done, EXIT_DAMAGED, Failure, jobs, progress, read, size};
use crate::control::types::{ErrorKind, Job, JobState, ScrubReport, ScrubRequest};

/// Runs of damaged bytes that are named of a layer.
const RANGES_MAX: usize = 20;

/// Holds the layers of a volume, or of all, against their checksums.
pub(super) fn run(
    client: &Client,
    volume: Option<String>,
    wait: WaitArgs,
    json: bool,
) -> Result<Done, Failure> {
    let request = ScrubRequest {
        volume,
        rate_bytes_per_s: wait.rate_bytes_per_s(),
    };
    let begun = client.call(Method::POST, "/v1/scrubs", Some(&json!(request)))?;
    let job: Job = read(&begun)?;
    if !wait.wait {
        return Ok(Done::new(begun, jobs::begun(&[job])));
    }
    let ended = progress::wait_whatever(client, vec![job], json)?;
    let Some(job) = ended.into_iter().next() else {
        return Err(Failure::of(ErrorKind::Internal, "no job to wait for"));
    };
    if job.state == JobState::Cancelled {
        let what = format!("job {} was cancelled", job.id);
        return Err(Failure::of(ErrorKind::Failed, what));
    }
    let mut text = jobs::ended_line(&job);
    text.push_str(&job.scrub.as_ref().map(found).unwrap_or_default());
    Ok(Done {
        code: if job.state == JobState::Done {
            0
        } else {
            EXIT_DAMAGED
        },
        json: json!(job),
        text,
    })
}

/// What a scrub found, in lines.
pub(super) fn found(report: &ScrubReport) -> String {
    let mut lines = vec![format!(
        "{} of {} layers, {} of data",
        report.layers,
        report.layers_total,
        size::show(report.bytes)
    )];
    if report.taken > 0 {
        lines.push(format!(
            "{} layers had no checksums; they were taken now, and nothing is known of their data",
            report.taken
        ));
    }
    if report.mended > 0 {
        lines.push(format!(
            "{} clusters were damaged, and were mended from the cache",
            report.mended
        ));
    }
    for bad in &report.bad {
        let over = if bad.volumes.is_empty() {
            "of no volume".to_owned()
        } else {
            format!("of {}", bad.volumes.join(", "))
        };
        let bytes = size::show(bad.bytes);
        lines.push(format!("damaged: layer {}, {bytes}, {over}", bad.layer));
        for range in bad.ranges.iter().take(RANGES_MAX) {
            let end = range.offset.saturating_add(range.bytes);
            lines.push(format!("  bytes {} to {end}", range.offset));
        }
        if bad.ranges.len() > RANGES_MAX {
            lines.push("  and more (--json lists them)".into());
        }
    }
    for layer in &report.damaged_checksums {
        lines.push(format!(
            "checksums of layer {layer} were damaged; what they stood for is not known to be good"
        ));
    }
    for left in &report.left_out {
        lines.push(format!("left out: layer {}: {}", left.layer, left.why));
    }
    if report.through_page_cache {
        lines.push(
            "some data was read through the host's page cache, whose file system has no direct transfers".into(),
        );
    }
    lines.iter().map(|line| format!("{line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::types::{BadLayer, ByteRange, LeftOut};

    #[test]
    fn damage_is_named_with_its_place() {
        let report = ScrubReport {
            layers_total: 3,
            layers: 2,
            bytes: 8192,
            taken: 1,
            mended: 4,
            bad_bytes: 4096,
            bad: vec![BadLayer {
                layer: "L".into(),
                volumes: vec!["web".into(), "web@s1".into()],
                bytes: 4096,
                ranges: vec![ByteRange {
                    offset: 8192,
                    bytes: 4096,
                }],
            }],
            damaged_checksums: vec!["M".into()],
            left_out: vec![LeftOut {
                layer: "N".into(),
                why: "job 3 works on it".into(),
            }],
            through_page_cache: true,
        };
        let text = found(&report);
        for line in [
            "2 of 3 layers, 8 KiB of data",
            "damaged: layer L, 4 KiB, of web, web@s1",
            "  bytes 8192 to 12288",
            "left out: layer N: job 3 works on it",
        ] {
            assert!(text.lines().any(|has| has == line), "{line:?} in {text}");
        }
    }
}
