//! What Forebay is held against: nginx that stores raw photos, and the design it replaces.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::postgres::Cluster;
use crate::support::process::{find_program, guarded, is_root, signal, start};
use crate::support::{eventually, free_port};

/// One of nginx's, with a configuration of the bench's own.
pub struct Nginx {
    pub url: String,
    server: Server,
    folder: TempDir,
}

/// A server of several processes, ended in order when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        signal(self.0.id(), Signal::TERM);
        let _ = self.0.wait();
    }
}

impl Nginx {
    /// `PUT`s of raw photos, each stored under a name of its own and none of them synced.
    pub async fn storing() -> Nginx {
        // the body's temporary file is renamed, as it is on the same disk
        Nginx::start("root FOLDER/photos; dav_methods PUT; rewrite ^ /$request_id break;").await
    }

    /// Everything passed on to `to`.
    async fn before(to: &str) -> Nginx {
        let pass = format!("proxy_pass http://{to}; proxy_http_version 1.1; proxy_set_header Connection \"\";");
        Nginx::start(&pass).await
    }

    async fn start(location: &str) -> Nginx {
        let folder = tempfile::tempdir().expect("a folder for nginx");
        let at = folder.path().display().to_string();
        std::fs::create_dir(folder.path().join("photos")).expect("a folder for photos");
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {at}/{kind};"))
            .concat();
        let user = if is_root() { "user root;" } else { "" };
        let location = location.replace("FOLDER", &at);
        let port = free_port();
        let config = format!(
            "{user} worker_processes auto; daemon off; pid {at}/pid; error_log {at}/error.log warn;\n\
             events {{ worker_connections 4096; }}\n\
             http {{ access_log off; {temporary} client_max_body_size 16m; client_body_buffer_size 512k;\n\
             server {{ listen 127.0.0.1:{port}; location / {{ {location} }} }} }}\n"
        );
        std::fs::write(folder.path().join("nginx.conf"), config).expect("a configuration is written");
        let mut command = guarded(find_program("nginx", &[]), "TERM", None);
        command.args(["-e", &format!("{at}/error.log"), "-c", &format!("{at}/nginx.conf")]).stderr(Stdio::null());
        let process = start(command);
        answers(port).await;
        Nginx { url: format!("http://127.0.0.1:{port}/"), server: Server(process), folder }
    }

    /// Its master; the workers are its children.
    pub fn pid(&self) -> u32 {
        self.server.0.id()
    }

    /// How many photos it has stored.
    pub fn stored(&self) -> u64 {
        count(&self.folder.path().join("photos"))
    }

    /// Stops; what it has stored.
    pub fn end(self) -> TempDir {
        drop(self.server);
        self.folder
    }
}

/// Flask under gunicorn behind nginx, with a table in Postgres.
pub struct Flask {
    front: Nginx,
    gunicorn: Server,
    folder: TempDir,
}

impl Flask {
    /// With the workers that gunicorn's own documents recommend: twice the cores and one.
    pub async fn start(cluster: &Cluster) -> Flask {
        let folder = tempfile::tempdir().expect("a folder for photos");
        let database = cluster.database();
        let made = "CREATE TABLE photos (id uuid PRIMARY KEY, device_id text NOT NULL, size_bytes bigint NOT NULL, \
                    state text NOT NULL, received_at timestamptz NOT NULL DEFAULT now())";
        let done = Command::new("psql").args(["-q", "-d", &database, "-c", made]).status().expect("psql runs");
        assert!(done.success(), "the table of the Flask design is made");
        let workers = 2 * std::thread::available_parallelism().map_or(1, |cores| cores.get()) + 1;
        let port = free_port();
        let mut gunicorn = guarded("python3", "TERM", None);
        gunicorn
            .args(["-m", "gunicorn", "--workers", &workers.to_string(), "--bind", &format!("127.0.0.1:{port}")])
            .args(["--keep-alive", "75", "--log-level", "error", "app:app"])
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peer"))
            .env("PYTHONPATH", concat!(env!("CARGO_MANIFEST_DIR"), "/target/tools/peer"))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("PEER_FOLDER", folder.path())
            .env("PEER_DATABASE", database);
        let gunicorn = Server(start(gunicorn));
        answers(port).await;
        Flask { front: Nginx::before(&format!("127.0.0.1:{port}")).await, gunicorn, folder }
    }

    pub fn url(&self) -> &str {
        &self.front.url
    }

    /// How many photos it has stored.
    pub fn stored(&self) -> u64 {
        count(self.folder.path())
    }

    /// Stops; what it and the nginx before it have stored.
    pub fn end(self) -> [TempDir; 2] {
        let front = self.front.end();
        drop(self.gunicorn);
        [front, self.folder]
    }
}

async fn answers(port: u16) {
    eventually("a server to listen", async || tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()).await;
}

fn count(folder: &Path) -> u64 {
    std::fs::read_dir(folder).map_or(0, |entries| entries.count() as u64)
}
