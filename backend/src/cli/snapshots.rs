//! Commands on snapshots.

use std::io::{self, Write};

use hyper::Method;
use serde_json::json;

use super::args::SnapshotCommand;
use super::client::{Client, encoded};
use super::{Done, Failure, filtered, jobs, joined, output, progress, read, size, volume_target};
use crate::control::timestamp::Timestamp;
use crate::control::types::{
    DeleteQuery, DeleteReport, Direction, Fate, MergeWay, PointRef, RestoreReport, RestoreRequest,
    SnapshotList, SnapshotReport, SnapshotRequest, WayCost,
};

/// Carries out a command on snapshots.
pub(super) fn run(client: &Client, command: SnapshotCommand, json: bool) -> Result<Done, Failure> {
    match command {
        SnapshotCommand::Create { name, volumes, all } => {
            let request = json!(SnapshotRequest {
                name: name.clone(),
                volumes,
                all
            });
            let json = client.call(Method::POST, "/v1/snapshots", Some(&request))?;
            let text = output::report(&name, &read::<SnapshotReport>(&json)?);
            Ok(Done::new(json, text))
        }
        SnapshotCommand::List { volume } => {
            let target = filtered("/v1/snapshots", volume.as_deref());
            let json = client.call(Method::GET, &target, None)?;
            let text = output::snapshots(&read::<SnapshotList>(&json)?.snapshots, Timestamp::now());
            Ok(Done::new(json, text))
        }
        SnapshotCommand::Restore {
            volume,
            snapshot,
            keep,
            only,
        } => {
            let request = RestoreRequest {
                snapshot,
                keep,
                only,
            };
            let target = volume_target(&volume) + "/restore";
            let json = client.call(Method::POST, &target, Some(&json!(request)))?;
            let text = restored(&read(&json)?, request.keep.as_deref());
            Ok(Done::new(json, text))
        }
        SnapshotCommand::Delete {
            volume,
            snapshot,
            dry_run,
            push_down,
            into_base,
            way,
            wait,
        } => {
            let query = DeleteQuery {
                dry_run,
                push_down,
                into_base,
                way,
                rate_bytes_per_s: wait.rate_bytes_per_s(),
            };
            let target = delete_target(&volume, &snapshot, &query);
            let reply = client.call(Method::DELETE, &target, None)?;
            let mut report: DeleteReport = read(&reply)?;
            let after = joined::after(client, &report)?;
            let mut text = deleted(&report, after);
            if !wait.wait {
                text.push_str(&jobs::begun(&report.jobs));
                return Ok(Done::new(reply, text));
            }
            report.jobs = progress::wait(client, report.jobs, json)?;
            let later = joined::wait(client, &report, json)?;
            report.jobs.extend(later);
            text.extend(report.jobs.iter().map(jobs::ended_line));
            Ok(Done::new(json!(report), text))
        }
    }
}

/// The route that deletes a snapshot, with its options.
fn delete_target(volume: &str, snapshot: &str, query: &DeleteQuery) -> String {
    let mut options: Vec<String> = Vec::new();
    let flags = [
        ("dry_run", query.dry_run),
        ("push_down", query.push_down),
        ("into_base", query.into_base),
    ];
    options.extend(
        flags
            .iter()
            .filter(|(_, set)| *set)
            .map(|(name, _)| format!("{name}=true")),
    );
    if let Some(way) = query.way {
        let way = match way {
            MergeWay::Up => "up",
            MergeWay::Down => "down",
        };
        options.push(format!("way={way}"));
    }
    if let Some(rate) = query.rate_bytes_per_s {
        options.push(format!("rate_bytes_per_s={rate}"));
    }
    format!(
        "/v1/snapshots/{}/{}?{}",
        encoded(volume),
        encoded(snapshot),
        options.join("&")
    )
}

/// What a restore did.
fn restored(report: &RestoreReport, keep: Option<&str>) -> String {
    let since = match keep {
        Some(keep) => format!("what was written since is kept as snapshot {keep}"),
        None => "what was written since is thrown away".to_owned(),
    };
    format!(
        "{} restored to snapshot {} in {}; {since}\n",
        report.volumes.join(", "),
        report.snapshot,
        output::milliseconds(report.elapsed_ns)
    )
}

/// What deleting a snapshot did, or would do. `after`: the job that the rest is left until.
fn deleted(report: &DeleteReport, after: Option<u64>) -> String {
    let name = format!("{}@{}", report.volume, report.snapshot);
    let mut text = if report.dry_run {
        format!("deleting snapshot {name} would do this:\n")
    } else {
        format!("snapshot {name} deleted\n")
    };
    text.push_str(&match &report.fate {
        Fate::Removed { frees_bytes } => {
            let bytes = size::show(*frees_bytes);
            format!("nothing needs its data, which is removed at once and frees {bytes}\n")
        }
        Fate::Kept { children } => format!(
            "its data stays without a name until one of the {children} layers over it is left \
             (--push-down copies it into each of them)\n"
        ),
        Fate::Named => "its data stays, since something else needs it as it is\n".to_owned(),
        Fate::Joined { child, ways, .. } if *child == report.layer => {
            let mut text = "its data is moved into the image below it, which is written: neither what it was nor what it will \
                            be until the job has ended\n"
                .to_owned();
            if report.dry_run {
                text.push_str(&costs(ways, "down: its data goes into the image"));
            }
            text
        }
        Fate::Joined {
            child_name, ways, ..
        } => {
            let after = after.map_or_else(String::new, |id| format!(" after job {id}"));
            let mut text =
                format!("its data is joined{after} with what lies over it: {child_name}\n");
            if report.dry_run {
                text.push_str(&costs(ways, "down: that layer's data goes into its file"));
            }
            text
        }
    });
    text
}

/// What each way costs. `down`: what the way down is.
fn costs(ways: &[WayCost], down: &str) -> String {
    use super::table::{self, Align};
    let row = |cost: &WayCost| {
        let what = match cost.way {
            Direction::Up => "up: its data goes into that layer",
            Direction::Down => down,
            Direction::InPlace => "in place: as down, while a guest uses that layer",
            Direction::Copy => "copy: into each layer over it",
        };
        [
            if cost.chosen { "*" } else { "" }.to_owned(),
            what.to_owned(),
            size::show(cost.bytes),
            size::show(cost.space_bytes),
            estimate(cost.estimate_ms),
        ]
    };
    let titles = [
        ("", Align::Left),
        ("WAY (* is taken)", Align::Left),
        ("TO COPY", Align::Right),
        ("SPACE", Align::Right),
        ("TIME", Align::Right),
    ];
    table::draw(titles, &ways.iter().map(row).collect::<Vec<_>>())
}

/// A guess of a time.
fn estimate(ms: u64) -> String {
    match ms {
        0..1000 => "under 1 s".into(),
        ms => format!("about {}", jobs::span(ms.div_ceil(1000))),
    }
}

/// Prints what differs between two points, line by line as it comes.
pub(super) fn diff(client: &Client, from: &PointRef, to: Option<&PointRef>) -> Result<(), Failure> {
    let mut target = format!("/v1/diff?from={}", encoded(&from.to_string()));
    if let Some(to) = to {
        target.push_str(&format!("&to={}", encoded(&to.to_string())));
    }
    let mut out = io::stdout().lock();
    let printed = client.stream(&target, &mut |piece| out.write_all(piece))?;
    match printed.and_then(|()| out.flush()) {
        // A reader that has gone is no failure.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::of(crate::control::types::ErrorKind::Io, error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A report of a layer that has this fate.
    fn report(dry_run: bool, fate: Fate) -> DeleteReport {
        DeleteReport {
            volume: "web".into(),
            snapshot: "s1".into(),
            layer: String::new(),
            dry_run,
            fate,
            jobs: Vec::new(),
        }
    }

    #[test]
    fn a_dry_run_shows_what_each_way_costs() {
        let cost = |way, bytes, chosen| WayCost {
            way,
            bytes,
            space_bytes: 64 << 20,
            estimate_ms: bytes >> 20,
            chosen,
        };
        let fate = Fate::Joined {
            child: "another".into(),
            child_name: "web@s2".into(),
            ways: vec![
                cost(Direction::Up, 10 << 20, true),
                cost(Direction::Down, 90 << 30, false),
            ],
        };
        let expected = "\
deleting snapshot web@s1 would do this:
its data is joined with what lies over it: web@s2
   WAY (* is taken)                            TO COPY   SPACE            TIME
*  up: its data goes into that layer            10 MiB  64 MiB       under 1 s
   down: that layer's data goes into its file   90 GiB  64 MiB  about 93 s
";
        let text = deleted(&report(true, fate.clone()), None);
        let squeeze = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(squeeze(&text), squeeze(expected), "{text}");
        let text = deleted(&report(false, fate), Some(7));
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(text.contains("joined after job 7 with"), "{text}");
    }

    #[test]
    fn it_says_that_an_image_is_written() {
        let fate = Fate::Joined {
            child: String::new(),
            child_name: "layer 01234567".into(),
            ways: vec![WayCost {
                way: Direction::Down,
                bytes: 1 << 20,
                space_bytes: 1 << 20,
                estimate_ms: 1,
                chosen: true,
            }],
        };
        let text = deleted(&report(true, fate), None);
        assert!(
            text.contains("into the image below it, which is written"),
            "{text}"
        );
        assert!(
            text.contains("down: its data goes into the image"),
            "{text}"
        );
        assert!(!text.contains("01234567"), "{text}");
    }

    #[test]
    fn the_route_carries_the_options() {
        let query = DeleteQuery {
            dry_run: true,
            push_down: false,
            into_base: true,
            way: Some(MergeWay::Down),
            rate_bytes_per_s: Some(5),
        };
        assert_eq!(
            delete_target("a b", "s", &query),
            "/v1/snapshots/a%20b/s?dry_run=true&into_base=true&way=down&rate_bytes_per_s=5"
        );
    }
}
