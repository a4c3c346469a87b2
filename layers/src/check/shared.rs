//! Layers that have one data file with two names. While two layers are merged that is so (`FORMAT.md`), and the job's row tells
//! everybody that what one of them gives back the other one still needs. Without the row it is a trap.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::{Report, Severity};
use crate::catalog::{CatalogState, JobId, JobKind, JobRow, JobState, LayerState, Rows, Way};
use crate::mapfile::data_path;
use crate::units::LayerId;

/// Those of these layers that have a data file in common, in groups of two and more.
fn groups<'a>(dir: &Path, layers: impl Iterator<Item = &'a LayerId>) -> Vec<Vec<LayerId>> {
    let mut by_file: BTreeMap<(u64, u64), Vec<LayerId>> = BTreeMap::new();
    for layer in layers {
        // What cannot be looked at is reported by who looks at each layer.
        if let Ok(file) = std::fs::metadata(dir.join(data_path(*layer)))
            && file.nlink() > 1
        {
            by_file
                .entry((file.dev(), file.ino()))
                .or_default()
                .push(*layer);
        }
    }
    by_file.retain(|_, group| group.len() > 1);
    by_file.into_values().collect()
}

/// Reports layers that share a file although no job joins them.
pub(super) fn check(dir: &Path, state: &CatalogState, report: &mut Report) {
    for group in groups(dir, state.layers.keys()) {
        let joins = |job: &&JobRow| group.contains(&job.source) && group.contains(&job.target);
        let joined = group
            .iter()
            .any(|layer| state.jobs_of(*layer).any(|job| joins(&job)));
        if !joined {
            let names: Vec<String> = group.iter().map(LayerId::to_string).collect();
            report.add(
                Severity::Error,
                group.first().copied(),
                format!(
                    "layers {} have one data file, and no job joins them",
                    names.join(" and ")
                ),
                "do not start the daemon; make a new catalog with `check --rebuild-catalog`, which adds the job",
            );
        }
    }
}

/// Adds the jobs that were at work on layers that share a file.
pub(super) fn add_jobs(dir: &Path, rows: &mut Rows, notes: &mut Vec<String>) {
    for group in groups(dir, rows.layers.keys()) {
        for (lower, upper) in pairs(rows, &group) {
            let Some(row) = rows.layers.get(&upper) else {
                continue;
            };
            let id = JobId(rows.next_job);
            let job = JobRow {
                id,
                kind: JobKind::Merge,
                subject: format!("layer {upper}"),
                source: lower,
                target: upper,
                way: match row.state {
                    LayerState::Sealed => Way::Down,
                    LayerState::Active | LayerState::Sealing => Way::InPlace,
                },
                state: JobState::Queued,
                error: None,
                rate: None,
                created_ns: row.created_ns,
            };
            notes.push(format!(
                "layers {lower} and {upper} have one data file, since they were being joined: job {} goes on with that",
                id.0
            ));
            rows.next_job = rows.next_job.saturating_add(1);
            rows.jobs.insert(id, job);
        }
    }
}

/// Each layer of a group with the next one of it that lies above.
fn pairs(rows: &Rows, group: &[LayerId]) -> Vec<(LayerId, LayerId)> {
    let mut pairs = Vec::new();
    for upper in group {
        let mut next = rows.layers.get(upper).and_then(|row| row.parent);
        // Headers that form a circle are found by the state's own rules, afterwards.
        for _ in 0..rows.layers.len() {
            let Some(layer) = next else {
                break;
            };
            if group.contains(&layer) {
                pairs.push((layer, *upper));
                break;
            }
            next = rows.layers.get(&layer).and_then(|row| row.parent);
        }
    }
    pairs
}
