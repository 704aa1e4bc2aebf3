//! The acceptance of one photo: what was read becomes an upload, durable on disk and in the queue.
//!
//! Always: file, folder, record, answer, in that order; what was begun is finished even when the device hangs up; the same
//! upload again gets the same answer, and other bytes under its id are refused. Never: an answer that says yes before the
//! photo and its record would survive a power cut.

use std::sync::Arc;
use std::time::Duration;

use tracing::{Instrument, Span};

use super::Ingest;
use super::body::{Arrived, Fields, Photo};
use crate::crash_points::{self, Point};
use crate::error::Error;
use crate::http::problem::{Kind, Problem};
use crate::queue::{Accepted, Record};
use crate::spool::{Stored, Unfinished};
use crate::telemetry;
use crate::units::UnixMs;
use crate::upload::{
    DeviceId, FILENAME_BYTES_MAX, ImageType, METADATA_BYTES_MAX, METADATA_ENTRIES_MAX, Priority, Sha256, State,
    UPLOAD_ID_BYTES_MAX, Upload, UploadId,
};

/// The longest that the queue is waited for to take back that an upload is dead.
const REVIVE_TIMEOUT: Duration = Duration::from_secs(2);

/// Accepts one photo. The work goes on when the returned future is dropped.
pub async fn accept(ingest: &Ingest, fields: Fields, photo: Photo) -> Result<Accepted, Problem> {
    let (accepting, ingest) = (ingest.accepting.clone(), ingest.clone());
    let accepted = accepting.spawn(
        async move {
            let Arrived { bytes, head, room } = photo.finish();
            let (bytes, sha256) = ingest.digests.digest(bytes).await?;
            let upload = Arc::new(upload(&ingest, fields, &head, bytes.size_bytes(), sha256)?);
            let span = Span::current();
            span.record("upload", tracing::field::display(upload.id));
            span.record("device", tracing::field::display(&upload.device_id));
            let persisted = persist(&ingest, upload, bytes).await;
            drop(room);
            persisted
        }
        .instrument(Span::current()),
    );
    accepted.await.unwrap_or_else(|_| Err(Problem::new(Kind::Internal, "the photo was not kept; send it again")))
}

/// Checks every field. All that is wrong with one is said in its own words.
fn upload(ingest: &Ingest, fields: Fields, head: &[u8], size_bytes: u64, sha256: Sha256) -> Result<Upload, Problem> {
    let invalid = |what: String| Problem::new(Kind::InvalidField, what);
    let device_id = fields.device_id.ok_or_else(|| invalid("device_id is missing".to_owned()))?;
    let device_id = DeviceId::try_from(device_id).map_err(invalid)?;
    let upload_id = text("upload_id", fields.upload_id, UPLOAD_ID_BYTES_MAX)?;
    let filename = text("filename", fields.filename, FILENAME_BYTES_MAX)?;
    let captured_at = fields
        .captured_at
        .map(|text| text.parse::<UnixMs>().map_err(|e| invalid(format!("captured_at: {e}"))))
        .transpose()?;
    let priority = match fields.priority {
        Some(text) => text.parse::<Priority>().map_err(|e| invalid(format!("priority: {e}")))?,
        None => Priority::default(),
    };
    let metadata_bytes: usize = fields.metadata.iter().map(|(key, value)| key.len() + value.len()).sum();
    if fields.metadata.len() > METADATA_ENTRIES_MAX || metadata_bytes > METADATA_BYTES_MAX {
        return Err(invalid(format!(
            "metadata may have {METADATA_ENTRIES_MAX} entries and {METADATA_BYTES_MAX} bytes at most"
        )));
    }
    if fields.metadata.iter().any(|(key, value)| key.contains('\0') || value.contains('\0')) {
        return Err(invalid("metadata may not hold NUL characters".to_owned()));
    }
    if let Some(text) = fields.sha256 {
        let claimed: Sha256 = text.parse().map_err(invalid)?;
        if claimed != sha256 {
            let detail = format!("the photo that arrived has the SHA-256 {sha256}; send it again");
            return Err(Problem::new(Kind::DigestMismatch, detail));
        }
    }
    if let Some(claimed) = fields.content_type
        && !claimed.starts_with("image/")
        && claimed != "application/octet-stream"
    {
        return Err(Problem::new(Kind::NotAnImage, format!("content_type is {claimed:?}; expected image/*")));
    }
    let content_type = ImageType::sniff(head).ok_or_else(|| {
        let known: Vec<&str> = ImageType::ALL.iter().map(|t| t.as_str()).collect();
        Problem::new(Kind::NotAnImage, format!("the bytes are none of {}", known.join(", ")))
    })?;

    let received_at = UnixMs::now();
    let id = match &upload_id {
        Some(given) => UploadId::of_device(&device_id, given),
        None => UploadId::new(),
    };
    Ok(Upload {
        object_key: ingest.keys.key(&device_id, id, received_at, content_type),
        id,
        device_id,
        upload_id,
        size_bytes,
        sha256,
        content_type,
        filename,
        captured_at,
        priority,
        metadata: fields.metadata,
        traceparent: telemetry::traceparent_of(&Span::current()),
        received_at,
    })
}

/// Text that a device chose. An empty one is none.
fn text(name: &str, text: Option<String>, bytes_max: usize) -> Result<Option<String>, Problem> {
    match text {
        Some(text) if text.is_empty() => Ok(None),
        Some(text) if text.len() > bytes_max || text.chars().any(char::is_control) => Err(Problem::new(
            Kind::InvalidField,
            format!("{name} may have {bytes_max} bytes at most and no control characters"),
        )),
        other => Ok(other),
    }
}

/// Disk, then queue. When the disk holds this id already, its record is what is queued and answered.
async fn persist(ingest: &Ingest, upload: Arc<Upload>, photo: Unfinished) -> Result<Accepted, Problem> {
    let (spooled, stored_now) = match ingest.spool.store(upload.clone(), photo).await.map_err(not_durable)? {
        Stored::New => (upload.clone(), true),
        Stored::Replaced => (upload.clone(), false),
        Stored::Held(held) => (Arc::new(*held), false),
    };
    same_bytes(&upload, &spooled)?;
    let mut accepted = match ingest.queue.accept(spooled.clone()).await {
        Ok(accepted) => accepted,
        Err(error) => {
            // the photo and its record are durable where they are; what the queue lacks is taken in from the spool
            ingest.spool.journal(spooled.clone()).await.map_err(not_durable)?;
            tracing::debug!(%error, "the upload waits in the journal");
            telemetry::metrics().journaled();
            Accepted { record: Record::queued(spooled), new: stored_now }
        }
    };
    let other_bytes = accepted.record.upload.sha256 != upload.sha256;
    let over = matches!(accepted.record.state, State::Uploaded | State::Shed);
    if stored_now && !accepted.new && (other_bytes || over) {
        // the first photo under this id is in the bucket, or given up, and was off the disk when this one came: what was just
        // written is not needed, and whoever removed the first may not have told the queue yet
        ingest.spool.remove(upload.clone()).await.map_err(not_durable)?;
    }
    same_bytes(&upload, &accepted.record.upload)?;
    if accepted.record.state == State::Dead {
        // a yes means that it will be in the bucket; its photo is on disk, and sound, whatever it died of. A queue that has gone
        // away since it answered hears of it from the journal
        let revived = tokio::time::timeout(REVIVE_TIMEOUT, ingest.queue.revive(&upload)).await;
        if !matches!(revived, Ok(Ok(_))) {
            ingest.spool.journal(upload.clone()).await.map_err(not_durable)?;
            tracing::debug!("that it is queued again waits in the journal");
            telemetry::metrics().journaled();
        }
        accepted.record.state = State::Queued;
    }
    let told = crash_points::pass(Point::IngestAnswer).await;
    told.map_err(|e| not_durable(Error::unavailable("the device cannot be told", e)))?;
    Ok(accepted)
}

fn same_bytes(sent: &Upload, held: &Upload) -> Result<(), Problem> {
    if sent.sha256 == held.sha256 {
        return Ok(());
    }
    Err(Problem::new(
        Kind::UploadIdReused,
        format!(
            "this upload_id was accepted at {} with the SHA-256 {}; give each photo its own",
            held.received_at, held.sha256
        ),
    ))
}

fn not_durable(error: Error) -> Problem {
    match error {
        Error::Full(why) => Problem::new(Kind::SpoolFull, why),
        error => Problem::new(Kind::Unavailable, "the photo cannot be made durable now; send it again").because(error),
    }
}
