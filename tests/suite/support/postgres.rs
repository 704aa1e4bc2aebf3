//! One throw-away Postgres cluster for the test run, with `fsync` on, run as a user that is not root; a database of its own
//! for each test.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use forebay::config::QueueUrl;
use forebay::queue::Queue;

use super::process::{guarded, is_root, start};
use super::{PATIENCE, free_port};

struct Cluster {
    port: u16,
    _folder: PathBuf,
    _server: Child,
}

fn programs() -> PathBuf {
    let mut versions: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .map(|entries| entries.flatten().map(|entry| entry.path().join("bin")).collect())
        .unwrap_or_default();
    versions.sort();
    versions
        .pop()
        .unwrap_or_else(|| super::process::find_program("initdb", &[]).parent().map(Path::to_path_buf).unwrap())
}

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("forebay-test-postgres-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        if is_root() {
            let owned = Command::new("chown").arg("postgres").arg(&folder).status().unwrap();
            assert!(owned.success(), "there is no user postgres; run tests/install-parts");
        }
        let data = folder.join("data");
        let made = guarded(programs().join("initdb"), "KILL", Some("postgres"))
            .args(["-U", "forebay", "--auth=trust", "-E", "UTF8", "-D"])
            .arg(&data)
            .output()
            .unwrap();
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        let port = free_port();
        let log = std::fs::File::create(folder.join("log")).unwrap();
        let mut server = guarded(programs().join("postgres"), "INT", Some("postgres"));
        server.args(["-c", "listen_addresses=127.0.0.1", "-c", &format!("port={port}")]);
        server.args(["-c", &format!("unix_socket_directories={}", folder.display()), "-c", "max_connections=200"]);
        server.arg("-D").arg(&data).stdout(log.try_clone().unwrap()).stderr(log);
        let server = start(server);
        let began = std::time::Instant::now();
        while !psql(port, "postgres", "SELECT 1") {
            assert!(began.elapsed() < PATIENCE, "Postgres does not start; see {}", folder.display());
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        Cluster { port, _folder: folder, _server: server }
    })
}

fn psql(port: u16, database: &str, statement: &str) -> bool {
    Command::new(programs().join("psql"))
        .args(["-h", "127.0.0.1", "-p", &port.to_string(), "-U", "forebay", "-d", database, "-qc", statement])
        .output()
        .is_ok_and(|done| done.status.success())
}

/// The URL of a new, empty database.
pub fn database() -> String {
    static DATABASES: AtomicU32 = AtomicU32::new(0);
    let name = format!("test_{}", DATABASES.fetch_add(1, Ordering::Relaxed));
    let port = cluster().port;
    assert!(psql(port, "postgres", &format!("CREATE DATABASE {name}")));
    format!("postgres://forebay:unused@127.0.0.1:{port}/{name}")
}

/// An empty queue in a database of its own.
pub async fn queue() -> Queue {
    let url = tokio::task::spawn_blocking(database).await.unwrap();
    let queue = Queue::open(&QueueUrl::Postgres(url)).unwrap();
    queue.migrate().await.unwrap();
    queue
}
