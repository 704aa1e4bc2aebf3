//! One SeaweedFS server for the test run: a real S3 server that is not ours. A bucket of its own for each test.

use std::process::Child;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use forebay::bucket::Bucket;
use forebay::config::Endpoint;

use super::process::{find_program, guarded, start};
use super::{eventually, free_port};

pub const ACCESS_KEY: &str = "test-access";
pub const SECRET_KEY: &str = "test-secret";

struct Server {
    port: u16,
    _process: Child,
}

fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("forebay-test-weed-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        let identities = serde_json::json!({ "identities": [{
            "name": "test",
            "credentials": [{ "accessKey": ACCESS_KEY, "secretKey": SECRET_KEY }],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }]});
        let config = folder.join("s3.json");
        std::fs::write(&config, identities.to_string()).unwrap();
        let port = free_port();
        let weed = find_program("weed", &[concat!(env!("CARGO_MANIFEST_DIR"), "/target/tools/seaweedfs/bin")]);
        let mut command = guarded(weed, "KILL", None);
        command.args(["server", "-s3", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=2000"]);
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
        Server { port, _process: start(command) }
    })
}

/// A new bucket, and how to reach it.
pub async fn bucket() -> (Bucket, Endpoint, String) {
    static BUCKETS: AtomicU32 = AtomicU32::new(0);
    let name = format!("test-{}", BUCKETS.fetch_add(1, Ordering::Relaxed));
    let port = tokio::task::spawn_blocking(|| server().port).await.unwrap();
    let endpoint = Endpoint {
        url: format!("http://127.0.0.1:{port}"),
        access_key: ACCESS_KEY.to_owned(),
        secret_key: SECRET_KEY.to_owned(),
    };
    let bucket = Bucket::at(&endpoint, &name);
    eventually("SeaweedFS to make a bucket", async || bucket.create().await.ok()).await;
    (bucket, endpoint, name)
}
