//! The operator's listener: status, metrics and the rate of the whole site, from any process.
//!
//! Always: on an address of its own, apart from the devices'. Never: work of its own for each viewer of
//! the status; all see one snapshot.

mod rate;
mod snapshot;

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, State};
use axum::http::{StatusCode, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use tokio::sync::watch;

pub use self::snapshot::{Parts, start as start_snapshots};
use crate::allowance::Uplink;
use crate::http::problem::{Kind, Problem, method_not_allowed, not_found};
use crate::queue::Queue;
use crate::status::Status;
use crate::telemetry;

#[derive(Clone)]
struct Console {
    snapshots: watch::Receiver<Arc<Status>>,
    queue: Queue,
    uplink: Uplink,
    registry: Option<prometheus::Registry>,
}

/// The operator's API. Without a registry there are no metrics.
pub fn router(
    snapshots: watch::Receiver<Arc<Status>>,
    queue: Queue,
    uplink: Uplink,
    registry: Option<prometheus::Registry>,
) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/status", get(status))
        .route("/metrics", get(metrics))
        .route("/rate", get(rate::show).put(rate::set).delete(rate::clear))
        .route("/pause", post(rate::pause))
        .route("/resume", post(rate::resume))
        .route("/livez", get(async || "ok\n"))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn(rate::from_no_page))
        .layer(DefaultBodyLimit::max(rate::BODY_BYTES_MAX))
        .with_state(Console { snapshots, queue, uplink, registry })
}

/// The snapshot as text.
async fn page(State(console): State<Console>) -> String {
    format!("{}\n", console.snapshots.borrow().as_ref())
}

async fn status(State(console): State<Console>) -> Json<Arc<Status>> {
    Json(console.snapshots.borrow().clone())
}

async fn metrics(State(console): State<Console>) -> Response {
    let Some(registry) = &console.registry else {
        return Problem::new(Kind::NotFound, "this process keeps no metrics").into_response();
    };
    match telemetry::encode(registry) {
        Ok(text) => (StatusCode::OK, [(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "the metrics cannot be shown");
            Problem::new(Kind::Internal, "the metrics cannot be shown; see the log").into_response()
        }
    }
}
