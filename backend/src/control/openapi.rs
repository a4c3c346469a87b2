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
                       snapshots, and jobs. For example: curl --unix-socket STORE/control.sock http://localhost/v1/volumes"
    ),
    paths(
        routes::status::status,
        routes::status::show_stats,
        routes::volumes::list_volumes,
        routes::volumes::create_volume,
        routes::volumes::show_volume,
        routes::volumes::change_volume,
        routes::volumes::delete_volume,
        routes::volumes::attach_volume,
        routes::volumes::detach_volume,
        routes::volumes::flatten_volume,
        routes::volumes::recover_volume,
        routes::volumes::import_image,
        routes::volumes::show_usage,
        routes::snapshots::list_snapshots,
        routes::snapshots::create_snapshot,
        routes::snapshots::restore_volume,
        routes::snapshots::delete_snapshot,
        routes::snapshots::show_tree,
        routes::snapshots::show_diff,
        routes::jobs::list_jobs,
        routes::jobs::show_job,
        routes::jobs::change_job,
        routes::jobs::pause_job,
        routes::jobs::resume_job,
        routes::jobs::cancel_job,
        routes::jobs::scrub,
        routes::status::stream_events,
        routes::status::show_openapi,
        routes::status::show_metrics,
    ),
    components(schemas(Event))
)]
pub struct ApiDoc;
