//! The HTTP client beneath the PUT and the S3 SDK: one request at a time on each of a few kept connections, which a pacer may
//! hold to its budget.
//!
//! Always: HTTP/1.1, as S3 speaks it; TLS with the system's certificates; past a proxy if the environment names one; a
//! request that never left a kept connection, because the store had closed it, is sent again on a new one. Never: a retry of
//! anything else.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::Duration;

use aws_sdk_s3::config::{HttpClient, RuntimeComponents};
use aws_sdk_s3::primitives::SdkBody;
use aws_smithy_runtime_api::client::http::{
    HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::client::result::ConnectorError;
use http::header::{HOST, PROXY_AUTHORIZATION};
use http::uri::Scheme;
use http::{HeaderValue, Request, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;
use tower_service::Service;

use super::dial::{Connection, Dial};
use crate::error::chain;
use crate::pacer::{Meter, Pacer, Turn};

/// A connection that was not used for so long is not used again: stores and firewalls give up theirs after about as long.
const IDLE_MAX: Duration = Duration::from_secs(15);
/// One that sent something and is still busy so long after the head of its answer is given up by the next request: a store that
/// has refused a photo early need not read the rest of it. What is fetched may take as long as it takes.
const SENDING_MAX: Duration = Duration::from_secs(60);
/// Longest wait for a connection where the SDK does not say.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no answer, or no connection.
pub(super) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The client. Cheap to clone; all clones share their connections.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    pacer: Option<Pacer>,
    proxies: Option<Matcher>,
    idle: Mutex<Vec<Idle>>,
}

/// A connection that waits for its next request.
struct Idle {
    to: Uri,
    sender: SendRequest<SdkBody>,
    meter: Weak<Meter>,
    since: Instant,
    /// Its last request had a body.
    sends: bool,
    /// Dropped with the connection: whoever gives a request up must not leave a task behind that goes on sending it.
    _driver: AbortOnDropHandle<()>,
}

impl Client {
    /// Connections that pay `pacer` for their bytes, if there is one; with `proxies` they go past those that the environment
    /// names.
    pub fn new(pacer: Option<Pacer>, proxies: bool) -> Client {
        let proxies = proxies.then(Matcher::from_env);
        Client { inner: Arc::new(Inner { pacer, proxies, idle: Mutex::default() }) }
    }

    /// Sends one, over a connection that is opened within `timeout` if none is kept; its answer's head, and what follows it.
    pub(super) async fn send(
        &self,
        mut request: Request<SdkBody>,
        timeout: Duration,
    ) -> Result<Response<Incoming>, Failure> {
        let to = origin(request.uri())?;
        let turn = request.extensions_mut().remove::<Turn>().unwrap_or_default();
        let sends = request.body().content_length() != Some(0);
        if !request.headers().contains_key(HOST) {
            let host = host(&to)?;
            request.headers_mut().insert(HOST, host);
        }
        let intercept = self.inner.proxies.as_ref().and_then(|proxies| proxies.intercept(&to));
        match &intercept {
            // a proxy for plain HTTP is given the whole address
            Some(proxy) if to.scheme() == Some(&Scheme::HTTP) => {
                if let Some(auth) = proxy.basic_auth() {
                    request.headers_mut().insert(PROXY_AUTHORIZATION, auth.clone());
                }
            }
            _ => {
                let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
                *request.uri_mut() = path.parse()?;
            }
        }
        while let Some(mut kept) = self.take_idle(&to) {
            if let Some(meter) = kept.meter.upgrade() {
                meter.carry(&turn);
            }
            turn.is_theirs();
            match kept.sender.try_send_request(request).await {
                Ok(response) => {
                    self.keep(Idle { sends, ..kept });
                    return Ok(response);
                }
                Err(mut error) => match error.take_message() {
                    Some(never_sent) => request = never_sent,
                    None => return Err(error.into_error().into()),
                },
            }
        }
        turn.is_theirs();
        if let Some(proxy) = &intercept
            && proxy.uri().scheme() != Some(&Scheme::HTTP)
        {
            // neither is spoken here, and a password must not go out in the clear
            let scheme = proxy.uri().scheme_str().unwrap_or("?");
            return Err(
                format!("the proxy that the environment names is {scheme}://…; only http:// is supported").into()
            );
        }
        let past = intercept.as_ref().map(|proxy| address(proxy.uri()));
        let opening = self.open(&to, intercept.map(|proxy| (proxy.uri().clone(), proxy.basic_auth().cloned())), &turn);
        let opened = tokio::time::timeout(timeout, opening).await;
        let opened = opened.map_err(|_| format!("none within {timeout:?}"));
        let mut opened = opened.and_then(|opened| opened.map_err(|error| chain(error.as_ref()))).map_err(|why| {
            // host and port alone: an address may hold a password
            let past = past.map(|proxy| format!(" through the proxy {proxy}")).unwrap_or_default();
            format!("no connection to {}{past}: {why}", address(&to))
        })?;
        let response = opened.sender.send_request(request).await?;
        self.keep(Idle { sends, ..opened });
        Ok(response)
    }

    async fn open(&self, to: &Uri, proxy: Option<(Uri, Option<HeaderValue>)>, turn: &Turn) -> Result<Idle, Failure> {
        let mut dial = Dial::new(self.inner.pacer.clone());
        let plain = to.scheme() == Some(&Scheme::HTTP);
        let connection = match proxy {
            None => dial.call(to.clone()).await?,
            Some((proxy, _)) if plain => dial.call(proxy).await?,
            Some((proxy, auth)) => {
                let tunnel = Tunnel::new(proxy, dial);
                let mut tunnel = match auth {
                    Some(auth) => tunnel.with_auth(auth),
                    None => tunnel,
                };
                tunnel.call(to.clone()).await?
            }
        }
        .into_inner();
        let meter = match &connection {
            Connection::Paced(paced) => Arc::downgrade(&paced.meter()),
            Connection::Free(_) => Weak::new(),
        };
        if let Some(meter) = meter.upgrade() {
            meter.carry(turn);
        }
        let (sender, driver) = match plain {
            true => speak(connection).await?,
            false => {
                let name = to.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
                speak(TlsConnector::from(tls()?).connect(ServerName::try_from(name)?, connection).await?).await?
            }
        };
        Ok(Idle { to: to.clone(), sender, meter, since: Instant::now(), sends: false, _driver: driver })
    }

    /// The connection used last: one that stays warm is worth more than two that cool down.
    fn take_idle(&self, to: &Uri) -> Option<Idle> {
        let mut idle = self.idle();
        // one that is not ready still has an answer to bring
        idle.retain(|kept| {
            let longest = match kept.sender.is_ready() {
                true => IDLE_MAX,
                false if kept.sends => SENDING_MAX,
                false => Duration::MAX,
            };
            !kept.sender.is_closed() && kept.since.elapsed() < longest
        });
        let place = idle.iter().rposition(|kept| kept.to == *to && kept.sender.is_ready())?;
        Some(idle.remove(place))
    }

    fn keep(&self, used: Idle) {
        self.idle().push(Idle { since: Instant::now(), ..used });
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.inner.idle.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Begins HTTP on a connection, which is then driven by a task of its own.
async fn speak<C>(connection: C) -> Result<(SendRequest<SdkBody>, AbortOnDropHandle<()>), Failure>
where
    C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, driver) = handshake(TokioIo::new(connection)).await?;
    let driver = tokio::spawn(async move {
        // its end is seen by whoever waits for an answer
        let _ = driver.await;
    });
    Ok((sender, AbortOnDropHandle::new(driver)))
}

/// Scheme and authority of an address.
fn origin(uri: &Uri) -> Result<Uri, Failure> {
    let (Some(scheme), Some(authority)) = (uri.scheme(), uri.authority()) else {
        return Err(format!("{uri} names no host").into());
    };
    Ok(Uri::builder().scheme(scheme.clone()).authority(authority.clone()).path_and_query("/").build()?)
}

/// Host and port, for people.
fn address(uri: &Uri) -> String {
    let host = uri.host().unwrap_or("?");
    uri.port_u16().map_or(host.to_owned(), |port| format!("{host}:{port}"))
}

/// The host as it is signed: with its port, unless that is the scheme's own.
pub(super) fn host(to: &Uri) -> Result<HeaderValue, Failure> {
    let host = to.host().unwrap_or_default();
    let own = if to.scheme() == Some(&Scheme::HTTPS) { 443 } else { 80 };
    Ok(match to.port_u16().filter(|port| *port != own) {
        Some(port) => HeaderValue::try_from(format!("{host}:{port}"))?,
        None => HeaderValue::try_from(host)?,
    })
}

/// The system's certificates, read once.
fn tls() -> Result<Arc<ClientConfig>, Failure> {
    static TLS: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    if let Some(tls) = TLS.get() {
        return Ok(tls.clone());
    }
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        let why = found.errors.first().map_or("none are installed".to_owned(), |error| error.to_string());
        return Err(
            format!("this machine has no certificates to know a store by ({why}); install ca-certificates").into()
        );
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(TLS.get_or_init(|| Arc::new(versions.with_root_certificates(roots).with_no_client_auth())).clone())
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("paced", &self.inner.pacer.is_some()).finish_non_exhaustive()
    }
}

impl HttpClient for Client {
    fn http_connector(&self, settings: &HttpConnectorSettings, _: &RuntimeComponents) -> SharedHttpConnector {
        let connect_timeout = settings.connect_timeout().unwrap_or(CONNECT_TIMEOUT);
        SharedHttpConnector::new(Connector { client: self.clone(), connect_timeout })
    }
}

/// The client with the settings of one request.
#[derive(Debug)]
struct Connector {
    client: Client,
    connect_timeout: Duration,
}

impl HttpConnector for Connector {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let (client, connect_timeout) = (self.client.clone(), self.connect_timeout);
        HttpConnectorFuture::new(async move {
            let request = request.try_into_http1x().map_err(|error| ConnectorError::user(error.into()))?;
            let response = client.send(request, connect_timeout).await.map_err(ConnectorError::io)?;
            HttpResponse::try_from(response.map(SdkBody::from_body_1_x))
                .map_err(|error| ConnectorError::other(error.into(), None))
        })
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    /// A store that answers a request of so many bytes with a head, a client that has heard it, and how many connections the
    /// client keeps busy `after` that.
    async fn busy_after(after: Duration, photo_bytes: usize, head: &str) -> usize {
        let store = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}/", store.local_addr().unwrap());
        let client = Client::new(None, false);
        let request = Request::put(&address).body(SdkBody::from(vec![7; photo_bytes])).unwrap();
        let sent = tokio::spawn({
            let client = client.clone();
            async move { client.send(request, CONNECT_TIMEOUT).await.unwrap() }
        });
        let (mut connection, _) = store.accept().await.unwrap();
        // of its head
        connection.read_exact(&mut [0; 16]).await.unwrap();
        connection.write_all(head.as_bytes()).await.unwrap();
        let _answer = sent.await.unwrap();
        tokio::time::pause();
        tokio::time::advance(after).await;
        tokio::time::resume();
        let to = origin(&address.parse().unwrap()).unwrap();
        assert!(client.take_idle(&to).is_none(), "it is busy");
        client.idle().len()
    }

    #[tokio::test]
    async fn a_connection_whose_store_answers_early_and_reads_no_further_is_given_up() {
        const REFUSED: &str = "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n";
        // more than what fits between the two
        const PHOTO_BYTES: usize = 64 * 1024 * 1024;
        assert_eq!(busy_after(Duration::ZERO, PHOTO_BYTES, REFUSED).await, 1);
        assert_eq!(busy_after(SENDING_MAX, PHOTO_BYTES, REFUSED).await, 0);
    }

    #[tokio::test]
    async fn what_is_fetched_may_take_as_long_as_it_takes() {
        const BEGUN: &str = "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nthe rest ";
        assert_eq!(busy_after(100 * SENDING_MAX, 0, BEGUN).await, 1);
    }
}
