//! The machine and the programs that a bench ran on, and what a process has cost.

use std::process::Command;
use std::time::Duration;

use serde::Serialize;

use crate::support::process::find_program;
use crate::support::program;

/// What a reader must know to make something of the figures.
#[derive(Debug, Serialize)]
pub struct Machine {
    processor: String,
    cores: usize,
    sha_extensions: bool,
    memory_gib: u64,
    kernel: String,
    /// The build that is measured.
    program: String,
    /// Name and version of each program that took part.
    versions: Vec<(String, String)>,
}

impl Machine {
    pub fn here() -> Machine {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let (cpu, memory) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_once(':')).map_or(String::new(), |(_, value)| value.trim().to_owned())
        };
        let tools = concat!(env!("CARGO_MANIFEST_DIR"), "/target/tools");
        let versions = [
            ("forebay", program::path().display().to_string(), "--version"),
            ("nginx", find_program("nginx", &[]).display().to_string(), "-v"),
            ("wrk", find_program("wrk", &[]).display().to_string(), "-v"),
            ("rclone", find_program("rclone", &[&format!("{tools}/rclone/bin")]).display().to_string(), "version"),
            ("SeaweedFS", find_program("weed", &[&format!("{tools}/seaweedfs/bin")]).display().to_string(), "version"),
            ("Postgres", "psql".to_owned(), "--version"),
            ("Python", "python3".to_owned(), "--version"),
        ];
        Machine {
            processor: field(&cpu, "model name"),
            cores: std::thread::available_parallelism().map_or(1, |cores| cores.get()),
            sha_extensions: field(&cpu, "flags").split(' ').any(|flag| flag == "sha_ni"),
            memory_gib: field(&memory, "MemTotal")
                .split(' ')
                .next()
                .and_then(|kib| kib.parse::<u64>().ok())
                .unwrap_or(0)
                >> 20,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            program: program::path().display().to_string(),
            versions: versions.map(|(name, program, ask)| (name.to_owned(), version(&program, ask))).to_vec(),
        }
    }

    /// One line for each thing worth knowing.
    pub fn lines(&self) -> Vec<String> {
        let sha = if self.sha_extensions { "with" } else { "without" };
        let mut lines = vec![
            format!("{} cores of {}, {sha} SHA extensions, {} GiB", self.cores, self.processor, self.memory_gib),
            format!("Linux {}", self.kernel),
            format!("measured: {}", self.program),
        ];
        lines.extend(self.versions.iter().map(|(name, version)| format!("{name}: {version}")));
        lines
    }
}

fn version(program: &str, ask: &str) -> String {
    let Ok(told) = Command::new(program).arg(ask).output() else { return "?".to_owned() };
    let told = [told.stdout, told.stderr].concat();
    String::from_utf8_lossy(&told).lines().find(|line| !line.trim().is_empty()).unwrap_or("?").trim().to_owned()
}

/// Processor time that a process and all that it started have taken so far, which is known until it is waited for. Of children
/// that have ended it is known to 10 ms only, and may be less than while they lived.
pub fn cpu(pid: u32) -> Duration {
    of_all(pid).expect("the process that is measured is there")
}

/// None of a process that is gone.
fn of_all(pid: u32) -> Option<Duration> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let theirs = children.split_whitespace().filter_map(|pid| of_all(pid.parse().ok()?)).sum::<Duration>();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit_once(") ").map_or("", |(_, fields)| fields).split(' ').collect();
    let ticks: u64 = fields.iter().skip(13).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    Some(clock(pid)? + theirs + Duration::from_millis(ticks * 10))
}

/// The clock of the processor time of one process, if there is one.
fn clock(pid: u32) -> Option<Duration> {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let mut clock = 0;
    // SAFETY: both are given a place of their own for what they answer.
    let answered = unsafe {
        libc::clock_getcpuclockid(pid as libc::pid_t, &mut clock) == 0 && libc::clock_gettime(clock, &mut now) == 0
    };
    answered.then(|| Duration::new(now.tv_sec as u64, now.tv_nsec as u32))
}

/// Memory that a process holds now (`VmRSS`) and has held at most (`VmHWM`), in bytes.
pub fn memory(pid: u32) -> (u64, u64) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let bytes = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    (bytes("VmRSS:"), bytes("VmHWM:"))
}
