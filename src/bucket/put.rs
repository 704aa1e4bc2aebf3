//! The PUT of a photo, written out.
//!
//! It is the request that is made for every photo. The SDK's way to it, through layers of configuration, endpoint rules and
//! some thirty interceptors, took a fifth of the drain's processor time (docs/performance.md). So the SDK is asked once where
//! photos go and by which names requests there are signed, and each is then signed by the crate that the SDK signs with. Always:
//! the digest that ingest took is both signed and given to the store to check. Never: a retry, or a redirect that is followed.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use aws_credential_types::provider::SharedCredentialsProvider;
use aws_sdk_s3::Client;
use aws_sdk_s3::presigning::PresigningConfig;
use aws_sdk_s3::primitives::SdkBody;
use aws_sigv4::http_request::{
    PayloadChecksumKind, PercentEncodingMode, SignableBody, SignableRequest, SigningSettings, UriPathNormalizationMode,
    sign,
};
use aws_sigv4::sign::v4;
use aws_smithy_runtime_api::client::identity::Identity;
use bytes::Bytes;
use http::header::{AGE, CONTENT_TYPE, DATE, HOST, USER_AGENT};
use http::{HeaderMap, HeaderValue, Request, Response, Uri};
use http_body_util::{BodyExt, Limited};
use jiff::fmt::rfc2822;
use jiff::{SignedDuration, Timestamp};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde::Deserialize;
use tokio::sync::OnceCell;

use super::client::{self, Failure};
use super::credentials::Credentials;
use super::{CONNECT_TIMEOUT, Object, answered, classify, unanswered};
use crate::error::{Error, Result};

/// All but what a key may have in an address as it is: RFC 3986's unreserved characters, and the ends of folders.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');
/// S3's errors have a few hundred bytes.
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// A clock that is off by less is not why a store refused.
const SKEW_MIN: SignedDuration = SignedDuration::from_mins(4);

/// The answers after which other credentials may do.
const CODES_OF_CREDENTIALS: &[&str] = &["ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId"];
const CHECKSUM: &str = "x-amz-checksum-sha256";
const AGENT: HeaderValue = HeaderValue::from_static(concat!("forebay/", env!("CARGO_PKG_VERSION")));

/// Puts photos into one bucket. Cheap to clone; all clones share what they know.
#[derive(Clone)]
pub(super) struct Put {
    http: client::Client,
    known: Arc<Known>,
}

struct Known {
    /// For its word on where photos go. It sends none, and has nobody's credentials.
    sdk: Client,
    bucket: String,
    place: OnceCell<Place>,
    credentials: Credentials,
    /// How far the store's clock was ahead of this machine's when it last refused a request.
    skew: Mutex<SignedDuration>,
}

/// Where photos go, and the names by which requests there are signed.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    /// What stands before the key: scheme, host, and the bucket where it is part of the path.
    before_key: String,
    host: HeaderValue,
    region: String,
    service: String,
}

impl Put {
    /// Over `http`, signed with `provider`'s credentials, to where `sdk` would send them.
    pub(super) fn new(
        sdk: &Client,
        http: client::Client,
        provider: Option<SharedCredentialsProvider>,
        bucket: &str,
    ) -> Put {
        let nobodys = aws_credential_types::Credentials::new("nobody", "nobody", None, None, "for an address");
        // for directory buckets the SDK would open a session, and sign with that
        let config = sdk.config().to_builder().disable_s3_express_session_auth(true).credentials_provider(nobodys);
        let known = Known {
            sdk: Client::from_conf(config.build()),
            bucket: bucket.to_owned(),
            place: OnceCell::new(),
            credentials: Credentials::of(provider),
            skew: Mutex::default(),
        };
        Put { http, known: Arc::new(known) }
    }

    /// The same, over other connections.
    pub(super) fn over(&self, http: client::Client) -> Put {
        Put { http, known: self.known.clone() }
    }

    /// Sends one photo, for as long as it takes; the SHA-256 in base64 that the store says it has, if it says.
    ///
    /// [`Error::Unavailable`] when the environment is at fault, [`Error::Refused`] when this very object is.
    pub(super) async fn send(&self, object: &Object<'_>) -> Result<Option<String>> {
        let doing = format!("PUT {}", object.key);
        let place = self.known.place(&doing).await?;
        let now = self.known.now();
        let credentials = self.known.credentials.get(now).await.map_err(|error| unanswered(&doing, &error))?;
        let answer = async {
            let request = place.request(object, &credentials, now)?;
            let (head, body) = self.http.send(request, CONNECT_TIMEOUT).await?.into_parts();
            // to its end, so that the connection can be used again, and no success that was cut off is believed
            let body = match Limited::new(body, ANSWER_BYTES_MAX).collect().await {
                Ok(body) => body.to_bytes(),
                // its status says enough
                Err(_) if !head.status.is_success() => Bytes::new(),
                Err(error) => return Err(error),
            };
            Ok::<_, Failure>(Response::from_parts(head, body))
        };
        let answer = answer.await.map_err(|error| unanswered(&doing, error.as_ref()))?;
        if answer.status().is_success() {
            let digest = answer.headers().get(CHECKSUM).and_then(|digest| digest.to_str().ok());
            return Ok(digest.map(str::to_owned));
        }
        let refusal: Refusal = quick_xml::de::from_reader(&answer.body()[..]).unwrap_or_default();
        if refusal.code.as_deref().is_some_and(|code| CODES_OF_CREDENTIALS.contains(&code)) {
            self.known.credentials.refused(&credentials);
        }
        if answer.status().as_u16() == 403 {
            self.known.note_time(answer.headers());
        }
        Err(answered(&doing, answer.status().as_u16(), refusal.code.as_deref(), refusal.message.as_deref()))
    }
}

impl Known {
    async fn place(&self, doing: &str) -> Result<&Place> {
        let asked = self.place.get_or_try_init(async || {
            let minute = PresigningConfig::expires_in(Duration::from_secs(60));
            let minute = minute.map_err(|error| Error::unavailable(doing, error))?;
            let signed = self.sdk.put_object().bucket(&self.bucket).key(Place::KEY).presigned(minute).await;
            let signed = signed.map_err(|error| classify(doing, error))?;
            Place::of(signed.uri()).ok_or_else(|| {
                Error::Unavailable(format!(
                    "{doing}: requests to the bucket {} are signed in a way that is not known here; \
                                            give it by its name, not by that of an access point",
                    self.bucket
                ))
            })
        });
        asked.await
    }

    /// The time to sign with: the store's, where that is known to be another.
    fn now(&self) -> SystemTime {
        let now = Timestamp::now();
        now.checked_add(*self.skew()).unwrap_or(now).into()
    }

    /// A store that refused a request may have done so for its time, and says its own.
    fn note_time(&self, headers: &HeaderMap) {
        if headers.contains_key(AGE) {
            return; // it was kept on the way, and so was its date
        }
        let said = headers.get(DATE).and_then(|date| date.to_str().ok());
        if let Some(theirs) = said.and_then(|date| rfc2822::parse(date).ok()) {
            let ahead = theirs.timestamp().duration_since(Timestamp::now());
            *self.skew() = if ahead.abs() < SKEW_MIN { SignedDuration::ZERO } else { ahead };
        }
    }

    fn skew(&self) -> MutexGuard<'_, SignedDuration> {
        self.skew.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Place {
    /// The key that the SDK is asked with: one that stands in an address as it is.
    const KEY: &str = "key";

    /// As the SDK has it in the address of a PUT of [`Place::KEY`] that carries its signature. None when it signs in another
    /// way than with credentials alone.
    fn of(signed: &str) -> Option<Place> {
        let (address, query) = signed.split_once('?')?;
        let before_key = address.strip_suffix(Place::KEY)?;
        let parameter = |name: &str| {
            let mut parameters = query.split('&').filter_map(|parameter| parameter.split_once('='));
            let value = parameters.find(|(called, _)| *called == name)?.1;
            percent_decode_str(value).decode_utf8().ok()
        };
        if parameter("X-Amz-Algorithm")? != "AWS4-HMAC-SHA256" {
            return None;
        }
        // key/date/region/service/aws4_request
        let credential = parameter("X-Amz-Credential")?;
        let mut scope = credential.rsplit('/').skip(1);
        let (service, region) = (scope.next()?.to_owned(), scope.next()?.to_owned());
        let host = client::host(&address.parse::<Uri>().ok()?).ok()?;
        Some(Place { before_key: before_key.to_owned(), host, region, service })
    }

    /// The PUT of this photo, signed with these credentials at this time.
    fn request(
        &self,
        object: &Object<'_>,
        credentials: &Identity,
        now: SystemTime,
    ) -> std::result::Result<Request<SdkBody>, Failure> {
        let address = format!("{}{}", self.before_key, utf8_percent_encode(object.key, ENCODED));
        let checksum = object.sha256.base64();
        let content_type = object.content_type.as_str();
        let mut settings = SigningSettings::default();
        // as S3 alone has it: each part of the path is encoded once, and "a//b" is not "a/b"
        settings.percent_encoding_mode = PercentEncodingMode::Single;
        settings.uri_path_normalization_mode = UriPathNormalizationMode::Disabled;
        settings.payload_checksum_kind = PayloadChecksumKind::XAmzSha256;
        let params = v4::SigningParams::builder()
            .identity(credentials)
            .region(&self.region)
            .name(&self.service)
            .time(now)
            .settings(settings)
            .build()?
            .into();
        let headers = [
            (HOST.as_str(), self.host.to_str()?),
            (CONTENT_TYPE.as_str(), content_type),
            (CHECKSUM, checksum.as_str()),
        ];
        let body = SignableBody::Precomputed(object.sha256.to_string());
        let signable = SignableRequest::new("PUT", address.as_str(), headers.into_iter(), body)?;
        let (signature, _) = sign(signable, &params)?.into_parts();
        let mut request = Request::put(&address)
            .header(HOST, &self.host)
            .header(CONTENT_TYPE, content_type)
            .header(CHECKSUM, &checksum)
            .header(USER_AGENT, AGENT)
            .extension(object.turn.clone())
            .body(SdkBody::from(object.photo.clone()))?;
        signature.apply_to_request_http1x(&mut request);
        Ok(request)
    }
}

/// The body of an error.
#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct Refusal {
    code: Option<String>,
    message: Option<String>,
}

#[cfg(test)]
mod tests {
    use aws_sdk_s3::config::{BehaviorVersion, Region};

    use super::*;
    use crate::pacer::Turn;
    use crate::upload::{ImageType, Sha256};

    const ODD_KEY: &str = "a b//ü+%2F&=?#~*'()!@:$,;[]/cam-1.jpg";

    fn key_pair(session_token: Option<&str>) -> SharedCredentialsProvider {
        let session_token = session_token.map(str::to_owned);
        SharedCredentialsProvider::new(aws_credential_types::Credentials::new(
            "AKID",
            "secret",
            session_token,
            None,
            "test",
        ))
    }

    /// Of an SDK with these settings, and with its words on where the odd key goes.
    async fn put_to(
        bucket: &str,
        set: impl Fn(aws_sdk_s3::config::Builder) -> aws_sdk_s3::config::Builder,
    ) -> (Put, String) {
        let builder = aws_sdk_s3::config::Builder::new()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new("eu-west-3"))
            .credentials_provider(key_pair(None))
            .http_client(client::Client::new(None, false));
        let sdk = Client::from_conf(set(builder).build());
        let put = Put::new(&sdk, client::Client::new(None, false), Some(key_pair(None)), bucket);
        let minute = PresigningConfig::expires_in(Duration::from_secs(60)).unwrap();
        let signed = put.known.sdk.put_object().bucket(bucket).key(ODD_KEY).presigned(minute).await.unwrap();
        (put, signed.uri().split_once('?').unwrap().0.to_owned())
    }

    async fn request(put: &Put, session_token: Option<&str>) -> Request<SdkBody> {
        let photo = Bytes::from_static(b"photo");
        let (sha256, turn) = (Sha256::of(&photo), Turn::default());
        let object = Object { key: ODD_KEY, content_type: ImageType::Jpeg, sha256, photo: &photo, turn: &turn };
        let credentials = Credentials::of(Some(key_pair(session_token))).get(SystemTime::now()).await.unwrap();
        put.known.place("PUT").await.unwrap().request(&object, &credentials, SystemTime::UNIX_EPOCH).unwrap()
    }

    #[tokio::test]
    async fn a_photo_goes_where_the_sdk_would_send_it() {
        for (bucket, settings, host, service) in [
            ("photos", (true, None), "s3.eu-west-3.amazonaws.com", "s3"),
            ("photos", (false, None), "photos.s3.eu-west-3.amazonaws.com", "s3"),
            ("photos", (true, Some("http://127.0.0.1:8333")), "127.0.0.1:8333", "s3"),
            ("photos", (true, Some("https://store.example/below/")), "store.example", "s3"),
            ("photos", (false, Some("https://store.example:9000")), "photos.store.example:9000", "s3"),
            (
                "photos--use1-az4--x-s3",
                (false, None),
                "photos--use1-az4--x-s3.s3express-use1-az4.eu-west-3.amazonaws.com",
                "s3express",
            ),
        ] {
            let (put, address) = put_to(bucket, |builder| {
                let builder = builder.force_path_style(settings.0);
                match settings.1 {
                    Some(endpoint) => builder.endpoint_url(endpoint),
                    None => builder,
                }
            })
            .await;
            let request = request(&put, None).await;
            assert_eq!(request.uri().to_string(), address);
            assert_eq!(request.headers()[HOST], host);
            let signed = request.headers()["authorization"].to_str().unwrap();
            let scope = format!("AWS4-HMAC-SHA256 Credential=AKID/19700101/eu-west-3/{service}/aws4_request, ");
            assert!(signed.starts_with(&scope), "{signed}");
        }
    }

    #[tokio::test]
    async fn digest_and_session_are_part_of_what_is_signed() {
        let (put, _) = put_to("photos", |builder| builder).await;
        let request = request(&put, Some("session")).await;
        let said = |name: &str| request.headers()[name].to_str().unwrap();
        assert_eq!(said("x-amz-checksum-sha256"), Sha256::of(b"photo").base64());
        assert_eq!(said("x-amz-content-sha256"), Sha256::of(b"photo").to_string());
        assert_eq!(said("x-amz-security-token"), "session");
        let names = "host;x-amz-checksum-sha256;x-amz-content-sha256;x-amz-date;x-amz-security-token";
        assert!(
            said("authorization").contains(&format!("SignedHeaders=content-type;{names}")),
            "{}",
            said("authorization")
        );
    }

    #[test]
    fn where_credentials_alone_do_not_sign_there_is_no_place() {
        assert_eq!(
            Place::of(
                "https://host/bucket/key?X-Amz-Algorithm=AWS4-ECDSA-P256-SHA256&X-Amz-Credential=A%2F1%2Fs3%2Faws4_request"
            ),
            None
        );
        assert_eq!(Place::of("https://host/bucket/key"), None);
    }

    #[tokio::test]
    async fn a_store_that_refuses_says_the_time_to_sign_with() {
        let (put, _) = put_to("photos", |builder| builder).await;
        let says = |ahead: SignedDuration| {
            let date = rfc2822::to_string(&(Timestamp::now() + ahead).to_zoned(jiff::tz::TimeZone::UTC)).unwrap();
            put.known.note_time(&HeaderMap::from_iter([(DATE, HeaderValue::try_from(date).unwrap())]));
            // to minutes: a date has whole seconds
            let signs = Timestamp::try_from(put.known.now()).unwrap().duration_since(Timestamp::now());
            signs.round(jiff::Unit::Minute).unwrap()
        };
        let half_a_century = SignedDuration::from_hours(450_000);
        assert_eq!(says(half_a_century), half_a_century);
        assert_eq!(says(SignedDuration::from_hours(-2)), SignedDuration::from_hours(-2));
        // that is no reason to refuse anything, so the clock is right by now
        assert_eq!(says(SignedDuration::from_mins(2)), SignedDuration::ZERO);
    }
}
