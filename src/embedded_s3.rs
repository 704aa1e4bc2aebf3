//! An S3 server within this process, for the demo and the tests: s3s-fs over real HTTP, with real signatures.
//!
//! Always: on the loopback only, with credentials made up at start. Never: for production; it syncs nothing.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use hyper_util::rt::TokioIo;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::config::Endpoint;
use crate::error::{Error, Result};

/// A running server. It stops when dropped.
pub struct EmbeddedS3 {
    endpoint: Endpoint,
    _stop: DropGuard,
}

impl EmbeddedS3 {
    /// Serves the folder `root`, whose sub-folders are the buckets, on a free port.
    pub async fn start(root: &Path) -> Result<EmbeddedS3> {
        let failed = |cause: String| Error::unavailable("cannot start the embedded S3 server", cause);
        std::fs::create_dir_all(root).map_err(|e| failed(e.to_string()))?;
        let files = s3s_fs::FileSystem::new(root).map_err(|e| failed(format!("{e:?}")))?;
        let (access_key, secret_key) = ("forebay".to_owned(), format!("{:032x}", rand::random::<u128>()));
        let mut builder = S3ServiceBuilder::new(files);
        builder.set_auth(SimpleAuth::from_single(access_key.clone(), secret_key.clone()));
        let service = builder.build();

        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(|e| failed(e.to_string()))?;
        let address: SocketAddr = listener.local_addr().map_err(|e| failed(e.to_string()))?;
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        tokio::spawn(async move {
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    () = stopped.cancelled() => return,
                };
                let Ok((stream, _)) = accepted else { continue };
                let connection =
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service.clone());
                let stopped = stopped.clone();
                tokio::spawn(async move {
                    tokio::select! {
                        _ = connection => {}
                        () = stopped.cancelled() => {}
                    }
                });
            }
        });
        let endpoint = Endpoint { url: format!("http://{address}"), access_key, secret_key };
        Ok(EmbeddedS3 { endpoint, _stop: stop.drop_guard() })
    }

    /// How to reach it.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }
}
