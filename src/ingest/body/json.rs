//! A JSON body, read as it comes: the text of the top-level `image` goes straight through the base64 decoder into the
//! photo, and everything else, which is small, is kept and parsed at the end.
//!
//! ```text
//! {"device_id":"cam-1","image":"/9j/4AAQ…","priority":"high"}      what comes
//! {"device_id":"cam-1","image":"","priority":"high"}               what is parsed by serde_json
//! ```
//!
//! So a photo is never in memory as text, and what is taken for JSON is decided by serde_json alone: this scanner only
//! finds one string. Never: recursion, or more than [`REST_BYTES_MAX`] of anything but the photo.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::Deserialize;

use super::base64::{Base64Error, Decoder};
use super::{Fields, Photo, REST_BYTES_MAX};
use crate::http::problem::{Kind, Problem};

/// Arrays and objects in each other; no field of an upload needs even two.
const DEPTH_MAX: usize = 32;

/// Reads one body; pieces go in by [`JsonBody::push`] and end with [`JsonBody::finish`].
pub struct JsonBody {
    photo: Photo,
    rest: Vec<u8>,
    at: At,
    depth: usize,
    /// In the outermost object, before a colon.
    expects_key: bool,
    /// Where the text of the last top-level key begins in `rest`.
    key_start: usize,
    /// The last top-level key is `image` and its value has not begun.
    image_next: bool,
    decoder: Option<Decoder>,
    image_seen: bool,
}

enum At {
    Outside,
    /// In a string that is not the image; true behind a backslash.
    Text {
        escaped: bool,
        key: bool,
    },
    Image,
    /// In the image, behind a backslash; the characters of the escape so far.
    ImageEscape(Vec<u8>),
}

#[derive(Deserialize)]
struct Rest<'a> {
    #[serde(borrow)]
    device_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    image: Option<Cow<'a, str>>,
    #[serde(borrow)]
    upload_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    captured_at: Option<Cow<'a, str>>,
    #[serde(borrow)]
    filename: Option<Cow<'a, str>>,
    #[serde(borrow)]
    content_type: Option<Cow<'a, str>>,
    #[serde(borrow)]
    sha256: Option<Cow<'a, str>>,
    #[serde(borrow)]
    priority: Option<Cow<'a, str>>,
    metadata: Option<BTreeMap<String, String>>,
}

impl JsonBody {
    pub fn new(photo: Photo) -> Self {
        JsonBody {
            photo,
            rest: Vec::new(),
            at: At::Outside,
            depth: 0,
            expects_key: false,
            key_start: 0,
            image_next: false,
            decoder: None,
            image_seen: false,
        }
    }

    /// Takes the next piece of the body.
    pub fn push(&mut self, mut piece: &[u8]) -> Result<(), Problem> {
        while !piece.is_empty() {
            let taken = match self.at {
                At::Outside => self.outside(piece)?,
                At::Text { escaped, key } => self.text(piece, escaped, key),
                At::Image => self.image(piece)?,
                At::ImageEscape(_) => self.image_escape(piece[0])?,
            };
            piece = &piece[taken..];
            if self.rest.len() > REST_BYTES_MAX {
                return Err(Problem::new(
                    Kind::TooLarge,
                    format!("the fields other than image are longer than {REST_BYTES_MAX} bytes"),
                ));
            }
        }
        Ok(())
    }

    /// Writes out what of the photo is in memory, if there is much and memory is short.
    pub async fn relieve(&mut self) -> Result<(), Problem> {
        self.photo.relieve().await
    }

    /// The fields and the photo, once the body is over.
    pub fn finish(mut self) -> Result<(Fields, Photo), Problem> {
        if matches!(self.at, At::Image | At::ImageEscape(_)) {
            return Err(Problem::new(Kind::MalformedBody, "the JSON is cut off in the middle of image"));
        }
        let rest: Rest = serde_json::from_slice(&self.rest).map_err(not_json)?;
        match rest.image {
            None => return Err(Problem::new(Kind::InvalidField, "image is missing")),
            // its key was written with escapes, so the scanner did not know it
            Some(text) if !self.image_seen => {
                let mut decoder = Decoder::default();
                self.photo.append(
                    |photo| decoder.push(text.as_bytes(), photo).and_then(|()| decoder.finish(photo)),
                    not_base64,
                )?;
            }
            Some(_) => {}
        }
        if self.photo.is_empty() {
            return Err(Problem::new(Kind::InvalidField, "image is empty"));
        }
        let owned = |text: Option<Cow<str>>| text.map(Cow::into_owned);
        let fields = Fields {
            device_id: owned(rest.device_id),
            upload_id: owned(rest.upload_id),
            captured_at: owned(rest.captured_at),
            filename: owned(rest.filename),
            content_type: owned(rest.content_type),
            sha256: owned(rest.sha256),
            priority: owned(rest.priority),
            metadata: rest.metadata.unwrap_or_default(),
        };
        Ok((fields, self.photo))
    }

    /// Takes everything up to and including the next quotation mark.
    fn outside(&mut self, piece: &[u8]) -> Result<usize, Problem> {
        for (n, &byte) in piece.iter().enumerate() {
            if self.depth == 0
                && byte != b'{'
                && self.rest.iter().all(u8::is_ascii_whitespace)
                && !byte.is_ascii_whitespace()
            {
                return Err(Problem::new(Kind::MalformedBody, "the body is not a JSON object"));
            }
            if byte == b'"' && self.depth == 1 && self.image_next {
                self.image_next = false;
                self.image_seen = true;
                self.decoder = Some(Decoder::default());
                self.rest.extend_from_slice(b"\"\"");
                self.at = At::Image;
                return Ok(n + 1);
            }
            self.rest.push(byte);
            match byte {
                b'"' => {
                    let key = self.depth == 1 && self.expects_key;
                    self.key_start = if key { self.rest.len() } else { self.key_start };
                    self.at = At::Text { escaped: false, key };
                    return Ok(n + 1);
                }
                b'{' | b'[' => {
                    self.depth += 1;
                    self.expects_key = self.depth == 1;
                    if self.depth > DEPTH_MAX {
                        return Err(Problem::new(
                            Kind::MalformedBody,
                            format!("the JSON is nested more than {DEPTH_MAX} deep"),
                        ));
                    }
                }
                b'}' | b']' => self.depth = self.depth.saturating_sub(1),
                b',' if self.depth == 1 => (self.expects_key, self.image_next) = (true, false),
                b':' if self.depth == 1 => self.expects_key = false,
                _ => {}
            }
        }
        Ok(piece.len())
    }

    fn text(&mut self, piece: &[u8], escaped: bool, key: bool) -> usize {
        if escaped {
            self.rest.push(piece[0]);
            self.at = At::Text { escaped: false, key };
            return 1;
        }
        let Some(end) = memchr::memchr2(b'"', b'\\', piece) else {
            // enough to see that it is too long
            self.rest.extend_from_slice(&piece[..piece.len().min(REST_BYTES_MAX + 1)]);
            return piece.len();
        };
        self.rest.extend_from_slice(&piece[..=end]);
        if piece[end] == b'\\' {
            self.at = At::Text { escaped: true, key };
        } else {
            if key {
                self.image_next = &self.rest[self.key_start..self.rest.len() - 1] == b"image";
            }
            self.at = At::Outside;
        }
        end + 1
    }

    fn image(&mut self, piece: &[u8]) -> Result<usize, Problem> {
        let end = memchr::memchr2(b'"', b'\\', piece);
        self.decode(&piece[..end.unwrap_or(piece.len())])?;
        let Some(end) = end else { return Ok(piece.len()) };
        if piece[end] == b'\\' {
            self.at = At::ImageEscape(Vec::new());
        } else {
            if let Some(decoder) = self.decoder.take() {
                self.photo.append(|photo| decoder.finish(photo), not_base64)?;
            }
            self.at = At::Outside;
        }
        Ok(end + 1)
    }

    /// Many encoders write `/` as `\/`, and some write `+` and `=` as `\u002b` and `\u003d`.
    fn image_escape(&mut self, byte: u8) -> Result<usize, Problem> {
        let At::ImageEscape(escape) = &mut self.at else { return Ok(0) };
        escape.push(byte);
        let character = match escape.as_slice() {
            [b'n' | b'r' | b't'] => b'\n',
            [b'u', hex @ ..] if hex.len() < 4 => return Ok(1),
            [b'u', hex @ ..] => std::str::from_utf8(hex)
                .ok()
                .and_then(|hex| u16::from_str_radix(hex, 16).ok())
                .and_then(|code| u8::try_from(code).ok())
                .unwrap_or(b'!'), // nothing that base64 knows
            [plain] => *plain,
            _ => b'!',
        };
        self.at = At::Image;
        self.decode(&[character])?;
        Ok(1)
    }

    fn decode(&mut self, text: &[u8]) -> Result<(), Problem> {
        match &mut self.decoder {
            Some(decoder) => self.photo.append(|photo| decoder.push(text, photo), not_base64),
            None => Ok(()),
        }
    }
}

fn not_base64(error: Base64Error) -> Problem {
    Problem::new(Kind::MalformedBody, format!("image is not base64: {error}"))
}

fn not_json(error: serde_json::Error) -> Problem {
    // the text that was parsed lacks the image, so places behind it would mislead
    let text = error.to_string();
    let text = text.split(" at line ").next().unwrap_or_default();
    match error.classify() {
        serde_json::error::Category::Data => Problem::new(Kind::InvalidField, text),
        _ => Problem::new(Kind::MalformedBody, format!("the body is not JSON: {text}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(body: &[u8], piece: usize) -> Result<(Fields, Vec<u8>), Problem> {
        let mut json = JsonBody::new(Photo::new(1 << 20, None));
        for piece in body.chunks(piece.max(1)) {
            json.push(piece)?;
        }
        json.finish().map(|(fields, photo)| (fields, photo.finish().bytes.rest().as_slice().to_vec()))
    }

    fn refusal(body: &str) -> Kind {
        read(body.as_bytes(), 7).unwrap_err().kind
    }

    proptest! {
        #[test]
        fn it_reads_what_serde_json_reads_however_the_body_is_cut(
            photo in proptest::collection::vec(any::<u8>(), 1..2000),
            device in "\\PC{1,20}",
            metadata in proptest::collection::btree_map("\\PC{0,8}", "\\PC{0,8}", 0..4),
            image_first in any::<bool>(),
            pretty in any::<bool>(),
            piece in 1usize..300,
        ) {
            let image = base64_simd::STANDARD.encode_to_string(&photo);
            let mut body = serde_json::Map::new();
            if image_first { body.insert("image".into(), image.clone().into()); }
            body.insert("a_decoy".into(), serde_json::json!({"image": "not this one", "x": ["image", {"image": 1}]}));
            body.insert("device_id".into(), device.clone().into());
            body.insert("metadata".into(), serde_json::json!(metadata));
            if !image_first { body.insert("image".into(), image.into()); }
            let text = match pretty {
                true => serde_json::to_vec_pretty(&body).unwrap(),
                false => serde_json::to_vec(&body).unwrap(),
            };
            let (fields, read) = read(&text, piece).unwrap();
            prop_assert_eq!(fields.device_id, Some(device));
            prop_assert_eq!(fields.metadata, metadata);
            prop_assert_eq!(read, photo);
        }

        #[test]
        fn no_bytes_make_it_panic(body in proptest::collection::vec(any::<u8>(), 0..300), piece in 1usize..50) {
            let _ = read(&body, piece);
        }
    }

    #[test]
    fn cut_off_at_any_byte_it_is_malformed() {
        let body = br#"{"device_id":"cam-1","image":"QUJDREVG\/+==","metadata":{"a":"b"}}"#;
        for end in 0..body.len() {
            let refused = read(&body[..end], 9).unwrap_err();
            assert_eq!(refused.status(), 400, "cut off at {end}");
        }
    }

    #[test]
    fn escapes_that_encoders_write_are_understood() {
        let (_, photo) = read(br#"{"image":"\u002b\/8\u003D\n"}"#, 1).unwrap();
        assert_eq!(photo, [0xfb, 0xff]);
        let (_, photo) = read(br#"{"\u0069mage":"QUJD"}"#, 3).unwrap();
        assert_eq!(photo, b"ABC");
    }

    #[test]
    fn what_is_not_an_upload_is_refused_by_its_fault() {
        assert_eq!(refusal(""), Kind::MalformedBody);
        assert_eq!(refusal("null"), Kind::MalformedBody);
        assert_eq!(refusal("photo"), Kind::MalformedBody);
        assert_eq!(refusal(&"[".repeat(10_000)), Kind::MalformedBody);
        assert_eq!(refusal(&format!(r#"{{"x":{}"#, "[".repeat(10_000))), Kind::MalformedBody);
        assert_eq!(refusal(r#"{"device_id":"cam-1"}"#), Kind::InvalidField);
        assert_eq!(refusal(r#"{"image":""}"#), Kind::InvalidField);
        assert_eq!(refusal(r#"{"image":null}"#), Kind::InvalidField);
        assert_eq!(refusal(r#"{"image":17}"#), Kind::InvalidField);
        assert_eq!(refusal(r#"{"image":"QUJD","image":"QUJD"}"#), Kind::InvalidField);
        assert_eq!(refusal(r#"{"image":"QUJD","metadata":{"a":1}}"#), Kind::InvalidField);
        assert_eq!(refusal(r#"{"image":"QUJD"} and more"#), Kind::MalformedBody);
        assert_eq!(refusal(&format!(r#"{{"image":"QUJD","filename":"{}"}}"#, "x".repeat(200_000))), Kind::TooLarge);
    }
}
