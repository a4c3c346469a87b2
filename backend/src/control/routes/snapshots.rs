//! Routes of snapshots, of the tree that they make, and of what differs between them.

use std::convert::Infallible;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::super::error::Result;
use super::super::types::{
    DeleteQuery, DeleteReport, DiffLine, DiffQuery, ErrorBody, RestoreReport, RestoreRequest,
    SnapshotList, SnapshotReport, SnapshotRequest, Tree, VolumeFilter,
};
use super::Shared;
use super::request::{JsonBody, QueryOf, SnapshotName, VolumeName};

/// Lines of a comparison that are sent as one piece.
const DIFF_LINES: usize = 1024;

/// Snapshots of one volume or all, oldest first.
#[utoipa::path(get, path = "/v1/snapshots", params(VolumeFilter), responses(
    (status = 200, body = SnapshotList),
    (status = 404, body = ErrorBody),
))]
pub async fn list_snapshots(
    State(gate): Shared,
    QueryOf(filter): QueryOf<VolumeFilter>,
) -> Result<Json<SnapshotList>> {
    gate.run(move |commands| commands.snapshots(filter.volume.as_deref()))
        .await
        .map(Json)
}

/// Takes a snapshot of one or more volumes, all at one instant, while their guests run.
#[utoipa::path(post, path = "/v1/snapshots", request_body = SnapshotRequest, responses(
    (status = 201, body = SnapshotReport),
    (status = 404, body = ErrorBody),
    (status = 409, body = ErrorBody, description = "a volume has a snapshot of that name"),
    (status = 422, body = ErrorBody, description = "a field cannot be as it is"),
    (status = 507, body = ErrorBody, description = "the host has no space left"),
))]
pub async fn create_snapshot(
    State(gate): Shared,
    JsonBody(request): JsonBody<SnapshotRequest>,
) -> Result<(StatusCode, Json<SnapshotReport>)> {
    let report = gate.run(|commands| commands.snapshot(request)).await?;
    Ok((StatusCode::CREATED, Json(report)))
}

/// The layers of the store or of one volume, parents before children.
#[utoipa::path(get, path = "/v1/tree", params(VolumeFilter), responses(
    (status = 200, body = Tree),
    (status = 404, body = ErrorBody),
))]
pub async fn show_tree(
    State(gate): Shared,
    QueryOf(filter): QueryOf<VolumeFilter>,
) -> Result<Json<Tree>> {
    gate.run(move |commands| commands.tree(filter.volume.as_deref()))
        .await
        .map(Json)
}

/// Makes a volume hold what a snapshot of it holds, while no guest uses it.
#[utoipa::path(post, path = "/v1/volumes/{name}/restore", params(("name" = String, Path)), request_body = RestoreRequest,
    responses(
    (status = 200, body = RestoreReport),
    (status = 404, body = ErrorBody, description = "no such volume or snapshot"),
    (status = 409, body = ErrorBody, description = "a guest uses it, or the name to keep it under is taken"),
    (status = 422, body = ErrorBody, description = "a field cannot be as it is"),
    (status = 507, body = ErrorBody, description = "the host has no space left"),
))]
pub async fn restore_volume(
    State(gate): Shared,
    VolumeName(name): VolumeName,
    JsonBody(request): JsonBody<RestoreRequest>,
) -> Result<Json<RestoreReport>> {
    gate.run(move |commands| commands.restore(&name, request))
        .await
        .map(Json)
}

/// Deletes a snapshot, or says what that would cost. Its name is gone on return; jobs see to its data.
#[utoipa::path(delete, path = "/v1/snapshots/{volume}/{snapshot}",
    params(("volume" = String, Path), ("snapshot" = String, Path), DeleteQuery), responses(
    (status = 200, body = DeleteReport),
    (status = 404, body = ErrorBody, description = "no such volume or snapshot"),
    (status = 409, body = ErrorBody, description = "something else needs it as it is"),
    (status = 422, body = ErrorBody, description = "a field cannot be as it is"),
))]
pub async fn delete_snapshot(
    State(gate): Shared,
    SnapshotName { volume, snapshot }: SnapshotName,
    QueryOf(query): QueryOf<DeleteQuery>,
) -> Result<Json<DeleteReport>> {
    gate.run(move |commands| commands.delete_snapshot(&volume, &snapshot, query))
        .await
        .map(Json)
}

/// The ranges that may differ between two points, one JSON object a line.
#[utoipa::path(get, path = "/v1/diff", params(DiffQuery), responses(
    (status = 200, body = DiffLine, content_type = "application/x-ndjson"),
    (status = 404, body = ErrorBody, description = "no such volume or snapshot"),
    (status = 422, body = ErrorBody, description = "the two have nothing in common, or a field cannot be as it is"),
))]
pub async fn show_diff(
    State(gate): Shared,
    QueryOf(query): QueryOf<DiffQuery>,
) -> Result<Response> {
    let mut lines = gate
        .run(move |commands| commands.diff(&query))
        .await?
        .into_iter();
    // Encoded as they are sent, so that a long list is in memory once.
    let pieces = std::iter::from_fn(move || {
        let mut text = String::new();
        for line in lines.by_ref().take(DIFF_LINES) {
            let DiffLine {
                offset,
                length,
                zero,
            } = line;
            text.push_str(&format!(
                "{{\"offset\":{offset},\"length\":{length},\"zero\":{zero}}}\n"
            ));
        }
        (!text.is_empty()).then_some(Ok::<_, Infallible>(text))
    });
    let body = Body::from_stream(tokio_stream::iter(pieces));
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}
