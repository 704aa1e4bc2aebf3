//! Load from outside: wrk, a program of its own, that times what it sends.

use std::path::PathBuf;
use std::process::Stdio;

use forebay::fleet::photo::Camera;
use serde::Deserialize;
use tempfile::TempDir;

use crate::support::json_upload;
use crate::support::process::{find_program, guarded};

/// The size of a photo.
pub const PHOTO_BYTES: usize = 250_000;
/// Distinct photos, sent in turn.
const PHOTOS: usize = 16;

/// The bodies that are sent, as files that wrk reads.
pub struct Bodies {
    pub json: Vec<PathBuf>,
    pub raw: Vec<PathBuf>,
    _folder: TempDir,
}

impl Bodies {
    pub fn new() -> Bodies {
        let folder = tempfile::tempdir().expect("a folder for the bodies");
        let camera = Camera::new(PHOTO_BYTES).expect("a camera");
        let (mut json, mut raw) = (Vec::new(), Vec::new());
        for number in 0..PHOTOS {
            let photo = camera.photo(number, &format!("bench {number}"));
            let body = json_upload(&format!("cam-{number:04}"), None, &photo).to_string();
            for (files, name, bytes) in [(&mut json, "json", body.as_bytes()), (&mut raw, "jpg", &photo[..])] {
                let path = folder.path().join(format!("{number}.{name}"));
                std::fs::write(&path, bytes).expect("a body is written");
                files.push(path);
            }
        }
        Bodies { json, raw, _folder: folder }
    }
}

/// What wrk saw.
#[derive(Debug, Clone, Deserialize)]
pub struct Seen {
    /// Answers of any kind.
    answers: u64,
    /// Answers other than 2xx and 3xx.
    pub refused: u64,
    /// Connections and requests that came to nothing.
    pub broken: u64,
    microseconds: u64,
    /// The time to an answer, in microseconds.
    pub p50: u64,
    pub p99: u64,
}

impl Seen {
    /// Good answers.
    pub fn uploads(&self) -> u64 {
        self.answers - self.refused
    }

    pub fn per_second(&self) -> f64 {
        self.uploads() as f64 * 1e6 / self.microseconds as f64
    }
}

/// How much is sent.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub connections: u32,
    pub seconds: u64,
    /// Of all connections together, spread at random; as fast as they can where none is given.
    pub per_second: Option<f64>,
}

/// Sends `files`, one after another and from the start again.
pub async fn send(method: &str, url: &str, kind: &str, files: &[PathBuf], load: Load) -> Seen {
    let (base, path) = url.split_at(url.find("://").map_or(0, |at| at + 3));
    let (host, path) = path.split_once('/').map_or((path, String::new()), |(host, path)| (host, path.to_owned()));
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/load/send.lua");
    let pause_ms = load.per_second.map_or(0.0, |rate| f64::from(load.connections) * 1000.0 / rate);
    let mut wrk = guarded(find_program("wrk", &[]), "KILL", None);
    wrk.args(["--threads", "1", "--timeout", "20s", "--connections", &load.connections.to_string()]);
    wrk.args(["--duration", &format!("{}s", load.seconds), "--script", script, &format!("{base}{host}"), "--"]);
    wrk.args([method, &format!("/{path}"), kind, &pause_ms.to_string()]).args(files);
    wrk.stdin(Stdio::null()).stderr(Stdio::inherit());
    let done = tokio::task::spawn_blocking(move || wrk.output()).await.expect("wrk ends").expect("wrk runs");
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    let seen = said.lines().rev().find(|line| line.starts_with('{'));
    let seen = seen.unwrap_or_else(|| panic!("wrk said nothing of what it saw: {said}"));
    serde_json::from_str(seen).expect("one line of JSON")
}
