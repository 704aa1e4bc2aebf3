//! An upload: one accepted photo and its record, with the names and limits of everything in it.
//!
//! Always: a value of these types is valid, whoever made it (a `DeviceId` holds no slash, an object key names one object).
//! Never: I/O, and never a photo's bytes beyond a look at their first few.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use aws_lc_rs::digest;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::units::UnixMs;

/// The longest device id, in bytes.
pub const DEVICE_ID_BYTES_MAX: usize = 128;
/// The longest id that a device may give a photo, in bytes.
pub const UPLOAD_ID_BYTES_MAX: usize = 200;
/// The longest file name that is kept, in bytes.
pub const FILENAME_BYTES_MAX: usize = 255;
/// The most metadata entries of one upload.
pub const METADATA_ENTRIES_MAX: usize = 64;
/// The most bytes of metadata, keys and values together.
pub const METADATA_BYTES_MAX: usize = 8 * 1024;
/// The longest object key that S3 takes, in bytes.
pub const OBJECT_KEY_BYTES_MAX: usize = 1024;

/// Everything about one accepted photo that is fixed at acceptance. It stands at the end of the photo's spool file, so
/// that the queue can be rebuilt from the spool alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upload {
    pub id: UploadId,
    pub device_id: DeviceId,
    /// The device's own id for this photo, if it gave one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upload_id: Option<String>,
    /// Where the photo goes in the bucket, prefix included.
    pub object_key: String,
    pub size_bytes: u64,
    pub sha256: Sha256,
    pub content_type: ImageType,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filename: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub captured_at: Option<UnixMs>,
    #[serde(default)]
    pub priority: Priority,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// The W3C trace context of the request that brought it, so that its upload can be linked to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    pub received_at: UnixMs,
}

/// The appliance's id of an upload: time-ordered, or derived from the device's own id for the photo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UploadId(pub Uuid);

impl UploadId {
    /// A new, time-ordered id (UUID version 7).
    pub fn new() -> Self {
        UploadId(Uuid::now_v7())
    }

    /// The id of the photo that `device` calls `upload_id` (UUID version 8, from SHA-256). It is the same on every
    /// replica and after every restart, which is what makes a retry the same upload even while the queue is away.
    pub fn of_device(device: &DeviceId, upload_id: &str) -> Self {
        let mut hash = digest::Context::new(&digest::SHA256);
        hash.update(device.as_str().as_bytes());
        hash.update(&[0]); // neither part can hold a NUL, so no two pairs share their bytes
        hash.update(upload_id.as_bytes());
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hash.finish().as_ref()[..16]);
        UploadId(uuid::Builder::from_custom_bytes(bytes).into_uuid())
    }
}

impl Default for UploadId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for UploadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl FromStr for UploadId {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Uuid::try_parse(text).map(UploadId).map_err(|_| format!("expected an upload's id (a UUID), found {text:?}"))
    }
}

/// The name of a device: 1 to 128 letters, digits, `.`, `_`, `-` and `:`, not starting with a dot. It goes into object
/// keys as it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct DeviceId(String);

impl DeviceId {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for DeviceId {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        if text.is_empty() {
            return Err("device_id is empty".into());
        }
        if text.len() > DEVICE_ID_BYTES_MAX {
            return Err(format!("device_id is {} bytes long; at most {DEVICE_ID_BYTES_MAX} are allowed", text.len()));
        }
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | ':');
        if text.starts_with('.') || !text.chars().all(allowed) {
            return Err(
                "device_id may hold letters, digits, '.', '_', '-' and ':', and may not start with a dot".into()
            );
        }
        Ok(DeviceId(text))
    }
}

impl FromStr for DeviceId {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        DeviceId::try_from(text.to_owned())
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A SHA-256 digest. Prints and parses as 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sha256(pub [u8; 32]);

impl Sha256 {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        let mut hasher = Sha256Hasher::new();
        hasher.update(bytes);
        hasher.finish()
    }

    /// As S3 wants it in `x-amz-checksum-sha256`.
    pub fn base64(&self) -> String {
        base64_simd::STANDARD.encode_to_string(self.0)
    }
}

/// Takes a SHA-256 piece by piece.
#[derive(Clone)]
pub struct Sha256Hasher(digest::Context);

impl Sha256Hasher {
    pub fn new() -> Self {
        Sha256Hasher(digest::Context::new(&digest::SHA256))
    }

    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub fn finish(self) -> Sha256 {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(self.0.finish().as_ref());
        Sha256(bytes)
    }
}

impl Default for Sha256Hasher {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Sha256 {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "sha256 must be 64 hex digits".to_owned();
        if text.len() != 64 || !text.is_ascii() {
            return Err(wrong());
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| wrong())?;
            // from_str_radix would take a sign
            *byte = if pair.starts_with('+') {
                return Err(wrong());
            } else {
                u8::from_str_radix(pair, 16).map_err(|_| wrong())?
            };
        }
        Ok(Sha256(bytes))
    }
}

impl Serialize for Sha256 {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Sha256 {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Declares an enum whose variants each have one name, used in JSON, SQL, metrics and logs alike.
macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum $name { $($(#[$vdoc])* #[serde(rename = $text)] $variant),+ }

        impl $name {
            /// All of them, in order.
            pub const ALL: &[$name] = &[$($name::$variant),+];

            /// Its one name.
            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($text => Ok($name::$variant),)+
                    _ => Err(format!("expected one of {}, found {text:?}", [$($text),+].join(", "))),
                }
            }
        }
    };
}
pub(crate) use named;

named! {
    /// Where an upload stands.
    State {
        /// Durable here, waiting for the drain.
        Queued = "queued",
        /// Leased by a drain that is sending it.
        Uploading = "uploading",
        /// S3 has it and confirmed its digest.
        Uploaded = "uploaded",
        /// Set aside through a fault of its own; an operator decides.
        Dead = "dead",
        /// Given up by policy; this record is its tombstone.
        Shed = "shed",
    }
}

named! {
    /// How soon an upload should leave, compared with others.
    #[derive(Default)]
    Priority {
        Low = "low",
        #[default]
        Normal = "normal",
        High = "high",
    }
}

named! {
    /// The kinds of image that are accepted, by their media types.
    ImageType {
        Jpeg = "image/jpeg",
        Png = "image/png",
        Gif = "image/gif",
        Webp = "image/webp",
        Heif = "image/heif",
        Avif = "image/avif",
        Tiff = "image/tiff",
        Bmp = "image/bmp",
    }
}

impl ImageType {
    /// How many of a photo's first bytes [`ImageType::sniff`] looks at.
    pub const SNIFF_BYTES: usize = 64;

    /// The kind of image that starts with `head`. What a device claims does not matter; the bytes do.
    pub fn sniff(head: &[u8]) -> Option<Self> {
        match infer::get(head)?.mime_type() {
            "image/heic" => Some(ImageType::Heif),
            mime => mime.parse().ok(),
        }
    }

    /// The file extension, without its dot.
    pub fn extension(self) -> &'static str {
        match self {
            ImageType::Jpeg => "jpg",
            ImageType::Png => "png",
            ImageType::Gif => "gif",
            ImageType::Webp => "webp",
            ImageType::Heif => "heic",
            ImageType::Avif => "avif",
            ImageType::Tiff => "tif",
            ImageType::Bmp => "bmp",
        }
    }
}

/// How object keys are made: text with `{device}`, `{yyyy}`, `{mm}`, `{dd}`, `{hh}`, `{id}` and `{ext}` in it. The date is the
/// acceptance's, in UTC. `{id}` must be there, so that no two uploads share a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyTemplate {
    prefix: String,
    template: String,
}

impl KeyTemplate {
    const PLACEHOLDERS: [&'static str; 7] = ["device", "yyyy", "mm", "dd", "hh", "id", "ext"];

    /// `template` under `prefix`; a slash is put between them unless the prefix is empty or ends with one.
    pub fn new(prefix: &str, template: &str) -> Result<Self, String> {
        let mut rest = template;
        let mut has_id = false;
        while let Some(open) = rest.find('{') {
            let close = rest[open..].find('}').ok_or_else(|| format!("a {{ without its }} in {template:?}"))? + open;
            let name = &rest[open + 1..close];
            if !Self::PLACEHOLDERS.contains(&name) {
                return Err(format!("{{{name}}} is not known; expected {{{}}}", Self::PLACEHOLDERS.join("}, {")));
            }
            has_id |= name == "id";
            rest = &rest[close + 1..];
        }
        if !has_id {
            return Err(format!("{template:?} has no {{id}}, so that two photos could share a key"));
        }
        if template.starts_with('/') || template.chars().chain(prefix.chars()).any(|c| c.is_control()) {
            return Err(format!("{template:?} starts with a slash or holds control characters"));
        }
        let mut prefix = prefix.trim_start_matches('/').to_owned();
        if !prefix.is_empty() && !prefix.ends_with('/') {
            prefix.push('/');
        }
        if prefix.len() + template.len() + DEVICE_ID_BYTES_MAX + 64 > OBJECT_KEY_BYTES_MAX {
            return Err(format!("keys made from it could be longer than S3's {OBJECT_KEY_BYTES_MAX} bytes"));
        }
        Ok(KeyTemplate { prefix, template: template.to_owned() })
    }

    /// What every key starts with.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The key of the upload `id` from `device`, accepted at `received_at`.
    pub fn key(&self, device: &DeviceId, id: UploadId, received_at: UnixMs, image: ImageType) -> String {
        let date = received_at.timestamp().to_zoned(jiff::tz::TimeZone::UTC);
        let filled = self
            .template
            .replace("{device}", device.as_str())
            .replace("{yyyy}", &format!("{:04}", date.year()))
            .replace("{mm}", &format!("{:02}", date.month()))
            .replace("{dd}", &format!("{:02}", date.day()))
            .replace("{hh}", &format!("{:02}", date.hour()))
            .replace("{id}", &id.to_string())
            .replace("{ext}", image.extension());
        format!("{}{filled}", self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(text: &str) -> Result<DeviceId, String> {
        text.parse()
    }

    #[test]
    fn a_device_id_can_name_nothing_but_itself() {
        for bad in ["", "../etc", "a/b", "a\0b", ".hidden", "..", "cam 1", "caméra", &"x".repeat(129)] {
            assert!(device(bad).is_err(), "{bad:?}");
        }
        for good in ["cam-0001", "00:1B:44:11:3A:B7", "gate.north_2", &"x".repeat(128)] {
            assert!(device(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn the_same_photo_of_the_same_device_has_the_same_id_everywhere() {
        let (a, b) = (device("cam-1").unwrap(), device("cam-2").unwrap());
        assert_eq!(UploadId::of_device(&a, "42"), UploadId::of_device(&a, "42"));
        assert_ne!(UploadId::of_device(&a, "42"), UploadId::of_device(&b, "42"));
        assert_ne!(UploadId::of_device(&a, "42"), UploadId::of_device(&a, "43"));
    }

    #[test]
    fn a_key_is_the_template_filled_in() {
        let template = KeyTemplate::new("site-7", "{device}/{yyyy}/{mm}/{dd}/{id}.{ext}").unwrap();
        let id = UploadId::of_device(&device("cam-1").unwrap(), "1");
        let key =
            template.key(&device("cam-1").unwrap(), id, "2026-11-21T23:59:59.999Z".parse().unwrap(), ImageType::Jpeg);
        assert_eq!(key, format!("site-7/cam-1/2026/11/21/{id}.jpg"));
    }

    #[test]
    fn a_template_that_could_collide_or_is_misspelt_is_refused() {
        for bad in ["{device}.jpg", "{id", "{id}/{dvice}", "/{id}"] {
            assert!(KeyTemplate::new("", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_digest_is_64_hex_digits_and_nothing_else() {
        let digest = Sha256::of(b"abc");
        assert_eq!(digest.to_string(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(digest.to_string().to_uppercase().parse(), Ok(digest));
        assert!("+a".repeat(32).parse::<Sha256>().is_err());
        assert!("ba78".parse::<Sha256>().is_err());
    }

    #[test]
    fn the_bytes_decide_what_an_image_is() {
        assert_eq!(ImageType::sniff(&[0xff, 0xd8, 0xff, 0xe0, 0, 0, 0, 0]), Some(ImageType::Jpeg));
        assert_eq!(ImageType::sniff(b"\x89PNG\r\n\x1a\n"), Some(ImageType::Png));
        assert_eq!(ImageType::sniff(b"this is text that claims to be a JPEG"), None);
        assert_eq!(ImageType::sniff(b""), None);
    }
}
