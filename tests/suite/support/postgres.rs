//! Throw-away Postgres clusters, with `fsync` on, run as a user that is not root: one that the whole test run shares, with a
//! database of its own for each test, and others for tests that hurt them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};

use forebay::config::QueueUrl;
use forebay::queue::Queue;
use rustix::process::Signal;

use super::process::{guarded, is_root, kill_with_children, signal, start, until};
use super::{free_port, scratch};

/// A cluster of its own. Stopped and removed when dropped.
pub struct Cluster {
    port: u16,
    connections: u32,
    folder: PathBuf,
    /// None while it is stopped.
    server: Mutex<Option<Child>>,
    databases: AtomicU32,
}

impl Cluster {
    /// Makes a cluster that takes so many connections, and starts it.
    pub fn start(connections: u32) -> Cluster {
        let folder = scratch::folder("postgres");
        if is_root() {
            let owned = Command::new("chown").arg("postgres").arg(&folder).status().unwrap();
            assert!(owned.success(), "there is no user postgres; run tests/install-parts");
        }
        let made = guarded(programs().join("initdb"), "KILL", Some("postgres"))
            .args(["-U", "forebay", "--auth=trust", "-E", "UTF8", "--no-sync", "-D"])
            .arg(folder.join("data"))
            .output()
            .unwrap();
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        let cluster = Cluster {
            port: free_port(),
            connections,
            folder,
            server: Mutex::default(),
            databases: AtomicU32::default(),
        };
        cluster.start_again();
        cluster
    }

    /// Starts it after [`Cluster::kill`] or [`Cluster::stop`], at the same port with the same data, and waits until it answers.
    pub fn start_again(&self) {
        let mut running = self.server.lock().unwrap();
        assert!(running.is_none(), "it runs already");
        let log = std::fs::File::options().create(true).append(true).open(self.folder.join("log")).unwrap();
        let mut server = guarded(programs().join("postgres"), "INT", Some("postgres"));
        server.args(["-c", "listen_addresses=127.0.0.1", "-c", &format!("port={}", self.port)]);
        server.args(["-c", &format!("unix_socket_directories={}", self.folder.display())]);
        server.args(["-c", &format!("max_connections={}", self.connections), "-D"]).arg(self.folder.join("data"));
        server.stdout(log.try_clone().unwrap()).stderr(log);
        let server = running.insert(start(server));
        until("Postgres to answer", || {
            if let Ok(Some(status)) = server.try_wait() {
                panic!("Postgres ended with {status}; see {}", self.folder.join("log").display());
            }
            self.psql("SELECT 1").is_ok()
        });
    }

    /// Ends it as a power cut would: all of its processes at once, without a word to anyone.
    pub fn kill(&self) {
        if let Some(postmaster) = self.server.lock().unwrap().take() {
            kill_with_children(postmaster);
        }
    }

    /// Stops it in order, without waiting for those who are connected.
    pub fn stop(&self) {
        let Some(mut postmaster) = self.server.lock().unwrap().take() else { return };
        signal(postmaster.id(), Signal::INT);
        postmaster.wait().unwrap();
    }

    /// Has one statement done in a session of its own, as the superuser: what it gave, or the error.
    pub fn psql(&self, statement: &str) -> Result<String, String> {
        let done = Command::new(programs().join("psql"))
            .args(["-h", "127.0.0.1", "-p", &self.port.to_string(), "-U", "forebay", "-d", "postgres"])
            .args(["-qAtc", statement])
            .output()
            .map_err(|error| error.to_string())?;
        match done.status.success() {
            true => Ok(String::from_utf8_lossy(&done.stdout).trim().to_owned()),
            false => Err(String::from_utf8_lossy(&done.stderr).trim().to_owned()),
        }
    }

    /// The URL of a new, empty database.
    pub fn database(&self) -> String {
        let name = format!("test_{}", self.databases.fetch_add(1, Ordering::Relaxed));
        self.psql(&format!("CREATE DATABASE {name}")).unwrap();
        format!("postgres://forebay:unused@127.0.0.1:{}/{name}", self.port)
    }

    /// The same for those in another network namespace: by the socket in its folder.
    pub fn database_by_socket(&self) -> String {
        let url = self.database();
        let name = url.rsplit('/').next().unwrap_or_default();
        format!("postgres://forebay:unused@localhost:{}/{name}?host={}", self.port, self.folder.display())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
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

/// The URL of a new, empty database in the cluster that all tests share. Blocks.
pub fn database() -> String {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(200)).database()
}

/// An empty queue in a database of its own.
pub async fn queue() -> Queue {
    let url = tokio::task::spawn_blocking(database).await.unwrap();
    let queue = Queue::open(&QueueUrl::Postgres(url)).unwrap();
    queue.migrate().await.unwrap();
    queue
}
