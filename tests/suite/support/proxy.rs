//! A TCP proxy before a server, whose link can be cut or go silent: what a server on loopback cannot be made to show.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

/// What becomes of bytes and connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Link {
    Up,
    /// Connections break, and new ones break at once.
    Cut,
    /// Connections stay, and nothing passes.
    Silent,
}

pub struct Proxy {
    pub port: u16,
    state: Arc<State>,
}

struct State {
    link: AtomicU8,
    /// Connections up to this one are forgotten.
    forgotten: AtomicU32,
    made: AtomicU32,
}

impl Proxy {
    /// Before the server on `port` of this machine.
    pub async fn start(port: u16) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let state =
            State { link: AtomicU8::new(Link::Up as u8), forgotten: AtomicU32::new(0), made: AtomicU32::new(0) };
        let proxy = Proxy { port: listener.local_addr().unwrap().port(), state: Arc::new(state) };
        let state = proxy.state.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let state = state.clone();
                let number = state.made.fetch_add(1, Ordering::SeqCst) + 1;
                tokio::spawn(async move {
                    let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await else { return };
                    let (from_client, to_client) = client.into_split();
                    let (from_server, to_server) = server.into_split();
                    // when either way ends, dropping the other ends it too
                    tokio::select! {
                        () = pump(from_client, to_server, &state, number) => {}
                        () = pump(from_server, to_client, &state, number) => {}
                    }
                });
            }
        });
        proxy
    }

    pub fn set(&self, link: Link) {
        self.state.link.store(link as u8, Ordering::SeqCst);
    }

    /// Nothing passes any more over the connections that there are, as when a firewall has lost its table; new ones pass.
    pub fn forget_connections(&self) {
        self.state.forgotten.store(self.state.made.load(Ordering::SeqCst), Ordering::SeqCst);
    }
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, state: &State, number: u32) {
    let silent =
        || state.link.load(Ordering::SeqCst) == Link::Silent as u8 || number <= state.forgotten.load(Ordering::SeqCst);
    let mut bytes = vec![0; 16 * 1024];
    loop {
        let read = tokio::select! {
            read = from.read(&mut bytes) => read,
            () = cut(&state.link) => return,
        };
        let Ok(read @ 1..) = read else { return };
        while silent() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        if to.write_all(&bytes[..read]).await.is_err() {
            return;
        }
    }
}

async fn cut(link: &AtomicU8) {
    while link.load(Ordering::SeqCst) != Link::Cut as u8 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}
