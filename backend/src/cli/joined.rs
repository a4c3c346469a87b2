//! A deletion whose join is left to later: the layers are at work, and the daemon makes the job when they are not.

use std::thread;
use std::time::Duration;

use hyper::Method;

use super::client::Client;
use super::{Failure, filtered, progress, read};
use crate::control::types::{DeleteReport, ErrorKind, Fate, Job, Tree, TreeNode};

/// How often the daemon is asked.
const INTERVAL: Duration = Duration::from_millis(200);
/// So often it may say that nothing is at work, and that the layer is still there, before that is taken for an answer.
const IDLE_MAX: u32 = 25;

/// The layer that is gone once a deletion has done all that it is to do.
fn goes(report: &DeleteReport) -> Option<&str> {
    match &report.fate {
        // What goes into an image stays as the layer over it.
        Fate::Joined { child, .. } if !report.dry_run && *child != report.layer => {
            Some(&report.layer)
        }
        _ => None,
    }
}

/// The tree that a deletion was about.
fn tree_of(client: &Client, report: &DeleteReport) -> Result<Tree, Failure> {
    let target = filtered("/v1/tree", Some(&report.volume));
    read(&client.call(Method::GET, &target, None)?)
}

/// The job that has its hands on a layer or on one directly over it, of those that have not ended.
fn job_at<'a>(tree: &'a Tree, layer: &str) -> Option<&'a Job> {
    let own = |node: &&TreeNode| node.layer == layer;
    let over = |node: &&TreeNode| node.parent.as_deref() == Some(layer);
    let nodes = tree.layers.iter();
    let near = nodes.clone().filter(own).chain(nodes.filter(over));
    near.filter_map(|node| node.job)
        .find_map(|id| tree.jobs.iter().find(|job| job.id == id))
        .filter(|job| !job.state.has_ended())
}

/// The job after which the layer of a deletion is joined, if no job does it yet.
///
/// # Errors
/// What the daemon answered.
pub(super) fn after(client: &Client, report: &DeleteReport) -> Result<Option<u64>, Failure> {
    match goes(report) {
        Some(layer) if report.jobs.is_empty() => {
            let tree = tree_of(client, report)?;
            Ok(job_at(&tree, layer).map(|job| job.id))
        }
        _ => Ok(None),
    }
}

/// Waits until the layer of a deletion is gone. Returns the jobs that were waited for, as they are then.
///
/// # Errors
/// As of `progress::wait`; or nothing goes on with it.
pub(super) fn wait(
    client: &Client,
    report: &DeleteReport,
    quiet: bool,
) -> Result<Vec<Job>, Failure> {
    let mut ended = Vec::new();
    let Some(layer) = goes(report) else {
        return Ok(ended);
    };
    let mut idle = 0;
    loop {
        let tree = tree_of(client, report)?;
        if !tree.layers.iter().any(|node| node.layer == layer) {
            return Ok(ended);
        }
        if let Some(job) = job_at(&tree, layer) {
            idle = 0;
            ended.extend(progress::wait(client, vec![job.clone()], quiet)?);
            continue;
        }
        if tree.jobs.iter().all(|job| job.state.has_ended()) {
            idle += 1;
        }
        if idle > IDLE_MAX {
            return Err(Failure::of(
                ErrorKind::Failed,
                format!(
                    "the data of {}@{} is not joined with what lies over it, and no job is at it (stratablk job list); \
                     the daemon tries again when it is started",
                    report.volume, report.snapshot
                ),
            ));
        }
        thread::park_timeout(INTERVAL);
    }
}
