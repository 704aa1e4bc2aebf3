//! Whether this process lives, and whether devices should be sent to it.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::Ingest;
use crate::http::problem::{Kind, Problem};

/// The state of a process that can take photos.
#[derive(Serialize, utoipa::ToSchema)]
pub struct Ready {
    /// `ready`, or `degraded` while the queue is away: photos are taken all the same, and queued when it is back.
    #[schema(example = "ready")]
    status: &'static str,
    /// Why it is degraded.
    reason: Option<String>,
}

/// The process runs
#[utoipa::path(get, path = "/livez", tag = "health", responses((status = 200, description = "It lives")))]
pub async fn livez() -> &'static str {
    "ok\n"
}

/// The process can take photos
///
/// S3 being down does not matter here: photos wait on the disk.
#[utoipa::path(get, path = "/readyz", tag = "health", responses(
    (status = 200, description = "Send photos", body = Ready),
    (status = 503, description = "Send them elsewhere", body = crate::http::problem::ProblemBody, content_type = "application/problem+json"),
))]
pub async fn readyz(State(ingest): State<Ingest>) -> Response {
    if ingest.stopping.is_cancelled() {
        return Problem::new(Kind::Stopping, "this process is stopping").into_response();
    }
    if let Err(error) = ingest.spool.refusing() {
        let kind = if matches!(error, crate::error::Error::Full(_)) { Kind::SpoolFull } else { Kind::Unavailable };
        return Problem::new(kind, error.to_string()).into_response();
    }
    let ready = match ingest.queue.check().await {
        Ok(()) => Ready { status: "ready", reason: None },
        Err(error) => Ready { status: "degraded", reason: Some(error.to_string()) },
    };
    (StatusCode::OK, Json(ready)).into_response()
}
