//! Debian's nginx with the repository's own server configuration.

use std::path::Path;
use std::process::Child;

use rustix::process::Signal;

use super::process::{find_program, guarded, kill_with_children, signal, start};
use super::{eventually, free_port};

pub struct Nginx {
    pub url: String,
    port: u16,
    /// None while it is killed.
    process: Option<Child>,
    folder: tempfile::TempDir,
}

impl Nginx {
    /// In front of `replicas`, given as host:port.
    pub async fn start(replicas: &[String]) -> Nginx {
        let port = free_port();
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        let servers: String = replicas.iter().map(|replica| format!("server {replica} max_fails=0; ")).collect();
        let server_config = Path::new(env!("CARGO_MANIFEST_DIR")).join("nginx/forebay.conf");
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .iter()
            .map(|kind| format!("    {kind}_temp_path {};\n", at(kind)))
            .collect();
        let main = format!(
            "user root;\nworker_processes auto;\ndaemon off;\npid {};\nerror_log {} warn;\nevents {{ worker_connections 4096; }}\n\
             http {{\n{temporary}    upstream forebay_ingest {{ {servers} keepalive 64; }}\n    include {};\n    access_log {} forebay buffer=64k flush=1s;\n}}\n",
            at("pid"),
            at("error.log"),
            server_config.display(),
            at("access.log"),
        );
        let main = if super::process::is_root() { main } else { main.replace("user root;\n", "") };
        std::fs::write(at("nginx.conf"), main).unwrap();
        std::fs::write(at("listen.conf"), format!("listen 127.0.0.1:{port};\n")).unwrap();
        let mut nginx = Nginx { url: format!("http://127.0.0.1:{port}"), port, process: None, folder };
        nginx.start_again().await;
        nginx
    }

    /// Starts it after [`Nginx::kill`], at the same port, and waits until it listens.
    pub async fn start_again(&mut self) {
        let at = |name: &str| self.folder.path().join(name).display().to_string();
        // killed outright, the master would leave its workers behind
        let mut command = guarded(find_program("nginx", &[]), "TERM", None);
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        command.arg("-e").arg(at("error.log")).arg("-c").arg(at("nginx.conf"));
        let process = self.process.insert(start(command));
        eventually("nginx to listen", async || {
            if let Ok(Some(status)) = process.try_wait() {
                panic!("nginx ended with {status}");
            }
            tokio::net::TcpStream::connect(("127.0.0.1", self.port)).await.ok()
        })
        .await;
    }

    /// Ends it and its workers outright.
    pub fn kill(&mut self) {
        if let Some(master) = self.process.take() {
            kill_with_children(master);
        }
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        if let Some(mut master) = self.process.take() {
            signal(master.id(), Signal::TERM);
            let _ = master.wait();
        }
    }
}
