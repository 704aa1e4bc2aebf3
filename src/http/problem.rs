//! Errors as devices and operators see them: `application/problem+json` (RFC 9457).
//!
//! Always: `type` is stable and names the kind of problem; 429 and 503 carry a jittered `Retry-After` in whole seconds.
//! Never: the innards of a failure; those are in the log.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

/// One kind of problem. Its name is the end of the problem's `type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    MalformedBody,
    InvalidField,
    Forbidden,
    NotFound,
    MethodNotAllowed,
    BodyTooSlow,
    LengthRequired,
    TooLarge,
    UnsupportedMediaType,
    NotAnImage,
    DigestMismatch,
    UploadIdReused,
    OutOfRange,
    QueueAway,
    Busy,
    SpoolFull,
    Unavailable,
    Stopping,
    Internal,
}

impl Kind {
    /// Status, name and title.
    fn parts(self) -> (StatusCode, &'static str, &'static str) {
        use Kind::*;
        match self {
            MalformedBody => (StatusCode::BAD_REQUEST, "malformed-body", "The body cannot be read"),
            InvalidField => (StatusCode::BAD_REQUEST, "invalid-field", "A field is missing or not valid"),
            Forbidden => (StatusCode::FORBIDDEN, "forbidden", "This is not for whoever asks"),
            NotFound => (StatusCode::NOT_FOUND, "not-found", "There is nothing here"),
            MethodNotAllowed => {
                (StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", "This method is not for this path")
            }
            BodyTooSlow => (StatusCode::REQUEST_TIMEOUT, "body-too-slow", "The body came too slowly"),
            LengthRequired => (StatusCode::LENGTH_REQUIRED, "length-required", "A body is needed"),
            TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "too-large", "What was sent is larger than is accepted"),
            UnsupportedMediaType => {
                (StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type", "This kind of body is not accepted")
            }
            NotAnImage => {
                (StatusCode::UNSUPPORTED_MEDIA_TYPE, "not-an-image", "The bytes are not an image that is accepted")
            }
            DigestMismatch => {
                (StatusCode::UNPROCESSABLE_ENTITY, "digest-mismatch", "The bytes are not those of the digest")
            }
            UploadIdReused => {
                (StatusCode::UNPROCESSABLE_ENTITY, "upload-id-reused", "This upload_id belongs to other bytes")
            }
            OutOfRange => (StatusCode::UNPROCESSABLE_ENTITY, "out-of-range", "A value cannot be what it is"),
            QueueAway => (StatusCode::SERVICE_UNAVAILABLE, "queue-away", "The queue does not answer"),
            Busy => (StatusCode::SERVICE_UNAVAILABLE, "busy", "Too much is in flight"),
            SpoolFull => (StatusCode::SERVICE_UNAVAILABLE, "spool-full", "There is no room for another photo"),
            Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "unavailable", "The photo cannot be made durable now"),
            Stopping => (StatusCode::SERVICE_UNAVAILABLE, "stopping", "This process is stopping"),
            Internal => (StatusCode::INTERNAL_SERVER_ERROR, "internal", "An error in the appliance"),
        }
    }

    /// Seconds after which it makes sense to come back, before jitter.
    fn retry_after_seconds(self) -> Option<u64> {
        match self {
            Kind::Busy | Kind::Stopping => Some(2),
            Kind::Unavailable | Kind::QueueAway | Kind::Internal => Some(5),
            Kind::SpoolFull => Some(30),
            _ => None,
        }
    }
}

/// A problem and what there is to say of this one.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{detail}")]
pub struct Problem {
    pub kind: Kind,
    pub detail: String,
    /// What is behind it, for the log alone.
    pub cause: Option<String>,
}

/// The JSON of a problem.
#[derive(Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ProblemBody {
    /// Which problem it is; stable.
    #[schema(example = "urn:forebay:problem:not-an-image")]
    pub r#type: String,
    pub title: String,
    pub status: u16,
    /// What is wrong with this very request, and what to do about it.
    pub detail: String,
}

impl Problem {
    pub fn new(kind: Kind, detail: impl Into<String>) -> Self {
        Problem { kind, detail: detail.into(), cause: None }
    }

    /// With what is behind it, which the log hears of and the other side does not.
    pub fn because(self, cause: impl std::fmt::Display) -> Self {
        Problem { cause: Some(cause.to_string()), ..self }
    }

    /// The status it is answered with.
    pub fn status(&self) -> StatusCode {
        self.kind.parts().0
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let (status, name, title) = self.kind.parts();
        let body = ProblemBody {
            r#type: format!("urn:forebay:problem:{name}"),
            title: title.to_owned(),
            status: status.as_u16(),
            detail: self.detail,
        };
        let json = serde_json::to_vec(&body).unwrap_or_default();
        let mut response = (status, json).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(seconds) = self.kind.retry_after_seconds() {
            // up to twice the base, so that a thousand devices do not come back in the same second
            let jittered = seconds + rand::random_range(0..=seconds);
            headers.insert(header::RETRY_AFTER, HeaderValue::from(jittered));
        }
        response
    }
}

/// The answer for paths that nobody serves.
pub async fn not_found(uri: axum::http::Uri) -> Problem {
    Problem::new(Kind::NotFound, format!("nothing is served at {}", uri.path()))
}

/// The answer for methods that a path does not take.
pub async fn method_not_allowed(method: axum::http::Method, uri: axum::http::Uri) -> Problem {
    Problem::new(Kind::MethodNotAllowed, format!("{} does not take {method}", uri.path()))
}
