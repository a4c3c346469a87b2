//! The routes of the control socket: from HTTP to a command and back, and nothing else.
//!
//! Every request with a fault gets a JSON error that names the field and the fix; none changes anything.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request, State};
use axum::http::request::Parts;
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::sse::{self, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use axum::{Json, Router};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError;
use tokio_stream::{Stream, StreamExt};
use utoipa::OpenApi;

use super::error::{ApiError, Result};
use super::events::{Event, Happening};
use super::gate::Gate;
use super::timestamp::Timestamp;
use super::types::{
    AttachmentRequest, Deleted, ErrorBody, ErrorKind, SnapshotList, SnapshotReport,
    SnapshotRequest, Stats, Status, Tree, Volume, VolumeFilter, VolumeList, VolumeRequest,
};
use super::{metrics, openapi};

/// The largest body of a request.
pub const BODY_BYTES_MAX: usize = 1 << 20;
/// How long a client may take to send a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a quiet event stream shows that it is alive.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// What every handler gets.
type Shared = State<Arc<Gate>>;

/// All routes of the control socket.
pub fn router(gate: Arc<Gate>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/stats", get(show_stats))
        .route("/v1/volumes", get(list_volumes).post(create_volume))
        .route("/v1/volumes/{name}", get(show_volume).delete(delete_volume))
        .route(
            "/v1/volumes/{name}/attachment",
            put(attach_volume).delete(detach_volume),
        )
        .route("/v1/snapshots", get(list_snapshots).post(create_snapshot))
        .route("/v1/tree", get(show_tree))
        .route("/v1/events", get(stream_events))
        .route("/v1/openapi.json", get(show_openapi))
        .route("/metrics", get(show_metrics))
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_method)
        .with_state(gate)
}

/// A body of JSON, read whole within its limits.
struct JsonBody<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request<Body>, _: &S) -> Result<Self> {
        let body = Limited::new(request.into_body(), BODY_BYTES_MAX).collect();
        let body = tokio::time::timeout(BODY_TIMEOUT, body)
            .await
            .map_err(|_| {
                bad_request(
                    StatusCode::REQUEST_TIMEOUT,
                    "the body did not arrive in time",
                )
            })?;
        let bytes = body
            .map_err(|error| {
                if error.downcast_ref::<LengthLimitError>().is_some() {
                    let what = format!("the body is larger than {BODY_BYTES_MAX} bytes");
                    bad_request(StatusCode::PAYLOAD_TOO_LARGE, what)
                } else {
                    bad_request(
                        StatusCode::BAD_REQUEST,
                        format!("the body broke off: {error}"),
                    )
                }
            })?
            .to_bytes();
        parse(&bytes).map(Self)
    }
}

/// The name of a volume in the path of a route.
struct VolumeName(String);

impl<S: Send + Sync> FromRequestParts<S> for VolumeName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(name)) => Ok(Self(name)),
            Err(error) => Err(bad_request(error.status(), error.body_text()).of("name")),
        }
    }
}

/// A request that is at fault as a whole.
fn bad_request(status: StatusCode, message: impl Into<String>) -> ApiError {
    ApiError::new(status, ErrorKind::Invalid, message)
}

/// The value that a JSON text describes, or an error that names the field.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    let mut text = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut text).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        if inner.is_data() {
            let field = if path == "." {
                named_in(&inner.to_string())
            } else {
                path
            };
            ApiError::invalid(&field, inner.to_string())
        } else {
            bad_request(
                StatusCode::BAD_REQUEST,
                format!("the body is not JSON: {inner}"),
            )
        }
    })?;
    text.end().map_err(|error| {
        bad_request(
            StatusCode::BAD_REQUEST,
            format!("the body is more than one JSON value: {error}"),
        )
    })?;
    Ok(value)
}

/// The field that a message of serde is about, if it quotes one ("missing field `name`"); else the body itself.
fn named_in(message: &str) -> String {
    message.split('`').nth(1).unwrap_or("body").to_owned()
}

/// The filter of a query string.
fn filter(query: std::result::Result<Query<VolumeFilter>, QueryRejection>) -> Result<VolumeFilter> {
    match query {
        Ok(Query(filter)) => Ok(filter),
        Err(error) => Err(ApiError::invalid(
            &named_in(&error.body_text()),
            error.body_text(),
        )),
    }
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

/// The daemon: version, process, store.
#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = Status)))]
async fn status(State(gate): Shared) -> Result<Json<Status>> {
    gate.run(|commands| Ok(Json(commands.status()))).await
}

/// What the cache and the volumes have done since the daemon started.
#[utoipa::path(get, path = "/v1/stats", responses((status = 200, body = Stats)))]
async fn show_stats(State(gate): Shared) -> Result<Json<Stats>> {
    gate.run(|commands| Ok(Json(commands.stats()))).await
}

/// All volumes, by name.
#[utoipa::path(get, path = "/v1/volumes", responses((status = 200, body = VolumeList)))]
async fn list_volumes(State(gate): Shared) -> Result<Json<VolumeList>> {
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
async fn create_volume(
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
async fn show_volume(State(gate): Shared, VolumeName(name): VolumeName) -> Result<Json<Volume>> {
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
async fn delete_volume(State(gate): Shared, VolumeName(name): VolumeName) -> Result<Json<Deleted>> {
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
async fn attach_volume(
    State(gate): Shared,
    VolumeName(name): VolumeName,
    JsonBody(request): JsonBody<AttachmentRequest>,
) -> Result<Json<Volume>> {
    gate.run(move |commands| commands.attach(&name, request))
        .await
        .map(Json)
}

/// Stops serving a volume, after what is under way has ended.
#[utoipa::path(delete, path = "/v1/volumes/{name}/attachment", params(("name" = String, Path)), responses(
    (status = 200, body = Volume),
    (status = 404, body = ErrorBody, description = "no such volume, or it is not attached"),
))]
async fn detach_volume(State(gate): Shared, VolumeName(name): VolumeName) -> Result<Json<Volume>> {
    gate.run(move |commands| commands.detach(&name))
        .await
        .map(Json)
}

/// Snapshots of one volume or all, oldest first.
#[utoipa::path(get, path = "/v1/snapshots", params(VolumeFilter), responses(
    (status = 200, body = SnapshotList),
    (status = 404, body = ErrorBody),
))]
async fn list_snapshots(
    State(gate): Shared,
    query: std::result::Result<Query<VolumeFilter>, QueryRejection>,
) -> Result<Json<SnapshotList>> {
    let filter = filter(query)?;
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
async fn create_snapshot(
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
async fn show_tree(
    State(gate): Shared,
    query: std::result::Result<Query<VolumeFilter>, QueryRejection>,
) -> Result<Json<Tree>> {
    let filter = filter(query)?;
    gate.run(move |commands| commands.tree(filter.volume.as_deref()))
        .await
        .map(Json)
}

/// What happens from now on, as server-sent events.
#[utoipa::path(get, path = "/v1/events", responses(
    (status = 200, body = Event, content_type = "text/event-stream"),
    (status = 503, body = ErrorBody, description = "too many listen already"),
))]
async fn stream_events(
    State(gate): Shared,
) -> Result<Sse<impl Stream<Item = std::result::Result<sse::Event, Infallible>>>> {
    let listener = gate.commands().events().listen().ok_or_else(|| {
        ApiError::unavailable("too many listen to events already; close one of them")
    })?;
    let stream = BroadcastStream::new(listener).map(|received| {
        let event = received.unwrap_or_else(|BroadcastStreamRecvError::Lagged(count)| Event {
            // Stands in the place of the lost ones and has no number of its own.
            id: 0,
            time: Timestamp::now(),
            what: Happening::Missed { count },
        });
        let sent = sse::Event::default()
            .id(event.id.to_string())
            .event(event.what.name());
        Ok(sent.json_data(&event).unwrap_or_else(|error| {
            sse::Event::default().comment(format!("an event could not be encoded: {error}"))
        }))
    });
    Ok(Sse::new(stream).keep_alive(sse::KeepAlive::new().interval(KEEP_ALIVE)))
}

/// This description.
#[utoipa::path(get, path = "/v1/openapi.json", responses((status = 200)))]
async fn show_openapi() -> Response {
    Json(openapi::ApiDoc::openapi()).into_response()
}

/// Counters and gauges for Prometheus.
#[utoipa::path(get, path = "/metrics", responses((status = 200, body = String, content_type = "text/plain")))]
async fn show_metrics(State(gate): Shared) -> Result<Response> {
    let text = gate.run(|commands| {
        Ok(metrics::text(
            &commands.status(),
            &commands.cache(),
            &commands.volumes().volumes,
        ))
    });
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text.await?).into_response())
}
