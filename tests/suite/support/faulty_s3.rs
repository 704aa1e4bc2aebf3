//! A proxy before a real S3 server that makes it misbehave on demand: what a sound server cannot be made to show.
//!
//! One request a connection. The head passes through as it came (its signature covers the host), so that whatever is not
//! touched is between the program and the real server.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use forebay::bucket::Bucket;
use forebay::config::Endpoint;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// One way to misbehave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The connection breaks as soon as it is there.
    Unreachable,
    SlowDown,
    InternalError,
    ExpiredToken,
    NoSuchBucket,
    ClockSkewed,
    /// The connection breaks in the middle of the body.
    ResetInBody,
    /// The body is read, and no answer ever comes.
    Hang,
    /// The server has it, and the connection breaks in the middle of the answer's head.
    TruncatedAnswer,
    /// The server has it, and the connection breaks before the answer.
    AnswerLost,
    /// 200, and an error as its body.
    OkWithErrorBody,
    /// 200 to everything, from something that is no S3 at all.
    CaptivePortal,
    /// A byte of the body is changed on its way.
    BodyCorrupted,
    /// The answer confirms another SHA-256.
    WrongChecksum,
    /// The server gives no SHA-256, and another ETag than the bytes'.
    WrongEtag,
}

impl Fault {
    /// Those that are nobody's fault but the environment's.
    pub const OF_THE_ENVIRONMENT: &[Fault] = &[
        Fault::Unreachable,
        Fault::SlowDown,
        Fault::InternalError,
        Fault::ExpiredToken,
        Fault::NoSuchBucket,
        Fault::ClockSkewed,
        Fault::ResetInBody,
        Fault::Hang,
        Fault::TruncatedAnswer,
        Fault::AnswerLost,
        Fault::OkWithErrorBody,
        Fault::CaptivePortal,
    ];

    /// Those that concern one object's bytes.
    pub const OF_THE_DATA: &[Fault] = &[Fault::BodyCorrupted, Fault::WrongChecksum, Fault::WrongEtag];
}

/// When it misbehaves.
#[derive(Debug, Clone, PartialEq)]
pub enum Mood {
    Sound,
    Always(Fault),
    /// Where the key holds this text.
    ForKeysWith(&'static str, Fault),
    /// This share of all requests, with one of these faults each.
    Share(f64, Vec<Fault>),
}

/// The proxy. It ends with the runtime that started it.
#[derive(Clone)]
pub struct FaultyS3 {
    pub endpoint: Endpoint,
    shared: Arc<Shared>,
}

struct Shared {
    server: String,
    mood: Mutex<Mood>,
    requests: AtomicU64,
    faults: AtomicU64,
    /// Bytes of bodies that came in.
    body_bytes: AtomicU64,
}

impl FaultyS3 {
    /// Before the server at `endpoint`.
    pub async fn before(endpoint: &Endpoint) -> FaultyS3 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let shared = Arc::new(Shared {
            server: endpoint.url.trim_start_matches("http://").to_owned(),
            mood: Mutex::new(Mood::Sound),
            requests: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            body_bytes: AtomicU64::new(0),
        });
        let proxy = FaultyS3 { endpoint: Endpoint { url, ..endpoint.clone() }, shared: shared.clone() };
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let shared = shared.clone();
                tokio::spawn(async move { drop(relay(client, &shared).await) });
            }
        });
        proxy
    }

    /// The bucket of this name, by way of the proxy.
    pub fn bucket(&self, name: &str) -> Bucket {
        Bucket::at(&self.endpoint, name)
    }

    pub fn set(&self, mood: Mood) {
        *self.shared.mood.lock().unwrap() = mood;
    }

    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// How many requests were met with a fault.
    pub fn faults(&self) -> u64 {
        self.shared.faults.load(Ordering::Relaxed)
    }

    pub fn body_bytes(&self) -> u64 {
        self.shared.body_bytes.load(Ordering::Relaxed)
    }
}

impl Shared {
    fn fault(&self, path: &str) -> Option<Fault> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let fault = match &*self.mood.lock().unwrap() {
            Mood::Always(fault) => Some(*fault),
            Mood::ForKeysWith(text, fault) if path.contains(text) => Some(*fault),
            Mood::Share(share, faults) if rand::random_bool(*share) => {
                Some(faults[rand::random_range(0..faults.len())])
            }
            _ => None,
        };
        self.faults.fetch_add(u64::from(fault.is_some()), Ordering::Relaxed);
        fault
    }
}

/// The head of a request: what was read, and where it ends.
struct Head {
    text: String,
    method: String,
    path: String,
    content_length: u64,
    /// The first bytes of the body, which came with it.
    rest: Vec<u8>,
}

async fn read_head(client: &mut TcpStream) -> std::io::Result<Head> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break end + 4;
        }
        if client.read_buf(&mut bytes).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    };
    let rest = bytes.split_off(end);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let mut words = text.split(' ');
    let (method, path) = (words.next().unwrap_or("").to_owned(), words.next().unwrap_or("").to_owned());
    let content_length = header(&text, "content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
    Ok(Head { method, path, content_length, rest, text })
}

fn header(head: &str, name: &str) -> Option<String> {
    head.lines().find_map(|line| {
        let (found, text) = line.split_once(':')?;
        found.eq_ignore_ascii_case(name).then(|| text.trim().to_owned())
    })
}

async fn relay(mut client: TcpStream, shared: &Shared) -> std::io::Result<()> {
    let head = read_head(&mut client).await?;
    let fault = shared.fault(&head.path);
    let answer = |status: &str, code: &str| {
        let body = format!("<Error><Code>{code}</Code><Message>as the test wants it</Message></Error>");
        let body = if head.method == "HEAD" { String::new() } else { body };
        format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len())
    };
    let said = match fault {
        Some(Fault::Unreachable) => return reset(client),
        Some(Fault::ResetInBody) => {
            let half = head.content_length / 2;
            read_body(&mut client, head.rest, half, shared).await?;
            return reset(client);
        }
        Some(Fault::SlowDown) => answer("503 Slow Down", "SlowDown"),
        Some(Fault::InternalError) => answer("500 Internal Server Error", "InternalError"),
        Some(Fault::ExpiredToken) => answer("400 Bad Request", "ExpiredToken"),
        Some(Fault::NoSuchBucket) => answer("404 Not Found", "NoSuchBucket"),
        Some(Fault::ClockSkewed) => answer("403 Forbidden", "RequestTimeTooSkewed"),
        Some(Fault::OkWithErrorBody) => answer("200 OK", "InternalError"),
        Some(Fault::CaptivePortal) => {
            "HTTP/1.1 200 OK\r\nConnection: close\r\nETag: W/\"c-login\"\r\nContent-Length: 12\r\n\r\n".to_owned()
                + if head.method == "HEAD" { "" } else { "<html></html" }
        }
        Some(Fault::Hang) => {
            let mut sink = Vec::new();
            client.read_to_end(&mut sink).await?;
            return Ok(());
        }
        _ => return pass(client, head, fault, shared).await,
    };
    let length = head.content_length;
    read_body(&mut client, head.rest, length, shared).await?;
    client.write_all(said.as_bytes()).await?;
    client.shutdown().await
}

/// Everything goes to the server and back, changed as the fault wants it.
async fn pass(mut client: TcpStream, head: Head, fault: Option<Fault>, shared: &Shared) -> std::io::Result<()> {
    let mut server = TcpStream::connect(&shared.server).await?;
    let closing = head.text.replacen("\r\n", "\r\nConnection: close\r\n", 1);
    server.write_all(closing.as_bytes()).await?;
    let length = head.content_length;
    let mut body = read_body(&mut client, head.rest, length, shared).await?;
    if fault == Some(Fault::BodyCorrupted)
        && let Some(byte) = body.last_mut()
    {
        *byte ^= 1;
    }
    server.write_all(&body).await?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer).await?;
    match fault {
        Some(Fault::AnswerLost) => return reset(client),
        Some(Fault::TruncatedAnswer) => {
            client.write_all(&answer[..answer.len().min(20)]).await?;
            return client.shutdown().await;
        }
        Some(Fault::WrongChecksum) => {
            answer = with_headers(&answer, "x-amz-checksum-sha256", |digest| Some(turned(digest)))
        }
        Some(Fault::WrongEtag) => {
            answer = with_headers(&answer, "x-amz-checksum-sha256", |_| None);
            answer = with_headers(&answer, "etag", |_| Some(format!("\"{}\"", "0".repeat(32))));
        }
        _ => {}
    }
    client.write_all(&answer).await?;
    client.shutdown().await
}

async fn read_body(client: &mut TcpStream, rest: Vec<u8>, length: u64, shared: &Shared) -> std::io::Result<Vec<u8>> {
    let mut body = rest;
    shared.body_bytes.fetch_add(body.len() as u64, Ordering::Relaxed);
    while (body.len() as u64) < length {
        match client.read_buf(&mut body).await? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            read => shared.body_bytes.fetch_add(read as u64, Ordering::Relaxed),
        };
    }
    Ok(body)
}

/// The connection ends with a reset, not a farewell.
fn reset(client: TcpStream) -> std::io::Result<()> {
    client.set_zero_linger()
}

/// Another digest of the same form.
fn turned(digest: &str) -> String {
    let (first, rest) = digest.split_at(1);
    format!("{}{rest}", if first == "A" { "B" } else { "A" })
}

/// The answer with one header changed, or without it.
fn with_headers(answer: &[u8], name: &str, change: impl Fn(&str) -> Option<String>) -> Vec<u8> {
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap_or(answer.len());
    let head = String::from_utf8_lossy(&answer[..end]).into_owned();
    let lines = head.split("\r\n").filter_map(|line| match line.split_once(':') {
        Some((found, text)) if found.eq_ignore_ascii_case(name) => {
            change(text.trim()).map(|text| format!("{found}: {text}"))
        }
        _ => Some(line.to_owned()),
    });
    let mut changed = lines.collect::<Vec<_>>().join("\r\n").into_bytes();
    changed.extend_from_slice(&answer[end..]);
    changed
}
