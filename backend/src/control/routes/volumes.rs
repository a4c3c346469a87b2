//! Routes of volumes and their attachments.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::super::error::Result;
use super::super::types::{
    AttachmentRequest, Deleted, DetachQuery, Detached, ErrorBody, Import, ImportRequest, Job,
    JobOptions, Recovered, UsageList, Volume, VolumeChange, VolumeFilter, VolumeList,
    VolumeRequest,
};
use super::Shared;
use super::request::{JsonBody, JsonOrNothing, QueryOf, VolumeName};

/// All volumes, by name.
#[utoipa::path(get, path = "/v1/volumes", responses((status = 200, body = VolumeList)))]
pub async fn list_volumes(State(gate): Shared) -> Result<Json<VolumeList>> {
    gate.run(|commands| Ok(Json(commands.volumes()))).await
}

/// Creates a volume: empty, over a raw image, or from a snapshot.
#[utoipa::path(post, path = "/v1/volumes", request_body = VolumeRequest, responses(
    (status = 201, body = Volume),
    (status = 404, body = ErrorBody, description = "no such volume or snapshot to start from"),
    (status = 409, body = ErrorBody, description = "the name is taken"),
    (status = 422, body = ErrorBody, description = "a field cannot be as it is"),
    (status = 507, body = ErrorBody, description = "the host has no space left"),
))]
pub async fn create_volume(
    State(gate): Shared,
    JsonBody(request): JsonBody<VolumeRequest>,
) -> Result<(StatusCode, Json<Volume>)> {
    let volume = gate.run(|commands| commands.create_volume(request)).await?;
    Ok((StatusCode::CREATED, Json(volume)))
}

/// One volume.
#[utoipa::path(get, path = "/v1/volumes/{name}", params(("name" = String, Path)), responses(
    (status = 200, body = Volume),
    (status = 404, body = ErrorBody),
))]
pub async fn show_volume(
    State(gate): Shared,
    VolumeName(name): VolumeName,
) -> Result<Json<Volume>> {
    gate.run(move |commands| commands.volume(&name))
        .await
        .map(Json)
}

/// Deletes a volume with its snapshots.
#[utoipa::path(delete, path = "/v1/volumes/{name}", params(("name" = String, Path)), responses(
    (status = 200, body = Deleted),
    (status = 404, body = ErrorBody),
    (status = 409, body = ErrorBody, description = "it is attached"),
))]
pub async fn delete_volume(
    State(gate): Shared,
    VolumeName(name): VolumeName,
) -> Result<Json<Deleted>> {
    gate.run(move |commands| commands.delete_volume(&name))
        .await
        .map(Json)
}

/// Serves a volume on a vhost-user socket, now and after every restart of the daemon.
#[utoipa::path(put, path = "/v1/volumes/{name}/attachment", params(("name" = String, Path)),
    request_body = AttachmentRequest, responses(
    (status = 200, body = Volume),
    (status = 404, body = ErrorBody),
    (status = 409, body = ErrorBody, description = "the volume or the socket is in use"),
    (status = 422, body = ErrorBody, description = "a field cannot be as it is"),
))]
pub async fn attach_volume(
    State(gate): Shared,
    VolumeName(name): VolumeName,
    JsonBody(request): JsonBody<AttachmentRequest>,
) -> Result<Json<Volume>> {
    gate.run(move |commands| commands.attach(&name, request))
        .await
        .map(Json)
}

/// Stops serving a volume, after what is under way has ended.
#[utoipa::path(delete, path = "/v1/volumes/{name}/attachment", params(("name" = String, Path), DetachQuery), responses(
    (status = 200, body = Detached),
    (status = 404, body = ErrorBody, description = "no such volume, or it is not attached"),
    (status = 409, body = ErrorBody, description = "the name to keep it as is taken"),
))]
pub async fn detach_volume(
    State(gate): Shared,
    VolumeName(name): VolumeName,
    QueryOf(query): QueryOf<DetachQuery>,
) -> Result<Json<Detached>> {
    gate.run(move |commands| commands.detach(&name, query))
        .await
        .map(Json)
}

/// Changes the type of a volume, or its size.
#[utoipa::path(patch, path = "/v1/volumes/{name}", params(("name" = String, Path)), request_body = VolumeChange, responses(
    (status = 200, body = Volume),
    (status = 404, body = ErrorBody),
    (status = 409, body = ErrorBody, description = "it is in use"),
    (status = 422, body = ErrorBody, description = "a field cannot be as it is"),
))]
pub async fn change_volume(
    State(gate): Shared,
    VolumeName(name): VolumeName,
    JsonBody(change): JsonBody<VolumeChange>,
) -> Result<Json<Volume>> {
    gate.run(move |commands| commands.change_volume(&name, change))
        .await
        .map(Json)
}

/// Makes a volume independent of all layers below its active one, as a job.
#[utoipa::path(post, path = "/v1/volumes/{name}/flatten", params(("name" = String, Path)), request_body = JobOptions, responses(
    (status = 202, body = Job),
    (status = 404, body = ErrorBody),
    (status = 409, body = ErrorBody, description = "it is being flattened already"),
))]
pub async fn flatten_volume(
    State(gate): Shared,
    VolumeName(name): VolumeName,
    JsonOrNothing(options): JsonOrNothing<JobOptions>,
) -> Result<(StatusCode, Json<Job>)> {
    let job = gate
        .run(move |commands| commands.flatten(&name, options))
        .await?;
    Ok((StatusCode::ACCEPTED, Json(job)))
}

/// Lets a volume that has failed take writes again: what it holds since its last snapshot is written once more and synced.
#[utoipa::path(post, path = "/v1/volumes/{name}/recover", params(("name" = String, Path)), responses(
    (status = 200, body = Recovered),
    (status = 404, body = ErrorBody),
    (status = 409, body = ErrorBody, description = "it is in use"),
    (status = 422, body = ErrorBody, description = "it has not failed"),
    (status = 500, body = ErrorBody, description = "the host has failed again; nothing has changed"),
))]
pub async fn recover_volume(
    State(gate): Shared,
    VolumeName(name): VolumeName,
) -> Result<Json<Recovered>> {
    gate.run(move |commands| commands.recover(&name))
        .await
        .map(Json)
}

/// Creates a volume with the content of a raw image. It can be used at once; a job makes it independent of the image.
#[utoipa::path(post, path = "/v1/imports", request_body = ImportRequest, responses(
    (status = 202, body = Import),
    (status = 409, body = ErrorBody, description = "the name is taken"),
    (status = 422, body = ErrorBody, description = "a field cannot be as it is"),
    (status = 507, body = ErrorBody, description = "the host has no space left"),
))]
pub async fn import_image(
    State(gate): Shared,
    JsonBody(request): JsonBody<ImportRequest>,
) -> Result<(StatusCode, Json<Import>)> {
    let import = gate.run(|commands| commands.import(request)).await?;
    Ok((StatusCode::ACCEPTED, Json(import)))
}

/// What volumes take on the host.
#[utoipa::path(get, path = "/v1/usage", params(VolumeFilter), responses(
    (status = 200, body = UsageList),
    (status = 404, body = ErrorBody),
))]
pub async fn show_usage(
    State(gate): Shared,
    QueryOf(filter): QueryOf<VolumeFilter>,
) -> Result<Json<UsageList>> {
    gate.run(move |commands| commands.usage(filter.volume.as_deref()))
        .await
        .map(Json)
}
