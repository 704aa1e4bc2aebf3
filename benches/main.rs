//! Forebay beside its best raw alternatives, in one run on one machine: contestants take turns, several rounds of each, medians
//! and spread, and the losing cases stay in.
//!
//! `make bench`; `WHAT` picks a part, see [`What`]; `ROUNDS` and `FOR` say how often and how long, `UPLOADS` how large a
//! backlog, and `PROGRAM` which build of the program is measured; `make bench` names the one that is released, and if none is
//! named it is the tests' own. Load comes from outside, real HTTP from a program of its own. Nothing is switched off for it, and
//! `verify` must find nothing after it. Writes `results.json` and `page.html` into `target/bench`.

// the parts that only the suite needs
#[allow(dead_code)]
#[path = "../tests/suite/support/mod.rs"]
mod support;

mod backlog;
mod drain;
mod footprint;
mod latency;
mod leftovers;
mod load;
mod machine;
mod peers;
mod report;
mod throughput;
mod training;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use forebay::units::{UnixMs, parse_span};

use crate::leftovers::Leftovers;
use crate::load::Bodies;
use crate::machine::Machine;
use crate::report::Report;
use crate::support::program::run;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    All,
    /// Uploads a second, taken in.
    Throughput,
    /// Objects a second, let out, and what that costs.
    Drain,
    /// Memory and processor time: idle, at the site's rate, with slow devices.
    Footprint,
    /// The time to an acknowledgement, beside what the disk alone takes.
    Latency,
    /// Claims, lists, start and status while millions of uploads wait.
    Backlog,
    /// Measures nothing: puts the program under load, so that it counts what it does. Not part of all.
    Training,
}

impl What {
    fn read(text: &str) -> Result<What, String> {
        match text {
            "all" => Ok(What::All),
            "throughput" => Ok(What::Throughput),
            "drain" => Ok(What::Drain),
            "footprint" => Ok(What::Footprint),
            "latency" => Ok(What::Latency),
            "backlog" => Ok(What::Backlog),
            "training" => Ok(What::Training),
            other => {
                Err(format!("WHAT is all, throughput, drain, footprint, latency, backlog or training, not {other:?}"))
            }
        }
    }

    fn has(self, part: What) -> bool {
        self == part || self == What::All
    }
}

/// What was asked for.
struct Plan {
    what: What,
    rounds: u32,
    /// Of load, in each round; where it matters how long a load goes on, some times as many.
    seconds: u64,
    /// How many are queued where many are.
    uploads: u64,
}

impl Plan {
    fn read() -> Result<Plan, String> {
        let asked = |name: &str, default: &str| {
            std::env::var(name).ok().filter(|text| !text.is_empty()).unwrap_or_else(|| default.to_owned())
        };
        let rounds = asked("ROUNDS", "5");
        let span = asked("FOR", "8s");
        // a bare number is seconds
        let span = if span.parse::<u32>().is_ok() { format!("{span}s") } else { span };
        let uploads = asked("UPLOADS", "10000000");
        Ok(Plan {
            uploads: uploads.parse().map_err(|_| format!("UPLOADS is a number, not {uploads:?}"))?,
            what: What::read(&asked("WHAT", "all"))?,
            rounds: rounds.parse::<u8>().map_err(|_| format!("ROUNDS is a number up to 255, not {rounds:?}"))?.into(),
            seconds: match parse_span(&span).map_err(|error| format!("FOR: {error}"))?.as_secs() {
                0 => 1,
                seconds @ ..=3600 => seconds,
                _ => return Err(format!("FOR is an hour at most, not {span}")),
            },
        })
    }

    /// A line of progress.
    fn tell(&self, round: u32, what: &str) {
        println!("round {} of {}: {what}", round + 1, self.rounds);
    }
}

/// What a second of load may bring to the disk at most, on the machines that were seen: as nginx takes it.
const STORED_PER_SECOND: u64 = 1_100_000_000;

/// An error where the disk has less than what throughput and the way out may store at once: whoever has to refuse a photo is not
/// measured.
fn room_for(plan: &Plan) -> std::io::Result<()> {
    let folder = std::env::temp_dir();
    let disk = rustix::fs::statvfs(&folder)?;
    let free = disk.f_bavail * disk.f_frsize;
    let of = |part, bytes| if plan.what.has(part) { bytes } else { 0 };
    let round = of(What::Throughput, throughput::seconds(plan) * STORED_PER_SECOND);
    let needed = round.max(of(What::Drain, drain::stored_bytes(plan)));
    match free < needed {
        false => Ok(()),
        true => Err(std::io::Error::other(format!(
            "{} has {} GB free, and what is measured may store {} GB; set TMPDIR to a folder with more, on the disk that is to be \
             measured, or FOR or ROUNDS to less",
            folder.display(),
            free / 1_000_000_000,
            needed / 1_000_000_000
        ))),
    }
}

/// Whose turn it is.
#[derive(Debug, Clone, Copy)]
enum Turn {
    Ours,
    Theirs,
}

/// Both, and in every other round the other one begins: what the first leaves in memory and on the disk, the second finds.
fn turns(round: u32) -> [Turn; 2] {
    match round % 2 {
        0 => [Turn::Theirs, Turn::Ours],
        _ => [Turn::Ours, Turn::Theirs],
    }
}

/// Processor time for one of `uploads`, in milliseconds.
fn cpu_per(cpu: Duration, uploads: u64) -> f64 {
    cpu.as_secs_f64() * 1000.0 / uploads.max(1) as f64
}

/// The `quantile` (0 to 1) of what was seen.
fn quantile(seen: &[f64], quantile: f64) -> f64 {
    let mut sorted = seen.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = ((sorted.len() as f64 * quantile).ceil() as usize).saturating_sub(1);
    sorted.get(place).copied().unwrap_or(f64::NAN)
}

/// Lets the disk finish what the last contestant has left to it.
async fn settle() {
    let _ = tokio::task::spawn_blocking(rustix::fs::sync).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
}

/// Makes the queue of these settings.
async fn migrate(settings: &[(String, String)], folder: &Path) {
    let done = run(&["migrate"], settings, folder).await;
    assert!(done.status.success(), "the queue is made: {}", String::from_utf8_lossy(&done.stderr));
}

/// Holds queue, spool and bucket against each other, which must agree; what `verify` says.
async fn verified(settings: &[(String, String)], data: &Path) -> serde_json::Value {
    let data = data.display().to_string();
    let done = run(&["verify", "--json", "--data-dir", &data], settings, Path::new("/")).await;
    let report: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap_or_default();
    assert!(done.status.success(), "verify finds nothing: {report} {}", String::from_utf8_lossy(&done.stderr));
    report
}

async fn measure(plan: &Plan) -> std::io::Result<()> {
    if plan.what == What::Training {
        training::run_all(&Bodies::new()).await;
        return Ok(());
    }
    room_for(plan)?;
    let mut report = Report { machine: Machine::here(), when: UnixMs::now().to_string(), measured: Vec::new() };
    report.machine.lines().iter().for_each(|line| println!("{line}"));
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench");
    let bodies = Bodies::new();
    let mut leftovers = Leftovers::default();
    // those first that delete no photos or few: who makes files after thousands were deleted may pay for that
    for part in [What::Throughput, What::Latency, What::Footprint, What::Drain, What::Backlog] {
        if !plan.what.has(part) {
            continue;
        }
        match part {
            What::All | What::Training => {}
            What::Throughput => throughput::run_all(plan, &bodies, &mut leftovers, &mut report).await,
            What::Footprint => footprint::run_all(plan, &bodies, &mut leftovers, &mut report).await,
            What::Drain => drain::run_all(plan, &bodies, &mut report).await,
            What::Latency => latency::run_all(plan, &bodies, &mut leftovers, &mut report).await,
            What::Backlog => backlog::run_all(plan, &mut report).await,
        }
        // what is there is kept, whatever becomes of the next
        report.write(&folder)?;
    }
    println!("\nwritten to {}", folder.display());
    Ok(())
}

fn main() -> ExitCode {
    let plan = match Plan::read() {
        Ok(plan) => plan,
        Err(error) => {
            eprintln!("bench: {error}");
            return ExitCode::FAILURE;
        }
    };
    if let Some(program) = std::env::var_os("PROGRAM").filter(|path| !path.is_empty()) {
        // it is run in other folders
        match std::fs::canonicalize(&program) {
            Ok(path) => support::program::run_instead(path),
            Err(error) => {
                eprintln!("bench: PROGRAM is {}: {error}", program.display());
                return ExitCode::FAILURE;
            }
        }
    }
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let done = runtime.block_on(async {
        // whoever is interrupted drops what it has made, and that ends or removes it
        tokio::select! {
            done = measure(&plan) => done,
            _ = tokio::signal::ctrl_c() => Err(std::io::Error::other("interrupted")),
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}
