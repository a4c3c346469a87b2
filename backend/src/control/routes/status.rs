//! Routes of the daemon itself: what it is, what it has done, what happens in it.

use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::sse::{self, Sse};
use axum::response::{IntoResponse, Response};
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError;
use tokio_stream::{Stream, StreamExt};
use utoipa::OpenApi;

use super::super::error::{ApiError, Result};
use super::super::events::{Event, Happening};
use super::super::timestamp::Timestamp;
use super::super::types::{ErrorBody, Stats, Status};
use super::super::{metrics, openapi};
use super::Shared;

/// How often a quiet event stream shows that it is alive.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The daemon: version, process, store.
#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = Status)))]
pub async fn status(State(gate): Shared) -> Result<Json<Status>> {
    gate.run(|commands| Ok(Json(commands.status()))).await
}

/// What the cache and the volumes have done since the daemon started.
#[utoipa::path(get, path = "/v1/stats", responses((status = 200, body = Stats)))]
pub async fn show_stats(State(gate): Shared) -> Result<Json<Stats>> {
    gate.run(|commands| Ok(Json(commands.stats()))).await
}

/// What happens from now on, as server-sent events.
#[utoipa::path(get, path = "/v1/events", responses(
    (status = 200, body = Event, content_type = "text/event-stream"),
    (status = 503, body = ErrorBody, description = "too many listen already"),
))]
pub async fn stream_events(
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
pub async fn show_openapi() -> Response {
    Json(openapi::ApiDoc::openapi()).into_response()
}

/// Counters and gauges for Prometheus.
#[utoipa::path(get, path = "/metrics", responses((status = 200, body = String, content_type = "text/plain")))]
pub async fn show_metrics(State(gate): Shared) -> Result<Response> {
    let text = gate.run(|commands| {
        Ok(metrics::text(
            &commands.status(),
            &commands.cache(),
            &commands.volumes().volumes,
            &commands.jobs().jobs,
        ))
    });
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text.await?).into_response())
}
