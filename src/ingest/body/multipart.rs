//! A multipart body: the photo in a part called `image` or `file`, the other fields in parts of their own names.
//!
//! Always: what is neither photo nor field (what comes before the first part, the parts' heads) is held to the same bytes as the
//! fields. Never: a piece of the body taken before the parser has looked at the one before it.

use std::error::Error as _;
use std::future::poll_fn;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;

use bytes::Bytes;
use futures_util::stream;
use multer::Multipart;

use super::{Fields, Incoming, Photo, REST_BYTES_MAX, metadata};
use crate::http::problem::{Kind, Problem};

/// Reads all parts.
pub async fn read(boundary: &str, incoming: &mut Incoming, mut photo: Photo) -> Result<(Fields, Photo), Problem> {
    let photo_bytes = AtomicUsize::new(0);
    let pieces = stream::unfold((incoming, 0_usize, 0), async |(incoming, body_bytes, newest_bytes)| {
        if body_bytes > 0 {
            let_the_parser_look().await;
        }
        // it lets go of a photo as it comes, and holds what makes no sense yet; of the newest piece it may not have seen all
        let rest_bytes = (body_bytes - newest_bytes).saturating_sub(photo_bytes.load(Ordering::Relaxed));
        if rest_bytes > REST_BYTES_MAX {
            let detail =
                format!("all but the photo is longer than {REST_BYTES_MAX} bytes; is the boundary the declared one?");
            return Some((Err(Problem::new(Kind::TooLarge, detail)), (incoming, body_bytes, newest_bytes)));
        }
        let piece = incoming.next().await.transpose()?;
        let piece_bytes = piece.as_ref().map_or(0, Bytes::len);
        Some((piece, (incoming, body_bytes + piece_bytes, piece_bytes)))
    });
    let mut parts = Multipart::new(pieces, boundary);
    let mut fields = Fields::default();
    let mut image_seen = false;
    let mut rest_bytes = 0;

    while let Some(mut part) = parts.next_field().await.map_err(malformed)? {
        let name = part.name().unwrap_or("").to_owned();
        if name == "image" || name == "file" {
            if image_seen {
                return Err(Problem::new(Kind::InvalidField, "there is more than one image; send one photo a request"));
            }
            image_seen = true;
            fields.filename = fields.filename.or_else(|| part.file_name().map(str::to_owned));
            fields.content_type = fields.content_type.or_else(|| part.content_type().map(|t| t.to_string()));
            while let Some(piece) = part.chunk().await.map_err(malformed)? {
                photo_bytes.fetch_add(piece.len(), Ordering::Relaxed);
                photo.extend(&piece)?;
                photo.relieve().await?;
            }
            continue;
        }
        let mut text = Vec::new();
        while let Some(piece) = part.chunk().await.map_err(malformed)? {
            rest_bytes += piece.len();
            if rest_bytes > REST_BYTES_MAX {
                let detail = format!("the fields other than the photo are longer than {REST_BYTES_MAX} bytes");
                return Err(Problem::new(Kind::TooLarge, detail));
            }
            text.extend_from_slice(&piece);
        }
        let text = String::from_utf8(text)
            .map_err(|_| Problem::new(Kind::InvalidField, format!("the field {name} is not UTF-8")))?;
        match name.as_str() {
            "device_id" => fields.device_id = Some(text),
            "upload_id" => fields.upload_id = Some(text),
            "captured_at" => fields.captured_at = Some(text),
            "filename" => fields.filename = Some(text),
            "content_type" => fields.content_type = Some(text),
            "sha256" => fields.sha256 = Some(text),
            "priority" => fields.priority = Some(text),
            "metadata" => fields.metadata = metadata(&text)?,
            _ => {} // unknown fields are let be, as in JSON
        }
    }
    match (image_seen, photo.is_empty()) {
        (false, _) => {
            Err(Problem::new(Kind::InvalidField, "image is missing; send the photo in a part called image or file"))
        }
        (true, true) => Err(Problem::new(Kind::InvalidField, "image is empty")),
        (true, false) => Ok((fields, photo)),
    }
}

/// The parser takes pieces for as long as there are any, and then looks at all of them: it is told once that there is none yet.
async fn let_the_parser_look() {
    let mut told = false;
    poll_fn(|cx| match std::mem::replace(&mut told, true) {
        true => Poll::Ready(()),
        false => {
            cx.waker().wake_by_ref();
            Poll::Pending
        }
    })
    .await;
}

/// What the parser says, or what was wrong with the body beneath it.
fn malformed(error: multer::Error) -> Problem {
    match error.source().and_then(|cause| cause.downcast_ref::<Problem>()) {
        Some(problem) => problem.clone(),
        None => Problem::new(Kind::MalformedBody, format!("the multipart body cannot be read: {error}")),
    }
}
