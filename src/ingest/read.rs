//! Lists of uploads, one upload, and its photo while it is on disk.

use std::collections::BTreeMap;

use axum::Json;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use tokio_util::io::ReaderStream;

use super::Ingest;
use crate::error::Error;
use crate::http::problem::{Kind, Problem};
use crate::queue::{Cursor, Filter, PAGE_RECORDS_MAX, Record};
use crate::units::UnixMs;
use crate::upload::UploadId;

/// Records on a page, unless the request says how many.
const PAGE_RECORDS_DEFAULT: u32 = 50;

/// An upload and how far it has come.
#[derive(Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct UploadView {
    pub id: String,
    pub device_id: String,
    /// The device's own id for this photo.
    pub upload_id: Option<String>,
    pub object_key: String,
    pub size_bytes: u64,
    pub sha256: String,
    pub content_type: String,
    pub filename: Option<String>,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub captured_at: Option<UnixMs>,
    pub priority: String,
    pub metadata: BTreeMap<String, String>,
    #[schema(value_type = String, format = DateTime)]
    pub received_at: UnixMs,
    /// `queued`, `uploading`, `uploaded`, `dead` or `shed`.
    pub state: String,
    /// How often its upload was begun.
    pub attempts: i32,
    /// How many failures were its own.
    pub failures: i32,
    /// Why it failed last, or was set aside.
    pub reason: Option<String>,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub uploaded_at: Option<UnixMs>,
    /// When its photo left the appliance's disk.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub removed_at: Option<UnixMs>,
}

impl From<Record> for UploadView {
    fn from(record: Record) -> Self {
        let upload = &record.upload;
        UploadView {
            id: upload.id.to_string(),
            device_id: upload.device_id.to_string(),
            upload_id: upload.upload_id.clone(),
            object_key: upload.object_key.clone(),
            size_bytes: upload.size_bytes,
            sha256: upload.sha256.to_string(),
            content_type: upload.content_type.to_string(),
            filename: upload.filename.clone(),
            captured_at: upload.captured_at,
            priority: upload.priority.to_string(),
            metadata: upload.metadata.clone(),
            received_at: upload.received_at,
            state: record.state.to_string(),
            attempts: record.attempt,
            failures: record.failures,
            reason: record.reason,
            uploaded_at: record.uploaded_at,
            removed_at: record.removed_at,
        }
    }
}

/// One page of uploads.
#[derive(Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct UploadPage {
    pub uploads: Vec<UploadView>,
    /// Give it back as `cursor` for the page after this one; none on the last.
    pub next_cursor: Option<String>,
}

/// What a list is asked for.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ListQuery {
    /// Records on the page, 1 to 500; 50 if not given.
    limit: Option<String>,
    /// Where the page before ended.
    cursor: Option<String>,
    /// Only uploads in this state.
    state: Option<String>,
    /// Only uploads of this device.
    device_id: Option<String>,
}

/// List uploads, newest first
#[utoipa::path(get, path = "/v1/uploads", tag = "uploads", params(ListQuery), responses(
    (status = 200, description = "A page", body = UploadPage),
    (status = 400, description = "A parameter is not valid", body = crate::http::problem::ProblemBody, content_type = "application/problem+json"),
))]
pub async fn list(
    State(ingest): State<Ingest>,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Json<UploadPage>, Problem> {
    let Query(query) = query.map_err(|rejection| Problem::new(Kind::InvalidField, rejection.body_text()))?;
    let invalid =
        |name: &'static str| move |wrong: String| Problem::new(Kind::InvalidField, format!("{name}: {wrong}"));
    let given = |text: Option<String>| text.filter(|text| !text.is_empty());
    let limit = match given(query.limit) {
        None => PAGE_RECORDS_DEFAULT,
        Some(text) => text
            .parse()
            .ok()
            .filter(|limit| (1..=PAGE_RECORDS_MAX).contains(limit))
            .ok_or_else(|| invalid("limit")(format!("expected 1 to {PAGE_RECORDS_MAX}, found {text:?}")))?,
    };
    let after = match given(query.cursor) {
        None => Cursor::START,
        Some(text) => cursor_of(&text)
            .ok_or_else(|| invalid("cursor")("expected the next_cursor of the page before".to_owned()))?,
    };
    let filter = Filter {
        device_id: given(query.device_id).map(|text| text.parse()).transpose().map_err(invalid("device_id"))?,
        state: given(query.state).map(|text| text.parse()).transpose().map_err(invalid("state"))?,
    };
    let records = ingest.queue.list(&filter, after, limit).await.map_err(away)?;
    let next_cursor = (records.len() == limit as usize).then(|| records.last().map(cursor_text)).flatten();
    Ok(Json(UploadPage { uploads: records.into_iter().map(UploadView::from).collect(), next_cursor }))
}

/// One upload
#[utoipa::path(get, path = "/v1/uploads/{id}", tag = "uploads", params(("id" = String, Path)), responses(
    (status = 200, description = "The upload and how far it has come", body = UploadView),
    (status = 404, description = "No such upload", body = crate::http::problem::ProblemBody, content_type = "application/problem+json"),
))]
pub async fn one(State(ingest): State<Ingest>, Path(id): Path<String>) -> Result<Json<UploadView>, Problem> {
    record(&ingest, &id).await.map(|record| Json(record.into()))
}

/// The photo, while it is on the appliance's disk
#[utoipa::path(get, path = "/v1/uploads/{id}/image", tag = "uploads", params(("id" = String, Path)), responses(
    (status = 200, description = "The photo as it was sent", body = Vec<u8>, content_type = "image/*"),
    (status = 404, description = "No such upload, or its photo is in S3 only",
        body = crate::http::problem::ProblemBody, content_type = "application/problem+json"),
))]
pub async fn image(State(ingest): State<Ingest>, Path(id): Path<String>) -> Result<Response, Problem> {
    let Record { upload, state, .. } = record(&ingest, &id).await?;
    let photo = ingest.spool.stream(upload.clone()).await.map_err(|error| match error {
        Error::Missing(_) if state == crate::upload::State::Shed => {
            Problem::new(Kind::NotFound, "the photo was given up when the disk was full")
        }
        Error::Missing(_) => Problem::new(
            Kind::NotFound,
            format!("the photo is no longer on this disk; it is in the bucket as {}", upload.object_key),
        ),
        other => away(other),
    })?;
    let headers = [
        (header::CONTENT_TYPE, upload.content_type.as_str().to_owned()),
        (header::CONTENT_LENGTH, upload.size_bytes.to_string()),
        (header::ETAG, format!("\"{}\"", upload.sha256)),
        // the type was told by the bytes; a browser must not guess another
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
    ];
    Ok((headers, Body::from_stream(ReaderStream::new(photo))).into_response())
}

async fn record(ingest: &Ingest, id: &str) -> Result<Record, Problem> {
    let missing = || Problem::new(Kind::NotFound, format!("there is no upload {id}"));
    let id: UploadId = id.parse().map_err(|_| missing())?;
    ingest.queue.get(id).await.map_err(away)?.ok_or_else(missing)
}

fn away(error: Error) -> Problem {
    tracing::warn!(%error, "a device's question was not answered");
    Problem::new(Kind::Unavailable, "the queue cannot be asked now; photos are accepted all the same")
}

fn cursor_text(record: &Record) -> String {
    format!("{:x}.{}", record.upload.received_at.0, record.upload.id.0.simple())
}

fn cursor_of(text: &str) -> Option<Cursor> {
    let (received_at, id) = text.split_once('.')?;
    Some(Cursor { received_at: UnixMs(i64::from_str_radix(received_at, 16).ok()?), id: id.parse().ok()? })
}
