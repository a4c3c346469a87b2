//! The description of the control API in OpenAPI, generated from the routes and their types.

use utoipa::OpenApi;

use super::events::Event;
use super::routes;

/// Collects the routes; their types come along.
#[derive(Debug, OpenApi)]
#[openapi(
    info(
        title = "stratablk control API",
        description = "HTTP/1.1 with JSON over the daemon's Unix socket: volumes, their attachments to virtual machines, \
                       and snapshots. For example: curl --unix-socket STORE/control.sock http://localhost/v1/volumes"
    ),
    paths(
        routes::status,
        routes::show_stats,
        routes::list_volumes,
        routes::create_volume,
        routes::show_volume,
        routes::delete_volume,
        routes::attach_volume,
        routes::detach_volume,
        routes::list_snapshots,
        routes::create_snapshot,
        routes::show_tree,
        routes::stream_events,
        routes::show_openapi,
        routes::show_metrics,
    ),
    components(schemas(Event))
)]
pub struct ApiDoc;
