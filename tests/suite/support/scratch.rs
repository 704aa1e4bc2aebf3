//! Folders of servers that live as long as the test run, and so are dropped by nobody.
//!
//! Always: they are removed when the run ends, unless what removes them is ended with it, as with a container.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// A new folder for a server of this kind.
pub fn folder(kind: &str) -> PathBuf {
    static FOLDERS: AtomicU32 = AtomicU32::new(0);
    static CLEANER: OnceLock<Child> = OnceLock::new();
    static OURS: OnceLock<String> = OnceLock::new();
    let ours = OURS.get_or_init(|| format!("forebay-test-{:08x}-", rand::random::<u32>()));
    CLEANER.get_or_init(|| cleaner(&std::env::temp_dir().join(ours)));
    let number = FOLDERS.fetch_add(1, Ordering::Relaxed);
    let folder = std::env::temp_dir().join(format!("{ours}{kind}-{number}"));
    std::fs::create_dir(&folder).unwrap();
    folder
}

/// Waits for the end of this process, which closes the pipe that it reads, and removes all folders that begin with `ours`.
/// Servers end at the same time and may still write, hence the tries.
fn cleaner(ours: &std::path::Path) -> Child {
    const SCRIPT: &str = r#"trap '' INT TERM HUP
        cat
        for try in 1 2 3 4 5 6 7 8 9 10; do rm -rf "$0"* 2>/dev/null; sleep 0.5; done"#;
    Command::new("sh")
        .args(["-c", SCRIPT])
        .arg(ours)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}
