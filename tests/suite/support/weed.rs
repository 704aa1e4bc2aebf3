//! SeaweedFS, a real S3 server that is not ours: one for the test run, with a bucket of its own for each test, and others for
//! tests that put it behind a link.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use forebay::bucket::{Bucket, Object};
use forebay::config::Endpoint;
use forebay::pacer::Turn;
use forebay::upload::{ImageType, Sha256};
use tokio::sync::OnceCell;

use super::process::{find_program, guarded, guarded_within, start};
use super::{eventually, free_port, scratch};

pub const ACCESS_KEY: &str = "test-access";
pub const SECRET_KEY: &str = "test-secret";
/// How the names of buckets begin that take objects from those who do not say who they are.
pub const OPEN_BUCKETS: &str = "open-";

/// One server. Ended and removed when dropped.
pub struct Server {
    pub endpoint: Endpoint,
    process: Child,
    folder: PathBuf,
    stores: OnceCell<()>,
}

impl Server {
    /// Starts one at `address`, in another network namespace if asked. Blocks.
    pub fn start(address: &str, namespace: Option<&Path>) -> Server {
        let folder = scratch::folder("weed");
        let identities = serde_json::json!({ "identities": [
            {
                "name": "test",
                "credentials": [{ "accessKey": ACCESS_KEY, "secretKey": SECRET_KEY }],
                "actions": ["Admin", "Read", "Write", "List", "Tagging"],
            },
            { "name": "anonymous", "actions": [format!("Write:{OPEN_BUCKETS}*")] },
        ]});
        let config = folder.join("s3.json");
        std::fs::write(&config, identities.to_string()).unwrap();
        let port = free_port();
        let weed = find_program("weed", &[concat!(env!("CARGO_MANIFEST_DIR"), "/target/tools/seaweedfs/bin")]);
        let mut command = match namespace {
            Some(namespace) => guarded_within(namespace, weed, "KILL"),
            None => guarded(weed, "KILL", None),
        };
        command.args(["server", "-s3", "-volume.max=2000"]);
        command.arg(format!("-ip={address}")).arg(format!("-ip.bind={address}"));
        command.args([
            "-master.volumeSizeLimitMB=64",
            "-master.telemetry=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            // a missing bucket is an error, as it is in S3
            "-s3.autoCreateBucket=false",
        ]);
        command.arg(format!("-s3.port={port}"));
        for other in [
            "master.port",
            "master.port.grpc",
            "volume.port",
            "volume.port.grpc",
            "filer.port",
            "filer.port.grpc",
            "s3.port.grpc",
        ] {
            command.arg(format!("-{other}={}", free_port()));
        }
        command.arg(format!("-dir={}", folder.display())).arg(format!("-s3.config={}", config.display()));
        let log = std::fs::File::create(folder.join("log")).unwrap();
        command.stdout(log.try_clone().unwrap()).stderr(log);
        let endpoint = Endpoint {
            url: format!("http://{address}:{port}"),
            access_key: ACCESS_KEY.to_owned(),
            secret_key: SECRET_KEY.to_owned(),
        };
        Server { endpoint, process: start(command), folder, stores: OnceCell::new() }
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// A new bucket, and its name.
    pub async fn bucket(&self) -> (Bucket, String) {
        static BUCKETS: AtomicU32 = AtomicU32::new(0);
        let name = format!("test-{}", BUCKETS.fetch_add(1, Ordering::Relaxed));
        (self.bucket_named(&name).await, name)
    }

    /// The bucket of this name, made if need be.
    pub async fn bucket_named(&self, name: &str) -> Bucket {
        self.stores.get_or_init(|| self.until_it_stores()).await;
        let bucket = Bucket::at(&self.endpoint, name);
        eventually("SeaweedFS to make a bucket", async || bucket.create().await.ok()).await;
        bucket
    }

    /// Waits until it takes objects: it makes buckets seconds before its volumes have joined it, and an object that comes in
    /// between waits.
    async fn until_it_stores(&self) {
        let bucket = Bucket::at(&self.endpoint, "ready");
        let photo = Bytes::from_static(b"stored");
        let turn = Turn::default();
        let object = Object {
            key: "ready",
            content_type: ImageType::Jpeg,
            sha256: Sha256::of(&photo),
            photo: &photo,
            turn: &turn,
        };
        eventually("SeaweedFS to store an object", async || {
            bucket.create().await.ok()?;
            // it may take one and never answer
            tokio::time::timeout(Duration::from_secs(10), bucket.put(&object)).await.ok()?.ok()
        })
        .await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// A new bucket on the server that the test run shares, and how to reach it.
pub async fn bucket() -> (Bucket, Endpoint, String) {
    static SERVER: OnceLock<Server> = OnceLock::new();
    let server = tokio::task::spawn_blocking(|| SERVER.get_or_init(|| Server::start("127.0.0.1", None))).await.unwrap();
    let (bucket, name) = server.bucket().await;
    (bucket, server.endpoint.clone(), name)
}
