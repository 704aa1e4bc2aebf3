//! Torture: devices with a ledger of their own send to the whole appliance while its processes are killed, its Postgres dies,
//! its S3 misbehaves or its disk loses power, for as long as asked; then everything heals, and the ledger is held against
//! every byte.
//!
//! `make torture FOR=10m`, and as part of the tests for some seconds. `WHAT` picks what goes wrong, see [`What`]; `DEVICES`,
//! `PER_MINUTE` and `PHOTO_BYTES` make another fleet. Exits 0 only if nothing was lost, doubled or altered, and every process
//! that was killed was ready again in time.

// the parts that only the suite needs
#[allow(dead_code)]
#[path = "../suite/support/mod.rs"]
mod support;

mod appliance;
mod cut_power;
mod findings;

use std::process::ExitCode;
use std::time::Duration;

use forebay::units::parse_span;

use crate::support::fleet::Fleet;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// Any process is killed every one to five seconds, Postgres among them, and S3 fails 30% of all requests.
    Everything,
    /// Postgres is killed again and again, and nothing else: no device may notice.
    Postgres,
    /// S3 fails 30% of all requests, and nothing else.
    S3,
    /// The spool's disk loses its power again and again, on ext4 and on XFS. Needs root.
    Power,
}

impl What {
    fn read(text: &str) -> Result<What, String> {
        match text {
            "everything" => Ok(What::Everything),
            "postgres" => Ok(What::Postgres),
            "s3" => Ok(What::S3),
            "power" => Ok(What::Power),
            other => Err(format!("WHAT is everything, postgres, s3 or power, not {other:?}")),
        }
    }
}

/// What was asked for.
struct Plan {
    what: What,
    duration: Duration,
    devices: u32,
    per_minute: u32,
    photo_bytes: u32,
}

impl Plan {
    fn read() -> Result<Plan, String> {
        let asked = |name: &str, default: &str| {
            std::env::var(name).ok().filter(|text| !text.is_empty()).unwrap_or_else(|| default.to_owned())
        };
        let number = |name: &str, default: &str| {
            let text = asked(name, default);
            text.parse::<u32>().map_err(|_| format!("{name} is a number, not {text:?}"))
        };
        let span = asked("FOR", "20s");
        Ok(Plan {
            what: What::read(&asked("WHAT", "everything"))?,
            duration: parse_span(&span).map_err(|error| format!("FOR: {error}"))?,
            devices: number("DEVICES", "50")?,
            per_minute: number("PER_MINUTE", "30")?,
            photo_bytes: number("PHOTO_BYTES", "50000")?,
        })
    }

    fn fleet(&self, url: &str, folder: &std::path::Path) -> Fleet {
        Fleet {
            url: url.to_owned(),
            devices: self.devices,
            per_minute: self.per_minute,
            seconds: self.duration.as_secs() as u32,
            photo_bytes: self.photo_bytes,
            ledger: folder.join("devices.ledger"),
        }
    }
}

fn main() -> ExitCode {
    // as one test among others: `cargo test <name>` and `--list` ask for it by name
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        println!("torture: test");
        return ExitCode::SUCCESS;
    }
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    if !filters.is_empty() && !filters.iter().any(|filter| "torture".contains(filter.as_str())) {
        return ExitCode::SUCCESS;
    }
    let plan = match Plan::read() {
        Ok(plan) => plan,
        Err(error) => {
            eprintln!("torture: {error}");
            return ExitCode::FAILURE;
        }
    };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let sound = runtime.block_on(async {
        match plan.what {
            What::Power => cut_power::run(&plan).await,
            _ => appliance::run(&plan).await,
        }
    });
    // a fleet or a proxy that still waits must not keep the process
    runtime.shutdown_timeout(Duration::from_secs(1));
    if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
