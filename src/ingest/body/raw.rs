//! A body that is the photo itself: the other fields are query parameters or headers.

use axum::http::request::Parts;

use super::{Fields, Incoming, Photo, metadata};
use crate::http::problem::{Kind, Problem};

/// Reads the photo, and the fields from the head.
pub async fn read(parts: &Parts, incoming: &mut Incoming, mut photo: Photo) -> Result<(Fields, Photo), Problem> {
    let mut fields = query(parts.uri.query().unwrap_or(""))?;
    fields.content_type = parts.headers.get("content-type").and_then(|value| value.to_str().ok()).map(str::to_owned);
    if let Some(digest) = parts.headers.get("content-digest") {
        let digest = digest.to_str().ok().and_then(sha256_of_digest).ok_or_else(|| {
            Problem::new(Kind::InvalidField, "Content-Digest must be sha-256=:<base64>: as RFC 9530 has it")
        })?;
        fields.sha256 = fields.sha256.or(Some(digest));
    }
    while let Some(piece) = incoming.next().await? {
        photo.extend(&piece)?;
        photo.relieve().await?;
    }
    if photo.is_empty() {
        return Err(Problem::new(Kind::MalformedBody, "the body is empty; it must be the photo"));
    }
    Ok((fields, photo))
}

fn query(text: &str) -> Result<Fields, Problem> {
    let pairs: Vec<(String, String)> = serde_urlencoded::from_str(text)
        .map_err(|_| Problem::new(Kind::InvalidField, "the query parameters cannot be read"))?;
    let mut fields = Fields::default();
    for (name, text) in pairs {
        match name.as_str() {
            "device_id" => fields.device_id = Some(text),
            "upload_id" => fields.upload_id = Some(text),
            "captured_at" => fields.captured_at = Some(text),
            "filename" => fields.filename = Some(text),
            "sha256" => fields.sha256 = Some(text),
            "priority" => fields.priority = Some(text),
            "metadata" => fields.metadata = metadata(&text)?,
            _ => {}
        }
    }
    Ok(fields)
}

/// The hex of `sha-256=:<base64>:` among the digests of a `Content-Digest`. Digests by other names are passed over.
fn sha256_of_digest(text: &str) -> Option<String> {
    let mut known = String::new();
    for member in text.split(',') {
        let (name, value) = member.trim().split_once('=')?;
        let base64 = value.strip_prefix(':')?.strip_suffix(':')?;
        if name.eq_ignore_ascii_case("sha-256") {
            let bytes = base64_simd::STANDARD.decode_to_vec(base64).ok()?;
            known = crate::upload::Sha256(bytes.try_into().ok()?).to_string();
        }
    }
    (!known.is_empty()).then_some(known)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upload::Sha256;

    #[test]
    fn a_content_digest_is_understood_among_others() {
        let digest = Sha256::of(b"photo");
        let text = format!("sha-512=:AAAA:, sha-256=:{}:", digest.base64());
        assert_eq!(sha256_of_digest(&text), Some(digest.to_string()));
        for bad in ["sha-256=AAAA", "sha-256=:AAAA:", "sha-512=:AAAA:", "", "sha-256"] {
            assert_eq!(sha256_of_digest(bad), None, "{bad}");
        }
    }
}
