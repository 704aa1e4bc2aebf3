//! Serves a router on a TCP listener.
//!
//! Always: a permit is taken before a connection is accepted, so that the number of connections is bounded; a head that
//! comes too slowly ends its connection, as does an answer that is not read; stopping closes the door first, then lets
//! requests in flight finish.
//! Never: waits longer than the deadline to stop.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::Request;
use hyper::body::{Body, Incoming};
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::eager::Eager;
use super::gathering::Gathering;

/// Connections at once on one listener. Each costs some 25 kB while idle.
const CONNECTIONS_MAX: usize = 4096;
/// What is read at once, and the longest head. A connection holds memory for as much while it idles, so that more would be
/// a little faster, and take 200 MiB for a thousand devices that keep their connection.
const READ_BYTES_MAX: usize = 16 * 1024;
/// The longest a connection may idle or take over a request's head. Longer than nginx keeps its side open, so that it is
/// never the appliance that closes a connection on which a request is already on its way.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);
/// The longest that what was sent may stay unread or unacknowledged. Who asks and does not read would otherwise hold a connection
/// for good (and does before Linux 5.11), and a device that lost its power for as long as the kernel tries again, a quarter of an hour.
const UNREAD_TIMEOUT: Duration = Duration::from_secs(60);

/// Listens at `address`. After an outage a whole site comes back at the same moment: as many may wait to be accepted as may be
/// connected, if the kernel's `somaxconn` allows it.
pub fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // a restart need not wait until the last run's connections are forgotten
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(CONNECTIONS_MAX as u32)
}

/// Serves `router` until `stop` is cancelled, then gives requests in flight `grace` to finish.
pub async fn serve(listener: TcpListener, router: Router, stop: CancellationToken, grace: Duration) {
    serve_readers(listener, router, stop, grace, UNREAD_TIMEOUT).await;
}

async fn serve_readers(
    listener: TcpListener,
    router: Router,
    stop: CancellationToken,
    grace: Duration,
    unread_timeout: Duration,
) {
    let connections = GracefulShutdown::new();
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &permits) => accepted,
            () = stop.cancelled() => break,
        };
        let (stream, permit) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // out of file descriptors, or the peer went away between SYN and accept
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let _ = rustix::net::sockopt::set_tcp_user_timeout(&stream, unread_timeout.as_millis() as u32);
        let stream = Gathering::new(stream);
        let (expected, router) = (stream.expected(), TowerToHyperService::new(router.clone()));
        let service = service_fn(move |request: Request<Incoming>| {
            expected.body(request.body().size_hint().exact().unwrap_or(0));
            let (expected, answer) = (expected.clone(), router.call(request));
            async move {
                let answer = answer.await;
                // of a body that was refused the rest is thrown away
                expected.nothing();
                answer
            }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(READ_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), service);
        let connection = Eager::new(connections.watch(connection));
        tokio::spawn(async move {
            // a peer that hangs up is its own affair; whatever concerns an upload was logged where it was handled
            let _ = connection.await;
            drop(permit);
        });
    }
    drop(listener);
    if tokio::time::timeout(grace, connections.shutdown()).await.is_err() {
        tracing::warn!(grace_seconds = grace.as_secs(), "requests were still in flight when the time to stop was over");
    }
}

async fn accept(
    listener: &TcpListener,
    permits: &Arc<Semaphore>,
) -> std::io::Result<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let permit = permits.clone().acquire_owned().await.map_err(std::io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, permit))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::Mutex;

    use axum::body::Body as AnyBody;
    use axum::routing::get;
    use bytes::Bytes;
    use futures_util::stream;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::oneshot;
    use tokio::time::Instant;

    use super::*;

    #[tokio::test]
    async fn who_asks_and_does_not_read_loses_the_connection() {
        let listener = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let mut reader = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (answering, given_up) = oneshot::channel::<()>();
        let answering = Arc::new(Mutex::new(Some(answering)));
        let endless = async move || {
            let answering = answering.lock().unwrap().take();
            AnyBody::from_stream(stream::repeat_with(move || {
                let _ends_with_the_answer = &answering;
                Ok::<_, Infallible>(Bytes::from_static(&[7; 64 * 1024]))
            }))
        };
        let router = Router::new().route("/", get(endless));
        let stop = CancellationToken::new();
        let unread = Duration::from_millis(500);
        tokio::spawn(serve_readers(listener, router, stop, Duration::ZERO, unread));
        reader.write_all(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n").await.unwrap();
        let mut head = [0; 15];
        reader.read_exact(&mut head).await.unwrap();
        assert_eq!(head, *b"HTTP/1.1 200 OK");
        let began = Instant::now();
        let ended = tokio::time::timeout(Duration::from_secs(30), given_up).await;
        assert!(ended.expect("it does not wait for good").is_err());
        assert!(began.elapsed() >= unread / 2, "it was ended for that");
    }

    #[tokio::test]
    async fn a_site_that_comes_back_all_at_once_finds_the_door_open() {
        let listener = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        // nobody has been let in yet
        let coming = (0..500).map(|_| TcpStream::connect(address));
        let came = tokio::time::timeout(Duration::from_secs(10), futures_util::future::try_join_all(coming)).await;
        assert_eq!(came.unwrap().unwrap().len(), 500);
    }
}
