//! The device API's description, made from the handlers themselves, and the page that shows it, from embedded assets.

use axum::Router;
use serde::Serialize;
use std::collections::BTreeMap;
use utoipa::{OpenApi, ToSchema};
use utoipa_swagger_ui::SwaggerUi;

use super::Ingest;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Forebay device API",
        description = "Takes photos from devices and lets them out to S3. A photo that was answered with 201 or 200 is durable."
    ),
    paths(
        super::upload,
        super::read::list,
        super::read::one,
        super::read::image,
        super::health::livez,
        super::health::readyz
    ),
    tags((name = "uploads", description = "Photos in, and what became of them"), (name = "health", description = "For balancers"))
)]
struct Description;

/// A photo as JSON.
#[derive(Serialize, ToSchema)]
pub struct JsonUpload {
    /// 1 to 128 letters, digits, `.`, `_`, `-` and `:`.
    #[schema(example = "cam-0001")]
    device_id: String,
    /// Base64, standard or URL-safe, padded or not, with or without line breaks or a `data:` prefix.
    image: String,
    /// The device's own id for this photo: a retry with the same one is the same upload.
    upload_id: Option<String>,
    /// When the photo was taken (RFC 3339).
    #[schema(format = DateTime)]
    captured_at: Option<String>,
    filename: Option<String>,
    content_type: Option<String>,
    /// Hex; checked.
    sha256: Option<String>,
    /// `low`, `normal` or `high`.
    priority: Option<String>,
    metadata: Option<BTreeMap<String, String>>,
}

/// A photo as a form: the same fields, the photo in `image` or `file`.
#[derive(Serialize, ToSchema)]
pub struct FormUpload {
    device_id: String,
    #[schema(format = Binary)]
    image: String,
    upload_id: Option<String>,
    captured_at: Option<String>,
    filename: Option<String>,
    content_type: Option<String>,
    sha256: Option<String>,
    priority: Option<String>,
    /// A flat JSON object of strings.
    metadata: Option<String>,
}

/// `/openapi.json` and `/docs`.
pub fn router() -> Router<Ingest> {
    Router::from(SwaggerUi::new("/docs").url("/openapi.json", Description::openapi()))
}
