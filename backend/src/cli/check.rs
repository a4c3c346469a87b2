//! `stratablk check`: verifies a store on the spot, without a daemon, or rebuilds its catalog. The only file of the command
//! line that reads a store.

use std::fmt::Write;
use std::sync::Arc;

use serde_json::{Value, json};
use stratablk_layers::check::{CheckOptions, Finding, Rebuilt, Report, Severity};
use stratablk_layers::file::Media;
use stratablk_layers::file::host::{HostMedia, HostOptions};
use stratablk_layers::{Error, Result, check};

use super::args::CheckArgs;
use super::size;

/// What a check found, as JSON and in words, and whether the store is sound.
#[derive(Debug)]
pub struct Outcome {
    /// For `--json`.
    pub json: Value,
    /// For people.
    pub text: String,
    /// Whether nothing is wrong.
    pub sound: bool,
}

/// Verifies a store, after rebuilding its catalog if that was asked for.
///
/// # Errors
/// Only what keeps a check from being made (the store is in use, or is none); damage is an outcome.
pub fn run(args: &CheckArgs) -> Result<Outcome> {
    let dir = &args.store;
    let media =
        HostMedia::new(dir.clone(), HostOptions::default()).map_err(|source| Error::Io {
            op: "open",
            path: dir.clone(),
            source,
        })?;
    let media: Arc<dyn Media> = Arc::new(media);
    let rebuilt = if args.rebuild_catalog {
        Some(check::rebuild_catalog(dir, &media)?)
    } else {
        None
    };
    let mut report = check::check(
        dir,
        &media,
        CheckOptions {
            scrub: args.scrub,
            ..CheckOptions::default()
        },
    )?;
    let (unwritten, finding) = check::unwritten(dir, args.cache_dir.clone())?;
    report.findings.extend(finding);
    Ok(Outcome {
        json: json(&report, unwritten, rebuilt.as_ref()),
        text: text(&report, rebuilt.as_ref()),
        sound: report.is_sound(),
    })
}

/// A severity in a word.
const fn word(severity: Severity) -> &'static str {
    match severity {
        Severity::Note => "note",
        Severity::Warning => "warning",
        Severity::Error => "error",
    }
}

/// The outcome for programs.
fn json(report: &Report, unwritten: u64, rebuilt: Option<&Rebuilt>) -> Value {
    let finding = |f: &Finding| {
        json!({
            "severity": word(f.severity),
            "layer": f.layer.map(|layer| layer.to_string()),
            "what": f.what,
            "fix": f.fix,
        })
    };
    json!({
        "sound": report.is_sound(),
        "layers": report.layers,
        "volumes": report.volumes,
        "snapshots": report.snapshots,
        "unwritten_clusters": unwritten,
        "scrubbed_layers": report.scrubbed_layers,
        "scrubbed_bytes": report.scrubbed_bytes,
        "through_page_cache": report.through_page_cache,
        "findings": report.findings.iter().map(finding).collect::<Vec<_>>(),
        "rebuilt": rebuilt.map(|r| json!({
            "layers": r.layers,
            "volumes": r.volumes,
            "snapshots": r.snapshots,
            "notes": r.notes,
            "backup": r.backup.as_ref().map(|path| path.to_string_lossy()),
        })),
    })
}

/// The outcome for people.
fn text(report: &Report, rebuilt: Option<&Rebuilt>) -> String {
    let mut out = String::new();
    if let Some(rebuilt) = rebuilt {
        let _ = write!(
            out,
            "catalog rebuilt: {} layers, {} volumes, {} snapshots",
            rebuilt.layers, rebuilt.volumes, rebuilt.snapshots
        );
        if let Some(backup) = &rebuilt.backup {
            let _ = write!(out, "; the old one is {}", backup.display());
        }
        out.push('\n');
        for note in &rebuilt.notes {
            let _ = writeln!(out, "note: {note}");
        }
    }
    for finding in &report.findings {
        let _ = write!(out, "{}: ", word(finding.severity));
        if let Some(layer) = finding.layer {
            let _ = write!(out, "layer {layer}: ");
        }
        let _ = writeln!(out, "{}", finding.what);
        if !finding.fix.is_empty() {
            let _ = writeln!(out, "  {}", finding.fix);
        }
    }
    if report.scrubbed_layers > 0 {
        let way = if report.through_page_cache {
            " (some of it through the host's page cache)"
        } else {
            ""
        };
        let _ = writeln!(
            out,
            "{} of data of {} layers read and held against checksums{way}",
            size::show(report.scrubbed_bytes),
            report.scrubbed_layers
        );
    }
    let verdict = if report.is_sound() {
        "sound"
    } else {
        "damaged"
    };
    let _ = writeln!(
        out,
        "{verdict}: {} layers, {} volumes, {} snapshots",
        report.layers, report.volumes, report.snapshots
    );
    out
}
