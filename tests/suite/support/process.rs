//! Child processes that never outlive the test run, and their output.
//!
//! The kernel ends a child when the *thread* that started it ends, so all are started by one thread that lives on.

use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock, mpsc};

type Job = Box<dyn FnOnce() + Send>;

fn starter() -> &'static Mutex<mpsc::Sender<Job>> {
    static STARTER: OnceLock<Mutex<mpsc::Sender<Job>>> = OnceLock::new();
    STARTER.get_or_init(|| {
        let (jobs, receiver) = mpsc::channel::<Job>();
        std::thread::spawn(move || receiver.iter().for_each(|job| job()));
        Mutex::new(jobs)
    })
}

/// `program` behind a wrapper that gives it `signal` when the tests end, and runs it as another user than root if asked.
pub fn guarded(program: impl AsRef<std::ffi::OsStr>, signal: &str, user: Option<&str>) -> Command {
    let mut command = Command::new("setpriv");
    command.arg("--pdeathsig").arg(signal);
    if let (Some(user), true) = (user, is_root()) {
        command.args([format!("--reuid={user}"), format!("--regid={user}"), "--clear-groups".to_owned()]);
    }
    command.arg("--").arg(program).stdin(Stdio::null());
    command
}

/// Starts a command that was made by [`guarded`].
pub fn start(mut command: Command) -> Child {
    let (sender, receiver) = mpsc::channel();
    let what = format!("{command:?}");
    starter().lock().unwrap().send(Box::new(move || drop(sender.send(command.spawn())))).unwrap();
    receiver.recv().unwrap().unwrap_or_else(|error| panic!("cannot start {what}: {error}"))
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Where `name` is, among `places` and on the PATH.
pub fn find_program(name: &str, places: &[&str]) -> std::path::PathBuf {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut candidates: Vec<_> = places.iter().map(|place| std::path::Path::new(place).join(name)).collect();
    candidates.extend(path.split(':').chain(["/usr/sbin"]).map(|folder| std::path::Path::new(folder).join(name)));
    candidates
        .into_iter()
        .find(|candidate| candidate.is_file())
        .unwrap_or_else(|| panic!("{name} is not installed; run tests/install-parts"))
}
