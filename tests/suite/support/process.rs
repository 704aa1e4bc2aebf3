//! Child processes that never outlive the test run, and their output.
//!
//! The kernel ends a child when the *thread* that started it ends, so all are started by one thread that lives on.

use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock, mpsc};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::PATIENCE;

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

/// `program` guarded as by [`guarded`], in the network namespace that the file at `namespace` is.
pub fn guarded_within(namespace: &std::path::Path, program: impl AsRef<std::ffi::OsStr>, signal: &str) -> Command {
    let mut command = guarded("nsenter", signal, None);
    // it becomes the program, so pid and signal stay
    command.arg(format!("--net={}", namespace.display())).arg("--").arg(program);
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

/// Sends a signal; to one that is gone, none.
pub fn signal(pid: u32, signal: Signal) {
    let _ = kill_process(Pid::from_raw(pid as i32).unwrap(), signal);
}

/// Ends a server and the processes that it started all at once, without a word to any of them.
pub fn kill_with_children(mut server: Child) {
    let pid = server.id();
    // once it stands still it starts no more, and no process of its own tells it of another's end
    signal(pid, Signal::STOP);
    until("a server to stand still", || matches!(state(pid), None | Some('T' | 'Z')));
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let children: Vec<u32> = children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect();
    children.iter().chain([&pid]).for_each(|pid| signal(*pid, Signal::KILL));
    server.wait().unwrap();
    // what they held (ports, memory) is free only when they are gone
    until("a server's processes to be gone", || children.iter().all(|pid| matches!(state(*pid), None | Some('Z'))));
}

/// The state of a process as a letter; none when there is no such process.
fn state(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Waits until `condition` holds. Blocks.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
