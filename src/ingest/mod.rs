//! The devices' listener: takes photos, lists them, gives them back.
//!
//! Always: stateless, so that any number of replicas serve one spool and one queue; an answer that says yes is true.
//! Never: a look at the bucket. S3 being down is no concern of a device.

mod accept;
mod admission;
pub mod body; // public for whoever counts its instructions
pub mod digests; // and this too
mod health;
mod openapi;
mod read;
mod refusals;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, Span};

use self::admission::Admission;
use self::body::{Incoming, Photo};
use self::digests::Digests;
use self::refusals::Refusals;
use crate::config::Config;
use crate::http::problem::{Kind, Problem, method_not_allowed, not_found};
use crate::queue::{Queue, Record};
use crate::spool::Spool;
use crate::telemetry;
use crate::units::UnixMs;
use crate::upload::KeyTemplate;

/// Everything a request needs. Cheap to clone.
#[derive(Clone)]
pub struct Ingest {
    spool: Spool,
    queue: Queue,
    admission: Admission,
    digests: Digests,
    keys: Arc<KeyTemplate>,
    upload_bytes_max: usize,
    body_timeout: Duration,
    refusals: Arc<Refusals>,
    stopping: CancellationToken,
    /// Acceptances under way, whether or not their devices still wait for them.
    accepting: TaskTracker,
}

impl Ingest {
    /// `stopping` makes the readiness check say no.
    pub fn new(config: &Config, spool: Spool, queue: Queue, stopping: CancellationToken) -> Self {
        Ingest {
            admission: Admission::new(spool.clone()),
            digests: Digests::of_this_processor(),
            spool,
            queue,
            keys: Arc::new(config.keys.clone()),
            upload_bytes_max: config.upload_max.0 as usize,
            body_timeout: config.body_timeout,
            refusals: Arc::new(Refusals::new()),
            stopping,
            accepting: TaskTracker::new(),
        }
    }

    /// The acceptances under way: a process that stops waits for them, as some go on when their devices have hung up.
    pub fn accepting(&self) -> TaskTracker {
        self.accepting.clone()
    }

    /// The device API.
    pub fn router(self) -> Router {
        Router::new()
            .route("/", post(upload))
            .route("/v1/uploads", post(upload).get(read::list))
            .route("/list", get(read::list))
            .route("/v1/uploads/{id}", get(read::one))
            .route("/v1/uploads/{id}/image", get(read::image))
            .route("/livez", get(health::livez))
            .route("/readyz", get(health::readyz))
            .merge(openapi::router())
            .fallback(not_found)
            .method_not_allowed_fallback(method_not_allowed)
            .with_state(self)
    }
}

/// The answer to an accepted upload.
#[derive(Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct UploadAnswer {
    /// The appliance's id of this upload.
    #[schema(value_type = String, example = "01936f0e-7b1c-7e3a-9d2f-0c4b8a6d5e1f")]
    pub id: crate::upload::UploadId,
    #[schema(value_type = String, example = "cam-0001")]
    pub device_id: crate::upload::DeviceId,
    /// Where the photo will be in the bucket.
    #[schema(example = "cam-0001/2026/11/21/01936f0e-7b1c-7e3a-9d2f-0c4b8a6d5e1f.jpg")]
    pub object_key: String,
    pub size_bytes: u64,
    /// Hex.
    #[schema(value_type = String)]
    pub sha256: crate::upload::Sha256,
    #[schema(value_type = String, example = "queued")]
    pub state: crate::upload::State,
    #[schema(value_type = String, format = DateTime)]
    pub received_at: UnixMs,
}

impl From<&Record> for UploadAnswer {
    fn from(record: &Record) -> Self {
        let upload = &record.upload;
        UploadAnswer {
            id: upload.id,
            device_id: upload.device_id.clone(),
            object_key: upload.object_key.clone(),
            size_bytes: upload.size_bytes,
            sha256: upload.sha256,
            state: record.state,
            received_at: upload.received_at,
        }
    }
}

/// Take a photo
///
/// Answers 201 only after the photo and its record would survive a power cut, and 200 with the same body when the upload is
/// already held. A device that gives each photo an `upload_id` may send it again as often as it likes.
#[utoipa::path(
    post, path = "/v1/uploads", tag = "uploads",
    params(
        ("X-Device-Id" = Option<String>, Header, description = "The device, where the body does not say it"),
        ("Idempotency-Key" = Option<String>, Header, description = "The upload_id, where the body does not say it"),
        ("Content-Digest" = Option<String>, Header, description = "sha-256=:base64: of a raw photo (RFC 9530), checked"),
    ),
    request_body(content(
        (openapi::JsonUpload = "application/json"),
        (openapi::FormUpload = "multipart/form-data"),
        (Vec<u8> = "image/*"),
    )),
    responses(
        (status = 201, description = "Durable; it will be in S3 under object_key", body = UploadAnswer,
            headers(("Location" = String, description = "The upload's own address"))),
        (status = 200, description = "Already held", body = UploadAnswer),
        (status = "4XX", description = "Sending the same again will not help, 408 apart",
            body = crate::http::problem::ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "Send it again after Retry-After seconds",
            body = crate::http::problem::ProblemBody, content_type = "application/problem+json"),
    )
)]
async fn upload(State(ingest): State<Ingest>, request: Request) -> Response {
    let began = Instant::now();
    let span = tracing::info_span!("ingest", upload = tracing::field::Empty, device = tracing::field::Empty);
    if let Some(parent) = request.headers().get("traceparent").and_then(|value| value.to_str().ok()) {
        telemetry::continue_trace(&span, parent);
    }
    let response = match receive(&ingest, request, &span).await {
        Ok(response) => {
            ingest.refusals.taken();
            response
        }
        Err(problem) => {
            let _in_span = span.enter();
            ingest.refusals.refused(&problem);
            problem.into_response()
        }
    };
    telemetry::metrics().answered(response.status().as_u16(), began.elapsed().as_secs_f64());
    response
}

/// Nothing is logged before the photo is all there, so only then `span` is entered, and not anew for each piece.
async fn receive(ingest: &Ingest, request: Request, span: &Span) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    let mut incoming = Incoming::new(body, ingest.body_timeout);
    let read = async {
        let kind = body::check_head(&parts, ingest.upload_bytes_max)?;
        let declared =
            parts.headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok()).unwrap_or(0);
        let room = ingest.admission.admit(declared)?;
        let photo = Photo::new(ingest.upload_bytes_max, Some(room));
        let photo = photo.digested_as_it_comes(ingest.digests.on_the_way(declared));
        body::read(&kind, &parts, &mut incoming, photo).await
    }
    .await;
    let (fields, photo) = match read {
        Ok(read) => read,
        Err(problem) => {
            if problem.kind != Kind::BodyTooSlow {
                tokio::spawn(incoming.discard());
            }
            return Err(problem);
        }
    };
    let accepted = accept::accept(ingest, fields, photo).instrument(span.clone()).await?;
    let upload = &accepted.record.upload;
    let status = if accepted.new { StatusCode::CREATED } else { StatusCode::OK };
    if accepted.new {
        telemetry::metrics().acknowledged(upload.size_bytes);
    }
    let _in_span = span.enter();
    tracing::debug!(status = status.as_u16(), size_bytes = upload.size_bytes, "acknowledged");
    let mut response = (status, axum::Json(UploadAnswer::from(&accepted.record))).into_response();
    if let Ok(location) = HeaderValue::try_from(format!("/v1/uploads/{}", upload.id)) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Ok(response)
}
