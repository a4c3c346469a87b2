//! The replies of the daemon in words and tables for people.

use super::size;
use super::table::{self, Align};
use crate::control::timestamp::Timestamp;
use crate::control::types::{
    Attachment, AttachmentState, Snapshot, SnapshotReport, Usage, UsageList, Volume, VolumeList,
};

/// Nanoseconds of a second.
const SECOND_NS: u64 = 1_000_000_000;

/// How long ago something was: `just now`, `5 min ago`, `3 days ago`.
pub fn ago(then: Timestamp, now: Timestamp) -> String {
    let seconds = now.0.saturating_sub(then.0) / SECOND_NS;
    let (count, unit) = match seconds {
        0..10 => return "just now".into(),
        10..120 => (seconds, "s"),
        120..7_200 => (seconds / 60, "min"),
        7_200..172_800 => (seconds / 3_600, "h"),
        _ => (seconds / 86_400, "days"),
    };
    format!("{count} {unit} ago")
}

/// A time span in milliseconds with as many digits as matter: `0.02 ms`, `12.3 ms`.
pub fn milliseconds(ns: u64) -> String {
    let hundredths = ns.div_ceil(10_000);
    match hundredths {
        0 => "0 ms".into(),
        1..1_000 => format!("{}.{:02} ms", hundredths / 100, hundredths % 100),
        _ => format!("{}.{} ms", hundredths / 100, hundredths / 10 % 10),
    }
}

/// Where an attachment stands, in a few words.
fn state(attachment: &Attachment) -> &'static str {
    state_word(attachment.state)
}

/// The word for a state.
pub const fn state_word(state: AttachmentState) -> &'static str {
    match state {
        AttachmentState::Listening => "listening",
        AttachmentState::Connected => "connected",
        AttachmentState::Changing => "changing",
        AttachmentState::Failed => "failed",
    }
}

/// The state of a volume in a word: what is wrong with it first.
fn volume_state(volume: &Volume) -> &'static str {
    if volume.failure.is_some() {
        return "failed";
    }
    if volume.no_space {
        return "no-space";
    }
    if volume.bad_bytes > 0 {
        return "damaged";
    }
    volume.attachment.as_ref().map_or("detached", state)
}

/// All volumes.
pub fn volumes(list: &VolumeList) -> String {
    if list.volumes.is_empty() {
        return "no volumes yet; create one with `stratablk volume create NAME --size 10G`\n"
            .into();
    }
    let row = |v: &Volume| {
        [
            v.name.clone(),
            v.kind.to_string(),
            size::show(v.size_bytes),
            size::show(v.allocated_bytes),
            v.depth.to_string(),
            v.snapshots.to_string(),
            volume_state(v).to_owned(),
            v.attachment
                .as_ref()
                .map_or_else(|| "-".into(), |a| a.socket.clone()),
        ]
    };
    let titles = [
        ("NAME", Align::Left),
        ("TYPE", Align::Left),
        ("SIZE", Align::Right),
        ("ACTIVE", Align::Right),
        ("LAYERS", Align::Right),
        ("SNAPSHOTS", Align::Right),
        ("STATE", Align::Left),
        ("SOCKET", Align::Left),
    ];
    table::draw(titles, &list.volumes.iter().map(row).collect::<Vec<_>>())
}

/// One volume with all that is known of it.
pub fn volume(volume: &Volume, now: Timestamp) -> String {
    let mut lines: Vec<(&str, String)> = vec![
        ("name", volume.name.clone()),
        (
            "type",
            match &volume.attached_from {
                Some(from) => format!("{}, made for an attachment of {from}", volume.kind),
                None => volume.kind.to_string(),
            },
        ),
        (
            "size",
            format!(
                "{} ({} bytes)",
                size::show(volume.size_bytes),
                volume.size_bytes
            ),
        ),
        (
            "created",
            format!("{} ({})", ago(volume.created, now), volume.created),
        ),
        ("base", volume.base.clone().unwrap_or_else(|| "none".into())),
        ("layers", volume.depth.to_string()),
        ("snapshots", volume.snapshots.to_string()),
        (
            "active layer",
            format!(
                "{}, {} on the host",
                volume.active_layer,
                size::show(volume.allocated_bytes)
            ),
        ),
    ];
    if let Some(failure) = &volume.failure {
        lines.push(("failed", failure.clone()));
    }
    if volume.no_space {
        let text = "no space left on the host; what it has to write waits in the cache";
        lines.push(("no-space", text.into()));
    }
    if volume.bad_bytes > 0 {
        let bytes = size::show(volume.bad_bytes);
        let text =
            format!("{bytes} in its layers; reads of that fail (see stratablk tree and job list)");
        lines.push(("damaged", text));
    }
    match &volume.attachment {
        None => lines.push(("attached", "no".into())),
        Some(a) => {
            let access = if a.read_only {
                "read-only"
            } else {
                "read-write"
            };
            let queues = if a.queues == 1 { "queue" } else { "queues" };
            lines.push((
                "attached",
                format!("{}, {} {queues}, {access}", a.socket, a.queues),
            ));
            let rings = if a.rings_running == 1 {
                "ring"
            } else {
                "rings"
            };
            let front_end = match &a.error {
                Some(error) => format!("failed: {error}"),
                None if a.connections > 1 => format!(
                    "{}, {} front-ends, {} {rings} running",
                    state(a),
                    a.connections,
                    a.rings_running
                ),
                None => format!("{}, {} {rings} running", state(a), a.rings_running),
            };
            lines.push(("front-end", front_end));
            let r = &a.requests;
            lines.push((
                "requests",
                format!(
                    "{} reads ({}), {} writes ({}), {} flushes, {} discards, {} errors",
                    r.reads,
                    size::show(r.read_bytes),
                    r.writes,
                    size::show(r.written_bytes),
                    r.flushes,
                    r.discards,
                    r.errors
                ),
            ));
        }
    }
    lines
        .iter()
        .map(|(name, value)| format!("{name:<13} {value}\n"))
        .collect()
}

/// Snapshots, oldest first.
pub fn snapshots(list: &[Snapshot], now: Timestamp) -> String {
    if list.is_empty() {
        return "no snapshots yet; take one with `stratablk snapshot create NAME --all`\n".into();
    }
    let row = |s: &Snapshot| {
        [
            s.name.clone(),
            s.volume.clone(),
            ago(s.created, now),
            size::show(s.size_bytes),
            size::show(s.allocated_bytes),
        ]
    };
    let titles = [
        ("SNAPSHOT", Align::Left),
        ("VOLUME", Align::Left),
        ("TAKEN", Align::Left),
        ("SIZE", Align::Right),
        ("LAYER", Align::Right),
    ];
    table::draw(titles, &list.iter().map(row).collect::<Vec<_>>())
}

/// What volumes take on the host.
pub fn usage(list: &UsageList) -> String {
    let row = |usage: &Usage| {
        [
            usage.volume.clone(),
            size::show(usage.exclusive_bytes),
            size::show(usage.shared_bytes),
            size::show(usage.base_bytes),
        ]
    };
    let titles = [
        ("VOLUME", Align::Left),
        ("EXCLUSIVE", Align::Right),
        ("SHARED", Align::Right),
        ("BASE", Align::Right),
    ];
    table::draw(titles, &list.volumes.iter().map(row).collect::<Vec<_>>())
}

/// What taking a snapshot did.
pub fn report(name: &str, report: &SnapshotReport) -> String {
    let volumes: Vec<_> = report.snapshots.iter().map(|s| s.volume.as_str()).collect();
    let waited = match report.stall_max_ns {
        0 => "no request waited".to_owned(),
        stall => format!("no request waited longer than {}", milliseconds(stall)),
    };
    format!(
        "snapshot {name} of {} taken in {}; {waited}\n",
        volumes.join(", "),
        milliseconds(report.elapsed_ns)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rounded_for_people() {
        for (ns, text) in [
            (0, "0 ms"),
            (1, "0.01 ms"),
            (20_000, "0.02 ms"),
            (1_234_567, "1.24 ms"),
            (12_300_000, "12.3 ms"),
            (3_000_000_000, "3000.0 ms"),
        ] {
            assert_eq!(milliseconds(ns), text, "{ns}");
        }
        let now = Timestamp(10 * 86_400 * SECOND_NS);
        let before = |seconds: u64| ago(Timestamp(now.0 - seconds * SECOND_NS), now);
        assert_eq!(before(0), "just now");
        assert_eq!(before(30), "30 s ago");
        assert_eq!(before(300), "5 min ago");
        assert_eq!(before(7_300), "2 h ago");
        assert_eq!(before(3 * 86_400), "3 days ago");
        assert_eq!(
            ago(Timestamp(now.0 + 1), now),
            "just now",
            "clocks may go back"
        );
    }

    #[test]
    fn a_snapshot_reports_in_one_line() {
        let snapshot = |volume: &str| Snapshot {
            name: "before-upgrade".into(),
            volume: volume.into(),
            created: Timestamp(0),
            group: String::new(),
            layer: String::new(),
            size_bytes: 0,
            allocated_bytes: 0,
        };
        let done = SnapshotReport {
            snapshots: vec![snapshot("web"), snapshot("db")],
            elapsed_ns: 12_300_000,
            stall_max_ns: 20_000,
            bytes_written: 0,
        };
        assert_eq!(
            report("before-upgrade", &done),
            "snapshot before-upgrade of web, db taken in 12.3 ms; no request waited longer than 0.02 ms\n"
        );
    }
}
