//! Opens TCP connections to a host by its name, paced or not.
//!
//! Always: the first of its addresses that answers is taken, and one that does not holds the others up for a moment only. Never:
//! a timeout of its own; who dials gives up.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use http::Uri;
use http::uri::Scheme;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tower_service::Service;

use super::client::Failure;
use crate::pacer::{PacedConnection, Pacer};

/// How long an address has before the next is tried beside it. RFC 8305 allows up to two seconds: packets of attempts that are
/// given up are not paid for, so a long round trip alone must not make two.
const HEAD_START: Duration = Duration::from_secs(1);

/// A connection, paced or not.
pub(super) enum Connection {
    Paced(PacedConnection),
    Free(TcpStream),
}

/// Opens them.
#[derive(Clone)]
pub(super) struct Dial {
    pacer: Option<Pacer>,
}

impl Dial {
    /// For connections that pay `pacer` for their bytes, if there is one.
    pub(super) fn new(pacer: Option<Pacer>) -> Dial {
        Dial { pacer }
    }
}

impl Service<Uri> for Dial {
    type Response = TokioIo<Connection>;
    type Error = Failure;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Failure>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let pacer = self.pacer.clone();
        Box::pin(async move {
            let host = to.host().unwrap_or_default().trim_matches(['[', ']']);
            let port = to.port_u16().unwrap_or(if to.scheme() == Some(&Scheme::HTTPS) { 443 } else { 80 });
            let addresses = lookup(host, port).await.map_err(|error| format!("its name: {error}"))?;
            let connection = first_to_answer(by_turns(addresses), |address| connect(address, pacer.clone()));
            Ok(TokioIo::new(connection.await?))
        })
    }
}

/// The addresses of a host. In a thread of its own: a resolver that does not answer, which may take half a minute, must not hold up
/// those that read and remove photos.
async fn lookup(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let host = host.to_owned();
    let (told, looked_up) = oneshot::channel();
    std::thread::Builder::new().name("lookup".to_owned()).spawn(move || {
        // whoever asked may have given up
        let _ = told.send((host.as_str(), port).to_socket_addrs().map(Iterator::collect));
    })?;
    looked_up.await.map_err(io::Error::other)?
}

async fn connect(address: SocketAddr, pacer: Option<Pacer>) -> io::Result<Connection> {
    Ok(match pacer {
        Some(pacer) => Connection::Paced(PacedConnection::connect(address, pacer).await?),
        None => {
            let tcp = TcpStream::connect(address).await?;
            tcp.set_nodelay(true)?;
            Connection::Free(tcp)
        }
    })
}

/// The families of addresses in turns, each in its order, beginning with the first address: one family may not work at all.
fn by_turns(addresses: Vec<SocketAddr>) -> VecDeque<SocketAddr> {
    let first_is_v6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (mut one, mut other): (VecDeque<_>, VecDeque<_>) =
        addresses.into_iter().partition(|address| address.is_ipv6() == first_is_v6);
    let mut turns = VecDeque::new();
    while let Some(address) = one.pop_front() {
        turns.push_back(address);
        std::mem::swap(&mut one, &mut other);
        if one.is_empty() {
            std::mem::swap(&mut one, &mut other);
        }
    }
    turns
}

/// What comes of the first address that answers. The next is tried when one fails, or beside it after [`HEAD_START`].
async fn first_to_answer<T, F>(
    mut addresses: VecDeque<SocketAddr>,
    connect: impl Fn(SocketAddr) -> F,
) -> Result<T, Failure>
where
    F: Future<Output = io::Result<T>>,
{
    let mut attempts = FuturesUnordered::new();
    // the address that the system prefers says best what is wrong
    let mut first_failure = None;
    loop {
        if let Some(address) = addresses.pop_front() {
            let attempt = connect(address);
            attempts.push(async move { attempt.await.map_err(|error| format!("{address}: {error}")) });
        }
        tokio::select! {
            answer = attempts.next() => match answer {
                Some(Ok(answer)) => return Ok(answer),
                Some(Err(error)) => drop(first_failure.get_or_insert(error)),
                None => return Err(first_failure.unwrap_or_else(|| "its name has no address".to_owned()).into()),
            },
            () = tokio::time::sleep(HEAD_START), if !addresses.is_empty() => {}
        }
    }
}

/// Calls the same method on whichever connection there is.
macro_rules! on_connection {
    ($self:ident, $method:ident($($argument:expr),*)) => {
        match $self.get_mut() {
            Connection::Paced(connection) => Pin::new(connection).$method($($argument),*),
            Connection::Free(connection) => Pin::new(connection).$method($($argument),*),
        }
    };
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        on_connection!(self, poll_read(cx, into))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        on_connection!(self, poll_write(cx, buffer))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        on_connection!(self, poll_write_vectored(cx, buffers))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_connection!(self, poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_connection!(self, poll_shutdown(cx))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(list: &[&str]) -> Vec<SocketAddr> {
        list.iter().map(|address| address.parse().unwrap()).collect()
    }

    /// Addresses at port 1 refuse, at port 2 they never answer; the others answer with their port.
    async fn port(address: SocketAddr) -> io::Result<u16> {
        match address.port() {
            1 => Err(io::Error::from(io::ErrorKind::ConnectionRefused)),
            2 => std::future::pending().await,
            port => Ok(port),
        }
    }

    #[tokio::test]
    async fn names_and_addresses_are_looked_up() {
        assert_eq!(lookup("127.0.0.1", 80).await.unwrap(), addresses(&["127.0.0.1:80"]));
        assert_eq!(lookup("::1", 443).await.unwrap(), addresses(&["[::1]:443"]));
        let of_localhost = lookup("localhost", 80).await.unwrap();
        assert!(!of_localhost.is_empty() && of_localhost.iter().all(|address| address.ip().is_loopback()));
        // a name that no resolver is asked for
        assert!(lookup("no name", 80).await.is_err());
    }

    #[test]
    fn the_families_take_turns() {
        let turns = by_turns(addresses(&["[::1]:1", "[::1]:2", "[::1]:3", "127.0.0.1:4"]));
        assert_eq!(turns, addresses(&["[::1]:1", "127.0.0.1:4", "[::1]:2", "[::1]:3"]));
    }

    #[tokio::test]
    async fn an_address_that_refuses_or_is_silent_gives_way_to_the_next() {
        let answer = first_to_answer(addresses(&["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:8333"]).into(), port);
        assert_eq!(answer.await.unwrap(), 8333);
    }

    #[tokio::test]
    async fn when_all_refuse_the_first_is_named() {
        let answer = first_to_answer(addresses(&["127.0.0.2:1", "127.0.0.1:1"]).into(), port).await;
        assert_eq!(answer.unwrap_err().to_string(), "127.0.0.2:1: connection refused");
        assert!(first_to_answer(VecDeque::new(), port).await.is_err());
    }
}
