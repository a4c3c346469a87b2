//! `stratablk stats`: the figures of the cache and of the volumes, once or again and again.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use hyper::Method;

use super::cache::seconds;
use super::client::Client;
use super::table::{self, Align};
use super::{Done, Failure, output, read, size};
use crate::control::types::{CacheFigures, ErrorKind, Stats, VolumeFigures};

/// The route of the figures.
const ROUTE: &str = "/v1/stats";

/// What to show, and how often.
#[derive(Debug, Args)]
pub struct StatsArgs {
    /// Show them again every so many seconds, from 0.1 to 86400, with what happened a second in between
    #[arg(long, value_name = "SECONDS", value_parser = interval)]
    pub watch: Option<f64>,
}

/// How long to wait between two looks.
fn interval(text: &str) -> Result<f64, String> {
    seconds(0.1, 86_400.0, text)
}

/// Shows the figures; for ever, if they are watched. `None` if all was printed.
///
/// # Errors
/// What the daemon answered; usage.
pub(super) fn run(client: &Client, args: &StatsArgs, json: bool) -> Result<Option<Done>, Failure> {
    let Some(every) = args.watch else {
        let json = client.call(Method::GET, ROUTE, None)?;
        let text = text(&read(&json)?, None);
        return Ok(Some(Done::new(json, text)));
    };
    if json {
        return Err(Failure::Usage(
            "--watch prints text; without it, stats --json prints one document".into(),
        ));
    }
    let every = Duration::from_secs_f64(every);
    let mut before: Option<(Stats, Instant)> = None;
    loop {
        let now = Instant::now();
        let stats: Stats = read(&client.call(Method::GET, ROUTE, None)?)?;
        let since = before
            .as_ref()
            .map(|(stats, then)| (&stats.cache, now.duration_since(*then)));
        let mut out = io::stdout().lock();
        let separator = if before.is_some() { "\n" } else { "" };
        let written = out
            .write_all(format!("{separator}{}", text(&stats, since)).as_bytes())
            .and_then(|()| out.flush());
        match written {
            Ok(()) => {}
            // Nobody reads any more.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(None),
            Err(error) => return Err(Failure::of(ErrorKind::Io, error)),
        }
        drop(out);
        before = Some((stats, now));
        // To wake early would only be to look early.
        thread::park_timeout(every.saturating_sub(now.elapsed()));
    }
}

/// `part` of `whole` in percent with one digit after the point; `-` of nothing.
fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "-".into();
    }
    let thousandths = u128::from(part) * 1000 / u128::from(whole);
    format!("{}.{} %", thousandths / 10, thousandths % 10)
}

/// The figures in words, with what happened a second if an earlier look is known.
fn text(stats: &Stats, before: Option<(&CacheFigures, Duration)>) -> String {
    let cache = &stats.cache;
    let share = |bytes| {
        format!(
            "{} ({})",
            size::show(bytes),
            percent(bytes, cache.size_bytes)
        )
    };
    let mut lines = vec![
        ("cache size", size::show(cache.size_bytes)),
        ("used", share(cache.used_bytes)),
        ("dirty", share(cache.dirty_bytes)),
        (
            "hit rate",
            percent(cache.hits, cache.hits.saturating_add(cache.misses)),
        ),
    ];
    for (name, value) in COUNTERS {
        let total = value(cache);
        let mut text = total.to_string();
        if let Some((before, time)) = before {
            let happened = total.saturating_sub(value(before));
            let rate = u128::from(happened) * 1000 / time.as_millis().max(1);
            let _ = write!(text, " ({rate} a second)");
        }
        lines.push((name, text));
    }
    let mut out = String::new();
    for (name, value) in lines {
        let _ = writeln!(out, "{name:<13} {value}");
    }
    if !stats.volumes.is_empty() {
        out.push('\n');
        out.push_str(&volumes(&stats.volumes));
    }
    out
}

/// What a figure is called, and where it is.
type Counter = (&'static str, fn(&CacheFigures) -> u64);

/// What is counted, in the order in which it is shown.
const COUNTERS: [Counter; 9] = [
    ("hits", |c| c.hits),
    ("misses", |c| c.misses),
    ("fills", |c| c.fills),
    ("bypasses", |c| c.bypasses),
    ("writes", |c| c.writes),
    ("write-backs", |c| c.write_backs),
    ("evictions", |c| c.evictions),
    ("retries", |c| c.retries),
    ("parks", |c| c.parks),
];

/// What the guests have asked for, a line a volume.
fn volumes(volumes: &[VolumeFigures]) -> String {
    let titles = [
        ("VOLUME", Align::Left),
        ("STATE", Align::Left),
        ("READS", Align::Right),
        ("READ", Align::Right),
        ("WRITES", Align::Right),
        ("WRITTEN", Align::Right),
        ("FLUSHES", Align::Right),
        ("DISCARDS", Align::Right),
        ("ERRORS", Align::Right),
    ];
    let row = |volume: &VolumeFigures| {
        let requests = volume.requests;
        let shown = |show: fn(u64) -> String, value: Option<u64>| value.map_or("-".into(), show);
        let count = |value| shown(|value| value.to_string(), value);
        [
            volume.name.clone(),
            volume
                .state
                .map_or("detached", output::state_word)
                .to_owned(),
            count(requests.map(|r| r.reads)),
            shown(size::show, requests.map(|r| r.read_bytes)),
            count(requests.map(|r| r.writes)),
            shown(size::show, requests.map(|r| r.written_bytes)),
            count(requests.map(|r| r.flushes)),
            count(requests.map(|r| r.discards)),
            count(requests.map(|r| r.errors)),
        ]
    };
    table::draw(titles, &volumes.iter().map(row).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::types::{AttachmentState, RequestCounts};

    /// Figures that are all different.
    fn stats() -> Stats {
        Stats {
            cache: CacheFigures {
                size_bytes: 1 << 20,
                used_bytes: 512 << 10,
                dirty_bytes: 4096,
                hits: 900,
                misses: 100,
                fills: 90,
                bypasses: 10,
                writes: 55,
                write_backs: 44,
                evictions: 33,
                retries: 22,
                parks: 11,
            },
            volumes: vec![
                VolumeFigures {
                    name: "web".into(),
                    state: Some(AttachmentState::Connected),
                    requests: Some(RequestCounts {
                        reads: 7,
                        read_bytes: 28 << 10,
                        ..Default::default()
                    }),
                },
                VolumeFigures {
                    name: "db".into(),
                    state: None,
                    requests: None,
                },
            ],
        }
    }

    #[test]
    fn the_table_has_every_figure() {
        let expected = "\
cache size    1 MiB
used          512 KiB (50.0 %)
dirty         4 KiB (0.3 %)
hit rate      90.0 %
hits          900
misses        100
fills         90
bypasses      10
writes        55
write-backs   44
evictions     33
retries       22
parks         11

VOLUME  STATE      READS    READ  WRITES  WRITTEN  FLUSHES  DISCARDS  ERRORS
web     connected      7  28 KiB       0      0 B        0         0       0
db      detached       -       -       -        -        -         -       -
";
        assert_eq!(text(&stats(), None), expected);
    }

    #[test]
    fn a_watcher_sees_what_happens_a_second() {
        let mut before = stats().cache;
        before.hits = 400;
        let text = text(&stats(), Some((&before, Duration::from_millis(500))));
        assert!(
            text.contains("hits          900 (1000 a second)\n"),
            "{text}"
        );
        assert!(text.contains("misses        100 (0 a second)\n"), "{text}");
    }

    #[test]
    fn nothing_has_no_rate() {
        assert_eq!(percent(0, 0), "-");
        assert_eq!(percent(1, 3), "33.3 %");
        assert_eq!(percent(u64::MAX, u64::MAX), "100.0 %");
    }
}
