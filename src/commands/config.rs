//! `forebay config`: every setting, its value and where that comes from; secrets redacted.

use std::process::ExitCode;

use serde::Serialize;

use super::{Outcome, SettingFlags};
use crate::allowance::{Control, Uplink};
use crate::config::{Config, ConfigErrors};
use crate::units::UnixMs;

#[derive(clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    flags: SettingFlags,
}

#[derive(Serialize)]
struct Shown {
    name: &'static str,
    value: String,
    origin: String,
}

pub fn run(args: Args) -> Outcome {
    let source = args.flags.source();
    let (values, _) = source.values();
    let shown: Vec<Shown> = values
        .iter()
        .map(|value| Shown { name: value.setting.variable, value: value.shown(), origin: value.origin.to_string() })
        .collect();
    if args.json {
        say!("{}", serde_json::to_string_pretty(&shown).unwrap_or_default());
    } else {
        let width = shown.iter().map(|s| s.value.len()).max().unwrap_or(0).min(60);
        for Shown { name, value, origin } in &shown {
            say!("{name:<26} {value:<width$}  {origin}");
        }
    }
    match Config::load(&source) {
        Ok(config) => {
            if !args.json {
                uplink_in_words(&config.uplink);
                if config.bucket.is_none() {
                    say!("there is no FOREBAY_S3_BUCKET: what sends or looks at photos in S3 will not start");
                }
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(ConfigErrors(errors)) => Err(ConfigErrors(errors).into()),
    }
}

/// What the settings come to: the week as people read it, and what it allows now.
fn uplink_in_words(uplink: &Uplink) {
    let now = UnixMs::now();
    let in_force = uplink.in_force(now, &Control::default());
    let local = jiff::Zoned::new(now.timestamp(), uplink.zone.rules.clone());
    say!("\nthe site's time zone is {}; there it is {}", uplink.zone.name, local.strftime("%a %Y-%m-%d %H:%M"));
    if let Some(timetable) = &uplink.timetable {
        say!("the week:");
        timetable.week().iter().for_each(|line| say!("  {line}"));
    }
    let allowance = in_force.allowance.map(|rate| rate.to_string()).unwrap_or_default();
    say!("the drain may use {allowance} of the uplink now: {}", in_force.rule);
}
