//! Jobs and removals that were interrupted are no damage, and without their rows the same files are.

use super::*;
use crate::catalog::{JobId, JobKind, JobRow, JobState, Way};

fn job(kind: JobKind, way: Way, source: u128, target: u128) -> Change {
    Change::AddJob(JobRow {
        id: JobId(1),
        kind,
        subject: "vm@monday".into(),
        source: id(source),
        target: id(target),
        way,
        state: JobState::Queued,
        error: None,
        rate: None,
        created_ns: 5,
    })
}

/// Findings but for the one that there is a job, which must be there.
fn findings_beside_the_job(fixture: &Fixture) -> Vec<Finding> {
    let mut findings = fixture.check().findings;
    let at = findings.iter().position(|it| it.what.contains("job 1, "));
    let job = findings.remove(at.unwrap());
    assert_eq!(job.severity, Severity::Note);
    assert!(!job.fix.is_empty());
    findings
}

#[test]
fn a_job_that_waits_is_told() {
    let fixture = Fixture::new();
    fixture.commit(&[job(JobKind::Merge, Way::Up, 2, 3)]);
    assert_eq!(findings_beside_the_job(&fixture), []);
    for (state, error, part) in [
        (JobState::Paused, None, "paused"),
        (JobState::Stopped, None, "cancelled"),
        (
            JobState::Stopped,
            Some("no space left".to_owned()),
            "failed: no space left",
        ),
    ] {
        fixture.commit(&[Change::SetJob {
            id: JobId(1),
            state,
            error,
            rate: None,
        }]);
        let report = fixture.check();
        assert_eq!(report.findings.len(), 1);
        assert!(
            report.findings[0].what.contains(part),
            "{:?}",
            report.findings
        );
        assert!(report.findings[0].fix.contains("job resume 1"));
    }
}

#[test]
fn the_parent_that_a_job_will_set_is_no_damage() {
    for (parent, sound) in [(Some(1), true), (None, false)] {
        let fixture = Fixture::new();
        fixture.commit(&[job(JobKind::Merge, Way::Up, 2, 3)]);
        fixture.remap(&header(3, parent, "vm", ""), &some());
        assert_eq!(findings_beside_the_job(&fixture).is_empty(), sound);
        // The same files, once the job is no more.
        fixture.commit(&[Change::RemoveJob(JobId(1))]);
        assert!(!fixture.check().is_sound());
    }
}

#[test]
fn a_base_that_a_job_writes_has_any_time() {
    let fixture = Fixture::new();
    fixture.commit(&[job(JobKind::IntoBase, Way::Down, 1, 2)]);
    let base = fs::File::options().write(true).open(&fixture.base).unwrap();
    base.set_modified(std::time::SystemTime::UNIX_EPOCH)
        .unwrap();
    assert_eq!(findings_beside_the_job(&fixture), []);
    fixture.commit(&[Change::RemoveJob(JobId(1))]);
    assert!(!fixture.check().is_sound());
}

#[test]
fn a_file_that_two_layers_share_may_be_the_longer_one() {
    let fixture = Fixture::new();
    fixture.commit(&[job(JobKind::Merge, Way::InPlace, 2, 3)]);
    let data = fs::File::options()
        .write(true)
        .open(fixture.path(&data_path(id(3))));
    data.unwrap().set_len(2000 * 512).unwrap();
    assert_eq!(findings_beside_the_job(&fixture), []);
    fixture.commit(&[Change::RemoveJob(JobId(1))]);
    assert!(fixture.check().findings[0].what.contains("has room for"));
}

#[test]
fn what_is_left_of_a_removed_layer_is_no_orphan() {
    let fixture = Fixture::new();
    fixture.commit(&[
        Change::RemoveVolume("other".into()),
        Change::RemoveLayer(id(4)),
    ]);
    let findings = fixture.check().findings;
    assert_eq!(findings.len(), 1);
    assert_eq!(
        (findings[0].severity, findings[0].layer),
        (Severity::Note, Some(id(4)))
    );
    // In part, or not at all.
    fs::remove_file(fixture.path(&map_path(id(4)))).unwrap();
    assert_eq!(fixture.check().findings.len(), 1);
    fs::remove_dir_all(fixture.path(&layer_dir(id(4)))).unwrap();
    assert_eq!(fixture.check().findings, []);
    fixture.commit(&[Change::Removed(id(4))]);
    assert_eq!(fixture.check().findings, []);
}

/// Gives the upper layer the file of the lower one.
fn share(fixture: &Fixture, lower: u128, upper: u128) {
    let [lower, upper] = [lower, upper].map(|n| fixture.path(&data_path(id(n))));
    fs::remove_file(&upper).unwrap();
    fs::hard_link(lower, upper).unwrap();
}

#[test]
fn layers_that_share_a_file_need_their_job() {
    let fixture = Fixture::new();
    share(&fixture, 2, 3);
    let report = fixture.check();
    assert_eq!(report.findings.len(), 1, "{:?}", report.findings);
    assert!(report.findings[0].what.contains("one data file"));
    assert!(!report.is_sound());
    fixture.commit(&[job(JobKind::Merge, Way::InPlace, 2, 3)]);
    assert_eq!(findings_beside_the_job(&fixture), []);
    // The job of others does not help.
    share(&fixture, 4, 3);
    assert!(
        findings_beside_the_job(&fixture)[0]
            .what
            .contains("one data file")
    );
}

#[test]
fn a_rebuilt_catalog_has_the_jobs_of_layers_that_share_a_file() {
    let fixture = Fixture::new();
    // Another snapshot between, so that there is a sealed layer over a sealed one.
    fixture.layer(&header(5, Some(2), "vm", "tuesday"), &some());
    fixture.remap(&header(3, Some(5), "vm", ""), &some());
    for (lower, upper, way) in [(2, 5, Way::Down), (2, 3, Way::InPlace)] {
        share(&fixture, lower, upper);
        fixture.rebuild().unwrap();
        let state = fixture.catalog();
        let jobs: Vec<_> = state.jobs.values().collect();
        assert_eq!(jobs.len(), 1);
        assert_eq!((jobs[0].source, jobs[0].target), (id(lower), id(upper)));
        assert_eq!((jobs[0].kind, jobs[0].way), (JobKind::Merge, way));
        assert!(fixture.check().is_sound());
        // A file of its own again.
        let own = fixture.path(&data_path(id(upper)));
        fs::remove_file(&own).unwrap();
        fs::File::create(own)
            .unwrap()
            .set_len(SECTORS * 512)
            .unwrap();
    }
    // One that lies beside is no part of a merge any more.
    share(&fixture, 4, 3);
    fixture.rebuild().unwrap();
    assert!(fixture.catalog().jobs.is_empty());
}
