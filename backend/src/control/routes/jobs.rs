//! Routes of jobs.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::super::error::Result;
use super::super::types::{ErrorBody, Job, JobChange, JobList, ScrubRequest};
use super::Shared;
use super::request::{JobNumber, JsonBody, JsonOrNothing};

/// The jobs that have not ended, and those that ended lately, by number.
#[utoipa::path(get, path = "/v1/jobs", responses((status = 200, body = JobList)))]
pub async fn list_jobs(State(gate): Shared) -> Result<Json<JobList>> {
    gate.run(|commands| Ok(Json(commands.jobs()))).await
}

/// One job.
#[utoipa::path(get, path = "/v1/jobs/{id}", params(("id" = u64, Path)), responses(
    (status = 200, body = Job),
    (status = 404, body = ErrorBody),
))]
pub async fn show_job(State(gate): Shared, JobNumber(id): JobNumber) -> Result<Json<Job>> {
    gate.run(move |commands| commands.job(id)).await.map(Json)
}

/// Limits a job to so many bytes a second, or no longer.
#[utoipa::path(patch, path = "/v1/jobs/{id}", params(("id" = u64, Path)), request_body = JobChange, responses(
    (status = 200, body = Job),
    (status = 404, body = ErrorBody),
    (status = 422, body = ErrorBody, description = "it has ended, or a field cannot be as it is"),
))]
pub async fn change_job(
    State(gate): Shared,
    JobNumber(id): JobNumber,
    JsonBody(change): JsonBody<JobChange>,
) -> Result<Json<Job>> {
    gate.run(move |commands| commands.change_job(id, change))
        .await
        .map(Json)
}

/// Holds the data of sealed layers against the checksums that were taken when they were sealed, as a job.
#[utoipa::path(post, path = "/v1/scrubs", request_body = ScrubRequest, responses(
    (status = 202, body = Job),
    (status = 404, body = ErrorBody),
    (status = 422, body = ErrorBody, description = "a field cannot be as it is"),
))]
pub async fn scrub(
    State(gate): Shared,
    JsonOrNothing(request): JsonOrNothing<ScrubRequest>,
) -> Result<(StatusCode, Json<Job>)> {
    let job = gate.run(move |commands| commands.scrub(request)).await?;
    Ok((StatusCode::ACCEPTED, Json(job)))
}

/// Lets a job rest until it is resumed, also over restarts.
#[utoipa::path(post, path = "/v1/jobs/{id}/pause", params(("id" = u64, Path)), responses(
    (status = 200, body = Job),
    (status = 404, body = ErrorBody),
    (status = 422, body = ErrorBody, description = "it has ended"),
))]
pub async fn pause_job(State(gate): Shared, JobNumber(id): JobNumber) -> Result<Json<Job>> {
    gate.run(move |commands| commands.pause_job(id))
        .await
        .map(Json)
}

/// Lets a job go on that rests, was cancelled, or failed.
#[utoipa::path(post, path = "/v1/jobs/{id}/resume", params(("id" = u64, Path)), responses(
    (status = 200, body = Job),
    (status = 404, body = ErrorBody),
    (status = 422, body = ErrorBody, description = "it is done"),
))]
pub async fn resume_job(State(gate): Shared, JobNumber(id): JobNumber) -> Result<Json<Job>> {
    gate.run(move |commands| commands.resume_job(id))
        .await
        .map(Json)
}

/// Stops a job for good. Every disk reads the same whether or not it ends.
#[utoipa::path(post, path = "/v1/jobs/{id}/cancel", params(("id" = u64, Path)), responses(
    (status = 200, body = Job),
    (status = 404, body = ErrorBody),
    (status = 409, body = ErrorBody, description = "it cannot be left half done; pause it"),
    (status = 422, body = ErrorBody, description = "it has ended"),
))]
pub async fn cancel_job(State(gate): Shared, JobNumber(id): JobNumber) -> Result<Json<Job>> {
    gate.run(move |commands| commands.cancel_job(id))
        .await
        .map(Json)
}
