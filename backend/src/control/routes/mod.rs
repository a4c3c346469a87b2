//! The routes of the control socket: from HTTP to a command and back, and nothing else.
//!
//! Every request with a fault gets a JSON error that names the field and the fix; none changes anything.

pub mod jobs;
mod request;
pub mod snapshots;
pub mod status;
pub mod volumes;

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{Method, StatusCode, Uri};
use axum::routing::{delete, get, post, put};

pub use self::request::BODY_BYTES_MAX;
use super::error::ApiError;
use super::gate::Gate;
use super::types::ErrorKind;

/// What every handler gets.
type Shared = State<Arc<Gate>>;

/// All routes of the control socket.
pub fn router(gate: Arc<Gate>) -> Router {
    Router::new()
        .route("/v1/status", get(status::status))
        .route("/v1/stats", get(status::show_stats))
        .route(
            "/v1/volumes",
            get(volumes::list_volumes).post(volumes::create_volume),
        )
        .route(
            "/v1/volumes/{name}",
            get(volumes::show_volume)
                .patch(volumes::change_volume)
                .delete(volumes::delete_volume),
        )
        .route(
            "/v1/volumes/{name}/attachment",
            put(volumes::attach_volume).delete(volumes::detach_volume),
        )
        .route("/v1/volumes/{name}/flatten", post(volumes::flatten_volume))
        .route("/v1/volumes/{name}/recover", post(volumes::recover_volume))
        .route(
            "/v1/volumes/{name}/restore",
            post(snapshots::restore_volume),
        )
        .route("/v1/imports", post(volumes::import_image))
        .route("/v1/usage", get(volumes::show_usage))
        .route(
            "/v1/snapshots",
            get(snapshots::list_snapshots).post(snapshots::create_snapshot),
        )
        .route(
            "/v1/snapshots/{volume}/{snapshot}",
            delete(snapshots::delete_snapshot),
        )
        .route("/v1/tree", get(snapshots::show_tree))
        .route("/v1/diff", get(snapshots::show_diff))
        .route("/v1/jobs", get(jobs::list_jobs))
        .route("/v1/jobs/{id}", get(jobs::show_job).patch(jobs::change_job))
        .route("/v1/jobs/{id}/pause", post(jobs::pause_job))
        .route("/v1/jobs/{id}/resume", post(jobs::resume_job))
        .route("/v1/jobs/{id}/cancel", post(jobs::cancel_job))
        .route("/v1/scrubs", post(jobs::scrub))
        .route("/v1/events", get(status::stream_events))
        .route("/v1/openapi.json", get(status::show_openapi))
        .route("/metrics", get(status::show_metrics))
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_method)
        .with_state(gate)
}

/// A path that no route has.
async fn no_such_route(method: Method, uri: Uri) -> ApiError {
    let message = format!("no route {method} {}; see /v1/openapi.json", uri.path());
    ApiError::new(StatusCode::NOT_FOUND, ErrorKind::NotFound, message)
}

/// A route without this method.
async fn no_such_method(method: Method, uri: Uri) -> ApiError {
    let message = format!(
        "{} does not take {method}; see /v1/openapi.json",
        uri.path()
    );
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, ErrorKind::Invalid, message)
}
