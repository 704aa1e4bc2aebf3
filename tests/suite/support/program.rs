//! The real program, as a child process.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, OnceLock};

use forebay::config::Endpoint;
use rustix::process::Signal;

use super::eventually;
use super::process::{guarded, guarded_within, start};

/// Run instead of the program that was built with the tests (that one has the crash points).
static OTHER: OnceLock<PathBuf> = OnceLock::new();

/// Has all that is started from now on be the program at `path`.
#[allow(dead_code)] // only benchmarks do
pub fn run_instead(path: PathBuf) {
    OTHER.set(path).expect("said once");
}

/// The program that is run.
pub fn path() -> &'static Path {
    OTHER.get().map_or(Path::new(env!("CARGO_BIN_EXE_forebay")), PathBuf::as_path)
}

/// A command with nothing of the caller's own settings.
fn clean(mut command: Command) -> Command {
    for (name, _) in std::env::vars() {
        if name.starts_with("FOREBAY_") || name.starts_with("AWS_") || name.starts_with("OTEL_") {
            command.env_remove(name);
        }
    }
    command
}

/// The settings by which the program reaches a bucket.
pub fn s3_settings(endpoint: &Endpoint, bucket: &str) -> Vec<(String, String)> {
    [
        ("AWS_ENDPOINT_URL_S3", endpoint.url.as_str()),
        ("AWS_ACCESS_KEY_ID", &endpoint.access_key),
        ("AWS_SECRET_ACCESS_KEY", &endpoint.secret_key),
        ("AWS_REGION", "us-east-1"),
        ("FOREBAY_S3_BUCKET", bucket),
    ]
    .map(|(name, text)| (name.to_owned(), text.to_owned()))
    .to_vec()
}

/// Runs a command of the program to its end.
pub async fn run(arguments: &[&str], settings: &[(String, String)], folder: &Path) -> Output {
    let mut command = clean(Command::new(path()));
    command.args(arguments).envs(settings.iter().cloned()).current_dir(folder).stdin(Stdio::null());
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

/// A running `serve`, `ingest` or `drain`.
pub struct Program {
    process: Child,
    log: Arc<Mutex<Vec<serde_json::Value>>>,
    /// Where devices send, without a slash at the end.
    pub url: String,
    /// Where the operator looks, without a slash at the end.
    pub console: String,
}

impl Program {
    /// Starts a role on free ports and waits until it is up.
    pub async fn start(role: &str, settings: &[(String, String)], data_dir: &Path) -> Program {
        Program::start_by(guarded(path(), "KILL", None), role, settings, data_dir).await
    }

    /// As [`Program::start`], in a network namespace of its own.
    pub async fn start_within(namespace: &Path, role: &str, settings: &[(String, String)], data_dir: &Path) -> Program {
        let command = guarded_within(namespace, path(), "KILL");
        Program::start_by(command, role, settings, data_dir).await
    }

    async fn start_by(command: Command, role: &str, settings: &[(String, String)], data_dir: &Path) -> Program {
        let mut command = clean(command);
        command
            .arg(role)
            .env("FOREBAY_LISTEN", "127.0.0.1:0")
            .env("FOREBAY_CONSOLE_LISTEN", "127.0.0.1:0")
            .env("FOREBAY_LOG_FORMAT", "json")
            .env("FOREBAY_DATA_DIR", data_dir)
            .envs(settings.iter().cloned())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut process = start(command);
        let log = Arc::new(Mutex::new(Vec::new()));
        let (lines, written) = (BufReader::new(process.stderr.take().unwrap()), log.clone());
        std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                let entry = serde_json::from_str(&line).unwrap_or(serde_json::Value::String(line));
                written.lock().unwrap().push(entry);
            }
        });
        let mut program = Program { process, log, url: String::new(), console: String::new() };
        let up = eventually("the program to be up", async || {
            if let Ok(Some(status)) = program.process.try_wait() {
                panic!("forebay {role} ended with {status}: {:?}", program.log());
            }
            program.log().into_iter().find(|entry| entry["message"] == "forebay is up")
        })
        .await;
        let address = |field: &str| up[field].as_str().unwrap_or("").trim_end_matches('/').to_owned();
        (program.url, program.console) = (address("devices"), address("console"));
        program
    }

    /// Everything it has logged.
    pub fn log(&self) -> Vec<serde_json::Value> {
        self.log.lock().unwrap().clone()
    }

    /// Its host and port for devices.
    pub fn address(&self) -> String {
        self.url.trim_start_matches("http://").to_owned()
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.process.try_wait().unwrap()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        super::process::signal(self.pid(), signal);
    }

    /// Ends it outright, without a word to it.
    pub fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Waits for its end; true when it exited with 0.
    pub async fn ends_well(mut self) -> bool {
        eventually("the program to stop", async || self.process.try_wait().unwrap()).await.success()
    }

    /// Sends SIGTERM and waits for its end; true when it exited with 0.
    pub async fn terminate(self) -> bool {
        self.signal(Signal::TERM);
        self.ends_well().await
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
    }
}
