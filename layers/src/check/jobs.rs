//! What jobs and removals that are under way mean for the check: states of the files that would be damage without them.

use std::sync::Arc;

use super::{Report, Severity};
use crate::catalog::{CatalogState, JobKind, JobRow, JobState, Way};
use crate::file::Media;
use crate::mapfile::layer_dir;
use crate::units::LayerId;

/// What the jobs of a layer may be doing to its files.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct UnderWay {
    /// Its data file may be that of another layer as well.
    pub shares_file: bool,
    /// It is a raw base that is written.
    pub writes_base: bool,
}

/// What the jobs of a layer may be doing to its files.
pub(super) fn under_way(state: &CatalogState, layer: LayerId) -> UnderWay {
    let mut found = UnderWay::default();
    for job in state.jobs_of(layer) {
        found.shares_file |=
            job.kind == JobKind::Merge && matches!(job.way, Way::Down | Way::InPlace);
        found.writes_base |= job.kind == JobKind::IntoBase && job.source == layer;
    }
    found
}

/// The jobs that have not ended.
pub(super) fn waiting(state: &CatalogState, report: &mut Report) {
    for job in state.jobs.values() {
        let number = job.id.0;
        let (how, fix) = match (job.state, &job.error) {
            (JobState::Queued, _) => (
                "is not done yet".to_owned(),
                "nothing; the daemon goes on with it".to_owned(),
            ),
            (JobState::Paused, _) => (
                "is paused".to_owned(),
                format!("let it go on with `stratablk job resume {number}`"),
            ),
            (JobState::Stopped, None) => (
                "was cancelled".to_owned(),
                format!("nothing, or let it go on with `stratablk job resume {number}`"),
            ),
            (JobState::Stopped, Some(error)) => (
                format!("failed: {error}"),
                format!("see to the cause, then `stratablk job resume {number}`"),
            ),
        };
        let what = format!("job {number}, {} {}, {how}", kind(job), job.subject);
        report.add(Severity::Note, Some(job.target), what, fix);
    }
}

/// What a job does, before its subject.
fn kind(job: &JobRow) -> &'static str {
    match job.kind {
        JobKind::Merge => "merging",
        JobKind::PushDown => "pushing down",
        JobKind::Flatten => "flattening",
        JobKind::Import => "importing",
        JobKind::IntoBase => "moving into its base",
        JobKind::Scrub => "scrubbing",
    }
}

/// A directory of a layer that was removed.
pub(super) fn doomed(media: &Arc<dyn Media>, layer: LayerId, report: &mut Report) {
    report.add(
        Severity::Note,
        Some(layer),
        format!(
            "{} is of a layer that was removed, and not gone yet",
            media.display_path(&layer_dir(layer)).display()
        ),
        "nothing; it is removed when the store is next opened",
    );
}
