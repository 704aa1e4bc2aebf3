//! The bucket: the only user of the S3 SDK.
//!
//! Always: one PUT a photo, with the SHA-256 taken at ingest, so that the store refuses altered bytes; success only when the
//! store confirmed those bytes. Never: a retry of its own (the queue owns back-off, and bytes sent again are paid for again),
//! and never a credential in an error.
//!
//! `put.rs` is the PUT, signed with what `credentials.rs` holds; `client.rs` is the HTTP client beneath it and the SDK, whose
//! connections a pacer may hold to its budget; `dial.rs` opens them.

mod client;
mod credentials;
mod dial;
mod put;

use std::time::Duration;

use aws_config::environment::EnvironmentVariableCredentialsProvider;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Credentials, Region, RequestChecksumCalculation, ResponseChecksumValidation,
    StalledStreamProtectionConfig,
};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::RequestId;
use aws_sdk_s3::types::ChecksumMode;
use bytes::Bytes;
use md5::{Digest, Md5};

use self::put::Put;
use crate::config::{BucketConfig, Endpoint};
use crate::error::{Error, Result, chain};
use crate::pacer::{Pacer, Turn};
use crate::upload::{ImageType, Sha256, Sha256Hasher};

/// Longest wait for a connection to the store.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for the answer to a request without a photo.
const SMALL_REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// One bucket of one S3-compatible store. Cheap to clone.
#[derive(Clone)]
pub struct Bucket {
    client: Client,
    put: Put,
    name: String,
    /// Proxies of the environment are heeded.
    proxies: bool,
}

/// A photo on its way to the bucket, and whose turn it is.
#[derive(Debug, Clone)]
pub struct Object<'a> {
    pub key: &'a str,
    pub content_type: ImageType,
    pub sha256: Sha256,
    pub photo: &'a Bytes,
    pub turn: &'a Turn,
}

/// Whether the store has an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    Yes,
    No,
    /// It does not say: without the right to list the bucket, a missing object is forbidden.
    NotSaid,
}

/// An object as a listing shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub key: String,
    pub size_bytes: u64,
}

impl Bucket {
    /// The bucket of a configuration, with credentials, region and endpoint from AWS's own variables and chain.
    pub async fn connect(config: &BucketConfig) -> Bucket {
        let mut loader = aws_config::defaults(BehaviorVersion::latest());
        // the first place of the chain anyway; the others read all the system's certificates before anyone asks for them
        let environment = EnvironmentVariableCredentialsProvider::new();
        if environment.provide_credentials().await.is_ok() {
            loader = loader.credentials_provider(environment);
        }
        let shared = loader.load().await;
        let mut builder = aws_sdk_s3::config::Builder::from(&shared).force_path_style(config.path_style);
        if shared.region().is_none() {
            // compatible stores do not care; AWS itself answers with the right one
            builder = builder.region(Region::new("us-east-1"));
        }
        Bucket::with(builder, shared.credentials_provider(), &config.name, true)
    }

    /// A bucket at an endpoint that is given, not configured.
    pub fn at(endpoint: &Endpoint, name: &str) -> Bucket {
        let credentials = Credentials::new(&endpoint.access_key, &endpoint.secret_key, None, None, "given");
        let credentials = SharedCredentialsProvider::new(credentials);
        let builder = aws_sdk_s3::config::Builder::new()
            .behavior_version(BehaviorVersion::latest())
            .endpoint_url(&endpoint.url)
            .region(Region::new("us-east-1"))
            .credentials_provider(credentials.clone())
            .force_path_style(true);
        // the store is on this machine: no proxy
        Bucket::with(builder, Some(credentials), name, false)
    }

    /// The same bucket, but every byte to it is paid for.
    pub fn paced(&self, pacer: &Pacer) -> Bucket {
        let http = client::Client::new(Some(pacer.clone()), self.proxies);
        let client = Client::from_conf(self.client.config().to_builder().http_client(http.clone()).build());
        Bucket { client, put: self.put.over(http), ..self.clone() }
    }

    fn with(
        builder: aws_sdk_s3::config::Builder,
        credentials: Option<SharedCredentialsProvider>,
        name: &str,
        proxies: bool,
    ) -> Bucket {
        let timeouts =
            TimeoutConfig::builder().connect_timeout(CONNECT_TIMEOUT).operation_timeout(SMALL_REQUEST_TIMEOUT).build();
        let http = client::Client::new(None, proxies);
        let config = builder
            .http_client(http.clone())
            .retry_config(RetryConfig::disabled())
            .timeout_config(timeouts)
            // what is paced is meant to stall
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            // otherwise the SDK adds trailers that several compatible stores refuse
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            .build();
        let client = Client::from_conf(config);
        Bucket { put: Put::new(&client, http, credentials, name), client, name: name.to_owned(), proxies }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Puts one photo. True when the store's answer confirmed its bytes; otherwise [`Bucket::confirmed`] must be asked. A slow
    /// link is no failure: whoever sends watches the turn.
    ///
    /// [`Error::Unavailable`] when the environment is at fault, [`Error::Refused`] when this very object is.
    pub async fn put(&self, object: &Object<'_>) -> Result<bool> {
        match self.put.send(object).await? {
            Some(digest) => confirm_digest(object, &digest).map(|()| true),
            None => Ok(false),
        }
    }

    /// Whether the store holds exactly this photo under its key. An error when it holds something else there, or gives no
    /// digest by which to tell.
    pub async fn confirmed(&self, object: &Object<'_>) -> Result<Held> {
        let turn = object.turn.clone();
        let head = self
            .client
            .head_object()
            .bucket(&self.name)
            .key(object.key)
            .checksum_mode(ChecksumMode::Enabled)
            .customize()
            .mutate_request(move |request| request.add_extension(turn.clone()))
            .send()
            .await;
        let head = match head {
            Ok(head) => head,
            Err(error) if status(&error) == Some(404) => return Ok(Held::No),
            // what S3 answers for a key that is not there to those who may not list the bucket
            Err(error) if status(&error) == Some(403) => return Ok(Held::NotSaid),
            Err(error) => return Err(classify(&format!("HEAD {}", object.key), error)),
        };
        let etag = head.e_tag().unwrap_or("").trim_matches('"').to_owned();
        let is_md5 = etag.len() == 32 && etag.bytes().all(|byte| byte.is_ascii_hexdigit());
        if head.checksum_sha256().is_none() && head.request_id().is_none() && !is_md5 {
            // a captive portal says 200 to everything, and many give an ETag of their own
            return Err(Error::Unavailable(format!("HEAD {}: what answered is no object store", object.key)));
        }
        if head.content_length() != Some(object.photo.len() as i64) {
            return Err(Error::Refused(format!(
                "the store holds {} bytes under {}, not {}",
                head.content_length().unwrap_or(0),
                object.key,
                object.photo.len()
            )));
        }
        if let Some(digest) = head.checksum_sha256() {
            return confirm_digest(object, digest).map(|()| Held::Yes);
        }
        // without encryption or multipart an ETag is the MD5, which stores without checksums still give
        if !is_md5 {
            return Err(Error::Unavailable(format!(
                "the store confirms neither a SHA-256 nor an MD5 of {}, so that no photo can be called uploaded",
                object.key
            )));
        }
        // the store has checked no digest of ingest's, so it is checked here that these are the bytes
        let photo = object.photo.clone();
        let digests = tokio::task::spawn_blocking(move || (Sha256::of(&photo), Md5::digest(&photo)));
        let (sha256, md5) = digests.await.map_err(|e| Error::unavailable("cannot take a photo's digest", e))?;
        if sha256 != object.sha256 {
            return Err(Error::Damaged(format!("its bytes have the digest {sha256}, not {}", object.sha256)));
        }
        let md5: String = md5.iter().map(|byte| format!("{byte:02x}")).collect();
        if etag.eq_ignore_ascii_case(&md5) {
            Ok(Held::Yes)
        } else {
            Err(Error::Refused(format!("the store holds other bytes under {}", object.key)))
        }
    }

    /// Size and digest of the object's bytes, read back whole. None when there is no such object.
    pub async fn read_back(&self, key: &str) -> Result<Option<(u64, Sha256)>> {
        let doing = format!("GET {key}");
        let mut object = match self.client.get_object().bucket(&self.name).key(key).send().await {
            Ok(object) => object,
            Err(error) if status(&error) == Some(404) => return Ok(None),
            Err(error) => return Err(classify(&doing, error)),
        };
        let (mut size, mut hasher) = (0, Sha256Hasher::new());
        while let Some(piece) = object.body.next().await {
            let piece = piece.map_err(|e| Error::unavailable(&doing, chain(&e)))?;
            size += piece.len() as u64;
            hasher.update(&piece);
        }
        Ok(Some((size, hasher.finish())))
    }

    /// Calls `found` with every object whose key starts with `prefix`, in the order of their keys.
    pub async fn list(&self, prefix: &str, mut found: impl FnMut(Listed)) -> Result<()> {
        let mut pages = self.client.list_objects_v2().bucket(&self.name).prefix(prefix).into_paginator().send();
        while let Some(page) = pages.next().await {
            let page = page.map_err(|error| classify("LIST", error))?;
            for object in page.contents() {
                let key = object.key().unwrap_or_default().to_owned();
                found(Listed { key, size_bytes: object.size().unwrap_or(0).max(0) as u64 });
            }
        }
        Ok(())
    }

    /// Makes the bucket; that it is there already is no error.
    pub async fn create(&self) -> Result<()> {
        match self.client.create_bucket().bucket(&self.name).send().await {
            Ok(_) => Ok(()),
            Err(error) if status(&error) == Some(409) => Ok(()),
            Err(error) => Err(classify("CREATE BUCKET", error)),
        }
    }
}

fn confirm_digest(object: &Object<'_>, digest: &str) -> Result<()> {
    if digest == object.sha256.base64() {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "the store says that the SHA-256 of {} is {digest}, not {}",
        object.key,
        object.sha256.base64()
    )))
}

fn status<E>(error: &SdkError<E>) -> Option<u16> {
    error.raw_response().map(|response| response.status().as_u16())
}

/// The answers that blame this very object. Everything else is held to be the environment, because an upload that is
/// wrongly set aside costs an operator's night, and one that is wrongly tried again costs a moment.
const CODES_OF_THE_OBJECT: &[&str] = &[
    "BadDigest",
    "InvalidDigest",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
    "EntityTooLarge",
    "EntityTooSmall",
    "KeyTooLongError",
    "MetadataTooLarge",
    "InvalidObjectName",
    "InvalidURI",
];

fn classify<E>(doing: &str, error: SdkError<E>) -> Error
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    match (&error, status(&error)) {
        (SdkError::ServiceError(service), Some(status)) => {
            answered(doing, status, service.err().code(), service.err().message())
        }
        // what the SDK wraps the cause in says nothing to an operator
        (SdkError::DispatchFailure(failure), _) => {
            let wrapped = failure.as_connector_error().map(|wrapped| wrapped as &dyn std::error::Error);
            unanswered(doing, wrapped.and_then(|wrapped| wrapped.source()).unwrap_or(&error))
        }
        _ => Error::unavailable(doing, chain(&error)),
    }
}

/// What an answer of the store's that is no success says.
fn answered(doing: &str, status: u16, code: Option<&str>, message: Option<&str>) -> Error {
    let code = code.unwrap_or("no code");
    let text = format!("{doing}: S3 answered {status} {code}: {}{}", message.unwrap_or("no message"), remedy(code));
    match CODES_OF_THE_OBJECT.contains(&code) || status == 413 {
        true => Error::Refused(text),
        false => Error::Unavailable(text),
    }
}

/// There is no answer, because of this.
fn unanswered(doing: &str, cause: &(dyn std::error::Error + 'static)) -> Error {
    Error::unavailable(doing, credentials_missing(cause).unwrap_or_else(|| chain(cause)))
}

/// What to say where `error` is that there are no credentials: where they may stand, and not every place that was looked at.
fn credentials_missing(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    let missing = causes.find_map(|cause| cause.downcast_ref::<CredentialsError>())?;
    let remedy = "set both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE to a profile that has them, or give \
                  the machine a role";
    Some(match missing {
        CredentialsError::CredentialsNotLoaded(_) => format!("there are no AWS credentials ({remedy})"),
        other => format!("AWS credentials were not to be had ({remedy}): {}", chain(other)),
    })
}

/// What an operator can do about the commoner answers.
fn remedy(code: &str) -> &'static str {
    match code {
        "RequestTimeTooSkewed" => " (set this machine's clock: it is off by more than 15 minutes)",
        "ExpiredToken" | "InvalidToken" => {
            " (renew the AWS credentials; those of the environment or a profile need a restart)"
        }
        "InvalidAccessKeyId" | "SignatureDoesNotMatch" => " (check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)",
        "AccessDenied" => " (the credentials need s3:PutObject and s3:GetObject on the bucket)",
        "NoSuchBucket" => " (make the bucket, or set FOREBAY_S3_BUCKET)",
        "PermanentRedirect" | "AuthorizationHeaderMalformed" => " (set AWS_REGION to the bucket's region)",
        _ => "",
    }
}
