//! A request's body becomes fields and a photo: three kinds of body, one meaning.
//!
//! Always: the photo is decoded once, as it comes; a body is given up as soon as it is known to be too large or too slow;
//! while memory is short, photos that come slowly are written out as they come. Never: a photo held as text, or more of a body
//! held than the photo and 64 KiB.

mod base64;
mod json;
mod multipart;
mod raw;

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Frame;
use tokio::time::{Instant, Sleep, sleep};

use super::admission::Room;
use crate::http::problem::{Kind, Problem};
use crate::spool::Unfinished;
use crate::upload::ImageType;

/// The most bytes of everything but the photo.
pub const REST_BYTES_MAX: usize = 64 * 1024;
/// What of a photo is worth a write of its own when memory is short.
const WRITE_OUT_BYTES: usize = 32 * 1024;
/// What of a photo is worth a step of its digest.
const DIGEST_BYTES: usize = 4 * 1024;
/// The longest silence in the middle of a body.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// What a device says of its photo, not yet checked.
#[derive(Debug, Default, PartialEq)]
pub struct Fields {
    pub device_id: Option<String>,
    pub upload_id: Option<String>,
    pub captured_at: Option<String>,
    pub filename: Option<String>,
    pub content_type: Option<String>,
    pub sha256: Option<String>,
    pub priority: Option<String>,
    pub metadata: BTreeMap<String, String>,
}

/// A photo that grows as it comes.
pub struct Photo {
    bytes: Unfinished,
    /// By which its kind is told.
    head: Vec<u8>,
    bytes_max: usize,
    room: Option<Room>,
    /// Its digest is taken as it comes.
    digests: bool,
}

/// A photo that is all there.
pub struct Arrived {
    /// In memory, or begun on disk.
    pub bytes: Unfinished,
    /// Its first [`ImageType::SNIFF_BYTES`].
    pub head: Vec<u8>,
    /// The memory that it takes, to be held as long as it does.
    pub room: Option<Room>,
}

impl Photo {
    /// An empty one that may grow to `bytes_max`, as long as there is `room` in memory.
    pub fn new(bytes_max: usize, room: Option<Room>) -> Self {
        Photo { bytes: Unfinished::default(), head: Vec::new(), bytes_max, room, digests: false }
    }

    /// Takes its digest as it comes, or when it is all there.
    pub fn digested_as_it_comes(self, digests: bool) -> Self {
        Photo { digests, ..self }
    }

    /// Makes place for a photo of about `bytes`.
    fn reserve(&mut self, bytes: usize) {
        self.bytes.rest().reserve(bytes.min(self.bytes_max));
    }

    /// Nothing of it has come yet.
    pub fn is_empty(&self) -> bool {
        self.bytes.size_bytes() == 0
    }

    /// Lets `write` append to the photo; its error becomes a problem by `explain`.
    fn append<E>(
        &mut self,
        write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
        explain: impl FnOnce(E) -> Problem,
    ) -> Result<(), Problem> {
        let rest = self.bytes.rest().appended_to();
        let before = rest.len();
        write(rest).map_err(explain)?;
        let new = &rest[before..];
        let head_lacks = ImageType::SNIFF_BYTES.saturating_sub(self.head.len());
        self.head.extend_from_slice(&new[..new.len().min(head_lacks)]);
        let new_bytes = new.len();
        if self.digests && self.bytes.undigested_bytes() >= DIGEST_BYTES {
            self.bytes.digest();
        }
        if self.bytes.size_bytes() > self.bytes_max as u64 {
            return Err(too_large(self.bytes_max));
        }
        match &mut self.room {
            Some(room) => room.grow(new_bytes),
            None => Ok(()),
        }
    }

    /// Appends bytes as they are.
    fn extend(&mut self, piece: &[u8]) -> Result<(), Problem> {
        if self.bytes.size_bytes() + piece.len() as u64 > self.bytes_max as u64 {
            return Err(too_large(self.bytes_max));
        }
        self.append(
            |bytes| {
                bytes.extend_from_slice(piece);
                Ok(())
            },
            |never: std::convert::Infallible| match never {},
        )
    }

    /// Writes out what of it is in memory, if there is much and memory is short.
    async fn relieve(&mut self) -> Result<(), Problem> {
        match &mut self.room {
            Some(room) if room.is_short() && self.bytes.rest().len() >= WRITE_OUT_BYTES => {
                self.bytes = room.write_out(std::mem::take(&mut self.bytes)).await?;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Ends it.
    pub fn finish(self) -> Arrived {
        Arrived { bytes: self.bytes, head: self.head, room: self.room }
    }
}

fn too_large(bytes_max: usize) -> Problem {
    Problem::new(Kind::TooLarge, format!("a photo may have at most {bytes_max} bytes"))
}

/// What a body says next; nothing at its end.
type NextFrame = Option<Result<Frame<Bytes>, axum::Error>>;

/// A body that must come in time.
pub struct Incoming {
    body: Body,
    deadline: Instant,
    /// When the next piece was begun to be waited for.
    waits_since: Instant,
    /// Rings when patience may be over. It is set anew when it rings, not for each piece: that would cost more than many a piece.
    alarm: Pin<Box<Sleep>>,
}

impl Incoming {
    /// All of it must be there within `timeout`.
    pub fn new(body: Body, timeout: Duration) -> Self {
        let now = Instant::now();
        Incoming { body, deadline: now + timeout, waits_since: now, alarm: Box::pin(sleep(timeout.min(SILENCE_MAX))) }
    }

    /// The next piece; none at the end.
    async fn next(&mut self) -> Result<Option<Bytes>, Problem> {
        self.waits_since = Instant::now();
        loop {
            match poll_fn(|cx| self.poll_frame(cx)).await? {
                None => return Ok(None),
                Some(Err(_)) => return Err(Problem::new(Kind::MalformedBody, "the body broke off")),
                // trailers say nothing here
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(piece) => return Ok(Some(piece)),
                    Err(_) => continue,
                },
            }
        }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Result<NextFrame, Problem>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            return Poll::Ready(Ok(frame));
        }
        while self.alarm.as_mut().poll(cx).is_ready() {
            let patience = self.deadline.min(self.waits_since + SILENCE_MAX);
            if Instant::now() >= patience {
                return Poll::Ready(Err(Problem::new(
                    Kind::BodyTooSlow,
                    "the body did not come in time; send it again",
                )));
            }
            self.alarm.as_mut().reset(patience);
        }
        Poll::Pending
    }

    /// Reads on and throws away, within limits, after a refusal: a device that is still sending would otherwise get a
    /// reset instead of its answer.
    pub async fn discard(mut self) {
        const BYTES_MAX: usize = 32 * 1024 * 1024;
        let until = Instant::now() + Duration::from_secs(10);
        let mut seen = 0;
        while let Ok(Some(Ok(frame))) = tokio::time::timeout_at(until, self.body.frame()).await {
            seen += frame.data_ref().map_or(0, Bytes::len);
            if seen > BYTES_MAX {
                return;
            }
        }
    }
}

/// Refuses by the head alone what the body would be refused for. `bytes_max` is the largest photo.
pub fn check_head(parts: &Parts, bytes_max: usize) -> Result<Kinds, Problem> {
    let kind = Kinds::of(&parts.headers)?;
    let declared = content_length(&parts.headers);
    if declared.is_none() && !parts.headers.contains_key(header::TRANSFER_ENCODING) {
        return Err(Problem::new(Kind::LengthRequired, "there is no body; send the photo with a Content-Length"));
    }
    // base64 takes four thirds, line breaks and escapes a little more
    let body_max = match kind {
        Kinds::Raw => bytes_max,
        Kinds::Json => bytes_max + bytes_max / 2 + REST_BYTES_MAX,
        Kinds::Multipart(_) => bytes_max + REST_BYTES_MAX,
    };
    if declared.is_some_and(|length| length > body_max as u64) {
        return Err(too_large(bytes_max));
    }
    Ok(kind)
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The three kinds of body.
#[derive(Debug, PartialEq, Eq)]
pub enum Kinds {
    Json,
    /// With its boundary.
    Multipart(String),
    Raw,
}

impl Kinds {
    fn of(headers: &HeaderMap) -> Result<Kinds, Problem> {
        let text = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
        let essence = text.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
        match essence.as_str() {
            "application/json" => Ok(Kinds::Json),
            "multipart/form-data" => multer::parse_boundary(text)
                .map(Kinds::Multipart)
                .map_err(|_| Problem::new(Kind::MalformedBody, "the multipart Content-Type has no boundary")),
            image if image.starts_with("image/") => Ok(Kinds::Raw),
            other => Err(Problem::new(
                Kind::UnsupportedMediaType,
                format!("expected application/json, multipart/form-data or image/*, found {other:?}"),
            )),
        }
    }
}

/// Reads the whole body.
pub async fn read(
    kind: &Kinds,
    parts: &Parts,
    incoming: &mut Incoming,
    mut photo: Photo,
) -> Result<(Fields, Photo), Problem> {
    let declared = content_length(&parts.headers).unwrap_or(0) as usize;
    let (mut fields, photo) = match kind {
        Kinds::Json => {
            photo.reserve(declared / 4 * 3);
            let mut json = json::JsonBody::new(photo);
            while let Some(piece) = incoming.next().await? {
                json.push(&piece)?;
                json.relieve().await?;
            }
            json.finish()?
        }
        Kinds::Multipart(boundary) => {
            photo.reserve(declared);
            multipart::read(boundary, incoming, photo).await?
        }
        Kinds::Raw => {
            photo.reserve(declared);
            raw::read(parts, incoming, photo).await?
        }
    };
    // what the body does not say, the head may
    let head = |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    fields.device_id = fields.device_id.or_else(|| head("x-device-id"));
    fields.upload_id = fields.upload_id.filter(|text| !text.is_empty()).or_else(|| head("idempotency-key"));
    Ok((fields, photo))
}

/// The metadata of a body that is not JSON: a flat JSON object of strings as text.
fn metadata(text: &str) -> Result<BTreeMap<String, String>, Problem> {
    serde_json::from_str(text)
        .map_err(|_| Problem::new(Kind::InvalidField, "metadata must be a flat JSON object of strings"))
}

#[cfg(test)]
mod tests {
    use futures_util::stream;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A body whose next piece comes after each of these.
    fn pieces_after(pauses: impl IntoIterator<Item = Duration>, timeout: Duration) -> Incoming {
        let pauses: Vec<Duration> = pauses.into_iter().collect();
        let pieces = stream::unfold(pauses.into_iter(), async |mut pauses| {
            sleep(pauses.next()?).await;
            Some((Ok::<_, std::io::Error>(Bytes::from_static(b"piece")), pauses))
        });
        Incoming::new(Body::from_stream(pieces), timeout)
    }

    /// Reads all of it; how many pieces came, how long it took, and why it ended if not by its end.
    async fn read_all(mut body: Incoming) -> (usize, Duration, Option<Kind>) {
        let (began, mut pieces) = (Instant::now(), 0);
        loop {
            match body.next().await {
                Ok(Some(_)) => pieces += 1,
                Ok(None) => return (pieces, began.elapsed(), None),
                Err(problem) => return (pieces, began.elapsed(), Some(problem.kind)),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_may_take_longer_than_a_silence_as_long_as_it_comes() {
        let body = pieces_after([20 * SECOND; 5], 120 * SECOND);
        assert_eq!(read_all(body).await, (5, 100 * SECOND, None));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silence_is_counted_from_the_last_piece() {
        let body = pieces_after([SECOND, 25 * SECOND, 300 * SECOND], 120 * SECOND);
        let (pieces, took, why) = read_all(body).await;
        assert_eq!((pieces, why), (2, Some(Kind::BodyTooSlow)));
        assert_eq!(took.as_secs(), 26 + 30);
    }

    #[tokio::test(start_paused = true)]
    async fn all_of_a_body_must_be_there_in_time_however_steadily_it_comes() {
        let body = pieces_after([SECOND; 100], 45 * SECOND + SECOND / 2);
        let (pieces, took, why) = read_all(body).await;
        assert_eq!((pieces, why), (45, Some(Kind::BodyTooSlow)));
        assert_eq!(took.as_secs(), 45);
    }
}
